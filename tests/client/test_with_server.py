"""The SDK against the real server: uploads, queued and running jobs, watching across a restart of the server."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Server, wait_until
from server.running import Running, running

from rewardsmith import DatasetError, FinetuningError, GRPOConfig, RequestError, Rewardsmith, SamplingParamsConfig, wire
from rewardsmith.client.stream import Interruption, Step


def length(prompt, completion, example):
    return len(completion) / 10


def shortness(prompt, completion, example):
    print("length", len(completion))
    return 1 / (1 + len(completion))


CONFIG = GRPOConfig(
    base_model="countdown-tiny",
    reward_fns=[length],
    train_steps=3,
    sampling_params=SamplingParamsConfig(max_tokens=32),
)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("api") / "home") as server:
        server.prepare()
        yield server


@pytest.fixture
def rs(api: Running) -> Rewardsmith:
    return Rewardsmith(api.http.headers["Authorization"].split()[1], api.url, quiet=True)


def create(rs: Rewardsmith) -> str:
    return rs.finetuning.jobs.create(config=CONFIG, dataset="rows", repo="sums").uuid


def test_a_dataset_comes_back_as_it_was(rs: Rewardsmith, tmp_path: Path):
    rows = [{"prompt": f"{n} = ", "nums": [n, 1.5], "answer": n, "note": "\u2028 é"} for n in range(3)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    uploaded = rs.datasets.from_file(tmp_path / "sums.jsonl", name="types")
    assert (uploaded.rows, uploaded.columns) == (3, ["prompt", "nums", "answer", "note"])
    assert rs.datasets.get("types") == rs.datasets.get(uploaded) == uploaded
    assert "types" in [dataset.name for dataset in rs.datasets.list()]
    saved = rs.datasets.download(uploaded, dest=tmp_path)
    assert [json.loads(line) for line in saved.read_text().split("\n") if line] == rows
    with pytest.raises(RequestError, match="types"):
        rs.datasets.from_file(tmp_path / "sums.jsonl", name="types")
    rs.datasets.delete(uploaded)
    with pytest.raises(RequestError, match="HTTP 404"):
        rs.datasets.get("types")


def test_a_bad_file_is_refused_with_its_rows(rs: Rewardsmith, tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n{"prompt": ""}\n')
    with pytest.raises(DatasetError, match=r"(?s)\Abad\.jsonl was refused.*2.*3(?!.*HTTP)"):
        rs.datasets.from_file(tmp_path / "bad.jsonl")
    with pytest.raises(RequestError, match="HTTP 404"):
        rs.datasets.get("bad")


def test_repos_are_created_once_listed_and_deleted(rs: Rewardsmith):
    repo = rs.repos.create(name="short-lived", description="a repo")
    assert rs.repos.create(name="short-lived", exists_ok=True).uuid == repo.uuid
    with pytest.raises(RequestError, match="short-lived"):
        rs.repos.create(name="short-lived")
    assert rs.repos.get(repo).description == "a repo"
    assert repo.uuid in [r.uuid for r in rs.repos.list()]
    rs.repos.delete(repo)
    with pytest.raises(RequestError, match="HTTP 404"):
        rs.repos.get("short-lived")


def test_a_queued_job_is_complete_and_cancels_at_once(rs: Rewardsmith, capsys: pytest.CaptureFixture):
    uuid = create(rs)
    job = rs.finetuning.jobs.get(uuid)
    assert (job.status, job.dataset, job.base_model, job.revision) == ("queued", "rows", "countdown-tiny", 1)
    assert (job.params.learning_rate, job.params.train_steps) == (1e-5, 3), "the defaults are filled in"
    assert (
        job.params.reward_fns["length"].source
        == "def length(prompt, completion, example):\n    return len(completion) / 10\n"
    )
    assert uuid in [j.uuid for j in rs.finetuning.jobs.list(status="queued", repo="sums")]
    assert rs.adapters.get(job.adapter_id, wait=False).finetuning_job_uuid == uuid
    assert job.adapter_id in [adapter.name for adapter in rs.adapters.list("sums")]
    rs.adapters.cancel(job.adapter_id)
    assert rs.finetuning.jobs.get(uuid).status == "canceled"
    rs.finetuning.jobs.watch(uuid)
    assert "already canceled. Nothing to watch." in capsys.readouterr().out
    with pytest.raises(RequestError, match="HTTP 409"):
        rs.adapters.update_config(job.adapter_id, {"reward_fns": [shortness]})


def test_rewards_change_while_a_job_waits_and_nothing_else_does(rs: Rewardsmith):
    uuid = create(rs)
    adapter = rs.finetuning.jobs.get(uuid).adapter_id
    config = rs.adapters.get_config(adapter)
    config.reward_fns["shortness"] = shortness
    del config.reward_fns["length"]
    rs.adapters.update_config(adapter, config)
    assert list(rs.adapters.get_config(adapter).reward_fns) == ["shortness"]
    assert [[f.name for f in r.functions] for r in rs.finetuning.jobs.revisions(uuid)] == [["length"], ["shortness"]]
    rs.adapters.update_config(adapter, rs.adapters.get_config(adapter))
    assert len(rs.finetuning.jobs.revisions(uuid)) == 2, "what is the same makes no revision"
    config.train_steps = 9
    with pytest.raises(RequestError, match="train_steps"):
        rs.adapters.update_config(adapter, config)
    rs.finetuning.jobs.cancel(uuid)


def test_a_finished_version_is_archived_and_deleted(rs: Rewardsmith):
    uuid = create(rs)
    rs.finetuning.jobs.cancel(uuid)
    name = rs.finetuning.jobs.get(uuid).adapter_id
    rs.adapters.archive(name)
    tag = int(name.split("/")[1])
    assert tag not in [version.tag for version in rs.repos.get("sums").versions]
    rs.adapters.unarchive(name)
    assert tag in [version.tag for version in rs.repos.get("sums").versions]
    with pytest.raises(RequestError):
        rs.adapters.download(name)
    rs.adapters.delete(name)
    with pytest.raises(RequestError, match="HTTP 404"):
        rs.adapters.get(name)


def test_watching_a_run_from_its_first_step_to_its_last(api: Running, rs: Rewardsmith, capsys: pytest.CaptureFixture):
    claim, journal = api.claimed_job()

    def run() -> None:
        for step in (1, 2, 3):
            journal.step(step, total_reward_std=0.5, **{"reward/length/mean": step / 10})
            seen.wait(20)
        journal.post("finish", status="completed", checkpoint=None)

    seen = threading.Event()
    trainer = threading.Thread(target=run)
    trainer.start()
    steps = []
    for event in rs.finetuning.jobs.stream(claim.uuid):
        if isinstance(event, Step):
            steps.append(event)
            seen.set()
    trainer.join()
    assert [step.step for step in steps] == [1, 2, 3]
    assert steps[-1].metrics["reward/length/mean"] == pytest.approx(0.3)
    points = rs.finetuning.jobs.metrics(claim.uuid, series="total_reward", after_step=1)
    assert [(p.step, p.value) for p in points["total_reward"]] == [(2, 0.2), (3, pytest.approx(0.3))]
    assert [event.kind for event in rs.finetuning.jobs.events(claim.uuid)][-1] == "status"
    assert list(rs.finetuning.jobs.completions(claim.uuid)) == []
    assert list(rs.finetuning.jobs.reward_logs(claim.uuid)) == []
    capsys.readouterr()


def test_a_job_that_fails_raises_its_error(api: Running, rs: Rewardsmith):
    failures = []

    def fail_the_next() -> None:
        claim = wait_until(lambda: api.store.runs.claim("test-host", 60), "a job")
        finish = wire.Finish(fence=claim.fence, status="errored", error="the sampler was out of luck")
        api.store.runs.finish(claim.uuid, finish, 60)

    for job in rs.finetuning.jobs.list(status="queued"):
        rs.finetuning.jobs.cancel(job)
    trainer = threading.Thread(target=fail_the_next)
    trainer.start()
    with pytest.raises(FinetuningError, match="out of luck"):
        failures.append(rs.adapters.create(config=CONFIG, dataset="rows", repo="sums"))
    trainer.join()


@pytest.mark.slow
def test_watching_survives_a_restart_of_the_server(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with Server(tmp_path / "home", dispatcher=False) as server:
        rs = server.client()
        rs.datasets.from_file(tmp_path / "rows.jsonl")
        rs.repos.create(name="sums")
        uuid = create(rs)
        events = rs.finetuning.jobs.stream(uuid)
        assert next(e for e in events if isinstance(e, wire.Job)).status == "queued"
        server.kill()
        assert next(e for e in events if isinstance(e, Interruption)).over is False
        server.start()
        assert next(e for e in events if isinstance(e, Interruption)).over is True
        rs.finetuning.jobs.cancel(uuid)
        *_, last = events
        assert last.status == "canceled"
