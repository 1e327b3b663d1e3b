"""The command line: a thin shell over the SDK and the server, by the same words.

One module per group of commands. `output` prints, `job_config` reads the config of a job from files and options.
What the SDK can say becomes one line and exit code 1; REWARDSMITH_TRACEBACK=1 shows where it came from.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from rewardsmith.cli import (
    adapters,
    datasets,
    estimate,
    jobs,
    logs,
    processes,
    repos,
    revisions,
    rewards,
    sandbox,
    secrets,
)
from rewardsmith.cli.output import print_error


def _print_version(asked: bool) -> None:
    if asked:
        print(f"rewardsmith {version('rewardsmith')}")
        raise typer.Exit


app = typer.Typer(
    name="rewardsmith",
    help="Reinforcement fine-tuning that you run yourself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


processes.add_to(app)
app.command()(estimate.estimate)
app.command()(logs.logs)
app.command()(sandbox.sandbox)
for group in (datasets, repos, adapters, jobs, revisions, rewards, secrets):
    app.add_typer(group.app)


def main() -> None:
    # The boundary of the process: whatever was not foreseen ends here too, as one line.
    try:
        app(prog_name="rewardsmith")
    except Exception as error:
        if os.environ.get("REWARDSMITH_TRACEBACK") == "1":
            raise
        print_error(error)
        sys.exit(1)
