"""Training steps: they learn, resume bit for bit, agree on 1 and 4 devices, compile once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afr_jax.core import checkpoint, parallel
from afr_jax.data import augmentation, sampling
from afr_jax.models import heads
from afr_jax.models.classifiers import resnet
from afr_jax.training import optimizers, trainer
from afr_jax.training import scores as training_scores

_NUM_CLASSES = 3


def _recipe(**options):
    optimizer = optimizers.OptimizerOptions(learning_rate=0.1, num_steps=30, warmup_steps=2)
    settings = {
        "net": resnet.ResNet((1,), width=4),
        "head": heads.Softmax(_NUM_CLASSES),
        "optimizer": optimizer,
        "augmentation": augmentation.Augmentation(pad_px=1, flip_probability=0.5),
    }
    return trainer.Recipe(**(settings | options))


def _images(count=48):
    """Classes that differ in color, with noise."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % _NUM_CLASSES
    colors = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
    noise = generator.integers(-50, 50, (count, 8, 8, 3))
    return np.clip(colors[labels][:, None, None] + noise, 0, 255).astype(np.uint8), labels


_KEY = jax.random.key(7)
_BATCHES = sampling.ShuffledBatches(48, 16, seed=3)


def _start(mesh, recipe):
    data = trainer.place_data(*_images(), mesh)
    return data, trainer.init_state(_KEY, recipe, image_shape=(8, 8, 3), mesh=mesh)


def _run(mesh, recipe, num_steps, *, state=None, chunk=None):
    data, first = _start(mesh, recipe)
    return trainer.run_steps(
        _KEY,
        first if state is None else state,
        data,
        recipe=recipe,
        mesh=mesh,
        batches=_BATCHES,
        num_steps=num_steps,
        chunk=chunk,
    )


def _host(state):
    return jax.tree.map(np.array, state)


@pytest.fixture(scope="module")
def mesh():
    return parallel.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def straight(mesh):
    """The state and metrics of 20 steps on one device."""
    state, metrics = _run(mesh, _recipe(), 20)
    return _host(state), metrics


def test_it_learns_and_says_so(mesh, straight):
    state, metrics = straight
    assert metrics.loss.shape == (20,) and int(state.step) == 20
    assert metrics.loss[-3:].mean() < 0.5 * metrics.loss[:3].mean()
    data, _ = _start(mesh, _recipe())
    scores = training_scores.evaluate(state, data, recipe=_recipe(), mesh=mesh, batch_size=20)
    assert scores["count"] == 48 and scores["accuracy"] > 0.9
    # Two batches more of the same data: masked rows are not counted twice.
    part = training_scores.evaluate(
        state, data, recipe=_recipe(), mesh=mesh, rows=np.arange(5), batch_size=20
    )
    assert part["count"] == 5
    embeddings = training_scores.embed(state, data, recipe=_recipe(), mesh=mesh, batch_size=20)
    assert embeddings.shape == (48, 4)
    kernel = state.params["head"]["classifier"]["kernel"]
    logits = embeddings @ kernel + state.params["head"]["classifier"]["bias"]
    assert np.mean(logits.argmax(axis=1) == _images()[1]) == pytest.approx(scores["accuracy"])
    labels = _images()[1]
    assert training_scores.nearest_center_accuracy(embeddings, labels, embeddings, labels) > 0.9


def test_a_run_that_was_cut_equals_the_straight_one_bit_for_bit(mesh, straight, tmp_path):
    state, first = _run(mesh, _recipe(), 9)
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(9, state)
    _, example = _start(mesh, _recipe())
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        step, state = checkpoints.restore(example)
    assert step == 9
    state, second = _run(mesh, _recipe(), 11, state=state)
    jax.tree.map(np.testing.assert_array_equal, _host(state), straight[0])
    losses = np.concatenate([first.loss, second.loss])
    np.testing.assert_array_equal(losses, straight[1].loss)


def test_scores_do_not_depend_on_the_devices(straight, one_device, spread):
    """Of 43 examples, in batches of 18: the last one is filled up, and none divides by four."""

    def measured(mesh, backend):
        data = trainer.place_data(*_images(), mesh)
        options = {"recipe": _recipe(), "mesh": mesh, "rows": np.arange(3, 46)}
        options |= {"batch_size": 18, "backend": backend}
        found = training_scores.evaluate(straight[0], data, **options)
        return found, training_scores.embed(straight[0], data, **options)

    expected, embeddings = measured(one_device, "jit")
    found, again = measured(*spread)
    assert found["count"] == expected["count"] == 43
    assert found["accuracy"] == expected["accuracy"]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(again, embeddings, atol=1e-5)


def test_four_devices_and_a_scan_give_the_same_run(straight):
    state, metrics = _run(parallel.make_mesh(), _recipe(), 6, chunk=3)
    # BatchNorm is over the whole batch; sums in another order, grown by 6 steps at rate 0.1.
    np.testing.assert_allclose(metrics.loss, straight[1].loss[:6], rtol=2e-3)
    np.testing.assert_allclose(metrics.learning_rate, straight[1].learning_rate[:6], rtol=1e-6)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))


def test_no_second_compilation(mesh, straight, no_compilation):
    del straight
    recipe = _recipe()
    with no_compilation():
        _run(mesh, recipe, 2)


def test_a_step_is_that_of_the_definition(mesh):
    """SGD with decay and clipping by hand, from the gradient of the mean loss."""
    optimizer = optimizers.OptimizerOptions(
        learning_rate=0.1, num_steps=10, weight_decay=0.01, clip_norm=0.05, schedule="constant"
    )
    recipe = _recipe(
        optimizer=optimizer,
        augmentation=augmentation.Augmentation(),
        input_scale=2.0,
        input_offset=-1.0,
    )
    _, state = _start(mesh, recipe)
    images, labels = (value[:16] for value in _images())
    before = _host(state)

    def loss_fn(params):
        inputs = images.astype(np.float32) / 255 * 2 - 1
        embeddings, moved = recipe.net.apply(
            {"params": params["net"], "batch_stats": before.batch_stats},
            inputs,
            train=True,
            mutable=["batch_stats"],
        )
        classifier = params["head"]["classifier"]
        logits = embeddings @ classifier["kernel"] + classifier["bias"][None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))
        return losses.mean(), moved["batch_stats"]

    gradient, stats = jax.jit(jax.grad(loss_fn, has_aux=True))(before.params)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    after, metrics = jax.jit(trainer.train_step, static_argnames="recipe")(
        _KEY, state, images, jnp.asarray(labels, jnp.int32), recipe=recipe
    )
    assert metrics.gradient_norm == pytest.approx(norm, rel=1e-4) and norm > 0.05
    expected = jax.tree.map(
        lambda p, g: p - 0.1 * (g * 0.05 / norm + (0.01 * p if p.ndim > 1 else 0.0)),
        before.params,
        gradient,
    )
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), after.params, expected
    )
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6),
        after.batch_stats,
        stats,
    )


def test_a_loss_that_is_not_finite_stops_the_run(mesh):
    recipe = _recipe()
    _, state = _start(mesh, recipe)
    broken = state._replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, state.params))
    with pytest.raises(FloatingPointError, match="step 0"):
        _run(mesh, recipe, 2, state=broken)


def test_batches_that_do_not_fit_the_devices():
    mesh = parallel.make_mesh()
    data, state = _start(mesh, _recipe())
    with pytest.raises(ValueError, match="4 devices"):
        trainer.run_steps(
            _KEY,
            state,
            data,
            recipe=_recipe(),
            mesh=mesh,
            batches=sampling.ShuffledBatches(48, 6),
            num_steps=1,
        )
    with pytest.raises(ValueError, match="labels"):
        trainer.place_data(np.zeros((2, 8, 8, 3), np.uint8), np.zeros(3), mesh)


@pytest.mark.parametrize(
    "options, steps, rates",
    [
        ({"num_steps": 10, "schedule": "constant"}, [0, 9, 20], [0.1, 0.1, 0.1]),
        ({"num_steps": 10}, [0, 5, 10, 30], [0.1, 0.05, 0.0, 0.0]),
        ({"num_steps": 12, "warmup_steps": 2}, [0, 1, 2, 7, 12], [0.05, 0.1, 0.1, 0.05, 0.0]),
        ({"num_steps": 3, "warmup_steps": 1}, [0, 1, 2], [0.1, 0.1, 0.05]),
    ],
)
def test_learning_rates(options, steps, rates):
    rate_fn = optimizers.learning_rate_fn(optimizers.OptimizerOptions(**options))
    np.testing.assert_allclose([rate_fn(jnp.asarray(s)) for s in steps], rates, atol=1e-8)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_a_warm_up_rises_and_a_cosine_falls(warmup_steps, schedule):
    """Every step of a run and beyond it, by the formulas in float64."""
    options = optimizers.OptimizerOptions(
        learning_rate=0.3, num_steps=40, warmup_steps=warmup_steps, schedule=schedule
    )
    steps = np.arange(50)
    rates = jax.vmap(optimizers.learning_rate_fn(options))(jnp.asarray(steps))
    share = np.clip((steps - warmup_steps) / (40 - warmup_steps), 0, 1)
    falling = 0.5 * (1 + np.cos(np.pi * share)) if schedule == "cosine" else 1.0
    rising = (steps + 1) / max(warmup_steps, 1)
    expected = 0.3 * np.where(steps < warmup_steps, rising, falling)
    np.testing.assert_allclose(rates, expected, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "adam"},
        {"schedule": "steps"},
        {"learning_rate": 0.0},
        {"warmup_steps": 10, "num_steps": 10},
        {"momentum": 1.0},
    ],
)
def test_wrong_optimizers(options):
    (name,) = [next(iter(options))]
    with pytest.raises(ValueError, match=name):
        optimizers.OptimizerOptions(**options)


def test_adamw_decays_kernels_only():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimizer = optimizers.make_optimizer(
        optimizers.OptimizerOptions("adamw", 0.1, 10, weight_decay=0.5, schedule="constant")
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0.0)
