r"""The Fokker-Planck equation on a grid: how the density of dx = f(x, t) dt + g(t) dw moves.

    dp/dt = -div J,        J = f p - (g^2 / 2) grad p,

in finite volumes: p is a cell's mean, and each face between two cells carries the exponentially fitted flux

    J = (D / h) [B(-w) p_left - B(w) p_right],     D = g^2 / 2,  w = f h / D,  B(w) = w / (e^w - 1)

(Scharfetter & Gummel, 1969; Chang & Cooper, 1970).  It is central where diffusion rules and upwind where drift does,
second order in h for D > 0, and J = 0 gives p_right / p_left = e^w: the stationary density of a quadratic potential is
exact at the cells' centres.  Outer faces carry none.  What leaves a cell enters its neighbour, so mass is kept to
rounding, and Euler's step in time is as long as no cell gives away more than it has, so p >= 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.diffusion.checks import require_rising

Array = jax.Array
Drift = Callable[[Array, Array], Array]
Diffusion = Callable[[Array], Array]

# The share that is taken of the longest step that keeps p >= 0.
SAFETY = 0.9
LEAST_DIFFUSION = 1e-12  # D = 0 is pure drift: w stays finite


class Grid(NamedTuple):
    """A box cut into equal cells: its corners `low` and `high` [D], and the `cells` [D] along each axis."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    cells: tuple[int, ...]

    @property
    def widths(self) -> np.ndarray:
        """The cell's side along each axis, [D]."""
        return (np.array(self.high) - np.array(self.low)) / np.array(self.cells)

    def points(self, face: int | None = None) -> Array:
        """Centres of the cells [*cells, D]; or of the inner faces across axis `face`, of which there is one less."""
        axes = []
        for axis, (low, width, count) in enumerate(zip(self.low, self.widths, self.cells, strict=True)):
            offset = np.arange(1, count) if axis == face else np.arange(count) + 0.5
            axes.append(low + width * offset)
        return jnp.asarray(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1), jnp.result_type(float))


def normalised(grid: Grid, log_density: Array) -> Array:
    """The density [*cells] of mass 1 on the grid with this logarithm, known up to a constant."""
    p = jnp.exp(log_density - log_density.max())
    return p / (p.sum() * grid.widths.prod())


def mass(grid: Grid, p: Array) -> Array:
    """Total mass of a density [..., *cells]."""
    return p.sum(axis=tuple(range(-len(grid.cells), 0))) * grid.widths.prod()


def bernoulli(w: Array) -> Array:
    """B(w) = w / (e^w - 1) for w >= 0; the other half is B(-w) = B(w) + w."""
    safe = jnp.where(w == 0, 1.0, w)
    return jnp.where(w == 0, 1.0, safe / jnp.expm1(safe))


def _rates(grid: Grid, drift: Drift, diffusion: Diffusion, t: Array) -> list[tuple[Array, Array]]:
    """For each axis the rates, per unit time, at which its inner faces are crossed: (to the right, to the left)."""
    strength = jnp.maximum(0.5 * diffusion(t) ** 2, LEAST_DIFFUSION)
    rates = []
    for axis, width in enumerate(grid.widths):
        w = drift(grid.points(face=axis), t)[..., axis] * width / strength
        smaller = bernoulli(jnp.abs(w))  # of B(w) and B(-w)
        scale = strength / width**2
        rates.append((scale * (smaller + jnp.maximum(w, 0.0)), scale * (smaller + jnp.maximum(-w, 0.0))))
    return rates


def _pad(a: Array, axis: int, before: int, after: int) -> Array:
    return jnp.pad(a, [(before, after) if i == axis else (0, 0) for i in range(a.ndim)])


def _outflow(rates: list[tuple[Array, Array]]) -> Array:
    """The rate at which each cell empties [*cells]."""
    leaving = [_pad(right, axis, 0, 1) + _pad(left, axis, 1, 0) for axis, (right, left) in enumerate(rates)]
    return jnp.stack(leaving).sum(axis=0)


def _divergence(p: Array, rates: list[tuple[Array, Array]]) -> Array:
    """div J [*cells] as the difference of the fluxes through opposite faces."""
    total = jnp.zeros_like(p)
    for axis, (right, left) in enumerate(rates):
        last = p.shape[axis] - 1
        flux = right * jax.lax.slice_in_dim(p, 0, last, axis=axis) - left * jax.lax.slice_in_dim(p, 1, None, axis=axis)
        total += jnp.diff(_pad(flux, axis, 1, 1), axis=axis)
    return total


def solve(grid: Grid, p: Array, times: Array, drift: Drift, diffusion: Diffusion) -> Array:
    """Densities [N, *cells] at rising `times` [N], from p [*cells] >= 0 at times[0].

    drift: (x [..., D], t) -> [..., D].  diffusion: t -> g(t).  Both finite at `times`; a process's own are
    `partial(sde.drift, process)` and `partial(sde.diffusion, process)`.
    Between two times there are as many steps as positivity asks for, about (t - s) g^2 D / h^2, each with the rates of
    its middle; the rates are bounded by those at both ends and in the middle of the interval: exact if monotone.

    Raises:
      UserError: times that fall.
    """
    require_rising(times)

    def interval(p, ends):
        t, end = ends
        fastest = jax.vmap(lambda t: _outflow(_rates(grid, drift, diffusion, t)).max())(jnp.linspace(t, end, 3)).max()
        count = jnp.ceil((end - t) * fastest / SAFETY).astype(int) + 1
        dt = (end - t) / count

        def advance(n, carry):
            p, lost = carry
            rates = _rates(grid, drift, diffusion, t + (n + 0.5) * dt)
            # Kahan's summation: near a stationary state the changes are below p's rounding, and would add up unevenly.
            change = -dt * _divergence(p, rates) - lost
            new = p + change
            return new, (new - p) - change

        p, _ = jax.lax.fori_loop(0, count, advance, (p, jnp.zeros_like(p)))
        return p, p

    _, densities = jax.lax.scan(interval, p, (times[:-1], times[1:]))
    return jnp.concatenate([p[None], densities])
