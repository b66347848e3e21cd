"""Whether two photos show one person, by each extractor."""

import pathlib
from collections.abc import Mapping

import numpy as np

from afr_jax.app import limits
from afr_jax.app.tasks import models, outputs, pictures
from afr_jax.core import files
from afr_jax.data import photos
from afr_jax.evaluation.report import page
from afr_jax.recognition import detect, pipeline

# Confidence from which a face is counted for people.
_SURE = 0.9


def run(
    loaded: models.Models, folder: pathlib.Path, payload: Mapping[str, files.Json]
) -> dict[str, files.Json]:
    """Compares the main faces of two photos.

    Args:
        loaded: the networks.
        folder: for pictures of the faces.
        payload: `first` and `second`, each with `path` and `name`.

    Returns:
        `verdicts` by extractor; `faces`, the number seen in each photo; `outputs`.

    Raises:
        limits.Refused: a photo cannot be read, or shows no face.
    """
    recognizer = loaded.recognizer
    both = [payload["first"], payload["second"]]
    sources = [photos.PhotoSource(each["name"], pathlib.Path(each["path"])) for each in both]
    found = list(pipeline.recognize(recognizer, sources, which="all"))
    for source, seen in zip(sources, found, strict=True):
        if seen.problem is not None:
            raise limits.Refused(f"{source.name}: {seen.problem}")
    pixels = [photos.read_source(source).pixels for source in sources]
    main = [_main(seen.faces, each.shape) for seen, each in zip(found, pixels, strict=True)]
    verdicts = []
    for name, extractor in recognizer.extractors.items():
        pair = (seen.embeddings[name][face] for seen, face in zip(found, main, strict=True))
        verdict = pipeline.judge(extractor, *pair)
        assert verdict.threshold is not None
        distance, threshold = page.apart(verdict.distance, verdict.threshold)
        verdicts.append(
            {
                "name": name,
                "distance": distance,
                "threshold": threshold,
                "share": verdict.distance / verdict.threshold,
                "same": verdict.same_person,
            }
        )
    shown = {}
    for number, (seen, face) in enumerate(zip(found, main, strict=True)):
        picture = pictures.face(pixels[number], seen.faces.boxes[face])
        (folder / f"face_{number}.jpg").write_bytes(picture)
        shown[f"face_{number}"] = outputs.output(f"face_{number}.jpg")
    return {
        "verdicts": verdicts,
        "names": [source.name for source in sources],
        "faces": [int((seen.faces.confidences >= _SURE).sum()) for seen in found],
        "outputs": shown,
    }


def _main(faces: detect.Faces, shape: tuple[int, ...]) -> int:
    """Number of the face that a photo is of."""
    (box,) = detect.main_face(faces, shape).boxes
    return int(np.argmin(np.abs(faces.boxes - box).sum(axis=1)))
