import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afr_jax.core import interrupts, parallel


def _perturb_one(key, params, image):
    """A few noisy gradient steps on one image: keys, parameters, several outputs, a loop."""

    def loss_fn(delta, step_key):
        noise = 0.1 * jax.random.normal(step_key, delta.shape)
        return jnp.sum(jnp.tanh((image + delta + noise).reshape(-1) @ params["w"]) ** 2)

    def step(delta, index):
        loss, gradient = jax.value_and_grad(loss_fn)(delta, jax.random.fold_in(key, index))
        return jnp.clip(delta - 0.1 * jnp.sign(gradient), -0.3, 0.3), loss

    delta, losses = jax.lax.scan(step, jnp.zeros_like(image), jnp.arange(3))
    return {"delta": delta, "losses": losses, "mean": image.mean()}


def _inputs(count):
    keys = jax.random.split(jax.random.key(0), count)
    params = {"w": jax.random.normal(jax.random.key(1), (4 * 4 * 3, 5))}
    images = np.random.default_rng(0).uniform(size=(count, 4, 4, 3)).astype(np.float32)
    return keys, params, images


_IN_AXES = (0, None, 0)


def test_mesh_has_one_auto_axis_over_all_devices():
    mesh = parallel.make_mesh()
    assert mesh.shape == {"data": 4}
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)
    assert parallel.make_mesh(devices=jax.devices()[:2]).shape == {"data": 2}


def test_shard_batch_splits_rows_and_replicate_copies():
    mesh = parallel.make_mesh()
    images = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    sharded = parallel.shard_batch({"image": images}, mesh)["image"]
    assert [shard.data.shape for shard in sharded.addressable_shards] == [(2, 3)] * 4
    np.testing.assert_array_equal(sharded, images)
    copied = parallel.replicate(images, mesh)
    assert [shard.data.shape for shard in copied.addressable_shards] == [(8, 3)] * 4
    assert parallel.local_rows({"image": sharded})["image"] is sharded


@pytest.mark.parametrize("count, multiple, expected", [(5, 4, 8), (8, 4, 8), (1, 4, 4), (3, 1, 3)])
def test_pad_batch_repeats_the_last_row(count, multiple, expected):
    tree = {"image": np.arange(count * 2.0).reshape(count, 2), "label": jnp.arange(count)}
    padded, mask = parallel.pad_batch(tree, multiple)
    assert isinstance(padded["image"], np.ndarray)
    assert mask.dtype == bool and mask.shape == (expected,) and mask.sum() == count
    for name, leaf in tree.items():
        np.testing.assert_array_equal(padded[name][mask], leaf)
        for row in padded[name][count:]:
            np.testing.assert_array_equal(row, leaf[-1])


def test_pad_batch_takes_typed_keys():
    keys = jax.random.split(jax.random.key(0), 3)
    padded, _ = parallel.pad_batch(keys, 4)
    np.testing.assert_array_equal(jax.random.key_data(padded[3]), jax.random.key_data(keys[2]))


@pytest.mark.parametrize(
    "tree, multiple, error",
    [
        ({"a": np.zeros((0, 2))}, 4, ValueError),
        ({"a": np.zeros((2, 2))}, 0, ValueError),
        ({}, 4, ValueError),
        ({"a": np.zeros((2, 2)), "b": np.zeros((3, 2))}, 4, AssertionError),
    ],
)
def test_pad_batch_rejects_what_is_no_batch(tree, multiple, error):
    with pytest.raises(error):
        parallel.pad_batch(tree, multiple)


def _perturb_batch(keys, params, images):
    return jax.vmap(_perturb_one, in_axes=_IN_AXES)(keys, params, images)


_FUNCTIONS = {"image": _perturb_one, "batch": _perturb_batch}


@pytest.mark.parametrize(
    "count, batch_size, of",
    [
        (8, 8, "image"),
        (11, 4, "image"),
        (11, 3, "batch"),
        (1, 8, "batch"),
        (7, (1, 2, 5), "image"),
        (6, (1, 2, 5), "batch"),
    ],
)
@pytest.mark.parametrize("backend", ["jit", "pmap"])
@pytest.mark.parametrize("num_devices", [1, 4])
def test_every_backend_and_device_count_gives_the_vmapped_result(
    num_devices, backend, count, batch_size, of
):
    inputs = _inputs(count)
    expected = jax.jit(_perturb_batch)(*inputs)
    mesh = parallel.make_mesh(devices=jax.devices()[:num_devices])
    run = parallel.map_batches(
        _FUNCTIONS[of], mesh, in_axes=_IN_AXES, batch_size=batch_size, of=of, backend=backend
    )
    result = run(*inputs)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(result))
    chex.assert_trees_all_equal_shapes_and_dtypes(result, expected)
    # XLA may sum in another order where a device has another number of rows.
    chex.assert_trees_all_close(result, expected, atol=1e-6)


def test_jit_and_pmap_agree_bit_for_bit_on_the_same_devices():
    inputs = _inputs(11)
    mesh = parallel.make_mesh()
    results = [
        parallel.map_batches(_perturb_one, mesh, in_axes=_IN_AXES, batch_size=8, backend=backend)(
            *inputs
        )
        for backend in ("jit", "pmap")
    ]
    chex.assert_trees_all_equal(*results)


@pytest.mark.parametrize(
    "count, batch_size, sizes",
    [
        (11, 8, [8, 8]),
        (11, 6, [8, 8]),
        (3, 8, [4]),
        (11, (1, 3, 8), [8, 4]),
        (13, (1, 3, 8), [8, 8]),
        (2, (1, 3, 8), [4]),
    ],
)
def test_batches_have_few_sizes_and_no_device_is_dropped(count, batch_size, sizes):
    """Padded to multiples of four devices; the function is called from the host."""
    seen = []

    def double(rows):
        seen.append(len(rows))
        return 2 * rows

    run = parallel.map_batches(
        double,
        parallel.make_mesh(),
        in_axes=(0,),
        batch_size=batch_size,
        of="batch",
        backend="host",
    )
    np.testing.assert_array_equal(run(np.arange(count)), 2 * np.arange(count))
    assert seen == sizes


def test_every_device_gets_its_share_of_a_batch():
    seen = []

    def shards(rows):
        jax.debug.inspect_array_sharding(rows, callback=seen.append)
        return rows

    mesh = parallel.make_mesh()
    parallel.map_batches(shards, mesh, in_axes=(0,), batch_size=8, of="batch")(np.zeros((5, 3)))
    assert [sharding.shard_shape((8, 3)) for sharding in seen] == [(2, 3)]


def test_batch_result_equals_the_single_result():
    keys, params, images = _inputs(6)
    run = parallel.map_batches(_perturb_one, parallel.make_mesh(), in_axes=_IN_AXES, batch_size=4)
    row = jax.tree.map(lambda leaf: leaf[3], run(keys, params, images))
    chex.assert_trees_all_close(row, _perturb_one(keys[3], params, images[3]), atol=1e-5)


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_second_call_does_not_recompile(backend):
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(_perturb_one, n=1)
    keys, params, images = _inputs(11)
    for change in (1.0, 2.0):
        run = parallel.map_batches(
            counted, parallel.make_mesh(), in_axes=_IN_AXES, batch_size=4, backend=backend
        )
        run(keys, jax.tree.map(lambda leaf, by=change: by * leaf, params), images)
        run(keys[:7], params, images[:7])


def _scaled(image, *, scale):
    return scale * image


@pytest.mark.parametrize("backend", ["jit", "pmap", "host"])
def test_static_arguments_are_constants_of_the_program(backend):
    images = np.ones((5, 2), np.float32)
    for scale in (2.0, 3.0):
        run = parallel.map_batches(
            _scaled,
            parallel.make_mesh(),
            in_axes=(0,),
            batch_size=4,
            of="batch",
            backend=backend,
            static={"scale": scale},
        )
        np.testing.assert_array_equal(run(images), scale * images)


def test_thread_map_keeps_the_order_and_raises():
    assert parallel.thread_map(lambda n: n * n, range(5), width=3) == [0, 1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        parallel.thread_map(lambda n: 1 / n, [1, 0])


def test_plain_jit_over_a_sharded_batch_reduces_shared_gradients():
    mesh = parallel.make_mesh()
    images = np.random.default_rng(0).uniform(size=(8, 6)).astype(np.float32)
    patch = jnp.linspace(0.0, 1.0, 6)
    gradient_fn = jax.jit(
        jax.grad(lambda patch, images: jnp.mean(jnp.sum((images * patch[None]) ** 2, -1)))
    )
    sharded = gradient_fn(parallel.replicate(patch, mesh), parallel.shard_batch(images, mesh))
    expected = 2 * np.asarray(patch, np.float64) * np.mean(images.astype(np.float64) ** 2, 0)
    np.testing.assert_allclose(sharded, expected, rtol=1e-5)


@pytest.mark.parametrize("in_axes", [(), (None,), (0, 1)])
def test_in_axes_are_checked(in_axes):
    with pytest.raises(ValueError, match="in_axes"):
        parallel.map_batches(
            lambda image: image, parallel.make_mesh(), in_axes=in_axes, batch_size=4
        )


@pytest.mark.parametrize("batch_size", [0, (), (4, 1), (2, 2)])
def test_batch_sizes_are_checked(batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        parallel.map_batches(_scaled, parallel.make_mesh(), in_axes=(0,), batch_size=batch_size)


def test_no_rows_and_wrong_arguments_are_refused():
    run = parallel.map_batches(_perturb_one, parallel.make_mesh(), in_axes=_IN_AXES, batch_size=4)
    with pytest.raises(TypeError, match="got 1 arguments"):
        run(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="no rows"):
        run(*(_inputs(4)[n] if n == 1 else _inputs(4)[n][:0] for n in range(3)))
    with pytest.raises(ValueError, match="host"):
        parallel.map_batches(
            _perturb_one, parallel.make_mesh(), in_axes=_IN_AXES, batch_size=4, backend="host"
        )


def test_a_stream_begins_few_items_and_few_heavy_ones():
    """At any time, what was taken from the items and not yet given back."""
    taken, given, most = [], 0, {1: 0, 50: 0}

    def items(weight):
        for number in range(20):
            taken.append(number)
            most[weight] = max(most[weight], len(taken) - given)
            yield number, weight

    for weight in most:
        taken.clear()
        stream = parallel.thread_stream(
            lambda item: item[0], items(weight), weight_fn=lambda item: item[1], limit=60
        )
        for given, result in enumerate(stream):
            assert result == given
    # In hand, and behind it two at work, two waiting and the next; of the heavy ones one.
    assert most == {1: 6, 50: 3}


def test_a_stream_that_is_left_cancels_what_is_not_begun():
    begun = []
    stream = parallel.thread_stream(lambda n: begun.append(n) or 1 / (n - 1), range(100), width=1)
    with pytest.raises(ZeroDivisionError):
        list(stream)
    assert len(begun) < 5


def test_an_interrupt_ends_work_in_threads(monkeypatch):
    """A signal that nobody saw ends a loop in whatever thread it runs."""
    done = []

    def work(number):
        done.append(number)
        if number == 3:
            monkeypatch.setattr(interrupts, "_received", [signal.SIGTERM])

    with pytest.raises(interrupts.Interrupted) as caught:
        parallel.thread_map(work, range(100), width=1)
    assert caught.value.number == signal.SIGTERM and done == [0, 1, 2, 3]
