"""Losses: one gradient whatever the head, weights at hand-computed SNRs, expectations known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diffusion_cases import CURVES, NAMES, PROCESSES, key, relative, switched
from test_prediction import HEADS

from diffrl.diffusion import likelihood, losses, prediction, times
from diffrl.diffusion import process as P
from diffrl.diffusion.sampling import fold, normal, sample_keys

X0 = jnp.sin(jnp.arange(64.0)).reshape(16, 4)
KEYS = sample_keys(key(11), 16)
PARAMS = {"w": 0.5 * jnp.cos(jnp.arange(16.0)).reshape(4, 4), "b": jnp.array([0.1, -0.2, 0.3, 0.0])}


def x0_network(params, x, t):
    return jnp.tanh(x / (1 + jnp.abs(x)) @ params["w"] + t[:, None] * params["b"])


def through(process, head, params):
    """The x_0 network above as a network that speaks through `head`."""

    def model(shown, t, cond):
        x = shown / head.inputs(jnp.ones_like(shown), t)
        return prediction.to_output(process, head, x, t, x0_network(params, x, t))

    return model


@jax.jit
def gradients(index):
    """Of every head's loss, in the parameters of one and the same x_0 network, under one weighting."""
    process, draw = switched(index), times.uniform(0.1, 0.9)
    results = {}
    for name, make in HEADS.items():
        head = make(process)
        objective = losses.denoising(process, head, draw, losses.min_snr(5.0))

        def loss(params, head=head, objective=objective):
            return objective(through(process, head, params), X0, None, KEYS)[0].mean()

        results[name] = jax.value_and_grad(loss)(PARAMS)
    return results


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_equal_across_parameterisations(name):
    results = gradients(NAMES.index(name))
    value, gradient = results.pop("x0")
    assert value > 0.0
    for head, (other_value, other) in results.items():
        assert relative(other_value, value) < 1e-4, head
        for leaf in gradient:
            assert relative(other[leaf], gradient[leaf]) < 1e-4, (head, leaf)


@jax.jit
def natural(index):
    """Unweighted losses beside those under the weight that is the head's own."""
    process, draw = switched(index), times.uniform(0.1, 0.9)
    pairs = {
        "eps": losses.snr,
        "v": losses.snr_plus_one,
        "edm": losses.edm(),
        "x0": lambda p, t: jnp.ones_like(t),
    }
    results = {}
    for name, weight in pairs.items():
        head = HEADS[name](process)
        model = through(process, head, PARAMS)
        objectives = [losses.denoising(process, head, draw, w) for w in (None, weight)]
        results[name] = [f(model, X0, None, KEYS)[0] for f in objectives]
    return results


@pytest.mark.parametrize("name", NAMES)
def test_the_natural_weight_of_each_head(name):
    """SNR for eps, SNR + 1 for v where alpha^2 + sigma^2 = 1, SNR + 1 / sigma_data^2 for EDM."""
    results = natural(NAMES.index(name))
    if name in ("flow", "ve", "sub_vp"):
        del results["v"]
    for head, (bare, weighted) in results.items():
        np.testing.assert_allclose(weighted, bare, rtol=1e-4, err_msg=head)


def test_weights_by_hand():
    """At SNR = 1/9, 1 and 9: t = 3/4, 1/2 and 1/4 of the flow."""
    process, t = PROCESSES["flow"], jnp.array([0.75, 0.5, 0.25])
    table = {
        losses.snr: [1 / 9, 1, 9],
        losses.snr_plus_one: [10 / 9, 2, 10],
        losses.min_snr(): [1 / 9, 1, 5],
        losses.min_snr(0.5): [1 / 9, 0.5, 0.5],
        losses.p2(): [1 / 10, 1 / 2, 9 / 10],
        losses.p2(0.5): [1 / np.sqrt(90), 1 / np.sqrt(2), 9 / np.sqrt(10)],
        losses.p2(1.0, 3.0): [1 / 28, 1 / 4, 3 / 4],
        losses.edm(): [37 / 9, 5, 13],  # (sigma^2 + 1/4) / (sigma / 2)^2 at sigma = 3, 1, 1/3
        losses.sigmoid(): [1 / 10, 1 / 2, 9 / 10],
        losses.sigmoid(float(np.log(3))): [3 / 28, 3 / 4, 9 / 4],
        losses.variational: [0.25 / 0.75**3, 0.5 / 0.5**3, 0.75 / 0.25**3],  # -SNR' / 2 = (1 - t) / t^3
    }
    for weight, expected in table.items():
        np.testing.assert_allclose(weight(process, t), expected, rtol=1e-5)


def test_min_snr_in_v():
    """Hang et al. (2023): min(SNR, gamma) / (SNR + 1) on v's error, for variance-preserving processes."""
    process, t = PROCESSES["cosine"], jnp.array([0.5, 0.2])
    snr = 1 / np.tan(0.5 * np.pi * np.array([0.5, 0.2])) ** 2
    on_v = losses.min_snr()(process, t) * prediction.slope(prediction.v_head(process), t) ** 2
    np.testing.assert_allclose(on_v, [0.5, 5 / (snr[1] + 1)], rtol=1e-5)
    on_eps = losses.min_snr()(process, t) * prediction.slope(prediction.eps_head(process), t) ** 2
    np.testing.assert_allclose(on_eps, [1.0, 5 / snr[1]], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_variational_weight_integrates_the_mmse(name):
    """I-MMSE: for N(0, l) data, int w(t) mmse(t) dt = (log(1 + l SNR(0.1)) - log(1 + l SNR(0.9))) / 2."""
    process, variance, t = PROCESSES[name], 0.3, (np.arange(20_000) + 0.5) / 20_000 * 0.8 + 0.1
    alpha, sigma = CURVES[name](t)
    mmse = variance * sigma**2 / (alpha**2 * variance + sigma**2)
    weight = np.asarray(jax.jit(losses.variational, static_argnums=0)(process, t), float)
    integral = 0.8 * np.mean(weight * mmse)
    ends = np.divide(*CURVES[name](np.array([0.1, 0.9]))) ** 2
    assert integral == pytest.approx(0.5 * -np.diff(np.log1p(variance * ends))[0], rel=2e-3)


def test_expected_losses():
    """L_simple is 1 for a network that returns 0; alpha^2 l / (alpha^2 l + sigma^2) at best, for N(0, l) data."""
    process, variance = PROCESSES["cosine"], 0.25
    head = prediction.eps_head(process)
    x0, keys = 0.5 * jax.random.normal(key(1), (4000, 4)), sample_keys(key(2), 4000)

    def best(x, t, cond):
        alpha, sigma = P.scales(process, t, x)
        return sigma * x / (alpha**2 * variance + sigma**2)

    @jax.jit
    def means(x0, keys):
        objective = losses.denoising(process, head, times.uniform(0.3, 0.3))
        return [objective(f, x0, None, keys)[0].mean() for f in (lambda x, t, cond: 0 * x, best)]

    alpha, sigma = CURVES["cosine"](0.3)
    expected = [1.0, alpha**2 * variance / (alpha**2 * variance + sigma**2)]
    np.testing.assert_allclose(means(x0, keys), expected, rtol=0.04)


def test_a_samples_loss_is_its_own():
    process = PROCESSES["cosine"]
    objective = losses.denoising(process, prediction.v_head(process), times.uniform(), losses.min_snr())

    def model(x, t, cond):
        return 0.1 * x * cond[:, None]

    cond = jnp.arange(16.0)
    run = jax.jit(lambda *batch: objective(model, *batch))
    whole, metrics = run(X0, cond, KEYS)
    part, _ = run(X0[5:8], cond[5:8], KEYS[5:8])
    assert whole.shape == (16,)
    assert metrics == {}
    np.testing.assert_allclose(part, whole[5:8], rtol=1e-5)


# --- The hybrid objective of improved DDPM ---------------------------------------------------------------------------

STEPS = 8
TABLE = P.tabulated(P.alpha_bars(P.linear_betas(STEPS, 0.02, 0.7)))
GRID = jnp.arange(STEPS + 1) / STEPS
HEAD = prediction.eps_head(TABLE)
QUANTISED = jnp.round(127.5 * (X0 + 1)) / 127.5 - 1


def halves(params, x, t, cond):
    mean = x @ params["mean"]
    return jnp.concatenate([mean, jnp.tanh(x @ params["var"])], axis=-1)


def test_hybrids_variance_does_not_move_the_mean():
    """The mean half's gradient is L_simple's alone, on the same draws; the variance half's is not 0."""
    params = {"mean": PARAMS["w"], "var": 0.3 * PARAMS["w"].T}

    def gradient_of(objective, model):
        def loss(params):
            return objective(lambda *a: model(params, *a), QUANTISED, None, KEYS)[0].mean()

        return jax.jit(jax.grad(loss))(params)

    both = gradient_of(losses.hybrid(TABLE, HEAD, GRID, losses.min_snr()), halves)
    simple = losses.denoising(TABLE, HEAD, times.discrete(STEPS), losses.min_snr())
    alone = gradient_of(simple, lambda params, *a: halves(params, *a)[..., :4])
    np.testing.assert_allclose(both["mean"], alone["mean"], rtol=1e-5, atol=1e-7)
    assert np.abs(both["var"]).max() > 1e-6
    assert np.abs(alone["var"]).max() == 0.0


def test_hybrids_metrics():
    """ "vlb" estimates the bound's terms, all N of them, from one; the prior's is not in it."""
    params = {"mean": PARAMS["w"], "var": 0.3 * PARAMS["w"].T}
    objective, num = losses.hybrid(TABLE, HEAD, GRID, scale=0.25), 4096

    @jax.jit
    def run(x0, keys):
        def model(*a):
            return halves(params, *a)

        exact = likelihood.variational_bound(TABLE, prediction.with_variance(HEAD, model), GRID, keys, x0, learned=True)
        return *objective(model, x0, None, keys), exact["terms"].sum(axis=0)

    value, metrics, expected = run(jnp.tile(QUANTISED, (num // 16, 1)), sample_keys(key(6), num))
    error = np.asarray(metrics["vlb"]).std() / np.sqrt(num)
    assert float(metrics["vlb"].mean()) == pytest.approx(float(expected.mean()), abs=4 * error)
    assert error < 0.05 * float(expected.mean())
    assert set(metrics) == {"simple", "vlb"}
    np.testing.assert_allclose(value, metrics["simple"] + 0.25 * metrics["vlb"], rtol=1e-6)


def test_hybrid_learns_the_optimal_variance():
    """For N(0, l) data and the exact mean, the reverse step's true variance is the best: v is found for n >= 2."""
    variance = 0.04
    alpha, sigma = np.asarray(TABLE.alpha(GRID), float), np.asarray(TABLE.sigma(GRID), float)
    t, s = np.arange(2, STEPS + 1), np.arange(1, STEPS)
    marginal = alpha**2 * variance + sigma**2
    # x_s | x_t of jointly normal (x_s, x_t), whose covariance is (alpha_t / alpha_s) var(x_s).
    true = marginal[s] - (alpha[t] / alpha[s] * marginal[s]) ** 2 / marginal[t]
    large = sigma[t] ** 2 - (alpha[t] / alpha[s] * sigma[s]) ** 2
    small = large * sigma[s] ** 2 / sigma[t] ** 2
    optimal = np.log(true / small) / np.log(large / small)

    x0 = jnp.round(127.5 * (0.2 * jax.random.normal(key(0), (512, 8)) + 1)) / 127.5 - 1
    objective = losses.hybrid(TABLE, HEAD, GRID, scale=1.0)

    def model(raw, x, t, cond):
        a, s = P.scales(TABLE, t, x)
        n = jnp.round(t * STEPS).astype(int)
        eps = s * x / (a**2 * variance + s**2)
        return jnp.concatenate([eps, jnp.broadcast_to(raw[n][:, None], x.shape)], axis=-1)

    optimiser = optax.adam(0.05)

    @jax.jit
    def train(raw):
        def step(carry, i):
            raw, state = carry
            keys = fold(sample_keys(key(4), len(x0)), i)

            def loss(raw):
                return objective(lambda *a: model(raw, *a), x0, None, keys)[0].mean()

            updates, state = optimiser.update(jax.grad(loss)(raw), state)
            return (optax.apply_updates(raw, updates), state), raw

        _, path = jax.lax.scan(step, (raw, optimiser.init(raw)), jnp.arange(400))
        return path[-100:].mean(axis=0)

    learned = 0.5 * (np.asarray(train(jnp.zeros(STEPS + 1))) + 1)
    assert np.ptp(optimal) > 0.1  # the optimum is not one constant
    np.testing.assert_allclose(learned[2:], optimal, atol=0.04)


# --- Known entries and weights of elements ---------------------------------------------------------------------------


def partly(known, elements, x0=X0, model=None):
    objective = losses.denoising(PROCESSES["cosine"], prediction.eps_head(PROCESSES["cosine"]), times.uniform(0.1, 0.9))
    return objective(model or (lambda x, t, cond: x0_network(PARAMS, x, t)), x0, None, KEYS, known, elements)[0]


def test_known_entries_are_shown_clean_and_make_no_error():
    known, shown = jnp.zeros((16, 4), bool).at[:, 1].set(True), []

    def model(x, t, cond):
        shown.append(x)
        return jnp.zeros_like(x).at[:, 1].set(jnp.nan)

    error = partly(known, None, model=model)
    np.testing.assert_array_equal(shown[0][:, 1], X0[:, 1])
    assert (shown[0][:, 0] != X0[:, 0]).all()
    noise = normal(fold(KEYS, losses.NOISE), X0)
    np.testing.assert_allclose(error, (noise[:, np.array([0, 2, 3])] ** 2).mean(axis=1), rtol=1e-5)


def test_weights_of_elements_are_shares_of_a_mean():
    whole = partly(None, None)
    np.testing.assert_allclose(partly(None, jnp.full((4,), 7.0)), whole, rtol=1e-5)
    first, rest = (partly(None, jnp.array(w)) for w in ([1.0, 0, 0, 0], [0.0, 1, 1, 1]))
    np.testing.assert_allclose((first + 3 * rest) / 4, whole, rtol=1e-5)
    np.testing.assert_array_equal(partly(jnp.ones((16, 4), bool), None), 0.0)  # all is known: nothing to learn


def test_what_has_no_weight_may_be_anything():
    def total(w):
        return losses.weighted_mean(jnp.stack([w, 1 / (w - w)])[None], jnp.array([1.0, 0.0])).sum()

    assert float(total(jnp.float32(2.0))) == 2.0
