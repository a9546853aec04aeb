"""The command line of experiments: what it reads and saves, and the one line that answers each mistake."""

import dataclasses
import errno
import functools
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import pytest

from diffrl import config as config_lib
from diffrl.errors import UserError


@dataclasses.dataclass
class Optim:
    learning_rate: float = config_lib.leaf(1e-3, help="peak learning rate")
    betas: tuple[float, float] = config_lib.leaf((0.9, 0.999), at_least=0, below=1)


@dataclasses.dataclass
class Config:
    steps: int = config_lib.leaf(100, help="training steps", free=True, at_least=1)
    mults: tuple[int, ...] = config_lib.leaf((1, 2), at_least=1)
    names: tuple[str, ...] = ("fid",)
    folder: str | None = None
    limit: int | None = config_lib.leaf(3, above=0, at_most=9)
    crop: tuple[int, int] | None = None
    flip: bool = True
    note: str = ""
    optim: Optim = dataclasses.field(default_factory=Optim)


def wide() -> Config:
    """Twice the channels."""
    return Config(mults=(2, 4))


def noted(note: str) -> Config:
    """Has a note."""
    return Config(note=note)


PRESETS = {"base": Config, "wide": wide, "so": functools.partial(noted, "so")}
MODES = ("train", "sample")


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)


def parse(*argv):
    return config_lib.parse(argv, PRESETS, MODES, "test_config")


def launch(*argv, main=None, setup=None):
    """Run an experiment as `run` does and return what its `main` was given."""
    given = []

    def record(config, run):
        given.append((config, run))

    config_lib.run(main or record, PRESETS, MODES, setup=setup, argv=argv)
    return given[0] if given else None


@pytest.mark.parametrize(
    ("argv", "leaf", "value"),
    [
        (["--config.steps=7"], "steps", 7),
        (["--config.steps", "7"], "steps", 7),
        (["--config.steps=7", "--config.steps=8"], "steps", 8),
        (["--config.mults=(1,2,4)"], "mults", (1, 2, 4)),
        (["--config.mults=1,2,4"], "mults", (1, 2, 4)),
        (["--config.mults=8"], "mults", (8,)),
        (["--config.names=('a','b')"], "names", ("a", "b")),
        (["--config.crop=(3,4)"], "crop", (3, 4)),
        (["--config.folder=a=b"], "folder", "a=b"),
        (["--config.folder=x", "--config.folder=None"], "folder", None),
        (["--config.limit=none"], "limit", None),
        (["--config.limit=none", "--config.limit=5"], "limit", 5),
        (["--config.flip=false"], "flip", False),
        (["--noconfig.flip"], "flip", False),
        (["--noconfig.flip", "--config.flip"], "flip", True),
        (["--config.note="], "note", ""),
        (["--config.note", "two words"], "note", "two words"),
        (["--config.optim.learning_rate=3e-4"], "optim.learning_rate", 3e-4),
        (["--config.optim.learning_rate=1"], "optim.learning_rate", 1.0),
        (["--config.optim.betas=(0.5,0.9)"], "optim.betas", (0.5, 0.9)),
        (["--config.steps=7", "--preset=wide"], "mults", (2, 4)),
    ],
)
def test_a_flag_sets_its_leaf_and_no_other(argv, leaf, value):
    config, run, changes = parse(*argv)
    after = {name: found.value for name, found in config_lib.leaves(config).items()}
    before = {name: found.value for name, found in config_lib.leaves(PRESETS[run.preset]()).items()}
    assert after[leaf] == value
    assert type(after[leaf]) is type(value)
    others = after.keys() - {leaf, "steps"}
    assert {name: after[name] for name in others} == {name: before[name] for name in others}
    assert not changes
    assert not run.resumed


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--config.optim.learning_rat=1"], "did you mean --config.optim.learning_rate?"),
        (["--config.learning_rate=1"], "did you mean --config.optim.learning_rate?"),
        (["--config.optin.betas=1"], "did you mean --config.optim.betas?"),
        (["-config.steps=1"], "did you mean --config.steps?"),
        (["--step=3"], "did you mean --config.steps?"),
        (["--work_dir=x"], "did you mean --workdir?"),
        (["steps=3"], "not a flag: steps; did you mean --config.steps?"),
        (["--config.steps=3", "extra"], "not a flag: extra"),
        (["--preset=wied"], "--preset=wied: expected one of base, wide, so; did you mean wide?"),
        (["--mode=sampel"], "did you mean sample?"),
        (["--config.steps=many"], "--config.steps=many: expected int, as in --config.steps=100"),
        (["--config.steps=1.5"], "expected int"),
        (["--config.steps=none"], "expected int"),
        (["--config.flip=perhaps"], "expected bool"),
        (["--config.limit=x"], "expected int | None"),
        (["--config.optim.betas=(0.9,0.99,0.999)"], "expected tuple[float, float]"),
        (["--config.optim.betas=0.9"], "as in --config.optim.betas=(0.9,0.999)"),
        (["--config.mults=(1,2.5)"], "expected tuple[int, ...]"),
        (["--config.mults=(1,"], "expected tuple[int, ...]"),
        (["--config.steps=0"], "--config.steps=0: expected at least 1"),
        (["--config.mults=(2,0)"], "--config.mults=(2,0): expected at least 1"),
        (["--config.limit=10"], "--config.limit=10: expected above 0 and at most 9"),
        (["--config.optim.betas=(0.9,1)"], "expected at least 0 and below 1"),
        (["--config.names=a,b"], "as in --config.names=('fid',)"),
        (["--config.crop=(1,2,3)"], "expected tuple[int, int] | None"),
        (["--config.optim=3"], "--config.optim is a section"),
        (["--config=3"], "--config is a section"),
        (["--config.optim.learning_rate=nan"], "--config.optim.learning_rate=nan: expected a finite number"),
        (["--config.optim.learning_rate=inf"], "expected a finite number"),
        (["--config.steps"], "a value is missing, as in --config.steps=100"),
        (["--preset"], "--preset"),
        (["--workdir="], "--workdir is empty"),
        (["--workdir=gs://bucket/run"], "--workdir=gs://bucket/run: not a folder"),
        (["--mode=sample"], "runs/test_config/base: no run here"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_the_remedy(argv, says):
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_round_trip():
    config = Config(mults=(4, 5, 6), limit=None, crop=(1, 2), optim=Optim(betas=(0.1, 0.2)))
    assert config_lib.from_dict(Config(), json.loads(json.dumps(config_lib.to_dict(config)))) == config


def test_differences_name_exactly_the_leaves_that_differ():
    saved = config_lib.to_dict(Config())
    now = config_lib.to_dict(Config(mults=(1, 2, 4), optim=Optim(learning_rate=3e-4)))
    assert config_lib.differences(saved, saved) == {}
    assert config_lib.differences(saved, now) == {
        "mults": "[1, 2] saved, [1, 2, 4] now",
        "optim.learning_rate": "0.001 saved, 0.0003 now",
    }


def test_an_old_file_with_other_leaves_is_a_difference_not_a_crash():
    saved = config_lib.to_dict(Config(steps=7))
    saved["gone"] = {"deep": 1}
    saved["flip"] = "yes"
    del saved["optim"]["betas"]
    config = config_lib.from_dict(Config(), saved)
    assert config == Config(steps=7)
    assert config_lib.differences(saved, config_lib.to_dict(config)) == {
        "flip": "'yes' saved, True now",
        "optim.betas": "not saved, [0.9, 0.999] now",
        "gone.deep": "1 saved, no longer a leaf",
    }


def test_a_run_saves_its_config_and_a_bare_resume_takes_it():
    first, run = launch("--config.optim.learning_rate=0.5")
    assert (run.workdir, run.mode, run.resumed) == (pathlib.Path("runs/test_config/base"), "train", False)
    saved = json.loads((run.workdir / "config.json").read_text())
    assert saved["preset"] == "base"
    assert saved["versions"]["jax"] == jax.__version__
    assert list(saved["config"]) == [field.name for field in dataclasses.fields(Config)]
    assert saved["config"]["optim"]["learning_rate"] == 0.5

    again, run = launch()
    assert again == first
    assert run.resumed
    sampled, run = launch("--mode=sample", "--preset=base")
    assert (sampled, run.mode) == (first, "sample")


def test_a_resume_with_another_config_stops_until_it_is_accepted(tmp_path, capsys):
    launch("--workdir=w", "--preset=wide")
    before = (tmp_path / "w/config.json").read_text()
    with pytest.raises(SystemExit) as caught:
        launch("--workdir=w", "--config.optim.learning_rate=0.5", "--config.steps=7")
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: w was made with another config (optim.learning_rate: 0.001 saved, 0.5 now):")
    assert line.count("\n") == 1
    assert (tmp_path / "w/config.json").read_text() == before

    config, run = launch("--workdir=w", "--config.optim.learning_rate=0.5", "--accept_changes")
    assert (config.optim.learning_rate, config.mults, run.preset) == (0.5, (2, 4), "wide")
    assert "config.optim.learning_rate: 0.001 saved, 0.5 now" in capsys.readouterr().err
    assert (tmp_path / "w/config.1.json").read_text() == before
    assert json.loads((tmp_path / "w/config.json").read_text())["config"]["optim"]["learning_rate"] == 0.5


def test_what_is_refused_leaves_no_trace(tmp_path):
    """Neither in a workdir that is new nor in one that holds a run; what has done something stays."""

    def refuse(config, run):
        (run.workdir / "checkpoints").mkdir(exist_ok=True)
        (run.workdir / "metrics.jsonl").touch()
        if config.note == "late":
            (run.workdir / "metrics.jsonl").write_text("{}")
        raise UserError(f"no data set {config.note}")

    for _ in range(2):
        with pytest.raises(SystemExit):
            launch("--workdir=w", "--config.note=typo", main=refuse)
        assert config_lib.read(tmp_path / "w") is None
    launch("--workdir=w")
    before = (tmp_path / "w/config.json").read_text()
    with pytest.raises(SystemExit):
        launch("--workdir=w", "--config.steps=7", "--config.note=typo", "--accept_changes", main=refuse)
    assert (tmp_path / "w/config.json").read_text() == before
    assert [path.name for path in (tmp_path / "w").glob("config*")] == ["config.json"]
    with pytest.raises(SystemExit):
        launch("--workdir=w", "--config.note=late", "--accept_changes", main=refuse)
    assert json.loads((tmp_path / "w/config.json").read_text())["config"]["note"] == "late"


@pytest.mark.parametrize("more", [[], ["--accept_changes"], ["--mode=sample"]])
def test_the_workdir_of_another_experiment_is_refused(tmp_path, more):
    config_lib.save(tmp_path / "w", "digits", Config(), "ddpm")
    with pytest.raises(UserError, match=r"^w holds a run of ddpm, this is test_config: choose another"):
        parse("--workdir=w", *more)


def test_many_differences_are_cut_short():
    launch("--workdir=w")
    flags = ["note=x", "flip=False", "folder=y", "limit=1", "names=('z',)", "mults=(3,)", "crop=(1,1)"]
    with pytest.raises(UserError, match="; and 2 more\\)"):
        parse("--workdir=w", *(f"--config.{flag}" for flag in flags))


def test_another_preset_in_the_same_workdir_is_a_difference():
    launch("--workdir=w")
    with pytest.raises(UserError, match=r"\(mults: \[1, 2\] saved, \[2, 4\] now\)"):
        parse("--workdir=w", "--preset=wide")
    with pytest.raises(UserError, match="holds a run of base; leave --preset out"):
        parse("--workdir=w", "--preset=wide", "--mode=sample")


def test_free_leaves_may_change_and_other_modes_save_nothing(tmp_path, capsys):
    launch("--workdir=w")
    config, _ = launch("--workdir=w", "--config.steps=7")
    assert config.steps == 7
    assert "config.steps: 100 saved, 7 now" in capsys.readouterr().err
    files = {path.name: path.read_text() for path in (tmp_path / "w").iterdir()}
    assert files.keys() == {"config.json", "config.1.json"}
    config, _ = launch("--workdir=w", "--mode=sample", "--noconfig.flip")
    assert (config.flip, config.steps) == (False, 7)
    assert "config.flip: True saved, False now" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in (tmp_path / "w").iterdir()} == files


def test_limits_hold_in_presets_and_saved_files(tmp_path):
    with pytest.raises(UserError, match=r"--config\.steps=0: expected at least 1"):
        config_lib.parse([], {"broken": lambda: Config(steps=0)})
    with pytest.raises(UserError, match=r"betas=.*nan.*: expected at least 0 and below 1"):
        config_lib.parse([], {"broken": lambda: Config(optim=Optim(betas=(float("nan"), 0.9)))})
    launch("--workdir=w")
    saved = (tmp_path / "w/config.json").read_text()
    (tmp_path / "w/config.json").write_text(saved.replace('"steps": 100', '"steps": -1'))
    with pytest.raises(UserError, match=r"--config\.steps=-1: expected at least 1"):
        parse("--workdir=w")
    config, *_ = parse("--workdir=w", "--config.steps=5")
    assert config.steps == 5


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert parse("--workdir=~/w")[1].workdir == tmp_path / "home" / "w"


def test_presets_are_not_changed_by_overrides():
    shared = Config()
    config, *_ = config_lib.parse(["--config.limit=none", "--config.steps=7"], {"shared": lambda: shared})
    assert (config.limit, config.steps) == (None, 7)
    assert shared == Config()


def test_help_lists_presets_modes_and_every_leaf(capsys):
    launch("--preset=wide", "--config.typo=1", "--help")
    text = capsys.readouterr().out
    assert text.startswith("The command line of experiments")
    for part in (
        "--preset=wide  Twice the channels.",
        "--preset=so    Has a note.",
        "train | sample",
        "--accept_changes",
        "--config.mults=(2,4)",
    ):
        assert part in text
    assert "Config(" not in text
    lines = {line.split("=")[0].strip(): line for line in text.splitlines()}
    for name, leaf in config_lib.leaves(Config()).items():
        assert leaf.help in lines[f"--config.{name}"]
    assert lines["--config.optim.betas"].endswith("at least 0 and below 1")
    assert lines["--config.steps"].endswith("training steps; at least 1")
    line = " ".join(lines["--config.optim.learning_rate"].split())
    assert line == "--config.optim.learning_rate=0.001 float peak learning rate"
    assert " * " in lines["--config.steps"]


def _fails(error):
    def main(config, run):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("batch 3: 2 devices; choose 4"), 2, "error: batch 3: 2 devices; choose 4\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: w: No space left on device; make room"),
        (
            OSError(errno.EACCES, "Permission denied", "data/x.npz"),
            2,
            "error: data/x.npz: Permission denied; mend",
        ),
    ],
)
def test_what_the_user_can_mend_ends_in_one_line(error, status, line, capsys):
    with pytest.raises(SystemExit) as caught:
        launch("--workdir=w", main=_fails(error))
    assert caught.value.code == status
    written = capsys.readouterr().err
    assert written.startswith(line)
    assert written.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), OSError(errno.ENOENT, "No such file", "x")])
def test_everything_else_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        launch("--workdir=w", main=_fails(error))


def test_setup_comes_before_main_and_before_anything_is_written(tmp_path):
    seen = []
    launch(
        "--workdir=w",
        main=lambda config, run: seen.append("main"),
        setup=lambda: seen.append((tmp_path / "w").exists()),
    )
    assert seen == [False, "main"]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    config, _ = launch("--workdir=w")
    assert config == Config()
    assert not (tmp_path / "w").exists()


def test_a_workdir_that_cannot_be_made_or_read_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "w").mkdir()
    (tmp_path / "w/config.json").write_text('{"config": {"ste')
    for workdir, says in [
        ("file/run", "file/run: "),
        ("file", "file: "),
        ("w", "w/config.json: cannot be read"),
    ]:
        with pytest.raises(SystemExit) as caught:
            launch(f"--workdir={workdir}")
        assert caught.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: {says}")
        assert line.count("\n") == 1
    assert (tmp_path / "w/config.json").read_text() == '{"config": {"ste'


def test_as_a_program(tmp_path):
    """The whole way once, as a person goes it: the exit status, and where the compilation cache lands."""
    script = tmp_path / "toy.py"
    script.write_text(
        textwrap.dedent(
            '''
            """A toy."""
            import dataclasses
            import jax
            from absl import flags
            from diffrl import config as config_lib

            @dataclasses.dataclass
            class Config:
                steps: int = 3

            def main(config, run):
                print(config.steps, run.workdir, flags.FLAGS.is_parsed(), jax.config.jax_compilation_cache_dir)

            if __name__ == "__main__":
                config_lib.run(main, {"only": Config})
            '''
        )
    )
    root = pathlib.Path(config_lib.__file__).parents[1]
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(root)}
    env.pop("JAX_COMPILATION_CACHE_DIR")

    def toy(*argv):
        command = [sys.executable, str(script), *argv]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)

    good = toy("--config.steps=5")
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.split() == ["5", "runs/toy/only", "True", str(tmp_path / ".cache/diffrl/jax")]
    bad = toy("--config.step=5")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: unknown flag --config.step; did you mean --config.steps?\n"
