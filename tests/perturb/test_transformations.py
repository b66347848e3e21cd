import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from PIL import Image

from afr_jax.perturb import transformations as t


@pytest.fixture(scope="module")
def photo():
    return skimage.data.astronaut()[32:128, 160:272].astype(np.float32) / 255


@pytest.mark.parametrize("quality", [30, 50, 90])
def test_jpeg_is_that_of_pillow(photo, quality, variant):
    pixels = np.round(255 * photo).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    theirs = np.asarray(Image.open(buffer)).astype(float)
    ours = 255 * np.asarray(variant(t.jpeg)(photo, float(quality)))
    # libjpeg smooths chroma when it doubles it; elsewhere both round alike.
    luma = (ours - theirs) @ [0.299, 0.587, 0.114]
    assert np.abs(luma).mean() < 1.0
    assert np.abs(ours - theirs).mean() < 2.5
    lost = np.abs(theirs - pixels).mean()
    assert np.abs(ours - theirs).mean() < 0.6 * lost


def test_jpeg_passes_the_gradient_on(photo):
    small = photo[:16, :16]
    direction = np.random.default_rng(0).normal(size=small.shape).astype(np.float32)
    _, moved = jax.jvp(lambda x: t.jpeg(x, 95.0), (small,), (direction,))
    # Rounding is passed straight through: luma moves as without JPEG.
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    inside = (np.asarray(t.jpeg(small, 95.0)) > 0.01).all(-1)
    np.testing.assert_allclose((moved @ luma)[inside], (direction @ luma)[inside], atol=1e-4)


def test_blur_equals_scipy(photo, variant):
    ndimage = pytest.importorskip("scipy.ndimage")
    for sigma in (0.6, 1.0):
        expected = ndimage.gaussian_filter(
            photo.astype(float), (sigma, sigma, 0), mode="nearest", radius=(3, 3, 0)
        )
        np.testing.assert_allclose(variant(t.blur)(photo, sigma), expected, atol=1e-5)
    np.testing.assert_allclose(variant(t.blur)(photo, 0.0), photo, atol=1e-6)


def test_contrast_keeps_the_mean(photo, variant):
    changed = np.asarray(variant(t.change_contrast)(photo, 0.5))
    np.testing.assert_allclose(changed.mean(), photo.mean(), atol=1e-5)
    np.testing.assert_allclose(changed.std(), 0.5 * photo.std(), rtol=1e-4)


def test_views_vary_stay_in_range_and_can_be_switched_off(photo):
    view = jax.jit(t.random_view, static_argnums=2)
    one, again, other = (view(jax.random.key(k), photo, t.ViewOptions()) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.02
    assert one.min() >= 0 and one.max() <= 1
    nothing = t.ViewOptions(0.0, 0.0, 0.0, 0.0, 0.0, None)
    np.testing.assert_array_equal(t.random_view(jax.random.key(3), photo, nothing), photo)


def test_noise_has_its_deviation(variant):
    noisy = variant(t.add_noise)(jax.random.key(0), jnp.zeros((64, 64, 3)), 0.02)
    np.testing.assert_allclose(np.std(noisy), 0.02, rtol=0.03)


@pytest.mark.parametrize(
    "change", [{"light": 1.0}, {"noise": -0.1}, {"blur_px": 3.0}, {"jpeg_quality": (90, 50)}]
)
def test_ranges_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        t.ViewOptions(**change)
