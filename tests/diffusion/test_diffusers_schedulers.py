"""Tables, grids, single steps and whole walks against diffusers' schedulers, on one deterministic model.

Walks are compared in float64, with diffusers' tables, which it makes in float32, replaced by ours: DDPM, DDIM, Heun and
UniPC to twelve digits.  Its Euler, EDM, flow-matching and DPM-Solver++ schedulers cast every step to float32, whatever
they are given: they agree to FLOAT32.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import key, relative

from diffrl.diffusion import losses, prediction, samplers, times
from diffrl.diffusion import process as P
from diffrl.diffusion.dpm_solver import dpmpp_2m, dpmpp_2m_sde
from diffrl.diffusion.sampling import Sampler, sample
from diffrl.diffusion.unipc import unipc

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="torch of the [oracles] extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers of the [oracles] extra is not installed")

T = 1000
BETAS = {
    "linear": P.linear_betas(),
    "scaled_linear": P.scaled_linear_betas(),
    "squaredcos_cap_v2": P.cosine_betas(),
}
TABLE = P.tabulated(P.alpha_bars(P.linear_betas()))
ALPHA_BAR = P.alpha_bars(P.linear_betas())
X = np.random.default_rng(0).normal(size=(4, 3, 2, 2))
FLOAT64, FLOAT32 = 1e-12, 3e-6


def predict(x, k, library=np):
    """A smooth "noise prediction" at index k = 0 ... T - 1, the same in numpy, jax and torch."""
    return 0.6 * library.tanh(x) + 0.3 * x * (k / T) - 0.1


def model(x, t, cond):
    return predict(x, (t * T - 1.0)[:, None, None, None], jnp)


DENOISE = prediction.from_eps(TABLE, model)


def schedule(name):
    ranges = {"scaled_linear": (0.00085, 0.012)}.get(name, (1e-4, 0.02))
    return {"beta_schedule": name, "beta_start": ranges[0], "beta_end": ranges[1], "num_train_timesteps": T}


@contextlib.contextmanager
def double():
    """float64 in jax, and where torch is not told."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with jax.enable_x64(True):
            yield
    finally:
        torch.set_default_dtype(before)


def ours(sampler, grid, x=X):
    return sample(sampler, key(), jnp.asarray(x), jnp.asarray(grid))


def nodes(num):
    """`times.table_grid` in float64."""
    return np.round(np.linspace(T, 0, num + 1)) / T


def levels_of(grid):
    """sigma / alpha of the table at its nodes, float64."""
    alpha_bar = np.append(1.0, ALPHA_BAR)[np.round(np.asarray(grid) * T).astype(int)]
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def walked(scheduler, num, levels=None, k=None, **options):
    """diffusers' own loop from X, with our table; a level for each time replaces its own.

    k: the index that the model is told, if not the scheduler's.
    """
    scheduler.set_timesteps(num)
    scheduler.alphas_cumprod = torch.tensor(ALPHA_BAR)
    if levels is not None:
        repeats = np.ones(len(levels), int)
        if "Heun" in type(scheduler).__name__:  # which has its inner levels twice
            repeats[1:-1] = 2
        scheduler.sigmas = torch.tensor(np.repeat(levels, repeats))
    x = torch.tensor(X) * scheduler.init_noise_sigma
    for now in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, now)
        x = scheduler.step(predict(shown, now.item() if k is None else k, torch), now, x, **options).prev_sample
    return x.numpy()


@pytest.mark.parametrize("name", BETAS)
def test_tables(name):
    theirs = diffusers.DDPMScheduler(**schedule(name))
    np.testing.assert_allclose(BETAS[name], theirs.betas, rtol=1e-4)
    np.testing.assert_allclose(P.alpha_bars(BETAS[name]), theirs.alphas_cumprod, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 20, 500, 999])
@pytest.mark.parametrize(("kind", "v"), [("fixed_small", 0.0), ("fixed_large", 1.0), ("learned_range", 0.3)])
def test_steps_of_ddpm(kind, v, k):
    """The reverse step from index k to k - 1: its mean, and its standard deviation times the very noise of torch."""
    theirs = diffusers.DDPMScheduler(**schedule("linear"), variance_type=kind, clip_sample=False)
    with double():
        theirs.alphas_cumprod, x = torch.tensor(ALPHA_BAR), torch.tensor(X)
        out = predict(x, k, torch)
        if kind == "learned_range":
            out = torch.cat([out, torch.full_like(out, 2 * v - 1)], dim=1)
        step = theirs.step(out, k, x, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(0)).numpy()

        grid = jnp.array([k + 1, k]) / T
        x0 = DENOISE(jnp.asarray(X), jnp.full(4, grid[0]), None)

        def denoise(*_):
            return (x0, v) if kind == "learned_range" else x0

        sampler = samplers.ancestral(TABLE, denoise, v, learned=kind == "learned_range")
        _, info = sample(sampler, key(), jnp.asarray(X), grid, trace=lambda x, info: info)
        assert relative(info.x0[0], step.pred_original_sample) < FLOAT64
        assert relative(info.mean[0] + info.std[0] * noise, step.prev_sample) < FLOAT64


def test_the_last_step_of_ddpm():
    theirs = diffusers.DDPMScheduler(**schedule("linear"), clip_sample=False)
    with double():
        theirs.alphas_cumprod, x = torch.tensor(ALPHA_BAR), torch.tensor(X)
        expected = theirs.step(predict(x, 0, torch), 0, x).prev_sample
        assert relative(ours(samplers.ancestral(TABLE, DENOISE), [1 / T, 0.0]), expected) < FLOAT64


@pytest.mark.parametrize("num", [10, 50])
def test_ddim(num):
    theirs = diffusers.DDIMScheduler(**schedule("linear"), timestep_spacing="trailing", clip_sample=False)
    with double():
        expected = walked(theirs, num)
        np.testing.assert_array_equal(theirs.timesteps, np.asarray(times.table_grid(T, num) * T - 1)[:-1].round())
        assert relative(ours(samplers.ddim(TABLE, DENOISE), nodes(num)), expected) < FLOAT64


def with_given_noise(sampler, noise):
    def step(keys, state, t, s, cond):
        state, info = sampler.step(keys, state, t, s, cond)
        return state._replace(x=info.mean + info.std * noise), info

    return Sampler(sampler.init, step)


def test_ddim_with_noise():
    """eta = 0.7, the same constant "noise" at every step."""
    noise = np.random.default_rng(1).normal(size=X.shape)
    theirs = diffusers.DDIMScheduler(**schedule("linear"), timestep_spacing="trailing", clip_sample=False)
    with double():
        expected = walked(theirs, 20, eta=0.7, variance_noise=torch.tensor(noise))
        sampler = with_given_noise(samplers.ddim(TABLE, DENOISE, eta=0.7), noise)
        assert relative(ours(sampler, nodes(20)), expected) < FLOAT64


@pytest.mark.parametrize("num", [2, 10, 50])
def test_dpm_solver(num):
    theirs = diffusers.DPMSolverMultistepScheduler(
        **schedule("linear"), algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
        timestep_spacing="trailing", final_sigmas_type="zero",
    )  # fmt: skip
    with double():
        expected = walked(theirs, num, levels_of(nodes(num)))
        assert relative(ours(dpmpp_2m(TABLE, DENOISE), nodes(num)), expected) < FLOAT32


def test_dpm_solver_as_an_sde():
    """The same constant "noise" at every step."""
    noise = np.random.default_rng(1).normal(size=X.shape)
    theirs = diffusers.DPMSolverMultistepScheduler(
        **schedule("linear"), algorithm_type="sde-dpmsolver++", solver_order=2, solver_type="midpoint",
        timestep_spacing="trailing", final_sigmas_type="zero",
    )  # fmt: skip
    with double():
        expected = walked(theirs, 20, levels_of(nodes(20)), variance_noise=torch.tensor(noise))
        sampler = with_given_noise(dpmpp_2m_sde(TABLE, DENOISE), noise)
        assert relative(ours(sampler, nodes(20)), expected) < FLOAT32


@pytest.mark.parametrize(("order", "num"), [(2, 2), (2, 10), (2, 50), (3, 10), (3, 50)])
def test_unipc(order, num):
    """Into sigma = 0; of order 3 only to its last but one node, where diffusers already goes down to order 2."""
    theirs = diffusers.UniPCMultistepScheduler(
        **schedule("linear"), solver_order=order, solver_type="bh2", predict_x0=True,
        timestep_spacing="trailing", final_sigmas_type="zero",
    )  # fmt: skip
    with double():
        theirs.set_timesteps(num)
        theirs.sigmas = torch.tensor(levels_of(nodes(num)))
        path, x = [], torch.tensor(X)
        for k in theirs.timesteps:
            x = theirs.step(predict(x, k.item(), torch), k, x).prev_sample
            path.append(x.numpy())
        grid = jnp.asarray(nodes(num))
        _, walk = sample(unipc(TABLE, DENOISE, order), key(), jnp.asarray(X), grid, trace=lambda x, info: x)
    steps = num if order == 2 else num - 2
    assert relative(walk[:steps], path[:steps]) < FLOAT64


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_of_full_order_to_the_end(order):
    """Down to the table's first node, where sigma > 0."""
    grid = np.append(np.arange(T, 0, -50), 1) / T
    theirs = diffusers.UniPCMultistepScheduler(
        **schedule("linear"), solver_order=order, solver_type="bh2", timestep_spacing="trailing",
        final_sigmas_type="sigma_min", lower_order_final=False,
    )  # fmt: skip
    with double():
        assert relative(ours(unipc(TABLE, DENOISE, order), grid), walked(theirs, 20, levels_of(grid))) < FLOAT64


@pytest.mark.parametrize(("theirs", "spacing", "make", "tolerance"), [
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, dpmpp_2m, FLOAT32),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True}, unipc, FLOAT64),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, samplers.euler, FLOAT32),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, samplers.heun, FLOAT64),
    ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}, dpmpp_2m, FLOAT32),
])  # fmt: skip
def test_grids_of_levels(theirs, spacing, make, tolerance):
    """Karras's sigmas and geometric ones: the levels, and a walk with a model that is told no time."""
    scheduler = getattr(diffusers, theirs)(**schedule("linear"), **spacing)
    scheduler.set_timesteps(12)
    levels = np.append(np.unique(scheduler.sigmas)[:0:-1], 0.0)  # Heun's scheduler has its inner levels twice
    low, high = (np.sqrt(1 / TABLE.alpha(jnp.float32(t)) ** 2 - 1) for t in (1 / T, 1.0))
    make_grid = times.karras_grid if "use_karras_sigmas" in spacing else times.log_snr_grid
    grid = make_grid(TABLE, 12, low, high)
    np.testing.assert_allclose(TABLE.sigma(grid) / TABLE.alpha(grid), levels, rtol=1e-4, atol=1e-6)

    with double():
        grid = make_grid(TABLE, 12, low, high)
        levels = np.asarray(TABLE.sigma(grid) / TABLE.alpha(grid))
        expected = walked(scheduler, 12, levels, k=500)
        denoise = prediction.from_eps(TABLE, lambda x, t, cond: predict(x, 500, jnp))
        x = X * float(scheduler.init_noise_sigma)
        if float(scheduler.init_noise_sigma) > 1:  # theirs is x / alpha
            x = x * float(TABLE.alpha(grid[0]))
        assert relative(ours(make(TABLE, denoise), grid, x), expected) < tolerance


@pytest.mark.parametrize(("theirs", "make", "tolerance"), [
    ("EulerDiscreteScheduler", samplers.euler, FLOAT32),
    ("HeunDiscreteScheduler", samplers.heun, FLOAT64),
])  # fmt: skip
def test_euler_and_heun_in_sigma_over_alpha(theirs, make, tolerance):
    """k-diffusion's x is x / alpha; its walk ends with Euler's step into sigma = 0, as ours does."""
    scheduler = getattr(diffusers, theirs)(**schedule("linear"), timestep_spacing="trailing")
    with double():
        expected = walked(scheduler, 20, levels_of(nodes(20)))
        x = X * float(scheduler.init_noise_sigma) * np.sqrt(ALPHA_BAR[-1])
        assert relative(ours(make(TABLE, DENOISE), nodes(20), x), expected) < tolerance


def test_flow_matching():
    """Rectified flow's Euler steps along dx/dt = velocity, on our straight grid."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=T, shift=1.0)
    grid = np.linspace(1.0, 0.0, 11)
    scheduler.set_timesteps(sigmas=grid[:-1].tolist())
    np.testing.assert_allclose(scheduler.sigmas, grid, atol=1e-6)
    process = P.flow()

    def velocity(x, t, cond):
        return predict(x, (t * T)[:, None, None, None], jnp)

    with double():
        x = torch.tensor(X)
        for t, k in zip(grid, scheduler.timesteps, strict=False):
            x = scheduler.step(predict(x, t * T, torch), k, x).prev_sample
        actual = ours(samplers.euler(process, prediction.from_velocity(process, velocity)), grid)
    assert relative(actual, x) < FLOAT32


def test_edm():
    """Preconditioning, Karras's sigmas and Euler's steps of EDM; the network sees log(sigma) / 4."""
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(18)
    process = P.ve(0.002, 100.0)
    np.testing.assert_allclose(process.sigma(times.karras_grid(process, 18)), scheduler.sigmas, rtol=1e-4)

    def network(shown, t, cond):
        return predict(shown, (25.0 * jnp.log(process.sigma(t)))[:, None, None, None], jnp)

    with double():
        grid = times.karras_grid(process, 18)
        scheduler.sigmas, x = torch.tensor(np.asarray(process.sigma(grid))), 80.0 * torch.tensor(X)
        for sigma, c_noise in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
            shown = scheduler.scale_model_input(x, c_noise)
            x = scheduler.step(predict(shown, 25.0 * torch.log(sigma), torch), c_noise, x).prev_sample
        actual = ours(samplers.euler(process, prediction.edm(process, network, 0.5)), grid, 80.0 * X)
    assert relative(actual, x) < FLOAT32


def test_snr_and_v_targets():
    from diffusers.training_utils import compute_snr

    scheduler = diffusers.DDPMScheduler(**schedule("scaled_linear"))
    process = P.tabulated(P.alpha_bars(P.scaled_linear_betas()))
    k = torch.tensor([0, 10, 400, 999])
    t = jnp.asarray((k.numpy() + 1) / T, jnp.float32)
    np.testing.assert_allclose(losses.snr(process, t), compute_snr(scheduler, k), rtol=1e-3)
    eps = torch.tensor(X[::-1].copy())
    xt = P.add_noise(process, jnp.asarray(X), t, jnp.asarray(X[::-1]))
    np.testing.assert_allclose(xt, scheduler.add_noise(torch.tensor(X), eps, k), atol=1e-5)
    v = prediction.v_head(process).target(jnp.asarray(X), jnp.asarray(X[::-1]), t)
    np.testing.assert_allclose(v, scheduler.get_velocity(torch.tensor(X), eps, k), atol=1e-5)
