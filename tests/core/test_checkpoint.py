import os
import shutil
import signal
import sys
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afr_jax.core import checkpoint, interrupts, parallel


class _State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    key: jax.Array
    image_keys: jax.Array
    noise: np.ndarray
    epoch: int


def _state(seed=0):
    key = jax.random.key(seed)
    params = {"w": jax.random.normal(key, (8, 3)), "b": jnp.zeros(3)}
    tx = optax.chain(optax.clip(1.0), optax.trace(0.9), optax.adam(1e-3))
    opt_state = tx.init(params)
    _, opt_state = tx.update(params, opt_state, params)
    noise = np.arange(6.0) + seed
    return _State(jnp.int32(seed), params, opt_state, key, jax.random.split(key, 4), noise, seed)


def _assert_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for left, right in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        if isinstance(left, jax.Array) and jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        np.testing.assert_array_equal(left, right)
        assert np.asarray(left).dtype == np.asarray(right).dtype


def test_empty_folder_restores_nothing(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(_state()) is None
        assert checkpoints.latest_step() is None


def test_types_keys_and_optimizer_states_round_trip(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, _state(3))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        step, restored = checkpoints.restore(_state(0))
    assert step == 3
    assert isinstance(restored, _State)
    _assert_equal(restored, _state(3))
    jax.random.normal(restored.key)


def test_restores_from_an_abstract_tree(tmp_path):
    tree = {"params": _state(1).params, "key": jax.random.key(1)}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
        _, restored = checkpoints.restore(jax.eval_shape(lambda: tree))
    _assert_equal(restored, tree)


def test_newest_of_the_kept_is_restored_and_old_ones_go(tmp_path):
    with checkpoint.Checkpoints(tmp_path, num_kept=2) as checkpoints:
        for step in (1, 2, 10):
            checkpoints.save(step, {"a": jnp.full(3, step)})
        assert checkpoints.latest_step() == 10
        step, restored = checkpoints.restore({"a": jnp.zeros(3, int)})
        assert step == 10
        np.testing.assert_array_equal(restored["a"], 10)
    assert {path.name for path in tmp_path.iterdir()} == {"2", "10"}


def test_donating_right_after_saving_is_safe(tmp_path):
    step_fn = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    tree = {"a": jnp.zeros((256, 256))}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
        for _ in range(3):
            tree = step_fn(tree)
        _, restored = checkpoints.restore(tree)
    np.testing.assert_array_equal(restored["a"], 0)


def test_saving_the_newest_step_again_has_no_effect(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"a": jnp.zeros(2)})
        checkpoints.save(2, {"a": jnp.ones(2)})
        np.testing.assert_array_equal(checkpoints.restore({"a": jnp.zeros(2)})[1]["a"], 0)
        with pytest.raises(ValueError, match="step 1 comes before the newest checkpoint, step 2"):
            checkpoints.save(1, {"a": jnp.zeros(2)})


@pytest.mark.parametrize("num_before, num_after", [(4, 2), (1, 4)])
def test_resumes_on_another_number_of_devices(tmp_path, num_before, num_after):
    before, after = (
        parallel.make_mesh(devices=jax.devices()[:count]) for count in (num_before, num_after)
    )
    values = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": parallel.shard_batch(values, before)})
        _, restored = checkpoints.restore({"a": parallel.shard_batch(0 * values, after)})
    assert len(restored["a"].addressable_shards) == num_after
    np.testing.assert_array_equal(restored["a"], values)


def test_another_shape_is_an_error(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(3)})
        with pytest.raises(ValueError, match="not compatible"):
            checkpoints.restore({"a": jnp.zeros(4)})


def test_another_structure_is_an_error(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(3)})
        with pytest.raises(ValueError, match="do not match"):
            checkpoints.restore({"b": jnp.zeros(3)})


def test_a_relative_folder_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with checkpoint.Checkpoints("run/checkpoints") as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(2)})
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


def test_a_killed_save_is_ignored(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(2)})
    (tmp_path / "2.orbax-checkpoint-tmp-7").mkdir()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        step, restored = checkpoints.restore({"a": jnp.zeros(2)})
    assert step == 1
    chex.assert_trees_all_equal(restored, {"a": jnp.ones(2)})


def test_no_bit_of_a_checkpoint_changes_unseen(tmp_path, caplog):
    states = {1: {"a": jnp.arange(99.0)}, 2: {"a": jnp.arange(99.0) + 1}}
    with checkpoint.Checkpoints(tmp_path / "whole") as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state)
    names = [p.relative_to(tmp_path) for p in (tmp_path / "whole" / "2").rglob("*") if p.is_file()]
    rng = np.random.default_rng(0)
    for name in names:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        path = folder / name.relative_to("whole")
        changed = bytearray(path.read_bytes())
        bit = int(rng.integers(8 * len(changed)))
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with checkpoint.Checkpoints(folder) as checkpoints:
            latest = checkpoints.latest_step()
            step, restored = checkpoints.restore(states[1])
            chex.assert_trees_all_equal(restored, states[step])
            assert latest == step
            if step == 1:
                assert f"{folder / '2'}: the checkpoint is damaged" in caplog.text
                checkpoints.save(2, states[2])
                assert checkpoints.latest_step() == 2
            # The rest says when it was written.
            assert step == 1 or "default" not in name.parts or name.name == "commit_success.txt"
        caplog.clear()


def test_a_cut_file_and_a_lost_one_are_damage(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"a": jnp.full(999, step)})
    for step in (3, 2):
        data = [p for p in (tmp_path / str(step)).rglob("d/*") if p.is_file()]
        largest = max(data, key=lambda path: path.stat().st_size)
        largest.unlink() if step == 3 else largest.write_bytes(largest.read_bytes()[:-9])
        with checkpoint.Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest_step() == (2 if step == 3 else None)
    assert {path.name for path in tmp_path.iterdir()} == {"damaged-2", "damaged-3"}


def test_keeping_none_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="num_kept is 0"):
        checkpoint.Checkpoints(tmp_path, num_kept=0)


def test_a_full_disk_is_told_before_orbax_begins(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with (
        checkpoint.Checkpoints(tmp_path / "full") as checkpoints,
        pytest.raises(OSError, match=r"No space left on device: .*full"),
    ):
        checkpoints.save(1, {"a": jnp.ones(3), "key": jax.random.key(0), "step": 1})
    assert not list((tmp_path / "full").iterdir())


def test_a_signal_while_a_save_is_completed_raises_behind_it(tmp_path, monkeypatch):
    """Orbax, whose threads are waited for, would print the interruption as an error of its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)
    completed = []
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        wait = checkpoints._manager.wait_until_finished

        def interrupted_wait():
            os.kill(os.getpid(), signal.SIGTERM)
            wait()
            completed.append(True)

        checkpoints.save(3, _state())
        try:
            interrupts.raise_and_remember()
            with monkeypatch.context() as patch:
                patch.setattr(checkpoints._manager, "wait_until_finished", interrupted_wait)
                with pytest.raises(interrupts.Interrupted):
                    checkpoints.wait()
            assert completed
        finally:
            interrupts.raise_and_remember()  # Forgets the signal.
            for number, handler in handlers.items():
                signal.signal(number, handler)
        assert checkpoints.latest_step() == 3
