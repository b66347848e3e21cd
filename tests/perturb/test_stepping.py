"""The driver of chunks, and the steps of a chunk, on a loop whose every number is known."""

import functools
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from afr_jax.perturb import stepping


def _step(state, x):
    state = 1.5 * state + x
    return state, {"state": state, "double": 2 * state[0]}


def _expected(xs):
    states, state = [], np.arange(3.0)
    for x in xs:
        state = 1.5 * state + x
        states.append(state)
    return np.stack(states)


@pytest.mark.parametrize("length, count", [(1, 1), (1, None), (6, None), (6, 6), (6, 4), (6, 1)])
def test_take_takes_count_steps(length, count):
    xs = np.linspace(1, 2, 6)[:length].astype(np.float32)

    @jax.jit
    def chunk(state, xs, count):
        return stepping.take(_step, state, xs, length=length, count=count)

    state, outputs = chunk(jnp.arange(3.0), xs, count)
    taken = count or length
    expected = _expected(xs[:taken])
    np.testing.assert_allclose(state, expected[-1], rtol=1e-6)
    assert outputs["state"].shape == (length, 3) and outputs["double"].shape == (length,)
    np.testing.assert_allclose(outputs["state"][:taken], expected, rtol=1e-6)
    np.testing.assert_allclose(outputs["double"][:taken], 2 * expected[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(outputs["state"][taken:], 0)


def test_take_needs_no_entries():
    state, outputs = jax.jit(
        lambda count: stepping.take(lambda s, _: (s + 1, s), 0, None, length=5, count=count)
    )(3)
    assert state == 3
    np.testing.assert_array_equal(outputs, [0, 1, 2, 0, 0])


def test_a_step_that_is_not_taken_costs_nothing_under_vmap():
    """The bound is not batched: a callback in the body runs as often as steps are taken."""
    calls = []

    def step(state, x):
        jax.debug.callback(lambda: calls.append(1))
        return _step(state, x)

    @jax.jit
    def chunk(states, xs, count):
        return jax.vmap(lambda one: stepping.take(step, one, xs, length=5, count=count))(states)

    starts = jnp.stack([jnp.arange(3.0), -jnp.arange(3.0)])
    xs = np.linspace(1, 2, 5, dtype=np.float32)
    states, outputs = chunk(starts, xs, 2)
    jax.effects_barrier()
    assert len(calls) in (2, 4)
    np.testing.assert_allclose(states[0], _expected(xs[:2])[-1], rtol=1e-6)
    assert outputs["state"].shape == (2, 5, 3)


@pytest.mark.parametrize("first, num_steps", [(0, 7), (4, 3), (0, 6), (2, 1)])
@pytest.mark.parametrize("length", [1, 3, 50])
def test_one_program_serves_runs_of_any_length(first, num_steps, length):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def chunk(state, xs, count):
        return stepping.take(_step, state, xs, length=length, count=count)

    def chunk_fn(state, steps):
        xs = np.resize(np.linspace(1, 2, 10, dtype=np.float32)[list(steps)], length)
        return chunk(state, xs, np.int32(len(steps)))

    told = []
    steps = range(first, first + num_steps)
    state, outputs = stepping.drive(
        chunk_fn, jnp.arange(3.0), steps=steps, length=length, report_fn=told.append
    )
    expected = _expected(np.linspace(1, 2, 10)[list(steps)])
    np.testing.assert_allclose(state, expected[-1], rtol=1e-6)
    assert isinstance(outputs["state"], np.ndarray)
    np.testing.assert_allclose(outputs["state"], expected, rtol=1e-6)
    np.testing.assert_allclose(outputs["double"], 2 * expected[:, 0], rtol=1e-6)
    assert sum(told) == num_steps and set(told[:-1]) <= {length}


def test_drive_cuts_along_the_axis_of_the_steps():
    _, outputs = stepping.drive(
        lambda state, steps: (state, np.arange(8).reshape(2, 4) + steps.start),
        None,
        steps=range(6),
        length=4,
        axis=1,
    )
    np.testing.assert_array_equal(outputs, [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]])


def test_drive_takes_scalars_of_single_steps_and_no_steps_at_all():
    steps = functools.partial(stepping.drive, lambda state, steps: (state + 1, steps.start))
    count, outputs = steps(0, steps=range(3, 6), length=1)
    assert count == 3
    np.testing.assert_array_equal(outputs, [3, 4, 5])
    assert steps(0, steps=range(3, 3)) == (0, None)


@pytest.mark.parametrize("options", [{"length": 0}, {"steps": range(6, 0, -1)}])
def test_drive_refuses_steps_that_it_cannot_take(options):
    with pytest.raises(ValueError, match="length is"):
        stepping.drive(lambda state, steps: (state, None), 0, **{"steps": range(3)} | options)


def test_a_chunk_is_one_step_on_cpu():
    assert stepping.chunk_length() == 1


_MANY_STEPS = """
import jax, jax.numpy as jnp
from afr_jax.core import parallel
from afr_jax.perturb import stepping
mesh = parallel.make_mesh()
state = parallel.shard_batch(jnp.ones((8, 64, 64)), mesh)

@jax.jit
def step(state):
    for _ in range(3):
        state = state @ state.swapaxes(1, 2) / (1 + jnp.abs(state).mean())
    return state, state.mean()

for _ in range(3):
    _, means = stepping.drive(lambda state, part: step(state), state, steps=range(400), length=1)
print(len(jax.devices()), means.shape)
"""


def test_devices_that_are_threads_of_a_cpu_do_not_wait_for_one_another_for_ever():
    """Where they do, XLA aborts the process, or it hangs."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _MANY_STEPS],
        env=environment,
        cwd=programs.ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout) == (0, "4 (400,)\n"), done.stderr[-2000:]
