"""What diffusers calls the levels and the blocks that its U-Net and its autoencoders share.

    ours                                diffusers
    down_{l}_{block,attention}_{i}      down_blocks.{l}.{resnets,attentions}.{i}
    down_{l}_resample                   down_blocks.{l}.downsamplers.0
    mid_block_{i}, mid_attention        mid_block.resnets.{i}, mid_block.attentions.0
    up_{l}_{block,attention}_{i}        up_blocks.{L-1-l}.{resnets,attentions}.{i}
    up_{l}_resample                     up_blocks.{L-1-l}.upsamplers.0

and `MODULES` for what lies in them and around.  Both of our ways count levels from the finest.
"""

MODULES = {
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
    "norm_0": "norm1",
    "conv_0": "conv1",
    "norm_1": "norm2",
    "conv_1": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "out": "to_out.0",
}
KINDS = {"block": "resnets", "attention": "attentions"}


def block(name: str, levels: int) -> str | None:
    """Diffusers' name of one of our blocks in a network of so many levels; None for what is no block."""
    match name.split("_"):
        case ["mid", "attention"]:
            return "mid_block.attentions.0"
        case ["mid", "block", i]:
            return f"mid_block.resnets.{i}"
        case ["down", level, "resample"]:
            return f"down_blocks.{level}.downsamplers.0"
        case ["up", level, "resample"]:
            return f"up_blocks.{levels - 1 - int(level)}.upsamplers.0"
        case ["down", level, part, i]:
            return f"down_blocks.{level}.{KINDS[part]}.{i}"
        case ["up", level, part, i]:
            return f"up_blocks.{levels - 1 - int(level)}.{KINDS[part]}.{i}"
    return None
