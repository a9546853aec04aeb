"""experiments.diffuser, decision_diffuser and replanning as a user runs them, tiny: files, resuming, refusals."""

import json
import types

import jax
import numpy as np
import pytest

from diffrl import config as config_lib
from diffrl.data import trajectories
from diffrl.recipes import tasks
from diffrl.rl import mazes
from experiments import decision_diffuser, diffuser, replanning

TINY = [
    "--config.task.transitions=6000",
    "--config.net.kind=transformer",  # compiles faster
    "--config.net.width=16",
    "--config.net.depth=1",
    "--config.net.heads=2",
    "--config.model.horizon=16",
    "--config.diffusion.table_steps=4",
    "--config.train.batch_size=8",
    "--config.optim.warmup_steps=0",
    "--config.eval.episodes=6",
    "--config.eval.watch=4",
    "--config.eval.batch=6",
    "--config.eval.video=False",
    "--config.plan.steps=0",
    "--config.task.steps=40",
]


def run(experiment, workdir, *flags, tiny=TINY):
    arguments = [f"--workdir={workdir}", *tiny, *filter(None, flags)]
    config_lib.run(experiment.main, experiment.PRESETS, modes=("train", "eval"), argv=arguments)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A Diffuser's workdir after eight steps, and what it printed."""
    workdir = tmp_path_factory.mktemp("diffuser")
    run(diffuser, workdir, "--config.train.steps=8", "--config.train.sample_every=4")
    return workdir


def test_diffuser_leaves_scores_curve_pictures_and_the_best_checkpoint(planned):
    scores = json.loads((planned / "scores.json").read_text())
    assert set(json.loads((planned / "curve.json").read_text())) == {"4", "8"}
    for goals in ("the maze's goal", "random goals"):
        for who in ("Diffuser", "waypoint controller", "random actions"):
            assert any(name.startswith(f"{who}, {goals}") for name in scores), (who, goals)
    assert all(np.isfinite(row["score"]) and row["episodes"] == 6 for row in scores.values())
    for name in ("plans.png", "plans_random_goals.png", "loss.png", "curve.png", "scores.md", "demonstrations.npz"):
        assert (planned / name).exists(), name
    assert any((planned / "best").iterdir())
    found, facts = trajectories.load(planned / "demonstrations.npz")
    assert len(found.rewards) == 6000
    assert "diffrl" in facts["made_by"]


@pytest.mark.long
def test_more_steps_go_on_and_other_plans_need_no_training(planned, capsys):
    before = json.loads((planned / "curve.json").read_text())
    run(diffuser, planned, "--config.train.steps=12", "--config.train.sample_every=4")
    after = json.loads((planned / "curve.json").read_text())
    assert set(after) == {"4", "8", "12"}
    assert {step: after[step] for step in before} == before
    assert "Diffuser, the maze's goal, step 12" in capsys.readouterr().out
    scores = (planned / "scores.json").read_text()
    run(diffuser, planned, "--mode=eval", "--config.plan.every=20", "--config.plan.warm=0.5", "--config.plan.seed=3")
    assert (planned / "scores.json").read_text() == scores
    assert (planned / "eval" / "scores.json").read_text() != scores
    assert json.loads((planned / "eval" / "config.json").read_text())["plan"]["seed"] == 3
    assert (planned / "eval" / "plans.png").exists()


@pytest.mark.slow
def test_a_maze_of_ones_own(tmp_path):
    flags = ["--config.task.maze=#####/#OOG#/#####", "--config.train.steps=2", "--config.train.sample_every=0"]
    run(diffuser, tmp_path, *flags)
    scores = json.loads((tmp_path / "scores.json").read_text())
    row = next(row for name, row in scores.items() if name.startswith("waypoint controller, the maze's goal"))
    assert 50 < row["score"] < 150  # its scale has this controller at 100


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.task.maze=umase"], "umaze"),
        (["--config.task.maze=#####/#O#G#/#####"], "cannot be solved"),
        (["--config.task.file=nowhere.hdf5"], "nowhere.hdf5"),
        (["--config.task.normaliser=none"], "limits, gaussian, cdf"),
        (["--config.net.kind=unet", "--config.model.horizon=15"], "horizon 15"),
        (["--config.model.horizon=5000"], "no window of 19997 steps"),
        (["--config.plan.every=6"], "multiple of 4"),
        (["--config.plan.every=100"], "every 100 steps"),
        (["--config.plan.candidates=3"], "nothing ranks them"),
        (["--config.plan.remaining=4"], "any_arrival"),
        (["--config.plan.sampler=dim"], "ddim"),
        (["--config.task.reward=dence"], "sparse or dense"),
        (["--config.diffusion.learned_variance=True"], "learned_variance"),
        (["--preset=hopper", "--config.task.steps=0", "--config.task.actors="], "task.actors"),
        (["--preset=hopper", "--config.task.steps=0", "--config.task.quality=best"], "medium"),
        (["--config.task.robot=hoper"], "hopper"),
        (["--config.task.start=(1,0)"], "start=(1, 0) lies in a wall"),
        (["--config.task.start=(1,)"], "give x and y"),
        (["--config.plan.steps=9"], "plan.steps=9"),
        (["--config.train.profiles_every=2"], "no snapshots"),
        (["--config.diffusion.drop_label=0.5"], "no labels"),
        (["--config.task.normaliser=gaussian"], "plan.clip=False"),
        (["--config.value.train=True", "--config.plan.sampler=dpmpp_2m"], "one-step sampler"),
    ],
)
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    refused(diffuser, tmp_path, flags, words, capsys)


def refused(experiment, workdir, flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(experiment, workdir, *flags)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.parametrize(
    ("experiment", "flags", "words"),
    [
        (decision_diffuser, ["--config.plan.remaining=16"], "no goal to keep"),
        (decision_diffuser, ["--config.plan.candidates=4"], "no value to rank by"),
        (decision_diffuser, ["--config.decision.quantile=0"], "Set one"),
        (decision_diffuser, ["--config.decision.target=2"], "expected at least 0 and at most 1"),
        (decision_diffuser, ["--config.seed=-1"], "expected at least 0"),
        (decision_diffuser, ["--config.net.kind=unet", "--config.net.multipliers=()"], "one for each level"),
        (decision_diffuser, ["--config.task.random_goal=True"], "task.random_goal"),
        (replanning, ["--config.replan.every=(8,)", "--config.model.any_arrival=False"], "any_arrival"),
        (replanning, ["--config.replan.every=(8,)", "--config.replan.remaining=500"], "remaining=500"),
        (replanning, [], "every 64 steps"),
    ],
)
def test_mistakes_of_the_others_too(experiment, flags, words, tmp_path, capsys):
    refused(experiment, tmp_path, flags, words, capsys)


def test_demonstrations_of_something_else_are_refused(planned, tmp_path, capsys):
    refused(diffuser, planned, ["--mode=eval", "--config.task.maze=medium"], "maze='umaze', not 'medium'", capsys)
    (tmp_path / "demonstrations.npz").write_bytes((planned / "demonstrations.npz").read_bytes())
    refused(diffuser, tmp_path, ["--config.task.transitions=500"], "transitions=6000, not 500", capsys)
    file = f"--config.task.file={tmp_path / 'demonstrations.npz'}"
    refused(diffuser, tmp_path / "other", [file, "--config.task.maze=large"], "not in free cells of large", capsys)
    robot = [file, "--config.task.robot=hopper"]
    refused(
        diffuser,
        tmp_path / "robot",
        ["--preset=hopper", *robot, "--config.task.steps=0"],
        "hopper has 11 and 3",
        capsys,
    )
    refused(diffuser, tmp_path / "robot", robot, "task.steps=40: a robot has no such thing", capsys)
    refused(diffuser, tmp_path / "maze", ["--config.task.quality=expert"], "task.quality=expert: a maze has", capsys)


def test_windows_are_cut_at_the_goal_or_not(planned):
    def cut(at_goal):
        task = tasks.open_task(tasks.TaskConfig(transitions=6000, cut_at_goal=at_goal), planned)
        there = np.linalg.norm(task.transitions.observations[:, :2] - np.array(task.maze.goal), axis=1) < 0.5
        left = np.flatnonzero(there[:-1] & ~there[1:])
        ends = task.paths.starts + task.paths.lengths - 1
        assert task.paths.lengths.sum() == 6000
        return np.isin(left, ends).mean(), len(ends)

    (all_of_them, many), (chance, few) = cut(True), cut(False)
    assert all_of_them == 1
    assert chance < 0.1
    assert few < many


def test_a_fall_costs_what_the_value_is_told():
    """An episode that falls in its third step and one that is cut there, rewards of 1."""
    nothing, falls = np.zeros((6, 1), np.float32), np.arange(6) == 2
    steps = trajectories.Transitions(nothing, nothing, np.ones(6, np.float32), falls, np.arange(6) == 5)
    task = types.SimpleNamespace(transitions=steps, paths=trajectories.paths(steps.terminals | steps.timeouts))
    for penalty in (0.0, 10.0):
        wanted = np.array([3, 2, 1, 3, 2, 1]) - penalty * (np.arange(6) < 3)
        found = tasks.scaled_returns(task, 1.0, penalty)
        np.testing.assert_allclose(found, (wanted - wanted.mean()) / wanted.std(), rtol=1e-5)


@pytest.mark.long
def test_decision_diffuser_learns_plans_actions_and_prospects(tmp_path):
    run(
        decision_diffuser, tmp_path, "--config.train.steps=4", "--config.train.sample_every=2",
        "--config.train.log_every=1", "--config.plan.every=20",
    )  # fmt: skip
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for key in ("planning", "acting", "quantile"):
        assert np.isfinite(metrics[-1][key])
    assert "Decision Diffuser" in (tmp_path / "scores.md").read_text()


@pytest.mark.parametrize("experiment", [pytest.param(diffuser, marks=pytest.mark.slow), decision_diffuser])
def test_robots_plan_from_a_file_and_walk(experiment, tmp_path):
    """Demonstrations of no skill: two falls and a cut episode; planners trained for two steps walk until they fall."""
    pytest.importorskip("gymnasium")
    pytest.importorskip("imageio")
    random = np.random.default_rng(0)
    file = tmp_path / "hops.npz"
    falls, cuts = np.zeros((2, 300), bool)
    falls[[99, 199]], cuts[299] = True, True
    seen, done = random.standard_normal((300, 11)), random.uniform(-1, 1, (300, 3))
    rows = (x.astype(np.float32) for x in (seen, done, random.random(300)))
    trajectories.save(file, trajectories.Transitions(*rows, falls, cuts))
    run(
        experiment, tmp_path / "run", "--preset=hopper", f"--config.task.file={file}", "--config.train.steps=2",
        "--config.value.multipliers=(1,)" * (experiment is diffuser), "--config.eval.episodes=2",
        "--config.diffusion.table_steps=4", tiny=[flag for flag in TINY if "task.steps" not in flag],
    )  # fmt: skip
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    (name,) = (name for name in scores if "step 2" in name)
    assert "hopper of hops.npz" in name
    assert scores[name]["episodes"] == 2 == len(scores["lengths"])
    assert 0 < min(scores["lengths"]) < 300
    demonstrated = scores["the demonstrations' episodes"]
    assert demonstrated["episodes"] == 2
    assert demonstrated["return"] == pytest.approx(50, abs=10)


@pytest.mark.slow
def test_replanning_compares_ways_and_intervals(tmp_path):
    run(
        replanning, tmp_path, "--config.train.steps=2", "--config.replan.every=(8,20)", "--config.replan.remaining=4",
    )  # fmt: skip
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["way"], row["every"], row["plans"]) for row in rows] == [
        ("one plan", 0, 1),
        *(
            (way, every, plans)
            for way in ("cold, goal at the end", "cold, goal at its time", "warm, goal at its time")
            for every, plans in ((8, 5), (20, 2))
        ),
    ]
    assert (tmp_path / "replanning.png").exists()
    assert (tmp_path / "table.md").read_text().count("\n") == 9


def test_mazes_presets_span_what_the_paper_plans():
    for name, (_, steps, _) in mazes.STANDARD.items():
        config, paper = diffuser.PRESETS[name](), diffuser.PRESETS[f"{name}_paper"]()
        assert paper.model.horizon <= steps
        assert abs(config.model.horizon * config.model.stride - paper.model.horizon) == 0


@pytest.mark.slow
def test_with_and_without_jit_plans_and_paths_are_alike(planned):
    """The whole closed loop, jit against no jit, on a few steps of the world."""
    from diffrl.planning import policies
    from diffrl.recipes import planners, planning
    from diffrl.rl import controllers

    config = diffuser.PRESETS["umaze"]()
    config = config_lib.from_dict(config, config_lib.read(planned)["config"])
    task = tasks.open_task(config.task, planned)
    fitted = tasks.make_normalisers(config.task, task)
    model = planners.diffuser_model(config, fitted, (16, 6))
    source = tasks.make_source(task, fitted, config.model)
    session = planning.open_session(config, config_lib.Run(planned, "eval", "umaze"), source, fitted, model)
    params = jax.device_get(planning.restored(session).ema)

    def play(params, keys):
        controller = policies.controller(
            model.planner(params, fitted), policies.towards_waypoints(), 4, goal=tasks.goal_observation
        )
        return controllers.execute(task.world(False), controller, 6, lambda world, carry, action: (world.obs, carry.x))(
            keys
        )

    keys = jax.random.split(jax.random.key(0), 2)
    _, compiled = jax.jit(play)(params, keys)
    with jax.disable_jit():
        _, plain = play(params, keys)
    for a, b in zip(compiled, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_plans_of_no_checkpoint_are_one_line(planned, tmp_path, capsys):
    refused(diffuser, tmp_path, ["--mode=eval"], "no run", capsys)
    (tmp_path / "config.json").write_bytes((planned / "config.json").read_bytes())
    refused(diffuser, tmp_path, ["--mode=eval"], "no checkpoint yet", capsys)
