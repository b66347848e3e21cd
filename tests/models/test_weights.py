"""Readers of weight files: real files of torch and Keras, and every kind of damage to them."""

import importlib
import io
import pathlib
import pickle
import re
import zipfile

import flax.linen as nn
import h5py
import jax
import jax.numpy as jnp
import make_extractor_references as references
import numpy as np
import pytest
import torch_writer as torch

from afr_jax.core import files
from afr_jax.models.extractors import inception_resnet, iresnet, openface
from afr_jax.models.weights import conversion, formats, torch_files

_TORCH = references.REFERENCES / "torch.pt"
_LEGACY = references.REFERENCES / "torch_legacy.pt"
_MODULE = references.REFERENCES / "torch_module.pt"
_KERAS = references.REFERENCES / "keras.h5"


# Whole files.


@pytest.mark.parametrize("path", [_TORCH, _LEGACY, _MODULE])
def test_what_torch_wrote_is_read(path):
    kind, arrays = formats.read_arrays(path)
    expected = references.tiny_arrays()
    if path == _MODULE:
        expected = {name.replace(".", "_"): array for name, array in expected.items()}
    assert kind == "torch" and list(arrays) == list(expected)
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def test_what_keras_wrote_is_read():
    kind, arrays = formats.read_arrays(_KERAS)
    names = ["conv/kernel", "conv/bias"]
    names += [f"norm/{leaf}" for leaf in ("gamma", "beta", "moving_mean", "moving_variance")]
    assert kind == "keras" and list(arrays) == names
    for name, array in arrays.items():
        expected = references.random_weights.random_array(references.SEED, name, array.shape, 18)
        np.testing.assert_array_equal(array, expected)


def test_a_whole_keras_model_is_read(tmp_path):
    """`model.save` puts the weights into a group."""
    path = tmp_path / "model.h5"
    with h5py.File(_KERAS) as old, h5py.File(path, "w") as new:
        group = new.create_group("model_weights")
        for name in old:
            old.copy(name, group)
        group.attrs["layer_names"] = old.attrs["layer_names"]
    expected = formats.read_arrays(_KERAS)[1]
    found = formats.read_arrays(path)[1]
    assert list(found) == list(expected)


def test_npz_is_read(tmp_path):
    path = tmp_path / "conversion.bin"
    with open(path, "wb") as file:
        np.savez(file, **{"a/b": np.arange(3.0)})
    kind, arrays = formats.read_arrays(path)
    assert kind == "npz"
    np.testing.assert_array_equal(arrays["a/b"], [0, 1, 2])


# Damage.


def _rezip(data: bytes, change) -> bytes:
    """The same archive with another content of files: `change(name, data)`, None drops one."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            changed = change(name, old.read(name))
            if changed is not None:
                new.writestr(name, changed)
    return result.getvalue()


def _with_index(change):
    return lambda data: _rezip(data, lambda n, d: change(d) if n.endswith("data.pkl") else d)


_TORCH_DAMAGES = {
    "truncated": (_TORCH, lambda data: data[: len(data) // 2]),
    "end missing": (_TORCH, lambda data: data[:-30]),
    "legacy truncated": (_LEGACY, lambda data: data[:-20]),
    "legacy without arrays": (_LEGACY, lambda data: data[:900]),
    "legacy header only": (_LEGACY, lambda data: data[:40]),
    "values missing": (_TORCH, lambda d: _rezip(d, lambda n, x: None if "/data/0" in n else x)),
    "values short": (_TORCH, lambda d: _rezip(d, lambda n, x: x[:-4] if "/data/0" in n else x)),
    "index truncated": (_TORCH, _with_index(lambda index: index[:-40])),
    "index empty": (_TORCH, _with_index(lambda index: b"")),
    "not little-endian": (
        _TORCH,
        lambda data: _rezip(data, lambda n, d: b"big" if n.endswith("byteorder") else d),
    ),
    "no state dict": (_TORCH, _with_index(lambda index: pickle.dumps([1.0], 2))),
    "a number in it": (_TORCH, _with_index(lambda index: pickle.dumps({"a": 1.0}, 2))),
    "an empty dict": (_TORCH, _with_index(lambda index: pickle.dumps({}, 2))),
}


@pytest.mark.parametrize("damage", list(_TORCH_DAMAGES))
def test_damaged_torch_files_are_refused(tmp_path, damage):
    original, change = _TORCH_DAMAGES[damage]
    path = tmp_path / "conversion.pt"
    path.write_bytes(change(original.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        formats.read_arrays(path)


def _tensor_index(shape=(2, 3), **fields) -> bytes:
    """The pickle of a state dict with one array of six values."""
    fields = {"strides": (3, 1), "size": 6} | fields
    return torch.index(torch.dictionary({torch.text("a"): torch.tensor("0", shape, **fields)}))


def _torch_zip(index: bytes, values: bytes) -> bytes:
    return torch.archive(index, {"0": values})


def test_the_tests_own_writer_writes_good_files(tmp_path):
    path = tmp_path / "conversion.pt"
    path.write_bytes(_torch_zip(_tensor_index(), np.arange(6, dtype="<f4").tobytes()))
    np.testing.assert_array_equal(torch_files.read_state_dict(path)["a"], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    "fields",
    [
        {"offset": 1},
        {"offset": -1},
        {"shape": (3, 3)},
        {"shape": (2, -3)},
        {"shape": (2, 3, 1)},
        {"strides": (300_000_000, 1)},
        {"strides": (-3, 1)},
        {"shape": (2**30, 2**30), "strides": (0, 1)},
        {"shape": (2**30, 6), "strides": (0, 1)},
        {"shape": (1,) * 17, "strides": (1,) * 17},
        {"size": 7},
        {"size": -6},
        {"kind": "ComplexFloatStorage"},
    ],
)
def test_arrays_that_reach_outside_their_values_are_refused(tmp_path, fields):
    path = tmp_path / "conversion.pt"
    path.write_bytes(_torch_zip(_tensor_index(**fields), np.arange(6, dtype="<f4").tobytes()))
    with pytest.raises(ValueError, match=r"conversion.pt"):
        torch_files.read_state_dict(path)


class _Call:
    """Pickles to a call of any function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "call",
    [
        lambda path: _Call(open, path, "w"),
        lambda path: {"a": _Call(exec, f"open({path!r}, 'w')")},
        lambda path: [_Call(io.open, path, "w"), np.zeros(3)],
        lambda path: _Call(importlib.import_module, "this"),
    ],
)
@pytest.mark.parametrize("is_legacy", [False, True])
def test_a_state_dict_cannot_run_code(tmp_path, call, protocol, is_legacy):
    marker, path = tmp_path / "marker", tmp_path / "conversion.pt"
    payload = pickle.dumps(call(str(marker)), protocol)
    if is_legacy:
        data = _LEGACY.read_bytes()
        stream = io.BytesIO(data)
        for _ in range(3):
            pickle.Unpickler(stream).load()
        path.write_bytes(data[: stream.tell()] + payload)
    else:
        path.write_bytes(_torch_zip(payload, b""))
    with pytest.raises(ValueError, match="does not need"):
        formats.read_arrays(path)
    assert not marker.exists()


def _npz_with_objects(path: pathlib.Path, marker: pathlib.Path) -> None:
    np.savez(path, a=np.array([_Call(open, str(marker), "w")], object))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"<html>not found</html>" * 100),
        lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
        lambda path: path.write_bytes(pickle.dumps({"a": np.zeros(3)})),
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(_KERAS.read_bytes()[:5000]),
        lambda path: h5py.File(path, "w").close(),
        lambda path: _npz_with_objects(path, path.with_name("marker")),
        lambda path: path.write_bytes(_torch_zip(b"", b"").replace(b"data.pkl", b"data.pk1")),
    ],
)
def test_other_files_are_refused(tmp_path, write):
    path = tmp_path / "weights.npz"
    write(path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        formats.read_arrays(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "read_fn, path",
    [(iresnet.read_weights, _KERAS), (openface.read_weights, _TORCH)],
)
def test_a_file_of_another_library_is_refused(read_fn, path):
    with pytest.raises(ValueError, match=r"the only forms? "):
        read_fn(path)


def test_the_file_of_another_network_is_refused():
    with pytest.raises(ValueError, match=r"missing \(repeat_2.*, \.\.\.\); 7 extra .*fc.weight"):
        inception_resnet.read_weights(_TORCH)


# Into variables.


class _Net(nn.Module):
    @nn.compact
    def __call__(self, chips):
        x = nn.Conv(4, (3, 3), name="conv")(chips)
        return nn.BatchNorm(use_running_average=True, name="norm")(x).mean(axis=(1, 2))


def _entry(leaf, shape):
    return conversion.torch_entry(leaf[1], leaf[2], shape)


def _arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "norm.weight": (4,)}
    shapes |= {f"norm.{name}": (4,) for name in ("bias", "running_mean", "running_var")}
    return {name: generator.normal(size=shape) for name, shape in shapes.items()}


def test_arrays_become_variables():
    arrays = _arrays()
    variables = conversion.fill("file", conversion.shapes(_Net(), 8), arrays, _entry)
    kernel = variables["params"]["conv"]["kernel"]
    assert kernel.shape == (3, 3, 3, 4) and kernel.dtype == np.float32
    np.testing.assert_allclose(kernel[2, 0, 1, 3], arrays["conv.weight"][3, 1, 2, 0], rtol=1e-6)
    variance = variables["batch_stats"]["norm"]["var"]
    np.testing.assert_allclose(variance, arrays["norm.running_var"], rtol=1e-6)


def test_all_differences_are_listed():
    arrays = _arrays()
    arrays["other.weight"] = arrays.pop("conv.bias")
    arrays["logits.weight"] = arrays.pop("norm.bias")
    arrays["norm.weight"] = np.zeros((4, 1))
    arrays["conv.weight"] = np.zeros((3, 3, 3, 4))
    with pytest.raises(ValueError, match=r"^some/file") as error:
        conversion.fill(
            "some/file",
            conversion.shapes(_Net(), 8),
            arrays,
            _entry,
            ignore_fn=lambda name: name.startswith("logits"),
        )
    text = str(error.value)
    assert "2 missing (conv.bias, norm.bias)" in text
    assert "1 extra (other.weight)" in text
    assert "norm.weight [4, 1], not [4]" in text
    assert "conv.weight [3, 3, 3, 4], not [4, 3, 3, 3]" in text


def test_arrays_of_other_types_are_refused():
    arrays = _arrays() | {"conv.bias": np.zeros(4, np.int64)}
    with pytest.raises(ValueError, match=r"conv.bias holds int64"):
        conversion.fill("file", conversion.shapes(_Net(), 8), arrays, _entry)


# Our own files.


def _variables() -> dict:
    chips = jnp.zeros((1, 8, 8, 3))
    return jax.tree.map(np.asarray, _Net().init(jax.random.key(0), chips))


@pytest.mark.parametrize("dtype, tolerance", [(None, 0.0), ("float16", 1e-3)])
def test_safetensors_round_trip(tmp_path, dtype, tolerance):
    path, variables = tmp_path / "net.safetensors", _variables()
    conversion.write_safetensors(path, variables, dtype=dtype, metadata={"source": "test"})
    assert formats.kind_of(path) == "safetensors"
    assert [found.name for found in tmp_path.iterdir()] == ["net.safetensors"]
    assert "params/conv/kernel" in formats.read_safetensors(path)
    found = conversion.read_safetensors(path, conversion.shapes(_Net(), 8))
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    for ours, stored in zip(jax.tree.leaves(variables), jax.tree.leaves(found), strict=True):
        assert stored.dtype == np.float32
        np.testing.assert_allclose(stored, ours, rtol=tolerance, atol=0)


def test_values_too_large_for_half_precision_are_refused(tmp_path):
    variables = {"params": {"a": np.array([1.0, 1e6], np.float32)}}
    path = tmp_path / "net.safetensors"
    with pytest.raises(ValueError, match="params/a holds values"):
        conversion.write_safetensors(path, variables, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        conversion.write_safetensors(path, _variables())
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data[:-10], "not a readable safetensors"),
        (lambda data: data[:20], "not a readable safetensors"),
        (lambda data: data.replace(b"params/conv/kernel", b"params/cone/kernel"), "checksum"),
        (lambda data: data.replace(b"[3,3,3,4]", b"[3,3,4,3]"), "checksum"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "checksum"),
    ],
)
def test_damaged_safetensors_are_refused(tmp_path, change, message):
    path = tmp_path / "net.safetensors"
    conversion.write_safetensors(path, _variables())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        conversion.read_safetensors(path, conversion.shapes(_Net(), 8))
    assert str(path) in str(error.value)


def test_safetensors_of_another_network_are_refused(tmp_path):
    path, variables = tmp_path / "net.safetensors", _variables()
    conv = variables["params"].pop("conv")
    for other, message in (
        ({"cone": conv}, "2 missing"),
        ({"conv": conv | {"kernel": conv["kernel"].transpose(0, 1, 3, 2)}}, "1 misshapen"),
    ):
        params = variables["params"] | other
        conversion.write_safetensors(path, {**variables, "params": params})
        with pytest.raises(ValueError, match=message):
            conversion.read_safetensors(path, conversion.shapes(_Net(), 8))
