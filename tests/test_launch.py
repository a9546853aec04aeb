"""The launch scripts, with programs that only record in the place of python and gcloud."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = ("local.sh", "tpu_pod.sh")
# What a shell would split, expand or execute.
NASTY = ["--config.net.mults=(1,2,4)", '--config.note=it\'s $HOME; `id` "x" & *', "--config.name="]

RECORD = """#!{python}
import json, os, sys
keys = ("JAX_PLATFORMS", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION", "DIFFRL_DISTRIBUTED")
record = {{"argv": sys.argv[1:], **{{key: os.environ[key] for key in keys if key in os.environ}}}}
with open({log!r}, "a") as file:
    print(json.dumps(record), file=file)
"""


@pytest.fixture
def house(tmp_path):
    """A tree with the scripts and one experiment, and python and gcloud that record their arguments."""
    shutil.copytree(LAUNCH, tmp_path / "house" / "launch")
    (tmp_path / "house" / "experiments").mkdir()
    (tmp_path / "house" / "experiments" / "toy.py").write_text("")
    (tmp_path / "bin").mkdir()
    for name in ("python", "gcloud"):
        program = tmp_path / "bin" / name
        program.write_text(RECORD.format(python=shutil.which("python3"), log=str(tmp_path / f"{name}.log")))
        program.chmod(0o755)
    return tmp_path


def launch(house, script, *argv, **env):
    path = f"{house / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(house / "house" / "launch" / script), *argv],
        env={"PATH": path, "HOME": str(house), **env},
        cwd=house,
        capture_output=True,
        text=True,
        check=False,
    )


def recorded(house, program):
    log = house / f"{program}.log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_is_sound_and_explains_itself(house, script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
    assert os.access(LAUNCH / script, os.X_OK)
    told = launch(house, script, "--help")
    assert told.returncode == 0
    assert told.stdout.startswith(f"usage: launch/{script}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_is_content(script):
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", str(LAUNCH / script)], capture_output=True, text=True, check=False)
    assert checked.stdout == ""


@pytest.mark.parametrize(
    ("devices", "settings"),
    [
        ([], {}),
        (["--devices=cpu"], {"JAX_PLATFORMS": "cpu"}),
        (
            ["--devices=cpu:8"],
            {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        ),
        (["--devices=gpu"], {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}),
        (
            ["--devices=gpu:0,2"],
            {
                "JAX_PLATFORMS": "cuda,cpu",
                "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
                "CUDA_VISIBLE_DEVICES": "0,2",
            },
        ),
    ],
)
def test_local_runs_the_experiment_on_the_devices(house, devices, settings):
    done = launch(house, "local.sh", *devices, "toy", *NASTY)
    assert (done.returncode, done.stderr) == (0, "")
    assert recorded(house, "python") == [{"argv": ["-m", "experiments.toy", *NASTY], **settings}]


def test_local_keeps_what_the_environment_says(house):
    launch(house, "local.sh", "--devices=gpu", "toy", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")
    launch(house, "local.sh", "--devices=cpu:2", "toy", XLA_FLAGS="--xla_dump_to=d")
    gpu, cpu = recorded(house, "python")
    assert gpu["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert cpu["XLA_FLAGS"] == "--xla_dump_to=d --xla_force_host_platform_device_count=2"


def test_local_finds_the_interpreter(house):
    """The one in .venv, as README makes it, unless the environment names another; none at all is one line."""
    own = house / "house" / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    shutil.copy(house / "bin" / "python", own)
    shown = launch(house, "local.sh", "--dry-run", "toy")
    assert shlex.split(shown.stdout)[-3:] == [str(own), "-m", "experiments.toy"]
    shown = launch(house, "local.sh", "--dry-run", "toy", PYTHON="python3")
    assert shlex.split(shown.stdout)[-3:] == ["python3", "-m", "experiments.toy"]
    missing = launch(house, "local.sh", "toy", PYTHON="python7")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "no python7 here: set PYTHON" in missing.stderr


def test_local_dry_run_prints_the_command_and_runs_nothing(house):
    shown = launch(house, "local.sh", "--dry-run", "--devices=gpu:1", "toy", *NASTY)
    assert shlex.split(shown.stdout)[-3 - len(NASTY) :] == ["python", "-m", "experiments.toy", *NASTY]
    assert "CUDA_VISIBLE_DEVICES=1" in shlex.split(shown.stdout)
    assert recorded(house, "python") == []


@pytest.mark.parametrize(
    ("script", "argv", "env", "says"),
    [
        ("local.sh", [], {}, "which experiment?"),
        ("local.sh", ["tyo"], {}, "no experiment tyo; there are: toy"),
        ("local.sh", ["--devices=tpu", "toy"], {}, "--devices=tpu: expected auto, cpu"),
        ("local.sh", ["--devices=gpu:a", "toy"], {}, "--devices=gpu:a: expected numbers"),
        ("local.sh", ["--devices=cpu:0", "toy"], {}, "--devices=cpu:0: expected a number"),
        ("local.sh", ["--preset=x", "toy"], {}, "unknown flag --preset=x before"),
        ("tpu_pod.sh", [], {}, "expected create, install"),
        ("tpu_pod.sh", ["start"], {"TPU_NAME": "big", "ZONE": "z"}, "command 'start'"),
        ("tpu_pod.sh", ["tail"], {"ZONE": "z"}, "TPU_NAME is not set"),
        ("tpu_pod.sh", ["tail"], {"TPU_NAME": "big"}, "ZONE is not set"),
        ("tpu_pod.sh", ["create"], {"TPU_NAME": "big", "ZONE": "z"}, "TPU_TYPE is not set"),
        ("tpu_pod.sh", ["run"], {"TPU_NAME": "big", "ZONE": "z"}, "which experiment?"),
        ("tpu_pod.sh", ["run", "tyo"], {"TPU_NAME": "big", "ZONE": "z"}, "no experiment tyo"),
    ],
)
def test_a_mistake_is_one_line_and_runs_nothing(house, script, argv, env, says):
    done = launch(house, script, *argv, **env)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert recorded(house, "python") + recorded(house, "gcloud") == []


@pytest.mark.parametrize(
    ("devices", "env", "says"),
    [
        ("gpu", {}, 'no cuda device for JAX_PLATFORMS=cuda,cpu: pip install -e ".[cuda]" on a host that has one'),
        ("cpu", {"JAX_COORDINATOR_ADDRESS": "host:1"}, "cannot join the other processes (Number of processes must"),
    ],
)
def test_devices_that_are_not_there_are_one_line(tmp_path, devices, env, says):
    """The real script, experiment and jax; no GPU is visible to them."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_", "DIFFRL_"))}
    done = subprocess.run(
        ["bash", str(LAUNCH / "local.sh"), f"--devices={devices}", "ddpm", f"--workdir={tmp_path / 'run'}"],
        env={**inherited, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    *_, line = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith("error: ")
    assert says in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


TPU = ["compute", "tpus", "tpu-vm"]
POD = {"TPU_NAME": "big", "ZONE": "z"}


@pytest.mark.parametrize(
    ("command", "env", "argv"),
    [
        (
            "create",
            {"TPU_TYPE": "v4-32"},
            ["create", "big", "--accelerator-type=v4-32", "--version=tpu-ubuntu2204-base", "--zone=z"],
        ),
        (
            "create",
            {"TPU_TYPE": "v6e-8", "TPU_VERSION": "v2-alpha-tpuv6e", "SPOT": "1", "PROJECT": "p"},
            [
                *("create", "big", "--accelerator-type=v6e-8", "--version=v2-alpha-tpuv6e"),
                *("--spot", "--zone=z", "--project=p"),
            ],
        ),
        ("tail", {}, ["ssh", "big", "--worker=0", "--command=tail -n 50 -F diffrl/run.log", "--zone=z"]),
        (
            "stop",
            {},
            ["ssh", "big", "--worker=all", "--command=xargs kill -TERM < diffrl/run.pid", "--zone=z"],
        ),
        ("delete", {}, ["delete", "big", "--zone=z"]),
    ],
)
def test_tpu_pod_asks_gcloud(house, command, env, argv):
    done = launch(house, "tpu_pod.sh", command, **POD, **env)
    assert (done.returncode, done.stderr) == (0, "")
    assert [record["argv"] for record in recorded(house, "gcloud")] == [[*TPU, *argv]]


def test_tpu_pod_run_reaches_the_remote_python_unharmed(house):
    """The command that gcloud was given is executed by a shell, as the worker's would."""
    assert launch(house, "tpu_pod.sh", "run", "toy", *NASTY, **POD).returncode == 0
    [record] = recorded(house, "gcloud")
    assert record["argv"][:5] == [*TPU, "ssh", "big"]
    assert "--worker=all" in record["argv"]
    [remote] = [arg.removeprefix("--command=") for arg in record["argv"] if arg.startswith("--command=")]

    worker = house / "diffrl" / ".venv" / "bin"
    worker.mkdir(parents=True)
    shutil.copy(house / "bin" / "python", worker / "python")
    subprocess.run(["bash", "-c", f"{remote}; wait"], cwd=house, check=True)
    expected = {"argv": ["-m", "experiments.toy", *NASTY], "DIFFRL_DISTRIBUTED": "1"}
    [started] = recorded(house, "python")
    assert {key: started[key] for key in expected} == expected
    assert (house / "diffrl" / "run.pid").read_text().strip().isdigit()


def test_tpu_pod_installs_the_committed_tree_on_every_worker(house):
    shown = launch(house, "tpu_pod.sh", "--dry-run", "install", **POD)
    archive, copy, install = map(shlex.split, shown.stdout.splitlines())
    assert archive[-1] == "HEAD"
    file = archive[-2].removeprefix("--output=")
    assert copy == ["gcloud", *TPU, "scp", file, "big:diffrl.tar.gz", "--worker=all", "--zone=z"]
    assert "--worker=all" in install
    assert any('pip install --quiet --python .venv/bin/python -e ".[tpu]"' in part for part in install)
    assert recorded(house, "gcloud") == []
