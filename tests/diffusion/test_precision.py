"""Float32 against float64 over 1000 steps from t = 1 to t = 0, also where alpha or sigma vanishes there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import PROCESSES, blobs, key

from diffrl.diffusion import mixtures, prediction, samplers, sde, times
from diffrl.diffusion.dpm_solver import dpmpp_2m, dpmpp_2m_sde
from diffrl.diffusion.sampling import sample, start
from diffrl.diffusion.unipc import unipc

STEPS, POINTS = 1000, 32
SAMPLERS = {
    "ddim": samplers.ddim,
    "heun": samplers.heun,
    "heun_flow": lambda p, d: samplers.heun(p, d, flow=True),
    "dpmpp_2m": dpmpp_2m,
    "unipc2": unipc,
    "unipc3": lambda p, d: unipc(p, d, 3),
    "probability_flow": sde.probability_flow,
    "ancestral0": samplers.ancestral,
    "ancestral1": lambda p, d: samplers.ancestral(p, d, 1.0),
    "ddim0.5": lambda p, d: samplers.ddim(p, d, 0.5),
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "euler_maruyama": sde.euler_maruyama,
    "heun_churn": lambda p, d: samplers.churn(samplers.heun(p, d), p, 0.01),
}
# Heads that are finite where alpha or sigma vanishes; where alpha does not, some that divide by it.
HEADS = {
    "cosine": prediction.v_head,
    "vp": prediction.eps_head,
    "sub_vp": prediction.eps_head,
    "ddpm": prediction.eps_head,
    "flow": prediction.velocity_head,
    "ve": prediction.score_head,
}
GRIDS = {
    "linear": lambda process: times.linear_grid(STEPS),
    "karras": lambda process: times.karras_grid(process, STEPS),
    "log_snr": lambda process: times.log_snr_grid(process, STEPS),
}


def ends(sampler, name, grids, x64):
    """Where POINTS samples of the mixture end [grids, POINTS, 2]; estimates pass through the head like a network's."""
    process, head = PROCESSES[name], HEADS[name](PROCESSES[name])
    with jax.enable_x64(x64):
        exact = mixtures.denoiser(blobs(), process)

        def model(x, t, cond):
            return prediction.to_output(process, head, x, t, exact(x, t))

        made = SAMPLERS[sampler](process, prediction.denoiser(head, model))
        run = jax.jit(lambda x, grid: sample(made, key(1), x, grid))
        x = jax.jit(lambda: start(process, key(0), (POINTS, 2), dtype=jnp.result_type(float)))()
        return np.stack([run(x, jax.jit(GRIDS[grid], static_argnums=0)(process)) for grid in grids])


def errors(monkeypatch, *case):
    """Each sample's error [grids, POINTS] relative to the largest magnitude; both precisions get float32's noise."""
    draw = jax.random.normal
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: draw(key, shape, jnp.float32).astype(dtype))
    exact, single = (ends(*case, x64) for x64 in (True, False))
    assert (exact.dtype, single.dtype) == (np.float64, np.float32)
    assert np.all(np.isfinite(exact))
    return np.abs(single - exact).max(axis=2) / np.abs(exact).max(axis=(1, 2))[:, None]


@pytest.mark.parametrize(("sampler", "process", "grids"), [
    ("ddim", "cosine", ["linear", "karras", "log_snr"]),
    ("ddim", "sub_vp", ["linear"]),
    ("ddim", "ve", ["linear"]),
    ("ddim", "ddpm", ["linear"]),
    ("heun", "cosine", ["linear", "karras", "log_snr"]),
    ("heun", "ve", ["linear"]),
    ("heun_flow", "flow", ["linear", "karras"]),
    ("dpmpp_2m", "flow", ["linear", "karras", "log_snr"]),
    ("dpmpp_2m", "ve", ["linear"]),
    ("unipc2", "cosine", ["linear"]),
    ("unipc3", "vp", ["linear", "karras", "log_snr"]),
    ("probability_flow", "vp", ["linear"]),
])  # fmt: skip
def test_float32_agrees_with_float64(sampler, process, grids, monkeypatch):
    assert errors(monkeypatch, sampler, process, grids).max() < 3e-5


@pytest.mark.parametrize(("sampler", "process", "grids"), [
    ("ancestral0", "cosine", ["linear"]),
    ("ancestral1", "vp", ["linear"]),
    ("ddim0.5", "sub_vp", ["linear"]),
    ("dpmpp_2m_sde", "cosine", ["linear", "karras"]),
    ("euler_maruyama", "vp", ["linear"]),
    ("euler_maruyama", "ve", ["linear"]),
    ("heun_churn", "flow", ["karras"]),
])  # fmt: skip
def test_float32_agrees_with_float64_on_the_same_noise(sampler, process, grids, monkeypatch):
    """Nine samples in ten: a chain that comes between two components may leave them by either way."""
    assert np.quantile(errors(monkeypatch, sampler, process, grids), 0.9, axis=1).max() < 3e-5
