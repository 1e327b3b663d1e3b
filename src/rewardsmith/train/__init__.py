"""Training: `loop` is the file to read first; every other module is one noun or verb of it."""
