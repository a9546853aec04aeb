"""LPIPS 0.1 on AlexNet with the weights of R. Zhang et al., github.com/richzhang/PerceptualSimilarity.

AlexNet's are torchvision's; the weights of its channels (`lin`) come with LPIPS.  `evaluate.lpips` makes the distance.

Two sets of names are read, from one .npz or from several: PyTorch's (`features.0.weight`, `lin0.model.1.weight`) and
Flax's (`AlexNet_0/Conv_0/kernel`, `NetLinLayer_0/Conv_0/kernel`).
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.errors import UserError
from diffrl.nets.alexnet import LAYERS, SMALLEST, AlexNet

# Of ImageNet's pixels in [-1, 1], as LPIPS has them.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
TORCH_CONVOLUTIONS = (0, 3, 6, 8, 10)  # their places in torchvision's `features`

Apply = Callable[[Any, jax.Array], tuple[jax.Array, ...]]


def load(*paths: str | pathlib.Path) -> tuple[Apply, Any]:
    """Reads weights; returns `(apply, params)` with `apply(params, x) -> five activations [B, h, w, C]`.

    `x` is [B, H, W, C] in [-1, 1], C = 1 (grey, shown as RGB) or 3; H and W at least `nets.alexnet.SMALLEST`.
    `params` is {"alexnet": the network's, "lin": five vectors [C]}.
    Raises UserError where a file is missing or the files do not hold exactly these layers.
    """
    state: dict[str, np.ndarray] = {}
    for path in paths:
        try:
            with np.load(path) as file:
                state |= dict(file)
        except (OSError, ValueError) as error:
            raise UserError(f"LPIPS weights {path}: cannot be read as .npz ({error})") from error
    return apply, convert(state)


def apply(params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """The activations that LPIPS compares; raises UserError for images that are too small."""
    if min(x.shape[1:3]) < SMALLEST:
        raise UserError(f"LPIPS of {x.shape[1]}x{x.shape[2]} images: AlexNet needs at least {SMALLEST}x{SMALLEST}")
    x = jnp.broadcast_to(x, (*x.shape[:-1], 3))
    outputs: Any = AlexNet().apply({"params": params["alexnet"]}, (x - jnp.array(SHIFT)) / jnp.array(SCALE))
    return outputs


def convert(state: Mapping[str, np.ndarray]) -> Any:
    """Published arrays, by name -> our parameters; raises UserError where one is missing or has another shape."""
    torch = any(name.startswith("features.") for name in state)

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in state:
            raise UserError(f"LPIPS weights lack {name}: expected AlexNet's convolutions and LPIPS's lin layers")
        array = state[name]
        if torch and array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)  # OIHW -> HWIO
        if array.shape != shape:
            raise UserError(f"LPIPS weights: {name} has shape {state[name].shape}, which is no AlexNet's")
        return array.astype(np.float32)

    network, lin, old = {}, [], 3
    for i, (channels, size, *_) in enumerate(LAYERS):
        place = TORCH_CONVOLUTIONS[i]
        kernel, bias, weight = (
            (f"features.{place}.weight", f"features.{place}.bias", f"lin{i}.model.1.weight")
            if torch
            else (f"AlexNet_0/Conv_{i}/kernel", f"AlexNet_0/Conv_{i}/bias", f"NetLinLayer_{i}/Conv_0/kernel")
        )
        network[f"conv{i}"] = {
            "kernel": take(kernel, (size, size, old, channels)),
            "bias": take(bias, (channels,)),
        }
        lin.append(take(weight, (1, 1, channels, 1)).reshape(channels))
        old = channels
    return {"alexnet": network, "lin": tuple(lin)}
