"""Operators against their dense matrices (adjoint, pseudo-inverse, ridge), and against scipy, Pillow and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from diffusion_cases import key
from PIL import Image

from diffrl.diffusion import operators
from diffrl.errors import UserError

SHAPE = (6, 8, 2)
RNG = np.random.default_rng(0)
KNOWN = RNG.random((6, 8)) < 0.5
OPERATORS = {
    "mask": lambda: operators.mask(KNOWN[..., None], SHAPE),
    "blur, wrap": lambda: operators.blur(SHAPE, 0.6),
    "blur, reflect": lambda: operators.blur(SHAPE, 0.6, "reflect"),
    "box": lambda: operators.downsample(SHAPE, 2),
    "cubic": lambda: operators.downsample(SHAPE, 2, "cubic"),
    "FFT of complex images": lambda: operators.masked_fft(KNOWN),
    "FFT of real images": lambda: operators.masked_fft(KNOWN, channels=1),
    "general": lambda: operators.general(lambda x: x[:, ::2] - 0.3 * x[:, 1::2], SHAPE),
}


@pytest.fixture(params=OPERATORS, scope="module")
def case(request):
    """An operator and its matrix A, float64 [measured, pixels]."""
    operator = OPERATORS[request.param]()
    size = np.prod(operator.shape)
    columns = np.asarray(operator.forward(jnp.eye(size).reshape(size, *operator.shape)), np.float64)
    return operator, columns.reshape(size, -1).T


def flat(x):
    return np.asarray(x, np.float64).reshape(len(x), -1)


def test_adjoint(case):
    """<A x, y> = <x, A^T y>, and A^T is the transposed matrix."""
    operator, matrix = case
    x = jax.random.normal(key(0), (3, *operator.shape))
    ax = operator.forward(x)
    y = jax.random.normal(key(1), ax.shape)
    back = operators.adjoint(operator, y)
    assert back.shape == x.shape
    np.testing.assert_allclose((flat(ax) * flat(y)).sum(1), (flat(x) * flat(back)).sum(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(flat(back), flat(y) @ matrix, atol=1e-5)


def test_pseudo_inverse(case):
    """numpy's, from the singular values; and A A^+ y = y for what was measured."""
    operator, matrix = case
    y = operator.forward(jax.random.normal(key(2), (3, *operator.shape)))
    x = jax.jit(lambda y: operators.pseudo_inverse(operator, y))(y)
    np.testing.assert_allclose(flat(x), flat(y) @ np.linalg.pinv(matrix, rcond=1e-4).T, atol=2e-4)
    np.testing.assert_allclose(operator.forward(x), y, atol=1e-5)


def test_ridge(case):
    """A^T (A A^T + r I)^{-1} y of any y, with an r for each sample."""
    operator, matrix = case
    r = np.array([0.01, 0.3, 10.0])
    y = operator.forward(jax.random.normal(key(3), (3, *operator.shape)))
    y = y + 0.1 * jax.random.normal(key(4), y.shape)
    x = jax.jit(lambda y, r: operators.adjoint(operator, operator.solve(y, r)))(y, jnp.asarray(r, jnp.float32))
    gram = matrix @ matrix.T
    expected = [
        matrix.T @ np.linalg.solve(gram + s * np.eye(len(gram)), row) for s, row in zip(r, flat(y), strict=True)
    ]
    np.testing.assert_allclose(flat(x), expected, atol=2e-4)


def test_conjugate_gradients_are_each_samples_own():
    """A sample's solution does not depend on its neighbours in the batch, easy or hard."""
    operator = operators.general(lambda x: x[:, 1:] - x[:, :-1], (12,))
    y = operator.forward(jnp.stack([jnp.zeros(12), jax.random.normal(key(0), (12,)), jnp.arange(12.0) ** 2]))
    invert = jax.jit(lambda y: operators.pseudo_inverse(operator, y))
    together, alone = invert(y), [invert(row[None])[0] for row in y]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert not np.asarray(together[0]).any()


@pytest.mark.parametrize(("padding", "scipys"), [("wrap", "wrap"), ("reflect", "mirror"), ("symmetric", "reflect")])
def test_blur_is_scipys(padding, scipys):
    x = RNG.normal(size=(9, 7, 2)).astype(np.float32)
    expected = scipy.ndimage.gaussian_filter(x.astype(np.float64), (1.1, 1.1, 0), mode=scipys, truncate=4.0)
    np.testing.assert_allclose(operators.blur(x.shape, 1.1, padding).forward(x[None])[0], expected, atol=1e-5)


@pytest.mark.parametrize(("method", "pillows"), [("box", Image.Resampling.BOX), ("cubic", Image.Resampling.BICUBIC)])
@pytest.mark.parametrize("factor", [2, 3])
def test_downsampling_is_pillows(method, pillows, factor):
    x = RNG.normal(size=(12, 18)).astype(np.float32)
    expected = np.asarray(Image.fromarray(x).resize((18 // factor, 12 // factor), pillows))
    actual = operators.downsample((12, 18, 1), factor, method).forward(x[None, ..., None])[0, ..., 0]
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_masked_fft_is_numpys():
    """Orthonormal, of complex numbers in two channels; where nothing is measured, 0."""
    x = RNG.normal(size=(1, *SHAPE)).astype(np.float32)
    spectrum = np.fft.fft2(x[0, ..., 0] + 1j * x[0, ..., 1]) / np.sqrt(6 * 8)
    expected = np.where(KNOWN[..., None], np.stack([spectrum.real, spectrum.imag], -1), 0.0)
    np.testing.assert_allclose(operators.masked_fft(KNOWN).forward(x)[0], expected, atol=1e-5)


def test_sizes_that_do_not_divide_are_one_line():
    with pytest.raises(UserError, match="8x6 cannot be made 4 times smaller"):
        operators.downsample((8, 6, 1), 4)


@pytest.mark.parametrize("channels", [0, 3])
def test_masked_fft_takes_real_or_complex_images(channels):
    with pytest.raises(UserError, match=f"channels={channels}: a masked FFT takes real images"):
        operators.masked_fft(KNOWN, channels)


@pytest.mark.parametrize("std", [0.0, -1.0])
def test_a_blur_without_width_is_one_line(std):
    with pytest.raises(UserError, match=f"std={std}: a blur's is positive"):
        operators.blur(SHAPE, std)
