"""How a step of ours grows with layers, width, vocabulary, prompt, completion, group and number of prompts.

    python bench/scaling.py --json FILE [--svg docs/benchmarks.svg] [--short]

One quantity changes at a time, the others stay as in `BASE`. Each point is a process of its own: a warm step, then
`--repeats` steps (3), of which the median counts. `growth` is the exponent between the last two points of a sweep: 1 is
linear, 0 is no growth.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cases import TINY, Case
from harness import Report, Row, arguments, repeats_of, reporting
from plot import Panel, small_multiples
from sides import open_ours

BASE = replace(TINY, name="base", new_tokens=64, prompt_tokens=(80, 80))
Make = Callable[[int], Case]
SWEEPS: dict[str, tuple[Make, list[int]]] = {
    "layers": (lambda n: replace(BASE, layers=n), [2, 4, 8, 16]),
    # Heads of 32, as in the base, and an MLP about 8/3 as wide.
    "width": (lambda n: replace(BASE, hidden=n, mlp=n // 12 * 32, heads=n // 32), [128, 256, 512, 1024]),
    "vocabulary": (lambda n: replace(BASE, vocab=n), [512, 2048, 8192, 32_768]),
    "prompt tokens": (lambda n: replace(BASE, prompt_tokens=(n, n)), [32, 128, 512, 1024]),
    "completion tokens": (lambda n: replace(BASE, new_tokens=n), [32, 64, 128, 256]),
    "group size": (lambda n: replace(BASE, group=n), [4, 8, 16, 32]),
    "prompts": (lambda n: replace(BASE, prompts=n), [4, 8, 16, 32]),
}
SERIES = {"step": "seconds", "rollout": "generate", "update": "update"}


def sweep(name: str, make: Make, points: list[int], report: Report, repeats: int, device: str) -> Panel:
    series: dict[str, list[float]] = {metric: [] for metric in SERIES}
    for point in points:
        with open_ours(replace(make(point), device=device)) as worker:
            worker.ask("step")  # warm
            readings = [worker.measure("step") for _ in range(repeats)]
        for metric, key in SERIES.items():
            values = [reading.answer[key] for reading in readings]
            others = [reading.others for reading in readings]
            report.add(Row.of(f"{name} {point}", metric, "s", values, others=others))
            series[metric].append(statistics.median(values))
    for metric, values in series.items():
        growth = math.log(values[-1] / values[-2]) / math.log(points[-1] / points[-2])
        report.add(Row.of(f"{name} {points[-2]} to {points[-1]}", f"{metric}, growth", "exponent", [growth]))
    return Panel(name, points, series)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the plot here")
    options = parser.parse_args()
    if options.only == "theirs":
        parser.error("only our side is measured here")
    with reporting("scaling", options.json) as report:
        panels = []
        for name, (make, points) in SWEEPS.items():
            if not options.cases or name in options.cases:
                taken = points[::2] if options.short else points
                repeats = repeats_of(options, full=3, short=1)
                panels.append(sweep(name, make, taken, report, repeats, options.device))
        if options.svg:
            options.svg.write_text(small_multiples(panels, "seconds"))


if __name__ == "__main__":
    main()
