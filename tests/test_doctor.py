"""What `rewardsmith doctor` finds, on this machine and on one where something is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Server, free_port

from rewardsmith.rewards.sandbox import probe


def doctor(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "rewardsmith", "doctor", *arguments],
        env=os.environ | {"REWARDSMITH_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def findings(done: subprocess.CompletedProcess) -> dict[str, dict]:
    return {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_this_machine_can_train_and_the_running_server_is_found(server: Server):
    done = doctor(server.home, REWARDSMITH_BASE_URL=server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Training can run here." in done.stdout
    assert f"answers at {server.url} and accepts the token" in done.stdout
    assert f"tier {probe.report().tier}: " in done.stdout


def test_what_training_can_do_without_is_a_note(tmp_path: Path):
    done = doctor(tmp_path / "home", "--json", REWARDSMITH_BASE_URL=f"http://127.0.0.1:{free_port()}")
    found = findings(done)
    assert done.returncode == 0
    assert found["server"]["state"] == "note"
    assert "rewardsmith serve" in found["server"]["advice"]
    assert found["home"]["text"].endswith("made at the first start")
    assert not (tmp_path / "home").exists(), "it looks and changes nothing"


@pytest.fixture
def damaged_torch(tmp_path: Path) -> str:
    """A folder for PYTHONPATH; it also spares the seconds that the real one takes."""
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch is damaged')")
    return str(tmp_path)


def test_a_torch_that_cannot_be_imported_is_bad(tmp_path: Path, damaged_torch: str):
    done = doctor(tmp_path / "home", "--json", PYTHONPATH=damaged_torch)
    assert done.returncode == 1
    assert json.loads(done.stdout)["can_train"] is False
    assert "libtorch is damaged" in findings(done)["torch"]["text"]
    assert "Training cannot run here" in doctor(tmp_path / "home", PYTHONPATH=damaged_torch).stdout


def test_the_packages_of_a_light_install_are_told_as_a_list(tmp_path: Path):
    hidden = "import sys; sys.modules['packaging'] = None; from rewardsmith.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", hidden, "doctor", "--json"], capture_output=True, text=True)
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert "the server part is not installed" in found["packages"]["text"]
    assert 'pip install "rewardsmith[server]"' in found["packages"]["advice"]


def test_a_home_that_cannot_be_written_to_is_bad(damaged_torch: str):
    found = findings(doctor(Path("/proc/rewardsmith"), "--json", PYTHONPATH=damaged_torch))
    assert found["home"]["state"] == "bad"
    assert "REWARDSMITH_HOME" in found["home"]["advice"]


def test_a_token_that_others_can_read_is_named(tmp_path: Path, damaged_torch: str):
    (tmp_path / "owner-token").write_text("pb_x")
    (tmp_path / "owner-token").chmod(0o644)
    url = f"http://127.0.0.1:{free_port()}"
    found = findings(doctor(tmp_path, "--json", PYTHONPATH=damaged_torch, REWARDSMITH_BASE_URL=url))
    assert "chmod 600" in found["home"]["advice"]
