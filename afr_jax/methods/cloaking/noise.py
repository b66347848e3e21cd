"""Gaussian noise as a baseline: as much of it on every face as the budget of a cloak allows.

What an optimizer is worth is what it has over this. Nothing here knows an extractor's network, only
which pixels its chip covers.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from afr_jax.methods.cloaking import budget, photo_cloaks
from afr_jax.models.extractors import registry

# Standard deviation before the noise is fitted to its budget, in gray levels.
_GRAY_LEVELS = 8.0


def add_noise(
    photo: photo_cloaks.PhotoFaces,
    extractors: Sequence[registry.Extractor],
    *,
    limits: budget.Budget,
    seed: int = 0,
) -> tuple[np.ndarray, list[photo_cloaks.CloakedFace]]:
    """Adds Gaussian noise to the channels of every pixel of the faces.

    Args:
        photo: with its faces.
        extractors: whose chips the noise covers.
        limits: of a face.
        seed: of the noise, with the photo's name.

    Returns:
        As `photo_cloaks.cloak_photos` for one photo.
    """
    generator = np.random.default_rng([seed, zlib.crc32(photo.name.encode())])

    def draw(region: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        return generator.normal(0.0, _GRAY_LEVELS, (*(region[2:] - region[:2]), 3))

    return photo_cloaks.change_faces(photo, extractors, draw, limits=limits)
