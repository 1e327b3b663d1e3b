"""Time until a mean reward of 0.9 on a task that a random model can learn, same hyper-parameters on both sides.

    python bench/time_to_reward.py --json FILE [--short] [--repeats SEEDS]

The reward is the share of a completion's tokens that are in the first sixteenth of the vocabulary: about 0.06 at
first, raised by nothing but the policy gradient. Every repeat is another seed of adapter and sampling. The two sides
take steps in turn until each has had a step whose mean reward is 0.9. Steps are shown beside seconds: where they
differ, luck or the algorithm does, not speed.
"""

from __future__ import annotations

from dataclasses import replace

from cases import TINY, Case
from harness import Report, Row, arguments, repeats_of, reporting
from sides import Setting, both, fastest_setting

GOAL = 0.9
MOST_STEPS = 200
TASK = replace(TINY, name="narrow words", new_tokens=64, reward="narrow", learning_rate=1e-3)


def run(case: Case, setting: Setting | None, only: str | None, report: Report) -> dict[str, dict[str, list[float]]]:
    """Seconds and mean reward of each step up to the goal, by side. Shorter lists than `MOST_STEPS` reached it."""
    with both(case, setting, only, report) as workers:
        taken: dict[str, dict[str, list[float]]] = {
            name: {"seconds": [], "reward": [], "others": []} for name in workers
        }
        for _ in range(MOST_STEPS):
            for name, steps in taken.items():
                if steps["reward"] and steps["reward"][-1] >= GOAL:
                    continue
                reading = workers[name].measure("step")
                steps["seconds"].append(reading.answer["seconds"])
                steps["reward"].append(reading.answer["reward"])
                steps["others"].append(reading.others)
    return taken


def report_runs(report: Report, runs: list[dict[str, dict[str, list[float]]]]) -> None:
    others = [value for seed in runs for steps in seed.values() for value in steps["others"]]
    unreached = [name for seed in runs for name, steps in seed.items() if steps["reward"][-1] < GOAL]
    note = f"not reached in {MOST_STEPS} steps: {', '.join(unreached)}" if unreached else ""

    def values(name: str, value) -> list[float]:
        return [value(seed[name]) for seed in runs if name in seed]

    for metric, unit, value in (
        (f"time to a reward of {GOAL}", "s", lambda steps: sum(steps["seconds"])),
        (f"steps to a reward of {GOAL}", "steps", lambda steps: len(steps["seconds"])),
        ("one step", "s", lambda steps: sum(steps["seconds"]) / len(steps["seconds"])),
    ):
        row = Row.of(TASK.name, metric, unit, values("ours", value), values("theirs", value), others=others, note=note)
        report.add(row)
    report.extra["curves"] = [{name: steps["reward"] for name, steps in seed.items()} for seed in runs]


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    case = replace(TASK, device=options.device)
    seeds = repeats_of(options, short=2)
    with reporting("time_to_reward", options.json) as report:
        setting = None
        if options.only != "ours":
            setting, tried = fastest_setting(case, short=options.short)
            report.conditions["trl"] = {"taken": setting.words, "tried": tried}
        report_runs(report, [run(replace(case, seed=seed), setting, options.only, report) for seed in range(seeds)])


if __name__ == "__main__":
    main()
