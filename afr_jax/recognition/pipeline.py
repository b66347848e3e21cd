"""Stages 2 to 4 of face recognition in one call: from photo files to embedded faces.

What enrollment, matching, verification and evaluations share: a photo is read and its faces are
detected once, then aligned and embedded for every extractor in use.
"""

import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import parallel
from afr_jax.data import photos
from afr_jax.models import mtcnn
from afr_jax.models.extractors import registry
from afr_jax.recognition import database, detect, embed
from afr_jax.training import trained

_GROUP = 64
NO_FACE = "no face was found"


class Recognizer(NamedTuple):
    """A detector and some extractors, loaded.

    Attributes:
        detector: variables of MTCNN's three networks.
        options: of the detector.
        extractors: entries of the zoo and the like, by the name that was asked for.
        variables: theirs, by name.
    """

    detector: dict
    options: detect.DetectorOptions
    extractors: dict[str, registry.Extractor]
    variables: dict[str, dict]


class Recognized(NamedTuple):
    """What was found in one photo.

    Attributes:
        path: of the file.
        problem: why there are no faces: an unreadable file, or `NO_FACE`; None if there are.
        digest: SHA-256 of the file, hexadecimal; empty if it could not be read.
        faces: the N faces.
        embeddings: `[N, D]` float32 of each extractor, by name.
    """

    path: pathlib.Path
    problem: str | None
    digest: str
    faces: detect.Faces
    embeddings: dict[str, np.ndarray]


def load(
    names: Sequence[str],
    *,
    weights: Mapping[str, str] | None = None,
    options: detect.DetectorOptions | None = None,
) -> Recognizer:
    """Loads the detector and extractors.

    Args:
        names: of extractors in the zoo, or folders of trained ones (`trained.write_extractor`).
        weights: file of an extractor's weights, by its name; its default source otherwise.
        options: of the detector; its defaults if None.

    Raises:
        ValueError: an unknown name, or a file that does not hold the network's weights.
        FileNotFoundError: weights that are not there, with what to do.
    """
    weights = weights or {}
    for name in weights:
        if name not in names:
            raise ValueError(f"weights are given for {name!r}, which is not among the extractors")
    extractors = {name: find_extractor(name) for name in names}
    return Recognizer(
        detector=jax.tree.map(jnp.asarray, mtcnn.read_weights(mtcnn.find_weights())),
        options=options or detect.DetectorOptions(),
        extractors=extractors,
        variables={
            name: jax.tree.map(
                jnp.asarray, registry.load_variables(extractor, path=weights.get(name))
            )
            for name, extractor in extractors.items()
        },
    )


def find_extractor(name: str) -> registry.Extractor:
    """An extractor by its name in the zoo, or by the folder of a trained one.

    Raises:
        ValueError: neither.
    """
    if name not in registry.EXTRACTORS and pathlib.Path(name).exists():
        return trained.read_extractor(name)
    return registry.get(name)


def tag(recognizer: Recognizer, name: str) -> database.ExtractorTag:
    """What a reference database notes of the extractor that filled it."""
    extractor = recognizer.extractors[name]
    weights = registry.fingerprint(recognizer.variables[name])
    size = extractor.embedding_size
    return database.ExtractorTag(extractor.name, weights, size, extractor.metric)


def parse_weights(values: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Weight files of a command line: `NAME=FILE`, or `FILE` alone where there is one extractor.

    Raises:
        ValueError: a file without a name where there are several extractors.
    """
    found = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or name not in names:
            if len(names) != 1:
                raise ValueError(f"{value!r} must be NAME=FILE, NAME one of {', '.join(names)}")
            name, path = names[0], value
        found[name] = path
    return found


def recognize(
    recognizer: Recognizer,
    paths: Iterable[pathlib.Path],
    *,
    which: Literal["main", "all"] = "main",
    min_confidence: float = 0.0,
) -> Iterator[Recognized]:
    """Reads photos, finds and embeds their faces.

    Photos are taken in groups of 64, two at a time through the detector, and dropped as soon as
    their faces are embedded.

    Args:
        recognizer: from `load`.
        paths: of photo files.
        which: the face that a photo is of (`detect.main_face`), or every one.
        min_confidence: of the detector, for a face to count.

    Yields:
        One result for each path, in their order.
    """
    paths = [pathlib.Path(path) for path in paths]
    for start in range(0, len(paths), _GROUP):
        group = paths[start : start + _GROUP]
        found = parallel.thread_map(
            lambda path: _find(recognizer, path, which, min_confidence), group
        )
        pairs = [
            (pixels, landmarks) for pixels, faces, _, _ in found for landmarks in faces.landmarks
        ]
        embeddings = {
            name: embed.embed_faces(extractor, recognizer.variables[name], pairs)
            for name, extractor in recognizer.extractors.items()
        }
        at = 0
        for path, (_, faces, digest, problem) in zip(group, found, strict=True):
            rows = slice(at, at + len(faces.boxes))
            at = rows.stop
            own = {name: vectors[rows] for name, vectors in embeddings.items()}
            yield Recognized(path, problem, digest, faces, own)


def file_digest(path: pathlib.Path) -> str:
    """SHA-256 of a photo file, hexadecimal; empty if it cannot be read as one."""
    try:
        return hashlib.sha256(photos.read_photo_bytes(path)).hexdigest()
    except photos.PhotoError:
        return ""


def _find(recognizer, path, which, min_confidence):
    """Pixels (None for an unreadable photo), faces, digest and problem of one photo."""
    none = detect.no_faces()
    try:
        data = photos.read_photo_bytes(path)
        pixels = photos.decode_photo(data).pixels
    except photos.PhotoError as error:
        return None, none, "", str(error)
    faces = detect.detect_faces(recognizer.detector, pixels, options=recognizer.options)
    spread = np.ptp(faces.landmarks, axis=1).max(axis=1, initial=0.0)
    # Landmarks in one spot cannot be aligned.
    faces = detect.select_faces(faces, (faces.confidences >= min_confidence) & (spread >= 1.0))
    if which == "main":
        faces = detect.main_face(faces, pixels.shape)
    digest = hashlib.sha256(data).hexdigest()
    return pixels, faces, digest, None if len(faces.boxes) else NO_FACE
