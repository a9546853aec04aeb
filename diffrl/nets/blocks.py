"""The U-Net's parts on [B, *spatial, C], written once for one, two and three spatial axes.

The residual block is DDPM's (Ho et al. 2020, arXiv:2006.11239), with ADM's two changes as options (Dhariwal
and Nichol 2021, arXiv:2105.05233): the embedding as scale and shift of the second norm, and resampling
inside the block.  Norms run in float32, convolutions in `dtype`; the last layer of every residual branch
starts at zero, so that each block starts as its shortcut.
"""

import zlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from diffrl.errors import UserError
from diffrl.nets.attention import attention
from diffrl.nets.embeddings import dense_init

zeros = nn.initializers.zeros_init()


def conv(
    x: Array, width: int, *, name: str, dtype: DTypeLike, strides: int = 1, padding=(1, 1), init=dense_init
) -> Array:
    """A convolution to `width` channels, 3 wide along every spatial axis of x; for use in compact methods."""
    rank = x.ndim - 2
    fields = {"kernel_init": init, "dtype": dtype, "name": name}
    return nn.Conv(width, (3,) * rank, strides, [padding] * rank, **fields)(x)


def group_norm(x: Array, groups: int, eps: float, *, name: str) -> Array:
    """Group norm (Wu and He 2018, arXiv:1803.08494) over space and each group's channels, in float32."""
    return GroupNorm(groups, eps, name=name)(x)


class GroupNorm(nn.Module):
    """x [B, *spatial, C] -> the same shape, float32; parameters are those of `nn.GroupNorm`.

    That sums over space and a group's channels at once, which XLA does not vectorise on a CPU; here space comes first.
    """

    groups: int
    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, *space, channels = x.shape
        if channels % self.groups:
            raise UserError(f"groups={self.groups} does not divide {channels} channels; choose a divisor")
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        x = x.astype(jnp.float32)
        wide = (batch, *[1] * len(space), channels)

        def mean(x: Array) -> Array:
            of_channels = x.mean(axis=range(1, x.ndim - 1)).reshape(batch, self.groups, -1)
            return jnp.broadcast_to(of_channels.mean(axis=-1, keepdims=True), of_channels.shape).reshape(wide)

        centre = mean(x)
        variance = jnp.maximum(mean(x * x) - centre**2, 0.0)
        return (x - centre) * (lax.rsqrt(variance + self.eps) * scale) + bias


def double(x: Array) -> Array:
    """Nearest-neighbour upsampling by 2 along every spatial axis."""
    for axis in range(1, x.ndim - 1):
        x = jnp.repeat(x, 2, axis=axis)
    return x


def halve(x: Array) -> Array:
    """The mean of every cell of 2 along every spatial axis, whose sizes are even."""
    for axis in range(1, x.ndim - 1):
        pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
        x = pairs.mean(axis=axis + 1)
    return x


class Dropout(nn.Module):
    """Dropout whose mask for sample i is a function of keys[i] and of this layer's place in the network.

    Hence it is the same for every batch size and device count.  keys None: no dropout.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, keys: Array | None) -> Array:
        if keys is None or self.rate == 0.0:
            return x
        # crc32, for Python's own hash of a string changes from process to process.
        place = zlib.crc32("/".join(self.path).encode())

        def keep(key: Array) -> Array:
            return jax.random.bernoulli(jax.random.fold_in(key, place), 1.0 - self.rate, x.shape[1:])

        return jnp.where(jax.vmap(keep)(keys), x / (1.0 - self.rate), 0.0)


class ResidualBlock(nn.Module):
    """x [B, *spatial, C], emb [B, E] or None -> [B, *spatial', features]; None: there is nothing to tell.

    `resample` (`double`, `halve`) acts on both branches, on the residual one after its first norm.
    """

    features: int
    groups: int
    eps: float
    dropout: float
    scale_shift: bool
    dtype: DTypeLike
    resample: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Array, emb: Array | None = None, keys: Array | None = None) -> Array:
        h = nn.silu(group_norm(x, self.groups, self.eps, name="norm_0")).astype(self.dtype)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h, self.features, dtype=self.dtype, name="conv_0")
        h = nn.silu(self._modulated_norm(h, emb)).astype(self.dtype)
        h = Dropout(self.dropout, name="dropout")(h, keys)
        h = conv(h, self.features, dtype=self.dtype, init=zeros, name="conv_1")
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, kernel_init=dense_init, dtype=self.dtype, name="shortcut")(x)
        return x + h

    def _modulated_norm(self, h: Array, emb: Array | None) -> Array:
        if emb is None:
            return group_norm(h, self.groups, self.eps, name="norm_1")
        width = 2 * self.features if self.scale_shift else self.features
        emb = nn.Dense(width, kernel_init=dense_init, dtype=self.dtype, name="embedding")(emb)
        emb = emb.reshape(emb.shape[0], *(1,) * (h.ndim - 2), width)
        if not self.scale_shift:
            return group_norm(h + emb, self.groups, self.eps, name="norm_1")
        scale, shift = jnp.split(emb, 2, axis=-1)
        return group_norm(h, self.groups, self.eps, name="norm_1") * (1 + scale) + shift


class AttentionBlock(nn.Module):
    """x [B, *spatial, C] -> the same shape: every position attends to all; `heads` divides C."""

    heads: int
    groups: int
    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        h = group_norm(x, self.groups, self.eps, name="norm").reshape(x.shape[0], -1, channels)
        # One product for the three; fan-in, because fan-average would count three times the outputs of each.
        init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        split = (3, self.heads, channels // self.heads)
        qkv = nn.DenseGeneral(split, kernel_init=init, dtype=self.dtype, name="qkv")(h)
        h = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(h.shape)
        h = nn.Dense(channels, kernel_init=zeros, dtype=self.dtype, name="out")(h)
        return x + h.reshape(x.shape)
