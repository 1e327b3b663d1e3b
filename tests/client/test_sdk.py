"""The methods of the SDK by what they send, return, print and raise (contract 1.1 to 1.5)."""

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from client.scripted import USER, Answer, ScriptedServer, job, scripted_server, sse, step

from rewardsmith import ConfigError, DatasetError, FinetuningError, GRPOConfig, RequestError, ResponseError, Rewardsmith
from rewardsmith.wire import AdapterId

DATASET = {"uuid": "d-1", "id": 7, "name": "rows", "rows": 2, "columns": ["prompt"]}
JOBS = "/v2/finetuning/jobs"


def a_reward(prompt, completion, example):
    return 1.0


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


@pytest.fixture
def rs(server: ScriptedServer) -> Rewardsmith:
    return Rewardsmith("pb_test", server.url, quiet=True)


def version(status: str = "completed", **fields: object) -> dict[str, object]:
    return {
        "repo": "my-repo",
        "tag": 1,
        "status": status,
        "finetuningJob": {"uuid": "j-1", "error": None},
        **fields,
    }


# ---- connection


def test_connecting_says_so_on_stderr_and_sends_token_and_agent(server: ScriptedServer, capsys: pytest.CaptureFixture):
    Rewardsmith("pb_test", server.url)
    captured = capsys.readouterr()
    assert captured.err == "Connected to Rewardsmith as User(id=u-1, username=owner)\n"
    assert captured.out == ""
    assert server.requests[0].headers["Authorization"] == "Bearer pb_test"
    assert server.requests[0].headers["User-Agent"].startswith("rewardsmith-sdk/")


def test_a_token_that_would_travel_in_the_open_is_warned_about(server: ScriptedServer, capsys: pytest.CaptureFixture):
    Rewardsmith("pb_test", server.url.replace("127.0.0.1", "0.0.0.0"), quiet=True)
    assert "warning: the API token travels unencrypted" in capsys.readouterr().err


# ---- datasets


def test_an_upload_goes_to_the_presigned_url_without_the_token(server: ScriptedServer, rs: Rewardsmith, tmp_path: Path):
    server.on("POST /v2/datasets/upload", {"presignedUrl": f"{server.url}/put/x", "uploadToken": "x"})
    server.on("PUT /put/x", Answer(200, b""))
    server.on("PUT /v2/datasets/upload", {**DATASET, "status": "connecting"})
    server.on("GET /v1/datasets/name/rows", DATASET)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    dataset = rs.datasets.from_file(tmp_path / "rows.jsonl")
    assert (dataset.name, dataset.connection_type, dataset.connection_name, dataset.status) == (
        "rows", "file", "file_uploads", "connected"
    )  # fmt: skip
    [put] = server.sent("PUT /put/x")
    assert put.body == b'{"prompt": "a"}\n'
    assert "Authorization" not in put.headers
    assert server.sent("PUT /v2/datasets/upload")[0].json() == {"name": "rows", "uploadToken": "x"}


def test_a_refused_file_is_a_dataset_error_with_the_reasons(server: ScriptedServer, rs: Rewardsmith, tmp_path: Path):
    server.on("POST /v2/datasets/upload", {"presignedUrl": f"{server.url}/put/x", "uploadToken": "x"})
    server.on("PUT /put/x", Answer(200, b""))
    server.on("PUT /v2/datasets/upload", Answer(400, {"error": "rows.jsonl was refused: row 3: prompt is empty"}))
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(DatasetError, match=r"^rows\.jsonl was refused: row 3: prompt is empty$"):
        rs.datasets.from_file(tmp_path / "rows.jsonl")
    assert isinstance(DatasetError("x"), ValueError), "contract 1.3"
    with pytest.raises(DatasetError, match="there is no file"):
        rs.datasets.from_file(tmp_path / "absent.jsonl")


def test_registering_is_not_repeated_because_its_token_is_used_up(
    server: ScriptedServer, rs: Rewardsmith, tmp_path: Path
):
    server.on("POST /v2/datasets/upload", {"presignedUrl": f"{server.url}/put/x", "uploadToken": "x"})
    server.on("PUT /put/x", Answer(200, b""))
    server.on("PUT /v2/datasets/upload", Answer(hang_up=True))
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(RuntimeError, match="broke before the answer came"):
        rs.datasets.from_file(tmp_path / "rows.jsonl")
    assert len(server.sent("PUT /v2/datasets/upload")) == 1


def test_a_frame_keeps_the_types_of_its_values(server: ScriptedServer, rs: Rewardsmith):
    pandas = pytest.importorskip("pandas")
    server.on("POST /v2/datasets/upload", {"presignedUrl": f"{server.url}/put/x", "uploadToken": "x"})
    server.on("PUT /put/x", Answer(200, b""))
    server.on("PUT /v2/datasets/upload", DATASET)
    row = {"prompt": "é", "nums": [1, 2], "target": 3, "third": 1 / 3, "gone": None}
    rs.datasets.from_pandas_dataframe(pandas.DataFrame([row, row]), name="rows")
    lines = server.sent("PUT /put/x")[0].body.decode().splitlines()
    assert [json.loads(line) for line in lines] == [{**row, "third": pytest.approx(1 / 3, abs=1e-14)}] * 2
    assert server.sent("PUT /v2/datasets/upload")[0].json()["name"] == "rows"


@pytest.mark.parametrize(("dest", "file"), [(".", "rows.jsonl"), ("a/b", "a/b.jsonl"), ("c.jsonl", "c.jsonl")])
def test_a_download_gets_the_suffix_of_its_format(
    server: ScriptedServer, rs: Rewardsmith, tmp_path: Path, dest: str, file: str
):
    server.on("GET /v2/datasets/rows/download-link", {"url": f"{server.url}/get/x", "fileExtension": "jsonl"})
    server.on("GET /get/x", Answer(200, b"{}\n"))
    assert rs.datasets.download("file_uploads/rows", dest=tmp_path / dest) == tmp_path / file
    assert (tmp_path / file).read_bytes() == b"{}\n"


def test_a_dataset_is_found_by_name_connection_or_object(server: ScriptedServer, rs: Rewardsmith):
    server.on("GET /v1/datasets/name/rows", DATASET)
    dataset = rs.datasets.get("rows")
    rs.datasets.get("other/rows")
    rs.datasets.get(dataset)
    paths = [r.path for r in server.sent("GET /v1/datasets/name/rows")]
    assert [path.partition("=")[2] for path in paths] == ["file_uploads", "other", "file_uploads"]


# ---- repos


def test_repos_hide_archived_versions(server: ScriptedServer, rs: Rewardsmith):
    versions = [
        {"tag": tag, "createdAt": "2026-01-01T00:00:00Z", "createdBy": "me", "baseModel": "m", "archived": tag == 2}
        for tag in (1, 2)
    ]
    server.on("POST /v2/repos", {"uuid": "r-1", "name": "my-repo", "versions": versions})
    repo = rs.repos.create(name="my-repo", exists_ok=True)
    assert server.sent("POST /v2/repos")[0].json() == {"name": "my-repo", "description": None, "existsOk": True}
    assert [v.tag for v in repo.versions] == [1]
    assert [v.tag for v in repo.all_versions] == [1, 2]
    server.on("DELETE /v2/repos/r-1", Answer(204, b""))
    rs.repos.delete(repo)
    assert server.sent("DELETE /v2/repos/r-1")


# ---- jobs


def test_a_job_is_sent_once_under_one_key_and_confirmed(
    server: ScriptedServer, rs: Rewardsmith, capsys: pytest.CaptureFixture
):
    server.on("GET /v1/datasets/name/rows", DATASET)
    server.on(f"POST {JOBS}", Answer(503, {"error": "starting"}), job("queued"))
    config = GRPOConfig(base_model="countdown-tiny", reward_fns=[a_reward], train_steps=5, epochs=2)
    created = rs.finetuning.jobs.create(
        config=config, dataset=rs.datasets.get("rows"), repo="my-repo", description="first", show_tensorboard=True
    )
    first, second = server.sent(f"POST {JOBS}")
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
    sent = second.json()
    source = base64.b64decode(sent["params"]["rewardFns"]["functions"]["a_reward"]["encodedFn"]).decode()
    assert source == "def a_reward(prompt, completion, example):\n    return 1.0\n"
    assert sent["params"]["train_steps"] == 5
    assert "learning_rate" not in sent["params"], "the server fills in defaults"
    assert (sent["dataset"], sent["repo"], sent["continueFromVersion"]) == ("rows", "my-repo", None)
    assert (created.uuid, created.status, created.dataset, created.accelerator) == ("j-1", "queued", "rows", "cpu")
    assert (created.target_repo, created.target_version_tag, created.adapter_id) == ("my-repo", 1, "my-repo/1")
    assert created.params.train_steps == 3
    captured = capsys.readouterr()
    assert all(word in captured.out for word in ("countdown-tiny", "base", "my-repo/1", "j-1"))
    assert "epochs is ignored" in captured.err
    assert "no TensorBoard" in captured.err


def test_what_was_changed_inside_a_config_is_sent_too(server: ScriptedServer, rs: Rewardsmith):
    server.on(f"POST {JOBS}", job("queued"))
    config = GRPOConfig(base_model="m")
    config.reward_fns["later"] = a_reward
    config.sampling_params.temperature = 0.5
    rs.finetuning.jobs.create(config=config, dataset="rows", repo="my-repo")
    params = server.requests[-1].json()["params"]
    assert list(params["rewardFns"]["functions"]) == ["later"]
    assert params["sampling_params"] == {"temperature": 0.5}


def test_a_base_model_in_a_folder_here_is_named_by_its_absolute_path(
    server: ScriptedServer, rs: Rewardsmith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server.on(f"POST {JOBS}", job("queued"))
    (tmp_path / "below").mkdir()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = str((tmp_path / "model").resolve())
    for given, sent in [("../model", folder), ("~/model", folder), ("./model", "./model"), ("model", "model")]:
        config = GRPOConfig(base_model=given)
        rs.finetuning.jobs.create(config=config, dataset="rows", repo="my-repo")
        assert server.requests[-1].json()["params"]["base_model"] == sent
        assert config.base_model == given


def test_two_jobs_have_two_keys(server: ScriptedServer, rs: Rewardsmith):
    server.on(f"POST {JOBS}", job("queued"))
    for _ in range(2):
        rs.finetuning.jobs.create(config={"base_model": "m"}, dataset="rows", repo="my-repo")
    assert len({r.headers["Idempotency-Key"] for r in server.sent(f"POST {JOBS}")}) == 2


def test_a_bad_config_or_reward_is_refused_before_anything_is_sent(server: ScriptedServer, rs: Rewardsmith):
    sent = len(server.requests)
    with pytest.raises(ConfigError, match="train_steps"):
        rs.finetuning.jobs.create(config={"num_train_steps": 3}, dataset="rows", repo="r")
    with pytest.raises(ConfigError, match="GRPOConfig or a dict"):
        rs.finetuning.jobs.create(config="config.json", dataset="rows", repo="r")
    with pytest.raises(ConfigError, match="lambda"):
        rs.finetuning.jobs.create(config={"reward_fns": {"f": lambda p, c, e: 1.0}}, dataset="rows", repo="r")
    for version_of_nothing in ("my-repo", 1):
        with pytest.raises(ConfigError, match="<repo>/<version>"):
            rs.finetuning.jobs.create(config={}, dataset="rows", repo="r", continue_from_version=version_of_nothing)
    assert len(server.requests) == sent


def test_a_list_of_another_shape_is_no_answer_of_this_api(server: ScriptedServer, rs: Rewardsmith):
    server.on("GET /v2/repos", {"data": {"other": []}})
    with pytest.raises(ResponseError):
        rs.repos.list()


def test_lists_go_on_over_pages(server: ScriptedServer, rs: Rewardsmith):
    page = {"data": {"jobs": [job("completed")] * 2}, "next": "c1"}
    server.on(f"GET {JOBS}", page, {"data": {"jobs": [job("errored")]}, "next": None})
    found = rs.finetuning.jobs.list(limit=50, status="errored", repo="my-repo")
    assert [j.status for j in found] == ["completed", "completed", "errored"]
    assert "after=c1" in server.requests[-1].path
    assert "status=errored" in server.requests[-1].path


def test_completions_are_fetched_page_by_page(server: ScriptedServer, rs: Rewardsmith):
    row = {
        "step": 1, "epoch": 0.1, "phase": "train", "row": 0, "sample": 0, "prompt": "p", "completion": "c",
        "total_reward": None, "advantage": 0.0, "finish_reason": "stop", "tokens": 3, "revision": 1,
        "policy_version": 0, "scores": {"f": None}, "outcomes": {"f": "abstain"},
    }  # fmt: skip
    pages = [{"data": [{**row, "idx": i} for i in (0, 1)], "next": "n1"}, {"data": [{**row, "idx": 2}], "next": None}]
    server.on(f"GET {JOBS}/j-1/completions", *pages)
    rows = rs.finetuning.jobs.completions("j-1", step=1, function="f", min_score=0.0)
    assert next(rows).idx == 0
    assert len(server.sent(f"GET {JOBS}/j-1/completions")) == 1
    assert [r.idx for r in rows] == [1, 2]
    first, second = (r.path for r in server.sent(f"GET {JOBS}/j-1/completions"))
    assert "min_score=0.0" in first
    assert "max_score" not in first
    assert "after=n1" in second


@pytest.mark.parametrize("ref", ["j-1", {"uuid": "j-1"}, "my-repo/1"])
def test_a_job_is_found_by_uuid_dict_or_adapter(server: ScriptedServer, rs: Rewardsmith, ref: object):
    server.on("GET /v2/repos/my-repo/version/1", version())
    server.on(f"POST {JOBS}/j-1/cancel", {})
    rs.finetuning.jobs.cancel(ref)
    assert server.sent(f"POST {JOBS}/j-1/cancel")


def test_an_ended_job_has_nothing_to_watch(server: ScriptedServer, rs: Rewardsmith, capsys: pytest.CaptureFixture):
    server.on(f"GET {JOBS}/j-1", job("canceled"))
    rs.finetuning.jobs.watch("j-1")
    assert "already canceled. Nothing to watch." in capsys.readouterr().out


def test_watching_a_job_that_fails_prints_its_error(
    server: ScriptedServer, rs: Rewardsmith, capsys: pytest.CaptureFixture
):
    server.on(f"GET {JOBS}/j-1", job("training"))
    events = sse(("step", step(1, f=0.5), "1.0"), ("job", job("errored", step=1, error="out of luck"), "1.0"))
    server.on(f"GET {JOBS}/j-1/events/stream", Answer(200, events))
    rs.finetuning.jobs.watch("j-1")
    assert capsys.readouterr().out.splitlines()[-2:] == ["Job errored after step 1.", "out of luck"]


def test_a_change_sends_what_is_set_so_that_a_part_is_enough(server: ScriptedServer, rs: Rewardsmith):
    server.on(f"GET {JOBS}/j-1", job("training", params={"base_model": "m", "train_steps": 3, "beta": 0.0}))
    server.on("GET /v2/repos/my-repo/version/1", version("training"))
    server.on(f"PUT {JOBS}/j-1/config", Answer(204, b""))
    config = rs.adapters.get_config("my-repo/1")
    config.reward_fns["added"] = a_reward
    assert rs.adapters.update_config("my-repo/1", config) is None
    rs.adapters.update_config("my-repo/1", {"reward_fns": [a_reward]})
    whole, part = (r.json() for r in server.sent(f"PUT {JOBS}/j-1/config"))
    assert whole["base_model"] == "m"
    assert list(whole["rewardFns"]["functions"]) == ["added"]
    assert list(part) == ["rewardFns"]


# ---- adapters


def test_create_shows_the_job_and_returns_the_adapter(
    server: ScriptedServer, rs: Rewardsmith, capsys: pytest.CaptureFixture
):
    server.on(f"POST {JOBS}", job("queued"))
    server.on(f"GET {JOBS}/j-1", job("queued"))
    events = sse(("job", job("training"), "0.0"), ("step", step(1, f=0.5), "1.0"), ("job", job("completed"), "1.0"))
    server.on(f"GET {JOBS}/j-1/events/stream", Answer(200, events))
    server.on("GET /v2/repos/my-repo/version/1", version(adapterPath="my-repo/1/checkpoint-1", baseModel="m"))
    adapter = rs.adapters.create(config={"base_model": "m"}, dataset="rows", repo="my-repo")
    assert (adapter.repo, adapter.tag, adapter.name, adapter.checkpoint, adapter.id) == (
        "my-repo", 1, "my-repo/1", None, "my-repo/1"
    )  # fmt: skip
    assert (adapter.artifact_path, adapter.finetuning_job_uuid, adapter.finetuning_error, adapter.archived) == (
        "my-repo/1/checkpoint-1", "j-1", None, False
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    order = ["Requested", "This call waits", "The job is in the queue", "Starting.", "Waiting to receive", "step 1/3"]
    positions = [next(i for i, line in enumerate(lines) if line.startswith(text)) for text in order]
    assert positions == sorted(positions)


def test_a_job_without_an_adapter_raises_its_error(server: ScriptedServer, rs: Rewardsmith):
    server.on(f"POST {JOBS}", job("queued"))
    server.on(f"GET {JOBS}/j-1", job("errored"))
    server.on("GET /v2/repos/my-repo/version/1", version("errored", finetuningJob={"uuid": "j-1", "error": "no luck"}))
    with pytest.raises(FinetuningError, match="no luck"):
        rs.adapters.create(config={"base_model": "m"}, dataset="rows", repo="my-repo")


def test_getting_an_unfinished_adapter_waits_for_it(
    server: ScriptedServer, rs: Rewardsmith, capsys: pytest.CaptureFixture
):
    server.on("GET /v2/repos/my-repo/version/1", version("training"), version("training"), version(adapterPath="x"))
    server.on(f"GET {JOBS}/j-1", job("training"))
    server.on(f"GET {JOBS}/j-1/events/stream", Answer(200, sse(("job", job("completed"), "1.0"))))
    assert rs.adapters.get("my-repo/1", wait=False).status == "training"
    assert capsys.readouterr().out == ""
    assert rs.adapters.get("my-repo/1").artifact_path == "x"
    assert "not yet ready" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["my-repo", "my-repo/", "my-repo/x", "my-repo/0", "a/b/1", "my-repo/1@", "/1"])
def test_a_bad_adapter_id_names_the_form(rs: Rewardsmith, text: str):
    with pytest.raises(ValueError, match="<repo>/<version>"):
        rs.adapters.get(text)


def test_adapter_ids_read_back_as_they_were_written():
    assert str(AdapterId.parse("my-repo/12@3")) == "my-repo/12@3"
    assert AdapterId.parse("my-repo/12") == AdapterId("my-repo", 12)


def test_a_version_without_a_job_has_no_config(server: ScriptedServer, rs: Rewardsmith):
    server.on("GET /v2/repos/my-repo/version/1", version(finetuningJob=None))
    with pytest.raises(RequestError, match="not made by a job"):
        rs.adapters.get_config("my-repo/1")


def test_archiving_is_for_whole_versions(server: ScriptedServer, rs: Rewardsmith):
    server.on("PUT /v2/repos/my-repo/version/1", version())
    rs.adapters.archive("my-repo/1")
    rs.adapters.unarchive("my-repo/1")
    assert [r.json() for r in server.sent("PUT /v2/repos/my-repo/version/1")] == [
        {"archived": True},
        {"archived": False},
    ]
    for change in (rs.adapters.archive, rs.adapters.delete):
        with pytest.raises(ConfigError, match="works on whole versions: my-repo/1"):
            change("my-repo/1@2")


def test_a_download_is_named_after_the_version(
    server: ScriptedServer,
    rs: Rewardsmith,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    server.on("GET /v2/repos/my-repo/version/1@2/download", Answer(200, b"zip"))
    server.on("GET /v2/repos/my-repo/version/1/download", Answer(200, b"zip"))
    monkeypatch.chdir(tmp_path)
    assert rs.adapters.download("my-repo/1") == Path("1.zip")
    assert rs.adapters.download("my-repo/1@2", tmp_path) == tmp_path / "1@2.zip"
    assert rs.adapters.download("my-repo/1", tmp_path / "new" / "a.zip").read_bytes() == b"zip"
    assert "Downloading adapter my-repo/1" in (said := capsys.readouterr().out)
    assert said.endswith("Done!\n")


# ---- the recorded exchanges of the stock SDK


def test_what_is_sent_has_the_shapes_of_the_stock_sdk(server: ScriptedServer, rs: Rewardsmith):
    recorded = Path(__file__).parents[3] / "shared" / "reference" / "wire_exchanges.jsonl"
    if not recorded.exists():
        pytest.skip(f"the recorded exchanges are not in {recorded}")
    exchanges = {(e["method"], e["path"]): e for e in map(json.loads, recorded.read_text().splitlines())}
    theirs = exchanges["POST", JOBS]
    server.on(f"POST {JOBS}", theirs["answer"])
    params = {name: value for name, value in theirs["body"]["params"].items() if name != "rewardFns"}
    rs.finetuning.jobs.create(
        config={**params, "reward_fns": {"format": a_reward}},
        dataset=theirs["body"]["dataset"],
        repo=theirs["body"]["repo"],
        description=theirs["body"]["description"],
    )
    ours = server.requests[-1].json()
    assert {**ours["params"], "rewardFns": 0} == {**theirs["body"]["params"], "rewardFns": 0}
    assert {name: ours[name] for name in theirs["body"] if name != "params"} == {
        name: value for name, value in theirs["body"].items() if name != "params"
    }
    assert USER["username"] == exchanges["GET", "/users/current"]["answer"]["username"]
    assert "predibase" not in sys.modules
