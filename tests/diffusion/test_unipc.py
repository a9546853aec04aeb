"""UniPC: its integrals against quadrature, orders of convergence on a Gaussian, both ends, edits from outside."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from diffusion_cases import PROCESSES, SPANS, flow_order, key

from diffrl.diffusion import unipc as U
from diffrl.diffusion.samplers import ddim
from diffrl.diffusion.sampling import Sampler, sample, start
from diffrl.errors import UserError

X = jnp.array([[1.0, -0.5], [-2.0, 0.3]])
ORDERS = {order: functools.partial(U.unipc, order=order) for order in (2, 3)}


def denoise(x, t, cond=None):
    """Smooth, of no particular data."""
    return 0.4 * jnp.tanh(x) + jnp.cos(3.0 * t)[:, None]


def integral(h, polynomial):
    return scipy.integrate.quad(lambda u: h * np.exp(-h * (1 - u)) * polynomial(u), 0, 1, epsabs=0, epsrel=1e-12)[0]


# --- The integrals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x64", "rtol"), [(False, 1e-6), (True, 1e-11)])
def test_moments(x64, rtol):
    """All of them, for steps short and long, to the last digits."""
    for h in [1e-7, 1e-4, 0.03, 0.5, 0.999, 1.0, 1.001, 3.0, 20.0]:
        with jax.enable_x64(x64):
            actual = U.moments(jnp.asarray(h))
        h = float(np.asarray(h, np.float64 if x64 else np.float32))
        np.testing.assert_allclose(actual, [integral(h, lambda u: u**k) for k in range(4)], rtol=rtol, err_msg=f"{h}")


def test_moments_of_an_infinite_step():
    np.testing.assert_array_equal(U.moments(jnp.inf), np.ones(4))


@pytest.mark.parametrize("order", [2, 3])
def test_polynomials_up_to_the_order_are_integrated_exactly(order):
    """Corrected: of degree `order`, which UniP alone does for one degree less (and, of order 2, by B(h)'s 1/2)."""
    h = np.array([0.7, 0.4, 1.1])[:order]
    places = -np.append(0.0, np.cumsum(h[1:])) / h[0]
    with jax.enable_x64(True):
        lengths = tuple(map(jnp.asarray, h))
        for degree in range(order + 1):
            values = tuple(jnp.asarray([u**degree]) for u in places)
            predicted = U.prediction(lengths, values)
            corrected = predicted + U.correction(lengths, values, jnp.ones(1))
            assert float(corrected[0]) == pytest.approx(integral(h[0], lambda u: u**degree), rel=1e-12)
            if degree == 1 and order == 2:
                assert float(predicted[0]) == pytest.approx(0.5 * -np.expm1(-h[0]), rel=1e-12)
            elif degree < order:
                assert float(predicted[0]) == pytest.approx(float(corrected[0]), rel=1e-12)


# --- Convergence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", [2, 3])
def test_the_pair_is_one_order_better_than_its_predictor(predictor):
    """Orders 3 and 4 (the error of UniPC-3's first step, of order 3, is too small to be seen)."""
    for process, span in SPANS.items():
        grids = [np.linspace(*span, n + 1) for n in (40, 80, 160)]
        assert flow_order(ORDERS[predictor], process, grids) == pytest.approx(predictor + 1, abs=0.2), process


def test_uneven_grids_keep_the_order():
    """Steps of lengths 1 : 2, in turns."""
    grids = [0.8 - 0.5 * np.append(0.0, np.cumsum(np.tile([1.0, 2.0], n // 2)) / (1.5 * n)) for n in (40, 80, 160)]
    assert flow_order(ORDERS[2], "flow", grids) == pytest.approx(3, abs=0.2)


# --- Ends, and edits from outside ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("process", ["cosine", "flow"])
def test_from_vanishing_alpha_to_vanishing_sigma(order, process):
    process = PROCESSES[process]
    sampler = ORDERS[order](process, denoise)
    np.testing.assert_allclose(sample(sampler, key(), X, jnp.array([1.0, 0.0])), denoise(X, jnp.ones(2)), rtol=1e-6)
    x = start(process, key(0), (4, 2))
    end, (path, info) = sample(sampler, key(), x, jnp.linspace(1.0, 0.0, 7), trace=True)
    assert np.all(np.isfinite(path))
    np.testing.assert_allclose(end, info.x0[-1], rtol=1e-6)  # the last step returns the estimate
    first = sample(ddim(process, denoise), key(), x, jnp.linspace(1.0, 0.0, 7)[:2])
    np.testing.assert_allclose(path[0], first, rtol=1e-5, atol=1e-6)


def test_what_a_wrapper_changes_stays_changed():
    """Moved by 1 after the second of five steps, x ends sigma_s / sigma_t further, as the estimates do not see it."""
    process, grid = PROCESSES["cosine"], jnp.linspace(0.9, 0.2, 6)
    plain = U.unipc(process, lambda x, t, cond: jnp.cos(3.0 * t)[:, None] + 0.0 * x, 3)

    def step(keys, state, t, s, cond):
        state, info = plain.step(keys, state, t, s, cond)
        return state._replace(x=state.x + jnp.where(jnp.isclose(s, grid[2]), 1.0, 0.0)), info

    moved, still = (sample(sampler, key(), X, grid) for sampler in (Sampler(plain.init, step), plain))
    np.testing.assert_allclose(moved - still, process.sigma(grid[5]) / process.sigma(grid[2]), rtol=1e-5)


def test_one_network_call_a_step():
    calls = []

    def counted(x, t, cond):
        calls.append(t.shape)
        return denoise(x, t)

    sampler = U.unipc(PROCESSES["cosine"], counted, 3)
    sampler.step(None, sampler.init(X), jnp.float32(0.8), jnp.float32(0.5), None)
    assert calls == [(2,)]


@pytest.mark.parametrize("order", [1, 4])
def test_other_orders_are_refused(order):
    with pytest.raises(UserError, match="choose 2 or 3"):
        U.unipc(PROCESSES["cosine"], denoise, order)
