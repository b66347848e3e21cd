"""The reader of ONNX files: good files of all types, quantized weights, all kinds of damage."""

import numpy as np
import onnx_writer as onnx
import pytest

from afr_jax.models.extractors import sface
from afr_jax.models.weights import formats, onnx_files
from afr_jax.recognition.detectors import yunet

_RANDOM = np.random.default_rng(0)


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = _RANDOM.normal(size=shape) * 50
    return np.abs(values).astype(name) if name == "uint8" else values.astype(name)


# Whole files.


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 1), (0, 4)])
@pytest.mark.parametrize("name", list(onnx.TYPES))
def test_raw_arrays_are_read(tmp_path, name, shape):
    array = _values(name, shape)
    path = onnx.write(tmp_path / "net.bin", [onnx.tensor("a.b", array)])
    kind, arrays = formats.read_arrays(path)
    assert kind == "onnx" and list(arrays) == ["a.b"]
    assert arrays["a.b"].dtype == array.dtype
    np.testing.assert_array_equal(arrays["a.b"], array)


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("name", list(onnx.TYPES))
def test_typed_arrays_are_read(tmp_path, name, is_packed):
    array = _values(name, (2, 300))
    if name == "int64":
        array[0, :4] = [2**63 - 1, -(2**63), 0, -1]
    field = {"float32": 4, "int64": 7, "float64": 10}.get(name, 5)
    if field in (4, 10):
        pieces = [array.tobytes()] if is_packed else [each.tobytes() for each in array.ravel()]
        # One value each, in a field of four or eight bytes.
        key = onnx.varint(field << 3 | (2 if is_packed else 5 if field == 4 else 1))
        size = onnx.varint(len(pieces[0])) if is_packed else b""
        values = b"".join(key + size + piece for piece in pieces)
    else:
        numbers = array.view(np.uint16) if name == "float16" else array
        numbers = numbers.ravel().tolist()
        packed = [(field, b"".join(map(onnx.varint, numbers)))]
        values = onnx.message(packed if is_packed else [(field, each) for each in numbers])
    shape = [(1, b"\x02\xac\x02")] if is_packed else [(1, 2), (1, 300)]
    data = onnx.message([*shape, (2, onnx.TYPES[name]), (8, "a")]) + values
    path = onnx.write(tmp_path / "net.onnx", [data])
    np.testing.assert_array_equal(formats.read_arrays(path)[1]["a"], array)


def test_nodes_are_read(tmp_path):
    nodes = [
        onnx.node("Conv", ["x", "w"], ["c"], group=1, pads=[1, 1, 1, 1]),
        onnx.node("Gemm", ["c", "f", "b"], ["y"], transB=1, alpha=0.5, low=-3),
    ]
    path = onnx.write(tmp_path / "net.onnx", [onnx.tensor("w", np.zeros(2))], nodes)
    graph = onnx_files.read_graph(path)
    assert graph.nodes == (
        onnx_files.Node("Conv", ("x", "w"), ("c",), {"group": 1, "pads": (1, 1, 1, 1)}),
        onnx_files.Node("Gemm", ("c", "f", "b"), ("y",), {"transB": 1, "alpha": 0.5, "low": -3}),
    )


def test_the_files_of_the_wheel_are_read():
    kind, arrays = formats.read_arrays(sface.find_weights())
    assert kind == "onnx"
    assert arrays["conv_14_conv2d_weight"].shape == (1024, 1024, 1, 1)
    assert {array.dtype.name for array in arrays.values()} == {"float32", "int64"}
    kind, arrays = formats.read_arrays(yunet.find_weights())
    assert kind == "onnx"
    assert arrays["backbone.model0.conv2.conv1.weight"].shape == (16, 16, 1, 1)


# Quantized weights.


def _quantized(values, scales, zeros, **settings):
    tensors = [onnx.tensor("w_quantized", values), onnx.tensor("w_scales", scales)]
    names = ["w_quantized", "w_scales"]
    if zeros is not None:
        tensors.append(onnx.tensor("w_zero_point", zeros))
        names.append("w_zero_point")
    return tensors, [onnx.node("DequantizeLinear", names, ["w_dequantized"], **settings)]


@pytest.mark.parametrize(
    "shape, scale_shape, settings",
    [
        ((6, 10), (6, 3), {"axis": 1, "block_size": 4}),
        ((6, 10), (6, 1), {"axis": -1, "block_size": 10}),
        ((10, 6), (3, 6), {"axis": 0, "block_size": 4}),
        ((5,), (2,), {"axis": 0, "block_size": 3}),
        ((4, 3, 2), (3,), {}),
        ((4, 3, 2), (4,), {"axis": 0}),
        ((4, 3), (), {}),
        ((4, 3), (1,), {"axis": 0}),
        ((1, 3), (1, 1), {"axis": 1, "block_size": 3}),
    ],
)
@pytest.mark.parametrize("name", ["int8", "uint8"])
def test_quantized_weights_become_real(tmp_path, name, shape, scale_shape, settings):
    values, zeros = _values(name, shape), _values(name, scale_shape)
    scales = _RANDOM.uniform(0.1, 1, scale_shape).astype(np.float32)
    path = onnx.write(tmp_path / "net.onnx", *_quantized(values, scales, zeros, **settings))
    arrays = formats.read_arrays(path)[1]
    expected = np.zeros(shape, np.float32)
    axis, block = settings.get("axis", 1), settings.get("block_size", 0)
    for place in np.ndindex(shape):
        if len(scale_shape) == len(shape) and block:
            own = list(place)
            own[axis] = place[axis] // block
        else:
            own = [place[axis]] if scale_shape and scale_shape != (1,) else [0] * len(scale_shape)
        real = int(values[place]) - int(zeros[tuple(own)])
        expected[place] = np.float32(real) * scales[tuple(own)]
    assert list(arrays) == ["w"] and arrays["w"].dtype == np.float32
    np.testing.assert_array_equal(arrays["w"], expected)


def test_integers_that_many_nodes_convert_are_refused(tmp_path):
    values, scale = np.zeros(1 << 20, np.int8), np.ones((), np.float32)
    tensors = [onnx.tensor("q", values), onnx.tensor("s", scale)]
    nodes = [onnx.node("DequantizeLinear", ["q", "s"], [f"w{i}"]) for i in range(150)]
    path = onnx.write(tmp_path / "net.onnx", tensors, nodes)
    _assert_refused(path, "unpack to")


def test_real_weights_are_reshaped_and_used_by_name(tmp_path):
    values, scales = np.arange(6, dtype=np.int8).reshape(2, 3), np.float32([[2], [3]])
    tensors, nodes = _quantized(values, scales, None, axis=1, block_size=3)
    tensors.append(onnx.tensor("w_shape", np.array([3, 1, 2])))
    nodes.append(onnx.node("Reshape", ["w_dequantized", "w_shape"], ["w_reshaped"]))
    nodes.append(onnx.node("Conv", ["x", "w_reshaped"], ["y"]))
    graph = onnx_files.read_graph(onnx.write(tmp_path / "net.onnx", tensors, nodes))
    assert graph.nodes == (onnx_files.Node("Conv", ("x", "w"), ("y",), {}),)
    np.testing.assert_array_equal(graph.arrays["w"], [[[0, 2]], [[4, 9]], [[12, 15]]])


@pytest.mark.parametrize(
    "values, scales, zeros, settings",
    [
        ((6, 10), (6, 2), (6, 2), {"axis": 1, "block_size": 4}),
        ((6, 10), (6, 3), (6, 3), {"axis": 2, "block_size": 4}),
        ((6, 10), (6, 3), (6, 3), {"axis": -3, "block_size": 4}),
        ((6, 10), (6, 3), (6, 3), {"axis": 1, "block_size": -4}),
        ((6, 10), (6, 3), (6, 3), {"axis": 1}),
        ((6, 10), (6, 3), (3, 6), {"axis": 1, "block_size": 4}),
        ((6, 10), (9,), (9,), {"axis": 1}),
        ((0, 10**12), (0, 10**11), (0, 10**11), {"axis": 1, "block_size": 10}),
    ],
)
def test_scales_that_do_not_fit_are_refused(tmp_path, values, scales, zeros, settings):
    arrays = [_zeros(values, "int8"), _zeros(scales, "float32"), _zeros(zeros, "int8")]
    path = onnx.write(tmp_path / "net.onnx", *_quantized(*arrays, **settings))
    _assert_refused(path)


def _zeros(shape, name):
    return np.lib.stride_tricks.as_strided(np.zeros(1, name), shape, [0] * len(shape))


def test_weights_of_other_types_are_not_dequantized(tmp_path):
    scale = np.float32(1)
    for values, scales in ((scale, scale), (np.int8(1), np.int8(1))):
        path = onnx.write(tmp_path / "net.onnx", *_quantized(values, scales, None))
        _assert_refused(path)


# Damage.


def _assert_refused(path, match=None):
    with pytest.raises(ValueError, match=match) as error:
        formats.read_arrays(path)
    assert str(path) in str(error.value)


def _good() -> bytes:
    values = _values("int8", (6, 10))
    tensors, nodes = _quantized(
        values, np.ones((6, 3), np.float32), np.zeros((6, 3), np.int8), axis=1, block_size=4
    )
    tensors.append(onnx.tensor("w_shape", np.array([6, 10, 1, 1])))
    nodes.append(onnx.node("Reshape", ["w_dequantized", "w_shape"], ["w_reshaped"]))
    packed = onnx.message([(1, 3), (2, 7), (8, "n"), (7, b"".join(map(onnx.varint, (1, -1, 300))))])
    return onnx.model(onnx.graph(nodes, [*tensors, packed]))


def test_a_file_that_ends_too_early_is_refused(tmp_path):
    path, data = tmp_path / "net.onnx", _good()
    path.write_bytes(data)
    assert list(formats.read_arrays(path)[1]) == ["n", "w"]
    for size in range(len(data)):
        path.write_bytes(data[:size])
        _assert_refused(path)


def test_the_published_file_is_refused_wherever_it_ends(tmp_path):
    path, data = tmp_path / "sface.onnx", sface.find_weights().read_bytes()
    for size in (3, 100, 5000, 40_000, 10**6, len(data) // 2, len(data) - 500, len(data) - 1):
        path.write_bytes(data[:size])
        _assert_refused(path, "truncated")


def test_flipped_bits_raise_nothing_else(tmp_path):
    path, data = tmp_path / "net.onnx", bytearray(_good())
    refused = 0
    for place in range(len(data)):
        for bit in (0, 3, 7):
            data[place] ^= 1 << bit
            path.write_bytes(data)
            try:
                formats.read_arrays(path)
            except ValueError as error:
                refused += 1
                assert str(path) in str(error)
            data[place] ^= 1 << bit
    # Values, names and what is not read may change unnoticed.
    assert refused > len(data) / 2


def test_random_bytes_raise_nothing_else(tmp_path):
    path, head = tmp_path / "net.onnx", onnx.model([])[:4]
    for _ in range(300):
        path.write_bytes(head + _RANDOM.bytes(_RANDOM.integers(1, 200)))
        _assert_refused(path)


_RAW = (9, np.zeros(6, np.float32).tobytes())


@pytest.mark.parametrize(
    "fields, match",
    [
        ([(1, 2), (1, 4), (2, 1), (8, "a"), _RAW], "as many values"),
        ([(1, 7), (2, 1), (8, "a"), _RAW], "as many values"),
        ([(1, 1 << 40), (1, 1 << 40), (2, 1), (8, "a"), _RAW], "as many values"),
        ([(1, -2), (1, -3), (2, 1), (8, "a"), _RAW], "impossible shape"),
        ([(1, 6), *[(1, 1)] * 40, (2, 1), (8, "a"), _RAW], "impossible shape"),
        ([(1, 6), (8, "a"), _RAW], "a type"),
        ([(1, 6), (2, 8), (8, "a"), _RAW], "a type"),
        ([(1, 6), (2, 99), (8, "a"), _RAW], "a type"),
        ([(1, 6), (2, 1), _RAW], "no name"),
        ([(1, 6), (2, 1), (8, "a")], "as many values"),
        ([(1, 6), (2, 1), (8, "a"), (9, 5)], "number stands"),
        ([(1, 6), (2, 1), (8, "a"), (4, b"\0" * 23)], "as many values"),
        ([(1, 6), (2, 1), (8, "a"), _RAW, (13, [(1, "location"), (2, "/etc/passwd")])], "another"),
        ([(1, 6), (2, 1), (8, "a"), _RAW, (14, 1)], "another file"),
        ([(1, 1), (2, 3), (8, "a"), (5, 128)], "cannot hold"),
        ([(1, 1), (2, 2), (8, "a"), (5, -1)], "cannot hold"),
        ([(1, 1), (2, 10), (8, "a"), (5, 1 << 16)], "cannot hold"),
        ([(1, 1), (2, 7), (8, "a"), (7, b"\xff" * 11 + b"\1")], "too many digits"),
        ([(1, 1), (2, 7), (8, "a"), (7, b"\xff")], "ends within"),
        ([(1, 6), (2, 1), (8, b"\xff\xfe"), _RAW], "decode"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, fields, match):
    _assert_refused(onnx.write(tmp_path / "net.onnx", [fields]), match)


@pytest.mark.parametrize(
    "data, match",
    [
        (onnx.message([(1, 10), (2, "tests")]), "holds no model"),
        (onnx.message([(1, 10), (7, []), (7, []), (8, [])]), "holds no model"),
        (onnx.message([(1, 10), (2, "tests")]) + b"\x3b", "no field"),
        (onnx.message([(1, 10), (2, "tests")]) + b"\x02\x00", "no field"),
        (onnx.message([(1, 10), (2, "tests")]) + b"\x3a" + b"\xff" * 9 + b"\1", "longer"),
        (onnx.message([(1, 10), (2, "tests")]) + b"\x3a" + b"\xff" * 12, "too many digits"),
        (onnx.model(onnx.graph([], [onnx.tensor("a", np.zeros(1))] * 2)), "two arrays"),
        (onnx.model(onnx.graph([], [7])), "number stands"),
    ],
)
def test_wrong_models_are_refused(tmp_path, data, match):
    path = tmp_path / "net.onnx"
    path.write_bytes(data)
    _assert_refused(path, match)


@pytest.mark.parametrize("shape", [[-1, 2], [7], [[6, 1]]])
def test_impossible_reshapes_are_refused(tmp_path, shape):
    tensors, nodes = _quantized(np.ones((2, 3), np.int8), np.float32(1), None)
    tensors.append(onnx.tensor("w_shape", np.array(shape)))
    nodes.append(onnx.node("Reshape", ["w_dequantized", "w_shape"], ["w_reshaped"]))
    _assert_refused(onnx.write(tmp_path / "net.onnx", tensors, nodes))
