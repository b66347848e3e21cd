"""Matches query photos against a reference database: who is on them?

    python -m experiments.enroll --gallery=people --database=out/people
    python -m experiments.match --queries=party --database=out/people --top_k=3

Every face of every query photo is detected, aligned and embedded with the extractor that the
database was made with, and compared with all enrolled faces. Writes `matches.csv` into the work
directory (default `out/match`), a line for each query face and rank:

    query, face, query_box, rank, identity, image, box, distance, threshold, matched, decision

`distance` is in --metric, `matched` is 1 where it lies below the threshold. `decision` is the
identity of the nearest enrolled face if that matched, else `unknown`. Boxes are `y0 x0 y1 x1` in
pixels of the upright photo. `result.json` counts the query photos by status (`ok`, `no_face`,
`unreadable`) and names those without a face.

--metric: `euclidean` is the distance of the embeddings, `euclidean_l2` that of the embeddings
scaled to unit length, `cosine` one minus the cosine of their angle. By default the extractor's own
metric and threshold; --threshold gives another one. From 100,000 faces on the search goes through
the database's index, unless --exact.

Exit codes: 0 done; 2 wrong usage; 3 done, but some queries could not be read or have no face.
Expected on two CPU cores: 0.1 s a query photo after half a minute of compilation in the first run.
"""

import csv
import io
from typing import Any

import numpy as np
from absl import flags, logging

from afr_jax.core import files, program, progress, workdir
from afr_jax.data import photo_files
from afr_jax.models.extractors import registry
from afr_jax.recognition import database, detect, match, pipeline

_QUERIES = flags.DEFINE_list("queries", [], "photos and folders of photos to look at")
_DATABASE = flags.DEFINE_string("database", None, "folder or object-store address to search in")
_TOP_K = flags.DEFINE_integer("top_k", 5, "nearest enrolled faces to list for a query face", 1)
_METRIC = flags.DEFINE_enum(
    "metric", None, registry.METRICS, "how embeddings are compared; default: as the extractor's"
)
_THRESHOLD = flags.DEFINE_float(
    "threshold", None, "distance below which it is the same person; default: the extractor's"
)
_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "weight file, or folder of the trained extractor, that the database is made with",
)
_EXACT = flags.DEFINE_bool("exact", None, "search all faces even if there is an index")
_MIN_FACE = flags.DEFINE_integer("min_face_px", 20, "side of the smallest face looked for", 12)
_MIN_CONFIDENCE = flags.DEFINE_float(
    "min_confidence", 0.9, "of the detector, for a face to be matched", 0.0, 1.0
)

_COLUMNS = (
    *("query", "face", "query_box", "rank", "identity", "image", "box"),
    *("distance", "threshold", "matched", "decision"),
)


def match_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    inputs = _inputs()
    try:
        reference = database.open_database(_DATABASE.value)
        reference.check_not_empty()
        name, weights = reference.tag.name, _WEIGHTS.value
        if name not in registry.EXTRACTORS:
            if not weights:
                raise program.UsageError(
                    f"{reference.uri} was made with {name}: give its --weights"
                )
            name, weights = weights, None
        recognizer = pipeline.load(
            [name],
            weights={name: weights} if weights else None,
            options=detect.DetectorOptions(min_face_px=_MIN_FACE.value),
        )
        reference.check_tag(pipeline.tag(recognizer, name))
        extractor = recognizer.extractors[name]
        metric = _METRIC.value or extractor.metric
        threshold = _THRESHOLD.value
        if threshold is None:
            threshold = match.threshold_of(extractor, metric)
    except (database.DatabaseError, FileNotFoundError, ValueError) as error:
        raise program.UsageError(str(error)) from error
    work = workdir.open_workdir(
        flags.FLAGS.workdir or "out/match",
        {"database": reference.uri, "metric": metric, "threshold": threshold},
        resumable=("database", "metric", "threshold"),
    )
    found = pipeline.recognize(
        recognizer,
        [item.path for item in inputs],
        which="all",
        min_confidence=_MIN_CONFIDENCE.value,
    )
    found = list(progress.track(found, description="query photos", total=len(inputs)))
    names = [item.relative.as_posix() for item in inputs]
    probes = [item.embeddings[name] for item in found]
    hits = reference.search(
        np.concatenate(probes), k=_TOP_K.value, metric=metric, exact=_EXACT.value
    )
    rows, decisions = _rows(names, found, hits, threshold)
    files.write_atomically(work.path / "matches.csv", _as_csv(rows).encode("utf-8"), overwrite=True)
    statuses = [_status(item) for item in found]
    problems = [
        {"query": name, "reason": item.problem}
        for name, item in zip(names, found, strict=True)
        if item.problem
    ]
    for problem in problems:
        logging.warning("%s: %s", problem["query"], problem["reason"])
    result = {
        "database": reference.uri,
        "enrolled": len(reference),
        "extractor": extractor.name,
        "metric": metric,
        "threshold": threshold,
        "queries": {status: statuses.count(status) for status in ("ok", "no_face", "unreadable")},
        "faces": len(decisions),
        "identified": sum(decision != match.UNKNOWN for decision in decisions),
        "unknown": decisions.count(match.UNKNOWN),
        "matches": work.path / "matches.csv",
        "not_handled": problems,
    }
    work.write_result(result)
    return result, program.EXIT_PARTIAL if problems else program.EXIT_OK


def _inputs() -> list[photo_files.PhotoInput]:
    if not _DATABASE.value:
        raise program.UsageError("--database is needed")
    if not _QUERIES.value:
        raise program.UsageError("--queries is needed: photos or folders of photos")
    try:
        inputs = photo_files.list_photos(_QUERIES.value)
    except FileNotFoundError as error:
        raise program.UsageError(f"--queries: {error}") from error
    if not inputs:
        raise program.UsageError(f"--queries={','.join(_QUERIES.value)} holds no files")
    return inputs


def _rows(names, found, hits, threshold) -> tuple[list[list[Any]], list[str]]:
    """Lines of the CSV, and the decision on each face."""
    rows, decisions = [], []
    faces = (
        (name, number, box)
        for name, item in zip(names, found, strict=True)
        for number, box in enumerate(item.faces.boxes)
    )
    for at, (name, number, query_box) in enumerate(faces):
        is_known = hits.distances[at, 0] < threshold
        decision = hits.identities[at][0] if is_known else match.UNKNOWN
        decisions.append(decision)
        for rank in range(hits.distances.shape[1]):
            distance = float(hits.distances[at, rank])
            rows.append(
                [
                    *(name, number, _spoken(query_box), rank + 1),
                    *(hits.identities[at][rank], hits.images[at][rank]),
                    *(_spoken(hits.boxes[at, rank]), f"{distance:.6f}", f"{threshold:.6g}"),
                    *(int(distance < threshold), decision),
                ]
            )
    return rows, decisions


def _as_csv(rows: list[list[Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    writer.writerows(rows)
    return text.getvalue()


def _spoken(box: np.ndarray) -> str:
    return " ".join(f"{value:.1f}" for value in box)


def _status(item: pipeline.Recognized) -> str:
    if item.problem is None:
        return "ok"
    return "no_face" if item.problem == pipeline.NO_FACE else "unreadable"


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(match_program)
