"""State dicts that torch saved, read without torch and without executing anything.

Both of torch's formats are pickles beside raw arrays: since 1.6 a zip archive, before one file of
five pickles and the arrays behind them. Unpickling may call any function that a file names; here it
calls none. What a state dict needs (ordered dictionaries and the rebuilding of arrays) is part of
this module; everything else that a file names, as training checkpoints do, becomes an empty
placeholder that may lie beside the state dict, but not in it.
"""

import collections
import functools
import io
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from afr_jax.models.weights import checks

# The first pickle of a file in the format before 1.6.
_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_AXES = 16
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
            "model" is found, whatever a training run has noted beside it; "module." in front of all
            names is dropped.

    Returns:
        The arrays, which may be views of each other and cannot be written to.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or its state dict holds anything but arrays.
    """
    data = pathlib.Path(path).read_bytes()
    foreign: list[str] = []
    try:
        value = _read_legacy(data, foreign) if is_legacy(data[:64]) else _read_zip(data, foreign)
        return _state_dict(value)
    # Damage can surface as nearly any error, also from within the unpickler.
    except Exception as error:
        if foreign:
            more = f"it refers to {foreign[0]}, which a state dict does not need"
            error = ValueError(f"{error}; {more}")
        raise checks.unreadable(path, "torch state dict", error) from error


class _StorageType(NamedTuple):
    """A type of values, as the pickle names it; unlike a dtype, it has no state to be set."""

    dtype: np.dtype


class _Storage(NamedTuple):
    """Values of an array before it has a shape; in the old format they are read at the end."""

    dtype: np.dtype
    size: int
    load_fn: Callable[[], memoryview]


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        numbers = (self.offset, *self.shape, *self.strides)
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("an array has an impossible shape")
        if len(self.shape) != len(self.strides) or len(self.shape) > _MAX_AXES:
            raise ValueError("an array has an impossible shape")
        count = math.prod(self.shape)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if count and last >= self.storage.size:
            raise ValueError("an array reaches past the end of its values")
        # A step of zero repeats one value without end.
        if count > self.storage.size:
            raise ValueError("an array has more places than values")
        values = np.frombuffer(self.storage.load_fn(), self.storage.dtype)
        if values.size != self.storage.size:
            raise ValueError("values are missing: the file is truncated")
        if not count:
            return np.zeros(self.shape, self.storage.dtype)
        strides = [step * values.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(
            values[self.offset :], self.shape, strides, writeable=False
        )


class _RebuildTensor:
    """Stands for torch's function; an object without attributes, so that no file can change it."""

    __slots__ = ()

    def __call__(
        self,
        storage: object,
        offset: int,
        shape: Sequence[int],
        strides: Sequence[int],
        *_: object,
    ) -> _Tensor:
        if not isinstance(storage, _Storage):
            raise ValueError("an array without values")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter:
    """As `_RebuildTensor`, for what was a parameter."""

    __slots__ = ()

    def __call__(self, tensor: _Tensor, *_: object) -> _Tensor:
        return tensor


class _Foreign:
    """What a file makes of a class or function that is not looked up: nothing."""

    __slots__ = ()

    def __new__(cls, *_: object, **__: object) -> "_Foreign":
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> "_Foreign":
        return self

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        """Takes an item of a list and forgets it."""

    def extend(self, values: object) -> None:
        """Takes items of a list and forgets them."""

    def add(self, value: object) -> None:
        """Takes an item of a set and forgets it."""


class _Unpickler(checks.Unpickler):
    """Knows the names that a state dict needs: nothing foreign can run."""

    _NAMES: ClassVar = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
        ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    }

    def __init__(
        self, stream: io.BytesIO, find_storage: Callable[..., _Storage], foreign: list[str]
    ) -> None:
        super().__init__(stream, encoding="utf-8")
        self._find_storage = find_storage
        self._foreign = foreign

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        if (module, name) in self._NAMES:
            return self._NAMES[module, name]
        self._foreign.append(f"{module}.{name}")
        return type("Foreign", (_Foreign,), {"__slots__": ()})

    def persistent_load(self, pid: Any) -> _Storage:
        kind, kept, key, _, size, *_ = pid
        if kind != "storage" or not isinstance(kept, _StorageType) or type(size) is not int:
            raise ValueError("it refers to something that is no array")
        # Tuples that hold one tuple twice, and so on, are short in the file and endless as text.
        if not isinstance(key, (str, int)):
            raise ValueError("an array's values are named by neither text nor a number")
        return self._find_storage(kept.dtype, str(key), size)


def _read_zip(data: bytes, foreign: list[str]) -> Any:
    storages: dict[str, _Storage] = {}
    # Stays open: the values are read when the state dict is known.
    archive = zipfile.ZipFile(io.BytesIO(data))
    checks.check_archive(archive, len(data))
    members = {info.filename: info for info in archive.infolist()}
    indices = [name for name in members if name.endswith("/data.pkl")]
    if len(indices) != 1:
        raise ValueError(f"it has {len(indices)} indices (data.pkl), not one")
    folder = indices[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in members and archive.read(order) != b"little":
        raise ValueError("its arrays are big-endian")

    def find_storage(dtype: np.dtype, key: str, size: int) -> _Storage:
        name = f"{folder}data/{key}"
        if name in storages:
            if storages[name][:2] != (dtype, size):
                raise ValueError(f"{name} is of two types or sizes")
            return storages[name]
        if name not in members:
            raise ValueError(f"{name} is missing")
        # Torch does not compress: a small file cannot stand for a huge array.
        if members[name].file_size != size * dtype.itemsize:
            raise ValueError(f"{name} has not the size that the index says")
        if members[name].compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        load_fn = functools.cache(lambda: memoryview(archive.read(name)))
        return storages.setdefault(name, _Storage(dtype, size, load_fn))

    return _Unpickler(io.BytesIO(archive.read(indices[0])), find_storage, foreign).load()


def _read_legacy(data: bytes, foreign: list[str]) -> Any:
    stream = io.BytesIO(data)
    storages: dict[str, _Storage] = {}
    offsets: dict[str, int] = {}

    def find_storage(dtype: np.dtype, key: str, size: int) -> _Storage:
        def load_values() -> memoryview:
            return memoryview(data)[offsets[key] : offsets[key] + size * dtype.itemsize]

        return storages.setdefault(key, _Storage(dtype, size, load_values))

    def load() -> Any:
        return _Unpickler(stream, find_storage, foreign).load()

    magic, protocol, system = load(), load(), load()
    is_little = isinstance(system, dict) and system.get("little_endian")
    if magic != _MAGIC or protocol != _LEGACY_PROTOCOL or not is_little:
        raise ValueError("it is of an unknown version, or big-endian")
    value, keys = load(), load()
    for key in keys:
        size = int.from_bytes(stream.read(8), "little")
        if not isinstance(key, str) or key not in storages or size != storages[key].size:
            raise ValueError("an array has not the size that the index says")
        offsets[key] = stream.tell()
        stream.seek(size * storages[key].dtype.itemsize, io.SEEK_CUR)
    if storages.keys() - offsets.keys():
        raise ValueError("arrays are missing: the file is truncated")
    return value


def _state_dict(value: Any) -> dict[str, np.ndarray]:
    for key in ("state_dict", "model"):
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not value:
        raise ValueError("it holds no state dict")
    for name, item in value.items():
        if not isinstance(name, str):
            raise ValueError(f"a key of type {type(name).__name__} is no name of an array")
        if not isinstance(item, _Tensor):
            raise ValueError(f"{name[:80]!r} is no array")
    return without_prefix({name: item.array() for name, item in value.items()}, "module.")


def without_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays with their names shortened, if all names begin with the prefix; else as is."""
    if all(name.startswith(prefix) for name in arrays):
        return {name.removeprefix(prefix): array for name, array in arrays.items()}
    return dict(arrays)
