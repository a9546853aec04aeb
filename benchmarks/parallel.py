r"""Rounds and wall time of sampling in parallel in time (ParaDiGMS) against the sequential scan, on the digits model.

  python -m benchmarks.parallel --workdir=runs/ddpm/digits                      # two CPU cores, about 3 minutes
  python -m benchmarks.parallel --workdir=runs/ddpm/digits --sampler=ancestral --batch=16

The workdir holds a run of `experiments.ddpm`; where it is empty the digits model is trained there first.  A round is
one network call for a whole window of steps, so time is saved where such a call takes hardly longer than one for a
single step: on accelerators that the batch leaves idle.  The column "full" is how much longer that call takes here.
"""

import argparse

import jax
import jax.numpy as jnp

from benchmarks import common
from diffrl import config as config_lib
from diffrl.diffusion import sampling, times
from diffrl.diffusion.parallel import sample_parallel
from diffrl.recipes import denoising, images
from diffrl.train import mesh


def programs(session, params, args, window):
    """(draw() -> x, parallel() -> (x, rounds), one network call, one for the window), which block."""
    config, model = session.config, session.model
    config.sample.sampler, config.sample.guidance = args.sampler, 1.0
    grid = times.linear_grid(args.steps, 0.999)
    label = jnp.arange(args.batch) % model.num_classes
    keys = sampling.sample_keys(jax.random.key(args.seed), args.batch)
    x = sampling.start(model.diffusion.process, keys, (args.batch, *model.shape), grid[0])

    def make(params):
        denoise = denoising.make_denoiser(model.diffusion, model.apply, params)
        return denoising.make_sampler(model.diffusion, config.sample, denoise, model.num_classes)

    sequential = jax.jit(lambda params: sampling.sample(make(params), keys, x, grid, label))
    spread = mesh.spread(session.devices)
    parallel = jax.jit(
        lambda params: sample_parallel(make(params), keys, x, grid, label, window, args.tolerance, place=spread)
    )
    network = jax.jit(lambda params, x, label: model.apply(params, x, jnp.full(len(x), 500.0), label, None))
    many = jnp.tile(x, (window, 1, 1, 1)), jnp.tile(label, window)
    return tuple(
        lambda f=f, a=a: jax.block_until_ready(f(params, *a))
        for f, a in ((sequential, ()), (parallel, ()), (network, (x, label)), (network, many))
    )


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--workdir", required=True, help="of a run of experiments.ddpm; trained first where it is empty")
    flags.add_argument("--sampler", choices=("ddim", "ancestral", "euler", "heun"), default="ddim")
    flags.add_argument("--steps", type=int, default=100)
    flags.add_argument("--batch", type=int, default=1)
    flags.add_argument("--windows", type=int, nargs="+", default=[10, 25, 50, 100], help="spread over all devices")
    flags.add_argument("--tolerance", type=float, default=1e-2)
    flags.add_argument("--repeats", type=int, default=3, help="interleaved; medians are printed")
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    config, run, _ = config_lib.parse([f"--workdir={args.workdir}"], {"digits": images.digits_config})
    session = images.open_session(config, run)
    params = images.train(session).ema

    print(f"{args.steps} steps of {args.sampler}, {args.batch} images at once, tolerance {args.tolerance}")
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}; {args.repeats} repeats")
    columns = ("window", "rounds", "steps/rounds", "ms", "scan, ms", "speed-up", "full", "change")
    print("".join(f"{name:>13}" for name in columns))
    for window in args.windows:
        draw, draw_parallel, one, full = programs(session, params, args, window)
        found, rounds = draw_parallel()
        change = float(jnp.abs(found - draw()).max())
        timed = common.measure({"scan": draw, "parallel": draw_parallel, "one": one, "full": full}, args.repeats)
        scan, parallel, one_call, full_call = (1e3 * result.median for result in timed.values())
        print(
            f"{window:13}{int(rounds):13}{args.steps / int(rounds):13.1f}{parallel:13.1f}{scan:13.1f}"
            f"{scan / parallel:13.2f}{full_call / one_call:13.1f}{change:13.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
