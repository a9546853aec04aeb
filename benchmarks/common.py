"""What the benchmarks share: one network in both frameworks, interleaved timing, and the machine's own measure.

The network is diffusers' `UNet2DModel` with random weights and our U-Net with the same weights, so that both
sides do the same work.  The machine's measure is a large matrix product, the most that a network of that
dtype could reach.
"""

import argparse
import importlib
import os
import platform
import statistics
import time
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

# Before either starts.  torch needs its share of the accelerator's memory; and its idle OpenMP threads must sleep
# rather than spin, which on a machine with other work costs torch itself a factor of ten.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
import jax.numpy as jnp

from diffrl.nets.unet import UNet
from diffrl.pretrained import diffusers_unet

DDPM = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
SIZES: dict[str, dict[str, Any]] = {
    # google/ddpm-cifar10-32, 35.7 M parameters.
    "cifar10": DDPM
    | {
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    # Its quarter in width and half in depth.
    "small": DDPM
    | {
        "sample_size": 32,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
    },
    # For scikit-learn's 8x8 digits.
    "digits": DDPM
    | {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
}


class Pair(NamedTuple):
    """One network twice, with equal weights."""

    torch: Any  # diffusers.UNet2DModel, on the torch device
    ours: UNet
    params: Any
    shape: tuple[int, int, int]  # of an image, [H, W, C]
    parameters: int


def parser(description: str, sizes: Iterable[str] = SIZES) -> argparse.ArgumentParser:
    """Flags of the benchmarks of networks."""
    flags = argparse.ArgumentParser(description=description.splitlines()[0])
    flags.add_argument("--size", choices=sorted(sizes), default="cifar10")
    flags.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    flags.add_argument("--batch", type=int, default=8)
    flags.add_argument("--repeats", type=int, default=5, help="interleaved; medians are printed")
    flags.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile too; by default on a GPU only"
    )
    return flags


def need(module: str) -> Any:
    """Imports one of the reference libraries; ends the program with one line where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SystemExit(f"{module} is not installed, and this compares with it: pip install -e '.[oracles]'") from None


def torch_device(torch: Any) -> str:
    """The device, cuda or cpu, that jax uses too; gives torch all cores and the precision that XLA has there."""
    cuda = torch.cuda.is_available()
    if cuda != (jax.default_backend() == "gpu"):
        raise SystemExit(
            f"jax runs on {jax.default_backend()} and torch on {'cuda' if cuda else 'cpu'}: install both for "
            "one device, or set JAX_PLATFORMS=cpu and CUDA_VISIBLE_DEVICES="
        )
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as XLA's default
    torch.backends.cudnn.benchmark = True
    return "cuda" if cuda else "cpu"


def make_pair(size: str, dtype: str) -> Pair:
    """The network of `SIZES[size]`, ours computing in `dtype`; asserts equal numbers of parameters."""
    torch, diffusers = need("torch"), need("diffusers")
    torch.manual_seed(0)
    config = SIZES[size]
    model = diffusers.UNet2DModel(**config)
    full = dict(model.config)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params = diffusers_unet.params_from_diffusers(weights, full)
    count = sum(tensor.numel() for tensor in model.parameters())
    assert count == sum(leaf.size for leaf in jax.tree.leaves(params)), "the two networks differ"
    device = torch_device(torch)
    model = model.to(device, memory_format=torch.channels_last if device == "cuda" else torch.contiguous_format)
    ours = diffusers_unet.unet_from_config(full).clone(dtype=jnp.dtype(dtype))
    return Pair(model, ours, params, (full["sample_size"],) * 2 + (full["in_channels"],), count)


def flops(lowered: Any) -> float:
    """Floating-point operations of a lowered program, by XLA's count of what was written: fused kernels hide theirs."""
    return float((lowered.cost_analysis() or {})["flops"])


class Result(NamedTuple):
    """Seconds of one program."""

    median: float
    best: float


def measure(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Result]:
    """Times programs, which must block until done, in turns: what disturbs the machine disturbs all of them.

    One uncounted turn first: compilation, autotuning, caches.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: Result(statistics.median(values), min(values)) for name, values in times.items()}


def matmuls(dtype: str) -> tuple[dict[str, Callable[[], Any]], float]:
    """Large square products in XLA and in torch, and their FLOP."""
    torch = need("torch")
    device = torch_device(torch)
    n = 8192 if device == "cuda" else 2048
    a = jnp.ones((n, n), dtype)
    b = torch.ones(n, n, dtype=getattr(torch, dtype), device=device)
    product = jax.jit(jnp.matmul)
    programs = {
        f"matmul {dtype}, XLA": lambda: product(a, a).block_until_ready(),
        f"matmul {dtype}, torch": lambda: finish(torch, torch.matmul(b, b)),
    }
    return programs, 2.0 * n**3


def finish(torch: Any, result: Any) -> Any:
    """Waits for torch's queue."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def compare(
    title: str,
    programs: dict[str, Callable[[], Any]],
    repeats: int,
    *,
    units: int,
    samples: int,
    flops: float,
    dtype: str,
    counted: str = "XLA's count",
    share: Mapping[str, float] = types.MappingProxyType({}),
) -> dict[str, Result]:
    """Measures `programs` beside the machine's matrix products, prints a table and returns seconds per unit.

    Args:
        programs: the first is what the others are compared with.
        units: steps or calls that one program does.
        samples, flops: samples and floating-point operations of one unit; `counted`: by whom.
        share: how often programs do these operations, where it is not once.
    """
    work = {name: flops * units * share.get(name, 1.0) for name in programs}
    everything = dict(programs)
    for name in ("float32", "bfloat16"):
        products, count = matmuls(name)
        everything |= products
        work |= dict.fromkeys(products, count)
    seconds = measure(everything, repeats)
    peak = max(work[name] / seconds[name].median for name in work if name.startswith(f"matmul {dtype}"))

    print(f"\n{title}, {flops / 1e9:.1f} GFLOP by {counted}; {repeats} interleaved repeats")
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores ({platform.machine()}), "
        f"jax {jax.__version__}, torch {need('torch').__version__}"
    )
    print(f"{'':24}{'ms':>10}{'best':>10}{'samples/s':>12}{'GFLOP/s':>10}{'of matmul':>11}{'time/ours':>11}")
    ours = seconds[next(iter(programs))].median
    for name in programs:
        median, best = seconds[name]
        rate = work[name] / median
        print(
            f"{name:24}{1e3 * median / units:10.1f}{1e3 * best / units:10.1f}{samples * units / median:12.1f}"
            f"{rate / 1e9:10.1f}{rate / peak:11.1%}{median / ours:11.2f}"
        )
    for name in list(seconds)[len(programs) :]:
        median, best = seconds[name]
        print(f"{name:24}{1e3 * median:10.1f}{1e3 * best:10.1f}{'':12}{work[name] / median / 1e9:10.1f}")
    return {name: Result(*(value / units for value in seconds[name])) for name in programs}
