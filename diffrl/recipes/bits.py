"""Bits per dimension of held-out images: by the variational bound, and exactly by the probability flow."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.data.source import Source
from diffrl.diffusion import dequantisation, likelihood, ode_likelihood
from diffrl.diffusion.process import log_snr
from diffrl.diffusion.sampling import sample_keys
from diffrl.errors import UserError
from diffrl.recipes import denoising, judging
from diffrl.recipes.images import Session

Array = jax.Array


def variational_bound(session: Session, params: Any, held_out: Source) -> dict[str, Any]:
    """The variational bound of held-out images, given their labels, with its standard error."""
    config, model = session.config, session.model
    num = min(config.eval.bound_images, held_out.length)
    if not num:
        return {}
    steps: int = config.diffusion.table_steps if _has_table(session) else config.eval.bound_steps
    last = 1.0 if float(model.diffusion.process.alpha(jnp.ones(()))) > 0 else 0.999
    grid = jnp.linspace(0.0, last, steps + 1)

    @jax.jit
    def bound(params, keys, x, label):
        denoise = denoising.make_denoiser(model.diffusion, model.apply, params)
        learned, v = model.diffusion.learned, config.sample.variance
        return likelihood.variational_bound(model.diffusion.process, denoise, grid, keys, x, label, v, learned)["total"]

    values = _bits(session, held_out, num, functools.partial(bound, params), purpose=2)
    return {
        "bits_per_dim": float(values.mean()),
        "bits_per_dim_stderr": _standard_error(values),
        "bound_images": num,
        "bound_steps": steps,
    }


def exact(session: Session, params: Any, held_out: Source) -> dict[str, Any]:
    """-log2 P of held-out images, given their labels, by the probability-flow ODE, with its standard error.

    Above the model's own by the gap of the dequantisation alone; the trace is Hutchinson's, with one direction.
    """
    config, model = session.config, session.model
    num = min(config.eval.nll_images, held_out.length)
    if not num:
        return {}
    if config.eval.nll_steps < 1:
        raise UserError(f"eval.nll_steps={config.eval.nll_steps}: take at least 1")
    process = model.diffusion.process
    # A table's network has not seen noise below that of its first step.
    high = float(log_snr(process, jnp.asarray(1.0 / config.diffusion.table_steps))) if _has_table(session) else 13.3
    grid = ode_likelihood.noising_grid(process, config.eval.nll_steps, min(high, 13.3))
    dequantisers = {
        "uniform": dequantisation.uniform,
        "truncated_normal": dequantisation.truncated_normal(process, grid[0]),
    }
    dequantise = denoising.choose("eval.dequantisation", config.eval.dequantisation, dequantisers)

    @jax.jit
    def nll(params, keys, x, label):
        estimate = denoising.make_denoiser(model.diffusion, model.apply, params)
        denoise = (lambda x, t, cond: estimate(x, t, cond)[0]) if model.diffusion.learned else estimate

        def log_density(z, keys):
            return ode_likelihood.log_density(process, denoise, grid, keys, z, label).log_density

        return dequantisation.bits_per_dim(dequantise, log_density, keys, x)

    values = _bits(session, held_out, num, functools.partial(nll, params), purpose=3)
    return {
        "exact_bits_per_dim": float(values.mean()),
        "exact_bits_per_dim_stderr": _standard_error(values),
        "nll_images": num,
        "nll_steps": config.eval.nll_steps,
        "dequantisation": config.eval.dequantisation,
    }


def _has_table(session: Session) -> bool:
    return session.config.diffusion.process in ("ddpm", "improved")


def _standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _bits(session: Session, held_out: Source, num: int, measure: Callable, purpose: int) -> np.ndarray:
    """What `measure(keys [B], x, label)` finds for each of `num` held-out images, in batches; image i has key i."""
    if session.source.fetch(np.arange(1))["x"].dtype != np.uint8:
        raise UserError("bits/dim needs 8-bit images: set --config.eval.bound_images=0 and eval.nll_images=0")
    x, label = judging.spread(held_out, num)
    label = None if session.model.num_classes is None else label
    key = jax.random.fold_in(jax.random.key(session.config.sample.seed), purpose)
    keys = sample_keys(key, num)

    def of_rows(rows):
        return measure(keys[rows], x[rows], None if label is None else label[rows])

    return judging.in_batches(of_rows, num, session.config.sample.batch, desc="bits/dim")
