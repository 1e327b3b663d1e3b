"""Reward logs as they are asked for: every filter, and the folded view."""

from typing import Any, get_args

import pytest
from stored import claim, create_job, report_step, reward_log, write_segment

from rewardsmith import wire
from rewardsmith.errors import ConfigError
from rewardsmith.rewards.outcomes import Outcome
from rewardsmith.store import Claim, Store, reward_logs, segment_search
from rewardsmith.wire.records import CallOutcome

TRACEBACK = 'Traceback (most recent call last):\n  File "exact", line {line}\nKeyError: {key}'


@pytest.fixture
def claimed(store: Store) -> Claim:
    create_job(store)
    return claim(store)


def commit(store: Store, claimed: Claim, step: int, rows: list[dict[str, Any]], phase: str = "train") -> None:
    segment = write_segment(store, claimed.uuid, [row | {"phase": phase} for row in rows], family="reward_logs")
    report_step(store, claimed, step, segments=[segment])


def found(store: Store, claimed: Claim, **filters: Any) -> list[tuple[int, int]]:
    page = store.completions.reward_logs(claimed.uuid, wire.LogFilters(**filters))
    return [(row["step"], row["idx"]) for row in page.data]


def folded(store: Store, claimed: Claim, limit: int = 50, **filters: Any) -> wire.FoldedLogs:
    return store.completions.folded_logs(claimed.uuid, wire.LogFilters(**filters), limit=limit)


def test_the_outcomes_of_the_wire_are_those_of_the_pool() -> None:
    assert get_args(CallOutcome) == get_args(Outcome)


def test_calls_that_said_nothing_are_shown_on_request(store: Store, claimed: Claim) -> None:
    rows = [
        reward_log(1, 0, prints=""),
        reward_log(1, 1, prints="hello"),
        reward_log(1, 2, prints="", outcome="abstain", value=None),
        reward_log(1, 3, prints="", outcome="not_a_number"),
        reward_log(1, 4, prints="", outcome="infrastructure", value=None),
    ]
    commit(store, claimed, 1, rows)
    assert found(store, claimed) == [(1, 1), (1, 3), (1, 4)]
    assert found(store, claimed, every=True) == [(1, idx) for idx in range(5)]
    assert found(store, claimed, every=True, outcome="ok") == [(1, 0), (1, 1)]


def test_steps_epochs_and_phases(store: Store, claimed: Claim) -> None:
    for step in range(0, 21, 5):  # ten steps are one epoch
        commit(store, claimed, step, [reward_log(step, 0)], phase="train" if step else "eval")
    assert found(store, claimed, from_step=5, to_step=15) == [(15, 0), (10, 0), (5, 0)]
    assert found(store, claimed, from_step=15) == [(20, 0), (15, 0)]
    assert found(store, claimed, to_step=5) == [(5, 0), (0, 0)]
    assert found(store, claimed, epoch=1) == [(10, 0), (5, 0)]
    assert found(store, claimed, epoch=2) == [(20, 0), (15, 0)]
    assert found(store, claimed, epoch=0, phase="eval") == [(0, 0)]
    assert found(store, claimed, phase="eval", from_step=1) == []


def test_a_range_of_steps_reads_no_file_outside(store: Store, claimed: Claim) -> None:
    for step in (1, 2, 3):
        commit(store, claimed, step, [reward_log(step, 0)])
    for segment in store.telemetry.segments(claimed.uuid):
        if segment.step != 2:
            store.artifacts.delete(segment.path)
    assert found(store, claimed, from_step=2, to_step=2, every=True) == [(2, 0)]


def test_equal_errors_are_folded_with_a_count_and_an_example(store: Store, claimed: Claim) -> None:
    for step in (1, 2, 3):
        rows = [
            reward_log(step, idx, outcome="exception", error=TRACEBACK.format(line=idx, key="'target'"), prints="")
            for idx in range(4)
        ]
        rows.append(reward_log(step, 4, outcome="timeout", error=f"no result after {step} s\nin sleep", prints=""))
        rows.append(reward_log(step, 5, prints=f"\nlength {step * 10}\nand more"))
        rows.append(reward_log(step, 6, "other", prints=f"length {step}"))
        rows.append(reward_log(step, 7, prints=""))
        commit(store, claimed, step, rows)
    folds = folded(store, claimed)
    assert [(one.function, one.outcome, one.gist, one.count) for one in folds.data] == [
        ("exact", "exception", "KeyError: 'target'", 12),
        ("exact", "ok", "length #", 3),
        ("exact", "timeout", "no result after # s", 3),
        ("other", "ok", "length #", 3),
    ]
    assert folds.others == 0 and folds.next is None
    first = folds.data[0]
    assert (first.first_step, first.last_step, first.example.step) == (1, 3, 3)
    assert first.example.error == TRACEBACK.format(line=first.example.idx, key="'target'")
    assert sum(one.count for one in folded(store, claimed, every=True).data) == 24
    assert [one.count for one in folded(store, claimed, function="other", to_step=2).data] == [2]


def test_folds_beyond_the_limit_are_counted(store: Store, claimed: Claim) -> None:
    words = ["red", "red", "red", "green", "green", "blue"]
    commit(store, claimed, 1, [reward_log(1, idx, prints=word) for idx, word in enumerate(words)])
    folds = folded(store, claimed, limit=1)
    assert [(one.gist, one.count) for one in folds.data] == [("red", 3)] and folds.others == 3


def test_revisions_are_not_folded_together(store: Store, claimed: Claim) -> None:
    for step, revision in ((1, 1), (2, 1), (3, 2)):
        commit(store, claimed, step, [reward_log(step, 0, prints="same", revision=revision)])
    assert sorted((one.revision, one.count) for one in folded(store, claimed).data) == [(1, 2), (2, 1)]


def test_a_long_log_is_folded_in_parts_that_add_up(
    store: Store, claimed: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_search, "SEARCH_SECONDS", -1)
    monkeypatch.setattr(reward_logs, "ROWS_AT_ONCE", 1)
    for step in range(1, 40):
        commit(
            store, claimed, step, [reward_log(step, 0, prints="same"), reward_log(step, 1, prints="odd" * (step % 2))]
        )
    counts, after, pages = {"same": 0, "odd": 0}, None, 0
    while after is not None or not pages:
        page = store.completions.folded_logs(claimed.uuid, wire.LogFilters(), after=after)
        for one in page.data:
            counts[one.gist] += one.count
        after, pages = page.next, pages + 1
    assert counts == {"same": 39, "odd": 20} and pages > 2


def test_other_cursors_are_refused(store: Store, claimed: Claim) -> None:
    commit(store, claimed, 1, [reward_log(1, 0)])
    with pytest.raises(ConfigError, match="pass back what `next` gave"):
        store.completions.folded_logs(claimed.uuid, wire.LogFilters(), after="x")
