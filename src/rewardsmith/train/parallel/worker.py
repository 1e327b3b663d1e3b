"""A worker process of the data-parallel ranks, seen from both sides: `Worker` is rank 0's handle, `_serve` runs inside.

Orders go one at a time through a pipe, answers come back; while a worker samples, it sends each finished group. What it
reads and writes besides lies in shared memory. A worker ends when its pipe does, so none outlives rank 0. What is
computed is in `rank`.
"""

from __future__ import annotations

import io
import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from rewardsmith.errors import JobError, RewardsmithError
from rewardsmith.train.parallel.rank import Rank

ENDS_WITHIN = 5.0  # seconds a worker has to end by itself once its pipe is closed


class Worker:
    """`groups` are the finished groups that were not asked for yet: (place in the order, completions).

    `notice` hears what the rank has to say to the user.
    """

    def __init__(self, context: Any, number: int, others: Sequence[Worker]) -> None:
        self.number = number
        self.connection, theirs = context.Pipe()
        # A forked worker has copies of these ends; left open, they would keep the other workers alive without rank 0.
        foreign = [worker.connection for worker in others] + [self.connection]
        self._process = context.Process(
            target=_serve, args=(theirs, foreign if _forks(context) else []), name=f"rank {number}", daemon=True
        )
        self._process.start()
        theirs.close()
        self.busy = False
        self.groups: deque[tuple[int, Any]] = deque()
        self.notice: Callable[[str], None] = lambda message: None
        self._result: Any = None

    def order(self, name: str, *arguments: Any) -> None:
        """Gives the worker something to do. Raises JobError when it is gone."""
        self.busy = True
        try:
            _send(self.connection, (name, *arguments))
        except OSError:
            raise self._gone() from None

    def receive(self) -> None:
        """Takes in what has arrived, without waiting. Raises what the worker raised, or JobError when it is gone."""
        while self.busy and self.connection.poll():
            self._receive_one()

    def answer(self) -> Any:
        """Waits for the result of the order. Raises as `receive` does."""
        while self.busy:
            self._receive_one()
        return self._result

    def cancel(self) -> None:
        """Ends a sampling order early and forgets what it brought.

        Raises nothing when the worker fails or is gone: why rank 0 cancels matters more, and the next order finds out.
        """
        if self.busy:
            try:
                _send(self.connection, ("cancel",))
                self.answer()
            except (OSError, JobError):
                self.busy = False
        self.groups.clear()

    def close(self) -> None:
        self.connection.close()
        self._process.join(ENDS_WITHIN)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive_one(self) -> None:
        try:
            kind, content = self.connection.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if kind == "group":
            self.groups.append(content)
            return
        if kind == "notice":
            self.notice(f"rank {self.number}: {content}")
            return
        self.busy = False
        if kind == "error":
            raise content
        self._result = content

    def _gone(self) -> JobError:
        self.busy = False
        self._process.join(ENDS_WITHIN)
        return JobError(
            f"training rank {self.number} is gone ({_how_it_ended(self._process.exitcode)}). The job cannot go on; the "
            "checkpoints that it has saved stay"
        )


class _Canceled(Exception):
    """Rank 0 has something else to say, or is gone."""


def _how_it_ended(code: int | None) -> str:
    """Of a process by its exit code, minus the signal's number where a signal ended it, None when it still runs."""
    if code is None:
        return "its process runs but does not answer"
    if code == -signal.SIGKILL:
        return "it was killed, often for want of memory"
    if code == -signal.SIGBUS:
        return "it was ended by SIGBUS, often for want of shared memory: in a container, raise --shm-size"
    return f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _forks(context: BaseContext) -> bool:
    return context.get_start_method() == "fork"


def _serve(connection: Connection, foreign: Sequence[Connection]) -> None:
    """Carries out orders until the pipe ends."""
    for other in foreign:
        other.close()
    # The job process decides when to end; a terminal's Ctrl-C reaches the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    rank: Rank | None = None
    try:
        while True:
            name, *arguments = connection.recv()
            try:
                if name == "cancel":
                    continue  # it crossed the end of what it was to cancel
                if name == "load":
                    rank, result = _load(connection, *arguments), None
                else:
                    assert rank is not None, "the first order is load"
                    result = _carry_out(connection, rank, name, arguments)
                _send(connection, ("done", result))
            except _Canceled:
                _send(connection, ("done", None))
            except RewardsmithError as error:
                _send(connection, ("error", error))
            except Exception as error:
                _send(connection, ("error", JobError(f"a training rank failed: {error}\n{traceback.format_exc()}")))
    except (EOFError, OSError):
        return  # rank 0 is gone, or has closed the pipe


def _load(connection: Connection, *arguments: Any) -> Rank:
    rank = Rank(*arguments, between_tokens=lambda: _stop_when_asked(connection))
    rank.budget.notice = lambda message: _send(connection, ("notice", message))
    return rank


def _carry_out(connection: Connection, rank: Rank, name: str, arguments: list[Any]) -> Any:
    if name == "generate":
        for group in rank.generate(*arguments):
            _send(connection, ("group", group))
        return None
    orders: dict[str, Callable[..., Any]] = {
        "merge": rank.merge,
        "deliver": rank.deliver,
        "gradient": rank.gradient,
        "reference_logps": rank.reference_logps,
    }
    return orders[name](*arguments)


def _send(connection: Connection, message: Any) -> None:
    """Tensors in shared memory go as references. Others as their bytes: each reference costs an open file.

    Those of a GPU, too: what was received by CUDA's own way between processes may not be sent on.
    """
    stream = io.BytesIO()
    pickler = ForkingPickler(stream)
    pickler.dispatch_table = {**pickler.dispatch_table, torch.Tensor: _reduced}
    pickler.dump(message)
    connection.send_bytes(stream.getbuffer())


def _reduced(tensor: Tensor) -> Any:
    if tensor.is_cpu and tensor.is_shared():  # type: ignore[no-untyped-call]
        return reduce_tensor(tensor)  # type: ignore[no-untyped-call]
    return torch.from_numpy, (tensor.cpu().numpy(),)


def _stop_when_asked(connection: Connection) -> None:
    if connection.poll():
        raise _Canceled
