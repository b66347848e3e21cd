"""Cloaks by PyPI `fawkes`: its optimizer on dlib's chips, with dlib's net.

The package's own extractors cannot be downloaded any more. The change of a chip is brought back to
the photo by the inverse warp, and fitted to the budget there, as ours is.
"""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.evaluation import reference
from afr_jax.methods.cloaking import budget as budgets
from afr_jax.methods.cloaking import photo_cloaks
from afr_jax.models.extractors import registry
from afr_jax.recognition import align, chips

DRIVER = "fawkes_driver.py"
# Regions are warped at sides that are multiples of this, to share compiled programs.
_SIDE_STEP = 64
# The learning rate of the package's low mode, as in the benchmark.
_BATCH, _LEARNING_RATE = 4, 25.0


def cloak(
    package: reference.ReferenceProcess,
    folder: pathlib.Path,
    faces: Sequence[photo_cloaks.PhotoFaces],
    extractor: registry.Extractor,
    limits: budgets.Budget,
    *,
    num_steps: int,
    seed: int = 0,
) -> list[tuple[np.ndarray, list[photo_cloaks.CloakedFace]]]:
    """Cloaks the faces of some photos.

    Args:
        package: the driver `DRIVER`, running.
        folder: where chips are put for the package.
        faces: photos with their faces.
        extractor: dlib's.
        limits: of the photo's faces; the package knows DSSIM alone, that of its chips.
        num_steps: of the package's optimizer.
        seed: of its start.

    Returns:
        As `photo_cloaks.cloak_photos`.
    """
    cut = [
        chips.extractor_chip(extractor, photo.pixels, landmarks)
        for photo in faces
        for landmarks in photo.faces.landmarks
    ]
    # The package's compiled net has one batch size.
    cut = np.stack(cut + cut[-1:] * (-len(cut) % _BATCH))
    source, output = folder / "chips.npy", folder / "cloaked.npy"
    np.save(source, cut)
    package.call(
        "cloak",
        chips=str(source),
        output=str(output),
        dssim=limits.dssim,
        steps=num_steps,
        batch=_BATCH,
        learning_rate=_LEARNING_RATE,
        graph_mode=True,
        seed=seed,
    )
    changes = iter(np.load(output).astype(np.float32) - cut)

    def change(region: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        return _unwarped(next(changes), extractor, region, landmarks)

    return [
        photo_cloaks.change_faces(photo, (extractor,), change, limits=limits) for photo in faces
    ]


def _unwarped(
    change: np.ndarray, extractor: registry.Extractor, region: np.ndarray, landmarks: np.ndarray
) -> np.ndarray:
    """A chip's change `[S, S, 3]` on the pixels `[h, w, 3]` of a region, zero outside the chip."""
    transform = align.chip_transform(extractor, landmarks)
    inverse = np.linalg.inv(transform[:, :2])
    shift = inverse @ (region[:2] - transform[:, 2])
    back = np.concatenate([inverse, shift[:, None]], axis=1)
    height, width = region[2:] - region[:2]
    pool = align.pool_factor(align.transform_scale(back))
    side = -(-int(max(height, width)) // _SIDE_STEP) * _SIDE_STEP
    whole = _warp(jnp.asarray(change), jnp.asarray(back), size=side, pool=pool)
    return np.asarray(whole)[:height, :width]


_warp = jax.jit(align.warp, static_argnames=("size", "pool"))
