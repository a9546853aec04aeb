"""TAEF2, the tiny autoencoder of FLUX.2's latents (O. Boer Bohan, github.com/madebyollin/taesd, MIT), name by name.

    ours                                   taesd.py's Sequential, or diffusers' `layers` (the decoder's less 1)
    encoder/conv_in, decoder/conv_in       encoder.0, decoder.1
    {down,up}_{l}_block_{i}, _resample     the next ones, in the order in which they are called
    conv_{0,1,2}                           conv.{0,2,4}
    pool_{in,norm,out}                     pool.{0,1,3}
    conv_out                               the last

Its latents are what FLUX.2's diffusion model sees, but unpatched: 32 channels at an 8th of the side, to be diffused as
they are (mean 0.0 and deviation 0.8 on two photographs).  FLUX.2's own autoencoder gives others, which its pipeline
patches to 128 channels at a 16th of the side and normalises by the statistics of a BatchNorm; unpatching what comes of
that gives these.  There is no scale and no shift to apply here.

Published as taef2_encoder and taef2_decoder in taesd.py's names, and as one taef2.safetensors in those of diffusers.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffrl.errors import UserError
from diffrl.nets.tiny_autoencoder import TinyAutoencoder
from diffrl.pretrained.weights import Reader, fill, kind, open_file

PARTS = ("encoder", "decoder")
INNER = {
    "conv_0": "conv.0",
    "conv_1": "conv.2",
    "conv_2": "conv.4",
    "pool_in": "pool.0",
    "pool_norm": "pool.1",
    "pool_out": "pool.3",
}


def load(
    encoder: str | pathlib.Path, decoder: str | pathlib.Path | None = None
) -> tuple[TinyAutoencoder, dict[str, Any]]:
    """Reads two files, one that holds both, or a folder that has one taef2_encoder* and one taef2_decoder*.

    Returns:
        The network and its params, for `net.apply({"params": params}, x, method="encode")`, and "decode".

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, left over or of another shape.
    """
    path = pathlib.Path(encoder)
    if decoder is None and path.is_file():
        state = {plain(name): tensor for name, tensor in open_file(path).items()}
    else:
        first, second = (encoder, decoder) if decoder else (_only(path, f"taef2_{part}") for part in PARTS)
        both = zip(PARTS, (open_file(first), open_file(second)), strict=True)
        state = {f"{part}.{name}": tensor for part, weights in both for name, tensor in weights.items()}
    net = TinyAutoencoder()
    return net, convert(state, net)


def convert(state: Mapping[str, np.ndarray], net: TinyAutoencoder) -> dict[str, Any]:
    """The parameters of `net` from tensors named encoder.0.weight and so on; other networks of the family load as well.

    Raises:
        UserError: a tensor is missing, left over or of another shape.
    """
    reader = Reader(state, "this tiny autoencoder")
    places = {"encoder": _encoder_layers(net.blocks), "decoder": _decoder_layers(net.blocks)}

    def source(path: str, shape: tuple[int, ...]) -> np.ndarray:
        part, layer, *inner, leaf = path.split("/")
        theirs = [part, str(places[part].index(layer)), *(INNER[name] for name in inner), kind(leaf)]
        return reader.fit(".".join(theirs), shape)

    side = 2 ** (len(net.blocks) - 1)
    return fill(net, [(1, side, side, net.image_channels)], reader, source)


def _encoder_layers(blocks: tuple[int, ...]) -> list[str]:
    layers = ["conv_in"]
    for level, count in enumerate(blocks):
        layers += [f"down_{level}_block_{i}" for i in range(count)] + [f"down_{level}_resample"]
    return [*layers[:-1], "conv_out"]  # the last level is not halved


def _decoder_layers(blocks: tuple[int, ...]) -> list[str]:
    layers = ["bound", "conv_in", "relu"]
    for level, count in reversed(list(enumerate(blocks))):
        layers += [f"up_{level}_block_{i}" for i in range(count)] + ["double", f"up_{level}_resample"]
    return [*layers[:-2], "conv_out"]  # nor is it doubled


def plain(name: str) -> str:
    """diffusers' name of a tensor in taesd.py's counting; its decoder's `layers` begin behind the bound."""
    match = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name
    part, layer, rest = match.groups()
    return f"{part}.{int(layer) + (part == 'decoder')}.{rest}"


def _only(folder: pathlib.Path, start: str) -> pathlib.Path:
    found = sorted(folder.glob(f"{start}*"))
    if len(found) != 1:
        told = f"{len(found)} files" if found else "no file"
        raise UserError(f"{folder} has {told} whose names begin with {start}; give the paths of encoder and decoder")
    return found[0]
