"""From the arrays of a weight file to the variables of a module, name for name, shape for shape.

Our own weight files are safetensors whose names are the paths of the variables.

How foreign files are read as arrays is in `formats.py` and the modules that it calls; which array
goes where is in the module of each network.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from afr_jax.core import files
from afr_jax.models.weights import formats

# Arrays that a message names of each kind.
_MOST_NAMED = 6
# Keras's names of the arrays of a BatchNorm.
_KERAS_NORM_LEAVES = {
    "scale": "gamma",
    "bias": "beta",
    "mean": "moving_mean",
    "var": "moving_variance",
}
_TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "slope": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# Axes of a torch kernel in the order of ours: OIHW to HWIO, [out, in] to [in, out].
_TORCH_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}


class Entry(NamedTuple):
    """Where a variable lies in a file.

    Attributes:
        name: of the array.
        shape: of the array.
        convert: takes the array to the variable.
    """

    name: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray]


# Of a linen module: {"params": ..., "batch_stats": ...}, nested, of arrays or of their shapes.
Variables = Mapping[str, Any]
EntryFn = Callable[[tuple[str, ...], tuple[int, ...]], Entry | float]


def shapes(module: nn.Module, input_px: int) -> Variables:
    """The variables of a module as `jax.ShapeDtypeStruct`, for chips of side `input_px`."""
    return _shapes(module, input_px)  # pyrefly: ignore[bad-argument-type]  Modules are hashable.


@functools.cache
def _shapes(module: nn.Module, input_px: int) -> Variables:
    chips = jax.ShapeDtypeStruct((1, input_px, input_px, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))  # A real one takes programs of its own.
    return jax.eval_shape(module.init, key, chips)


def plain_entry(name: str, shape: tuple[int, ...]) -> Entry:
    """An array that is stored as it is used."""
    return Entry(name, shape, lambda array: array)


def keras_leaf(leaf: str, is_norm: bool) -> str:
    """Keras's name of an array of a layer, from ours; `is_norm` for the arrays of a BatchNorm."""
    return _KERAS_NORM_LEAVES[leaf] if is_norm else leaf


def torch_entry(scope: str, leaf: str, shape: tuple[int, ...]) -> Entry:
    """The array of a torch layer.

    Args:
        scope: name of the layer in the state dict.
        leaf: our name of its array: kernel, bias, scale, mean, var or slope.
        shape: of our array.

    Returns:
        The entry; kernels are transposed.
    """
    name = f"{scope}.{_TORCH_LEAVES[leaf]}"
    axes = _TORCH_AXES.get(len(shape))
    if axes is None:
        return plain_entry(name, shape)
    stored = tuple(shape[axis] for axis in np.argsort(axes))
    return Entry(name, stored, lambda array: array.transpose(axes))


def flattened_entry(name: str, shape: tuple[int, ...], channels: int) -> Entry:
    """The matrix behind a flattened square map: channels, rows, columns there, here channels last.

    Args:
        name: of the array, `[out, channels * rows * columns]`.
        shape: of ours, `[rows * columns * channels, out]`.
        channels: of the map.

    Returns:
        The entry; the matrix is transposed and its inputs are reordered.
    """
    count, outputs = shape
    side = math.isqrt(count // channels)
    blocks = (outputs, channels, side, side)
    return Entry(
        name,
        (outputs, count),
        lambda array: array.reshape(blocks).transpose(2, 3, 1, 0).reshape(shape),
    )


def is_torch_counter(name: str) -> bool:
    """Whether an array of a state dict only counts the batches that a BatchNorm has seen."""
    return name.endswith(".num_batches_tracked")


def fill(
    path: str | os.PathLike[str],
    variable_shapes: Variables,
    arrays: Mapping[str, np.ndarray],
    entry_fn: EntryFn,
    *,
    ignore_fn: Callable[[str], bool] = lambda name: False,
) -> Variables:
    """The variables of a module from the arrays of a file.

    Args:
        path: of the file, for messages.
        variable_shapes: what the module needs, see `shapes`.
        arrays: of the file, by name.
        entry_fn: says, for the path and the shape of a variable, where it lies in the file; or the
            value of a variable that such files do not have.
        ignore_fn: whether an array that nothing needs may be in the file.

    Returns:
        The variables, float32.

    Raises:
        ValueError: names or shapes differ; the message counts the missing, extra and misshapen
            arrays and names the first of each.
    """
    variables, missing, misshapen, used = {}, [], [], set()
    needed: Any = flax.traverse_util.flatten_dict(dict(variable_shapes))
    for leaf, expected in needed.items():
        entry = entry_fn(leaf, expected.shape)
        if not isinstance(entry, Entry):
            variables[leaf] = np.full(expected.shape, entry, np.float32)
            continue
        used.add(entry.name)
        array = arrays.get(entry.name)
        if array is None:
            missing.append(entry.name)
        elif array.shape != entry.shape:
            misshapen.append(f"{entry.name} {list(array.shape)}, not {list(entry.shape)}")
        else:
            # The small float types of accelerators have kind V.
            if array.dtype.kind not in "fV":
                raise ValueError(f"{path}: {entry.name} holds {array.dtype}, not real numbers")
            converted = entry.convert(array.astype(np.float32))
            variables[leaf] = np.ascontiguousarray(converted).reshape(expected.shape)
    extra = [name for name in arrays if name not in used and not ignore_fn(name)]
    problems = (("missing", missing), ("extra", extra), ("misshapen", misshapen))
    found = [f"{len(names)} {kind} ({_first(names)})" for kind, names in problems if names]
    if found:
        reason = files.printable("; ".join(found))
        raise ValueError(f"{files.printable(path)} does not hold this network's arrays: {reason}")
    return flax.traverse_util.unflatten_dict(variables)


def _first(names: Sequence[str]) -> str:
    """The first few of some names."""
    shown = ", ".join(name[:120] for name in names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown}, ..."


def fingerprint(variables: Variables) -> str:
    """Hex SHA-256 over names, shapes, dtypes and values of all arrays, in the order of names."""
    digest = hashlib.sha256()
    for name, array in sorted(_flat(variables).items()):
        header = json.dumps([name, array.shape, array.dtype.name])
        digest.update(header.encode() + b"\0")
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write_safetensors(
    path: str | os.PathLike[str],
    variables: Variables,
    *,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes variables atomically, with a checksum; the name of an array is its path with slashes.

    Args:
        path: the file.
        variables: nested mapping of arrays.
        dtype: "float16" halves the file; None keeps what the arrays have.
        metadata: text that the file carries.

    Returns:
        The checksum.

    Raises:
        ValueError: a value does not fit into `dtype`.
    """
    flat = {}
    for name, array in _flat(variables).items():
        stored = np.ascontiguousarray(array)
        if dtype is not None and array.dtype.kind == "f":
            with np.errstate(over="ignore"):
                stored = stored.astype(dtype)
            if not np.array_equal(np.isfinite(stored), np.isfinite(array)):
                raise ValueError(f"{name} holds values that do not fit into {dtype}")
        flat[name] = stored
    checksum = files.digest_of(flat)
    known = {**(metadata or {}), formats.CHECKSUM: checksum}
    files.write_atomically(path, safetensors.numpy.save(flat, metadata=known), overwrite=True)
    return checksum


def read_safetensors(
    path: str | os.PathLike[str], variable_shapes: Variables, *, checksum: str | None = None
) -> Variables:
    """Reads what `write_safetensors` wrote.

    Args:
        path: the file.
        variable_shapes: what the module needs, see `shapes`.
        checksum: that it must have; None for any.

    Returns:
        The variables, float32 whatever the file holds.

    Raises:
        ValueError: the file is damaged or another one, or names or shapes differ.
    """
    arrays = formats.read_safetensors(path, checksum=checksum)
    return fill(
        path, variable_shapes, arrays, lambda leaf, shape: plain_entry("/".join(leaf), shape)
    )


def is_own(path: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file names its arrays as we do, not as torch does.

    Raises:
        ValueError: the file is damaged.
    """
    return any("/" in name for name in formats.read_safetensors(path))


def _flat(variables: Variables) -> dict[str, np.ndarray]:
    flat = flax.traverse_util.flatten_dict(dict(variables))
    return {"/".join(path): np.asarray(array) for path, array in flat.items()}
