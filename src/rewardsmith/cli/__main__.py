"""`python -m rewardsmith.cli`: the same as the command `rewardsmith`."""

from rewardsmith.cli import main

main()
