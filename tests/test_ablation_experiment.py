"""The ablation of the U-Net: equal compute, one change at a time, and results that are used only where they belong."""

import json
import shutil

import jax
import numpy as np
import pytest

from diffrl import config as config_lib
from diffrl.data.source import from_arrays
from diffrl.recipes import images
from experiments import unet_ablation

pytestmark = pytest.mark.usefixtures("one_device")
TINY = [
    "--config.base.unet.channels=8",
    "--config.base.unet.groups=4",
    "--config.base.unet.blocks=1",
    "--config.base.unet.attention=()",
    "--config.base.train.batch_size=16",
    "--config.base.optim.warmup_steps=1",
    "--config.base.optim.schedule=constant",
]


def ablate(workdir, *flags):
    argv = [f"--workdir={workdir}", *TINY, *flags]
    config_lib.run(unet_ablation.main, unet_ablation.PRESETS, argv=argv)
    return json.loads((workdir / "results.json").read_text())


@pytest.mark.long
def test_compute_is_equal_and_a_second_run_needs_nothing_but_the_results(tmp_path):
    flags = ["--config.base_steps=2", "--config.seeds=1", "--config.variants=('base','one level less')"]
    rows = ablate(tmp_path, *flags)
    compute = [row["steps"] * row["gflops_per_step"] for row in rows]
    assert compute[0] == pytest.approx(compute[1], rel=0.5)  # whole steps of two
    assert all(0 < row["loss"] < 10 for row in rows)
    shutil.rmtree(tmp_path / "runs")
    assert ablate(tmp_path, *flags) == rows
    assert (tmp_path / "ablation.png").exists()
    assert "one level less" in (tmp_path / "table.md").read_text()


@pytest.fixture
def trained(monkeypatch):
    """The runs (steps, seed) that were trained; their loss is steps + seed, and a step costs 1 FLOP."""
    done = []

    def work(job, held_out, run):
        steps, seed = job.config.train.steps, job.config.seed
        done.append((steps, seed))
        loss = {"run": job.name(), "variant": job.variant, "seed": seed, "loss": float(steps + seed), "steps": steps}
        return loss | {"parameters": job.parameters, "gflops_per_step": job.flops / 1e9}

    monkeypatch.setattr(unet_ablation, "price", lambda config, source: (1.0, 1))
    monkeypatch.setattr(unet_ablation, "work", work)
    return done


@pytest.mark.parametrize(
    ("flags", "runs", "shown"),
    [
        ([], [], "10.5000 ± 0.5000"),
        (["--config.seeds=1"], [], "10.0000 ± 0.0000"),
        (["--config.seeds=3"], [(10, 2)], "11.0000 ± 1.0000"),
        (["--config.base.train.log_every=7"], [], "10.5000 ± 0.5000"),
        (["--config.base_steps=20", "--accept_changes"], [(20, 0), (20, 1)], "20.5000 ± 0.5000"),
        (["--config.base.optim.learning_rate=1", "--accept_changes"], [(10, 0), (10, 1)], "10.5000 ± 0.5000"),
        (["--config.base.eval.split=train"], [(10, 0), (10, 1)], "10.5000 ± 0.5000"),
    ],
)
def test_results_are_used_where_they_belong_and_are_kept(tmp_path, trained, flags, runs, shown):
    base = ["--config.base_steps=10", "--config.variants=('base',)"]
    rows = ablate(tmp_path, *base)
    assert trained == [(10, 0), (10, 1)]
    trained.clear()
    assert ablate(tmp_path, *base, *flags)[: len(rows)] == rows
    assert trained == runs
    assert shown in (tmp_path / "table.md").read_text()


def attention(unet):
    """Where a network for 8x8 images attends."""
    source = from_arrays(np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2, int), num_classes=10)
    model = images.build(images.ImageConfig(unet=unet), source)
    return sorted(name for name in jax.eval_shape(model.init, jax.random.key(0)) if "attention" in name)


def test_a_level_less_still_attends_on_its_last():
    base = unet_ablation.digits().base.unet
    assert attention(base) == ["down_1_attention_0", "mid_attention", "up_1_attention_0", "up_1_attention_1"]
    moved = ["down_0_attention_0", "mid_attention", "up_0_attention_0", "up_0_attention_1"]
    assert attention(unet_ablation.variants(base, 8)["one level less"]) == moved
    wide = unet_ablation.cifar10().base.unet
    assert unet_ablation.variants(wide, 32)["one level less"].attention == wide.attention  # its last did not attend


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--config.variants=('bsae',)", "no variant 'bsae': choose from 'base', 'no attention'"),
        ("--config.seeds=0", "--config.seeds=0: expected at least 1"),
        ("--config.base.optim.warmup_steps=11", "optim.warmup_steps=11: choose a value between 0 and the 10 steps"),
        ("--config.base.eval.split=dev", "no split 'dev'"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(tmp_path, trained, capsys, flag, says):
    with pytest.raises(SystemExit):
        ablate(tmp_path / "run", "--config.base_steps=10", flag)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert says in line
    assert trained == []


def test_without_a_count_there_is_no_equal_compute(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    with pytest.raises(SystemExit):
        ablate(tmp_path / "run")
    assert "error: XLA counts no FLOPs on cpu" in capsys.readouterr().err.splitlines()[-1]
