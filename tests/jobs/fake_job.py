"""A job process without training: takes the ticket and speaks the journal as a real one does. `fake_job.py MODE`.

finish          three steps, then the end
hold            one step, then heartbeats until it is told to end; SIGTERM makes it yield
stubborn        the same, deaf to SIGTERM
family          the same, with a process of its own that nobody ends
silent          one step, then nothing more, not even a heartbeat
die             a last word on stderr and exit status 3
step-then-die   one new step beyond those of earlier attempts, then exit status 3
linger          finish, then never exit
"""

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

mode = sys.argv[1]
ticket = json.loads(sys.stdin.readline())
base = f"{ticket['url']}/v2/journal/{ticket['uuid']}"


def call(path: str, body: dict | None = None) -> dict:
    request = urllib.request.Request(
        f"{base}/{path}",
        data=json.dumps({"fence": ticket["fence"], **body}).encode() if body is not None else None,
        headers={"Authorization": f"Bearer {ticket['token']}", "Content-Type": "application/json"},
    )
    patience = time.monotonic() + 30
    while time.monotonic() < patience:
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as refused:
            sys.exit(f"refused: {refused.code} {refused.read().decode()}")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    sys.exit("the server is gone")


def report(step: int) -> dict:
    metrics = {"total_reward": step / 10, "total_reward_std": 0.5, "reward/length/mean": step / 10}
    where = {"step": step, "epoch": step / 4, "totalSteps": 3, "stepsPerEpoch": 4, "revision": 1}
    return call("report", {**where, "metrics": metrics, "segments": []})


def end(status: str) -> None:
    call("finish", {"status": status})


def hold() -> None:
    while (action := call("heartbeat", {})["action"]) == "continue":
        time.sleep(0.05)
    end("canceled" if action == "cancel" else "stopped")


print("fake job", mode, "attempt with fence", ticket["fence"], flush=True)
spec = call("spec")
if mode == "die":
    sys.stderr.write("CUDA error: the device fell asleep\n")
    sys.exit(3)
if mode == "step-then-die":
    report(spec["attempt"])
    sys.exit(3)
if mode in ("finish", "linger"):
    for step in (1, 2, 3):
        report(step)
    end("completed")
    while mode == "linger":
        time.sleep(1)
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "stubborn" else lambda *_: sys.exit(75))
report(1)
if mode == "family":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
while mode == "silent":
    time.sleep(1)
hold()
