"""What each part of the U-Net is worth: attention, residual blocks, scale-shift, depth, at equal compute.

    python -m experiments.unet_ablation                       # digits, about seven minutes of two CPU cores
    python -m experiments.unet_ablation --preset=cifar10 --config.base.data.dir=DIR

Every variant changes one thing in the same base network and trains for the same number of floating-point operations
(XLA's count for its training step), so a dearer network takes fewer steps.  Its score is the held-out denoising loss of
its averaged parameters, on the same images and noises for all.  Ends with a table (table.md, results.json) and a plot
(ablation.png).  A second run of the same command takes up the variant it was at; one with another budget or base
(--accept_changes) uses only those results that were made with it.
"""

import dataclasses
import sys
from typing import NamedTuple

import jax
import numpy as np

from diffrl import config as config_lib
from diffrl.data.catalog import DataConfig, make_source
from diffrl.data.source import Source
from diffrl.errors import UserError
from diffrl.evaluate import plots
from diffrl.recipes import digests, images, scores
from diffrl.recipes import results as results_lib
from diffrl.recipes.images import ImageConfig
from diffrl.recipes.networks import UNetConfig
from diffrl.recipes.training import TrainConfig
from diffrl.train.mesh import init_distributed
from diffrl.train.optim import OptimConfig


@dataclasses.dataclass
class Config:
    """The base model, and how much compute each variant of it gets."""

    base: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    base_steps: int = config_lib.leaf(200, "steps of the base network; the others get as many FLOPs", at_least=1)
    seeds: int = config_lib.leaf(2, "runs per variant", free=True, at_least=1)
    variants: tuple[str, ...] = config_lib.leaf((), "only these; all if empty", free=True)


def digits() -> Config:
    """8x8 digits on a CPU."""
    base = ImageConfig(
        unet=UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention=(4,), groups=8),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=50, schedule="cosine"),
        train=TrainConfig(batch_size=32, ema_decay=0.99, sample_every=0, checkpoint_every=200),
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


class Job(NamedTuple):
    """One run: its variant, its whole config, and the price of a step."""

    variant: str
    config: ImageConfig
    flops: float
    parameters: int

    def name(self) -> str:
        """The variant, the seed, and a digest of all else that the result depends on."""
        digest = digests.digest(images.trained_by(self.config) | {"split": self.config.eval.split})
        return f"{self.variant.replace(' ', '_')}-{self.config.seed}-{digest}"


def variants(base: UNetConfig, size: int) -> dict[str, UNetConfig]:
    """The base network and those that differ from it in one thing, for images of `size` rows."""
    fewer = base.multipliers[:-1]
    # Attention on the level that goes moves up to the last that stays: it is depth that changes, not attention.
    last = size >> max(len(fewer) - 1, 0)
    attention = tuple(dict.fromkeys(max(at, last) for at in base.attention))
    return {
        "base": base,
        "no attention": dataclasses.replace(base, attention=(), middle_attention=False),
        "attention in the middle only": dataclasses.replace(base, attention=()),
        "one more residual block": dataclasses.replace(base, blocks=base.blocks + 1),
        "scale-shift": dataclasses.replace(base, scale_shift=True),
        "residual blocks resample": dataclasses.replace(base, resample_blocks=True),
        "one level less": dataclasses.replace(base, multipliers=fewer, attention=attention),
        "one level more": dataclasses.replace(base, multipliers=(*base.multipliers, base.multipliers[-1])),
        "half as wide": dataclasses.replace(base, channels=base.channels // 2),
    }


def plan(config: Config) -> list[Job]:
    """All runs, of equal FLOPs.  Every network is traced before one is trained, so that none fails after an hour."""
    source = make_source(config.base.data)
    chosen = variants(config.base.unet, source.shape[0])
    unknown = set(config.variants) - set(chosen)
    if unknown:
        raise UserError(f"no variant {sorted(unknown)[0]!r}: choose from {', '.join(map(repr, chosen))}")
    wanted = {name: dataclasses.replace(config.base, unet=chosen[name]) for name in config.variants or chosen}
    prices = {name: price(variant, source) for name, variant in ({"base": config.base} | wanted).items()}
    jobs = []
    for name, variant in wanted.items():
        flops, parameters = prices[name]
        steps = max(1, round(config.base_steps * prices["base"][0] / flops))
        images.optim.make(config.base.optim, steps)  # refuses a warm-up that is longer than the run
        train = dataclasses.replace(variant.train, steps=steps)
        for seed in range(config.base.seed, config.base.seed + config.seeds):
            jobs.append(Job(name, dataclasses.replace(variant, train=train, seed=seed), flops, parameters))
    return jobs


def price(config: ImageConfig, source: Source) -> tuple[float, int]:
    """XLA's count of FLOPs for one training step and the number of parameters; nothing is compiled or run."""
    model = images.build(config, source)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    return images.price(config, model), sum(leaf.size for leaf in jax.tree.leaves(abstract))


def work(job: Job, held_out: Source, run: config_lib.Run) -> dict:
    """Trains one network and scores it."""
    session = images.open_session(job.config, run._replace(workdir=run.workdir / "runs" / job.name()))
    trained = images.train(session)
    return {
        "run": job.name(),
        "variant": job.variant,
        "seed": job.config.seed,
        "loss": scores.held_out_loss(session, trained.ema, held_out),
        "steps": job.config.train.steps,
        "parameters": job.parameters,
        "gflops_per_step": job.flops / 1e9,
    }


def main(config: Config, run: config_lib.Run) -> None:
    jobs = plan(config)
    held_out = make_source(config.base.data, config.base.eval.split)
    path = run.workdir / "results.json"
    results = results_lib.load(path, [])
    done = {result.get("run"): result for result in results}
    todo = [job for job in jobs if job.name() not in done]
    for i, job in enumerate(todo):
        print(f"[{i + 1}/{len(todo)}] {job.variant}, seed {job.config.seed}", file=sys.stderr)
        done[job.name()] = work(job, held_out, run)
        results.append(done[job.name()])
        results_lib.save(path, results)
    rows: dict[str, list[dict]] = {}
    for job in jobs:
        rows.setdefault(job.variant, []).append(done[job.name()])
    summary = [summarise(found) for found in rows.values()]
    seeds = f"{config.seeds} seed{'s' if config.seeds > 1 else ''}"
    text = table(summary, seeds)
    (run.workdir / "table.md").write_text(text)
    budget = jobs[0].flops * jobs[0].config.train.steps
    plots.ranking(
        run.workdir / "ablation.png",
        {row["variant"]: (row["loss"], row["spread"]) for row in summary},
        "held-out denoising loss (lower is better)",
        title=f"U-Net ablation at {budget / 1e12:.1f} TFLOP each, {seeds}",
    )
    print(text)
    print(f"everything lies in {run.workdir}")


def summarise(results: list[dict]) -> dict:
    """Of one variant: mean over seeds, and half the distance between the extremes."""
    losses = [result["loss"] for result in results]
    return {**results[0], "loss": float(np.mean(losses)), "spread": (max(losses) - min(losses)) / 2}


def table(summary: list[dict], seeds: str) -> str:
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
    return "\n".join(lines) + f"\n\nMean of {seeds} ± half their range.\n"


PRESETS = {"digits": digits, "cifar10": cifar10}

if __name__ == "__main__":
    config_lib.run(main, PRESETS, setup=init_distributed)
