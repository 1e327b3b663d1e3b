"""Secrets as they travel (contract 1.7, 5.1): the key is in the body of every request, also of GET. Data only.

Values are left out of `repr`, so that no log or traceback has them by accident.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from rewardsmith.wire.base import Answer, Request


class SecretKey(Request):
    key: str = Field(min_length=1, max_length=200)


class SecretRequest(SecretKey):
    value: str = Field(min_length=1, max_length=65_536, repr=False)


class SecretValue(Answer):
    key: str
    value: str = Field(repr=False)


class Secret(Answer):
    """A stored secret without its value."""

    key: str
    created_at: datetime
    updated_at: datetime
