"""State dicts that torch saved, read without torch and without executing anything.

Both of torch's formats are pickles beside raw arrays: since 1.6 a zip archive, before one file of
five pickles and the arrays behind them. Unpickling may call any function that a file names; here it
may name only what a state dict needs (ordered dictionaries and the rebuilding of arrays, which are
functions of this module), and everything else is an error.
"""

import collections
import io
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

# The first pickle of a file in the format before 1.6.
_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": jnp.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


def is_legacy(head: bytes) -> bool:
    """Whether a file with these first bytes is in torch's format before 1.6."""
    return head[2:].startswith(pickle.dumps(_MAGIC, 2)[2:])


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a state dict by name.

    Args:
        path: a file of `torch.save`, in either format. A state dict under the key "state_dict" or
            "model" is found; "module." in front of all names is dropped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, names anything but arrays, or holds no state dict.
    """
    data = pathlib.Path(path).read_bytes()
    try:
        value = _read_legacy(data) if is_legacy(data[:64]) else _read_zip(data)
        return _state_dict(value)
    # Damage can surface as nearly any error, also from within the unpickler.
    except Exception as error:
        raise ValueError(f"{path} is not a readable torch state dict: {error}") from error


class _Storage(NamedTuple):
    """Values of an array before it has a shape; in the old format they are read at the end."""

    dtype: np.dtype
    size: int
    load_fn: Callable[[], bytes]


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        numbers = (self.offset, *self.shape, *self.strides)
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("an array has an impossible shape")
        if len(self.shape) != len(self.strides):
            raise ValueError("an array has an impossible shape")
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if math.prod(self.shape) and last >= self.storage.size:
            raise ValueError("an array reaches past the end of its values")
        values = np.frombuffer(self.storage.load_fn(), self.storage.dtype)
        if values.size != self.storage.size:
            raise ValueError("values are missing: the file is truncated")
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.storage.dtype)
        strides = [step * values.itemsize for step in self.strides]
        view = np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides)
        return np.array(view)


def _rebuild_tensor(storage, offset, shape, strides, *_) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError("an array without values")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor, *_) -> _Tensor:
    return tensor


class _Unpickler(pickle.Unpickler):
    """Admits the names that a state dict needs: nothing foreign can run."""

    _NAMES: ClassVar = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    }

    def __init__(self, stream: io.BytesIO, find_storage: Callable[..., _Storage]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._find_storage = find_storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) not in self._NAMES:
            raise ValueError(f"it refers to {module}.{name}, which a state dict does not need")
        return self._NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size, *_ = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or type(size) is not int:
            raise ValueError("it refers to something that is no array")
        return self._find_storage(dtype, str(key), size)


def _read_zip(data: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = index.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("its arrays are big-endian")

        def find_storage(dtype: np.dtype, key: str, size: int) -> _Storage:
            name = f"{folder}data/{key}"
            # Torch does not compress: a small file cannot stand for a huge array.
            if archive.getinfo(name).file_size != size * dtype.itemsize:
                raise ValueError(f"{name} has not the size that the index says")
            if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed")
            return _Storage(dtype, size, lambda: archive.read(name))

        return _arrays(_Unpickler(io.BytesIO(archive.read(index)), find_storage).load())


def _read_legacy(data: bytes) -> Any:
    stream = io.BytesIO(data)
    storages: dict[str, _Storage] = {}
    offsets: dict[str, int] = {}

    def find_storage(dtype: np.dtype, key: str, size: int) -> _Storage:
        def load() -> bytes:
            return data[offsets[key] : offsets[key] + size * dtype.itemsize]

        return storages.setdefault(key, _Storage(dtype, size, load))

    def load() -> Any:
        return _Unpickler(stream, find_storage).load()

    magic, protocol, system = load(), load(), load()
    if magic != _MAGIC or protocol != _LEGACY_PROTOCOL or not system.get("little_endian"):
        raise ValueError("it is of an unknown version, or big-endian")
    value, keys = load(), load()
    for key in keys:
        size = int.from_bytes(stream.read(8), "little")
        if size != storages[key].size:
            raise ValueError("an array has not the size that the index says")
        offsets[key] = stream.tell()
        stream.seek(size * storages[key].dtype.itemsize, io.SEEK_CUR)
    return _arrays(value)


def _arrays(value: Any) -> Any:
    """Arrays in the place of their descriptions, at any depth of dictionaries."""
    if isinstance(value, dict):
        return {name: _arrays(item) for name, item in value.items()}
    return value.array() if isinstance(value, _Tensor) else value


def _state_dict(value: Any) -> dict[str, np.ndarray]:
    for key in ("state_dict", "model"):
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not value:
        raise ValueError("it holds no state dict")
    for name, array in value.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise ValueError(f"{name!r} is no array")
    prefix = "module."
    if all(name.startswith(prefix) for name in value):
        return {name.removeprefix(prefix): array for name, array in value.items()}
    return value
