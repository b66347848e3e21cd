"""Stage 2 to 4 of face recognition in one call: from a photo and its landmarks to embeddings."""

import functools
from collections.abc import Iterable

import jax
import numpy as np

from afr_jax.core import images, parallel
from afr_jax.models.extractors import registry
from afr_jax.models.weights import conversion
from afr_jax.recognition import align

# Faces that one call embeds on each device; the rest of the last batch repeats a face.
_BATCH_LADDER = (1, 4, 16)
_ACCELERATOR_LADDER = (1, 16, 128)
_CANVAS_LADDER = (160, 192, 256, 320, 448)


def embed_faces(
    extractor: registry.Extractor,
    variables: conversion.Variables,
    faces: Iterable[tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
    """Aligns and embeds faces of any number of photos, spread over the devices of this process.

    Args:
        extractor: of the registry, or a trained one.
        variables: of its module.
        faces: (photo `[H, W, 3]` uint8, landmarks `[5, 2]` (y, x)) of each face.

    Returns:
        `[N, D]` float32, in the order of the faces.

    Raises:
        ValueError: landmarks that span no face.
    """
    mesh = parallel.make_mesh(devices=jax.local_devices())
    num_devices = len(mesh.local_devices)
    ladder = _BATCH_LADDER if jax.default_backend() == "cpu" else _ACCELERATOR_LADDER
    variables = parallel.replicate(variables, mesh)
    buckets: dict[int, list] = {}
    count = 0
    for count, (pixels, landmarks) in enumerate(faces, start=1):
        canvas, transform = _face_canvas(extractor, pixels, landmarks)
        bucket = buckets.setdefault(canvas.shape[0], [])
        bucket.append((count - 1, canvas, transform))
    embeddings = np.zeros((count, extractor.embedding_size), np.float32)
    for bucket in buckets.values():
        for start in range(0, len(bucket), ladder[-1] * num_devices):
            some = bucket[start : start + ladder[-1] * num_devices]
            index, canvases, transforms = zip(*some, strict=True)
            share = -(-len(index) // num_devices)
            size = num_devices * images.bucket_size(share, ladder)
            filled = [*range(len(index))] + [0] * (size - len(index))
            batch = np.stack(canvases)[filled], np.stack(transforms)[filled]
            batch = parallel.shard_batch(batch, mesh)
            vectors = np.asarray(_embed_batch(variables, *batch, extractor))
            embeddings[list(index)] = vectors[: len(index)]
    return embeddings


@functools.partial(jax.jit, static_argnames="extractor")
def _embed_batch(variables, canvases, transforms, extractor):
    """`[B, S, S, 3]` and `[B, 2, 3]` to `[B, D]`."""
    warp = functools.partial(align.warp, size=extractor.input_px)
    return registry.embed(extractor, variables, jax.vmap(warp)(canvases, transforms))


def _face_canvas(extractor, pixels, landmarks):
    """The piece of the photo under the chip, averaged to the chip's scale, and its transform."""
    transform = align.chip_transform(extractor, landmarks)
    bounds = align.chip_bounds(transform, extractor.input_px)
    factor = align.pool_factor(align.transform_scale(transform))
    margin = 2 * factor
    bounds = bounds + np.array([-margin, -margin, margin, margin])
    canvas = align.cut_canvas(pixels, bounds, factor=factor, ladder=_CANVAS_LADDER)
    transform = align.canvas_transform(transform, canvas)
    return canvas.image, transform.astype(np.float32)
