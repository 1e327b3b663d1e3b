"""The commands of the documentation, run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Server, environment

QUICKSTART = Path(__file__).parents[2] / "docs" / "quickstart.md"


@pytest.mark.slow
def test_the_quickstart_runs_as_written(server: Server, tmp_path: Path):
    blocks = re.findall(r"```(\w*)\n(.*?)```", QUICKSTART.read_text(), re.DOTALL)
    (tmp_path / "rewards.py").write_text(next(text for language, text in blocks if language == "python"))
    commands = [text for language, text in blocks if not language and "rewardsmith " in text]
    commands = [text for text in commands if "rewardsmith serve" not in text and "git clone" not in text]
    assert len(commands) == 3, "upload, create and watch, look into it"
    variables = environment(server.home) | {
        "REWARDSMITH_BASE_URL": server.url,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for text in commands:
        # Fewer steps than in the text; all else as it is.
        script = "set -eu\n" + text.replace("train_steps=20", "train_steps=2")
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    assert list(tmp_path.glob("*.zip"))
