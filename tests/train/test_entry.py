"""The job process itself: ticket in, exit status out."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from job_runs import UUID, config, rows, spec, write_rows
from scripted_server import TOKEN, ScriptedServer
from tiny_models import save_model

from rewardsmith.jobs.entry import YIELDED
from rewardsmith.machine import available_cores


def start(server: ScriptedServer) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "rewardsmith.jobs.entry"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
    )
    process.stdin.write(json.dumps({"url": server.url, "uuid": UUID, "fence": 1, "token": TOKEN}) + "\n")
    process.stdin.close()
    return process


def test_a_process_asked_to_make_room_finishes_its_step_saves_it_and_says_so(tmp_path: Path):
    write_rows(tmp_path, rows(6))
    model = save_model(tmp_path / "model")
    with ScriptedServer(spec(tmp_path, model, config(train_steps=1000, save_every=500))) as server:
        process = start(server)

        def on_report(path: str, body: dict) -> None:
            if path == "report" and body["step"] == 2:
                process.send_signal(signal.SIGTERM)

        server.on_report = on_report
        log = process.stderr.read()
        assert process.wait(60) == YIELDED, log
    (saved,) = server.bodies("checkpoint")
    assert saved["step"] == server.bodies("report")[-1]["step"] >= 2
    assert not server.bodies("finish")
    assert TOKEN not in log and "total_reward" in log


@pytest.mark.parametrize(("asked", "threads"), [(None, available_cores()), ("1", 1), ("100000", available_cores())])
def test_threads_are_settled_before_torch_is_there(asked: str | None, threads: int):
    """As the user asked, but no more than there are cores: the launcher passes on what it counts without quotas."""
    code = (
        "import os, sys; import rewardsmith.jobs.entry as entry; assert 'torch' not in sys.modules;"
        "entry._set_threads(); assert 'torch' not in sys.modules;"
        "print(os.environ['OMP_WAIT_POLICY'], os.environ['OMP_NUM_THREADS'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= {"OMP_NUM_THREADS": asked} if asked else {}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["PASSIVE", str(threads)]
