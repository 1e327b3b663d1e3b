"""Worker processes that obey commands, and what is read off them: wall and CPU time, load of others, memory.

Each side of a comparison is a process of its own, or one per rank, that stays warm: one JSON line in, one out. The
driver asks the sides in turn, A B A B, so that whatever the machine does meanwhile falls on both. What the sides do is
in `ours` and `theirs`; nothing here knows of models.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
SAMPLE_SECONDS = 0.02
ANSWER_SECONDS = 3600
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY")


class BenchError(Exception):
    """A side did not answer; the message ends with what it said last."""


class Commands:
    """A worker's end: commands from standard input, answers to what was standard output.

    Libraries print; their output goes to standard error so that it cannot be taken for an answer.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def next(self) -> dict[str, Any] | None:
        """The next command; None when the driver is gone."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def answer(self, answer: dict[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


def cuda_peak() -> int:
    """Most bytes that this process's tensors have held on the GPU since the last call; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return int(peak)


@dataclass
class Reading:
    """One answer with what the machine did meanwhile. CPU seconds are of the side's whole process tree; `others` is
    what all other processes used, in cores."""

    answer: dict[str, Any]
    wall: float
    cpu: float
    others: float


class Worker:
    """One side: `ranks` processes that get the same commands. Use as a context manager."""

    def __init__(self, script: str, *, ranks: int = 1, threads: int | None = None) -> None:
        self.script = script
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the worker
        port = _free_port()
        self._processes = []
        for rank in range(ranks):
            environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
            environment.pop("OMP_NUM_THREADS", None)
            if threads is not None:
                environment["OMP_NUM_THREADS"] = str(threads)
            if ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                environment |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, str(HERE / script)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._said,
                    env=environment,
                    text=True,
                )
            )
        self.path = ""  # which way the side computes, where it says so
        self.environment = {name: environment[name] for name in THREAD_VARIABLES if name in environment}

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()  # it ends by itself at the end of its input
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                    child.kill()
                process.wait()

    def tree(self) -> list[psutil.Process]:
        found = []
        for process in self._processes:
            try:
                root = psutil.Process(process.pid)
                found += [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return found

    def cpu_seconds(self) -> float:
        """User and system time of the tree, with children that have ended."""
        total = 0.0
        for process in self.tree():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system + times.children_user + times.children_system
        return total

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a command to all ranks. Seconds are those of the slowest rank, tokens the sum, rewards the mean.

        Raises BenchError when a rank ends or does not answer.
        """
        line = json.dumps({"do": do, **arguments}) + "\n"
        timer = threading.Timer(ANSWER_SECONDS, self._kill)
        timer.start()
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(line)
                process.stdin.flush()
            answers = [self._answer(process) for process in self._processes]
        except BrokenPipeError:
            raise self._error() from None
        finally:
            timer.cancel()
        return _merged(answers)

    def measure(self, do: str, **arguments: Any) -> Reading:
        busy, cpu, started = _busy_seconds(), self.cpu_seconds(), time.perf_counter()
        answer = self.ask(do, **arguments)
        wall = time.perf_counter() - started
        cpu = self.cpu_seconds() - cpu
        others = max(0.0, _busy_seconds() - busy - cpu) / wall
        return Reading(answer, wall, cpu, others)

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise self._error()
        return dict(json.loads(line))

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def _error(self) -> BenchError:
        self._said.seek(0)
        return BenchError(f"{self.script} ended or did not answer. It said:\n{self._said.read()[-4000:]}")


def _merged(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    merged = dict(answers[0])
    for answer in answers[1:]:
        for name, value in answer.items():
            if isinstance(value, dict):
                merged[name] = merged[name] | value
            elif name in ("tokens", "reward"):
                merged[name] += value
            else:
                merged[name] = max(merged[name], value)
    if "reward" in merged:
        merged["reward"] /= len(answers)
    return merged


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _busy_seconds() -> float:
    """CPU seconds since boot that the kernel counts as used, on all cores."""
    times = psutil.cpu_times()
    extra = getattr(times, "irq", 0.0) + getattr(times, "softirq", 0.0)
    return float(times.user + times.nice + times.system + extra)


class MemoryPeak:
    """The most memory a worker's tree holds, by two counts, from `start` to `stop`.

    `pss`: sum of proportional set sizes, every 20 ms: pages that ranks share count once. `rss`: sum of each process's
    own high-water mark of resident pages, which misses no spike but counts shared pages once per process.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._stopped = threading.Event()
        self._pss = 0
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        for process in self._worker.tree():
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the high-water mark starts anew
        self._thread.start()

    def stop(self) -> dict[str, int]:
        self._stopped.set()
        self._thread.join()
        return {"pss": self._pss, "rss": tree_memory(self._worker)["peak_rss"]}

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._pss = max(self._pss, tree_memory(self._worker)["pss"])


def tree_memory(worker: Worker) -> dict[str, int]:
    """Bytes of a worker's tree now: `pss`, `rss`, and `peak_rss` (sum of the high-water marks)."""
    total = {"pss": 0, "rss": 0, "peak_rss": 0}
    for process in worker.tree():
        try:
            smaps = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        for text, name, key in ((smaps, "Pss:", "pss"), (status, "VmRSS:", "rss"), (status, "VmHWM:", "peak_rss")):
            found = [line.split()[1] for line in text.splitlines() if line.startswith(name)]
            total[key] += int(found[0]) * 1024 if found else 0
    return total


Sides = dict[str, Callable[[], Reading]]


def interleaved(sides: Sides, repeats: int) -> dict[str, list[Reading]]:
    """Asks the sides in turn, `repeats` times each: A B A B ..."""
    readings: dict[str, list[Reading]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, ask in sides.items():
            readings[name].append(ask())
    return readings
