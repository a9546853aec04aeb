"""The optimiser's config: schedules by hand, clipping, where the decay acts, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from diffrl.errors import UserError
from diffrl.train.optim import OptimConfig, make, schedule
from diffrl.train.step import global_step


@pytest.mark.parametrize(
    ("options", "steps", "rates"),
    [
        ({}, 4, [1, 1, 1, 1]),
        ({"warmup_steps": 4}, 6, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"warmup_steps": 1, "schedule": "linear"}, 5, [1, 1, 0.75, 0.5, 0.25]),
        # (1 + cos(pi n / 4)) / 2
        ({"schedule": "cosine"}, 4, [1, 0.853553, 0.5, 0.146447]),
        ({"warmup_steps": 2, "schedule": "cosine"}, 4, [0.5, 1, 1, 0.5]),
    ],
)
def test_schedules_by_hand(options, steps, rates):
    rate = schedule(OptimConfig(learning_rate=1.0, **options), steps)
    np.testing.assert_allclose([rate(n) for n in range(steps)], rates, atol=1e-6)


def test_metrics_name_the_rate_in_use():
    state, update = toy.fresh(), jax.jit(global_step(toy.make_update()()))
    for n in range(3):
        state, metrics = update(state, toy.batch(n))
        assert float(metrics["learning_rate"]) == pytest.approx(1e-2 * (n + 1) / 5)


@pytest.mark.parametrize(("clip", "norm"), [(1.0, 1.0), (0.0, 5.0), (10.0, 5.0)])
def test_clipping_bounds_what_adam_sees(clip, norm):
    optimizer = make(OptimConfig(clip_norm=clip, b1=0.9), 10)
    params = {"w": jnp.zeros(2)}
    _, state = optimizer.update({"w": jnp.array([3.0, 4.0])}, optimizer.init(params), params)
    (mean,) = optax.tree_utils.tree_get(state, "mu").values()
    assert float(jnp.linalg.norm(mean)) == pytest.approx(0.1 * norm)


def test_first_step_and_decay():
    """Adam's first step has the size of the learning rate; decay shrinks kernels and leaves biases alone."""
    optimizer = make(OptimConfig(learning_rate=0.1, weight_decay=0.5, clip_norm=0), 10)
    params = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full(2, 2.0)}
    grads = {"kernel": jnp.zeros((2, 2)), "bias": jnp.array([1e-3, -7.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], [-0.1, 0.1], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learning_rate": 0.0}, "optim.learning_rate=0.0: choose a value above 0"),
        ({"schedule": "cosin"}, "optim.schedule=cosin: .* constant, cosine, linear"),
        ({"warmup_steps": 11}, "optim.warmup_steps=11: .* between 0 and the 10 steps"),
        ({"b2": 1.0}, r"optim.b2=1.0: .* in \[0, 1\)"),
        ({"clip_norm": -1.0}, "optim.clip_norm=-1.0"),
        ({"weight_decay": float("nan")}, "optim.weight_decay=nan"),
    ],
)
def test_bad_values_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        make(OptimConfig(**options), 10)
