"""The one training loop: dispatch, report, hooks, checkpoints, and a clean end however it ends."""

import contextlib
import signal
import sys
import threading

import jax
import jax.numpy as jnp

from diffrl.errors import UserError
from diffrl.train import mesh
from diffrl.train.feed import Collected, Nothing, Stream
from diffrl.train.report import NotFinite, Report


class Stopped(SystemExit):
    """Training was asked to stop by a signal and has saved; its code is the shell's, 128 + the signal's number."""


def fit(
    step,
    state,
    data,
    *,
    steps,
    inner=1,
    checkpoints=None,
    checkpoint_every=1000,
    hooks=(),
    writers=None,
    log_every=50,
    batch_size=None,
    progress=True,
    desc="",
):
    """Trains until `state.step` is `steps` and returns the state; a run that is there already does nothing.

    Dispatch is asynchronous: the host reads metrics once per `log_every` steps, one dispatch late, and before a save.

    Args:
        step: compiled (state, batch) -> (state, metrics); it may donate the state.
        data: an iterator of what `step` takes, with `get_state() -> dict` if there are checkpoints; or a function
            collect(state, key) -> iterable of batches, called whenever the last one is used up.  Collected rounds are
            checkpointed at their ends, so that a resumed run is the same run; or None, for steps that make their own.
        steps: the total, earlier runs included.
        inner: updates per call of `step` (see `step.repeat`).
        checkpoints: a `Checkpoints`, or None.
        checkpoint_every, log_every: in updates; both fire at the first dispatch that passes a multiple.
        hooks: called as hook(step, state) after every dispatch (see `hooks.every`).
        writers: a `Writers`, or None.
        batch_size: for samples per second.
        progress: whether to show a bar.
        desc: the bar's name.

    Raises:
        UserError: the loss or the gradient is not finite (the first such step is named, nothing bad is saved), the
            data ended, a checkpoint could not be written, or `inner` does not divide the steps that are left.
        Exception: what the data or hooks raise; the steps before it are saved first.
        Stopped: SIGTERM or SIGINT came; the dispatch was finished and saved.
    """
    done = int(jax.device_get(state.step))
    if done >= steps:
        return state
    if (steps - done) % inner:
        raise UserError(
            f"steps={steps} leaves {steps - done} to do, which inner={inner} does not divide: change either"
        )
    if checkpoints is not None and data is not None and not callable(data) and not hasattr(data, "get_state"):
        raise TypeError("data that is to be checkpointed needs get_state() and set_state(dict)")
    feed = Nothing() if data is None else Collected(data) if callable(data) else Stream(data)
    report = Report(
        done,
        steps,
        inner,
        writers=writers,
        log_every=log_every,
        batch_size=batch_size,
        progress=progress,
        desc=desc,
    )
    due = False
    with Signals() as signals:
        try:
            while done < steps:
                state, metrics = step(state, _next(feed, state, done, report, checkpoints))
                done += inner
                report.add(done, metrics)
                _call(hooks, feed, state, done, report, checkpoints)
                stop = signals.received(done)
                due = due or done // checkpoint_every > (done - inner) // checkpoint_every or done == steps or stop
                if due and (feed.whole or done == steps):
                    report.flush()
                    _save(checkpoints, done, state, feed)
                    due = False
                if stop:
                    raise stopped(stop, done, checkpoints)
            report.close(done)
            if checkpoints is not None:
                checkpoints.wait()
            return state
        except NotFinite as error:
            raise UserError(f"{error}: try a lower learning rate or clipping; {_saved(checkpoints)}") from None
        finally:
            report.close()


def resume(checkpoints, state, data=None, writers=None):
    """The state to go on from: the newest checkpoint's, with data and metrics put back to that point, or `state`.

    Args:
        state: a fresh state, placed as the restored one shall be.
        data: has `set_state(dict)`; a collecting function, or None, is left alone.

    Raises:
        UserError: the checkpoint holds another model, or the data of another number of processes; or another run
            trains in this folder now.
    """
    checkpoints.claim()  # before anything is cut
    restored = checkpoints.restore(state)
    if restored is not None:
        state, position = restored
        if data is not None and not callable(data):
            if position is None:
                raise UserError(
                    f"{checkpoints.folder} was saved by another number of processes than the {jax.process_count()} of "
                    "this run, which cannot find its place in the data: start as many as before"
                )
            data.set_state(position)
    if writers is not None:
        writers.cut(int(jax.device_get(state.step)))
    return state


class Signals:
    """Notes SIGTERM and SIGINT instead of dying of them, in the main thread and for as long as the context lasts."""

    def __enter__(self):
        self._number, self._before = 0, {}
        # Several processes must stop at the same step: there jax's own SIGTERM handler and its barrier do it.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def received(self, step):
        """The number of the signal that all processes should obey after this step, or 0."""
        return signal.SIGTERM if mesh.preempted(step) else self._number

    def _note(self, number, _):
        if number == self._number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: now
        self._number = number


@jax.jit
def _all_finite(tree):
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _next(feed, state, done, report, checkpoints):
    """The next batch; where the data fail, the work since the last checkpoint is saved before their error goes on."""
    with _rescued(feed, state, done, report, checkpoints):
        return feed.next(state)


def _call(hooks, feed, state, done, report, checkpoints):
    """The hooks; where one fails, the work since the last checkpoint is saved before its error goes on."""
    with _rescued(feed, state, done, report, checkpoints):
        for hook in hooks:
            hook(done, state)


@contextlib.contextmanager
def _rescued(feed, state, done, report, checkpoints):
    try:
        yield
    except UserError as error:
        _rescue(feed, state, done, report, checkpoints)
        raise UserError(f"{error}; {_saved(checkpoints)}") from error
    except Exception as error:
        _rescue(feed, state, done, report, checkpoints)
        error.add_note(_saved(checkpoints))
        raise


def _rescue(feed, state, done, report, checkpoints):
    """Saves what has been trained, if it can be resumed and is not saved yet."""
    # One process of several cannot save alone: the others are in the middle of a step that waits for it.
    if checkpoints is None or not feed.whole or jax.process_count() > 1:
        return
    checkpoints.wait()
    if done not in (0, *checkpoints.steps()):
        report.flush()
        _save(checkpoints, done, state, feed)


def _save(checkpoints, done, state, feed):
    """Saves, unless the parameters have overflowed in a step whose metrics did not show it yet."""
    if checkpoints is None:
        return
    if not _all_finite(state.params):
        raise NotFinite(f"the parameters are not finite after step {done}")
    checkpoints.save(done, state, feed.position())


def stopped(number, done, checkpoints):
    """Waits for the save, says where things stand, and returns what to raise then."""
    print(
        f"stopped at step {done}; {_saved(checkpoints)}; the same command continues",
        file=sys.stderr,
        flush=True,
    )
    return Stopped(128 + number)


def _saved(checkpoints):
    """Where the last checkpoint lies, in words."""
    if checkpoints is None:
        return "there are no checkpoints"
    checkpoints.wait()
    steps = checkpoints.steps()
    return f"the last checkpoint is step {steps[-1]} in {checkpoints.folder}" if steps else "there is no checkpoint yet"
