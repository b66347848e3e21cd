"""TensorFlow Lite files for tests, without operations: good ones, and some nobody would write."""

import pathlib
from collections.abc import Sequence

import flatbuffers
import numpy as np
import tflite

TYPES = {"float32": 0, "float16": 1, "int32": 2, "uint8": 3, "int64": 4, "int8": 9}


def _vector(builder, start_fn, places):
    start_fn(builder, len(places))
    for place in reversed(places):
        builder.PrependUOffsetTRelative(place)
    return builder.EndVector()


def write(
    path: pathlib.Path,
    tensors: Sequence[tuple[str, tuple[int, ...], int, bytes | int | None]],
    *,
    num_graphs: int = 1,
) -> pathlib.Path:
    """Writes a network without operations; tensors are (name, shape, type, data).

    Data are bytes, None, or the number of the array that they are shared with.
    """
    builder = flatbuffers.Builder(1024)
    buffers, tables = [], []
    for index, (name, shape, kind, data) in enumerate(tensors):
        name = builder.CreateString(name)
        place = data if isinstance(data, int) else index
        data = None if place != index or data is None else builder.CreateByteVector(data)
        shape = builder.CreateNumpyVector(np.array(shape, np.int32))
        tflite.BufferStart(builder)
        if data is not None:
            tflite.BufferAddData(builder, data)
        buffers.append(tflite.BufferEnd(builder))
        tflite.TensorStart(builder)
        tflite.TensorAddName(builder, name)
        tflite.TensorAddShape(builder, shape)
        tflite.TensorAddType(builder, kind)
        tflite.TensorAddBuffer(builder, place)
        tables.append(tflite.TensorEnd(builder))
    tables = _vector(builder, tflite.SubGraphStartTensorsVector, tables)
    tflite.SubGraphStart(builder)
    tflite.SubGraphAddTensors(builder, tables)
    graph = tflite.SubGraphEnd(builder)
    graphs = _vector(builder, tflite.ModelStartSubgraphsVector, [graph] * num_graphs)
    buffers = _vector(builder, tflite.ModelStartBuffersVector, buffers)
    tflite.ModelStart(builder)
    tflite.ModelAddVersion(builder, 3)
    tflite.ModelAddSubgraphs(builder, graphs)
    tflite.ModelAddBuffers(builder, buffers)
    builder.Finish(tflite.ModelEnd(builder), b"TFL3")
    path.write_bytes(builder.Output())
    return path


def tensor(name: str, array: np.ndarray) -> tuple[str, tuple[int, ...], int, bytes]:
    """An array as `write` takes it."""
    return name, array.shape, TYPES[array.dtype.name], array.tobytes()
