"""Augmentations against NumPy, their ranges, and that they are per image and per key."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afr_jax.data import augmentation

_IMAGE = np.asarray(jax.random.uniform(jax.random.key(0), (12, 10, 3)))
_KEYS = jax.random.split(jax.random.key(1), 64)
_ALL = augmentation.Augmentation(
    pad_px=2,
    min_scale=0.5,
    max_stretch=1.2,
    flip_probability=0.5,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    gray_probability=0.3,
    cutout_px=4,
)


def _many(fn, image=_IMAGE, **options):
    return np.asarray(jax.jit(jax.vmap(lambda key: fn(key, image, **options)))(_KEYS))


def test_shift_gives_every_place_of_the_padded_image():
    padded = np.pad(_IMAGE, ((1, 1), (1, 1), (0, 0)))
    places = [padded[i : i + 12, j : j + 10] for i in range(3) for j in range(3)]
    found = {
        next(n for n, place in enumerate(places) if np.array_equal(place, image))
        for image in _many(augmentation.random_shift, pad_px=1)
    }
    assert found == set(range(9))


def test_flip_mirrors_about_half_of_them():
    images = _many(augmentation.random_flip)
    mirrored = [np.array_equal(image, _IMAGE[:, ::-1]) for image in images]
    kept = [np.array_equal(image, _IMAGE) for image in images]
    assert all(one != other for one, other in zip(mirrored, kept, strict=True))
    assert 16 < sum(mirrored) < 48


def test_resized_crop_of_a_ramp_is_a_part_of_the_ramp():
    rows, columns = np.meshgrid(np.linspace(0, 1, 32), np.linspace(0, 1, 32), indexing="ij")
    ramp = np.stack([rows, columns, rows], axis=-1).astype(np.float32)
    images = _many(augmentation.random_resized_crop, image=ramp, min_scale=0.25, max_stretch=1.0)
    inner = images[:, 4:-4, 4:-4]
    steps = np.diff(inner[..., 0], axis=1).mean(axis=(1, 2)) * 31
    # The side of the crop is the root of its share of the area: 0.5 to 1 of the image.
    assert steps.min() > 0.49 and steps.max() < 1.01 and np.ptp(steps) > 0.3
    np.testing.assert_allclose(
        np.diff(inner[..., 1], axis=2).mean(axis=(1, 2)) * 31, steps, atol=1e-3
    )
    whole = _many(augmentation.random_resized_crop, image=ramp, min_scale=1.0)
    np.testing.assert_allclose(whole, np.broadcast_to(ramp, whole.shape), atol=1e-5)


def test_color_jitter_against_numpy():
    brightness = _many(augmentation.color_jitter, brightness=0.4)
    factors = np.median(brightness / _IMAGE, axis=(1, 2, 3))
    assert factors.min() > 0.59 and factors.max() < 1.41 and np.ptp(factors) > 0.5
    expected = np.clip(_IMAGE * factors[:, None, None, None], 0, 1)
    np.testing.assert_allclose(brightness, expected, atol=1e-5)
    luma = _IMAGE @ np.array([0.299, 0.587, 0.114])
    for image in _many(augmentation.color_jitter, saturation=1.0)[:8]:
        # Colors move along the line through their luma, which stays where nothing is clipped.
        inside = ((image > 0) & (image < 1)).all(axis=-1)
        weights = np.array([0.299, 0.587, 0.114])
        np.testing.assert_allclose((image @ weights)[inside], luma[inside], atol=1e-5)
    small = (0.5 + 0.1 * (_IMAGE - 0.5)).astype(np.float32)
    contrast = _many(augmentation.color_jitter, image=small, contrast=0.5)
    means = (contrast @ np.array([0.299, 0.587, 0.114])).mean(axis=(1, 2))
    np.testing.assert_allclose(means, (small @ np.array([0.299, 0.587, 0.114])).mean(), atol=1e-5)
    spread = contrast.std(axis=(1, 2, 3)) / small.std()
    assert spread.min() > 0.49 and spread.max() < 1.51 and np.ptp(spread) > 0.6


def test_gray():
    images = _many(augmentation.random_gray, probability=0.5)
    is_gray = (np.ptp(images, axis=-1) == 0).all(axis=(1, 2))
    assert 16 < is_gray.sum() < 48
    luma = _IMAGE @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(images[is_gray][0, ..., 0], luma, atol=1e-6)
    np.testing.assert_array_equal(images[~is_gray][0], _IMAGE)


def test_cutout_is_a_square_within_the_image():
    for image in _many(augmentation.cutout, side_px=4):
        rows, columns = np.nonzero((image == 0).all(axis=-1))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width and 2 <= height <= 4 and 2 <= width <= 4
        untouched = (image != 0).any(axis=-1)
        np.testing.assert_array_equal(image[untouched], _IMAGE[untouched])


def test_all_together():
    batch = np.stack([_IMAGE] * 8)
    call = jax.jit(augmentation.augment_batch, static_argnames="options")
    images = np.asarray(call(jax.random.key(5), batch, options=_ALL))
    assert images.shape == batch.shape and images.min() >= 0 and images.max() <= 1 + 1e-6
    # Equal images get changes of their own; the same key gives the same ones.
    assert len({image.tobytes() for image in images}) == 8
    np.testing.assert_array_equal(images, call(jax.random.key(5), batch, options=_ALL))
    assert not np.array_equal(images, call(jax.random.key(6), batch, options=_ALL))


def test_nothing_is_done_by_default():
    image = augmentation.augment(
        jax.random.key(0), jnp.asarray(_IMAGE), options=augmentation.Augmentation()
    )
    np.testing.assert_array_equal(image, _IMAGE)


@pytest.mark.parametrize(
    "name, value",
    [
        ("flip_probability", 1.1),
        ("brightness", -0.1),
        ("min_scale", 0.0),
        ("max_stretch", 0.5),
        ("cutout_px", -1),
    ],
)
def test_options_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(augmentation.Augmentation(), **{name: value})
