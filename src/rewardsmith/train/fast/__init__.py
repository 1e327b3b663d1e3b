"""The fast update: packed tokens, each prompt computed once, no gradient but the adapter's, a budget for memory."""
