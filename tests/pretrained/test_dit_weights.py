"""diffusers' DiT with random weights, in torch, and ours with the same give the same output; so for Meta's names."""

import jax
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.pretrained import dit

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="the [oracles] extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the [oracles] extra is not installed")
pytest.importorskip("safetensors", reason="the [oracles] extra is not installed")

CONFIG = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8, "num_layers": 3,
    "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5, "norm_num_groups": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = diffusers.DiTTransformer2DModel(**CONFIG).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.1 * torch.randn(weight.shape)
        for block in made.transformer_blocks[1:]:  # published networks have one embedding, many times
            block.norm1.emb.load_state_dict(made.transformer_blocks[0].norm1.emb.state_dict())
    return made


def numpy_weights(model):
    return {name: weight.detach().numpy() for name, weight in model.state_dict().items()}


def inputs():
    x = np.random.default_rng(0).standard_normal((3, 8, 8, 4)).astype(np.float32)
    return x, np.array([0.0, 17.0, 999.0], np.float32), np.array([0, 5, 2])  # 5 is the null class


def theirs(model):
    x, t, labels = inputs()
    with torch.no_grad():
        y = model(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(labels)).sample
    return y.numpy().transpose(0, 2, 3, 1)


def ours(net, params):
    return jax.jit(net.apply)({"params": params}, *inputs())


def test_same_output(model):
    want = theirs(model)
    assert np.abs(want).max() > 0.3
    np.testing.assert_allclose(ours(*dit.from_diffusers(numpy_weights(model), model.config)), want, atol=1e-4)


def test_load_reads_what_diffusers_saves(model, tmp_path):
    model.save_pretrained(tmp_path / "transformer")
    np.testing.assert_allclose(ours(*dit.load(tmp_path)), theirs(model), atol=1e-4)


def original(model):
    """The same tensors under the names of the paper's repository, which keeps the positions as well."""
    new = {"pos_embed": model.pos_embed.pos_embed.numpy()}
    for name, tensor in numpy_weights(model).items():
        if ".norm1.emb." in name and not name.startswith("transformer_blocks.0."):
            continue
        for old, other in {
            "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "transformer_blocks.0.norm1.emb.class_embedder": "y_embedder",
            "pos_embed.proj": "x_embedder.proj",
            "transformer_blocks": "blocks", "norm1.linear": "adaLN_modulation.1", "attn1.to_out.0": "attn.proj",
            "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2", "proj_out_1": "final_layer.adaLN_modulation.1",
            "proj_out_2": "final_layer.linear",
        }.items():  # fmt: skip
            name = name.replace(old, other)
        new[name] = tensor
    for i in range(CONFIG["num_layers"]):
        for kind in ("weight", "bias"):
            parts = [new.pop(f"blocks.{i}.attn1.to_{part}.{kind}") for part in "qkv"]
            new[f"blocks.{i}.attn.qkv.{kind}"] = np.concatenate(parts)
    return new


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_metas_names(model, tmp_path, suffix):
    """From either kind of file; the frequencies, in which diffusers differs, are put aside."""
    from safetensors.numpy import save_file

    path = tmp_path / f"DiT{suffix}"
    state = original(model)
    # Heads of 64 channels are the published ones: with one head here, the queries of ours are those of one.
    if suffix == ".pt":
        torch.save({name: torch.tensor(tensor) for name, tensor in state.items()}, path)
    else:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in state.items()}, path)
    net, params = dit.load(path, sample_size=8)
    assert (net.width, net.depth, net.heads, net.patch, net.num_classes, net.freq_shift) == (64, 3, 1, 2, 5, 0.0)
    net = net.clone(heads=2, freq_shift=1.0)
    params["blocks"]["qkv"] = {
        name: leaf.reshape(*leaf.shape[:-2], 2, 32) for name, leaf in params["blocks"]["qkv"].items()
    }
    np.testing.assert_allclose(ours(net, params), theirs(model), atol=1e-4)


TABLE = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("proj_out_2.bias"), "lack proj_out_2.bias"),
        (lambda w: w.update(extra=np.zeros(1)), "hold extra"),
        (lambda w: w.update({"proj_out_2.bias": np.zeros(3)}), r"proj_out_2.bias has shape \(3,\).*wants \(32,\)"),
        (lambda w: w.update({TABLE: np.zeros((6, 64))}), "is not the embedding of the other blocks"),
    ],
)
def test_wrong_tensors_are_named(model, change, words):
    weights = numpy_weights(model)
    change(weights)
    with pytest.raises(UserError, match=words):
        dit.from_diffusers(weights, model.config)


def test_wrong_files_are_one_line(model, tmp_path):
    with pytest.raises(UserError, match="is no file"):
        dit.load(tmp_path / "absent.pt")
    (tmp_path / "broken.pt").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be read as weights of torch"):
        dit.load(tmp_path / "broken.pt")
    with pytest.raises(UserError, match=r"has no config\.json"):
        dit.load(tmp_path)
    with pytest.raises(UserError, match="not for inputs of side 16"):
        dit.from_original(original(model), 16)
    with pytest.raises(UserError, match="not DiT's sines and cosines"):
        dit.from_original(original(model) | {"pos_embed": np.ones((1, 16, 64), np.float32)}, 8)
