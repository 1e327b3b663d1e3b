"""Several processes of one machine train as one: who computes what, and how the parts come together."""
