"""What a run leaves behind: `rewardsmith jobs metrics | completions | events`; `logs` has the rest."""

from __future__ import annotations

from itertools import islice, pairwise
from typing import Annotated, Literal

import typer
from rich.text import Text

from rewardsmith import wire
from rewardsmith.cli.output import AsJson, connect, console, print_json, print_table, reward
from rewardsmith.client.view import printable, sparkline

CURVE_WIDTH = 30

JobRef = Annotated[
    str, typer.Argument(metavar="JOB", help="A job's uuid or its adapter, such as my-repo/1.", show_default=False)
]
Step = Annotated[int | None, typer.Option(min=0, help="Only of this step.", show_default=False)]
Function = Annotated[str | None, typer.Option(help="Only of this reward function.", show_default=False)]
Outcome = Annotated[
    str | None, typer.Option(help="Only with this outcome, such as exception or timeout.", show_default=False)
]
Containing = Annotated[str | None, typer.Option("--text", help="Only those that contain this.", show_default=False)]
Limit = Annotated[int, typer.Option(min=1, help="At most so many.")]


def add_to(app: typer.Typer) -> None:
    for command in (metrics, completions, events):
        app.command()(command)


def metrics(
    job: JobRef,
    series: Annotated[str | None, typer.Option(help="Every point of this one.", show_default=False)] = None,
    after_step: Annotated[int | None, typer.Option(min=0, help="Only later steps.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Show what was measured at each step."""
    found = connect().finetuning.jobs.metrics(job, series, after_step)
    if as_json:
        return print_json(found)
    if series is not None:
        rows: list[list[object]] = [[point.step, f"{point.value:.6g}"] for point in found.get(series, [])]
        return print_table(["step>", f"{series}>"], rows, empty=f"No {series} yet.")
    print_table(
        ["series", "points>", "first>", "last>", "curve"],
        (
            [name, len(points), f"{points[0].value:.6g}", f"{points[-1].value:.6g}", _curve(points)]
            for name, points in found.items()
            if points
        ),
        empty=f"No step yet. See where it is: rewardsmith jobs watch {job}",
    )


def completions(
    job: JobRef,
    step: Step = None,
    phase: Annotated[
        Literal["train", "eval"] | None, typer.Option(help="Only of training, or of held-out rows.", show_default=False)
    ] = None,
    row: Annotated[
        int | None,
        typer.Option(min=0, help="Only of the dataset row with this index, from 0.", show_default=False),
    ] = None,
    function: Function = None,
    outcome: Outcome = None,
    min_score: Annotated[float | None, typer.Option(help="Scored so at least.", show_default=False)] = None,
    max_score: Annotated[float | None, typer.Option(help="Scored so at most.", show_default=False)] = None,
    text: Containing = None,
    order: Annotated[Literal["newest", "oldest"], typer.Option(help="Which come first.")] = "newest",
    limit: Limit = 10,
    as_json: AsJson = False,
) -> None:
    """Show what the model wrote and how it was scored."""
    found = connect().finetuning.jobs.completions(
        job,
        step=step,
        phase=phase,
        row=row,
        function=function,
        outcome=outcome,
        min_score=min_score,
        max_score=max_score,
        text=text,
        order=order,
    )
    shown = list(islice(found, limit))
    if as_json:
        return print_json(shown)
    for completion in shown:
        scores = "  ".join(f"{name} {_score(completion, name)}" for name in completion.outcomes)
        place = f"step {completion.step}  row index {completion.row}  sample {completion.sample}"
        _block(f"{place}  total {reward(completion.total_reward)}  {scores}", completion.completion)
    if not shown:
        print("No completions that fit.")


def events(job: JobRef, as_json: AsJson = False) -> None:
    """Show the timeline of a job."""
    found = connect().finetuning.jobs.events(job)
    if as_json:
        return print_json(found)
    print_table(
        ["at", "step>", "kind", "message"],
        ([f"{e.at:%Y-%m-%d %H:%M:%S}", "" if e.step is None else e.step, e.kind, first_line(e.message)] for e in found),
        empty="Nothing has happened yet.",
    )


def first_line(text: str) -> str:
    """With a sign that there is more."""
    first, more, _ = text.strip().partition("\n")
    return f"{first} …" if more else first


def _score(completion: wire.CompletionRow, name: str) -> str:
    outcome = completion.outcomes[name]
    return reward(completion.scores.get(name)) if outcome == "ok" else outcome


def _curve(points: list[wire.MetricPoint]) -> str:
    """The points as at most so many bars, each the mean of its share."""
    values = [point.value for point in points]
    bars = min(CURVE_WIDTH, len(values))
    edges = [len(values) * i // bars for i in range(bars + 1)]
    return sparkline(sum(values[a:b]) / (b - a) for a, b in pairwise(edges))


def _block(title: str, text: str) -> None:
    console().print(Text(printable(title), "bold"), soft_wrap=True)
    console().print(Text("".join(f"  {line}\n" for line in printable(text).splitlines())), soft_wrap=True)
