"""SSIM against scikit-image in float64 and dm_pix in float32; gradients against both."""

import cv2
import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
import skimage.metrics

from afr_jax.core.perception import ssim

_dssim = jax.jit(ssim.dssim)
_gradient = jax.jit(jax.grad(ssim.dssim))


def _ssim_map(image, other):
    return ssim.ssim_map(image, ssim.ssim_reference(other))


def _reference_map(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """SSIM of Wang et al. 2004 at every window wholly inside the image, float64."""
    _, similarity = skimage.metrics.structural_similarity(
        image.astype(np.float64),
        other.astype(np.float64),
        data_range=1.0,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return similarity[5:-5, 5:-5].mean(axis=-1)


def _reference_dssim(image: np.ndarray, other: np.ndarray) -> float:
    return (1.0 - _reference_map(image, other).mean()) / 2.0


def _pair(kind: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.uniform(size=shape)
    other = {
        "unrelated": rng.uniform(size=shape),
        "near": np.clip(image + rng.normal(0, 0.02, shape), 0, 1),
        "inverse": 1.0 - image,
        # Flat images: the variances are differences of nearly equal numbers.
        "flat": np.full(shape, 0.9),
        "saturated": np.ones(shape),
    }[kind]
    if kind == "flat":
        image = np.full(shape, 0.9) + rng.normal(0, 1e-3, shape)
    return image.astype(np.float32), other.astype(np.float32)


# Widths around the block of the window filter (54) and its remainders.
_SHAPES = [(11, 11, 1), (12, 30, 3), (64, 64, 3), (65, 11, 3), (30, 119, 1)]


@pytest.mark.parametrize("shape", _SHAPES)
def test_map_equals_scikit_image(shape, variant):
    image, other = _pair("near", shape)
    similarity = variant(_ssim_map)(image, other)
    assert similarity.shape == (shape[0] - 10, shape[1] - 10)
    np.testing.assert_allclose(similarity, _reference_map(image, other), atol=5e-6)


@pytest.mark.parametrize("kind", ["unrelated", "near", "inverse", "flat", "saturated"])
def test_dssim_equals_dm_pix_and_scikit_image(kind, variant):
    image, other = _pair(kind, (40, 64, 3))
    # float32 variances are good to 1e-7, against C2 = 9e-4.
    np.testing.assert_allclose(
        variant(ssim.dssim)(image, other), _reference_dssim(image, other), atol=5e-5
    )
    peer = (1.0 - float(jax.jit(pix.ssim)(image, other))) / 2.0
    np.testing.assert_allclose(
        variant(ssim.dssim)(image, other), peer, atol=1e-4 if kind == "flat" else 5e-6
    )


def test_dssim_of_a_photo_with_a_known_change(variant):
    photo = skimage.data.astronaut()[60:160, 170:270].astype(np.float32) / 255
    moved = np.clip(photo + 8 / 255 * np.sign(np.sin(np.arange(100)))[:, None, None], 0, 1)
    moved = moved.astype(np.float32)
    expected = _reference_dssim(photo, moved)
    assert 0.01 < expected < 0.2
    np.testing.assert_allclose(variant(ssim.dssim)(photo, moved), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["unrelated", "near", "inverse", "saturated"])
def test_gradient_equals_dm_pix(kind, variant):
    image, other = _pair(kind, (40, 64, 3))
    peer = jax.jit(jax.grad(lambda image, other: (1.0 - pix.ssim(image, other)) / 2.0))
    expected = peer(jnp.asarray(image), jnp.asarray(other))
    scale = np.abs(expected).max()
    assert scale > 0
    np.testing.assert_allclose(
        variant(jax.grad(ssim.dssim))(image, other), expected, atol=1e-4 * scale
    )


@pytest.mark.parametrize("kind", ["unrelated", "near"])
def test_gradient_equals_differences_of_scikit_image(kind, variant):
    image, other = (x.astype(np.float64) for x in _pair(kind, (24, 31, 3)))
    gradient = np.asarray(
        variant(jax.grad(ssim.dssim))(image.astype(np.float32), other.astype(np.float32)),
        np.float64,
    )
    rng = np.random.default_rng(1)
    for _ in range(3):
        direction = rng.normal(size=image.shape)
        step = 1e-5
        above = _reference_dssim(image + step * direction, other)
        below = _reference_dssim(image - step * direction, other)
        expected = (above - below) / (2 * step)
        # The sum has thousands of terms of both signs: compared with their size, not its own.
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        np.testing.assert_allclose(np.sum(gradient * direction), expected, atol=1e-4 * scale)


def test_gradient_of_the_map_is_that_of_each_window():
    """A cotangent of one window: the rows and columns outside it get no gradient."""
    image, other = _pair("near", (24, 31, 3))
    reference = ssim.ssim_reference(jnp.asarray(other))
    gradient = jax.jit(jax.grad(lambda image: ssim.ssim_map(image, reference)[3, 15]))(image)
    window = np.zeros(gradient.shape, bool)
    window[3:14, 15:26] = True
    assert np.all(np.asarray(gradient)[~window] == 0)
    # The mean over one window is the window, and DSSIM is minus half the similarity.
    expected = -2 * np.asarray(_gradient(image[3:14, 15:26], other[3:14, 15:26]))
    atol = 2e-4 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(gradient)[3:14, 15:26], expected, atol=atol)


def test_no_gradient_reaches_the_reference():
    image, other = _pair("near", (16, 16, 3))
    gradient_fn = jax.jit(jax.grad(ssim.dssim, argnums=1))
    np.testing.assert_array_equal(gradient_fn(image, other), 0)


def test_equal_images_have_dssim_zero_and_no_gradient():
    image, _ = _pair("near", (33, 40, 3))
    assert abs(float(_dssim(image, image))) < 1e-6
    np.testing.assert_allclose(_gradient(image, image), 0, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_images_have_a_finite_gradient(value):
    image = np.full((16, 16, 3), value, np.float32)
    assert abs(float(_dssim(image, image))) < 1e-6
    assert np.all(np.isfinite(_gradient(image, image)))


@pytest.mark.parametrize("box", [(0, 0, 40, 64), (3, 7, 14, 18), (5, 0, 40, 33), (29, 53, 40, 64)])
def test_box_dssim_is_that_of_the_crops(box, variant):
    image, other = _pair("near", (40, 64, 3))
    similarity = variant(_ssim_map)(image, other)
    crop = np.s_[box[0] : box[2], box[1] : box[3]]
    np.testing.assert_allclose(
        variant(ssim.box_dssim)(similarity, jnp.array(box)),
        _reference_dssim(image[crop], other[crop]),
        atol=5e-6,
    )


def test_box_dssim_of_a_box_without_windows_is_finite():
    similarity = jnp.zeros((30, 54))
    assert np.isfinite(ssim.box_dssim(similarity, jnp.array([5, 5, 15, 15])))


def test_vmap_equals_one_at_a_time():
    images = np.stack([_pair(kind, (20, 26, 3)) for kind in ("near", "unrelated", "inverse")])
    batched = jax.jit(jax.vmap(jax.value_and_grad(ssim.dssim)))(images[:, 0], images[:, 1])
    for value, gradient, (image, other) in zip(*batched, images, strict=True):
        np.testing.assert_allclose(value, _reference_dssim(image, other), atol=5e-6)
        np.testing.assert_allclose(gradient, _gradient(image, other), atol=1e-7)


@pytest.mark.parametrize("shape", [(10, 40, 3), (40, 10, 3), (40, 40)])
def test_images_smaller_than_the_window_are_rejected(shape):
    with pytest.raises(AssertionError):
        ssim.ssim_reference(jnp.zeros(shape))


def test_images_of_other_shapes_are_rejected():
    with pytest.raises(AssertionError):
        ssim.dssim(jnp.zeros((20, 20, 3)), jnp.zeros((20, 21, 3)))


def test_changes_of_the_tolerance_lose_equal_similarity():
    """Single pixels of a photo, each changed by a small multiple of what is tolerated there."""
    image = skimage.data.astronaut()[:128, 160:288].astype(np.float64) / 255
    tolerance = np.asarray(ssim.tolerance(ssim.ssim_reference(jnp.asarray(image, jnp.float32))))
    assert tolerance.shape == image.shape
    losses = []
    for y, x in np.random.default_rng(0).integers(12, 116, (20, 2)):
        changed = image.copy()
        changed[y, x] += 0.1 * tolerance[y, x]
        losses.append(1 - _reference_map(image, changed).mean())
    inside = tolerance[12:116, 12:116]
    assert inside.max() > 5 * inside.min()
    assert max(losses) < 1.25 * min(losses), losses


@pytest.mark.parametrize("amplitude", [0.3, 1.0, 3.0, 60.0])
@pytest.mark.parametrize("shape", [(11, 11, 3), (64, 40, 1), (301, 230, 3)])
def test_the_yardstick_of_files_is_that_of_scikit_image(shape, amplitude):
    """Smooth, noisy and nearly flat photos, changed by less than a gray level and by many."""
    rng = np.random.default_rng(0)
    smooth = cv2.GaussianBlur(rng.uniform(0, 255, shape), (0, 0), 3).reshape(shape)
    for image in (smooth, rng.uniform(0, 255, shape), np.full(shape, 250.0)):
        pair = [
            np.clip(np.round(plane), 0, 255).astype(np.uint8)
            for plane in (image, image + rng.normal(0, amplitude, shape))
        ]
        expected = _reference_dssim(pair[0] / 255, pair[1] / 255)
        np.testing.assert_allclose(ssim.dssim_uint8(*pair), expected, rtol=2e-5, atol=1e-9)
        box = np.array([0, 0, 11, 11])
        whole = np.array([[0, 0, *shape[:2]], box])
        expected = max(expected, _reference_dssim(*[plane[:11, :11] / 255 for plane in pair]))
        np.testing.assert_allclose(
            ssim.dssim_uint8(*pair, boxes=whole), expected, rtol=2e-5, atol=1e-9
        )


def test_a_box_smaller_than_the_window_is_an_error():
    image = np.zeros((40, 40, 3), np.uint8)
    with pytest.raises(ValueError, match="sides of 11 pixels"):
        ssim.dssim_uint8(image, image, boxes=np.array([[0, 0, 40, 40], [5, 5, 15, 30]]))
