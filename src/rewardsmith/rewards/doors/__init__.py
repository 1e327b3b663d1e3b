"""Doors in: reward functions that were written for another trainer, as RewardFunctions whose text travels.

`from_trl`, `from_verl` and `from_verifiers` take functions, `from_openai_grader` takes JSON. Each makes one text that
stands alone: the function with what it leans on, then one call of it. What cannot be carried over is refused by name.
Nothing of the user's is run here.
"""

from rewardsmith.rewards.doors.openai_grader import from_openai_grader
from rewardsmith.rewards.doors.trl import from_trl
from rewardsmith.rewards.doors.verifiers import from_verifiers
from rewardsmith.rewards.doors.verl import from_verl

__all__ = ["from_openai_grader", "from_trl", "from_verifiers", "from_verl"]
