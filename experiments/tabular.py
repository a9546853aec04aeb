"""Reinforcement learning in a table: exact optima, and the learners that find them by trial.

    python -m experiments.tabular                     # FrozenLake, the cliff and Taxi: four minutes of CPU
    python -m experiments.tabular --config.worlds="('cliff',)" --config.seeds=50

Value iteration solves each world exactly (Sutton & Barto, 2018, chapter 4); Monte Carlo control, SARSA, SARSA(lambda),
expected SARSA, Q-learning and double Q-learning learn it from single steps, all seeds of a learner in one compiled
scan.  Rules of exploration (epsilon-greedy, softmax, UCB) are compared under Q-learning on the slippery lake.

Writes

    optimal.png       the optimal values and policies of the worlds that are grids
    learning.png      return of the episodes against steps, mean and 95 % interval over the seeds
    exploration.png   the same for the rules of exploration
    table.md          what the greedy policy of each learner is worth beside the optimum; results.json
    runs/             what each learner came to in each world

A second run of the command takes what has ended from there, also with other worlds or learners.

Expected: optima 0.8235 (lake), -13 (cliff), 7.93 (Taxi).  On the cliff Q-learning's greedy policy walks along the edge
(-13) while its exploring episodes earn about -50; SARSA learns the way round (-17 to -15) and earns about -23, as in
example 6.6 of the book.  Double Q-learning halves its experience between two tables and is the slowest.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffrl import config as config_lib
from diffrl.errors import UserError
from diffrl.evaluate import plots
from diffrl.recipes import digests, results
from diffrl.rl import dynamic_programming as dp
from diffrl.rl import exploration, gridworlds, mdp, tabular, wrappers
from diffrl.rl.exploration import Rule
from diffrl.rl.mdp import MDP
from diffrl.rl.tabular import Episodes, Learner

Array = jax.Array
BINS = 60  # points of a learning curve


@dataclasses.dataclass
class Config:
    """What is learned where, and for how long."""

    worlds: tuple[str, ...] = config_lib.leaf(("lake", "cliff", "taxi"), "of lake, lake8x8, cliff, taxi", free=True)
    learners: tuple[str, ...] = config_lib.leaf((), "only these; all if empty", free=True)
    seeds: int = config_lib.leaf(10, "independent runs of each learner", at_least=2)
    steps: int = config_lib.leaf(100_000, "of each run", at_least=10 * BINS)
    alpha: float = config_lib.leaf(0.3, "step size", above=0, at_most=1)
    epsilon: float = config_lib.leaf(0.1, "exploration of the learners", at_least=0, at_most=1)
    lam: float = config_lib.leaf(
        0.7, "decay of SARSA(lambda)'s traces, whose steps are (1 - lambda) alpha", at_least=0, below=1
    )
    limit: int = config_lib.leaf(200, "steps after which an episode is cut", at_least=1)
    seed: int = config_lib.leaf(0, "of all runs", at_least=0)


class World(NamedTuple):
    """A process, and how it is shown.

    Attributes:
        discount: that its learners use.
        low: the least return worth drawing.
        sides, arrows: of a grid, and what its actions look like.
    """

    process: MDP
    discount: float
    low: float
    sides: tuple[int, int] | None = None
    arrows: str = ""


WORLDS: dict[str, Callable[[], World]] = {
    "lake": lambda: World(gridworlds.frozen_lake(), 0.99, 0.0, (4, 4), "←↓→↑"),
    "lake8x8": lambda: World(gridworlds.frozen_lake("8x8"), 0.99, 0.0, (8, 8), "←↓→↑"),
    "cliff": lambda: World(gridworlds.cliff_walking(), 1.0, -150.0, (4, 12), "↑→↓←"),
    "taxi": lambda: World(gridworlds.taxi(), 0.99, -250.0),
}


def learners(config: Config, discount: float) -> dict[str, Learner]:
    """Those that learn from single steps."""
    alpha = config.alpha
    return {
        "SARSA": tabular.sarsa(alpha, discount),
        f"SARSA({config.lam:g})": tabular.sarsa(alpha * (1 - config.lam), discount, config.lam),
        "expected SARSA": tabular.expected_sarsa(alpha, discount),
        "Q-learning": tabular.q_learning(alpha, discount),
        "double Q-learning": tabular.double_q(alpha, discount),
    }


def rules(config: Config) -> dict[str, Rule]:
    half = config.steps // 2
    return {
        f"epsilon = {config.epsilon:g}": exploration.epsilon_greedy(config.epsilon),
        "epsilon falls from 1 to 0": exploration.epsilon_greedy(lambda n: jnp.clip(1 - n / half, 0.0, 1.0)),
        "softmax, temperature 0.02": exploration.softmax(0.02),
        "UCB, scale 0.5": exploration.ucb(0.5),
    }


class Run(NamedTuple):
    """Of all seeds: the curve [seeds, BINS], masked where no episode ended, and the greedy policies' worth [seeds]."""

    curve: np.ma.MaskedArray
    greedy: np.ndarray


def train(config: Config, world: World, learner: Learner, rule: Rule) -> Run:
    """One learner, all seeds in one compiled program."""
    env = wrappers.time_limit(mdp.environment(world.process, "world"), config.limit)
    states = world.process.start.shape[0]
    learn = functools.partial(tabular.learn, env, learner, rule, states, config.steps)

    def run(key: Array) -> tuple[Array, Array]:
        table, episodes = learn(key)
        return binned(episodes, config.steps), worth(config, world, learner.values(table))

    return over_seeds(config, run)


def monte_carlo(config: Config, world: World) -> Run:
    """As many episodes as the steps would be if each took the limit's quarter; binned by the steps that they took."""
    env, rule = mdp.environment(world.process, "world"), exploration.epsilon_greedy(config.epsilon)
    states, count = world.process.start.shape[0], 4 * config.steps // config.limit
    control = functools.partial(tabular.monte_carlo, env, rule, states, config.limit, count, world.discount)

    def run(key: Array) -> tuple[Array, Array]:
        table, episodes = control(key)
        curve = binned(episodes, config.steps, jnp.cumsum(episodes.episode_length))
        return curve, worth(config, world, table.q)

    return over_seeds(config, run)


class Kept:
    """Runs that have ended, each in a file named by all that it depends on; shows how many are to come.

    Args:
        folder: of the files.
        total: how many will be asked for.
    """

    def __init__(self, config: Config, folder: pathlib.Path, total: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._settings, self._folder = digests.settings(config), folder
        self._bar = tqdm(total=total, unit="run", dynamic_ncols=True)

    def __call__(self, world: str, name: str, make: Callable[[], Run]) -> Run:
        """What `make` gave when this was last asked for, or gives now."""
        self._bar.set_description(f"{name} in {world}")
        path = self._folder / f"{digests.digest(self._settings | {'world': world, 'learner': name})}.json"
        found = results.load(path, None)
        if found is None:
            made = make()
            found = {"world": world, "learner": name, "greedy": made.greedy.tolist()}
            found["curve"] = made.curve.filled(np.nan).tolist()
            results.save(path, found)
        self._bar.update()
        return Run(np.ma.masked_invalid(found["curve"]), np.asarray(found["greedy"]))

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def over_seeds(config: Config, run: Callable[[Array], tuple[Array, Array]]) -> Run:
    """Both results of `run(key)` for all seeds."""
    curve, greedy = jax.device_get(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(config.seed), config.seeds)))
    return Run(np.ma.masked_invalid(curve), greedy)


def binned(episodes: Episodes, steps: int, when: Array | None = None) -> Array:
    """The mean return [BINS] of what ended in each bin of steps; `when`: [N], the step at which each episode did."""
    when = jnp.arange(len(episodes.done)) if when is None else when
    bin = jnp.minimum(when // (steps // BINS), BINS - 1)  # multiplied first, many steps would overflow
    bins = jnp.where(episodes.done & (when < steps), bin, BINS)
    total, count = (jnp.zeros(BINS + 1).at[bins].add(x) for x in (episodes.episode_return, 1.0))
    return jnp.where(count > 0, total / count, jnp.nan)[:BINS]


def worth(config: Config, world: World, q: Array) -> Array:
    """The undiscounted value of the greedy policy from the start, of episodes that are cut at the limit."""
    policy = jax.nn.one_hot(dp.greedy(q), q.shape[-1])
    return dp.evaluate(world.process, policy, 1.0, limit=config.limit) @ world.process.start


# --- Pictures and tables ---------------------------------------------------------------------------------------------


def draw_optimal(config: Config, path: Any) -> None:
    """Optimal values and one arrow a cell."""
    grids = {name: WORLDS[name]() for name in config.worlds if WORLDS[name]().sides is not None}
    if not grids:
        return
    figure, axes = plots.panels(1, len(grids), 4.4, 2.8)
    for panel, (name, world) in zip(axes.flat, grids.items(), strict=True):
        assert world.sides is not None
        solution = dp.value_iteration(world.process, world.discount)
        stays = (world.process.terminated & (world.process.reward == 0)) | (world.process.prob == 0)
        ends = np.asarray(stays.all(axis=(1, 2))).reshape(world.sides)
        values = np.where(ends, np.nan, np.asarray(solution.values).reshape(world.sides))
        panel.grid(False)
        panel.imshow(values, cmap="Blues")
        low, high = np.nanmin(values), np.nanmax(values)
        for (row, column), action in np.ndenumerate(np.asarray(solution.policy).reshape(world.sides)):
            if not ends[row, column]:
                dark = values[row, column] > low + 0.6 * (high - low)
                text = f"{world.arrows[action]}\n{values[row, column]:.2g}"
                panel.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        panel.set_title(f"{name}: optimal at discount {world.discount:g}", loc="left", fontsize=10)
        panel.set(xticks=[], yticks=[])
    plots.save(path, figure)


def draw_curves(config: Config, path: Any, panels: dict[str, dict[str, Run]], worlds: list[World]) -> None:
    """A panel for each of `panels`, with its world: mean and 95 % interval of the mean over seeds."""
    figure, axes = plots.panels(1, len(panels), 4.6, 3.4)
    steps = (np.arange(BINS) + 0.5) * config.steps / BINS
    for panel, (title, runs), world in zip(axes.flat, panels.items(), worlds, strict=True):
        for (name, run), colour in zip(runs.items(), plots.COLOURS, strict=False):
            mean = np.ma.masked_where(run.curve.count(axis=0) < 0.8 * len(run.curve), run.curve.mean(axis=0))
            band = 1.96 * run.curve.std(axis=0) / np.sqrt(len(run.curve) - 1)
            panel.plot(steps, mean, color=colour, label=name, linewidth=1.4)
            panel.fill_between(steps, mean - band, mean + band, color=colour, alpha=0.2, linewidth=0)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlabel("steps")
        best = optimum(world)
        panel.axhline(best, color="black", linewidth=0.8, linestyle=":", label="optimum")
        panel.set_ylim(world.low, best + 0.05 * (best - world.low))
        panel.legend(frameon=False, fontsize=8)
    axes.flat[0].set_ylabel("return of an episode")
    plots.save(path, figure)


def optimum(world: World) -> float:
    """Undiscounted, and without a limit."""
    return float(dp.value_iteration(world.process, 1.0, 1e-7).values @ world.process.start)


def main(config: Config, run: config_lib.Run) -> None:
    if not config.worlds:
        raise UserError(f"--config.worlds=() is empty: choose from {', '.join(WORLDS)}")
    for name in config.worlds:
        if name not in WORLDS:
            raise UserError(f"--config.worlds={name!r} is no world: choose from {', '.join(WORLDS)}")
    known = [*learners(config, 1.0), "Monte Carlo"]
    for name in config.learners:
        if name not in known:
            raise UserError(f"--config.learners={name!r} is no learner: choose from {', '.join(known)}")
    if config.limit > config.steps:
        raise UserError(
            f"--config.limit={config.limit}: no episode need end in {config.steps} steps; choose a lower one"
        )
    run.workdir.mkdir(parents=True, exist_ok=True)
    draw_optimal(config, run.workdir / "optimal.png")
    greedy_rule = exploration.epsilon_greedy(config.epsilon)
    lines = ["| world | learner | greedy policy | last tenth of the episodes |", "|---|---|---|---|"]
    saved, panels = {}, {}
    tries = rules(config)
    total = len(config.worlds) * len(config.learners or known) + len(tries)
    with Kept(config, run.workdir / "runs", total) as kept:
        for name in config.worlds:
            world = WORLDS[name]()
            best = optimum(world)
            lines.append(f"| {name} | optimum | {best:.4f} | |")
            makers = {
                each: functools.partial(train, config, world, learner, greedy_rule)
                for each, learner in learners(config, world.discount).items()
            }
            makers["Monte Carlo"] = functools.partial(monte_carlo, config, world)
            runs = {each: kept(name, each, makers[each]) for each in config.learners or makers}
            panels[name], saved[name] = runs, {"optimum": best, **{each: summary(r) for each, r in runs.items()}}
            lines += [row(name, each, r) for each, r in runs.items()]

        lake = WORLDS["lake"]()
        learner = tabular.q_learning(0.1, lake.discount)
        tried = {
            name: kept("lake", f"Q-learning, alpha 0.1, {name}", functools.partial(train, config, lake, learner, rule))
            for name, rule in tries.items()
        }
    draw_curves(config, run.workdir / "learning.png", panels, [WORLDS[name]() for name in config.worlds])
    draw_curves(config, run.workdir / "exploration.png", {"Q-learning on the slippery lake": tried}, [lake])
    lines += [row("lake, alpha 0.1", f"Q-learning, {each}", r) for each, r in tried.items()]
    saved["exploration"] = {each: summary(r) for each, r in tried.items()}

    text = "\n".join(lines) + "\n"
    (run.workdir / "table.md").write_text(text, encoding="utf-8")
    results.save(run.workdir / "results.json", saved)
    print(text)
    print(f"everything lies in {run.workdir}")


def summary(run: Run) -> dict[str, list[float]]:
    """Mean and standard error over the seeds, of the greedy policy and of the last tenth of the bins with an end."""
    late = np.array([curve.compressed()[-BINS // 10 :].mean() for curve in run.curve if curve.count()])
    return {
        name: [float(np.mean(x)), float(np.std(x, ddof=1) / np.sqrt(len(x)))]
        for name, x in {"greedy": run.greedy, "late": late}.items()
    }


def row(world: str, learner: str, run: Run) -> str:
    cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in summary(run).values()]
    return f"| {world} | {learner} | {cells[0]} | {cells[1]} |"


PRESETS = {"default": Config}

if __name__ == "__main__":
    config_lib.run(main, PRESETS)
