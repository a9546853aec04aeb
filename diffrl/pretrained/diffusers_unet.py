"""Hugging Face diffusers' `UNet2DModel` (google/ddpm-cifar10-32 and its kin) as our U-Net, name by name.

Blocks are called as `diffusers_blocks` says, `qkv` is to_q, to_k and to_v, and `MODULES` has the rest.  The published
networks take t = n - 1 in 0 ... 999 for step n.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffrl.errors import UserError
from diffrl.nets.unet import UNet
from diffrl.pretrained import diffusers_blocks
from diffrl.pretrained.diffusers_blocks import block
from diffrl.pretrained.weights import DIFFUSERS_WEIGHTS, Reader, Weights, fill, kind, modern, open_folder, renamed

WEIGHTS = DIFFUSERS_WEIGHTS  # what `load` looks for

# Options of diffusers that our U-Net does not have, and the values at which both are the same network.
FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "downsample_padding": (0, 1),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2D",),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
}

MODULES = diffusers_blocks.MODULES | {
    "time_embedding": "time_embedding",
    "dense_0": "linear_1",
    "dense_1": "linear_2",
    "label_embedding": "class_embedding",
    "embedding": "time_emb_proj",
}


def load(path: str | pathlib.Path) -> tuple[UNet, dict]:
    """Reads a folder that diffusers' `save_pretrained` wrote: that of a model, or of a pipeline with one in `unet/`.

    Returns:
        The network and its params, for `unet.apply({"params": params}, x, t)`.

    Raises:
        UserError: a file is missing or damaged, or the architecture is not one of ours.
    """
    weights, config = open_folder(path, "unet")
    return unet_from_config(config), params_from_diffusers(weights, config)


def unet_from_config(config: Mapping[str, Any]) -> UNet:
    """The U-Net of a `UNet2DModel`'s config, for inputs of its `sample_size`, on which the attention's places depend.

    Raises:
        UserError: the config asks for something that our U-Net does not have.
    """
    for key, values in FIXED.items():
        if config.get(key, values[-1]) not in values:
            raise _unsupported(key, config[key])
    scale_shift = config.get("resnet_time_scale_shift") == "scale_shift"
    groups = config["norm_num_groups"]
    # The default is no norm at all before the middle attention of a scale-shift network.
    if (config.get("attn_norm_num_groups") or (None if scale_shift else groups)) != groups:
        raise _unsupported("attn_norm_num_groups", config.get("attn_norm_num_groups"))
    widths = config["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise _unsupported("block_out_channels", widths)
    return UNet(
        out_channels=config["out_channels"],
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=config["layers_per_block"],
        attention=_attention_sizes(config),
        head_dim=config.get("attention_head_dim", 8),
        scale_shift=scale_shift,
        resample_blocks=_resamples_by_blocks(config),
        dropout=config.get("dropout", 0.0),
        num_classes=config.get("num_class_embeds"),
        cos_first=config["flip_sin_to_cos"],
        freq_shift=config["freq_shift"],
        groups=groups,
        norm_eps=config["norm_eps"],
        downsample_padding=(config.get("downsample_padding", 1), 1),
    )


def params_from_diffusers(weights: Weights, config: Mapping[str, Any]) -> dict:
    """The parameters of `unet_from_config(config)`, float32, from a `UNet2DModel`'s state dict.

    diffusers has no null class: its row is zero, which leaves the time embedding as it is.

    Raises:
        UserError: a weight is missing, is left over or has another shape than the config says.
    """
    unet, size = unet_from_config(config), config["sample_size"]
    reader = Reader(renamed(weights, modern), "the U-Net of this config")

    def source(path: str, shape: tuple[int, ...]) -> np.ndarray:
        names = _sources(path.split("/"), len(unet.multipliers))
        if path.endswith("/table"):
            return np.pad(reader.fit(names, (shape[0] - 1, shape[1]), turn=False), ((0, 1), (0, 0)))
        return reader.fit(names, shape)

    return fill(unet, [(1, size, size, config["in_channels"]), (1,)], reader, source)


def _attention_sizes(config: Mapping[str, Any]) -> tuple[int, ...]:
    down = [name.startswith("Attn") for name in config["down_block_types"]]
    up = [name.startswith("Attn") for name in config["up_block_types"]]
    if down != up[::-1]:
        raise _unsupported("up_block_types", config["up_block_types"])
    if not isinstance(config.get("sample_size"), int):
        raise _unsupported("sample_size", config.get("sample_size"))
    return tuple(config["sample_size"] >> level for level, attends in enumerate(down) if attends)


def _resamples_by_blocks(config: Mapping[str, Any]) -> bool:
    """Whether residual blocks resample; at the attending levels that is an option beside the block's type."""
    down, up = config["down_block_types"], config["up_block_types"]
    by_type = {"DownBlock2D": "conv", "UpBlock2D": "conv"}
    by_type |= {"ResnetDownsampleBlock2D": "resnet", "ResnetUpsampleBlock2D": "resnet"}
    by_type["AttnDownBlock2D"] = config.get("downsample_type") or "conv"
    by_type["AttnUpBlock2D"] = config.get("upsample_type") or "conv"
    for name in (*down, *up):
        if name not in by_type:
            raise _unsupported("block type", name)
    # The last block of each way does not resample.
    kinds = {by_type[name] for name in (*down[:-1], *up[:-1])}
    if len(kinds) > 1:
        raise _unsupported("down_block_types", f"{down} with both kinds of resampling")
    return kinds == {"resnet"}


def _unsupported(key: str, value: Any) -> UserError:
    return UserError(f"diffusers' {key}={value} has no counterpart in our U-Net; load another checkpoint")


def _sources(path: list[str], levels: int) -> list[str]:
    """The weights of diffusers that make up the parameter at `path`."""
    top, *inner, leaf = path
    prefix = block(top, levels) or MODULES[top]
    if top.endswith("_resample") and not inner:
        prefix += ".conv"
    names = ["to_q", "to_k", "to_v"] if inner == ["qkv"] else [".".join(MODULES[name] for name in inner)]
    return [".".join(filter(None, (prefix, name, kind(leaf)))) for name in names]
