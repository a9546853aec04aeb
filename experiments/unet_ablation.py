"""What each part of the U-Net is worth: attention, residual blocks, scale-shift, depth, at equal compute.

    python -m experiments.unet_ablation                       # digits, about seven minutes of two CPU cores
    python -m experiments.unet_ablation --preset=cifar10 --config.base.data.dir=DIR

Every variant changes one thing in the same base network and trains for the same number of floating-point operations
(XLA's count for its training step), so a dearer network takes fewer steps.  Its score is the held-out denoising loss of
its averaged parameters, on the same images and noises for all.  Ends with a table (table.md, results.json) and a plot
(ablation.png).  A second run of the same command takes up the variant it was at.
"""

import copy
import dataclasses
import json
import sys

import jax
import numpy as np

from diffrl import config as config_lib
from diffrl.data.catalog import DataConfig, make_source
from diffrl.errors import UserError
from diffrl.evaluate import plots
from diffrl.recipes import images, scores
from diffrl.recipes.images import ImageConfig, TrainConfig, UNetConfig
from diffrl.train import state as train_state
from diffrl.train.mesh import init_distributed
from diffrl.train.optim import OptimConfig


@dataclasses.dataclass
class Config:
    """The base model, and how much compute each variant of it gets."""

    base: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    base_steps: int = config_lib.leaf(250, "steps of the base network; the others get as many FLOPs")
    seeds: int = config_lib.leaf(2, "runs per variant")
    variants: tuple[str, ...] = config_lib.leaf((), "only these; all if empty", free=True)


def digits() -> Config:
    """8x8 digits on a CPU."""
    base = ImageConfig(
        unet=UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention=(4,), groups=8),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=50, schedule="cosine"),
        train=TrainConfig(batch_size=64, ema_decay=0.99, sample_every=0, checkpoint_every=200),
    )
    return Config(base)


def cifar10() -> Config:
    """32x32 colour images on a GPU: hours."""
    base = ImageConfig(
        data=DataConfig(name="cifar10", flip=True),
        unet=UNetConfig(channels=64, multipliers=(1, 2, 2), blocks=2, attention=(16,), dtype="bfloat16"),
        optim=OptimConfig(learning_rate=4e-4, warmup_steps=500, schedule="cosine"),
        train=TrainConfig(batch_size=256, ema_decay=0.999, sample_every=0, checkpoint_every=2000),
    )
    return Config(base, base_steps=20_000, seeds=3)


def variants(base: UNetConfig) -> dict[str, UNetConfig]:
    """The base network and those that differ from it in one thing."""
    return {
        "base": base,
        "no attention": dataclasses.replace(base, attention=(), middle_attention=False),
        "attention in the middle only": dataclasses.replace(base, attention=()),
        "one more residual block": dataclasses.replace(base, blocks=base.blocks + 1),
        "scale-shift": dataclasses.replace(base, scale_shift=True),
        "residual blocks resample": dataclasses.replace(base, resample_blocks=True),
        "one level less": dataclasses.replace(base, multipliers=base.multipliers[:-1]),
        "one level more": dataclasses.replace(base, multipliers=(*base.multipliers, base.multipliers[-1])),
        "half as wide": dataclasses.replace(base, channels=base.channels // 2),
    }


def flops_per_step(config: ImageConfig) -> tuple[float, int]:
    """XLA's count for one training step and the number of parameters; nothing is compiled or run."""
    source = make_source(config.data)
    model = images.build(config, source)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = images.optim.make(config.optim, config.train.steps)
    current = jax.eval_shape(lambda p: train_state.create(p, optimizer, jax.random.key(0)), abstract)
    shape = (config.train.batch_size, *source.shape)
    batch = {"x": jax.ShapeDtypeStruct(shape, np.float32), "label": jax.ShapeDtypeStruct(shape[:1], np.int32)}
    cost = jax.jit(images.make_step(config, model)).lower(current, batch).cost_analysis() or {}
    return cost["flops"], sum(leaf.size for leaf in jax.tree.leaves(abstract))


def run_variant(config: Config, name: str, unet: UNetConfig, seed: int, budget: float, run: config_lib.Run) -> dict:
    """Trains one variant on `budget` FLOPs and scores it."""
    base = copy.deepcopy(config.base)
    base.unet, base.seed = unet, seed
    cost, parameters = flops_per_step(base)
    base.train.steps = max(1, round(budget / cost))
    workdir = run.workdir / "runs" / f"{name.replace(' ', '_')}-{seed}"
    session = images.open_session(base, run._replace(workdir=workdir))
    trained = images.train(session)
    held_out = scores.held_out_source(session)
    if held_out is None:
        raise UserError(f"{base.data.name} has no part {base.eval.split!r} to hold out: set --config.base.eval.split")
    loss = scores.held_out_loss(session, trained.ema, held_out)
    return {
        "variant": name,
        "seed": seed,
        "loss": loss,
        "steps": base.train.steps,
        "parameters": parameters,
        "gflops_per_step": cost / 1e9,
    }


def main(config: Config, run: config_lib.Run) -> None:
    chosen = variants(config.base.unet)
    unknown = set(config.variants) - set(chosen)
    if unknown:
        raise UserError(f"no variant {sorted(unknown)[0]!r}: choose from {', '.join(map(repr, chosen))}")
    if config.variants:
        chosen = {name: unet for name, unet in chosen.items() if name in config.variants}
    path = run.workdir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else []
    done = {(result["variant"], result["seed"]) for result in results}
    budget = config.base_steps * flops_per_step(config.base)[0]
    todo = [(name, seed) for name in chosen for seed in range(config.seeds) if (name, seed) not in done]
    for i, (name, seed) in enumerate(todo):
        print(f"[{i + 1}/{len(todo)}] {name}, seed {seed}", file=sys.stderr)
        results.append(run_variant(config, name, chosen[name], seed, budget, run))
        path.write_text(json.dumps(results, indent=1) + "\n")
    summary = [summarise(name, [r for r in results if r["variant"] == name]) for name in chosen]
    text = table(summary, config.seeds)
    (run.workdir / "table.md").write_text(text)
    plots.ranking(
        run.workdir / "ablation.png",
        {row["variant"]: (row["loss"], row["spread"]) for row in summary},
        "held-out denoising loss (lower is better)",
        title=f"U-Net ablation at {budget / 1e12:.1f} TFLOP each, {config.seeds} seeds",
    )
    print(text)
    print(f"everything lies in {run.workdir}")


def summarise(name: str, results: list[dict]) -> dict:
    """Mean over seeds, and half the distance between the extremes."""
    losses = [result["loss"] for result in results]
    return {**results[0], "loss": float(np.mean(losses)), "spread": (max(losses) - min(losses)) / 2}


def table(summary: list[dict], seeds: int) -> str:
    """A Markdown table of all variants, best first."""
    lines = [
        "| variant | parameters | GFLOP a step | steps | held-out loss |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(summary, key=lambda row: row["loss"]):
        lines.append(
            f"| {row['variant']} | {row['parameters'] / 1e6:.2f} M | {row['gflops_per_step']:.2f} | {row['steps']} "
            f"| {row['loss']:.4f} ± {row['spread']:.4f} |"
        )
    return "\n".join(lines) + f"\n\nMean of {seeds} seeds ± half their range.\n"


PRESETS = {"digits": digits, "cifar10": cifar10}

if __name__ == "__main__":
    config_lib.run(main, PRESETS, setup=init_distributed)
