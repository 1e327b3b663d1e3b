"""What a job and an administrator grant to the reward functions of a pool. Data only."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Grants:
    """`secrets` are environment variables, in the clear; their values are taken out of every text that leaves the pool.

    `private_endpoints` are those of private networks, `host:port`, that functions may ask for as for any other.
    """

    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    private_endpoints: Collection[str] = ()
