"""Victims: partial protection, resuming, many at once, countermeasures."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from afr_jax.core import checkpoint, parallel
from afr_jax.data import image_sets
from afr_jax.evaluation.attackers import many_victims, victims
from afr_jax.models.classifiers import registry

_OPTIONS = victims.VictimOptions(
    network=registry.ClassifierOptions("small_resnet", width=4),
    num_epochs=2,
    batch_size=20,
    augmented=False,
)


def _mesh(count=1):
    return parallel.make_mesh(devices=jax.devices()[:count])


@pytest.fixture(scope="module")
def sets():
    return tuple(image_sets.synthetic(0, 80, side=8, split=split) for split in ("train", "test"))


def _train(sets, options=_OPTIONS, images=None, count=1, **changes):
    train_set, test_set = sets
    if images is not None:
        train_set = train_set._replace(images=images)
    return victims.train_victim(train_set, test_set, options=options, mesh=_mesh(count), **changes)


@pytest.fixture(scope="module")
def straight(sets):
    return _train(sets)


def test_a_part_is_protected_by_rate_and_class():
    clean = np.zeros((100, 1, 1, 3), np.uint8)
    labels = np.arange(100) % 4
    smaller, larger = (
        victims.protect_part(clean, clean + 9, labels, rate=rate)[1] for rate in (0.2, 0.7)
    )
    assert smaller.sum() == 20 and larger.sum() == 70 and (larger | ~smaller).all()
    images, chosen = victims.protect_part(clean, clean + 9, labels, rate=0.4, classes=[1, 3])
    assert chosen.sum() == 20 and set(labels[chosen]) == {1, 3}
    np.testing.assert_array_equal(images[:, 0, 0, 0], chosen * 9)
    with pytest.raises(ValueError, match="rate"):
        victims.protect_part(clean, clean, labels, rate=1.5)


def test_a_resumed_victim_equals_the_straight_one(sets, straight, tmp_path):
    one = dataclasses.replace(_OPTIONS, num_epochs=2)

    class _Stop(Exception):
        pass

    def stop(epoch, *_):
        raise _Stop

    with checkpoint.Checkpoints(tmp_path / "a") as checkpoints:
        with pytest.raises(_Stop):
            _train(sets, one, checkpoints=checkpoints, report_fn=stop)
        assert checkpoints.latest_step() == 1
        resumed = _train(sets, one, checkpoints=checkpoints)
    np.testing.assert_array_equal(resumed.curve.test_accuracy, straight.curve.test_accuracy)
    for new, old in zip(
        jax.tree.leaves(resumed.state.params), jax.tree.leaves(straight.state.params), strict=True
    ):
        np.testing.assert_array_equal(new, old)


@pytest.fixture(scope="module")
def singles(sets, straight):
    """Curves of three victims, trained one by one: on darker images, and with another seed."""
    darker = (sets[0].images // 2).astype(np.uint8)
    runs = (_train(sets, images=darker), straight, _train(sets, seed=3))
    return [run.curve for run in runs]


def test_many_victims_equal_single_ones(sets, singles, spread):
    """Three runs, and 80 test images, on one and four devices."""
    mesh, backend = spread
    train_set, test_set = sets
    darker = (train_set.images // 2).astype(np.uint8)
    curves = many_victims.train_many(
        np.stack([train_set.images, darker]),
        train_set.labels,
        test_set.images,
        test_set.labels,
        set_of_run=[1, 0, 0],
        seed_of_run=[0, 0, 3],
        num_classes=4,
        options=_OPTIONS,
        mesh=mesh,
        backend=backend,
    )
    for many, one in zip(curves, singles, strict=True):
        # Convolutions of several runs are summed in another order: a few of 80 images may turn.
        np.testing.assert_allclose(many.train_accuracy, one.train_accuracy, atol=0.05)
        np.testing.assert_allclose(many.test_accuracy, one.test_accuracy, atol=0.08)


@pytest.mark.parametrize(
    "countermeasure", ["mixup", "cutmix", "randaugment", "ueraser", "adversarial"]
)
def test_countermeasures_in_training_fit_the_step(sets, straight, countermeasure):
    """Traced, not run: what they do to images is tested where they are made."""
    recipe = victims.make_recipe(_OPTIONS, num_classes=4, num_examples=80, image_px=8)
    step_fn = functools.partial(victims.victim_step, recipe=recipe, countermeasure=countermeasure)
    images, labels = sets[0].images[:20], sets[0].labels[:20]
    state, accuracy = jax.eval_shape(step_fn, jax.random.key(0), straight.state, images, labels)
    assert accuracy.shape == ()
    assert jax.tree.structure(state) == jax.tree.structure(straight.state)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (state, straight.state)]
    assert shapes[0] == shapes[1]


def test_options_are_checked():
    with pytest.raises(ValueError, match="architecture"):
        registry.ClassifierOptions("alexnet")
    for change, name in (
        ({"countermeasure": "sepia"}, "countermeasure"),
        ({"num_epochs": 0}, "epochs"),
    ):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(_OPTIONS, **change)


def test_conversions_are_done_to_training_and_test_images_as_asked(sets):
    images = sets[0].images
    gray = dataclasses.replace(_OPTIONS, countermeasure="grayscale")
    assert (gray.stored(images) == gray.stored(images)[..., :1]).all()
    np.testing.assert_array_equal(gray.tested(images), gray.stored(images))
    assert dataclasses.replace(gray, convert_test=False).tested(images) is images
    assert gray.in_training == "none"
    mixup = dataclasses.replace(_OPTIONS, countermeasure="mixup")
    assert mixup.stored(images) is images and mixup.in_training == "mixup"


def test_sets_must_fit_together(sets):
    train_set, test_set = sets
    for other in (
        test_set._replace(classes=(*test_set.classes[:-1], "other")),
        test_set._replace(images=test_set.images[:, :4, :4]),
    ):
        with pytest.raises(ValueError, match="same classes and size"):
            victims.train_victim(train_set, other, options=_OPTIONS)


def test_a_victim_without_a_loss_is_none(sets):
    """It would answer one class, and pass for one that the noise kept from learning."""
    broken = dataclasses.replace(_OPTIONS, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"loss is nan after epoch 1"):
        _train(sets, broken)
    train_set, test_set = sets
    with pytest.raises(FloatingPointError, match="after epoch 1"):
        many_victims.train_many(
            train_set.images[None],
            train_set.labels,
            test_set.images,
            test_set.labels,
            set_of_run=[0],
            seed_of_run=[0],
            num_classes=len(train_set.classes),
            options=broken,
            mesh=_mesh(),
        )
