"""Random changes of training images on the device: crop, resize, flip, color, gray, cutout.

Every function takes the key first and ONE image `[H, W, 3]`, float RGB in [0, 1], and returns the
same shape and range; batch with `jax.vmap` and one key an image (`augment_batch`). The same key
gives the same change on any number of devices.

Color is changed as torchvision and Pillow do it. dm-pix does it otherwise (contrast about the mean
of each channel, saturation in HSV, a luma whose weights sum to 0.9999), which is why it is not used
here.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

# ITU-R 601, as Pillow's "L" and torchvision's grayscale.
_LUMA = (0.299, 0.587, 0.114)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to training images, in this order; the defaults do nothing.

    Attributes:
        pad_px: pads by so many black pixels and crops back at a random place (CIFAR's crop).
        min_scale: crops a rectangle of a random share of the area, between this and 1, and resizes
            it to the whole (Szegedy et al. 2015, section 6); 1 switches it off.
        max_stretch: aspect ratio of that rectangle between 1 / this and this.
        flip_probability: of a mirror image.
        brightness: factor between 1 - this and 1 + this.
        contrast: likewise, about the mean luma.
        saturation: likewise, about the luma of each pixel.
        gray_probability: of an image without color.
        cutout_px: side of a black square at a random center (DeVries and Taylor 2017); at the
            border only a part of it lies in the image.
    """

    pad_px: int = 0
    min_scale: float = 1.0
    max_stretch: float = 1.0
    flip_probability: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    gray_probability: float = 0.0
    cutout_px: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name in ("flip_probability", "gray_probability"):
            _check(name, getattr(self, name), 0, 1)
        for name in ("brightness", "contrast", "saturation"):
            _check(name, getattr(self, name), 0, 1)
        for name in ("pad_px", "cutout_px"):
            _check(name, getattr(self, name), 0, float("inf"))
        _check("min_scale", self.min_scale, 1e-3, 1)
        _check("max_stretch", self.max_stretch, 1, 4)


def augment_batch(key: jax.Array, images: jax.Array, *, options: Augmentation) -> jax.Array:
    """Changes every image of a batch `[B, H, W, 3]` with a key of its own."""
    keys = jax.random.split(key, images.shape[0])
    return jax.vmap(lambda k, image: augment(k, image, options=options))(keys, images)


def augment(key: jax.Array, image: jax.Array, *, options: Augmentation) -> jax.Array:
    """Changes an image as the options say.

    Args:
        key: of all draws for this image.
        image: `[H, W, 3]` float in [0, 1].
        options: what is done; steps that are switched off cost nothing.

    Returns:
        `[H, W, 3]` in [0, 1].
    """
    chex.assert_shape(image, (None, None, 3))
    keys = jax.random.split(key, 6)
    if options.pad_px:
        image = random_shift(keys[0], image, pad_px=options.pad_px)
    if options.min_scale < 1 or options.max_stretch > 1:
        image = random_resized_crop(
            keys[1], image, min_scale=options.min_scale, max_stretch=options.max_stretch
        )
    if options.flip_probability:
        image = random_flip(keys[2], image, probability=options.flip_probability)
    if options.brightness or options.contrast or options.saturation:
        image = color_jitter(
            keys[3],
            image,
            brightness=options.brightness,
            contrast=options.contrast,
            saturation=options.saturation,
        )
    if options.gray_probability:
        image = random_gray(keys[4], image, probability=options.gray_probability)
    if options.cutout_px:
        image = cutout(keys[5], image, side_px=options.cutout_px)
    return image


def random_shift(key: jax.Array, image: jax.Array, *, pad_px: int) -> jax.Array:
    """Shifts by up to `pad_px` in both axes, evenly distributed; black comes in."""
    padded = jnp.pad(image, ((pad_px, pad_px), (pad_px, pad_px), (0, 0)))
    row, column = jax.random.randint(key, (2,), 0, 2 * pad_px + 1)
    return jax.lax.dynamic_slice(padded, (row, column, jnp.zeros_like(row)), image.shape)


def random_resized_crop(
    key: jax.Array, image: jax.Array, *, min_scale: float, max_stretch: float = 1.0
) -> jax.Array:
    """Enlarges a random rectangle within the image to the image's size, bilinearly.

    The share of the area is even in [min_scale, 1], the logarithm of the stretch even in
    [-log(max_stretch), log(max_stretch)]; a side that would leave the image is cut to it.
    """
    area_key, stretch_key, place_key = jax.random.split(key, 3)
    side = jnp.sqrt(jax.random.uniform(area_key, (), image.dtype, min_scale, 1.0))
    limit = jnp.log(jnp.asarray(max_stretch, image.dtype))
    half = jnp.exp(jax.random.uniform(stretch_key, (), image.dtype, -1.0, 1.0) * limit / 2)
    share = jnp.minimum(jnp.stack([side / half, side * half]), 1.0)
    size = jnp.array(image.shape[:2], image.dtype)
    start = jax.random.uniform(place_key, (2,), image.dtype) * (1 - share) * size
    return jax.image.scale_and_translate(
        image, image.shape, (0, 1), 1 / share, -start / share, method="linear", antialias=False
    )


def random_flip(key: jax.Array, image: jax.Array, *, probability: float = 0.5) -> jax.Array:
    """Mirrors left and right with a probability."""
    return jnp.where(jax.random.bernoulli(key, probability), image[:, ::-1], image)


def color_jitter(
    key: jax.Array,
    image: jax.Array,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
) -> jax.Array:
    """Multiplies brightness, contrast and saturation by random factors, in this order.

    Each factor is even in [1 - x, 1 + x]; the result is clipped after each step.
    """
    spread = jnp.array([brightness, contrast, saturation], image.dtype)
    factors = 1 + spread * jax.random.uniform(key, (3,), image.dtype, -1.0, 1.0)
    image = jnp.clip(image * factors[0], 0.0, 1.0)
    mean = jnp.mean(_luma(image))
    image = jnp.clip(mean + (image - mean) * factors[1], 0.0, 1.0)
    luma = _luma(image)
    return jnp.clip(luma + (image - luma) * factors[2], 0.0, 1.0)


def random_gray(key: jax.Array, image: jax.Array, *, probability: float) -> jax.Array:
    """Takes the color out of an image with a probability; the channels are then its luma."""
    return jnp.where(jax.random.bernoulli(key, probability), gray(image), image)


def gray(image: jax.Array) -> jax.Array:
    """The image without color, `[H, W, 3]` with three equal channels."""
    return jnp.broadcast_to(_luma(image), image.shape)


def cutout(key: jax.Array, image: jax.Array, *, side_px: int) -> jax.Array:
    """Blackens a square of `side_px` at a random center in the image."""
    height, width, _ = image.shape
    row_key, column_key = jax.random.split(key)
    row = jax.random.randint(row_key, (), 0, height) - side_px // 2
    column = jax.random.randint(column_key, (), 0, width) - side_px // 2
    rows, columns = jnp.arange(height), jnp.arange(width)
    in_rows = (rows >= row) & (rows < row + side_px)
    in_columns = (columns >= column) & (columns < column + side_px)
    hole = in_rows[:, None] & in_columns[None, :]
    return jnp.where(hole[..., None], 0.0, image)


def _luma(image: jax.Array) -> jax.Array:
    """`[H, W, 1]`."""
    return jnp.sum(image * jnp.array(_LUMA, image.dtype).reshape(1, 1, 3), axis=-1, keepdims=True)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, but must lie in [{low:g}, {high:g}]")


# The usual recipe of CIFAR: crop after padding by 4, flip.
CIFAR = Augmentation(pad_px=4, flip_probability=0.5)
# For aligned face crops: mild zoom and light, since the pose in the chip is known.
FACES = Augmentation(
    min_scale=0.75,
    max_stretch=1.1,
    flip_probability=0.5,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    gray_probability=0.1,
)
