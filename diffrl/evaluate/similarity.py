r"""How close a picture is to another: PSNR and SSIM (Wang et al., 2004, doi:10.1109/TIP.2003.819861).

    PSNR = 10 log10(range² / mean (a - b)²),
    SSIM = mean (2 mu_a mu_b + c_1)(2 s_ab + c_2) / ((mu_a² + mu_b² + c_1)(s_a² + s_b² + c_2)),  c_i = (k_i range)²,

the moments taken under a Gaussian window of 1.5 pixels, 11 x 11, wherever it lies inside the image.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.errors import UserError

Array = jax.Array
RANGE = 2.0  # of images in [-1, 1]
WIDTH, SIGMA = 11, 1.5
K_1, K_2 = 0.01, 0.03


def psnr(a: Array, b: Array) -> Array:
    """[B] decibels from images [B, H, W, C] in [-1, 1]; infinite for equal ones."""
    error = ((a - b) ** 2).reshape(len(a), -1).mean(-1)
    return 10.0 * jnp.log10(RANGE**2 / error)


def ssim(a: Array, b: Array) -> Array:
    """[B] similarities, at most 1, of images [B, H, W, C] in [-1, 1]; the mean over channels.

    Raises:
        UserError: the images are smaller than the window.
    """
    if min(a.shape[1:3]) < WIDTH:
        raise UserError(f"SSIM needs images of at least {WIDTH} pixels, not {min(a.shape[1:3])}")
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b, both = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2, _blur(a * b) - mean_a * mean_b
    c_1, c_2 = (K_1 * RANGE) ** 2, (K_2 * RANGE) ** 2
    value = (2 * mean_a * mean_b + c_1) * (2 * both + c_2)
    value /= (mean_a**2 + mean_b**2 + c_1) * (var_a + var_b + c_2)
    return value.reshape(len(a), -1).mean(-1)


def _blur(x: Array) -> Array:
    """The Gaussian mean of every window that lies inside, [B, H - 10, W - 10, C]."""
    bell = np.exp(-0.5 * ((np.arange(WIDTH) - WIDTH // 2) / SIGMA) ** 2)
    line = jnp.asarray(bell / bell.sum(), x.dtype)
    channels = x.shape[-1]
    for shape in ((WIDTH, 1, 1, 1), (1, WIDTH, 1, 1)):
        kernel = jnp.broadcast_to(line.reshape(shape), (*shape[:3], channels))
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=channels,
            precision="highest",
        )  # fmt: skip
    return x
