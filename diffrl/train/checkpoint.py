"""Checkpoints that are either whole or not used: the only place that knows Orbax.

A checkpoint is a folder named by its step:

    120/state/          the arrays of the TrainState by name, written by Orbax in the background
    120/contents.json   shape and dtype of every array, and where the data iterators stood
    120/manifest.json   sha256 of every file above; written last, it is what makes the checkpoint exist

Orbax alone restores some damaged checkpoints silently (one flipped byte in an array's chunk is enough), hence the
sums.  They are verified before anything is read; a checkpoint that fails is set aside and the one before it used.
"""

import concurrent.futures
import json
import logging
import pathlib
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from diffrl.errors import UserError
from diffrl.train import lock, manifest, mesh


class Checkpoints:
    """The checkpoints of one run, newest last; every process of the run makes one, over the same shared folder.

    Args:
        folder: where they lie; made if it is absent.
        keep: how many to keep; older ones go once a newer one is whole.  None: all.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder, keep=3):
        if keep is not None and keep < 1:
            raise UserError(f"keep={keep} checkpoints: keep at least 1")
        self.folder, self.keep = pathlib.Path(folder).absolute(), keep
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.folder}: {error.strerror}; choose another --workdir") from error
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future | None = None
        self._claimed, self._lock, self._owner = False, None, ""
        logging.getLogger("absl").addFilter(_not_orbax)

    def claim(self):
        """Makes this run the folder's only writer until `close`; others may read.  `resume` and `save` call it.

        Raises:
            UserError: another run has it.
        """
        if not self._claimed and mesh.first_process_decides(self._is_taken):
            raise UserError(
                f"another run saves to {self.folder}{self._owner}: wait for its end, stop it, "
                "or choose another --workdir"
            )
        self._claimed = True

    def steps(self) -> list[int]:
        """The steps of all finished checkpoints, ascending."""
        return sorted(int(path.name) for path in self._folders() if manifest.sealed(path))

    def has(self, step) -> bool:
        """Whether the checkpoint of a step is finished; every process gets the same answer."""
        return bool(mesh.first_process_decides(lambda: step in self.steps()))

    def save(self, step, state, data_state=None):
        """Starts to save; returns as soon as the arrays are copied, so that the state may then be donated.

        Args:
            step: the number of updates done.
            state: a TrainState; typed keys are allowed anywhere in it.
            data_state: a JSON-able dict, this process's position in its data.

        Raises:
            UserError: this step exists already, this save or the one before it could not be written, or another run
                saves here.
        """
        self.claim()
        self.wait()
        path = self.folder / str(step)
        if step in self.steps():
            raise UserError(f"checkpoint {path} exists already: resume from it or choose another --workdir")
        arrays = _with_content(_named(jax.tree.map(_plain, state)))
        # Orbax on a full disk strews tracebacks from its threads; this sees nearly every full disk before it does.
        if mesh.first_process_decides(lambda: self._lacks(sum(leaf.nbytes for leaf in arrays.values()))):
            raise self._failed(path, OSError("No space left on device"))
        contents = {
            "leaves": _described(state),
            "data": mesh.gather_json(data_state or {}),
        }
        try:
            if jax.process_index() == 0:
                shutil.rmtree(path, ignore_errors=True)  # what an interrupted save left
                path.mkdir()
            self._orbax.save(path / "state", args=ocp.args.PyTreeSave(arrays))
        except (OSError, ValueError) as error:
            raise self._failed(path, error) from error
        self._pending = self._thread.submit(self._finish, path, contents)

    def restore(self, like, step=None):
        """The newest readable checkpoint, or that of one step, as (state, data_state); None if there is none at all.

        The state fits any devices; the data_state is None if another number of processes saved it.  A damaged
        checkpoint is renamed to `<step>.corrupt`, which is said on stderr, and the one before it is tried.

        Args:
            like: a TrainState of arrays or jax.ShapeDtypeStructs; gives structure, dtypes and shardings.
            step: that of a finished checkpoint; None: the newest.

        Raises:
            UserError: the checkpoint holds another model, or that of `step` is absent or damaged.
        """
        self.wait()
        if step is not None:
            self._check_whole(step)
        else:
            step = mesh.first_process_decides(self._newest_whole)
        if step < 0:
            return None
        path = self.folder / str(step)
        contents = json.loads((path / "contents.json").read_text())
        _check_leaves(path, contents["leaves"], _described(like))
        mine = contents["data"][jax.process_index()] if len(contents["data"]) == jax.process_count() else None
        return self._read(path, like), mine

    def wait(self):
        """Blocks until the save under way is whole; raises UserError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self):
        """Waits, then ends the background thread and lets go of the folder."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()
            if self._lock is not None:
                self._lock.close()
            logging.getLogger("absl").removeFilter(_not_orbax)

    def _is_taken(self):
        try:
            self._lock = lock.claim(self.folder)
        except BlockingIOError as error:
            self._owner = f" ({error})"
            return True
        return False

    def _folders(self):
        return [path for path in self.folder.iterdir() if path.name.isdigit()]

    def _lacks(self, size):
        """Whether `size` bytes do not fit on the disk; some mounted buckets do not tell."""
        usage = shutil.disk_usage(self.folder)
        return bool(usage.total) and usage.free < size

    def _finish(self, path, contents):
        """In the background: waits for Orbax, writes the sums, deletes what is older than the `keep` newest."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() > 0:
                return
            manifest.write_json(path / "contents.json", contents)
            manifest.seal(path)
            oldest = self.steps()[-self.keep :][0] if self.keep is not None else -1
            for old in self._folders():
                if int(old.name) < oldest:
                    manifest.unseal(old)
                    shutil.rmtree(old, ignore_errors=True)
        except (OSError, ValueError) as error:
            raise self._failed(path, error) from error

    def _failed(self, path, error):
        """The one line for a save that the disk refused (a ValueError, if Tensorstore says so); frees what it took."""
        if jax.process_index() == 0:
            _clear(path)
        reason = str(error).splitlines()[0].split(": ")[-1].split(" [os_error")[0]
        kept = ", ".join(map(str, self.steps())) or "none yet"
        return UserError(
            f"cannot save {path}: {reason}; free space or choose another --workdir (kept checkpoints: {kept})"
        )

    def _newest_whole(self):
        """The newest step whose files have their sums, or -1; says which ones above it are not used, and why."""
        for path in sorted(self._folders(), key=lambda path: -int(path.name)):
            if not manifest.sealed(path):
                _say(f"checkpoint {path} was never finished: not used")
            elif damage := manifest.damage(path):
                aside = path.with_name(f"{path.name}.corrupt")
                while aside.exists():
                    aside = aside.with_name(f"{aside.name}+")
                path.rename(aside)
                _say(f"checkpoint {path} is damaged ({damage}): kept as {aside.name}, trying the one before")
            else:
                return int(path.name)
        return -1

    def _check_whole(self, step):
        """Raises UserError, on every process, if a step has no checkpoint or a damaged one."""
        path = self.folder / str(step)
        if not self.has(step):
            raise UserError(f"there is no checkpoint {path}: choose from {', '.join(map(str, self.steps())) or 'none'}")
        if mesh.first_process_decides(lambda: manifest.damage(path) is not None):
            raise UserError(f"checkpoint {path} is damaged ({manifest.damage(path)}): choose another step")

    def _read(self, path, like):
        """The state at `path` in the structure, dtypes and shardings of `like`."""
        plain = jax.eval_shape(lambda tree: jax.tree.map(_plain, tree), like)
        default = jnp.zeros(()).sharding
        args = jax.tree.map(
            lambda leaf, shape: ocp.ArrayRestoreArgs(
                dtype=shape.dtype,
                global_shape=shape.shape,
                sharding=getattr(leaf, "sharding", None) or default,
            ),
            like,
            plain,
        )
        saved = _with_content(_named(plain))
        restore_args = {name: arg for name, arg in _named(args).items() if name in saved}
        arrays = self._orbax.restore(path / "state", args=ocp.args.PyTreeRestore(item=saved, restore_args=restore_args))
        for name, arg in _named(args).items():
            if name not in saved:
                arrays[name] = jnp.zeros(arg.global_shape, arg.dtype, device=arg.sharding)
        leaves = [arrays[name] for name in _named(plain)]
        return jax.tree.map(_wrap, like, jax.tree.unflatten(jax.tree.structure(like), leaves))


def _clear(path, patience=5.0):
    """Deletes what a failed save wrote.  Orbax raises at the first error; its other writes go on for a moment."""
    deadline, quiet = time.monotonic() + patience, 0
    while quiet < 3 and time.monotonic() < deadline:
        quiet = 0 if path.exists() else quiet + 1
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.05)


def _say(line):
    print(line, file=sys.stderr, flush=True)


def _named(tree):
    """{"params/Dense_0/kernel": leaf, ...}, in the tree's order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _with_content(arrays):
    """Without arrays of no elements, which Orbax refuses; contents.json knows their shapes all the same.

    A state of MuJoCo has such for the contacts of a world where nothing can touch.
    """
    return {name: leaf for name, leaf in arrays.items() if leaf.size}


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf):
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _wrap(like, data):
    if not _is_key(like):
        return data
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(jnp.empty((), like.dtype)))


def _described(tree):
    """{"params/Dense_0/kernel": "float32[3, 4]", ...}"""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _named(tree).items()}


def _check_leaves(path, saved, wanted):
    """Raises UserError naming the first leaves in which a checkpoint and the present model differ."""
    names = [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
    if names:
        show = [
            f"{name} is {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here" for name in names[:3]
        ]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(f"{path} holds another model: {'; '.join(show)}{more}: use its config or another --workdir")


def _not_orbax(record):
    """Orbax logs a failed save as five tracebacks before it raises it; our one line says the same."""
    return "/orbax/" not in record.pathname
