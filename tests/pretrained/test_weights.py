"""What comes out of files of weights is what went in, as float32; what is wrong with one is said in a line."""

import json
import pickle
import struct

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.pretrained import weights
from diffrl.pretrained.weights import Reader, fill, open_file, open_folder

VALUES = {"a.weight": np.arange(24.0).reshape(4, 3, 1, 2) / 8, "a.bias": np.array([-1.5, 0, 0.25, 3])}


def write_safetensors(path, tensors, kinds):
    """The format by hand, so that no package is needed; the oracle below shows that it is the package's."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = np.asarray(tensor).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": kinds, "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def taken(opened):
    reader = Reader(opened, "this network")
    return {name: reader.take(name) for name in opened}


def assert_values(opened):
    got = taken(opened)
    assert got.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], value)  # VALUES are exact in every precision


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F16", np.float16), ("BF16", jnp.bfloat16), ("F32", np.float32), ("F64", np.float64)]
)
def test_safetensors(tmp_path, kind, dtype):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {name: value.astype(dtype) for name, value in VALUES.items()}, kind)
    assert_values(open_file(path))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_npz(tmp_path, dtype):
    np.savez_compressed(tmp_path / "w.npz", **{name: value.astype(dtype) for name, value in VALUES.items()})
    assert_values(open_file(tmp_path / "w.npz"))


@pytest.mark.oracle
def test_safetensors_of_the_package(tmp_path):
    torch = pytest.importorskip("torch", reason="the [oracles] extra is not installed")
    save_file = pytest.importorskip("safetensors.torch", reason="the [oracles] extra is not installed").save_file
    path = tmp_path / "w.safetensors"
    save_file({name: torch.tensor(value).bfloat16() for name, value in VALUES.items()}, path, {"format": "pt"})
    assert_values(open_file(path))


@pytest.mark.oracle
@pytest.mark.parametrize("key", [None, "ema", "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch(tmp_path, key, zipped):
    torch = pytest.importorskip("torch", reason="the [oracles] extra is not installed")
    state = {name: torch.tensor(value).bfloat16() for name, value in VALUES.items()}
    path = tmp_path / "w.ckpt"
    whole = state | {"steps": 3} if key is None else {key: state, "optimizer": {"x": torch.zeros(1)}}
    torch.save(whole, path, _use_new_zipfile_serialization=zipped)
    assert_values(open_file(path))


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a file was run')",)


@pytest.mark.oracle
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_code_in_torch_files_is_not_run(tmp_path, suffix):
    torch = pytest.importorskip("torch", reason="the [oracles] extra is not installed")
    path = tmp_path / f"w{suffix}"
    torch.save({"a": Trap()}, path)
    with pytest.raises(UserError, match="holds more than tensors"):
        open_file(path)
    path.write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(UserError, match="cannot be read as weights of torch"):
        open_file(path)


def test_code_in_npz_is_not_run(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([Trap()], object), b=np.ones(2))
    opened = open_file(tmp_path / "w.npz")
    np.testing.assert_array_equal(opened["b"], 1)  # lazily: the other one is not touched
    with pytest.raises(UserError, match=r"w\.npz.*a: .*pickle"):
        opened["a"]
    (tmp_path / "w.npz").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"cannot be read as \.npz"):
        open_file(tmp_path / "w.npz")


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 40, b"not weights at all, but long enough"])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
def test_damaged_files_are_one_line(tmp_path, suffix, content):
    if suffix == ".pt":
        pytest.importorskip("torch", reason="the [oracles] extra is not installed")
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} cannot be read as .*; fetch it again") as raised:
        open_file(path)
    assert "\n" not in str(raised.value)


def test_truncated_files(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", VALUES, "F64")
    np.savez(tmp_path / "w.npz", **VALUES)
    for name in ("w.safetensors", "w.npz"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-9])
        with pytest.raises(UserError, match="fetch it again"):
            open_file(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "Q4"}, {"shape": [5]}, {"data_offsets": [1000, 1032]}, {"shape": [-2, -2]}, {"data_offsets": None}],
)
def test_safetensors_headers_are_not_trusted(tmp_path, change):
    entry = {"dtype": "F64", "shape": [4], "data_offsets": [0, 32]} | change
    text = json.dumps({"a.bias": entry}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(32))
    with pytest.raises(UserError, match=r"cannot be read as \.safetensors"):
        open_file(tmp_path / "w.safetensors")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="is no file"):
        open_file(tmp_path / "absent.pt")
    (tmp_path / "w.txt").write_text("a")
    with pytest.raises(UserError, match="is no known kind of weights"):
        open_file(tmp_path / "w.txt")
    np.savez(tmp_path / "w.npz")
    with pytest.raises(UserError, match="holds no tensors"):
        open_file(tmp_path / "w.npz")
    np.save(tmp_path / "w.npy", np.ones(2))
    (tmp_path / "w.npy").rename(tmp_path / "w.npz")
    with pytest.raises(UserError, match=r"cannot be read as \.npz"):
        open_file(tmp_path / "w.npz")


def test_folders_of_diffusers(tmp_path):
    inner = tmp_path / "vae"
    inner.mkdir()
    with pytest.raises(UserError, match=r"vae has no config\.json"):
        open_folder(tmp_path, "vae")
    (inner / "config.json").write_text("{")
    with pytest.raises(UserError, match=weights.DIFFUSERS_WEIGHTS):
        open_folder(tmp_path, "vae")
    write_safetensors(inner / weights.DIFFUSERS_WEIGHTS, VALUES, "F64")
    with pytest.raises(UserError, match="is no JSON"):
        open_folder(tmp_path, "vae")
    (inner / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is no config"):
        open_folder(tmp_path, "vae")
    (inner / "config.json").write_text('{"layers": 2}')
    for path in (tmp_path, inner):
        opened, config = open_folder(path, "vae")
        assert config == {"layers": 2}
        assert_values(opened)


def test_renamed_tensors_stay_unread():
    class Shy(dict):
        def __getitem__(self, name):
            assert name == "x.key.bias", "a tensor was read that nobody asked for"
            return super().__getitem__(name)

    new = weights.renamed(Shy({"x.key.bias": np.ones(1), "x.proj_attn.bias": np.zeros(1)}), weights.modern)
    assert list(new) == ["x.to_k.bias", "x.to_out.0.bias"]
    np.testing.assert_array_equal(new["x.to_k.bias"], 1)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ((4,), (4,)),
        ((4, 3), (3, 4)),
        ((4, 3, 5, 2), (5, 2, 3, 4)),
        ((4, 3, 5, 2), (30, 4)),  # a patch as one axis
        ((4, 3, 1, 1), (3, 4)),  # a convolution of width 1 as a product
        ((4, 3), (1, 1, 3, 4)),
        ((12, 3), (3, 3, 2, 2)),  # three projections of two heads
    ],
)
def test_fit_turns_axes(theirs, ours):
    """torch's y = W x, with every window's place, is our x W."""
    tensor = np.random.default_rng(0).standard_normal(theirs).astype(np.float32)
    got = Reader({"a": tensor}, "this network").fit("a", ours)
    assert got.shape == ours
    if tensor.ndim == 1:
        np.testing.assert_array_equal(got, tensor)
    else:
        x = np.arange(np.prod(theirs[1:])).reshape(theirs[1:])
        want = np.tensordot(tensor, x, tensor.ndim - 1)
        x = np.moveaxis(x, 0, -1).reshape(-1)
        np.testing.assert_allclose(x @ got.reshape(len(x), -1), want, rtol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "ours"), [((4, 3), (4, 3)), ((4,), (5,)), ((4, 3, 2, 2), (2, 2, 4, 3)), ((6, 4), (6, 4)), ((4, 3), (3,))]
)
def test_fit_moves_no_axis_across_another(theirs, ours):
    with pytest.raises(UserError, match=r"a has shape .* \(in our axes\), this network wants .*another model"):
        Reader({"a": np.zeros(theirs)}, "this network").fit("a", ours)


def test_fit_joins_outputs():
    parts = {name: np.full((2, 3), i) for i, name in enumerate("qkv")}
    got = Reader(parts, "this network").fit(list("qkv"), (3, 3, 1, 2))
    np.testing.assert_array_equal(got, np.broadcast_to(np.arange(3)[:, None, None], (3, 3, 1, 2)))
    with pytest.raises(UserError, match=r"k has shape \(2, 4\), but q has \(2, 3\)"):
        Reader(parts | {"k": np.zeros((2, 4))}, "this network").fit(list("qkv"), (3, 3, 1, 2))


def test_tables_are_not_turned():
    table = np.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(Reader({"a": table}, "this network").fit("a", (4, 3), turn=False), table)


def test_each_tensor_is_taken_once():
    reader = Reader({"a": np.ones(2), "b": np.ones(3)}, "this network")
    assert reader.shape("b") == (3,)
    reader.take("a")
    with pytest.raises(ValueError, match="a is taken twice"):
        reader.take("a")
    with pytest.raises(UserError, match="hold b, which this network has not"):
        reader.done()
    reader.discard("b", "absent")
    reader.done()


def test_fill():
    """A dense layer's parameters; a missing, a left over and a misshapen tensor are named."""
    theirs = {"fc.weight": np.arange(6.0).reshape(2, 3), "fc.bias": np.ones(2)}

    def filled(tensors):
        reader = Reader(tensors, "this layer")
        return fill(nn.Dense(2), [(1, 3)], reader, lambda path, shape: reader.fit(f"fc.{weights.kind(path)}", shape))

    params = filled({name: tensor.astype(np.float16) for name, tensor in theirs.items()})
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(nn.Dense(2).apply({"params": params}, np.eye(3)), theirs["fc.weight"].T + 1)
    with pytest.raises(UserError, match=r"lack fc\.bias, which this layer has"):
        filled({"fc.weight": theirs["fc.weight"]})
    with pytest.raises(UserError, match="hold extra, which this layer has not"):
        filled(theirs | {"extra": np.zeros(1)})
    with pytest.raises(UserError, match=r"fc\.bias has shape \(3,\).*this layer wants \(2,\)"):
        filled(theirs | {"fc.bias": np.zeros(3)})
