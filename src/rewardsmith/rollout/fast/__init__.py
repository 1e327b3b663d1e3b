"""The fast engine: continuous batching over a paged cache, with native kernels where they can be had."""
