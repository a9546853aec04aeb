"""The tiny autoencoder of the TAESD family (O. Boer Bohan, github.com/madebyollin/taesd), of 2.7 M parameters.

It is trained to give and take the latents of a large autoencoder, so that it can stand in for it.  Blocks are

    y = relu(x + conv(relu(conv(relu(conv(x))))))

and nothing is normalised, except where `pool` is set, in TAEF2: there each block of the coarsest level first adds to x
conv1x1(relu(groupnorm(conv1x1(x)))), four times as wide inside, whose norm sees the whole image.  The decoder first
bounds latents softly, 3 tanh(z / 3).  The networks' own images are in [0, 1]; ours are in [-1, 1].
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from diffrl.errors import UserError
from diffrl.nets.blocks import double, group_norm
from diffrl.nets.embeddings import dense_init

BOUND = 3.0  # of the latents that the decoder sees
GROUPS, NORM_EPS = 4, 1e-5


class TinyAutoencoder(nn.Module):
    """x [B, H, W, image_channels] in [-1, 1] -> its reconstruction, through latents [B, H / f, W / f, latent].

    Attributes:
        image_channels: of x.
        latent: channels of the latents.
        channels: width of every level.
        blocks: per level, the finest first; each level has half the side of the one before, so f = 2^(levels - 1).
        pool: whether the coarsest level's blocks see the whole image, see above.
        dtype: of convolutions; parameters and norms are float32.
    """

    image_channels: int = 3
    latent: int = 32
    channels: int = 64
    blocks: tuple[int, ...] = (1, 3, 3, 3)
    pool: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        fields = self.channels, self.blocks, self.pool, self.dtype
        self.encoder = Encoder(self.latent, *fields)
        self.decoder = Decoder(self.image_channels, *fields)

    def encode(self, x: Array) -> Array:
        """x -> latents, float32, mostly within `BOUND`; there is no variance.

        Raises:
            UserError: the image cannot be halved often enough.
        """
        factor = 2 ** (len(self.blocks) - 1)
        if any(side % factor for side in x.shape[1:3]):
            size = "x".join(map(str, x.shape[1:3]))
            raise UserError(f"an image of {size} has no latents of a {factor}th; pad it to multiples of {factor}")
        return self.encoder((x + 1) / 2).astype(jnp.float32)

    def decode(self, z: Array) -> Array:
        """Latents [B, h, w, latent] -> images [B, h f, w f, image_channels] float32, unclipped."""
        return 2 * self.decoder(BOUND * jnp.tanh(z / BOUND)).astype(jnp.float32) - 1

    def __call__(self, x: Array) -> Array:
        """The reconstruction; it also makes all parameters."""
        return self.decode(self.encode(x))


class Encoder(nn.Module):
    """x [B, H, W, C] -> [B, H / f, W / f, out_channels]; fields as of `TinyAutoencoder`."""

    out_channels: int
    channels: int
    blocks: tuple[int, ...]
    pool: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        last = len(self.blocks) - 1
        h = _conv(x, self.channels, self.dtype, "conv_in")
        for level, count in enumerate(self.blocks):
            for i in range(count):
                h = Block(self.pool and level == last, self.dtype, name=f"down_{level}_block_{i}")(h)
            if level < last:
                h = _conv(h, self.channels, self.dtype, f"down_{level}_resample", strides=2, use_bias=False)
        return _conv(h, self.out_channels, self.dtype, "conv_out")


class Decoder(nn.Module):
    """Bounded latents [B, h, w, C] -> [B, h f, w f, out_channels]; fields as of `TinyAutoencoder`."""

    out_channels: int
    channels: int
    blocks: tuple[int, ...]
    pool: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, z: Array) -> Array:
        last = len(self.blocks) - 1
        h = nn.relu(_conv(z, self.channels, self.dtype, "conv_in"))
        for level, count in reversed(list(enumerate(self.blocks))):
            for i in range(count):
                h = Block(self.pool and level == last, self.dtype, name=f"up_{level}_block_{i}")(h)
            if level > 0:
                h = _conv(double(h), self.channels, self.dtype, f"up_{level}_resample", use_bias=False)
        return _conv(h, self.out_channels, self.dtype, "conv_out")


class Block(nn.Module):
    """x [B, H, W, C] -> the same shape, never negative."""

    pool: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        if self.pool:
            h = _conv(x, 4 * width, self.dtype, "pool_in", size=1, use_bias=False)
            h = nn.relu(group_norm(h, GROUPS, NORM_EPS, name="pool_norm")).astype(self.dtype)
            x = x + _conv(h, width, self.dtype, "pool_out", size=1, use_bias=False)
        h = nn.relu(_conv(x, width, self.dtype, "conv_0"))
        h = nn.relu(_conv(h, width, self.dtype, "conv_1"))
        return nn.relu(x + _conv(h, width, self.dtype, "conv_2"))


def _conv(
    x: Array, width: int, dtype: DTypeLike, name: str, size: int = 3, strides: int = 1, use_bias: bool = True
) -> Array:
    around = [(size // 2, size // 2)] * 2
    window = (size, size)
    return nn.Conv(width, window, strides, around, use_bias=use_bias, kernel_init=dense_init, dtype=dtype, name=name)(x)
