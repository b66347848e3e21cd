"""What XLA says of the programs that some work compiles, and what the device could do at best."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp

from afr_jax.benchmark import timing

_COMPILED = "/jax/core/compile/backend_compile_duration"
# Sides of the matrices, and numbers of the copied array: past all caches.
_MATRIX = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
_COPIED = 1 << 26
_seconds: list[float] = []


class CompiledProgram(NamedTuple):
    """A compiled program, by XLA's own count.

    Attributes:
        name: of the function it was made of.
        flops: of one call, where a loop counts as one pass through it.
        bytes_accessed: read and written by its operations in one call, from whatever memory.
        memory_bytes: of its arguments, results and temporary arrays.
    """

    name: str
    flops: float
    bytes_accessed: float
    memory_bytes: int


class Compilation(NamedTuple):
    """What the first run of some work compiled, the largest program first, and in which time."""

    programs: list[CompiledProgram]
    seconds: float


class Peak(NamedTuple):
    """The most that was measured of a device in a second: arithmetic, and bytes moved."""

    flops: float
    bytes_moved: float


def first_run(work_fn: Callable[[], object]) -> Compilation:
    """Runs some work without the programs that this process has compiled before.

    A cache of compiled programs on the disk still makes it faster, unless
    JAX_ENABLE_COMPILATION_CACHE=false keeps it out.
    """
    if not _seconds:
        jax.monitoring.register_event_duration_secs_listener(_note)
        _seconds.append(0.0)
    jax.clear_caches()
    client = jax.local_devices()[0].client
    known = {program.fingerprint for program in client.live_executables()}
    before = sum(_seconds)
    work_fn()
    programs = []
    for program in client.live_executables():
        if program.fingerprint not in known:
            counted = program.cost_analysis()
            counted = counted[0] if isinstance(counted, list) else counted
            memory = program.get_compiled_memory_stats()
            programs.append(
                CompiledProgram(
                    program.hlo_modules()[0].name.removeprefix("jit_"),
                    counted.get("flops", 0.0),
                    counted.get("bytes accessed", 0.0),
                    memory.argument_size_in_bytes
                    + memory.output_size_in_bytes
                    - memory.alias_size_in_bytes
                    + memory.temp_size_in_bytes,
                )
            )
    programs.sort(key=lambda program: program.flops, reverse=True)
    return Compilation(programs, sum(_seconds) - before)


def peak_sides() -> dict[str, Callable[[], object]]:
    """Work at the device's limit, for `timing.by_both_clocks`: a float32 product, and a copy."""
    side = _MATRIX.get(jax.default_backend(), 8192)
    matrix = jnp.ones((side, side), jnp.float32)
    copied = jnp.ones(_COPIED, jnp.float32)
    multiply, add = jax.jit(jnp.matmul), jax.jit(lambda array: array + 1)
    return {
        "matmul": lambda: jax.block_until_ready(multiply(matrix, matrix)),
        "copy": lambda: jax.block_until_ready(add(copied)),
    }


def peak(taken: dict[str, list[timing.Took]], *, clock: str) -> Peak:
    """The peak by what `peak_sides` took, the best of each.

    Args:
        taken: by side.
        clock: "wall" or "processor".
    """
    side = _MATRIX.get(jax.default_backend(), 8192)
    best = {name: min(getattr(took, clock) for took in taken[name]) for name in ("matmul", "copy")}
    return Peak(2 * side**3 / best["matmul"], 2 * 4 * _COPIED / best["copy"])


def _note(event: str, duration_secs: float, **_: str | int | float) -> None:
    if event == _COMPILED:
        _seconds.append(duration_secs)
