r"""50-step DDIM, ours against diffusers' in torch: same weights, start, time grid, batch, dtype, machine and run.

  python -m benchmarks.sample --size=cifar10 --batch=2 --repeats=3          # two CPU cores, about 5 minutes
  python -m benchmarks.sample --size=cifar10 --batch=256 --dtype=bfloat16   # a GPU: also torch.compile

Ours is one compiled scan, torch's a Python loop over `DDIMScheduler.step`.  Both are deterministic, so the
images are compared too.  The sampler's own overhead is the time of the scan over 50 times that of one
compiled network call.  Needs the [oracles] extra.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from diffrl.diffusion import prediction, process, samplers, sampling, times

T = 1000


def our_sampler(pair, noise, steps):
    """(sample() -> x, network() -> eps, FLOP of a sample): both block; params are arguments, not constants."""
    table = process.tabulated(process.alpha_bars(process.linear_betas(T)))
    grid = times.table_grid(T, steps)

    def model(params, x, t):
        return pair.ours.apply({"params": params}, x, t * T - 1)

    @jax.jit
    def draw(params, x):
        denoise = prediction.from_eps(table, lambda x, t, cond: model(params, x, t))
        return sampling.sample(samplers.ddim(table, denoise), jax.random.key(0), x, grid)

    network = jax.jit(model)
    x, t = jnp.asarray(noise), jnp.full(len(noise), 0.5)
    flops = steps * common.flops(network.lower(pair.params, x, t))
    return (
        lambda: draw(pair.params, x).block_until_ready(),
        lambda: network(pair.params, x, t).block_until_ready(),
        flops,
    )


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
    ours, network, flops = our_sampler(pair, noise, args.steps)
    eager = torch_sampler(pair, noise, args.steps, args.dtype, False)
    programs = {
        "diffrl": ours,
        "network calls alone": lambda: [network() for _ in range(args.steps)],
        "torch eager": eager,
    }
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
    ratio = seconds["diffrl"].median / seconds["network calls alone"].median
    print(f"our sampler takes {ratio:.3f} of the time of {args.steps} separate network calls")


if __name__ == "__main__":
    main()
