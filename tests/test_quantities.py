"""Durations and sizes as people say them."""

import pytest

from rewardsmith.quantities import duration, figure, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (91, "2 min"), (3590, "1 h 0 min"), (9000, "2 h 30 min"), (273_600, "3 d 4 h")],
)
def test_durations_are_said_like_people_say_them(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0341, "0.034"), (0.5, "0.5"), (2.06, "2.1"), (12.34, "12.3"), (130.2, "130")]
)
def test_figures_have_the_digits_that_mean_something(value: float, text: str):
    assert figure(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 MiB"), (340 * 2**20, "340 MiB"), (0.6 * 2**30, "0.6 GiB"), (12.2 * 2**30, "12 GiB")]
)
def test_sizes_are_said_in_their_unit(count: float, text: str):
    assert size(count) == text
