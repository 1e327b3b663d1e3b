import sqlite3
from pathlib import Path

import pytest
from stored import OWNER_ID, claim, create_job, finish, open_store, report_checkpoint

from rewardsmith.errors import ConfigError, Conflict, Forbidden, NotFound, Unauthorized
from rewardsmith.store import Identity, Store
from rewardsmith.wire import AdapterId


def test_the_owner_has_one_token_and_only_its_digest_is_kept(store: Store, tmp_path: Path) -> None:
    assert store.registry.identify("owner-token") == Identity(OWNER_ID, "owner", "user")
    assert store.registry.ensure_owner("new-token") == Identity(OWNER_ID, "owner", "user")
    assert store.registry.identify("new-token").username == "owner"
    for unknown in ("owner-token", "", "' OR 1=1 --"):
        with pytest.raises(Unauthorized):
            store.registry.identify(unknown)
    with sqlite3.connect(tmp_path / "db" / "rewardsmith.sqlite") as database:
        assert "new-token" not in "\n".join(database.iterdump())


def test_the_owner_stays_the_same_when_the_store_is_opened_again(store: Store, tmp_path: Path) -> None:
    uuid = store.registry.user(OWNER_ID).uuid
    again = open_store(tmp_path)
    again.registry.ensure_owner("later-token")
    assert again.registry.user(OWNER_ID).uuid == uuid
    again.close()
    with pytest.raises(NotFound):
        store.registry.user(2)


def test_a_jobs_token_speaks_for_that_attempt(store: Store) -> None:
    job = create_job(store)
    first = claim(store)
    assert store.registry.identify(first.token) == Identity(OWNER_ID, "owner", "job", job.uuid, 1)
    store.runs.release(job.uuid, first.fence)
    second = claim(store)
    assert store.registry.identify(second.token).fence == 2
    assert store.registry.identify(first.token).fence == 1  # its writes are refused by their fence


def test_repos_are_made_found_listed_and_deleted(store: Store) -> None:
    made = store.registry.create_repo("math.v-1_x", "sums", False, OWNER_ID)
    assert (made.name, made.description, made.all_versions) == ("math.v-1_x", "sums", [])
    assert store.registry.get_repo("math.v-1_x") == store.registry.get_repo(made.uuid) == made
    with pytest.raises(Conflict, match=r"'math.v-1_x' exists; pass exists_ok=True"):
        store.registry.create_repo("math.v-1_x", None, False, OWNER_ID)
    assert store.registry.create_repo("math.v-1_x", "other", True, OWNER_ID) == made
    store.registry.create_repo("second", None, False, OWNER_ID)
    assert [repo.name for repo in store.registry.list_repos()] == ["second", "math.v-1_x"]
    assert [repo.name for repo in store.registry.list_repos(limit=1)] == ["second"]
    store.registry.delete_repo(made.uuid)
    with pytest.raises(NotFound, match=r"no repo 'math.v-1_x'"):
        store.registry.get_repo("math.v-1_x")


@pytest.mark.parametrize(
    "name", ["", "..", ".", "../etc", "a/b", "a b", "x" * 101, "-a", "ü", "a\n", "'; DROP TABLE repos; --"]
)
def test_other_repo_names_are_refused(store: Store, name: str) -> None:
    with pytest.raises(ConfigError, match="repo name"):
        store.registry.create_repo(name, None, False, OWNER_ID)


def test_names_that_look_like_sql_are_plain_data(store: Store) -> None:
    store.registry.create_repo("math", "'); DROP TABLE repos; --", False, OWNER_ID)
    for ref in ("' OR '1'='1", "math' --", "%", "m_th"):
        with pytest.raises(NotFound):
            store.registry.get_repo(ref)
        with pytest.raises(NotFound):
            store.registry.list_versions(ref)
    assert store.registry.get_repo("math").description == "'); DROP TABLE repos; --"


def test_a_version_serves_nothing_until_its_job_has_ended(store: Store) -> None:
    job = create_job(store, description="first try")
    claimed = claim(store)
    report_checkpoint(store, claimed, 1, 10, eval_reward=0.5, best=True)
    report_checkpoint(store, claimed, 2, 20, eval_reward=0.4)
    version = store.registry.get_version("math", 1)
    assert (version.status, version.adapter_path, version.checkpoint) == ("training", None, None)
    assert [(saved.checkpoint, saved.best) for saved in version.checkpoints] == [(1, True), (2, False)]
    with pytest.raises(NotFound, match="its job is training; math/1@2 is its newest checkpoint"):
        store.registry.adapter_path("math", 1)
    assert store.registry.adapter_path("math", 1, 2) == f"jobs/{job.uuid}/checkpoints/2-step-20"
    finish(store, claimed, checkpoint=1)
    version = store.registry.get_version("math", 1)
    assert (version.status, version.checkpoint, version.description) == ("completed", 1, "first try")
    assert version.adapter_path == store.registry.adapter_path("math", 1) == f"jobs/{job.uuid}/checkpoints/1-step-10"
    assert version.finetuning_job is not None and version.finetuning_job.uuid == job.uuid
    with pytest.raises(NotFound, match=r"math/1 has no checkpoint 7; its checkpoints: 1, 2"):
        store.registry.get_version("math", 1, 7)


def test_a_version_without_adapter_says_why(store: Store) -> None:
    create_job(store)
    finish(store, claim(store), "errored", error="the model is gone")
    with pytest.raises(NotFound, match=r"math/1 has no adapter: its job is errored \(the model is gone\)"):
        store.registry.adapter_path("math", 1)


def test_versions_are_listed_archived_and_counted_on_after_deletion(store: Store) -> None:
    for _ in range(2):
        create_job(store)
        finish(store, claim(store))
    create_job(store, repo="other")
    listed = [(version.repo, version.tag) for version in store.registry.list_versions()]
    assert listed == [("other", 1), ("math", 2), ("math", 1)]
    assert [version.tag for version in store.registry.list_versions("math")] == [2, 1]
    assert store.registry.set_archived("math", 1, True).archived
    repo = store.registry.get_repo("math")
    assert [version.tag for version in repo.versions] == [2]
    assert [(version.tag, version.archived) for version in repo.all_versions] == [(1, True), (2, False)]
    assert not store.registry.set_archived("math", 1, False).archived
    store.registry.delete_version("math", 2)
    with pytest.raises(NotFound, match="repo 'math' has no version 2; it has 1"):
        store.registry.get_version("math", 2)
    assert create_job(store).target_version_tag == 3


def test_deleting_a_version_deletes_its_files_and_keeps_its_job(store: Store) -> None:
    job = create_job(store)
    claimed = claim(store)
    for path in ("checkpoints/1-step-10/weights", "checkpoints/superseded/weights", "states/1-step-10/optimizer"):
        store.artifacts.put(f"jobs/{job.uuid}/{path}", b"x")
    store.artifacts.put(f"jobs/{job.uuid}/segments/1.parquet", b"x")
    report_checkpoint(store, claimed, 1, 10)
    with pytest.raises(Forbidden, match=rf"math/1 is in use by job {job.uuid}"):
        store.registry.delete_version("math", 1)
    with pytest.raises(Forbidden, match="repo 'math' is in use"):
        store.registry.delete_repo("math")
    finish(store, claimed, checkpoint=1)
    store.registry.delete_version("math", 1)
    assert store.artifacts.list(f"jobs/{job.uuid}") == [f"jobs/{job.uuid}/segments/1.parquet"]
    kept = store.runs.get(job.uuid)
    assert (kept.status, kept.target_repo_name, kept.target_version_tag) == ("completed", "math", 1)


def test_a_version_that_a_job_continues_cannot_be_deleted(store: Store) -> None:
    first = create_job(store)
    claimed = claim(store)
    report_checkpoint(store, claimed, 1, 10)
    finish(store, claimed, checkpoint=1)
    create_job(store, repo="child", continue_from="math/1@1")
    with pytest.raises(Forbidden, match="math/1 is in use"):
        store.registry.delete_version("math", 1)
    child = claim(store)
    assert store.runs.spec(child.uuid, child.fence).continue_from_path == f"jobs/{first.uuid}/checkpoints/1-step-10"
    finish(store, child)
    store.registry.delete_repo("math")
    assert store.runs.get(child.uuid).status == "completed"


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("math/3", AdapterId("math", 3)), ("math/3@12", AdapterId("math", 3, 12)), ("a.b-c/1", AdapterId("a.b-c", 1))],
)
def test_adapter_ids(text: str, parsed: AdapterId) -> None:
    assert AdapterId.parse(text) == parsed and str(parsed) == text


@pytest.mark.parametrize(
    "text",
    [
        "math",
        "math/",
        "math/x",
        "math/3@",
        "math/-1",
        "a/b/3",
        "math/3@1@2",
        "math/3\n",
        "math/0",
        "math/3@0",
        "a@b/3",
        "math/٣",
        "",
    ],
)
def test_other_adapter_ids_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="<repo>/<version> or <repo>/<version>@<checkpoint>"):
        AdapterId.parse(text)
