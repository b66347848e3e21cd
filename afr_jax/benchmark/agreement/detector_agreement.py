"""Row `detector_agreement`: does our detector find what PyPI `mtcnn` finds, on any photos?

Both look at every photo with the package's default settings. A face of confidence 0.9 or more is
found by the other side if that has a box of IoU 0.9 or more there. Expected on 280 photos of WIDER
FACE and LFW: every face is found by both.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from afr_jax.benchmark import detection, setting, timing
from afr_jax.core import files, options, progress
from afr_jax.data import photo_files, photos
from afr_jax.evaluation import reference
from afr_jax.evaluation.attackers import other_detectors
from afr_jax.recognition import detect

DRIVER = "mtcnn_driver.py"
_MIN_OVERLAP, _MIN_CONFIDENCE = 0.9, 0.9


@dataclasses.dataclass(frozen=True)
class DetectorAgreementOptions:
    """What is compared in the row `detector_agreement`."""

    max_photos: int = options.option(
        0, "at most that many files of each of --images, evenly spread; 0: all", at_least=0
    )

    def __post_init__(self) -> None:
        """Checks ranges."""
        options.check(self)


def run(config: DetectorAgreementOptions, given: setting.Setting) -> setting.Measured:
    """Compares the faces of each photo.

    The details are counts, landmark errors as shares of the width of the package's box, and every
    disagreement.

    Raises:
        options.UsageError: there are no photos, or there is no package to compare with.
    """
    if not given.images:
        raise options.UsageError("--images is needed for --rows=detector_agreement")
    sources = []
    for found in given.images:
        count = min(config.max_photos or len(found), len(found))
        sources += [found[number * len(found) // count] for number in range(count)]
    with given.reference.start(DRIVER) as other:
        details = _compare(other, sources, given)
        versions = other.versions
    name = f"detector agreement, {details['num_photos']} photos"
    counts, errors = details["confident_faces"], details["landmark_error"]
    sides = ("ours", "theirs")
    shares = [counts[f"{s}_found"] / counts[s] if counts[s] else None for s in sides]
    rows = [
        timing.state(name, "confident faces", counts["ours"], counts["theirs"]),
        timing.state(name, "share of them that the other finds", *shares),
        timing.state(name, "median landmark error, share of the box", errors["median"], None),
        timing.state(name, "largest landmark error, share of the box", errors["largest"], None),
    ]
    details |= {"min_overlap": _MIN_OVERLAP, "min_confidence": _MIN_CONFIDENCE}
    return setting.Measured(rows, versions, details, complete=not details["unreadable"])


def _compare(
    other: reference.ReferenceProcess,
    sources: Sequence[photo_files.PhotoInput],
    given: setting.Setting,
) -> dict[str, files.Json]:
    """Counts, landmark errors, disagreements, and the files that are no photos."""
    variables, cascade = given.detector(), detect.DetectorOptions()
    counts = dict.fromkeys(("ours", "ours_found", "theirs", "theirs_found"), 0)
    errors, disagreements, unreadable = [], [], []
    for source in progress.track(sources, description="photos"):
        name = source.relative.as_posix()
        try:
            if source.problem is not None:
                raise photos.PhotoError(source.problem)
            pixels = given.shrunk(photos.read_photo(source.path).pixels)
        except photos.PhotoError as error:
            unreadable.append({"image": name, "reason": str(error)})
            continue
        np.save(given.folder / "photo.npy", pixels)
        ours = detect.detect_faces(variables, pixels, options=cascade)
        theirs = other_detectors.ask_mtcnn(other, [given.folder / "photo.npy"], cascade)[1][0]
        limits = {"min_overlap": _MIN_OVERLAP, "min_confidence": _MIN_CONFIDENCE}
        agreement = detection.compare(ours, theirs, **limits)
        errors.extend(agreement.landmark_errors)
        for side, faces, rest, found in (
            ("ours", ours, theirs, agreement.ours),
            ("theirs", theirs, ours, agreement.theirs),
        ):
            counts[side] += len(found)
            counts[f"{side}_found"] += int(found.sum())
            sure = detect.select_faces(faces, faces.confidences >= _MIN_CONFIDENCE)
            lone = detect.select_faces(sure, ~found)
            overlaps = detect.overlap(lone.boxes, rest.boxes).max(axis=1, initial=0.0)
            for box, confidence, overlap in zip(*lone[:2], overlaps, strict=True):
                where = {"image": name, "found_by": side, "box": np.round(box, 2)}
                disagreements.append({**where, "confidence": confidence, "best_iou": overlap})
    return {
        "num_photos": len(sources) - len(unreadable),
        "confident_faces": counts,
        "landmark_error": {
            "median": float(np.median(errors)) if errors else None,
            "largest": float(np.max(errors)) if errors else None,
        },
        "disagreements": disagreements,
        "unreadable": unreadable,
    }
