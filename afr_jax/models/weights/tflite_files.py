"""Weights in TensorFlow Lite files (`.tflite`), read without TensorFlow and without executing them.

Such a file is one flatbuffer: tables that point at each other, and the values of the weights. The
package `tflite` knows the tables; it believes what they say, so the sizes are checked here.
"""

import math
import os
import pathlib
from typing import TypeVar

import numpy as np
import tflite

from afr_jax.core import files
from afr_jax.models.weights import checks

_Part = TypeVar("_Part")
# Bytes 4 to 8 of a file.
_MAGIC = b"TFL3"
_TYPES = {
    tflite.TensorType.FLOAT32: np.dtype("<f4"),
    tflite.TensorType.FLOAT16: np.dtype("<f2"),
    tflite.TensorType.INT32: np.dtype("<i4"),
    tflite.TensorType.INT64: np.dtype("<i8"),
    tflite.TensorType.INT8: np.dtype("i1"),
    tflite.TensorType.UINT8: np.dtype("u1"),
}


def is_tflite(head: bytes) -> bool:
    """Whether a file with these first bytes is a TensorFlow Lite model."""
    return head[4:8] == _MAGIC


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a TensorFlow Lite file by name.

    Args:
        path: the file. Weights that it stores as small integers come as these integers.

    Returns:
        The arrays, which may be views of each other and cannot be written to.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no TensorFlow Lite model, holds several networks, or
            arrays of types that no network here has.
    """
    data = pathlib.Path(path).read_bytes()
    try:
        return _arrays(data)
    # Damage can surface as nearly any error.
    except Exception as error:
        raise checks.unreadable(path, "TensorFlow Lite file", error) from error


def _arrays(data: bytes) -> dict[str, np.ndarray]:
    model = tflite.Model.GetRootAs(data)
    if not is_tflite(data) or model.SubgraphsLength() != 1:
        raise ValueError("it is truncated, or does not hold one network")
    graph = _there(model.Subgraphs(0))
    # Each of them is at least a place, of four bytes, in a list.
    if 4 * max(graph.TensorsLength(), model.BuffersLength()) > len(data):
        raise ValueError("a list is longer than the file: it is truncated")
    arrays: dict[str, np.ndarray] = {}
    num_bytes = 0
    for index in range(graph.TensorsLength()):
        tensor = _there(graph.Tensors(index))
        if not 0 <= tensor.Buffer() < model.BuffersLength():
            raise ValueError(f"array {index} has no place in the file")
        buffer = _there(model.Buffers(tensor.Buffer()))
        if not buffer.DataLength():  # What is only there while the network runs.
            continue
        raw, name = np.asarray(buffer.DataAsNumpy()), _there(tensor.Name()).decode()
        num_bytes += raw.nbytes + len(name)
        files.check_expansion(num_bytes, len(data))
        if not name or name in arrays:
            raise ValueError(f"there are two arrays {name!r}, or one has no name")
        arrays[name] = _array(name, tensor, raw)
    return arrays


def _there(part: _Part | None) -> _Part:
    if part is None:
        raise ValueError("a part is missing")
    return part


def _array(name: str, tensor: tflite.Tensor, raw: np.ndarray) -> np.ndarray:
    """An array of its bytes `[N]` uint8."""
    if tensor.Type() not in _TYPES:
        raise ValueError(f"{name!r} is of a type that no network here has")
    dtype = _TYPES[tensor.Type()]
    shape = tuple(np.asarray(tensor.ShapeAsNumpy()).tolist()) if tensor.ShapeLength() else ()
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != raw.size:
        raise ValueError(f"{name!r} has not as many values as its shape says")
    return raw.view(dtype).reshape(shape)
