"""`rs.revisions` and the filters of reward logs: what is sent, against a scripted server; the rest on a real one."""

from collections.abc import Iterator

import pytest
from client.scripted import Answer, ScriptedServer, scripted_server
from server.running import TOKEN, Running, running
from store.stored import completion, report_step, reward_log, write_segment

from rewardsmith import ConfigError, GRPOConfig, RequestError, RewardFunction, Rewardsmith, RewardSourceError
from rewardsmith.store import Claim

JOB = "/v2/finetuning/jobs/j-1"
REVISION = {"revision": 2, "createdAt": "2026-01-01T00:00:00Z", "createdBy": "me", "functions": []}


def length(prompt, completion, example):
    return len(completion) / 10


def right(prompt, completion, example):
    print("looked for", example["answer"])
    return 1.0 if completion == str(example["answer"]) else 0.0


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as one:
        yield one


@pytest.fixture
def scripted(server: ScriptedServer) -> Rewardsmith:
    return Rewardsmith("pb_test", server.url, quiet=True)


# ---- what is sent


def test_a_change_names_only_what_is_to_be_different(server: ScriptedServer, scripted: Rewardsmith):
    server.on(f"POST {JOB}/revisions", REVISION)
    made = scripted.revisions.apply("j-1", [length], note="why", compared_steps=3)
    scripted.revisions.apply("j-1", remove=["a"], weights={"b": 2, "c": {1: 0.0, 50: 1.0}})
    scripted.revisions.apply("j-1", {"f": RewardFunction.from_callable(length, weight=2.0)}, remove="a")
    first, second, third = (request.json() for request in server.sent(f"POST {JOB}/revisions"))
    assert made.revision == 2
    assert (list(first["functions"]), first["note"], first["comparedSteps"]) == (["length"], "why", 3)
    assert first["functions"]["length"].keys() == {"encodedFn"}
    assert (second["functions"], second["remove"]) == ({}, ["a"])
    assert second["weights"] == {"b": 2, "c": {"1": 0.0, "50": 1.0}}
    assert (third["functions"]["f"]["weight"], third["remove"]) == (2.0, ["a"])


def test_a_change_whose_answer_was_lost_is_sent_again(server: ScriptedServer, scripted: Rewardsmith):
    """The server makes no second revision of the same change."""
    server.on(f"POST {JOB}/revisions", Answer(503, {"error": "busy"}), REVISION)
    server.on(f"POST {JOB}/revisions/1/rollback", Answer(503, {"error": "busy"}), REVISION)
    assert scripted.revisions.apply("j-1", [length]).revision == 2
    assert scripted.revisions.rollback("j-1", 1, note="better").revision == 2
    assert server.sent(f"POST {JOB}/revisions/1/rollback")[-1].json() == {"note": "better"}


def test_what_makes_no_sense_is_refused_before_anything_is_sent(server: ScriptedServer, scripted: Rewardsmith):
    sent = len(server.requests)
    with pytest.raises(ConfigError, match="nothing is to change"):
        scripted.revisions.apply("j-1")
    with pytest.raises(ConfigError, match="give one of them"):
        scripted.revisions.dry_run("j-1", [length], steps=1, completions=2)
    with pytest.raises(RewardSourceError, match="lambda"):
        scripted.revisions.dry_run("j-1", {"f": lambda prompt, completion, example: 1.0})
    with pytest.raises(ConfigError, match=r"no filter 'stepp'; they have function, revision, step"):
        scripted.finetuning.jobs.reward_logs("j-1", stepp=1)
    assert len(server.requests) == sent


def test_pages_of_folds_add_up(server: ScriptedServer, scripted: Rewardsmith):
    row = {"step": 9, "idx": 0, "epoch": 1.0, "phase": "train", "row": 0, "sample": 0, "value": 0.0, "seconds": 0.1}
    row |= {"function": "f", "revision": 1, "outcome": "exception", "prints": "", "error": "E"}
    fold = {name: row[name] for name in ("function", "revision", "outcome")} | {"gist": "E", "example": row}
    newer = [fold | {"count": 2, "firstStep": 8, "lastStep": 9}]
    older = [
        fold | {"count": 5, "firstStep": 1, "lastStep": 7},
        fold | {"gist": "G", "count": 6, "firstStep": 3, "lastStep": 3},
    ]
    pages = [{"data": newer, "others": 1, "next": "n"}, {"data": older, "others": 2, "next": None}]
    server.on(f"GET {JOB}/reward-logs/folded", *pages)
    found = scripted.finetuning.jobs.reward_logs("j-1", folded=True, from_step=1, every=True)
    assert [(one.gist, one.count, one.first_step, one.last_step) for one in found.data] == [
        ("E", 7, 1, 9),
        ("G", 6, 3, 3),
    ]
    assert found.others == 3
    first, second = (request.path for request in server.sent(f"GET {JOB}/reward-logs/folded"))
    assert "from_step=1" in first and "every=true" in first and "after=n" in second


# ---- the real server


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("api") / "home") as one:
        one.prepare()
        yield one


@pytest.fixture
def rs(api: Running) -> Rewardsmith:
    return Rewardsmith(TOKEN, api.url, quiet=True)


def training(api: Running, rs: Rewardsmith) -> tuple[str, Claim]:
    config = GRPOConfig(
        base_model="countdown-tiny", reward_fns=[length], train_steps=3, num_generations=2, effective_batch_size=2
    )
    job = rs.finetuning.jobs.create(config=config, dataset="rows", repo="sums")
    while (claim := api.store.runs.claim("test-host", 60)) and claim.uuid != job.uuid:
        pass
    assert claim
    return job.adapter_id, claim


def test_a_change_is_tried_applied_compared_and_taken_back(api: Running, rs: Rewardsmith):
    adapter, claim = training(api, rs)
    rows = [completion(1, idx, row=0, sample=idx, completion=text) for idx, text in enumerate(("4", "five"))]
    rows = [row | {"scores": {"length": {"value": 0.1, "outcome": "ok", "seconds": 0.0}}} for row in rows]
    report_step(api.store, claim, 1, segments=[write_segment(api.store, claim.uuid, rows)])
    tried = rs.revisions.dry_run(adapter, [right], steps=1)
    assert [(one.name, one.change) for one in tried.functions] == [("length", "same"), ("right", "added")]
    assert tried.functions[1].new and tried.functions[1].new.mean == 0.5 and len(rs.revisions.list(adapter)) == 1
    second = rs.revisions.apply(adapter, [right], remove=["length"], note="what counts")
    assert (second.revision, second.note, [f.name for f in second.functions]) == (2, "what counts", ["right"])
    assert second.functions[0].source.startswith("def right(")
    assert rs.revisions.get(adapter, 2) == second == rs.revisions.list(adapter)[-1]
    assert [one.change for one in rs.revisions.diff(adapter, 2).functions] == ["added", "removed"]
    third = rs.revisions.rollback(adapter, to=1)
    assert third.sha256 == rs.revisions.get(adapter, 1).sha256 and third.note == "rollback to revision 1"
    assert [one.change for one in rs.revisions.diff(adapter, 3, against=1).functions] == ["same"]
    with pytest.raises(RequestError, match="HTTP 404"):
        rs.revisions.rollback(adapter, to=9)


def test_reward_logs_by_adapter_filtered_and_folded(api: Running, rs: Rewardsmith):
    adapter, claim = training(api, rs)
    for step in (1, 2, 3):
        rows = [reward_log(step, idx, "length", prints=f"seen {idx}" * (idx > 0)) for idx in range(3)]
        report_step(api.store, claim, step, segments=[write_segment(api.store, claim.uuid, rows, family="reward_logs")])
    logs = rs.adapters.reward_logs
    assert [(row.step, row.idx) for row in logs(adapter, from_step=2, to_step=2)] == [(2, 1), (2, 2)]
    assert len(list(logs(adapter, every=True))) == 9
    (fold,) = logs(adapter, folded=True, function="length").data
    assert (fold.count, fold.gist, fold.first_step, fold.last_step) == (6, "seen #", 1, 3)
    assert logs(adapter, folded=True, outcome="timeout").data == []
