"""What users write for a version of a repo, or for one checkpoint of it: `math/3`, `math/3@2`. Nothing is looked up."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewardsmith.errors import ConfigError

FORM = re.compile(r"([^/@]+)/([1-9][0-9]{0,8})(?:@([1-9][0-9]{0,8}))?")


@dataclass(frozen=True)
class AdapterId:
    """`repo/version` or `repo/version@checkpoint`; `repo` is a name or uuid."""

    repo: str
    tag: int
    checkpoint: int | None = None

    @classmethod
    def parse(cls, text: str) -> AdapterId:
        """Raises ConfigError."""
        match = FORM.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"adapter id {text!r}: write <repo>/<version> or <repo>/<version>@<checkpoint>, as in 'math/3@2'"
            )
        repo, tag, checkpoint = match.groups()
        return cls(repo, int(tag), int(checkpoint) if checkpoint else None)

    @property
    def version(self) -> str:
        """The part after the slash."""
        return f"{self.tag}" if self.checkpoint is None else f"{self.tag}@{self.checkpoint}"

    def __str__(self) -> str:
        return f"{self.repo}/{self.version}"
