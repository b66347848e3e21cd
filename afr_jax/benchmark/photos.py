"""Photos for benchmarks: of files, or made of a sample portrait."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import skimage.data
from PIL import Image

from afr_jax.data import photos


def read(sources: Sequence[pathlib.Path], count: int) -> Iterator[np.ndarray]:
    """The first `count` readable photos, `[H, W, 3]` uint8 each."""
    for path in sources:
        if not count:
            return
        with contextlib.suppress(photos.PhotoError):
            yield photos.read_photo(path).pixels
            count -= 1


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    """The photo with its longer side brought to `side` pixels."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def of_any_size(pixels: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """The middle of a photo in another shape, of 0.1 to 4 megapixels, each doubling as likely."""
    rng = np.random.default_rng(seed)
    area, shape = np.exp(rng.uniform(np.log([1e5, 0.67]), np.log([4e6, 1.5])))
    height, width = pixels.shape[:2]
    rows = min(height, max(1, round(width / shape)))
    columns = min(width, max(1, round(rows * shape)))
    top, left = (height - rows) // 2, (width - columns) // 2
    scale = np.sqrt(area / (rows * columns))
    size = max(1, round(columns * scale)), max(1, round(rows * scale))
    piece = Image.fromarray(pixels[top : top + rows, left : left + columns])
    return np.asarray(piece.resize(size, Image.Resampling.LANCZOS))


def group(megapixels: float) -> np.ndarray:
    """A photo of so many megapixels, 4:3, with the face of the sample portrait three times."""
    width = round((megapixels * 4e6 / 3) ** 0.5)
    face = resized(skimage.data.astronaut()[:400, 60:360], round(width * 4 / 9))
    row = np.concatenate([face, face[:, ::-1], face], axis=1)
    below, beside = round(width * 3 / 4) - row.shape[0], max(width - row.shape[1], 0)
    return np.pad(row, ((0, below), (0, beside), (0, 0)), mode="edge")


def made(number: int, side: int) -> np.ndarray:
    """The sample portrait, in one of 4 sizes as often as it fits, in one of 6 shapes."""
    divisor = (2, 3, 4, 6)[number % 4]
    portrait = resized(skimage.data.astronaut(), 2 * side // divisor)
    portrait = portrait[:, ::-1] if number % 3 == 2 else portrait
    shorter = round(side * np.linspace(360, 640, 6)[number % 6] / 640)
    rows, columns = (side, shorter) if number % 5 > 2 else (shorter, side)
    return np.ascontiguousarray(np.tile(portrait, (divisor, divisor, 1))[:rows, :columns])
