"""What a person reads while a job runs: in a terminal, in a log file, and after Ctrl-C."""

import io
import re
import traceback
from collections.abc import Iterator

import pytest
from client.scripted import job, step
from rich.console import Console

from rewardsmith import wire
from rewardsmith.client import view
from rewardsmith.client.objects import FinetuningJob
from rewardsmith.client.stream import Event, Interruption, Step

PARAMS = {"rewardFns": {"functions": {"zeta": {}, "alpha": {}}}}


def a_job(status: str, **fields: object) -> wire.Job:
    return wire.Job.model_validate(job(status, **{"params": PARAMS, **fields}))


def a_step(number: int, **means: float) -> Step:
    return Step.model_validate(step(number, **means))


def an_event(kind: str, message: str, step: int | None = None) -> wire.JobEvent:
    return wire.JobEvent(id=1, at="2026-01-01T00:00:00Z", kind=kind, message=message, step=step)


def drawn(*events: Event, terminal: bool = False, begin: str = "training", width: int = 100) -> list[str]:
    """The lines that stay, without colours and without the part that is drawn again and again."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, force_interactive=terminal, width=width, color_system=None)
    with view.JobView(FinetuningJob.of(a_job(begin)), console) as picture:
        picture._live.auto_refresh = False
        for event in events:
            picture.show(event)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip() and not line.startswith("training ")]


def test_a_log_file_gets_one_line_for_each_step():
    lines = drawn(a_job("training", totalSteps=200), a_step(12, zeta=0.5, alpha=0.25), a_step(13, zeta=1.0))
    assert lines[1:] == [
        "step  12/200  total_reward 0.7500  total_reward_std 0.5000  zeta 0.5000  alpha 0.2500",
        "step  13/200  total_reward 1.0000  total_reward_std 0.5000  zeta 1.0000  alpha --",
    ]


def test_a_terminal_gets_the_table_of_the_contract():
    lines = drawn(a_step(1, zeta=0.5), a_step(2, zeta=0.5, alpha=1, added=0), terminal=True, width=80)
    table = lines[lines.index(next(line for line in lines if line.split()[:1] == ["step"])) :]
    assert table[0].split() == ["step", "total_reward", "total_reward_std", "reward_fn", "reward"]
    assert [line.split() for line in table[2:7]] == [
        ["1", "0.5000", "0.5000", "zeta", "0.5000"],
        ["alpha", "--"],
        ["2", "1.5000", "0.5000", "zeta", "0.5000"],
        ["alpha", "1.0000"],
        ["added", "0.0000"],
    ]
    assert len({len(line) for line in table[2:7]}) == 1, "columns stand below each other"
    assert max(map(len, table)) <= 80


@pytest.mark.parametrize("width", [60, 70, 78])
def test_in_a_narrow_terminal_names_give_way_and_rows_stay_whole(width: int):
    lines = drawn(a_step(1, **{"a-name-that-is-longer-than-most-are": 0.5}), terminal=True, width=width)
    assert ["1", "0.5000", "0.5000", "zeta", "--"] in [line.split() for line in lines]
    long = next(line for line in lines if "a-name" in line)
    assert long.endswith("0.5000")
    assert len(long) == width


def test_names_and_messages_cannot_steer_the_terminal():
    wide = "評" * 40
    lines = drawn(a_step(1, **{wide: 1.0}), an_event("warning", "\x1b[2Jgone [red]red[/red]"), terminal=True)
    assert any("評…" in line or "評 " in line for line in lines)
    assert any("\N{REPLACEMENT CHARACTER}[2Jgone [red]red[/red]" in line for line in lines)


def test_the_queue_and_the_start_are_told_in_order():
    created = "2020-01-01T00:00:00Z"
    lines = drawn(a_job("queued", createdAt=created), a_job("training", createdAt=created), begin="queued")
    assert lines[0] == "The job is in the queue."
    assert lines[1].startswith("Starting. Total queue time: ")
    assert lines[2] == "Waiting to receive training metrics ..."


def test_what_happens_to_a_run_is_told():
    lines = drawn(
        an_event("status", "queued -> training"),
        an_event("checkpoint", "checkpoint 1 saved at step 20, held-out 0.5 (best)"),
        an_event("revision", "reward revision 2 from step 31"),
        an_event("paused", "half of the calls of 'zeta' fail"),
        an_event("restarted", "attempt 2 goes on after step 20"),
        Interruption("no server answers"),
        Interruption("", over=True),
        a_job("errored", step=31),
    )
    assert "queued -> training" not in "\n".join(lines)
    assert lines[1:4] == [
        "checkpoint 1 saved at step 20, held-out 0.5 (best)",
        "reward revision 2 from step 31",
        "half of the calls of 'zeta' fail",
    ]
    assert "rewardsmith jobs resume my-repo/1" in lines[4]
    assert lines[5:] == [
        "attempt 2 goes on after step 20",
        "Waiting for the server: no server answers",
        "The server answers again.",
        "Job errored after step 31.",
    ]


def test_a_watcher_who_comes_late_reads_the_timeline_at_the_steps_it_belongs_to():
    lines = drawn(
        an_event("checkpoint", "checkpoint 1", step=2),
        an_event("revision", "reward revision 2 from step 3", step=3),
        an_event("checkpoint", "checkpoint 2", step=4),
        *(a_step(number) for number in (1, 2, 3)),
        a_job("errored", step=3),
    )
    order = [line.split("  ")[0] for line in lines[1:]]
    assert order == [
        "step 1/3",
        "step 2/3",
        "checkpoint 1",
        "reward revision 2 from step 3",
        "step 3/3",
        "checkpoint 2",
        "Job errored after step 3.",
    ]


def test_a_pause_is_told_though_its_step_is_not():
    lines = drawn(an_event("paused", "too many errors", step=1), a_job("training", pausedReason="too many errors"))
    assert "too many errors" in lines


def test_held_out_scores_are_shown_also_before_the_first_step():
    before = Step(step=0, epoch=0, metrics={"eval/total_reward": 0.25, "eval/zeta": 0.125})
    assert drawn(before)[-1] == "held-out score at step 0: total_reward 0.2500  zeta 0.1250"


@pytest.mark.parametrize(
    ("status", "text"),
    [("completed", "my-repo/1 is ready"), ("stopped", "my-repo/1 holds"), ("canceled", "Job canceled after step")],
)
def test_every_ending_is_named(status: str, text: str):
    assert text in drawn(a_job(status))[-1]


def test_interrupting_says_that_the_job_goes_on_and_how_to_come_back():
    def interrupted() -> Iterator[Event]:
        yield a_step(1)
        raise KeyboardInterrupt

    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt) as raised:
        view.watch(interrupted(), FinetuningJob.of(a_job("training")), Console(file=out))
    assert "the job goes on" in out.getvalue()
    assert "rewardsmith jobs watch my-repo/1" in out.getvalue()
    assert "rewardsmith jobs stop my-repo/1" in out.getvalue()
    shown = "".join(traceback.format_exception(raised.value))
    assert "in interrupted" not in shown, "what it was waiting in would bury those lines"


def forecast_step(number: int, seconds_left: float | None) -> Step:
    left = {} if seconds_left is None else {"forecast/seconds_left": seconds_left}
    return Step(step=number, epoch=0, metrics={"total_reward": number, "seconds/generate": 20, **left})


def test_the_last_line_tells_progress_and_the_time_left_and_fits_a_terminal():
    out = io.StringIO()
    console = Console(file=out, width=80)
    picture = view.JobView(FinetuningJob.of(a_job("training", totalSteps=1000)), console)
    picture.show(forecast_step(1, None))
    console.print(picture._footer())
    assert "1/1000" in out.getvalue() and "left" not in out.getvalue(), "the job has no forecast yet"
    for number in range(2, 40):
        picture.show(forecast_step(number, 9000 - 60 * number))
    out.truncate(0)
    console.print(picture._footer())
    (line,) = out.getvalue().strip("\0\n").splitlines()
    assert "39/1000  1 h 51 min left" in line
    assert line.rstrip().endswith("█") and "…" not in line, "the newest steps are those that stay"


def test_a_log_file_tells_the_time_left_at_the_end_of_each_line():
    lines = drawn(a_job("training", totalSteps=4), forecast_step(1, None), forecast_step(2, 130), forecast_step(4, 0))
    assert [line.partition("alpha --")[2] for line in lines[1:]] == ["", "  2 min left", ""]


def test_a_flat_or_empty_curve_is_drawn():
    assert view.sparkline([]) == ""
    assert view.sparkline([2, 2]) == "▁▁"
    assert view.sparkline([0, 1]) == "▁█"
