"""Clusters of images without labels: K-means in the principal components of the pixels.

NumPy and scikit-learn on the host. Clusters depend on the order of the images by rounding and by
the draw of the first centers: callers pass images in the order of their ids.
"""

import numpy as np
from sklearn import cluster, decomposition

_NUM_COMPONENTS = 32


def of_images(images: np.ndarray, num_clusters: int, *, seed: int = 0) -> np.ndarray:
    """The cluster of each image.

    Args:
        images: `[N, H, W, 3]` uint8, N at least `num_clusters`.
        num_clusters: K.
        seed: of the first centers.

    Returns:
        `[N]` int32, each of 0 to K - 1 at least once unless images are equal.
    """
    pixels = images.reshape(len(images), -1).astype(np.float64) / 255
    size = min(_NUM_COMPONENTS, *pixels.shape)
    features = decomposition.PCA(size, random_state=seed).fit_transform(pixels)
    found = cluster.KMeans(num_clusters, n_init=4, random_state=seed).fit_predict(features)
    return found.astype(np.int32)
