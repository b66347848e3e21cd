"""Pictures that the page shows: whole photos, small ones, faces."""

import io
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from afr_jax.data import photos
from afr_jax.evaluation.patches import pictures as patch_pictures

_PREVIEW_PX, _FACE_PX = 1200, 160
# Side of a face's picture, in sides of its box.
_SIDES = 1.6


def preview(photo: photos.Photo) -> bytes:
    """JPEG of a photo at most 1200 px wide and high, what is transparent in white."""
    picture = Image.fromarray(photo.pixels)
    if photo.alpha is not None:
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=Image.fromarray(photo.alpha))
        picture = white
    picture.thumbnail((_PREVIEW_PX, _PREVIEW_PX), Image.Resampling.LANCZOS)
    return _jpeg(picture, photo.icc_profile)


def face(pixels: np.ndarray, box: Sequence[float] | np.ndarray) -> bytes:
    """JPEG of a face of pixels `[H, W, 3]` uint8 and what is around its box."""
    picture = patch_pictures.close_up(Image.fromarray(pixels), np.array(box), sides=_SIDES)
    side = max(picture.size)
    if side > _FACE_PX:
        picture = picture.resize((_FACE_PX, _FACE_PX), Image.Resampling.LANCZOS)
    return _jpeg(picture, None)


def write_whole(path: pathlib.Path, pixels: np.ndarray, photo: photos.Photo | None) -> None:
    """Writes a lossless PNG, quickly, with the color profile of the photo."""
    profile = None if photo is None else photo.icc_profile
    Image.fromarray(pixels).save(path, "PNG", compress_level=1, icc_profile=profile)


def _jpeg(picture: Image.Image, profile: bytes | None) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88, icc_profile=profile)
    return buffer.getvalue()
