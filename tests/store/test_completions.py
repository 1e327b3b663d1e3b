from pathlib import Path
from typing import Any

import duckdb
import pytest
from stored import claim, completion, create_job, open_store, report_step, reward_log, write_segment

from rewardsmith import wire
from rewardsmith.errors import ConfigError, NotFound
from rewardsmith.store import Claim, Store, segment_search


@pytest.fixture
def claimed(store: Store) -> Claim:
    create_job(store)
    return claim(store)


def commit(store: Store, claimed: Claim, step: int, *families: tuple[str, list[dict[str, Any]]]) -> None:
    segments = [write_segment(store, claimed.uuid, rows, family=family) for family, rows in families]
    report_step(store, claimed, step, segments=segments)


def commit_steps(store: Store, claimed: Claim, steps: range, rows: int = 4) -> None:
    for step in steps:
        commit(store, claimed, step, ("completions", [completion(step, idx) for idx in range(rows)]))


def keys(page: wire.Page) -> list[tuple[int, int]]:
    return [(row["step"], row["idx"]) for row in page.data]


def found(store: Store, claimed: Claim, **filters: Any) -> list[tuple[int, int]]:
    return keys(store.completions.completions(claimed.uuid, **filters))


def test_a_row_comes_back_as_it_was_written(store: Store, claimed: Claim) -> None:
    scores = {
        "exact": {"value": 0.5, "outcome": "ok", "seconds": 0.1},
        "style": {"value": None, "outcome": "timeout", "seconds": 3.0},
    }
    row = completion(1, 0, completion="Zwei ist '2'; \0 {}", total_reward=None, advantage=None, scores=scores)
    commit(store, claimed, 1, ("completions", [row]))
    (data,) = store.completions.completions(claimed.uuid).data
    read = wire.CompletionRow(**data)
    assert read.model_dump() == row | {
        "scores": {"exact": 0.5, "style": None},
        "outcomes": {"exact": "ok", "style": "timeout"},
        "seconds": {"exact": 0.1, "style": 3.0},
    }
    assert data["totalReward"] is None and data["finishReason"] == "stop"


def test_newest_steps_come_first_and_a_step_keeps_its_order(store: Store, claimed: Claim) -> None:
    commit_steps(store, claimed, range(1, 4), rows=2)
    assert found(store, claimed) == [(3, 0), (3, 1), (2, 0), (2, 1), (1, 0), (1, 1)]
    assert found(store, claimed, order="oldest") == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]


@pytest.mark.parametrize("order", ["newest", "oldest"])
@pytest.mark.parametrize("limit", [1, 3, 7])
def test_pages_lose_and_repeat_no_row_while_segments_arrive(
    store: Store, claimed: Claim, order: Any, limit: int
) -> None:
    commit_steps(store, claimed, range(1, 7))
    pages: list[wire.Page] = []
    step, after = 7, None
    while not pages or after is not None:
        pages.append(store.completions.completions(claimed.uuid, order=order, limit=limit, after=after))
        after = pages[-1].next
        if step < 10:
            commit_steps(store, claimed, range(step, step + 1))
            step += 1
    seen = [key for page in pages for key in keys(page)]
    steps = range(6, 0, -1) if order == "newest" else range(1, 10)
    assert seen == [(step, idx) for step in steps for idx in range(4)]
    assert len(pages) > 3 and all(len(page.data) == limit for page in pages[:-1])


def test_train_and_held_out_rows_of_one_step_are_told_apart(store: Store, claimed: Claim) -> None:
    train = [completion(1, idx) for idx in range(3)]
    held_out = [completion(1, idx, phase="eval") for idx in range(3)]
    commit(store, claimed, 1, ("completions", train), ("completions", held_out))
    seen, after = [], None
    while True:
        page = store.completions.completions(claimed.uuid, limit=2, after=after)
        seen += [(row["phase"], row["idx"]) for row in page.data]
        after = page.next
        if after is None:
            break
    assert seen == [("eval", 0), ("eval", 1), ("eval", 2), ("train", 0), ("train", 1), ("train", 2)]
    for phase in ("train", "eval"):
        page = store.completions.completions(claimed.uuid, phase=phase)
        assert [row["phase"] for row in page.data] == [phase] * 3


def test_filters(store: Store, claimed: Claim) -> None:
    def scored(value: float | None, outcome: str = "ok") -> dict[str, Any]:
        return {
            "exact": {"value": value, "outcome": outcome, "seconds": 0.0},
            'it\'s "odd"': {"value": 1.0, "outcome": "ok", "seconds": 0.0},
        }

    rows = [
        completion(1, 0, scores=scored(0.0, "exception"), total_reward=1.0, completion="Größe 100%"),
        completion(1, 1, scores=scored(0.5), total_reward=1.5, prompt="Ask_ME"),
        completion(1, 2, scores=scored(None, "abstain"), total_reward=None),
        completion(1, 4, scores={}, total_reward=9.0),
    ]
    commit(store, claimed, 1, ("completions", rows))
    commit(store, claimed, 2, ("completions", [completion(2, 0, scores=scored(1.0), total_reward=2.0)]))
    expected = [
        ({"step": 1, "function": "exact"}, [(1, 0), (1, 1), (1, 2)]),
        ({"step": 3}, []),
        ({"row": 1}, [(1, 4)]),
        ({"outcome": "exception"}, [(1, 0)]),
        ({"outcome": "ok"}, [(2, 0), (1, 0), (1, 1), (1, 2)]),
        ({"outcome": "ok", "function": "exact"}, [(2, 0), (1, 1)]),
        ({"min_score": 1.5}, [(2, 0), (1, 1), (1, 4)]),
        ({"max_score": 1.0}, [(1, 0)]),
        ({"function": "exact", "min_score": 0.5, "max_score": 0.9}, [(1, 1)]),
        ({"function": 'it\'s "odd"', "min_score": 0.0}, [(2, 0), (1, 0), (1, 1), (1, 2)]),
        ({"text": "GRÖSSE"}, []),
        ({"text": "grÖße 100%"}, [(1, 0)]),
        ({"text": "ask_me"}, [(1, 1)]),
        ({"text": "ask%me"}, []),
        ({"function": "exact') OR true --"}, []),
        ({"outcome": "' OR '1'='1"}, []),
        ({"phase": "x' OR 'a'='a"}, []),
        ({"text": "'; DROP TABLE x; --"}, []),
    ]
    for filters, rows_found in expected:
        assert found(store, claimed, **filters) == rows_found, filters


def test_a_rare_row_is_found_behind_many_segments(store: Store, claimed: Claim) -> None:
    commit(store, claimed, 1, ("completions", [completion(1, 0, completion="needle")]))
    commit_steps(store, claimed, range(2, 41), rows=1)
    page = store.completions.completions(claimed.uuid, text="needle", limit=5)
    assert keys(page) == [(1, 0)] and page.next is None


def test_a_long_search_goes_out_in_parts(store: Store, claimed: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_search, "SEARCH_SECONDS", -1)
    monkeypatch.setattr(segment_search, "FIRST_FILES", 4)
    commit_steps(store, claimed, range(1, 41), rows=1)
    for order in ("newest", "oldest"):
        seen, after, pages = [], None, 0
        while True:
            page = store.completions.completions(
                claimed.uuid, max_score=0.0, row=0, text=".0", order=order, limit=1 if pages % 2 else 30, after=after
            )
            seen += keys(page)
            pages, after = pages + 1, page.next
            if after is None:
                break
        steps = range(40, 0, -1) if order == "newest" else range(1, 41)
        assert seen == [(step, 0) for step in steps] and pages > 2
    page = store.completions.completions(claimed.uuid, text="nowhere", limit=1)
    assert page.data == [] and page.next is not None


def test_files_that_no_report_named_do_not_exist(store: Store, claimed: Claim) -> None:
    commit_steps(store, claimed, range(1, 3), rows=1)
    write_segment(store, claimed.uuid, [completion(3, 0)])
    write_segment(store, claimed.uuid, [completion(1, 1)], name="-torn")
    assert found(store, claimed) == [(2, 0), (1, 0)]
    assert found(store, claimed, step=3) == []


def test_truncated_steps_are_gone_and_come_again(store: Store, claimed: Claim) -> None:
    commit_steps(store, claimed, range(1, 4), rows=1)
    store.runs.release(claimed.uuid, claimed.fence)
    second = claim(store)
    assert found(store, second) == []
    segment = write_segment(store, second.uuid, [completion(1, 0, completion="again")], name="-2")
    report_step(store, second, 1, segments=[segment])
    assert [row["completion"] for row in store.completions.completions(second.uuid).data] == ["again"]


def test_jobs_do_not_see_each_other(store: Store, claimed: Claim) -> None:
    commit_steps(store, claimed, range(1, 2))
    other = create_job(store, repo="other")
    assert store.completions.completions(other.uuid) == wire.Page(data=[], next=None)
    with pytest.raises(NotFound, match="no job 'nobody'"):
        store.completions.completions("nobody")


def test_reward_logs_are_paged_and_filtered(store: Store, claimed: Claim) -> None:
    for step in (1, 2):
        rows = [reward_log(step, idx, name) for idx in range(3) for name in ("a", "b")]
        rows[0] |= {"outcome": "exception", "error": "ZeroDivisionError: division", "value": None}
        commit(store, claimed, step, ("reward_logs", rows))
    seen, after = [], None
    while True:
        page = store.completions.reward_logs(claimed.uuid, wire.LogFilters(), limit=5, after=after)
        seen += [(row["step"], row["idx"], row["function"]) for row in page.data]
        after = page.next
        if after is None:
            break
    assert seen == [(step, idx, name) for step in (2, 1) for idx in range(3) for name in ("a", "b")]

    def logs(**filters: Any) -> list[dict[str, Any]]:
        return store.completions.reward_logs(claimed.uuid, wire.LogFilters(**filters)).data

    (failed,) = logs(outcome="exception", step=2)
    assert wire.RewardLogRow(**failed).error == "ZeroDivisionError: division" and failed["value"] is None
    assert len(logs(function="b")) == 6
    assert len(logs(text="zerodivision")) == 2
    assert len(logs(text="2.1")) == 2
    assert logs(revision=2) == []
    oldest = store.completions.reward_logs(claimed.uuid, wire.LogFilters(function="a"), order="oldest").data
    assert [row["step"] for row in oldest] == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("after", ["", "x", "WzEsMl0=", "bnVsbA==", "WzEsWyJ0cmFpbiJdXQ==", "ü", "WyIxIixudWxsXQ=="])
def test_other_cursors_are_refused(store: Store, claimed: Claim, after: str) -> None:
    commit_steps(store, claimed, range(1, 2))
    with pytest.raises(ConfigError, match="pass back what `next` gave"):
        store.completions.completions(claimed.uuid, after=after)


@pytest.mark.parametrize("limit", [0, -1, 501])
def test_other_limits_are_refused(store: Store, claimed: Claim, limit: int) -> None:
    with pytest.raises(ConfigError, match="a page has 1 to 500 rows"):
        store.completions.reward_logs(claimed.uuid, wire.LogFilters(), limit=limit)


def test_the_query_engine_sees_the_artifacts_and_nothing_else(store: Store, claimed: Claim) -> None:
    """A manifest row could only lead outside if the checks of reports failed; DuckDB is the second wall."""
    commit_steps(store, claimed, range(1, 2))
    file = store.artifacts.local_path(store.telemetry.segments(claimed.uuid)[0].path)
    assert file is not None
    outside = store.artifacts.local_root.parent / "outside.parquet"
    outside.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(outside)
    with pytest.raises(duckdb.PermissionException):
        store.completions.completions(claimed.uuid)


def test_the_artifacts_may_lie_behind_a_link_and_an_odd_name(tmp_path: Path) -> None:
    (tmp_path / "a [b]* 'c'").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a [b]* 'c'")
    store = open_store(tmp_path / "link")
    store.registry.ensure_owner("token")
    create_job(store)
    claimed = claim(store)
    commit_steps(store, claimed, range(1, 3), rows=1)
    assert found(store, claimed) == [(2, 0), (1, 0)]
    store.close()
