"""When hooks fire."""

import pytest

from diffrl.train.hooks import every


@pytest.mark.parametrize(
    ("steps", "inner", "fired"),
    [
        (range(1, 11), 1, [4, 8]),
        (range(3, 31, 3), 3, [6, 9, 12, 18, 21, 24, 30]),  # passing counts
        (range(10, 60, 10), 10, [10, 20, 30, 40, 50]),  # more than one multiple per dispatch: once
        ([5, 6, 7, 8], 1, [8]),  # resumed after 4
        ([9, 12, 15], 3, [9, 12]),  # resumed after 6: the first dispatch passes 8
    ],
)
def test_every(steps, inner, fired):
    calls = []
    hook = every(4, lambda step, state: calls.append((step, state)), inner)
    for step in steps:
        hook(step, f"state {step}")
    assert calls == [(step, f"state {step}") for step in fired]
