"""Sampling alone: our engine against the generation of TRL's trainer (transformers' `generate` on the PEFT model).

    python bench/rollout.py --json FILE [--short] [--cases NAME ...] [--device cuda [--vllm]]

Both draw the completions of one step, again and again from the same policy. In the first measurement our log-probs
are compared with those that transformers computes for the same tokens.
"""

from __future__ import annotations

from cases import Case
from harness import Report, Row, arguments, repeats_of, reporting
from sides import Setting, both, chosen, fastest_setting
from workers import interleaved


def compare(case: Case, report: Report, setting: Setting | None, repeats: int, only: str | None) -> None:
    with both(case, setting, only, report) as workers:
        if "ours" in workers:
            mismatch = workers["ours"].ask("mismatch")
            for name in ("mean", "max"):
                report.add(Row.of(case.name, f"log-prob difference to transformers, {name}", "nats", [mismatch[name]]))
        for worker in workers.values():
            worker.ask("generate")  # warm
        readings = interleaved({name: lambda w=w: w.measure("generate") for name, w in workers.items()}, repeats)
    ours, theirs = readings.get("ours", []), readings.get("theirs", [])
    others = [reading.others for reading in [*ours, *theirs]]
    speeds = [[r.answer["tokens"] / r.answer["seconds"] for r in side] for side in (ours, theirs)]
    per_cpu_second = [[r.answer["tokens"] / r.cpu for r in side] for side in (ours, theirs)]
    report.add(Row.of(case.name, "rollout", "tokens/s", *speeds, higher_is_better=True, others=others))
    report.add(Row.of(case.name, "rollout", "tokens/cpu-s", *per_cpu_second, higher_is_better=True, others=others))


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--vllm", action="store_true", help="TRL samples with vLLM (--device cuda)")
    options = parser.parse_args()
    with reporting("rollout", options.json) as report:
        for case in chosen(options):
            setting = None
            if options.only != "ours":
                setting, tried = fastest_setting(case, "generate", short=options.short, vllm=options.vllm)
                report.conditions.setdefault("trl", {})[case.name] = {"taken": setting.words, "tried": tried}
            compare(case, report, setting, repeats_of(options), options.only)


if __name__ == "__main__":
    main()
