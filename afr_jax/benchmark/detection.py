"""Row `detection`: our detector beside the PyPI `mtcnn` package, how fast, and the same faces?"""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from afr_jax.benchmark import photos as photo_source
from afr_jax.benchmark import setting, timing
from afr_jax.core import options
from afr_jax.evaluation import reference
from afr_jax.evaluation.attackers import other_detectors
from afr_jax.models import mtcnn
from afr_jax.recognition import detect

DRIVER = "mtcnn_driver.py"


@dataclasses.dataclass(frozen=True)
class DetectionOptions:
    """What is measured in the row `detection`."""

    num_photos: int = options.option(12, "photos for detection", at_least=1)
    photo_px: int = options.option(640, "their longer side, pixels", at_least=64)

    def __post_init__(self) -> None:
        """Checks ranges."""
        options.check(self)


def run(config: DetectionOptions, given: setting.Setting) -> setting.Measured:
    """Photos of one longer side and many shapes, through both detectors.

    Raises:
        options.UsageError: no photo can be read.
    """
    side, count = config.photo_px, config.num_photos
    if given.images:
        batch = [
            photo_source.resized(pixels, side) for pixels in photo_source.read(given.paths, count)
        ]
    else:
        batch = [photo_source.made(number, side) for number in range(count)]
    if not batch:
        raise options.UsageError("--images holds no readable photo")
    with given.reference.open(DRIVER) as other:
        rows = measure(
            f"detection, {len(batch)} photos of {side} px",
            given.detector(),
            batch,
            given.folder,
            other,
            detector_options=detect.DetectorOptions(),
            repeats=given.repeats,
        )
        return setting.Measured(rows, other.versions if other else {})


class Agreement(NamedTuple):
    """What two detectors say of one photo.

    Attributes:
        ours: `[N]` bool, whether each of our confident faces is among theirs.
        theirs: `[M]` bool, whether each of their confident faces is among ours.
        landmark_errors: `[K]`, for each of our confident faces that is among theirs, the largest
            distance of a landmark, as a share of the width of their box.
    """

    ours: np.ndarray
    theirs: np.ndarray
    landmark_errors: np.ndarray


def compare(
    ours: detect.Faces,
    theirs: detect.Faces,
    *,
    min_overlap: float = 0.9,
    min_confidence: float = 0.9,
) -> Agreement:
    """Matches the faces of two detectors.

    A face counts if its own detector is confident of it; it is among the other detector's faces if
    one of them, confident or not, overlaps it enough, so that no match hangs on a confidence that
    lies a hair beside the limit.

    Args:
        ours: faces of one detector.
        theirs: faces of the other.
        min_overlap: least intersection over union of a match.
        min_confidence: least confidence of a face that counts.

    Returns:
        The agreement, faces in the order of the arguments.
    """
    overlaps = detect.overlap(ours.boxes, theirs.boxes)
    is_found = overlaps.max(axis=1, initial=0.0) >= min_overlap
    is_known = overlaps.max(axis=0, initial=0.0) >= min_overlap
    counts = ours.confidences >= min_confidence
    index = np.flatnonzero(counts & is_found)
    partner = overlaps[index].argmax(axis=1) if index.size else index
    gaps = np.linalg.norm(ours.landmarks[index] - theirs.landmarks[partner], axis=-1)
    widths = theirs.boxes[partner, 3] - theirs.boxes[partner, 1]
    return Agreement(
        is_found[counts],
        is_known[theirs.confidences >= min_confidence],
        gaps.max(axis=1, initial=0.0) / np.maximum(widths, 1.0),
    )


def measure(
    row: str,
    variables: mtcnn.Variables,
    photos: Sequence[np.ndarray],
    folder: pathlib.Path,
    other: reference.ReferenceProcess | None,
    *,
    detector_options: detect.DetectorOptions,
    repeats: int,
) -> list[timing.Row]:
    """Rows of the table: milliseconds a photo, and whether both find the same faces.

    Args:
        row: name of the rows.
        variables: of our detector.
        photos: `[H, W, 3]` uint8 each.
        folder: where the photos are put for the package.
        other: the package; None leaves its column empty.
        detector_options: settings of the cascade.
        repeats: timed passes of each side over all photos.

    Returns:
        The rows.
    """
    paths = [folder / f"{number}.npy" for number in range(len(photos))]
    for path, pixels in zip(paths, photos, strict=True):
        np.save(path, pixels)
    found: dict[str, list[detect.Faces]] = {}

    def ours() -> float:
        start = time.perf_counter()
        found["ours"] = detect.detect_photos(variables, photos, options=detector_options)
        return 1e3 * (time.perf_counter() - start) / len(photos)

    sides = {"ours": ours}
    if other is not None:

        def theirs() -> float:
            seconds, found["theirs"] = other_detectors.ask_mtcnn(other, paths, detector_options)
            return 1e3 * sum(seconds) / len(photos)

        sides["theirs"] = theirs
    times = timing.take_turns(sides, repeats=repeats)
    rows = [timing.compare(row, "ms per photo", times["ours"], times.get("theirs"))]
    if other is not None:
        pairs = [compare(*pair) for pair in zip(found["ours"], found["theirs"], strict=True)]
        own = np.concatenate([pair.ours for pair in pairs])
        foreign = np.concatenate([pair.theirs for pair in pairs])
        rows.append(timing.state(row, "confident faces", len(own), len(foreign)))
        shares = [float(faces.mean()) if len(faces) else None for faces in (own, foreign)]
        rows.append(timing.state(row, "share of them that the other finds", *shares))
    return rows
