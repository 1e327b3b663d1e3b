"""All executors of a pool and the sandboxes they live in: started, listened to, replaced, ended.

Usually there is one sandbox with all executors in it. Where an imported package has started threads, a process cannot
be forked safely, and every executor gets a sandbox of its own. A sandbox that ends is started again, each time after a
longer pause, until nothing has come back from ten of them in a row. What an end means for the calls, `pool` decides.
"""

from __future__ import annotations

import select
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rewardsmith import machine
from rewardsmith.errors import RewardPoolError, SandboxError
from rewardsmith.rewards.executor import FORK_SECONDS, Executor
from rewardsmith.rewards.sandbox.limits import Limits
from rewardsmith.rewards.sandbox.tiers import Tier
from rewardsmith.rewards.sandbox.zygote import Door, Ended, Forked, Sandbox, Source

MAX_WORKERS = 8
TICK_SECONDS = 0.1  # the longest that nobody looks whether something is to be stopped
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 30.0
MOST_LOSSES = 10
LATE_LOAD_SECONDS = 0.2  # for the stack of what is loaded too slowly


def available_workers() -> int:
    """The cores this process may use, at most 8."""
    return min(machine.available_cores(), MAX_WORKERS)


class Fleet:
    """`failures` says why nothing could be started, since it was last cleared. `pace` is the mean time of a call."""

    def __init__(
        self,
        functions: Sequence[Source],
        size: int,
        tier: Tier,
        limits: Limits,
        site_dirs: Sequence[Path],
        environment: Mapping[str, str],
        door: Door | None,
        note: Callable[[str], None],
    ) -> None:
        self.functions, self.size, self.limits = functions, size, limits
        self.executors: set[Executor] = set()
        self.failures: list[str] = []
        self.pace = 0.001
        self._settings = (tier, limits, site_dirs, environment, door)
        self._note = note
        self._sandboxes: set[Sandbox] = set()
        self._one_each = False
        self._numbers = 0
        self._losses, self._next_start, self._last_reason = 0, 0.0, ""
        # The kernel ends a sandbox with the thread that started it.
        self._spawner = ThreadPoolExecutor(1, thread_name_prefix="reward-spawner")
        self._release = weakref.finalize(self, _release, self._sandboxes, self.executors, self._spawner)

    def start(self) -> None:
        """Load the functions and fork all executors. Raises RewardPoolError saying what cannot be loaded and why."""
        self._start_sandbox()
        while not self.failures and not all(sandbox.ready for sandbox in self._sandboxes):
            for sandbox in self.turn():
                self.lose(sandbox)
        if self.failures:
            raise RewardPoolError(self.failures[0])
        if self._one_each:
            self._note(
                "a package that the reward functions import starts threads: every executor gets a sandbox of its own, "
                "and replacing one takes as long as its imports"
            )
        self.supply(self.size)

    def stop(self) -> None:
        self._release()

    @property
    def stopped(self) -> bool:
        return not self._release.alive

    def came_back(self) -> None:
        """A result has come: what was started does work."""
        self._losses, self._next_start = 0, 0.0

    # ---- executors --------------------------------------------------------------------------------------------------

    def supply(self, wanted: int) -> None:
        """Have so many executors, or a sandbox on its way where there is none to fork them.

        Raises RewardPoolError when sandboxes end again and again.
        """
        if self._losses >= MOST_LOSSES:
            raise RewardPoolError(
                f"sandboxes of the reward functions ended {self._losses} times without one result: {self._last_reason}"
            )
        missing = min(wanted, self.size) - len(self.executors)
        for sandbox in self._with_room():
            if missing <= 0:
                return
            for _ in range(1 if self._one_each else missing):
                try:
                    self.executors.add(Executor(sandbox, self._numbers))
                except OSError as error:
                    self.failures.append(f"an executor cannot be started: {error}")
                    return
                self._numbers += 1
                missing -= 1
        room = missing if self._one_each else int(missing > 0 and not self._sandboxes)
        for _ in range(room - sum(not sandbox.ready for sandbox in self._sandboxes)):
            if time.monotonic() >= self._next_start:
                self._start_sandbox()

    def _with_room(self) -> Iterator[Sandbox]:
        taken = {executor.sandbox for executor in self.executors} if self._one_each else set()
        return (sandbox for sandbox in list(self._sandboxes) if sandbox.ready and sandbox not in taken)

    def remove(self, executor: Executor) -> None:
        """End it and all it started."""
        self.executors.discard(executor)
        executor.close()
        if self._one_each:
            self._discard(executor.sandbox)
        elif executor.ended is None:
            executor.sandbox.kill(executor.number)

    # ---- sandboxes --------------------------------------------------------------------------------------------------

    def _start_sandbox(self) -> None:
        if self.stopped:
            raise RewardPoolError("the reward pool is closed")
        try:
            self._sandboxes.add(self._spawner.submit(Sandbox, self.functions, *self._settings).result())
        except (OSError, SandboxError) as error:
            self.failures.append(f"a sandbox cannot be started: {error}")
            self._count_loss(str(error))

    def lose(self, sandbox: Sandbox) -> None:
        """It has ended, or must. Its executors are gone with it."""
        if not sandbox.ready:
            self.failures.append(self._what_cannot_be_loaded(sandbox))
        for executor in [executor for executor in self.executors if executor.sandbox is sandbox]:
            self.executors.discard(executor)
            executor.close()
        self._discard(sandbox)

    def _discard(self, sandbox: Sandbox) -> None:
        if sandbox in self._sandboxes:
            self._sandboxes.discard(sandbox)
            self._count_loss(sandbox.broken or "it was ended, with the call that it was busy with")
            sandbox.stop()

    def _count_loss(self, reason: str) -> None:
        pause = min(FIRST_PAUSE_SECONDS * 2**self._losses, LONGEST_PAUSE_SECONDS)
        self._losses, self._next_start, self._last_reason = self._losses + 1, time.monotonic() + pause, reason

    def _what_cannot_be_loaded(self, sandbox: Sandbox) -> str:
        at_function = sandbox.hardened and sandbox.loaded < len(self.functions)
        subject = f"reward function {self.functions[sandbox.loaded].name!r}" if at_function else "a sandbox"
        return f"{subject} cannot be loaded: {sandbox.broken}"

    # ---- waiting ----------------------------------------------------------------------------------------------------

    def turn(self, until: float = float("inf")) -> list[Sandbox]:
        """Wait for something to happen, until a moment and no longer than a tick; then hear all sandboxes.

        The answer is the sandboxes that have ended or must; their executors may still have results to give.
        """
        now = time.monotonic()
        poll = select.poll()
        talkers: list[Sandbox | Executor] = [*self._sandboxes, *self.executors]
        for talker in talkers:
            for fd in talker.readable:
                poll.register(fd, select.POLLIN)
            for fd in talker.writable:
                poll.register(fd, select.POLLOUT)
        poll.poll(1000 * max(0.0, min(now + TICK_SECONDS, until) - now))
        by_number = {executor.number: executor for executor in self.executors}
        for sandbox in self._sandboxes:
            sandbox.flush()
            for event in sandbox.receive():
                if isinstance(event, Forked) and event.number in by_number:
                    by_number[event.number].has_started()
                elif isinstance(event, Ended) and event.number in by_number:
                    by_number[event.number].ended = (event.code, event.error)
            self._keep_time(sandbox)
            self._one_each |= (sandbox.threads or 1) > 1
        for executor in self.executors:
            executor.flush()
            executor.log.drain()
        return [sandbox for sandbox in self._sandboxes if sandbox.broken]

    def _keep_time(self, sandbox: Sandbox) -> None:
        now = time.monotonic()
        late = any(
            executor.sandbox is sandbox and not executor.started and now > executor.born + FORK_SECONDS
            for executor in self.executors
        )
        if sandbox.broken is None and late:
            sandbox.broken = f"no process was forked within {FORK_SECONDS:g} s"
        if sandbox.broken or sandbox.ready:
            return
        if sandbox.log.size > self.limits.output_bytes:
            sandbox.broken = f"printed more than {self.limits.output_bytes} bytes"
        elif now > sandbox.clock + self.limits.load_seconds + LATE_LOAD_SECONDS:
            sandbox.broken = f"no result after {self.limits.load_seconds:g} s\n{sandbox.log.text()}".strip()


def _release(sandboxes: set[Sandbox], executors: set[Executor], spawner: ThreadPoolExecutor) -> None:
    while executors:
        executors.pop().close()
    while sandboxes:
        sandboxes.pop().stop()
    spawner.shutdown(wait=False)
