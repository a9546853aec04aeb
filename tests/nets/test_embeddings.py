"""Time and label embeddings: values by hand, the kernel that Fourier features approximate, the null class."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.nets.embeddings import LabelEmbedding, TimeEmbedding, fourier, sinusoidal


def test_ddpm_frequencies():
    """Width 6 under DDPM's convention has periods 2π, 2π 100 and 2π 10000, sines first."""
    row = sinusoidal(jnp.array([5.0]), 6)[0]
    angles = [5.0, 0.05, 0.0005]
    np.testing.assert_allclose(row, [*map(math.sin, angles), *map(math.cos, angles)], atol=1e-6)


def test_adm_frequencies():
    """Without the shift the three frequencies are 1, 10^(-4/3), 10^(-8/3), and cosines come first."""
    row = sinusoidal(jnp.array([5.0]), 6, cos_first=True, freq_shift=0.0)[0]
    angles = [5.0, 5 * 10 ** (-4 / 3), 5 * 10 ** (-8 / 3)]
    np.testing.assert_allclose(row, [*map(math.cos, angles), *map(math.sin, angles)], atol=1e-6)


def test_steps_of_a_long_schedule_stay_apart():
    rows = sinusoidal(jnp.arange(1000.0), 128)
    assert float(jnp.linalg.norm(rows[1:] - rows[:-1], axis=-1).min()) > 0.5


def test_fourier_features_have_the_gaussian_kernel():
    """Bochner: with frequencies N(0, s²), E cos(2πw(t - t')) = exp(-2π²s²(t - t')²)."""
    width, scale = 256, 2.0
    t = jnp.linspace(0.0, 1.0, 21)
    rows = fourier(t, width, scale=scale)
    kernel = np.exp(-2 * (np.pi * scale * (t[:, None] - t[None])) ** 2)
    np.testing.assert_allclose(rows @ rows.T / (width // 2), kernel, atol=0.02)


@pytest.mark.parametrize("embed", [sinusoidal, fourier])
def test_odd_width_is_an_error(embed):
    with pytest.raises(UserError, match="width 7"):
        embed(jnp.zeros(1), 7)


def test_time_embedding_is_float32_for_half_precision_times():
    net = TimeEmbedding(8, 16)
    variables = net.init(jax.random.key(0), jnp.zeros(2))
    out = net.apply(variables, jnp.array([1.0, 2.0], jnp.bfloat16))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, net.apply(variables, jnp.array([1.0, 2.0])), atol=1e-6)


def test_label_embedding_has_a_null_row_and_refuses_others():
    net = LabelEmbedding(3, 4)
    variables = net.init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    out = net.apply(variables, jnp.array([0, 3, 4]))
    np.testing.assert_array_equal(out[:2], variables["params"]["table"][jnp.array([0, 3])])
    assert np.isnan(out[2]).all()
