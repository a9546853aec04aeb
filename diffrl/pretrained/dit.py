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

import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from diffrl.errors import UserError
from diffrl.nets.dit import DiT, sincos

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Options of diffusers, and the values at which both are the same network.
FIXED: dict[str, Any] = {
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
}
HEAD_DIM = {384: 64, 768: 64, 1024: 64, 1152: 72}  # of the published widths

Weights = Mapping[str, np.ndarray]


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
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        for name in ("config.json", DIFFUSERS_WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"{folder} has no {name}; point to a folder of diffusers' save_pretrained")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return from_diffusers(_open_safetensors(folder / DIFFUSERS_WEIGHTS), config)
    if not path.is_file():
        raise UserError(f"{path} is no file; point to a .pt or .safetensors of DiT, or to a folder of diffusers")
    weights = _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)
    return from_original(weights, sample_size)


def from_original(weights: Weights, sample_size: int) -> tuple[DiT, Any]:
    """From tensors named as in the paper's repository, whose sizes say which network it is."""
    reader = _Reader(weights)
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

    def qkv(i: int, kind: str) -> np.ndarray:
        return reader.take(f"blocks.{i}.attn.qkv.{kind}")

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
    params = _fill(net, sample_size, channels, reader, names, qkv, ["y_embedder.embedding_table.weight"])
    return net, params


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
    reader = _Reader(weights)
    block = "transformer_blocks.{}."

    def qkv(i: int, kind: str) -> np.ndarray:
        return np.concatenate([reader.take(f"{block.format(i)}attn1.to_{name}.{kind}") for name in "qkv"])

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
    tables = [f"{block.format(0)}norm1.emb.class_embedder.embedding_table.weight"]
    return net, _fill(net, config["sample_size"], config["in_channels"], reader, names, qkv, tables)


def _check_positions(theirs: np.ndarray, side: int, width: int, sample_size: int) -> None:
    ours = np.asarray(sincos(side, side, width))
    if theirs.shape[-2:] != ours.shape:
        raise UserError(
            f"the weights are not for inputs of side {sample_size}: they have {theirs.shape[-2]} positions; "
            "give the sample_size that they were made for"
        )
    if not np.allclose(theirs, ours, atol=1e-3):
        raise UserError("the weights' pos_embed are not DiT's sines and cosines; they belong to another model")


class _Reader:
    """Tensors by name, each to be taken once."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self._left = weights, set(weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._get(name).shape

    def take(self, name: str) -> np.ndarray:
        tensor = self._get(name)
        self._left.discard(name)
        return tensor

    def discard(self, name: str) -> None:
        self._left.discard(name)

    def done(self) -> None:
        if self._left:
            raise UserError(f"the weights hold {min(self._left)}, which this DiT has not; they belong to another model")

    def _get(self, name: str) -> np.ndarray:
        if name not in self._weights:
            raise UserError(f"the weights lack {name}; they belong to another model")
        return np.asarray(self._weights[name], np.float32)


def _fill(
    net: DiT,
    size: int,
    channels: int,
    reader: _Reader,
    names: Mapping[str, str],
    qkv: Callable[[int, str], np.ndarray],
    tables: list[str],
) -> Any:
    """The parameters of `net`, every one from `reader`."""
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, jax.ShapeDtypeStruct((1,), jnp.float32))["params"]
    params = {}
    for path, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items():
        place, _, end = path.rpartition("/")
        kind = "bias" if end == "bias" else "weight"
        if path == "label_embedding/table":
            params[path] = _fitted(reader.take(tables[0]), leaf.shape, tables[0])
        elif place.startswith("blocks/"):
            rows = np.empty(leaf.shape, np.float32)
            for i in range(net.depth):
                theirs = qkv(i, kind) if place == "blocks/qkv" else reader.take(f"{names[place].format(i)}.{kind}")
                rows[i] = _fitted(_turned(theirs), leaf.shape[1:], f"{path} of block {i}")
            params[path] = rows
        else:
            name = f"{names[place]}.{kind}"
            params[path] = _fitted(_turned(reader.take(name)), leaf.shape, name)
    reader.done()
    return jax.tree.map(jnp.asarray, flax.traverse_util.unflatten_dict(params, sep="/"))


def _turned(tensor: np.ndarray) -> np.ndarray:
    """torch's [outputs, inputs, ...] as [..., inputs, outputs]; a convolution's window as one axis of inputs."""
    if tensor.ndim < 2:
        return tensor
    return np.moveaxis(tensor, (0, 1), (-1, -2)).reshape(-1, tensor.shape[0])


def _fitted(tensor: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    if tensor.size != math.prod(shape) or (tensor.ndim > 1 and tensor.shape[0] != shape[0]):
        raise UserError(f"the tensor of {name} has shape {tensor.shape} (in our axes), this DiT wants {shape}")
    return tensor.reshape(shape)


class _Lazy(Mapping[str, np.ndarray]):
    """Tensors that are read when they are asked for."""

    def __init__(self, names: list[str], read: Callable[[str], np.ndarray]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def _open_safetensors(path: pathlib.Path) -> Weights:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError("reading .safetensors needs a package; pip install safetensors, or diffrl[oracles]") from None
    try:
        file = safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as .safetensors ({error}); fetch it again") from error
    return _Lazy(list(file.keys()), file.get_tensor)


def _open_torch(path: pathlib.Path) -> Weights:
    try:
        import torch
    except ImportError:
        raise UserError(f"reading {path.name} needs torch; pip install 'diffrl[oracles]'") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever the file makes it
        told = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as weights of torch ({told}); fetch it again") from error
    state = state.get("ema", state.get("model", state))  # training checkpoints hold both
    return _Lazy(list(state), lambda name: state[name].float().numpy())
