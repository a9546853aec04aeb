"""Diffusion in the latents of an autoencoder, trained here or published (Rombach et al., 2022, arXiv:2112.10752).

The data are encoded once, to `data.latents`' files; each channel's mean and variance are measured there, and kept in
the state of the model that is trained on them.  The same normalisation is undone, once, before decoding.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.compression import normaliser, posterior
from diffrl.compression.normaliser import Normaliser
from diffrl.config import leaf, read
from diffrl.data import latents as files
from diffrl.data.catalog import DataConfig
from diffrl.data.source import Source
from diffrl.errors import UserError
from diffrl.pretrained import diffusers_autoencoder, taef2
from diffrl.recipes import autoencoding, digests, results
from diffrl.train import mesh

Array = jax.Array

MEASURED = 50_000  # latents whose moments are the normaliser


@dataclasses.dataclass
class LatentsConfig:
    """Diffusion in latents rather than in pixels."""

    model: str = leaf(
        "", "the autoencoder: a workdir of experiments.autoencoder, a folder of diffusers or of TAEF2; '' = pixels"
    )
    cache: str = leaf("", "where the encoded data lie; '' = latents/ in the workdir", free=True)
    batch: int = leaf(64, "images encoded at a time", free=True, at_least=1)


class Autoencoder(NamedTuple):
    """encode: (params, x [B, H, W, C]) -> moments [B, h, w, 2 c], or latents [B, h, w, c] where it is not `random`.

    decode: (params, z [B, h, w, c]) -> images.
    """

    name: str
    encode: Callable
    decode: Callable
    params: Any
    random: bool
    image_channels: int


class Codec(NamedTuple):
    """An autoencoder on one data set, whose latents are encoded and measured.

    shape: (h, w, c) of a latent.  source: () -> the encoded data.
    """

    autoencoder: Autoencoder
    normaliser: Normaliser
    shape: tuple[int, ...]
    source: Callable[[], Source]

    @property
    def arrays(self) -> tuple[Any, Normaliser]:
        """What a jitted function takes as an argument, for `decode`."""
        return self.autoencoder.params, self.normaliser

    def draw(self, x: Array, keys: Array, frozen: Any) -> Array:
        """Normalised latents of encoded examples, drawn afresh."""
        return normalised(self.autoencoder, Normaliser(*frozen["normaliser"]), x, keys)


def normalised(autoencoder: Autoencoder, norm: Normaliser, x: Array, keys: Array) -> Array:
    """What is diffused, from what the encoder gave."""
    z = posterior.sample(x, keys) if autoencoder.random else x
    return normaliser.normalise(norm, z)


def decode(codec: Codec, arrays: tuple[Any, Normaliser], z: Array) -> Array:
    """Images, unclipped, of normalised latents [B, h, w, c]; arrays: of `Codec.arrays`."""
    params, norm = arrays
    return codec.autoencoder.decode(params, normaliser.restore(norm, z))


def open_autoencoder(path: str) -> Autoencoder:
    """The autoencoder that lies at `path`, whoever trained it.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"latents.model={path} is no folder: name a run of experiments.autoencoder, or a published one")
    saved = read(folder) if (folder / "config.json").is_file() else None
    if saved is not None and "autoencoder" in saved["config"]:
        return _trained(folder)
    if any(file.name.startswith("taef2") for file in folder.iterdir()):
        return _taef2(folder)
    return _diffusers(folder)


def _trained(folder: pathlib.Path) -> Autoencoder:
    session = autoencoding.open_trained(folder)
    current = autoencoding.restored_state(session)
    session.checkpoints.close()
    net, params = session.model.net, autoencoding.codec_params(current)
    encode, decode = autoencoding.make_encoder(net), autoencoding.make_decoder(net)
    return Autoencoder(folder.name, encode, decode, params, net.moments, net.image_channels)


def _diffusers(folder: pathlib.Path) -> Autoencoder:
    net, params, codes, *_ = diffusers_autoencoder.load(folder)
    held = {"autoencoder": params} | ({} if codes is None else {"codes": jnp.asarray(codes)})
    encode, decode = autoencoding.make_encoder(net), autoencoding.make_decoder(net)
    return Autoencoder(folder.name, encode, decode, held, net.moments, net.image_channels)


def _taef2(folder: pathlib.Path) -> Autoencoder:
    net, params = taef2.load(folder)

    def encode(params, x):
        return net.apply({"params": params}, x, method="encode")

    def decode(params, z):
        return net.apply({"params": params}, z, method="decode")

    return Autoencoder("taef2", encode, decode, params, False, 3)


def open_codec(config: LatentsConfig, data: DataConfig, source: Source, workdir: pathlib.Path) -> Codec:
    """The autoencoder with its latents of `source`, which are encoded now unless they lie there already.

    Raises:
        UserError: no such autoencoder, or one for other images.
    """
    autoencoder = open_autoencoder(config.model)
    if autoencoder.image_channels != source.shape[-1]:
        raise UserError(
            f"latents.model={config.model} is for images of {autoencoder.image_channels} channels, {source.name} has "
            f"{source.shape[-1]}: set --config.data.channels={autoencoder.image_channels}"
        )
    folder = pathlib.Path(config.cache).expanduser() if config.cache else workdir / "latents"
    weights = digests.weights(autoencoder.params)
    _bind(workdir, weights, config.model)
    about = {"autoencoder": weights, "data": _told(data), "shape": source.shape}
    files.write(
        folder, source, make_encode(autoencoder), about, batch=_batch(config.batch), mirror=data.flip,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    mesh.gather_json(None)  # until all processes have written theirs
    open_source = functools.partial(files.read, folder, about)
    encoded = open_source()
    channels = encoded.shape[-1] // (2 if autoencoder.random else 1)
    return Codec(autoencoder, _measured(autoencoder, encoded), (*encoded.shape[:-1], channels), lambda: encoded)


def _bind(workdir: pathlib.Path, weights: str, model: str) -> None:
    """Ties a run to the weights that it began with: what it has learned means nothing in other latents.

    Raises UserError where the run began with others.
    """
    path = workdir / "autoencoder.json"
    began = results.load(path, {}).get("weights", weights)
    if began != weights:
        raise UserError(
            f"latents.model={model} has changed since {workdir} began (weights {weights}, then {began}): "
            "bring the old ones back, or choose another --workdir"
        )
    mesh.gather_json(None)  # until all processes have read it
    if jax.process_index() == 0 and not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        results.save(path, {"weights": weights, "model": model})


def make_encode(autoencoder: Autoencoder) -> Callable[[np.ndarray], np.ndarray]:
    """images [B, H, W, C] -> what the encoder gives, over this process's devices; B a multiple of their number."""
    devices = mesh.make_mesh(devices=jax.local_devices())
    call = jax.jit(autoencoder.encode)

    def encode(x):
        return np.asarray(call(autoencoder.params, mesh.put_global(devices, x)))

    return encode


def encode_all(codec: Codec, x: np.ndarray, batch: int = 64) -> np.ndarray:
    """What the encoder gives for images [N, H, W, C]."""
    encode, size = make_encode(codec.autoencoder), _batch(batch)
    parts = [encode(np.resize(x[i : i + size], (size, *x.shape[1:]))) for i in range(0, len(x), size)]
    return np.concatenate(parts)[: len(x)]


def _batch(wanted: int) -> int:
    count = jax.local_device_count()
    return -(-wanted // count) * count


def _measured(autoencoder: Autoencoder, encoded: Source) -> Normaliser:
    rows = np.unique(np.linspace(0, encoded.length - 1, min(MEASURED, encoded.length)).astype(int))

    def batches():
        for chunk in np.array_split(rows, max(1, len(rows) // 1024)):
            x = encoded.fetch(chunk)["x"]
            if autoencoder.random:
                mean, log_var = (np.asarray(part) for part in posterior.split(jnp.asarray(x)))
                yield mean, np.exp(log_var)
            else:
                yield x, np.zeros_like(x)

    return normaliser.measure(batches())


def _told(data: DataConfig) -> dict[str, Any]:
    """What decides about the images, not how or whence they are read."""
    return {
        "name": data.name,
        "split": data.split,
        "size": data.image_size,
        "channels": data.channels,
        "flip": data.flip,
    }
