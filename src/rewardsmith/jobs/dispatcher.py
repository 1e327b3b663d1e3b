"""Gives queued jobs a process and looks after those processes: claim, start, adopt, reap, restart.

All it knows lies in the store; a dispatcher that starts anew finds its predecessor's processes by their handles and
goes on. It reads no reports: a job says by HTTP how it gets on, and extends its lease by that. Where the process of a
job runs is the business of a `Launcher`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from signal import Signals

import httpx

from rewardsmith.errors import Conflict
from rewardsmith.jobs.local import Launcher, Ticket
from rewardsmith.store import Claim, LiveJob, Store

log = logging.getLogger("rewardsmith.dispatcher")

PERIOD_SECONDS = 1.0
# Exit status of a job that was asked by SIGTERM to make room, and saved its state first.
YIELDED = 75
# How long a job that has to make room may take for that; how long one may take to exit after its last report; and how
# long one whose lease is over may take to be heard again, as after a laptop's sleep; and how long one that was asked to
# cancel may take to end.
STOP_GRACE_SECONDS = 10.0
EXIT_GRACE_SECONDS = 30.0
SILENCE_GRACE_SECONDS = 10.0
CANCEL_GRACE_SECONDS = 30.0


@dataclass
class _Process:
    """When a process was first seen without a live job, and when its job was first seen with its lease over."""

    over_since: float | None = None
    silent_since: float | None = None


class Dispatcher:
    """Runs up to `slots` jobs at a time on this host. `url` is the server as the job processes reach it."""

    def __init__(
        self,
        store: Store,
        launcher: Launcher,
        url: str,
        *,
        lease_seconds: float,
        max_attempts: int,
        slots: int = 1,
    ) -> None:
        self._runs = store.runs
        self._launcher = launcher
        self._url = url
        self._lease_seconds = lease_seconds
        self._max_attempts = max_attempts
        self._slots = slots
        self._host = socket.gethostname()
        # Every process here that was seen to belong to a job, by handle.
        self._processes: dict[str, _Process] = {}

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set; then ends the jobs of this host, which go back to the queue."""
        while not stop.is_set():
            try:
                self.turn()
            except Exception:
                # Nobody restarts this loop: whatever went wrong is tried again, and the jobs go on meanwhile.
                log.exception("a turn failed; trying again")
            stop.wait(PERIOD_SECONDS)
        self.end_jobs()

    def turn(self) -> None:
        """One look at every live job and every process, then a claim for each free slot."""
        running = sum([self._watch(self._with_handle(job)) for job in self._runs.live()])
        running += sum([self._outlives(handle) for handle in self._over()])
        while running < self._slots and (claim := self._runs.claim(self._host, self._lease_seconds)):
            running += self._start(claim)

    def end_jobs(self) -> None:
        """Asks all processes of this host to save their state and end; afterwards none is left."""
        mine = [job for job in map(self._with_handle, self._runs.live()) if job.host == self._host and job.handle]
        handles = {*self._processes, *(job.handle for job in mine if job.handle)}
        if not handles:
            return
        log.info("ending %d job(s); they go on when a dispatcher runs again", len(mine))
        with ThreadPoolExecutor(len(handles)) as threads:
            list(threads.map(lambda handle: self._launcher.stop(handle, STOP_GRACE_SECONDS), handles))
        for job in mine:
            self._put_back(job)

    def _start(self, claim: Claim) -> bool:
        log.info("starting job %s, attempt %d", claim.uuid, claim.attempt)
        try:
            handle = self._launcher.start(Ticket(self._url, claim.uuid, claim.fence, claim.attempt, claim.token))
        except OSError as error:
            self._fail(claim.uuid, claim.fence, f"the job process cannot be started: {error}")
            return False
        self._processes[handle] = _Process()
        self._runs.set_handle(claim.uuid, claim.fence, handle)
        return True

    def _with_handle(self, job: LiveJob) -> LiveJob:
        """A job here whose dispatcher was killed before it stored the handle gets that now."""
        if job.host != self._host or job.handle or not (handle := self._launcher.find(job.uuid, job.attempt)):
            return job
        with suppress(Conflict):
            self._runs.set_handle(job.uuid, job.fence, handle)
        return replace(job, handle=handle)

    def _watch(self, job: LiveJob) -> bool:
        """Whether a live job occupies a slot here; one whose process is gone or silent is put back or ended."""
        if job.host != self._host or job.handle is None:
            if job.expired:
                self._fail(job.uuid, job.fence, f"its process on {job.host} has not been heard of for too long")
            return job.host == self._host and not job.expired
        if job.handle not in self._processes:
            log.info("job %s is taken over, its process %s was started earlier", job.uuid, job.handle)
        process = self._processes.setdefault(job.handle, _Process())
        if not self._launcher.alive(job.handle):
            self._ended(job, job.handle)
            return False
        if job.canceling_seconds is not None and job.canceling_seconds > CANCEL_GRACE_SECONDS:
            self._forget(job.handle)
            self._fail(job.uuid, job.fence, f"it was killed, {CANCEL_GRACE_SECONDS:g} s after it was asked to cancel")
            return False
        if not job.expired or not self._server_answers():
            process.silent_since = None
            return True
        process.silent_since = process.silent_since or time.monotonic()
        if time.monotonic() - process.silent_since < SILENCE_GRACE_SECONDS:
            return True
        self._forget(job.handle)
        words = self._launcher.last_words(job.uuid, job.attempt)
        self._fail(job.uuid, job.fence, f"the job process stopped reporting and was killed; {words}")
        return False

    def _ended(self, job: LiveJob, handle: str) -> None:
        code = self._launcher.exit_code(handle)
        self._forget(handle)
        if code == YIELDED:
            self._put_back(job)
            return
        words = self._launcher.last_words(job.uuid, job.attempt)
        self._fail(job.uuid, job.fence, f"the job process {_how_it_ended(code)}; {words}")

    def _put_back(self, job: LiveJob) -> None:
        try:
            log.info("job %s made room, it is %s", job.uuid, self._runs.release(job.uuid, job.fence).status)
        except Conflict:
            log.info("job %s ended by itself", job.uuid)

    def _fail(self, uuid: str, fence: int, reason: str) -> None:
        try:
            job = self._runs.fail_attempt(uuid, fence, reason, self._max_attempts)
        except Conflict:
            return  # It told the server its end between our two looks.
        log.warning("job %s is %s: %s", uuid, job.status, reason)

    def _over(self) -> list[str]:
        """Processes whose job has ended or moved on."""
        live = {job.handle for job in self._runs.live()}
        return [handle for handle in self._processes if handle not in live]

    def _outlives(self, handle: str) -> bool:
        """Whether a process is still there after its job; it has some time to exit, then it is killed."""
        process = self._processes[handle]
        process.over_since = process.over_since or time.monotonic()
        if self._launcher.alive(handle) and time.monotonic() - process.over_since < EXIT_GRACE_SECONDS:
            return True
        self._forget(handle)
        return False

    def _forget(self, handle: str) -> None:
        """The end of a process, with everything that it may have left behind."""
        self._launcher.stop(handle, 0)
        self._processes.pop(handle, None)

    def _server_answers(self) -> bool:
        """A silent job is not to blame while the server is away."""
        try:
            return httpx.get(f"{self._url}/health", timeout=2, trust_env=False).is_success
        except httpx.TransportError:
            return False


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "is gone"
    if code == -Signals.SIGKILL:
        return "was killed by SIGKILL, which is what happens when memory runs out"
    return f"was ended by {Signals(-code).name}" if code < 0 else f"exited with status {code}"
