"""What runs inside the sandbox: standard library only. There it is the package `inside`, the only one of ours."""
