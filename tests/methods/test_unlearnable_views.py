"""Noise under views (AUE, AAP), noise by clusters, and every method's bound on written files."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest

from afr_jax.core import parallel
from afr_jax.data import augmentation, image_sets
from afr_jax.methods.unlearnable import clusters, recipes, search, source
from afr_jax.models import heads
from afr_jax.training import optimizers, trainer

_LUMA = np.array([0.299, 0.587, 0.114])
_OPTIONS = search.SearchOptions(
    num_steps=3, step_size=2 / 255, train_steps=0, batch_size=24, max_rounds=1, stop_error=None
)


class _Linear(nn.Module):
    """Logits of the pixels."""

    num_classes: int

    @nn.compact
    def __call__(self, images, *, train=False):
        return nn.Dense(self.num_classes)(images.reshape(images.shape[0], -1))


def _recipe(num_classes):
    options = optimizers.OptimizerOptions(learning_rate=0.1, schedule="constant")
    return trainer.Recipe(_Linear(num_classes), heads.Logits(), options)


@pytest.fixture(autouse=True)
def linear_source(monkeypatch):
    """Sources that compile fast."""
    monkeypatch.setattr(recipes.SearchedNoise, "recipe", lambda self, count: _recipe(count))


def _kernel(num_classes, seed=0):
    """The weights `[pixels, K]` that a search starts with, in double precision."""
    state = trainer.init_state(
        jax.random.key(seed), _recipe(num_classes), image_shape=(8, 8, 3), mesh=_mesh()
    )
    return np.asarray(state.params["net"]["Dense_0"]["kernel"], np.float64)


def _mesh():
    return parallel.make_mesh(devices=jax.devices()[:1])


def _gray_ways(ways):
    """What gradients `[..., pixels]` become behind a view without color."""
    by_pixel = ways.reshape(*ways.shape[:-1], 64, 3).sum(axis=-1, keepdims=True) * _LUMA
    return by_pixel.reshape(ways.shape)


@pytest.mark.parametrize("granularity", ["sample", "class"])
def test_aue_steps_through_the_view(granularity):
    """Two classes and a linear source: the way of every step is known."""
    data = image_sets.synthetic(1, 12, num_classes=2, side=8)
    view = augmentation.Augmentation(gray_probability=1.0)
    options = dataclasses.replace(_OPTIONS, views=1, view=view)
    config = recipes.AUE(granularity=granularity, search=options)
    found = recipes.make_unlearnable(data, config=config, mesh=_mesh())
    weights = _kernel(2)
    own = np.stack([weights[:, 0] - weights[:, 1], weights[:, 1] - weights[:, 0]])
    expected = np.sign(_gray_ways(own)) * 6
    order = [data.sample_ids.index(name) for name in found.names] if granularity == "sample" else []
    labels = data.labels[order] if granularity == "sample" else np.arange(2)
    np.testing.assert_array_equal(found.levels.reshape(len(labels), -1), expected[labels])


def test_aap_trains_on_views_and_leads_them_to_another_label():
    """Its source on mirror images is the plain source of mirrored images."""
    data = image_sets.synthetic(2, 24, num_classes=2, side=8)
    mirror = augmentation.Augmentation(flip_probability=1.0)
    options = {"source_steps": 5, "batch_size": 24, "max_rounds": 1, "num_steps": 3}
    config = recipes.AAP().with_search(**options | {"step_size": 2 / 255, "view": mirror})
    assert config.search_options().views == 1 and config.search_options().permuted
    noise = recipes.make_unlearnable(data, config=config, mesh=_mesh())
    plain = recipes.TAP().with_search(**options | {"step_size": 2 / 255})
    mirrored = data._replace(images=data.images[:, :, ::-1].copy())
    expected = recipes.make_unlearnable(mirrored, config=plain, mesh=_mesh())
    np.testing.assert_array_equal(noise.levels, expected.levels[:, :, ::-1])


def test_views_grow_with_their_strength():
    none, full = recipes.contrastive_view(0.0), recipes.contrastive_view(1.0)
    assert (none.min_scale, none.brightness, none.gray_probability) == (1.0, 0.0, 0.0)
    assert full.min_scale == pytest.approx(0.1) and full.brightness == full.contrast == 0.4
    assert full.gray_probability == 0.2
    assert recipes.AUE().published().view == recipes.contrastive_view(0.6)
    assert recipes.AAP().published().view == recipes.contrastive_view(0.4)
    assert source.NoiseOptions().view == augmentation.CIFAR


def test_clusters_are_a_fixed_point_of_lloyd():
    """32 images at most: their principal components keep all distances."""
    images = image_sets.synthetic(3, 30, num_classes=3, side=8).images
    found = clusters.of_images(images, 4, seed=1)
    assert sorted(set(found)) == [0, 1, 2, 3]
    pixels = images.reshape(30, -1).astype(np.float64)
    centers = np.stack([pixels[found == number].mean(axis=0) for number in range(4)])
    distances = ((pixels[:, None] - centers) ** 2).sum(axis=2)
    np.testing.assert_array_equal(np.argmin(distances, axis=1), found)
    # Images that are far apart come apart.
    flat = np.repeat(np.array([[0], [90], [250]], np.uint8), 5, axis=0)
    flat = flat.reshape(15, 1, 1, 1) + np.zeros((15, 8, 8, 3), np.uint8)
    groups = clusters.of_images(flat, 3).reshape(3, 5)
    assert (groups == groups[:, :1]).all() and len(set(groups[:, 0])) == 3


def test_unlearnable_clusters_know_no_labels():
    data = image_sets.synthetic(4, 30, num_classes=3, side=8)
    config = recipes.UnlearnableClusters(num_clusters=2).with_search(
        source_steps=0, max_rounds=1, num_steps=4, step_size=2 / 255, batch_size=30
    )
    noise = recipes.make_unlearnable(data, config=config, mesh=_mesh())
    relabeled = data._replace(labels=data.labels[::-1].copy())
    again = recipes.make_unlearnable(relabeled, config=config, mesh=_mesh())
    np.testing.assert_array_equal(noise.levels, again.levels)
    assert noise.granularity == "sample" and noise.names == data.sample_ids
    # One noise a cluster, towards the other one's row of the last layer.
    groups = clusters.of_images(data.images, 2)
    weights = _kernel(2)
    away = np.stack([weights[:, 1] - weights[:, 0], weights[:, 0] - weights[:, 1]])
    expected = np.sign(away)[groups] * 8
    np.testing.assert_array_equal(noise.levels.reshape(30, -1), expected)
    one_class = data._replace(labels=np.zeros(30, np.int32), classes=("one",))
    assert len(recipes.make_unlearnable(one_class, config=config, mesh=_mesh()).names) == 30
    with pytest.raises(ValueError, match="one noise a cluster"):
        recipes.UnlearnableClusters(granularity="sample")
    with pytest.raises(ValueError, match="num_clusters"):
        recipes.UnlearnableClusters(num_clusters=1)


@pytest.mark.parametrize(
    "method, granularity",
    [
        pair
        for pair in itertools.product(recipes.METHODS, ("sample", "class"))
        if recipes.is_defined(*pair)
    ],
)
def test_every_method_is_within_its_bound_on_written_files(method, granularity, tmp_path):
    """Of images with black and white parts, where a clipped change could hide."""
    data = image_sets.synthetic(5, 24, num_classes=3, side=8)
    images = data.images.copy()
    images[:, :2], images[:, 2:4] = 0, 255
    data = data._replace(images=images)
    config = recipes.METHODS[method](granularity=granularity)
    if isinstance(config, recipes.SearchedNoise):
        config = config.with_search(
            batch_size=24,
            max_rounds=2,
            num_steps=3,
            step_size=3 / 255,
            source_steps=2,
            train_steps=2,
            adversary_steps=1,
            views=min(1, config.search_options().views),
            view=augmentation.Augmentation(),
        )
    noise = recipes.make_unlearnable(data, config=config, mesh=_mesh())
    noise.apply(data).save(tmp_path)
    written = image_sets.load_image_folder(tmp_path)
    assert written.sample_ids == data.sample_ids
    change = written.images.astype(np.float64) - data.images
    assert (change != 0).any()
    if config.budget == "L-infinity":
        assert np.abs(change).max() <= 8
        assert np.abs(change).max() >= 6, "hardly used"
    elif config.budget == "L2":
        # sqrt(d) * 6 gray levels, but for the rounding of its few values.
        norms = np.linalg.norm(change.reshape(24, -1), axis=1)
        assert norms.max() <= 6 * np.sqrt(8 * 8 * 3) * 1.05
    else:
        assert method == "cuda"
