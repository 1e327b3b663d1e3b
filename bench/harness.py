"""What all benchmarks share: the command line, the table with its medians and ratios, the JSON file with conditions.

A ratio is taken pair by pair of interleaved measurements, and its median is reported. How a side is run and measured
is in `workers`, what is run in `cases`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
QUIET = 0.1  # cores of other processes up to which a machine counts as quiet
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "numpy", "vllm")


@dataclass
class Row:
    """One line of the table. `ratio` is above 1 where ours is the better one; None where a side was not run."""

    case: str
    metric: str
    unit: str
    ours: float | None = None
    theirs: float | None = None
    ratio: float | None = None
    ours_all: list[float] = field(default_factory=list)
    theirs_all: list[float] = field(default_factory=list)
    ratio_all: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    note: str = ""

    @classmethod
    def of(
        cls,
        case: str,
        metric: str,
        unit: str,
        ours: Sequence[float] = (),
        theirs: Sequence[float] = (),
        *,
        higher_is_better: bool = False,
        others: Sequence[float] = (),
        note: str = "",
    ) -> Row:
        """From the values of all repeats, in the order they were measured: medians, and pair by pair the ratio."""
        pairs = list(zip(ours, theirs, strict=False))
        ratios = [(a / b if higher_is_better else b / a) for a, b in pairs if a and b]
        middle = lambda values: statistics.median(values) if values else None  # noqa: E731
        return cls(
            case,
            metric,
            unit,
            middle(list(ours)),
            middle(list(theirs)),
            middle(ratios),
            list(ours),
            list(theirs),
            ratios,
            [round(value, 3) for value in others],
            note,
        )


@dataclass
class Report:
    """The rows of one benchmark and their conditions. Each row is printed as it comes; `close` writes the file."""

    name: str
    json_file: Path | None
    rows: list[Row] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    def add(self, row: Row) -> None:
        if not self.rows:
            print(HEADER)
        self.rows.append(row)
        print(line_of(row), flush=True)

    def close(self) -> None:
        noisy = [value for row in self.rows for value in row.others]
        if noisy and statistics.median(noisy) > QUIET:
            print(f"Other processes used {statistics.median(noisy):.2f} cores (median): these figures do not count.")
        if self.json_file is None:
            return
        content = {
            "benchmark": self.name,
            "command": " ".join(sys.argv),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(time.time() - self.started, 1),
            "versions": versions(),
            "machine": machine(),
            "conditions": self.conditions,
            "rows": [row.__dict__ | {"spread": _spread(row)} for row in self.rows],
            **self.extra,
        }
        self.json_file.write_text(json.dumps(content, indent=1) + "\n")


@contextmanager
def reporting(name: str, json_file: Path | None) -> Iterator[Report]:
    """What was measured before an error or an interruption is printed and written too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    report = Report(name, json_file)
    try:
        yield report
    finally:
        report.close()


def _spread(row: Row) -> dict[str, list[float]]:
    named = {"ours": row.ours_all, "theirs": row.theirs_all, "ratio": row.ratio_all}
    return {name: [min(values), max(values)] for name, values in named.items() if values}


HEADER = "| case | metric | ours | TRL | ratio | min..max | n | others |\n" + "| --- " * 8 + "|"


def line_of(row: Row) -> str:
    """A line of the Markdown table: medians, the ratio with its range, number of repeats, load of others in cores."""
    ratio = f"{row.ratio:.2f}x" if row.ratio is not None else "-"
    spread = f"{min(row.ratio_all):.2f}..{max(row.ratio_all):.2f}" if row.ratio_all else "-"
    others = f"{statistics.median(row.others):.2f}" if row.others else "-"
    count = max(len(row.ours_all), len(row.theirs_all))
    note = f" ({row.note})" if row.note else ""
    cells = [row.case, f"{row.metric}, {row.unit}{note}", number(row.ours), number(row.theirs), ratio, spread, count]
    return "| " + " | ".join(map(str, [*cells, others])) + " |"


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def versions() -> dict[str, str]:
    import rewardsmith

    found = {"python": platform.python_version(), "rewardsmith": rewardsmith.__version__}
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    if git.returncode == 0:
        found["commit"] = git.stdout.strip()
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    import torch

    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in cpu.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    flags = set(fields.get("flags", "").split())
    found = {
        "cpu": fields.get("model name", platform.processor()),
        "family_model": f"{fields.get('cpu family')}/{fields.get('model')}",
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "features": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni"}),
        "system": f"{platform.system()} {platform.release()}",
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
        found["cuda"] = torch.version.cuda
    return found


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and conditions here")
    parser.add_argument("--repeats", type=int, help="measurements of each side, interleaved")
    parser.add_argument("--short", action="store_true", help="the short set, as `make bench` runs it")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only these cases")
    parser.add_argument("--only", choices=["ours", "theirs"], help="run one side alone; no ratios then")
    return parser


def repeats_of(options: argparse.Namespace, *, full: int = 5, short: int = 3) -> int:
    return options.repeats or (short if options.short else full)
