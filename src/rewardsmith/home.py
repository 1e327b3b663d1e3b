"""Where a server keeps its things, how it is reached, and what it allows: paths, addresses, limits. Reads no file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

DEFAULT_PORT = 8421


@dataclass(frozen=True)
class ServerConfig:
    """Where a server keeps its things and how it may be reached. `home` holds the database, artifacts and token.

    `private_endpoints`, `host:port` each, may be used by reward functions that ask for them although they are addresses
    of this machine or of a private network.
    """

    home: Path
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    max_body_bytes: int = 16 * 2**20
    max_dataset_bytes: int = 100 * 2**20
    lease_seconds: float = 60.0
    max_attempts: int = 3
    private_endpoints: tuple[str, ...] = ()

    @property
    def database_url(self) -> str:
        return f"sqlite:///{quote(str(self.home / 'rewardsmith.sqlite'))}"

    @property
    def artifacts_url(self) -> str:
        return (self.home / "artifacts").as_uri()

    @property
    def token_file(self) -> Path:
        return token_file(self.home)

    @property
    def key_file(self) -> Path:
        """The key of the stored secrets; mode 0600. A backup of the database is of no use for them without it."""
        return self.home / "secrets.key"


def default_home() -> Path:
    return Path(os.environ.get("REWARDSMITH_HOME") or "~/.rewardsmith").expanduser().absolute()


def token_file(home: Path) -> Path:
    """The owner token that the server makes at its first start; mode 0600."""
    return home / "owner-token"


def default_base_url() -> str:
    """Address of the server: ours first, then the original's variable (contract 1.1)."""
    url = os.environ.get("REWARDSMITH_BASE_URL") or os.environ.get("PREDIBASE_GATEWAY")
    return (url or f"http://127.0.0.1:{DEFAULT_PORT}").rstrip("/").removesuffix("/v1").removesuffix("/v2")
