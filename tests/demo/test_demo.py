"""`rewardsmith demo` as a user runs it, start to end."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from processes import environment


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_learns_and_leaves_nothing_running(tmp_path: Path):
    home, figures_file = tmp_path / "home", tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "rewardsmith", "demo", "--exit", "--json", str(figures_file)],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(figures_file.read_text())
    assert figures["after"]["equation"] - figures["before"]["equation"] >= 0.2, figures
    assert figures["after"]["format"] > 0.95
    assert (Path(figures["adapter_path"]) / "adapter_model.safetensors").exists()
    for part in ("equation: mean of each step", "base model:", "adapter:", "Held-out equations solved"):
        assert part in done.stdout
    assert not [
        p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("REWARDSMITH_HOME") == str(home)
    ]
