"""Noise without a network: uniform noise, linearly separable patches (LSP), class filters (CUDA).

What an image or a class gets depends on the seed and its name alone, not on what else is in the
data set or in which order. Results are signed gray levels. NumPy on the host.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

_CHANNELS = 3
# Yu et al. 2022, "Availability Attacks Create Shortcuts" (KDD), and its code: class_sep of
# scikit-learn's make_classification, and an L2 norm of sqrt(d) * 6 / 255 beside other methods'
# L-infinity budget of 8 / 255.
_CLASS_SEPARATION = 10.0
_LSP_RMS_PER_EPSILON = 6 / 8
# Sadasivan et al. 2023, "CUDA: Convolution-based Unlearnable Datasets" (CVPR), and its code:
# filters of side 3 for images of 32 px, weights uniform in [0, 0.3], one weight set to 1.
_CUDA_BLUR = 0.3
_CUDA_SIDE = 3


def uniform(
    seed: int, names: Sequence[str], shape: tuple[int, int, int], *, epsilon_levels: float
) -> np.ndarray:
    """Uniform noise in [-epsilon, epsilon], one for each name.

    Args:
        seed: of all draws.
        names: sample ids or class names.
        shape: (H, W, 3).
        epsilon_levels: gray levels.

    Returns:
        `[len(names), H, W, 3]` int16.
    """
    limit = int(epsilon_levels)
    return np.stack(
        [
            _generator(seed, name).integers(-limit, limit + 1, shape).astype(np.int16)
            for name in names
        ]
    )


def separable_patches(
    seed: int,
    names: Sequence[str],
    class_names: Sequence[str],
    shape: tuple[int, int, int],
    *,
    epsilon_levels: float,
    patch_px: int | None = None,
) -> np.ndarray:
    """Linearly separable patches: each class is a cluster of coarse color patterns.

    Yu et al. 2022, section 4.2: a class has a corner of a hypercube as its center and a random
    linear map for its spread; a draw is reshaped to a grid of patches and scaled to an L2 norm. The
    norm is sqrt(d) * 6 / 8 epsilon, so single values exceed epsilon: the budget is one of L2.

    Args:
        seed: of all draws.
        names: sample ids, or class names for the centers of the clusters alone.
        class_names: class of each name; equal to `names` for class-wise noise.
        shape: (H, W, 3).
        epsilon_levels: gray levels.
        patch_px: side of a patch; default 8 for images up to 64 px, else 32 (the authors').

    Returns:
        `[len(names), H, W, 3]` int16.
    """
    side = patch_px or (8 if max(shape[:2]) <= 64 else 32)
    grid = -(-shape[0] // side), -(-shape[1] // side)
    size = grid[0] * grid[1] * _CHANNELS
    clusters = {}
    for name in sorted(set(class_names)):
        generator = _generator(seed, f"class {name}")
        center = _CLASS_SEPARATION * generator.choice([-1.0, 1.0], size)
        clusters[name] = center, generator.uniform(-1, 1, (size, size))
    norm = np.sqrt(np.prod(shape)) * _LSP_RMS_PER_EPSILON * epsilon_levels
    noise = np.empty((len(names), *shape), np.int16)
    for row, (name, class_name) in enumerate(zip(names, class_names, strict=True)):
        center, spread = clusters[class_name]
        draw = center
        if name != class_name:
            draw = center + _generator(seed, name).standard_normal(size) @ spread
        patches = draw.reshape(*grid, _CHANNELS).repeat(side, axis=0).repeat(side, axis=1)
        patches = patches[: shape[0], : shape[1]]
        noise[row] = np.rint(patches * (norm / np.linalg.norm(patches)))
    return noise


def class_filters(seed: int, classes: Sequence[str]) -> np.ndarray:
    """CUDA's filter of each class, `[K, 3, 3]` float64, the same for all channels."""
    filters = []
    for name in classes:
        generator = _generator(seed, f"class {name}")
        weights = generator.uniform(0, _CUDA_BLUR, (_CUDA_SIDE, _CUDA_SIDE))
        weights[tuple(generator.integers(0, _CUDA_SIDE, 2))] = 1.0
        filters.append(weights)
    return np.stack(filters)


def filtered(images: np.ndarray, labels: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """Images through the filter of their class, each divided by its maximum (CUDA).

    The border is padded with zeros. There is no budget: the change is as large as the filter makes
    it. A black image stays black.

    Args:
        images: `[N, H, W, 3]` uint8.
        labels: `[N]` int, rows of `filters`.
        filters: `[K, S, S]`, S odd; applied as a correlation, as networks do.

    Returns:
        `[N, H, W, 3]` uint8.
    """
    side = filters.shape[1]
    pad = side // 2
    result = np.empty_like(images)
    height, width = images.shape[1:3]
    for part in np.array_split(np.arange(len(images)), max(1, len(images) // 1024)):
        padded = np.pad(images[part].astype(np.float32), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        total = np.zeros((len(part), height, width, _CHANNELS), np.float32)
        for i in range(side):
            for j in range(side):
                weight = filters[labels[part], i, j].astype(np.float32).reshape(-1, 1, 1, 1)
                total += weight * padded[:, i : i + height, j : j + width]
        largest = total.max(axis=(1, 2, 3), keepdims=True)
        result[part] = np.rint(total * (255.0 / np.maximum(largest, 1e-6))).astype(np.uint8)
    return result


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
