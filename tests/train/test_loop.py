"""The loop: resuming, stopping, diverging, and when it looks at the device."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffrl.data.prefetch import Prefetch
from diffrl.errors import UserError
from diffrl.train.checkpoint import Checkpoints
from diffrl.train.loop import Stopped, fit, resume
from diffrl.train.state import Purpose, TrainState, step_key
from diffrl.train.writers import Writers


class Run:
    """One start of a run in a folder: what an experiment's main does."""

    def __init__(self, folder, inner=1, data=None):
        self.inner = inner
        self.step, place, _ = toy.compiled(inner)
        self.checkpoints, self.writers, self.data = (
            Checkpoints(folder / "checkpoints"),
            Writers(folder),
            data or toy.Data(inner),
        )
        self.state = resume(self.checkpoints, place(), self.data, self.writers)

    def fit(self, steps, **options):
        common = {"checkpoint_every": 4, "log_every": 4, "inner": self.inner, "progress": False}
        try:
            self.state = fit(
                self.step,
                self.state,
                self.data,
                steps=steps,
                checkpoints=self.checkpoints,
                writers=self.writers,
                **common | options,
            )
        finally:
            self.checkpoints.close()
            self.writers.close()
        return self


def recorded(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("inner", [1, 2])
def test_resuming_is_exact(tmp_path, inner):
    whole = Run(tmp_path / "whole", inner).fit(12)
    Run(tmp_path / "parts", inner).fit(8)
    parts = Run(tmp_path / "parts", inner)
    assert (int(parts.state.step), parts.data.place) == (8, 8)
    parts.fit(12)
    toy.assert_same(parts.state, whole.state)
    assert parts.data.place == whole.data.place == 12
    losses = [[(line["step"], line["loss"]) for line in recorded(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [4, 8, 12]


def test_metrics_are_means_over_the_window(tmp_path):
    run = Run(tmp_path)
    losses, step = [], run.step

    def spy(state, batch):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        return state, metrics

    run.step = spy
    run.fit(10, batch_size=toy.B)
    lines = recorded(tmp_path)
    assert [line["step"] for line in lines] == [4, 8, 10]
    np.testing.assert_allclose(
        [line["loss"] for line in lines], [np.mean(losses[i:j]) for i, j in ((0, 4), (4, 8), (8, 10))]
    )
    assert lines[1]["samples_per_s"] == pytest.approx(toy.B * lines[1]["steps_per_s"])


def test_what_came_after_the_checkpoint_is_cut(tmp_path):
    Run(tmp_path).fit(8)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    Run(tmp_path).fit(12)
    assert [line["step"] for line in recorded(tmp_path)] == [4, 8, 12]


def test_a_finished_run_does_nothing(tmp_path):
    Run(tmp_path).fit(4)
    again = Run(tmp_path)
    again.step = again.data = None
    before = again.state
    assert again.fit(4).state is before


def bare(step=0):
    """A state for steps that are plain functions."""
    return TrainState(jnp.int32(step), {"w": jnp.zeros(())}, None, None, jax.random.key(0))


class Reads:
    """A metric that counts how often the host reads it."""

    def __init__(self, log, step):
        self.log, self.step = log, step

    def __array__(self, dtype=None, copy=None):
        self.log.append(self.step)
        return np.float32(self.step)


def test_the_host_reads_once_per_window_and_one_dispatch_late():
    """No synchronisation per step: after which dispatch was each step's metric read?"""
    dispatched, read = [], []

    def step(state, batch):
        dispatched.append(batch)
        return state, {"loss": Reads(log, batch)}

    class Log(list):
        def append(self, which):
            read.append((which, len(dispatched)))

    log = Log()
    fit(step, bare(), iter(range(1, 100)), steps=25, log_every=10, progress=False)
    first_read = dict(reversed(read))
    expected = {n: 11 if n <= 10 else 21 if n <= 20 else 25 for n in range(1, 26)}
    assert first_read == expected


def test_nothing_is_transferred_between_windows():
    """The same on real arrays: jax itself forbids every implicit transfer while the loop runs."""
    step, place, _ = toy.compiled()
    state, data = place(), toy.Data()
    batches = iter([next(data) for _ in range(8)])
    state, _ = step(state, next(batches))
    with jax.transfer_guard("disallow"):
        fit(step, state, batches, steps=7, log_every=3, progress=False)


def diverging(bad, name="loss"):
    """The toy's step, whose metric is not finite from update `bad` on."""
    step = toy.compiled()[0]

    def call(state, batch):
        state, metrics = step(state, batch)
        return state, {**metrics, name: jnp.where(state.step >= bad, jnp.nan, metrics[name])}

    return call


@pytest.mark.parametrize(("bad", "last"), [(7, 4), (8, 4), (9, 8), (2, None)])
def test_divergence_names_the_step_and_keeps_the_last_good(tmp_path, bad, last):
    run = Run(tmp_path)
    run.step = diverging(bad, "grad_norm")
    with pytest.raises(UserError, match=f"grad_norm is nan at step {bad}: ") as error:
        run.fit(20, log_every=50)
    steps = Checkpoints(tmp_path / "checkpoints").steps()
    assert steps == ([] if last is None else [*range(4, last + 1, 4)])
    assert ("no checkpoint yet" if last is None else f"step {last} in {tmp_path}") in str(error.value)


def test_divergence_within_inner_steps_is_exact():
    def step(state, batch):
        return state, {"loss": jnp.array([1.0, 2.0, jnp.inf, jnp.nan]) if batch else jnp.ones(4)}

    with pytest.raises(UserError, match=r"loss is inf at step 7: .*there are no checkpoints"):
        fit(step, bare(), iter([0, 1, 0]), steps=12, inner=4, progress=False)


def test_overflowed_parameters_are_not_saved(tmp_path):
    """The last update may spoil the parameters before any metric shows it."""

    def step(state, batch):
        return state._replace(params={"w": state.params["w"] + jnp.inf}), {"loss": jnp.ones(())}

    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match="parameters are not finite after step 4"):
        fit(step, bare(), toy.Data(), steps=8, checkpoints=checkpoints, checkpoint_every=4, progress=False)
    assert checkpoints.steps() == []


def killing(at, number=signal.SIGTERM):
    return lambda step, state: os.kill(os.getpid(), number) if step == at else None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_stop(tmp_path, number, code, capsys):
    whole = Run(tmp_path / "whole").fit(12)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    with pytest.raises(Stopped) as stopped:
        Run(tmp_path / "parts").fit(12, hooks=[killing(6, number)])
    assert stopped.value.code == code
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    said = capsys.readouterr().err.splitlines()[-1]
    folder = tmp_path / "parts" / "checkpoints"
    assert said == f"stopped at step 6; the last checkpoint is step 6 in {folder}; the same command continues"
    toy.assert_same(Run(tmp_path / "parts").fit(12).state, whole.state)


class Torn(toy.Data):
    """Data whose source cannot be read from batch 6 on, until it is mended."""

    def __init__(self, error):
        super().__init__()
        self._error = error

    def __next__(self):
        if self.place >= 6:
            raise self._error
        return super().__next__()

    def close(self):
        pass


@pytest.mark.parametrize(("error", "ahead"), [(UserError("x.png is torn: delete it"), 2), (OSError("gone"), 0)])
def test_failing_data_lose_nothing(tmp_path, error, ahead):
    """What was trained is saved with the place of the last batch that was used, however many were fetched ahead."""
    whole = Run(tmp_path / "whole").fit(12)
    torn = tmp_path / "torn"
    with pytest.raises(type(error)) as failed:
        Run(torn, data=Prefetch(Torn(error), lambda batch: batch, size=ahead)).fit(12)
    said = "; ".join([str(failed.value), *getattr(failed.value, "__notes__", [])])
    assert said == f"{error}; the last checkpoint is step 6 in {torn / 'checkpoints'}"

    with pytest.raises(type(error)):  # not mended: step 6 is there already
        Run(torn, data=Torn(error)).fit(12)
    mended = Run(torn)
    assert (int(mended.state.step), mended.data.place) == (6, 6)
    toy.assert_same(mended.fit(12).state, whole.state)


@pytest.mark.parametrize("error", [UserError("no such sampler"), RuntimeError("gone")])
def test_failing_hooks_lose_nothing(tmp_path, error):
    """A picture that cannot be drawn comes after the steps that were to be pictured."""

    def hook(step, state):
        if step == 6:
            raise error

    whole = Run(tmp_path / "whole").fit(12)
    torn = tmp_path / "torn"
    with pytest.raises(type(error)) as failed:
        Run(torn).fit(12, hooks=[hook])
    said = "; ".join([str(failed.value), *getattr(failed.value, "__notes__", [])])
    assert said == f"{error}; the last checkpoint is step 6 in {torn / 'checkpoints'}"
    toy.assert_same(Run(torn).fit(12).state, whole.state)


def test_failing_data_do_not_hide_a_divergence(tmp_path):
    run = Run(tmp_path, data=Torn(UserError("torn")))
    run.step = diverging(6)
    with pytest.raises(UserError, match=r"loss is nan at step 6: .* step 4 in"):
        run.fit(12)


def collecting(rounds):
    """Rounds of three batches, made of the model's parameters and the round's key."""

    def collect(state, key):
        rounds.append(int(state.step))
        draws = jax.random.normal(key, (3, toy.B, toy.D)) + state.params["b"][: toy.D]
        toy.assert_same(key, step_key(state, Purpose.COLLECT))
        return [toy.compiled()[2]({"x": np.asarray(x)}) for x in draws]

    return collect


def test_collected_rounds_resume_exactly(tmp_path):
    """Checkpoints fall on the ends of rounds, even when a signal comes within one."""
    step, place, _ = toy.compiled()
    rounds = []
    whole = fit(step, place(), collecting(rounds), steps=12, progress=False)
    assert rounds == [0, 3, 6, 9]

    checkpoints = Checkpoints(tmp_path)
    options = {"checkpoints": checkpoints, "checkpoint_every": 2, "progress": False}
    with pytest.raises(Stopped):
        fit(step, place(), collecting(rounds), steps=12, hooks=[killing(7)], **options)
    assert checkpoints.steps() == [3, 6]
    state = resume(checkpoints, place())
    toy.assert_same(fit(step, state, collecting(rounds), steps=12, **options), whole)
    checkpoints.close()


@pytest.mark.parametrize(("dies_at", "left"), [(2, []), (3, [3])])
def test_a_collection_that_fails_leaves_what_can_be_resumed(tmp_path, dies_at, left):
    """A whole first round is saved; from the middle of one nothing could go on."""
    step, place, put = toy.compiled()
    asked = iter(range(9))

    def collect(state, key):
        for _ in range(3):
            if next(asked) == dies_at:
                raise UserError("the simulator died")
            yield put(toy.batch(0))

    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match="the simulator died; "):
        fit(step, place(), collect, steps=12, checkpoints=checkpoints, checkpoint_every=100, progress=False)
    assert checkpoints.steps() == left
    checkpoints.close()


def test_mistakes_are_one_line(tmp_path):
    quiet = {"progress": False}
    with pytest.raises(UserError, match="steps=10 leaves 7 to do, which inner=2 does not divide"):
        fit(None, bare(3), iter([]), steps=10, inner=2, **quiet)
    with pytest.raises(UserError, match="the data ended after step 0: let it repeat"):
        fit(None, bare(), iter([]), steps=10, **quiet)
    with pytest.raises(UserError, match="nothing was collected at step 0"):
        fit(None, bare(), lambda state, key: [], steps=10, **quiet)
    with pytest.raises(TypeError, match="get_state"):
        fit(None, bare(), iter([]), steps=10, checkpoints=Checkpoints(tmp_path), **quiet)


def test_the_bar_counts_from_the_restored_step(tmp_path, capsys):
    Run(tmp_path).fit(4)
    capsys.readouterr()
    Run(tmp_path).fit(8, progress=True, desc="toy", batch_size=toy.B)
    said = capsys.readouterr().err
    assert "toy:  50%" in said
    assert "compiling the first step" in said
    assert "8/8" in said
