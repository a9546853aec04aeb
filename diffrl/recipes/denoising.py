"""From the words of a config to the parts of `diffrl.diffusion`: process, head, objective and sampler."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffrl.config import leaf
from diffrl.diffusion import dpm_solver, guidance, losses, prediction, process, samplers, times, unipc
from diffrl.diffusion.sampling import Sampler, fold, sample, start
from diffrl.errors import UserError
from diffrl.train import mesh
from diffrl.train.state import Aux

Array = jax.Array

# What a sample's key is folded with, beyond the purposes of `losses`.
DROP, NETWORK, PREPARE = 101, 102, 103


@dataclasses.dataclass
class DiffusionConfig:
    """The noising process, what the network predicts, and the objective."""

    process: str = leaf(
        "cosine", "cosine, linear, sub_vp, flow, ve, or a table: ddpm (linear betas), improved (cosine)"
    )
    table_steps: int = leaf(1000, "T, the steps of a table", at_least=2)
    prediction: str = leaf("v", "what the network predicts: eps, x0, v, score, velocity or edm")
    times: str = leaf("uniform", "how t is drawn: uniform, discrete (a table's steps), log_normal or logit_normal")
    weight: str = leaf("none", "none (the head's own), snr, snr_plus_one, min_snr, p2, edm, sigmoid or variational")
    learned_variance: bool = leaf(False, "improved DDPM's hybrid loss: the network learns the reverse variance too")
    sigma_data: float = leaf(0.5, "standard deviation of the data, for edm", above=0)
    drop_label: float = leaf(
        0.1, "how often the label is replaced by the null class in training", at_least=0, at_most=1
    )


@dataclasses.dataclass
class SampleConfig:
    """How samples are drawn; may differ from one use of a model to the next."""

    sampler: str = leaf("ddim", "ancestral, ddim, euler, heun, dpmpp_2m, dpmpp_2m_sde or unipc", free=True)
    steps: int = leaf(50, "steps of the sampler", free=True, at_least=1)
    grid: str = leaf("linear", "linear, table (a table's own steps), karras or log_snr", free=True)
    eta: float = leaf(0.0, "ddim: 0 is deterministic, 1 has the posterior's variance", free=True, at_least=0, at_most=1)
    variance: float = leaf(
        0.0, "ancestral: 0 is the posterior's variance, 1 the forward step's", free=True, at_least=0, at_most=1
    )
    temperature: float = leaf(1.0, "ancestral: factor on the noise of its steps", free=True, at_least=0)
    guidance: float = leaf(1.0, "classifier-free guidance: 0 unconditional, 1 conditional, more is stronger", free=True)
    clip: bool = leaf(True, "keep the estimate of x_0 in [-1, 1]; pixels only", free=True)
    ema_width: float = leaf(
        0.0,
        "sigma_rel of the average to draw with, from a run with train.profiles_every; 0 = train.ema_decay's",
        free=True,
        at_least=0,
        at_most=0.288,
    )
    batch: int = leaf(256, "samples drawn at a time", free=True, at_least=1)
    count: int = leaf(100, "samples that --mode=sample draws, classes in turn", free=True, at_least=1)
    seed: int = leaf(0, "of the samples", free=True)


class Diffusion(NamedTuple):
    """A process with the head through which a network speaks, and the time that the network is shown."""

    process: process.Process
    head: prediction.Head
    objective: losses.Objective
    network_time: Callable[[Array], Array]
    learned: bool


def choose(what: str, name: str, options: dict[str, Any]) -> Any:
    """`options[name]`, or one clear line."""
    if name not in options:
        raise UserError(f"{what}={name!r} is not known: choose one of {', '.join(options)}")
    return options[name]


def make_diffusion(config: DiffusionConfig, fourier: bool = False) -> Diffusion:
    """The parts that `config` names.  fourier: the network's time features expect a time of order 1, not of order 1000.

    Raises:
      UserError: an unknown name, or learned variance without a table or with another draw of times.
    """
    length = config.table_steps
    # DDPM's betas are 0.1 / T ... 20 / T: with those of T = 1000, a shorter table would not end in noise.
    tables = {
        "ddpm": lambda: np.minimum(process.linear_betas(length, 0.1 / length, 20 / length), 0.999),
        "improved": lambda: process.cosine_betas(length),
    }
    if config.process in tables:
        chosen = process.tabulated(process.alpha_bars(tables[config.process]()))
    else:
        curves = {
            "cosine": process.cosine,
            "linear": process.vp,
            "sub_vp": process.sub_vp,
            "flow": process.flow,
            "ve": lambda: process.ve(0.002, 80.0),
        }
        chosen = choose("diffusion.process", config.process, {**curves, **tables})()
    heads = {
        "eps": prediction.eps_head,
        "x0": prediction.x0_head,
        "v": prediction.v_head,
        "score": prediction.score_head,
        "velocity": prediction.velocity_head,
        "edm": lambda p: prediction.edm_head(p, config.sigma_data),
    }
    head = choose("diffusion.prediction", config.prediction, heads)(chosen)
    weights = {
        "none": None,
        "snr": losses.snr,
        "snr_plus_one": losses.snr_plus_one,
        "min_snr": losses.min_snr(),
        "p2": losses.p2(),
        "edm": losses.edm(config.sigma_data),
        "sigmoid": losses.sigmoid(),
        "variational": losses.variational,
    }
    weight = choose("diffusion.weight", config.weight, weights)
    draws = {
        "uniform": times.uniform(),
        "discrete": times.discrete(config.table_steps),
        "log_normal": times.log_normal(chosen),
        "logit_normal": times.logit_normal(),
    }
    draw = choose("diffusion.times", config.times, draws)
    if config.learned_variance and config.process not in tables:
        raise UserError(
            f"diffusion.learned_variance needs a table: set diffusion.process to one of {', '.join(tables)}"
        )
    if config.learned_variance and config.times not in ("uniform", "discrete"):
        raise UserError(
            f"diffusion.times={config.times}: a learned variance is trained at the table's steps, all alike; "
            "set diffusion.times=discrete"
        )
    if config.learned_variance:
        objective = losses.hybrid(chosen, head, jnp.arange(config.table_steps + 1) / config.table_steps, weight)
    else:
        objective = losses.denoising(chosen, head, draw, weight)

    scale = 1.0 if fourier else 1000.0

    def network_time(t):
        if config.process in tables and not fourier:
            return t * config.table_steps - 1.0  # k = 0 ... T - 1, as published checkpoints have it
        if config.prediction == "edm":
            return scale * -0.125 * process.log_snr(chosen, t)  # log(sigma / alpha) / 4
        return scale * t

    return Diffusion(chosen, head, objective, network_time, config.learned_variance)


def make_loss(
    diffusion: Diffusion, apply: Callable, num_classes: int | None, drop_label: float, prepare: Callable | None = None
) -> Callable:
    """The `Loss` of the training step.

    apply: (params, x, t, label or None, keys [B]) -> y, a network's output.
    prepare: (x of a batch, keys [B], the state's frozen) -> x_0; None: x itself.
    """

    def loss(params, state, batch, keys):
        x0 = batch["x"] if prepare is None else prepare(batch["x"], fold(keys, PREPARE), state.frozen)
        label = batch["label"] if num_classes is not None else None
        if label is not None:
            label = guidance.drop_condition(fold(keys, DROP), label, num_classes, drop_label)
        network_keys = fold(keys, NETWORK)

        def model(x, t, cond):
            return apply(params, x, diffusion.network_time(t), cond, network_keys)

        value, metrics = diffusion.objective(model, x0, label, keys)
        return value.mean(), Aux({name: metric.mean() for name, metric in metrics.items()})

    return loss


def make_denoiser(diffusion: Diffusion, apply: Callable, params: Any) -> Callable:
    """(x, t, label) -> x_0, or (x_0, v) where the variance is learned."""

    def model(x, t, cond):
        return apply(params, x, diffusion.network_time(t), cond, None)

    make = prediction.with_variance if diffusion.learned else prediction.denoiser
    return make(diffusion.head, model)


def make_sampler(
    diffusion: Diffusion, config: SampleConfig, denoise: Callable, num_classes: int | None, section: str = "sample"
) -> Sampler:
    """The configured sampler, with guidance and clipping around the denoiser; section: of the flags, for messages."""
    if num_classes is not None and config.guidance != 1.0:
        denoise = guidance.classifier_free(denoise, config.guidance, num_classes)
    if config.clip:
        denoise = guidance.clip(denoise)
    mean = (lambda x, t, cond: denoise(x, t, cond)[0]) if diffusion.learned else denoise
    options = {
        "ancestral": lambda: samplers.ancestral(
            diffusion.process, denoise, config.variance, diffusion.learned, config.temperature
        ),
        "ddim": lambda: samplers.ddim(diffusion.process, mean, config.eta),
        "euler": lambda: samplers.euler(diffusion.process, mean),
        # EDM's variable wants EDM's grid; even steps in t are far too long in it at the noisy end.
        "heun": lambda: samplers.heun(diffusion.process, mean, flow=config.grid != "karras"),
        "dpmpp_2m": lambda: dpm_solver.dpmpp_2m(diffusion.process, mean),
        "dpmpp_2m_sde": lambda: dpm_solver.dpmpp_2m_sde(diffusion.process, mean),
        "unipc": lambda: unipc.unipc(diffusion.process, mean),
    }
    return choose(f"{section}.sampler", config.sampler, options)()


def make_grid(diffusion: Diffusion, config: SampleConfig, table_steps: int, section: str = "sample") -> Array:
    """The times that the sampler walks, [steps + 1].

    Where alpha(1) = 0 the grid starts just below 1, since a head that divides by alpha has no estimate there.
    """
    if config.steps < 1:
        raise UserError(f"{section}.steps={config.steps}: take at least 1")
    if config.grid == "table" and config.steps > table_steps:
        raise UserError(f"{section}.steps={config.steps} is more than the table's {table_steps}: take fewer")
    first = 1.0 if float(diffusion.process.alpha(jnp.ones(()))) > 0 else 0.999
    grids = {
        "linear": lambda: times.linear_grid(config.steps, first),
        "table": lambda: times.table_grid(table_steps, config.steps),
        "karras": lambda: times.karras_grid(diffusion.process, config.steps),
        "log_snr": lambda: times.log_snr_grid(diffusion.process, config.steps),
    }
    return choose(f"{section}.grid", config.grid, grids)()


def draw(
    sampler: Sampler, diffusion: Diffusion, grid: Array, key: Array, ids: Array, shape: tuple, label: Any
) -> Array:
    """Samples [B, *shape] with the ids [B]: sample i depends on (key, i) alone, whatever the batch it is drawn in."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)
    x = start(diffusion.process, keys, (len(ids), *shape), grid[0])
    return sample(sampler, keys, x, grid, label)


def in_chunks(
    draw: Callable[[dict], Array], labels: np.ndarray | None, num: int, batch: int, devices: jax.sharding.Mesh
) -> np.ndarray:
    """What `draw` makes of {"id": 0 ... `num` - 1, "label": theirs, if there are any}, about `batch` at a time.

    All chunks have one size, which the devices can share, so that one compiled program serves them: the last is padded.
    """
    parts = mesh.batch_parts(devices)
    size = max(1, min(batch, num) // parts) * parts
    starts = range(0, num, size)
    made = []
    for first in tqdm(starts, desc="sampling", unit="batch", disable=len(starts) < 4, leave=False):
        part = {"id": np.arange(first, first + size)}
        if labels is not None:
            part["label"] = np.resize(labels[first:num], size)
        made.append(mesh.fetch(draw(mesh.put_global(devices, part))))
    return np.concatenate(made)[:num]
