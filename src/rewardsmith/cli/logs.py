"""`rewardsmith logs JOB`: what the reward functions of a job printed and how they failed, or its process's own log.

Control characters are shown escaped: functions print what the model wrote.
"""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Literal

import typer
from rich.text import Text

from rewardsmith import wire
from rewardsmith.cli.output import AsJson, connect, console, print_json, reward
from rewardsmith.cli.records import Containing, Function, JobRef, Limit, Outcome, Step
from rewardsmith.client.jobs import LogFilters
from rewardsmith.client.view import printable


def logs(
    job: JobRef,
    function: Function = None,
    revision: Annotated[int | None, typer.Option(min=1, help="Only of this revision.", show_default=False)] = None,
    step: Step = None,
    from_step: Annotated[int | None, typer.Option(min=0, help="From this step on.", show_default=False)] = None,
    to_step: Annotated[int | None, typer.Option(min=0, help="Up to this step.", show_default=False)] = None,
    epoch: Annotated[
        int | None, typer.Option(min=0, help="Only of this pass over the rows, from 1.", show_default=False)
    ] = None,
    phase: Annotated[
        Literal["train", "eval"] | None, typer.Option(help="Only of training, or of held-out rows.", show_default=False)
    ] = None,
    outcome: Outcome = None,
    text: Containing = None,
    every: Annotated[bool, typer.Option("--every", help="Also calls that printed nothing and did not fail.")] = False,
    folded: Annotated[bool, typer.Option("--folded", help="Calls that said the same as one, with a count.")] = False,
    limit: Limit = 20,
    process: Annotated[
        bool, typer.Option("--process/--rewards", help="What the job's own process wrote, or its reward functions.")
    ] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="With --process: of this attempt.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the reward functions printed and how they failed."""
    if process or attempt is not None:
        return _process_log(job, attempt, as_json)
    filters: LogFilters = {
        "function": function,
        "revision": revision,
        "step": step,
        "from_step": from_step,
        "to_step": to_step,
        "epoch": epoch,
        "phase": phase,
        "outcome": outcome,
        "text": text,
        "every": every,
    }
    jobs = connect().finetuning.jobs
    if folded:
        return _show_folded(jobs.reward_logs(job, folded=True, **filters), limit, as_json)
    shown = list(islice(jobs.reward_logs(job, **filters), limit))
    if as_json:
        return print_json(shown)
    for call in shown:
        seconds = f"{1000 * call.seconds:.1f} ms"
        block(f"{_place(call)}  {call.function}  {call.outcome}  {reward(call.value)}  {seconds}", _said(call))
    if not shown:
        print("No lines that fit." if every else "No lines that fit; --every shows calls that said nothing, too.")


def _show_folded(found: wire.FoldedLogs, limit: int, as_json: bool) -> None:
    if as_json:
        return print_json(found)
    for fold in found.data[:limit]:
        steps = (
            f"step {fold.last_step}"
            if fold.first_step == fold.last_step
            else (f"steps {fold.first_step} to {fold.last_step}")
        )
        block(
            f"{fold.count} x {fold.function}  {fold.outcome}  revision {fold.revision}  {steps}",
            f"{_place(fold.example)}:\n{_said(fold.example)}",
        )
    others = found.others + sum(fold.count for fold in found.data[limit:])
    if others:
        print(f"and {others} calls that said something else; --limit shows more")
    if not found.data:
        print("No lines that fit.")


def _process_log(job: str, attempt: int | None, as_json: bool) -> None:
    log = connect().finetuning.jobs.log(job, attempt)
    if as_json:
        return print_json(log)
    # A progress bar writes its line again and again; what it wrote last is what counts.
    last = "\n".join(line.rpartition("\r")[2] for line in log.split("\n"))
    console().print(Text(printable(last)), soft_wrap=True, end="")


def _place(call: wire.RewardLogRow) -> str:
    held_out = "  held out" if call.phase == "eval" else ""
    return f"step {call.step}  row index {call.row}  sample {call.sample}{held_out}"


def _said(call: wire.RewardLogRow) -> str:
    between = "\n" if call.prints and call.error and not call.prints.endswith("\n") else ""
    return call.prints + between + call.error


def escaped(text: str) -> str:
    """Control characters, and others that could change how a line looks, as Python writes them."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def block(title: str, text: str) -> None:
    """A title and indented lines below it."""
    console().print(Text(escaped(title), "bold"), soft_wrap=True)
    console().print(Text("".join(f"  {line}\n" for line in escaped(text).split("\n"))), soft_wrap=True)
