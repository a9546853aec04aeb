"""The optimiser as a config: AdamW (Loshchilov & Hutter, arXiv:1711.05101), clipping and a schedule, all optax's."""

import dataclasses

import jax
import optax

from diffrl.errors import UserError


@dataclasses.dataclass
class OptimConfig:
    """AdamW after clipping by the global norm.

    Attributes:
        learning_rate: the peak; update n of the warm-up (from 1) uses n / warmup_steps of it.
        schedule: after the warm-up: "constant", or "cosine" or "linear" down to zero at the last step.
        weight_decay: decoupled, on kernels and embeddings only (leaves of two or more axes).
        clip_norm: largest global norm of a gradient; 0 = no clipping.
    """

    learning_rate: float = 2e-4
    warmup_steps: int = 0
    schedule: str = "constant"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0


def make(config, steps) -> optax.GradientTransformation:
    """The transformation for a run of `steps` updates; the learning rate in use lies in its state, for the metrics.

    Raises:
        UserError: a value out of range, or a warm-up longer than the run.
    """
    _check(config, steps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=schedule(config, steps)),
    )


def schedule(config, steps) -> optax.Schedule:
    """Step (from 0) -> learning rate."""
    peak, rest = config.learning_rate, max(steps - config.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    # Step 0 already moves: a first update of exactly zero would be a step of compute thrown away.
    grow = optax.linear_schedule(peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([grow, after], [config.warmup_steps])


def _check(config, steps):
    """Raises UserError for the first value that cannot work."""
    schedules = ("constant", "cosine", "linear")
    rules = (
        ("learning_rate", config.learning_rate > 0, "above 0"),
        ("schedule", config.schedule in schedules, f"one of {', '.join(schedules)}"),
        ("b1", 0 <= config.b1 < 1, "in [0, 1)"),
        ("b2", 0 <= config.b2 < 1, "in [0, 1)"),
        ("eps", config.eps > 0, "above 0"),
        ("weight_decay", config.weight_decay >= 0, "0 or more"),
        ("clip_norm", config.clip_norm >= 0, "0 (off) or more"),
        ("warmup_steps", 0 <= config.warmup_steps <= steps, f"between 0 and the {steps} steps of the run"),
    )
    for name, good, remedy in rules:
        if not good:
            raise UserError(f"optim.{name}={getattr(config, name)}: choose a value {remedy}")
