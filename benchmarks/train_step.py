r"""Our training step against diffusers' U-Net in torch: same architecture, weights, batch, dtype, machine and run.

  python -m benchmarks.train_step --size=cifar10 --batch=8                      # two CPU cores, about 3 minutes
  python -m benchmarks.train_step --size=cifar10 --batch=256 --dtype=bfloat16   # a GPU: also torch.compile

A step is: draw t and noise, L_simple, gradients, Adam, and the average of the parameters.  Ours is one
compiled program whose state is donated; torch's runs eagerly (and through torch.compile), under autocast for
bfloat16.  Needs the [oracles] extra.
"""

import time
from functools import partial

import jax
import optax

from benchmarks import common
from diffrl.diffusion import losses, prediction, process, times
from diffrl.train import mesh, state, step

T = 1000
EMA_DECAY = 0.9999
LEARNING_RATE = 2e-4


def our_step(pair, images):
    """(run(steps), FLOP per step, seconds of the first step, compilation included)."""
    table = process.tabulated(process.alpha_bars(process.linear_betas(T)))
    objective = losses.denoising(table, prediction.eps_head(table), times.discrete(T))

    def loss(params, train_state, batch, keys):
        del train_state

        def model(x, t, cond):
            return pair.ours.apply({"params": params}, x, t * T - 1, cond)

        return objective(model, batch["x"], None, keys)[0].mean(), state.Aux({})

    optimizer = optax.adam(LEARNING_RATE)
    line = mesh.make_mesh(devices=jax.devices()[:1])
    now = mesh.place(line, state.create(pair.params, optimizer, jax.random.key(0)))
    update = step.make_update(loss, optimizer, ema_decay=EMA_DECAY, ema_warmup=False)
    compiled = mesh.compile_step(step.global_step(update), line, now)
    batch = mesh.put_batch(line)({"x": images})
    flops = common.flops(compiled.lower(now, batch))

    def run(steps):
        nonlocal now
        for _ in range(steps):
            now, _ = compiled(now, batch)
        jax.block_until_ready(now)

    start = time.perf_counter()
    run(1)
    return run, flops, time.perf_counter() - start


def torch_step(pair, images, dtype, compiled):
    """run(steps) with torch's own idioms: SDPA attention, foreach Adam and averaging, channels last on a GPU."""
    torch = common.need("torch")
    device = common.torch_device(torch)
    batch = torch.tensor(images).permute(0, 3, 1, 2).to(device)
    alpha_bar = torch.tensor(process.alpha_bars(process.linear_betas(T)), dtype=torch.float32, device=device)
    model = pair.torch.train()
    params = list(model.parameters())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.Adam(params, lr=LEARNING_RATE, fused=device == "cuda")
    network = torch.compile(model) if compiled else model

    def one():
        t = torch.randint(T, (len(batch),), device=device)
        noise = torch.randn_like(batch)
        level = alpha_bar[t].reshape(-1, 1, 1, 1)
        noisy = level.sqrt() * batch + (1 - level).sqrt() * noise
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            predicted = network(noisy, t).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1 - EMA_DECAY)

    def run(steps):
        for _ in range(steps):
            one()
        common.finish(torch, None)

    return run


def main():
    flags = common.parser(__doc__)
    flags.add_argument("--steps", type=int, default=2, help="per repeat; more on a GPU")
    args = flags.parse_args()
    pair = common.make_pair(args.size, args.dtype)
    images = jax.device_get(jax.random.uniform(jax.random.key(1), (args.batch, *pair.shape), minval=-1.0))
    ours, flops, first = our_step(pair, images)
    programs = {"diffrl": ours, "torch eager": torch_step(pair, images, args.dtype, False)}
    if args.compile or (args.compile is None and jax.default_backend() == "gpu"):
        programs["torch.compile"] = torch_step(pair, images, args.dtype, True)
    common.compare(
        f"training step, {args.size}, {pair.parameters / 1e6:.2f} M parameters, batch {args.batch}, {args.dtype}",
        {name: partial(run, args.steps) for name, run in programs.items()},
        args.repeats,
        units=args.steps,
        samples=args.batch,
        flops=flops,
        dtype=args.dtype,
    )
    print(f"our first step, compilation included: {first:.1f} s")


if __name__ == "__main__":
    main()
