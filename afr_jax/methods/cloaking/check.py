"""What a cloak did to each face, measured on the final pixels as recognizers would see them.

Every face is looked at in the final photo as written and in the same photo after JPEG: detected,
aligned and embedded again each time, and compared with its clean embedding. The extractors that
measure need not be those that the cloak was made against.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

from afr_jax.data import photos
from afr_jax.methods.cloaking import budget, photo_cloaks
from afr_jax.models import mtcnn
from afr_jax.models.extractors import registry
from afr_jax.recognition import detect, embed, pipeline

REENCODING = (
    "JPEG quality 75 (4:2:0) was checked on every final photo; stronger compression, resizing and "
    "filters were not."
)

_JPEG_QUALITY = 75
# A face of the final photo is the face of the original if their boxes overlap this much.
_SAME_FACE_IOU = 0.5
_NOT_FOUND = "the face was not found again"


class Reencoded(TypedDict):
    """What an extractor makes of a cloaked face after JPEG.

    Attributes:
        distance: L2, from the clean embedding; None where the face was not found again.
        same_person: whether that is below the threshold; likewise.
        reason: why there is no distance, or None.
    """

    distance: float | None
    same_person: bool | None
    reason: str | None


class CloakVerdict(TypedDict):
    """What an extractor makes of a cloaked face in the written photo.

    Attributes:
        distance: L2, from the clean embedding.
        distance_before_budget: what the search reached before rounding and fitting; None for an
            extractor that the cloak was not made against.
        threshold: below which two faces are the same person.
        metric: "l2".
        same_person: whether the distance is below the threshold.
        surrogate: whether the cloak was made against the extractor.
        after_jpeg75: the same after JPEG of quality 75, 4:2:0.
    """

    distance: float
    distance_before_budget: float | None
    threshold: float
    metric: str
    same_person: bool
    surrogate: bool
    after_jpeg75: Reencoded


class CloakRecord(TypedDict):
    """A face in report.json; the last four only where it was to be cloaked.

    Attributes:
        box: (y0, x0, y1, x1), all that may have changed for this face.
        detection: the detector's box.
        confidence: the detector's.
        status: "cloaked", "failed" or "skipped".
        reason: for a status other than "cloaked", else None.
        dssim: on the final pixels, the larger of those of region and box.
        linf: largest change of a pixel, in [0, 1] units.
        mean_difference: of the channel where it is largest, in gray levels.
        extractors: verdicts by the extractor's name.
    """

    box: list[int]
    detection: list[float]
    confidence: float
    status: str
    reason: str | None
    dssim: NotRequired[float]
    linf: NotRequired[float]
    mean_difference: NotRequired[float]
    extractors: NotRequired[dict[str, CloakVerdict]]


class _Place(TypedDict):
    box: list[int]
    detection: list[float]
    confidence: float


def check_photo(
    recognizer: pipeline.Recognizer,
    photo: photo_cloaks.PhotoFaces,
    final: np.ndarray,
    cloaked: Sequence[photo_cloaks.CloakedFace],
    *,
    surrogates: Collection[str],
    dssim_budget: float,
    options: detect.DetectorOptions,
) -> list[CloakRecord]:
    """Measures every cloaked face of a photo on its final pixels.

    Args:
        recognizer: the detector, and the extractors that judge.
        photo: the original.
        final: `[H, W, 3]` uint8, decoded from the final file.
        cloaked: what was done to each face of `photo.faces`.
        surrogates: names of the extractors that the cloak was made against.
        dssim_budget: of the cloak.
        options: of the detector.

    Returns:
        A record for each face, as in report.json; status `cloaked` only if the face was found
        again, its DSSIM lies within the budget and every pixel outside the regions is the
        original's.
    """
    untouched = np.ones(final.shape[:2], bool)
    for face in cloaked:
        y0, x0, y1, x1 = face.region
        untouched[y0:y1, x0:x1] = False
    leaked = bool(np.any(photo.pixels[untouched] != final[untouched]))
    before = [face.distances for face in cloaked]
    judged = _judge(recognizer, photo.pixels, photo.faces, final, before, surrogates, options)
    records = []
    for number, (face, entries) in enumerate(zip(cloaked, judged, strict=True)):
        y0, x0, y1, x1 = face.region
        change = final[y0:y1, x0:x1].astype(np.int32) - photo.pixels[y0:y1, x0:x1]
        dssim = budget.face_dssim(photo.pixels, final, face.region, face.box)
        record: CloakRecord = {
            **_place(photo.faces, number, face.region),
            "status": "cloaked",
            "reason": None,
            "dssim": dssim,
            "linf": float(np.abs(change).max() / 255),
            "mean_difference": float(
                change.mean(axis=(0, 1))[np.abs(change.mean((0, 1))).argmax()]
            ),
            "extractors": entries or {},
        }
        problem = _problem(entries, dssim, dssim_budget, leaked, change)
        if problem:
            record.update(status="failed", reason=problem)
        records.append(record)
    return records


def judge_again(
    recognizer: pipeline.Recognizer,
    pixels: np.ndarray,
    faces: detect.Faces,
    final: np.ndarray,
    records: Sequence[CloakRecord],
    *,
    surrogates: Collection[str],
    options: detect.DetectorOptions,
) -> list[CloakRecord]:
    """Records of `check_photo` with verdicts of other extractors in place of the old ones.

    Args:
        recognizer: the detector, and the extractors that judge.
        pixels: `[H, W, 3]` uint8 of the original.
        faces: the faces that were cloaked, as they were found in the original.
        final: `[H, W, 3]` uint8, decoded from the final file.
        records: of all faces; those that are not of status `cloaked` stay as they are.
        surrogates: names of the extractors that the cloak was made against.
        options: of the detector.

    Returns:
        The new records.
    """
    cloaked = [record["extractors"] for record in records if record["status"] == "cloaked"]
    before = [
        {name: entry["distance_before_budget"] for name, entry in entries.items()}
        for entries in cloaked
    ]
    judged = iter(_judge(recognizer, pixels, faces, final, before, surrogates, options))
    return [
        {**record, "extractors": next(judged) or {}} if record["status"] == "cloaked" else record
        for record in records
    ]


def skipped_faces(
    faces: detect.Faces, kept: np.ndarray, *, min_confidence: float
) -> list[CloakRecord]:
    """Records, as in report.json, of the faces of a photo that are not to be cloaked.

    Args:
        faces: all that were found.
        kept: `[N]` bool, which of them are cloaked.
        min_confidence: below which a face is not; the others are too small.
    """
    records: list[CloakRecord] = []
    for number in np.flatnonzero(~kept).tolist():
        box, confidence = faces.boxes[number], faces.confidences[number]
        region = np.concatenate([np.floor(box[:2]), np.ceil(box[2:])]).astype(int)
        reason = "it is too small to be recognized"
        if confidence < min_confidence:
            reason = f"confidence {confidence:.2f} is below {min_confidence}"
        place = _place(faces, number, region)
        records.append({**place, "status": "skipped", "reason": reason})
    return records


def _place(faces: detect.Faces, number: int, region: np.ndarray) -> _Place:
    return {
        "box": region.tolist(),
        "detection": faces.boxes[number].tolist(),
        "confidence": float(faces.confidences[number]),
    }


def _judge(
    recognizer: pipeline.Recognizer,
    pixels: np.ndarray,
    faces: detect.Faces,
    final: np.ndarray,
    before_budget: Sequence[Mapping[str, float | None]],
    surrogates: Collection[str],
    options: detect.DetectorOptions,
) -> list[dict[str, CloakVerdict] | None]:
    """Entries by extractor for each face; None for one that was not found again in `final`."""
    compressed = photos.through_jpeg(final, quality=_JPEG_QUALITY)
    versions = [
        (version, _find_again(recognizer.detector, faces, version, options))
        for version in (final, compressed)
    ]
    results: list[dict[str, CloakVerdict] | None] = [
        None if landmarks is None else {} for landmarks in versions[0][1]
    ]
    for name, extractor in recognizer.extractors.items():
        pairs = [(pixels, landmarks) for landmarks in faces.landmarks]
        pairs += [
            (version, found) for version, again in versions for found in again if found is not None
        ]
        vectors = iter(embed.embed_faces(extractor, recognizer.variables[name], pairs))
        clean = [next(vectors) for _ in faces.landmarks]
        written, after = (
            [
                None if found is None else float(registry.distance(next(vectors), own))
                for found, own in zip(again, clean, strict=True)
            ]
            for _, again in versions
        )
        for number, entries in enumerate(results):
            distance = written[number]
            if entries is not None and distance is not None:
                entries[name] = CloakVerdict(
                    distance=distance,
                    distance_before_budget=before_budget[number].get(name),
                    threshold=extractor.threshold,
                    metric="l2",
                    same_person=distance < extractor.threshold,
                    surrogate=name in surrogates,
                    after_jpeg75=_after(after[number], extractor.threshold),
                )
    return results


def _after(distance: float | None, threshold: float) -> Reencoded:
    same = None if distance is None else distance < threshold
    reason = _NOT_FOUND if distance is None else None
    return {"distance": distance, "same_person": same, "reason": reason}


def _find_again(
    detector: mtcnn.Variables,
    faces: detect.Faces,
    pixels: np.ndarray,
    options: detect.DetectorOptions,
) -> list[np.ndarray | None]:
    """Landmarks in a final photo of each original face, None where it is not found.

    Where the detector's settings miss one, it looks again with a finer pyramid and lower
    thresholds, as a tracker may.
    """
    closer = dataclasses.replace(
        options, min_face_px=20.0, scale_factor=0.85, thresholds=(0.4, 0.4, 0.4)
    )
    for settings in (options, closer):
        found = detect.detect_faces(detector, pixels, options=settings)
        same = detect.overlap(faces.boxes, found.boxes)
        landmarks = [
            found.landmarks[int(row.argmax())] if row.size and row.max() >= _SAME_FACE_IOU else None
            for row in same
        ]
        if all(item is not None for item in landmarks):
            break
    return landmarks


def _problem(
    entries: dict[str, CloakVerdict] | None,
    dssim: float,
    dssim_budget: float,
    leaked: bool,
    change: np.ndarray,
) -> str | None:
    if entries is None:
        return f"{_NOT_FOUND} in the written photo, so the cloak was not measured"
    if dssim > dssim_budget:
        return f"DSSIM {dssim:.4f} exceeds the budget {dssim_budget}"
    if leaked:
        return "pixels outside the face regions changed"
    if not np.any(change):
        return "no change within the budget was found"
    return None
