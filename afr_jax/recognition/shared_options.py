"""Options that several programs share: which detector, which extractors, with which weights."""

import dataclasses

from afr_jax.core import options
from afr_jax.models.extractors import registry
from afr_jax.recognition import detect, pipeline


@dataclasses.dataclass(frozen=True)
class ExtractorOptions:
    """One extractor, the detector before it, and how its distances are judged."""

    extractor: str = options.option(
        "dlib", f"{', '.join(registry.EXTRACTORS)}, or the folder of a trained one"
    )
    weights: str | None = options.option(None, "file of its weights; default: its usual source")
    metric: str | None = options.option(
        None,
        "how embeddings are compared; default: as the extractor's",
        choices=tuple(registry.METRICS),
    )
    threshold: float | None = options.option(
        None, "distance below which it is the same person; default: the extractor's"
    )
    min_face_px: float = options.option(20, "side of the smallest face, pixels", at_least=12)

    def __post_init__(self) -> None:
        """Checks ranges and choices."""
        options.check(self)

    def load(self) -> pipeline.Recognizer:
        """Loads the detector and the extractor.

        Raises:
            options.UsageError: an unknown extractor, or weights that are not there or not its own.
        """
        try:
            return pipeline.load(
                [self.extractor],
                weights={self.extractor: self.weights} if self.weights else None,
                options=detect.DetectorOptions(min_face_px=self.min_face_px),
            )
        except (FileNotFoundError, ValueError) as error:
            raise options.UsageError(str(error)) from error
