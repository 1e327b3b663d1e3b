"""Whether a model and a config fit this machine, and how long a step will take, before anything is trained."""
