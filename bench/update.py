"""The update alone: gradient and optimizer step on the same completions and rewards, against TRL's trainer.

    python bench/update.py --json FILE [--short] [--cases NAME ...] [--device cuda]

Before each pair the completions are drawn anew by our engine (by TRL's with `--only theirs`); both sides then learn
from these ids. Ours counts advantages, update and delivery of the new policy to the engine; TRL's counts its
micro-batches and the optimizer step, not what it does between generation and the first of them.
"""

from __future__ import annotations

from cases import Case
from harness import Report, Row, arguments, repeats_of, reporting
from sides import Setting, both, chosen, fastest_setting
from workers import Reading


def compare(case: Case, report: Report, setting: Setting | None, repeats: int, only: str | None) -> None:
    readings: dict[str, list[Reading]] = {"ours": [], "theirs": []}
    with both(case, setting, only, report) as workers:
        for _ in range(1 + repeats):
            drawn = next(iter(workers.values())).ask("generate")["completions"]
            if "ours" in workers:
                readings["ours"].append(workers["ours"].measure("update"))
            if "theirs" in workers:
                readings["theirs"].append(workers["theirs"].measure("step", completions=drawn))
    ours, theirs = readings["ours"][1:], readings["theirs"][1:]  # the first pair warms
    others = [reading.others for reading in [*ours, *theirs]]
    seconds = [[r.answer["seconds"] for r in ours], [r.answer["update"] for r in theirs]]
    tokens = [[r.answer["tokens"] for r in side] for side in (ours, theirs)]
    speeds = [[n / s for n, s in zip(*side, strict=True)] for side in zip(tokens, seconds, strict=True)]
    report.add(Row.of(case.name, "update", "s", *seconds, others=others))
    report.add(Row.of(case.name, "update", "trained tokens/s", *speeds, higher_is_better=True, others=others))
    report.add(Row.of(case.name, "update, CPU time", "cpu-s", [r.cpu for r in ours], [r.cpu for r in theirs]))
    report.add(Row.of(case.name, "trained", "tokens", *tokens))


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    with reporting("update", options.json) as report:
        for case in chosen(options):
            setting = None
            if options.only != "ours":
                setting, tried = fastest_setting(case, "update", short=options.short)
                report.conditions.setdefault("trl", {})[case.name] = {"taken": setting.words, "tried": tried}
            compare(case, report, setting, repeats_of(options), options.only)


if __name__ == "__main__":
    main()
