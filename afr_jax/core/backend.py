"""What is set of XLA and the process: compiler options, memory, compiled programs, fusion."""

import contextlib
import ctypes
import functools
import os
import pathlib
import platform
import resource
import tempfile
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import jaxlib
from absl import logging

# XLA stops the process at an option that it does not know: only where it was tried.
_YNNPACK_OPTION = "--xla_cpu_experimental_ynn_fusion_type"
_YNNPACK_VERSIONS = ("0.10.",)
_Tree = TypeVar("_Tree")
_CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
# What a program takes before its first photo, what one takes for each pixel of a photo at its peak
# (decoding, detection, encoding), and the share of the memory that photos may take.
_PROGRAM_BYTES, _PIXEL_BYTES, _PHOTO_SHARE = 3 << 30, 20, 0.5
_FEWEST_PIXELS, _MOST_PIXELS = 8_000_000, 100_000_000
# glibc's mallopt: one arena, no maps of single blocks, nothing given back, 256 MiB at a time.
_MALLOPT = {-8: 1, -4: 0, -1: 2**31 - 1, -2: 256 << 20}


def choose_compiler_options() -> None:
    """Switches YNNPACK off in XLA for CPUs, unless `XLA_FLAGS` says something about it.

    jaxlib 0.10 hands convolutions to YNNPACK, which takes 1.2 to 2.2 times as long as XLA's own way
    for the face extractors here. Call it before JAX makes its first array: later it has no effect.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if jaxlib.__version__.startswith(_YNNPACK_VERSIONS) and _YNNPACK_OPTION not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_YNNPACK_OPTION}=".strip()


def keep_freed_memory() -> None:
    """Lets the process keep memory that it frees, where its C library is glibc.

    XLA for CPUs allocates the working memory of every call anew. Given back to the system each time
    and cleared by it again, it cost a seventh of a cloak's step (tried once: two cores, two nets).
    The price is that the process stays as large as it ever was, until `give_back_memory`.
    """
    if platform.libc_ver()[0] == "glibc":
        for parameter, value in _MALLOPT.items():
            ctypes.CDLL(None).mallopt(parameter, value)


def give_back_memory() -> None:
    """Gives the system what is free now; for after a photo that took much more than others do."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def enable_compilation_cache() -> pathlib.Path | None:
    """Lets compiled programs persist between processes.

    The folder is `JAX_COMPILATION_CACHE_DIR` if set, else `afr_jax/xla` in `XDG_CACHE_HOME` or
    `~/.cache`. An unusable folder only costs the cache; a bucket (gs://...) is left to JAX.

    Returns:
      The local folder in use, or None.
    """
    configured = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009  # JAX does not type it.
    if configured and "://" in configured:
        return None
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    try:
        folder = pathlib.Path(configured or os.path.join(cache_home, "afr_jax", "xla")).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:
        logging.info("no compilation cache: %s", error)
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


def memory_bytes() -> int:
    """Memory this process may have: the machine's, its container's, or what `ulimit -v` says."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit.
            found.append(int(pathlib.Path("/sys/fs/cgroup", name).read_text()))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min([*found, soft] if soft != resource.RLIM_INFINITY else found)


def most_pixels() -> int:
    """Width times height of the largest photo that is decoded.

    By default what half of the machine's memory holds at the peak of a program's work, from 8 to
    100 megapixels: an allocation that fails inside of XLA would not come back as an error.
    """
    return _limit[0] if _limit else _pixels_that_fit()


def limit_pixels(megapixels: float | None) -> None:
    """Sets `most_pixels` for this process; None for the default."""
    _limit[:] = [] if megapixels is None else [round(megapixels * 1e6)]


_limit: list[int] = []


@functools.cache
def _pixels_that_fit() -> int:
    pixels = int((memory_bytes() - _PROGRAM_BYTES) * _PHOTO_SHARE / _PIXEL_BYTES)
    return min(max(pixels, _FEWEST_PIXELS), _MOST_PIXELS)


def apart(fn: Callable[..., _Tree], *arrays: jax.Array) -> _Tree:
    """`fn(*arrays)`, fused on CPU with nothing that makes the arrays or reads the result.

    XLA:CPU fuses cheap operations into those that read them, once for each reader, in the order in
    which that one goes through memory. That saves a pass over memory, and costs many where each
    number is read several times (taps of a window) or across the rows (a transposition).

    It becomes a branch that is always taken, which XLA does not know: it does not look into
    branches. Elsewhere, and for values, this is `fn(*arrays)`.

    Args:
        fn: traced; convolutions in it would be slow, as XLA prepares them outside of branches only.
        arrays: its arguments.
    """
    if jax.default_backend() != "cpu":
        return fn(*arrays)
    fn = jax.jit(fn)  # Traced once, for its shapes and as a branch.
    shapes = jax.eval_shape(fn, *arrays)

    def nothing(*_: jax.Array) -> _Tree:
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    return jax.lax.cond(jax.lax.optimization_barrier(jnp.array(True)), fn, nothing, *arrays)


def settle(values: _Tree) -> _Tree:
    """Values that on CPU are worked out once, however many operations read them.

    XLA:CPU would work out anew for each reader whatever it can fuse into it.
    """
    return jax.lax.optimization_barrier(values) if jax.default_backend() == "cpu" else values


def plane_sums(planes: jax.Array) -> jax.Array:
    """Sums of planes `[..., H, W]`, `[...]`.

    On CPU XLA adds the numbers of a row one after the other, each waiting for the sum so far. Here
    rows are added up first, next to one another, which takes a third to a half of the time.
    """
    return jnp.sum(settle(jnp.sum(planes, -2)), -1)


def sums(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Sums of two float32 arrays `[..., C]` or more over all axes but the last, `[C]` each.

    On CPU XLA sums one such array up many times slower than it reads it, and several of one shape
    in one reduction at that pace.
    """
    axes = tuple(range(arrays[0].ndim - 1))
    if jax.default_backend() != "cpu":
        return tuple(jnp.sum(array, axes) for array in arrays)
    # Rows first: each is summed up where it lies, and rows go to all cores.
    for some in (axes[-1:], axes[:-1]):
        arrays = jax.lax.reduce(
            arrays,
            (jnp.float32(0),) * len(arrays),
            lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
            some,
        )
    return arrays
