"""Area resize against OpenCV, bilinear sampling against TensorFlow's rule, 8-bit conversion."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afr_jax.core import images

_resize = jax.jit(images.resize_area, static_argnames="shape")
_sample = jax.jit(images.bilinear_crops)


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


def _inter_area(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    resized = cv2.resize(image, shape[::-1], interpolation=cv2.INTER_AREA)
    return resized.reshape(*shape, image.shape[2])


@pytest.mark.parametrize(
    "size, shape",
    [
        # The pyramid of Kaziakhmedov et al. 2019.
        ((720, 1280), (103, 182)),
        ((720, 1280), (73, 129)),
        ((720, 1280), (52, 92)),
        ((40, 60), (20, 15)),
        ((50, 37), (34, 36)),
        ((50, 37), (50, 20)),
        ((50, 37), (1, 1)),
        ((50, 37), (50, 37)),
        ((300, 30), (3, 29)),
    ],
)
def test_resize_area_equals_opencv(size, shape):
    image = _noise(*size, 3)
    resized = _resize(image, shape)
    assert resized.shape == (*shape, 3) and resized.dtype == jnp.float32
    # Far below a gray level: row starts of 14-pixel cells are known to 1e-4 pixel.
    np.testing.assert_allclose(resized, _inter_area(image, shape), atol=2e-5)


@pytest.mark.parametrize(
    "in_size, out_size",
    [((90, 120), (30, 40)), ((83, 120), (27, 40)), ((90, 101), (29, 32)), ((61, 70), (19, 22))],
)
def test_resize_area_of_a_padded_canvas_equals_that_of_the_image(in_size, out_size):
    image = _noise(*in_size, 3)
    canvas = np.full((90, 120, 3), 1e3, np.float32)
    canvas[: in_size[0], : in_size[1]] = image
    resized = _resize(canvas, (30, 40), in_size=jnp.array(in_size), out_size=jnp.array(out_size))
    assert resized.shape == (30, 40, 3)
    np.testing.assert_allclose(
        resized[: out_size[0], : out_size[1]], _inter_area(image, out_size), atol=2e-5
    )


def test_resize_area_of_many_taps_within_a_padded_canvas(variant):
    """More than eight taps go through a loop."""
    image = _noise(173, 150, 2)
    canvas = images.pad_to(image, (192, 192))
    size = jnp.array([173, 150])
    resize = variant(images.resize_area, static_argnames="shape")
    resized = resize(canvas, (10, 10), in_size=size, out_size=jnp.array([9, 8]))
    np.testing.assert_allclose(resized[:9, :8], _inter_area(image, (9, 8)), atol=2e-5)


@pytest.mark.parametrize("in_size, out_size", [(151, 42), (160, 60), (170, 36)])
def test_nothing_of_the_padding_reaches_the_last_row(in_size, out_size):
    """In float32 the last intervals of these sizes end behind the image, by about 1e-5 rows."""
    canvas = np.zeros((288, 288, 1), np.float32)
    canvas[in_size:] = canvas[:, in_size:] = 1e6
    sizes = {"in_size": jnp.array([in_size] * 2), "out_size": jnp.array([out_size] * 2)}
    resized = _resize(canvas, (60, 60), **sizes)
    np.testing.assert_array_equal(resized[:out_size, :out_size], 0)


def test_resize_area_obeys_out_size_along_an_axis_that_keeps_its_length():
    image = _noise(20, 20, 1)
    resized = _resize(image, (20, 20), out_size=jnp.array([19, 19]))
    np.testing.assert_allclose(resized[:19, :19], _inter_area(image, (19, 19)), atol=1e-5)


def test_resize_area_vmaps_over_images_and_sizes():
    batch = _noise(3, 24, 30, 1)
    sizes = jnp.array([[24, 30], [22, 30], [23, 28]])
    out_sizes = jnp.array([[8, 10], [7, 9], [7, 9]])
    resize = jax.vmap(
        lambda image, in_size, out_size: _resize(image, (8, 10), in_size=in_size, out_size=out_size)
    )
    for resized, image, (h, w), (rows, columns) in zip(
        resize(batch, sizes, out_sizes), batch, sizes.tolist(), out_sizes.tolist(), strict=True
    ):
        expected = _inter_area(np.ascontiguousarray(image[:h, :w]), (rows, columns))
        np.testing.assert_allclose(resized[:rows, :columns], expected, atol=1e-5)


def test_resize_area_spreads_the_gradient_by_the_covered_area():
    gradient = jax.grad(lambda image: _resize(image, (2, 1))[0, 0, 0])(jnp.zeros((3, 2, 1)))
    np.testing.assert_allclose(
        gradient[..., 0], [[1 / 3, 1 / 3], [1 / 6, 1 / 6], [0, 0]], atol=1e-6
    )


@pytest.mark.parametrize("shape", [(51, 37), (50, 38), (0, 10), (10, 0), (-1, 10)])
def test_resize_area_rejects_shapes_that_do_not_shrink(shape):
    with pytest.raises(ValueError, match="resize_area shrinks"):
        images.resize_area(jnp.zeros((50, 37, 3)), shape)


def test_resize_area_rejects_an_image_without_channels():
    with pytest.raises(AssertionError):
        images.resize_area(jnp.zeros((50, 37)), (10, 10))


def _sampled(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """One point of TensorFlow's `crop_and_resize` (its CPU kernel), in float64; outside zero."""
    height, width = image.shape[:2]
    if not (0 <= y <= height - 1 and 0 <= x <= width - 1):
        return np.zeros(image.shape[2])
    top, left, bottom, right = int(np.floor(y)), int(np.floor(x)), int(np.ceil(y)), int(np.ceil(x))
    upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
    lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
    return upper + (lower - upper) * (y - top)


@pytest.mark.parametrize("size", [(20, 17), (15, 17), (20, 1), (9, 8)])
def test_bilinear_crops_follow_tensorflow(size, variant):
    image = _noise(*size, 3)
    canvas = np.full((20, 17, 3), 1e3, np.float32)
    canvas[: size[0], : size[1]] = image
    rng = np.random.default_rng(1)
    rows = rng.uniform(-3, size[0] + 2, (4, 6)).astype(np.float32)
    columns = rng.uniform(-3, size[1] + 2, (4, 5)).astype(np.float32)
    # The corners, a whole pixel, and the last place that counts as inside.
    rows[0] = [0, size[0] - 1, 3, -1e-3, size[0] - 1 + 1e-3, -50]
    columns[0] = [0, size[1] - 1, 2.5, 99, -1]
    crops = variant(images.bilinear_crops)(canvas, rows, columns, jnp.array(size))
    expected = [
        [[_sampled(image.astype(float), y, x) for x in columns[n]] for y in rows[n]]
        for n in range(4)
    ]
    assert crops.shape == (4, 6, 5, 3)
    np.testing.assert_allclose(crops, expected, atol=1e-5)


def test_bilinear_crops_of_no_boxes_and_of_no_image():
    image = _noise(8, 8, 3)
    empty = _sample(image, jnp.zeros((0, 4)), jnp.zeros((0, 4)), jnp.array([8, 8]))
    assert empty.shape == (0, 4, 4, 3)
    nothing = _sample(image, jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.array([0, 0]))
    np.testing.assert_array_equal(nothing, 0)


@pytest.mark.parametrize(
    "size, expected", [(1, 8), (8, 8), (9, 16), (24, 24), (25, 48), (48, 48), (49, 72)]
)
def test_bucket_size(size, expected):
    assert images.bucket_size(size, (8, 16, 24)) == expected


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 5, 3, 2)])
def test_pad_to_appends_zeros(shape):
    array = _noise(*shape)
    padded = images.pad_to(array, (6, 9))
    assert padded.shape == (6, 9, *shape[2:]) and padded.dtype == array.dtype
    np.testing.assert_array_equal(padded[:4, :5], array)
    assert padded[4:].sum() == 0 and padded[:, 5:].sum() == 0


def test_pad_to_does_not_cut():
    with pytest.raises(ValueError, match="negative"):
        images.pad_to(_noise(4, 5, 3), (3, 9))


def test_uint8_round_trip():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = images.to_float(pixels)
    assert image.dtype == jnp.float32 and image.min() == 0.0 and image.max() == 1.0
    np.testing.assert_array_equal(images.to_uint8(image), pixels)


def test_to_uint8_rounds_and_clips():
    values = jnp.array([-1.0, -0.001, 0.49 / 255, 0.51 / 255, 100.4 / 255, 100.6 / 255, 1.001, 9.0])
    pixels = images.to_uint8(values)
    assert pixels.dtype == jnp.uint8
    np.testing.assert_array_equal(pixels, [0, 0, 0, 1, 100, 101, 255, 255])


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_to_float_takes_bytes_only(dtype):
    with pytest.raises(AssertionError):
        images.to_float(jnp.zeros((2, 2), dtype))


@pytest.mark.parametrize("exponent", [2.4, 1 / 3, 0.35])
def test_powers_are_those_of_double_precision(exponent):
    values = np.geomspace(1e-6, 20.0, 1001).astype(np.float32)
    found = jax.jit(images.power, static_argnums=1)(values, exponent)
    np.testing.assert_allclose(found, values.astype(np.float64) ** exponent, rtol=5e-6)
