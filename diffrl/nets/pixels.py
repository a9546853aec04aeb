"""Networks of pictures: the one of Atari's games and the small one of MinAtar's.

With `dueling` the last layers are two, a value's and the advantages' (Wang et al., arXiv:1511.06581):

    q(x, a) = v(x) + A(x, a) - mean_b A(x, b).

Convolutions are written twice: inside the body of a loop, which is where agents live, XLA runs those gradients on one
of a CPU's threads, up to thirteen times slower than outside.  There they are slices, side by side, and one product.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from diffrl.nets.perceptron import hidden, kernel, numbers


def convolve(x: Array, weights: Array, stride: int) -> Array:
    """x [B, H, W, C] with weights [K, K, C, F], no padding: [B, (H - K) // stride + 1, (W - K) // stride + 1, F]."""

    def native(x: Array, weights: Array) -> Array:
        dimensions = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, weights, (stride, stride), "VALID", dimension_numbers=dimensions)

    return lax.platform_dependent(x, weights, cpu=lambda x, weights: as_product(x, weights, stride), default=native)


def as_product(x: Array, weights: Array, stride: int) -> Array:
    """`convolve` on cells of stride x stride pixels: the pixels of a cell are channels, and the stride is 1."""
    size, _, channels, features = weights.shape
    cells = -(-size // stride)
    high, wide = ((side - size) // stride + 1 for side in x.shape[1:3])
    # A kernel that is no multiple of the stride gets rows and columns of zeros, and the picture what they fall on.
    missing = cells * stride - size
    weights = jnp.pad(weights, ((0, missing), (0, missing), (0, 0), (0, 0)))
    x = jnp.pad(x, ((0, 0), (0, missing), (0, missing), (0, 0)))
    rows, columns = high + cells - 1, wide + cells - 1
    x = x[:, : rows * stride, : columns * stride].reshape(-1, rows, stride, columns, stride, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows, columns, stride * stride * channels)
    weights = weights.reshape(cells, stride, cells, stride, channels, features).transpose(0, 2, 1, 3, 4, 5)
    moved = [x[:, i : i + high, j : j + wide] for i in range(cells) for j in range(cells)]
    return jnp.concatenate(moved, axis=-1) @ weights.reshape(-1, features)


class Conv(nn.Module):
    """[B, H, W, C] -> [B, H', W', features] without padding; its parameters are those of nn.Conv."""

    features: int
    size: int
    stride: int
    orthogonal: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        weights = self.param("kernel", hidden(self.orthogonal), shape)
        return convolve(x, weights, self.stride) + self.param("bias", nn.initializers.zeros_init(), (self.features,))


class ConvNet(nn.Module):
    """Pictures [B, H, W, C] -> [B, outputs] float32; bytes (uint8) are brought to [0, 1].

    Attributes:
        outputs: how many.
        convolutions: (channels, size of the kernel, stride) of each.
        width: of the hidden layer behind them; the two streams of a dueling network have one each.
        dueling: see above.
        out_scale: gain of the last layer's kernel (of the advantages'; the value's is 1).
        orthogonal: kernels are orthogonal, of gain sqrt 2 but for the last; else LeCun's normals.
    """

    outputs: int
    convolutions: tuple[tuple[int, int, int], ...]
    width: int
    dueling: bool = False
    out_scale: float = 1.0
    orthogonal: bool = True

    @nn.compact
    def __call__(self, obs: Array) -> Array:
        h = numbers(obs)
        for i, (features, size, stride) in enumerate(self.convolutions):
            h = nn.relu(Conv(features, size, stride, self.orthogonal, name=f"conv_{i}")(h))
        h = h.reshape(h.shape[0], -1)
        if not self.dueling:
            return self._stream(h, self.outputs, self.out_scale, "")
        value = self._stream(h, 1, 1.0, "_value")
        advantages = self._stream(h, self.outputs, self.out_scale, "_advantage")
        return value + advantages - advantages.mean(axis=-1, keepdims=True)

    def _stream(self, h: Array, outputs: int, scale: float, name: str) -> Array:
        h = nn.relu(nn.Dense(self.width, kernel_init=hidden(self.orthogonal), name=f"hidden{name}")(h))
        return nn.Dense(outputs, kernel_init=kernel(scale, self.orthogonal), name=f"out{name}")(h)


class NatureCNN(ConvNet):
    """For Atari's games, [B, 84, 84, frames] (Mnih et al., 2015): 1.7 million parameters."""

    convolutions: tuple[tuple[int, int, int], ...] = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
    width: int = 512


class MinAtarCNN(ConvNet):
    """For MinAtar's games, [B, 10, 10, channels] (Young & Tian, arXiv:1903.03176): 0.1 million parameters."""

    convolutions: tuple[tuple[int, int, int], ...] = ((16, 3, 1),)
    width: int = 128
