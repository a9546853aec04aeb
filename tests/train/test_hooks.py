"""When hooks fire."""

import pytest

from diffrl.train.hooks import every


@pytest.mark.parametrize(
    ("steps", "last", "fired"),
    [
        (range(1, 11), None, [4, 8]),
        (range(1, 11), 10, [4, 8, 10]),
        (range(1, 9), 8, [4, 8]),
        (range(3, 31, 3), None, [6, 9, 12, 18, 21, 24, 30]),  # three steps per dispatch: passing counts
        (range(10, 60, 10), None, [20, 30, 40, 50]),  # more than one multiple per dispatch: once
        ([5, 6, 7, 8], None, [8]),  # resumed after 4
    ],
)
def test_every(steps, last, fired):
    calls = []
    hook = every(4, lambda step, state: calls.append((step, state)), last)
    for step in steps:
        hook(step, f"state {step}")
    assert calls == [(step, f"state {step}") for step in fired]
