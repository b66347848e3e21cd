"""Embedding of faces: alignment and extractor in one call, from photos and landmarks to vectors."""

import functools
import math
from collections.abc import Iterable

import jax
import numpy as np

from afr_jax.core import parallel
from afr_jax.models.extractors import registry
from afr_jax.models.weights import conversion
from afr_jax.recognition import align

# Bucket sizes: faces that one call embeds on each device.
_BATCH_SIZES = (1, 4)
_ACCELERATOR_BATCH_SIZES = (1, 16, 128)
# Around a chip, canvas pixels.
_MARGIN = 2


def embed_faces(
    extractor: registry.Extractor,
    variables: conversion.Variables,
    faces: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    mesh: parallel.Mesh | None = None,
    backend: parallel.Backend = "jit",
) -> np.ndarray:
    """Aligns and embeds faces of any number of photos, spread over the devices.

    Args:
        extractor: of the registry, or a trained one.
        variables: of its module.
        faces: (photo `[H, W, 3]` uint8, landmarks `[5, 2]` (y, x)) of each face.
        mesh: The devices; None for all of this process.
        backend: As of `parallel.map_batches`.

    Returns:
        `[N, D]` float32, in the order of the faces.

    Raises:
        ValueError: landmarks that span no face.
    """
    mesh = mesh or parallel.make_mesh(devices=jax.local_devices())
    sizes = _BATCH_SIZES if jax.default_backend() == "cpu" else _ACCELERATOR_BATCH_SIZES
    map_fn = parallel.map_batches(
        _embed_batch,
        mesh,
        in_axes=(None, 0, 0),
        batch_size=tuple(size * mesh.devices.size for size in sizes),
        of="batch",
        backend=backend,
        static={"extractor": extractor},
    )
    placed = parallel.replicate(variables, mesh)
    views = [_face_canvas(extractor, pixels, landmarks) for pixels, landmarks in faces]
    if not views:
        return np.zeros((0, extractor.embedding_size), np.float32)
    canvases, transforms = map(np.stack, zip(*views, strict=True))
    return map_fn(placed, canvases, transforms)


def _embed_batch(
    variables: conversion.Variables,
    canvases: jax.Array,
    transforms: jax.Array,
    *,
    extractor: registry.Extractor,
) -> jax.Array:
    """`[B, S, S, 3]` and `[B, 2, 3]` to `[B, D]`."""
    warp = functools.partial(align.warp, size=extractor.input_px)
    return registry.embed(extractor, variables, jax.vmap(warp)(canvases, transforms))


def _canvas_side(extractor: registry.Extractor) -> int:
    """Side of a canvas that holds every chip, turned in any way, so that all share a program."""
    diagonal = extractor.input_px * np.hypot(1, extractor.stretch)
    return math.ceil(align.MOST_STEP * diagonal) + 2 * _MARGIN + 2


def _face_canvas(
    extractor: registry.Extractor, pixels: np.ndarray, landmarks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The piece of the photo under the chip, averaged to the chip's scale, and its transform."""
    transform = align.chip_transform(extractor, landmarks)
    bounds = align.chip_bounds(transform, extractor.input_px)
    factor = align.pool_factor(align.transform_scale(transform))
    bounds = bounds + factor * np.array([-_MARGIN, -_MARGIN, _MARGIN, _MARGIN])
    sides = (_canvas_side(extractor),)
    canvas = align.cut_canvas(pixels, bounds, factor=factor, bucket_sizes=sides)
    transform = align.canvas_transform(transform, canvas)
    return canvas.image, transform.astype(np.float32)
