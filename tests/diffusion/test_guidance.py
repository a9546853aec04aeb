"""Guidance and thresholding: exact ends, exact denoisers, hand numbers, diffusers' guiders, one network call."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import PROCESSES, key

from diffrl.diffusion import dpm_solver, guidance, mixtures, prediction, samplers, sde, unipc
from diffrl.diffusion.sampling import sample, sample_keys
from diffrl.errors import UserError

PROCESS = PROCESSES["cosine"]
CLASSES = [mixtures.mixture([1.0], [mean], [0.09]) for mean in ([-1.0, 0.0], [1.0, 0.5])]
MARGINAL = mixtures.mixture([1, 1], [[-1.0, 0.0], [1.0, 0.5]], [0.09, 0.09])
NULL = 2


def class_conditional(x, t, cond):
    """Exact for the labels 0 and 1, and for the null class the exact marginal."""
    estimates = [mixtures.denoiser(m, PROCESS)(x, t) for m in (*CLASSES, MARGINAL)]
    return jnp.take_along_axis(jnp.stack(estimates), cond[None, :, None], axis=0)[0]


X = jax.random.normal(key(0), (6, 2))
T = jnp.linspace(0.1, 0.95, 6)
LABEL = jnp.array([0, 1, 0, 1, 1, 0], jnp.int32)


def test_ends_are_bitwise():
    """One half of the pair, untouched by the other; operation by operation, since XLA may fuse two programs unlike."""

    def denoise(x, t, cond):
        return jnp.tanh(x) * (cond[:, None] - 0.7)

    unconditional, conditional = (guidance.classifier_free(denoise, scale, NULL)(X, T, LABEL) for scale in (0.0, 1.0))
    np.testing.assert_array_equal(unconditional, denoise(X, T, jnp.full_like(LABEL, NULL)))
    np.testing.assert_array_equal(conditional, denoise(X, T, LABEL))


@pytest.mark.parametrize("scale", [2.5, np.array([0.0, 0.5, 1.0, 2.0, 4.0, -1.0], np.float32)])
def test_two_exact_denoisers_are_mixed(scale):
    exact = [jax.jit(mixtures.denoiser(m, PROCESS))(X, T) for m in (*CLASSES, MARGINAL)]
    c = np.where(np.asarray(LABEL)[:, None] == 0, exact[0], exact[1]).astype(np.float64)
    u = np.asarray(exact[2], np.float64)
    s = np.broadcast_to(scale, 6)[:, None]
    guided = jax.jit(guidance.classifier_free(class_conditional, scale, NULL))(X, T, LABEL)
    np.testing.assert_allclose(guided, u + s * (c - u), atol=2e-6)


def test_guided_score_is_the_gradient_of_the_sharpened_density():
    """s grad log p(x | c) + (1 - s) grad log p(x), by autodiff of the two densities."""

    def sharpened(x):
        conditional, marginal = (mixtures.log_density(m, PROCESS, x, T) for m in (CLASSES[1], MARGINAL))
        return (3.0 * conditional - 2.0 * marginal).sum()

    @jax.jit
    def guided_score(x):
        x0 = guidance.classifier_free(class_conditional, 3.0, NULL)(x, T, jnp.ones(6, jnp.int32))
        return prediction.to_score(PROCESS, x, T, x0)

    np.testing.assert_allclose(guided_score(X), jax.jit(jax.grad(sharpened))(X), rtol=1e-3, atol=1e-3)


def test_one_call_and_trees():
    """The network is traced once; `cond` may be a tree, and `null` broadcasts against it without changing dtypes."""
    calls = []

    def denoise(x, t, cond):
        calls.append(jax.tree.map(jnp.shape, cond))
        assert cond["label"].dtype == jnp.int32
        return x + cond["label"][:, None] + cond["prompt"].sum(axis=(1, 2))[:, None]

    cond = {"label": LABEL, "prompt": jnp.ones((6, 3, 2))}
    null = {"label": NULL, "prompt": jnp.zeros((3, 2))}
    guided = guidance.classifier_free(denoise, 2.0, null)(X, T, cond)
    assert calls == [{"label": (6,), "prompt": (6, 3, 2)}]
    expected = np.asarray(X) + (-1.0 * NULL + 2.0 * (np.asarray(LABEL) + 6.0))[:, None]
    np.testing.assert_allclose(guided, expected, rtol=1e-6)


def test_the_network_runs_once_on_a_doubled_batch():
    """At run time, one call of a host function sees both halves."""
    shapes = []

    def host(x, cond):
        shapes.append((x.shape, cond.shape))
        return np.broadcast_to(x + cond[..., None], (*cond.shape, 2)).astype(np.float32)

    def denoise(x, t, cond):
        return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x, cond, vmap_method="expand_dims")

    jax.block_until_ready(guidance.classifier_free(denoise, 2.0, NULL)(X, T, LABEL))
    assert shapes == [((1, 6, 2), (2, 6))]


# --- Interval --------------------------------------------------------------------------------------------------------

INTERVAL = guidance.interval(PROCESS, 3.0, -1.0, 1.0)


def test_interval_by_hand():
    """The cosine process has log SNR = -2 log tan(pi t / 2): 0 at t = 1/2, and -1 and 1 at the ends below."""
    low, high = (2 / np.pi * np.arctan(np.exp(edge)) for edge in (-0.5, 0.5))
    t = jnp.array([0.0, low - 1e-3, low + 1e-3, 0.5, high - 1e-3, high + 1e-3, 1.0], jnp.float32)
    np.testing.assert_array_equal(INTERVAL(t), [1, 1, 3, 3, 3, 1, 1])
    np.testing.assert_array_equal(guidance.interval(PROCESS, 3.0, -1.0, 1.0, 0.0)(t[:3]), [0, 0, 3])
    each = guidance.interval(PROCESS, jnp.array([2.0, 3.0, 4.0]), -1.0, 1.0)
    np.testing.assert_array_equal(each(jnp.array([0.5, 0.1, 0.5])), [2, 1, 4])


def test_outside_the_interval_is_the_conditional_model_bitwise():
    guided = guidance.classifier_free(class_conditional, INTERVAL, NULL)
    for t in (0.1, 0.95):
        at = jnp.full(6, t)
        np.testing.assert_array_equal(guided(X, at, LABEL), class_conditional(X, at, LABEL))


def test_a_batch_may_straddle_the_interval():
    t = jnp.array([0.1, 0.45, 0.5, 0.55, 0.95, 0.99])
    mixed = jax.jit(guidance.classifier_free(class_conditional, INTERVAL, NULL))(X, t, LABEL)
    s = np.array([1.0, 3.0, 3.0, 3.0, 1.0, 1.0], np.float32)
    expected = jax.jit(guidance.classifier_free(class_conditional, s, NULL))(X, t, LABEL)
    np.testing.assert_allclose(mixed, expected, atol=1e-6)


def test_outside_the_interval_the_batch_is_not_doubled():
    shapes = []

    def host(x, cond):
        shapes.append(cond.shape)
        return np.zeros((*cond.shape, 2), np.float32)

    def denoise(x, t, cond):
        return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x, cond, vmap_method="expand_dims")

    sampler = samplers.ddim(PROCESS, guidance.classifier_free(denoise, INTERVAL, NULL))
    grid = jnp.array([0.95, 0.8, 0.5, 0.1, 0.0])
    jax.block_until_ready(jax.jit(lambda x: sample(sampler, key(), x, grid, LABEL))(X))
    assert shapes == [(6,), (6,), (2, 6), (6,)]


# --- Autoguidance ----------------------------------------------------------------------------------------------------


def test_autoguidance_asks_each_of_two_networks_once():
    calls = []

    def network(name, factor):
        def denoise(x, t, cond):
            calls.append((name, x.shape))
            return jnp.tanh(factor * x) * cond[:, None]

        return denoise

    good, bad = network("good", 1.3), network("bad", 0.4)
    expected = {1.0: good(X, T, LABEL), 0.0: bad(X, T, LABEL)}
    for scale, estimate in expected.items():
        calls.clear()
        guided = guidance.autoguidance(good, bad, scale)(X, T, LABEL)
        np.testing.assert_array_equal(guided, estimate)
        assert sorted(calls) == [("bad", X.shape), ("good", X.shape)]


def test_autoguidance_moves_away_from_a_blurred_density():
    """Its score is that of p^s q^(1 - s), by autodiff of the two densities."""
    blurred = mixtures.mixture([1, 1], [[-0.9, 0.1], [0.9, 0.4]], [0.25, 0.25])

    def sharpened(x):
        return sum(s * mixtures.log_density(m, PROCESS, x, T).sum() for s, m in ((2.0, MARGINAL), (-1.0, blurred)))

    @jax.jit
    def guided_score(x):
        good, bad = (mixtures.denoiser(m, PROCESS) for m in (MARGINAL, blurred))
        return prediction.to_score(PROCESS, x, T, guidance.autoguidance(good, bad, 2.0)(x, T, None))

    np.testing.assert_allclose(guided_score(X), jax.jit(jax.grad(sharpened))(X), rtol=1e-3, atol=1e-3)


# --- Rescale and APG -------------------------------------------------------------------------------------------------


def random_pair(shape=(5, 4, 4, 3)):
    rng = np.random.default_rng(3)
    return (rng.normal(size=shape).astype(np.float32) for _ in range(2))


def test_rescale_by_hand():
    """(1 - 3) 0 + 3 (-1, 1) has thrice the std of (-1, 1); half of that is taken back."""
    u, c = jnp.zeros((1, 2)), jnp.array([[-1.0, 1.0]])
    np.testing.assert_allclose(guidance.rescale(1.0)(u, c, 3.0), [[-1, 1]], rtol=1e-6)
    np.testing.assert_allclose(guidance.rescale(0.5)(u, c, 3.0), [[-2, 2]], rtol=1e-6)
    np.testing.assert_array_equal(guidance.rescale(0.0)(u, c, 3.0), [[-3, 3]])


def test_rescale_keeps_each_samples_std():
    u, c = random_pair()
    guided = guidance.rescale(1.0)(u, c, 7.0)
    np.testing.assert_allclose(guided.std((1, 2, 3)), c.std((1, 2, 3)), rtol=1e-5)


def test_rescale_leaves_a_constant_alone():
    """One entry, or equal ones, have no std to bring back."""
    for shape in ((2, 1), (2, 3)):
        u, c = jnp.zeros(shape), jnp.ones(shape)
        np.testing.assert_array_equal(guidance.rescale(0.7)(u, c, 3.0), np.full(shape, 3.0))


def test_project_by_hand():
    """c = (2, 0) and c - u = (3, 4), of length 5: parallel (3, 0), orthogonal (0, 4).  A radius of 2.5 halves both."""
    c, u, s = jnp.array([[2.0, 0.0]]), jnp.array([[-1.0, -4.0]]), 2.0
    cases = {
        (1.0, np.inf): [5, 4],
        (0.0, np.inf): [2, 4],
        (0.5, np.inf): [3.5, 4],
        (0.0, 2.5): [2, 2],
        (1.0, 9.0): [5, 4],
    }
    for (eta, radius), expected in cases.items():
        np.testing.assert_allclose(guidance.project(eta, radius)(u, c, s), [expected], rtol=1e-6)
    np.testing.assert_array_equal(guidance.project(0.0, 1.0)(c, c, s), c)  # no direction
    np.testing.assert_array_equal(guidance.project(0.0)(u, 0 * c, s), [[1, 4]])  # nothing to be parallel to


def test_project_with_nothing_projected_is_classifier_free_guidance():
    options = {"linear": guidance.linear, "project": guidance.project(1.0, np.inf), "rescale": guidance.rescale(0.0)}
    wrapped = [guidance.classifier_free(class_conditional, 3.0, NULL, combine) for combine in options.values()]
    plain, *others = (jax.jit(guided)(X, T, LABEL) for guided in wrapped)
    for other in others:
        np.testing.assert_allclose(other, plain, atol=2e-6)


@pytest.mark.oracle
def test_rescale_and_project_against_diffusers():
    torch = pytest.importorskip("torch", reason="torch of the [oracles] extra is not installed")
    pytest.importorskip("diffusers", reason="diffusers of the [oracles] extra is not installed")
    from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    u, c = random_pair()
    theirs = rescale_noise_cfg(torch.tensor(u + 4.0 * (c - u)), torch.tensor(c), 0.7)
    np.testing.assert_allclose(guidance.rescale(0.7)(u, c, 4.0), theirs, rtol=1e-4, atol=1e-5)
    for eta, radius in ((0.0, 2.5), (0.3, 100.0)):
        options = {"eta": eta, "norm_threshold": radius, "use_original_formulation": True}
        theirs = normalized_guidance(torch.tensor(c), torch.tensor(u), 3.0, **options)
        np.testing.assert_allclose(guidance.project(eta, radius)(u, c, 4.0), theirs, rtol=1e-4, atol=1e-5)


# --- Momentum --------------------------------------------------------------------------------------------------------

GRID = jnp.array([0.95, 0.7, 0.4, 0.2, 0.0])


def ddim(denoise):
    return samplers.ddim(PROCESS, denoise)


def test_no_momentum_is_plain_guidance():
    pair, project = guidance.against_null(class_conditional, NULL), guidance.project(0.2, 1.0)
    plain = ddim(guidance.classifier_free(class_conditional, 3.0, NULL, project))
    sampler = guidance.momentum(ddim, pair, 3.0, project, beta=0.0)
    expected, actual = (jax.jit(lambda x, s=s: sample(s, key(), x, GRID, LABEL))(X) for s in (plain, sampler))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("make", [dpm_solver.dpmpp_2m, unipc.unipc])
def test_momentum_keeps_the_memory_of_multistep_samplers(make):
    pair = guidance.against_null(class_conditional, NULL)
    plain = make(PROCESS, guidance.classifier_free(class_conditional, 3.0, NULL))
    sampler = guidance.momentum(lambda denoise: make(PROCESS, denoise), pair, 3.0, beta=0.0)
    expected, actual = (jax.jit(lambda x, s=s: sample(s, key(), x, GRID, LABEL))(X) for s in (plain, sampler))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("wrap", [
    lambda denoise: samplers.heun(PROCESS, denoise),
    lambda denoise: samplers.churn(ddim(denoise), PROCESS, 0.1),
    lambda denoise: sde.predictor_corrector(ddim(denoise), PROCESS, denoise),
], ids=["heun", "churn", "predictor_corrector"])  # fmt: skip
def test_momentum_refuses_samplers_with_other_estimates(wrap):
    """A second one, or one at another x: the pair was evaluated at (x_t, t) alone."""
    sampler = guidance.momentum(wrap, guidance.against_null(class_conditional, NULL), 3.0)
    with pytest.raises(UserError, match="one estimate a step"):
        jax.eval_shape(lambda x: sample(sampler, key(), x, GRID, LABEL), X)


@pytest.mark.oracle
def test_momentum_against_diffusers_buffer():
    """DDIM by hand, in numpy, around diffusers' guidance."""
    torch = pytest.importorskip("torch", reason="torch of the [oracles] extra is not installed")
    pytest.importorskip("diffusers", reason="diffusers of the [oracles] extra is not installed")
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    def pair(x, t, cond):
        return 0.5 * jnp.tanh(x), jnp.tanh(x + 0.3) + 0.1 * cond[:, None]

    x, grid, label = np.asarray(X, np.float64), np.asarray(GRID, np.float64), np.asarray(LABEL)[:, None]
    buffer = MomentumBuffer(-0.6)
    options = {"eta": 0.2, "norm_threshold": 0.8, "use_original_formulation": True}
    for t, s in itertools.pairwise(grid):
        u, c = torch.tensor(0.5 * np.tanh(x)), torch.tensor(np.tanh(x + 0.3) + 0.1 * label)
        x0 = normalized_guidance(c, u, 2.0, buffer, **options).numpy()
        eps = (x - np.cos(0.5 * np.pi * t) * x0) / np.sin(0.5 * np.pi * t)
        x = np.cos(0.5 * np.pi * s) * x0 + np.sin(0.5 * np.pi * s) * eps
    sampler = guidance.momentum(ddim, pair, 3.0, guidance.project(0.2, 0.8), beta=-0.6)
    actual = jax.jit(lambda x: sample(sampler, key(), x, GRID, LABEL))(X)
    np.testing.assert_allclose(actual, x, atol=1e-5)


# --- Learned variance, thresholding, dropped conditions --------------------------------------------------------------


def test_learned_variance_is_the_conditional_one():
    def denoise(x, t, cond):
        return (class_conditional(x, t, cond), jnp.broadcast_to(cond[:, None], x.shape))

    x0, v = jax.jit(guidance.classifier_free(denoise, 0.0, NULL))(X, T, LABEL)
    np.testing.assert_array_equal(v, np.broadcast_to(LABEL[:, None], X.shape))
    unconditional = jax.jit(class_conditional)(X, T, jnp.full_like(LABEL, NULL))
    np.testing.assert_allclose(x0, unconditional, rtol=1e-6)
    x0, v = jax.jit(guidance.clip(denoise, -0.1, 0.1))(X, T, LABEL)
    assert np.abs(x0).max() <= 0.1
    assert v.max() == 1.0


def test_clip_by_hand():
    denoise = guidance.clip(lambda x, t, cond: 2.0 * x)
    np.testing.assert_array_equal(denoise(jnp.array([[-3.0, 0.25, 0.5, 9.0]]), None, None), [[-1, 0.5, 1, 1]])


def test_dynamic_threshold_by_hand():
    """|x_0| = 0 ... 4: the 75th percentile is 3.  A sample within [-1, 1] stays as it is."""
    x0 = jnp.array([[0.0, -1.0, 2.0, -3.0, 4.0], [0.1, -0.2, 0.3, 0.5, -0.9]])
    denoise = guidance.dynamic_threshold(lambda x, t, cond: x, 0.75)
    expected = [[0, -1 / 3, 2 / 3, -1, 1], [0.1, -0.2, 0.3, 0.5, -0.9]]
    np.testing.assert_allclose(denoise(x0, None, None), expected, rtol=1e-6)
    pictures = jnp.tile(x0[:, :, None, None], (1, 1, 2, 2))
    tiled = guidance.dynamic_threshold(lambda x, t, cond: x, 1.0)(pictures, None, None)
    np.testing.assert_allclose(tiled[:, :, 1, 1], [[0, -0.25, 0.5, -0.75, 1], expected[1]], rtol=1e-6)


@pytest.mark.parametrize("percentile", [99.5, 0.0])
def test_a_percentile_is_a_share(percentile):
    with pytest.raises(UserError, match=f"percentile={percentile}: choose a share"):
        guidance.dynamic_threshold(lambda x, t, cond: x, percentile)


def test_dropped_conditions():
    """At the given rate, all leaves of a sample together, decided by the sample's key alone."""
    keys = sample_keys(key(7), 4000)
    cond = {"label": jnp.ones(4000, jnp.int32), "prompt": jnp.ones((4000, 3))}
    null = {"label": 10, "prompt": jnp.zeros(3)}
    dropped = guidance.drop_condition(keys, cond, null, 0.2)
    gone = np.asarray(dropped["label"]) == 10
    assert abs(gone.mean() - 0.2) < 4 * np.sqrt(0.16 / 4000)
    np.testing.assert_array_equal(dropped["prompt"], np.where(gone[:, None], 0.0, np.ones((1, 3))))
    assert dropped["label"].dtype == jnp.int32
    part = guidance.drop_condition(keys[50:60], jnp.ones(10, jnp.int32), 10, 0.2)
    np.testing.assert_array_equal(part, dropped["label"][50:60])
    for rate, label in ((0.0, 1), (1.0, 10)):
        assert np.all(guidance.drop_condition(keys[:9], jnp.ones(9, jnp.int32), 10, rate) == label)
