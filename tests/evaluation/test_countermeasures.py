"""Countermeasures: conversions against Pillow and arithmetic, mixing by hand, RandAugment."""

import io

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from afr_jax.evaluation.attackers import countermeasures
from afr_jax.perturb import sign_descent

_ueraser = jax.jit(countermeasures.ueraser)


@pytest.fixture(scope="module")
def images():
    """Smooth pictures with some noise, uint8 `[4, 32, 32, 3]`."""
    generator = np.random.default_rng(0)
    ramp = np.linspace(20, 200, 32)[:, None, None] + np.array([0.0, 20.0, 40.0])
    return np.clip(ramp + generator.normal(0, 12, (4, 32, 32, 3)), 0, 255).astype(np.uint8)


def _equalized(image):
    """By OpenCV; Pillow's has steps of whole counts, which small images feel."""
    return np.stack([cv2.equalizeHist(channel) for channel in np.asarray(image).T]).T


def test_gray_is_the_luma_in_all_channels(images):
    gray = countermeasures.convert("grayscale", images)
    assert (gray == gray[..., :1]).all()
    luma = images.astype(np.float64) @ [0.299, 0.587, 0.114]
    assert np.abs(gray[..., 0] - luma).max() <= 1


def test_jpeg_is_the_real_codec_and_lower_quality_is_further_away(images):
    errors = []
    for quality in (75, 50, 10):
        made = countermeasures.convert(f"jpeg{quality}", images)
        buffer = io.BytesIO()
        Image.fromarray(images[1]).save(buffer, "JPEG", quality=quality, subsampling=2)
        np.testing.assert_array_equal(made[1], np.asarray(Image.open(buffer)))
        errors.append(np.abs(made.astype(int) - images).mean())
    assert errors == sorted(errors) and errors[0] > 0


def test_bit_depth_and_blur(images):
    low = countermeasures.convert("bit_depth", images)
    assert set(np.unique(low)) <= {0, 85, 170, 255}
    assert np.abs(low.astype(int) - images).max() <= 43
    blurred = countermeasures.convert("blur", images)
    assert (
        np.diff(blurred.astype(float), axis=2).std() < np.diff(images.astype(float), axis=2).std()
    )
    assert countermeasures.convert("none", images) is images
    with pytest.raises(ValueError, match="sepia"):
        countermeasures.convert("sepia", images)


def test_the_denoiser_takes_noise_away_and_leaves_edges():
    clean = np.full((64, 64, 3), 60, np.uint8)
    clean[:, 32:] = 180
    noise = np.random.default_rng(3).normal(0, 4, clean.shape)
    noisy = np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)
    found = countermeasures.convert("denoise", noisy[None])[0].astype(float)
    assert np.abs(found - clean).mean() < np.abs(noisy.astype(float) - clean).mean() / 2
    assert np.abs(found - clean).max() < 20


def test_mixed_images_are_what_their_shares_say():
    images = jax.random.uniform(jax.random.key(0), (6, 8, 8, 3))
    mixed = countermeasures.mixup(jax.random.key(1), images)
    share = np.asarray(mixed.share).reshape(-1, 1, 1, 1)
    by_hand = share * np.asarray(images) + (1 - share) * np.asarray(images)[mixed.other]
    np.testing.assert_allclose(mixed.images, by_hand, atol=1e-6)
    assert sorted(np.asarray(mixed.other)) == list(range(6)) and 0 <= share.min() <= 1


def test_cutmix_pastes_one_rectangle_and_counts_its_area():
    images = jnp.arange(6.0).reshape(6, 1, 1, 1) * jnp.ones((6, 16, 16, 3)) / 6
    seen = []
    for seed in range(12):
        mixed = countermeasures.cutmix(jax.random.key(seed), images)
        source = np.asarray(images)[:, 0, 0, 0]
        values = np.asarray(mixed.images)
        moved = np.flatnonzero(np.asarray(mixed.other) != np.arange(6))
        for row in moved:
            own = np.isclose(values[row, ..., 0], source[row])
            np.testing.assert_allclose(own.mean(), mixed.share[row], atol=1e-6)
            other = ~own
            assert np.isclose(values[row][other], source[mixed.other[row]]).all()
            rows, columns = np.flatnonzero(other.any(1)), np.flatnonzero(other.any(0))
            assert other.sum() == len(rows) * len(columns)
        seen.append(float(mixed.share[0]))
    assert 1.0 in seen and len(set(seen)) > 3


@pytest.mark.parametrize(
    "name, pillow_fn, tolerance",
    [
        ("autocontrast", ImageOps.autocontrast, 1),
        ("equalize", _equalized, 0),
        ("solarize", lambda image: ImageOps.solarize(image, 179), 0),
        ("posterize", lambda image: ImageOps.posterize(image, 7), 0),
    ],
    ids=["autocontrast", "equalize", "solarize", "posterize"],
)
def test_operations_do_what_others_do(images, name, pillow_fn, tolerance):
    """At magnitude 0.3: solarize from 0.7 on (178.5), 7 bits."""
    operation = countermeasures.randaugment_operations(0.3)[name]
    made = np.asarray(operation(jnp.asarray(images[0], jnp.float32) / 255, jnp.ones(()))) * 255
    expected = np.asarray(pillow_fn(Image.fromarray(images[0]))).astype(np.float64)
    assert np.abs(made - expected).max() <= tolerance + 0.51


def test_geometry_moves_by_what_it_says():
    image = jnp.zeros((32, 32, 3)).at[10:20, 12:22].set(1.0)
    operations = countermeasures.randaugment_operations(0.3)
    rotate, shift = operations["rotate"], operations["translate_x"]
    moved = np.asarray(shift(image, jnp.ones(())))
    # 0.3 x 10 px to the left: the place is sampled at column + 3.
    np.testing.assert_allclose(moved[:, :29], np.asarray(image)[:, 3:], atol=1e-5)
    there = rotate(image, jnp.ones(()))
    back = np.asarray(rotate(there, -jnp.ones(())))
    assert (
        np.abs(back[13:17, 15:19] - 1).max() < 1e-5
        and np.abs(np.asarray(there) - image).max() > 0.1
    )


def test_randaugment_stays_in_range_and_depends_on_its_key(images):
    image = jnp.asarray(images[0], jnp.float32) / 255
    augment_fn = jax.jit(jax.vmap(countermeasures.randaugment, in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(0), 16)
    made = np.asarray(augment_fn(keys, image))
    np.testing.assert_array_equal(made, augment_fn(keys, image))
    assert made.min() >= -1e-6 and made.max() <= 1 + 1e-6 and np.isfinite(made).all()
    assert len({array.tobytes() for array in made}) > 8


def test_ueraser_views_differ_by_image_and_stay_in_range(images):
    shown = jnp.asarray(images, jnp.float32) / 255
    made = np.stack([_ueraser(jax.random.key(seed), shown) for seed in range(12)])
    assert made.min() >= 0 and made.max() <= 1 and np.isfinite(made).all()
    # Equal images of a batch get fields and channels of their own.
    twins = jnp.broadcast_to(shown[:1], shown.shape)
    views = np.stack([_ueraser(jax.random.key(seed), twins) for seed in range(6)])
    assert (np.abs(views - views[:, :1]).max(axis=(2, 3, 4)) > 0.01).mean() > 0.5


def test_the_worst_view_is_that_of_the_largest_loss(images):
    """By the same views, made one by one."""
    shown, key = jnp.asarray(images, jnp.float32) / 255, jax.random.key(7)
    weights = jax.random.normal(jax.random.key(8), shown.shape[1:])

    def losses_fn(views):
        return jnp.sum(views * weights[None], axis=(1, 2, 3))

    made = countermeasures.worst_views(key, shown, losses_fn, num_views=3)
    views = np.stack([_ueraser(one, shown) for one in jax.random.split(key, 3)])
    losses = np.einsum("vbhwc,hwc->vb", views.astype(np.float64), np.asarray(weights, np.float64))
    expected = views[losses.argmax(axis=0), np.arange(len(images))]
    np.testing.assert_allclose(made, expected, atol=1e-6)


def test_adversarial_images_raise_the_loss_within_the_ball():
    weights = jax.random.normal(jax.random.key(2), (8, 8, 3))
    images = jax.random.uniform(jax.random.key(3), (3, 8, 8, 3))

    def loss_fn(shown):
        return jnp.sum(shown * weights[None])

    made = sign_descent.adversarial(
        jax.random.key(4), loss_fn, images, limit=8 / 255, step_size=2 / 255, num_steps=10
    )
    change = np.asarray(made - images)
    assert np.abs(change).max() <= 8 / 255 + 1e-6
    # A linear loss: ten steps of 2 reach the corner of the ball from anywhere in it.
    best = np.clip(np.asarray(images) + np.sign(np.asarray(weights)) * 8 / 255, 0, 1)
    np.testing.assert_allclose(made, best, atol=1e-6)


def test_denoised_is_what_opencv_makes_of_the_file(tmp_path):
    """OpenCV reads files with blue first, and its denoiser takes them so."""
    generator = np.random.default_rng(0)
    pixels = np.zeros((48, 48, 3), np.uint8) + np.array([200, 90, 40], np.uint8)
    noisy = np.clip(pixels + generator.normal(0, 20, pixels.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(tmp_path / "noisy.png")
    read = cv2.imread(str(tmp_path / "noisy.png"))
    expected = cv2.cvtColor(
        cv2.fastNlMeansDenoisingColored(
            read, None, countermeasures._DENOISED, countermeasures._DENOISED
        ),
        cv2.COLOR_BGR2RGB,
    )
    found = countermeasures.convert("denoise", noisy[None])[0]
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - pixels.astype(int)).mean() < np.abs(noisy - pixels.astype(int)).mean()
