"""What every row of the benchmark is given, and what it gives back."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from afr_jax.benchmark import photos, timing
from afr_jax.core import files, options
from afr_jax.data import photo_files
from afr_jax.evaluation import reference
from afr_jax.models import mtcnn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Setting(NamedTuple):
    """What a row is given beside its own options.

    Attributes:
        reference: opens the drivers of the reference implementations.
        folder: for what the two sides exchange; it is empty and removed afterwards.
        images: photos of the user, for each file or folder that was named; empty takes what the row
            makes itself.
        repeats: timed runs of each side.
        seed: of all randomness.
        max_px: photos are shrunk until their longer side has so many pixels; None leaves them.
    """

    reference: reference.ReferenceOptions
    folder: pathlib.Path
    images: Sequence[Sequence[photo_files.PhotoInput]] = ()
    repeats: int = 5
    seed: int = 0
    max_px: int | None = None

    @property
    def paths(self) -> list[pathlib.Path]:
        """The photos of all `images` in one list, without files that are none by their names."""
        return [item.path for found in self.images for item in found if item.problem is None]

    def detector(self) -> mtcnn.Variables:
        """The variables of our MTCNN.

        Raises:
            options.UsageError: its weights are not installed.
        """
        with options.usage("the detector"):
            return mtcnn.load_variables()

    def shrunk(self, pixels: np.ndarray) -> np.ndarray:
        """A photo `[H, W, 3]` uint8 within `max_px`."""
        if self.max_px is None or max(pixels.shape[:2]) <= self.max_px:
            return pixels
        return photos.resized(pixels, self.max_px)


class Measured(NamedTuple):
    """What a row gives back.

    Attributes:
        rows: of the table.
        versions: of the reference implementation; empty where it was not asked.
        details: what stands in the result beside the table, under the row's name.
        figures: plots, written as PNG files under these names.
        complete: False if an input could not be handled, or the two sides do not agree; the details
            name it.
    """

    rows: Sequence[timing.Row]
    versions: Mapping[str, str] = {}
    details: Mapping[str, files.Json] = {}
    figures: Mapping[str, "Figure"] = {}
    complete: bool = True
