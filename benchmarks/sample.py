r"""50-step DDIM, ours against diffusers' in torch: same weights, start, time grid, batch, dtype, machine and run.

  python -m benchmarks.sample --size=cifar10 --batch=2 --repeats=3          # two CPU cores, about 10 minutes
  python -m benchmarks.sample --size=cifar10 --batch=256 --dtype=bfloat16   # a GPU: also torch.compile

Ours is one compiled scan, torch's a Python loop over `DDIMScheduler.step`.  Both are deterministic, so the images are
compared too.  The sampler's own overhead is the time of the scan over that of as many compiled network calls; it is
also measured for UniPC-3, which computes most of all samplers, and guidance's is that of two calls a step.  How long
a scan of 10 and of 1000 steps takes to compile is printed at the end.  Needs the [oracles] extra.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from diffrl.diffusion import guidance, prediction, process, samplers, sampling, times, unipc

T = 1000


def our_programs(pair, noise, steps):
    """({name: program}, compile(steps) -> seconds, FLOP of a sample): programs block; params are their arguments."""
    table = process.tabulated(process.alpha_bars(process.linear_betas(T)))
    x, t, cond = jnp.asarray(noise), jnp.full(len(noise), 0.5), jnp.zeros(len(noise))

    def model(params, x, t, cond):
        # The condition, which is 0, enters as a label does: through the embedding of the time.
        return pair.ours.apply({"params": params}, x, t * T - 1 + cond)

    def draw(make, guided, grid, params, x):
        denoise = prediction.from_eps(table, partial(model, params))
        if guided:
            denoise = guidance.classifier_free(denoise, 1.5, 0.0)
        return sampling.sample(make(table, denoise), jax.random.key(0), x, grid, cond)

    def compile_seconds(steps):
        lowered = jax.jit(partial(draw, samplers.ddim, False)).lower(times.table_grid(T, steps), pair.params, x)
        start = time.perf_counter()
        lowered.compile()
        return time.perf_counter() - start

    network, grid = jax.jit(model), times.table_grid(T, steps)
    scans = {
        "diffrl": jax.jit(partial(draw, samplers.ddim, False)),
        "diffrl, UniPC-3": jax.jit(partial(draw, partial(unipc.unipc, order=3), False)),
        "diffrl, guided": jax.jit(partial(draw, samplers.ddim, True)),
    }

    def blocking(scan):
        return lambda: scan(grid, pair.params, x).block_until_ready()

    def calls():
        for _ in range(steps):
            network(pair.params, x, t, cond).block_until_ready()

    programs = {**{name: blocking(scan) for name, scan in scans.items()}, "network calls alone": calls}
    return programs, compile_seconds, steps * common.flops(network.lower(pair.params, x, t, cond))


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
    flags.add_argument("--steps", type=int, default=50, help="of DDIM")
    args = flags.parse_args()
    pair = common.make_pair(args.size, args.dtype)
    noise = jax.device_get(jax.random.normal(jax.random.key(1), (args.batch, *pair.shape)))
    programs, compile_seconds, flops = our_programs(pair, noise, args.steps)
    ours = programs["diffrl"]
    programs["torch eager"] = eager = torch_sampler(pair, noise, args.steps, args.dtype, False)
    if args.compile or (args.compile is None and jax.default_backend() == "gpu"):
        programs["torch.compile"] = torch_sampler(pair, noise, args.steps, args.dtype, True)
    seconds = common.compare(
        f"{args.steps}-step DDIM, {args.size}, {pair.parameters / 1e6:.2f} M parameters, batch {args.batch}, "
        f"{args.dtype}",
        programs,
        args.repeats,
        units=1,
        samples=args.batch,
        flops=flops,
        dtype=args.dtype,
    )
    theirs = eager().float().permute(0, 2, 3, 1).cpu().numpy()
    difference = np.abs(np.asarray(ours()) - theirs).max() / np.abs(theirs).max()
    print(f"largest difference between the images: {difference:.1e} of the largest value")
    calls = seconds["network calls alone"].median
    for name, allowed in {"diffrl": 1.05, "diffrl, UniPC-3": 1.05, "diffrl, guided": 2.05}.items():
        ratio = seconds[name].median / calls
        print(f"{name}: {ratio:.3f} of the time of {args.steps} network calls (wanted: at most {allowed})")
    few, many = compile_seconds(10), compile_seconds(T)
    print(f"compiled in {few:.1f} s for 10 steps, in {many:.1f} s for {T}")


if __name__ == "__main__":
    main()
