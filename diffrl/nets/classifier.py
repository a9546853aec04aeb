"""A classifier of noisy images: the descending half of the U-Net, told the time (Dhariwal and Nichol 2021,
arXiv:2105.05233, section 4).

One attention block at the lowest resolution and the mean over positions stand for the paper's attention pooling.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from diffrl.errors import UserError
from diffrl.nets.blocks import AttentionBlock, ResidualBlock, conv, group_norm, halve, zeros
from diffrl.nets.embeddings import TimeEmbedding


class NoisyClassifier(nn.Module):
    """(x [B, *spatial, C], t [B], keys [B] or None) -> logits [B, num_classes] float32.

    Attributes:
        num_classes: classes.
        channels: width of the first level.
        multipliers: width of each level in units of `channels`; each has half the size of the one before, so the
            input's sizes are multiples of 2^(levels - 1).
        blocks: residual blocks per level.
        heads: of the attention; divides the last level's width.
        dropout: rate, used where keys are given.
        fourier: Gaussian instead of geometric time frequencies (see `embeddings`).
        groups: of every group norm; divides every level's width.
        dtype: of convolutions and attention; parameters, norms and logits are float32.

    Raises:
        UserError: the input cannot be halved often enough.
    """

    num_classes: int
    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 2
    heads: int = 4
    dropout: float = 0.0
    fourier: bool = False
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, t: Array, keys: Array | None = None) -> Array:
        factor = 2 ** (len(self.multipliers) - 1)
        if any(size % factor for size in x.shape[1:-1]):
            size = "x".join(map(str, x.shape[1:-1]))
            raise UserError(f"a classifier of {size} cannot halve {len(self.multipliers) - 1} times: fewer multipliers")
        emb = nn.silu(TimeEmbedding(self.channels, 4 * self.channels, self.fourier, name="time_embedding")(t))
        h = conv(x, self.channels, dtype=self.dtype, name="conv_in")
        for level, multiplier in enumerate(self.multipliers):
            for i in range(self.blocks):
                # The first block of every further level halves, inside the block as ADM does.
                resample = halve if level > 0 and i == 0 else None
                width = self.channels * multiplier
                fields = (width, self.groups, 1e-6, self.dropout, True, self.dtype, resample)
                h = ResidualBlock(*fields, name=f"level_{level}_block_{i}")(h, emb, keys)
        h = AttentionBlock(self.heads, self.groups, 1e-6, self.dtype, name="attention")(h)
        h = nn.silu(group_norm(h, self.groups, 1e-6, name="norm_out"))
        pooled = h.mean(axis=tuple(range(1, h.ndim - 1)))
        return nn.Dense(self.num_classes, kernel_init=zeros, name="head")(pooled)
