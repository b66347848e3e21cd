"""What a cloak did, measured on the final pixels as a recogniser would see them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from afr_jax.methods import cloak
from afr_jax.models import zoo
from afr_jax.recognition import detect, embed

# A face of the final photo is the face of the original if their boxes overlap this much.
_SAME_FACE_IOU = 0.5


def check_photo(
    detector: dict,
    extractors: Mapping[str, tuple[zoo.Extractor, dict]],
    photo: cloak.PhotoFaces,
    final: np.ndarray,
    cloaked: Sequence[cloak.CloakedFace],
    *,
    dssim_budget: float,
    options: detect.DetectorOptions,
) -> list[dict[str, Any]]:
    """Measures every cloaked face of a photo on its final pixels.

    The faces are detected again in the final photo; each is embedded from its new landmarks and
    compared with its clean embedding.

    Args:
        detector: variables of the detector.
        extractors: to measure with, by name: table entry and variables.
        photo: the original.
        final: `[H, W, 3]` uint8, decoded from the final file.
        cloaked: what was done to each face of `photo.faces`.
        dssim_budget: of the cloak.
        options: of the detector.

    Returns:
        A record for each face, as in report.json; status `cloaked` only if the face was found
        again, its DSSIM lies within the budget and every pixel outside the regions is the
        original's.
    """
    found, matches = _find_again(detector, photo.faces, final, options)
    embeddings = {}
    for name, (extractor, variables) in extractors.items():
        clean = [(photo.pixels, landmarks) for landmarks in photo.faces.landmarks]
        again = [(final, found.landmarks[match]) for match in matches if match is not None]
        vectors = embed.embed_faces(extractor, variables, clean + again)
        embeddings[name] = vectors[: len(clean)], iter(vectors[len(clean) :])
    untouched = np.ones(final.shape[:2], bool)
    for face in cloaked:
        y0, x0, y1, x1 = face.region
        untouched[y0:y1, x0:x1] = False
    leaked = bool(np.any(photo.pixels[untouched] != final[untouched]))
    records = []
    for number, (face, match) in enumerate(zip(cloaked, matches, strict=True)):
        y0, x0, y1, x1 = face.region
        change = final[y0:y1, x0:x1].astype(np.int32) - photo.pixels[y0:y1, x0:x1]
        dssim = cloak.face_dssim(photo.pixels, final, face.region, face.box)
        record = {
            "box": face.region.tolist(),
            "detection": photo.faces.boxes[number].tolist(),
            "confidence": float(photo.faces.confidences[number]),
            "status": "cloaked",
            "reason": None,
            "dssim": dssim,
            "linf": float(np.abs(change).max() / 255),
            "mean_difference": float(
                change.mean(axis=(0, 1))[np.abs(change.mean((0, 1))).argmax()]
            ),
            "extractors": {},
        }
        if match is not None:
            for name, (extractor, _) in extractors.items():
                clean, again = embeddings[name]
                distance = float(zoo.distance(next(again), clean[number]))
                record["extractors"][name] = {
                    "distance": distance,
                    "distance_before_budget": face.distances.get(name),
                    "threshold": extractor.threshold,
                    "metric": "l2",
                    "same_person": distance < extractor.threshold,
                }
        problem = _problem(match, dssim, dssim_budget, leaked, change)
        if problem:
            record.update(status="failed", reason=problem)
        records.append(record)
    return records


def _find_again(detector, faces, final, options) -> tuple[detect.Faces, list[int | None]]:
    """Faces of the final photo, and for each original face which of them it is.

    Where the detector's settings miss one, it looks again with a finer pyramid and lower
    thresholds, as a tracker may.
    """
    closer = dataclasses.replace(
        options, min_face_px=20.0, scale_factor=0.85, thresholds=(0.4, 0.4, 0.4)
    )
    for settings in (options, closer):
        found = detect.detect_faces(detector, final, options=settings)
        same = detect.overlap(faces.boxes, found.boxes)
        matches = [
            int(row.argmax()) if row.size and row.max() >= _SAME_FACE_IOU else None for row in same
        ]
        if None not in matches:
            break
    return found, matches


def _problem(match, dssim, budget, leaked, change) -> str | None:
    if match is None:
        return "the face was not found again in the written photo, so the cloak was not measured"
    if dssim > budget:
        return f"DSSIM {dssim:.4f} exceeds the budget {budget}"
    if leaked:
        return "pixels outside the face regions changed"
    if not np.any(change):
        return "no change within the budget was found"
    return None
