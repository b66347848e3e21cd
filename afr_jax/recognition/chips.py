"""Aligned face chips of photos as uint8: what an extractor is trained on.

Extractors align while they embed (`afr_jax.recognition.embed`); training wants the
chips themselves, once.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from afr_jax.core import images, parallel
from afr_jax.data import identities, photos
from afr_jax.models import mtcnn
from afr_jax.models.extractors import registry
from afr_jax.recognition import align, detect

_CANVAS_SIZES = (160, 256, 384)
# Photos that are decoded and in memory at a time.
_GROUP = 64
# The detector's smallest face is 20 px, and a crop is not all face.
_MIN_CROP_PX = 32


def template_for(side: int) -> tuple[tuple[float, float], ...]:
    """The landmarks (y, x) of ArcFace's alignment, in a chip of another side."""
    arcface = registry.get("mobilefacenet")
    ratio = side / arcface.input_px
    # Pixel centers, not corners, lie at whole numbers.
    return tuple(((y + 0.5) * ratio - 0.5, (x + 0.5) * ratio - 0.5) for y, x in arcface.template)


def face_chip(
    pixels: np.ndarray, landmarks: np.ndarray, template: Sequence[Sequence[float]], side: int
) -> np.ndarray:
    """The aligned chip of a face.

    Args:
        pixels: photo `[H, W, 3]` uint8.
        landmarks: `[5, 2]` (y, x) in it.
        template: where they come to lie in the chip, `[5, 2]`.
        side: of the chip.

    Returns:
        `[side, side, 3]` uint8; black beyond the photo.

    Raises:
        ValueError: landmarks that span no face.
    """
    return _cut_chip(pixels, align.similarity_transform(landmarks, np.asarray(template)), side)


def extractor_chip(
    extractor: registry.Extractor, pixels: np.ndarray, landmarks: np.ndarray
) -> np.ndarray:
    """The chip of a face as an extractor wants it, its stretch included.

    Args:
        extractor: whose chip, of side S.
        pixels: photo `[H, W, 3]` uint8.
        landmarks: `[5, 2]` (y, x) in it.

    Returns:
        `[S, S, 3]` uint8; black beyond the photo.

    Raises:
        ValueError: landmarks that span no face.
    """
    return _cut_chip(pixels, align.chip_transform(extractor, landmarks), extractor.input_px)


def aligned_chips(
    detector: mtcnn.Variables,
    listing: identities.Listing,
    template: Sequence[Sequence[float]],
    side: int,
    *,
    options: detect.DetectorOptions | None = None,
    report_fn: Callable[[int], None] | None = None,
) -> tuple[identities.Listing, np.ndarray]:
    """Detects the main face of every photo and aligns it.

    Args:
        detector: variables of MTCNN's networks.
        listing: the photos.
        template: see `face_chip`.
        side: of the chips.
        options: of the detector; its defaults if None.
        report_fn: called with the number of photos that were handled since (progress).

    Returns:
        The listing without the photos that cannot be read or show no face, which become problems,
        and the chips of the others, `[N, side, side, 3]` uint8, in its order.

    Raises:
        ValueError: no photo shows a face.
    """

    def cut(sample: identities.Sample, pixels: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        del sample
        return face_chip(pixels, landmarks, template, side)

    return cut_faces(detector, listing, cut, options=options, report_fn=report_fn)


def cut_faces(
    detector: mtcnn.Variables,
    listing: identities.Listing,
    cut_fn: Callable[[identities.Sample, np.ndarray, np.ndarray], np.ndarray],
    *,
    options: detect.DetectorOptions | None = None,
    report_fn: Callable[[int], None] | None = None,
) -> tuple[identities.Listing, np.ndarray]:
    """Detects the main face of every photo and makes an array of each.

    Args:
        detector: variables of MTCNN's networks.
        listing: the photos.
        cut_fn: takes a photo of the listing, its pixels `[H, W, 3]` uint8 and the landmarks
            `[5, 2]` of its main face to an array; a ValueError says why it cannot.
        options: of the detector; its defaults if None.
        report_fn: called with the number of photos that were handled since (progress).

    Returns:
        The listing without the photos that cannot be read, show no face or cannot be cut, which
        become problems, and the arrays of the others, stacked in its order.

    Raises:
        ValueError: no photo is left.
    """
    options = options or detect.DetectorOptions()

    def chip(sample: identities.Sample) -> np.ndarray | str:
        try:
            pixels = photos.read_photo(sample.path).pixels
            found = detect.detect_faces(detector, pixels, options=options)
            found = detect.main_face(found, pixels.shape)
            if not len(found.boxes):
                return "no face was found"
            return cut_fn(sample, pixels, found.landmarks[0])
        except (photos.PhotoError, ValueError) as error:
            return str(error)

    results: list[np.ndarray | str] = []
    for start in range(0, len(listing.samples), _GROUP):
        part = listing.samples[start : start + _GROUP]
        results += parallel.thread_map(chip, part)
        if report_fn is not None:
            report_fn(len(part))
    problems = [
        identities.Omission(sample.sample_id, result)
        for sample, result in zip(listing.samples, results, strict=True)
        if isinstance(result, str)
    ]
    found = [result for result in results if not isinstance(result, str)]
    if not found:
        raise ValueError(f"none of {len(results)} photos shows a face; {problems[0].reason}")
    return listing.without(problems), np.stack(found)


def measured_template(
    detector: mtcnn.Variables, crops: np.ndarray, *, min_faces: int = 8
) -> tuple[tuple[float, float], ...] | None:
    """Where the landmarks lie in crops that were aligned by somebody else.

    Args:
        detector: variables of MTCNN's networks.
        crops: `[N, S, S, 3]` uint8; a few dozen are enough.
        min_faces: how many faces the detector must find.

    Returns:
        The median landmarks, five (y, x); None where the crops are too small to look for faces in,
        or too few were found.
    """
    if crops.shape[1] < _MIN_CROP_PX:
        return None
    found = (detect.main_face(detect.detect_faces(detector, crop), crop.shape) for crop in crops)
    landmarks = [faces.landmarks[0] for faces in found if len(faces.boxes)]
    if len(landmarks) < min_faces:
        return None
    return tuple((float(y), float(x)) for y, x in np.median(landmarks, axis=0))


def _cut_chip(pixels: np.ndarray, transform: np.ndarray, side: int) -> np.ndarray:
    factor = align.pool_factor(align.transform_scale(transform))
    margin = 2 * factor * np.array([-1, -1, 1, 1])
    bounds = align.chip_bounds(transform, side) + margin
    canvas = align.cut_canvas(pixels, bounds, factor=factor, bucket_sizes=_CANVAS_SIZES)
    moved = align.canvas_transform(transform, canvas).astype(np.float32)
    return np.asarray(_warp(canvas.image, moved, side))


@functools.partial(jax.jit, static_argnames="side")
def _warp(image: np.ndarray, transform: np.ndarray, side: int) -> jax.Array:
    return images.to_uint8(align.warp(image, transform, size=side))
