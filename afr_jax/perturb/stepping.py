"""The driver of long loops: chunks of steps that one compiled program takes, called from the host.

XLA runs the bodies of loops badly on CPUs (a step of a cloak takes about three times as long in a
scan as alone), while accelerators lose time with every call. So a loop of known length is cut into
chunks of `chunk_length` steps. Inside a chunk, traced, `take` takes the steps; `drive` calls the
chunks one after the other. The last chunk of a run may be shorter: the number of its steps is an
argument of the program, so that one program serves a run of any length.

A typical chunk:

    @functools.partial(jax.jit, static_argnames="length", donate_argnames="state")
    def _chunk(key, state, first, count, *, length):
        def step(state, index):
            return one_step(jax.random.fold_in(key, first + index), state)

        return stepping.take(step, state, jnp.arange(length), length=length, count=count)

    length = stepping.chunk_length()
    state, losses = stepping.drive(
        lambda state, steps: _chunk(key, state, steps.start, len(steps), length=length),
        state, steps=range(1000), length=length,
    )
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import interrupts
from afr_jax.core.parallel import PyTree
from afr_jax.core.runtime import profiling

State = TypeVar("State")


# Chunks under way at once where the devices are threads of one CPU: with many more, the threads of
# XLA wait for one another without end, and it aborts the process.
_IN_FLIGHT = 8


def chunk_length() -> int:
    """Steps of one call on this backend: 1 on CPU, where a scan is slow, else 50."""
    return 1 if jax.default_backend() == "cpu" else 50


def drive(
    chunk_fn: Callable[[State, range], tuple[State, PyTree]],
    state: State,
    *,
    steps: range,
    length: int | None = None,
    axis: int = 0,
    report_fn: Callable[[int], None] | None = None,
) -> tuple[State, PyTree]:
    """Takes the steps of a run from the host, chunk after chunk.

    Args:
        chunk_fn: Takes the state and the numbers of the steps of a chunk, at most `length` of them,
            and returns the state after them and the outputs. Outputs have the steps along `axis`;
            entries behind the last step of the chunk are cut off. A chunk of one step may return
            scalars.
        state: The state before the first step. It may be donated by `chunk_fn`.
        steps: The numbers of all steps, rising by one.
        length: The number of steps of a chunk; by default `chunk_length()`.
        axis: The axis of the steps in the outputs.
        report_fn: Called after each chunk with the number of its steps (progress).

    Returns:
        The state after all steps, and the outputs of all of them, joined along `axis`, NumPy. They
        are fetched from the devices once, at the end, so that no chunk waits for the one before
        (but for every eighth on several devices of a CPU).
        Without a step the outputs are None.

    Raises:
        ValueError: `length` is below 1, or the steps do not rise by one.
    """
    length = chunk_length() if length is None else length
    if length < 1 or steps.step != 1:
        raise ValueError(f"length is {length}, steps are {steps}: from 1 on, rising by one")
    waits = jax.default_backend() == "cpu" and jax.local_device_count() > 1
    parts, counts = [], []
    for begin in range(steps.start, steps.stop, length):
        interrupts.check()
        profiling.begin_step()
        part = range(begin, min(begin + length, steps.stop))
        state, outputs = chunk_fn(state, part)
        parts.append(outputs)
        if waits and not len(parts) % _IN_FLIGHT:
            jax.block_until_ready(state)
        counts.append(len(part))
        if report_fn is not None:
            report_fn(len(part))
    if not parts:
        return state, None

    def join(*leaves: np.ndarray) -> np.ndarray:
        rows = (
            np.atleast_1d(leaf).take(range(count), axis=axis)
            for leaf, count in zip(leaves, counts, strict=True)
        )
        return np.concatenate(list(rows), axis=axis)

    return state, jax.tree.map(join, *jax.device_get(parts))


def take(
    step_fn: Callable[[State, PyTree], tuple[State, PyTree]],
    state: State,
    xs: PyTree | None,
    *,
    length: int,
    count: jax.Array | int | None = None,
) -> tuple[State, PyTree]:
    """Takes the steps of one chunk; to be traced.

    Args:
        step_fn: Takes the state and one entry of `xs`, and returns the state and the outputs of a
            step, as the body of `jax.lax.scan`.
        state: The state before the first step.
        xs: Leaves `[length, ...]`, an entry for each step; None where steps need none.
        length: The largest number of steps, static. With 1 the step is taken without a loop.
        count: The number of steps to take, int32 scalar, from 1 to `length`; traced, so that one
            program serves them all. Under `jax.vmap` it must be the same for the whole batch (close
            over it). None takes all.

    Returns:
        The state after `count` steps, and their outputs `[length, ...]`, zeros behind the last.
    """
    if length == 1:
        state, outputs = step_fn(state, jax.tree.map(lambda leaf: leaf[0], xs))
        return state, jax.tree.map(lambda leaf: leaf[None], outputs)
    if count is None:
        return jax.lax.scan(step_fn, state, xs, length=length)

    def entry(index: jax.Array | int) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[index], xs)

    _, shapes = jax.eval_shape(lambda state: step_fn(state, entry(0)), state)
    outputs = jax.tree.map(lambda one: jnp.zeros((length, *one.shape), one.dtype), shapes)

    def body(index: jax.Array, carry: tuple[State, PyTree]) -> tuple[State, PyTree]:
        state, outputs = carry
        state, found = step_fn(state, entry(index))
        return state, jax.tree.map(lambda all_, one: all_.at[index].set(one), outputs, found)

    # A bound that is traced makes a while loop of it: steps behind it cost nothing.
    return jax.lax.fori_loop(0, jnp.asarray(count, jnp.int32), body, (state, outputs))
