"""Published weights: files of named tensors, opened lazily, and the parameters of a network filled from them.

    weights, config = open_folder(path, "vae")           # or weights = open_file(path)
    reader = Reader(weights, "this autoencoder")          # who speaks in the errors
    params = fill(net, [(1, 64, 64, 3)], reader, source)  # source(path of ours, shape of ours) -> array

where `source` mostly says `reader.fit(their names, shape)`.  Every tensor is read when it is asked for, is taken once
and becomes float32; at the end none may be left.  Kernels are turned from torch's [outputs, inputs, ...] to
[..., inputs, outputs].

Kinds of files: .safetensors; .npz; and torch's .pt, .pth, .ckpt and .bin.  Nothing that a file pickles is run: torch
reads tensors only, numpy no objects.
"""

import json
import math
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from diffrl.errors import UserError

Weights = Mapping[str, np.ndarray]
Source = Callable[[str, tuple[int, ...]], np.ndarray]

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Files written before diffusers 0.15 call the four projections of an attention so.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
CHECKPOINT_KEYS = ("ema", "model", "state_dict")  # where training checkpoints keep the weights, the best first
ELSE = "they belong to another model"


def open_file(path: str | pathlib.Path) -> Weights:
    """The tensors of a file by name, each read when it is asked for, in the file's own precision and axes.

    Raises:
        UserError: the file is missing, damaged, of an unknown kind, or holds no tensors; later, a tensor is damaged.
    """
    path = pathlib.Path(path)
    kinds = {".safetensors": _open_safetensors, ".npz": _open_npz}
    kinds |= dict.fromkeys((".pt", ".pth", ".ckpt", ".bin"), _open_torch)
    if not path.is_file():
        raise UserError(f"{path} is no file; point to weights in one of {', '.join(kinds)}")
    if path.suffix not in kinds:
        raise UserError(f"{path} is no known kind of weights; point to one of {', '.join(kinds)}")
    weights = kinds[path.suffix](path)
    if not weights:
        raise UserError(f"{path} holds no tensors; point to a file of weights")
    return weights


def open_folder(path: str | pathlib.Path, subfolder: str) -> tuple[Weights, dict[str, Any]]:
    """Tensors and config of what diffusers' `save_pretrained` wrote: a model, or a pipeline with one in `subfolder`.

    Raises:
        UserError: a file is missing or damaged.
    """
    folder = pathlib.Path(path)
    folder = folder / subfolder if (folder / subfolder).is_dir() else folder
    for name in ("config.json", DIFFUSERS_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; point to a folder of diffusers' save_pretrained")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is no JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is no config of diffusers; fetch it again")
    return open_file(folder / DIFFUSERS_WEIGHTS), config


def renamed(weights: Weights, rename: Callable[[str], str]) -> Weights:
    """The same tensors under other names, still unread."""
    names = {rename(name): name for name in weights}
    return _Lazy(list(names), lambda name: weights[names[name]])


def modern(name: str) -> str:
    """diffusers' present name of a tensor."""
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def kind(path: str) -> str:
    """torch's last word for a parameter of ours: "bias", and "weight" for kernels, scales and tables."""
    return "bias" if path.rpartition("/")[2] == "bias" else "weight"


def turned(tensor: np.ndarray) -> np.ndarray:
    """torch's [outputs, inputs, ...] as [..., inputs, outputs]; vectors stay."""
    return np.moveaxis(tensor, (0, 1), (-1, -2)) if tensor.ndim > 1 else tensor


class Reader:
    """Tensors by name, as float32, each to be taken once; `model` is what the errors call the network."""

    def __init__(self, weights: Weights, model: str) -> None:
        self.left = set(weights)
        self._weights, self._model = weights, model

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the file, without taking the tensor; raises UserError where there is none of this name."""
        return np.shape(self._get(name))

    def take(self, name: str) -> np.ndarray:
        """The tensor in the file's axes; raises UserError where there is none of this name."""
        tensor = np.array(self._get(name), np.float32)  # a copy: what is behind may be a file
        if name not in self.left:
            raise ValueError(f"{name} is taken twice")  # a mistake of the loader, not of the user
        self.left.discard(name)
        return tensor

    def discard(self, *names: str) -> None:
        """Tensors that are not needed, if they are there."""
        self.left.difference_update(names)

    def fit(self, names: str | Sequence[str], shape: tuple[int, ...], turn: bool = True) -> np.ndarray:
        """A tensor, or several joined along their outputs, `turned` and of our shape.

        Axes may be split or merged (heads, the window of a patch, a window of 1), never moved across one another.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        names = [names] if isinstance(names, str) else names
        parts = [self.take(name) for name in names]
        for name, part in zip(names, parts, strict=True):
            if part.shape != parts[0].shape:
                raise UserError(f"{name} has shape {part.shape}, but {names[0]} has {parts[0].shape}; {ELSE}")
        tensor = parts[0] if len(parts) == 1 else np.concatenate(parts)
        tensor = turned(tensor) if turn else tensor
        if not _same_axes(tensor.shape, shape):
            told = " with ".join(names)
            raise UserError(f"{told} has shape {tensor.shape} (in our axes), {self._model} wants {shape}; {ELSE}")
        return tensor.reshape(shape)

    def done(self) -> None:
        """Raises UserError where a tensor is left."""
        if self.left:
            raise UserError(f"the weights hold {min(self.left)}, which {self._model} has not; {ELSE}")

    def _get(self, name: str) -> np.ndarray:
        if name not in self._weights:
            raise UserError(f"the weights lack {name}, which {self._model} has; {ELSE}")
        return self._weights[name]


def fill(net: nn.Module, inputs: Sequence[tuple[int, ...]], reader: Reader, source: Source) -> dict[str, Any]:
    """The parameters of `net`, float32, one by one from `source`, which `reader` must have nothing left of.

    Args:
        inputs: shapes of what `net` is called with, float32.
        source: (path of a parameter, as "down_0_block_0/conv_0/kernel"; its shape) -> its value.

    Raises:
        UserError: a tensor is missing, left over or of another shape.
    """
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
    shapes = jax.eval_shape(net.init, jax.random.key(0), *structs)["params"]
    leaves = flax.traverse_util.flatten_dict(shapes, sep="/")
    params = {path: jnp.asarray(source(path, leaf.shape)) for path, leaf in leaves.items()}
    reader.done()
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _same_axes(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one shape comes of the other by splitting or merging neighbours: its borders are the other's too."""
    borders = [{math.prod(shape[: i + 1]) for i in range(len(shape))} - {1} for shape in (one, other)]
    return math.prod(one) == math.prod(other) and (borders[0] <= borders[1] or borders[1] <= borders[0])


class _Lazy(Mapping[str, np.ndarray]):
    """Tensors that are read when they are asked for."""

    def __init__(self, names: list[str], read: Callable[[str], np.ndarray]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _unreadable(path: pathlib.Path, what: str, told: object) -> UserError:
    return UserError(f"{path} cannot be read as {what} ({told}); fetch it again")


def _open_safetensors(path: pathlib.Path) -> Weights:
    try:
        file = safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, ".safetensors", error) from error
    return _Lazy(list(file.keys()), file.get_tensor)


def _open_npz(path: pathlib.Path) -> Weights:
    try:
        file = np.load(path, allow_pickle=False)
        names = list(file.files)
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise _unreadable(path, ".npz", error or "it is empty") from error

    def read(name: str) -> np.ndarray:
        try:
            return file[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise _unreadable(path, ".npz", f"{name}: {error}") from error

    return _Lazy(names, read)


def _open_torch(path: pathlib.Path) -> Weights:
    try:
        import torch
    except ImportError:
        raise UserError(f"reading {path.name} needs torch; pip install -e '.[oracles]'") from None
    try:
        # Files of old versions of torch are no zips, and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises whatever the file makes it; what it tells is long, and bad advice
        raise _unreadable(path, "weights of torch", "it is damaged, or holds more than tensors") from error
    if not isinstance(state, dict):
        raise _unreadable(path, "weights of torch", "it holds no tensors by name")
    state = next((state[key] for key in CHECKPOINT_KEYS if isinstance(state.get(key), dict)), state)
    names = [name for name, tensor in state.items() if isinstance(tensor, torch.Tensor)]
    return _Lazy(names, lambda name: state[name].detach().float().numpy())
