"""Whether two photos show one person, by each extractor."""

import pathlib
from collections.abc import Mapping

from afr_jax.app import limits
from afr_jax.app.tasks import models, outputs, pictures
from afr_jax.core import files
from afr_jax.data import photos
from afr_jax.evaluation.report import page
from afr_jax.recognition import detect, pipeline


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
    found = list(pipeline.recognize(recognizer, sources))
    for source, seen in zip(sources, found, strict=True):
        if seen.problem is not None:
            raise limits.Refused(f"{source.name}: {seen.problem}")
    verdicts = []
    for name, extractor in recognizer.extractors.items():
        verdict = pipeline.judge(extractor, *(seen.embeddings[name][0] for seen in found))
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
    counts = []
    for number, (source, seen) in enumerate(zip(sources, found, strict=True)):
        pixels = photos.read_source(source).pixels
        (folder / f"face_{number}.jpg").write_bytes(pictures.face(pixels, seen.faces.boxes[0]))
        shown[f"face_{number}"] = outputs.output(f"face_{number}.jpg")
        faces = detect.detect_faces(recognizer.detector, pixels, options=recognizer.options)
        counts.append(int((faces.confidences >= 0.9).sum()))
    return {
        "verdicts": verdicts,
        "names": [source.name for source in sources],
        "faces": counts,
        "outputs": shown,
    }
