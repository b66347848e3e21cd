"""The single door to meshes and device placement: data parallelism over one axis, "data".

Row-wise functions (an image in, a result out) run over any number of rows by `map_batches`, which
adds batches, padding, vmap, jit and shardings (or `pmap`). Functions with shared state (a training
step, one patch for all images) need only a plain `jax.jit`: place the batch with `shard_batch` and
the state with `replicate`, and the compiler reduces gradients over the devices by itself.

With several processes the mesh spans the devices of all of them. `shard_batch` takes the rows of
each process, `spread` and `map_batches` take all rows in every process. In `distributed.alone` a
mesh is of the process's own devices.
"""

import collections
import concurrent.futures
import functools
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast, overload

import chex
import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import distributed, interrupts
from afr_jax.core.runtime import profiling

# Any nest of containers with arrays as leaves (a pytree); type checkers cannot say more of it.
PyTree = Any
# An array of the host or of a device.
AnyArray = jax.Array | np.ndarray
Tree = TypeVar("Tree")
Item = TypeVar("Item")
Result = TypeVar("Result")
Backend = Literal["jit", "pmap"]
AXIS = "data"
Mesh = jax.sharding.Mesh
NamedSharding = jax.sharding.NamedSharding
PartitionSpec = jax.sharding.PartitionSpec


def make_mesh(*, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of one axis, "data".

    The axis is of type Auto: `jax.make_mesh` would make it Explicit, under which gathers by label,
    `segment_sum` and gradients of replicated parameters raise.

    Args:
      devices: in mesh order; None for all devices of the processes that work together.
    """
    devices = distributed.own_devices() if devices is None else devices
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def pad_batch(tree: Tree, multiple: int) -> tuple[Tree, np.ndarray]:
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


@overload
def shard_batch(tree: AnyArray, mesh: Mesh) -> jax.Array: ...
@overload
def shard_batch(tree: Tree, mesh: Mesh) -> Tree: ...
def shard_batch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Places a batch on the mesh, its rows split over the devices.

    Args:
      tree: leaves [B, ...], with B divisible by the number of devices; with several processes the
        rows of this process, as many in each, divisible by its own number of devices.
      mesh: from `make_mesh`.

    Returns:
      The tree with global arrays as leaves, [B * processes, ...].
    """
    sharding = batch_sharding(mesh)
    if not mesh.is_multi_process:
        return jax.device_put(tree, sharding)
    return _place(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree
    )


@overload
def spread(tree: AnyArray, mesh: Mesh) -> jax.Array: ...
@overload
def spread(tree: Tree, mesh: Mesh) -> Tree: ...
def spread(tree: PyTree, mesh: Mesh) -> PyTree:
    """Places a batch on the mesh, its rows split over the devices.

    Args:
      tree: leaves [B, ...], with B divisible by the number of devices, the same in all processes.
      mesh: from `make_mesh`.

    Returns:
      The tree with global arrays as leaves, [B, ...].
    """
    return shard_batch(_own_rows(tree, mesh), mesh)


@overload
def replicate(tree: AnyArray, mesh: Mesh) -> jax.Array: ...
@overload
def replicate(tree: Tree, mesh: Mesh) -> Tree: ...
def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Places a whole copy on every device; with several processes the values must be equal."""
    sharding = replicated(mesh)
    if not mesh.is_multi_process:
        return jax.device_put(tree, sharding)

    def place(leaf: AnyArray) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)

    return _place(place, tree)


def _place(place_fn: Callable[[AnyArray], jax.Array], tree: PyTree) -> PyTree:
    """Maps a function over the leaves; of typed keys over their data, which NumPy knows."""

    def place(leaf: AnyArray) -> jax.Array:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = place_fn(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return place_fn(leaf)

    return jax.tree.map(place, tree)


def place(tree: Tree, *, beside: jax.Array | None = None) -> Tree:
    """Places arrays on the default device, without a program for each shape as `jnp.asarray` has.

    Args:
      tree: arrays of any kind.
      beside: an array whose devices they get instead, leading axes split likewise. Arrays that lie
        elsewhere than those of another call make another compiled program.
    """
    return jax.device_put(tree, None if beside is None else beside.sharding)


def thread_map(
    fn: Callable[[Item], Result], items: Iterable[Item], *, width: int = 2
) -> list[Result]:
    """Maps a function of host work and small programs over items, a few at a time, in threads.

    Args:
      fn: of one item; thread-safe.
      items: in order.
      width: how many at a time.

    Returns:
      The results, in the order of the items; the first exception is raised.
    """
    return list(thread_stream(fn, items, width=width))


def thread_stream(
    fn: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    width: int = 2,
    weight_fn: Callable[[Item], int] | None = None,
    limit: int = 0,
) -> Iterator[Result]:
    """`thread_map`, result by result: few items are begun whose results were not taken yet.

    Args:
        fn: as of `thread_map`.
        items: in order; taken when their turn comes.
        width: how many at a time; as many again may be done and waiting.
        weight_fn: what an item weighs, such as the pixels of a photo.
        limit: of the weight of all that is begun and not taken; a heavier item is begun alone.

    Yields:
        The results, in the order of the items; an exception ends it.
    """
    begun: collections.deque[tuple[concurrent.futures.Future[Result], int]] = collections.deque()
    held = 0

    def checked(item: Item) -> Result:
        interrupts.check()
        profiling.begin_step()
        return fn(item)

    with concurrent.futures.ThreadPoolExecutor(width) as pool:
        try:
            for item in items:
                weight = 0 if weight_fn is None else weight_fn(item)
                while len(begun) >= 2 * width or (begun and weight and held + weight > limit):
                    future, taken = begun.popleft()
                    held -= taken
                    yield future.result()
                begun.append((pool.submit(checked, item), weight))
                held += weight
            while begun:
                yield begun.popleft()[0].result()
        finally:
            for future, _ in begun:
                future.cancel()


def local_rows(tree: Tree) -> Tree:
    """Returns this process's rows of what `shard_batch` or a sharded function returned.

    Args:
      tree: leaves [B, ...], split over "data".

    Returns:
      The same tree with one process; else numpy leaves, [B / processes, ...].
    """

    def rows(leaf: jax.Array) -> jax.Array | np.ndarray:
        if leaf.is_fully_addressable:
            return leaf
        shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards])

    return jax.tree.map(rows, tree)


def map_batches(
    fn: Callable[..., PyTree],
    mesh: Mesh,
    *,
    in_axes: Sequence[Literal[0] | None],
    batch_size: int | Sequence[int],
    of: Literal["image", "batch"] = "image",
    backend: Backend | Literal["host"] = "jit",
    static: Mapping[str, Hashable] | None = None,
) -> Callable[..., PyTree]:
    """Maps a function over any number of rows, in batches that are split over the devices.

    Rows must not influence each other, and what is random must have a key for each row: then the
    result depends neither on the batches nor on the number of devices. The last batch is filled up
    with repetitions of its last row, whose results are cut off.

    Compiled programs are kept by function, mesh and options, so that a second `map_batches` of the
    same does not compile again. Therefore `fn` should be a function of a module: a new lambda is a
    new program.

    Args:
      fn: The function; positional arguments, any trees in and out.
      mesh: The devices, from `make_mesh`.
      in_axes: For each argument 0 (leaves [N, ...], a row each) or None (the same for all rows:
        parameters, options that are arrays). Arguments that stay the same over several calls are
        best placed once, with `replicate`.
      batch_size: The rows of one call, over all devices; it is cut to N and filled up to a multiple
        of the devices. A tuple of rising sizes has the bucket sizes of a batch: batches have the
        largest one, and the last has the smallest that holds what is left.
      of: Whether `fn` takes one row ("image"), and is vmapped, or a whole batch ("batch"), leaves
        [B, ...] to leaves [B, ...].
      backend: "jit" (with shardings) or "pmap", which gives the same values and is slower to call.
        With "host", `fn` of a batch is called as it is, without a program around it, for functions
        that drive programs of their own: it gets the rows of a batch where they are, their number a
        multiple of the devices, and places them itself.
      static: Arguments that `fn` takes by name, hashable, constants of the compiled program.

    Returns:
      A function of the arguments, for any N >= 1, that returns NumPy leaves [N, ...]. With several
      processes each passes the same N rows, and gets the results of all of them.

    Raises:
      ValueError: `in_axes` has no 0, or `batch_size` does not rise from 1 on, or a single image is
        asked for from the host.
    """
    in_axes = tuple(in_axes)
    if 0 not in in_axes or set(in_axes) - {0, None}:
        raise ValueError(f"in_axes is {in_axes}, but must be of 0 and None, with one 0 at least")
    is_cut = isinstance(batch_size, int)
    sizes = (batch_size,) if is_cut else tuple(batch_size)
    if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"batch_size is {batch_size}, but must be at least 1, or several, rising")
    if backend == "host" and of == "image":
        raise ValueError("a function that is called from the host takes a batch, not an image")
    named = tuple(sorted((static or {}).items()))
    runner = _RUNNERS[backend](_Mapped(fn, mesh, in_axes, of, named))

    def run(*arguments: PyTree) -> PyTree:
        if len(arguments) != len(in_axes):
            raise TypeError(f"got {len(arguments)} arguments, but in_axes has {len(in_axes)}")
        arguments = tuple(
            replicate(argument, mesh) if axis is None and backend == "jit" else argument
            for argument, axis in zip(arguments, in_axes, strict=True)
        )
        batched = [item for item, axis in zip(arguments, in_axes, strict=True) if axis == 0]
        parts: list[PyTree] = []
        waiting: tuple[PyTree, int] | None = None
        count = _num_rows(batched)
        if count < 1:
            raise ValueError("no rows to map over")
        used = (min(*sizes, count),) if is_cut else sizes
        for begin, end, size in _cut(count, used, mesh.devices.size):
            interrupts.check()
            profiling.begin_step()
            part = jax.tree.map(operator.itemgetter(slice(begin, end)), batched)
            padded, _ = pad_batch(part, size)
            rows = iter(padded)
            outputs = runner(
                *(
                    argument if axis is None else next(rows)
                    for argument, axis in zip(arguments, in_axes, strict=True)
                )
            )
            # One batch is under way while the results of the one before are fetched.
            if waiting is not None:
                parts.append(_fetch(*waiting))
            waiting = outputs, end - begin
        if waiting is not None:
            parts.append(_fetch(*waiting))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    return run


def _cut(count: int, sizes: tuple[int, ...], num_devices: int) -> Iterator[tuple[int, int, int]]:
    """First row, end and padded size of each batch of `count` rows."""
    for begin in range(0, count, sizes[-1]):
        end = min(begin + sizes[-1], count)
        size = next(size for size in sizes if size >= end - begin)
        yield begin, end, -(-size // num_devices) * num_devices


def _fetch(outputs: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[:count], fetch(outputs))


def fetch(tree: PyTree) -> PyTree:
    """Whole arrays as NumPy has them; with several processes all of them call it together.

    Args:
      tree: leaves of any placement.
    """

    def whole(leaf: AnyArray) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            mesh = cast(NamedSharding, leaf.sharding).mesh
            leaf = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(leaf)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


class _Mapped(NamedTuple):
    """What a compiled program depends on, hashable."""

    fn: Callable[..., PyTree]
    mesh: Mesh
    in_axes: tuple[Literal[0] | None, ...]
    of: str
    static: tuple[tuple[str, Hashable], ...]

    def batch_fn(self) -> Callable[..., PyTree]:
        named = functools.partial(self.fn, **dict(self.static))
        return jax.vmap(named, in_axes=self.in_axes) if self.of == "image" else named


# Few are in use at a time, and each may hold what its function closes over.
@functools.lru_cache(maxsize=32)
def _jit_runner(mapped: _Mapped) -> Callable[..., PyTree]:
    mesh = mapped.mesh
    # What lies on devices of other processes would be fetched in a second program.
    results = replicated(mesh) if mesh.is_multi_process else batch_sharding(mesh)
    batch_fn = jax.jit(mapped.batch_fn(), out_shardings=results)

    def run(*arguments: PyTree) -> PyTree:
        return batch_fn(
            *(
                replicate(argument, mesh) if axis is None else spread(argument, mesh)
                for argument, axis in zip(arguments, mapped.in_axes, strict=True)
            )
        )

    return run


@functools.lru_cache(maxsize=32)
def _pmap_runner(mapped: _Mapped) -> Callable[..., PyTree]:
    mesh, in_axes, batch_fn = mapped.mesh, mapped.in_axes, mapped.batch_fn()
    num_local = len(mesh.local_devices)

    def gathered(*arguments: PyTree) -> PyTree:
        outputs = batch_fn(*arguments)
        return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, AXIS, tiled=True), outputs)

    run_all = jax.pmap(
        gathered, AXIS, in_axes=in_axes, out_axes=None, devices=list(mesh.devices.flat)
    )

    def split(leaf: AnyArray) -> AnyArray:
        return leaf.reshape(num_local, leaf.shape[0] // num_local, *leaf.shape[1:])

    def run(*arguments: PyTree) -> PyTree:
        return run_all(
            *(
                argument if axis is None else jax.tree.map(split, _own_rows(argument, mesh))
                for argument, axis in zip(arguments, in_axes, strict=True)
            )
        )

    return run


def _host_runner(mapped: _Mapped) -> Callable[..., PyTree]:
    return mapped.batch_fn()


_RUNNERS = {"jit": _jit_runner, "pmap": _pmap_runner, "host": _host_runner}


def _own_rows(tree: Tree, mesh: Mesh) -> Tree:
    """The rows of a batch that belong on the devices of this process."""
    if not mesh.is_multi_process:
        return tree
    owners = [device.process_index for device in mesh.devices.flat]
    owner_of_row = np.repeat(owners, _num_rows(tree) // len(owners))
    own = np.flatnonzero(owner_of_row == jax.process_index())
    return jax.tree.map(lambda leaf: leaf[own], tree)


def _num_rows(tree: PyTree) -> int:
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise ValueError("a batch without arrays")
    chex.assert_equal_shape_prefix(leaves, 1)
    return leaves[0].shape[0]
