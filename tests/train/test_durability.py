"""A run that is killed again and again ends bit for bit where an undisturbed one ends."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import pytest
import toy

from diffrl.train.checkpoint import Checkpoints

WORKER = pathlib.Path(__file__).with_name("durable_worker.py")
STEPS = 300


def start(folder):
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return subprocess.Popen(
        [sys.executable, WORKER, folder, str(STEPS)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def end(folder):
    """(state, data position, {step: loss}) of a finished run."""
    checkpoints = Checkpoints(folder / "checkpoints")
    state, position = checkpoints.restore(toy.fresh())
    checkpoints.close()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return state, position, [(line["step"], line["loss"]) for line in lines]


def interrupt(folder, number, after):
    """Starts the run and sends it a signal `after` seconds of training; returns what it said."""
    process = start(folder)
    assert process.stdout.readline() == "training\n"
    time.sleep(after)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -number), "it ended before the signal came"
    return err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder))
    return end(folder)


KILL, TERM = signal.SIGKILL, signal.SIGTERM


@pytest.mark.parametrize("signals", [(KILL, TERM, KILL), pytest.param((KILL,) * 12, marks=pytest.mark.slow)])
def test_interrupted_runs_end_the_same(tmp_path, whole, signals):
    rng = random.Random(0)
    for number in signals:
        said = interrupt(tmp_path, number, after=rng.uniform(0, 0.25))
        if number == TERM:
            assert re.search(r"stopped at step (\d+); the last checkpoint is step \1 in .*; the same .*\n$", said)
    finish(start(tmp_path))
    state, position, losses = end(tmp_path)
    assert int(state.step) == STEPS
    toy.assert_same(state, whole[0])
    assert position == whole[1] == {"place": STEPS}
    # A run stopped within a logging window starts that window anew.
    assert sum(a != b for a, b in zip(losses, whole[2], strict=True)) <= signals.count(TERM)
    assert [step for step, _ in losses] == list(range(10, STEPS + 1, 10))
