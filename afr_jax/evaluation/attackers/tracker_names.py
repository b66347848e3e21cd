"""Names of trackers: an extractor, and how the tracker aligns and embeds faces.

`sface` aligns by MTCNN's landmarks, as everything here does by default. `sface@yunet` aligns by
those of the second detector, `sface@mirror` takes the mean of the embeddings of a chip and its
mirror image, `sface@yunet@mirror` does both. A cloak that is tuned to one alignment shows there.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from afr_jax.recognition import pipeline

ALIGNERS = ("mtcnn", "yunet")


class TrackerName(NamedTuple):
    """What a tracker's name says.

    Attributes:
        extractor: name in the registry, or the folder of a trained one.
        aligner: whose landmarks chips are cut by, one of `ALIGNERS`.
        mirrored: whether mirror images count (`Extractor.mirrored`).
    """

    extractor: str
    aligner: str = "mtcnn"
    mirrored: bool = False


def parse(text: str) -> TrackerName:
    """Reads a tracker's name: that of an extractor, and behind it `@yunet`, `@mirror` or both."""
    plain = text.removesuffix("@mirror")
    extractor = plain.removesuffix("@yunet")
    aligner = "mtcnn" if extractor == plain else "yunet"
    return TrackerName(extractor, aligner, mirrored=plain != text)


def add_trackers(recognizer: pipeline.Recognizer, names: Sequence[str]) -> pipeline.Recognizer:
    """A recognizer whose extractors are, by their full names, those of some trackers.

    Args:
        recognizer: has the extractor of each tracker by its plain name.
        names: of the trackers.
    """
    parsed = {name: parse(name) for name in names}
    extractors = {
        name: dataclasses.replace(recognizer.extractors[each.extractor], mirrored=each.mirrored)
        for name, each in parsed.items()
    }
    variables = {name: recognizer.variables[each.extractor] for name, each in parsed.items()}
    return recognizer._replace(extractors=extractors, variables=variables)
