"""What a victim does against unlearnable noise: conversions of stored images, changes in training.

Conversions (`convert`) act once on 8-bit images on the host, JPEG through the real codec: Liu et
al. 2023, "Image Shortcut Squeezing" (ICML). The others act in every step on the device, on batches
`[B, H, W, 3]` float in [0, 1] with the key first: mixup, cutmix, RandAugment, UEraser here; cutout
is an option of `augmentation.Augmentation`, adversarial training is in `victims`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageFilter

from afr_jax.core import parallel
from afr_jax.data import photos

STORED = ("none", "grayscale", "jpeg10", "jpeg50", "jpeg75", "blur", "denoise", "bit_depth")
IN_TRAINING = ("cutout", "mixup", "cutmix", "randaugment", "ueraser", "adversarial")
NAMES = STORED + IN_TRAINING
Operation = Callable[[jax.Array, jax.Array], jax.Array]
_BLUR_SIGMA_PX = 1.0
# Standard deviation of the noise that the denoiser takes away, in gray levels.
_DENOISED = 6
# Image Shortcut Squeezing reduces to 2 bits.
_BITS = 2
_CHANNELS = 3
_UERASER_MAGNITUDES = (0.2, 0.5, 0.8)


class Mixed(NamedTuple):
    """A batch whose images are each a mixture of two.

    Attributes:
        images: `[B, H, W, 3]`.
        other: `[B]` int32, row of the second image.
        share: `[B]` float, weight of the first label.
    """

    images: jax.Array
    other: jax.Array
    share: jax.Array


def convert(name: str, images: np.ndarray, *, num_threads: int = 4) -> np.ndarray:
    """Stored images as the victim converts them.

    grayscale: ITU-R 601 luma in three channels. jpegNN: a file of that quality, 4:2:0, and back.
    blur: Gaussian, standard deviation 1 px. denoise: non-local means of strength 6 (Buades et al.
    2005, by OpenCV). bit_depth: 2 bits a channel, spread over 0..255.

    Args:
        name: one of `STORED`.
        images: `[N, H, W, 3]` uint8.
        num_threads: that convert.

    Returns:
        `[N, H, W, 3]` uint8.

    Raises:
        ValueError: there is no such conversion.
    """
    if name not in STORED:
        raise ValueError(f"no conversion {name!r}; there are: {', '.join(STORED)}")
    if name == "none":
        return images
    if name == "bit_depth":
        steps = 2**_BITS - 1
        return np.rint(np.rint(images * (steps / 255.0)) * (255.0 / steps)).astype(np.uint8)
    convert_fn = functools.partial(_convert_one, name)
    return np.stack(parallel.thread_map(convert_fn, list(images), width=num_threads))


def mixup(key: jax.Array, images: jax.Array, *, alpha: float = 1.0) -> Mixed:
    """Weighted means of two images and labels; Zhang et al. 2018, "mixup", equation 2.

    One weight of Beta(alpha, alpha) for the batch.
    """
    order_key, share_key = jax.random.split(key)
    count = images.shape[0]
    other = jax.random.permutation(order_key, count)
    share = jax.random.beta(share_key, alpha, alpha)
    mixed = share * images + (1 - share) * images[other]
    return Mixed(mixed, other, jnp.full((count,), share))


def cutmix(
    key: jax.Array, images: jax.Array, *, beta: float = 1.0, probability: float = 0.5
) -> Mixed:
    """A rectangle of another image pasted in, labels by area; Yun et al. 2019, "CutMix".

    One rectangle for the batch, of an area drawn from 1 - Beta(beta, beta), cut at the border; the
    batch stays as it is with 1 - probability. beta and probability are those of Huang et al. 2021.
    """
    order_key, share_key, place_key, use_key = jax.random.split(key, 4)
    count, height, width, _ = images.shape
    other = jax.random.permutation(order_key, count)
    side = jnp.sqrt(1.0 - jax.random.beta(share_key, beta, beta))
    used = jax.random.bernoulli(use_key, probability)
    size = jnp.array([height, width], jnp.float32)
    center = jax.random.uniform(place_key, (2,)) * size
    low = jnp.clip(jnp.round(center - side * size / 2), 0, size)
    high = jnp.clip(jnp.round(center + side * size / 2), 0, size)
    rows, columns = jnp.arange(height), jnp.arange(width)
    in_rows = (rows >= low[0]) & (rows < high[0])
    in_columns = (columns >= low[1]) & (columns < high[1])
    hole = (in_rows[:, None] & in_columns[None, :] & used).reshape(1, height, width, 1)
    share = 1.0 - jnp.mean(hole.astype(jnp.float32))
    mixed = jnp.where(hole, images[other], images)
    return Mixed(mixed, other, jnp.full((count,), share))


def randaugment(
    key: jax.Array, image: jax.Array, *, num_operations: int = 2, magnitude: float = 0.3
) -> jax.Array:
    """Random operations of fixed strength; Cubuk et al. 2020, "RandAugment".

    The 14 operations of the paper's table 1, with the ranges of AutoAugment; geometry is bilinear,
    black comes in.

    Args:
        key: of all draws.
        image: `[H, W, 3]` float in [0, 1].
        num_operations: applied one after another; 2 in the paper.
        magnitude: of 1; 0.3 is level 9 of 30.

    Returns:
        `[H, W, 3]` in [0, 1].
    """
    operations = list(randaugment_operations(magnitude).values())
    for step_key in jax.random.split(key, num_operations):
        which_key, sign_key = jax.random.split(step_key)
        which = jax.random.randint(which_key, (), 0, len(operations))
        sign = jax.random.rademacher(sign_key, (), jnp.float32)
        image = jax.lax.switch(which, operations, image, sign)
    return image


def randaugment_operations(magnitude: float) -> dict[str, Operation]:
    """The operations of `randaugment` by name, at a magnitude in [0, 1].

    Each takes an image `[H, W, 3]` in [0, 1] and a sign, 1.0 or -1.0, for those that go both ways.
    """
    enhance = 0.9 * magnitude
    angle = jnp.deg2rad(30.0 * magnitude)
    shear = 0.3 * magnitude
    shift = magnitude * 10 / 32  # AutoAugment shifts images of 32 px by up to 10.
    bits = 8 - round(4 * magnitude)

    def blend(base_fn: Callable[[jax.Array], jax.Array]) -> Operation:
        def change(image: jax.Array, sign: jax.Array) -> jax.Array:
            base = base_fn(image)
            return jnp.clip(base + (1 + sign * enhance) * (image - base), 0.0, 1.0)

        return change

    def affine(
        matrix_fn: Callable[[jax.Array], jax.Array], offset: tuple[float, float] = (0.0, 0.0)
    ) -> Operation:
        def change(image: jax.Array, sign: jax.Array) -> jax.Array:
            move = jnp.array(offset) * jnp.array(image.shape[:2]) * sign
            return _warp(image, matrix_fn(sign), move)

        return change

    def rotation(sign: jax.Array) -> jax.Array:
        cosine, sine = jnp.cos(angle), sign * jnp.sin(angle)
        return jnp.stack([jnp.stack([cosine, -sine]), jnp.stack([sine, cosine])])

    def still(sign: jax.Array) -> jax.Array:
        del sign
        return jnp.eye(2)

    shear_x, shear_y = (jnp.array(m) for m in ([[0.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]))
    return {
        "identity": lambda image, sign: image,
        "autocontrast": lambda image, sign: _stretch(image),
        "equalize": lambda image, sign: _equalize(image),
        "rotate": affine(rotation),
        "solarize": lambda image, sign: jnp.where(image >= 1 - magnitude, 1 - image, image),
        "posterize": lambda image, sign: (
            jnp.floor(image * 255 / 2 ** (8 - bits)) * 2 ** (8 - bits) / 255
        ),
        "color": blend(lambda image: jnp.broadcast_to(_luma(image), image.shape)),
        "contrast": blend(lambda image: jnp.broadcast_to(jnp.mean(_luma(image)), image.shape)),
        "brightness": blend(jnp.zeros_like),
        "sharpness": blend(_smooth),
        "shear_x": affine(lambda sign: jnp.eye(2) + sign * shear * shear_x),
        "shear_y": affine(lambda sign: jnp.eye(2) + sign * shear * shear_y),
        "translate_x": affine(still, (0.0, shift)),
        "translate_y": affine(still, (shift, 0.0)),
    }


def ueraser(key: jax.Array, images: jax.Array) -> jax.Array:
    """Strong random views; Qin et al. 2023, "Learning the Unlearnable" (UEraser).

    As in the authors' code: with probability 1/2 each, a smooth random field is added (plasma
    brightness) and the channels are shuffled; then one random operation of random strength. The
    field is an enlarged grid of 4 x 4 with a random mean, within -1/2 and 1/2, where theirs is a
    fractal; the operation is one of `randaugment` at one of three magnitudes, the same for the
    batch, where theirs is TrivialAugment's.

    Args:
        key: of all draws.
        images: `[B, H, W, 3]` float in [0, 1].

    Returns:
        `[B, H, W, 3]` in [0, 1].
    """
    keys = jax.random.split(key, 7)
    count, height, width, _ = images.shape
    one_each = (count, 1, 1, 1)
    coarse = jax.random.uniform(keys[0], (count, 4, 4, 1), minval=-0.25, maxval=0.25)
    field = jax.image.resize(coarse, (count, height, width, 1), "linear")
    field += jax.random.uniform(keys[1], one_each, minval=-0.25, maxval=0.25)
    brighter = jnp.clip(images + field, 0.0, 1.0)
    images = jnp.where(jax.random.bernoulli(keys[2], shape=one_each), brighter, images)
    order = jnp.argsort(jax.random.uniform(keys[3], (count, 1, 1, _CHANNELS)), axis=-1)
    shuffled = jnp.take_along_axis(images, order, axis=-1)
    images = jnp.where(jax.random.bernoulli(keys[4], shape=one_each), shuffled, images)
    operations = [
        jax.vmap(operation)
        for magnitude in _UERASER_MAGNITUDES
        for operation in randaugment_operations(magnitude).values()
    ]
    which = jax.random.randint(keys[5], (), 0, len(operations))
    signs = jax.random.rademacher(keys[6], (count,), jnp.float32)
    return jnp.clip(jax.lax.switch(which, operations, images, signs), 0.0, 1.0)


def worst_views(
    key: jax.Array,
    images: jax.Array,
    losses_fn: Callable[[jax.Array], jax.Array],
    *,
    num_views: int = 5,
) -> jax.Array:
    """Of some views of each image, the one with the largest loss; UEraser-Max, equation 3.

    Args:
        key: of all draws.
        images: `[B, H, W, 3]` float in [0, 1].
        losses_fn: takes images and returns their losses `[B]`.
        num_views: K, of `ueraser`.

    Returns:
        `[B, H, W, 3]`.
    """
    # A loop, since the operations take long to compile; the network's part is not in it.
    views = jax.lax.map(lambda one: ueraser(one, images), jax.random.split(key, num_views))
    losses = jnp.stack([losses_fn(view) for view in views])
    return views[jnp.argmax(losses, axis=0), jnp.arange(len(images))]


def _warp(image: jax.Array, matrix: jax.Array, move: jax.Array) -> jax.Array:
    """Samples at matrix @ (place - center) + center + move, places being (row, column)."""
    height, width, _ = image.shape
    center = (jnp.array([height, width], jnp.float32) - 1) / 2
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    places = jnp.stack([rows, columns]).reshape(2, -1).astype(jnp.float32)
    at = matrix @ (places - center[:, None]) + (center + move)[:, None]

    def sample(channel: jax.Array) -> jax.Array:
        return jax.scipy.ndimage.map_coordinates(channel, list(at), order=1, cval=0.0)

    return jax.vmap(sample, in_axes=2, out_axes=1)(image).reshape(image.shape)


def _stretch(image: jax.Array) -> jax.Array:
    """Every channel stretched to 0..1; a flat one stays."""
    low = jnp.min(image, axis=(0, 1), keepdims=True)
    span = jnp.max(image, axis=(0, 1), keepdims=True) - low
    return jnp.where(span > 0, (image - low) / jnp.where(span > 0, span, 1.0), image)


def _equalize(image: jax.Array) -> jax.Array:
    """Every channel with an even histogram of 256 levels."""

    def one(channel: jax.Array) -> jax.Array:
        level = jnp.round(channel * 255).astype(jnp.int32).reshape(-1)
        counts = jnp.zeros(256, jnp.float32).at[level].add(1.0)
        below = jnp.cumsum(counts)
        first = below[jnp.min(level)]
        span = channel.size - first
        even = (below[level] - first) / jnp.where(span > 0, span, 1.0)
        return jnp.where(span > 0, even.reshape(channel.shape), channel)

    return jax.vmap(one, in_axes=2, out_axes=2)(image)


def _smooth(image: jax.Array) -> jax.Array:
    """Pillow's SMOOTH filter inside, the image itself at the border."""
    weights = jnp.array([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13
    height, width, _ = image.shape
    inner = sum(
        weights[i, j] * image[i : height - 2 + i, j : width - 2 + j]
        for i in range(3)
        for j in range(3)
    )
    return image.at[1:-1, 1:-1].set(inner)


def _luma(image: jax.Array) -> jax.Array:
    weights = jnp.array([0.299, 0.587, 0.114], image.dtype).reshape(1, 1, 3)
    return jnp.sum(image * weights, axis=-1, keepdims=True)


def _convert_one(name: str, pixels: np.ndarray) -> np.ndarray:
    if name.startswith("jpeg"):
        return photos.through_jpeg(pixels, quality=int(name.removeprefix("jpeg")))
    if name == "denoise":
        # OpenCV's has blue first.
        turned = np.ascontiguousarray(pixels[..., ::-1])
        turned = cv2.fastNlMeansDenoisingColored(turned, None, _DENOISED, _DENOISED)
        return np.ascontiguousarray(turned[..., ::-1])
    image = Image.fromarray(pixels)
    if name == "grayscale":
        image = image.convert("L")
    else:
        image = image.filter(ImageFilter.GaussianBlur(_BLUR_SIGMA_PX))
    return np.asarray(image.convert("RGB"))
