"""Progressive distillation: one step of the student is two of its teacher's, whatever the teacher's solver."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diffusion_cases import PROCESSES, blobs, gaussian, key, laws, order

from diffrl.diffusion import distillation, losses, mixtures, prediction, samplers, times
from diffrl.diffusion.sampling import sample, sample_keys
from diffrl.train.state import Aux, create
from diffrl.train.step import global_step, make_update, repeat

PROCESS = PROCESSES["cosine"]
EXACT = mixtures.denoiser(blobs(), PROCESS)
TEACHER = distillation.ddim_solver(PROCESS, EXACT)
HEAD = prediction.v_head(PROCESS)
X = jax.random.normal(key(0), (64, 2))


def student(num, teacher=TEACHER, process=PROCESS):
    """The denoiser that progressive distillation with N = `num` aims at."""

    def denoise(x, t, cond=None):
        middle, s = t - 0.5 / num, jnp.maximum(t - 1.0 / num, 0.0)
        return distillation.ddim_x0(process, x, teacher(teacher(x, t, middle, cond), middle, s, cond), t, s)

    return denoise


@pytest.mark.parametrize("name", ["cosine", "flow", "vp"])
def test_one_step_is_two_of_the_teachers(name):
    """Along the whole grid: N steps of DDIM with the student end where 2 N with the teacher do."""
    process = PROCESSES[name]
    denoise = mixtures.denoiser(blobs(), process)
    teacher = distillation.ddim_solver(process, denoise)

    @jax.jit
    def walks(x):
        pairs = ((student(4, teacher, process), 4), (denoise, 8), (denoise, 4))
        return [sample(samplers.ddim(process, f), key(), x, times.linear_grid(num)) for f, num in pairs]

    half, whole, few = walks(X)
    np.testing.assert_allclose(half, whole, atol=2e-5)
    assert np.abs(half - few).max() > 0.02


OWN_TIMES = jnp.array([0.9, 0.6, 0.3]), jnp.array([0.5, 0.1, 0.0])


def test_solvers_take_each_sample_at_its_own_times():
    """DDIM's as the sampler of that name does, one by one."""
    t, s = OWN_TIMES
    together = jax.jit(lambda x: TEACHER(x, t, s, None))(X[:3])
    alone = jax.jit(lambda x, *grid: sample(samplers.ddim(PROCESS, EXACT), key(), x, jnp.stack(grid)))
    for i in range(3):
        np.testing.assert_allclose(together[i], alone(X[i : i + 1], t[i], s[i])[0], rtol=1e-5, atol=1e-6)


def test_the_two_call_solver_is_closer_to_the_flow():
    """Of each sample at its own times; for Gaussian data the flow keeps (x - alpha MEAN) / std fixed."""
    z, exact = np.array([-1.5, 0.5, 1.0]), mixtures.denoiser(gaussian(), PROCESS)
    x, end = (mean + np.sqrt(variance) * z for mean, variance in (laws("cosine", t) for t in OWN_TIMES))
    errors = []
    for make in (distillation.ddim_solver, distillation.midpoint_solver):
        found = make(PROCESS, exact)(jnp.asarray(x[:, None], jnp.float32), *OWN_TIMES, None)
        errors.append(np.abs(found[:, 0] - end))
    assert np.all(errors[1] < 0.6 * errors[0])
    assert np.all(errors[0] > 1e-3)


@pytest.mark.parametrize(("make", "theory"), [(distillation.ddim_solver, 1), (distillation.midpoint_solver, 2)])
def test_local_orders(make, theory):
    """One step from 0.6 of length h errs by O(h^(order + 1)) from the exact map of a Gaussian's flow, in float64."""
    lengths, (mean, variance) = np.array([0.1, 0.05, 0.025]), laws("cosine", 0.6)
    means, variances = laws("cosine", 0.6 - lengths)
    with jax.enable_x64(True):
        solve, t = make(PROCESS, mixtures.denoiser(gaussian(), PROCESS)), jnp.full(3, 0.6)
        x = jnp.full((3, 1), mean + np.sqrt(variance))
        found = np.asarray(solve(x, t, jnp.asarray(0.6 - lengths), None))[:, 0]
    assert -order(found - means - np.sqrt(variances), lengths) == pytest.approx(theory + 1, abs=0.2)


def test_solvers_are_finite_at_both_ends():
    for make in (distillation.ddim_solver, distillation.midpoint_solver):
        solve = make(PROCESS, EXACT)
        assert np.isfinite(solve(X, jnp.ones(64), jnp.zeros(64), None)).all()


def test_the_objective_is_zero_at_the_aim_alone():
    """In two heads, under a traced N; the teacher itself is not its own student."""
    x0, keys = mixtures.draw(blobs(), key(1), 64), sample_keys(key(2), 64)

    def through(head, denoise):
        return lambda x, t, cond: prediction.to_output(PROCESS, head, x, t, denoise(x, t, cond))

    @jax.jit
    def run(num):
        found = {}
        for name, make in {"v": prediction.v_head, "x0": prediction.x0_head}.items():
            head = make(PROCESS)
            objective = distillation.progressive(PROCESS, head, TEACHER, num, losses.snr_plus_one)
            models = (student(num), mixtures.denoiser(blobs(), PROCESS))
            found[name] = [objective(through(head, m), x0, None, keys)[0] for m in models]
        return found

    for num in (1, 4):
        found = run(jnp.asarray(num))
        for right, wrong in found.values():
            assert right.shape == (64,)
            assert float(right.max()) < 1e-6
            assert float(wrong.mean()) > 1e-3
        np.testing.assert_allclose(found["v"][1], found["x0"][1], rtol=1e-3, atol=1e-6)  # one weight, two heads


def test_no_gradient_reaches_the_teacher():
    def loss(scale):
        teacher = distillation.ddim_solver(PROCESS, lambda x, t, c: scale * x)
        objective = distillation.progressive(PROCESS, HEAD, teacher, 2)
        return objective(lambda x, t, c: 0.1 * x, X, None, sample_keys(key(), 64))[0].mean()

    assert float(jax.grad(loss)(0.5)) == 0.0


def test_two_stages_on_the_shared_step():
    """A table of gains per time, from a teacher of 4 steps to a student of 1, on Gaussian data N(0, 0.25).

    The teacher and N lie in `state.frozen`, so that one compiled step serves both stages; in the end one DDIM step
    with the student multiplies noise by what four with the teacher do.
    """
    steps, variance = 4, 0.25
    exact = mixtures.denoiser(mixtures.mixture([1.0], [[0.0]], [variance]), PROCESS)

    def model(params):  # v is linear in x for such data; one gain for each of the times n / 4
        return lambda x, t, cond: params[jnp.round(steps * t).astype(int)][:, None] * x

    def loss(params, state, batch, keys):
        teacher = distillation.ddim_solver(PROCESS, prediction.denoiser(HEAD, model(state.frozen["teacher"])))
        objective = distillation.progressive(PROCESS, HEAD, teacher, state.frozen["num"])
        value, metrics = objective(model(params), batch["x"], None, keys)
        return value.mean(), Aux(metrics)

    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 300))
    update = jax.jit(repeat(global_step(make_update(loss, optimizer, ema_decay=0.9)), 300))
    nodes = jnp.arange(steps + 1) / steps
    ones = jnp.ones((steps + 1, 1))
    gains = prediction.to_output(PROCESS, HEAD, ones[1:], nodes[1:], exact(ones[1:], nodes[1:]))[:, 0]
    teacher = params = jnp.concatenate([jnp.zeros(1), gains])
    data = {"x": 0.5 * jax.random.normal(key(3), (300, 64, 1))}
    for num in (2, 1):
        state = create(params, optimizer, key(4), frozen={"teacher": params, "num": jnp.asarray(num)})
        before = np.asarray(state.frozen["teacher"])
        state, metrics = update(state, data)
        np.testing.assert_array_equal(state.frozen["teacher"], before)
        assert metrics["loss"][-1] < 0.05 * metrics["loss"][0]
        params = state.ema

    def land(params, num):
        sampler = samplers.ddim(PROCESS, prediction.denoiser(HEAD, model(params)))
        return float(sample(sampler, key(), jnp.ones((1, 1)), times.linear_grid(num))[0, 0])

    assert land(params, 1) == pytest.approx(land(teacher, 4), abs=0.01)
    assert abs(land(teacher, 1) - land(teacher, 4)) > 0.1
