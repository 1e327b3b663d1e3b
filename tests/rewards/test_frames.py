"""The frames between pool and executor: what goes in comes out, and what no lawful sender sends is refused."""

import math
import os

import pytest

from rewardsmith.rewards.inside import frames
from rewardsmith.rewards.inside.frames import Broken, Frame, pack, unpack

GOOD = Frame(7, "exception", frames.LEFT_BEHIND, -0.5, 0.25, b"printed", "é traceback".encode())


def test_frames_arrive_one_by_one_in_any_pieces() -> None:
    data = bytearray()
    sent = pack(GOOD) + pack(GOOD._replace(id=8, prints=b"", error=b""))
    found = []
    for byte in sent:
        data.append(byte)
        while frame := unpack(data):
            found.append(frame)
    assert found == [GOOD, GOOD._replace(id=8, prints=b"", error=b"")]
    assert not data


UNLAWFUL = {
    "value is not a number": {"value": math.nan},
    "value infinite": {"value": -math.inf},
    "value too large": {"value": 1.1e12},
    "time is not a number": {"seconds": math.nan},
    "time infinite": {"seconds": math.inf},
    "time negative": {"seconds": -1.0},
    "unknown flag": {"flags": 4},
    "prints too long": {"prints": b"x" * (frames.MAX_TEXT_BYTES + 1)},
    "error too long": {"error": b"x" * (frames.MAX_TEXT_BYTES + 1)},
}


@pytest.mark.parametrize("change", UNLAWFUL.values(), ids=UNLAWFUL)
def test_unlawful_frames(change: dict[str, object]) -> None:
    with pytest.raises(Broken):
        unpack(bytearray(pack(GOOD._replace(**change))))


def test_an_unknown_outcome_is_unlawful() -> None:
    data = bytearray(pack(GOOD))
    data[8] = len(frames.OUTCOMES)
    with pytest.raises(Broken):
        unpack(data)


def test_orders_travel_whole_and_their_end_is_known() -> None:
    read_end, write_end = os.pipe()
    for text in ('{"a": 1}', '"\\ud800 and \U0001f3fd"'):
        frames.write(write_end, frames.order(text))
    os.close(write_end)
    try:
        assert frames.read_order(read_end) == {"a": 1}
        assert frames.read_order(read_end) == "\ud800 and \U0001f3fd"
        with pytest.raises(EOFError):
            frames.read_order(read_end)
    finally:
        os.close(read_end)


@pytest.mark.parametrize(
    ("code", "says"), [(3, "exit code 3"), (-11, "SIGSEGV"), (-9, "SIGKILL (the kernel does this"), (-40, "signal 40")]
)
def test_how_a_process_ended(code: int, says: str) -> None:
    assert says in frames.ending(code)
