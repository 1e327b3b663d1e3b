"""Whole GRPO steps against TRL's GRPOTrainer: seconds, CPU seconds, tokens per second, peak memory.

    python bench/vs_trl.py --json FILE [--short] [--cases NAME ...] [--device cuda [--vllm]]

For each case TRL is first tried with the settings of `sides`, and the fastest one is compared. Steps are then taken in
turn, A B A B, by two warm processes. Memory is measured afterwards, in new processes, one side at a time.
"""

from __future__ import annotations

from collections.abc import Callable

from cases import Case
from harness import Report, Row, arguments, repeats_of, reporting
from sides import LEANEST, Setting, both, chosen, fastest_setting, peak_memory
from workers import Reading, interleaved


def compare(case: Case, report: Report, setting: Setting | None, repeats: int, only: str | None) -> None:
    with both(case, setting, only, report) as workers:
        for worker in workers.values():
            worker.ask("step")  # warm
        readings = interleaved({name: lambda w=w: w.measure("step") for name, w in workers.items()}, repeats)
    ours, theirs = readings.get("ours", []), readings.get("theirs", [])
    others = [reading.others for reading in [*ours, *theirs]]

    def add(metric: str, unit: str, value: Callable[[Reading], float], higher_is_better: bool = False) -> None:
        values = (list(map(value, ours)), list(map(value, theirs)))
        report.add(Row.of(case.name, metric, unit, *values, higher_is_better=higher_is_better, others=others))

    add("step", "s", lambda r: r.answer["seconds"])
    add("step, CPU time", "cpu-s", lambda r: r.cpu)
    add("rollout in it", "s", lambda r: r.answer["generate"])
    add("update in it", "s", lambda r: r.answer["update"] + r.answer.get("deliver", 0.0))
    add("speed", "tokens/s", lambda r: r.answer["tokens"] / r.answer["seconds"], higher_is_better=True)
    add("sampled", "tokens", lambda r: r.answer["tokens"], higher_is_better=True)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--vllm", action="store_true", help="TRL samples with vLLM (--device cuda)")
    options = parser.parse_args()
    with reporting("vs_trl", options.json) as report:
        setting = None
        for case in chosen(options, short=("tiny", "ragged", "small")):
            # The short set looks for TRL's best setting on its first case only.
            if options.only != "ours" and not (options.short and setting):
                setting, tried = fastest_setting(case, short=options.short, vllm=options.vllm)
                report.conditions.setdefault("trl", {})[case.name] = {"taken": setting.words, "tried": tried}
            compare(case, report, setting, repeats_of(options), options.only)
            for row in peak_memory(case, setting, options.only):
                report.add(row)
            if case.device == "cpu" and setting is not None and not options.short:
                for row in peak_memory(case, LEANEST, options.only):
                    row.metric += f" (TRL: {LEANEST.words})"
                    report.add(row)


if __name__ == "__main__":
    main()
