"""Two processes with two devices each train what one process trains, and stop and resume together."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
import toy

from diffrl.errors import UserError
from diffrl.train.checkpoint import Checkpoints
from diffrl.train.loop import resume
from diffrl.train.step import global_step

WORKER = pathlib.Path(__file__).with_name("pod_worker.py")


def start(folder, steps):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, WORKER, folder, str(steps)]
    return [
        subprocess.Popen(
            command,
            env={**env, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def wait(processes):
    """[(exit status, standard output, standard error)]"""
    said = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


@pytest.mark.long
def test_two_processes_equal_one(tmp_path):
    endless = start(tmp_path, 1_000_000)
    for process in endless:
        while not process.stdout.readline().startswith("from 0"):
            assert process.poll() is None
    while not (tmp_path / "checkpoints" / "10" / "manifest.json").exists():
        assert endless[0].poll() is None
        time.sleep(0.1)
    endless[1].send_signal(signal.SIGTERM)  # one is told, both stop
    ends = wait(endless)
    assert [code for code, _, _ in ends] == [143, 143], ends
    assert "the same command continues" in ends[0][2]

    (stopped,) = Checkpoints(tmp_path / "checkpoints").steps()[-1:]
    steps = stopped + 10
    ends = wait(start(tmp_path, steps))
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert all(f"from {stopped}\n" in out for _, out, _ in ends)

    alone, update = toy.fresh(), jax.jit(global_step(toy.make_update()()))
    for n in range(steps):
        alone, _ = update(alone, toy.batch(n))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state, position = checkpoints.restore(toy.fresh())
    toy.assert_close(state, alone, 1e-5)
    assert position is None
    with pytest.raises(UserError, match="saved by another number of processes than the 1 of this run"):
        resume(checkpoints, toy.fresh(), toy.Data())
    contents = json.loads((checkpoints.folder / str(steps) / "contents.json").read_text())
    assert [data["place"] for data in contents["data"]] == [steps, steps]
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines))
