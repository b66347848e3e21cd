"""Target identities for cloaks: one for all photos of a run, as Fawkes asks for one per person."""

import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from afr_jax.core import progress
from afr_jax.data import photo_files, photos
from afr_jax.recognition import detect, embed, pipeline

Centroids = Mapping[str, Mapping[str, np.ndarray]]
OptionsFn = Callable[[Sequence[int]], detect.DetectorOptions]


class TargetError(ValueError):
    """A target that cannot be used; the message says why."""


class Target(NamedTuple):
    """Another person whom all faces of a run are moved towards.

    Attributes:
        identity: name of the person.
        centroids: mean embedding `[D]` by the extractor's name.
    """

    identity: str
    centroids: dict[str, np.ndarray]


def check(target: str, gallery: str | os.PathLike[str] | None) -> None:
    """Checks what is asked for before anything is loaded; see `choose`.

    Raises:
        TargetError: one does not go with the other, or a folder is not there.
    """
    if (target == "farthest") != (gallery is not None):
        raise TargetError("the target 'farthest' needs a gallery, and a gallery needs that target")
    if target not in ("repel", "farthest") and not pathlib.Path(target).is_dir():
        raise TargetError(f"{target} is not repel, farthest or a folder")
    if gallery is not None and not pathlib.Path(gallery).is_dir():
        raise TargetError(f"{gallery} is not a folder")


def choose(
    recognizer: pipeline.Recognizer,
    target: str,
    gallery: str | os.PathLike[str] | None,
    images: Iterable[np.ndarray],
    *,
    options_fn: OptionsFn,
) -> Target | None:
    """The person whom faces are moved towards.

    Args:
        recognizer: detector and extractors.
        target: "repel" for nobody; a folder with photos of the person; "farthest" for the person of
            the gallery who is farthest from all faces of the images.
        gallery: folder with a folder of photos for each person; for "farthest" alone.
        images: the user's photos, `[H, W, 3]` uint8; looked at for "farthest" alone.
        options_fn: the detector's options for a photo's shape.

    Raises:
        TargetError: see `check`; no face where one is needed.
    """
    check(target, gallery)
    if target == "repel":
        return None
    if gallery is not None:
        return farthest_in_gallery(recognizer, gallery, images, options_fn=options_fn)
    centroids = folder_centroids(recognizer, target, options_fn=options_fn)
    return Target(pathlib.Path(target).name, centroids)


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
        TargetError: the gallery is empty.
    """
    if not gallery:
        raise TargetError("the gallery has no identity with a face")

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
        TargetError: no photo has a face.
    """
    faces = _faces_below(recognizer, folder, options_fn)
    if not faces:
        raise TargetError(f"{folder} holds no photo with a face")
    return _centroids(recognizer, faces)


def farthest_in_gallery(
    recognizer: pipeline.Recognizer,
    gallery: str | os.PathLike[str],
    images: Iterable[np.ndarray],
    *,
    options_fn: OptionsFn,
) -> Target:
    """The person of a gallery who is farthest from all faces of some photos.

    Args:
        recognizer: detector and extractors.
        gallery: folder with a folder of photos for each person; who has no face there is left out.
        images: the user's photos, `[H, W, 3]` uint8.
        options_fn: the detector's options for a photo's shape.

    Returns:
        The person, see `farthest_identity`.

    Raises:
        TargetError: no face in the user's photos, or none in the gallery.
    """
    centroids = {}
    for folder in sorted(pathlib.Path(gallery).iterdir()):
        is_person = folder.is_dir() and not folder.name.startswith(".")
        if is_person and (faces := _faces_below(recognizer, folder, options_fn)):
            centroids[folder.name] = _centroids(recognizer, faces)
    own = []
    for pixels in images:
        found = _detect(recognizer, pixels, options_fn)
        own += [(pixels, landmarks) for landmarks in found.landmarks]
    if not own:
        raise TargetError("no face was found in the photos to cloak")
    thresholds = {name: each.threshold for name, each in recognizer.extractors.items()}
    identity = farthest_identity(_embed(recognizer, own), centroids, thresholds)
    return Target(identity, centroids[identity])


def _faces_below(
    recognizer: pipeline.Recognizer, folder: str | os.PathLike[str], options_fn: OptionsFn
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The most confident face of every readable photo of a folder, with its landmarks."""
    faces = []
    for source in photo_files.list_photos([folder]):
        try:
            pixels = photos.read_photo(source.path).pixels
        except photos.PhotoError as error:
            progress.warn(source.path, error)
            continue
        found = _detect(recognizer, pixels, options_fn)
        if len(found.boxes):
            faces.append((pixels, found.landmarks[0]))
    return faces


def _centroids(
    recognizer: pipeline.Recognizer, faces: Sequence[tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    return {name: centroid(vectors) for name, vectors in _embed(recognizer, faces).items()}


def _detect(
    recognizer: pipeline.Recognizer, pixels: np.ndarray, options_fn: OptionsFn
) -> detect.Faces:
    return detect.detect_faces(recognizer.detector, pixels, options=options_fn(pixels.shape))


def _embed(
    recognizer: pipeline.Recognizer, faces: Sequence[tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    return {
        name: embed.embed_faces(extractor, recognizer.variables[name], faces)
        for name, extractor in recognizer.extractors.items()
    }
