r"""50-step samplers: what they cost beyond their network calls, and DDIM against diffusers' in torch.

  python -m benchmarks.sample --size=cifar10 --batch=2 --repeats=3          # two CPU cores, about 15 minutes
  python -m benchmarks.sample --size=cifar10 --batch=256 --dtype=bfloat16   # a GPU: also torch.compile

A sampler's own cost is the time of its compiled scan over that of a compiled scan of as many bare network calls, each
on what the one before returned; guidance's is that of guided DDIM over DDIM.  Torch's side is a Python loop over
`DDIMScheduler.step` with the same weights, start, time grid, batch and dtype, in the same run; both are deterministic,
so the images are compared too.  How long a scan of 10 and of 1000 steps takes to compile is printed at the end.  Needs
the [oracles] extra.
"""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from diffrl.diffusion import dpm_solver, guidance, prediction, process, samplers, sampling, times, unipc

T = 1000
GUIDED, CALLS = "diffrl, guided", "network calls alone"
SAMPLERS = {
    "diffrl": samplers.ddim,
    "diffrl, DPM-Solver++(2M)": dpm_solver.dpmpp_2m,
    "diffrl, UniPC-3": partial(unipc.unipc, order=3),
    "diffrl, ancestral": samplers.ancestral,
}


def our_programs(pair, noise, steps):
    """({name: program}, compile(steps) -> seconds, FLOP of a sample): programs block; params are their arguments."""
    table = process.tabulated(process.alpha_bars(process.linear_betas(T)))
    x, cond = jnp.asarray(noise), jnp.zeros(len(noise))

    def model(params, x, t, cond):
        # The condition, which is 0, enters as a label does: through the embedding of the time.
        return pair.ours.apply({"params": params}, x, t * T - 1 + cond)

    def draw(make, guided, grid, params, x):
        denoise = prediction.from_eps(table, partial(model, params))
        if guided:
            denoise = guidance.classifier_free(denoise, 1.5, 0.0)
        return sampling.sample(make(table, denoise), jax.random.key(0), x, grid, cond)

    def calls(grid, params, x):
        def body(x, t):
            return model(params, x, jnp.full(len(x), t), cond), None

        return jax.lax.scan(body, x, grid[:-1])[0]

    def compile_seconds(steps):
        lowered = jax.jit(partial(draw, samplers.ddim, False)).lower(times.table_grid(T, steps), pair.params, x)
        start = time.perf_counter()
        lowered.compile()
        return time.perf_counter() - start

    grid = times.table_grid(T, steps)
    scans: dict[str, Callable] = {name: partial(draw, make, False) for name, make in SAMPLERS.items()}
    scans |= {GUIDED: partial(draw, samplers.ddim, True), CALLS: calls}

    def blocking(scan):
        compiled = jax.jit(scan)
        return lambda: compiled(grid, pair.params, x).block_until_ready()

    one = jax.jit(model).lower(pair.params, x, jnp.full(len(x), 0.5), cond)
    return {name: blocking(scan) for name, scan in scans.items()}, compile_seconds, steps * common.flops(one)


def torch_sampler(pair, noise, steps, dtype, compiled):
    """sample() -> x [B, C, H, W] on the device, with the network's weights in `dtype`."""
    torch, diffusers = common.need("torch"), common.need("diffusers")
    device = common.torch_device(torch)
    # "trailing" walks the steps n = T, T - T/steps, ..., as `times.table_grid` does.
    scheduler = diffusers.DDIMScheduler(
        T, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    model = pair.torch.eval()
    if dtype != "float32":
        model = model.to(getattr(torch, dtype))
    network = torch.compile(model) if compiled else model
    start = torch.tensor(noise).permute(0, 3, 1, 2).to(device, getattr(torch, dtype))

    def run():
        x = start
        with torch.inference_mode():
            for k in scheduler.timesteps:
                x = scheduler.step(network(x, k).sample, k, x).prev_sample
        return common.finish(torch, x)

    return run


def main():
    flags = common.parser(__doc__)
    flags.add_argument("--steps", type=int, default=50, help="of every sampler")
    args = flags.parse_args()
    pair = common.make_pair(args.size, args.dtype)
    noise = jax.device_get(jax.random.normal(jax.random.key(1), (args.batch, *pair.shape)))
    programs, compile_seconds, flops = our_programs(pair, noise, args.steps)
    ours = programs["diffrl"]
    programs["torch eager"] = eager = torch_sampler(pair, noise, args.steps, args.dtype, False)
    if args.compile or (args.compile is None and jax.default_backend() == "gpu"):
        programs["torch.compile"] = torch_sampler(pair, noise, args.steps, args.dtype, True)
    seconds = common.compare(
        f"{args.steps} steps, {args.size}, {pair.parameters / 1e6:.2f} M parameters, batch {args.batch}, {args.dtype}",
        programs,
        args.repeats,
        units=1,
        samples=args.batch,
        flops=flops,
        dtype=args.dtype,
        share={GUIDED: 2.0},
    )
    theirs = eager().float().permute(0, 2, 3, 1).cpu().numpy()
    difference = np.abs(np.asarray(ours()) - theirs).max() / np.abs(theirs).max()
    print(f"largest difference between the images: {difference:.1e} of the largest value")
    for name in SAMPLERS:
        ratio = seconds[name].median / seconds[CALLS].median
        print(f"{name}: {ratio:.3f} of the time of {args.steps} network calls (wanted: at most 1.05)")
    ratio = seconds[GUIDED].median / seconds["diffrl"].median
    print(f"{GUIDED}: {ratio:.3f} of the time without guidance (wanted: at most 2.05)")
    few, many = compile_seconds(10), compile_seconds(T)
    print(f"compiled in {few:.1f} s for 10 steps, in {many:.1f} s for {T}")


if __name__ == "__main__":
    main()
