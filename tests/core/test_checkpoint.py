from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afr_jax.core import checkpoint, parallel


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


def test_keeping_none_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="num_kept is 0"):
        checkpoint.Checkpoints(tmp_path, num_kept=0)
