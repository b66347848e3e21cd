"""Checks that our detector finds what PyPI `mtcnn` finds, on any photos.

    python -m experiments.detector_agreement --images=photos --peer_python=peers/bin/python

Both look at every photo with the package's default settings. A face of confidence 0.9 or more is
found by the other side if that has a box of IoU 0.9 or more there. Writes `result.json` into the
work folder, by default `out/detector_agreement`: counts, landmark errors as shares of the width of
the package's box, and every disagreement. How to make the environment of the package:
experiments/reference/README.md.

Expected on two CPU cores: 1 s a photo. Expected on 280 photos of WIDER FACE and LFW: every face is
found by both. --toy compares on two photos of at most 160 px.
"""

import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from afr_jax.benchmark import detection
from afr_jax.core import program, progress, workdir
from afr_jax.data import photo_files, photos
from afr_jax.evaluation import reference
from afr_jax.evaluation.attackers import other_detectors
from afr_jax.models import mtcnn
from afr_jax.recognition import detect

_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python of an environment with mtcnn")
_IMAGES = flags.DEFINE_list("images", [], "photos and folders of photos")
_MAX_PHOTOS = flags.DEFINE_integer(
    "max_photos", None, "at most that many files of each of --images, evenly spread", lower_bound=1
)

_MIN_OVERLAP, _MIN_CONFIDENCE = 0.9, 0.9
_TOY_PHOTOS, _TOY_PX = 2, 160
_SCRIPT = pathlib.Path(__file__).resolve().parent / "reference" / "mtcnn_driver.py"


def agreement_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    sources = list(_sources())
    settings = {
        **{"max_photos": _MAX_PHOTOS.value, "toy": flags.FLAGS.toy},
        **{"min_overlap": _MIN_OVERLAP, "min_confidence": _MIN_CONFIDENCE},
    }
    work = workdir.open_workdir(
        flags.FLAGS.workdir or "out/detector_agreement", settings, resumable=settings
    )
    provenance = program.provenance("experiments.detector_agreement")
    try:
        variables = jax.tree.map(jnp.asarray, mtcnn.read_weights(mtcnn.find_weights()))
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(str(error)) from error
    if _PEER_PYTHON.value is None:
        raise program.UsageError("--peer_python is needed; see experiments/reference/README.md")
    try:
        other = reference.Peer(pathlib.Path(_PEER_PYTHON.value).expanduser(), _SCRIPT)
    except reference.PeerError as error:
        raise program.UsageError(f"--peer_python: {error}") from error
    with other, tempfile.TemporaryDirectory() as folder:
        findings = _compare(variables, other, pathlib.Path(folder), sources)
        versions = other.versions
    result = {
        **provenance,
        "peer": versions,
        "settings": settings,
        **findings,
    }
    work.write_result(result)
    return result, program.EXIT_PARTIAL if findings["unreadable"] else program.EXIT_OK


def _sources() -> Iterator[photo_files.PhotoInput]:
    limit = _TOY_PHOTOS if flags.FLAGS.toy else _MAX_PHOTOS.value
    if not _IMAGES.value:
        raise program.UsageError("--images is needed")
    for path in _IMAGES.value:
        try:
            found = photo_files.list_photos([pathlib.Path(path).expanduser()])
        except FileNotFoundError as error:
            raise program.UsageError(f"--images: {error}") from error
        if not found:
            raise program.UsageError(f"--images: {path} holds no files")
        count = min(limit or len(found), len(found))
        yield from (found[index * len(found) // count] for index in range(count))


def _compare(
    variables: dict,
    other: reference.Peer,
    folder: pathlib.Path,
    sources: list[photo_files.PhotoInput],
) -> dict[str, Any]:
    """Counts, landmark errors, disagreements, and the files that are no photos."""
    options = detect.DetectorOptions()
    counts = dict.fromkeys(("ours", "ours_found", "theirs", "theirs_found"), 0)
    errors, disagreements, unreadable = [], [], []
    for source in progress.track(sources, description="photos"):
        name = source.relative.as_posix()
        try:
            pixels = _pixels(source)
        except photos.PhotoError as error:
            unreadable.append({"image": name, "reason": str(error)})
            continue
        np.save(folder / "photo.npy", pixels)
        ours = detect.detect_faces(variables, pixels, options=options)
        theirs = other_detectors.ask_mtcnn(other, [folder / "photo.npy"], options)[1][0]
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


def _pixels(source: photo_files.PhotoInput) -> np.ndarray:
    if source.problem is not None:
        raise photos.PhotoError(source.problem)
    pixels = photos.read_photo(source.path).pixels
    if flags.FLAGS.toy:
        image = Image.fromarray(pixels)
        image.thumbnail((_TOY_PX, _TOY_PX))
        pixels = np.asarray(image)
    return pixels


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(agreement_program)
