"""LPIPS on AlexNet: equal to PyTorch on random weights, and a perceptual distance with the published ones."""

import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.evaluate import lpips
from diffrl.pretrained import lpips_alexnet

CONVOLUTIONS = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


def random_state(seed=0):
    """A state dict with the names of torchvision's AlexNet and of LPIPS's lin layers."""
    rng = np.random.default_rng(seed)
    state = {}
    for i, (place, (new, old, size)) in enumerate(CONVOLUTIONS.items()):
        state[f"features.{place}.weight"] = rng.normal(size=(new, old, size, size)) * (2 / (size**2 * old)) ** 0.5
        state[f"features.{place}.bias"] = rng.uniform(-0.5, 0.5, new)
        state[f"lin{i}.model.1.weight"] = rng.uniform(size=(1, new, 1, 1)) / new
    return {name: array.astype(np.float32) for name, array in state.items()}


def in_flax(state):
    """The same weights under the names and with the axes of the Flax port."""
    flax = {}
    for i, place in enumerate(CONVOLUTIONS):
        flax[f"AlexNet_0/Conv_{i}/kernel"] = state[f"features.{place}.weight"].transpose(2, 3, 1, 0)
        flax[f"AlexNet_0/Conv_{i}/bias"] = state[f"features.{place}.bias"]
        flax[f"NetLinLayer_{i}/Conv_0/kernel"] = state[f"lin{i}.model.1.weight"].transpose(2, 3, 1, 0)
    return flax


def torch_lpips(state, a, b):
    """The distance as its authors compute it; a and b [B, 3, H, W] in [-1, 1]."""
    torch = pytest.importorskip("torch", reason="PyTorch, of the [oracles] extra, is the reference")
    f = torch.nn.functional
    w = {name: torch.tensor(array) for name, array in state.items()}
    shift, scale = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))

    def features(x):
        x = (torch.tensor(x) - shift) / scale
        for place, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            if place in (3, 6):
                x = f.max_pool2d(x, 3, 2)
            x = f.relu(f.conv2d(x, w[f"features.{place}.weight"], w[f"features.{place}.bias"], stride, padding))
            yield x / (x.norm(dim=1, keepdim=True) + 1e-10)

    layers = [
        f.conv2d((x - y) ** 2, w[f"lin{i}.model.1.weight"]).mean(dim=(2, 3))
        for i, (x, y) in enumerate(zip(features(a), features(b), strict=True))
    ]
    return sum(layers)[:, 0].numpy()


@pytest.mark.oracle
@pytest.mark.parametrize("size", [(31, 31), (40, 67)])
def test_equals_pytorch_on_random_weights(size, tmp_path):
    state = random_state()
    np.savez(tmp_path / "weights.npz", **state)
    a, b = np.random.default_rng(1).uniform(-1, 1, size=(2, 2, 3, *size)).astype(np.float32)
    apply, params = lpips_alexnet.load(tmp_path / "weights.npz")
    ours = lpips.measure(apply, params, *(x.transpose(0, 2, 3, 1) for x in (a, b)))
    np.testing.assert_allclose(ours, torch_lpips(state, a, b), rtol=2e-4)


def test_both_layouts_and_several_files_are_the_same_weights(tmp_path):
    state = random_state()
    np.savez(tmp_path / "flax.npz", **in_flax(state))
    np.savez(tmp_path / "alexnet.npz", **{name: v for name, v in state.items() if name.startswith("features")})
    np.savez(tmp_path / "lin.npz", **{name: v for name, v in state.items() if name.startswith("lin")})
    one = lpips_alexnet.load(tmp_path / "flax.npz")[1]
    two = lpips_alexnet.load(tmp_path / "alexnet.npz", tmp_path / "lin.npz")[1]
    np.testing.assert_array_equal(one["alexnet"]["conv3"]["kernel"], two["alexnet"]["conv3"]["kernel"])
    np.testing.assert_array_equal(one["lin"][2], two["lin"][2])


def faces(data_dir, count):
    pixels = np.load(data_dir / "faces" / "olivetti_64x64.npz")["images"][: 10 * count : 10, ..., None]
    return pixels / np.float32(127.5) - 1


def test_published_weights_see_what_people_see(data_dir):
    """A shift of a pixel is nearer than a blur of as much squared error; another face is farther than either."""
    metrics = data_dir / "metrics"
    apply, params = lpips_alexnet.load(metrics / "lpips_v0.1_alexnet_flax_hwio.npz")
    x = faces(data_dir, 8)
    shifted = np.roll(x, 1, axis=2)
    blurred = x + 0.0
    for _ in range(3):
        blurred = (np.roll(blurred, 1, 2) + blurred + np.roll(blurred, -1, 2)) / 3
        blurred = (np.roll(blurred, 1, 1) + blurred + np.roll(blurred, -1, 1)) / 3
    same, shift, blur, other = (
        lpips.measure(apply, params, x, y, batch=8).mean() for y in (x, shifted, blurred, np.roll(x, 1, axis=0))
    )
    assert same < 1e-12
    assert shift < 0.5 * blur
    assert blur < 2 * other
    assert shift < 0.5 * other
    with np.load(metrics / "lpips_lin_v0.1-alex.npz") as lin:  # the authors' own file of the last layers
        for i, weight in enumerate(params["lin"]):
            assert (weight >= 0).all()
            np.testing.assert_allclose(weight, lin[f"lin{i}.model.1.weight"].ravel(), rtol=1e-6)


def test_wrong_files_are_one_line(tmp_path):
    good = random_state()
    cases = {
        "lack features.6.bias": {name: v for name, v in good.items() if name != "features.6.bias"},
        "lack AlexNet_0/Conv_0/kernel": {"something": np.zeros(3)},
        "lin4.model.1.weight has shape": good | {"lin4.model.1.weight": np.zeros((1, 512, 1, 1))},
    }
    for text, state in cases.items():
        np.savez(tmp_path / "bad.npz", **state)
        with pytest.raises(UserError, match=text):
            lpips_alexnet.load(tmp_path / "bad.npz")
    with pytest.raises(UserError, match=r"cannot be read as \.npz"):
        lpips_alexnet.load(tmp_path / "absent.npz")
    apply, params = lpips_alexnet.apply, lpips_alexnet.convert(good)
    with pytest.raises(UserError, match="at least 31x31"):
        apply(params, np.zeros((1, 32, 30, 1)))
