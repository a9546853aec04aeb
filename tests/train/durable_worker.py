"""A training run as its own process, for tests that kill it: `python durable_worker.py FOLDER STEPS`."""

import pathlib
import sys
import time

import toy

from diffrl.train.checkpoint import Checkpoints
from diffrl.train.loop import fit, resume
from diffrl.train.writers import Writers


def main(folder, steps):
    step, place, _ = toy.compiled()
    checkpoints, writers, data = Checkpoints(folder / "checkpoints"), Writers(folder), toy.Data()
    state = resume(checkpoints, place(), data, writers)
    first = int(state.step) + 1

    def hook(n, _):
        if n == first:
            print("training", flush=True)
        time.sleep(0.005)  # long enough a run for kills to fall into it

    options = {"checkpoint_every": 10, "log_every": 10, "hooks": [hook], "progress": False}
    fit(step, state, data, steps=steps, checkpoints=checkpoints, writers=writers, **options)
    checkpoints.close()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
