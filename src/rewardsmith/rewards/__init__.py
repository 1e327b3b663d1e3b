"""User code made safe: `pool` is the one door to it, `outcomes` is what comes back through that door."""
