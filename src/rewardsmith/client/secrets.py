"""Secrets for reward functions, such as the key of a judge's API: kept by the server, encrypted (contract 1.7)."""

from __future__ import annotations

import builtins

from rewardsmith import wire
from rewardsmith.client.transport import Transport
from rewardsmith.errors import ConfigError

PATH = "/v2/secrets"


class Secrets:
    """`rs.secrets`. Errors never repeat a value."""

    def __init__(self, transport: Transport) -> None:
        self._http = transport

    def get(self, key: str) -> str:
        """The value."""
        return self._http.call("GET", PATH, wire.SecretValue, body=_named(key)).value

    def create(self, key: str, value: str) -> None:
        """Refused when there is one of that key."""
        self._http.send("POST", PATH, body=_named(key) | _valued(key, value))

    def update(self, key: str, value: str) -> None:
        """Another value; jobs that refer to it get that with their next attempt."""
        self._http.send("PUT", PATH, body=_named(key) | _valued(key, value))

    def delete(self, key: str) -> None:
        """Refused while a job that runs or waits refers to it."""
        self._http.send("DELETE", PATH, body=_named(key))

    def list(self) -> builtins.list[wire.Secret]:
        """By key, without the values."""
        return self._http.get(f"{PATH}/keys", builtins.list[wire.Secret])


def _named(key: object) -> dict[str, str]:
    if not isinstance(key, str) or not key:
        raise ConfigError(f"the key of a secret is a text, not {type(key).__name__}")
    return {"key": key}


def _valued(key: str, value: object) -> dict[str, str]:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"the value of secret {key!r} is a text, not {type(value).__name__}")
    return {"value": value}
