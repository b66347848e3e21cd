"""Stage 5 of face recognition: the nearest faces of a gallery for each probe, exactly.

All distances are computed on the accelerator: a matrix product and a running top-k over blocks of
the gallery, whose rows may be spread over all devices. Nothing of size probes x gallery is ever
kept. A gallery beyond the accelerator's memory, or the host's, is searched in shards that are there
one after the other; one that is too slow so, through the index of `database`.

Metrics (names as in `registry.METRICS`, meanings as in PyPI deepface): `euclidean` is the L2
distance, `euclidean_l2` that of the vectors scaled to unit length, `cosine` one minus the cosine of
their angle.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import images, parallel
from afr_jax.models.extractors import registry

UNKNOWN = "unknown"

_BLOCK = 16_384
_GROUP = 32
# Scores that may be kept in memory at once, on each device.
_AT_ONCE = 1 << 24
_PROBE_BUCKETS = (1, 16, 64, 256)
_BLOCK_BUCKETS = (256, 2048, _BLOCK)


class Matches(NamedTuple):
    """The k nearest gallery rows of Q probes: distances `[Q, k]` rising, index `[Q, k]`."""

    distances: np.ndarray
    index: np.ndarray


class Gallery(NamedTuple):
    """Enrolled embeddings on the accelerator; from `place`.

    Attributes:
        vectors: `[N, D]` float32 on the host, of unit length unless the metric is `euclidean`.
        rows: the same in blocks over the devices.
        squared: their squared lengths; infinite for rows that fill up a block.
        metric: one of `registry.METRICS`.
        mesh: the devices.
    """

    vectors: np.ndarray
    rows: jax.Array
    squared: jax.Array
    metric: str
    mesh: parallel.Mesh


def place(vectors: np.ndarray, *, metric: str, mesh: parallel.Mesh | None = None) -> Gallery:
    """Puts a gallery on the accelerator, once for many calls of `top_k`.

    Args:
        vectors: `[N, D]` float32, N at least 1.
        metric: one of `registry.METRICS`.
        mesh: devices to spread the rows over; all of this process by default.

    Raises:
        ValueError: an empty gallery, an unknown metric.
    """
    _check_metric(metric)
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(f"a gallery of shape {vectors.shape}; it must be [N, D] with N >= 1")
    if mesh is None:
        mesh = parallel.make_mesh(devices=jax.local_devices())
    if metric != "euclidean":
        vectors = unit_length(vectors)
    return Gallery(vectors, *_blocks(vectors, mesh), metric, mesh)


def top_k(probes: np.ndarray, gallery: Gallery, *, k: int) -> Matches:
    """The nearest rows of a gallery for each probe; ties go to the earlier row.

    Args:
        probes: `[Q, D]` float32.
        gallery: from `place`.
        k: rows for each probe; at most N are returned.

    Returns:
        Float32 distances in the gallery's metric, and int64 indices. The candidates are ranked by
        the expanded square |p|^2 - 2 p g + |g|^2, whose rounding may swap rows that are equally far
        to about 1e-6 of |p|^2; the distances returned are then computed from the differences.

    Raises:
        ValueError: vectors of another size, k below 1.
    """
    probes = np.asarray(probes, np.float32)
    if probes.ndim != 2 or probes.shape[1] != gallery.vectors.shape[1]:
        raise ValueError(f"probes {probes.shape} and gallery {gallery.vectors.shape} do not fit")
    if k < 1:
        raise ValueError(f"k is {k}, must be 1 or more")
    k = min(k, len(gallery.vectors))
    if gallery.metric != "euclidean":
        probes = unit_length(probes)
    if not len(probes):
        return Matches(np.zeros((0, k), np.float32), np.zeros((0, k), np.int64))

    def ranked(probes: np.ndarray) -> Matches:
        placed = parallel.replicate(probes, gallery.mesh)
        nearest = _nearest(placed, gallery.rows, gallery.squared, k=k)
        # Ranked by exact distances; a stable sort keeps the earlier row first where they tie.
        nearest = np.sort(np.asarray(nearest, np.int64), axis=1)
        exact = np.linalg.norm(probes[:, None] - gallery.vectors[nearest], axis=-1)
        order = np.argsort(exact, axis=1, kind="stable")
        return Matches(
            np.take_along_axis(exact, order, axis=1), np.take_along_axis(nearest, order, axis=1)
        )

    # Each device sees all probes, and its own rows of the gallery.
    map_fn = parallel.map_batches(
        ranked,
        gallery.mesh,
        in_axes=(0,),
        batch_size=_PROBE_BUCKETS,
        of="batch",
        backend="host",
    )
    distances, index = map_fn(probes)
    if gallery.metric == "cosine":
        distances = distances**2 / 2
    return Matches(distances, index)


def top_k_of_shards(
    probes: np.ndarray,
    shards: Iterable[np.ndarray],
    *,
    k: int,
    metric: str,
    mesh: parallel.Mesh | None = None,
) -> Matches:
    """As `top_k`, of a gallery that is never in memory as a whole.

    One shard is on the accelerator at a time, its rows spread over all devices; the k best so far
    are merged with those of each. Shards of one size share a compiled program.

    Args:
        probes: `[Q, D]` float32.
        shards: the gallery's rows, `[M, D]` float32 each, in order; M may differ.
        k: rows for each probe; at most as many as the gallery has are returned.
        metric: one of `registry.METRICS`.
        mesh: devices to spread the rows of a shard over; all of this process by default.

    Returns:
        As `top_k`: the distances do not depend on how the gallery is cut, nor does the index where
        they differ. Indices count from the first row of the first shard.

    Raises:
        ValueError: as `place` and `top_k`; an empty gallery.
    """
    found, first = None, 0
    for shard in shards:
        # The gallery of the shard is dropped before the next one is read.
        part = top_k(probes, place(shard, metric=metric, mesh=mesh), k=k)
        part = part._replace(index=part.index + first)
        first += len(shard)
        found = part if found is None else _merged(found, part, k)
    if found is None:
        raise ValueError("a gallery without shards")
    return found


def distance(first: np.ndarray, second: np.ndarray, *, metric: str) -> np.ndarray:
    """Distance `[...]` of embeddings `[..., D]` in a metric, float64.

    Raises:
        ValueError: an unknown metric.
    """
    _check_metric(metric)
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if metric != "euclidean":
        first, second = unit_length(first), unit_length(second)
    apart = np.linalg.norm(first - second, axis=-1)
    return apart**2 / 2 if metric == "cosine" else apart


def pairwise(first: np.ndarray, second: np.ndarray, *, metric: str) -> np.ndarray:
    """All distances `[N, M]`, float64, between embeddings `[N, D]` and `[M, D]`; on the host.

    Raises:
        ValueError: an unknown metric.
    """
    _check_metric(metric)
    rows = [distance(row[None], second, metric=metric) for row in np.asarray(first)]
    return np.stack(rows) if rows else np.zeros((0, len(second)))


def threshold_of(extractor: registry.Extractor, metric: str) -> float:
    """Distance in a metric below which an extractor takes two faces for the same person's.

    Raises:
        ValueError: an unknown metric, or none is known; the message says so.
    """
    _check_metric(metric)
    threshold = getattr(extractor.thresholds, metric)
    if threshold is None:
        raise ValueError(f"no threshold of {extractor.name} in {metric} is known: give one")
    return threshold


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Vectors `[..., D]` scaled to unit length; zero stays zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def _check_metric(metric: str) -> None:
    if metric not in registry.METRICS:
        raise ValueError(f"no metric {metric!r}; there are: {', '.join(registry.METRICS)}")


def _merged(first: Matches, second: Matches, k: int) -> Matches:
    """The k nearest of both; where they tie, those of the first."""
    distances, index = (np.concatenate(pair, axis=1) for pair in zip(first, second, strict=True))
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return Matches(
        np.take_along_axis(distances, order, axis=1), np.take_along_axis(index, order, axis=1)
    )


def _blocks(gallery: np.ndarray, mesh: parallel.Mesh) -> tuple[jax.Array, jax.Array]:
    """The gallery as `[devices, blocks, M, D]`, its rows' squared lengths; rows added are far.

    Device d, block b holds rows d * blocks * M + b * M onwards, so that the flat order is the
    gallery's.
    """
    num_devices = len(mesh.local_devices)
    share = -(-len(gallery) // num_devices)
    size = images.bucket_size(min(share, _BLOCK), _BLOCK_BUCKETS)
    num_blocks = -(-share // size)
    if num_blocks > 1:  # Powers of two, so that galleries of many sizes share a program.
        num_blocks = 1 << (num_blocks - 1).bit_length()
    total = num_devices * num_blocks * size
    shape = (num_devices, num_blocks, size)
    squared = np.full(total, np.inf, np.float32)
    squared[: len(gallery)] = np.sum(gallery**2, axis=1)
    rows = images.pad_to(gallery, (total, gallery.shape[1]))
    parts = (rows.reshape(*shape, -1), squared.reshape(shape))
    rows, squared = jax.tree.leaves(parallel.shard_batch(parts, mesh))
    return rows, squared


@functools.partial(jax.jit, static_argnames="k")
def _nearest(probes: jax.Array, rows: jax.Array, squared: jax.Array, k: int) -> jax.Array:
    """Index `[Q, k]` of the nearest rows; every device scans its blocks, then all are merged."""
    num_devices, num_blocks, size, _ = rows.shape
    if len(probes) * num_blocks * size <= _AT_ONCE:  # All scores at once: faster, and small enough.
        rows = rows.reshape(num_devices, 1, num_blocks * size, -1)
        squared = squared.reshape(rows.shape[:-1])
        num_blocks, size = 1, num_blocks * size

    def one(
        best: tuple[jax.Array, jax.Array], block: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        scores, index = best
        vectors, lengths, number = block
        product = jnp.einsum("qc,dmc->dqm", probes, vectors, precision=jax.lax.Precision.HIGHEST)
        # Minus the squared distance, but for |p|^2.
        found, at = _largest(2 * product - lengths[:, None, :], min(k, size))
        at = at + number * size
        scores = jnp.concatenate([scores, found], axis=-1)
        index = jnp.concatenate([index, at], axis=-1)
        scores, order = jax.lax.top_k(scores, k)
        return (scores, jnp.take_along_axis(index, order, axis=-1)), None

    start = (
        jnp.full((num_devices, len(probes), k), -jnp.inf),
        jnp.zeros((num_devices, len(probes), k), jnp.int32),
    )
    blocks = (jnp.moveaxis(rows, 1, 0), jnp.moveaxis(squared, 1, 0), jnp.arange(num_blocks))
    (scores, index), _ = jax.lax.scan(one, start, blocks, unroll=num_blocks == 1)
    first = (jnp.arange(num_devices) * num_blocks * size)[:, None, None]
    scores = jnp.moveaxis(scores, 0, 1).reshape(len(probes), -1)
    index = jnp.moveaxis(index + first, 0, 1).reshape(len(probes), -1)
    _, order = jax.lax.top_k(scores, k)
    return jnp.take_along_axis(index, order, axis=-1)


def _largest(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` along the last axis, in two stages: a sort of all is slow on CPU.

    The k largest lie in the k groups with the largest maxima.
    """
    if scores.shape[-1] <= k * _GROUP:
        return jax.lax.top_k(scores, k)
    grouped = scores.reshape(*scores.shape[:-1], -1, _GROUP)
    _, groups = jax.lax.top_k(jnp.max(grouped, axis=-1), k)
    groups = jnp.sort(groups, axis=-1)
    members = jnp.take_along_axis(grouped, groups[..., None], axis=-2)
    found, at = jax.lax.top_k(members.reshape(*scores.shape[:-1], -1), k)
    group = jnp.take_along_axis(groups, at // _GROUP, axis=-1)
    return found, group * _GROUP + at % _GROUP
