"""diffusers' AutoencoderKL and VQModel with random weights, in torch, and ours with the same weights agree."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.compression import codebook, posterior
from diffrl.errors import UserError
from diffrl.nets.autoencoder import SIZES, Autoencoder
from diffrl.pretrained import diffusers_autoencoder

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="the [oracles] extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the [oracles] extra is not installed")

# Stable Diffusion's, but for widths and groups.
KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 32,
}
# Newer ones (SD 3, FLUX) project nothing, and have a shift; latent diffusion's f16 attends at its last level.
NEWER = KL | {
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "layers_per_block": 1,
}
VQ = {key: value for key, value in NEWER.items() if not key.startswith(("use_", "shift"))} | {
    "latent_channels": 3,
    "num_vq_embeddings": 24,
    "vq_embed_dim": 5,
}


def random_model(make, config):
    torch.manual_seed(0)
    model = make(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def image(side=32):
    return np.random.default_rng(0).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def to_ours(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


@pytest.mark.parametrize("config", [KL, NEWER])
def test_kl(tmp_path, config):
    model = random_model(diffusers.AutoencoderKL, config)
    model.save_pretrained(tmp_path)
    net, params, codes, scale, shift = diffusers_autoencoder.load(tmp_path)
    assert codes is None
    assert scale == model.config.scaling_factor
    assert shift == (model.config.shift_factor or 0.0)
    x, variables = image(), {"params": params}
    with torch.no_grad():
        theirs = model.encode(to_torch(x)).latent_dist
        z = theirs.mean
        decoded = model.decode(z).sample
    moments = jax.jit(lambda x: net.apply(variables, x, method="encode"))(x)
    mean, log_var = posterior.split(moments)
    np.testing.assert_allclose(mean, to_ours(theirs.mean), atol=1e-4)
    np.testing.assert_allclose(log_var, to_ours(theirs.logvar), atol=1e-4)
    np.testing.assert_allclose(posterior.kl(moments), theirs.kl().numpy(), rtol=1e-4)
    ours = jax.jit(lambda z: net.apply(variables, z, method="decode"))(to_ours(z))
    np.testing.assert_allclose(ours, to_ours(decoded), atol=1e-4)


def test_vq(tmp_path):
    model = random_model(diffusers.VQModel, VQ)
    model.save_pretrained(tmp_path)
    net, params, codes, *_ = diffusers_autoencoder.load(tmp_path)
    x, variables = image(), {"params": params}
    with torch.no_grad():
        latents = model.encode(to_torch(x)).latents
        decoded = model.decode(latents).sample
    z = net.apply(variables, x, method="encode")
    np.testing.assert_allclose(z, to_ours(latents), atol=1e-4)
    quantised = codebook.quantise(jnp.asarray(codes), jnp.asarray(to_ours(latents)))
    assert len(np.unique(quantised.indices)) > 1
    ours = net.apply(variables, quantised.z, method="decode")
    np.testing.assert_allclose(ours, to_ours(decoded), atol=1e-4)


def test_published_sizes():
    """Stable Diffusion's f8 has 83.65 M parameters: diffusers' own network of its config is the oracle."""
    config = KL | {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "norm_num_groups": 32,
    }
    with torch.device("meta"):
        theirs = sum(parameter.numel() for parameter in diffusers.AutoencoderKL(**config).parameters())
    multipliers, latent, attention = SIZES[8]
    net = Autoencoder(latent=latent, multipliers=multipliers, attention=attention)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == theirs == 83_653_863
    assert net == diffusers_autoencoder.from_config(diffusers.AutoencoderKL(**KL).config | config)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"act_fn": "relu"}, "act_fn=relu has no counterpart"),
        ({"norm_type": "spatial"}, "norm_type=spatial"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "up_block_types"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
    ],
)
def test_what_we_have_not_is_named(change, told):
    with pytest.raises(UserError, match=told):
        diffusers_autoencoder.from_config(NEWER | {"in_channels": 3, "out_channels": 3} | change)


def test_misshapen_and_missing_tensors_are_named(tmp_path):
    model = random_model(diffusers.AutoencoderKL, NEWER)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    config = json.loads(json.dumps(dict(model.config)))
    for damage, told in (
        (lambda w: w.pop("decoder.conv_out.bias"), "lack decoder.conv_out.bias"),
        (lambda w: w.update(strange=np.zeros(3)), "hold strange"),
        (lambda w: w.update({"encoder.conv_in.weight": np.zeros((16, 3, 5, 5))}), "encoder.conv_in.weight has shape"),
    ):
        broken = dict(weights)
        damage(broken)
        with pytest.raises(UserError, match=told):
            diffusers_autoencoder.from_diffusers(broken, config)
