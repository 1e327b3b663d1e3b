"""What a sandbox may use (sandbox design 4.10). Data only: `build` hands it on, the kernel and the pool enforce it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Seconds are wall time. `memory_bytes` is the address space of one executor, `sandbox_bytes` the memory of the
    whole sandbox, which only a cgroup can bound (tier S3); `output_bytes` is what one call may print, `file_bytes` the
    size of one file, `processes` counts threads too.
    """

    call_seconds: float = 5.0
    load_seconds: float = 120.0
    memory_bytes: int = 2 * 2**30
    sandbox_bytes: int = 4 * 2**30
    output_bytes: int = 2**20
    file_bytes: int = 16 * 2**20
    tmp_bytes: int = 64 * 2**20
    shm_bytes: int = 64 * 2**20
    open_files: int = 256
    processes: int = 64
