"""Target identities for cloaks: one for all photos of a run, as Fawkes asks for one per person."""

from collections.abc import Mapping

import numpy as np

Centroids = Mapping[str, Mapping[str, np.ndarray]]


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
        ValueError: the gallery is empty.
    """
    if not gallery:
        raise ValueError("the gallery has no identity with a face")

    def nearest(centroids: Mapping[str, np.ndarray]) -> float:
        total = sum(
            np.linalg.norm(vectors - centroids[name], axis=-1) / thresholds[name]
            for name, vectors in own.items()
        )
        return float(np.min(total))

    return max(sorted(gallery), key=lambda identity: nearest(gallery[identity]))
