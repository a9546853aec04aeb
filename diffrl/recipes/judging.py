"""Judges of images, made as a config says, and what they are shown: held-out images, and sets in batches."""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from diffrl.config import leaf
from diffrl.data import cifar
from diffrl.data.catalog import DataConfig, make_source
from diffrl.data.pipeline import to_unit
from diffrl.data.source import Source, matched
from diffrl.errors import UserError
from diffrl.evaluate import frechet, judges
from diffrl.pretrained import cifar_resnet
from diffrl.recipes import denoising

CHUNK = 2000
FITTED = 2**26  # pixels of training images that a judge is fitted to: 21,845 images of CIFAR-10, all of MNIST


@dataclasses.dataclass
class JudgeConfig:
    judge: str = leaf("mlp", "mlp (fitted to the real images), resnet (needs judge_weights) or none", free=True)
    judge_weights: str = leaf("", ".npz of a published CIFAR-10 ResNet-20 or -56", free=True)
    split: str = leaf("test", "the held-out part of the data", free=True)
    samples: int = leaf(
        10_000, "generated and held-out images compared; no more than the held-out split", free=True, at_least=1
    )


class Judged(Protocol):
    """What is judged: a session, whose config has `data` and `eval`, and its training images."""

    @property
    def config(self) -> Any: ...

    @property
    def source(self) -> Source: ...


def check_images(source: Source) -> None:
    """Raises UserError for data that are no images."""
    if len(source.shape) != 3 or source.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"{source.name} has examples of shape {source.shape}: this experiment needs images [H, W, C] "
            "of 1, 3 or 4 channels"
        )


def fetched(source: Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Examples as float32 in [-1, 1], and their labels."""
    batch = source.fetch(indices)
    return to_unit(batch["x"]), batch.get("label")


def spread(source: Source, num: int) -> tuple[np.ndarray, np.ndarray | None]:
    """`num` examples spread evenly over the set, so that a sorted set gives all its classes."""
    return fetched(source, np.linspace(0, source.length - 1, min(num, source.length)).astype(int))


def check(config: JudgeConfig, source: Source | None = None) -> None:
    """Raises UserError for a judge that will not be there when it is needed, or that does not know these classes.

    Says on stderr why there can be none for the source.
    """
    denoising.choose("eval.judge", config.judge, dict.fromkeys(("mlp", "resnet", "none")))
    if config.judge_weights and not pathlib.Path(config.judge_weights).expanduser().is_file():
        raise UserError(f"eval.judge_weights={config.judge_weights} is no file: name the .npz of a CIFAR-10 ResNet")
    if source is None or config.judge == "none":
        return
    if reason := _absence(config, source):
        print(f"no judge: {reason}", file=sys.stderr)
    if reason or config.judge != "resnet":
        return
    known = source.class_names in ((), cifar.CLASSES)
    if source.shape != (32, 32, 3) or source.num_classes != len(cifar.CLASSES) or not known:
        raise UserError(
            f"eval.judge=resnet knows CIFAR-10 alone, not {source.num_classes} classes of {source.shape} in "
            f"{source.name}: choose mlp or none"
        )


def _absence(config: JudgeConfig, source: Source) -> str:
    """Why there can be no judge, or ""."""
    if source.num_classes is None:
        return "the data have no labels"
    if config.judge == "resnet" and not config.judge_weights:
        return "--config.eval.judge_weights names no published ResNet (.npz); --config.eval.judge=mlp needs none"
    return ""


def make_judge(session: Judged, held_out: Source) -> judges.Judge | None:
    """The configured judge, or None (with the reason on stderr) where there can be none."""
    config = session.config.eval
    check(config, session.source)
    if config.judge == "none" or _absence(config, session.source):
        return None
    x_test, labels_test = spread(held_out, CHUNK)
    name = session.config.data.name

    def mlp() -> judges.Judge:
        x, labels = spread(session.source, max(1, FITTED // math.prod(session.source.shape)))
        return judges.fit_mlp(f"MLP-{name}", x, labels, x_test, labels_test)

    def resnet() -> judges.Judge:
        apply, params = cifar_resnet.load(pathlib.Path(config.judge_weights).expanduser())
        return judges.from_network(cifar_resnet.name(params), apply, params, x_test, labels_test)

    return denoising.choose("eval.judge", config.judge, {"mlp": mlp, "resnet": resnet})()


def moments(judge: judges.Judge, source: Source) -> frechet.Moments:
    """Of the judge's features of all images of a source."""
    chunks = [np.arange(i, min(i + CHUNK, source.length)) for i in range(0, source.length, CHUNK)]
    return frechet.moments(judge.features, (fetched(source, chunk)[0] for chunk in chunks))


def in_batches(measure: Callable[[np.ndarray], Any], num: int, batch: int = 500, desc: str = "") -> np.ndarray:
    """What `measure`, indices [B] -> [B, ...], says of 0 ... `num` - 1; with a progress bar where `desc` is set.

    All batches are of one size, so that a compiled program serves them all: the last one repeats its indices.
    """
    size = min(num, batch)
    found = []
    for i in tqdm(range(0, num, size), desc=desc, unit="batch", leave=False, disable=not desc):
        rows = np.resize(np.arange(i, min(i + size, num)), size)
        found.append(np.asarray(measure(rows))[: num - i])
    return np.concatenate(found)


def held_out_source(session: Judged) -> Source | None:
    """The test split with the training set's labels, or None (with the reason on stderr) where there is none.

    Raises UserError for a split that is not of the training set's kind.
    """
    data: DataConfig = session.config.data
    try:
        source = make_source(data, session.config.eval.split)
    except UserError as error:
        print(f"no held-out images, so no scores: {error}", file=sys.stderr)
        return None
    return matched(source, session.source)
