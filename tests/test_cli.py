"""The command line as a process: what it prints, what it sends, how it fails. The server is a real one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import free_port
from server.running import ROWS, TOKEN, Running, running

from rewardsmith import ConfigError, wire
from rewardsmith.cli import main
from rewardsmith.cli.datasets import lengths
from rewardsmith.client.objects import Dataset

REWARDS = """\
import math

LIMIT = 3


def half(prompt, completion, example):
    return 0.5


def whole(prompt: str, completion: str, example: dict) -> float:
    import math
    return math.floor(1.5)


def helper(a, b):
    return LIMIT
"""

Cli = Callable[..., "Said"]


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("cli") / "home") as server:
        server.prepare()
        yield server


@pytest.fixture
def cli(api: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Cli:
    """Runs `rewardsmith ...` in a folder with a file of rewards and one of rows, as the owner of the server."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "rows.jsonl").write_bytes(ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REWARDSMITH_API_TOKEN", TOKEN)

    def run(*arguments: str, ok: bool = True, url: str = api.url) -> Said:
        monkeypatch.setenv("REWARDSMITH_BASE_URL", url)
        monkeypatch.setattr(sys, "argv", ["rewardsmith", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = Said(ended.value.code or 0, *capsys.readouterr())
        assert (said.code == 0) == ok, said
        return said

    return run


def submit(cli: Cli, *arguments: str) -> dict[str, Any]:
    settings = ["--set", "base_model=countdown-tiny", "--set", "sampling_params.max_tokens=32"]
    cli("jobs", "create", "--repo", "sums", "--dataset", "rows", *settings, *arguments)
    return cli("jobs", "list", "--json").json()[0]


# ---- what a first look shows


def test_empty_lists_say_what_to_do_next(cli: Cli, tmp_path: Path):
    with running(tmp_path / "home") as empty:
        for group, word in (("datasets", "upload"), ("repos", "create"), ("adapters", "create"), ("jobs", "create")):
            assert f"rewardsmith {group} {word}" in cli(group, "list", url=empty.url).out
            assert cli(group, "list", "--json", url=empty.url).json() == []


def test_every_command_explains_itself(cli: Cli):
    groups = {None: 14, "datasets": 5, "repos": 4, "adapters": 10, "jobs": 12, "revisions": 6}
    for group, commands in groups.items():
        text = cli(*filter(None, [group]), "--help").out
        lines = text.partition("Commands:\n")[2].splitlines()
        assert len(lines) == commands, text
        assert all(line.endswith(".") and not line.endswith("...") for line in lines), (
            "short, whole sentences:\n" + text
        )


def test_the_entry_point_is_a_process(tmp_path: Path):
    command = [sys.executable, "-m", "rewardsmith", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("rewardsmith ")


# ---- a job from files and settings


def test_a_job_takes_functions_of_a_file_and_settings(cli: Cli):
    job = submit(cli, "--rewards", "rewards.py", "--set", "train_steps=7", "--set", "sampling_params.top_p=0.9")
    assert list(job["params"]["rewardFns"]["functions"]) == ["half", "whole"], "those with three parameters"
    assert job["params"]["train_steps"] == 7
    assert job["params"]["sampling_params"]["top_p"] == 0.9
    assert job["status"] == "queued"


def test_settings_go_over_the_config_file_and_functions_can_be_named(cli: Cli, tmp_path: Path):
    config = {"train_steps": 5, "beta": 0.0, "sampling_params": {"temperature": 0.5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    job = submit(cli, "--config", "config.json", "--rewards", "rewards.py:whole", "--set", "train_steps=6")
    assert list(job["params"]["rewardFns"]["functions"]) == ["whole"]
    assert (job["params"]["train_steps"], job["params"]["beta"]) == (6, 0.0)
    assert job["params"]["sampling_params"]["temperature"] == 0.5


def test_a_config_that_is_shown_can_be_used_again_and_its_rewards_changed(cli: Cli, tmp_path: Path):
    first = submit(cli, "--rewards", "rewards.py:half")
    name = f"sums/{first['target_version_tag']}"
    shown = cli("adapters", "config", name).out
    assert "# half, weight 1" in shown
    assert "return 0.5" in shown
    (tmp_path / "again.json").write_text(cli("adapters", "config", name, "--json").out)
    second = submit(cli, "--config", "again.json", "--description", "again")
    assert second["params"] == first["params"]
    changed = cli("adapters", "update-config", name, "--rewards", "rewards.py:whole", "--remove", "half").out
    assert f"Reward functions of {name}: whole" in changed
    revisions = cli("jobs", "revisions", name, "--json").json()
    assert [[f["name"] for f in revision["functions"]] for revision in revisions] == [["half"], ["whole"]]
    assert "not yet" in cli("jobs", "revisions", name).out


def test_a_revision_that_had_no_turn_says_why(cli: Cli, api: Running):
    submit(cli, "--rewards", "rewards.py:half")
    while claim := api.store.runs.claim("test-host", 60):
        last = claim
    job = api.store.runs.get(last.uuid)
    name = f"{job.target_repo_name}/{job.target_version_tag}"
    for change in (["--rewards", "rewards.py:whole"], ["--remove", "half"], ["--rewards", "rewards.py:half"]):
        cli("adapters", "update-config", name, *change)
    message = "it does not load\nTraceback"
    for fields in ({"revision": 4, "refused": message}, {"revision": 3, "step": 2}):
        report = wire.EventReport(fence=last.fence, kind="revision", message=message, **fields)
        api.store.runs.report_event(last.uuid, report, 60)
    shown = cli("jobs", "revisions", name).out
    lines = {line.split()[0]: line for line in shown.splitlines()}
    assert "never (replaced by 3)" in lines["2"]
    assert lines["3"].split()[1] == "2"
    assert "refused: it does not load …" in lines["4"]
    events = cli("jobs", "events", name)
    assert "it does not load …" in events.out
    assert "Traceback" not in events.out
    assert message in [event["message"] for event in cli("jobs", "events", name, "--json").json()]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--rewards", "broken.py"], "broken.py, line 3: "),
        (["--rewards", "free.py"], "free.py, line 6: "),
        (["--rewards", "rewards.py:missing"], "no top-level function 'missing'; it has: half, whole, helper"),
        (["--rewards", "none.py"], "no top-level function with three parameters"),
        (["--rewards", "absent.py"], "absent.py: No such file"),
        (["--config", "broken.json"], "broken.json, line 2: "),
        (["--config", "list.json"], "list.json holds a list"),
        (["--set", "train_steps"], "write KEY=VALUE"),
        (["--set", "train_stepz=3"], "did you mean 'train_steps'"),
        (["--set", "train_steps=many"], "train_steps"),
        (["--set", "beta=1", "--set", "beta.x=1"], "already set to 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_its_place(cli: Cli, tmp_path: Path, arguments: list[str], text: str):
    (tmp_path / "broken.py").write_text("def a(p, c, e):\n    return 1\ndef b(:\n")
    (tmp_path / "free.py").write_text(
        "import math\n\n\n# why\ndef a(prompt, completion, example):\n    return math.pi\n"
    )
    (tmp_path / "none.py").write_text("def a(p, c):\n    return 1\n")
    (tmp_path / "broken.json").write_text('{\n"a": }')
    (tmp_path / "list.json").write_text("[]")
    failed = cli("jobs", "create", "--repo", "r", "--dataset", "d", *arguments, ok=False)
    assert failed.code == 1
    assert failed.err.startswith("error: ")
    assert text in failed.err
    assert "Traceback" not in failed.err
    assert failed.out == ""


# ---- reading and steering


def test_a_run_can_be_read_and_steered(cli: Cli, api: Running):
    submit(cli, "--rewards", "rewards.py:half")
    while claim := api.store.runs.claim("test-host", 60):
        last = claim
    job = api.store.runs.get(last.uuid)
    name = f"{job.target_repo_name}/{job.target_version_tag}"
    for step in (1, 2):
        where = {"step": step, "epoch": step / 4, "total_steps": 3, "steps_per_epoch": 4, "revision": 1}
        metrics = {"total_reward": step / 10, "reward/half/mean": 0.5}
        report = wire.StepReport(fence=last.fence, metrics=metrics, **where)
        api.store.runs.report_step(last.uuid, report, 60)
    assert "2/3" in cli("jobs", "list").out
    assert "training" in cli("jobs", "get", name).out
    table = cli("jobs", "metrics", name).out.splitlines()
    assert table[0].split() == ["series", "points", "first", "last", "curve"]
    assert ["total_reward", "2", "0.1", "0.2"] in [line.split()[:4] for line in table]
    points = cli("jobs", "metrics", name, "--series", "total_reward", "--json").json()
    assert points == {"total_reward": [{"step": 1, "value": 0.1}, {"step": 2, "value": 0.2}]}
    assert "queued" in cli("jobs", "events", name).out
    assert "No completions" in cli("jobs", "completions", name).out
    assert "No lines" in cli("jobs", "logs", name).out
    assert "stop after its current step" in cli("jobs", "stop", name).out
    finish = wire.Finish(fence=last.fence, status="errored", error="out of luck")
    api.store.runs.finish(last.uuid, finish, 60)
    ended = cli("jobs", "watch", name, ok=False)
    assert "already errored. Nothing to watch." in ended.out
    assert "out of luck" in cli("jobs", "get", name).out
    assert "out of luck" in cli("adapters", "get", name).out


def test_tables_in_a_pipe_are_not_cut(cli: Cli):
    name = "a-name-" * 14
    cli("repos", "create", name, "--description", "what it is for " * 20)
    assert name in cli("repos", "list").out
    assert ("what it is for " * 20).strip() in cli("repos", "list").out


def test_datasets_and_repos_go_their_way(cli: Cli, tmp_path: Path):
    assert "2 rows, columns prompt, answer" in cli("datasets", "upload", "rows.jsonl", "--name", "other").out
    assert "prompts   7 characters\n" in cli("datasets", "get", "other").out
    cli("datasets", "download", "other", "--dest", "saved")
    assert [json.loads(line)["answer"] for line in (tmp_path / "saved.jsonl").read_text().splitlines()] == [4, 8]
    cli("datasets", "delete", "other")
    assert "error: " in cli("datasets", "get", "other", ok=False).err
    cli("repos", "create", "gone")
    assert "--exists-ok" in cli("repos", "create", "gone", ok=False).err
    cli("repos", "delete", "gone")
    assert "HTTP 404" in cli("repos", "get", "gone", ok=False).err


def test_ctrl_c_stops_the_watching_and_not_the_job(cli: Cli, api: Running, tmp_path: Path):
    job = submit(cli, "--rewards", "rewards.py:half")
    watching = subprocess.Popen(
        [sys.executable, "-u", "-m", "rewardsmith", "jobs", "watch", job["uuid"]],
        env=os.environ | {"REWARDSMITH_API_TOKEN": TOKEN, "REWARDSMITH_BASE_URL": api.url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout.readline() == "The job is in the queue.\n"
    watching.send_signal(signal.SIGINT)
    out, err = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert "the job goes on" in out
    assert f"rewardsmith jobs stop sums/{job['target_version_tag']}" in out
    assert err == ""
    assert api.store.runs.get(job["uuid"]).status == "queued"


# ---- failing


def test_without_a_server_one_line_says_how_to_get_one(cli: Cli):
    url = f"http://127.0.0.1:{free_port()}"
    failed = cli("repos", "list", ok=False, url=url)
    assert failed.code == 1
    assert failed.err.startswith(f"error: no server answers at {url}")
    assert "rewardsmith serve" in failed.err
    assert len(failed.err.splitlines()) == 1


def test_a_traceback_is_shown_on_request_only(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    assert "Traceback" not in cli("adapters", "get", "my-repo", ok=False).err
    monkeypatch.setenv("REWARDSMITH_TRACEBACK", "1")
    with pytest.raises(ConfigError, match="<repo>/<version>"):
        cli("adapters", "get", "my-repo")


def test_a_home_that_cannot_be_used_is_one_line(cli: Cli, tmp_path: Path):
    failed = cli("serve", "--home", str(tmp_path / "rows.jsonl"), ok=False)
    assert failed.err.startswith("error: the home folder")


@pytest.mark.parametrize("command", ["serve", "dispatcher"])
def test_without_the_server_part_one_line_says_how_to_install_it(tmp_path: Path, command: str):
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError('not here', name='uvicorn')")
    said = subprocess.run(
        [sys.executable, "-m", "rewardsmith", command, "--home", str(tmp_path / "home")],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 1
    assert said.stderr.startswith('error: this needs the server part: pip install "rewardsmith[server]"')
    assert 'pip install ".[server]"' in said.stderr


def test_a_port_that_there_is_not_is_refused(cli: Cli):
    assert "65535" in cli("serve", "--port", "99999999", ok=False).err


def test_other_machines_are_let_in_only_on_request(cli: Cli, tmp_path: Path):
    failed = cli("serve", "--home", str(tmp_path / "home"), "--host", "0.0.0.0", "--port", "0", ok=False)
    assert "--allow-remote" in failed.err


def test_the_lengths_of_prompts_are_one_short_line():
    buckets = [wire.LengthBucket(low=low, high=low + 9, rows=rows) for low, rows in ((10, 1), (20, 6), (30, 3))]
    dataset = Dataset(uuid="d", id=1, name="rows", prompt_lengths=buckets)
    assert lengths(dataset) == "10-39 characters, median in 20-29  ▂█▅"
