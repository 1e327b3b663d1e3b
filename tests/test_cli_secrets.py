"""`rewardsmith secrets`: values come by standard input and are printed by `get` alone."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server.running import TOKEN, Running, running

from rewardsmith.cli import main

Cli = Callable[..., str]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("cli") / "home") as server:
        server.prepare()
        yield server


@pytest.fixture
def cli(api: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REWARDSMITH_API_TOKEN", TOKEN)
    monkeypatch.setenv("REWARDSMITH_BASE_URL", api.url)

    def run(*arguments: str, typed: str = "", ok: bool = True) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.setattr(sys, "argv", ["rewardsmith", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert (not ended.value.code) == ok, said
        return said.out if ok else said.err

    return run


def test_a_secret_is_stored_shown_and_deleted(cli: Cli):
    assert "rewardsmith secrets create" in cli("secrets", "list")
    said = cli("secrets", "create", "JUDGE_KEY", typed="sk-7f3a\n")
    assert "JUDGE_KEY" in said and "sk-7f3a" not in said
    assert cli("secrets", "get", "JUDGE_KEY") == "sk-7f3a\n"
    cli("secrets", "update", "JUDGE_KEY", typed="two\nlines\n")
    assert cli("secrets", "get", "JUDGE_KEY") == "two\nlines\n"
    assert "JUDGE_KEY" in cli("secrets", "list") and "lines" not in cli("secrets", "list")
    assert [secret["key"] for secret in json.loads(cli("secrets", "list", "--json"))] == ["JUDGE_KEY"]
    cli("secrets", "delete", "JUDGE_KEY")
    assert "'JUDGE_KEY'" in cli("secrets", "get", "JUDGE_KEY", ok=False)


def test_an_empty_input_is_no_secret(cli: Cli):
    assert "standard input is empty" in cli("secrets", "create", "EMPTY", ok=False)


def test_a_job_names_its_secrets(cli: Cli, tmp_path: Path):
    (tmp_path / "rewards.py").write_text("def half(prompt, completion, example):\n    return 0.5\n")
    cli("secrets", "create", "NAMED", typed="value")
    settings = [*("--set", "base_model=countdown-tiny"), *("--set", "sampling_params.max_tokens=8")]
    settings += ["--set", 'secrets=["NAMED"]']
    cli("jobs", "create", "--repo", "sums", "--dataset", "rows", "--rewards", "rewards.py", *settings)
    (job,) = json.loads(cli("jobs", "list", "--json"))
    assert job["params"]["secrets"] == {"NAMED": "secret:NAMED"}


def test_endpoints_of_private_networks_are_checked(cli: Cli, tmp_path: Path):
    said = cli("serve", "--home", str(tmp_path), "--private-endpoint", "http://10.0.0.1:8000", ok=False)
    assert "--private-endpoint" in said and "is a URL" in said
