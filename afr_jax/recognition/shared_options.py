"""Options that several programs share: photos, detector, extractors and their weights, metric."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import skimage

from afr_jax.core import options
from afr_jax.data import photos
from afr_jax.models.extractors import registry
from afr_jax.recognition import detect, pipeline

_NAMES = ", ".join(registry.EXTRACTORS)


@dataclasses.dataclass(frozen=True)
class FaceOptions:
    """How small a face is looked for, and how sure the detector must be of it."""

    min_face_px: float = options.option(20.0, detect.MIN_FACE_HELP, at_least=12)
    min_confidence: float = options.option(
        0.9, "of the detector, for a face to count", at_least=0, at_most=1
    )

    def __post_init__(self) -> None:
        """Checks ranges."""
        options.check(self)


@dataclasses.dataclass(frozen=True)
class ExtractorOptions:
    """One extractor, with its weights."""

    extractor: str = options.option("dlib", f"{_NAMES}, or the folder of a trained one")
    weights: str | None = options.option(None, "file of its weights; default: its usual source")

    def load(self, *, min_face_px: float = 20.0) -> pipeline.Recognizer:
        """Loads the detector and the extractor.

        Args:
            min_face_px: side of the smallest face looked for.

        Raises:
            options.UsageError: an unknown extractor, or weights that are not there or not its own.
        """
        with options.usage(""):
            return pipeline.load_recognizer(
                self.extractor,
                weights={self.extractor: self.weights} if self.weights else None,
                options=detect.DetectorOptions(min_face_px=min_face_px),
            )


@dataclasses.dataclass(frozen=True)
class ExtractorsOptions:
    """Several extractors, with their weights."""

    extractors: tuple[str, ...] = options.option(("dlib",), f"{_NAMES}, or folders of trained ones")
    weights: tuple[str, ...] = options.option(
        (), "weight files: NAME=FILE, or FILE for one extractor"
    )

    def load(self) -> pipeline.Recognizer:
        """Loads the detector and the extractors.

        Raises:
            options.UsageError: an unknown extractor, or weights that are not there or not its own.
        """
        with options.usage(""):
            weights = pipeline.parse_weights(self.weights, self.extractors)
            return pipeline.load_recognizer(*self.extractors, weights=weights)


@dataclasses.dataclass(frozen=True)
class MetricOptions:
    """How distances are taken and judged."""

    metric: str | None = options.option(
        None,
        "how embeddings are compared; default: as the extractor's",
        choices=tuple(registry.METRICS),
    )
    threshold: float | None = options.option(
        None, "distance below which it is the same person; default: the extractor's"
    )

    def __post_init__(self) -> None:
        """Checks choices."""
        options.check(self)


def list_photos(
    paths: Sequence[str], *, flag: str, exclude: Sequence[str | os.PathLike[str]] = ()
) -> photos.PhotoFiles:
    """The photos among and below the paths of a flag; see `photos.list_photos`.

    Args:
        paths: of files and folders.
        flag: its name, for messages.
        exclude: files and folders to leave out.

    Raises:
        options.UsageError: a path does not exist, or there is no photo.
    """
    with options.usage(f"--{flag}"):
        found = photos.list_photos(
            [pathlib.Path(path).expanduser() for path in paths], exclude=exclude
        )
    if not found.inputs:
        raise options.UsageError(f"--{flag}={','.join(paths)} holds no photos")
    return found


def sample_portrait() -> str:
    """Path of a sample photo: NASA's portrait of an astronaut, in the public domain."""
    return str(pathlib.Path(skimage.__file__).parent / "data" / "astronaut.png")
