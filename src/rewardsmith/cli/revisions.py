"""`rewardsmith revisions ...`: the reward functions of a running job, looked at, tried, changed and taken back."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.syntax import Syntax
from rich.text import Text

from rewardsmith import wire
from rewardsmith.cli.job_config import Rewards, read_rewards
from rewardsmith.cli.logs import block
from rewardsmith.cli.output import AsJson, age, connect, console, print_details, print_json, print_table, reward
from rewardsmith.cli.records import JobRef, first_line
from rewardsmith.client.view import printable, sparkline
from rewardsmith.errors import ConfigError
from rewardsmith.reward_config import RewardFunction

app = typer.Typer(
    name="revisions",
    help="Reward functions of a running job: look, try, change, go back.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Remove = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Take this function out. Repeatable.")]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        "--weight",
        metavar="NAME=WEIGHT",
        help="Its weight, or a schedule such as answer=1:1.0,100:0.2 (step:weight, in lines between). Repeatable.",
        show_default=False,
    ),
]
Note = Annotated[str | None, typer.Option(help="Why; kept with the revision.", show_default=False)]
SHOWN_CHANGES = 10


@app.command("list")
def list_(job: JobRef, as_json: AsJson = False) -> None:
    """Show every set of reward functions a job has had."""
    found = connect().revisions.list(job)
    if as_json:
        return print_json(found)
    print_table(
        ["revision>", "from step", "by", "made", "functions", "note"],
        (
            [
                r.revision,
                _effect(r, found),
                r.created_by,
                age(r.created_at),
                ", ".join(f.name for f in r.functions),
                r.note or "",
            ]
            for r in found
        ),
        empty="No revisions.",
    )


@app.command()
def get(
    job: JobRef,
    revision: Annotated[int, typer.Argument(min=1, help="Its number.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show one revision with the text of its functions."""
    found = connect().revisions.get(job, revision)
    if as_json:
        return print_json(found)
    print_details(
        [
            ("revision", found.revision),
            ("by", found.created_by),
            ("made", age(found.created_at)),
            ("note", found.note),
            ("from step", found.effective_step),
            ("refused", found.refused),
            ("replaces", found.replaces),
            ("sha256", found.sha256),
        ]
    )
    for function in found.functions:
        print(f"\n# {printable(function.name)}, {weight_of(function)}")
        console().print(Syntax(printable(function.source), "python", background_color="default"))


@app.command()
def diff(
    job: JobRef,
    revision: Annotated[int, typer.Argument(min=1, help="Its number.", show_default=False)],
    against: Annotated[
        int | None, typer.Option(min=1, help="Another one. [default: the one before it]", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a revision changed."""
    found = connect().revisions.diff(job, revision, against)
    if as_json:
        return print_json(found)
    _show_diff(found)


@app.command("dry-run")
def dry_run(
    job: JobRef,
    rewards: Rewards = None,
    remove: Remove = None,
    weight: Weights = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="On the completions of so many steps.", show_default=False)
    ] = None,
    completions: Annotated[
        int | None, typer.Option(min=1, help="On at least so many completions. [default: 256]", show_default=False)
    ] = None,
    row: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Also on the newest ones of this dataset row, by index from 0. Repeatable."),
    ] = None,
    rescore: Annotated[bool, typer.Option("--rescore", help="Run the present functions again, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Try a change on stored completions; the job is not touched."""
    found = connect().revisions.dry_run(
        job,
        dict(_functions(rewards)),
        remove=remove or (),
        weights=_weights(weight),
        steps=steps,
        completions=completions,
        rows=row or (),
        rescore=rescore,
    )
    if as_json:
        return print_json(found)
    _show_dry_run(found)


@app.command()
def apply(
    job: JobRef,
    rewards: Rewards = None,
    remove: Remove = None,
    weight: Weights = None,
    note: Note = None,
    compared_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Score what this replaces for so many steps more.", show_default=False),
    ] = None,
) -> None:
    """Change the reward functions; functions that are not named stay."""
    made = connect().revisions.apply(
        job,
        dict(_functions(rewards)),
        remove=remove or (),
        weights=_weights(weight),
        note=note,
        compared_steps=compared_steps,
    )
    _say_made(job, made)


@app.command()
def rollback(
    job: JobRef,
    to: Annotated[int, typer.Option(min=1, help="The revision whose functions to take.", show_default=False)],
    note: Note = None,
) -> None:
    """Go back to the functions of an earlier revision."""
    _say_made(job, connect().revisions.rollback(job, to, note))


def weight_of(function: wire.RevisionFunction | RewardFunction) -> str:
    if not function.schedule:
        return f"weight {function.weight:g}"
    return "weight " + ", ".join(f"{weight:g} at step {step}" for step, weight in sorted(function.schedule.items()))


def _say_made(job: str, made: wire.Revision) -> None:
    print(f"Revision {made.revision} of {job}: {', '.join(function.name for function in made.functions)}")
    if made.effective_step is None:
        print(f"From which step on they score: rewardsmith revisions list {job}")
    else:
        print(f"The job has these functions already, since step {made.effective_step}.")


def _functions(arguments: list[str] | None) -> list[tuple[str, RewardFunction]]:
    return [pair for argument in arguments or [] for pair in read_rewards(argument)]


def _weights(arguments: list[str] | None) -> dict[str, Any]:
    """Raises ConfigError for what is neither NAME=NUMBER nor NAME=STEP:NUMBER,..."""
    weights: dict[str, Any] = {}
    for argument in arguments or []:
        name, _, text = argument.rpartition("=")
        try:
            if not name:
                raise ValueError
            if ":" in text:
                knots = (knot.split(":") for knot in text.split(","))
                weights[name] = {int(step): float(weight) for step, weight in knots}
            else:
                weights[name] = float(text)
        except ValueError:
            raise ConfigError(f"--weight {argument!r}: write NAME=2.5, or NAME=1:1.0,100:0.2") from None
    return weights


def _effect(revision: wire.Revision, every: list[wire.Revision]) -> str:
    if revision.refused is not None:
        return f"refused: {first_line(revision.refused)}"
    if revision.effective_step is not None:
        return str(revision.effective_step)
    # A newer one that waits too may still be refused, and then this one has its turn.
    newer = (r.revision for r in every if r.revision > revision.revision and r.effective_step is not None)
    replacement = next(newer, None)
    return "not yet" if replacement is None else f"never (replaced by {replacement})"


def _show_diff(diff: wire.RevisionDiff) -> None:
    for function in diff.functions:
        if function.change == "same":
            continue
        console().print(Text(f"{printable(function.name)} {function.change}", "bold"))
        for setting in function.settings:
            _say_setting(setting)
        console().print(Syntax(printable(function.source), "diff", background_color="default"))
    for setting in diff.runtime:
        _say_setting(setting)
    if not diff.runtime and all(function.change == "same" for function in diff.functions):
        print("Nothing differs.")


def _say_setting(setting: wire.Setting) -> None:
    print(f"  {printable(f'{setting.name}: {setting.old} -> {setting.new}')}")


def _show_dry_run(found: wire.DryRun) -> None:
    signal = found.signal
    groups = f"{signal.groups} group{'s' * (signal.groups != 1)}"
    print(
        f"Tried on {found.scored} stored completions in {groups}, steps {found.first_step} to "
        f"{found.last_step}, against revision {found.against} ({found.seconds:.1f} s). The job goes on as it is."
    )
    for remark in (found.stopped, found.missing_rows and f"no completion found of rows {found.missing_rows}"):
        if remark:
            print(remark)
    print()
    print_table(
        ["", "change", "old mean>", "new mean>", "old std>", "new std>", "differing>", "failed>", "p95>", "old", "new"],
        [_compared(line) for line in [*found.functions, found.total]],
        empty="",
    )
    print(f"\ngroups without signal: {signal.without_signal_old} now, {signal.without_signal_new} with the change")
    for finding in found.findings:
        print(f"- {printable(finding)}")
    for failure in found.failures:
        place = f"step {failure.step}  row index {failure.row}  sample {failure.sample}"
        block(f"\n{failure.count} x {failure.function}  {failure.outcome}, such as {place}", failure.error)
    for change in found.changes[:SHOWN_CHANGES]:
        flipped = "  pushed the other way" if change.flipped else ""
        totals = f"{reward(change.old_total)} -> {reward(change.new_total)}"
        block(
            f"step {change.step}  row index {change.row}  sample {change.sample}  total {totals}{flipped}",
            change.completion,
        )


def _compared(line: wire.ScoreComparison) -> list[object]:
    old, new, counts = line.old, line.new, line.histogram
    return [
        line.name,
        line.change if line.ran or line.new is None else f"{line.change}, stored",
        reward(old.mean) if old else "",
        reward(new.mean) if new else "",
        reward(old.std) if old else "",
        reward(new.std) if new else "",
        line.differing,
        new.failed if new else "",
        f"{1000 * new.seconds_p95:.1f} ms" if new and new.seconds_p95 is not None else "",
        sparkline(counts.old) if counts and old else "",
        sparkline(counts.new) if counts and new else "",
    ]
