"""`rewardsmith revisions ...` and `rewardsmith logs`: what they print, on a real server."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server.running import TOKEN, Running, job_request, running
from store.stored import completion, report_step, reward_log, write_segment

from rewardsmith import wire
from rewardsmith.cli import main
from rewardsmith.store import Claim

REWARDS = """\
def right(prompt, completion, example):
    return 1.0 if completion == str(example["answer"]) else 0.0


def broken(prompt, completion, example):
    return example["no such column"]
"""
Cli = Callable[..., str]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("cli") / "home") as server:
        server.prepare()
        yield server


@pytest.fixture
def cli(api: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Cli:
    """Runs a command in a folder with a file of rewards; gives its output, or with `fails` its error."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REWARDSMITH_API_TOKEN", TOKEN)
    monkeypatch.setenv("REWARDSMITH_BASE_URL", api.url)

    def run(*arguments: str, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["rewardsmith", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert bool(ended.value.code) == fails, said
        return said.err if fails else said.out

    return run


@pytest.fixture
def job(api: Running) -> tuple[str, Claim]:
    """A job that is training, by the name of its adapter."""
    request = job_request(num_generations=2, effective_batch_size=2)
    answer = api.submit(request, **{"Idempotency-Key": f"cli-{len(api.jobs())}"}).json()
    while (claim := api.store.runs.claim("test-host", 60)) and claim.uuid != answer["uuid"]:
        pass
    assert claim
    return f"sums/{answer['targetVersionTag']}", claim


def test_a_change_is_applied_shown_and_taken_back(cli: Cli, job: tuple[str, Claim]):
    name, _ = job
    said = cli(
        "revisions", "apply", name, "--rewards", "rewards.py:right", "--remove", "length", "--note", "what counts"
    )
    assert f"Revision 2 of {name}: right" in said
    weighed = cli("revisions", "apply", name, "--weight", "right=1:0.0,100:2")
    assert "Revision 3" in weighed
    assert "already" not in weighed
    listed = cli("revisions", "list", name)
    assert "what counts" in listed and "not yet" in listed
    shown = cli("revisions", "get", name, "3")
    assert "# right, weight 0 at step 1, 2 at step 100" in shown and "def right(" in shown
    assert "# right, weight 0 at step 1, 2 at step 100" in cli("adapters", "config", name)
    difference = cli("revisions", "diff", name, "2")
    assert "right added" in difference and "length removed" in difference
    assert "+def right(prompt, completion, example):" in difference
    assert "-    return len(completion) / 10" in difference
    assert "schedule: None -> {'1': 0.0, '100': 2.0}" in cli("revisions", "diff", name, "3", "--against", "2")
    assert "Revision 4" in cli("revisions", "rollback", name, "--to", "1", "--note", "calmer")
    assert "rollback to revision 1: calmer" in cli("revisions", "list", name)
    assert json.loads(cli("revisions", "list", name, "--json"))[3]["functions"][0]["name"] == "length"
    assert "Nothing differs." in cli("revisions", "diff", name, "4", "--against", "1")


def test_a_dry_run_reads_like_a_page(cli: Cli, api: Running, job: tuple[str, Claim]):
    name, claim = job
    scores = {"length": {"value": 0.5, "outcome": "ok", "seconds": 0.0}}
    rows = [completion(1, idx, row=0, sample=idx, completion=text) for idx, text in enumerate(("4", "no\x1b[31m"))]
    rows = [row | {"scores": scores, "total_reward": 0.5} for row in rows]
    report_step(api.store, claim, 1, segments=[write_segment(api.store, claim.uuid, rows)])
    page = cli("revisions", "dry-run", name, "--rewards", "rewards.py", "--weight", "length=-1")
    assert "Tried on 2 stored completions in 1 group, steps 1 to 1, against revision 1" in page
    table = {line.split()[0]: line.split() for line in page.splitlines() if line and not line[0].isspace()}
    assert table["length"][1:4] == ["changed,", "stored", "0.5000"]
    assert table["right"][1:4] == ["added", "0.5000", "0.5000"], "its mean and spread"
    assert "groups without signal: 1 now, 0 with the change" in page
    assert "- broken failed in 2 of 2 calls" in page
    assert "KeyError: 'no such column'" in page and "2 x broken  exception" in page
    assert "total 0.5000 -> -0.5000" in page
    assert "\x1b" not in page and "no\\x1b[31m" in page
    assert json.loads(cli("revisions", "dry-run", name, "--weight", "length=2", "--json"))["scored"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing is to change"),
        (["--weight", "right"], "--weight 'right': write NAME=2.5, or NAME=1:1.0,100:0.2"),
        (["--weight", "right=much"], "write NAME=2.5"),
        (["--weight", "right=1:1,2"], "write NAME=2.5"),
        (["--weight", "absent=1"], "no reward function 'absent' to weigh"),
        (["--remove", "length"], "at least one"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(cli: Cli, job: tuple[str, Claim], arguments: list[str], says: str):
    said = cli("revisions", "apply", job[0], *arguments, fails=True)
    assert said.startswith("error: ") and says in said and "Traceback" not in said


def test_the_log_is_filtered_folded_and_escaped(cli: Cli, api: Running, job: tuple[str, Claim]):
    name, claim = job
    for step in (1, 2):
        rows = [
            reward_log(step, 0, "length", prints="red\x1b[31m\n"),
            reward_log(step, 1, "length", prints="", outcome="exception", error=f"Traceback\nKeyError: {step}"),
            reward_log(step, 2, "length", prints=""),
        ]
        report_step(api.store, claim, step, segments=[write_segment(api.store, claim.uuid, rows, family="reward_logs")])
    said = cli("logs", name)
    assert said == cli("logs", name, "--rewards") == cli("jobs", "logs", name)
    assert "red\\x1b[31m" in said and "\x1b" not in said
    assert said.count("step 2") == 2 and "KeyError: 2" in said and "10.0 ms" in said
    assert cli("logs", name, "--every").count("step 2") == 3
    assert "step 1" not in cli("logs", name, "--from-step", "2")
    assert "KeyError" not in cli("logs", name, "--outcome", "ok")
    folded = cli("logs", name, "--folded")
    assert "2 x length  exception  revision 1  steps 1 to 2" in folded and folded.count("KeyError") == 1
    assert "and 2 calls that said something else" in cli("logs", name, "--folded", "--limit", "1")
    assert "--every shows calls that said nothing" in cli("logs", name, "--function", "length", "--text", "absent")
    assert json.loads(cli("logs", name, "--folded", "--json"))["data"][0]["count"] == 2


def test_a_revision_that_the_job_has_already_says_since_when(cli: Cli, job: tuple[str, Claim]):
    assert "has these functions already, since step 1" in cli("revisions", "apply", job[0], "--weight", "length=1")


def test_commands_explain_themselves(cli: Cli):
    text = cli("revisions", "--help")
    lines = text.partition("Commands:\n")[2].splitlines()
    assert len(lines) == 6 and all(line.endswith(".") and not line.endswith("...") for line in lines), text
    assert wire.COMPARED_STEPS == 20, "as the SDK's documentation says"
