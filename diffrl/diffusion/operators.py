r"""Linear measurements y = A x: masks, blur, downsampling, masked Fourier transforms.

An operator defines A alone; its adjoint is `jax.linear_transpose`.  To go back from y one thing more is needed,

    solve(y, r) = (A A^T + r I)^{-1} y,   r >= 0,

since A^T solve(y, r) is the least-squares solution with penalty r |x|^2 (the mean of x ~ N(0, I) given y = A x + noise
of variance r), and at r = 0 it is A^+ y, the pseudo-inverse.  It is cheap where the eigenvectors of A A^T are at hand:

    mask          A = diag(m)                          A A^T = diag(m^2)
    separable     A = R (x) C, along rows and columns  A A^T = (U (x) V) diag(s (x) c) (U (x) V)^T
    masked FFT    A = M F, F orthonormal               A A^T = M

(Kawar et al., 2022, for the separable ones), and conjugate gradients serve for all others.  What `solve` makes of a
part of y that no x can explain does not matter: A^T forgets it.

Images and measurements are real [B, ...]; complex numbers are two channels, so that the transpose is the adjoint.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffrl.diffusion.process import expand
from diffrl.errors import UserError

Array = jax.Array
Padding = Literal["wrap", "reflect", "symmetric", "edge"]

# Eigenvalues of A A^T below this share of the largest are taken for 0: float32 cannot tell them from it.
CUTOFF = 1e-6


class Operator(NamedTuple):
    """A linear map on images.

    forward: A, [B, *shape] -> [B, *measured].
    shape: of one image, without the batch.
    solve: (y [B, *measured], r) -> (A A^T + r I)^{-1} y, with r >= 0 a number or [B].
    """

    forward: Callable[[Array], Array]
    shape: tuple[int, ...]
    solve: Callable[[Array, ArrayLike], Array]


def adjoint(operator: Operator, y: Array) -> Array:
    """A^T y: [B, *measured] -> [B, *shape]."""
    return _transpose(operator.forward, operator.shape, y)


def pseudo_inverse(operator: Operator, y: Array) -> Array:
    """A^+ y: of all x with the smallest |A x - y|, the one with the smallest |x|."""
    return adjoint(operator, operator.solve(y, 0.0))


def _transpose(forward: Callable[[Array], Array], shape: tuple[int, ...], y: Array) -> Array:
    x = jax.ShapeDtypeStruct((y.shape[0], *shape), y.dtype)
    return jax.linear_transpose(forward, x)(y)[0]


def general(forward: Callable[[Array], Array], shape: tuple[int, ...], iterations: int = 100) -> Operator:
    """Any linear `forward`; `solve` is at most `iterations` of conjugate gradients, each sample's own.

    At r = 0 it converges only for a y that is A of something.
    """

    def solve(y, r):
        def solve_one(y, r):
            def gram(v):
                return forward(_transpose(forward, shape, v[None]))[0] + r * v

            return jax.scipy.sparse.linalg.cg(gram, y, tol=1e-6, maxiter=iterations)[0]

        return jax.vmap(solve_one)(y, jnp.broadcast_to(jnp.asarray(r, y.dtype), y.shape[:1]))

    return Operator(forward, shape, solve)


def mask(known: Array, shape: tuple[int, ...]) -> Operator:
    """Keeps the entries where `known` (0 or 1, broadcasts against the images) and puts 0 for the others."""

    def solve(y, r):
        return jnp.where(known, y, 0.0) / (1.0 + expand(r, y))

    return Operator(lambda x: jnp.where(known, x, 0.0), shape, solve)


def masked_fft(known: Array, channels: int = 2) -> Operator:
    """The frequencies where `known` [H, W], in the order of `jnp.fft.fft2`, of an orthonormal 2-D transform.

    Single-coil MRI.  Images are complex, [H, W, 2], or real, [H, W, 1]; measurements are [H, W, 2].  The spectrum of a
    real image says everything twice unless `known` is one-sided, so A A^T has the eigenvalues 1/2 and 1, and conjugate
    gradients end after two iterations.

    Raises:
      UserError: another number of channels.
    """
    if channels not in (1, 2):
        raise UserError(f"channels={channels}: a masked FFT takes real images (1) or complex ones (2)")
    shape = (*known.shape, channels)

    def forward(x):
        imaginary = x[..., 1] if channels == 2 else jnp.zeros_like(x[..., 0])
        k = jnp.fft.fft2(jax.lax.complex(x[..., 0], imaginary), norm="ortho")
        return jnp.where(known[..., None], jnp.stack([k.real, k.imag], axis=-1), 0.0)

    if channels == 2:
        return Operator(forward, shape, mask(known[..., None], (*known.shape, 2)).solve)
    return general(forward, shape)


# --- Separable operators ---------------------------------------------------------------------------------------------


def separable(rows: np.ndarray, columns: np.ndarray, channels: int) -> Operator:
    """`rows` [h, H] applied along the first axis and `columns` [w, W] along the second of images [H, W, C]."""
    shape = (rows.shape[1], columns.shape[1], channels)
    (s, u), (c, v) = (np.linalg.eigh(matrix @ matrix.T) for matrix in (rows, columns))
    eigenvalues = np.outer(s, c)[..., None]
    kept = eigenvalues > CUTOFF * eigenvalues.max()

    def along(first, second, x):
        first, second = jnp.asarray(first, x.dtype), jnp.asarray(second, x.dtype)
        return jnp.einsum("hi,wj,bijc->bhwc", first, second, x, precision="highest")

    def solve(y, r):
        gain = jnp.where(kept, 1.0 / (jnp.where(kept, eigenvalues, 1.0) + expand(r, y)), 0.0)
        return along(u, v, gain.astype(y.dtype) * along(u.T, v.T, y))

    return Operator(lambda x: along(rows, columns, x), shape, solve)


def blur(shape: tuple[int, int, int], std: float, padding: Padding = "wrap") -> Operator:
    """A Gaussian of `std` pixels, cut at 4 `std`, on images of `shape` [H, W, C].

    padding: how `numpy.pad` continues the image: "wrap" (a circular convolution), "reflect", "symmetric" or "edge".

    Raises:
      UserError: std is not positive.
    """
    if std <= 0:
        raise UserError(f"std={std}: a blur's is positive; what blurs nothing is mask(True, shape)")
    reach = int(4.0 * std + 0.5)

    def kernel(u):
        return np.exp(-0.5 * (u / std) ** 2) * (np.abs(u) <= reach)

    rows, columns = (_filter(size, 1, kernel, reach, padding) for size in shape[:2])
    return separable(rows, columns, shape[2])


def downsample(shape: tuple[int, int, int], factor: int, method: Literal["box", "cubic"] = "box") -> Operator:
    """Images of `shape` [H, W, C] made `factor` times smaller.

    method: "box" averages blocks; "cubic" is antialiased bicubic interpolation (Keys, 1981, a = -1/2), as in Pillow.
    """
    if any(size % factor for size in shape[:2]):
        raise UserError(f"images of {shape[0]}x{shape[1]} cannot be made {factor} times smaller: take a factor of both")
    kernel = {"box": lambda u: 1.0 * (np.abs(u) < 0.5), "cubic": _keys}[method]
    rows, columns = (_filter(size, factor, kernel) for size in shape[:2])
    return separable(rows, columns, shape[2])


def _keys(u: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel."""
    u = np.abs(u)
    near, far = (1.5 * u - 2.5) * u**2 + 1.0, ((2.5 - 0.5 * u) * u - 4.0) * u + 2.0
    return np.where(u <= 1.0, near, np.where(u < 2.0, far, 0.0))


def _filter(size: int, factor: int, kernel: Callable, reach: int = 0, padding: Padding = "edge") -> np.ndarray:
    """The matrix [size / factor, size], float64, of a filter `kernel` of the distance in units of the output's pixels.

    The image is continued by `reach` pixels; a kernel that reaches further is renormalised at the edges.
    """
    centres = (np.arange(size // factor) + 0.5) * factor - 0.5
    taps = np.arange(-reach, size + reach)
    weights = kernel((taps - centres[:, None]) / factor)
    source = np.pad(np.arange(size), reach, mode=padding)  # which pixel a tap reads
    return weights / weights.sum(axis=1, keepdims=True) @ np.eye(size)[source]
