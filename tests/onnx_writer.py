"""ONNX files for tests, written field by field: good ones, and ones that no library would write.

A message is a list of (number of the field, value): an integer, bytes, text, or another such list.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10, "float64": 11}


def varint(value: int) -> bytes:
    """A number as protobuf writes it, negative ones as unsigned 64 bits."""
    value &= (1 << 64) - 1
    digits = []
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def message(fields: Sequence[tuple]) -> bytes:
    """A message."""
    result = b""
    for number, value in fields:
        if isinstance(value, int):
            result += varint(number << 3) + varint(value)
            continue
        if isinstance(value, list):
            value = message(value)
        value = value.encode() if isinstance(value, str) else value
        result += varint(number << 3 | 2) + varint(len(value)) + value
    return result


def tensor(name: str, array: np.ndarray) -> list[tuple]:
    """An array with raw values."""
    array = np.asarray(array)
    shape = [(1, side) for side in array.shape]
    return [*shape, (2, TYPES[array.dtype.name]), (8, name), (9, array.tobytes())]


def node(
    operator: str, inputs: Sequence[str], outputs: Sequence[str], **settings: int | float | list
) -> list[tuple]:
    """An operation; its settings are integers, numbers or lists of integers."""
    attributes = []
    for name, value in settings.items():
        if isinstance(value, int):
            attributes.append((5, [(1, name), (3, value), (20, 2)]))
        elif isinstance(value, list):
            attributes.append((5, [(1, name), *((8, each) for each in value), (20, 7)]))
        else:
            number = varint(2 << 3 | 5) + np.float32(value).tobytes()
            attributes.append((5, message([(1, name)]) + number + message([(20, 1)])))
    names = [(1, each) for each in inputs] + [(2, each) for each in outputs]
    return [*names, (4, operator), *attributes]


def graph(
    nodes: Sequence[list], tensors: Sequence[list], *, given: str = "x", result: str = "y"
) -> list[tuple]:
    """A graph of images `[1, 3, 112, 112]`."""

    def value(name, sides):
        shape = [(1, [(1, side)]) for side in sides]
        return [(1, name), (2, [(1, [(1, 1), (2, shape)])])]

    return [
        *((1, each) for each in nodes),
        (2, "test"),
        *((5, each) for each in tensors),
        (11, value(given, (1, 3, 112, 112))),
        (12, value(result, (1, 512))),
    ]


def model(graph_fields: Sequence[tuple], *, operators: int = 21) -> bytes:
    """The bytes of a file."""
    return message([(1, 10), (2, "tests"), (7, list(graph_fields)), (8, [(1, ""), (2, operators)])])


def write(path: pathlib.Path, tensors: Sequence[list], nodes: Sequence[list] = ()) -> pathlib.Path:
    """Writes a file and returns its path."""
    path.write_bytes(model(graph(nodes, tensors)))
    return path
