"""A transformer along time in the place of `temporal_unet.TemporalUNet`: one token per time step of a plan.

Its blocks are DiT's with adaptive norms (Peebles & Xie, arXiv:2212.09748), so that the network begins as zero and
its blocks as the identity; every step sees every other one in each of them, where a convolution sees its neighbours.
Places are sines and cosines of the step's number (Vaswani et al. 2017, arXiv:1706.03762).
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from diffrl.errors import UserError
from diffrl.nets.blocks import zeros
from diffrl.nets.dit import Block, modulate, xavier
from diffrl.nets.embeddings import sinusoidal
from diffrl.nets.temporal_unet import Condition, PlanEmbedding


class TemporalTransformer(nn.Module):
    """(x [B, H, C], t [B], cond or None, keys or None) -> [B, H, out_channels] float32, for any H; keys are not used.

    cond is {"value": [B, conditions], "known": [B]}, as of `TemporalUNet`.

    Attributes:
        out_channels: channels of the output.
        width: channels of a token, even.
        depth: blocks.
        heads: attention heads; must divide the width.
        mlp_ratio: hidden width of the MLPs in units of `width`.
        conditions: how many numbers a condition has; 0: there are none.
        dtype: of products and attention; parameters, norms, softmax and conditioning are float32.
    """

    out_channels: int
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    conditions: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Condition | None = None, keys: Array | None = None) -> Array:
        """The network's output; cond None means the null condition for all where `conditions` is set.

        Raises:
            UserError: heads do not divide the width, the width is odd, or a condition comes to a network without.
        """
        if self.width % self.heads:
            raise UserError(f"heads={self.heads} does not divide width={self.width}; choose a divisor")
        told = nn.silu(PlanEmbedding(self.width, self.conditions, name="embedding")(t, cond))
        h = nn.Dense(self.width, kernel_init=xavier, dtype=self.dtype, name="token")(x)
        h = h + sinusoidal(jnp.arange(x.shape[1]), self.width).astype(h.dtype)
        for i in range(self.depth):
            block = Block(
                self.width, self.heads, self.mlp_ratio, "adaln_zero", False, 1e-6, self.dtype, name=f"block_{i}"
            )
            h, _ = block(h, told, None)
        norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=jnp.float32)
        shift, scale = jnp.split(nn.Dense(2 * self.width, kernel_init=zeros, name="modulation_out")(told), 2, axis=-1)
        h = modulate(norm(h.astype(jnp.float32)), shift, scale)
        return nn.Dense(self.out_channels, kernel_init=zeros, dtype=self.dtype, name="out")(h).astype(jnp.float32)
