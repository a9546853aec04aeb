"""A run of reinforcement learning from start to end: seeds, devices, checkpoints, evaluations, curve and video."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl import config as config_lib
from diffrl.config import leaf
from diffrl.errors import UserError, nearest
from diffrl.evaluate import learning_curves, plots, video
from diffrl.evaluate.learning_curves import Curve
from diffrl.recipes import results, worlds
from diffrl.recipes.worlds import WorldConfig
from diffrl.rl import driver as drivers
from diffrl.rl import evaluation
from diffrl.rl.adapters import brax
from diffrl.rl.agent import Agent
from diffrl.rl.driver import Driver, PerShard, whole
from diffrl.rl.environment import Environment, State
from diffrl.train import loop, mesh
from diffrl.train.checkpoint import Checkpoints
from diffrl.train.writers import Writers

DISPATCHES = 4  # between two evaluations: metrics are seen and signals heard so often
FRAMES = 500  # of a video, at most


@dataclasses.dataclass
class RunConfig:
    """How long, how often and how many.

    Attributes:
        steps: of the environment, all worlds of a seed together, exploration before the first update included; an
            action that is repeated counts once.
    """

    steps: int = leaf(100_000, "environment steps of each seed", at_least=1)
    seeds: int = leaf(5, "independent runs, trained side by side in one program", at_least=1)
    evaluations: int = leaf(20, "points of the learning curve", at_least=1)
    episodes: int = leaf(20, "episodes of each seed at each evaluation", at_least=1)
    final_episodes: int = leaf(100, "episodes of each seed at the end", free=True, at_least=1)
    explore: bool = leaf(False, "evaluate the policy that explores, not its mode", free=True)
    checkpoint_every: int = leaf(1, "evaluations from checkpoint to checkpoint", free=True, at_least=1)
    keep: int = leaf(2, "checkpoints that are kept", free=True, at_least=1)
    video: bool = leaf(True, "end with a video, where there is something to see", free=True)


class Session(NamedTuple):
    """A run that is about to be trained.

    Attributes:
        world, run, seed: as configured.
        workdir: where everything goes.
        agent: what learns.
        population: the driver of all seeds.
        devices: a mesh.
    """

    world: WorldConfig
    run: RunConfig
    seed: int
    workdir: pathlib.Path
    agent: Agent
    population: Driver
    devices: Any


MakeDriver = Callable[[Environment, Agent, PerShard], Driver]


class Contestant(NamedTuple):
    """An agent in a vectorised environment, and how it is driven."""

    world: WorldConfig
    env: Environment
    agent: Agent
    make_driver: MakeDriver


def check_names(flag: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError for the first name that is not known, or if none is given."""
    if not given:
        raise UserError(f"--config.{flag} is empty: choose from {', '.join(known)}")
    for name in given:
        if name not in known:
            raise UserError(f"--config.{flag}={name}: {nearest(name, known, f'choose from {chr(44).join(known)}')}")


def open_session(config: Any, run: config_lib.Run, env: Environment, agent: Agent, make_driver: MakeDriver) -> Session:
    """The session of a config with `world`, `run`, `mesh` and `seed`.

    Devices take whole seeds where these can be dealt among them, else each a share of the worlds of every seed.

    Args:
        env: vectorised.
        make_driver: (env, agent, per_shard) -> the driver of one seed.

    Raises:
        UserError: worlds that do not divide among the devices, several seeds of a host's environment.
    """
    devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if worlds.is_host(config.world) and (config.run.seeds > 1 or mesh.batch_parts(devices) > 1):
        raise UserError(f"{config.world.name} runs on the host, one seed and one device: --config.run.seeds=1")
    over_seeds = seeds_per_shard(devices, config.run)
    one = make_driver(env, agent, mesh.per_shard(devices, config.world.num) if over_seeds is None else whole)
    population = one if worlds.is_host(config.world) else drivers.seeds(one, config.run.seeds, over_seeds)
    return Session(config.world, config.run, config.seed, run.workdir, agent, population, devices)


def seeds_per_shard(devices: Any, run: RunConfig) -> PerShard | None:
    """What gives each device whole seeds, or None where they cannot be dealt among them."""
    return None if run.seeds % mesh.batch_parts(devices) else mesh.per_shard(devices, run.seeds, "seeds")


class Plan(NamedTuple):
    """Of the driver's steps: how many in all, in a dispatch, and from evaluation to evaluation."""

    total: int
    inner: int
    every: int


def plan(run: RunConfig, driver: Driver) -> Plan:
    """As many steps as fit into `run.steps`, in dispatches of equal length; raises UserError if none fits."""
    most = (run.steps - driver.env_steps_before) // driver.env_steps
    if most < 1:
        least = driver.env_steps_before + driver.env_steps
        raise UserError(f"--config.run.steps={run.steps} is less than one update needs: choose at least {least}")
    every = max(1, most // run.evaluations)
    inner = max(1, every // DISPATCHES)
    every -= every % inner
    return Plan(most - most % inner, inner, every)


def train(session: Session) -> Any:
    """Trains to the end, from the newest checkpoint if there is one, and returns the agents' state [seeds, ...]."""
    population, settings = session.population, session.run
    todo = plan(settings, population)
    checkpoints, writers = Checkpoints(session.workdir / "checkpoints", settings.keep), Writers(session.workdir)
    try:
        fresh = jax.jit(population.init)(jax.random.key(session.seed))
        current = mesh.place_run(session.devices, fresh, population.axes)
        current = loop.resume(checkpoints, current, None, writers)
        if worlds.is_host(session.world):
            current = population.renew(current, fresh.world)  # they were not saved: their episodes begin anew
        print(describe(session, current, todo), file=sys.stderr)
        score = evaluation_hook(session, todo, writers)
        if not int(current.step):
            score(0, current)
        current = loop.fit(
            mesh.compile_run(drivers.repeat(population.step, todo.inner), session.devices, population.axes),
            current,
            None,
            steps=todo.total,
            inner=todo.inner,
            checkpoints=checkpoints,
            checkpoint_every=todo.every * settings.checkpoint_every,
            hooks=[score],
            writers=writers,
            log_every=todo.inner,
            batch_size=population.env_steps * settings.seeds,
            desc=session.world.name,
        )
        return mesh.place_run(session.devices, current.agent, None)
    finally:
        writers.close()
        checkpoints.close()


def describe(session: Session, current: Any, todo: Plan) -> str:
    sizes = sum(leaf.size for leaf in jax.tree.leaves(current.agent)) // session.run.seeds
    before = int(current.step)
    return (
        f"{session.world.name}: {session.run.seeds} seeds of {session.world.num} worlds, "
        f"{session.population.env_steps} steps an update, {todo.total} updates"
        + (f" ({before} done)" if before else "")
        + f", {sizes:,} numbers in an agent; output in {session.workdir}"
    )


def evaluator(session: Session, episodes: int) -> Callable[[Any, Any], evaluation.Episodes]:
    """(agents' state, key) -> the Episodes [seeds, episodes] of worlds that training does not see."""
    config = session.world
    env = worlds.vector(worlds.whole(config), episodes)
    limit = 10**9  # every world has a limit of its own
    one = evaluation.evaluate(env, session.agent, limit, session.run.explore)
    if worlds.is_host(config):
        return jax.jit(lambda state, key: jax.tree.map(lambda x: x[None], one(state, key)))
    over = jax.vmap(one)
    over_seeds = seeds_per_shard(session.devices, session.run)
    if over_seeds is not None:
        over = over_seeds(over, (0, 0), (0,))
    return jax.jit(lambda state, key: over(state, drivers.split_over(key, session.run.seeds)))


def evaluation_hook(session: Session, todo: Plan, writers: Writers) -> Callable[[int, Any], None]:
    """Writes every seed's mean return, eval_return/0, eval_return/1, ..., at the plan's points and at the end."""
    score = evaluator(session, session.run.episodes)
    population = session.population

    def hook(step: int, current: Any) -> None:
        if step % todo.every and step != todo.total:
            return
        key = jax.random.fold_in(jax.random.key(session.seed + 1), step)
        returns = mesh.fetch(score(current.agent, key).episode_return).mean(-1)
        told = {f"eval_return/{i}": value for i, value in enumerate(returns)}
        writers.scalars(step, {"env_steps": population.env_steps_before + step * population.env_steps, **told})

    return hook


def curve(workdir: pathlib.Path) -> Curve:
    """The evaluations that a run has written."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "eval_return/0" in row]
    scores = [[row[name] for name in row if name.startswith("eval_return/")] for row in rows]
    return Curve(np.array([row["env_steps"] for row in rows]), np.array(scores, np.float64))


def finish(session: Session, state: Any, title: str, threshold: float | None = None) -> dict[str, Any]:
    """Draws the curve, scores the final policies, writes results.json and a video of the median seed."""
    learning_curves.plot(
        session.workdir / "curve.png", {title: curve(session.workdir)}, title=title, threshold=threshold
    )
    key = jax.random.key(session.seed + 2)
    seen = jax.tree.map(mesh.fetch, evaluator(session, session.run.final_episodes)(state, key))
    returns = seen.episode_return.mean(-1)
    measured = {
        "world": session.world.name,
        "env_steps": int(curve(session.workdir).steps[-1]),
        "returns": returns.tolist(),
        "episode_length": float(seen.episode_length.mean()),
        "interquartile_mean": float(learning_curves.interquartile_mean(returns)),
    }
    results.save(session.workdir / "results.json", measured)
    told = ", ".join(f"{value:.1f}" for value in returns)
    print(f"return of each seed's final policy, {session.run.final_episodes} episodes: {told}")
    print(f"interquartile mean {measured['interquartile_mean']:.1f}; everything lies in {session.workdir}")
    if session.run.video and not worlds.is_host(session.world):
        middle = int(np.argsort(returns)[len(returns) // 2])
        best = jax.tree.map(lambda x: x[middle], state)
        show(session.world, session.agent, best, session.workdir, session.seed)
    return measured


def contest(config: Any, run: config_lib.Run, contestants: Mapping[str, Contestant]) -> None:
    """Trains all of "world/name", or "name" in the one world there is, in folders of these names, and compares them.

    Writes curves.png, a panel for each world, and table.md.
    """
    measured: dict[str, dict[str, Any]] = {}
    panels: dict[str, dict[str, Curve]] = {}
    for path, one in contestants.items():
        here = dataclasses.replace(config, world=one.world)
        session = open_session(here, run._replace(workdir=run.workdir / path), one.env, one.agent, one.make_driver)
        measured[path] = finish(session, train(session), path.replace("/", ": "))
        panels.setdefault(one.world.name, {})[path.rpartition("/")[2]] = curve(session.workdir)
    figure, grid = plots.panels(1, len(panels), 4.8, 3.6)
    for axes, (name, curves) in zip(grid.flat, panels.items(), strict=True):
        learning_curves.draw(axes, curves)
        axes.set_title(name, loc="left", fontsize=10)
    grid[0, 0].set_ylabel("return of an episode")
    plots.save(run.workdir / "curves.png", figure)
    lines = ["| run | steps of a seed | final return of each seed | interquartile mean |", "|---|---|---|---|"]
    for path, row in measured.items():
        each = ", ".join(f"{value:.1f}" for value in row["returns"])
        lines.append(f"| {path} | {row['env_steps']:,} | {each} | {row['interquartile_mean']:.1f} |")
    table = "\n".join(lines) + "\n"
    (run.workdir / "table.md").write_text(table, encoding="utf-8")
    print(table)


def show(world: WorldConfig, agent: Agent, state: Any, folder: pathlib.Path, seed: int) -> None:
    """Writes video.gif of an episode of one agent, or brax's viewer video.html."""
    env = worlds.single(world)
    is_brax = world.name.startswith("brax:")
    if env.render is None and not is_brax:
        return
    states = jax.device_get(jax.jit(evaluation.record(env, agent, FRAMES))(state, jax.random.key(seed)))
    done = np.asarray(states.terminated | states.truncated)
    length = int(np.argmax(done)) + 1 if done.any() else len(done)
    frames: list[State] = [jax.tree.map(lambda x: jnp.asarray(x[i]), states) for i in range(length)]
    if env.render is not None:
        video.gif(folder / "video.gif", [env.render(frame) for frame in frames])
    else:
        page = brax.html(world.name.partition(":")[2], frames, world.backend)
        (folder / "video.html").write_text(page, encoding="utf-8")
