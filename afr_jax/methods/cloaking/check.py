"""What a cloak did to each face, measured on the final pixels as recognizers would see them.

Every face is looked at in the final photo as written and in the same photo after JPEG: detected,
aligned and embedded again each time, and compared with its clean embedding. The extractors that
measure need not be those that the cloak was made against.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from afr_jax.core import images, parallel
from afr_jax.core.perception import measures
from afr_jax.data import photos
from afr_jax.methods.cloaking import budget, photo_cloaks
from afr_jax.models import lpips, mtcnn
from afr_jax.recognition import detect, embed, match, pipeline
from afr_jax.recognition.detectors import union, yunet

REENCODING = (
    "JPEG quality 75 (4:2:0) was checked on every final photo; stronger compression, resizing and "
    "filters were not."
)

# Sides of the blocks of a JPEG file with halved chroma, and how far its enlargement reaches.
_JPEG_BLOCK, _JPEG_BLUR = 16, 2
# A face of the final photo is the face of the original if their boxes overlap this much.
_SAME_FACE_IOU = 0.5
# A photo and its JPEG are looked at side by side if they have no more pixels together.
_PIXELS_AT_ONCE = 32_000_000
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
    """A face in report.json; the last seven only where it was to be cloaked.

    Attributes:
        box: (y0, x0, y1, x1), all that may have changed for this face.
        detection: the detector's box.
        confidence: the detector's; the larger where two see the face.
        detectors: confidence by the name of each detector that looked, None where it does not see
            the face.
        status: "cloaked"; "unchanged", where no change within the budget was found; "failed", where
            the cloak broke a promise; or "skipped".
        reason: for a status other than "cloaked", else None.
        found_again: whether a detector finds the face in the written file; where not, it was
            measured at the landmarks of the original.
        limits: what its change was held to (`budget.Budget`): those of the mode, or its relief.
        dssim: on the final pixels, the larger of those of region and box.
        visibility: what people see of the change of the region (`measures.Visibility`, and `lpips`,
            None where its weights are not installed).
        linf: largest change of a pixel, in [0, 1] units.
        mean_difference: of the channel where it is largest, in gray levels.
        extractors: verdicts by the extractor's name.
    """

    box: list[int]
    detection: list[float]
    confidence: float
    status: str
    reason: str | None
    detectors: NotRequired[dict[str, float | None]]
    found_again: NotRequired[bool]
    limits: NotRequired[dict[str, Any]]
    dssim: NotRequired[float]
    visibility: NotRequired[dict[str, float | None]]
    linf: NotRequired[float]
    mean_difference: NotRequired[float]
    extractors: NotRequired[dict[str, CloakVerdict]]


class Place(TypedDict):
    """What each record begins with; see `CloakRecord`."""

    box: list[int]
    detection: list[float]
    confidence: float


def check_photo(
    recognizer: pipeline.Recognizer,
    second: yunet.Detector | None,
    photo: photo_cloaks.PhotoFaces,
    final: np.ndarray,
    cloaked: Sequence[photo_cloaks.CloakedFace],
    *,
    surrogates: Collection[str],
    options: union.UnionOptions,
    reencoded: np.ndarray | None = None,
) -> list[CloakRecord]:
    """Measures every cloaked face of a photo on its final pixels.

    Args:
        recognizer: the first detector, and the extractors that judge.
        second: the second detector, or None.
        photo: the original.
        final: `[H, W, 3]` uint8, decoded from the final file.
        cloaked: what was done to each face of `photo.faces`.
        surrogates: names of the extractors that the cloak was made against.
        options: of the detectors.
        reencoded: `[H, W, 3]` uint8, the original through the encoder of the final file; None where
            that loses nothing.

    Returns:
        A record for each face, as in report.json; status `cloaked` only if it changed within its
        limits and every pixel outside the regions is the original's, or that of `reencoded`.
    """
    plain = photo.pixels if reencoded is None else reencoded
    changed = images.changed_pixels(plain, final)
    for face in cloaked:
        y0, x0, y1, x1 = face.region if reencoded is None else _jpeg_reach(face.region)
        changed[y0:y1, x0:x1] = False
    leaked = bool(changed.any())
    before = [face.distances for face in cloaked]
    judged, found_again = _judge(
        recognizer, second, photo.pixels, photo.faces, final, before, surrogates, options
    )
    records = []
    for number, (face, entries) in enumerate(zip(cloaked, judged, strict=True)):
        y0, x0, y1, x1 = face.region
        change = final[y0:y1, x0:x1].astype(np.int32) - photo.pixels[y0:y1, x0:x1]
        visible = measures.measure(photo.pixels[y0:y1, x0:x1], final[y0:y1, x0:x1])
        dssim = budget.face_dssim(photo.pixels, final, face.region, face.box)
        record: CloakRecord = {
            **place(photo.faces, number, face.region),
            "status": "cloaked",
            "reason": None,
            "found_again": found_again[number],
            "limits": dataclasses.asdict(dataclasses.replace(face.budget, relief=None)),
            "dssim": dssim,
            "visibility": {
                **visible._asdict(),
                "lpips": lpips.measure(photo.pixels[y0:y1, x0:x1], final[y0:y1, x0:x1]),
            },
            "linf": float(np.abs(change).max() / 255),
            "mean_difference": float(
                change.mean(axis=(0, 1))[np.abs(change.mean((0, 1))).argmax()]
            ),
            "extractors": entries,
        }
        problem = _problem(face.budget.share(dssim, visible), face.budget, leaked)
        if problem:
            record.update(status="failed", reason=problem)
        elif np.array_equal(final[y0:y1, x0:x1], plain[y0:y1, x0:x1]):
            record.update(status="unchanged", reason="no change within the budget was found")
        records.append(record)
    return records


def judge_again(
    recognizer: pipeline.Recognizer,
    second: yunet.Detector | None,
    pixels: np.ndarray,
    faces: detect.Faces,
    final: np.ndarray,
    records: Sequence[CloakRecord],
    *,
    surrogates: Collection[str],
    options: union.UnionOptions,
) -> list[CloakRecord]:
    """Records of `check_photo` with verdicts of other extractors in place of the old ones.

    Args:
        recognizer: the first detector, and the extractors that judge.
        second: the second detector, or None.
        pixels: `[H, W, 3]` uint8 of the original.
        faces: the faces that were cloaked, as they were found in the original.
        final: `[H, W, 3]` uint8, decoded from the final file.
        records: of all faces; those that were skipped stay as they are.
        surrogates: names of the extractors that the cloak was made against.
        options: of the detectors.

    Returns:
        The new records.
    """
    before = [
        {name: entry["distance_before_budget"] for name, entry in record["extractors"].items()}
        for record in records
        if "extractors" in record
    ]
    found, _ = _judge(recognizer, second, pixels, faces, final, before, surrogates, options)
    judged = iter(found)
    return [
        {**record, "extractors": next(judged)} if "extractors" in record else record
        for record in records
    ]


def place(faces: detect.Faces, number: int, region: np.ndarray) -> Place:
    """Where a face is: what each record begins with.

    Args:
        faces: of the photo.
        number: of the face among them.
        region: `[4]` int, all that may change for it.
    """
    return {
        "box": region.tolist(),
        "detection": faces.boxes[number].tolist(),
        "confidence": float(faces.confidences[number]),
    }


def _judge(
    recognizer: pipeline.Recognizer,
    second: yunet.Detector | None,
    pixels: np.ndarray,
    faces: detect.Faces,
    final: np.ndarray,
    before_budget: Sequence[Mapping[str, float | None]],
    surrogates: Collection[str],
    options: union.UnionOptions,
) -> tuple[list[dict[str, CloakVerdict]], list[bool]]:
    """Entries by extractor for each face, and whether it was found again in `final`."""
    compressed = photos.through_jpeg(final, quality=photo_cloaks.JPEG_QUALITY)
    again, after = parallel.thread_stream(
        lambda version: _find_again(recognizer.detector, second, faces, version, options),
        (final, compressed),
        weight_fn=lambda version: version[..., 0].size,
        limit=_PIXELS_AT_ONCE,
    )
    written = [
        own if found is None else found for own, found in zip(faces.landmarks, again, strict=True)
    ]
    results: list[dict[str, CloakVerdict]] = [{} for _ in written]
    for name, extractor in recognizer.extractors.items():
        pairs = [(pixels, landmarks) for landmarks in faces.landmarks]
        pairs += [(final, landmarks) for landmarks in written]
        pairs += [(compressed, found) for found in after if found is not None]
        vectors = iter(embed.embed_faces(extractor, recognizer.variables[name], pairs))
        clean = [next(vectors) for _ in written]
        distances = [_distance(next(vectors), own) for own in clean]
        distances_after = [
            None if found is None else _distance(next(vectors), own)
            for found, own in zip(after, clean, strict=True)
        ]
        for number, distance in enumerate(distances):
            results[number][name] = CloakVerdict(
                distance=distance,
                distance_before_budget=before_budget[number].get(name),
                threshold=extractor.threshold,
                metric="l2",
                same_person=distance < extractor.threshold,
                surrogate=name in surrogates,
                after_jpeg75=_after(distances_after[number], extractor.threshold),
            )
    return results, [found is not None for found in again]


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(match.distance(first, second, metric="euclidean"))


def _after(distance: float | None, threshold: float) -> Reencoded:
    same = None if distance is None else distance < threshold
    reason = _NOT_FOUND if distance is None else None
    return {"distance": distance, "same_person": same, "reason": reason}


def _find_again(
    detector: mtcnn.Variables,
    second: yunet.Detector | None,
    faces: detect.Faces,
    pixels: np.ndarray,
    options: union.UnionOptions,
) -> list[np.ndarray | None]:
    """Landmarks in a final photo of each original face, None where it is not found.

    Where both detectors miss one, MTCNN looks again with a finer pyramid and lower thresholds, as a
    tracker may.
    """
    landmarks = _same_places(
        faces, union.detect_union(detector, second, pixels, options=options).faces
    )
    if all(item is not None for item in landmarks):
        return landmarks
    closer = detect.DetectorOptions(min_face_px=20.0, scale_factor=0.85, thresholds=(0.4, 0.4, 0.4))
    others = _same_places(faces, detect.detect_faces(detector, pixels, options=closer))
    return [other if own is None else own for own, other in zip(landmarks, others, strict=True)]


def _same_places(faces: detect.Faces, found: detect.Faces) -> list[np.ndarray | None]:
    """Landmarks of the found face at the place of each face, None where there is none."""
    same = detect.overlap(faces.boxes, found.boxes)
    return [
        found.landmarks[int(row.argmax())] if row.size and row.max() >= _SAME_FACE_IOU else None
        for row in same
    ]


def _jpeg_reach(region: np.ndarray) -> np.ndarray:
    """What a change of a region can change in a JPEG file: whole blocks, and what is blurred in."""
    low, high = region[:2] // _JPEG_BLOCK, -(-region[2:] // _JPEG_BLOCK)
    whole = np.concatenate([low, high]) * _JPEG_BLOCK
    return np.maximum(whole + np.array([-1, -1, 1, 1]) * _JPEG_BLUR, 0)


def _problem(share: float, limits: budget.Budget, leaked: bool) -> str | None:
    if share > 1:
        return f"the change takes {100 * share:.0f} % of its budget ({limits})"
    if leaked:
        return "pixels outside the face regions changed"
    return None
