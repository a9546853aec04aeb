"""Every sampler of the library by name, with what it costs in network calls: what a comparison runs over."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.config import leaf
from diffrl.diffusion import dpm_solver, langevin, samplers, sde, unipc
from diffrl.diffusion.process import Process
from diffrl.diffusion.sampling import Info, Sampler
from diffrl.evaluate import plots


@dataclasses.dataclass
class SolverConfig:
    """How much noise the samplers have that can have more or less of it."""

    s_churn: float = leaf(10.0, "of Heun with churn: how much noise a whole walk adds", at_least=0)
    snr: float = leaf(0.16, "of predictor-corrector: noise to gradient, which sets the corrector's step", at_least=0)
    langevin: float = leaf(0.3, "of annealed Langevin: a move at level sigma is this times sigma^2 long", at_least=0)


class Method(NamedTuple):
    """A step makes `calls` network calls; the last one makes one."""

    make: Callable[[Process, Callable, jax.Array], Sampler]  # (process, denoise, number of steps) -> sampler
    colour: str
    follows: bool = True  # a solver of the probability flow
    calls: int = 1
    plane: bool = True  # of use in two dimensions

    def steps(self, budget: int) -> int:
        """The most steps that cost no more than `budget` calls."""
        return (budget + self.calls - 1) // self.calls


def methods(config: SolverConfig) -> dict[str, Method]:
    """All samplers by name; a method with and without noise has one colour where there are both."""
    blue, red, green, pink, orange, sky, black, grey = plots.COLOURS

    def churn(p, d, n):
        gamma = jnp.minimum(config.s_churn / n, np.sqrt(2.0) - 1.0)
        return samplers.churn(samplers.heun(p, d, flow=True), p, gamma)

    def predictor_corrector(p, d, n):
        return sde.predictor_corrector(samplers.ancestral(p, d), p, d, snr=config.snr)

    return {
        "DDIM = Euler": Method(lambda p, d, n: samplers.ddim(p, d), blue),
        "Euler in t": Method(lambda p, d, n: sde.probability_flow(p, d), grey),
        "Heun (EDM)": Method(lambda p, d, n: samplers.heun(p, d), black, calls=2),
        "Heun (flow)": Method(lambda p, d, n: samplers.heun(p, d, flow=True), green, calls=2),
        "DPM-Solver++(2M)": Method(lambda p, d, n: dpm_solver.dpmpp_2m(p, d), red),
        "UniPC-2": Method(lambda p, d, n: unipc.unipc(p, d, 2), orange),
        "UniPC-3": Method(lambda p, d, n: unipc.unipc(p, d, 3), pink),
        "ancestral, small = DDIM, eta 1": Method(lambda p, d, n: samplers.ancestral(p, d), blue, False),
        "ancestral, large": Method(lambda p, d, n: samplers.ancestral(p, d, 1.0), sky, False),
        "Euler-Maruyama": Method(lambda p, d, n: sde.euler_maruyama(p, d), grey, False),
        "Heun (flow), churn": Method(churn, green, False, 2),
        "SDE-DPM-Solver++(2M)": Method(lambda p, d, n: dpm_solver.dpmpp_2m_sde(p, d), red, False),
        # Its step divides by the gradient, which vanishes somewhere in the plane and hardly ever in many dimensions.
        "predictor-corrector": Method(predictor_corrector, pink, False, 2, plane=False),
        "annealed Langevin": Method(lambda p, d, n: langevin.annealed(p, d, 1, config.langevin), orange, False),
    }


def still_at_the_end(sampler: Sampler) -> Sampler:
    """Does nothing where the grid repeats a time: grids of every length, so padded, share one compiled program."""

    def step(keys, state, t, s, cond):
        state = jax.lax.cond(s < t, lambda _: sampler.step(keys, state, t, s, cond)[0], lambda _: state, None)
        return state, Info(state.x, state.x, jnp.zeros(()))  # nobody asks

    return Sampler(sampler.init, step)
