"""Alignment: the transform against scikit-image, the warp against plain sampling in float64."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
import skimage.transform

from afr_jax.models.extractors import registry
from afr_jax.recognition import align

_TEMPLATE = np.array(registry.get("dlib").template)
_warp = jax.jit(align.warp, static_argnames=("size", "pool"))


def _transform(scale: float, angle: float, shift: tuple[float, float]) -> np.ndarray:
    """Chip to photo: rotation, scale, shift, all in (y, x)."""
    turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return np.concatenate([turn, np.array(shift)[:, None]], axis=1)


def _apply(transform: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ transform[:, :2].T + transform[:, 2]


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


def _smooth(height: int, width: int) -> np.ndarray:
    """An image without detail below about 20 pixels."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(y / 7 + x / 11), np.cos(y / 9 - x / 8), np.sin(x / 6)]
    return (0.5 + 0.4 * np.stack(waves, axis=-1)).astype(np.float32)


# From landmarks to a transform.


def _skimage_transform(landmarks: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Umeyama's fit, chip to photo, `[2, 3]` in (y, x)."""
    kind = skimage.transform.SimilarityTransform
    source, target = landmarks[:, ::-1], template[:, ::-1]
    if hasattr(kind, "from_estimate"):
        fitted = kind.from_estimate(source, target)
    else:
        fitted = kind()
        fitted.estimate(source, target)
    inverse = np.linalg.inv(fitted.params)
    return inverse[:2, [1, 0, 2]][::-1]


@pytest.mark.parametrize("seed", range(5))
def test_similarity_transform_equals_scikit_image(seed):
    rng = np.random.default_rng(seed)
    exact = _transform(rng.uniform(0.2, 9), rng.uniform(-3, 3), rng.uniform(-50, 900, 2))
    landmarks = _apply(exact, _TEMPLATE) + rng.normal(0, 4, (5, 2))
    ours = align.similarity_transform(landmarks, _TEMPLATE)
    np.testing.assert_allclose(ours, _skimage_transform(landmarks, _TEMPLATE), rtol=1e-9)
    assert align.transform_scale(ours) == pytest.approx(np.sqrt(np.linalg.det(ours[:, :2])))


def test_similarity_transform_of_exact_landmarks():
    exact = _transform(2.5, 0.4, (30, -12))
    landmarks = _apply(exact, _TEMPLATE).astype(np.float32)
    ours = align.similarity_transform(landmarks, _TEMPLATE)
    np.testing.assert_allclose(ours, exact, atol=1e-4)
    assert align.transform_scale(ours) == pytest.approx(2.5, abs=1e-5)


def test_similarity_transform_does_not_mirror():
    landmarks = _TEMPLATE * [1, -1] + [0, 150]
    transform = align.similarity_transform(landmarks, _TEMPLATE)
    assert np.linalg.det(transform[:, :2]) > 0


_PENTAGON = np.stack(
    [np.sin(2 * np.pi * np.arange(5) / 5), np.cos(2 * np.pi * np.arange(5) / 5)], 1
)


@pytest.mark.parametrize("stretch", [1.0, 1.25])
def test_a_stretched_chip_shows_wider_faces(stretch):
    extractor = dataclasses.replace(registry.get("dlib"), stretch=stretch)
    squeezed = _TEMPLATE.copy()
    squeezed[:, 1] = 74.5 + (squeezed[:, 1] - 74.5) / stretch
    photo = _transform(0.7, 0.3, (40.0, 60.0))
    transform = align.chip_transform(extractor, _apply(photo, squeezed))
    # Exact landmarks of a face that is as wide as the template is, once stretched.
    np.testing.assert_allclose(_apply(transform, _TEMPLATE), _apply(photo, squeezed), atol=1e-9)
    np.testing.assert_allclose(
        _apply(transform, np.array([[74.5, 74.5]])), _apply(photo, np.array([[74.5, 74.5]]))
    )
    # A step along the chip's columns is shorter in the photo, one along its rows is not.
    np.testing.assert_allclose(np.linalg.norm(transform[:, 1]), 0.7 / stretch)
    assert align.transform_scale(transform) == pytest.approx(0.7)


@pytest.mark.parametrize(
    "landmarks, template, message",
    [
        (np.full((5, 2), 40.0), _TEMPLATE, "do not span a face"),
        (_TEMPLATE * 1e12, _TEMPLATE, "do not span a face"),
        # A mirrored pentagon: every rotation is as good as every other, at scale zero.
        (_PENTAGON * [1, -1], _PENTAGON, "do not span a face"),
        (np.full((5, 2), np.nan), _TEMPLATE, "not finite"),
        (np.where(np.arange(10).reshape(5, 2) == 3, np.nan, _TEMPLATE), _TEMPLATE, "not finite"),
        (np.where(np.arange(10).reshape(5, 2) == 3, np.inf, _TEMPLATE), _TEMPLATE, "not finite"),
    ],
)
def test_landmarks_that_span_no_face_are_refused(landmarks, template, message):
    with pytest.raises(ValueError, match=message):
        align.similarity_transform(landmarks, template)


@pytest.mark.parametrize("transform", [_transform(1.7, 0.5, (20, 30)), _transform(3, -2, (90, 0))])
def test_chip_bounds_are_the_smallest_rectangle_over_all_chip_pixels(transform):
    size = 24
    edges = np.arange(size + 1) - 0.5
    # Corners of all pixels; photo pixel i covers [i, i + 1) of the bounds, its center is i.
    corners = _apply(transform, np.array(list(itertools.product(edges, edges)))) + 0.5
    bounds = align.chip_bounds(transform, size)
    np.testing.assert_allclose(bounds, [*corners.min(axis=0), *corners.max(axis=0)], atol=1e-9)


@pytest.mark.parametrize(
    "bounds, expected",
    [
        ([2.2, 3.9, 7.1, 8.0], [2, 3, 8, 8]),
        ([-5.0, 3.0, 99.0, 4.0], [0, 3, 10, 4]),
        ([3.0, 3.0, 3.0, 3.0], [3, 3, 4, 4]),
        # Wholly outside: a pixel at the rim.
        ([50.0, -9.0, 60.0, -3.0], [9, 0, 10, 1]),
    ],
)
def test_integer_bounds(bounds, expected):
    low, high = align.integer_bounds(np.array(bounds), (10, 12))
    assert [*low, *high] == expected


@pytest.mark.parametrize(
    "scale, expected", [(0.3, 1), (1.0, 1), (1.25, 1), (1.26, 2), (2.25, 2), (2.3, 3), (6.0, 6)]
)
def test_pool_factor(scale, expected):
    assert align.pool_factor(scale) == expected


def test_pool_factor_keeps_its_promise():
    scales = np.linspace(1.01, 12, 500)
    steps = scales / [align.pool_factor(scale) for scale in scales]
    assert steps.max() <= 1.25 and steps.min() >= 0.6


def test_jitter_of_spread_zero_changes_nothing():
    transform = jnp.asarray(_transform(1.7, 0.5, (20, 30)), jnp.float32)
    jittered = align.jitter_transform(jax.random.key(0), transform, 24, shift=0.0, turn=0.0)
    np.testing.assert_allclose(jittered, transform, atol=1e-5)


def test_jitter_moves_turns_and_scales_about_the_centre():
    """Statistics of many draws: each of the four quantities has its spread, and no offset."""
    size, shift, turn, scale = 24, 0.02, 0.05, 1.7
    transform = _transform(scale, 0.5, (20, 30))
    jitter = functools.partial(align.jitter_transform, size=size, shift=shift, turn=turn)
    jittered = jax.jit(jax.vmap(jitter, in_axes=(0, None)))(
        jax.random.split(jax.random.key(0), 4000), jnp.asarray(transform, jnp.float32)
    )
    # As complex numbers y i + x, a similarity is z -> factor * z + shift.
    jittered = np.asarray(jittered, np.float64)
    assert np.allclose(jittered[:, 0, 0], jittered[:, 1, 1], atol=1e-6)
    assert np.allclose(jittered[:, 0, 1], -jittered[:, 1, 0], atol=1e-6)
    relative = (jittered[:, 1, 1] + 1j * jittered[:, 0, 1]) / scale
    relative /= np.exp(1j * 0.5)
    center = np.array([(size - 1) / 2] * 2)
    moved = jittered[:, :, :2] @ center + jittered[:, :, 2] - _apply(transform, center)
    draws = {
        "scale": (np.abs(relative) - 1, turn),
        "turn": (np.angle(relative), turn),
        "shift y": (moved[:, 0] / (size * scale), shift),
        "shift x": (moved[:, 1] / (size * scale), shift),
    }
    for name, (values, spread) in draws.items():
        # Of 4000 draws: the mean is good to 1.6 %, the deviation to 1.1 % of the spread.
        assert values.std() == pytest.approx(spread, rel=0.06), name
        assert abs(values.mean()) < 0.08 * spread, name
    assert np.abs(np.corrcoef([values for values, _ in draws.values()]) - np.eye(4)).max() < 0.08


# The warp.


def _sampled(image: np.ndarray, transform: np.ndarray, size: int, pool: int) -> np.ndarray:
    """Box average, then bilinear with zeros outside, point by point in float64."""
    image = image.astype(np.float64)
    rows, columns = -(-image.shape[0] // pool), -(-image.shape[1] // pool)
    extra = (rows * pool - image.shape[0], columns * pool - image.shape[1])
    image = np.pad(image, ((0, extra[0]), (0, extra[1]), (0, 0)), mode="edge")
    image = image.reshape(rows, pool, columns, pool, -1).mean(axis=(1, 3))
    image = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    chip = np.zeros((size, size, image.shape[2]))
    for i, j in np.ndindex(size, size):
        y, x = (transform @ [i, j, 1] - (pool - 1) / 2) / pool + 1
        if 0 <= y < image.shape[0] - 1 and 0 <= x < image.shape[1] - 1:
            top, left = int(y), int(x)
            square = image[top : top + 2, left : left + 2]
            chip[i, j] = np.einsum(
                "y,x,yxc->c", [1 - y + top, y - top], [1 - x + left, x - left], square
            )
    return chip


@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize(
    "transform",
    [
        _transform(1.1, 0.3, (4.3, 2.2)),
        _transform(2.6, -0.8, (20, -3)),
        _transform(0.4, 3, (30, 40)),
    ],
)
def test_warp_equals_plain_sampling(transform, pool, variant):
    image = _noise(41, 52, 3)
    chip = variant(align.warp, static_argnames=("size", "pool"))(
        image, transform, size=16, pool=pool
    )
    np.testing.assert_allclose(chip, _sampled(image, transform, 16, pool), atol=1e-4)


def test_identity_warp(variant):
    image = _noise(20, 20, 3)
    np.testing.assert_array_equal(
        variant(align.warp, static_argnames=("size", "pool"))(image, np.eye(2, 3), size=20), image
    )


@pytest.mark.parametrize("pool", [1, 2, 3])
def test_warp_of_a_ramp_is_exact(pool, variant):
    """Box averages and bilinear sampling keep linear functions: no half-pixel shift."""
    y, x = np.mgrid[:60, :60]
    ramp = np.stack([y, x], axis=-1).astype(np.float32)
    transform = _transform(1.3 * pool, 0.2, (6.4, 12.7))
    size = 24 // pool
    points = np.moveaxis(np.mgrid[:size, :size], 0, -1).reshape(-1, 2)
    chip = variant(align.warp, static_argnames=("size", "pool"))(
        ramp, transform, size=size, pool=pool
    )
    np.testing.assert_allclose(chip.reshape(-1, 2), _apply(transform, points), atol=1e-4)


def test_pixels_outside_are_black():
    chip = np.asarray(_warp(np.ones((8, 8, 1), np.float32), _transform(1, 0, (-4, 3)), size=12))
    expected = np.zeros((12, 12))
    expected[4:, :5] = 1
    np.testing.assert_array_equal(chip[..., 0], expected)
    beyond = _warp(np.ones((8, 8, 1), np.float32), _transform(1, 0, (1e6, -1e6)), size=4)
    np.testing.assert_array_equal(beyond, 0)


def test_the_rim_fades_within_a_pixel():
    chip = _warp(np.ones((8, 8, 1), np.float32), _transform(1, 0, (-0.25, 0)), size=8)
    np.testing.assert_allclose(chip[:, 0, 0], [0.75, *np.ones(7)], atol=1e-6)


@pytest.mark.parametrize("factor, residue", [(2, 0.0), (3, 1 / 9), (4, 0.0)])
def test_a_checkerboard_becomes_flat(factor, residue):
    """Without the box average the chip would show it at full contrast, or as all black."""
    y, x = np.mgrid[:72, :72]
    board = ((y + x) % 2).astype(np.float32)[..., None]
    transform = _transform(factor, 0, ((factor - 1) / 2, (factor - 1) / 2))
    pool = align.pool_factor(factor)
    chip = _warp(board, transform, size=72 // factor, pool=pool)
    # Of 9 pixels 5 are of one color.
    np.testing.assert_allclose(np.abs(2 * np.asarray(chip) - 1), residue, atol=1e-5)


@pytest.mark.parametrize(
    "scale, period, most", [(3.0, 4.0, 0.36), (2.0, 3.0, 0.4), (5.0, 6.0, 0.2)]
)
def test_frequencies_that_the_chip_cannot_hold_are_attenuated(scale, period, most):
    x = np.arange(150)
    image = np.sin(2 * np.pi * x / period).astype(np.float32)[None, :, None].repeat(150, axis=0)
    transform = _transform(scale, 0, (scale, scale))
    chips = [
        np.asarray(_warp(image, transform, size=24, pool=pool))
        for pool in (1, align.pool_factor(scale))
    ]
    assert chips[1].std() <= most * image.std() < chips[0].std()


def test_frequencies_that_the_chip_can_hold_are_kept():
    scale, period = 3.0, 24.0
    x = np.arange(150)
    image = np.sin(2 * np.pi * x / period).astype(np.float32)[None, :, None].repeat(150, axis=0)
    chip = _warp(image, _transform(scale, 0, (scale, scale)), size=24, pool=3)
    assert chip.std() > 0.9 * image.std()


@pytest.mark.parametrize("pool", [1, 3])
def test_the_gradient_is_the_adjoint_of_the_warp(pool):
    image, chip = _noise(30, 34, 2), _noise(12, 12, 2)
    transform = _transform(1.3 * pool, 0.4, (-1.0, 5.0))
    warped, pull = jax.vjp(lambda image: _warp(image, transform, size=12, pool=pool), image)
    (spread,) = pull(jnp.asarray(chip))
    assert spread.shape == image.shape
    np.testing.assert_allclose(
        np.vdot(np.asarray(warped, np.float64), chip), np.vdot(image, spread), rtol=1e-5
    )
    # What the chip does not see gets none; what it sees gets its share.
    seen = _sampled(np.ones((30, 34, 2)), transform, 12, pool)
    np.testing.assert_allclose(np.sum(spread), np.sum(seen * chip), rtol=1e-4)


def test_the_warp_vmaps():
    images = _noise(3, 20, 22, 1)
    transforms = np.stack([_transform(1.2, a, (2, 3)) for a in (0.0, 0.3, -0.2)])
    batch = jax.vmap(lambda image, transform: _warp(image, transform, size=10))(images, transforms)
    for chip, image, transform in zip(batch, images, transforms, strict=True):
        np.testing.assert_allclose(chip, _warp(image, transform, size=10), atol=1e-6)


# Canvases.


def _canvas(pixels, transform, *, size, factor, bucket_sizes=(48, 96, 192)):
    bounds = align.chip_bounds(transform, size) + np.array([-2, -2, 2, 2]) * factor
    return align.cut_canvas(pixels, bounds, factor=factor, bucket_sizes=bucket_sizes)


@pytest.mark.parametrize(
    "transform",
    # Inside, over the upper left corner, over the lower right corner.
    [
        _transform(1.1, 0.3, (40, 30)),
        _transform(0.9, -0.5, (-8, 5)),
        _transform(1.0, 0.2, (99, 99)),
    ],
)
def test_the_chip_from_a_canvas_is_that_from_the_photo(transform):
    pixels = skimage.data.astronaut()[:120, 150:270]
    canvas = _canvas(pixels, transform, size=32, factor=1)
    assert canvas.image.shape[:2] in {(48, 48), (96, 96)} and canvas.image.dtype == np.float32
    chip = _warp(canvas.image, align.canvas_transform(transform, canvas), size=32)
    direct = _warp(pixels / np.float32(255), transform, size=32)
    np.testing.assert_allclose(chip, direct, atol=2e-5)


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_the_chip_from_an_averaged_canvas_is_near_that_from_the_photo(factor):
    photo = _smooth(200, 190)
    pixels = np.round(photo * 255).astype(np.uint8)
    transform = _transform(factor, 0.3, (20.0, 60.0))
    canvas = _canvas(pixels, transform, size=24, factor=factor)
    ours = align.canvas_transform(transform, canvas)
    assert align.transform_scale(ours) == pytest.approx(1.0)
    chip = _warp(canvas.image, ours, size=24)
    direct = _warp(photo, transform, size=24, pool=factor)
    # A canvas's blocks begin at its origin, those of a photo at 0.
    np.testing.assert_allclose(chip, direct, atol=0.05)
    # A shift of half a photo pixel would show.
    assert np.abs(np.asarray(chip - direct)).mean() < 0.01


def test_a_canvas_holds_block_averages_of_the_photo():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    canvas = align.cut_canvas(pixels, np.array([4.5, 7, 15, 19]), factor=3, bucket_sizes=(8, 16))
    assert canvas.origin == (4, 7) and canvas.size == (4, 4) and canvas.factor == 3
    assert canvas.image.shape == (8, 8, 3)
    for i, j in np.ndindex(3, 4):
        block = pixels[4 + 3 * i : 7 + 3 * i, 7 + 3 * j : 10 + 3 * j]
        np.testing.assert_allclose(canvas.image[i, j], block.mean(axis=(0, 1)) / 255, atol=1e-6)
    # The last block row has two photo rows within the bounds; the last one counts twice.
    block = pixels[[13, 14, 14], 7:10]
    np.testing.assert_allclose(canvas.image[3, 0], block.mean(axis=(0, 1)) / 255, atol=1e-6)
    assert canvas.image[4:].sum() == 0 and canvas.image[:, 4:].sum() == 0


def test_canvas_transform_keeps_points():
    """A canvas pixel's center is the mean of its photo pixels' centers."""
    canvas = align.Canvas(np.zeros((8, 8, 3), np.float32), (10, 20), 3, (8, 8))
    to_canvas = align.canvas_transform(np.eye(2, 3), canvas)
    np.testing.assert_allclose(
        _apply(to_canvas, np.array([[11.0, 21], [14, 27]])), [[0, 0], [1, 2]]
    )
