"""The pure step: averages by hand, keys, accumulation, inner steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from diffrl.errors import UserError
from diffrl.train.state import Aux, Purpose, batch_keys, create, step_key
from diffrl.train.step import global_step, make_update, repeat


def falling(state, options, steps=3):
    """A parameter that falls by one per step: its averages after each."""
    update = global_step(make_update(lambda p, *_: (p["w"], Aux({})), optax.sgd(1.0), **options))
    for _ in range(steps):
        state, _ = update(state, {"x": jnp.zeros((2, 1))})
        yield float(state.ema["w"])


@pytest.mark.parametrize(
    ("options", "averages"),
    [
        # d = 1/10, 2/11, 3/12
        ({}, [-0.9, -1.8, -2.7]),
        # d = 1/10, then the cap
        ({"ema_decay": 0.15}, [-0.9, -1.835, -2.82525]),
        ({"ema_decay": 0.5, "ema_warmup": False}, [-0.5, -1.25, -2.125]),
        ({"ema_decay": 0.0}, [-1, -2, -3]),
    ],
)
def test_average_by_hand(options, averages):
    state = create({"w": jnp.zeros(())}, optax.sgd(1.0), jax.random.key(0))
    np.testing.assert_allclose(list(falling(state, options)), averages, rtol=1e-6)


def test_average_is_float32_and_optional():
    half = {"w": jnp.ones(3, jnp.bfloat16)}
    assert create(half, optax.sgd(1.0), jax.random.key(0)).ema["w"].dtype == jnp.float32
    assert create(half, optax.sgd(1.0), jax.random.key(0), ema=False).ema is None


def test_key_is_constant_and_the_step_counts():
    state, update = toy.fresh(), jax.jit(global_step(toy.make_update()()))
    for n in range(3):
        assert int(state.step) == n
        state, _ = update(state, toy.batch(n))
    toy.assert_same(state.key, jax.random.key(0))


def test_keys_belong_to_samples_steps_and_purposes():
    state = toy.fresh()
    few, many = toy.host(batch_keys(state, 3)), toy.host(batch_keys(state, 8))
    np.testing.assert_array_equal(few, many[:3])
    later = toy.host(batch_keys(state._replace(step=state.step + 1), 8))
    others = np.stack([toy.host(step_key(state, purpose)) for purpose in Purpose])
    everything = np.concatenate([many, later, others])
    assert len(np.unique(everything, axis=0)) == len(everything)


def test_jit_equals_no_jit():
    update, batch = global_step(toy.make_update()()), toy.batch(0, size=4)
    with jax.disable_jit():
        plain = update(toy.fresh(), batch)
    toy.assert_close(jax.jit(update)(toy.fresh(), batch), plain, 1e-6)


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_equals_the_whole_batch(parts):
    whole, cut = toy.fresh(), toy.fresh()
    one, many = (jax.jit(global_step(toy.make_update(accumulate=n)())) for n in (1, parts))
    for n in range(5):
        whole, expected = one(whole, toy.batch(n))
        cut, got = many(cut, toy.batch(n))
        toy.assert_close(got, expected, 1e-6)
    toy.assert_close(cut, whole, 1e-6)


def test_indivisible_accumulation_is_refused():
    with pytest.raises(UserError, match="batch of 32 cannot be accumulated in 5 parts"):
        global_step(toy.make_update(accumulate=5)())(toy.fresh(), toy.batch(0))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_extra_is_replaced_and_frozen_is_not(accumulate):
    def loss(params, state, batch, keys):
        seen = state.extra["seen"] + len(batch["x"])
        return jnp.sum(params["w"] * state.frozen), Aux({}, {"seen": seen})

    optimizer = optax.sgd(1.0)
    state = create(
        {"w": jnp.zeros(2)},
        optimizer,
        jax.random.key(0),
        frozen=jnp.arange(2.0),
        extra={"seen": jnp.int32(0)},
    )
    update = global_step(make_update(loss, optimizer, accumulate=accumulate))
    for _ in range(2):
        state, _ = update(state, {"x": jnp.zeros((8, 1))})
    assert int(state.extra["seen"]) == 16
    np.testing.assert_array_equal(state.params["w"], [0.0, -2.0])
    np.testing.assert_array_equal(state.frozen, [0.0, 1.0])


def test_reduce_comes_before_the_optimiser():
    update = toy.make_update()(reduce=lambda tree: jax.tree.map(jnp.zeros_like, tree))
    state, metrics = jax.jit(global_step(update))(toy.fresh(), toy.batch(0))
    assert float(metrics["grad_norm"]) == float(metrics["loss"]) == 0
    np.testing.assert_array_equal(state.params["b"], toy.params()["b"])


def test_inner_steps_equal_single_ones():
    single = jax.jit(global_step(toy.make_update()()))
    many = jax.jit(repeat(global_step(toy.make_update()()), 4))
    state, batches = toy.fresh(), [toy.batch(n) for n in range(4)]
    singles = []
    for batch in batches:
        state, metrics = single(state, batch)
        singles.append(metrics)
    scanned, metrics = many(toy.fresh(), {"x": np.stack([b["x"] for b in batches])})
    toy.assert_close(scanned, state, 1e-6)
    toy.assert_close(metrics, jax.tree.map(lambda *m: jnp.stack(m), *singles), 1e-6)
    assert int(scanned.step) == 4


def test_donating_a_state_leaves_its_arguments_alive():
    params, key = toy.params(), jax.random.key(0)
    state = create(params, toy.optimizer(), key)
    jax.jit(global_step(toy.make_update()()), donate_argnums=0)(state, toy.batch(0))
    assert state.params["a"].is_deleted()
    toy.assert_same((params, key), (toy.params(), jax.random.key(0)))
