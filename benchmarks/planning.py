r"""Plans per second in closed loop on Maze2D's U-maze, against Diffuser's loop in torch; demonstrations per minute.

  python -m benchmarks.planning                 # two CPU cores: 32 rows, every fourth step; about 3 minutes
  python -m benchmarks.planning --size=paper    # the paper's network, 128 rows; a GPU's default, with 4096 episodes
  python -m benchmarks.planning --episodes=128 --every=16 --alone=4
  python -m benchmarks.planning data            # `demonstrations.maze_walk`: a million steps of each of D4RL's mazes

Ours is one program: worlds, controller, and a plan of 64 ancestral steps every `--every` steps of the world, N episodes
side by side; the parts are those of `experiments.diffuser`.  Torch's side is what the published code does (Janner et al.,
2022): a loop in Python under no_grad with the ends set anew after each step, plans copied to the host and followed there
in MuJoCo, which our worlds equal to the last digits; without mujoco, our world's step, compiled and called from NumPy.

    torch, one at a time   batch 1, as the original plans
    torch, batched         all episodes' plans in one batch, worlds one by one on the host

Coefficients are Python's numbers there, not gathered as in the original, which is faster.  Networks have one set of
random weights, on which time does not depend; the networks' outputs, and whole plans from one start without noise, are
compared before anything is timed.  Both sides make as many plans in as many steps of as many worlds; `--alone` lets one
at a time do fewer episodes, as is the default on a GPU, where times are for as many as it did.

Rows are of the best of `--repeats` turns.  Floating-point operations are the architecture's, two for a multiply-add,
without those on the zeros beside a plan.  Needs the [oracles] extra.
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from diffrl.data import normalisers
from diffrl.diffusion import process, sampling
from diffrl.errors import UserError
from diffrl.nets.temporal_unet import TemporalUNet
from diffrl.planning import policies
from diffrl.pretrained import diffusers_temporal_unet
from diffrl.recipes import denoising, planning, tasks
from diffrl.recipes.planning import PlanConfig
from diffrl.rl import controllers, demonstrations, maze2d, mazes
from experiments import diffuser

ACTIONS, SEEN = 2, 4
PRESETS = {"small": "umaze", "paper": "umaze_paper"}  # of experiments.diffuser
# What plans are scaled by: about the range of D4RL's observations in the U-maze, and that of actions.
RANGES = {"observations": [[0.4, 0.4, -5.0, -5.0], [3.6, 3.6, 5.0, 5.0]], "actions": [[-1.0, -1.0], [1.0, 1.0]]}
KERNEL, EDGE = 5, 3

Plan = Callable[[np.ndarray], np.ndarray]  # obs [n, 4] -> observations of every step of the world [n, N, 4]


# --- One network and one task for both -------------------------------------------------------------------------------


class Pair(NamedTuple):
    """One network twice, with equal weights, and the config that says how both plan."""

    config: diffuser.Config
    torch: Any  # diffusers.UNet1DModel, on `device`
    device: str
    net: TemporalUNet
    params: Any
    fitted: Any

    @property
    def shape(self) -> tuple[int, int]:
        """[H, A + S] of a plan."""
        return self.config.model.horizon, ACTIONS + SEEN

    @property
    def levels(self) -> int:
        """Steps of the diffusion."""
        return self.config.diffusion.table_steps

    def planner(self, params: Any, fitted: Any, temperature: float = 1.0) -> planning.Planner:
        """What `experiments.diffuser` plans with."""
        plan = PlanConfig(temperature=temperature)
        config = dataclasses.replace(self.config, plan=plan)
        return planning.diffuser_model(config, fitted, self.shape).planner(params, fitted)


def make_pair(size: str) -> Pair:
    """Raises AssertionError where the two networks, or the two samplers, do not compute the same in float32."""
    torch, diffusers = common.need("torch"), common.need("diffusers")
    threads = torch.get_num_threads()
    device = common.torch_device(torch)
    torch.set_num_threads(threads)  # torch's own choice
    torch.manual_seed(0)
    config = diffuser.PRESETS[PRESETS[size]]()
    widths = [config.net.channels * m for m in config.net.multipliers]
    model = diffusers.UNet1DModel(
        in_channels=ACTIONS + SEEN, out_channels=ACTIONS + SEEN, block_out_channels=tuple(widths),
        down_block_types=("DownResnetBlock1D",) * len(widths), up_block_types=("UpResnetBlock1D",) * (len(widths) - 1),
        mid_block_type="MidResTemporalBlock1D", out_block_type="OutConv1DBlock", act_fn="mish",
        time_embedding_type="positional", use_timestep_embedding=True, flip_sin_to_cos=False, freq_shift=1,
    ).eval()  # fmt: skip
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    _, params = diffusers_temporal_unet.from_diffusers(weights, dict(model.config))
    net = planning.make_network(config.net, ACTIONS + SEEN)
    fitted = {name: normalisers.limits(np.array(ends, np.float32)) for name, ends in RANGES.items()}
    params, fitted = jax.tree.map(jnp.asarray, (params, fitted))
    pair = Pair(config, model.to(device), device, net, params, fitted)
    check(torch, pair)
    return pair


def check(torch: Any, pair: Pair) -> None:
    """One call of the network, and one plan without the noise of its steps, on both sides."""
    rng = np.random.default_rng(0)
    x, k = rng.standard_normal((4, *pair.shape)).astype(np.float32), rng.integers(pair.levels, size=4)
    maze = mazes.standard("umaze")
    obs = np.array([[3.1, 1.2, 0.3, -0.2], [1.0, 2.0, 0.0, 0.1]], np.float32)
    goal = jnp.broadcast_to(goal_row(maze), obs.shape)
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    table = denoising.make_diffusion(pair.config.diffusion).process
    begin = np.asarray(sampling.start(table, keys, (2, *pair.shape)))
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        y = pair.torch(torch.tensor(x.transpose(0, 2, 1)).to(pair.device), torch.tensor(k).to(pair.device)).sample
        theirs = torch_sampler(torch, pair, maze)(obs, begin)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        same = jax.jit(pair.net.apply)({"params": pair.params}, x, k.astype(np.float32))
        ours = jax.jit(lambda params: pair.planner(params, pair.fitted, 0.0).plan(keys, obs, goal))(pair.params)
    for what, a, b in (("outputs", same, y.cpu().numpy().transpose(0, 2, 1)), ("plans without noise", ours, theirs)):
        difference = np.abs(np.asarray(a) - b).max() / np.abs(b).max()
        assert difference < 1e-4, f"the two sides' {what} differ by {difference:.1e} of the largest value"
        print(f"largest difference between the {what}: {difference:.1e} of the largest value")


def goal_row(maze: mazes.Maze) -> np.ndarray:
    """At the goal, at rest [4]."""
    return np.array([*maze.goal, 0.0, 0.0], np.float32)


def multiply_adds(channels: int, multipliers: tuple[int, ...], horizon: int, padded: bool = False) -> int:
    """Of one call of the network for one plan: all convolutions and dense layers, nothing elementwise.

    padded: with those on the zeros beside a plan, as many count.
    """
    widths = [channels * m for m in multipliers]
    lengths = [horizon >> level for level in range(len(widths))]

    def conv(a: int, b: int, taps: int, length: int, stride: int = 1) -> int:
        places = (stride * i + j - taps // 2 for i in range(-(-length // stride)) for j in range(taps))
        return a * b * sum(padded or 0 <= place < length for place in places)

    def block(a: int, b: int, length: int) -> int:
        shortcut = conv(a, b, 1, length) if a != b else 0
        return conv(a, b, KERNEL, length) + conv(b, b, KERNEL, length) + channels * b + shortcut

    def lengthen(width: int, length: int) -> int:  # four taps of every row, two of which fall off the ends
        return width**2 * (4 * length - (0 if padded else 2))

    total = 2 * channels * 4 * channels  # of the time
    for level, (before, width) in enumerate(itertools.pairwise([ACTIONS + SEEN, *widths])):
        total += block(before, width, lengths[level]) + block(width, width, lengths[level])
        if level < len(widths) - 1:
            total += conv(width, width, EDGE, lengths[level], stride=2)
    total += 2 * block(widths[-1], widths[-1], lengths[-1])
    for level in range(len(widths) - 1, 0, -1):
        width = widths[level - 1]
        total += block(2 * widths[level], width, lengths[level]) + block(width, width, lengths[level])
        total += lengthen(width, lengths[level])
    return total + conv(widths[0], widths[0], KERNEL, horizon) + conv(widths[0], ACTIONS + SEEN, 1, horizon)


def xla_count(pair: Pair) -> float:
    """XLA's count of FLOP of the same, which has elementwise ones too, of the form with convolutions."""
    x, t = jax.ShapeDtypeStruct((1, *pair.shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    # On a CPU `nets.temporal_unet` multiplies windows instead, zeros and all; lowering needs no GPU.
    return common.flops(
        jax.jit(pair.net.apply).trace({"params": pair.params}, x, t).lower(lowering_platforms=("cuda",))
    )


# --- Ours ------------------------------------------------------------------------------------------------------------


def our_programs(pair: Pair, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """The closed loop, and parts of it that do as much of their work: the sampler alone, the network alone."""
    maze = mazes.standard("umaze")
    env = maze2d.make(maze, args.steps)
    keys = episode_keys(args.episodes)
    goal = jnp.broadcast_to(goal_row(maze), (args.episodes, SEEN))
    levels = jnp.tile(jnp.arange(pair.levels - 1.0, -1.0, -1.0), args.rounds)

    def loop(params, fitted, keys, obs):
        planner = pair.planner(params, fitted)
        drive = policies.controller(planner, policies.towards_waypoints, args.every, goal=tasks.goal_observation)
        return controllers.execute(env, drive, args.steps)(keys).episode_return

    def sampler(params, fitted, keys, obs):
        planner = pair.planner(params, fitted)

        def body(x, n):
            return planner.plan(sampling.fold(keys, n), obs, goal), None

        return jax.lax.scan(body, jnp.zeros((len(obs), *pair.shape)), jnp.arange(args.rounds))[0]

    def network(params, fitted, keys, obs):
        def body(x, k):
            x = pair.net.apply({"params": params}, x, sampling.per_sample(k, x))
            return jnp.clip(x, -1.0, 1.0), None

        return jax.lax.scan(body, jnp.zeros((len(obs), *pair.shape)), levels)[0]

    told = pair.params, pair.fitted, keys, jnp.asarray(starts(maze, keys))

    def ready(function):
        compiled = jax.jit(function).lower(*told).compile()
        return lambda: compiled(*told).block_until_ready()

    return {"diffrl": ready(loop), "sampler alone": ready(sampler), "network alone": ready(network)}


def episode_keys(episodes: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), episodes)


def starts(maze: mazes.Maze, keys: jax.Array) -> np.ndarray:
    """First observations [N, 4] of the episodes that `controllers.execute` makes of the keys."""
    world = jax.vmap(maze2d.make(maze, 1).reset)(sampling.fold(keys, controllers.RESET))
    return np.asarray(world.obs)


# --- Torch's ---------------------------------------------------------------------------------------------------------


def torch_sampler(torch: Any, pair: Pair, maze: mazes.Maze) -> Callable[..., np.ndarray]:
    """(obs [n, 4], begin [n, H, A + S] or None) -> x [n, H, A + S]: Diffuser's `p_sample_loop`, normalised as are ours.

    begin: noise to start from, and then none is added.
    """
    betas = process.cosine_betas(pair.levels)
    now = process.alpha_bars(betas)
    before = np.concatenate([[1.0], now[:-1]])
    of_x0 = (betas * np.sqrt(before) / (1 - now)).tolist()
    of_x = (np.sqrt(1 - betas) * (1 - before) / (1 - now)).tolist()
    std = np.sqrt(betas * (1 - before) / (1 - now)).tolist()  # 0 in the last step
    low, high = np.array(RANGES["observations"], np.float32)

    def pin(x: Any, conditions: dict[int, Any]) -> None:
        for row, value in conditions.items():
            x[:, row, ACTIONS:] = value

    def sample(obs: np.ndarray, begin: np.ndarray | None = None) -> np.ndarray:
        ends = {0: obs, pair.shape[0] - 1: np.broadcast_to(goal_row(maze), obs.shape)}
        conditions = {
            row: torch.tensor(2 * (value - low) / (high - low) - 1, dtype=torch.float32, device=pair.device)
            for row, value in ends.items()
        }
        with torch.no_grad():
            shape = (len(obs), *pair.shape)
            x = torch.randn(shape, device=pair.device) if begin is None else torch.tensor(begin).to(pair.device)
            pin(x, conditions)
            for n in reversed(range(pair.levels)):
                k = torch.full((len(obs),), n, device=pair.device, dtype=torch.long)
                x0 = pair.torch(x.transpose(1, 2), k).sample.transpose(1, 2).clamp_(-1.0, 1.0)
                x = of_x0[n] * x0 + of_x[n] * x
                if begin is None:
                    x = x + std[n] * torch.randn_like(x)
                pin(x, conditions)
            return x.cpu().numpy()

    return sample


def torch_planner(torch: Any, pair: Pair, maze: mazes.Maze) -> Plan:
    """Plans in the world's units, with straight lines between their rows."""
    sample, stride = torch_sampler(torch, pair, maze), pair.config.model.stride
    low, high = np.array(RANGES["observations"], np.float32)
    row, rest = np.divmod(np.arange((pair.shape[0] - 1) * stride + 1), stride)
    share, after = (rest / stride).astype(np.float32)[:, None], np.minimum(row + 1, pair.shape[0] - 1)

    def plan(obs: np.ndarray) -> np.ndarray:
        seen = (sample(obs)[..., ACTIONS:] + 1) / 2 * (high - low) + low
        return seen if stride == 1 else (1 - share) * seen[:, row] + share * seen[:, after]

    return plan


class Worlds(NamedTuple):
    """Worlds on the host.  reset: obs [n, 4] -> None.  step: actions [n, 2] -> obs [n, 4]."""

    reset: Callable[[np.ndarray], None]
    step: Callable[[np.ndarray], np.ndarray]


def mujoco_worlds(mujoco: Any, maze: mazes.Maze, count: int) -> Worlds:
    """D4RL's: velocities are clipped before a step, as actions are."""
    model = mujoco.MjModel.from_xml_string(maze2d.mjcf(maze))
    worlds = [mujoco.MjData(model) for _ in range(count)]

    def reset(obs: np.ndarray) -> None:
        for world, row in zip(worlds, obs, strict=True):
            world.qpos[:], world.qvel[:] = row[:2], row[2:]

    def step(actions: np.ndarray) -> np.ndarray:
        seen = np.empty((count, SEEN), np.float32)
        for i, world in enumerate(worlds):
            world.qvel[:] = np.clip(world.qvel, -maze2d.FASTEST, maze2d.FASTEST)
            world.ctrl[:] = np.clip(actions[i], -1.0, 1.0)
            mujoco.mj_step(model, world)
            seen[i, :2], seen[i, 2:] = world.qpos, world.qvel
        return seen

    return Worlds(reset, step)


def compiled_worlds(maze: mazes.Maze, count: int) -> Worlds:
    """Our own step, called with NumPy's arrays, all worlds at once."""
    walls = jnp.asarray(maze.walls)
    move = jax.jit(jax.vmap(lambda o, a: jnp.concatenate(maze2d.simulate(walls, o[:2], o[2:], a))))
    state = np.zeros((count, SEEN), np.float32)

    def reset(obs: np.ndarray) -> None:
        state[:] = obs

    def step(actions: np.ndarray) -> np.ndarray:
        state[:] = move(state, actions)
        return state.copy()

    return Worlds(reset, step)


def physics() -> tuple[str, Callable[[mazes.Maze, int], Worlds]]:
    """The peer's worlds, and what they are called."""
    try:
        mujoco = importlib.import_module("mujoco")
    except ImportError:
        return "diffrl's worlds, called from NumPy", compiled_worlds
    return f"MuJoCo {mujoco.__version__}", functools.partial(mujoco_worlds, mujoco)


def torch_loop(plan: Plan, worlds: Worlds, maze: mazes.Maze, first: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """Returns [n] of the episodes that begin in `first` [n, 4]: Diffuser's `plan_maze2d.py`, with plans anew."""
    obs, total = first, np.zeros(len(first))
    worlds.reset(obs)
    every = args.every or args.steps
    for t in range(args.steps):
        age = t % every
        if not age:
            rows = plan(obs)
        aim = rows[:, min(age + 1, rows.shape[1] - 1)]
        if age + 1 >= rows.shape[1]:
            aim = np.concatenate([aim[:, :2], np.zeros_like(aim[:, 2:])], axis=1)
        obs = worlds.step((aim[:, :2] - obs[:, :2]) + (aim[:, 2:] - obs[:, 2:]))
        total += np.linalg.norm(obs[:, :2] - np.array(maze.goal), axis=1) <= maze2d.GOAL_RADIUS
    return total


def torch_programs(pair: Pair, args: argparse.Namespace, make: Callable) -> dict[str, Callable[[], Any]]:
    torch, maze = common.need("torch"), mazes.standard("umaze")
    plan, first = torch_planner(torch, pair, maze), starts(maze, episode_keys(args.episodes))
    one, all_of_them = make(maze, 1), make(maze, args.episodes)

    def alone() -> Any:
        return [torch_loop(plan, one, maze, first[i : i + 1], args) for i in range(args.alone)]

    return {
        "torch, one at a time": alone,
        "torch, batched": lambda: torch_loop(plan, all_of_them, maze, first, args),
    }


# --- What is printed -------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> None:
    pair = make_pair(args.size)
    torch = common.need("torch")
    name, make = physics()
    ours, theirs = our_programs(pair, args), torch_programs(pair, args, make)
    threads = torch.get_num_threads()
    products, product = common.matmuls("float32")
    torch.set_num_threads(threads)
    seconds = common.measure(ours | theirs | products, args.repeats)

    forward = 2.0 * multiply_adds(pair.net.channels, pair.net.multipliers, pair.shape[0])
    padded = 2.0 * multiply_adds(pair.net.channels, pair.net.multipliers, pair.shape[0], padded=True)
    flops = forward * pair.levels
    peak = max(product / seconds[name].best for name in products)
    plans = {name: args.rounds * (args.alone if "one at" in name else args.episodes) for name in ours | theirs}
    config = pair.config
    count = sum(leaf.size for leaf in jax.tree.leaves(pair.params))
    print(
        f"\nU-maze, {args.episodes} episodes of {args.steps} steps, {args.rounds} plans in each, of {pair.shape[0]} rows "
        f"for every {config.model.stride} steps; {pair.levels} steps of diffusion, {count / 1e6:.2f} M parameters, float32"
    )
    print(
        f"torch follows its plans in {name}; one at a time does {args.alone} episodes; {args.repeats} interleaved repeats"
    )
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores ({platform.machine()}), jax {jax.__version__}, "
        f"torch {torch.__version__} ({threads} threads), OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY')}"
    )
    print(f"{'':26}{'ms/plan':>10}{'median':>10}{'plans/s':>10}{'GFLOP/s':>10}{'of matmul':>11}{'time/ours':>11}")
    base = seconds["diffrl"].best / plans["diffrl"]
    for name in ("diffrl", *theirs):
        best, rate = seconds[name].best / plans[name], flops * plans[name] / seconds[name].best
        print(
            f"{name:26}{1e3 * best:10.2f}{1e3 * seconds[name].median / plans[name]:10.2f}{1 / best:10.1f}"
            f"{rate / 1e9:10.1f}{rate / peak:11.1%}{best / base:11.2f}"
        )
    for name in products:
        print(f"{name:26}{1e3 * seconds[name].best:10.2f}{1e3 * seconds[name].median:10.2f}{'':10}"
              f"{product / seconds[name].best / 1e9:10.1f}")  # fmt: skip
    whole, sampler, network = (seconds[name].best for name in ours)
    print(
        f"ours: network {network / whole:.1%} ({flops * plans['diffrl'] / network / 1e9:.1f} GFLOP/s alone, "
        f"{flops * plans['diffrl'] / network / peak:.1%} of matmul), rest of the sampler {(sampler - network) / whole:.1%}, "
        f"worlds and control {(whole - sampler) / whole:.1%}"
    )
    counted = xla_count(pair)
    print(
        f"a plan: {flops / 1e9:.3f} GFLOP; a call of the network: {forward / 1e6:.2f} MFLOP "
        f"({padded / 1e6:.2f} with the zeros beside a plan), {counted / 1e6:.2f} by XLA's count with what is elementwise"
    )
    assert 1.0 <= counted / forward < 1.2, "the count by hand is not that of the network"


def compile_seconds() -> Iterator[float]:
    """Seconds that jax has compiled since the last time it was asked."""
    spent: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration")):
            spent.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    while True:
        yield sum(spent)
        spent.clear()


def data(args: argparse.Namespace) -> None:
    """Made and on the host; every call compiles anew, which is measured apart."""
    compiled = compile_seconds()
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores ({platform.machine()}), jax {jax.__version__}")
    print(f"best of {args.repeats}{'seconds':>16}{'compiling':>12}{'transitions/min':>18}")
    for name, (_, limit, _) in mazes.STANDARD.items():
        maze, found = mazes.standard(name), []
        for _ in range(args.repeats):
            next(compiled)
            begin = time.perf_counter()
            made = demonstrations.maze_walk(maze, args.transitions, limit)
            whole, apart = time.perf_counter() - begin, next(compiled)
            assert len(made.observations) == args.transitions
            found.append((whole - apart, apart))
        best, apart = min(found)
        print(f"{name:9}{best:16.2f}{apart:12.2f}{60 * args.transitions / best:18,.0f}")


def parse() -> argparse.Namespace:
    """Flags, with what the device at hand can bear where they are not given."""
    gpu = jax.default_backend() == "gpu"
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("what", choices=["loop", "data"], nargs="?", default="loop")
    flags.add_argument("--size", choices=sorted(PRESETS), default="paper" if gpu else "small")
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
    config = diffuser.PRESETS[PRESETS[args.size]]().model
    try:
        policies.check_every(planning.Space(config.horizon, ACTIONS, SEEN, stride=config.stride), args.every)
    except UserError as error:
        flags.error(str(error))
    args.rounds = -(-args.steps // args.every) if args.every else 1
    return args


def main() -> None:
    args = parse()
    if args.what == "data":
        data(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
