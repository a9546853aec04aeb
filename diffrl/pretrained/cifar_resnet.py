"""CIFAR-10 ResNet-20 ... -110 with the weights of Y. Idelbayev, github.com/akamaster/pytorch_resnet_cifar10.

The file is an .npz of that repository's PyTorch state dict, name by name.  Test accuracy on CIFAR-10:
ResNet-20 91.73 %, ResNet-56 93.39 %.  The features before the last layer make the Fréchet distance
`FD-ResNet56`.
"""

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from diffrl.errors import UserError
from diffrl.nets.resnet import CifarResNet

# ImageNet's statistics: that repository trained with them.  With CIFAR-10's own, 91.48 % and 93.27 % are left.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
BATCH_NORM_EPS = 1e-5  # PyTorch's default


Apply = Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]


def load(path: str | pathlib.Path) -> tuple[Apply, Any]:
    """Reads weights; returns `(apply, params)` with `apply(params, x) -> (logits [B, 10], features [B, 64])`.

    `x` is float [B, 32, 32, 3] in [-1, 1], as everywhere; the network's own normalisation happens inside.
    Raises UserError where the file is missing or does not hold exactly these layers.
    """
    try:
        with np.load(path) as file:
            state = dict(file)
    except (OSError, ValueError) as error:
        raise UserError(f"ResNet weights {path}: cannot be read as .npz ({error})") from error
    blocks = len({name.split(".")[1] for name in state if name.startswith("layer1.")})
    model = CifarResNet(blocks)
    params = convert(state, blocks)
    _check(model, params, path)

    def apply(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        pixels = (x + 1.0) / 2.0
        outputs: Any = model.apply({"params": params}, (pixels - jnp.array(MEAN)) / jnp.array(STD))
        return outputs

    return apply, params


def name(params: Any) -> str:
    """What the network is called, by its depth: "ResNet56"."""
    blocks = len(params) - 2  # besides the first convolution and the head
    return f"ResNet{2 * blocks + 2}"


def convert(state: Mapping[str, np.ndarray], blocks: int) -> Any:
    """A PyTorch state dict -> our parameters: HWIO kernels, batch normalisation folded in.

    BN(W x) = (g W / s) x + (b - g m / s), with the running mean m, s = sqrt(variance + eps), scale g and bias
    b.  Raises UserError where a layer is missing or one is left over.
    """
    left = dict(state)

    def take(name: str) -> np.ndarray:
        try:
            return left.pop(name)
        except KeyError:
            raise UserError(f"ResNet weights lack {name}: expected akamaster's PyTorch names") from None

    def conv(prefix: str, index: str) -> dict[str, np.ndarray]:
        kernel, norm = take(f"{prefix}conv{index}.weight"), f"{prefix}bn{index}."
        scale = take(norm + "weight") / np.sqrt(take(norm + "running_var") + BATCH_NORM_EPS)
        bias = take(norm + "bias") - take(norm + "running_mean") * scale
        return {"kernel": kernel.transpose(2, 3, 1, 0) * scale, "bias": bias}

    params: dict[str, Any] = {"conv": conv("", "1")}
    for stage in range(3):
        for block in range(blocks):
            prefix = f"layer{stage + 1}.{block}."
            params[f"stage{stage}_block{block}"] = {"conv1": conv(prefix, "1"), "conv2": conv(prefix, "2")}
    params["head"] = {"kernel": take("linear.weight").T, "bias": take("linear.bias")}
    surplus = [name for name in left if not re.search(r"num_batches_tracked$", name)]
    if surplus:
        raise UserError(f"ResNet weights hold {len(surplus)} unknown layers, the first {surplus[0]}: wrong file?")
    return params


def _check(model: CifarResNet, params: Any, path: str | pathlib.Path) -> None:
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    expected = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    for name, leaf in flax.traverse_util.flatten_dict(expected, sep="/").items():
        shape = flax.traverse_util.flatten_dict(params, sep="/")[name].shape
        if shape != leaf.shape:
            raise UserError(f"ResNet weights {path}: {name} has shape {shape}, expected {leaf.shape}")
