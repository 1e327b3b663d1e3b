"""`python -m rewardsmith`: the command line without its entry script."""

from rewardsmith.cli import main

main()
