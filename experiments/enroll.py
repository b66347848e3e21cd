"""Enrols a gallery of people into a reference database.

    python -m experiments.enroll --gallery=people --database=out/people
    python -m experiments.enroll --database=out/people --delete="Ann Example"

--gallery is a folder with a folder of photos for each person, whose name is the identity, or, with
--csv, a folder of photos and a CSV with the columns image, identity (paths below --gallery). The
face that each photo is of (large and central) is detected, aligned and embedded, and written with
its identity, photo, box, extractor and the fingerprint of the extractor's weights. --database is a
folder, or an address in an object store (s3://bucket/people; LanceDB reads the credentials from
the environment).

Running it again enrols what is new and what has changed; a killed run is completed that way.
--replace makes the database hold for each person of the gallery exactly the photos that are in the
gallery now. --delete removes people; with --purge also the bytes of their rows and all earlier
versions of the database, while nobody else uses it. A database holds embeddings of one extractor
with one set of weights; others are refused. A photo is known by its path below --gallery.

The result names every photo that could not be enrolled, and why. Exit
codes: 0 done; 2 wrong usage; 3 done, but some photos could not be enrolled.
Expected on two CPU cores with dlib: 0.06 s a photo after half a minute of compilation in the first
run. --toy enrols the first 8 photos.
"""

import itertools
import time
from typing import Any

import numpy as np
from absl import flags, logging

from afr_jax.core import program, progress, workdir
from afr_jax.data import identities
from afr_jax.models.extractors import registry
from afr_jax.recognition import database, detect, match, pipeline

_GALLERY = flags.DEFINE_string("gallery", None, "folder with a folder of photos for each person")
_CSV = flags.DEFINE_string("csv", None, "CSV with the columns image, identity; paths in --gallery")
_DATABASE = flags.DEFINE_string("database", None, "folder or object-store address of the database")
_EXTRACTOR = flags.DEFINE_string(
    "extractor", "dlib", f"{', '.join(registry.EXTRACTORS)}, or the folder of a trained one"
)
_WEIGHTS = flags.DEFINE_string("weights", None, "file of its weights; default: its usual source")
_REPLACE = flags.DEFINE_bool("replace", False, "drop what is enrolled of the gallery's people")
_DELETE = flags.DEFINE_multi_string("delete", [], "identity to remove; may be repeated")
_PURGE = flags.DEFINE_bool("purge", False, "with --delete: also from the disk, history included")
_MIN_FACE = flags.DEFINE_integer("min_face_px", 20, "side of the smallest face looked for", 12)
_MIN_CONFIDENCE = flags.DEFINE_float(
    "min_confidence", 0.9, "of the detector, for a face to be enrolled", 0.0, 1.0
)

_GROUP, _TOY_PHOTOS = 64, 8


def enroll_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    if not _DATABASE.value:
        raise program.UsageError("--database is needed")
    if bool(_GALLERY.value) == bool(_DELETE.value):
        raise program.UsageError("give one of --gallery and --delete")
    try:
        return _enrol() if _GALLERY.value else _delete()
    except (database.DatabaseError, FileNotFoundError, ValueError) as error:
        raise program.UsageError(str(error)) from error


def _enrol() -> tuple[dict[str, Any], int]:
    root = _GALLERY.value
    listing = identities.list_csv(_CSV.value, root) if _CSV.value else identities.list_tree(root)
    listing = listing.without(
        [
            identities.Problem(sample.sample_id, reason)
            for sample in listing.samples
            if (reason := _name_problem(sample))
        ]
    )
    items = list(listing.samples[:_TOY_PHOTOS] if flags.FLAGS.toy else listing.samples)
    work = workdir.open_workdir(flags.FLAGS.workdir, _config()) if flags.FLAGS.workdir else None
    start = time.perf_counter()
    recognizer = pipeline.load(
        [_EXTRACTOR.value],
        weights={_EXTRACTOR.value: _WEIGHTS.value} if _WEIGHTS.value else None,
        options=detect.DetectorOptions(min_face_px=_MIN_FACE.value),
    )
    tag = pipeline.tag(recognizer, _EXTRACTOR.value)
    reference = database.open_database(_DATABASE.value, tag=tag, create=True)
    enrolled = {} if _REPLACE.value else reference.images()
    todo = [
        item
        for item in items
        if item.sample_id not in enrolled
        or enrolled[item.sample_id] != (pipeline.file_digest(item.path), item.identity)
    ]
    counts = {"added": 0, "changed": 0, "unchanged": len(items) - len(todo)}
    problems = [(problem.name, problem.reason) for problem in listing.problems]
    if _REPLACE.value:
        todo.sort(key=lambda item: item.identity)
    found = pipeline.recognize(
        recognizer, [item.path for item in todo], min_confidence=_MIN_CONFIDENCE.value
    )
    found = progress.track(found, description="photos", total=len(todo))
    pairs = zip(todo, found, strict=True)
    for group in _groups(pairs):
        usable = [pair for pair in group if not pair[1].problem]
        problems += [(item.sample_id, seen.problem) for item, seen in group if seen.problem]
        if _REPLACE.value:
            if usable:
                reference.replace_identity(usable[0][0].identity, _entries(usable))
                counts["added"] += len(usable)
            continue
        if new := [pair for pair in usable if pair[0].sample_id not in enrolled]:
            reference.append(_entries(new))
        if changed := [pair for pair in usable if pair[0].sample_id in enrolled]:
            reference.replace_images(_entries(changed))
        if gone := [
            item.sample_id for item, seen in group if seen.problem and item.sample_id in enrolled
        ]:
            reference.delete_images(gone)
        counts["added"] += len(new)
        counts["changed"] += len(changed)
    reference.maintain()
    for name, reason in problems:
        logging.warning("%s: %s", name, reason)
    result = {
        "database": reference.uri,
        "extractor": tag.name,
        "weights": tag.weights,
        **counts,
        "enrolled": len(reference),
        "identities": len(reference.identities()),
        "seconds": time.perf_counter() - start,
        "not_handled": [{"image": name, "reason": reason} for name, reason in problems],
    }
    if work is not None:
        work.write_result(result)
    return result, program.EXIT_PARTIAL if problems else program.EXIT_OK


def _delete() -> tuple[dict[str, Any], int]:
    reference = database.open_database(_DATABASE.value)
    deleted = reference.delete_identities(_DELETE.value, purge=_PURGE.value)
    result = {
        "database": reference.uri,
        "deleted": deleted,
        "enrolled": len(reference),
        "identities": len(reference.identities()),
    }
    return result, program.EXIT_OK


def _groups(pairs):
    """Photos that are written by one transaction: a person's with --replace, else any 64."""
    if _REPLACE.value:
        for _, group in itertools.groupby(pairs, key=lambda pair: pair[0].identity):
            yield list(group)
        return
    yield from (list(group) for group in iter(lambda: list(itertools.islice(pairs, _GROUP)), []))


def _entries(pairs) -> database.Entries:
    return database.Entries(
        identities=[item.identity for item, _ in pairs],
        images=[item.sample_id for item, _ in pairs],
        digests=[seen.digest for _, seen in pairs],
        faces=[0] * len(pairs),
        boxes=np.stack([seen.faces.boxes[0] for _, seen in pairs]),
        vectors=np.stack([seen.embeddings[_EXTRACTOR.value][0] for _, seen in pairs]),
    )


def _name_problem(sample: identities.Sample) -> str | None:
    if sample.identity == match.UNKNOWN:
        return f"nobody may be called {match.UNKNOWN!r}: it says that none matched"
    try:
        sample.sample_id.encode("utf-8")
    except UnicodeEncodeError:
        return "the name is not Unicode"
    return None


def _config() -> dict[str, Any]:
    return {
        "gallery": _GALLERY.value,
        "database": _DATABASE.value,
        "extractor": _EXTRACTOR.value,
        "weights": _WEIGHTS.value,
        "toy": flags.FLAGS.toy,
    }


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(enroll_program)
