"""One process of several: `python pod_worker.py FOLDER STEPS`, joined as the environment says."""

import pathlib
import sys

import jax
import toy

from diffrl.train import mesh
from diffrl.train.checkpoint import Checkpoints
from diffrl.train.loop import fit, resume
from diffrl.train.step import global_step
from diffrl.train.writers import Writers


class Share:
    """This process's part of every batch; its position says whose it is."""

    def __init__(self, put):
        self.place, self._put = 0, put

    def __next__(self):
        self.place += 1
        part = toy.B // jax.process_count()
        start = part * jax.process_index()
        return self._put({"x": toy.batch(self.place - 1)["x"][start : start + part]})

    def get_state(self):
        return {"place": self.place, "process": "x" * jax.process_index()}

    def set_state(self, saved):
        assert saved["process"] == "x" * jax.process_index()
        self.place = saved["place"]


def main(folder, steps):
    mesh.init_distributed()
    devices = mesh.make_mesh(data=2, fsdp=2)
    call = mesh.compile_step(global_step(toy.make_update()()), devices, toy.fresh(), small=toy.SMALL)
    checkpoints, writers, data = (
        Checkpoints(folder / "checkpoints"),
        Writers(folder),
        Share(mesh.put_batch(devices)),
    )
    state = resume(checkpoints, mesh.place(devices, toy.fresh(), toy.SMALL), data, writers)
    print("from", int(jax.device_get(state.step)), flush=True)
    options = {"checkpoint_every": 10, "log_every": 5, "progress": False}
    fit(call, state, data, steps=steps, checkpoints=checkpoints, writers=writers, **options)
    checkpoints.close()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
