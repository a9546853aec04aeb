r"""DiT against the same network in torch: a training step, and 50 steps of DDIM.

  python -m benchmarks.dit train --no-scan    # two CPU cores: B/4, float32, batch 8, about 3 minutes
  python -m benchmarks.dit sample --no-scan   # batch 2, 50 steps, about 3 minutes
  python -m benchmarks.dit train --size=XL --patch=2 --dtype=bfloat16 --batch=64 --remat=dots   # a GPU of 80 GB
  python -m benchmarks.dit sample --size=XL --patch=2 --dtype=bfloat16 --batch=64

Without flags a GPU gets the last two, but no remat; there torch.compile runs too.  Torch's side is the paper's network
in torch's own idioms (fused qkv, scaled_dot_product_attention, addcmul, fused AdamW, foreach averaging) and no slower
than diffusers' `DiTTransformer2DModel`, which embeds the time anew in every block.  Its random weights reach ours
through `diffrl.pretrained.dit`, and the outputs are compared before anything is timed.

Floating-point operations are the architecture's, two for a multiply-add and three passes for a training step, so that
what remat computes again counts as time lost.  The scan compiles one block for all, but on a CPU copies weights,
activations and gradients in and out of stacks: --no-scan is faster there.  Needs the [oracles] extra.

A step of `train`: draw t and noise, L_simple, gradients, AdamW, and the average of the parameters.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from diffrl.diffusion import losses, prediction, process, samplers, sampling, times
from diffrl.nets.dit import FREQUENCIES, SIZES, DiT, sincos
from diffrl.pretrained import dit as pretrained
from diffrl.train import mesh, optim, state, step

T = 1000
CHANNELS, CLASSES = 4, 1000
EMA_DECAY = 0.9999
LEARNING_RATE = 1e-4


def multiply_adds(width: int, depth: int, tokens: int, patch: int) -> int:
    """Of one forward pass of one sample, 118.6 G for XL/2 on 32 x 32: products and attention, nothing elementwise."""
    token = 12 * depth * width**2 + 3 * patch**2 * CHANNELS * width  # qkv 3, out 1, MLP 8; patch in, two out
    attention = 2 * depth * tokens**2 * width
    told = (6 * depth + 2) * width**2 + (FREQUENCIES + width) * width
    return tokens * token + attention + told


def torch_dit(torch: Any, width: int, depth: int, heads: int, patch: int, latent: int, remat: bool) -> Any:
    """DiT with adaLN-zero: (x [B, C, H, W], k [B], labels [B]) -> [B, 2 C, H, W]; tensors named as in the paper's code.

    Weights are torch's own random ones, also where the paper begins at 0: nothing is to cancel in comparisons.
    """
    nn, fun, side = torch.nn, torch.nn.functional, latent // patch

    def norm(h, shift, scale):
        return torch.addcmul(shift[:, None], fun.layer_norm(h, (width,), eps=1e-6), 1 + scale[:, None])

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
            self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

        def forward(self, h, told):
            shift_0, scale_0, gate_0, shift_1, scale_1, gate_1 = self.adaLN_modulation(told).chunk(6, dim=1)
            qkv = self.attn["qkv"](norm(h, shift_0, scale_0))
            q, k, v = qkv.view(*h.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
            y = fun.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
            h = torch.addcmul(h, gate_0[:, None], self.attn["proj"](y))
            y = fun.gelu(self.mlp["fc1"](norm(h, shift_1, scale_1)), approximate="tanh")
            return torch.addcmul(h, gate_1[:, None], self.mlp["fc2"](y))

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(CHANNELS, width, patch, patch)})
            mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
            self.t_embedder = nn.ModuleDict({"mlp": mlp})
            self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(CLASSES + 1, width)})
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            outputs = {"adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))}
            self.final_layer = nn.ModuleDict(outputs | {"linear": nn.Linear(width, patch**2 * 2 * CHANNELS)})
            half = FREQUENCIES // 2
            self.register_buffer("waves", torch.exp(-math.log(1e4) / half * torch.arange(half)), persistent=False)
            self.register_buffer("places", torch.tensor(np.asarray(sincos(side, side, width))), persistent=False)

        def forward(self, x, k, labels):
            h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2)
            h = h + self.places.to(h.dtype)
            angles = k[:, None].float() * self.waves.float()
            waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)
            told = self.t_embedder["mlp"](waves) + self.y_embedder["embedding_table"](labels)
            for block in self.blocks:
                again = remat and torch.is_grad_enabled()
                h = torch.utils.checkpoint.checkpoint(block, h, told, use_reentrant=False) if again else block(h, told)
            shift, scale = self.final_layer["adaLN_modulation"](told).chunk(2, dim=1)
            h = self.final_layer["linear"](norm(h, shift, scale))
            h = h.view(-1, side, side, patch, patch, 2 * CHANNELS).permute(0, 5, 1, 3, 2, 4)
            return h.reshape(-1, 2 * CHANNELS, latent, latent)

    return Network()


class Pair(NamedTuple):
    """One network twice, with equal weights, and a batch for both."""

    torch: Any  # on the torch device
    ours: DiT
    params: Any
    x: np.ndarray  # [B, latent, latent, CHANNELS]
    labels: np.ndarray
    parameters: int
    multiply_adds: int  # of a forward pass of one sample


def make_pair(args: argparse.Namespace) -> Pair:
    """Raises AssertionError where the two do not compute the same function in float32."""
    torch = common.need("torch")
    torch.manual_seed(0)
    device = common.torch_device(torch)
    width, depth, heads = SIZES[args.size]
    theirs = torch_dit(torch, width, depth, heads, args.patch, args.latent, args.remat == "full")
    weights = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    ours, params = pretrained.from_original(weights, args.latent)
    if not args.scan:
        ours = ours.clone(scan=False)
        blocks = params.pop("blocks")
        params |= {f"block_{i}": jax.tree.map(lambda rows, i=i: rows[i], blocks) for i in range(depth)}

    rng = np.random.default_rng(0)
    x = rng.standard_normal((args.batch, args.latent, args.latent, CHANNELS), np.float32)
    k, labels = rng.integers(T, size=args.batch), rng.integers(CLASSES, size=args.batch)
    theirs = theirs.to(device)
    with torch.inference_mode(), jax.default_matmul_precision("highest"):
        torch.set_float32_matmul_precision("highest")
        y = theirs(*(torch.tensor(a).to(device) for a in (x[:2].transpose(0, 3, 1, 2), k[:2], labels[:2])))
        torch.set_float32_matmul_precision("high")
        same = jax.jit(ours.apply)({"params": params}, x[:2], k[:2], labels[:2])
    y = y.cpu().numpy().transpose(0, 2, 3, 1)
    difference = np.abs(np.asarray(same) - y).max() / np.abs(y).max()
    assert difference < 1e-3, f"the two networks differ by {difference:.1e} of the largest output"
    print(f"largest difference between the outputs: {difference:.1e} of the largest")

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    work = multiply_adds(width, depth, (args.latent // args.patch) ** 2, args.patch)
    return Pair(theirs, ours.clone(dtype=jnp.dtype(args.dtype), remat=args.remat), params, x, labels, count, work)


def our_step(pair):
    """(run(steps), the compiled program)."""
    table = process.tabulated(process.alpha_bars(process.linear_betas(T)))
    objective = losses.denoising(table, prediction.eps_head(table), times.discrete(T))

    def loss(params, train_state, batch, keys):
        del train_state

        def model(x, t, cond):
            return pair.ours.apply({"params": params}, x, t * T - 1, cond)[..., :CHANNELS]

        return objective(model, batch["x"], batch["labels"], keys)[0].mean(), state.Aux({})

    optimizer = optim.make(optim.OptimConfig(learning_rate=LEARNING_RATE, clip_norm=0.0), 1)
    line = mesh.make_mesh(devices=jax.devices()[:1])
    now = mesh.place(line, state.create(pair.params, optimizer, jax.random.key(0)))
    update = step.make_update(loss, optimizer, ema_decay=EMA_DECAY, ema_warmup=False)
    batch = mesh.put_batch(line)({"x": pair.x, "labels": pair.labels})
    compiled = mesh.compile_step(step.global_step(update), line, now).lower(now, batch).compile()

    def run(steps):
        nonlocal now
        for _ in range(steps):
            now, _ = compiled(now, batch)
        jax.block_until_ready(now)

    return run, compiled


def torch_step(pair, dtype, compiled):
    """run(steps) with torch's own idioms: SDPA, fused AdamW, foreach averaging; under autocast for bfloat16."""
    torch = common.need("torch")
    device = common.torch_device(torch)
    x, labels = (torch.tensor(a).to(device) for a in (pair.x.transpose(0, 3, 1, 2), pair.labels))
    alpha_bar = torch.tensor(process.alpha_bars(process.linear_betas(T)), dtype=torch.float32, device=device)
    model = pair.torch.train()
    params = list(model.parameters())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    network = torch.compile(model) if compiled else model

    def one():
        k = torch.randint(T, (len(x),), device=device)
        noise = torch.randn_like(x)
        level = alpha_bar[k].reshape(-1, 1, 1, 1)
        noisy = level.sqrt() * x + (1 - level).sqrt() * noise
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            predicted = network(noisy, k, labels)[:, :CHANNELS]
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


def our_sampler(pair, steps):
    """(sample() -> x [B, H, W, C], the compiled program): the whole loop is one program, params are its arguments."""
    table = process.tabulated(process.alpha_bars(process.linear_betas(T)))

    def draw(params, x, labels):
        def model(x, t, cond):
            return pair.ours.apply({"params": params}, x, t * T - 1, cond)[..., :CHANNELS]

        denoise = prediction.from_eps(table, model)
        grid = times.table_grid(T, steps)
        return sampling.sample(samplers.ddim(table, denoise), jax.random.key(0), x, grid, labels)

    params, x, labels = jax.tree.map(jnp.asarray, (pair.params, pair.x, pair.labels))
    compiled = jax.jit(draw).lower(params, x, labels).compile()
    return lambda: compiled(params, x, labels).block_until_ready(), compiled


def torch_sampler(pair, steps, dtype, compiled):
    """sample() -> x [B, C, H, W] float32 on the device, with the network's weights in `dtype`."""
    torch = common.need("torch")
    device = common.torch_device(torch)
    dtype = getattr(torch, dtype)
    model = pair.torch.eval().to(dtype)
    network = torch.compile(model) if compiled else model
    start, labels = (torch.tensor(a).to(device) for a in (pair.x.transpose(0, 3, 1, 2), pair.labels))
    alpha_bar = np.concatenate([[1.0], process.alpha_bars(process.linear_betas(T))])
    grid = np.rint(np.asarray(times.table_grid(T, steps)) * T).astype(int)

    def run():
        x = start
        with torch.inference_mode():
            for n, m in itertools.pairwise(grid):
                k = torch.full((len(x),), int(n) - 1, device=device)
                eps = network(x.to(dtype), k, labels)[:, :CHANNELS].float()
                # DDIM: x0 = (x - sigma_n eps) / alpha_n, and from there to alpha_m x0 + sigma_m eps.
                share = math.sqrt(alpha_bar[m] / alpha_bar[n])
                x = share * x + (math.sqrt(1 - alpha_bar[m]) - share * math.sqrt(1 - alpha_bar[n])) * eps
        return common.finish(torch, x)

    return run


def report(pair: Pair, compiled: Any) -> None:
    """The count of operations beside XLA's, and peak memory: what XLA planned and, on a GPU, what was in use."""
    net = pair.ours.clone(scan=False, remat="none")  # XLA counts the body of a loop once
    inputs = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, *pair.x.shape[1:]), (1,)))
    params, x, t = jax.eval_shape(lambda *inputs: (net.init(jax.random.key(0), *inputs), *inputs), *inputs)
    counted = common.flops(jax.jit(net.apply).lower(params, x, t))
    print(f"a forward pass: {pair.multiply_adds / 1e9:.1f} G multiply-adds, {counted / 1e9:.1f} GFLOP by XLA's count")
    plan = compiled.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    print(f"memory of diffrl: {held / 1e9:.2f} GB held, {plan.temp_size_in_bytes / 1e9:.2f} GB beside while it runs")
    torch = common.need("torch")
    if torch.cuda.is_available():
        ours, theirs = jax.devices()[0].memory_stats()["peak_bytes_in_use"], torch.cuda.max_memory_allocated()
        print(f"at most in use: {ours / 1e9:.2f} GB by jax, {theirs / 1e9:.2f} GB by torch")


def parse() -> argparse.Namespace:
    """Flags, with what the device at hand can bear where they are not given."""
    flags = common.parser(__doc__ or "", sizes=sorted(SIZES))
    gpu = jax.default_backend() == "gpu"
    flags.add_argument("what", choices=["train", "sample"])
    flags.add_argument("--patch", type=int, default=2 if gpu else 4)
    flags.add_argument("--latent", type=int, default=32, help="side of the latents")
    flags.add_argument("--remat", choices=["none", "dots", "full"], default="none", help="torch knows only full")
    flags.add_argument("--scan", action=argparse.BooleanOptionalAction, default=True, help="over our blocks")
    flags.add_argument("--steps", type=int, help="of training per repeat, or of DDIM")
    flags.set_defaults(size="XL" if gpu else "B", dtype="bfloat16" if gpu else "float32", batch=None)
    args = flags.parse_args()
    train = args.what == "train"
    args.batch = args.batch or (64 if gpu else 8 if train else 2)
    args.steps = args.steps or ((10 if gpu else 1) if train else 50)
    args.compile = gpu if args.compile is None else args.compile
    return args


def main():
    args = parse()
    pair = make_pair(args)
    train = args.what == "train"
    programs: dict[str, Callable[[], Any]] = {}
    if train:
        run, compiled = our_step(pair)
        programs["diffrl"] = partial(run, args.steps)
    else:
        programs["diffrl"], compiled = our_sampler(pair, args.steps)
    for name in ["torch eager", *(["torch.compile"] if args.compile else [])]:
        if train:
            programs[name] = partial(torch_step(pair, args.dtype, name == "torch.compile"), args.steps)
        else:
            programs[name] = torch_sampler(pair, args.steps, args.dtype, name == "torch.compile")
    passes = 3 if train else args.steps
    common.compare(
        f"{'training step' if train else f'{args.steps} steps of DDIM'}, DiT-{args.size}/{args.patch}, "
        f"{pair.parameters / 1e6:.1f} M parameters, latents {args.latent}, batch {args.batch}, {args.dtype}, "
        f"blocks {'scanned' if args.scan else 'unrolled'}, remat {args.remat}",
        programs,
        args.repeats,
        units=args.steps if train else 1,
        samples=args.batch,
        flops=2.0 * pair.multiply_adds * args.batch * passes,
        counted="the architecture",
        dtype=args.dtype,
    )
    report(pair, compiled)
    if not train:
        theirs = programs["torch eager"]().permute(0, 2, 3, 1).cpu().numpy()
        difference = np.abs(np.asarray(programs["diffrl"]()) - theirs).max() / np.abs(theirs).max()
        print(f"largest difference between the images: {difference:.1e} of the largest value")


if __name__ == "__main__":
    main()
