"""The noise search: closed forms on a linear net, budgets, resuming, devices, chunks, order."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afr_jax.core import checkpoint, parallel
from afr_jax.data import image_sets
from afr_jax.methods.unlearnable import recipes, search, source
from afr_jax.models import heads
from afr_jax.perturb import stepping
from afr_jax.training import optimizers, trainer


class _Linear(nn.Module):
    """Logits of the pixels; no BatchNorm."""

    num_classes: int = 2

    @nn.compact
    def __call__(self, images, *, train=False):
        return nn.Dense(self.num_classes)(images.reshape(images.shape[0], -1))


class _Tiny(nn.Module):
    """A convolution with BatchNorm, its mean and a linear layer."""

    num_classes: int = 4

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Conv(8, (3, 3), 2)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


def _recipe(net):
    options = optimizers.OptimizerOptions(learning_rate=0.1, schedule="constant")
    return trainer.Recipe(net, heads.Logits(), options)


_TINY = _recipe(_Tiny())
_OPTIONS = search.SearchOptions(
    num_steps=3, step_size=2 / 255, train_steps=4, batch_size=24, max_rounds=3, stop_error=None
)


class _TinyErrorMin(recipes.ErrorMin):
    """With a source network that compiles fast."""

    def recipe(self, num_classes):
        return _TINY


@pytest.fixture(scope="module")
def data():
    # 50 images: the last batch of 24 is filled up.
    return image_sets.synthetic(0, 50, num_classes=4, side=8)


def _mesh(count=1):
    return parallel.make_mesh(devices=jax.devices()[:count])


def _search(data, options=_OPTIONS, recipe=_TINY, count=1, **changes):
    return search.search(
        data.images,
        data.labels,
        num_classes=len(data.classes),
        recipe=recipe,
        options=options,
        mesh=_mesh(count),
        **{"seed": 0} | changes,
    )


@pytest.fixture(scope="module")
def straight(data):
    """A sample-wise search without interruption."""
    return _search(data)


def test_a_linear_net_gives_the_closed_form():
    """Two classes: the gradient is p (w_other - w_own), so each step goes the same way."""
    data = image_sets.synthetic(1, 12, num_classes=2, side=8)
    recipe = _recipe(_Linear())
    options = dataclasses.replace(_OPTIONS, train_steps=0, max_rounds=1, num_steps=3)
    kernel = trainer.init_state(jax.random.key(0), recipe, image_shape=(8, 8, 3)).params["net"]
    weights = np.asarray(kernel["Dense_0"]["kernel"], np.float64)
    ways = np.stack([weights[:, 0] - weights[:, 1], weights[:, 1] - weights[:, 0]])
    for ascend in (False, True):
        found = _search(data, dataclasses.replace(options, ascend=ascend), recipe)
        expected = np.sign(ways[data.labels]) * (-1 if ascend else 1) * 6 / 255
        np.testing.assert_allclose(found.noise.reshape(12, -1), expected, atol=1e-6)
    towards = _search(data, dataclasses.replace(options, permuted=True), recipe)
    # Two classes: the other label's descent is the own label's ascent.
    np.testing.assert_allclose(towards.noise.reshape(12, -1), expected, atol=1e-6)
    by_class = dataclasses.replace(options, granularity="class", num_steps=9)
    noise = _search(data, by_class, recipe).noise
    np.testing.assert_allclose(noise.reshape(2, -1), np.sign(ways) * 8 / 255, atol=1e-6)


def test_class_means_against_numpy():
    generator = np.random.default_rng(0)
    noise, deltas = generator.normal(0, 0.01, (3, 2, 2, 3)), generator.normal(0, 0.04, (6, 2, 2, 3))
    labels, mask = np.array([0, 0, 2, 2, 2, 1]), np.array([1, 1, 1, 0, 1, 0], bool)
    expected = noise.copy()
    expected[0] = deltas[:2].mean(axis=0)
    expected[2] = deltas[[2, 4]].mean(axis=0)
    made = search.class_means(
        *(jnp.asarray(a, jnp.float32) for a in (noise, deltas)),
        jnp.asarray(labels),
        jnp.asarray(mask),
        limit=0.03,
    )
    np.testing.assert_allclose(made, np.clip(expected, -0.03, 0.03), atol=1e-7)


def test_noise_lowers_the_training_error_within_the_budget(straight):
    assert straight.noise.shape == (50, 8, 8, 3)
    assert np.abs(straight.noise).max() <= 8 / 255 + 1e-7
    assert straight.errors.shape == (3,) and straight.errors[-1] < 0.5
    assert not straight.converged  # Without a limit there is nothing to meet.
    assert (straight.noise < 0).any() and (straight.noise > 0).any()


def test_a_resumed_search_equals_the_straight_one(data, straight, tmp_path):
    short = dataclasses.replace(_OPTIONS, stop_error=1.1)
    with checkpoint.Checkpoints(tmp_path / "a") as checkpoints:
        first = _search(data, short, checkpoints=checkpoints)
        assert len(first.errors) == 1 and first.converged
        rest = _search(data, checkpoints=checkpoints)
    np.testing.assert_array_equal(rest.noise, straight.noise)
    np.testing.assert_array_equal(rest.errors, straight.errors)


def test_the_training_error_does_not_depend_on_the_devices(data, straight, one_device, spread):
    """Of 50 images in batches of 14."""

    def error(mesh, backend):
        theta = trainer.init_state(jax.random.key(1), _TINY, image_shape=data.images.shape[1:])
        return source.training_error(
            (theta.params, theta.batch_stats),
            trainer.place_data(data.images, data.labels, mesh),
            jnp.asarray(straight.noise),
            jnp.arange(4),
            recipe=_TINY,
            options=_OPTIONS.noise,
            mesh=mesh,
            batch_size=14,
            backend=backend,
        )

    expected = error(one_device, "jit")
    assert 0 < expected < 1
    assert error(*spread) == pytest.approx(expected)


def test_four_devices_find_what_one_finds(data, straight):
    found = _search(data, count=4)
    # Sums over devices differ by rounding, which turns single signs of tiny gradients.
    differing = np.abs(found.noise - straight.noise) > 1e-6
    assert differing.mean() < 0.02
    np.testing.assert_allclose(found.errors, straight.errors, atol=0.05)


def test_long_calls_equal_single_steps(data, straight, monkeypatch):
    monkeypatch.setattr(stepping, "chunk_length", lambda: 50)
    found = _search(data)
    assert (np.abs(found.noise - straight.noise) > 1e-6).mean() < 0.02


def test_noise_follows_ids_through_shuffling_and_seeds(data):
    order = np.random.default_rng(2).permutation(50)
    shuffled = data._replace(
        sample_ids=tuple(data.sample_ids[i] for i in order),
        images=data.images[order],
        labels=data.labels[order],
    )
    config = _TinyErrorMin(search=dataclasses.replace(_OPTIONS, max_rounds=1))
    made, again, other = (
        recipes.make_unlearnable(d, config=config, mesh=_mesh(), seed=seed)
        for d, seed in ((data, 0), (shuffled, 0), (data, 1))
    )
    np.testing.assert_array_equal(made.levels, again.levels)
    assert made.names == again.names
    assert (made.levels != other.levels).any()
    protected = made.apply(data)
    assert np.abs(protected.images.astype(int) - data.images).max() <= 8
    assert len(made.settings["report"]["training_errors"]) == 1


def test_class_wise_noise_is_shared_and_a_second_search_does_not_compile(data, no_compilation):
    options = dataclasses.replace(_OPTIONS, granularity="class", num_steps=1, max_rounds=6)
    found = _search(data, options)
    assert found.noise.shape == (4, 8, 8, 3)
    assert np.abs(found.noise).max() <= 8 / 255 + 1e-7
    with no_compilation():
        _search(data, options, seed=5)


def test_error_max_trains_first_and_then_raises_the_error(data):
    options = dataclasses.replace(
        _OPTIONS, ascend=True, source_steps=30, train_steps=0, num_steps=5, max_rounds=1
    )
    noisy = _search(data, options)
    # More than guessing would give (0.75), of a network that has learned the clean images.
    assert noisy.errors[0] > 0.8


def test_rem_sees_views_and_an_adversary(data, straight):
    options = dataclasses.replace(_OPTIONS, views=1, adversary_radius=4 / 255, adversary_steps=2)
    robust = _search(data, options)
    assert np.abs(robust.noise).max() <= 8 / 255 + 1e-7
    assert (np.abs(robust.noise - straight.noise) > 1e-6).mean() > 0.05


@pytest.mark.parametrize(
    "change",
    [
        {"granularity": "batch"},
        {"epsilon": 0},
        {"num_steps": 0},
        {"class_share": 0},
        {"views": -1},
    ],
)
def test_options_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(_OPTIONS, **change)


def test_batches_of_a_pass_have_randomness_of_their_own():
    """Equal images in two batches see other views, however many batches a call takes."""
    single = image_sets.synthetic(0, 8, num_classes=4, side=8)
    images, labels = np.tile(single.images, (2, 1, 1, 1)), np.tile(single.labels, 2)
    options = dataclasses.replace(
        _OPTIONS, batch_size=8, num_steps=2, train_steps=0, max_rounds=1, views=1
    )
    found = _search(single._replace(images=images, labels=labels), options).noise
    assert not np.array_equal(found[:8], found[8:])
