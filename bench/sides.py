"""Opens both sides of a comparison: our worker, TRL's worker at its best settings, and the peak memory of each.

The workers themselves are `ours` and `theirs`; how they are measured is in `workers`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from cases import CASES, CPU_CASES, GPU_CASES, Case
from harness import Report, Row
from workers import BenchError, MemoryPeak, Reading, Worker, tree_memory

MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """How TRL is run: `ranks` processes of `threads` threads each, `micro_batch` completions at once in each."""

    micro_batch: int
    ranks: int = 1
    threads: int = 2
    checkpointing: bool = False
    bf16: bool = False  # on a CPU; on CUDA it always is
    vllm: bool = False

    @property
    def words(self) -> str:
        parts = [f"micro-batch {self.micro_batch}"]
        parts += [f"{self.ranks} x {self.threads} threads"] if self.threads else []
        parts += ["checkpointing"] if self.checkpointing else []
        parts += ["bfloat16"] if self.bf16 else []
        parts += ["vLLM"] if self.vllm else []
        return ", ".join(parts)


# Gradient checkpointing is off (TRL's default is on). Two ranks are what `torchrun --nproc-per-node 2` would start.
ONE_RANK = [Setting(8), Setting(16), Setting(64)]
TWO_RANKS = [Setting(8, ranks=2, threads=1), Setting(32, ranks=2, threads=1)]
LEANEST = Setting(8, checkpointing=True)
# TRL's default precision. Tried and reported, but not compared: on a CPU both sides compute in float32.
OTHER_PRECISION = Setting(16, bf16=True)
TRIED_SECONDS = 15.0
CUDA_MICRO_BATCHES = (8, 16, 32, 64, 128)


def chosen(options: argparse.Namespace, short: Sequence[str] = ("tiny",)) -> list[Case]:
    """The cases that the command line asks for; `short` are those of the short set on a CPU, on CUDA it is the first.

    Raises BenchError for an unknown name.
    """
    ours = GPU_CASES if options.device == "cuda" else CPU_CASES
    if options.cases:
        unknown = sorted(set(options.cases) - CASES.keys())
        if unknown:
            raise BenchError(f"no case named {unknown}; there are: {', '.join(CASES)}")
        return [CASES[name] for name in options.cases]
    if options.short:
        return [case for case in ours if case.name in short] or ours[:1]
    return ours


def open_ours(case: Case, workers: int | None = None) -> Worker:
    """`workers` beside the first process; None: as many as a job would start."""
    return _opened(Worker("ours.py"), case=asdict(case), workers=workers)


def open_theirs(case: Case, setting: Setting) -> Worker:
    worker = Worker("theirs.py", ranks=setting.ranks, threads=setting.threads or None)
    return _opened(worker, case=asdict(case), setting=asdict(setting))


def _opened(worker: Worker, **load: Any) -> Worker:
    try:
        worker.ask("load", **load)
        worker.path = worker.ask("open")["path"]
    except BenchError:
        worker.close()
        raise
    return worker


@contextmanager
def both(case: Case, setting: Setting | None, only: str | None, report: Report) -> Iterator[dict[str, Worker]]:
    """The sides that are wanted, each ready for its first step."""
    with ExitStack() as stack:
        workers = {}
        if only != "theirs":
            workers["ours"] = stack.enter_context(open_ours(case))
        if only != "ours" and setting is not None:
            workers["theirs"] = stack.enter_context(open_theirs(case, setting))
        report.conditions.setdefault("sides", {})[case.name] = {
            name: {"path": worker.path, "environment": worker.environment} for name, worker in workers.items()
        }
        yield workers


def candidates(case: Case, do: str, *, short: bool, vllm: bool = False) -> list[Setting]:
    """Settings worth trying. Generation takes all completions of a rank at once, whatever the micro-batch."""
    if case.device == "cuda":
        found = [Setting(size, threads=0, vllm=vllm) for size in CUDA_MICRO_BATCHES]
    else:
        found = [ONE_RANK[1], TWO_RANKS[0]] if short else [*ONE_RANK, *TWO_RANKS, OTHER_PRECISION]
    found = [s for s in found if case.completions % (s.micro_batch * s.ranks) == 0]
    return [s for i, s in enumerate(found) if do != "generate" or s.ranks not in [f.ranks for f in found[:i]]]


def fastest_setting(
    case: Case, do: str = "step", *, short: bool, vllm: bool = False
) -> tuple[Setting, list[dict[str, Any]]]:
    """The setting with the shortest "step", "generate" or "update" once it is warm, and what was seen of each. One that
    fails is left out, with the reason."""
    best, best_seconds, tried = None, float("inf"), []
    for setting in candidates(case, do, short=short, vllm=vllm):
        entry: dict[str, Any] = {"setting": setting.words}
        try:
            with open_theirs(case, setting) as worker:
                command = "generate" if do == "generate" else "step"
                worker.ask(command)
                reading = _quickest(worker, command)
            seconds = reading.answer["update" if do == "update" else "seconds"]
            entry |= {"seconds": seconds, "cpu_seconds": reading.cpu, "others": round(reading.others, 3)}
            if seconds < best_seconds and not setting.bf16:
                best, best_seconds = setting, seconds
        except BenchError as error:
            entry["failed"] = str(error)[-300:]
            print(f"left out, TRL failed with {setting.words}: {entry['failed']}")
        tried.append(entry)
    if best is None:
        raise BenchError(f"TRL ran with none of its settings on case {case.name}: {tried}")
    return best, tried


def _quickest(worker: Worker, command: str) -> Reading:
    """Of up to five times within some seconds: the first ones are slower, and what is chosen here should be right."""
    readings = [worker.measure(command)]
    while len(readings) < 5 and sum(reading.answer["seconds"] for reading in readings) < TRIED_SECONDS:
        readings.append(worker.measure(command))
    return min(readings, key=lambda reading: reading.answer["seconds"])


def peak_memory(case: Case, setting: Setting | None, only: str | None) -> Iterator[Row]:
    """Rows: the most memory during the start and two steps over one process that has just loaded the model, in MiB."""
    peaks: dict[str, dict[str, float]] = {}
    load = {"case": asdict(case)}
    if only != "theirs":
        loaded = _loaded(Worker("ours.py"), load | {"workers": 0})
        peaks["ours"] = _peak(Worker("ours.py"), load | {"workers": None}, loaded)
    if only != "ours" and setting is not None:
        load["setting"] = asdict(setting)
        loaded = _loaded(Worker("theirs.py"), load)
        worker = Worker("theirs.py", ranks=setting.ranks, threads=setting.threads or None)
        peaks["theirs"] = _peak(worker, load, loaded)
    names = {
        "cuda": "peak GPU memory over the loaded model",
        "pss": "peak memory over the loaded model",
        "rss": "the same by high-water marks",
        "loaded": "loaded model and libraries",
    }
    for key in ["cuda"] if case.device == "cuda" else ["pss", "rss", "loaded"]:
        values = {side: [peak[key]] for side, peak in peaks.items()}
        yield Row.of(case.name, names[key], "MiB", values.get("ours", []), values.get("theirs", []))


def _loaded(worker: Worker, load: dict[str, Any]) -> dict[str, int]:
    """Memory of one process with its libraries and the model, before it has anything else."""
    with worker:
        answer = worker.ask("load", **load)
        return tree_memory(worker) | {"cuda": answer["cuda_peak"]}


def _peak(worker: Worker, load: dict[str, Any], loaded: dict[str, int]) -> dict[str, float]:
    with worker:
        worker.ask("load", **load)
        peak = MemoryPeak(worker)
        peak.start()
        cuda = max(worker.ask(do)["cuda_peak"] for do in ("open", "step", "step"))
        highest = peak.stop()
    return {
        "pss": (highest["pss"] - loaded["pss"]) / MIB,
        "rss": (highest["rss"] - loaded["rss"]) / MIB,
        "loaded": loaded["pss"] / MIB,
        "cuda": (cuda - loaded["cuda"]) / MIB,
    }
