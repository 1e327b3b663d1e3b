"""The sandbox seen from outside: `tiers` names what it can stop, `probe` proves it, `build` and `cgroup` make one.

Nothing here runs user code, and nothing here opens a path that a sandbox can write to. What runs inside is `inside`.
"""
