"""What a terminal shows of a job: the reward table of contract 1.5 with a progress bar below it.

Where the output is no terminal there is one plain line for each step. It draws the events of `client.stream` and asks
the server nothing. Texts of the server and of users are shown without their control characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Self

from rich.cells import set_cell_size
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rewardsmith import wire
from rewardsmith.client.objects import FinetuningJob
from rewardsmith.client.stream import Event, Interruption, Step
from rewardsmith.quantities import duration

SHORTEST_NAME, LONGEST_NAME, OTHER_COLUMNS_WIDTH = 9, 30, 50
EVENT_STYLES = {
    "revision": "magenta",
    "checkpoint": "cyan",
    "paused": "yellow",
    "restarted": "yellow",
    "warning": "yellow",
}
BAR_WIDTH = 24
SPARKS = "▁▂▃▄▅▆▇█"


def confirm(job: FinetuningJob, source: str) -> None:
    """Say what was submitted."""
    rows = [
        ("base model", job.base_model),
        ("source", source),
        ("adapter", job.adapter_id),
        ("job", job.uuid),
    ]
    print("Requested a fine-tuning job:")
    for name, value in rows:
        print(f"  {name:<10}  {printable(value)}")


def watch(events: Iterable[Event], job: FinetuningJob, console: Console | None = None) -> wire.Job | None:
    """Draw the events until they end and return the job as it ended. Ctrl-C says how to go on and is raised again."""
    ended = None
    console = console or Console(highlight=False)
    try:
        with JobView(job, console) as view:
            for event in events:
                view.show(event)
                if isinstance(event, wire.Job):
                    ended = event
    except KeyboardInterrupt:
        console.print(
            f"Stopped watching; the job goes on.\n"
            f"  watch again  rewardsmith jobs watch {job.adapter_id}\n"
            f"  stop it      rewardsmith jobs stop {job.adapter_id}",
            markup=False,
        )
        # Raised anew, so that a script does not bury these lines under the frames of the open connection.
        raise KeyboardInterrupt from None
    return ended


class JobView:
    """The picture of one job, for as long as it is watched."""

    def __init__(self, job: FinetuningJob, console: Console) -> None:
        self._name = job.adapter_id
        self._console = console
        self._status: str = "unknown"
        self._queued_since: datetime | None = None
        self._paused: str | None = None
        self._lost = False
        self._functions = function_names(job.stored_params)
        self._step = 0
        self._total_steps = job.total_steps or job.stored_params.get("train_steps")
        self._seconds_left: float | None = None
        # A tuple, since the footer is drawn by a thread of its own while steps arrive.
        self._totals: tuple[float, ...] = ()
        self._table_begun = False
        self._held_back: list[wire.JobEvent] = []
        self._live = Live(
            console=console, get_renderable=self._footer, refresh_per_second=4, transient=True, vertical_overflow="crop"
        )
        self._enter_status(job.status, job.created_at)

    @property
    def _drawn(self) -> bool:
        return self._console.is_interactive

    def __enter__(self) -> Self:
        if self._drawn:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, event: Event) -> None:
        match event:
            case Step():
                self._show_step(event)
            case wire.Job():
                self._functions = function_names(event.params)
                self._total_steps = event.total_steps or self._total_steps
                self._paused = event.paused_reason
                self._enter_status(event.status, event.created_at)
                if event.status in wire.TERMINAL:
                    self._show_events()
                    self._say(*_ending(event))
            case wire.JobEvent():
                self._held_back.append(event)
            case Interruption(reason=reason, over=over):
                self._lost = not over
                self._say("The server answers again." if over else f"Waiting for the server: {reason}", "yellow")
        self._show_events()

    def _enter_status(self, status: str, created_at: datetime | None) -> None:
        if status == self._status:
            return
        before, self._status = self._status, status
        if status == "queued":
            if before == "unknown":
                self._queued_since = created_at or datetime.now(UTC)
                if not self._drawn:
                    self._say("The job is in the queue.")
        elif self._queued_since is not None:
            self._say(f"Starting. Total queue time: {_clock(self._queued_since)}")
            self._queued_since = None
        if status == "training" and self._step == 0:
            self._say("Waiting to receive training metrics ...")

    def _show_step(self, event: Step) -> None:
        self._step = event.step
        means = reward_means(event.metrics)
        names = [*self._functions, *sorted(set(means) - set(self._functions))]
        self._seconds_left = event.metrics.get("forecast/seconds_left")
        if "total_reward" in event.metrics:
            self._totals = (*self._totals, event.metrics["total_reward"])[-30:]
        if event.step > 0:
            if self._drawn:
                self._show_rows(event, names, means)
            else:
                self._show_line(event, names, means)
        if held_out := list(_held_out(event.metrics)):
            self._say(f"held-out score at step {event.step}: " + "  ".join(held_out), "cyan")

    def _show_rows(self, event: Step, names: list[str], means: dict[str, float]) -> None:
        if not self._table_begun:
            header = self._row("step", "total_reward", "total_reward_std", "reward_fn", "reward")
            self._console.print(Text(f"{header}\n{'─' * len(header)}", style="bold"))
            self._table_begun = True
        total, spread = (_number(event.metrics.get(name)) for name in ("total_reward", "total_reward_std"))
        rows = Text()
        for position, name in enumerate(names or ["--"]):
            first = (str(event.step), total, spread) if position == 0 else ("", "", "")
            reward = _number(means.get(name))
            rows.append(("\n" if position else "") + self._row(*first, name, reward), style="dim" if position else "")
        self._console.print(rows)

    def _row(self, step: str, total: str, spread: str, name: str, reward: str) -> str:
        """Names give way in a narrow terminal, so that every row stays one line."""
        width = min(max(self._console.width - OTHER_COLUMNS_WIDTH, SHORTEST_NAME), LONGEST_NAME)
        return f"{step:>5}  {total:>12}  {spread:>16}  {set_cell_size(printable(name), width)}  {reward:>9}"

    def _show_line(self, event: Step, names: list[str], means: dict[str, float]) -> None:
        values = [(name, event.metrics.get(name)) for name in ("total_reward", "total_reward_std")]
        values += [(name, means.get(name)) for name in names]
        shown = "  ".join(f"{printable(name)} {_number(value)}" for name, value in values)
        total = f"/{self._total_steps}" if self._total_steps else ""
        left = self._time_left()
        self._say(f"step {event.step:>{max(len(total) - 1, 0)}}{total}  {shown}" + f"  {left}" * bool(left))

    def _show_events(self) -> None:
        """Those whose place among the steps has come; the stream tells the timeline ahead of the steps."""
        no_step_will_come = self._paused is not None or self._status in wire.TERMINAL
        for event in list(self._held_back):
            # A revision is announced above its first step, everything else below the step it belongs to.
            place = (event.step or 0) - (event.kind == "revision")
            if place <= self._step or no_step_will_come:
                self._held_back.remove(event)
                self._show_event(event)

    def _show_event(self, event: wire.JobEvent) -> None:
        # The job itself tells its status, and the lines about it are this view's own.
        if event.kind == "status":
            return
        self._say(event.message, EVENT_STYLES.get(event.kind, ""))
        if event.kind == "paused":
            self._say(
                f"  Change the rewards with adapters.update_config, or go on as it is: "
                f"rewardsmith jobs resume {self._name}"
            )

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(Text(printable(text), style=style), soft_wrap=not self._drawn)

    def _footer(self) -> RenderableType:
        """The last lines of the terminal, drawn again four times a second."""
        if self._lost:
            return Spinner("dots", Text("waiting for the server", "yellow"))
        if self._status == "queued":
            waiting = (
                f"in the queue for {_clock(self._queued_since)}" if self._queued_since else "waiting to start again"
            )
            return Spinner("dots", Text(waiting))
        if self._paused is not None:
            return Text(f"paused: {printable(self._paused)}", "yellow")
        if not self._total_steps or self._status not in ("training", "stopping"):
            return Text("")
        done, left = f"{self._step}/{self._total_steps}", self._time_left()
        taken = len(self._status) + BAR_WIDTH + len(done) + len(left) + 4 * 2
        newest = self._totals[-max(self._console.width - taken, 1) :]
        line = Table.grid(padding=(0, 2))
        line.add_row(
            self._status,
            ProgressBar(total=self._total_steps, completed=self._step, width=BAR_WIDTH, complete_style="cyan"),
            done,
            left,
            Text(sparkline(newest), "green"),
        )
        return line

    def _time_left(self) -> str:
        """By the job's own forecast, which a run of one step and one that has just begun do not have."""
        return f"{duration(self._seconds_left)} left" if self._seconds_left else ""


def function_names(params: dict[str, object]) -> list[str]:
    """The reward functions of a stored config, in display order."""
    rewards = params.get("rewardFns")
    functions = rewards.get("functions") if isinstance(rewards, dict) else None
    return list(functions) if isinstance(functions, dict) else []


def reward_means(metrics: dict[str, float]) -> dict[str, float]:
    """The mean of each reward function in one step."""
    start, end = "reward/", "/mean"
    return {
        name[len(start) : -len(end)]: value
        for name, value in metrics.items()
        if name.startswith(start) and name.endswith(end)
    }


def sparkline(values: Iterable[float]) -> str:
    """Values as a row of bars between their lowest and highest."""
    known = list(values)
    low, high = min(known, default=0.0), max(known, default=0.0)
    span = (high - low) or 1.0
    return "".join(SPARKS[round((value - low) / span * (len(SPARKS) - 1))] for value in known)


def printable(text: str) -> str:
    """Without control characters, which could steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _ending(job: wire.Job) -> tuple[str, str]:
    name = f"{job.target_repo_name}/{job.target_version_tag}"
    match job.status:
        case "completed":
            return f"Job completed: adapter {name} is ready.", "green"
        case "stopped":
            return f"Job stopped after step {job.step}: adapter {name} holds what it had learned.", "green"
    return f"Job {job.status} after step {job.step}.", "red"


def _held_out(metrics: dict[str, float]) -> Iterator[str]:
    for name, value in metrics.items():
        if name.startswith("eval/"):
            yield f"{name.removeprefix('eval/')} {_number(value)}"


def _number(value: float | None) -> str:
    return "--" if value is None else f"{value:.4f}"


def _clock(since: datetime) -> str:
    begun = since if since.tzinfo else since.replace(tzinfo=UTC)
    return str(timedelta(seconds=max(0, round((datetime.now(UTC) - begun).total_seconds()))))
