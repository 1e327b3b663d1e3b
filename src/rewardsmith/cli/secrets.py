"""`rewardsmith secrets ...`. A value is never an argument: those are seen by other users and kept in histories."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rewardsmith.cli.output import AsJson, age, connect, print_json, print_table
from rewardsmith.errors import ConfigError

app = typer.Typer(
    name="secrets",
    help="Values for reward functions that nobody is shown.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Key = Annotated[str, typer.Argument(help="Name of the secret, such as JUDGE_API_KEY.", show_default=False)]


@app.command()
def create(key: Key) -> None:
    """Store a secret. The value is asked for, or read from standard input."""
    connect().secrets.create(key, _value(key))
    print(f'Stored secret {key}. A job gets it by GRPOConfig(secrets=["{key}"]).')


@app.command()
def update(key: Key) -> None:
    """Store another value. Jobs that refer to it get that with their next attempt."""
    connect().secrets.update(key, _value(key))
    print(f"Updated secret {key}.")


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the secrets, without their values."""
    found = connect().secrets.list()
    if as_json:
        return print_json(found)
    print_table(
        ["key", "created", "updated"],
        ([secret.key, age(secret.created_at), age(secret.updated_at)] for secret in found),
        empty="No secrets yet. Store one: rewardsmith secrets create KEY",
    )


@app.command()
def get(key: Key) -> None:
    """Print the value."""
    print(connect().secrets.get(key))


@app.command()
def delete(key: Key) -> None:
    """Delete a secret."""
    connect().secrets.delete(key)
    print(f"Deleted secret {key}.")


def _value(key: str) -> str:
    if sys.stdin.isatty():
        return str(typer.prompt(f"Value of {key}", hide_input=True, confirmation_prompt=True))
    value = sys.stdin.read().removesuffix("\n").removesuffix("\r")
    if not value:
        raise ConfigError(f"standard input is empty; write the value of {key} to it, as in: ... secrets create < FILE")
    return value
