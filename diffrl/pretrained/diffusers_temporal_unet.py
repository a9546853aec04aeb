"""Hugging Face diffusers' port of Diffuser, `UNet1DModel` (bglick13/hopper-medium-v2-value-function-hor32 and its kin).

Its folder `unet/` holds the planner, `value_function/` the score of plans.

    ours                                diffusers
    embedding/time_{i}                  time_mlp.linear_{i+1}
    down_{l}_block_{i}                  down_blocks.{l}.resnets.{i}
    down_{l}_resample                   down_blocks.{l}.downsample.conv
    mid_block_{i}                       mid_block.resnets.{i}, of a value mid_block.res{i+1}
    mid_{i}_resample                    mid_block.down{i+1}.conv, of a value
    up_{l}_block_{i}                    up_blocks.{L-1-l}.resnets.{i}
    up_{l}_resample                     up_blocks.{L-1-l}.upsample.conv

and `MODULES` for the rest.  Both networks take t = n - 1 in 0 ... T - 1 for step n.  Their plans are actions and then
observations, each normalised by the data set's mean and deviation.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffrl.errors import UserError
from diffrl.nets.temporal_unet import TemporalUNet, TemporalValue
from diffrl.pretrained.weights import Reader, Weights, fill, kind, open_folder

PLANNER, VALUE = "OutConv1DBlock", "ValueFunction"

# Options of diffusers, and the values at which both are the same network; the first is its default, if it is one.
FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("mish",),
    "extra_in_channels": (0,),
    "flip_sin_to_cos": (False,),
    "freq_shift": (1,),
    "layers_per_block": (1,),
    "norm_num_groups": (8,),
    "out_block_type": (PLANNER, VALUE),
    "time_embedding_type": ("positional",),
    "use_timestep_embedding": (True,),
}

MODULES = {
    "out_block/conv": "out_block.final_conv1d_1",
    "out_block/norm": "out_block.final_conv1d_gn",
    "conv_0/conv": "conv_in.conv1d",
    "conv_0/norm": "conv_in.group_norm",
    "conv_1/conv": "conv_out.conv1d",
    "conv_1/norm": "conv_out.group_norm",
    "embedding": "time_emb",
    "shortcut": "residual_conv",
}


def load(path: str | pathlib.Path) -> tuple[TemporalUNet | TemporalValue, dict]:
    """Reads a folder that diffusers' `save_pretrained` wrote: a model's, or a pipeline's, which gives its planner.

    Weights in a .bin: `from_diffusers(weights.open_file(path), config)`.

    Returns:
        The network and its params, for `net.apply({"params": params}, x, t)`.

    Raises:
        UserError: a file is missing or damaged, or the architecture is not one of ours.
    """
    return from_diffusers(*open_folder(path, "unet"))


def from_diffusers(weights: Weights, config: Mapping[str, Any]) -> tuple[TemporalUNet | TemporalValue, dict]:
    """The network of a `UNet1DModel`'s config, and its parameters, float32, from the state dict.

    Raises:
        UserError: the config asks for something that ours do not have; a weight is missing, left over or of another
            shape than the config says.
    """
    net = net_from_config(config)
    levels = len(net.multipliers)
    reader = Reader(weights, "the network of this config")

    def source(path: str, shape: tuple[int, ...]) -> np.ndarray:
        name = f"{_module(path.rpartition('/')[0], levels, config['out_block_type'])}.{kind(path)}"
        if name.endswith("upsample.conv.weight"):  # a transposed convolution's: [inputs, outputs, taps]
            return reader.fit(name, (shape[1], shape[2], shape[0]), turn=False).transpose(2, 0, 1)
        return reader.fit(name, shape)

    # The published value sees all of its plan in one place at the end, as it does here.
    horizon = 1 if config["out_block_type"] == VALUE else 2 ** (levels - 1)
    return net, fill(net, [(1, horizon, config["in_channels"]), (1,)], reader, source)


def net_from_config(config: Mapping[str, Any]) -> TemporalUNet | TemporalValue:
    """The network of a `UNet1DModel`'s config.

    Raises:
        UserError: the config asks for something that our networks do not have.
    """
    widths = config["block_out_channels"]
    is_value = config.get("out_block_type") == VALUE
    wanted = FIXED | {
        "downsample_each_block": (is_value,),
        "mid_block_type": ("ValueFunctionMidBlock1D" if is_value else "MidResTemporalBlock1D",),
        "down_block_types": (["DownResnetBlock1D"] * len(widths),),
        "up_block_types": ([] if is_value else ["UpResnetBlock1D"] * (len(widths) - 1),),
        "block_out_channels": ([width // widths[0] * widths[0] for width in widths],),
    }
    for key, values in wanted.items():
        given = config.get(key, values[0])
        if (list(given) if isinstance(given, tuple) else given) not in values:
            raise UserError(f"diffusers' {key}={given} has no counterpart in our networks; load another checkpoint")
    multipliers = tuple(width // widths[0] for width in widths)
    if is_value:
        return TemporalValue(widths[0], multipliers)
    return TemporalUNet(config["out_channels"], widths[0], multipliers)


def _module(path: str, levels: int, out: str) -> str:
    """diffusers' name of the module at `path`."""
    if path in ("hidden", "out"):
        planner, value = {"hidden": ("", "final_block.0"), "out": ("final_conv1d_2", "final_block.2")}[path]
        return f"out_block.{value if out == VALUE else planner}"
    if path in MODULES:
        return MODULES[path]
    top, _, inner = path.partition("/")
    match top.split("_"):
        case ["embedding"]:
            return f"time_mlp.linear_{int(inner[-1]) + 1}"
        case ["down", level, "resample"]:
            return f"down_blocks.{level}.downsample.conv"
        case ["mid", i, "resample"]:
            return f"mid_block.down{int(i) + 1}.conv"
        case ["up", level, "resample"]:
            return f"up_blocks.{levels - 1 - int(level)}.upsample.conv"
        case ["mid", "block", i]:
            prefix = f"res{int(i) + 1}" if out == VALUE else f"resnets.{i}"
            return f"mid_block.{prefix}.{MODULES[inner]}"
        case ["down", level, "block", i]:
            return f"down_blocks.{level}.resnets.{i}.{MODULES[inner]}"
        case ["up", level, "block", i]:
            return f"up_blocks.{levels - 1 - int(level)}.resnets.{i}.{MODULES[inner]}"
    raise ValueError(path)  # a mistake of the loader, not of the user
