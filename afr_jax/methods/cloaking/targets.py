"""Target identities for cloaks: one for all photos of a run, as Fawkes asks for one per person."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from absl import logging

from afr_jax.data import photo_files, photos
from afr_jax.recognition import detect, embed, pipeline

Centroids = Mapping[str, Mapping[str, np.ndarray]]
OptionsFn = Callable[[Sequence[int]], detect.DetectorOptions]


def centroid(embeddings: np.ndarray) -> np.ndarray:
    """Mean `[D]` of one identity's embeddings `[N, D]`, N >= 1."""
    if len(embeddings) == 0:
        raise ValueError("an identity needs at least one face")
    return np.mean(embeddings, axis=0)


def farthest_identity(
    own: Mapping[str, np.ndarray], gallery: Centroids, thresholds: Mapping[str, float]
) -> str:
    """The identity whose nearest photo of the user is farthest away.

    Shan et al. 2020, section 4.2: argmax over identities k of the minimum over the user's photos x
    of the distance of x to the centroid of k; distances of several extractors are added in units of
    their thresholds. Ties go to the first name.

    Args:
        own: the user's embeddings `[N, D]` by extractor.
        gallery: centroid `[D]` by identity and extractor.
        thresholds: by extractor.

    Returns:
        The name of the identity.

    Raises:
        ValueError: the gallery is empty.
    """
    if not gallery:
        raise ValueError("the gallery has no identity with a face")

    def nearest(centroids: Mapping[str, np.ndarray]) -> float:
        total = sum(
            np.linalg.norm(vectors - centroids[name], axis=-1) / thresholds[name]
            for name, vectors in own.items()
        )
        return float(np.min(total))

    return max(sorted(gallery), key=lambda identity: nearest(gallery[identity]))


def folder_centroids(
    recognizer: pipeline.Recognizer, folder: str | os.PathLike[str], *, options_fn: OptionsFn
) -> dict[str, np.ndarray]:
    """Centroids of a person's photos: the most confident face of each that is readable.

    Args:
        recognizer: detector and extractors.
        folder: with photos, in it and below it.
        options_fn: the detector's options for a photo's shape.

    Returns:
        Centroid `[D]` by extractor.

    Raises:
        ValueError: no photo has a face.
    """
    faces = _faces_below(recognizer, folder, options_fn)
    if not faces:
        raise ValueError(f"{folder} holds no photo with a face")
    return _centroids(recognizer, faces)


def farthest_in_gallery(
    recognizer: pipeline.Recognizer,
    gallery: str | os.PathLike[str],
    paths: Iterable[pathlib.Path],
    *,
    options_fn: OptionsFn,
) -> tuple[str, dict[str, np.ndarray]]:
    """The person of a gallery who is farthest from all faces of some photos.

    Args:
        recognizer: detector and extractors.
        gallery: folder with a folder of photos for each person; who has no face there is left out.
        paths: of the user's photos; unreadable ones are left out.
        options_fn: the detector's options for a photo's shape.

    Returns:
        The person's name and `folder_centroids`; see `farthest_identity`.

    Raises:
        ValueError: no face in the user's photos, or none in the gallery.
    """
    centroids = {}
    for folder in sorted(pathlib.Path(gallery).iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            if faces := _faces_below(recognizer, folder, options_fn):
                centroids[folder.name] = _centroids(recognizer, faces)
    own = []
    for path in paths:
        with contextlib.suppress(photos.PhotoError):
            pixels = photos.read_photo(path).pixels
            found = _detect(recognizer, pixels, options_fn)
            own += [(pixels, landmarks) for landmarks in found.landmarks]
    if not own:
        raise ValueError("no face was found in the photos to cloak")
    thresholds = {name: each.threshold for name, each in recognizer.extractors.items()}
    identity = farthest_identity(_embed(recognizer, own), centroids, thresholds)
    return identity, centroids[identity]


def _faces_below(recognizer, folder, options_fn) -> list[tuple[np.ndarray, np.ndarray]]:
    """The most confident face of every readable photo of a folder, with its landmarks."""
    faces = []
    for source in photo_files.list_photos([folder]):
        try:
            pixels = photos.read_photo(source.path).pixels
        except photos.PhotoError as error:
            logging.warning("%s: %s", source.path, error)
            continue
        found = _detect(recognizer, pixels, options_fn)
        if len(found.boxes):
            faces.append((pixels, found.landmarks[0]))
    return faces


def _centroids(recognizer, faces) -> dict[str, np.ndarray]:
    return {name: centroid(vectors) for name, vectors in _embed(recognizer, faces).items()}


def _detect(recognizer, pixels, options_fn) -> detect.Faces:
    return detect.detect_faces(recognizer.detector, pixels, options=options_fn(pixels.shape))


def _embed(recognizer, faces) -> dict[str, np.ndarray]:
    return {
        name: embed.embed_faces(extractor, recognizer.variables[name], faces)
        for name, extractor in recognizer.extractors.items()
    }
