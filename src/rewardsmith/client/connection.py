"""The entry of the SDK: one connection to a server and its resources (contract 1.1)."""

from __future__ import annotations

import sys
from typing import Self

from rewardsmith import wire
from rewardsmith.client.adapters import Adapters
from rewardsmith.client.address import find_address
from rewardsmith.client.datasets import Datasets
from rewardsmith.client.jobs import Jobs
from rewardsmith.client.repos import Repos
from rewardsmith.client.revisions import Revisions
from rewardsmith.client.secrets import Secrets
from rewardsmith.client.transport import Transport


class Finetuning:
    """`rs.finetuning`."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs


class Rewardsmith:
    """A connection to a Rewardsmith server.

        rs = Rewardsmith()
        dataset = rs.datasets.from_file("rows.jsonl")
        repo = rs.repos.create(name="countdown", exists_ok=True)
        adapter = rs.adapters.create(config=GRPOConfig(...), dataset=dataset, repo=repo)

    Without arguments it reads REWARDSMITH_BASE_URL and REWARDSMITH_API_TOKEN (or PREDIBASE_GATEWAY and
    PREDIBASE_API_TOKEN), and otherwise uses the server of this machine and the token that it keeps for its owner.
    Raises ConfigError without a token, ServerUnreachable without a server, RequestError when the token is refused.
    `quiet=True` leaves out the line about the connection.
    """

    def __init__(self, api_token: str | None = None, base_url: str | None = None, *, quiet: bool = False) -> None:
        address = find_address(api_token, base_url)
        self._http = Transport(address)
        self.datasets = Datasets(self._http)
        self.repos = Repos(self._http)
        self.finetuning = Finetuning(Jobs(self._http))
        self.adapters = Adapters(self._http, self.finetuning.jobs)
        self.revisions = Revisions(self._http, self.finetuning.jobs)
        self.secrets = Secrets(self._http)
        if address.exposes_token:
            print(f"warning: the API token travels unencrypted to {address.url}; use https://", file=sys.stderr)
        user = self._http.get("/users/current", wire.CurrentUser)
        if not quiet:
            print(f"Connected to Rewardsmith as User(id={user.uuid}, username={user.username})", file=sys.stderr)

    @property
    def base_url(self) -> str:
        return self._http.address.url

    def sandbox(self, *, fresh: bool = False) -> wire.SandboxReport:
        """How the server's machine isolates reward functions; `fresh` attacks a sandbox again, which takes a second."""
        return self._http.get("/v2/sandbox", wire.SandboxReport, {"fresh": fresh} if fresh else None)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Rewardsmith(base_url={self.base_url!r})"
