"""CIFAR-10 ResNets: equal to PyTorch on random weights, and of the published accuracy with published ones."""

import jax
import numpy as np
import pytest
from PIL import Image

from diffrl.errors import UserError
from diffrl.evaluate import frechet
from diffrl.pretrained import cifar_resnet


def random_state(blocks=2, seed=0):
    """A PyTorch-named state dict whose normalisations are far from the identity."""
    rng = np.random.default_rng(seed)
    state = {"linear.weight": rng.normal(size=(10, 64)), "linear.bias": rng.normal(size=10)}

    def layer(prefix, index, new, old):
        state[f"{prefix}conv{index}.weight"] = rng.normal(size=(new, old, 3, 3)) * (2 / (9 * old)) ** 0.5
        for name, low, high in [("weight", 0.3, 1.5), ("bias", -1, 1), ("running_mean", -1, 1)]:
            state[f"{prefix}bn{index}.{name}"] = rng.uniform(low, high, new)
        state[f"{prefix}bn{index}.running_var"] = rng.uniform(0.2, 2, new)

    layer("", 1, 16, 3)
    old = 16
    for stage, channels in enumerate((16, 32, 64), 1):
        for block in range(blocks):
            layer(f"layer{stage}.{block}.", 1, channels, old)
            layer(f"layer{stage}.{block}.", 2, channels, channels)
            old = channels
    return {name: array.astype(np.float32) for name, array in state.items()}


def torch_forward(state, blocks, pixels):
    """The network in PyTorch's own functions, normalisation unfolded; pixels [B, H, W, C] in [0, 1]."""
    torch = pytest.importorskip("torch", reason="PyTorch, of the [oracles] extra, is the reference")
    f = torch.nn.functional
    w = {name: torch.tensor(array) for name, array in state.items()}

    def norm(name, x):
        keys = ("running_mean", "running_var", "weight", "bias")
        return f.batch_norm(x, *(w[f"{name}.{key}"] for key in keys))

    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (cifar_resnet.MEAN, cifar_resnet.STD))
    x = (torch.tensor(pixels).permute(0, 3, 1, 2) - mean) / std
    x = f.relu(norm("bn1", f.conv2d(x, w["conv1.weight"], padding=1)))
    for stage in (1, 2, 3):
        for block in range(blocks):
            p = f"layer{stage}.{block}."
            stride = 2 if stage > 1 and block == 0 else 1
            h = f.relu(norm(p + "bn1", f.conv2d(x, w[p + "conv1.weight"], stride=stride, padding=1)))
            h = norm(p + "bn2", f.conv2d(h, w[p + "conv2.weight"], padding=1))
            if stride == 2:
                x = f.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))
            x = f.relu(h + x)
    features = x.mean((2, 3))
    return f.linear(features, w["linear.weight"], w["linear.bias"]).numpy(), features.numpy()


@pytest.mark.parametrize(("blocks", "name"), [(3, "ResNet20"), (9, "ResNet56")])
def test_the_name_has_the_depth(blocks, name):
    assert cifar_resnet.name(cifar_resnet.convert(random_state(blocks), blocks)) == name


def cifar_test(data_dir):
    """Images in [-1, 1] and labels of CIFAR-10's test split."""
    mosaic = np.asarray(Image.open(data_dir / "cifar10" / "test_mosaic100.webp").convert("RGB"))
    images = mosaic.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    return images / np.float32(127.5) - 1, np.load(data_dir / "cifar10" / "test_labels.npy")


def run(path, images, batch=250):
    apply, params = cifar_resnet.load(path)
    apply = jax.jit(apply)
    outputs = [apply(params, images[i : i + batch]) for i in range(0, len(images), batch)]
    logits, features = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
    return logits.argmax(axis=1), features


def fd(a, b):
    return frechet.frechet_distance(*(frechet.moments(lambda x: x, [features]) for features in (a, b)))


@pytest.mark.oracle
def test_equals_pytorch_on_random_weights(tmp_path):
    state = random_state()
    np.savez(tmp_path / "weights.npz", **state)
    pixels = np.random.default_rng(1).uniform(size=(4, 32, 32, 3)).astype(np.float32)
    apply, params = cifar_resnet.load(tmp_path / "weights.npz")
    logits, features = jax.jit(apply)(params, pixels * 2 - 1)
    expected_logits, expected_features = torch_forward(state, 2, pixels)
    scale = np.abs(expected_logits).max()
    np.testing.assert_allclose(features, expected_features, atol=1e-5 * np.abs(expected_features).max())
    np.testing.assert_allclose(logits, expected_logits, atol=1e-5 * scale)


def test_first_thousand_images(data_dir):
    """PyTorch gets 915 of them right with ResNet-20; and FD-ResNet20 rises with the noise on the images."""
    images, labels = cifar_test(data_dir)
    weights = data_dir / "metrics" / "cifar10_resnet20-12fca82f.npz"
    predicted, clean = run(weights, images[:1000])
    assert abs(int((predicted == labels[:1000]).sum()) - 915) <= 1
    noise = np.random.default_rng(0).normal(size=images[:500].shape).astype(np.float32)
    distances = [fd(clean[:500], clean[500:])]
    distances += [fd(run(weights, images[:500] + std * noise)[1], clean[500:]) for std in (0.05, 0.2)]
    assert 1.5 * distances[0] < distances[1] < distances[2] / 1.5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "percent", "floor"), [("20-12fca82f", 91.73, 0.0492), ("56-4bfd9763", 93.39, 0.0735)])
def test_published_accuracy(data_dir, name, percent, floor):
    """And the Fréchet distance between the halves of the test split: real against real, 5k against 5k."""
    images, labels = cifar_test(data_dir)
    predicted, features = run(data_dir / "metrics" / f"cifar10_resnet{name}.npz", images)
    assert 100 * (predicted == labels).mean() == pytest.approx(percent, abs=0.015)
    assert fd(features[:5000], features[5000:]) == pytest.approx(floor, rel=1e-2)


def test_wrong_files_are_one_line(tmp_path):
    good = random_state()
    cases = {
        "lack layer2.1.bn2.running_var": {k: v for k, v in good.items() if k != "layer2.1.bn2.running_var"},
        "unknown layers, the first layer3.7": good | {"layer3.7.conv1.weight": np.zeros(3)},
        "head/bias has shape": good | {"linear.bias": np.zeros(100)},
    }
    for text, state in cases.items():
        np.savez(tmp_path / "bad.npz", **state)
        with pytest.raises(UserError, match=text):
            cifar_resnet.load(tmp_path / "bad.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    for name in ("absent.npz", "text.npz"):
        with pytest.raises(UserError, match="cannot be read") as error:
            cifar_resnet.load(tmp_path / name)
        assert "\n" not in str(error.value)
