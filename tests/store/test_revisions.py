"""Revisions beyond what a process says of them: notes, digests, what replaces what, changes that came too late."""

from pathlib import Path

import pytest
from alembic import command
from stored import LEASE, claim, create_job, function, params, report_step

from rewardsmith import wire
from rewardsmith.errors import Conflict, NotFound
from rewardsmith.store import Claim, Store
from rewardsmith.store.database import Database, migration_config


def settle(store: Store, claimed: Claim, revision: int, **fields: object) -> None:
    report = wire.EventReport(fence=claimed.fence, kind="revision", message="said", revision=revision, **fields)
    store.runs.report_event(claimed.uuid, report, LEASE)


def add(store: Store, uuid: str, *names: str, **fields: object) -> wire.Revision:
    return store.runs.add_revision(uuid, params(names[0]), [function(name) for name in names], "owner", **fields)


def test_a_note_and_the_steps_of_comparison_are_kept_and_told(store: Store) -> None:
    job = create_job(store)
    made = add(store, job.uuid, "two", note="stricter", compared_steps=7)
    assert (made.note, made.compared_steps) == ("stricter", 7)
    assert store.runs.revision(job.uuid, 2) == made == store.runs.revisions(job.uuid)[1]
    first = store.runs.revision(job.uuid, 1)
    assert (first.note, first.compared_steps, first.replaces) == (None, 0, None)
    assert store.runs.events(job.uuid)[-1].message == "revision 2 by owner: two (stricter)"


def test_a_change_made_from_a_set_that_is_no_longer_the_present_one_is_refused(store: Store) -> None:
    job = create_job(store)
    claimed = claim(store)
    assert add(store, job.uuid, "two", base=1).revision == 2
    with pytest.raises(Conflict, match="made from revision 1, the present one is 2"):
        add(store, job.uuid, "three", base=1)
    settle(store, claimed, 2, refused="it does not load")
    with pytest.raises(Conflict, match="made from revision 2, the present one is 1"):
        add(store, job.uuid, "three", base=2)
    assert add(store, job.uuid, "three", base=1).revision == 3


def test_each_revision_names_the_one_that_scored_before_it(store: Store) -> None:
    job = create_job(store)
    claimed = claim(store)
    for name in ("two", "three", "four"):
        add(store, job.uuid, name)
    settle(store, claimed, 2, step=3)
    settle(store, claimed, 3, refused="no")
    replaced = [one.replaces for one in store.runs.revisions(job.uuid)]
    assert replaced == [None, 1, 2, 2]
    assert [store.runs.revision(job.uuid, number).replaces for number in (1, 2, 3, 4)] == replaced
    settle(store, claimed, 4, step=5)
    report_step(store, claimed, 5)
    assert store.runs.spec(job.uuid, claimed.fence).revision.replaces is None  # no checkpoint: from the start again


def test_equal_sets_have_equal_digests(store: Store) -> None:
    job = create_job(store, functions=[function("exact")])
    add(store, job.uuid, "other")
    add(store, job.uuid, "exact")
    heavier = function("exact").model_copy(update={"weight": 2.0})
    store.runs.add_revision(job.uuid, params(), [heavier], "owner")
    first, second, third, fourth = (one.sha256 for one in store.runs.revisions(job.uuid))
    assert first == third and len({first, second, fourth}) == 3 and len(first) == 64


def test_a_schedule_comes_back_as_it_was(store: Store) -> None:
    job = create_job(store)
    scheduled = function("two").model_copy(update={"schedule": {1: 0.0, 100: 2.0}})
    store.runs.add_revision(job.uuid, params(), [scheduled], "owner")
    assert store.runs.revision(job.uuid, 2).functions == [scheduled]


def test_the_config_of_an_earlier_revision_is_found(store: Store) -> None:
    job = create_job(store)
    add(store, job.uuid, "two")
    assert store.runs.config_with(job.uuid, 1) == params()
    assert store.runs.config_with(job.uuid, 2) == params("two")
    with pytest.raises(NotFound):
        store.runs.config_with(job.uuid, 3)


def test_revisions_of_an_older_database_are_kept(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'db.sqlite'}")
    with database.write() as connection:
        command.upgrade(migration_config(connection), "0001")
        for statement in (
            "INSERT INTO users VALUES (1, 'u', 'owner', '2026-01-01')",
            "INSERT INTO jobs (id, uuid, user_id, repo_name, tag, dataset_name, dataset_path, base_model, "
            "base_model_source, status, action, step, furthest_step, attempt, failures, fence, created_at, updated_at) "
            "VALUES (1, 'j', 1, 'r', 1, 'd', 'd', 'm', 'm', 'queued', 'continue', 0, 0, 0, 0, 0, '2026-01-01', "
            "'2026-01-01')",
            "INSERT INTO revisions VALUES (1, 1, 1, NULL, '{}', '[]', 'owner', '2026-01-01')",
        ):
            connection.exec_driver_sql(statement)
    database.migrate()
    with database.write() as connection:
        columns = "created_by, note, compared_steps"
        assert connection.exec_driver_sql(f"SELECT {columns} FROM revisions").all() == [("owner", None, 0)]
        command.downgrade(migration_config(connection), "0001")
        assert connection.exec_driver_sql("SELECT created_by FROM revisions").all() == [("owner",)]
    database.close()
