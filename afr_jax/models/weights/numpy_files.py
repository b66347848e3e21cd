"""Pickled dictionaries of NumPy arrays, nested, read without executing anything.

What a pickle of arrays needs (the making of an array, its type) is part of this module; NumPy's own
functions are never called, and a file that names anything else is refused.
"""

import io
import math
import os
import pathlib
from typing import ClassVar

import numpy as np

from afr_jax.models.weights import checks

_MOST_AXES = 16
# More than any network that is read here has; a dictionary may be referred to again and again.
_MOST_LEVELS, _MOST_ARRAYS = 8, 10_000


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a file, by their keys joined by slashes.

    Args:
        path: a pickle (protocol 3 or 4) of a dictionary whose values are arrays of real numbers or
            such dictionaries, as of the parameters of a Flax module.

    Returns:
        The arrays, which may be views of each other and cannot be written to.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds anything else.
    """
    data = pathlib.Path(path).read_bytes()
    try:
        found: dict[str, np.ndarray] = {}
        _flatten(_Unpickler(io.BytesIO(data)).load(), (), found)
        return found
    # Damage can surface as nearly any error, also from within the unpickler.
    except Exception as error:
        raise checks.unreadable(path, "pickle of arrays", error) from error


def _flatten(value: object, keys: tuple[str, ...], found: dict[str, np.ndarray]) -> None:
    if isinstance(value, _Array):
        found["/".join(keys)] = value.read()
        if len(found) > _MOST_ARRAYS:
            raise ValueError(f"it holds more than {_MOST_ARRAYS} arrays")
        return
    if not isinstance(value, dict) or not value or len(keys) == _MOST_LEVELS:
        raise ValueError(f"{'/'.join(keys)[:80]!r} is neither an array nor a dictionary of such")
    for key, item in value.items():
        if not isinstance(key, str):
            raise ValueError(f"a key of type {type(key).__name__} is no name")
        _flatten(item, (*keys, key), found)


class _Array:
    """What a file says of an array."""

    __slots__ = ("state",)

    def __setstate__(self, state: object) -> None:
        self.state = state

    def read(self) -> np.ndarray:
        if not isinstance(self.state, tuple):
            raise ValueError("an array without values")
        _, shape, dtype, is_fortran, data = self.state
        if not isinstance(dtype, _Type) or not isinstance(data, bytes):
            raise ValueError("an array without a type or values")
        if not isinstance(shape, tuple) or len(shape) > _MOST_AXES:
            raise ValueError("an array has an impossible shape")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("an array has an impossible shape")
        kind = dtype.read()
        if len(data) != math.prod(shape) * kind.itemsize:
            raise ValueError("an array has not as many values as its shape says")
        return np.frombuffer(data, kind).reshape(shape, order="F" if is_fortran else "C")


class _Type:
    """What a file says of the type of an array's values."""

    __slots__ = ("code", "state")

    def __init__(self, code: object) -> None:
        self.code = code
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def read(self) -> np.dtype:
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "|"
        if self.code not in ("f2", "f4", "f8") or order != "<":
            raise ValueError("an array holds no little-endian real numbers")
        return np.dtype(f"<{self.code}")


class _Make:
    """Stands for NumPy's function; an object without attributes, so that no file can change it."""

    __slots__ = ()

    def __call__(self, *_: object) -> _Array:
        return _Array()


class _MakeType:
    """As `_Make`, for the type of values."""

    __slots__ = ()

    def __call__(self, code: object, *_: object) -> _Type:
        return _Type(code)


class _Class:
    """Stands for NumPy's array, which the function is told to make."""

    __slots__ = ()


class _Unpickler(checks.Unpickler):
    """Knows the names that a pickle of arrays needs: nothing foreign can run."""

    # NumPy 2 calls its module by another name.
    _NAMES: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _Make(),
        ("numpy._core.multiarray", "_reconstruct"): _Make(),
        ("numpy", "ndarray"): _Class(),
        ("numpy", "dtype"): _MakeType(),
    }

    def find_class(self, module: str, name: str) -> object:
        known = self._NAMES.get((module, name))
        return super().find_class(module, name) if known is None else known
