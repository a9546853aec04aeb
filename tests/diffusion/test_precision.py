"""Float32 against float64 over 1000 steps from t = 1 to t = 0, also where alpha or sigma vanishes there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import PROCESSES, blobs, key, relative

from diffrl.diffusion import mixtures, prediction, samplers
from diffrl.diffusion.dpm_solver import dpmpp_2m, dpmpp_2m_sde
from diffrl.diffusion.sampling import Sampler, sample
from diffrl.diffusion.unipc import unipc

STEPS, POINTS = 1000, 32
NOISE = np.random.default_rng(0).normal(size=(STEPS + 1, POINTS, 2))
SAMPLERS = {
    "ancestral": samplers.ancestral,
    "ddim": samplers.ddim,
    "heun": samplers.heun,
    "heun_flow": lambda p, d: samplers.heun(p, d, flow=True),
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc2": unipc,
    "unipc3": lambda p, d: unipc(p, d, 3),
}
# A head that is finite where alpha or sigma vanishes; where alpha does not, one that divides by it.
HEADS = {"cosine": prediction.v_head, "flow": prediction.velocity_head, "vp": prediction.eps_head}
CASES = [("cosine", name) for name in SAMPLERS if name != "heun_flow"]
CASES += [("flow", "heun_flow"), ("flow", "dpmpp_2m"), ("flow", "unipc3"), ("vp", "ddim"), ("vp", "unipc3")]


def with_given_noise(sampler):
    """The same noise in both precisions: that of step n, whose start is t = n / STEPS."""

    def step(keys, state, t, s, cond):
        after, info = sampler.step(keys, state, t, s, cond)
        n = jnp.round(t * STEPS).astype(int)
        return after._replace(x=info.mean + info.std * jnp.asarray(NOISE, after.x.dtype)[n]), info

    return Sampler(sampler.init, step)


def end(make, name, x64):
    """Where POINTS samples of the mixture end; the estimate passes through the head, as a network's would."""
    process, head = PROCESSES[name], HEADS[name](PROCESSES[name])
    with jax.enable_x64(x64):
        exact = mixtures.denoiser(blobs(), process)

        def model(x, t, cond):
            return prediction.to_output(process, head, x, t, exact(x, t))

        sampler = with_given_noise(make(process, prediction.denoiser(head, model)))
        x, grid = jnp.asarray(NOISE[-1] * 1.0), jnp.asarray(np.arange(STEPS, -1, -1) / STEPS)
        return np.asarray(jax.jit(lambda x, grid: sample(sampler, key(), x, grid))(x, grid))


@pytest.mark.parametrize(("process", "sampler"), CASES)
def test_float32_agrees_with_float64(process, sampler):
    exact = end(SAMPLERS[sampler], process, True)
    assert exact.dtype == np.float64
    assert np.all(np.isfinite(exact))
    assert relative(end(SAMPLERS[sampler], process, False), exact) < 1e-4
