"""Hugging Face diffusers' `AutoencoderKL` (Stable Diffusion's and its kin) and `VQModel` as ours, name by name.

    ours                                        diffusers
    encoder/down_{l}_{block,attention}_{i}      encoder.down_blocks.{l}.{resnets,attentions}.{i}
    encoder/down_{l}_resample                   encoder.down_blocks.{l}.downsamplers.0.conv
    decoder/up_{l}_{block,attention}_{i}        decoder.up_blocks.{L-1-l}.{resnets,attentions}.{i}
    decoder/up_{l}_resample                     decoder.up_blocks.{L-1-l}.upsamplers.0.conv
    {encoder,decoder}/mid_block_{i}, ...        {encoder,decoder}.mid_block.resnets.{i}, ...
    project_in, project_out, conv_out           quant_conv, post_quant_conv, decoder.conv_out
    codes                                       quantize.embedding

Latents are diffusion's after (z - shift_factor) * scaling_factor, 0 and 0.18215 for Stable Diffusion 1 and 2.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffrl.errors import UserError
from diffrl.nets.autoencoder import Autoencoder
from diffrl.pretrained.diffusers_blocks import MODULES, block
from diffrl.pretrained.weights import Reader, Weights, fill, kind, modern, open_folder, renamed

# Options of diffusers, and the values at which both are the same network.
FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "norm_type": ("group",),
    "lookup_from_codebook": (False,),
    "latents_mean": (None,),
    "latents_std": (None,),
}
BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D")
OUTSIDE = {"project_in": "quant_conv", "project_out": "post_quant_conv", "conv_out": "decoder.conv_out"}


class Published(NamedTuple):
    """codes: [K, D] of a VQ model, else None; scale, shift: of its latents, for diffusion."""

    net: Autoencoder
    params: Any
    codes: np.ndarray | None
    scale: float
    shift: float


def load(path: str | pathlib.Path) -> Published:
    """Reads a folder that diffusers' `save_pretrained` wrote: of a model, or of a pipeline with one in vae/ or vqvae/.

    Raises:
        UserError: a file is missing or damaged, the architecture is not ours, a tensor is missing, left over or of
            another shape.
    """
    subfolder = "vqvae" if (pathlib.Path(path) / "vqvae").is_dir() else "vae"
    return from_diffusers(*open_folder(path, subfolder))


def from_diffusers(weights: Weights, config: Mapping[str, Any]) -> Published:
    """From the tensors and the config of an `AutoencoderKL`, or of a `VQModel`, which has `num_vq_embeddings`."""
    net = from_config(config)
    discrete = "num_vq_embeddings" in config
    reader = Reader(renamed(weights, modern), "this autoencoder")
    levels = len(net.multipliers)

    def source(path: str, shape: tuple[int, ...]) -> np.ndarray:
        top, *inner, _ = path.split("/")
        if top in OUTSIDE:
            return reader.fit(f"{OUTSIDE[top]}.{kind(path)}", shape)
        return _half(reader, top, inner, kind(path), shape, levels)

    codes = None
    if discrete:
        codes = reader.fit("quantize.embedding.weight", (config["num_vq_embeddings"], net.code or net.latent), False)
    side = 2 ** (levels - 1)
    params = fill(net, [(1, side, side, net.image_channels)], reader, source)
    return Published(net, params, codes, config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0)


def from_config(config: Mapping[str, Any]) -> Autoencoder:
    """The network of a config; raises UserError where it asks for something that ours does not have."""
    for key, values in FIXED.items():
        if config.get(key, values[0]) not in values:
            raise _unsupported(key, config[key])
    down, up = config["down_block_types"], config["up_block_types"]
    for name in (*down, *up):
        if name not in BLOCKS:
            raise _unsupported("block type", name)
    attends = [name.startswith("Attn") for name in down]
    if attends != [name.startswith("Attn") for name in up][::-1]:
        raise _unsupported("up_block_types", list(up))
    widths = config["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise _unsupported("block_out_channels", list(widths))
    quantised, projected = config.get("use_quant_conv", True), config.get("use_post_quant_conv", True)
    if quantised != projected:
        raise _unsupported("use_post_quant_conv", projected)
    discrete = "num_vq_embeddings" in config
    if config["in_channels"] != config["out_channels"]:
        raise _unsupported("out_channels", config["out_channels"])
    return Autoencoder(
        image_channels=config["out_channels"],
        latent=config["latent_channels"],
        code=config.get("vq_embed_dim") if discrete else None,
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=config["layers_per_block"],
        attention=tuple(level for level, attend in enumerate(attends) if attend),
        middle_attention=config.get("mid_block_add_attention", True),
        moments=not discrete,
        project=projected,
        groups=config["norm_num_groups"],
    )


def _half(reader: Reader, half: str, inner: list[str], end: str, shape: tuple[int, ...], levels: int) -> np.ndarray:
    """A parameter of the encoder or the decoder."""
    place, *rest = inner
    prefix = ".".join((half, block(place, levels) or MODULES[place]))
    if place.endswith("_resample"):
        prefix += ".conv"
    names = ["to_q", "to_k", "to_v"] if rest == ["qkv"] else [".".join(MODULES[name] for name in rest)]
    sources = [".".join(filter(None, (prefix, name, end))) for name in names]
    return _heads(reader, sources, shape) if rest == ["qkv"] else reader.fit(sources, shape)


def _heads(reader: Reader, sources: list[str], shape: tuple[int, ...]) -> np.ndarray:
    """Three projections, which files from before diffusers 0.15 keep as linear maps or convolutions of width 1."""
    inputs, heads = shape[:-3], shape[-2:]
    return np.stack([reader.fit(name, (*inputs, *heads)) for name in sources], axis=-3)


def _unsupported(key: str, value: Any) -> UserError:
    return UserError(f"diffusers' {key}={value} has no counterpart in our autoencoder; load another checkpoint")
