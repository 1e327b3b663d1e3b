"""`python -m rewardsmith.jobs.entry`: the process of one job attempt. Reads its ticket, trains, says how it ended.

The ticket is one line of JSON on standard input: url, uuid, fence, token. Exit status 75 means that the job made room
(SIGTERM) and goes on later from its checkpoint; 0 that the server knows the end; anything else is for the reaper.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rewardsmith import machine
from rewardsmith.errors import JobCanceled, LeaseLost, RewardsmithError, ServerLost
from rewardsmith.rewards.redact import redactor
from rewardsmith.wire import Finish, JobSpec

if TYPE_CHECKING:
    from rewardsmith.train.journal import Journal
    from rewardsmith.train.parallel.ranks import Ranks

log = logging.getLogger("rewardsmith.job")

YIELDED, LEASE_LOST, SERVER_LOST = 75, 3, 4
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def main() -> int:
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    asked_to_yield = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked_to_yield.set())
    _set_threads()
    ticket = json.loads(sys.stdin.readline())
    # After _set_threads: torch reads the environment when it is imported. Ranks start while this process is one thread.
    from rewardsmith.train.parallel.ranks import Ranks

    with Ranks.of_this_machine() as ranks:
        return run_job(ticket, asked_to_yield, ranks)


def run_job(ticket: dict[str, Any], asked_to_yield: threading.Event, ranks: Ranks) -> int:
    """The exit status of the attempt that `ticket` allows."""
    from rewardsmith.train.journal import Journal

    try:
        with Journal(ticket["url"], ticket["uuid"], ticket["fence"], ticket["token"]) as journal:
            spec = journal.spec()
            _hide_in_log(spec.secrets)
            finish = _attempt(spec, journal, asked_to_yield, ranks)
            if finish is None:
                journal.flush(seconds=5)
                return YIELDED
            journal.finish(finish)
            return 0
    except LeaseLost as error:
        log.warning("%s", error)
        return LEASE_LOST
    except ServerLost as error:
        log.error("%s", error)
        return SERVER_LOST


def _attempt(spec: JobSpec, journal: Journal, asked_to_yield: threading.Event, ranks: Ranks) -> Finish | None:
    """Trains, and gives the end to report; None when the job yields. Raises LeaseLost and ServerLost."""
    from rewardsmith.train.loop import train
    from rewardsmith.train.setup import set_up

    served = spec.resume.checkpoint if spec.resume else None
    try:
        with set_up(spec, journal, asked_to_yield.is_set, ranks) as run:
            try:
                ending = train(run)
            finally:
                served = run.progress.served
        if ending == "yielded":
            return None
        return Finish(fence=spec.fence, status=ending, checkpoint=served)
    except (LeaseLost, ServerLost):
        raise
    except JobCanceled:
        return Finish(fence=spec.fence, status="canceled", checkpoint=served)
    except RewardsmithError as error:
        log.exception("the job cannot go on")
        return Finish(fence=spec.fence, status="errored", error=error.message, checkpoint=served)
    except Exception as error:
        log.exception("unexpected")
        message = f"{type(error).__name__}: {error} (unexpected; the job's log has the traceback)"
        return Finish(fence=spec.fence, status="errored", error=message, checkpoint=served)


class _Redacting(logging.Formatter):
    """Lines and tracebacks without the values of secrets."""

    def __init__(self, secrets: Mapping[str, str]) -> None:
        super().__init__(LOG_FORMAT)
        self._redact = redactor(secrets)

    def format(self, record: logging.LogRecord) -> str:
        return self._redact(super().format(record))


def _hide_in_log(secrets: Mapping[str, str]) -> None:
    for handler in logging.getLogger().handlers if secrets else ():
        handler.setFormatter(_Redacting(secrets))


def _set_threads() -> None:
    """All cores for torch, waiting without spinning: a spinning thread takes whole time slices from the server.

    OMP_NUM_THREADS may be the user's, or the launcher's, which counts cores that a quota does not pay for.
    """
    os.environ["OMP_NUM_THREADS"] = str(machine.threads())
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


if __name__ == "__main__":
    sys.exit(main())
