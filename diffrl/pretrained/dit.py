"""Published DiT weights as our parameters: Meta's files, by name as in facebookresearch/DiT, and diffusers' folders.

    ours                     DiT                          diffusers (B = transformer_blocks.{i})
    patch                    x_embedder.proj              pos_embed.proj
    time_embedding/dense_i   t_embedder.mlp.{0,2}         B.norm1.emb.timestep_embedder.linear_{1,2}
    label_embedding          y_embedder.embedding_table   B.norm1.emb.class_embedder.embedding_table
    blocks/modulation        blocks.{i}.adaLN_modulation.1                    B.norm1.linear
    blocks/qkv               blocks.{i}.attn.qkv          B.attn1.{to_q,to_k,to_v}
    blocks/attention_out     blocks.{i}.attn.proj         B.attn1.to_out.0
    blocks/mlp_{0,1}         blocks.{i}.mlp.{fc1,fc2}     B.ff.net.{0.proj,2}
    modulation_out, out      final_layer.{adaLN_modulation.1,linear}          proj_out_1, proj_out_2

diffusers keeps the embeddings once for each block, all alike, and spaces the time's frequencies a little differently:
its networks have freq_shift=1.  The published networks take t = n - 1 in 0 ... 999 for step n, and latents of Stable
Diffusion's autoencoder times 0.18215; half of their output channels are a variance's.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffrl.errors import UserError
from diffrl.nets.dit import DiT, sincos
from diffrl.pretrained.weights import Reader, Weights, fill, kind, open_file, open_folder

# Options of diffusers, and the values at which both are the same network.
FIXED: dict[str, Any] = {
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
}
HEAD_DIM = {384: 64, 768: 64, 1024: 64, 1152: 72}  # of the published widths


def load(path: str | pathlib.Path, sample_size: int = 32) -> tuple[DiT, Any]:
    """The network and its parameters from Meta's .pt, from a .safetensors of the same names, or a folder of diffusers.

    Tensors are read and placed one by one.

    Args:
        sample_size: side of the latents, for Meta's files, which do not tell; the positions they hold must fit.

    Raises:
        UserError: a file is missing or cannot be read, a tensor is missing, left over or of another shape.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return from_diffusers(*open_folder(path, "transformer"))
    if not path.is_file():
        raise UserError(f"{path} is no file; point to a .pt or .safetensors of DiT, or to a folder of diffusers")
    return from_original(open_file(path), sample_size)


def from_original(weights: Weights, sample_size: int) -> tuple[DiT, Any]:
    """From tensors named as in the paper's repository, whose sizes say which network it is."""
    reader = Reader(weights, "this DiT")
    width, channels, patch, _ = reader.shape("x_embedder.proj.weight")
    depth = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)
    if width not in HEAD_DIM and width % 64:
        raise UserError(f"a DiT of width {width} has heads of unknown size: known are {', '.join(map(str, HEAD_DIM))}")
    net = DiT(
        out_channels=reader.shape("final_layer.linear.weight")[0] // patch**2,
        width=width,
        depth=depth,
        heads=width // HEAD_DIM.get(width, 64),
        patch=patch,
        mlp_ratio=reader.shape("blocks.0.mlp.fc1.weight")[0] // width,
        num_classes=reader.shape("y_embedder.embedding_table.weight")[0] - 1,
    )

    names = {
        "patch": "x_embedder.proj",
        "time_embedding/dense_0": "t_embedder.mlp.0",
        "time_embedding/dense_1": "t_embedder.mlp.2",
        "modulation_out": "final_layer.adaLN_modulation.1",
        "out": "final_layer.linear",
        "blocks/modulation": "blocks.{}.adaLN_modulation.1",
        "blocks/attention_out": "blocks.{}.attn.proj",
        "blocks/mlp_0": "blocks.{}.mlp.fc1",
        "blocks/mlp_1": "blocks.{}.mlp.fc2",
    }
    if "pos_embed" in weights:
        _check_positions(reader.take("pos_embed"), sample_size // patch, width, sample_size)
    table = "y_embedder.embedding_table.weight"
    return net, _fill(net, sample_size, channels, reader, names, ["blocks.{}.attn.qkv"], table)


def from_diffusers(weights: Weights, config: Mapping[str, Any]) -> tuple[DiT, Any]:
    """From the tensors and the config of diffusers' `DiTTransformer2DModel`."""
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"diffusers' {key}={config[key]} has no counterpart in our DiT; load another checkpoint")
    patch, heads = config["patch_size"], config["num_attention_heads"]
    net = DiT(
        out_channels=config["out_channels"] or config["in_channels"],
        width=heads * config["attention_head_dim"],
        depth=config["num_layers"],
        heads=heads,
        patch=patch,
        num_classes=config["num_embeds_ada_norm"],
        freq_shift=1.0,
        norm_eps=config["norm_eps"],
    )
    reader = Reader(weights, "this DiT")
    block = "transformer_blocks.{}."

    names = {
        "patch": "pos_embed.proj",
        "time_embedding/dense_0": f"{block.format(0)}norm1.emb.timestep_embedder.linear_1",
        "time_embedding/dense_1": f"{block.format(0)}norm1.emb.timestep_embedder.linear_2",
        "modulation_out": "proj_out_1",
        "out": "proj_out_2",
        "blocks/modulation": f"{block}norm1.linear",
        "blocks/attention_out": f"{block}attn1.to_out.0",
        "blocks/mlp_0": f"{block}ff.net.0.proj",
        "blocks/mlp_1": f"{block}ff.net.2",
    }
    for name in [name for name in weights if ".norm1.emb." in name]:
        first = block.format(0) + name.split(".", 2)[2]
        if name != first and not np.array_equal(reader.take(name), weights[first]):
            raise UserError(f"{name} is not the embedding of the other blocks; our DiT has one for all")
    reader.discard("pos_embed.pos_embed")  # fixed, and ours
    table = f"{block.format(0)}norm1.emb.class_embedder.embedding_table.weight"
    qkv = [f"{block}attn1.to_{name}" for name in "qkv"]
    return net, _fill(net, config["sample_size"], config["in_channels"], reader, names, qkv, table)


def _check_positions(theirs: np.ndarray, side: int, width: int, sample_size: int) -> None:
    ours = np.asarray(sincos(side, side, width))
    if theirs.shape[-2:] != ours.shape:
        raise UserError(
            f"the weights are not for inputs of side {sample_size}: they have {theirs.shape[-2]} positions; "
            "give the sample_size that they were made for"
        )
    if not np.allclose(theirs, ours, atol=1e-3):
        raise UserError("the weights' pos_embed are not DiT's sines and cosines; they belong to another model")


def _fill(
    net: DiT,
    size: int,
    channels: int,
    reader: Reader,
    names: Mapping[str, str],
    qkv: list[str],
    table: str,
) -> dict[str, Any]:
    """The parameters of `net`, every one from `reader`."""

    def source(path: str, shape: tuple[int, ...]) -> np.ndarray:
        place, end = path.rpartition("/")[0], kind(path)
        if path == "label_embedding/table":
            return reader.fit(table, shape, turn=False)
        theirs = qkv if place == "blocks/qkv" else [names[place]]
        if not place.startswith("blocks/"):
            return reader.fit([f"{name}.{end}" for name in theirs], shape)
        rows = np.empty(shape, np.float32)
        for i in range(net.depth):
            rows[i] = reader.fit([f"{name.format(i)}.{end}" for name in theirs], shape[1:])
        return rows

    return fill(net, [(1, size, size, channels), (1,)], reader, source)
