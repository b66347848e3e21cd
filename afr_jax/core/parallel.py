"""The single door to meshes and device placement: data parallelism over one axis, "data".

Per-image functions are written for one image and run over a batch by `data_parallel`, which adds
vmap, jit and shardings. Functions with shared state (a training step, one patch for all images)
need only a plain `jax.jit`: place the batch with `shard_batch` and the state with `replicate`, and
the compiler reduces gradients over the devices by itself.

With several processes each passes its own rows; the mesh spans the devices of all of them.
"""

import concurrent.futures
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import chex
import jax
import numpy as np

AXIS = "data"
Mesh = jax.sharding.Mesh
NamedSharding = jax.sharding.NamedSharding
PartitionSpec = jax.sharding.PartitionSpec


def make_mesh(*, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of one axis, "data".

    The axis is of type Auto: `jax.make_mesh` would make it Explicit, under which gathers by label,
    `segment_sum` and gradients of replicated parameters raise.

    Args:
      devices: in mesh order; None for all devices of all processes.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def pad_batch(tree: Any, multiple: int) -> tuple[Any, np.ndarray]:
    """Repeats the last row until the number of rows is a multiple.

    Args:
      tree: leaves [B, ...] with B >= 1; numpy arrays stay numpy, typed keys are fine.
      multiple: at least 1; usually the number of devices.

    Returns:
      The tree with leaves [C, ...], C the next multiple of `multiple`, and a mask [C] bool that is
      True for the B rows of the input.
    """
    count = _num_rows(tree)
    if count == 0 or multiple < 1:
        raise ValueError(f"cannot pad {count} rows to a multiple of {multiple}")
    padded_count = -(-count // multiple) * multiple
    rows = np.minimum(np.arange(padded_count), count - 1)
    mask = np.arange(padded_count) < count
    if padded_count == count:
        return tree, mask
    return jax.tree.map(lambda leaf: leaf[rows], tree), mask


def shard_batch(tree: Any, mesh: Mesh) -> Any:
    """Places a batch on the mesh, its rows split over the devices.

    Args:
      tree: leaves [B, ...], with B divisible by the number of devices; with several processes the
        rows of this process, as many in each, divisible by its own number of devices.
      mesh: from `make_mesh`.

    Returns:
      The tree with global arrays as leaves, [B * processes, ...].
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Places a whole copy on every device; with several processes the values must be equal."""
    return jax.device_put(tree, replicated(mesh))


def overlapped(fn: Callable[[Any], Any], items: Iterable[Any], *, width: int = 2) -> list[Any]:
    """Maps a function of host work and small programs over items, a few at a time, in threads.

    Args:
      fn: of one item; thread-safe.
      items: in order.
      width: how many at a time.

    Returns:
      The results, in the order of the items; the first exception is raised.
    """
    with concurrent.futures.ThreadPoolExecutor(width) as pool:
        return list(pool.map(fn, items))


def local_rows(tree: Any) -> Any:
    """Returns this process's rows of what `shard_batch` or a sharded function returned.

    Args:
      tree: leaves [B, ...], split over "data".

    Returns:
      The same tree with one process; else numpy leaves, [B / processes, ...].
    """
    if jax.process_count() == 1:
        return tree

    def rows(leaf: jax.Array) -> np.ndarray:
        shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards])

    return jax.tree.map(rows, tree)


def data_parallel(
    fn: Callable[..., Any],
    mesh: Mesh,
    *,
    in_axes: Sequence[Literal[0] | None],
    backend: Literal["jit", "pmap"] = "jit",
) -> Callable[..., Any]:
    """Turns a function of one image into one of a batch that is split over the devices.

    The result does not depend on the number of devices if every image brings its own key. Call this
    once and keep the result: each call compiles anew, and so does each new padded batch size.

    Args:
      fn: for one image; positional arguments, any pytrees in and out.
      mesh: from `make_mesh`.
      in_axes: for each argument 0 (leaves [B, ...], one row an image) or None (the same for all
        images: parameters). Arguments that stay the same are best placed once with `replicate`.
      backend: "jit" (with shardings) or "pmap", which gives the same values and is slower to call.

    Returns:
      A function of the batched arguments, with leaves [B, ...] for any B >= 1, that returns leaves
      [B, ...]. With several processes B counts the rows of this process, and must be equal in all.
    """
    in_axes = tuple(in_axes)
    if 0 not in in_axes or set(in_axes) - {0, None}:
        raise ValueError(f"in_axes is {in_axes}, but must be of 0 and None, with one 0 at least")
    runner = {"jit": _jit_runner, "pmap": _pmap_runner}[backend](fn, mesh, in_axes)
    num_local = len(mesh.local_devices)

    def run(*arguments: Any) -> Any:
        if len(arguments) != len(in_axes):
            raise TypeError(f"got {len(arguments)} arguments, but in_axes has {len(in_axes)}")
        batched = [item for item, axis in zip(arguments, in_axes, strict=True) if axis == 0]
        count = _num_rows(batched)
        padded, _ = pad_batch(batched, num_local)
        rows = iter(padded)
        arguments = tuple(
            argument if axis is None else next(rows)
            for argument, axis in zip(arguments, in_axes, strict=True)
        )
        outputs = runner(*arguments)
        if count % num_local == 0:
            return outputs
        return jax.tree.map(lambda leaf: leaf[:count], outputs)

    return run


def _jit_runner(
    fn: Callable[..., Any], mesh: Mesh, in_axes: tuple[int | None, ...]
) -> Callable[..., Any]:
    batch_fn = jax.jit(jax.vmap(fn, in_axes=in_axes), out_shardings=batch_sharding(mesh))

    def run(*arguments: Any) -> Any:
        placed = [
            replicate(argument, mesh) if axis is None else shard_batch(argument, mesh)
            for argument, axis in zip(arguments, in_axes, strict=True)
        ]
        return local_rows(batch_fn(*placed))

    return run


def _pmap_runner(
    fn: Callable[..., Any], mesh: Mesh, in_axes: tuple[int | None, ...]
) -> Callable[..., Any]:
    num_local = len(mesh.local_devices)
    batch_fn = jax.pmap(
        jax.vmap(fn, in_axes=in_axes), in_axes=in_axes, devices=list(mesh.devices.flat)
    )

    def split(leaf: Any) -> Any:
        return leaf.reshape(num_local, leaf.shape[0] // num_local, *leaf.shape[1:])

    def join(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])

    def run(*arguments: Any) -> Any:
        placed = [
            argument if axis is None else jax.tree.map(split, argument)
            for argument, axis in zip(arguments, in_axes, strict=True)
        ]
        return jax.tree.map(join, batch_fn(*placed))

    return run


def _num_rows(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise ValueError("a batch without arrays")
    chex.assert_equal_shape_prefix(leaves, 1)
    return leaves[0].shape[0]
