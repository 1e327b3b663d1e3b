"""What this machine can do at best, measured, and the share of it that rollout and update reach.

    python bench/roofline.py --json FILE [--short] [--cases NAME ...] [--device cuda] [--only ours]

Matrix products of several shapes and memory bandwidth first, by one thread, by two threads, and by two threads that
each have a product of their own. Then rollouts and updates of the cases: operations and bytes that they need (`work`)
over their time. On a CPU the products are in float32; bfloat16 is measured to see whether it would pay.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import work
from cases import Case, make_prompts
from harness import Report, Row, arguments, repeats_of, reporting
from sides import ONE_RANK, Setting, both, chosen

# rows x inputs x outputs: square ones, decode steps of the two CPU cases, micro-batches of an update
SHAPES = [(512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048)]
SHAPES += [(64, 192, 576), (64, 512, 3072), (64, 512, 8192), (1048, 192, 1024), (1048, 512, 3072)]
CUDA_SHAPES = [(8192, 8192, 8192), (16384, 3584, 37888), (8192, 896, 9728), (128, 3584, 37888), (128, 896, 9728)]
CUDA_SETTING = Setting(16, threads=0)
BANDWIDTH_BYTES = {"cpu": 2**28, "cuda": 2**32}


def seconds_of(act: Callable[[], object], device: str, least: float) -> float:
    """Median seconds of one call, of as many as fit `least` seconds."""
    act()
    taken: list[float] = []
    deadline = time.perf_counter() + least
    while len(taken) < 3 or time.perf_counter() < deadline:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        act()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def gemm(shape: tuple[int, int, int], dtype: torch.dtype, device: str, least: float) -> float:
    """Operations per second of one matrix product."""
    rows, inputs, outputs = shape
    a = torch.randn(rows, inputs, device=device).to(dtype)
    b = torch.randn(inputs, outputs, device=device).to(dtype)
    out = torch.empty(rows, outputs, device=device, dtype=dtype)
    return 2 * rows * inputs * outputs / seconds_of(lambda: torch.mm(a, b, out=out), device, least)


def side_by_side(count: int, measure: Callable[[], float]) -> float:
    """The sum of what `count` threads reach that each compute on one core."""

    def alone(_: int) -> float:
        torch.set_num_threads(1)  # OpenMP counts threads for each thread that asks
        return measure()

    with ThreadPoolExecutor(count) as pool:
        return sum(pool.map(alone, range(count)))


def hardware(device: str, report: Report, least: float) -> tuple[float, float]:
    """Adds the rows of the machine; returns its best operations per second and its bytes per second."""
    cpu = device == "cpu"
    cores = os.cpu_count() or 1
    best = 0.0
    for dtype in (torch.float32, torch.bfloat16) if cpu else (torch.bfloat16,):
        for shape in SHAPES if cpu else CUDA_SHAPES:
            name = f"{str(dtype).removeprefix('torch.')} product {' x '.join(map(str, shape))}"
            for threads in (1, cores) if cpu else (1,):
                if cpu:
                    torch.set_num_threads(threads)
                rate = gemm(shape, dtype, device, least)
                best = max(best, rate if dtype == torch.float32 or not cpu else 0.0)
                how = f", {threads} thread(s)" if cpu else ""
                report.add(Row.of("machine", name + how, "GFLOP/s", [rate / 1e9]))
            if cpu and dtype == torch.float32:
                rate = side_by_side(cores, lambda s=shape, d=dtype: gemm(s, d, device, least))
                best = max(best, rate)
                report.add(Row.of("machine", f"{name}, {cores} x 1 thread", "GFLOP/s", [rate / 1e9]))
    if cpu:
        torch.set_num_threads(cores)
    x = torch.ones(BANDWIDTH_BYTES[device] // 4, device=device)
    y = torch.empty_like(x)
    read = x.nbytes / seconds_of(x.sum, device, least)
    copy = 2 * x.nbytes / seconds_of(lambda: y.copy_(x), device, least)
    report.add(Row.of("machine", "memory read", "GB/s", [read / 1e9]))
    report.add(Row.of("machine", "memory copy, read and write", "GB/s", [copy / 1e9]))
    return best, max(read, copy)


def shares(case: Case, report: Report, peak: float, bandwidth: float, repeats: int, only: str | None) -> None:
    """Rollout and update of both sides as shares of `peak` operations and `bandwidth` bytes per second."""
    prompts = [len(ids) for ids in make_prompts(case)]
    found: dict[str, dict[str, list[float]]] = {}
    with both(case, CUDA_SETTING if case.device == "cuda" else ONE_RANK[1], only, report) as workers:
        for repeat in range(1 + repeats):
            for side, worker in workers.items():
                drawn = worker.ask("generate")
                groups = {int(row): [len(ids) for ids in group] for row, group in drawn["completions"].items()}
                if side == "ours":
                    update_seconds = worker.ask("update")["seconds"]
                else:
                    update_seconds = worker.ask("step", completions=drawn["completions"])["update"]
                if repeat == 0:
                    continue  # warm
                shape = [prompts[row] for row in groups], list(groups.values())
                sampled, trained = work.rollout(case, *shape), work.update(case, *shape)
                values = found.setdefault(side, {"flops": [], "bytes": [], "update": []})
                values["flops"].append(100 * sampled.flops / drawn["seconds"] / peak)
                values["bytes"].append(100 * sampled.bytes / drawn["seconds"] / bandwidth)
                values["update"].append(100 * trained.flops / update_seconds / peak)
    for key, metric in (
        ("flops", "rollout, share of the best product rate"),
        ("bytes", "rollout, share of memory bandwidth"),
        ("update", "update, share of the best product rate"),
    ):
        values = [found.get(side, {}).get(key, []) for side in ("ours", "theirs")]
        report.add(Row.of(case.name, metric, "%", *values, higher_is_better=True))


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    with reporting("roofline", options.json) as report:
        peak, bandwidth = hardware(options.device, report, 0.1 if options.short else 0.5)
        for case in chosen(options):
            shares(case, report, peak, bandwidth, repeats_of(options, short=2), options.only)


if __name__ == "__main__":
    main()
