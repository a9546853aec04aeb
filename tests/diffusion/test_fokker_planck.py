"""The grid's densities: mass, positivity, stationary laws, closed forms, particles and the order in h."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from diffusion_cases import key

from diffrl.diffusion import fokker_planck as fp
from diffrl.diffusion import mixtures, sde
from diffrl.diffusion import process as P
from diffrl.diffusion.sampling import sample
from diffrl.errors import UserError

TIMES = jnp.array([0.0, 0.1, 0.5, 2.0])
LINE = fp.Grid((-3.0,), (3.0,), (150,))
TEMPERATURE = 0.3


def potential(x):
    return (x**2 - 1.0) ** 2 + 0.2 * x


def well_drift(x, t):
    return -4.0 * x * (x**2 - 1.0) - 0.2


def constant(g):
    return lambda t: jnp.asarray(g)


def distance(grid, p, q):
    """The L1 distance of two densities, between 0 and 2."""
    return float(np.abs(np.asarray(p, np.float64) - np.asarray(q, np.float64)).sum() * grid.widths.prod())


def check_mass_and_sign(grid, densities):
    masses = np.asarray(densities, np.float64).reshape(len(densities), -1).sum(axis=1) * grid.widths.prod()
    np.testing.assert_allclose(masses, masses[0], rtol=1e-6)
    assert np.min(densities) >= 0.0


@functools.cache
def double_well():
    """From N(0.9, 0.2^2) to time 2."""
    start = fp.normalised(LINE, -0.5 * ((LINE.points()[:, 0] - 0.9) / 0.2) ** 2)
    g = constant(np.sqrt(2 * TEMPERATURE))
    return np.asarray(jax.jit(lambda p: fp.solve(LINE, p, TIMES, well_drift, g))(start))


def test_mass_and_sign_in_a_double_well():
    densities = double_well()
    assert densities.shape == (4, 150)
    assert fp.mass(LINE, densities) == pytest.approx(1.0, abs=1e-5)
    check_mass_and_sign(LINE, densities)


def test_the_density_is_that_of_particles():
    """Wasserstein distance to 20,000 Euler-Maruyama particles, at each time."""
    x = 0.9 + 0.2 * jax.random.normal(key(0), (20_000, 1))
    sampler = sde.simulate(well_drift, constant(np.sqrt(2 * TEMPERATURE)))
    run = jax.jit(lambda x: sample(sampler, key(1), x, jnp.linspace(0.0, 2.0, 1001), trace=lambda x, info: x[:, 0])[1])
    paths = np.asarray(run(x))
    centres = np.asarray(LINE.points()[:, 0])
    for t, p in zip(np.asarray(TIMES[1:]), double_well()[1:], strict=True):
        particles = paths[round(500 * t) - 1]
        assert scipy.stats.wasserstein_distance(particles, centres, v_weights=p) < 0.02


def test_a_quadratic_potentials_stationary_density_stays():
    """The flux vanishes exactly at Boltzmann's ratio, on a grid as coarse as the standard deviation."""
    grid = fp.Grid((-5.0, -5.0), (5.0, 5.0), (12, 20))
    start = fp.normalised(grid, -0.5 * (grid.points() ** 2 / jnp.array([1.0, 0.5])).sum(axis=-1))
    theta = jnp.array([1.0, 2.0])
    densities = fp.solve(grid, start, jnp.array([0.0, 1.0, 10.0]), lambda x, t: -theta * x, constant(np.sqrt(2.0)))
    np.testing.assert_allclose(densities[-1], start, rtol=1e-4, atol=1e-7)
    check_mass_and_sign(grid, densities)


def test_a_double_well_settles_in_boltzmanns_density():
    grid = fp.Grid((-2.5,), (2.5,), (200,))
    centres = np.asarray(grid.points()[:, 0], np.float64)
    boltzmann = fp.normalised(grid, jnp.asarray(-potential(centres), jnp.float32))
    flat = jnp.full(200, 0.2)
    run = jax.jit(lambda p: fp.solve(grid, p, jnp.array([0.0, 20.0]), well_drift, constant(np.sqrt(2.0))))
    densities = run(flat)
    assert distance(grid, densities[1], boltzmann) < 2e-3
    check_mass_and_sign(grid, densities)


def test_pure_diffusion_spreads_exactly():
    """Far from the walls the second moment on the grid grows by g^2 t, to rounding."""
    grid = fp.Grid((-8.0,), (8.0,), (160,))
    x = np.asarray(grid.points()[:, 0], np.float64)
    start = fp.normalised(grid, jnp.asarray(-0.5 * x**2, jnp.float32))
    densities = fp.solve(grid, start, jnp.array([0.0, 0.7]), lambda x, t: 0.0 * x, constant(1.1))
    moments = [np.sum(x**2 * p) / np.sum(p) for p in np.asarray(densities, np.float64)]
    assert moments[1] - moments[0] == pytest.approx(1.1**2 * 0.7, rel=1e-4)


def test_pure_drift_moves_and_stays_positive():
    """g = 0: the upwind limit, which smears but neither loses mass nor oscillates."""
    grid = fp.Grid((-2.0, -2.0), (2.0, 2.0), (80, 60))
    points = grid.points()
    block = jnp.where(jnp.all(jnp.abs(points + 0.7) < 0.4, axis=-1), 1.0, 0.0)
    start = block / fp.mass(grid, block)
    wind = jnp.array([1.0, 0.5])
    end = fp.solve(grid, start, jnp.array([0.0, 1.0]), lambda x, t: jnp.broadcast_to(wind, x.shape), constant(0.0))
    check_mass_and_sign(grid, end)
    means = jnp.einsum("nij,ijd->nd", end, points) * grid.widths.prod()
    np.testing.assert_allclose(means[1] - means[0], wind, atol=2e-3)


BLOBS = mixtures.mixture([0.6, 0.4], [[-0.7, 0.3], [0.8, -0.2]], [0.06, 0.12])


def exact(m, grid, process, t):
    points = grid.points()
    density = jax.jit(mixtures.log_density, static_argnums=1)
    values = density(m, process, points.reshape(-1, points.shape[-1]), t)
    return np.asarray(jnp.exp(values)).reshape(grid.cells)


@pytest.mark.parametrize("name", ["vp", "sub_vp"])
def test_a_processs_marginal_in_the_plane(name):
    process = {"vp": P.vp(0.1, 8.0), "sub_vp": P.sub_vp(0.1, 8.0)}[name]
    grid = fp.Grid((-3.6, -3.6), (3.6, 3.6), (60, 60))
    times = jnp.array([0.0, 0.2, 0.6])
    start = jnp.asarray(exact(BLOBS, grid, process, 0.0))
    field = functools.partial(sde.drift, process), functools.partial(sde.diffusion, process)
    densities = jax.jit(lambda p: fp.solve(grid, p, times, *field))(start)
    for t, p in zip(times, densities, strict=True):
        assert distance(grid, p, exact(BLOBS, grid, process, t)) < 0.02
    check_mass_and_sign(grid, densities)


def test_second_order_in_space():
    """And in h altogether, since the time step shrinks with h^2: errors against a mixture's exact marginal."""
    m, process = mixtures.mixture([0.6, 0.4], [[-0.7], [0.8]], [0.06, 0.12]), P.vp(0.1, 8.0)
    field = functools.partial(sde.drift, process), functools.partial(sde.diffusion, process)
    counts, errors = np.array([40, 80, 160]), []
    for count in counts:
        grid = fp.Grid((-3.5,), (3.5,), (int(count),))
        start = jnp.asarray(exact(m, grid, process, 0.0))
        end = jax.jit(lambda p, grid=grid: fp.solve(grid, p, jnp.array([0.0, 0.3]), *field))(start)[1]
        errors.append(distance(grid, end, exact(m, grid, process, 0.3)))
    assert np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(-2.0, abs=0.2)


def test_the_program_does_not_grow_with_the_number_of_times():
    sizes = []
    for count in (3, 300):
        times = jnp.linspace(0.0, 1.0, count)
        jaxpr = jax.make_jaxpr(lambda p, times: fp.solve(LINE, p, times, well_drift, constant(1.0)))(
            jnp.ones(150), times
        )
        sizes.append(len(str(jaxpr).splitlines()))
    assert sizes[0] == sizes[1]


def test_times_that_fall_are_one_line():
    with pytest.raises(UserError, match="times fall from 1 to 0"):
        fp.solve(LINE, jnp.ones(150) / 6.0, jnp.array([1.0, 0.0]), lambda x, t: -x, lambda t: 1.0)
