"""What an extractor makes of a query in a folder of people, in which one photo is cloaked."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from afr_jax.core import files
from afr_jax.evaluation.cloaking import embeddings, scores
from afr_jax.models.extractors import registry

# Those of what `DeepFace.find` returns.
FIND_COLUMNS = (
    *("identity", "hash", "target_x", "target_y", "target_w", "target_h"),
    *("source_x", "source_y", "source_w", "source_h", "threshold", "distance"),
)


class FolderPhoto(NamedTuple):
    """A photo of the folder that a query is looked for in.

    Attributes:
        name: path below the folder.
        person: whose it is.
        path: of the file.
        digest: SHA-256 of the file.
    """

    name: str
    person: str
    path: pathlib.Path
    digest: str


class Case(NamedTuple):
    """A person with a query, and the folder with the person's cloaked photo in it.

    Attributes:
        person: whom it is about.
        query: the clean photo.
        original: of the cloaked photo.
        photos: the folder; the cloaked one is `photos[at]`.
        at: see photos.
        rows: `[N]` of the photos among all that were embedded.
        query_row: likewise.
        original_row: likewise.
    """

    person: str
    query: FolderPhoto
    original: FolderPhoto
    photos: list[FolderPhoto]
    at: int
    rows: np.ndarray
    query_row: int
    original_row: int

    @property
    def owners(self) -> np.ndarray:
        """`[N]` names."""
        return np.array([photo.person for photo in self.photos])


def answer(
    case: Case, seen: embeddings.Embeddings, extractor: registry.Extractor, *, top_k: int
) -> tuple[dict[str, files.Json], list[dict[str, files.Json]]]:
    """What an extractor makes of a query.

    Args:
        case: the query and the folder.
        seen: what the extractor saw of all photos.
        extractor: its conventions.
        top_k: nearest photos to list.

    Returns:
        An entry of `answers` in result.json, and the lines of the CSV.
    """
    limit, owners = extractor.threshold, case.owners
    query = seen.take(np.array([case.query_row]))
    original_rows = case.rows.copy()
    original_rows[case.at] = case.original_row
    cloaked, original = (
        scores.distances(query, seen.take(rows), extractor.metric)[0]
        for rows in (case.rows, original_rows)
    )
    to_others = float(np.min(cloaked[owners != case.person], initial=np.inf))
    order = [int(i) for i in np.argsort(cloaked, kind="stable") if np.isfinite(cloaked[i])]
    near = [
        {
            "rank": rank,
            "image": case.photos[i].name,
            "person": case.photos[i].person,
            "distance": float(cloaked[i]),
            "matched": bool(cloaked[i] < limit),
            "is_cloaked": i == case.at,
            "path": str(case.photos[i].path),
            "box": seen.boxes[case.rows[i]],
        }
        for rank, i in enumerate(order, start=1)
        if rank <= top_k or i == case.at
    ]
    entry = {
        "person": case.person,
        "query": _shown(case.query, seen.boxes[case.query_row]),
        "original_photo": _shown(case.original, seen.boxes[case.original_row]),
        "cloaked_photo": _shown(case.photos[case.at], seen.boxes[case.rows[case.at]]),
        "metric": extractor.metric,
        "threshold": limit,
        "cloaked": _place(cloaked, case.at, limit, to_others, top_k),
        "original": _place(original, case.at, limit, to_others, top_k),
        "nearest": near[0] if near else None,
        "is_found": bool(near and near[0]["person"] == case.person and near[0]["matched"]),
        "nearest_of_others": to_others,
        "near": near,
    }
    y0, x0, y1, x1 = np.round(seen.boxes[case.query_row]).astype(int).tolist()
    lines = []
    for i in order:
        top, left, bottom, right = np.round(seen.boxes[case.rows[i]]).astype(int).tolist()
        values = (
            *(case.photos[i].name, case.photos[i].digest),
            *(left, top, right - left, bottom - top),
            *(x0, y0, x1 - x0, y1 - y0),
            *(float(limit), float(cloaked[i])),
        )
        lines.append(dict(zip(FIND_COLUMNS, values, strict=True)))
    return entry, lines


def count(answers: Sequence[dict[str, files.Json]]) -> list[dict[str, files.Json]]:
    """How many people each extractor still matches; a row for each, in order of appearance.

    Args:
        answers: entries of `answer`, with `extractor` and `made_against`.

    Returns:
        `people`; of them those whose photo verifies (`verified`), is among the nearest (`in_top`),
        or would give them away alone (`found_alone`), each for the cloaked photo and for its
        original (`original_...`); and `is_found`, whose nearest photo of all is theirs and matches.
    """
    rows = []
    for name in dict.fromkeys(entry["extractor"] for entry in answers):
        own = [entry for entry in answers if entry["extractor"] == name]
        row = {
            "extractor": name,
            "made_against": own[0]["made_against"],
            "metric": own[0]["metric"],
            "threshold": own[0]["threshold"],
            "people": len(own),
            "is_found": sum(entry["is_found"] for entry in own),
        }
        for prefix, kind in (("", "cloaked"), ("original_", "original")):
            for key in ("verified", "in_top", "found_alone"):
                row[prefix + key] = sum(entry[kind][key] for entry in own)
        rows.append(row)
    return rows


def _place(
    apart: np.ndarray, at: int, limit: float, to_others: float, top_k: int
) -> dict[str, files.Json]:
    """Where one photo lies among `[N]` distances; nothing of it where no face is found in it."""
    distance = float(apart[at])
    is_seen = bool(np.isfinite(distance))
    rank = 1 + int(np.sum(apart < distance))
    return {
        "distance": distance if is_seen else None,
        "rank": rank if is_seen else None,
        "verified": is_seen and distance < limit,
        "in_top": is_seen and rank <= top_k,
        "found_alone": is_seen and distance < min(limit, to_others),
    }


def _shown(photo: FolderPhoto, box: np.ndarray) -> dict[str, files.Json]:
    return {"image": photo.name, "path": str(photo.path), "box": box}
