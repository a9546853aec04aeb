"""The convolutional U-Net with attention of DDPM (Ho et al. 2020, arXiv:2006.11239) and ADM (Dhariwal and
Nichol 2021, arXiv:2105.05233).  Signals, images and volumes alike: kernels have as many axes as the input
has spatial ones.

The defaults are DDPM's CIFAR-10 network but for its dropout of 0.1.  ADM is `scale_shift=True,
resample_blocks=True, head_dim=64, cos_first=True, freq_shift=0.0, norm_eps=1e-5`; improved DDPM
(arXiv:2102.09672) the same with `heads=4`, without `resample_blocks` and with `downsample_padding=(1, 1)`.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from diffrl.errors import UserError
from diffrl.nets.blocks import AttentionBlock, ResidualBlock, conv, double, group_norm, halve, zeros
from diffrl.nets.embeddings import LabelEmbedding, TimeEmbedding


class UNet(nn.Module):
    """(x [B, *spatial, C], t [B], cond [B] or None, keys [B] or None) -> [B, *spatial, out_channels] float32.

    Attributes:
        out_channels: channels of the output; twice the input's where a variance is learned.
        channels: width of the first level.
        multipliers: width of each level in units of `channels`; each has half the size of the one before.
        blocks: residual blocks per level on the way down; there is one more on the way up.
        attention: sizes of the first spatial axis at which every block is followed by attention.
        middle_attention: whether the middle has it.
        heads: attention heads.
        head_dim: channels of a head; if given, it rather than `heads` decides.
        scale_shift: the embedding scales and shifts a block's second norm (ADM), not only shifts its input.
        resample_blocks: residual blocks resample (ADM) instead of strided and upsampling convolutions.
        dropout: rate, used where keys are given.
        num_classes: labels are 0 ... num_classes - 1, and num_classes is the null class; None: no labels.
        fourier: Gaussian instead of geometric time frequencies.
        cos_first, freq_shift: conventions of the geometric frequencies, see `embeddings.sinusoidal`.
        groups, norm_eps: of every group norm; groups must divide every level's width.
        downsample_padding: of the strided convolutions; (0, 1) is TensorFlow's SAME and so DDPM's.
        dtype: of convolutions and attention; parameters, norms, softmax and time embedding are float32.
        remat: recompute each block in the backward pass instead of storing its insides.
    """

    out_channels: int
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (16,)
    middle_attention: bool = True
    heads: int = 1
    head_dim: int | None = None
    scale_shift: bool = False
    resample_blocks: bool = False
    dropout: float = 0.0
    num_classes: int | None = None
    fourier: bool = False
    cos_first: bool = False
    freq_shift: float = 1.0
    groups: int = 32
    norm_eps: float = 1e-6
    downsample_padding: tuple[int, int] = (0, 1)
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Array | None = None, keys: Array | None = None) -> Array:
        """The network's output; cond None means the null class for all where `num_classes` is set.

        Raises:
            UserError: the input cannot be halved often enough, groups or heads do not divide a level's
                channels, or labels come to a network without classes.
        """
        widths = [self.channels * m for m in self.multipliers]
        _check_sizes(x.shape[1:-1], len(widths))
        _check_groups(widths, self.groups)
        emb = nn.silu(self._embed(t, cond))

        h = conv(x, self.channels, dtype=self.dtype, name="conv_in")
        skips = [h]
        for level, width in enumerate(widths):
            for i in range(self.blocks):
                h = self._block(h, emb, keys, width, f"down_{level}", i)
                skips.append(h)
            if level < len(widths) - 1:
                h = self._down(h, emb, keys, f"down_{level}_resample")
                skips.append(h)

        h = self._residual(h, emb, keys, widths[-1], "mid_block_0")
        if self.middle_attention:
            h = self._attend(h, "mid_attention")
        h = self._residual(h, emb, keys, widths[-1], "mid_block_1")

        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self._block(h, emb, keys, width, f"up_{level}", i)
            if level > 0:
                h = self._up(h, emb, keys, f"up_{level}_resample")

        h = nn.silu(group_norm(h, self.groups, self.norm_eps, name="norm_out"))
        return conv(h, self.out_channels, dtype=self.dtype, init=zeros, name="conv_out").astype(jnp.float32)

    def _embed(self, t: Array, cond: Array | None) -> Array:
        features = 4 * self.channels
        time = (self.channels, features, self.fourier, self.cos_first, self.freq_shift)
        emb = TimeEmbedding(*time, name="time_embedding")(t)
        if self.num_classes is None:
            if cond is not None:
                raise UserError("a network with num_classes=None was given labels; set num_classes or drop them")
            return emb
        labels = jnp.full(t.shape, self.num_classes) if cond is None else cond
        return emb + LabelEmbedding(self.num_classes, features, name="label_embedding")(labels)

    def _block(self, h: Array, emb: Array, keys: Array | None, width: int, place: str, i: int) -> Array:
        h = self._residual(h, emb, keys, width, f"{place}_block_{i}")
        return self._attend(h, f"{place}_attention_{i}") if h.shape[1] in self.attention else h

    def _residual(self, h: Array, emb: Array, keys: Array | None, width: int, name: str, resample=None) -> Array:
        block = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        fields = (width, self.groups, self.norm_eps, self.dropout, self.scale_shift, self.dtype, resample)
        return block(*fields, name=name)(h, emb, keys)

    def _attend(self, h: Array, name: str) -> Array:
        block = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        heads = _count_heads(h.shape[-1], self.heads, self.head_dim)
        return block(heads, self.groups, self.norm_eps, self.dtype, name=name)(h)

    def _down(self, h: Array, emb: Array, keys: Array | None, name: str) -> Array:
        width = h.shape[-1]
        if self.resample_blocks:
            return self._residual(h, emb, keys, width, name, halve)
        return conv(h, width, strides=2, padding=self.downsample_padding, dtype=self.dtype, name=name)

    def _up(self, h: Array, emb: Array, keys: Array | None, name: str) -> Array:
        width = h.shape[-1]
        if self.resample_blocks:
            return self._residual(h, emb, keys, width, name, double)
        return conv(double(h), width, dtype=self.dtype, name=name)


def _check_sizes(spatial: tuple[int, ...], levels: int) -> None:
    factor = 2 ** (levels - 1)
    if any(size % factor for size in spatial):
        size = "x".join(map(str, spatial))
        remedy = f"pad it to multiples of {factor} or give fewer multipliers"
        raise UserError(f"an input of size {size} cannot be halved {levels - 1} times; {remedy}")


def _check_groups(widths: list[int], groups: int) -> None:
    if any(width % groups for width in widths):
        best = max(n for n in range(1, groups + 1) if not any(width % n for width in widths))
        raise UserError(f"groups={groups} does not divide the levels' channels {widths}; groups={best} does")


def _count_heads(channels: int, heads: int, head_dim: int | None) -> int:
    name, value = ("heads", heads) if head_dim is None else ("head_dim", head_dim)
    if channels % value:
        raise UserError(f"{name}={value} does not divide an attention's {channels} channels; choose a divisor")
    return heads if head_dim is None else channels // head_dim
