"""experiments.autoencoder, ldm and dit as a user runs them, tiny: what they leave behind, resume, and refuse."""

import contextlib
import json
import types

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl import config as config_lib
from diffrl.compression import normaliser
from diffrl.data.digits import digits
from diffrl.data.pipeline import to_unit
from diffrl.errors import UserError
from diffrl.recipes import autoencoding, images, latents, reconstruction
from experiments import autoencoder, dit, ldm

AUTOENCODER = [
    "--config.autoencoder.channels=8",
    "--config.autoencoder.groups=4",
    "--noconfig.autoencoder.middle_attention",
    "--config.train.batch_size=16",
    "--config.train.sample_every=0",
    "--config.train.ema_decay=0.9",
    "--config.loss.critic_channels=8",
    "--config.loss.adversarial_start=3",
    "--config.optim.warmup_steps=0",
    "--config.optim.schedule=constant",
    "--config.eval.samples=16",
]
DIFFUSION = [
    "--config.unet.channels=8",
    "--config.unet.blocks=1",
    "--config.unet.multipliers=(1,)",
    "--config.unet.attention=()",
    "--config.unet.groups=4",
    "--config.dit.width=16",
    "--config.dit.depth=2",
    "--config.dit.heads=2",
    "--config.train.batch_size=16",
    "--config.train.sample_every=0",
    "--config.optim.warmup_steps=0",
    "--config.sample.steps=2",
    "--config.sample.batch=16",
    "--config.eval.samples=16",
]


def run(experiment, workdir, *flags, modes=("train", "sample", "eval"), makers=()):
    arguments = [f"--workdir={workdir}", *flags]
    config_lib.run(experiment.main, experiment.PRESETS, modes=(*modes, *makers), argv=arguments, makers=makers)


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """Workdirs of a KL and a VQ autoencoder after six steps."""
    found = {}
    for kind, preset in (("kl", "digits"), ("vq", "digits_vq")):
        found[kind] = tmp_path_factory.mktemp(kind)
        with devices.one_device() if kind == "vq" else contextlib.nullcontext():
            run(autoencoder, found[kind], f"--preset={preset}", *AUTOENCODER, "--config.train.steps=6")
    return found


def session(workdir):
    return autoencoding.open_trained(workdir)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_an_autoencoder_leaves_what_a_user_looks_for(coded, kind):
    names = {path.name for path in coded[kind].iterdir()}
    assert {"config.json", "metrics.jsonl", "reconstructions.png", "loss.png", "eval.json", "checkpoints"} <= names
    scores = json.loads((coded[kind] / "eval.json").read_text())
    assert scores["step"] == 6
    assert 0 < scores["psnr"] < 40
    assert scores["frechet"] > scores["frechet_real"] > 0
    assert ("kl" in scores) == (kind == "kl")
    assert ("perplexity" in scores) == (kind == "vq")


@pytest.mark.long
@pytest.mark.usefixtures("one_device")
def test_the_critic_has_no_say_before_its_start(coded):
    lines = [json.loads(line) for line in (coded["kl"] / "metrics.jsonl").read_text().splitlines()]
    assert lines, "metrics are written at the end of a run"
    # It starts at 3 and learns one update longer: before that its parameters do not move, those of the autoencoder do.
    opened = session(coded["kl"])
    opened.config.loss.critic_lead = 1
    fresh = autoencoding.initial_state(opened)
    loss = autoencoding.make_loss(opened.config, opened.model)
    batch = {"x": jnp.asarray(to_unit(opened.source.fetch(np.arange(8))["x"]))}
    keys = jax.random.split(jax.random.key(0), 8)
    for step, learns, says in ((1, False, False), (2, True, False), (3, True, True)):
        at = fresh._replace(step=jnp.asarray(step))
        value = jax.grad(
            lambda params, at=at: (lambda out: (out[0], out[1].metrics))(loss(params, at, batch, keys)), has_aux=True
        )
        grads, told = jax.jit(value)(fresh.params)
        assert any(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads["critic"])) == learns
        assert (told["adversarial_weight"] > 0) == says
        assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(grads["autoencoder"])) > 0


@pytest.mark.long
@pytest.mark.usefixtures("one_device")
def test_an_interrupted_autoencoder_ends_as_an_uninterrupted_one(coded, tmp_path):
    """The codebook in `extra` comes back, too."""
    flags = ["--preset=digits_vq", *AUTOENCODER]
    run(autoencoder, tmp_path, *flags, "--config.train.steps=3")
    run(autoencoder, tmp_path, *flags, "--config.train.steps=6")
    states = [autoencoding.restored_state(session(path)) for path in (tmp_path, coded["vq"])]
    trees = [jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key))) for state in states]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    assert np.abs(trees[0].extra.codes).max() > 0


def codec(workdir, tmp_path, flip=False, cache=""):
    data = types.SimpleNamespace(name="digits", split="train", image_size=0, channels=0, flip=flip)
    return latents.open_codec(
        latents.LatentsConfig(model=str(workdir), cache=str(cache)), data, digits("train"), tmp_path
    )


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_encode_cache_decode(coded, tmp_path, kind):
    """Through the files and the scale and back is as good as through the network alone: each is undone once."""
    opened = session(coded[kind])
    made = codec(coded[kind], tmp_path)
    rows = np.arange(40)
    x = to_unit(opened.source.fetch(rows)["x"])
    direct = reconstruction.reconstruct(opened, autoencoding.restored_state(opened), x)
    stored = jnp.asarray(made.source().fetch(rows)["x"])
    mean = stored[..., : made.shape[-1]]
    z = normaliser.normalise(made.normaliser, mean)
    np.testing.assert_allclose(np.asarray(z).reshape(-1, made.shape[-1]).mean(0), 0, atol=0.5)
    decoded = jnp.clip(latents.decode(made, made.arrays, z), -1, 1)
    error = np.abs(direct - x).mean()
    assert np.abs(decoded - direct).mean() < 0.05 * error
    # Normalised once: were it twice, or not at all, the images would differ by more than the autoencoder errs.
    wrong = jnp.clip(latents.decode(made, made.arrays, normaliser.normalise(made.normaliser, z)), -1, 1)
    assert np.abs(wrong - direct).mean() > 0.1 * error


def test_latents_are_drawn_afresh(coded, tmp_path):
    made = codec(coded["kl"], tmp_path)
    x = jnp.asarray(made.source().fetch(np.arange(500))["x"])
    frozen = {"normaliser": made.normaliser}
    draws = [made.draw(x, jax.random.split(jax.random.key(i), 500), frozen) for i in range(2)]
    assert jnp.abs(draws[0] - draws[1]).max() > 0
    np.testing.assert_allclose(np.asarray(draws[0]).reshape(-1, 2).std(0), 1, atol=0.1)


def test_mirrored_images_are_encoded_too(coded, tmp_path):
    assert codec(coded["kl"], tmp_path, flip=True).source().length == 2 * digits("train").length


@pytest.mark.usefixtures("one_device")
def test_latent_diffusion(coded, tmp_path, capsys):
    run(ldm, tmp_path, f"--config.latents.model={coded['kl']}", *DIFFUSION, "--config.train.steps=3")
    scores = json.loads((tmp_path / "eval.json").read_text())
    assert scores["frechet"] > scores["frechet_real"]
    assert "as latents of 4x4x2" in capsys.readouterr().err
    run(ldm, tmp_path, "--mode=sample", "--config.sample.count=12")
    made = np.load(tmp_path / "samples.npz")["x"]
    assert made.shape == (12, 8, 8, 1)  # images, not latents
    run(ldm, tmp_path, "--mode=eval")
    assert "bits" not in (tmp_path / "eval.json").read_text()
    restored = images.restored_state(_open(ldm, tmp_path))
    assert set(restored.frozen) == {"normaliser"}


def _open(experiment, workdir):
    config, started, _ = config_lib.parse(
        [f"--workdir={workdir}", "--mode=sample"],
        experiment.PRESETS,
        ("train", "sample"),
        experiment.__name__.rpartition(".")[2],
    )
    return images.open_session(config, started)


def test_another_autoencoder_is_not_mixed_up(coded, tmp_path):
    """A run is tied to its autoencoder's weights; a folder of latents that runs share is made anew for others."""
    first = codec(coded["kl"], tmp_path / "a", cache=tmp_path / "latents")
    with pytest.raises(UserError, match="has changed since"):
        codec(coded["vq"], tmp_path / "a", cache=tmp_path / "latents")
    second = codec(coded["vq"], tmp_path / "b", cache=tmp_path / "latents")
    assert first.shape != second.shape
    assert second.source().shape == second.shape


def test_wrong_models_are_named(tmp_path):
    with pytest.raises(UserError, match="is no folder: name a run of"):
        latents.open_autoencoder(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"no config\.json"):
        latents.open_autoencoder(str(tmp_path))
    with pytest.raises(SystemExit):
        run(ldm, tmp_path / "run", "--config.latents.model=")


@pytest.mark.long
def test_dit_in_latents(coded, tmp_path):
    flags = [f"--config.latents.model={coded['vq']}", "--config.dit.patch=1"]
    run(dit, tmp_path, *flags, *DIFFUSION, "--config.train.steps=2")
    assert json.loads((tmp_path / "eval.json").read_text())["step"] == 2


@pytest.mark.long
@pytest.mark.usefixtures("one_device")
def test_scaling(tmp_path, capsys):
    flags = ["--config.scaling.widths=(8,16)", "--config.scaling.depths=(1,2)", "--config.scaling.heads=(2,2)"]
    flags += [*DIFFUSION, "--config.train.steps=4", "--config.scaling.points=2", "--mode=scaling"]
    run(dit, tmp_path, *flags, makers=("scaling",))
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["steps"] for row in found.values()] == [[2, 4], [2, 4]]
    small, large = found.values()
    assert large["flops_per_step"] > 2 * small["flops_per_step"]
    assert (tmp_path / "scaling.png").exists()
    before = capsys.readouterr().out
    run(dit, tmp_path, *flags, makers=("scaling",))  # done: the same numbers, nothing trained
    assert before == capsys.readouterr().out
    run(dit, tmp_path, *flags, "--config.optim.learning_rate=0.02", "--accept_changes", makers=("scaling",))
    for name, row in json.loads((tmp_path / "scaling.json").read_text()).items():
        assert row["losses"] != found[name]["losses"]  # another config's curves are not this one's
    with pytest.raises(SystemExit):
        run(dit, tmp_path, *flags, "--config.scaling.heads=(2,)", "--accept_changes", makers=("scaling",))


@pytest.mark.long
@pytest.mark.usefixtures("one_device")
def test_compression(tmp_path):
    flags = [
        "--config.compression.factors=(2,)",
        "--config.compression.channels=(4,)",
        "--mode=compression",
        "--config.compression.kinds=('vq',)",
    ]
    flags += [
        "--config.compression.width=8",
        "--config.compression.steps=2",
        "--config.compression.diffusion_steps=2",
        "--config.compression.codes=16",
    ]
    flags += [*DIFFUSION, "--config.train.steps=2", "--config.loss.critic_channels=8"]
    run(ldm, tmp_path, *flags, makers=("compression",))
    found = json.loads((tmp_path / "compression.json").read_text())
    assert {name.partition("-")[0] for name in found} == {"f2_vq"}
    assert [row["latent"] for row in found.values()] == [[4, 4, 4]]
    assert all(row["ms_per_sample"] > 0 and row["frechet"] > 0 for row in found.values())
    assert len((tmp_path / "compression.md").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("flags", "measured", "coded", "diffused"),
    [
        ([], 0, 0, 0),
        (["--config.train.log_every=7", "--config.sample.count=9"], 0, 0, 0),
        (["--config.compression.kinds=('vq','kl')"], 1, 1, 1),
        (["--config.sample.guidance=5"], 1, 0, 0),
        (["--config.sample.steps=2"], 1, 0, 0),
        (["--config.eval.samples=10"], 1, 0, 0),
        (["--config.dit.width=48"], 1, 0, 1),
        (["--config.compression.diffusion_steps=9"], 1, 0, 1),
        (["--config.compression.steps=9"], 1, 1, 1),
        (["--config.optim.learning_rate=1"], 1, 1, 1),
    ],
)
def test_cells_are_used_where_they_belong_and_are_kept(tmp_path, monkeypatch, flags, measured, coded, diffused):
    """Numbers with the settings of their samples and scores, networks with those of their training."""
    cells = []

    def work(cell, run):
        cells.append(cell)
        return {"latent": [4, 4, 4], "ms_per_sample": float(len(cells))}

    def compare(*given):
        base = ["--mode=compression", "--config.compression.factors=(2,)", "--config.compression.channels=(4,)"]
        run(ldm, tmp_path, *base, "--config.compression.kinds=('vq',)", *given, makers=("compression",))
        return (tmp_path / "compression.md").read_text()

    monkeypatch.setattr(ldm, "work", work)
    table, saved = compare(), (tmp_path / "compression.json").read_text()
    assert (compare(*flags, "--accept_changes") != table) == bool(measured)
    assert len(cells) == 1 + measured
    for part, new in ((ldm.Cell.codec, coded), (ldm.Cell.model, diffused)):
        assert (part(cells[-1]) != part(cells[0])) == bool(new)
    assert json.loads(saved).items() <= json.loads((tmp_path / "compression.json").read_text()).items()
    assert compare("--preset=digits", "--accept_changes") == table  # the first are still there
    assert len(cells) == 1 + measured


@pytest.mark.parametrize(
    ("experiment", "flags"),
    [
        (autoencoder, ["--config.autoencoder.channels=8", "--config.loss.adversarial=0"]),
        (ldm, ["--mode=compression", "--config.compression.factors=(2,)", "--config.compression.channels=(4,)"]),
    ],
)
def test_a_judge_without_weights_is_missed_before_the_training(tmp_path, capsys, monkeypatch, experiment, flags):
    def train(*args):
        raise UserError("now it trains")

    monkeypatch.setattr(autoencoding, "train", train)
    with pytest.raises(SystemExit):
        run(experiment, tmp_path, *flags, "--config.eval.judge=resnet", makers=("compression",))
    *_, said, trains = capsys.readouterr().err.splitlines()
    assert said.startswith("no judge: --config.eval.judge_weights names no published ResNet")
    assert trains == "error: now it trains"


def test_a_study_of_nothing_is_refused(tmp_path, capsys):
    for flag in ("factors=()", "kinds=()"):
        with pytest.raises(SystemExit):
            run(ldm, tmp_path, "--mode=compression", f"--config.compression.{flag}", makers=("compression",))
        assert "give at least one of each" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.usefixtures("one_device")
def test_averages_of_any_width_after_training(tmp_path, capsys):
    """Snapshots are kept on the way; afterwards a width that was stored is the state's own average of that width."""
    run(dit, tmp_path, *DIFFUSION, "--config.train.steps=4", "--config.train.profiles_every=2")
    assert sorted(path.name for path in (tmp_path / "profiles").iterdir() if path.name.isdigit()) == ["2", "4"]
    assert json.loads((tmp_path / "eval.json").read_text())["step"] == 4
    opened = _open(dit, tmp_path)
    current = images.restored_state(opened)
    opened.config.sample.ema_width = 0.1
    found = images.averaged(opened, current)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, current.profiles[1])
    run(dit, tmp_path, "--mode=eval", "--config.sample.ema_width=0.15", "--config.eval.bound_images=0")
    assert "FD-MLP-digits" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.usefixtures("one_device")
def test_a_width_without_snapshots_is_named(coded, tmp_path, capsys):
    run(dit, tmp_path, *DIFFUSION, "--config.train.steps=1")
    with pytest.raises(SystemExit):
        run(dit, tmp_path, "--mode=sample", "--config.sample.ema_width=0.1")
    assert "train with profiles" in capsys.readouterr().err
