"""The scan over time and the randomness of samples: batch sizes, chunks, devices, traces, compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import PROCESSES, blobs, key
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffrl.diffusion import constraints, guidance, langevin, mixtures, sde, times
from diffrl.diffusion.consistency import consistency_sampler
from diffrl.diffusion.dpm_solver import dpmpp_2m, dpmpp_2m_sde
from diffrl.diffusion.samplers import ancestral, churn, ddim, heun
from diffrl.diffusion.sampling import Info, Sampler, State, fold, normal, sample, sample_keys, start
from diffrl.diffusion.unipc import unipc

PROCESS = PROCESSES["cosine"]
EXACT = mixtures.denoiser(blobs(), PROCESS)
GRID = times.linear_grid(6, 0.99)


def denoise(x, t, cond):
    """The exact denoiser, moved by a condition, on images [B, 3, 2] of three points each."""
    points = jax.vmap(EXACT, in_axes=(1, None), out_axes=1)(x, t)
    return points if cond is None else points + 0.1 * cond[:, None, None]


# What draws and walks, jitted once: (key or keys, ids or conditions) -> (noise of every step, x_T, x_0).
SAMPLER = ancestral(PROCESS, denoise, 1.0)


def draw_only(keys, state, t, s, cond):
    return State(normal(keys, state.x)), Info(state.x, state.x, s)


@jax.jit
def walk(keys, cond):
    x = start(PROCESS, keys, (len(cond), 3, 2), GRID[0])
    noise = sample(Sampler(State, draw_only), keys, x, GRID, trace=lambda x, info: x)[1]
    return noise, x, sample(SAMPLER, keys, x, GRID, cond)


COND = jnp.arange(8.0)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_sample_does_not_know_its_batch(batch):
    """Its noise at the start and at every step is bitwise its own; its image is, to 1e-4."""
    noise, x_start, x_end = walk(key(3), COND)
    few_noise, few_start, few_end = walk(key(3), COND[:batch])
    np.testing.assert_array_equal(few_noise, noise[:, :batch])
    np.testing.assert_array_equal(few_start, x_start[:batch])
    np.testing.assert_allclose(few_end, x_end[:batch], atol=1e-4)


def test_chunks_keep_their_ids():
    """Samples 5 ... 7, drawn by themselves from their own keys."""
    noise, x_start, x_end = walk(key(3), COND)
    ids = jax.vmap(lambda i: jax.random.fold_in(key(3), i))(jnp.arange(5, 8))
    chunk_noise, chunk_start, chunk_end = walk(ids, COND[5:])
    np.testing.assert_array_equal(chunk_noise, noise[:, 5:])
    np.testing.assert_array_equal(chunk_start, x_start[5:])
    np.testing.assert_allclose(chunk_end, x_end[5:], atol=1e-4)


def test_eight_devices_draw_the_same():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    keys = jax.device_put(sample_keys(key(3), 8), rows)
    sharded = walk(keys, jax.device_put(COND, rows))
    alone = walk(key(3), COND)
    assert len(sharded[2].sharding.device_set) == 8
    for a, b in zip(sharded[:2], alone[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(sharded[2], alone[2], atol=1e-4)


def test_one_key_is_its_folded_keys():
    keys = sample_keys(key(3), 8)
    assert keys.shape == (8,)
    np.testing.assert_array_equal(jax.random.key_data(sample_keys(keys, 8)), jax.random.key_data(keys))
    for a, b in zip(walk(key(3), COND), walk(keys, COND), strict=True):
        np.testing.assert_array_equal(a, b)


def test_noise_is_fresh():
    """Steps, samples and the start all differ, and are standard normal."""
    noise, x_start, _ = walk(key(3), COND)
    rows = np.concatenate([np.asarray(noise).reshape(-1, 6), np.asarray(x_start).reshape(-1, 6)])
    assert len(np.unique(rows[:, 0])) == len(rows) == 56
    big = np.asarray(normal(sample_keys(key(0), 2000), jnp.zeros((2000, 10))))
    assert big.mean() == pytest.approx(0.0, abs=0.03)
    assert big.std() == pytest.approx(1.0, abs=0.02)
    correlation = np.corrcoef(big.T) - np.eye(10)
    assert np.abs(correlation).max() < 0.1
    assert not np.array_equal(normal(fold(sample_keys(key(0), 2), 1), big[:2]), big[:2])


@pytest.mark.parametrize(("name", "t", "std"), [("ve", 1.0, 50.0), ("cosine", 0.5, 1.0), ("flow", 0.5, 0.5**0.5)])
def test_start_is_unit_data_with_the_processs_noise(name, t, std):
    x = start(PROCESSES[name], key(0), (5000, 4), t)
    assert x.dtype == jnp.float32
    assert float(x.std()) == pytest.approx(std, rel=0.03)


def test_traces_end_with_the_result():
    x = start(PROCESS, key(0), (2, 3, 2))

    @jax.jit
    def run(x):
        plain = sample(SAMPLER, key(1), x, GRID)
        traced = sample(SAMPLER, key(1), x, GRID, trace=True)
        kept = sample(SAMPLER, key(1), x, GRID, trace=lambda x, info: {"x0": info.x0[:, 0], "std": info.std})
        return plain, traced, kept

    plain, (final, (path, info)), (same, kept) = run(x)
    assert path.shape == (6, 2, 3, 2)
    assert info.std.shape == (6,)
    np.testing.assert_array_equal(path[-1], final)
    for last in (final, same):
        np.testing.assert_allclose(last, plain, atol=1e-6)
    np.testing.assert_array_equal(kept["x0"], info.x0[:, :, 0])
    np.testing.assert_array_equal(info.mean[-1], final)  # the step into sigma = 0 adds no noise
    # The path is what the reported Gaussians and the samples' own noise make it.
    noise = jnp.stack([normal(fold(sample_keys(key(1), 2), n), x) for n in range(6)])
    np.testing.assert_allclose(path, info.mean + info.std[:, None, None, None] * noise, atol=1e-6)


def test_jit_equals_no_jit():
    x = start(PROCESS, key(0), (2, 3, 2))

    def run(x):
        return sample(SAMPLER, key(1), x, GRID[-4:])

    with jax.disable_jit():
        plain = run(x)
    np.testing.assert_allclose(jax.jit(run)(x), plain, atol=1e-5)


def test_memory_is_carried():
    """A multistep sampler's state: here it counts steps and sums the times that it is given."""

    def init(x):
        return State(x, (jnp.zeros((), jnp.int32), jnp.zeros(())))

    def step(keys, state, t, s, cond):
        count, total = state.memory
        return State(state.x + count, (count + 1, total + t - s)), Info(state.x, state.x, total)

    x, kept = sample(Sampler(init, step), key(), jnp.zeros((2, 1)), GRID, trace=lambda x, info: info.std)
    np.testing.assert_array_equal(x, np.full((2, 1), 15.0))
    np.testing.assert_allclose(kept, 0.99 - np.asarray(GRID[:-1]), atol=1e-6)


def with_momentum(process, denoise):
    return guidance.momentum(lambda f: ddim(process, f), guidance.against_model(denoise, denoise), 2.0)


MAKERS = {
    "ancestral": ancestral,
    "ddim": ddim,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
    "euler_maruyama": sde.euler_maruyama,
    "probability_flow": sde.probability_flow,
    "forward": lambda p, d: sde.forward(p),
    "predictor_corrector": lambda p, d: sde.predictor_corrector(ddim(p, d), p, d),
    "annealed": langevin.annealed,
    "churn": lambda p, d: churn(heun(p, d), p, 0.1),
    "momentum": with_momentum,
    "repaint": lambda p, d: constraints.repaint(ancestral(p, d), p, jnp.zeros((2, 3, 2)), jnp.array([True, False])),
    "consistency": consistency_sampler,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_program_does_not_grow_with_the_number_of_steps(make):
    x = jnp.zeros((2, 3, 2))
    sizes = []
    for steps in (5, 500):

        def run(x, grid):
            return sample(make(PROCESS, denoise), key(), x, grid)

        jaxpr = jax.make_jaxpr(run)(x, jnp.linspace(0.99, 0.0, steps + 1))
        sizes.append(len(str(jaxpr).replace(str(steps + 1), "N").replace(str(steps), "N").splitlines()))
    assert sizes[0] == sizes[1] > 10
