"""The diffusion transformer, DiT (Peebles & Xie, arXiv:2212.09748): patches as tokens, and four ways to tell them more.

The time and the label reach a block (section 3.2 of the paper)

    adaln_zero   as scales, shifts and gates of its two branches, all 0 at first, so that every block begins as the
                 identity,
    adaln        as scales and shifts alone,
    cross        as a sequence of two that every block attends to, after it has attended to the patches,
    in_context   as two more tokens among the patches.

`SIZES` has the paper's widths, depths and heads.  XL with patches of 2 has 675 M parameters, and 118.6 G multiply-adds
on latents 32 x 32 x 4.  Positions are fixed sines and cosines, or rotations of queries and keys (RoPE, Su et al.,
arXiv:2104.09864, half of a head's channels for rows and half for columns); `qk_norm` is Dehghani et al.'s
(arXiv:2302.05442).
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from diffrl.errors import UserError, nearest
from diffrl.nets.attention import attention
from diffrl.nets.embeddings import LabelEmbedding, TimeEmbedding

Conditioning = Literal["adaln_zero", "adaln", "cross", "in_context"]
Positions = Literal["sincos", "rope"]
Remat = Literal["none", "dots", "full"]
CONDITIONINGS = ("adaln_zero", "adaln", "cross", "in_context")
FREQUENCIES = 256  # of the time


# width, depth, heads
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()


class DiT(nn.Module):
    """(x [B, H, W, C], t [B], cond [B] or None, keys [B] or None) -> [B, H, W, out_channels] float32.

    Attributes:
        out_channels: channels of the output; twice the input's where a variance is learned, as in the paper.
        width, depth, heads: see `SIZES`.
        patch: pixels along the side of a patch.
        mlp_ratio: hidden width of the MLPs in units of `width`.
        num_classes: labels are 0 ... num_classes - 1, and num_classes is the null class; None: no labels.
        conditioning, positions, qk_norm: see above.
        freq_shift: of the time's frequencies, see `embeddings.sinusoidal`: 0 in the paper's code, 1 in diffusers'.
        norm_eps: of the layer norms.
        dtype: of products and attention; parameters, norms, softmax and conditioning are float32.
        remat: what the backward pass computes again: nothing, all but products ("dots"), or the whole of each block.
        unroll: a scan whose steps are written out: longer to compile, faster on a CPU, where a loop copies much.
        scan: one block compiled for all, parameters stacked [depth, ...] in "blocks"; else block_0, block_1, ...
    """

    out_channels: int
    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 2
    mlp_ratio: int = 4
    num_classes: int | None = None
    conditioning: Conditioning = "adaln_zero"
    positions: Positions = "sincos"
    qk_norm: bool = False
    freq_shift: float = 0.0
    norm_eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    unroll: bool = False
    scan: bool = True

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Array | None = None, keys: Array | None = None) -> Array:
        """The network's output; cond None means the null class for all where `num_classes` is set.

        Raises:
            UserError: the patch does not divide the input, heads or positions do not fit the width, an option is
                unknown, or labels come to a network without classes.
        """
        self._check(x)
        rows, columns = (size // self.patch for size in x.shape[1:3])
        told = self._embed(t, cond)
        h = nn.Dense(self.width, kernel_init=xavier, dtype=self.dtype, name="patch")(patches(x, self.patch))
        if self.positions == "sincos":
            h = h + sincos(rows, columns, self.width).astype(h.dtype)
        turns = rotations(rows, columns, self.width // self.heads) if self.positions == "rope" else None
        if self.conditioning == "in_context":
            h = jnp.concatenate([h, told.astype(h.dtype)], axis=1)
        h = self._blocks(h, told, turns)[:, : rows * columns]
        if self._adaptive():
            shift, scale = _dense(told, 2, self.width, "modulation_out")
            h = modulate(_norm(h, self.norm_eps, False, "norm_out"), shift, scale)
        else:
            h = _norm(h, self.norm_eps, True, "norm_out")
        outputs = self.patch**2 * self.out_channels
        h = nn.Dense(outputs, kernel_init=zeros, dtype=self.dtype, name="out")(h)
        return unpatched(h.astype(jnp.float32), rows, columns, self.patch)

    def _adaptive(self) -> bool:
        return self.conditioning.startswith("adaln")

    def _embed(self, t: Array, cond: Array | None) -> Array:
        """silu(time + label) [B, D] for adaptive norms, else the sequence of both, [B, 1 or 2, D]; float32."""
        time = TimeEmbedding(
            FREQUENCIES, self.width, cos_first=True, freq_shift=self.freq_shift, name="time_embedding"
        )(t)
        if self.num_classes is None:
            if cond is not None:
                raise UserError("a network with num_classes=None was given labels; set num_classes or drop them")
            return nn.silu(time) if self._adaptive() else time[:, None]
        labels = jnp.full(t.shape, self.num_classes) if cond is None else cond
        label = LabelEmbedding(self.num_classes, self.width, std=0.02, name="label_embedding")(labels)
        return nn.silu(time + label) if self._adaptive() else jnp.stack([time, label], axis=1)

    def _blocks(self, h: Array, told: Array, turns: Any) -> Array:
        block: Any = Block
        if self.remat != "none":
            dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = dots if self.remat == "dots" else None
            block = nn.remat(block, policy=policy, prevent_cse=self.unroll or not self.scan)
        fields = {
            name: getattr(self, name)
            for name in ("width", "heads", "mlp_ratio", "conditioning", "qk_norm", "norm_eps", "dtype")
        }
        if self.scan:
            scanned = nn.scan(
                block,
                {"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.depth,
                unroll=self.depth if self.unroll else 1,
            )
            return scanned(**fields, name="blocks")(h, told, turns)[0]
        for i in range(self.depth):
            h, _ = block(**fields, name=f"block_{i}")(h, told, turns)
        return h

    def _check(self, x: Array) -> None:
        size = "x".join(map(str, x.shape[1:3]))
        if any(side % self.patch for side in x.shape[1:3]):
            raise UserError(f"patch={self.patch} does not divide an input of {size}; choose a divisor or pad it")
        if self.width % self.heads:
            raise UserError(f"heads={self.heads} does not divide width={self.width}; choose a divisor")
        for name, channels in {"sincos": self.width, "rope": self.width // self.heads}.items():
            if self.positions == name and channels % 4:
                raise UserError(
                    f"positions={name} need a multiple of 4 channels, not {channels}; change width or heads"
                )
        options = {
            "conditioning": CONDITIONINGS, "positions": ("sincos", "rope"), "remat": ("none", "dots", "full"),
        }  # fmt: skip
        for field, known in options.items():
            given = getattr(self, field)
            if given not in known:
                raise UserError(f"{field}={given}: {nearest(given, known, 'choose from ' + ', '.join(known))}")


class Block(nn.Module):
    """(h [B, T, D], told, turns) -> (h, None): attention and an MLP beside the tokens; fields as of `DiT`.

    Args of a call: told: see `DiT._embed`; turns: of `rotations`, or None.  Tokens beyond the turns are not turned.
    """

    width: int
    heads: int
    mlp_ratio: int
    conditioning: Conditioning
    qk_norm: bool
    norm_eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, h: Array, told: Array, turns: tuple[Array, Array] | None) -> tuple[Array, None]:
        gates: tuple[Array | float, Array | float] = (1.0, 1.0)
        if self.conditioning == "adaln_zero":
            shift_0, scale_0, gate_0, shift_1, scale_1, gate_1 = _dense(told, 6, self.width, "modulation")
            gates = gate_0[:, None].astype(self.dtype), gate_1[:, None].astype(self.dtype)
        elif self.conditioning == "adaln":
            shift_0, scale_0, shift_1, scale_1 = _dense(told, 4, self.width, "modulation")
        adaptive = self.conditioning.startswith("adaln")

        y = _norm(h, self.norm_eps, not adaptive, "norm_0")
        y = modulate(y, shift_0, scale_0) if adaptive else y
        h = h + gates[0] * self._attend(y.astype(self.dtype), turns)
        if self.conditioning == "cross":
            y = _norm(h, self.norm_eps, True, "norm_cross").astype(self.dtype)
            h = h + self._attend_to(y, told.astype(self.dtype))
        y = _norm(h, self.norm_eps, not adaptive, "norm_1")
        y = modulate(y, shift_1, scale_1) if adaptive else y
        y = self._linear(self.mlp_ratio * self.width, "mlp_0")(y.astype(self.dtype))
        return h + gates[1] * self._linear(self.width, "mlp_1")(nn.gelu(y, approximate=True)), None

    def _attend(self, y: Array, turns: tuple[Array, Array] | None) -> Array:
        shape = 3, self.heads, self.width // self.heads
        qkv = nn.DenseGeneral(shape, kernel_init=xavier, dtype=self.dtype, name="qkv")(y)
        q, k, v = (qkv[:, :, i] for i in range(3))
        if self.qk_norm:
            q, k = (_norm(x, self.norm_eps, True, f"norm_{name}").astype(v.dtype) for name, x in (("q", q), ("k", k)))
        if turns is not None:
            q, k = turned(q, turns), turned(k, turns)
        return self._merge(attention(q, k, v), "attention_out")

    def _attend_to(self, y: Array, told: Array) -> Array:
        shape = self.heads, self.width // self.heads

        def heads(count: int, name: str) -> Callable[[Array], Array]:
            features = shape if count == 1 else (count, *shape)
            return nn.DenseGeneral(features, kernel_init=xavier, dtype=self.dtype, name=name)

        q, kv = heads(1, "cross_q")(y), heads(2, "cross_kv")(told)
        return self._merge(attention(q, kv[:, :, 0], kv[:, :, 1]), "cross_out")

    def _merge(self, y: Array, name: str) -> Array:
        return self._linear(self.width, name)(y.reshape(*y.shape[:2], self.width))

    def _linear(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, kernel_init=xavier, dtype=self.dtype, name=name)


def patches(x: Array, patch: int) -> Array:
    """[B, H, W, C] -> [B, H W / patch^2, patch^2 C], row by row, and so within a patch."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch**2 * channels)


def unpatched(h: Array, rows: int, columns: int, patch: int) -> Array:
    """The inverse of `patches`."""
    h = h.reshape(h.shape[0], rows, columns, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return h.reshape(h.shape[0], rows * patch, columns * patch, -1)


def sincos(rows: int, columns: int, width: int) -> Array:
    """[rows columns, width] float32: a half of column and a half of row, each sines and then cosines, 1 to 1e-4."""
    angles = _angles(rows, columns, width // 4)
    return jnp.concatenate([wave(x) for x in reversed(angles) for wave in (np.sin, np.cos)], axis=-1, dtype=jnp.float32)


def rotations(rows: int, columns: int, channels: int) -> tuple[Array, Array]:
    """Cosines and sines [rows columns, channels / 2] of the angles by which pairs of a head's channels are turned."""
    angles = np.concatenate(_angles(rows, columns, channels // 4), axis=-1)
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def turned(x: Array, turns: tuple[Array, Array]) -> Array:
    """x [B, T, N, H], whose channel i and i + H / 2 are a pair, turned by position; tokens beyond them stay."""
    cos, sin = (part[:, None] for part in turns)
    count = cos.shape[0]
    a, b = jnp.split(x[:, :count].astype(jnp.float32), 2, axis=-1)
    new = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([new, x[:, count:]], axis=1)


def modulate(h: Array, shift: Array, scale: Array) -> Array:
    """h [B, T, D] with a shift and a scale [B, D] for all of its tokens; 0 and 0 change nothing."""
    return h * (1 + scale[:, None]) + shift[:, None]


def _angles(rows: int, columns: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every patch times `count` frequencies, [rows columns, count] each."""
    frequencies = 10_000.0 ** (-np.arange(count) / count)
    row, column = np.divmod(np.arange(rows * columns), columns)
    return row[:, None] * frequencies, column[:, None] * frequencies


def _dense(told: Array, parts: int, width: int, name: str) -> list[Array]:
    """`parts` linear maps of what a block is told, 0 at first."""
    return jnp.split(nn.Dense(parts * width, kernel_init=zeros, name=name)(told), parts, axis=-1)


def _norm(h: Array, eps: float, affine: bool, name: str) -> Array:
    """Layer norm in float32."""
    norm = nn.LayerNorm(epsilon=eps, use_bias=affine, use_scale=affine, dtype=jnp.float32, name=name)
    return norm(h.astype(jnp.float32))
