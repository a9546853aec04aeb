"""`at_use` changes neither values nor gradients, and puts arrays together late: within loops, and again going back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.train.gather import at_use

X = jax.random.normal(jax.random.key(0), (4, 6))
STACK = jax.random.normal(jax.random.key(1), (3, 6, 6)) / 3
ONE = jax.random.normal(jax.random.key(2), (6, 6)) / 3


@jax.custom_vjp
def doubled(w):
    return 2 * w


doubled.defvjp(lambda w: (2 * w, None), lambda _, g: (2 * g,))


def scanned(stack, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), jnp.sum(w)), x, stack)


def checkpointed(stack, x):
    return jax.lax.scan(lambda h, w: (jax.checkpoint(lambda h: jnp.tanh(h @ w))(h), None), x, stack, reverse=True)[0]


CASES = {
    "plain": (lambda w, x: x @ w, ONE, [(6, 6)]),
    "jit": (jax.jit(lambda w, x: jnp.tanh(x @ w) @ w), ONE, [(6, 6)]),
    "converted": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), ONE, [(6, 6)]),
    "scan": (scanned, STACK, [(6, 6)]),
    "checkpoint": (checkpointed, STACK, [(6, 6)]),
    "constant": (lambda w, x: jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=3)[0], ONE, [(6, 6)]),
    "carried": (lambda w, x: jax.lax.scan(lambda w, x: (w / 2, x @ w), w, x), ONE, [(6, 6)]),
    "while": (lambda w, x: jax.lax.fori_loop(0, 3, lambda _, x: x @ w, x), ONE, [(6, 6)]),
    "custom": (lambda w, x: x @ doubled(w), ONE, [(6, 6)]),
    "returned": (lambda w, x: (w, x), ONE, [(6, 6)]),
    "unused": (lambda w, x: x, ONE, []),
}


@pytest.mark.parametrize(("f", "w", "shapes"), CASES.values(), ids=CASES.keys())
def test_it_computes_the_same(f, w, shapes):
    seen = []

    def whole(x, mark):
        seen.append(x.shape)
        assert len(mark) == x.ndim
        return x

    mark = (None, "fsdp", None)[-w.ndim :]
    late = at_use(f, whole, [mark, None])

    def value(f):
        def summed(w, x):
            y = f(w, x)
            return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(y)), y

        return jax.jit(jax.value_and_grad(summed, has_aux=True))

    got, want = value(late)(w, X), value(f)(w, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    assert set(seen) == set(shapes)


def test_a_split_stack_is_made_whole_before_its_loop():
    seen = []
    at_use(scanned, lambda x, _: seen.append(x.shape) or x, [("fsdp", None, None), None])(STACK, X)
    assert seen == [STACK.shape]


def test_the_whole_is_not_kept_for_the_gradient():
    """What the backward pass reads is the array before `whole`, here before a factor that it has to see."""
    late = at_use(scanned, lambda x, _: 2.0 * x, [(None, None, None), None])
    _, back = jax.vjp(lambda w: late(w, X)[0], STACK)
    kept = [leaf for leaf in jax.tree.leaves(back) if leaf.shape == STACK.shape]
    assert kept
    assert all(np.array_equal(leaf, STACK) for leaf in kept)


@pytest.mark.parametrize("policy", ["dots_saveable", "nothing_saveable"])
def test_checkpoints_keep_their_policies(policy):
    """No operation is computed again that was not before: the same floating-point operations."""
    policy = getattr(jax.checkpoint_policies, policy)

    def f(w, x):
        return jnp.sum(jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w), policy=policy)(w, x))

    def count(f):
        return jax.jit(jax.grad(f, (0, 1))).lower(ONE, X).compile().cost_analysis()["flops"]

    assert count(at_use(f, lambda x, _: x, [(None, "fsdp"), None])) == pytest.approx(count(f), rel=0.02)
