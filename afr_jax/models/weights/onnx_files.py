"""Weights in ONNX files, read without `onnx` and without executing anything.

An ONNX file is one protobuf message: a graph of nodes and the arrays that they use (initializers).
Of all its fields a dozen matter here, and reading protobuf takes a page, so that is done here: a
dependency of 20 MB would know the format better, but would still leave the checks to us that a
foreign file needs (sizes against contents, arrays in other files). Every length is checked before
it is used, and no array is larger than its bytes in the file allow.

Weights that are stored as small integers (`DequantizeLinear`, in blocks or not) come as the real
numbers that the network works with.
"""

import math
import os
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from afr_jax.core import files
from afr_jax.models.weights import checks

# Wire types of protobuf: integer, 8 bytes, length and bytes, 4 bytes.
_INTEGER, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
_MAX_AXES = 16
_QUANTIZED = "_quantized"
# Type of an array's values (`TensorProto.DataType`) -> NumPy's type, and the field that holds the
# values where they are not raw.
_FLOATS, _INT32S, _INT64S, _DOUBLES = 4, 5, 7, 10
_TYPES: dict[int, tuple[np.dtype, int]] = {
    1: (np.dtype("<f4"), _FLOATS),
    2: (np.dtype("u1"), _INT32S),
    3: (np.dtype("i1"), _INT32S),
    6: (np.dtype("<i4"), _INT32S),
    7: (np.dtype("<i8"), _INT64S),
    # Stored as the integers of its bits.
    10: (np.dtype("<f2"), _INT32S),
    11: (np.dtype("<f8"), _DOUBLES),
}

_Fields = dict[int, list[int | memoryview]]


class Node(NamedTuple):
    """One operation of a graph.

    Attributes:
        operator: its name, "Conv" and the like.
        inputs: names of arrays and of results of other nodes.
        outputs: names of its results.
        settings: its attributes that are numbers or lists of integers.
    """

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: Mapping[str, int | float | tuple[int, ...]]


class Graph(NamedTuple):
    """A network.

    Attributes:
        nodes: in the order of the file, which is one that they can be run in; without those that
            only turn stored weights into real ones.
        arrays: by name.
    """

    nodes: tuple[Node, ...]
    arrays: dict[str, np.ndarray]


def is_onnx(head: bytes) -> bool:
    """Whether a file with these first bytes is an ONNX model: a version, then a field of a model.

    ONNX has no magic number; writers put the fields in the order of their numbers.
    """
    fields = (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)
    return len(head) > 2 and head[0] == 0x08 and 0 < head[1] < 64 and head[2] in fields


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an ONNX file by name; see `read_graph`."""
    return read_graph(path).arrays


def read_graph(path: str | os.PathLike[str]) -> Graph:
    """The nodes and arrays of an ONNX file.

    Args:
        path: the file. Weights that it stores as integers are taken to the real numbers that its
            `DequantizeLinear` (and `Reshape`) makes of them; where the integers are called
            "NAME_quantized", the array is NAME, else as the result of that node.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no ONNX model, or keeps arrays in other files or in types
            that no network here has.
    """
    data = pathlib.Path(path).read_bytes()
    try:
        return _graph(memoryview(data))
    # Damage can surface as nearly any error.
    except Exception as error:
        raise checks.unreadable(path, "ONNX file", error) from error


def _graph(data: memoryview) -> Graph:
    model = _fields(data)
    # Version of the format, graph, version of the operators.
    if not all(number in model for number in (1, 7, 8)) or len(model[7]) != 1:
        raise ValueError("it is truncated, or holds no model")
    fields = _fields(_bytes(model[7][0]))
    nodes = [_node(_bytes(value)) for value in fields.get(1, [])]
    arrays: dict[str, np.ndarray] = {}
    for value in fields.get(5, []):
        name, array = _array(_bytes(value))
        if not name or name in arrays:
            raise ValueError(f"there are two arrays {name!r}, or one has no name")
        arrays[name] = array
    return _dequantized(nodes, arrays, len(data))


def _dequantized(nodes: list[Node], arrays: dict[str, np.ndarray], file_bytes: int) -> Graph:
    """The graph with real weights in the place of integers and of the nodes that convert them."""
    left, used, names = [], set(), {}
    real_bytes = 0
    for node in nodes:
        inputs = tuple(names.get(name, name) for name in node.inputs)
        node = node._replace(inputs=inputs)
        if not inputs or inputs[0] not in arrays or not 2 <= len(inputs) <= 3:
            left.append(node)
        elif node.operator == "DequantizeLinear":
            operands = [arrays[name] for name in inputs]
            name = node.outputs[0]
            if inputs[0].endswith(_QUANTIZED):
                name = inputs[0].removesuffix(_QUANTIZED)
            if name in arrays:
                raise ValueError(f"there are two arrays {name!r}")
            # Any number of nodes may convert the same integers.
            real_bytes += operands[0].size * np.dtype(np.float32).itemsize
            files.check_expansion(real_bytes, file_bytes)
            arrays[name] = _dequantize(*operands, settings=node.settings)
            names[node.outputs[0]] = name
            used.update(inputs)
        elif node.operator == "Reshape" and inputs[0] in names.values():
            shape = arrays[inputs[1]]
            if shape.dtype != np.int64 or shape.ndim != 1 or np.any(shape < 0):
                raise ValueError(f"{inputs[0]} has an impossible shape")
            arrays[inputs[0]] = arrays[inputs[0]].reshape(shape)
            names[node.outputs[0]] = inputs[0]
            used.add(inputs[1])
        else:
            left.append(node)
    return Graph(tuple(left), {name: arrays[name] for name in arrays if name not in used})


def _dequantize(
    values: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None = None,
    *,
    settings: Mapping[str, int | float | tuple[int, ...]],
) -> np.ndarray:
    """(values - zeros) * scales, as ONNX's `DequantizeLinear`.

    One scale and zero serves the whole array, one index of an axis, or a block of indices of it.
    """
    if values.dtype.kind not in "iu" or scales.dtype.kind != "f" or not values.size:
        raise ValueError("weights are quantized to other than integers")
    if zeros is None:
        zeros = np.zeros(scales.shape, values.dtype)
    if zeros.shape != scales.shape or zeros.dtype != values.dtype:
        raise ValueError("the zero points of weights do not fit their scales")
    if scales.size != 1:
        axis, block = settings.get("axis", 1), settings.get("block_size", 0)
        if not isinstance(axis, int) or not isinstance(block, int):
            raise ValueError("weights are quantized along an axis that is no number")
        axis += values.ndim if axis < 0 else 0
        if not 0 <= axis < values.ndim or block < 0:
            raise ValueError("weights are quantized along an axis that they do not have")
        count = values.shape[axis]
        before, behind = values.shape[:axis], values.shape[axis + 1 :]
        expected = (*before, -(-count // block), *behind) if block else (count,)
        if scales.shape != expected:
            raise ValueError("the scales of weights do not fit their number")
        if block:
            index = np.arange(count) // block
            scales, zeros = scales.take(index, axis), zeros.take(index, axis)
        else:
            shape = (count, *(1 for _ in behind))
            scales, zeros = scales.reshape(shape), zeros.reshape(shape)
    else:
        scales, zeros = scales.reshape(()), zeros.reshape(())
    real = values.astype(np.int32) - zeros.astype(np.int32)
    return real.astype(np.float32) * scales.astype(np.float32)


def _node(data: memoryview) -> Node:
    fields = _fields(data)
    settings: dict[str, int | float | tuple[int, ...]] = {}
    for value in fields.get(5, []):
        attribute = _fields(_bytes(value))
        name = _text(attribute, 1)
        if 2 in attribute:
            (settings[name],) = struct.unpack("<f", _bytes(attribute[2][-1]))
        elif 3 in attribute:
            settings[name] = _integers(attribute[3])[-1]
        elif 8 in attribute:
            settings[name] = tuple(_integers(attribute[8]))
    inputs, outputs = (
        tuple(bytes(_bytes(name)).decode() for name in fields.get(number, [])) for number in (1, 2)
    )
    return Node(_text(fields, 4), inputs, outputs, settings)


def _array(data: memoryview) -> tuple[str, np.ndarray]:
    """Name and values of a `TensorProto`."""
    fields = _fields(data)
    name = _text(fields, 8)
    # Names of other files, and that the values lie there; parts of an array are long gone.
    if 13 in fields or 3 in fields or any(_integers(fields.get(14, []))):
        raise ValueError(f"the values of {name!r} lie in another file")
    shape = tuple(_integers(fields.get(1, [])))
    if len(shape) > _MAX_AXES or any(side < 0 for side in shape):
        raise ValueError(f"{name!r} has an impossible shape")
    kinds = _integers(fields.get(2, []))
    if len(kinds) != 1 or kinds[0] not in _TYPES:
        raise ValueError(f"{name!r} is of a type that no network here has")
    dtype, typed = _TYPES[kinds[0]]
    if 9 in fields:
        (raw,) = fields[9]
        raw = _bytes(raw)
    elif typed in (_FLOATS, _DOUBLES):
        raw = memoryview(b"".join(map(_bytes, fields.get(typed, []))))
    else:
        integers = _packed(fields.get(typed, []))
        bits = np.dtype("<u2") if dtype.kind == "f" else dtype
        limits = np.iinfo(bits)
        if integers.size and not limits.min <= integers.min() <= integers.max() <= limits.max:
            raise ValueError(f"{name!r} holds values that its type cannot hold")
        raw = memoryview(integers.astype(bits).tobytes())
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has not as many values as its shape says")
    return name, np.array(np.frombuffer(raw, dtype).reshape(shape))


def _fields(data: memoryview) -> _Fields:
    """The fields of a message by number, each with its values in order."""
    found: _Fields = {}
    for number, value in _walk(data):
        found.setdefault(number, []).append(value)
    return found


def _walk(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if not number:
            raise ValueError(f"no field begins before byte {at}")
        if wire == _INTEGER:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_EIGHT, _FOUR):
            size = 8 if wire == _EIGHT else 4
        else:
            raise ValueError(f"no field begins before byte {at}")
        if size > len(data) - at:
            raise ValueError("a part is longer than the file: it is truncated")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, low ones first, and the place behind it."""
    value = 0
    for index in range(10):
        if at + index >= len(data):
            raise ValueError("it ends within a number: it is truncated")
        byte = data[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError("a number has too many digits")


def _integers(values: list[int | memoryview]) -> list[int]:
    """Signed integers, whether each is a field of its own or many are packed into one."""
    return _packed(values).tolist()


def _packed(values: list[int | memoryview]) -> np.ndarray:
    """The same as an array of int64."""
    parts = []
    for value in values:
        if isinstance(value, int):
            parts.append(np.array([value & (1 << 64) - 1], np.uint64))
        elif len(value):
            parts.append(_varints(np.frombuffer(value, np.uint8)))
    return np.concatenate([np.zeros(0, np.uint64), *parts]).view(np.int64)


def _varints(digits: np.ndarray) -> np.ndarray:
    """Integers `[N]` uint64 of the bytes `[M]` that `_varint` reads one by one."""
    ends = np.flatnonzero(digits < 0x80)
    lengths = np.diff(ends, prepend=-1)
    if digits[-1] >= 0x80 or lengths.max() > 10:
        raise ValueError("a list of numbers ends within one, or one has too many digits")
    starts = ends - lengths + 1
    places = np.arange(digits.size) - np.repeat(starts, lengths)
    shifted = (digits & 0x7F).astype(np.uint64) << (7 * places).astype(np.uint64)
    return np.bitwise_or.reduceat(shifted, starts)


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a part should be")
    return value


def _text(fields: _Fields, number: int) -> str:
    values = fields.get(number, [])
    return bytes(_bytes(values[-1])).decode() if values else ""
