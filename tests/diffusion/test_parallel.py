"""Sampling in parallel in time gives what the scan gives, in fewer rounds.

Rounds of a window over all N steps, for 64 samples of a mixture in the plane under the cosine process:

    tolerance    1e-2                1e-3                1e-4
    N            50   100   200      50   100   200      50   100   200
    ddim          8     8     8       9    10    10      10    12    12
    eta = 1      17    19    21      19    21    23      20    23    25
    ancestral    17    19    21      19    21    24      20    23    25
    Heun          7     7     8       9     9     9      10    10    11

and the largest difference from the scan's samples is below the tolerance in each.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import PROCESSES, blobs, key

from diffrl.diffusion import mixtures, times
from diffrl.diffusion.parallel import sample_parallel
from diffrl.diffusion.samplers import ancestral, ddim, heun
from diffrl.diffusion.sampling import Info, Sampler, State, sample, sample_keys, start
from diffrl.errors import UserError
from diffrl.train import mesh

PROCESS = PROCESSES["cosine"]
EXACT = mixtures.denoiser(blobs(), PROCESS)


def denoise(x, t, cond):
    """The exact denoiser, moved by each sample's own condition."""
    return EXACT(x, t) + 0.1 * cond[:, None]


SAMPLERS = {
    "ddim": ddim(PROCESS, denoise),
    "ddim, eta = 1": ddim(PROCESS, denoise, 1.0),
    "ancestral": ancestral(PROCESS, denoise, 1.0),
    "heun": heun(PROCESS, denoise),
}
COND = jnp.linspace(-1.0, 1.0, 64)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def both(name, steps, window, tolerance, keys, x, cond):
    """(the scan's samples, ours, rounds)"""
    grid, sampler = times.linear_grid(steps, 0.99), SAMPLERS[name]
    sequential = sample(sampler, keys, x, grid, cond)
    return sequential, *sample_parallel(sampler, keys, x, grid, cond, window, tolerance)


def compare(name, steps, window, tolerance, batch=64):
    x = start(PROCESS, key(0), (batch, 2), 0.99)
    sequential, found, rounds = both(name, steps, window, tolerance, sample_keys(key(1), batch), x, COND[:batch])
    return float(jnp.abs(found - sequential).max()), int(rounds)


# Largest number of rounds for tolerances 1e-2, 1e-3 and 1e-4, of N = 100: the docstring's, and one to spare.
ROUNDS = {"ddim": (9, 11, 13), "ddim, eta = 1": (20, 22, 24), "ancestral": (20, 22, 24), "heun": (8, 10, 11)}


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_samples_in_few_rounds(name):
    for tolerance, most in zip((1e-2, 1e-3, 1e-4), ROUNDS[name], strict=True):
        difference, rounds = compare(name, 100, 100, tolerance)
        assert difference < tolerance
        assert rounds <= most


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_tolerance_the_samples_are_the_sequential_ones(name):
    difference, rounds = compare(name, 100, 100, 0.0)
    assert difference < 1e-5
    assert 1 < rounds <= 100


@pytest.mark.parametrize("window", [1, 7, 30])
def test_sliding_windows(window):
    """A window that N is no multiple of; one of 1 is the sequential sampler, round by round."""
    difference, rounds = compare("ancestral", 100, window, 1e-3)
    assert difference < (1e-6 if window == 1 else 3e-3)
    assert rounds == 100 if window == 1 else 100 / window < rounds < 60


def test_k_rounds_settle_k_steps_whatever_the_guesses():
    """A chaotic map, of which no guess is any good: N rounds for N steps, and then the exact path."""

    def step(keys, state, t, s, cond):
        x = 3.9 * state.x * (1 - state.x)
        return State(x), Info(x, x, t)

    x, grid = jnp.linspace(0.1, 0.6, 5)[:, None], times.linear_grid(40)
    found, rounds = sample_parallel(Sampler(State, step), key(), x, grid, window=40, tolerance=1e-6)
    sequential = sample(Sampler(State, step), key(), x, grid)
    assert rounds > 35
    np.testing.assert_allclose(found, sequential, atol=0.02)  # rounding grows by e^{0.5} a step


def test_guesses_that_overflow_are_mended():
    """Values beyond float32 in the window do not reach the samples."""

    def step(keys, state, t, s, cond):
        x = jnp.where(t > 0.5, 0.1 * state.x, 0.5 * state.x * jnp.exp(state.x))
        return State(x), Info(x, x, t)

    x, grid = jnp.full((3, 2), 3e4), times.linear_grid(12)
    found, rounds = sample_parallel(Sampler(State, step), key(), x, grid, window=12, tolerance=0.0)
    sequential = sample(Sampler(State, step), key(), x, grid)
    assert rounds <= 12
    assert np.all(sequential > 1e-4)
    np.testing.assert_allclose(found, sequential, rtol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def walk(place, keys, x, cond):
    return sample_parallel(SAMPLERS["ddim"], keys, x, times.linear_grid(100, 0.99), cond, window=40, place=place)


@pytest.mark.parametrize("spread", ["samples", "window"])
def test_eight_devices_give_the_same(spread):
    """The samples, or the window's steps, on eight devices: the same rounds, and samples to 1e-5."""
    devices = mesh.make_mesh()
    rows = mesh.batch_sharding(devices)
    seen = []

    def place(states):
        if spread == "window":
            states = mesh.spread(devices)(states)
        jax.debug.inspect_array_sharding(states, callback=seen.append)
        return states

    arguments = sample_keys(key(1), 64), start(PROCESS, key(0), (64, 2), 0.99), COND
    alone = walk(lambda states: states, *arguments)
    found = walk(place, *(jax.device_put(a, rows) if spread == "samples" else a for a in arguments))
    shape = (40, 8, 2) if spread == "samples" else (5, 64, 2)
    assert seen[0].shard_shape((40, 64, 2)) == shape
    assert int(found[1]) == int(alone[1]) < 50
    np.testing.assert_allclose(found[0], alone[0], atol=1e-5)


def test_a_sampler_with_a_memory_is_refused():
    two_step = Sampler(lambda x: State(x, x), SAMPLERS["ddim"].step)
    with pytest.raises(UserError, match="memory"):
        sample_parallel(two_step, key(), jnp.zeros((2, 2)), times.linear_grid(4), COND[:2])
    with pytest.raises(UserError, match="window=0"):
        sample_parallel(SAMPLERS["ddim"], key(), jnp.zeros((2, 2)), times.linear_grid(4), COND[:2], window=0)


def test_the_program_does_not_grow_with_the_number_of_steps():
    sizes = []
    for steps in (50, 500):
        grid = jnp.linspace(0.99, 0.0, steps + 1)
        program = jax.make_jaxpr(lambda x: sample_parallel(SAMPLERS["ddim"], key(), x, grid, COND[:2], window=8))
        sizes.append(str(program(jnp.zeros((2, 2)))).count(" = "))
    assert sizes[0] == sizes[1] > 10
