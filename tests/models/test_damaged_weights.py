"""Weight files that were damaged at random, or made to hurt: readers raise `ValueError` alone."""

import io
import pathlib
import pickle
import resource
import zipfile

import h5py
import make_extractor_references as references
import numpy as np
import onnx_writer as onnx
import pytest
import torch_writer as torch
from drill.hostile import keras as _keras

from afr_jax.core import files
from afr_jax.models.extractors import registry
from afr_jax.models.weights import conversion, formats

_ARRAYS = {"a.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "a.bias": np.ones(2)}


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **_ARRAYS)
    return file.getvalue()


def _safetensors(folder: pathlib.Path) -> bytes:
    path = folder / "own.safetensors"
    conversion.write_safetensors(path, {"params": {"a": _ARRAYS["a.weight"]}})
    return path.read_bytes()


def _onnx() -> bytes:
    values = np.arange(12, dtype=np.int8).reshape(3, 4)
    tensors = [onnx.tensor(name, array) for name, array in _ARRAYS.items()]
    tensors += [onnx.tensor("w_quantized", values), onnx.tensor("s", np.ones((3, 2), np.float32))]
    nodes = [
        onnx.node("DequantizeLinear", ["w_quantized", "s"], ["w"], axis=1, block_size=2),
        onnx.node("Conv", ["x", "w"], ["y"], pads=[1, 1]),
    ]
    return onnx.model(onnx.graph(nodes, tensors))


_WHOLE = {
    "torch": lambda folder: (references.REFERENCES / "torch.pt").read_bytes(),
    "torch_legacy": lambda folder: (references.REFERENCES / "torch_legacy.pt").read_bytes(),
    "checkpoint": lambda folder: torch.write_state_dict(
        folder / "a.ckpt", _ARRAYS, checkpoint=True
    ).read_bytes(),
    "npz": lambda folder: _npz(),
    "safetensors": _safetensors,
    "onnx": lambda folder: _onnx(),
    "keras": lambda folder: (references.REFERENCES / "keras.h5").read_bytes(),
}


def _damaged(data: bytes, random: np.random.Generator) -> bytes:
    """The file with some bytes changed, a part lost, doubled, or overwritten."""
    changed = bytearray(data)
    first, last = sorted(random.integers(0, len(data), 2))
    last = min(last, first + 64)
    way = random.integers(5)
    if way == 0:
        for place in random.integers(0, len(data), random.integers(1, 6)):
            changed[place] ^= 1 << random.integers(8)
    elif way == 1:
        del changed[first:]
    elif way == 2:
        del changed[first:last]
    elif way == 3:
        changed[first:first] = changed[first:last]
    else:
        changed[first:last] = random.bytes(last - first)
    return bytes(changed)


@pytest.mark.parametrize("name", _WHOLE)
def test_damage_of_any_kind_is_a_value_error_in_one_line(tmp_path, name):
    path = tmp_path / "net.bin"
    data = _WHOLE[name](tmp_path)
    path.write_bytes(data)
    whole = formats.read_arrays(path)[1]
    most = sum(array.nbytes for array in whole.values()) + 16 * len(data)
    random = np.random.default_rng(0)
    # HDF5 takes its time with each file.
    refused, count = 0, 50 if name == "keras" else 300
    for _ in range(count):
        path.write_bytes(_damaged(data, random))
        try:
            arrays = formats.read_arrays(path)[1]
        except ValueError as error:
            refused += 1
            assert type(error) is ValueError
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
            assert len(str(error)) < 1000
        else:
            # Flipped bits of the values themselves cannot be noticed; sizes can.
            assert sum(array.nbytes for array in arrays.values()) <= most
    assert refused > count // 4


# Files that a checkpoint may hold.


def test_a_training_checkpoint_is_read_without_its_classes(tmp_path):
    path = torch.write_state_dict(tmp_path / "a.ckpt", _ARRAYS, checkpoint=True)
    kind, arrays = formats.read_arrays(path)
    assert kind == "torch" and list(arrays) == list(_ARRAYS)
    for name, array in _ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_a_placeholder_in_the_state_dict_is_refused(tmp_path):
    path = tmp_path / "net.pt"
    module = torch.name("somebody.nets", "Net") + b")R"
    for value in (module, torch.dictionary({torch.text("a"): module})):
        path.write_bytes(torch.archive(torch.index(value), {}))
        with pytest.raises(ValueError, match=r"refers to somebody\.nets\.Net"):
            formats.read_arrays(path)


@pytest.mark.parametrize(
    "name",
    [
        torch.name("torch._utils", "_rebuild_tensor_v2"),
        torch.name("torch._utils", "_rebuild_parameter"),
        torch.name("torch", "FloatStorage"),
        torch.name("collections", "OrderedDict"),
        torch.name("builtins", "dict"),
    ],
)
@pytest.mark.parametrize("state", [b"}X\1\0\0\0aK\1s", b"N}X\1\0\0\0aK\1s\x86", b"N"])
def test_no_file_changes_what_reads_it(tmp_path, name, state):
    """A pickle may set the state of what it names: here there is none to set."""
    path = tmp_path / "net.pt"
    path.write_bytes(torch.archive(torch.index(name + state + b"b"), {}))
    with pytest.raises(ValueError, match=r"net.pt"):
        formats.read_arrays(path)
    good = torch.write_state_dict(tmp_path / "good.pt", _ARRAYS)
    np.testing.assert_array_equal(formats.read_arrays(good)[1]["a.bias"], _ARRAYS["a.bias"])


def test_a_dictionary_that_holds_itself_is_refused(tmp_path):
    loop: dict = {}
    loop["state_dict"] = loop
    path = tmp_path / "net.pt"
    path.write_bytes(torch.archive(pickle.dumps(loop, 2), {}))
    with pytest.raises(ValueError, match="no array"):
        formats.read_arrays(path)


# Files that unpack to far more than they are.


def _bomb_npz(path: pathlib.Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        file = io.BytesIO()
        np.save(file, np.zeros(1 << 25, np.float32))
        archive.writestr("a.npy", file.getvalue())


def _short_npz(path: pathlib.Path) -> None:
    file = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)}
    np.lib.format.write_array_header_1_0(file, shape)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", file.getvalue() + bytes(16))


def _bomb_index(path: pathlib.Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("x/data.pkl", bytes(1 << 27))


def _elsewhere_keras(path: pathlib.Path) -> None:
    with h5py.File(path.with_name("other.h5"), "w") as file:
        file["values"] = np.ones(4, np.float32)
    _keras(path, link=h5py.ExternalLink("other.h5", "values"))


def _model_elsewhere_keras(path: pathlib.Path) -> None:
    _keras(path.with_name("other.h5"), shape=(4,), dtype="f4")
    with h5py.File(path, "w") as file:
        file["model_weights"] = h5py.ExternalLink("other.h5", "/")


def _raw_keras(path: pathlib.Path) -> None:
    raw = path.with_name("raw")
    raw.write_bytes(bytes(64))
    _keras(path, shape=(4,), dtype="f4", external=[(str(raw), 0, 64)])


@pytest.mark.parametrize(
    "write, match",
    [
        (_bomb_npz, "unpack to"),
        (_short_npz, "not as many values"),
        (_bomb_index, "unpack to"),
        (lambda path: _keras(path, shape=(1 << 33,), dtype="f4", chunks=(1024,)), "unpack to"),
        (_elsewhere_keras, "another file"),
        (_model_elsewhere_keras, "another file"),
        (_raw_keras, "another file"),
        (lambda path: _keras(path, link=h5py.SoftLink("/b")), "another file"),
        (lambda path: _keras(path, data=["words"]), "no array of numbers"),
        (lambda path: _keras(path, shape=(9,), dtype="f4", compression="lzf"), "a filter"),
    ],
)
def test_files_that_hold_less_than_they_say_are_refused(tmp_path, write, match):
    path = tmp_path / "net.bin"
    write(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=match) as error:
        formats.read_arrays(path)
    assert str(path) in str(error.value)
    # Kilobytes: nothing was expanded.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_small_files_may_unpack_to_more():
    files.check_expansion(1 << 20, 100)
    with pytest.raises(ValueError, match="unpack"):
        files.check_expansion(1 << 30, 1 << 20)


@pytest.mark.parametrize("field", [(13, [(1, "location"), (2, "net.data")]), (14, 1)])
def test_arrays_of_onnx_in_other_files_are_refused(tmp_path, field):
    (tmp_path / "net.data").write_bytes(bytes(8))
    tensor = [(1, 2), (2, 1), (8, "a"), field]
    path = onnx.write(tmp_path / "net.onnx", [tensor])
    with pytest.raises(ValueError, match="another file"):
        formats.read_arrays(path)


@pytest.mark.parametrize("name", sorted(registry.EXTRACTORS))
def test_a_foreign_file_is_named_with_what_is_wrong(tmp_path, name):
    """Every network's reader, on a whole file of each kind that holds none."""
    extractor = registry.get(name)
    for kind, data in _WHOLE.items():
        path = tmp_path / f"{kind}.bin"
        path.write_bytes(data(tmp_path))
        with pytest.raises(ValueError, match=r"\.bin") as error:
            registry.load_variables(extractor, path)
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 2000
