"""PatchGAN, a critic that says of every patch of an image whether it is real (Isola et al., arXiv:1611.07004).

Convolutions 4 wide of stride 2, and two of stride 1; with three strided ones a verdict sees 70 x 70 pixels.  The paper
has batch norm, which would couple the images of a batch; group norm takes its place.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from diffrl.errors import UserError
from diffrl.nets.blocks import group_norm

kernel_init = nn.initializers.normal(0.02)


class PatchGAN(nn.Module):
    """x [B, H, W, C] in [-1, 1] -> logits [B, h, w, 1] float32, above 0 for what looks real.

    Attributes:
        channels: of the first convolution; doubled by each one up to eightfold.
        strided: convolutions of stride 2; one of stride 1 follows, and the one that gives the verdict.
        groups: of the norms; must divide `channels`.
        dtype: of the convolutions.
    """

    channels: int = 64
    strided: int = 3
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Raises UserError for an image that is too small for so many convolutions."""
        shortest = min(x.shape[1:3])
        if shortest >> self.strided < 3:
            raise UserError(
                f"a critic with {self.strided} strided convolutions needs images of at least {3 << self.strided} "
                f"pixels, not {shortest}; take fewer"
            )
        if self.channels % self.groups:
            raise UserError(f"groups={self.groups} does not divide the critic's {self.channels} channels")
        h = nn.leaky_relu(self._conv(x, self.channels, 2, "conv_0"), 0.2)
        for i in range(1, self.strided + 1):
            width = self.channels * min(2**i, 8)
            h = self._conv(h, width, 2 if i < self.strided else 1, f"conv_{i}", bias=False)
            h = nn.leaky_relu(group_norm(h, self.groups, 1e-5, name=f"norm_{i}"), 0.2)
        return self._conv(h, 1, 1, "conv_out").astype(jnp.float32)

    def _conv(self, x: Array, width: int, stride: int, name: str, bias: bool = True) -> Array:
        fields: Any = {"use_bias": bias, "dtype": self.dtype, "kernel_init": kernel_init, "name": name}
        return nn.Conv(width, (4, 4), stride, ((1, 1), (1, 1)), **fields)(x)
