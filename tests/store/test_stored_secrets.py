"""Secrets at rest: sealed, bound to their place, given to one job, and gone when they should be."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import create_engine, insert, select, text, update
from stored import OWNER_ID, claim, create_job, finish, open_store, report_checkpoint, report_step

from rewardsmith.errors import ConfigError, Conflict, NotFound
from rewardsmith.store import Store
from rewardsmith.store.schema import job_secrets, now, secrets, users
from rewardsmith.store.seal import Seal

VALUE = "sk-7f3a-schlüssel"
OTHER_USER = 2


@pytest.fixture
def other_user(store: Store) -> int:
    with store._database.write() as connection:
        connection.execute(insert(users).values(uuid="other", username="other", created_at=now()))
    return OTHER_USER


def stored_bytes(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in (folder / "db").iterdir())


def test_a_secret_is_kept_changed_and_deleted(store: Store) -> None:
    made = store.secrets.create(OWNER_ID, "judge", VALUE)
    assert made.key == "judge" and not hasattr(made, "value")
    assert store.secrets.get(OWNER_ID, "judge") == VALUE
    store.secrets.create(OWNER_ID, "another key", "x")
    changed = store.secrets.update(OWNER_ID, "judge", "new")
    assert changed.created_at == made.created_at and changed.updated_at > made.updated_at
    assert store.secrets.get(OWNER_ID, "judge") == "new"
    assert [secret.key for secret in store.secrets.list(OWNER_ID)] == ["another key", "judge"]
    store.secrets.delete(OWNER_ID, "judge")
    assert [secret.key for secret in store.secrets.list(OWNER_ID)] == ["another key"]


def test_what_is_not_there_or_there_already_is_said(store: Store) -> None:
    store.secrets.create(OWNER_ID, "judge", VALUE)
    with pytest.raises(Conflict, match=r"'judge' already.*update"):
        store.secrets.create(OWNER_ID, "judge", "other")
    assert store.secrets.get(OWNER_ID, "judge") == VALUE
    for call in (store.secrets.get, store.secrets.delete):
        with pytest.raises(NotFound, match="'none'"):
            call(OWNER_ID, "none")
    with pytest.raises(NotFound, match="'none'"):
        store.secrets.update(OWNER_ID, "none", "x")


def test_nobody_has_the_secrets_of_another_user(store: Store, other_user: int) -> None:
    store.secrets.create(OWNER_ID, "judge", VALUE)
    assert store.secrets.list(other_user) == []
    with pytest.raises(NotFound):
        store.secrets.get(other_user, "judge")
    with pytest.raises(NotFound):
        store.secrets.delete(other_user, "judge")
    store.secrets.create(other_user, "judge", "theirs")
    assert store.secrets.get(OWNER_ID, "judge") == VALUE


def test_values_are_not_in_the_database(store: Store, tmp_path: Path) -> None:
    store.secrets.create(OWNER_ID, "judge", VALUE)
    create_job(store, job_secrets={"PLAIN": "plain-" + VALUE, "STORED": "secret:judge"})
    found = stored_bytes(tmp_path)
    assert b"PLAIN" in found and b"judge" in found
    assert VALUE.encode() not in found and b"sk-7f3a" not in found


def test_only_its_user_can_read_the_key(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = tmp_path / "secrets.key"
    assert not key.exists()
    store.secrets.create(OWNER_ID, "judge", VALUE)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    key.chmod(0o644)
    assert Seal(key).seal("x", "place")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and "other users could read" in caplog.text


def test_without_the_right_key_the_file_is_named(store: Store, tmp_path: Path) -> None:
    store.secrets.create(OWNER_ID, "judge", VALUE)
    key = tmp_path / "secrets.key"
    key.rename(tmp_path / "elsewhere")
    with_new_key = open_store(tmp_path)
    with pytest.raises(ConfigError, match=rf"{key} is not the key"):
        with_new_key.secrets.get(OWNER_ID, "judge")
    with_new_key.close()
    key.write_text("no key")
    with pytest.raises(ConfigError, match="holds no key"):
        Seal(key).seal("x", "place")
    key.unlink()
    key.mkdir()
    with pytest.raises(ConfigError, match="cannot be used"):
        Seal(key).seal("x", "place")
    with pytest.raises(ConfigError, match="without a key file"):
        Seal(None).seal("x", "place")


def test_a_value_that_was_moved_or_changed_in_the_database_does_not_open(store: Store) -> None:
    for name in ("mine", "yours"):
        store.secrets.create(OWNER_ID, name, f"value of {name}")
    with store._database.write() as connection:
        sealed = connection.scalar(select(secrets.c.sealed).where(secrets.c.key == "yours"))
        assert sealed
        connection.execute(update(secrets).where(secrets.c.key == "mine").values(sealed=sealed))
        connection.execute(
            update(secrets).where(secrets.c.key == "yours").values(sealed=sealed[:-1] + bytes([sealed[-1] ^ 1]))
        )
    for name in ("mine", "yours"):
        with pytest.raises(ConfigError, match="cannot be read"):
            store.secrets.get(OWNER_ID, name)


def test_the_same_value_is_never_sealed_to_the_same_bytes(tmp_path: Path) -> None:
    seal = Seal(tmp_path / "key")
    assert len({seal.seal(VALUE, "place") for _ in range(100)}) == 100


def test_many_that_make_the_key_at_the_same_time_have_the_same_one(tmp_path: Path) -> None:
    seals = [Seal(tmp_path / "key") for _ in range(16)]
    with ThreadPoolExecutor(16) as threads:
        sealed = list(threads.map(lambda seal: seal.seal(VALUE, "place"), seals))
    assert {Seal(tmp_path / "key").open(one, "place") for one in sealed} == {VALUE}
    assert [file.name for file in tmp_path.iterdir()] == ["key"]


# ---- secrets of jobs


def test_a_job_is_given_its_values_and_the_stored_ones_as_they_are_then(store: Store) -> None:
    store.secrets.create(OWNER_ID, "judge", VALUE)
    job = create_job(store, job_secrets={"PLAIN": "plain", "STORED": "secret:judge"})
    claimed = claim(store)
    spec = store.runs.spec(job.uuid, claimed.fence)
    assert spec.secrets == {"PLAIN": "plain", "STORED": VALUE} == store.secrets.of_job(job.uuid)
    assert "plain" not in repr(spec) and VALUE not in repr(spec)
    store.secrets.update(OWNER_ID, "judge", "rotated")
    assert store.runs.spec(job.uuid, claimed.fence).secrets["STORED"] == "rotated"
    assert store.secrets.of_job(create_job(store).uuid) == {}


def test_a_job_that_refers_to_a_secret_that_is_not_there_is_not_made(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"secrets\.KEY: there is no stored secret 'none'"):
        create_job(store, job_secrets={"KEY": "secret:none"})
    assert store.runs.list()[0] == []


def test_a_secret_is_not_deleted_under_a_job_that_has_not_ended(store: Store) -> None:
    store.secrets.create(OWNER_ID, "judge", VALUE)
    job = create_job(store, job_secrets={"KEY": "secret:judge"})
    with pytest.raises(Conflict, match=job.uuid):
        store.secrets.delete(OWNER_ID, "judge")
    finish(store, claim(store))
    store.secrets.delete(OWNER_ID, "judge")
    with pytest.raises(ConfigError, match=r"secrets\.KEY refers to was deleted"):
        store.secrets.of_job(job.uuid)


def finished(store: Store, **secrets_of_it: str) -> str:
    """The id of a version with an adapter, whose job had these secrets."""
    job = create_job(store, job_secrets=secrets_of_it)
    claimed = claim(store)
    report_step(store, claimed, 1)
    report_checkpoint(store, claimed, 1, 1)
    finish(store, claimed, checkpoint=1)
    return f"{job.target_repo_name}/{job.target_version_tag}"


def test_who_continues_a_version_of_their_own_inherits_what_is_hidden(store: Store) -> None:
    store.secrets.create(OWNER_ID, "judge", VALUE)
    parent = finished(store, PLAIN="plain", STORED="secret:judge")
    hidden = {"PLAIN": "[secret PLAIN]", "STORED": "[secret STORED]"}
    child = create_job(store, continue_from=parent, job_secrets=hidden | {"NEW": "new"})
    assert store.secrets.of_job(child.uuid) == {"PLAIN": "plain", "STORED": VALUE, "NEW": "new"}
    with pytest.raises(ConfigError, match=r"secrets\.OTHER: '\[secret OTHER\]' stands for"):
        create_job(store, continue_from=parent, job_secrets={"OTHER": "[secret OTHER]"})
    with pytest.raises(ConfigError, match=r"secrets\.PLAIN: .* none to inherit"):
        create_job(store, job_secrets={"PLAIN": "[secret PLAIN]"})


def test_secrets_are_not_inherited_from_another_user(store: Store, other_user: int) -> None:
    parent = finished(store, PLAIN="plain")
    with pytest.raises(ConfigError, match="none to inherit"):
        create_job(store, user_id=other_user, continue_from=parent, job_secrets={"PLAIN": "[secret PLAIN]"})


def test_with_a_version_its_secrets_go(store: Store) -> None:
    repo, _, tag = finished(store, PLAIN="plain").partition("/")
    store.registry.delete_version(repo, int(tag))
    with store._database.read() as connection:
        assert connection.execute(select(job_secrets)).all() == []


def test_a_database_without_secrets_gets_them(tmp_path: Path) -> None:
    """As an older Rewardsmith left it."""
    opened = open_store(tmp_path)
    opened.close()
    engine = create_engine(f"sqlite:///{tmp_path / 'db' / 'rewardsmith.sqlite'}")
    with engine.begin() as connection:
        for statement in (
            "DROP TABLE job_secrets",
            "DROP TABLE secrets",
            "UPDATE alembic_version SET version_num='0002'",
        ):
            connection.execute(text(statement))
    engine.dispose()
    opened = open_store(tmp_path)
    opened.registry.ensure_owner("owner-token")
    assert opened.secrets.create(OWNER_ID, "judge", VALUE).key == "judge"
    opened.close()
