"""What happens to an image between a scene and a network: light, camera, compression.

These are the parts of an expectation over transformation (Athalye et al., "Synthesizing Robust
Adversarial Examples", ICML 2018).

Images are `[H, W, 3]` float in [0, 1]; functions take one image, batch with `jax.vmap`. All are
differentiable; those that round (`jpeg`) pass the gradient straight through. Results may leave
[0, 1] except where a function says that it clips.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core.perception import windows

_BLUR_RADIUS = 3

# Quantisation tables of ITU-T T.81 (JPEG), annex K.1, tables K.1 and K.2.
_LUMA_TABLE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.float32,
)
_CHROMA_TABLE = np.full((8, 8), 99, np.float32)
_CHROMA_TABLE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
# RGB to Y, Cb, Cr of JFIF 1.02 (ITU-R BT.601), centerd on 0.
_TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32
)


@dataclasses.dataclass(frozen=True)
class ViewOptions:
    """Ranges of `random_view`; 0 (or None) switches a part off.

    Attributes:
        light: brightness gain in [1 - light, 1 + light].
        contrast: factor about the image's mean, likewise.
        color_cast: gain of each channel, likewise.
        noise: largest standard deviation of Gaussian noise, in [0, 1] units.
        blur_px: largest standard deviation of Gaussian blur, in pixels, at most 1.5.
        jpeg_quality: (lowest, highest) quality in 1..100.
    """

    light: float = 0.3
    contrast: float = 0.2
    color_cast: float = 0.05
    noise: float = 0.02
    blur_px: float = 0.8
    jpeg_quality: tuple[int, int] | None = (50, 95)

    def __post_init__(self) -> None:
        for name in ("light", "contrast", "color_cast"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must lie in [0, 1)")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise is {self.noise}, must lie in [0, 1]")
        if not 0 <= self.blur_px <= _BLUR_RADIUS / 2:
            raise ValueError(f"blur_px is {self.blur_px}, must lie in [0, {_BLUR_RADIUS / 2}]")
        if self.jpeg_quality is not None:
            low, high = self.jpeg_quality
            if not 1 <= low <= high <= 100:
                raise ValueError(f"jpeg_quality is {self.jpeg_quality}, must rise within 1..100")


def random_view(
    key: jax.Array, image: jax.Array, options: ViewOptions, *, share: jax.Array | float = 1.0
) -> jax.Array:
    """One random photo of the scene: `random_light`, then `random_capture`.

    Args:
        key: decides all draws, each uniform in its range.
        image: `[H, W, 3]`.
        options: the ranges.
        share: how much of the ranges of blur and JPEG is used, from their mild ends, in [0, 1].

    Returns:
        `[H, W, 3]` in [0, 1].
    """
    light_key, capture_key = jax.random.split(key)
    lit = random_light(light_key, image, options)
    return random_capture(capture_key, lit, options, share=share)


def random_light(
    key: jax.Array, image: jax.Array, options: ViewOptions, *, mean: jax.Array | None = None
) -> jax.Array:
    """The scene in another light: brightness, contrast, color cast. The same key, the same light.

    Args:
        key: decides the draws.
        image: `[H, W, 3]`.
        options: the ranges.
        mean: scalar about which contrast changes; by default the image's.
    """
    keys = jax.random.split(key, 3)

    def gain(key: jax.Array, width: float, shape: tuple[int, ...] = ()) -> jax.Array:
        return jax.random.uniform(key, shape, minval=1 - width, maxval=1 + width)

    if options.contrast:
        image = change_contrast(image, gain(keys[0], options.contrast), mean=mean)
    if options.light:
        image = image * gain(keys[1], options.light)
    if options.color_cast:
        image = image * gain(keys[2], options.color_cast, (1, 1, 3))
    return image


def random_capture(
    key: jax.Array, image: jax.Array, options: ViewOptions, *, share: jax.Array | float = 1.0
) -> jax.Array:
    """What a camera makes of an image `[H, W, 3]`: blur, noise, clip to [0, 1], JPEG."""
    keys = jax.random.split(key, 4)
    if options.blur_px:
        image = blur(image, share * jax.random.uniform(keys[0], maxval=options.blur_px))
    if options.noise:
        image = add_noise(keys[1], image, jax.random.uniform(keys[2], maxval=options.noise))
    image = jnp.clip(image, 0.0, 1.0)
    if options.jpeg_quality is not None:
        low, high = options.jpeg_quality
        low = high - share * (high - low)
        image = jpeg(image, jax.random.uniform(keys[3], minval=low, maxval=high))
    return image


def change_contrast(
    image: jax.Array, factor: jax.Array | float, *, mean: jax.Array | None = None
) -> jax.Array:
    """Moves all values away from a mean, by default the image's, or towards it, by a factor."""
    mean = jnp.mean(image) if mean is None else mean
    return mean + factor * (image - mean)


def add_noise(key: jax.Array, image: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """Adds Gaussian noise of standard deviation `sigma`, independent in every value."""
    return image + sigma * jax.random.normal(key, image.shape, image.dtype)


def blur(image: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """Gaussian blur of `sigma` pixels (0: none), cut at 3 pixels; edges are repeated outwards."""
    chex.assert_rank(image, 3)
    reach = jnp.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, dtype=jnp.float32)
    weights = jnp.exp(-((reach / jnp.maximum(sigma, 1e-3)) ** 2) / 2)
    weights = weights / jnp.sum(weights)
    margin = (_BLUR_RADIUS, _BLUR_RADIUS)
    planes = windows.extend(image.transpose(2, 0, 1), {1: margin, 2: margin})
    return windows.window_sums(planes, weights).transpose(1, 2, 0)


def jpeg(image: jax.Array, quality: jax.Array | float) -> jax.Array:
    """What JPEG compression with 4:2:0 chroma leaves of an image, clipped to [0, 1].

    The lossy half of baseline JPEG: color transform, chroma averaged over 2 x 2 pixels, 8 x 8 DCT,
    division by the standard tables scaled as the Independent JPEG Group does, rounding. Rounding
    passes the gradient straight through (Bengio et al. 2013). Chroma is doubled by repetition.

    Args:
        image: `[H, W, 3]` in [0, 1]; blocks start at its first pixel, and edges are repeated to a
            multiple of 16.
        quality: in [1, 100].

    Returns:
        `[H, W, 3]`.
    """
    chex.assert_rank(image, 3)
    height, width, _ = image.shape
    quality = jnp.asarray(quality, jnp.float32)
    percent = jnp.where(quality < 50, 5000.0 / quality, 200.0 - 2.0 * quality)
    planes = jnp.einsum("hwc,kc->khw", 255.0 * image, jnp.asarray(_TO_YCC))
    planes = windows.extend(planes, {1: (0, -height % 16), 2: (0, -width % 16)})
    rows, columns = planes.shape[1:]
    luma = _quantised(planes[:1] - 128.0, _LUMA_TABLE, percent) + 128.0
    halved = planes[1:].reshape(2, rows // 2, 2, columns // 2, 2).mean(axis=(2, 4))
    chroma = _quantised(halved, _CHROMA_TABLE, percent)
    chroma = jnp.repeat(jnp.repeat(chroma, 2, axis=1), 2, axis=2)
    back = jnp.asarray(np.linalg.inv(_TO_YCC))
    pixels = jnp.einsum("khw,ck->hwc", jnp.concatenate([luma, chroma]), back)
    return jnp.clip(_straight_through(pixels, jnp.round(pixels)) / 255.0, 0.0, 1.0)[:height, :width]


def _quantised(planes: jax.Array, table: np.ndarray, percent: jax.Array) -> jax.Array:
    """Planes `[K, H, W]` after quantisation of their 8 x 8 DCT.

    The DCT is orthonormal: with rounding passed straight through, the gradient of all of it is the
    identity.
    """
    count, height, width = planes.shape
    steps = jnp.clip(jnp.floor((table * percent + 50.0) / 100.0), 1.0, 255.0)
    # One product for a block: 64 pixels to 64 coefficients.
    matrix = jnp.asarray(np.kron(_dct(), _dct()))
    blocks = planes.reshape(count, height // 8, 8, width // 8, 8).transpose(0, 1, 3, 2, 4)
    coefficients = blocks.reshape(-1, 64) @ matrix.T
    steps = steps.reshape(1, 64)
    blocks = (jnp.round(coefficients / steps) * steps) @ matrix
    blocks = blocks.reshape(count, height // 8, width // 8, 8, 8).transpose(0, 1, 3, 2, 4)
    return _straight_through(planes, blocks.reshape(count, height, width))


def _dct() -> np.ndarray:
    """The orthonormal DCT-II of 8 values, `[8, 8]`."""
    k, n = np.mgrid[:8, :8]
    scale = np.where(k == 0, np.sqrt(1 / 8), np.sqrt(2 / 8))
    return (scale * np.cos(np.pi * (2 * n + 1) * k / 16)).astype(np.float32)


def _straight_through(values: jax.Array, rounded: jax.Array) -> jax.Array:
    """The rounded values with the gradient of the values."""
    return rounded + (values - jax.lax.stop_gradient(values))
