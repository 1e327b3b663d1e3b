"""Prompts in, completions out: token ids and log-probs as sampled, never encoded again. Knows nothing of rewards."""
