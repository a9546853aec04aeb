"""Where numbers and pictures go: `metrics.jsonl` (one object a line, the record) and TensorBoard (to look at)."""

import itertools
import json
import math
import os
import pathlib
import shutil
import sys

import jax
from tensorboardX import SummaryWriter

from diffrl.errors import UserError


class Writers:
    """The writers of one run; on processes other than the first every method does nothing.

    Args:
        folder: gets `metrics.jsonl` and `tensorboard/`; made if it is absent.

    Raises (every method too):
        UserError: the folder cannot be written.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.metrics = self.folder / "metrics.jsonl"
        self._active = jax.process_index() == 0
        self._board: SummaryWriter | None = None
        self._purge: int | None = None
        if self._active:
            self._do(lambda: self.folder.mkdir(parents=True, exist_ok=True))

    def scalars(self, step, values):
        """Appends {"step": step, **values}; what is not finite becomes null, since JSON has no such numbers.

        TensorBoard, which complains of them, is shown a gap.
        """
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        safe = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._do(lambda: self._append(json.dumps({"step": step, **safe})))
        for name, value in safe.items():
            if value is not None:
                self._do(lambda: self._tensorboard().add_scalar(name, value, step))

    def images(self, step, name, image):
        """Shows a uint8 image [H, W, C] in TensorBoard."""
        if self._active:
            self._do(lambda: self._tensorboard().add_image(name, image, step, dataformats="HWC"))

    def cut(self, step):
        """Forgets everything after `step`, and a last line that was cut short: the run goes on from there.

        A record of which nothing remains, since no checkpoint does, is kept as `metrics.<n>.jsonl`.
        """
        if not self._active:
            return
        self._purge = step + 1
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step(line) <= step]
            if step == 0 and any(0 < _step(line) < math.inf for line in lines):
                names = (self.metrics.with_name(f"metrics.{n}.jsonl") for n in itertools.count(1))
                old = next(name for name in names if not name.exists())
                self._do(lambda: shutil.copy2(self.metrics, old))
                print(f"no checkpoint: beginning anew; the record of what was is kept as {old}", file=sys.stderr)
            part = self.metrics.with_suffix(".part")
            self._do(lambda: part.write_text("".join(f"{line}\n" for line in kept)))
            self._do(lambda: os.replace(part, self.metrics))

    def close(self):
        """Flushes TensorBoard; `metrics.jsonl` is always up to date."""
        if self._board is not None:
            self._board.close()

    def _append(self, line):
        with open(self.metrics, "a") as file:
            file.write(line + "\n")

    def _tensorboard(self):
        if self._board is None:  # not before `cut` has had its say
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._purge)
        return self._board

    def _do(self, write):
        try:
            write()
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder}: {error.strerror}; free space or choose another --workdir"
            ) from error


def _step(line):
    """The step of a line, or infinity for one that is not whole."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
