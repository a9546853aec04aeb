"""diffusers' port of Diffuser with random weights, in torch, and ours with the same weights give the same output."""

import jax
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.pretrained import diffusers_temporal_unet

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="the [oracles] extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the [oracles] extra is not installed")

# Diffuser's networks of hopper-medium-v2, here of half the width.
PLANNER = {
    "in_channels": 14,
    "out_channels": 14,
    "block_out_channels": (16, 64, 128),
    "down_block_types": ("DownResnetBlock1D",) * 3,
    "up_block_types": ("UpResnetBlock1D",) * 2,
    "mid_block_type": "MidResTemporalBlock1D",
    "out_block_type": "OutConv1DBlock",
    "act_fn": "mish",
    "time_embedding_type": "positional",
    "use_timestep_embedding": True,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
SCORE = PLANNER | {
    "block_out_channels": (16, 32, 64, 128),
    "down_block_types": ("DownResnetBlock1D",) * 4,
    "up_block_types": (),
    "mid_block_type": "ValueFunctionMidBlock1D",
    "out_block_type": "ValueFunction",
    "downsample_each_block": True,
}
HORIZON = 32  # the value's: 32 is halved six times, to 1


def torch_model(config):
    torch.manual_seed(0)
    model = diffusers.UNet1DModel(**config).eval()
    for weight in model.parameters():
        # Norms start as ones and biases as zeros: without this, two of them in each other's place would pass.
        weight.data += 0.1 * torch.randn(weight.shape)
    return model


def numpy_weights(model):
    return {name: weight.detach().numpy() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("config", [PLANNER, SCORE], ids=["planner", "value"])
def test_same_output_from_a_saved_folder(config, tmp_path):
    model = torch_model(config)
    model.save_pretrained(tmp_path)
    net, params = diffusers_temporal_unet.load(tmp_path)
    x = np.random.default_rng(0).standard_normal((3, HORIZON, 14)).astype(np.float32)
    t = np.array([0.0, 7.0, 99.0], np.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(x.transpose(0, 2, 1)), torch.tensor(t)).sample.numpy()
    theirs = theirs[:, 0] if config is SCORE else theirs.transpose(0, 2, 1)
    assert np.std(theirs, axis=0).max() > 0.05
    np.testing.assert_allclose(jax.jit(net.apply)({"params": params}, x, t), theirs, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "silu"},
        {"freq_shift": 0.0},
        {"out_block_type": None},
        {"downsample_each_block": True},
        {"block_out_channels": (16, 64, 120)},
        {"up_block_types": ("UpBlock1D", "UpResnetBlock1D")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_architectures_that_differ_are_refused(change):
    with pytest.raises(UserError, match=f"{next(iter(change))}=.* no counterpart"):
        diffusers_temporal_unet.net_from_config(PLANNER | change)


def test_weights_that_do_not_fit_are_named():
    weights = numpy_weights(torch_model(PLANNER))
    lost = "up_blocks.0.upsample.conv.weight"
    with pytest.raises(UserError, match=f"lack {lost}"):
        diffusers_temporal_unet.from_diffusers({k: v for k, v in weights.items() if k != lost}, PLANNER)
    with pytest.raises(UserError, match="hold extra"):
        diffusers_temporal_unet.from_diffusers(weights | {"extra": np.zeros(1)}, PLANNER)
