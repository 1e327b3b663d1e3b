"""Adapter repositories: create, get, list, delete (contract 1.2)."""

from __future__ import annotations

from rewardsmith import wire
from rewardsmith.client.transport import Data, Transport, segment
from rewardsmith.wire.base import Answer

RepoRef = str | wire.Repo


class _Repos(Answer):
    repos: list[wire.Repo]


class Repos:
    """`rs.repos`."""

    def __init__(self, transport: Transport) -> None:
        self._http = transport

    def create(self, *, name: str, description: str | None = None, exists_ok: bool = False) -> wire.Repo:
        """A new repo; with `exists_ok` the one of that name when there is one."""
        request = wire.RepoRequest(name=name, description=description, exists_ok=exists_ok)
        body = request.model_dump(by_alias=True)
        return self._http.call("POST", "/v2/repos", wire.Repo, body=body, repeat=exists_ok)

    def get(self, repo_ref: RepoRef) -> wire.Repo:
        """By name, uuid or object."""
        return self._http.get(f"/v2/repos/{repo_path(repo_ref)}", wire.Repo)

    def list(self, limit: int = 10) -> list[wire.Repo]:
        """The newest repos first."""
        return self._http.get("/v2/repos", Data[_Repos], {"limit": limit}).data.repos

    def delete(self, repo_ref: RepoRef) -> None:
        """With all its versions. Refused while one of its jobs runs."""
        self._http.send("DELETE", f"/v2/repos/{repo_path(repo_ref)}")


def repo_name(ref: RepoRef) -> str:
    return ref if isinstance(ref, str) else ref.name


def repo_path(ref: RepoRef) -> str:
    return segment(ref if isinstance(ref, str) else ref.uuid)
