"""The pictures of the page that a person reads after cloaking: before, after, difference.

Photos are uint8 [H, W, 3] RGB, upright; boxes are [y0, x0, y1, x1] in their pixels. Pictures leave
as data URIs, reduced to what a page can hold.
"""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from afr_jax.core import files, images

GAIN = 10
MID_GRAY = 128
_STRIP_ROWS = 256

_SMALL_FACE = 0.5  # of the photo's long side; a smaller face is also shown by itself
_FACE_MARGIN = 0.15  # of the box's long side, added on each side of that crop
_PNG_PIXELS = 256 * 256  # crops up to this size are stored without loss
_ENLARGED_PX = 480  # smaller crops are drawn with whole-number enlargement up to this
_TALL_PX = 640  # no picture is drawn higher than this


def amplified_difference(
    original: np.ndarray, cloaked: np.ndarray, *, gain: int = GAIN
) -> np.ndarray:
    """The change of each pixel, enlarged around mid gray: clip(128 + gain * (cloaked - original)).

    Args:
      original: uint8 [H, W, 3].
      cloaked: uint8 [H, W, 3].
      gain: the factor; a change of more than 127 / gain levels is cut off.

    Returns:
      uint8 [H, W, 3]; 128 where nothing changed.
    """
    shown = np.empty_like(original)
    for top in range(0, len(original), _STRIP_ROWS):
        rows = slice(top, top + _STRIP_ROWS)
        change = cloaked[rows].astype(np.int32) - original[rows]
        shown[rows] = np.clip(MID_GRAY + gain * change, 0, 255)
    return shown


def photo_pictures(
    original: np.ndarray,
    cloaked: np.ndarray,
    faces: Sequence[dict[str, files.Json]],
    preview_px: int,
) -> dict[str, files.Json]:
    """Encodes a photo, counts on its pixels, and puts each small face's crop into its view.

    Args:
      original: uint8 [H, W, 3].
      cloaked: uint8 [H, W, 3].
      faces: views with `box` (or None) and `cloaked`; `crop` is set in those that are shown alone.
      preview_px: limit of the long side of each picture, in pixels.

    Returns:
      The pictures `before`, `after` and `difference` as data URIs with their sizes; `identical`,
      whether no pixel changed; `num_outside`, how many changed outside the cloaked faces' boxes.

    Raises:
      ValueError: anything but uint8 [H, W, 3].
    """
    for array in (original, cloaked):
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
            raise ValueError(
                f"load_pair must return uint8 [H, W, 3], got {array.dtype} {list(array.shape)}"
            )
    height, width = original.shape[:2]
    changed = images.changed_pixels(original, cloaked)
    outside = changed.copy()
    for face in faces:
        if not face["box"] or not face["cloaked"]:
            continue
        y0, x0, y1, x1 = face["box"]
        outside[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = False
        small = max(y1 - y0, x1 - x0) < _SMALL_FACE * max(height, width)
        if small or max(height, width) > preview_px:
            face["crop"] = _crop(original, cloaked, face["box"], preview_px)
    return {
        **_picture_set(original, cloaked, preview_px, lossless=False),
        "identical": not changed.any(),
        "num_outside": int(outside.sum()),
    }


def data_uri(image: np.ndarray, size: tuple[int, int], *, lossless: bool) -> str:
    """A picture as text that a page can hold.

    Args:
      image: uint8 [H, W, 3].
      size: (width, height) that it is resized to.
      lossless: whether as PNG; else as JPEG of quality 92.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if lossless:
        picture.save(buffer, format="PNG", optimize=True)
    else:
        # Full color resolution: halved chroma alone would change a face by more than a cloak does.
        picture.save(buffer, format="JPEG", quality=92, subsampling=0, optimize=True)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _crop(
    original: np.ndarray, cloaked: np.ndarray, box: Sequence[int], preview_px: int
) -> dict[str, files.Json] | None:
    """A face and a margin around it, at the photo's own resolution where that fits."""
    margin = round(_FACE_MARGIN * max(box[2] - box[0], box[3] - box[1]))
    y0, x0 = max(box[0] - margin, 0), max(box[1] - margin, 0)
    rows, columns = slice(y0, max(box[2] + margin, 0)), slice(x0, max(box[3] + margin, 0))
    before, after = original[rows, columns], cloaked[rows, columns]
    if not before.size:
        return None
    lossless = before.shape[0] * before.shape[1] <= _PNG_PIXELS
    pictures = _picture_set(before, after, preview_px, lossless=lossless)
    enlarged = max(_ENLARGED_PX // max(pictures["width"], pictures["height"]), 1)
    pictures |= {key: enlarged * pictures[key] for key in ("width", "height")}
    return pictures | {"enlarged": enlarged, "x": x0, "y": y0}


def _picture_set(
    original: np.ndarray, cloaked: np.ndarray, preview_px: int, *, lossless: bool
) -> dict[str, files.Json]:
    """The three pictures of one view as data URIs, with their drawn and their native size."""
    native_height, native_width = original.shape[:2]
    scale = min(preview_px / max(native_height, native_width), 1.0)
    size = (max(round(native_width * scale), 1), max(round(native_height * scale), 1))
    arrays = {
        "before": original,
        "after": cloaked,
        "difference": amplified_difference(original, cloaked),
    }
    uris = {key: data_uri(array, size, lossless=lossless) for key, array in arrays.items()}
    drawn = min(_TALL_PX / size[1], 1.0)
    return {
        **uris,
        "width": max(round(size[0] * drawn), 1),
        "height": max(round(size[1] * drawn), 1),
        "native_width": native_width,
        "native_height": native_height,
        "reduced": scale < 1,
        "enlarged": 1,
        "x": 0,
        "y": 0,
    }
