"""The experiment on stochastic processes as a user runs it, with few particles; and its mistakes."""

import json

import pytest

from diffrl import config as config_lib
from experiments import stochastic_processes

FEW = ("--config.particles=400", "--config.shown=2", "--config.steps=40", "--config.cells=24")


def run(workdir, *flags):
    config_lib.run(stochastic_processes.main, stochastic_processes.PRESETS, argv=[f"--workdir={workdir}", *flags])
    return {row["quantity"]: row for row in json.loads((workdir / "results.json").read_text())}


def test_fokker_planck_keeps_mass_and_ends_at_boltzmann(tmp_path, capsys):
    rows = run(tmp_path, *FEW, "--config.only=('double_well','marginals')")
    for name in ("double well", "mixture under VP"):
        assert rows[f"{name}: change of mass"]["measured"] < 1e-6
        assert rows[f"{name}: least density"]["measured"] >= 0
    assert rows["double well, t = 20: L1 to Boltzmann"]["measured"] < 0.05
    assert rows["mixture under VP, t = 1: L1 of the equation to its exact solution"]["measured"] < 1e-3
    assert {path.name for path in tmp_path.glob("*.png")} == {"double_well.png", "marginals.png"}
    assert f"everything lies in {tmp_path}" in capsys.readouterr().out


@pytest.mark.slow
def test_everything_is_near_theory(tmp_path):
    rows = run(tmp_path, *FEW)
    moments = [row for name, row in rows.items() if "Cov" in name or name.startswith("variance")]
    assert len(moments) == 8 + 2
    assert all(abs(row["measured"] - row["expected"]) < 5 * row["error"] for row in moments)
    share = "share of the left mode, "
    wrong, right = (abs(rows[share + name]["measured"] - 0.25) for name in ("Langevin", "annealed Langevin"))
    assert right < wrong
    assert len(list(tmp_path.glob("*.png"))) == 5


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.cells=8", "--config.cells=8: expected at least 16"),
        ("--config.only=('bridge',)", "'bridge' is no picture: choose from paths, langevin"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flag, words):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, flag)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
