import contextlib
import json
import os
import sqlite3
import threading
from pathlib import Path

import pytest
from stored import OWNER_ID, claim, create_job, finish, open_store, receive, upload

from rewardsmith.errors import Conflict, DatasetError, Forbidden, NotFound
from rewardsmith.store import Store

ROWS = b'{"prompt": "one", "answer": 1}\n{"answer": 2, "prompt": "three"}\n'


def files(store: Store) -> list[str]:
    """Every file under the artifacts, those on their way in too."""
    root = store.artifacts.local_root
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_an_upload_becomes_a_dataset_with_a_report(store: Store) -> None:
    made = upload(store, "sums", ROWS)
    assert (made.name, made.status, made.connection.name) == ("sums", "connected", "file_uploads")
    assert (made.rows, made.columns) == (2, ["prompt", "answer"])
    assert [(bucket.low, bucket.high, bucket.rows) for bucket in made.prompt_lengths] == [
        (3, 3, 1),
        (4, 4, 0),
        (5, 5, 1),
    ]
    for ref in ("sums", "file_uploads/sums", made.uuid):
        assert store.datasets.get(ref) == made
    assert list(store.datasets.rows("sums")) == [json.loads(line) for line in ROWS.splitlines()]
    assert files(store) == [store.datasets.path("sums")]
    with pytest.raises(NotFound, match="no dataset 'other'"):
        store.datasets.get("other")


def test_a_broken_upload_changes_nothing(store: Store, tmp_path: Path) -> None:
    upload(store, "sums", ROWS)
    before = files(store), store.datasets.list(), _tables(tmp_path)
    for name, content in [("new", b'{"prompt": 1}'), ("new", b""), ("sums", b'{"prompt": "x"}'), ("a/b", ROWS)]:
        with pytest.raises((DatasetError, Conflict)):
            upload(store, name, content)
    assert (files(store), store.datasets.list(), _tables(tmp_path)) == before
    upload(store, "new", ROWS)


def _tables(tmp_path: Path) -> str:
    with sqlite3.connect(tmp_path / "db" / "rewardsmith.sqlite") as database:
        return "\n".join(database.iterdump())


def test_the_refusal_names_file_row_and_reason(store: Store) -> None:
    with pytest.raises(DatasetError) as caught:
        upload(store, "new", b"prompt,answer\nfine,1\n,2\n", file_name="my rows.csv")
    assert caught.value.message == (
        "my rows.csv was refused and nothing was stored: 1 row is wrong\n"
        "  row 2 (line 3): `prompt` is empty\n"
        "  columns found: prompt, answer"
    )


def test_a_taken_name_is_refused(store: Store) -> None:
    upload(store, "sums", ROWS)
    with pytest.raises(Conflict, match="dataset 'sums' exists; take another name, or delete that one first"):
        upload(store, "sums", ROWS)


@pytest.mark.parametrize("name", ["", " x", "a/b", "../x", "..", ".", "a\\b", "a\nb", "a\0b", "x" * 201])
def test_names_that_are_no_names_are_refused(store: Store, name: str) -> None:
    with pytest.raises(DatasetError, match="dataset name"):
        upload(store, name, ROWS)


@pytest.mark.parametrize("name", ["'; DROP TABLE datasets; --", '" OR 1=1', "%", "数据 2026", "x" * 200])
def test_odd_names_are_plain_data(store: Store, name: str) -> None:
    upload(store, "first", ROWS)
    upload(store, name, b'{"prompt": "other"}')
    assert store.datasets.get(name).name == name
    assert [found.name for found in store.datasets.list()] == [name, "first"]
    assert create_job(store, dataset=name).dataset_name == name
    assert list(store.datasets.rows(name)) == [{"prompt": "other"}]


@pytest.mark.parametrize("file_name", ["../../etc/cron.d/x.jsonl", "/tmp/x.jsonl", "a\nb.jsonl", "'; --.jsonl"])
def test_the_users_file_name_never_names_a_file(store: Store, file_name: str) -> None:
    token = store.datasets.begin_upload(file_name, OWNER_ID)
    with store.datasets.receive_upload(token) as file:
        path = Path(file.name)
    assert path.parent == store.artifacts.scratch() and token not in path.name
    assert path.parent.stat().st_mode & 0o077 == 0


def test_an_upload_token_is_for_one_upload_of_its_user(store: Store) -> None:
    token = store.datasets.begin_upload("rows.jsonl", OWNER_ID)
    receive(store, token, ROWS)
    for use in (store.datasets.receive_upload, store.datasets.check_upload):
        with pytest.raises(Conflict, match="this upload link was used"):
            use(token)
    with pytest.raises(Forbidden, match="begun by somebody else"):
        store.datasets.finish_upload("sums", token, OWNER_ID + 1)
    store.datasets.finish_upload("sums", token, OWNER_ID)
    for use in (
        store.datasets.receive_upload,
        store.datasets.check_upload,
        lambda spent: store.datasets.finish_upload("again", spent, OWNER_ID),
    ):
        with pytest.raises(NotFound):
            use(token)


def test_half_an_upload_is_no_dataset(store: Store, tmp_path: Path) -> None:
    token = store.datasets.begin_upload("rows.jsonl", OWNER_ID)
    with pytest.raises(Conflict, match="file for 'early' has not been received whole: send it to the presigned URL"):
        store.datasets.finish_upload("early", token, OWNER_ID)
    file = store.datasets.receive_upload(token)
    file.write(ROWS[: ROWS.index(b"\n") + 1])
    file.flush()
    for use in (store.datasets.receive_upload, store.datasets.check_upload):
        with pytest.raises(Conflict, match="this upload link was used"):
            use(token)
    successor = open_store(tmp_path)  # of a server that was killed here
    for datasets in (store.datasets, successor.datasets):
        with pytest.raises(Conflict, match="has not been received whole"):
            datasets.finish_upload("half", token, OWNER_ID)
    successor.close()
    file.write(ROWS[ROWS.index(b"\n") + 1 :])
    store.datasets.complete_upload(token, file)
    assert store.datasets.finish_upload("whole", token, OWNER_ID).rows == 2
    assert [path for path in files(store) if "upload" in path] == []


def test_an_abandoned_upload_leaves_nothing(store: Store) -> None:
    token = store.datasets.begin_upload("rows.jsonl", OWNER_ID)
    file = store.datasets.receive_upload(token)
    file.write(ROWS[:10])
    store.datasets.abandon_upload(token, file)
    assert file.closed
    assert files(store) == []
    with pytest.raises(NotFound):
        store.datasets.finish_upload("sums", token, OWNER_ID)


def test_an_upload_expires_with_its_file(store: Store, tmp_path: Path) -> None:
    token = store.datasets.begin_upload("rows.jsonl", OWNER_ID)
    receive(store, token, ROWS)
    (path,) = store.artifacts.scratch().iterdir()
    os.utime(path, (0, 0))
    with sqlite3.connect(tmp_path / "db" / "rewardsmith.sqlite") as database:
        database.execute("UPDATE uploads SET expires_at = '2020-01-01 00:00:00.000000'")
    database.close()
    with pytest.raises(NotFound, match="older than an hour"):
        store.datasets.finish_upload("sums", token, OWNER_ID)
    receive(store, store.datasets.begin_upload("rows.jsonl", OWNER_ID), ROWS)
    store.datasets.begin_upload("other.jsonl", OWNER_ID)
    assert not path.exists() and len(files(store)) == 1


def test_one_upload_finished_twice_at_once_makes_one_dataset(store: Store) -> None:
    token = store.datasets.begin_upload("rows.jsonl", OWNER_ID)
    receive(store, token, ROWS * 1000)
    made: list[str] = []
    start = threading.Barrier(2)

    def finish_as(name: str) -> None:
        start.wait()
        with contextlib.suppress(NotFound):
            made.append(store.datasets.finish_upload(name, token, OWNER_ID).name)

    threads = [threading.Thread(target=finish_as, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(made) == 1 and [found.name for found in store.datasets.list()] == made


def test_other_formats_are_refused_before_anything_is_sent(store: Store) -> None:
    with pytest.raises(DatasetError, match=r"rows\.xlsx: a dataset is"):
        store.datasets.begin_upload("rows.xlsx", OWNER_ID)


def test_a_dataset_in_use_cannot_be_deleted(store: Store) -> None:
    job = create_job(store, dataset="sums")
    with pytest.raises(Conflict, match=f"dataset 'sums' is in use by job {job.uuid}"):
        store.datasets.delete("sums")
    finish(store, claim(store))
    store.datasets.delete("sums")
    assert files(store) == [] and store.datasets.list() == []
    assert store.runs.get(job.uuid).dataset_name == "sums"
    with pytest.raises(NotFound):
        store.datasets.delete("sums")


def test_datasets_with_the_same_rows_share_a_file_until_the_last_is_deleted(store: Store) -> None:
    upload(store, "a", ROWS)
    upload(store, "b", ROWS.replace(b"\n", b"\n\n"))
    assert len(files(store)) == 1
    store.datasets.delete("a")
    assert len(list(store.datasets.rows("b"))) == 2
    store.datasets.delete("b")
    assert files(store) == []


def test_registering_and_deleting_the_same_rows_at_once_never_loses_the_file(store: Store) -> None:
    failures: list[Exception] = []

    def come_and_go(name: str) -> None:
        try:
            for _ in range(20):
                upload(store, name, ROWS)
                assert len(list(store.datasets.rows(name))) == 2
                store.datasets.delete(name)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=come_and_go, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == [] and files(store) == []
