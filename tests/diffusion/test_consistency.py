"""Consistency models on Gaussian data, whose probability flow is known: it keeps (x - alpha m) / std fixed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from diffusion_cases import CURVES, PROCESSES, key

from diffrl.diffusion import consistency, distillation, mixtures, prediction, times
from diffrl.diffusion import process as P
from diffrl.diffusion.process import expand
from diffrl.diffusion.sampling import sample, sample_keys, start
from diffrl.train.state import Aux, create
from diffrl.train.step import global_step, make_update, repeat

MEAN, VARIANCE = 0.3, 0.25
GAUSSIAN = mixtures.mixture([1.0], [[MEAN, MEAN]], [VARIANCE])
X0 = mixtures.draw(GAUSSIAN, key(0), 512)
KEYS = sample_keys(key(1), 512)
EVEN = consistency.even_ladder()


def exact(process, t_min=0.0):
    """(x_t, t, cond) -> where the flow through x_t is at t_min, divided by alpha(t_min)."""

    def f(x, t, cond=None):
        alpha, sigma = P.scales(process, t, x)
        first, first_sigma = (curve(jnp.full((), t_min)) for curve in process)
        grow = jnp.sqrt((first**2 * VARIANCE + first_sigma**2) / (alpha**2 * VARIANCE + sigma**2))
        return MEAN + grow / first * (x - alpha * MEAN)

    return f


def exact_solver(process):
    """Walks the flow without error, whatever the step."""

    def solve(x, t, s, cond):
        def spread(u):
            return expand(jnp.sqrt(process.alpha(u) ** 2 * VARIANCE + process.sigma(u) ** 2), x)

        alpha_t, alpha_s = (expand(process.alpha(u), x) for u in (t, s))
        return alpha_s * MEAN + spread(s) / spread(t) * (x - alpha_t * MEAN)

    return solve


def through(process, head, f):
    """The network that makes `f` through `head`; where the head does not listen, any value will do."""

    def model(shown, t, cond):
        x = shown / head.inputs(jnp.ones_like(shown), t)
        y = prediction.to_output(process, head, x, t, f(x, t, cond))
        return jnp.where(jnp.isfinite(y), y, 0.0)

    return model


# --- Times -----------------------------------------------------------------------------------------------------------


def test_neighbours_are_neighbours():
    """Every rung of a traced N has its turn; the first pair ends at the ladder's foot, exactly."""
    draw = times.uniform(0.0, 1.0)
    run = jax.jit(lambda num: consistency.neighbours(consistency.even_ladder(0.1, 0.9), draw, num)(KEYS))
    for num in (1, 4, 16):
        t, s = (np.asarray(a) for a in run(jnp.asarray(num)))
        np.testing.assert_allclose(t - s, 0.8 / num, rtol=1e-4)
        assert len(np.unique(np.round(s, 5))) == num
        assert s.min() == np.float32(0.1)
        assert t.max() == pytest.approx(0.9)


def test_karras_ladder():
    """Its rungs are EDM's grid, and place undoes time."""
    process = P.ve(0.002, 100.0)
    ladder = consistency.karras_ladder(process)
    rungs = ladder.time(jnp.arange(18) / 17)
    np.testing.assert_allclose(rungs[::-1], times.karras_grid(process, 18)[:-1], rtol=1e-4)
    np.testing.assert_allclose(ladder.place(rungs), np.arange(18) / 17, atol=1e-5)


def test_a_karras_ladder_ends_where_the_process_does():
    """VE goes to 50 and the ladder's default to 80: no two rungs are one, and no gap is 0."""
    ladder, weight = consistency.karras_ladder(PROCESSES["ve"]), consistency.inverse_gap(PROCESSES["ve"])
    rungs = ladder.time(jnp.arange(19) / 18)
    assert rungs[-1] == pytest.approx(1.0)
    assert np.all(np.diff(rungs) > 0)
    assert np.all(np.isfinite(weight(rungs[1:], rungs[:-1])))
    np.testing.assert_allclose(ladder.place(rungs), np.arange(19) / 18, atol=1e-5)


def test_log_normal_intervals_have_the_papers_mass():
    """p(i) ~ erf((log u_{i+1} - mean) / (sqrt 2 std)) - erf((log u_i - mean) / (sqrt 2 std)), the tails at the ends."""
    process, num = P.ve(0.002, 100.0), 8
    ladder = consistency.karras_ladder(process)
    pairs = consistency.neighbours(ladder, times.log_normal(process, -1.1, 2.0), num)
    _, s = jax.jit(pairs)(sample_keys(key(2), 5000))
    index = np.round(np.asarray(ladder.place(s)) * num).astype(int)
    inner = np.linspace(0.002 ** (1 / 7), 80.0 ** (1 / 7), num + 1)[1:-1] ** 7
    mass = np.diff(scipy.stats.norm(-1.1, 2.0).cdf(np.concatenate([[-np.inf], np.log(inner), [np.inf]])))
    assert scipy.stats.chisquare(np.bincount(index, minlength=num), 5000 * mass).pvalue > 0.01


def test_curriculum_of_the_paper():
    """s_0 = 10 and s_1 = 1280 in 800 k steps: doubled every 100 k, seven times."""
    steps = jnp.array([0, 99_999, 100_000, 350_000, 699_999, 700_000, 800_000, 10_000_000])
    found = [int(consistency.curriculum(step, 800_000)) for step in steps]
    assert found == [10, 10, 20, 80, 640, 1280, 1280, 1280]
    assert int(consistency.curriculum(jnp.asarray(5), 3, 4, 4)) == 4


# --- Metrics and heads -----------------------------------------------------------------------------------------------


def test_metrics():
    a, b = jnp.array([[3.0, 4.0], [0.0, 0.003]]), jnp.zeros((2, 2))
    np.testing.assert_allclose(consistency.squared(a, b), [12.5, 4.5e-6])
    np.testing.assert_allclose(consistency.pseudo_huber(12.0)(a, b), [1.0, 0.003**2 / 24], rtol=2e-3)
    # c is small by default: nearly the norm; and its gradient is finite where the two are equal.
    np.testing.assert_allclose(consistency.pseudo_huber()(a, b)[0], 5.0, rtol=1e-3)
    gradient = jax.grad(lambda a: consistency.pseudo_huber()(a, b).sum())(b)
    np.testing.assert_array_equal(gradient, b)


def test_inverse_gap():
    """On the line sigma / alpha = t / (1 - t): 1 / (3 - 1) between 1/2 and 3/4."""
    weight = consistency.inverse_gap(PROCESSES["flow"])
    np.testing.assert_allclose(weight(jnp.array([0.75]), jnp.array([0.5])), [0.5], rtol=1e-6)


def noisy_network(x, t, cond):
    return 100.0 * jnp.sin(17.0 * x + t[:, None])


@pytest.mark.parametrize(("name", "t_min"), [("ve", 0.1), ("cosine", 0.01), ("flow", 0.3), ("vp", 1e-3)])
def test_the_boundary_is_exact(name, t_min):
    """Bitwise, under jit, whatever the network says; and a time later it no longer holds."""
    process = PROCESSES[name]
    f = jax.jit(prediction.denoiser(consistency.consistency_head(process, 0.5, t_min), noisy_network))
    t = jnp.full(512, t_min, jnp.float32)
    np.testing.assert_array_equal(f(X0, t, None), X0 / expand(process.alpha(t), X0))
    assert np.abs(f(X0, 1.2 * t, None) - X0).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "make"), [("cosine", prediction.v_head), ("flow", prediction.velocity_head), ("ve", prediction.edm_head)]
)
def test_these_heads_keep_the_boundary_at_zero(name, make):
    f = prediction.denoiser(make(PROCESSES[name]), noisy_network)
    np.testing.assert_allclose(f(X0, jnp.zeros(512), None), X0, atol=1e-6)


def test_from_zero_the_head_is_edms():
    t, y = jnp.linspace(0.05, 0.95, 512), jnp.cos(X0)
    ours = consistency.consistency_head(PROCESSES["cosine"], 0.4)
    edm = prediction.edm_head(PROCESSES["cosine"], 0.4)
    for field in ("x0", "target"):
        np.testing.assert_allclose(getattr(ours, field)(X0, y, t), getattr(edm, field)(X0, y, t), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(ours.inputs(X0, t), edm.inputs(X0, t), rtol=1e-6)
    # Later than 0, too, target is the inverse of x0.
    shifted = consistency.consistency_head(PROCESSES["cosine"], 0.4, 0.02)
    xt = P.add_noise(PROCESSES["cosine"], X0, t, y)
    np.testing.assert_allclose(shifted.x0(xt, shifted.target(X0, y, t), t), X0, atol=2e-5)


# --- Objectives ------------------------------------------------------------------------------------------------------


def distillation_loss(process, head, pairs, teacher, f):
    objective = consistency.consistency_distillation(process, head, pairs, teacher, consistency.squared)
    model = through(process, head, f)
    return jax.jit(objective, static_argnums=(0, 1))(model, model, X0, None, KEYS)[0]


@pytest.mark.parametrize("name", ["cosine", "ve"])
def test_distillation_vanishes_at_the_exact_function(name):
    """With a teacher that walks the flow exactly, on any ladder; and it does not vanish at the denoiser."""
    process, t_min = PROCESSES[name], {"cosine": 0.0, "ve": 0.2}[name]
    head = {"cosine": prediction.v_head(process), "ve": consistency.consistency_head(process, 0.5, t_min)}[name]
    pairs = consistency.neighbours(consistency.even_ladder(t_min, 0.95), times.uniform(t_min, 0.95), 7)
    right = distillation_loss(process, head, pairs, exact_solver(process), exact(process, t_min))
    assert right.shape == (512,)
    assert float(right.max()) < 1e-7
    wrong = distillation_loss(process, head, pairs, exact_solver(process), mixtures.denoiser(GAUSSIAN, process))
    assert float(wrong.mean()) > 1e-3


@pytest.mark.parametrize(("make", "power"), [(distillation.ddim_solver, 4), (distillation.midpoint_solver, 6)])
def test_a_teachers_error_is_what_remains(make, power):
    """Local errors are O(N^-2) and O(N^-3), and the squared metric squares them."""
    process, counts = PROCESSES["cosine"], np.array([4, 8, 16])
    head, teacher = prediction.v_head(process), make(process, mixtures.denoiser(GAUSSIAN, process))
    model = through(process, head, exact(process))

    @jax.jit
    def loss(num):
        pairs = consistency.neighbours(EVEN, times.uniform(0.3, 0.7), num)
        objective = consistency.consistency_distillation(process, head, pairs, teacher, consistency.squared)
        return objective(model, model, X0, None, KEYS)[0].mean()

    slope = np.polyfit(np.log(counts), np.log([float(loss(num)) for num in counts]), 1)[0]
    assert slope == pytest.approx(-power, abs=0.3)


def test_the_target_gets_no_gradient():
    """The model as its own target learns as if the target were a frozen copy; weights scale the loss."""
    process = PROCESSES["cosine"]
    pairs = consistency.neighbours(EVEN, times.uniform(), 6)
    head, metric = prediction.v_head(process), consistency.pseudo_huber()

    def weight(t, s):
        return 3.0 + t

    plain = consistency.consistency_training(process, head, pairs, metric)
    weighted = consistency.consistency_training(process, head, pairs, metric, weight)

    def network(w):
        return lambda x, t, cond: w * x + t[:, None]

    def loss(w, target, objective=plain):
        return objective(network(w), network(target), X0, None, KEYS)[0]

    @jax.jit
    def run(w):
        itself = jax.grad(lambda w: loss(w, w).mean())(w)
        copy = jax.grad(lambda w: loss(w, 0.5).mean())(w)
        return itself, copy, jax.grad(lambda target: loss(0.5, target).mean())(w), loss(w, w), loss(w, w, weighted)

    itself, copy, of_target, value, more = run(0.5)
    assert float(itself) == pytest.approx(float(copy), rel=1e-5)
    assert abs(float(itself)) > 1e-3
    assert float(of_target) == 0.0
    ratio = more / value
    assert ratio.min() > 3.0
    assert ratio.max() <= 4.0 + 1e-5


@pytest.mark.parametrize("kind", ["training", "distillation"])
def test_gains_are_learned_on_the_shared_step(kind):
    """A table of affine maps, one per rung: one step from noise then has the data's moments.

    Training takes the model as its target; distillation the average in `state.ema`, and its teacher from
    `state.frozen`.  Training's pairs share their noise, not their trajectory, so that each rung regresses: it shrinks
    the spread by the cosine of the angle between (alpha_t sqrt(v), sigma_t) and (alpha_s sqrt(v), sigma_s).
    """
    process, num = PROCESSES["cosine"], 24
    alpha, sigma = CURVES["cosine"](np.arange(num + 1) / num)
    shrinkage = np.prod(np.cos(np.diff(np.arctan2(sigma, alpha * VARIANCE**0.5))))
    assert shrinkage < 0.96
    head = prediction.v_head(process)
    pairs = consistency.neighbours(EVEN, times.uniform(0.0, 1.0), num)

    def model(table):
        def apply(x, t, cond):
            gain, offset = table[jnp.round(num * t).astype(int)].T
            return gain[:, None] * x + offset[:, None]

        return apply

    def loss(params, state, batch, keys):
        if kind == "training":
            objective = consistency.consistency_training(process, head, pairs, consistency.squared)
            target = model(params)
        else:
            mean, variance = state.frozen
            data = mixtures.Mixture(jnp.zeros(1), mean[None], variance[None], jnp.eye(2)[None])
            teacher = distillation.midpoint_solver(process, mixtures.denoiser(data, process))
            objective = consistency.consistency_distillation(process, head, pairs, teacher, consistency.squared)
            target = model(state.ema)
        value, metrics = objective(model(params), target, batch["x"], None, keys)
        return value.mean(), Aux(metrics)

    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 1500))
    frozen = (jnp.full(2, MEAN), jnp.full(2, VARIANCE))
    state = create(jnp.zeros((num + 1, 2)), optimizer, key(3), frozen=frozen)
    update = jax.jit(repeat(global_step(make_update(loss, optimizer, ema_decay=0.95, ema_warmup=False)), 1500))
    data = {"x": mixtures.draw(GAUSSIAN, key(4), 1500 * 128).reshape(1500, 128, 2)}
    state, _ = update(state, data)
    one_step = sample(
        consistency.consistency_sampler(process, prediction.denoiser(head, model(state.ema))),
        key(5),
        start(process, key(5), (20_000, 2)),
        times.linear_grid(1),
    )
    assert np.asarray(one_step).mean() == pytest.approx(MEAN, abs=0.03)
    expected = VARIANCE**0.5 * (shrinkage if kind == "training" else 1.0)
    assert np.asarray(one_step).std() == pytest.approx(expected, rel=0.02)


# --- The sampler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("name", "t_min"), [("cosine", 0.0), ("flow", 0.0), ("ve", 0.4)])
def test_samples_have_the_datas_moments(name, t_min, steps):
    """Every step leaves the exact marginal; from t_min > 0 it is that of x at t_min, not noisier by the re-noising."""
    process = PROCESSES[name]
    sampler = consistency.consistency_sampler(process, exact(process, t_min), t_min)
    grid = jnp.append(jnp.linspace(1.0, t_min, steps + 1)[:-1], t_min)
    x = start(process, key(6), (40_000, 2))
    x = np.asarray(jax.jit(lambda x: sample(sampler, key(7), x, grid))(x)) / float(process.alpha(jnp.asarray(t_min)))
    alpha, sigma = CURVES[name](np.float64(t_min))
    assert x.mean() == pytest.approx(MEAN, abs=0.03)
    assert x.std() == pytest.approx(np.sqrt(VARIANCE + (sigma / alpha) ** 2), rel=0.01)


def test_in_between_too():
    """Stopped at s = 0.4 the samples are as noisy as x_s; and info tells the Gaussian that they came from."""
    process = PROCESSES["cosine"]
    sampler = consistency.consistency_sampler(process, exact(process))
    x = start(process, key(8), (40_000, 2))
    last, (path, info) = sample(sampler, key(9), x, jnp.array([1.0, 0.4]), trace=True)
    alpha, sigma = CURVES["cosine"](np.float64(0.4))
    assert np.asarray(last).std() == pytest.approx(np.sqrt(alpha**2 * VARIANCE + sigma**2), rel=0.02)
    np.testing.assert_allclose(info.mean[0], alpha * info.x0[0], rtol=1e-5)
    assert float(info.std[0]) == pytest.approx(sigma, rel=1e-5)
    assert np.asarray((path[0] - info.mean[0]) / info.std[0]).std() == pytest.approx(1.0, abs=0.02)
