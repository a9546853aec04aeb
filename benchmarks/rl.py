r"""Reinforcement learning against its peers: brax's PPO, stable-baselines3's PPO, and many seeds against one.

  python -m benchmarks.rl brax          # PPO on inverted_pendulum (spring): same sizes, same updates
  python -m benchmarks.rl sb3           # PPO on CartPole, same sizes and updates: 8 worlds, and one as sb3 has it
  python -m benchmarks.rl seeds         # 64 seeds in one program against one seed; --devices=2: on a device each
  python -m benchmarks.rl parts         # where PPO's time goes: physics, inference, update
  python -m benchmarks.rl returns --robot=hopper --steps=5000000      # what both learn in as many steps

Each prints a table with ratios; ours and the peer's are timed in turns on the same machine in the same run, compilation
apart.  brax's trainer calls `jax.device_put_replicated`, which jax has dropped: a shim below stands for it.  Needs the
[envs] extra, and `sb3` stable-baselines3 with torch ([oracles]).

`brax` on two CPU cores: --devices=2 splits our worlds over two virtual devices, and brax's pmap over the same two.
The seconds of compilation are all that was spent beyond the median: brax compiles its epoch twice, once for the state
that it begins with and once for what an epoch gives back.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

DEVICES = "--xla_force_host_platform_device_count"


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["brax", "sb3", "seeds", "parts", "returns"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices")
    parser.add_argument("--num", type=int, default=64, help="seeds of the population")
    parser.add_argument("--robot", default="inverted_pendulum", help="of `returns`")
    parser.add_argument("--steps", type=int, default=1_000_000, help="of `returns`, of the environment")
    parser.add_argument("--seed", type=int, default=1, help="of `returns`")
    return parser.parse_args()


def brax_sizes(robot: str) -> Any:
    """The config of `experiments.ppo` with brax's own recipe, whose sizes are those of its published notebook."""
    from experiments import ppo

    if robot == "inverted_pendulum":
        return ppo.brax(robot, 2_000_000, window=5)
    made = ppo.PRESETS.get(robot)
    if made is None or not made().world.name.startswith("brax:"):
        robots = [name for name, made in ppo.PRESETS.items() if made().world.name.startswith("brax:")]
        raise SystemExit(f"error: --robot={robot}: choose from {', '.join(robots)}")
    return made()


def brax_arguments(robot: str) -> dict[str, Any]:
    """The same recipe as arguments of brax's trainer."""
    config = brax_sizes(robot)
    settings, num = config.ppo, config.world.num
    window = settings.window
    return {
        "episode_length": config.world.episode_length, "action_repeat": config.world.action_repeat,
        "reward_scaling": settings.reward_scale, "normalize_observations": settings.normalise_obs,
        "unroll_length": window, "num_minibatches": settings.minibatches, "num_updates_per_batch": settings.epochs,
        "discounting": settings.discount, "learning_rate": settings.learning_rate, "entropy_cost": settings.entropy,
        "num_envs": num, "batch_size": num * settings.unroll // window // settings.minibatches,
    }  # fmt: skip


def brax_trainer() -> Any:
    """brax's module, with what jax has dropped put back."""
    import jax
    import jax.numpy as jnp

    def replicated(tree: Any, devices: Any) -> Any:
        return jax.tree.map(lambda x: jnp.stack([x] * len(devices)), tree)

    vars(jax)["device_put_replicated"] = replicated
    from brax.training.agents.ppo import train

    return train


def our_brax() -> tuple[Any, Any, Any]:
    """(driver, compiled step, a run) of PPO on inverted_pendulum in brax's own sizes."""
    import jax

    from diffrl.recipes import worlds
    from diffrl.rl import driver
    from diffrl.rl.on_policy import on_policy
    from diffrl.train import mesh
    from experiments import ppo

    config = brax_sizes("inverted_pendulum")
    env = worlds.vector(config.world, config.world.num, None, config.ppo.reward_scale)
    grid = mesh.make_mesh()
    run = on_policy(env, ppo.build(config, env), config.ppo.unroll, mesh.per_shard(grid, config.world.num))
    state = mesh.place_run(grid, jax.jit(run.init)(jax.random.key(0)), run.axes)
    return run, mesh.compile_run(driver.repeat(run.step, 1), grid, run.axes), state


def compiled(program: Any, *arguments: Any) -> tuple[Any, float]:
    """The executable, and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    return program.lower(*arguments).compile(), time.perf_counter() - start


def against_brax(repeats: int) -> None:
    """Both trainers in turns: one call of brax's `training_epoch` of one training step, and one of our steps."""
    import jax

    brax_ppo = brax_trainer()
    run, program, state = our_brax()
    program, ours_compile = compiled(program, state, None)

    def ours() -> None:
        nonlocal state
        state, told = program(state, None)
        jax.block_until_ready(told)

    mine: list[float] = []

    def timed() -> None:
        start = time.perf_counter()
        ours()
        mine.append(time.perf_counter() - start)

    theirs: list[float] = []

    def progress(steps: int, metrics: dict[str, Any]) -> None:
        # Called after every epoch of one training step: theirs has just ended, now it is our turn.
        if "training/walltime" in metrics:
            theirs.append(float(metrics["training/walltime"]) - sum(theirs))
            timed()

    from diffrl.rl.adapters import brax as adapter

    steps = run.env_steps
    brax_ppo.train(
        adapter._robot("inverted_pendulum", "spring"),
        num_timesteps=steps * (repeats + 2), num_evals=repeats + 3, seed=1, run_evals=False, progress_fn=progress,
        **brax_arguments("inverted_pendulum"),
    )  # fmt: skip
    their_compile = sum(theirs) - len(theirs) * sorted(theirs[2:])[len(theirs[2:]) // 2]
    print(f"brax's first epoch: {theirs[0]:.1f} s, its second: {theirs[1]:.1f} s")
    table("PPO on brax's inverted_pendulum, 2048 worlds, 32 minibatches x 4", steps, {
        "diffrl": (mine[1:], ours_compile), "brax": (theirs[2:], their_compile),
    })  # fmt: skip


def returns(robot: str, steps: int, seed: int, points: int = 8) -> None:
    """What both trainers have learned after as many steps: the mean return of the mode's 128 episodes."""
    import jax

    from diffrl.recipes import worlds
    from diffrl.rl import driver, evaluation
    from diffrl.rl.adapters import brax as adapter
    from diffrl.rl.on_policy import on_policy
    from experiments import ppo

    config = brax_sizes(robot)
    env = worlds.vector(config.world, config.world.num, None, config.ppo.reward_scale)
    agent = ppo.build(config, env)
    run = on_policy(env, agent, config.ppo.unroll)
    repeat = config.world.action_repeat
    each = max(1, steps // (run.env_steps * repeat * points))
    score = jax.jit(evaluation.evaluate(worlds.vector(config.world, 128), agent, 10**9))
    state, step = jax.jit(run.init)(jax.random.key(seed)), jax.jit(driver.repeat(run.step, each))
    start, done = time.perf_counter(), 0
    while True:
        found = float(score(state.agent, jax.random.key(seed + 1)).episode_return.mean())
        print(f"diffrl {done:12,} steps {found:10.1f} {time.perf_counter() - start:8.0f} s", flush=True)
        if done >= steps:
            break
        state, _ = step(state, None)
        done += each * run.env_steps * repeat
    start = time.perf_counter()

    def progress(done: int, metrics: dict[str, Any]) -> None:
        found = float(metrics["eval/episode_reward"])
        print(f"brax   {done:12,} steps {found:10.1f} {time.perf_counter() - start:8.0f} s", flush=True)

    evaluations = max(2, -(-steps // (each * run.env_steps * repeat)) + 1)
    brax_trainer().train(
        adapter._robot(robot, config.world.backend), num_timesteps=done, num_evals=evaluations, seed=seed,
        deterministic_eval=True, progress_fn=progress, **brax_arguments(robot),
    )  # fmt: skip


def table(title: str, steps: int, rows: dict[str, tuple[list[float], float]]) -> None:
    """Rows of (seconds of each repeat, seconds of compilation); the first is what the others are compared with."""
    import jax

    print(f"\n{title}")
    print(f"{jax.devices()[0].device_kind} x {jax.device_count()}, {os.cpu_count()} cores, jax {jax.__version__}")
    print(f"{'':28}{'steps/s':>12}{'best':>12}{'compile s':>12}{'time/first':>12}")
    middle = {name: sorted(seconds)[len(seconds) // 2] for name, (seconds, _) in rows.items()}
    first = next(iter(middle.values()))
    for name, (seconds, compile_seconds) in rows.items():
        print(
            f"{name:28}{steps / middle[name]:12,.0f}{steps / min(seconds):12,.0f}{compile_seconds:12.1f}"
            f"{middle[name] / first:12.2f}"
        )


def ppo_run(num: int = 8, unroll: int = 128, minibatches: int = 4) -> Any:
    """The driver of `experiments.ppo` on CartPole in these sizes."""
    from diffrl.recipes import worlds
    from diffrl.rl.on_policy import on_policy
    from experiments import ppo

    config = ppo.Config()
    config.world.num, config.ppo.unroll, config.ppo.minibatches = num, unroll, minibatches
    env = worlds.vector(config.world, num)
    return on_policy(env, ppo.build(config, env), unroll)


def a2c_run() -> Any:
    """The driver of `experiments.a2c`'s default."""
    from diffrl.recipes import worlds
    from diffrl.rl.on_policy import on_policy
    from experiments import a2c

    config = a2c.Config()
    env = worlds.vector(config.world, config.world.num, reward_scale=config.a2c.reward_scale)
    return on_policy(env, a2c.build(config, env), config.a2c.unroll)


def dqn_run() -> Any:
    """The driver of `experiments.dqn`'s default."""
    from diffrl.recipes import worlds
    from diffrl.rl.driver import whole
    from experiments import dqn

    config = dqn.Config()
    env = worlds.vector(config.world, config.world.num)
    return dqn.driver(config, env, dqn.build(config, env), whole)


def ready(run: Any, seeds: int, updates: int) -> tuple[Callable[[], None], float]:
    """(so many updates of a driver, or of many seeds of it; seconds of compilation)."""
    import jax

    from diffrl.rl import driver
    from diffrl.train import mesh

    grid = mesh.make_mesh(devices=None if seeds > 1 else jax.devices()[:1])
    run = driver.seeds(run, seeds, mesh.per_shard(grid, seeds, "seeds")) if seeds > 1 else run
    state = mesh.place_run(grid, jax.jit(run.init)(jax.random.key(0)), run.axes)
    program, seconds = compiled(mesh.compile_run(driver.repeat(run.step, updates), grid, run.axes), state, None)

    def ours() -> None:
        nonlocal state
        state, told = program(state, None)
        jax.block_until_ready(told)

    return ours, seconds


def in_turns(programs: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each; one uncounted turn first."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def against_sb3(repeats: int) -> None:
    """The same rollouts, epochs (10), minibatches and networks (64, 64), Adam and clipping."""
    for num, unroll, minibatches in ((8, 128, 4), (1, 2048, 32)):  # ours, and stable-baselines3's own
        _against_sb3(repeats, num, unroll, minibatches)


def _against_sb3(repeats: int, num: int, unroll: int, minibatches: int) -> None:
    import stable_baselines3 as sb3

    run = ppo_run(num, unroll, minibatches)
    ours, seconds = ready(run, 1, 10)
    model = sb3.PPO(
        "MlpPolicy", sb3.common.env_util.make_vec_env("CartPole-v1", num), n_steps=unroll,
        batch_size=num * unroll // minibatches, n_epochs=10, learning_rate=1e-3, device="cpu", verbose=0,
    )  # fmt: skip
    steps = 10 * run.env_steps

    def theirs() -> None:
        model.learn(steps, reset_num_timesteps=False)

    times = in_turns({"diffrl": ours, "stable-baselines3": theirs}, repeats)
    table(f"PPO on CartPole, {num} worlds x {unroll} steps, {minibatches} minibatches x 10", steps, {
        "diffrl": (times["diffrl"], seconds), "stable-baselines3": (times["stable-baselines3"], 0.0),
    })  # fmt: skip


def many_seeds(repeats: int, num: int) -> None:
    """Of each agent on CartPole, in its experiment's own sizes.  Steps/s are those of one seed."""
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        "PPO": (ppo_run, 10),
        "PPO, one world of 2048 steps, 32 minibatches": (lambda: ppo_run(1, 2048, 32), 2),
        "A2C": (a2c_run, 500),
        "DQN": (dqn_run, 100),
    }
    for name, (make, updates) in runs.items():
        run = make()
        one, first = ready(run, 1, updates)
        all_of_them, second = ready(run, num, updates)
        times = in_turns({"1": one, "all": all_of_them}, repeats)
        table(f"{name} on CartPole, one seed and {num} in one program", updates * run.env_steps, {
            "1 seed": (times["1"], first), f"{num} seeds": (times["all"], second),
        })  # fmt: skip


def parts(repeats: int) -> None:
    """One step of PPO on inverted_pendulum: physics alone, with the policy, and the whole."""
    import jax
    import jax.numpy as jnp

    from diffrl.recipes import worlds
    from diffrl.rl import driver
    from experiments import ppo

    config = brax_sizes("inverted_pendulum")
    env = worlds.vector(config.world, config.world.num, None, config.ppo.reward_scale)
    agent, unroll = ppo.build(config, env), config.ppo.unroll
    run, whole, state = our_brax()
    whole, seconds = compiled(whole, state, None)
    world, keys = jax.jit(env.reset)(jax.random.key(0)), driver.split_over(jax.random.key(1), config.world.num)
    learner = jax.jit(agent.init)(jax.random.key(0))
    still = jnp.zeros((config.world.num, *env.actions.shape))

    def physics(world: Any) -> Any:
        return jax.lax.scan(lambda world, _: (env.step(world, still), world.reward), world, None, unroll)[0]

    def acting(learner: Any, world: Any) -> Any:
        return driver.collect(env, functools.partial(agent.act, learner), unroll, world, keys, agent.noise)

    programs = {"physics": jax.jit(physics), "physics + inference": jax.jit(acting)}
    arguments = {"physics": (world,), "physics + inference": (learner, world)}

    def step() -> None:
        nonlocal state
        state, told = whole(state, None)
        jax.block_until_ready(told)

    timed: dict[str, Callable[[], None]] = {"whole step": step}
    for name, program in programs.items():
        timed[name] = lambda program=program, name=name: jax.block_until_ready(program(*arguments[name]))  # type: ignore[misc]
    times = in_turns(timed, repeats)
    table("PPO on inverted_pendulum, where the time goes", run.env_steps, {
        name: (times[name], seconds if name == "whole step" else 0.0) for name in timed
    })  # fmt: skip


def main() -> None:
    chosen = flags()
    if chosen.devices > 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}={chosen.devices}"
    measure: dict[str, Callable[[], None]] = {
        "brax": lambda: against_brax(chosen.repeats),
        "sb3": lambda: against_sb3(chosen.repeats),
        "seeds": lambda: many_seeds(chosen.repeats, chosen.num),
        "parts": lambda: parts(chosen.repeats),
        "returns": lambda: returns(chosen.robot, chosen.steps, chosen.seed),
    }
    measure[chosen.what]()


if __name__ == "__main__":
    main()
