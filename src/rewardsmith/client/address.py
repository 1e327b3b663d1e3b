"""Where the server is and which token opens it (contract 1.1).

Address: argument, REWARDSMITH_BASE_URL, PREDIBASE_GATEWAY, then this machine. Token: argument, REWARDSMITH_API_TOKEN,
PREDIBASE_API_TOKEN, then the owner token that a server keeps in REWARDSMITH_HOME; that one is the key of a server on
this machine and goes nowhere else. Nothing here talks to the network.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from rewardsmith.errors import ConfigError
from rewardsmith.home import default_base_url, default_home, token_file

TOKEN_VARIABLES = ("REWARDSMITH_API_TOKEN", "PREDIBASE_API_TOKEN")


@dataclass(frozen=True)
class Address:
    """`url` has a scheme and no trailing slash; `token_origin` says in words where the token was found."""

    url: str
    token: str = field(repr=False)
    token_origin: str

    @property
    def is_loopback(self) -> bool:
        return _is_loopback(self.url)

    @property
    def exposes_token(self) -> bool:
        """The token would travel unencrypted over a network."""
        return self.url.startswith("http://") and not self.is_loopback


def find_address(api_token: str | None = None, base_url: str | None = None) -> Address:
    """Raises ConfigError for an address that is none, and when no token is found."""
    url = normalised(base_url or default_base_url())
    token, origin = _find_token(api_token, url)
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"the API token of {origin} has characters that no token has; copy it again")
    return Address(url, token, origin)


def _find_token(api_token: str | None, url: str) -> tuple[str, str]:
    """The token and where it was found."""
    candidates = [("the argument api_token", api_token)]
    candidates += [(f"the environment variable {name}", os.environ.get(name)) for name in TOKEN_VARIABLES]
    for origin, token in candidates:
        if token and token.strip():
            return token.strip(), origin
    kept = token_file(default_home())
    if not _is_loopback(url):
        raise ConfigError(
            f"no API token for {url}: pass api_token=... or set {TOKEN_VARIABLES[0]}. "
            f"The owner token in {kept} is used only for a server on this machine"
        )
    try:
        token = kept.read_text().strip()
    except FileNotFoundError:
        token = ""
    except OSError as error:
        raise ConfigError(f"the owner token in {kept} cannot be read: {error.strerror}") from None
    if not token:
        raise ConfigError(
            f"there is no API token in {kept}, so no server was started here yet: run `rewardsmith serve`. "
            f"For another server pass api_token=... or set {TOKEN_VARIABLES[0]}"
        )
    return token, f"the file {kept}"


def normalised(url: str) -> str:
    """With a scheme (http for this machine, else https), without trailing slash, /v1 or /v2."""
    text = url.strip()
    if "://" not in text:
        text = f"http://{text}" if _is_loopback(f"http://{text}") else f"https://{text}"
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"{url!r} is no address of a server; it looks like http://127.0.0.1:8421")
    return text.rstrip("/").removesuffix("/v1").removesuffix("/v2")


def _is_loopback(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
