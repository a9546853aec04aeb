"""The networks that image experiments choose from: the U-Net and the diffusion transformer."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from diffrl.config import leaf
from diffrl.errors import UserError
from diffrl.nets.dit import SIZES, DiT
from diffrl.nets.unet import UNet
from diffrl.recipes import denoising


@dataclasses.dataclass
class UNetConfig:
    """The network; see `diffrl.nets.unet.UNet` for what each field means."""

    channels: int = leaf(128, at_least=1)
    multipliers: tuple[int, ...] = leaf((1, 2, 2, 2), at_least=1)
    blocks: int = leaf(2, at_least=0)
    attention: tuple[int, ...] = leaf((16,), "sizes of the first spatial axis at which every block attends")
    middle_attention: bool = True
    heads: int = leaf(1, at_least=1)
    head_dim: int | None = leaf(None, at_least=1)
    scale_shift: bool = False
    resample_blocks: bool = False
    dropout: float = leaf(0.0, at_least=0, below=1)
    fourier: bool = False
    groups: int = leaf(32, at_least=1)
    dtype: str = leaf("float32", "of convolutions and attention: float32, or bfloat16 on GPU and TPU")
    remat: bool = leaf(False, "recompute blocks in the backward pass: less memory, more time")


@dataclasses.dataclass
class DiTConfig:
    """The transformer; see `diffrl.nets.dit.DiT` for what each field means."""

    size: str = leaf("", "S, B, L or XL: the paper's width, depth and heads, in place of the next three")
    width: int = leaf(128, at_least=1)
    depth: int = leaf(6, at_least=1)
    heads: int = leaf(4, at_least=1)
    patch: int = leaf(2, "pixels along the side of a patch", at_least=1)
    mlp_ratio: int = leaf(4, at_least=1)
    conditioning: str = leaf("adaln_zero", "adaln_zero, adaln, cross or in_context")
    positions: str = leaf("sincos", "sincos or rope")
    qk_norm: bool = False
    dtype: str = leaf("float32", "of products and attention: float32, or bfloat16 on GPU and TPU")
    remat: str = leaf("none", "what the backward pass computes again: none, dots (all but products) or full", free=True)
    unroll: bool = leaf(False, "write the scan over blocks out: longer to compile, faster on a CPU", free=True)


def make_unet(config: UNetConfig, channels: int, num_classes: int | None, shape: tuple[int, ...]) -> UNet:
    """The U-Net for inputs [H, W, C] of `shape`.

    Raises:
        UserError: levels or attention that such an input does not have.
    """
    if not config.multipliers:
        raise UserError("unet.multipliers=(): give one for each level, as in (1,2,2)")
    sizes = [shape[0] // 2**level for level in range(len(config.multipliers))]
    absent = [size for size in config.attention if size not in sizes]
    if absent:
        raise UserError(
            f"unet.attention={config.attention}: images of {shape[0]} rows never have {absent[0]}; "
            f"choose from {', '.join(map(str, sizes))}, or () for none"
        )
    fields = dataclasses.asdict(config) | {"dtype": _dtype("unet", config.dtype)}
    return UNet(channels, num_classes=num_classes, **fields)


def make_dit(config: DiTConfig, channels: int, num_classes: int | None) -> DiT:
    """The transformer; raises UserError for an unknown size."""
    fields: dict[str, Any] = dataclasses.asdict(config) | {"dtype": _dtype("dit", config.dtype)}
    size = fields.pop("size")
    if size:
        width, depth, heads = denoising.choose("dit.size", size, SIZES)
        fields |= {"width": width, "depth": depth, "heads": heads}
    return DiT(channels, num_classes=num_classes, **fields)


def _dtype(section: str, name: str) -> Any:
    return denoising.choose(f"{section}.dtype", name, {"float32": jnp.float32, "bfloat16": jnp.bfloat16})
