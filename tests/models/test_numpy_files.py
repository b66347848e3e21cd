"""Pickles of arrays as data: what is read, what is refused, and that nothing runs."""

import pickle
import tracemalloc

import lz4.frame
import numpy as np
import pytest

from afr_jax.models import lpips, mtcnn
from afr_jax.models.weights import numpy_files, torch_files
from tests import torch_writer as torch

_ARRAYS = {
    "net": {
        "kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "bias": np.linspace(0, 1, 5),
    },
    "scale": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
}


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_nested_arrays_are_read(tmp_path, protocol, module):
    path = tmp_path / "net.ckpt"
    data = pickle.dumps(_ARRAYS, protocol)
    if protocol < 4:  # Later protocols write the length of a name before it.
        data = data.replace(b"numpy._core.multiarray", module)
    path.write_bytes(data)
    found = numpy_files.read_arrays(path)
    assert list(found) == ["net/kernel", "net/bias", "scale"]
    np.testing.assert_array_equal(found["net/kernel"], _ARRAYS["net"]["kernel"])
    np.testing.assert_array_equal(found["net/bias"], _ARRAYS["net"]["bias"])
    np.testing.assert_array_equal(found["scale"], _ARRAYS["scale"])
    assert found["scale"].dtype == np.float16


def _levels(count: int) -> dict:
    value: object = np.zeros(3, np.float32)
    for _ in range(count):
        value = dict.fromkeys("abcdefghij", value)
    assert isinstance(value, dict)
    return value


class _Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    "value, match",
    [
        ({}, "neither"),
        (np.zeros(3, np.float32), None),
        ([np.zeros(3, np.float32)], "neither"),
        ({"a": 1.0}, "neither"),
        ({1: np.zeros(3, np.float32)}, "type int is no name"),
        ({"a": np.zeros(3, object)}, "without a type or values"),
        ({"a": np.zeros(3, ">f4")}, "no little-endian"),
        ({"a": np.zeros(3, np.int32)}, "no little-endian"),
        ({"a": np.array(["text"])}, "no little-endian"),
        ({"a": np.zeros(3, [("x", "f4")])}, "no little-endian"),
        (_levels(5), "more than 10000"),
        (_levels(9), "neither"),
        ({"a": np.datetime64("2020-01-01")}, "does not need"),
    ],
)
def test_other_contents_are_refused(tmp_path, value, match):
    path = tmp_path / "net.ckpt"
    path.write_bytes(pickle.dumps(value, 3))
    if match is None:
        assert list(numpy_files.read_arrays(path)) == [""]
        return
    with pytest.raises(ValueError, match=rf"net.ckpt.*{match}"):
        numpy_files.read_arrays(path)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_nothing_runs(tmp_path, protocol):
    path, marker = tmp_path / "net.ckpt", tmp_path / "marker"
    for function, arguments in ((open, (str(marker), "w")), (exec, (f"open({str(marker)!r})",))):
        path.write_bytes(pickle.dumps({"a": _Call(function, *arguments)}, protocol))
        with pytest.raises(ValueError, match="does not need"):
            numpy_files.read_arrays(path)
    assert not marker.exists()


def test_a_file_of_lpips_with_parts_lost_is_refused(tmp_path):
    data, path = lpips.find_weights().read_bytes(), tmp_path / "alexnet.ckpt"
    for end in (0, 1, 40, 200, 5_000, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"alexnet.ckpt"):
            lpips.read_weights(path)
    path.write_bytes(data.replace(b"Conv_4", b"Conv_5"))
    with pytest.raises(ValueError, match="missing"):
        lpips.read_weights(path)
    path.write_bytes(data.replace(b"K\x0bK\x0bK\x03K@t", b"K\x0bK\x0bK\x04K@t"))
    with pytest.raises(ValueError, match="not as many values"):
        lpips.read_weights(path)


def _mtcnn(path, data):
    for name in ("pnet", "rnet", "onet"):
        (path.parent / f"{name}.lz4").write_bytes(lz4.frame.compress(data))
    mtcnn.read_weights(path.parent)


def _torch(path, data):
    path.write_bytes(torch.archive(data, {}))
    torch_files.read_state_dict(path)


def _numpy(path, data):
    path.write_bytes(data)
    numpy_files.read_arrays(path)


@pytest.mark.parametrize("read", [_mtcnn, _torch, _numpy])
@pytest.mark.parametrize(
    "code, num_digits",
    [
        # The object of a large number: room for all before it.
        (b"}" + pickle.LONG_BINPUT, 4),
        # What has a length that the file has not.
        *((code, 8) for code in (pickle.BYTEARRAY8, pickle.BINBYTES8, pickle.BINUNICODE8)),
        *((code, 4) for code in (pickle.BINBYTES, pickle.BINUNICODE, pickle.BINSTRING)),
        (pickle.LONG4, 4),
        (pickle.FRAME, 8),
    ],
)
def test_a_few_bytes_do_not_fill_the_memory(tmp_path, read, code, num_digits):
    data = b"\x80\x05" + code + (600_000_000).to_bytes(num_digits, "little") + b"."
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=str(tmp_path)):
            read(tmp_path / "net", data)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_tuples_within_tuples_are_not_written_out(tmp_path):
    """As text they are many thousand times longer than the file."""
    endless = b")" + 20 * (pickle.DUP + pickle.TUPLE2)
    storage = b"(" + torch.text("storage") + torch.name("torch", "FloatStorage")
    storage += endless + torch.text("cpu") + torch.integer(1) + b"tQ"
    tracemalloc.start()
    try:
        for read, data, match in (
            (_torch, storage, "neither text nor a number"),
            (_torch, torch.dictionary({endless: b"N"}), "type tuple"),
            (_numpy, torch.dictionary({endless: b"N"}), "type tuple"),
        ):
            with pytest.raises(ValueError, match=match):
                read(tmp_path / "net", b"\x80\x02" + data + b".")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
