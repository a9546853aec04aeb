"""Convolutional autoencoders of images, as in VQ-GAN (Esser et al., arXiv:2012.09841) and latent diffusion (Rombach
et al., arXiv:2112.10752): residual levels that halve an image and double it again, attention where it is smallest.

The same network serves both kinds.  With `moments` its encoder gives mean and log variance of a Gaussian latent
(`compression.posterior`), without them a latent that `compression.codebook` makes discrete.  `SIZES` has latent
diffusion's networks by the factor by which a side shrinks; f8 is Stable Diffusion's, 83.7 M parameters.

The decoder's last convolution stands apart from the rest: the weight of an adversarial loss is measured there.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from diffrl.errors import UserError
from diffrl.nets.blocks import AttentionBlock, ResidualBlock, conv, double, group_norm

# factor: multipliers, latent channels, levels that attend
SIZES = {4: ((1, 2, 4), 3, ()), 8: ((1, 2, 4, 4), 4, ()), 16: ((1, 1, 2, 2, 4), 16, (4,))}


class Autoencoder(nn.Module):
    """x [B, H, W, image_channels] in [-1, 1] -> its reconstruction, through latents [B, H / f, W / f, code].

    Attributes:
        image_channels: of x.
        latent: channels between encoder and decoder.
        code: channels of the latents where `project` makes them from `latent`; None: as many.
        channels: width of the first level.
        multipliers: width of each level in units of `channels`; each has half the side of the one before.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        attention: levels, from 0 for the finest, whose blocks are each followed by attention.
        middle_attention: whether the middle has it.
        moments: the encoder gives [mean, log variance], 2 x code channels.
        project: a convolution of width 1 behind the encoder and one before the decoder.
        groups, norm_eps: of every group norm; groups must divide every level's width.
        dtype: of convolutions and attention; parameters, norms and softmax are float32.
        remat: recompute each block in the backward pass instead of storing its insides.
    """

    image_channels: int = 3
    latent: int = 4
    code: int | None = None
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    attention: tuple[int, ...] = ()
    middle_attention: bool = True
    moments: bool = True
    project: bool = True
    groups: int = 32
    norm_eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        widths = tuple(self.channels * m for m in self.multipliers)
        _check_groups(widths, self.groups)
        fields = (widths, self.blocks, self.attention, self.middle_attention)
        rest = (self.groups, self.norm_eps, self.dtype, self.remat)
        parts = 2 if self.moments else 1
        self.encoder = Encoder(parts * self.latent, *fields, *rest)
        self.decoder = Decoder(*fields, *rest)
        if self.project:
            self.project_in = nn.Conv(parts * (self.code or self.latent), (1, 1), dtype=self.dtype)
            self.project_out = nn.Conv(self.latent, (1, 1), dtype=self.dtype)
        self.conv_out = nn.Conv(self.image_channels, (3, 3), dtype=self.dtype)

    def encode(self, x: Array) -> Array:
        """x -> latents, or their moments [B, H / f, W / f, 2 code]; float32.

        Raises:
            UserError: the image cannot be halved often enough.
        """
        _check_size(x.shape[1:3], len(self.multipliers))
        h = self.encoder(x)
        return (self.project_in(h) if self.project else h).astype(jnp.float32)

    def features(self, z: Array) -> Array:
        """Latents [B, h, w, code] -> what the last convolution sees, [B, h f, w f, channels]."""
        return self.decoder(self.project_out(z) if self.project else z)

    def last(self, h: Array) -> Array:
        """`features` -> the image, float32, unclipped."""
        return self.conv_out(h).astype(jnp.float32)

    def decode(self, z: Array) -> Array:
        """Latents [B, h, w, code] -> images [B, h f, w f, image_channels] float32, unclipped."""
        return self.last(self.features(z))

    def __call__(self, x: Array) -> Array:
        """The reconstruction through the mean latent, without a codebook; it also makes all parameters."""
        h = self.encode(x)
        return self.decode(jnp.split(h, 2, axis=-1)[0] if self.moments else h)


class Encoder(nn.Module):
    """x [B, H, W, C] -> [B, H / f, W / f, out_channels]; fields as of `Autoencoder`."""

    out_channels: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    middle_attention: bool
    groups: int
    norm_eps: float
    dtype: DTypeLike
    remat: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fields = self.groups, self.norm_eps, self.dtype, self.remat
        h = conv(x, self.widths[0], dtype=self.dtype, name="conv_in")
        for level, width in enumerate(self.widths):
            for i in range(self.blocks):
                h = _residual(h, width, f"down_{level}_block_{i}", *fields)
                if level in self.attention:
                    h = _attend(h, f"down_{level}_attention_{i}", *fields)
            if level < len(self.widths) - 1:
                h = conv(h, width, strides=2, padding=(0, 1), dtype=self.dtype, name=f"down_{level}_resample")
        h = _middle(h, self.middle_attention, *fields)
        h = nn.silu(group_norm(h, self.groups, self.norm_eps, name="norm_out")).astype(self.dtype)
        return conv(h, self.out_channels, dtype=self.dtype, name="conv_out")


class Decoder(nn.Module):
    """z [B, h, w, C] -> [B, h f, w f, widths[0]], all but the last convolution; fields as of `Autoencoder`."""

    widths: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    middle_attention: bool
    groups: int
    norm_eps: float
    dtype: DTypeLike
    remat: bool

    @nn.compact
    def __call__(self, z: Array) -> Array:
        fields = self.groups, self.norm_eps, self.dtype, self.remat
        h = conv(z, self.widths[-1], dtype=self.dtype, name="conv_in")
        h = _middle(h, self.middle_attention, *fields)
        for level, width in reversed(list(enumerate(self.widths))):
            for i in range(self.blocks + 1):
                h = _residual(h, width, f"up_{level}_block_{i}", *fields)
                if level in self.attention:
                    h = _attend(h, f"up_{level}_attention_{i}", *fields)
            if level > 0:
                h = conv(double(h), width, dtype=self.dtype, name=f"up_{level}_resample")
        return nn.silu(group_norm(h, self.groups, self.norm_eps, name="norm_out")).astype(self.dtype)


def _residual(h: Array, width: int, name: str, groups: int, eps: float, dtype: DTypeLike, remat: bool) -> Array:
    block = nn.remat(ResidualBlock) if remat else ResidualBlock
    return block(width, groups, eps, 0.0, False, dtype, name=name)(h)


def _attend(h: Array, name: str, groups: int, eps: float, dtype: DTypeLike, remat: bool) -> Array:
    block = nn.remat(AttentionBlock) if remat else AttentionBlock
    return block(1, groups, eps, dtype, name=name)(h)


def _middle(h: Array, attend: bool, *fields) -> Array:
    h = _residual(h, h.shape[-1], "mid_block_0", *fields)
    if attend:
        h = _attend(h, "mid_attention", *fields)
    return _residual(h, h.shape[-1], "mid_block_1", *fields)


def _check_size(size: tuple[int, ...], levels: int) -> None:
    factor = 2 ** (levels - 1)
    if any(side % factor for side in size):
        shown = "x".join(map(str, size))
        raise UserError(f"an image of {shown} cannot be halved {levels - 1} times; pad it to multiples of {factor}")


def _check_groups(widths: tuple[int, ...], groups: int) -> None:
    if any(width % groups for width in widths):
        best = max(n for n in range(1, groups + 1) if not any(width % n for width in widths))
        raise UserError(f"groups={groups} does not divide the levels' channels {list(widths)}; groups={best} does")
