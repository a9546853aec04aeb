"""The networks of planning by diffusion on trajectories [B, H, C], one row per time step.

`TemporalUNet` is Diffuser's denoiser (Janner et al. 2022, arXiv:2205.09991), convolutional along time alone, so that
what it learns holds at every place of a plan and the horizon is a matter of the noise that it is given.
`TemporalValue` is the half of it that scores a noisy plan.  Decision Diffuser (Ajay et al. 2023, arXiv:2211.15657)
tells the same network a return, constraints or skills: numbers, and whether they are known, for guidance without a
classifier.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from diffrl.errors import UserError
from diffrl.nets.blocks import group_norm
from diffrl.nets.embeddings import sinusoidal

Condition = dict[str, Array]

# torch's default, with which the papers' networks begin: uniform of variance 1 / (3 fan-in).
torch_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class TemporalUNet(nn.Module):
    """(x [B, H, C], t [B], cond or None, keys or None) -> [B, H, out_channels] float32; keys are not used.

    cond is {"value": [B, conditions], "known": [B]}: 0 for "known" is the null condition, whatever the value.

    Attributes:
        out_channels: channels of the output: of the input, or without its actions.
        channels: width of the time embedding, and of the first level in units of its multiplier.
        multipliers: width of each level in units of `channels`; each has half the length of the one before.
            Diffuser's are (1, 4, 8) on mazes and (1, 2, 4, 8) on D4RL's locomotion with horizons of 32.
        kernel: length of the convolutions, odd.
        groups: of every group norm; must divide every level's width.
        conditions: how many numbers a condition has; 0: there are none.
        dtype: of convolutions; parameters, norms and embeddings are float32.
    """

    out_channels: int
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 4, 8)
    kernel: int = 5
    groups: int = 8
    conditions: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Condition | None = None, keys: Array | None = None) -> Array:
        """The network's output; cond None means the null condition for all where `conditions` is set.

        Raises:
            UserError: the horizon cannot be halved often enough, groups do not divide a level's width, the kernel is
                even, or a condition comes to a network without or has another length.
        """
        widths = [self.channels * m for m in self.multipliers]
        _check_horizon(x.shape[1], len(widths) - 1)
        _check_kernel(self.kernel)
        _check_groups(widths, self.groups)
        emb = mish(PlanEmbedding(self.channels, self.conditions, name="embedding")(t, cond))

        def block(h: Array, width: int, name: str) -> Array:
            return TemporalBlock(width, self.kernel, self.groups, self.dtype, name=name)(h, emb)

        h, skips = x.astype(self.dtype), []
        for level, width in enumerate(widths):
            h = block(block(h, width, f"down_{level}_block_0"), width, f"down_{level}_block_1")
            skips.append(h)
            if level < len(widths) - 1:
                h = Conv(width, 3, self.dtype, stride=2, name=f"down_{level}_resample")(h)

        h = block(block(h, widths[-1], "mid_block_0"), widths[-1], "mid_block_1")

        # Down to the width of the level below; the first level's own skip is not used (nor is it in the paper's code).
        for level in range(len(widths) - 1, 0, -1):
            h = jnp.concatenate([h, skips[level]], axis=-1)
            for i in range(2):
                h = block(h, widths[level - 1], f"up_{level}_block_{i}")
            h = Lengthen(self.dtype, name=f"up_{level}_resample")(h)

        h = ConvBlock(widths[0], self.kernel, self.groups, self.dtype, name="out_block")(h)
        return Conv(self.out_channels, 1, self.dtype, name="out")(h).astype(jnp.float32)


class TemporalValue(nn.Module):
    """(x [B, H, C], t [B], cond or None, keys or None) -> [B] float32: a score of noisy plans; keys are not used.

    Every level halves the length, odd ones to (H + 1) / 2, so that any horizon will do; but the last layers see all
    that is left of it, hence parameters fit one horizon.  Attributes are those of `TemporalUNet`.
    """

    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    kernel: int = 5
    groups: int = 8
    conditions: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Condition | None = None, keys: Array | None = None) -> Array:
        """The scores; cond None means the null condition for all where `conditions` is set.

        Raises:
            UserError: groups do not divide a level's width, the kernel is even, or a condition comes to a network
                without or has another length.
        """
        last = self.channels * self.multipliers[-1]
        widths = [self.channels * m for m in self.multipliers]
        _check_kernel(self.kernel)
        _check_groups([*widths, last // 2, last // 4], self.groups)
        told = PlanEmbedding(self.channels, self.conditions, name="embedding")(t, cond)
        emb = mish(told)

        def block(h: Array, width: int, name: str) -> Array:
            return TemporalBlock(width, self.kernel, self.groups, self.dtype, name=name)(h, emb)

        h = x.astype(self.dtype)
        for level, width in enumerate(widths):
            h = block(block(h, width, f"down_{level}_block_0"), width, f"down_{level}_block_1")
            h = Conv(width, 3, self.dtype, stride=2, name=f"down_{level}_resample")(h)
        for i, width in enumerate((last // 2, last // 4)):
            h = block(h, width, f"mid_block_{i}")
            h = Conv(width, 3, self.dtype, stride=2, name=f"mid_{i}_resample")(h)

        # Channels before time, as the paper's code flattens them, so that its weights fit.
        h = h.astype(jnp.float32).swapaxes(1, 2).reshape(h.shape[0], -1)
        hidden = nn.Dense(h.shape[-1] // 2, kernel_init=torch_init, name="hidden")
        h = mish(hidden(jnp.concatenate([h, told], axis=-1)))
        return nn.Dense(1, kernel_init=torch_init, name="out")(h)[:, 0]


class PlanEmbedding(nn.Module):
    """(t [B], cond or None) -> [B, width], or [B, 2 width] where there are conditions: time, then condition; float32.

    An unknown condition is zeros after the perceptron, not before it, so that no value is mistaken for it.
    """

    width: int
    conditions: int = 0

    @nn.compact
    def __call__(self, t: Array, cond: Condition | None) -> Array:
        time = mish(self._dense(4 * self.width, "time_0")(sinusoidal(t, self.width)))
        time = self._dense(self.width, "time_1")(time)
        if not self.conditions:
            if cond is not None:
                raise UserError("a network with conditions=0 was given a condition; set conditions or drop it")
            return time
        value = jnp.zeros((t.shape[0], self.conditions)) if cond is None else cond["value"]
        known = jnp.zeros(t.shape[0]) if cond is None else cond["known"].astype(jnp.float32)
        if value.shape != (t.shape[0], self.conditions):
            wanted = f"[{t.shape[0]}, {self.conditions}]"
            raise UserError(
                f"a condition of shape {list(value.shape)} came where {wanted} is due; set conditions to fit"
            )
        h = mish(self._dense(self.width, "condition_0")(value.astype(jnp.float32)))
        h = mish(self._dense(4 * self.width, "condition_1")(h))
        h = self._dense(self.width, "condition_2")(h) * known[:, None]
        return jnp.concatenate([time, h], axis=-1)

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, kernel_init=torch_init, name=name)


class ConvBlock(nn.Module):
    """x [B, H, C] -> [B, H, features]: convolution, group norm, mish."""

    features: int
    kernel: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = Conv(self.features, self.kernel, self.dtype, name="conv")(x)
        return mish(group_norm(h, self.groups, 1e-5, name="norm")).astype(self.dtype)


class TemporalBlock(nn.Module):
    """x [B, H, C], emb [B, E] -> [B, H, features]: two convolutions, the embedding added between, and a shortcut."""

    features: int
    kernel: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, emb: Array) -> Array:
        fields = (self.features, self.kernel, self.groups, self.dtype)
        shift = nn.Dense(self.features, kernel_init=torch_init, name="embedding")(emb)
        h = ConvBlock(*fields, name="conv_0")(x) + shift[:, None].astype(self.dtype)
        h = ConvBlock(*fields, name="conv_1")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, self.dtype, name="shortcut")(x)
        return x + h


class Conv(nn.Module):
    """x [B, H, C] -> [B, H', features] with zeros beside x; a stride of 2 halves H, an odd one to (H + 1) / 2."""

    features: int
    kernel: int
    dtype: DTypeLike
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", torch_init, (self.kernel, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return convolve(x, kernel.astype(self.dtype), self.stride, self.kernel // 2) + bias.astype(self.dtype)


class Lengthen(nn.Module):
    """x [B, H, C] -> [B, 2 H, C]: the transposed convolution of 4 taps, y[2 i + j - 1] += x[i] kernel[j].

    Even and odd places of y each see two neighbours in x, so it is an ordinary convolution of 2 taps to both at once.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, length, width = x.shape
        kernel = self.param("kernel", torch_init, (4, width, width)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (width,))
        # [tap, C, parity, features]: x[i - 1] and x[i] reach 2 i through taps 3 and 1; x[i] and x[i + 1] 2 i + 1.
        both = kernel[::-1].reshape(2, 2, width, width).swapaxes(1, 2).reshape(2, width, 2 * width)
        y = convolve(x, both, 1, 1)
        y = jnp.stack([y[:, :-1, :width], y[:, 1:, width:]], axis=2)
        return y.reshape(batch, 2 * length, width) + bias.astype(self.dtype)


def convolve(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """x [B, H, C] with kernel [K, C, D], `padding` zeros before and after: [B, (H + 2 padding - K) // stride + 1, D].

    On a CPU, where there are gradients, a product of all windows: those of XLA's convolution are left to a kernel that
    is thirty times slower in a loop, and whole epochs are scanned.
    """
    product, plain = (functools.partial(form, stride=stride, padding=padding) for form in (unfolded, convolved))
    either = jax.custom_jvp(plain)
    either.defjvp(lambda primals, tangents: jax.jvp(product, primals, tangents))
    return lax.platform_dependent(x, kernel, cpu=either, default=plain)


def convolved(x: Array, kernel: Array, *, stride: int, padding: int) -> Array:
    """`convolve` as XLA's convolution."""
    return lax.conv_general_dilated(x, kernel, (stride,), [(padding, padding)], dimension_numbers=("NWC", "WIO", "NWC"))


def unfolded(x: Array, kernel: Array, *, stride: int, padding: int) -> Array:
    """`convolve` as one product, of rows that are windows of x."""
    taps, channels, features = kernel.shape
    x = jnp.pad(x, ((0, 0), (padding, padding), (0, 0)))
    length = (x.shape[1] - taps) // stride + 1
    last = stride * (length - 1) + 1
    windows = jnp.concatenate([x[:, j : j + last : stride] for j in range(taps)], axis=-1)
    y = windows.reshape(-1, taps * channels) @ kernel.reshape(-1, features)
    return y.reshape(x.shape[0], length, features)


def mish(x: Array) -> Array:
    """x tanh(softplus(x)) (Misra, arXiv:1908.08681), by a single exponential e: tanh(log(1 + e)) = n / (n + 2)."""
    e = jnp.exp(jnp.minimum(x, 20.0))  # beyond, n / (n + 2) is 1 in float32
    n = e * (e + 2)
    return x * (n / (n + 2))


def _check_kernel(kernel: int) -> None:
    if kernel % 2 == 0:
        raise UserError(f"kernel={kernel} has no middle; make it odd")


def _check_horizon(horizon: int, halvings: int) -> None:
    factor = 2**halvings
    if horizon % factor:
        near = [n for n in (horizon // factor * factor, -(-horizon // factor) * factor) if n]
        take = " or ".join(map(str, near))
        raise UserError(f"horizon {horizon} cannot be halved {halvings} times; take {take}, or fewer multipliers")


def _check_groups(widths: list[int], groups: int) -> None:
    if any(width % groups for width in widths):
        best = max(n for n in range(1, groups + 1) if not any(width % n for width in widths))
        raise UserError(f"groups={groups} does not divide the levels' channels {widths}; groups={best} does")
