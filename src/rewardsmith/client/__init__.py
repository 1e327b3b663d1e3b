"""The SDK: `Rewardsmith(...)` with `datasets`, `repos`, `adapters`, `revisions` and `finetuning.jobs`.

connection (read first) -> one module per resource -> transport -> the HTTP API. `stream` yields what happens in a job,
`view` draws it in a terminal.
"""

from rewardsmith.client.connection import Rewardsmith

__all__ = ["Rewardsmith"]
