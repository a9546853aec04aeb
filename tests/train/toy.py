"""A denoising problem small enough to train in milliseconds, and its data, for the tests of this folder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.train import mesh, optim, step
from diffrl.train.state import Aux, create

B, D = 32, 16
SMALL = 100  # so that the hidden layer counts as a big leaf


def params():
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=shape) / 4 for shape in ((D, 2 * D), (2 * D, D)))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"a": first, "b": np.zeros(2 * D), "c": second})


def loss(params, state, batch, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, (D,)))(keys)
    guess = jnp.tanh((batch["x"] + noise) @ params["a"] + params["b"]) @ params["c"]
    return jnp.mean((guess - batch["x"]) ** 2), Aux({"size": jnp.mean(guess**2)})


def optimizer(steps=20):
    config = optim.OptimConfig(learning_rate=1e-2, warmup_steps=5, schedule="cosine", weight_decay=0.01)
    return optim.make(config, steps)


def fresh(seed=0):
    return create(params(), optimizer(), jax.random.key(seed))


def batch(i, size=B):
    return {"x": np.random.default_rng(i).normal(size=(size, D)).astype(np.float32)}


def make_update(**options):
    return functools.partial(step.make_update, loss, optimizer(), **options)


@functools.cache
def compiled(inner=1):
    """(step, state, put) over all devices; the step does not donate what `fresh` made, only its placed copy."""
    devices = mesh.make_mesh(data=2, fsdp=-1)
    one = step.global_step(make_update()())
    many = one if inner == 1 else step.repeat(one, inner)
    placed = functools.partial(mesh.place, devices, small=SMALL)
    call = mesh.compile_step(many, devices, fresh(), inner=inner > 1, small=SMALL)
    return call, lambda: placed(fresh()), mesh.put_batch(devices, inner=inner > 1)


class Data:
    """Batches 0, 1, 2, ... on the devices, with a position that can be saved."""

    def __init__(self, inner=1):
        self.place, self._inner, self._put = 0, inner, compiled(inner)[2]

    def __next__(self):
        group = [batch(self.place + i) for i in range(self._inner)]
        self.place += self._inner
        return self._put(group[0] if self._inner == 1 else {"x": np.stack([b["x"] for b in group])})

    def get_state(self):
        return {"place": self.place}

    def set_state(self, saved):
        self.place = saved["place"]


def host(tree):
    """Leaves as numpy, keys as their data."""
    plain = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
    return jax.device_get(plain)


def assert_close(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), host(a), host(b))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, host(a), host(b))
