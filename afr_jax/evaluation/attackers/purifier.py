"""A victim's learned purifier: the best linear denoiser that clean public images teach.

Principal components of the public images, each shrunk by its variance over that of variance and
noise (Wiener's filter): what clean images hardly vary in is taken for noise. It knows neither
method nor labels, and stands for learned purifiers in kind: a bottleneck that clean images pass and
noise does not is the idea of D-VAE, too (Yu et al. 2024, "Purify Unlearnable Examples via
Rate-Constrained Variational Autoencoders", ICML), which is nonlinear and far larger. NumPy and
scikit-learn on the host.
"""

from typing import NamedTuple

import numpy as np
from sklearn import decomposition

_NUM_COMPONENTS = 512


class Purifier(NamedTuple):
    """A fitted purifier.

    Attributes:
        mean: `[P]`, of the clean images, P values in [0, 1] units.
        components: `[K, P]`, orthonormal rows.
        gains: `[K]` in [0, 1], what is kept of each component; nothing is of others.
    """

    mean: np.ndarray
    components: np.ndarray
    gains: np.ndarray


def fit(images: np.ndarray, *, limit: float = 8 / 255, seed: int = 0) -> Purifier:
    """Fits a purifier.

    Args:
        images: `[N, H, W, 3]` uint8, clean, at least two.
        limit: Standard deviation of the presumed noise: that of noise at the ends of this ball.
        seed: Of the start of the decomposition.

    Raises:
        ValueError: There are fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"{len(images)} images: a purifier needs two or more")
    pixels = _pixels(images)
    count = min(_NUM_COMPONENTS, len(images) - 1, pixels.shape[1])
    found = decomposition.PCA(count, random_state=seed).fit(pixels)
    gains = found.explained_variance_ / (found.explained_variance_ + limit**2)
    return Purifier(found.mean_, found.components_, gains)


def purify(purifier: Purifier, images: np.ndarray) -> np.ndarray:
    """Images `[N, H, W, 3]` uint8 without what is taken for noise; the same shape and type."""
    parts = (_pixels(images) - purifier.mean) @ purifier.components.T * purifier.gains
    clean = parts @ purifier.components + purifier.mean
    return np.rint(np.clip(clean, 0, 1) * 255).astype(np.uint8).reshape(images.shape)


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255
