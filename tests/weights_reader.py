"""What a rank process does with weights it received: run by tests/rollout/test_weights.py."""

import sys
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing  # tensors in shared memory travel through pipes
from reference_attention import reference_logits


def serve(connection: Connection) -> None:
    """Receives weights and ids, then orders until None: "logits", "merge" (the odd projections), "modules" (loaded)."""
    torch.set_num_threads(1)
    weights, ids = connection.recv()
    while (order := connection.recv()) is not None:
        if order == "logits":
            # As a list: a tensor would be one more thing to share.
            connection.send(reference_logits(weights, ids).tolist())
        elif order == "merge":
            weights.merge(1, 2)
            connection.send(None)
        elif order == "modules":
            connection.send([name for name in ("transformers", "peft") if name in sys.modules])
