"""Files as torch saves them, written without torch, opcode by opcode: good ones and others."""

import io
import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np

_KINDS = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
}


def text(value: str) -> bytes:
    """A string."""
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def integer(value: int) -> bytes:
    """A number of 32 bits."""
    return b"J" + value.to_bytes(4, "little", signed=True)


def integers(values: tuple[int, ...]) -> bytes:
    """A tuple of numbers."""
    return b"(" + b"".join(map(integer, values)) + b"t"


def name(module: str, attribute: str) -> bytes:
    """A class or function, by its name."""
    return f"c{module}\n{attribute}\n".encode()


def dictionary(items: Mapping[bytes, bytes]) -> bytes:
    """A dictionary, from keys and values that are written already."""
    return b"}(" + b"".join(key + value for key, value in items.items()) + b"u"


def tensor(
    key: str,
    shape: tuple[int, ...],
    *,
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
    size: int | None = None,
    kind: str = "FloatStorage",
) -> bytes:
    """The description of an array whose values are in the file `data/KEY`."""
    if strides is None:
        strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    size = int(np.prod(shape)) if size is None else size
    storage = b"(" + text("storage") + name("torch", kind)
    storage += text(key) + text("cpu") + integer(size) + b"tQ"
    call = name("torch._utils", "_rebuild_tensor_v2") + b"("
    return call + storage + integer(offset) + integers(shape) + integers(strides) + b"\x89}tR"


def index(value: bytes) -> bytes:
    """A whole pickle."""
    return b"\x80\x02" + value + b"."


def archive(pickled: bytes, values: Mapping[str, bytes]) -> bytes:
    """The bytes of a file: an index, and the values by their keys."""
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as file:
        file.writestr("x/data.pkl", pickled)
        for key, data in values.items():
            file.writestr(f"x/data/{key}", data)
    return result.getvalue()


def write_state_dict(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], *, checkpoint: bool = False
) -> pathlib.Path:
    """Writes arrays as a state dict.

    Args:
        path: the file.
        arrays: by name.
        checkpoint: whether the state dict lies in a training checkpoint, among names of classes of
            the training program.

    Returns:
        The path.
    """
    arrays = {each: np.ascontiguousarray(array) for each, array in arrays.items()}
    keys = {each: str(number) for number, each in enumerate(arrays)}
    value = dictionary(
        {
            text(each): tensor(keys[each], array.shape, kind=_KINDS[array.dtype.name])
            for each, array in arrays.items()
        }
    )
    if checkpoint:
        callback = name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
        made = name("argparse", "Namespace") + b")R" + dictionary({text("lr"): integer(1)}) + b"b"
        value = dictionary(
            {
                text("epoch"): integer(3),
                text("callbacks"): dictionary({callback: dictionary({text("mode"): text("max")})}),
                text("state_dict"): value,
                text("hyper_parameters"): made,
            }
        )
    values = {keys[each]: array.tobytes() for each, array in arrays.items()}
    path.write_bytes(archive(index(value), values))
    return path
