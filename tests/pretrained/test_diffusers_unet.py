"""diffusers' U-Net with random weights, in torch, and ours with the same weights give the same output."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.pretrained import diffusers_unet

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="the [oracles] extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the [oracles] extra is not installed")

# google/ddpm-cifar10-32, but for the widths, the groups that go with them and the size.
DDPM = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 8,
}
# The same with strided convolutions padded on both sides, several heads, cosines first: improved DDPM's conventions.
IDDPM = DDPM | {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
    "attention_head_dim": 8,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 8,
}
# ADM's network, as openai/diffusers-cd_imagenet64_l2 has it: labels, and residual blocks that resample.
ADM = IDDPM | {
    "out_channels": 6,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "num_class_embeds": 5,
}


def torch_unet(config):
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**config).eval()
    for weight in model.parameters():
        # Norms start as ones and biases as zeros: without this, two of them in each other's place would pass.
        weight.data += 0.1 * torch.randn(weight.shape)
    return model


def numpy_weights(model):
    return {name: weight.detach().numpy() for name, weight in model.state_dict().items()}


def outputs(model, unet, params):
    """(theirs, ours) on the same three random inputs, steps and, where there are classes, labels."""
    size = model.config.sample_size
    x = np.random.default_rng(0).standard_normal((3, size, size, 3)).astype(np.float32)
    t = np.array([0.0, 17.0, 999.0], np.float32)
    labels = np.array([0, 4, 2]) if model.config.num_class_embeds else None
    with torch.no_grad():
        given = () if labels is None else (torch.tensor(labels),)
        theirs = model(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), *given).sample
    ours = jax.jit(unet.apply)({"params": params}, x, t, labels)
    return theirs.numpy().transpose(0, 2, 3, 1), ours


@pytest.mark.parametrize("config", [DDPM, IDDPM, ADM], ids=["ddpm", "iddpm", "adm"])
def test_same_output(config):
    model = torch_unet(config)
    unet = diffusers_unet.unet_from_config(model.config)
    theirs, ours = outputs(model, unet, diffusers_unet.params_from_diffusers(numpy_weights(model), model.config))
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_load_reads_what_diffusers_saves(tmp_path):
    model = torch_unet(IDDPM)
    model.save_pretrained(tmp_path / "unet")
    theirs, ours = outputs(model, *diffusers_unet.load(tmp_path))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_old_names_of_the_attention():
    model = torch_unet(IDDPM)
    weights = numpy_weights(model)
    old = dict(weights)
    for name in weights:
        for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f".{new}." in name:
                old[name.replace(new, before)] = old.pop(name)
    assert old.keys() != weights.keys()
    expected = diffusers_unet.params_from_diffusers(weights, model.config)
    jax.tree.map(np.testing.assert_array_equal, diffusers_unet.params_from_diffusers(old, model.config), expected)


def test_parameter_count_of_adm_imagenet64():
    """At its true size, where torch's meta device holds shapes only: the same count, but for our null class."""
    config = ADM | {
        "sample_size": 64,
        "block_out_channels": (192, 384, 576, 768),
        "down_block_types": ("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3),
        "up_block_types": (*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        "layers_per_block": 3,
        "attention_head_dim": 64,
        "num_class_embeds": 1000,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
    }
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**config).num_parameters()
    x = jnp.zeros((1, 64, 64, 3))
    ours = jax.eval_shape(diffusers_unet.unet_from_config(config).init, jax.random.key(0), x, jnp.zeros(1))
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == theirs + 4 * 192


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("mid_block.resnets.1.conv2.bias"), "lack mid_block.resnets.1.conv2.bias"),
        (lambda w: w.update(extra=np.zeros(1)), "hold extra"),
        (lambda w: w.update({"conv_in.weight": np.zeros((16, 4, 3, 3))}), "conv_in.weight has shape"),
    ],
    ids=["missing", "left over", "shape"],
)
def test_weights_that_do_not_fit_are_named(change, message):
    model = torch_unet(IDDPM)
    weights = numpy_weights(model)
    change(weights)
    with pytest.raises(UserError, match=message):
        diffusers_unet.params_from_diffusers(weights, model.config)


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "gelu"},
        {"time_embedding_type": "fourier"},
        {"attn_norm_num_groups": None},
        {"block_out_channels": (32, 48)},
        {"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D")},
        {"up_block_types": ("UpBlock2D", "AttnUpBlock2D")},
        {"downsample_type": "resnet"},
        {"sample_size": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_architectures_that_differ_are_refused(change):
    config = dict(diffusers.UNet2DModel(**IDDPM).config) | change
    with pytest.raises(UserError, match="no counterpart"):
        diffusers_unet.unet_from_config(config)


def test_missing_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=diffusers_unet.WEIGHTS):
        diffusers_unet.load(tmp_path)
