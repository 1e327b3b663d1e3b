"""How much memory of a device is free for the taking, as far as machine and driver say."""

from __future__ import annotations

import torch

from rewardsmith.machine import available_memory


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken without swapping, within the limits of the machine and of the container."""
    if device.type != "cuda":
        return available_memory()
    # To the driver, what torch keeps for its next tensors is in use.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept
