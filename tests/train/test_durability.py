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
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy

from diffrl.train.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
WORKER = pathlib.Path(__file__).with_name("durable_worker.py")
STEPS = 300


def start(folder):
    return spawn(WORKER, folder, str(STEPS))


def spawn(*argv, **env):
    """Python with these arguments, its output to be read."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *argv], env={**os.environ, **cache, **env}, cwd=ROOT, **pipes, text=True)


def finish(process):
    _, err = process.communicate(timeout=300)
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


@pytest.mark.long
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


DDPM_STEPS = 240
DDPM = [
    *("--config.unet.channels=8", "--config.unet.groups=4", "--config.data.flip"),
    *(f"--config.train.steps={DDPM_STEPS}", "--config.train.batch_size=16", "--config.train.checkpoint_every=10"),
    *("--config.train.log_every=1", "--config.train.sample_every=0", "--config.optim.warmup_steps=5"),
    *("--config.sample.steps=1", "--config.eval.judge=none"),
]


def start_ddpm(folder):
    """The experiment as a user starts it, on two virtual devices."""
    return spawn(
        *("-m", "experiments.ddpm", f"--workdir={folder}", *DDPM),
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )


def logged(folder):
    """[(step, loss)] so far; the last line may be half written."""
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def kill_ddpm(folder, after):
    """Starts the experiment and kills it when it has done `after` steps more; returns the step at which it was."""
    process = start_ddpm(folder)
    while "compiling the first step" not in process.stderr.readline():  # by now metrics.jsonl is cut
        assert process.poll() is None
    first = len(logged(folder)) if (folder / "metrics.jsonl").exists() else 0
    while not (folder / "metrics.jsonl").exists() or len(logged(folder)) < first + after:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.002)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    return len(logged(folder))


@pytest.mark.slow
def test_a_killed_ddpm_ends_the_same(tmp_path):
    """U-Net, digits, loader with mirrored images, prefetch, Adam, average: killed at twelve random steps."""
    rng = random.Random(0)
    killed = [kill_ddpm(tmp_path / "killed", after=rng.randint(1, 30)) for _ in range(12)]
    assert len({step % 10 for step in killed}) >= 5, f"killed at {killed}: too regular to prove anything"
    ends = []
    for name in ("killed", "whole"):
        finish(start_ddpm(tmp_path / name))
        checkpoints = tmp_path / name / "checkpoints" / str(DDPM_STEPS)
        contents = json.loads((checkpoints / "contents.json").read_text())
        arrays = arrays_of(checkpoints)
        assert {key.split("/")[0] for key in arrays} == {"step", "params", "ema", "opt_state", "key"}
        ends.append((arrays, contents, logged(tmp_path / name)))
    (arrays, contents, losses), whole = ends
    jax.tree.map(np.testing.assert_array_equal, arrays, whole[0])
    assert contents == whole[1]
    assert contents["data"] == [{"step": DDPM_STEPS}]
    assert losses == whole[2]  # to the last bit: every step saw the batch that it would have seen
    assert [step for step, _ in losses] == list(range(1, DDPM_STEPS + 1))


def arrays_of(checkpoint):
    """{name: array} as Orbax reads them, with no model in between."""
    return ocp.PyTreeCheckpointer().restore(checkpoint / "state")
