"""Embeddings of photos after a countermeasure, kept in files so that each is made once.

Published photos reach the tracker re-encoded or edited; it detects, aligns and embeds what it gets.
Nothing here knows the landmarks of the originals.
"""

import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from afr_jax.core import files, parallel, workdir
from afr_jax.data import photos
from afr_jax.evaluation.attackers import countermeasures, tracker_names
from afr_jax.evaluation.cloaking import cells
from afr_jax.models.extractors import registry
from afr_jax.recognition import pipeline
from afr_jax.recognition.detectors import yunet

COUNTERMEASURES = ("none", "jpeg75", "jpeg50", "blur", "half_size", "grayscale", "denoise")


class Embeddings(NamedTuple):
    """What one extractor makes of N photos; rows without a face are zero.

    Attributes:
        found: `[N]` bool, whether a face was found.
        vectors: `[N, D]` float32.
        landmarks: `[N, 5, 2]` float32 (y, x), in the photo after the countermeasure.
        boxes: `[N, 4]` float32 (y0, x0, y1, x1) of the faces, likewise.
    """

    found: np.ndarray
    vectors: np.ndarray
    landmarks: np.ndarray
    boxes: np.ndarray

    def take(self, rows: slice | np.ndarray) -> "Embeddings":
        """Those of some photos."""
        return Embeddings(*(field[rows] for field in self))


def convert(name: str, pixels: np.ndarray) -> np.ndarray:
    """A photo `[H, W, 3]` uint8 after a countermeasure.

    half_size: both sides halved by averaging; the others as in `countermeasures.convert`.

    Raises:
        ValueError: there is no such countermeasure.
    """
    if name not in COUNTERMEASURES:
        raise ValueError(f"no countermeasure {name!r}; there are: {', '.join(COUNTERMEASURES)}")
    if name != "half_size":
        return countermeasures.convert(name, pixels[None])[0]
    height, width = pixels.shape[:2]
    size = max(width // 2, 1), max(height // 2, 1)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def embed_photos(
    recognizer: pipeline.Recognizer,
    paths: Sequence[pathlib.Path],
    folder: pathlib.Path,
    *,
    countermeasure: str = "none",
) -> dict[str, Embeddings]:
    """Embeddings of some photos by every extractor, from their files where there are any.

    Args:
        recognizer: detector and extractors.
        paths: of photos; always the same ones for one folder.
        folder: where `<countermeasure>-<extractor>.npz` are kept.
        countermeasure: of `COUNTERMEASURES`, applied to every photo before its face is detected.

    Returns:
        By the extractor's name.
    """
    paths_of = {
        name: folder / f"{countermeasure}-{cells.file_name(name)}.npz"
        for name in recognizer.extractors
    }
    read = {name: workdir.read_or_none(path, _read) for name, path in paths_of.items()}
    found = {name: known for name, known in read.items() if known is not None}
    missing = {name: each for name, each in recognizer.extractors.items() if name not in found}
    if missing:
        some = recognizer._replace(extractors=missing)
        for name, new in _embed(some, paths, countermeasure).items():
            files.write_arrays(paths_of[name], new._asdict())
            found[name] = new
    return {name: found[name] for name in paths_of}


def check_weights(path: pathlib.Path, recognizer: pipeline.Recognizer) -> None:
    """Notes the weights of extractors in a file, and refuses others than those noted before.

    Args:
        path: of the JSON file, in the folder of the run.
        recognizer: detector and extractors.

    Raises:
        ValueError: an extractor's weights are not those that the run's files were made with.
    """
    known = files.parse_json(path.read_text()) if path.exists() else {}
    now = {name: registry.fingerprint(v) for name, v in recognizer.variables.items()}
    # By the name that the files have: a folder may lie elsewhere, another one be called the same.
    kept = {cells.file_name(name): print_ for name, print_ in now.items()}
    known = {cells.file_name(name): print_ for name, print_ in known.items()}
    for name, own in now.items():
        if known.get(cells.file_name(name), own) != own:
            raise ValueError(f"{path.parent} was made with other weights of {name}")
    files.write_json(path, known | kept)


def _embed(
    recognizer: pipeline.Recognizer, paths: Sequence[pathlib.Path], countermeasure: str
) -> dict[str, Embeddings]:
    with tempfile.TemporaryDirectory() as scratch:
        if countermeasure != "none":
            folder = pathlib.Path(scratch)

            def write(item: tuple[int, pathlib.Path]) -> pathlib.Path:
                number, path = item
                pixels = convert(countermeasure, photos.read_photo(path).pixels)
                Image.fromarray(pixels).save(folder / f"{number}.png", compress_level=1)
                return folder / f"{number}.png"

            paths = parallel.thread_map(write, list(enumerate(paths)))
        results: dict[str, Embeddings] = {}
        for aligner in tracker_names.ALIGNERS:
            own = {
                name: extractor
                for name, extractor in recognizer.extractors.items()
                if tracker_names.parse(name).aligner == aligner
            }
            if own:
                results |= _recognize(recognizer._replace(extractors=own), paths, aligner)
        return results


def _recognize(
    recognizer: pipeline.Recognizer, paths: Sequence[pathlib.Path], aligner: str
) -> dict[str, Embeddings]:
    """Embeddings of photos whose faces one detector finds."""
    detect_fn = yunet.load() if aligner == "yunet" else None
    found = list(pipeline.recognize(recognizer, paths, detect_fn=detect_fn))
    mask = np.array([len(item.faces.boxes) > 0 for item in found], bool)
    landmarks = np.zeros((len(found), 5, 2), np.float32)
    boxes = np.zeros((len(found), 4), np.float32)
    for row in np.flatnonzero(mask):
        landmarks[row], boxes[row] = found[row].faces.landmarks[0], found[row].faces.boxes[0]
    results = {}
    for name, extractor in recognizer.extractors.items():
        vectors = np.zeros((len(found), extractor.embedding_size), np.float32)
        vectors[mask] = np.concatenate([item.embeddings[name] for item in found])
        results[name] = Embeddings(mask, vectors, landmarks, boxes)
    return results


def _read(path: str | os.PathLike[str]) -> Embeddings:
    return Embeddings(**files.read_arrays(path))
