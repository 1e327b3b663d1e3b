"""Commands that run something on this machine: serve, dispatcher, demo, doctor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from rewardsmith.cli.output import AsJson, print_json
from rewardsmith.client.address import normalised
from rewardsmith.doctor import INSTALL_SERVER, examine, show
from rewardsmith.errors import ConfigError
from rewardsmith.home import DEFAULT_PORT, ServerConfig, default_base_url, default_home
from rewardsmith.reward_config import checked_endpoint
from rewardsmith.rewards.sandbox import tiers

Home = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the database, artifacts and owner token. [default: REWARDSMITH_HOME, else ~/.rewardsmith]"
    ),
]


def add_to(app: typer.Typer) -> None:
    for command in (serve, dispatcher, demo, doctor):
        app.command()(command)


def serve(
    home: Home = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = DEFAULT_PORT,
    no_dispatcher: Annotated[
        bool, typer.Option("--no-dispatcher", help="Serve only; jobs wait for `rewardsmith dispatcher`.")
    ] = False,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Let --host be an address that other machines reach.")
    ] = False,
    private_endpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST:PORT",
            help="An address of this machine or a private network that reward functions may ask for. Repeatable.",
            show_default=False,
        ),
    ] = None,
    min_sandbox: Annotated[
        str | None,
        typer.Option(metavar="TIER", help="Lowest sandbox tier for reward functions: S1, S1w, S2 or S3. [default: S1]"),
    ] = None,
    unsafe_rewards: Annotated[
        bool, typer.Option("--unsafe-rewards", help="Run reward functions even where nothing keeps them in.")
    ] = False,
) -> None:
    """Run the server: the API, and the dispatcher that starts jobs."""
    with server_part():
        from rewardsmith.server import serve as server

    _set_policy(min_sandbox, unsafe_rewards)
    config = ServerConfig(home=_home(home), host=host, port=port, private_endpoints=_endpoints(private_endpoint or []))
    server.serve(config, dispatcher=not no_dispatcher, allow_remote=allow_remote)


def dispatcher(
    home: Home = None,
    base_url: Annotated[
        str | None,
        typer.Option(help="The server that jobs report to. [default: REWARDSMITH_BASE_URL, else this machine]"),
    ] = None,
) -> None:
    """Start and watch over jobs, beside a server with the same home."""
    with server_part():
        from rewardsmith.server import serve as server

    server.dispatch(ServerConfig(home=_home(home)), normalised(base_url or default_base_url()))


def demo(
    exit_when_done: Annotated[bool, typer.Option("--exit", help="End when the result is shown.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
) -> None:
    """Train the built-in model on puzzles; show what it learned."""
    from rewardsmith.demo import run

    run.run(seed=seed, exit_when_done=exit_when_done, json_file=json_file)


def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has for training, and what is missing."""
    report = examine()
    if as_json:
        print_json(report)
    else:
        show(report)
    raise typer.Exit(0 if report.can_train else 1)


@contextmanager
def server_part() -> Iterator[None]:
    """Where the packages of the server are imported: without them there is the SDK alone."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("rewardsmith"):
            raise
        raise ConfigError(f"this needs the server part: {INSTALL_SERVER} ({error.name} is missing)") from error


def _set_policy(min_sandbox: str | None, unsafe_rewards: bool) -> None:
    """For this process and the jobs it starts."""
    if min_sandbox is not None:
        os.environ[tiers.MINIMUM_VARIABLE] = min_sandbox
    if unsafe_rewards:
        os.environ[tiers.UNSAFE_VARIABLE] = "1"
    if tiers.policy()[1]:
        warning = "UNSAFE: reward functions run even where no sandbox keeps them in; they can read what this user can."
        Console(stderr=True).print(Text(warning, "bold red"))


def _endpoints(given: Sequence[str]) -> tuple[str, ...]:
    try:
        return tuple(checked_endpoint(text) for text in given)
    except ValueError as error:
        raise ConfigError(f"--private-endpoint: {error}") from None


def _home(given: Path | None) -> Path:
    return given.expanduser().absolute() if given else default_home()
