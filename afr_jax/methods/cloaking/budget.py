"""Fitting changes of faces to a DSSIM budget, measured on the final 8-bit pixels.

A change is `[h, w, 3]` of a region (y0, x0, y1, x1) of the photo. Rounding to 8 bits and regions
that overlap make the DSSIM of a scaled change uneven, so it is fitted by trying.
"""

from collections.abc import Sequence

import numpy as np

from afr_jax.core import ssim
from afr_jax.recognition import detect

# Rounds of fitting several changes together, and how many of them may enlarge a change.
_ROUNDS, _GROWING_ROUNDS = 12, 4
# Halvings of the interval that the scale of a single change lies in, and its largest scale.
_HALVINGS, _LARGEST_SCALE = 14, 64


def face_dssim(
    original: np.ndarray, cloaked: np.ndarray, region: np.ndarray, box: np.ndarray
) -> float:
    """DSSIM of a face: the larger of those over its region and over the detector's box.

    Args:
        original: `[H, W, 3]` uint8.
        cloaked: `[H, W, 3]` uint8.
        region: `[4]` int.
        box: `[4]` int.
    """
    return max(
        ssim.dssim_uint8(original[y0:y1, x0:x1], cloaked[y0:y1, x0:x1])
        for y0, x0, y1, x1 in (region, box)
    )


def fit_together(
    pixels: np.ndarray,
    regions: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    changes: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    dssim_budget: float,
) -> tuple[np.ndarray, list[float]]:
    """Adds the changes of all faces, each scaled until its DSSIM fits.

    At first a change below the budget may grow by up to half (rounding and enlarging lose some of
    it), within its pixel limits; later, changes only shrink: those of a face above the budget and
    of the faces whose regions overlap it.

    Args:
        pixels: of the photo, `[H, W, 3]` uint8.
        regions: `[4]` int of each face.
        boxes: `[4]` int of each face.
        changes: `[h, w, 3]` of each region in [0, 1] units, and the limits `[h, w, 1]` of its size.
        dssim_budget: of a face.

    Returns:
        The final pixels and the DSSIM of each face.
    """
    scales = np.ones(len(regions))
    best, best_dssims = pixels.copy(), [0.0] * len(regions)
    if not len(regions):
        return best, best_dssims
    areas = np.array(regions, np.float64)
    neighbors = (detect.overlap(areas, areas) > 0) | np.eye(len(regions), dtype=bool)
    for fit_round in range(_ROUNDS):
        # Whole levels take half the memory of floats, which counts for a photo of 12 megapixels.
        final = pixels.astype(np.int16)
        for (y0, x0, y1, x1), (delta, limit), scale in zip(regions, changes, scales, strict=True):
            levels = np.round(np.clip(scale * delta, -limit, limit) * 255.0)
            final[y0:y1, x0:x1] += levels.astype(np.int16)
        final = np.clip(np.round(final), 0, 255).astype(np.uint8)
        dssims = np.array(
            [
                face_dssim(pixels, final, region, box)
                for region, box in zip(regions, boxes, strict=True)
            ]
        )
        if np.all(dssims <= dssim_budget) and sum(dssims) >= sum(best_dssims):
            best, best_dssims = final, dssims.tolist()
        if np.all((dssims >= 0.995 * dssim_budget) & (dssims <= dssim_budget)):
            break
        if fit_round >= _GROWING_ROUNDS and np.all(dssims <= dssim_budget):
            break
        wanted = np.sqrt(0.998 * dssim_budget / np.maximum(dssims, 1e-9))
        if fit_round < _GROWING_ROUNDS:
            scales = np.minimum(scales * np.clip(wanted, 0.5, 1.25), 1.5)
        else:
            least = np.where(neighbors & (dssims > dssim_budget), wanted, 1.0).min(axis=1)
            scales = scales * np.maximum(least, 0.5)
    return best, best_dssims


def fit_alone(
    pixels: np.ndarray,
    original: np.ndarray,
    region: np.ndarray,
    box: np.ndarray,
    change: np.ndarray,
    *,
    dssim_budget: float,
) -> tuple[np.ndarray, float]:
    """Adds the largest multiple of one face's change that meets the budget.

    Args:
        pixels: of the photo as it is, other faces' changes included, `[H, W, 3]` uint8.
        original: of the photo, to measure against.
        region: `[4]` int.
        box: `[4]` int.
        change: `[h, w, 3]` or `[h, w, 1]` of the region, in gray levels.
        dssim_budget: of the face.

    Returns:
        The final pixels and the face's DSSIM.
    """
    y0, x0, y1, x1 = region

    def changed(scale: float) -> tuple[np.ndarray, float]:
        final = pixels.copy()
        piece = np.round(pixels[y0:y1, x0:x1] + scale * change)
        final[y0:y1, x0:x1] = np.clip(piece, 0, 255).astype(np.uint8)
        return final, face_dssim(original, final, region, box)

    # Twice as much at a time until it is too much, then halving.
    low, high = 0.0, 1.0
    while changed(high)[1] <= dssim_budget and high < _LARGEST_SCALE:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if changed(middle)[1] <= dssim_budget else (low, middle)
    return changed(low)
