r"""Plans per second in closed loop on Maze2D's U-maze, against Diffuser's loop in torch; demonstrations per minute.

  python -m benchmarks.planning                 # two CPU cores: 32 rows, every fourth step; about 3 minutes
  python -m benchmarks.planning --size=paper    # the paper's network, 128 rows; a GPU's default, with 4096 episodes
  python -m benchmarks.planning --episodes=128 --every=16 --alone=4
  python -m benchmarks.planning data            # `demonstrations.maze_walk`: a million steps of each of D4RL's mazes

Ours is one program: worlds, controller, and a plan of 64 ancestral steps every `--every` steps of the world, N worlds
side by side; sizes are those of `experiments.diffuser`.  Torch's side is what the published code does (Janner et al.,
2022, arXiv:2205.09991): a loop in Python under no_grad, the ends set anew after each step, plans copied to the host and
followed there in MuJoCo, which our worlds equal; without mujoco, in our world's step, called from NumPy.

    torch, one at a time   batch 1, as the original plans
    torch, batched         all episodes' plans in one batch, worlds one by one on the host

Its coefficients are Python's numbers and both ends are set at once, a little faster than the original.  Random weights
reach ours through `diffrl.pretrained`; outputs of the networks, and plans without noise, are compared before anything
is timed.  All make as many plans in as many steps of as many worlds; with `--alone`, as on a GPU by default, the one at
a time does fewer episodes.  Times are per plan, with the world's steps in them.  Floating-point operations are the
architecture's, two for a multiply-add, without those on the zeros beside a plan.
Needs the [oracles] extra.
"""

import argparse
import importlib
import itertools
import os
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from diffrl.data import normalisers
from diffrl.diffusion import guidance, prediction, process, samplers, sampling, times
from diffrl.errors import UserError
from diffrl.planning import diffuser, policies
from diffrl.pretrained import diffusers_temporal_unet
from diffrl.recipes import planners, tasks
from diffrl.rl import controllers, demonstrations, maze2d, mazes

Programs = dict[str, Callable[[], Any]]
Worlds = tuple[Callable, Callable]  # on the host; reset: obs [n, 4] -> None, step: actions [n, 2] -> obs [n, 4]

ACTIONS, SEEN, CHANNELS, STEPS = 2, 4, 32, 64
# Of experiments.diffuser: widths in units of `CHANNELS`, rows of a plan, steps of the world from row to row.
SIZES = {"small": ((1, 2, 4), 32, 4), "paper": ((1, 4, 8), 128, 1)}
# What plans are scaled by: about the range of D4RL's observations in the U-maze, and that of actions.
RANGES = {"observations": [[0.4, 0.4, -5.0, -5.0], [3.6, 3.6, 5.0, 5.0]], "actions": [[-1.0, -1.0], [1.0, 1.0]]}


class Pair(NamedTuple):
    """One network twice, with equal weights."""

    torch: Any  # diffusers.UNet1DModel, on `device`
    device: str
    ours: Any  # TemporalUNet
    params: Any
    shape: tuple[int, int]  # of a plan, [H, A + S]
    stride: int


def make_pair(size: str) -> Pair:
    """Raises AssertionError where the two networks, or the two samplers, do not compute the same in float32."""
    torch, diffusers = common.need("torch"), common.need("diffusers")
    threads = torch.get_num_threads()
    device = common.torch_device(torch)
    torch.set_num_threads(threads)  # torch's own choice
    torch.manual_seed(0)
    multipliers, horizon, stride = SIZES[size]
    model = diffusers.UNet1DModel(
        in_channels=ACTIONS + SEEN, out_channels=ACTIONS + SEEN, block_out_channels=[CHANNELS * m for m in multipliers],
        down_block_types=["DownResnetBlock1D"] * len(multipliers), mid_block_type="MidResTemporalBlock1D",
        up_block_types=["UpResnetBlock1D"] * (len(multipliers) - 1), out_block_type="OutConv1DBlock", act_fn="mish",
        time_embedding_type="positional", use_timestep_embedding=True, flip_sin_to_cos=False, freq_shift=1,
    ).eval()  # fmt: skip
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    ours, params = diffusers_temporal_unet.from_diffusers(weights, dict(model.config))
    pair = Pair(model.to(device), device, ours, jax.tree.map(jnp.asarray, params), (horizon, ACTIONS + SEEN), stride)
    check(torch, pair)
    return pair


def our_planner(pair: Pair, params: Any, temperature: float = 1.0) -> diffuser.Planner:
    """As `experiments.diffuser` plans."""
    table = process.tabulated(process.alpha_bars(process.cosine_betas(STEPS)))

    def model(x, t, cond):
        return pair.ours.apply({"params": params}, x, t * STEPS - 1)

    denoise = guidance.clip(prediction.denoiser(prediction.x0_head(table), model))
    sampler = samplers.ancestral(table, denoise, temperature=temperature)
    fitted = {name: normalisers.limits(np.array(ends, np.float32)) for name, ends in RANGES.items()}
    space = planners.make_space(jax.tree.map(jnp.asarray, fitted), planners.ModelConfig(pair.shape[0], pair.stride))
    return diffuser.planner(space, diffuser.Draws(table, lambda fixed: sampler, times.table_grid(STEPS, STEPS)))


def check(torch: Any, pair: Pair) -> None:
    """One call of the network, and one plan without the noise of its steps, on both sides."""
    x, k = np.random.default_rng(0).standard_normal((4, *pair.shape), np.float32), np.array([0, 1, 20, STEPS - 1])
    maze = mazes.standard("umaze")
    obs = np.array([[3.1, 1.2, 0.3, -0.2], [1.0, 2.0, 0.0, 0.1]], np.float32)
    goal = jnp.broadcast_to(goal_row(maze), obs.shape)
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    begin = np.array(sampling.start(process.cosine(), keys, (2, *pair.shape)))
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        y = pair.torch(torch.tensor(x.transpose(0, 2, 1)).to(pair.device), torch.tensor(k).to(pair.device)).sample
        theirs = torch_sampler(torch, pair, maze)(obs, begin)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        same = jax.jit(pair.ours.apply)({"params": pair.params}, x, k.astype(np.float32))
        ours = jax.jit(lambda params: our_planner(pair, params, 0.0).plan(keys, obs, goal))(pair.params)
    # Float32's rounding grows over the steps: either side's plan is within about 1e-4 of one in float64.
    outputs = "outputs", same, y.cpu().numpy().transpose(0, 2, 1), 1e-4
    for what, a, b, most in (outputs, ("plans without noise", ours, theirs, 1e-3)):
        difference = np.abs(np.asarray(a) - b).max() / np.abs(b).max()
        assert difference < most, f"the two sides' {what} differ by {difference:.1e} of the largest value"
        print(f"largest difference between the {what}: {difference:.1e} of the largest value")


def goal_row(maze: mazes.Maze) -> np.ndarray:
    """At the goal, at rest [4]."""
    return np.array([*maze.goal, 0.0, 0.0], np.float32)


def multiply_adds(multipliers: tuple[int, ...], horizon: int) -> int:
    """Of one call of the network for one plan: all convolutions and dense layers, nothing elementwise."""
    widths = [CHANNELS * m for m in multipliers]
    last = len(widths) - 1

    def conv(a: int, b: int, taps: int, length: int, stride: int = 1) -> int:
        places = (stride * i + j - taps // 2 for i in range(-(-length // stride)) for j in range(taps))
        return a * b * sum(0 <= place < length for place in places)

    def blocks(a: int, b: int, length: int) -> int:
        shortcut = conv(a, b, 1, length) if a != b else 0
        return conv(a, b, 5, length) + 3 * conv(b, b, 5, length) + shortcut + 2 * CHANNELS * b

    total = 2 * CHANNELS * 4 * CHANNELS  # of the time
    for level, (before, width) in enumerate(itertools.pairwise([ACTIONS + SEEN, *widths])):
        length = horizon >> level
        total += blocks(before, width, length)
        if level < last:
            # Down by three taps; up by four, of which two fall off the ends.
            half = length // 2
            total += conv(width, width, 3, length, stride=2) + width**2 * (4 * half - 2)
            total += blocks(2 * widths[level + 1], width, half)
    total += blocks(widths[-1], widths[-1], horizon >> last)
    return total + conv(widths[0], widths[0], 5, horizon) + conv(widths[0], ACTIONS + SEEN, 1, horizon)


def our_programs(pair: Pair, maze: mazes.Maze, args: argparse.Namespace) -> Programs:
    """The closed loop, and parts of it that do as much of their work: the sampler alone, the network alone."""
    env, blank = maze2d.make(maze, args.steps), jnp.zeros((args.episodes, *pair.shape))
    levels = jnp.tile(jnp.arange(STEPS - 1.0, -1.0, -1.0), args.rounds)

    def loop(params, keys, obs, goal):
        planner = our_planner(pair, params)
        drive = policies.controller(planner, policies.towards_waypoints(), args.every, goal=tasks.goal_observation)
        return controllers.execute(env, drive, args.steps)(keys).episode_return

    def sampler(params, keys, obs, goal):
        def plan(x, n):
            return our_planner(pair, params).plan(sampling.fold(keys, n), obs, goal), None

        return jax.lax.scan(plan, blank, jnp.arange(args.rounds))[0]

    def network(params, keys, obs, goal):
        def call(x, k):
            return jnp.clip(pair.ours.apply({"params": params}, x, sampling.per_sample(k, x)), -1.0, 1.0), None

        return jax.lax.scan(call, blank, levels)[0]

    keys, first = episodes(maze, args.episodes)
    told = pair.params, keys, jnp.asarray(first), jnp.broadcast_to(goal_row(maze), first.shape)

    def ready(function):
        compiled = jax.jit(function).lower(*told).compile()
        return lambda: compiled(*told).block_until_ready()

    return {"diffrl": ready(loop), "sampler alone": ready(sampler), "network alone": ready(network)}


def episodes(maze: mazes.Maze, count: int) -> tuple[jax.Array, np.ndarray]:
    """Keys [N], and the first observations [N, 4] of the episodes that `controllers.execute` makes of them."""
    keys = jax.random.split(jax.random.key(0), count)
    return keys, np.asarray(jax.vmap(maze2d.make(maze, 1).reset)(sampling.fold(keys, controllers.RESET)).obs)


def torch_sampler(torch: Any, pair: Pair, maze: mazes.Maze) -> Callable[..., np.ndarray]:
    """(obs [n, 4], begin [n, H, A + S], if any, after which no noise is added) -> x [n, H, A + S]: `p_sample_loop`."""
    betas = process.cosine_betas(STEPS)
    now, before = process.alpha_bars(betas), np.concatenate([[1.0], process.alpha_bars(betas)[:-1]])
    of_x0 = (betas * np.sqrt(before) / (1 - now)).tolist()
    of_x = (np.sqrt(1 - betas) * (1 - before) / (1 - now)).tolist()
    std = np.sqrt(betas * (1 - before) / (1 - now)).tolist()  # 0 in the last step
    low, high = np.array(RANGES["observations"], np.float32)

    def sample(obs: np.ndarray, begin: np.ndarray | None = None) -> np.ndarray:
        ends = np.stack([obs, np.broadcast_to(goal_row(maze), obs.shape)], axis=1)
        known = torch.tensor(2 * (ends - low) / (high - low) - 1, dtype=torch.float32, device=pair.device)
        first_and_last = slice(None), slice(None, None, pair.shape[0] - 1), slice(ACTIONS, None)
        with torch.no_grad():
            shape = (len(obs), *pair.shape)
            x = torch.randn(shape, device=pair.device) if begin is None else torch.tensor(begin).to(pair.device)
            x[first_and_last] = known
            for n in reversed(range(STEPS)):
                k = torch.full((len(obs),), n, device=pair.device, dtype=torch.long)
                x0 = pair.torch(x.transpose(1, 2), k).sample.transpose(1, 2).clamp_(-1.0, 1.0)
                x = of_x0[n] * x0 + of_x[n] * x
                if begin is None:
                    x = x + std[n] * torch.randn_like(x)
                x[first_and_last] = known
            return x.cpu().numpy()

    return sample


def torch_planner(torch: Any, pair: Pair, maze: mazes.Maze) -> Callable[[np.ndarray], np.ndarray]:
    """obs [n, 4] -> observations [n, N, 4] of every step in the world's units, with straight lines between rows."""
    sample, stride = torch_sampler(torch, pair, maze), pair.stride
    low, high = np.array(RANGES["observations"], np.float32)
    row, rest = np.divmod(np.arange((pair.shape[0] - 1) * stride + 1), stride)
    share, after = (rest / stride).astype(np.float32)[:, None], np.minimum(row + 1, pair.shape[0] - 1)

    def plan(obs: np.ndarray) -> np.ndarray:
        seen = (sample(obs)[..., ACTIONS:] + 1) / 2 * (high - low) + low
        return seen if stride == 1 else (1 - share) * seen[:, row] + share * seen[:, after]

    return plan


def mujoco_worlds(mujoco: Any, maze: mazes.Maze, count: int) -> Worlds:
    """D4RL's: velocities are clipped before a step, as actions are."""
    model = mujoco.MjModel.from_xml_string(maze2d.mjcf(maze))
    worlds = [mujoco.MjData(model) for _ in range(count)]

    def reset(obs):
        for world, row in zip(worlds, obs, strict=True):
            mujoco.mj_resetData(model, world)
            world.qpos[:], world.qvel[:] = row[:2], row[2:]

    def step(actions):
        seen = np.empty((count, SEEN), np.float32)
        for i, world in enumerate(worlds):
            world.qvel[:] = np.clip(world.qvel, -maze2d.FASTEST, maze2d.FASTEST)
            world.ctrl[:] = np.clip(actions[i], -1.0, 1.0)
            mujoco.mj_step(model, world)
            seen[i, :2], seen[i, 2:] = world.qpos, world.qvel
        return seen

    return reset, step


def our_worlds(maze: mazes.Maze, count: int) -> Worlds:
    """Our own step, compiled for all worlds at once."""
    walls, state = jnp.asarray(maze.walls), np.zeros((count, SEEN), np.float32)
    move = jax.jit(jax.vmap(lambda o, a: jnp.concatenate(maze2d.simulate(walls, o[:2], o[2:], a))))

    def step(actions):
        state[:] = move(state, actions)
        return state.copy()

    return lambda obs: np.copyto(state, obs), step


def torch_programs(pair: Pair, maze: mazes.Maze, args: argparse.Namespace) -> tuple[str, Programs]:
    """Diffuser's `plan_maze2d.py`, with plans anew; and what its worlds are."""
    plan, first = torch_planner(common.need("torch"), pair, maze), episodes(maze, args.episodes)[1]
    try:
        mujoco = importlib.import_module("mujoco")
        physics, one, many = f"MuJoCo {mujoco.__version__}", *(mujoco_worlds(mujoco, maze, n) for n in (1, len(first)))
    except ImportError:
        physics, one, many = "our own step", *(our_worlds(maze, n) for n in (1, len(first)))

    def loop(worlds, obs):
        reset, step = worlds
        reset(obs)
        total = np.zeros(len(obs))
        for t in range(args.steps):
            age = t % (args.every or args.steps)
            if not age:
                rows = plan(obs)
            aim = rows[:, min(age + 1, rows.shape[1] - 1)].copy()
            if age + 1 >= rows.shape[1]:
                aim[:, 2:] = 0.0
            obs = step((aim[:, :2] - obs[:, :2]) + (aim[:, 2:] - obs[:, 2:]))
            total += np.linalg.norm(obs[:, :2] - np.array(maze.goal), axis=1) <= maze2d.GOAL_RADIUS
        return total

    return physics, {
        "torch, one at a time": lambda: [loop(one, first[i : i + 1]) for i in range(args.alone)],
        "torch, batched": lambda: loop(many, first),
    }


def compare(args: argparse.Namespace) -> None:
    pair, maze, torch = make_pair(args.size), mazes.standard("umaze"), common.need("torch")
    ours = our_programs(pair, maze, args)
    physics, theirs = torch_programs(pair, maze, args)
    threads = torch.get_num_threads()
    products, product = common.matmuls("float32")
    torch.set_num_threads(threads)
    seconds = common.measure(ours | theirs | products, args.repeats)

    forward = 2.0 * multiply_adds(pair.ours.multipliers, pair.shape[0])
    flops = forward * STEPS
    # Of the form with convolutions; on a CPU windows are multiplied, zeros and all.  Lowering needs no GPU.
    traced = jax.jit(pair.ours.apply).trace({"params": pair.params}, jnp.zeros((1, *pair.shape)), jnp.zeros(1))
    counted = common.flops(traced.lower(lowering_platforms=("cuda",)))
    assert 1.0 <= counted / forward < 1.2, "the count by hand is not that of the network"
    plans = dict.fromkeys((*ours, *theirs), args.rounds * args.episodes)
    plans["torch, one at a time"] = args.rounds * args.alone
    peak = max(product / seconds[name].best for name in products)
    size = sum(leaf.size for leaf in jax.tree.leaves(pair.params))
    print(
        f"\nU-maze, {args.episodes} episodes ({args.alone} one at a time) of {args.steps} steps with {args.rounds} "
        f"plans each,\nof {pair.shape[0]} rows for every {pair.stride} steps, by {STEPS} steps of "
        f"diffusion; {size / 1e6:.2f} M parameters, float32; {args.repeats} interleaved repeats\n"
        f"a plan: {flops / 1e9:.3f} GFLOP; the network: {forward / 1e6:.2f} MFLOP, by XLA's count with what is "
        f"elementwise {counted / 1e6:.2f}\n"
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores ({platform.machine()}), jax {jax.__version__}, torch "
        f"{torch.__version__} ({threads} threads, OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}), worlds: {physics}"
    )
    print(f"{'best':24}{'ms/plan':>10}{'median':>10}{'plans/s':>10}{'GFLOP/s':>10}{'of matmul':>11}{'time/ours':>11}")
    base = seconds["diffrl"].best / plans["diffrl"]
    for name, count in plans.items():
        median, best = (value / count for value in seconds[name])
        print(
            f"{name:24}{1e3 * best:10.2f}{1e3 * median:10.2f}{1 / best:10.1f}"
            f"{flops / best / 1e9:10.1f}{flops / best / peak:11.1%}{best / base:11.2f}"
        )
    for name in products:
        median, best = seconds[name]
        print(f"{name:24}{1e3 * best:10.2f}{1e3 * median:10.2f}{'':10}{product / best / 1e9:10.1f}")
    whole, sampler, network = (seconds[name].best for name in ours)
    print(
        f"our time: {network / whole:.1%} network, {(sampler - network) / whole:.1%} rest of the sampler, "
        f"{(whole - sampler) / whole:.1%} worlds and control"
    )


def data(args: argparse.Namespace) -> None:
    """Made and on the host; every call compiles anew, which is measured apart."""
    spent: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration")):
            spent.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores ({platform.machine()}), jax {jax.__version__}")
    print(f"{f'best of {args.repeats}':12}{'seconds':>10}{'compiling':>12}{'transitions/min':>18}")
    for name, (_, limit, _) in mazes.STANDARD.items():
        maze, found = mazes.standard(name), []
        for _ in range(args.repeats):
            spent.clear()
            begin = time.perf_counter()
            demonstrations.maze_walk(maze, args.transitions, limit)
            found.append((time.perf_counter() - begin - sum(spent), sum(spent)))
        best, compiling = min(found)
        print(f"{name:12}{best:10.2f}{compiling:12.2f}{60 * args.transitions / best:18,.0f}")


def parse() -> argparse.Namespace:
    gpu = jax.default_backend() == "gpu"
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("what", choices=["loop", "data"], nargs="?", default="loop")
    flags.add_argument("--size", choices=sorted(SIZES), default="paper" if gpu else "small")
    flags.add_argument("--episodes", type=int, default=4096 if gpu else 32, help="side by side")
    flags.add_argument("--steps", type=int, default=64, help="of the world, per episode")
    flags.add_argument("--every", type=int, default=32, help="steps from plan to plan; 0: one plan per episode")
    flags.add_argument("--alone", type=int, help="episodes that torch does one at a time; by default all, on a GPU 4")
    flags.add_argument("--repeats", type=int, default=3, help="interleaved; the best is printed")
    flags.add_argument("--transitions", type=int, default=1_000_000, help="of `data`")
    args = flags.parse_args()
    if min(args.episodes, args.steps, args.repeats) < 1:
        flags.error("--episodes, --steps and --repeats count from 1")
    args.alone = min(args.episodes, args.alone or (4 if gpu else args.episodes))
    args.rounds = -(-args.steps // (args.every or args.steps))
    return args


def main() -> None:
    args = parse()
    try:
        (data if args.what == "data" else compare)(args)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
