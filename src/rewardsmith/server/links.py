"""Presigned links: a token in a path that opens one thing for a while, without any other credential.

The token is the subject and an expiry, signed with a key that lives as long as the server process.
"""

from __future__ import annotations

import hmac
import secrets
import time

from rewardsmith.errors import Forbidden

LIFETIME_SECONDS = 3600


class Links:
    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def sign(self, subject: str) -> str:
        signed = f"{subject}.{int(time.time()) + LIFETIME_SECONDS}"
        return f"{signed}.{self._signature(signed)}"

    def subject(self, token: str) -> str:
        """What a token stands for. Raises Forbidden for one that was not signed here or is too old."""
        signed, _, signature = token.rpartition(".")
        if not hmac.compare_digest(signature.encode(errors="replace"), self._signature(signed).encode()):
            raise Forbidden("this link was not made by this server process; ask for a new one")
        subject, _, expires = signed.rpartition(".")
        if int(expires) < time.time():
            raise Forbidden("this link has expired; ask for a new one")
        return subject

    def _signature(self, signed: str) -> str:
        return hmac.new(self._key, signed.encode(errors="replace"), "sha256").hexdigest()
