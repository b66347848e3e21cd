"""Rows of the reference database, and their form as an Arrow table."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from afr_jax.recognition import match

_METADATA_KEY = b"afr_jax"


class DatabaseError(Exception):
    """A database that cannot be opened, or that does not take what it is given."""


class ExtractorTag(NamedTuple):
    """What made the embeddings of a table.

    Attributes:
        name: of the extractor.
        weights: fingerprint of its variables (`registry.fingerprint`).
        embedding_size: D.
        metric: in which its embeddings are compared, one of `registry.METRICS`.
    """

    name: str
    weights: str
    embedding_size: int
    metric: str


class Entries(NamedTuple):
    """N enrolled faces.

    Attributes:
        identities: `[N]` whose faces they are; any text that is not empty.
        images: `[N]` name of the photo each was found in.
        digests: `[N]` SHA-256 of the photo's file, hexadecimal.
        faces: `[N]` number of the face in its photo, from 0.
        boxes: `[N, 4]` float32.
        vectors: `[N, D]` float32 embeddings.
    """

    identities: Sequence[str]
    images: Sequence[str]
    digests: Sequence[str]
    faces: Sequence[int]
    boxes: np.ndarray
    vectors: np.ndarray


class Hits(NamedTuple):
    """The k nearest entries of Q probes, nearest first.

    Attributes:
        identities: `[Q][k]`.
        images: `[Q][k]`.
        boxes: `[Q, k, 4]` float32.
        distances: `[Q, k]` float32, in the metric that was asked for.
    """

    identities: list[list[str]]
    images: list[list[str]]
    boxes: np.ndarray
    distances: np.ndarray


def schema(tag: ExtractorTag) -> pa.Schema:
    """The columns of a table for an extractor, with the tag as metadata."""
    return pa.schema(
        [
            pa.field("vector", pa.list_(pa.float32(), tag.embedding_size)),
            pa.field("identity", pa.string()),
            pa.field("image", pa.string()),
            pa.field("digest", pa.string()),
            pa.field("face", pa.int32()),
            pa.field("box", pa.list_(pa.float32(), 4)),
            pa.field("extractor", pa.string()),
            pa.field("weights", pa.string()),
        ],
        metadata={_METADATA_KEY: json.dumps(tag._asdict())},
    )


def read_tag(found: pa.Schema, uri: str) -> ExtractorTag:
    """What made the embeddings of a table with these columns.

    Raises:
        DatabaseError: it is no table of ours.
    """
    try:
        fields = json.loads((found.metadata or {})[_METADATA_KEY])
        tag = ExtractorTag(**fields)
        expected = schema(tag)
    except (KeyError, TypeError, ValueError) as error:
        raise DatabaseError(f"the table in {uri} was not made by afr_jax") from error
    if not found.equals(expected):
        names = ", ".join(sorted(set(expected.names) ^ set(found.names))) or "their types"
        raise DatabaseError(f"the table in {uri} has other columns than expected: {names}")
    return tag


def to_table(entries: Entries, tag: ExtractorTag) -> pa.Table:
    """Entries as rows of a table.

    Raises:
        DatabaseError: vectors that are not finite or of another size, an identity or image without
            a name, or an identity called `match.UNKNOWN`.
    """
    count = len(entries.identities)
    vectors = np.ascontiguousarray(entries.vectors, np.float32)
    boxes = np.ascontiguousarray(entries.boxes, np.float32)
    if vectors.shape != (count, tag.embedding_size) or boxes.shape != (count, 4):
        raise DatabaseError(
            f"{count} entries with vectors {vectors.shape} and boxes {boxes.shape}; "
            f"embeddings here have size {tag.embedding_size}"
        )
    if not np.isfinite(vectors).all():
        raise DatabaseError("an embedding is not finite")
    if not all(entries.identities) or not all(entries.images):
        raise DatabaseError("an identity or image without a name")
    if match.UNKNOWN in entries.identities:
        raise DatabaseError(f"nobody may be called {match.UNKNOWN!r}: it says that none matched")
    return pa.table(
        [
            _lists(vectors),
            pa.array(entries.identities, pa.string()),
            pa.array(entries.images, pa.string()),
            pa.array(entries.digests, pa.string()),
            pa.array(entries.faces, pa.int32()),
            _lists(boxes),
            pa.array([tag.name] * count, pa.string()),
            pa.array([tag.weights] * count, pa.string()),
        ],
        schema=schema(tag),
    )


def matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """A column of lists of `width` float32 as `[N, width]`."""
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    flat = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return flat.reshape(-1, width).astype(np.float32, copy=False)


def _lists(matrix: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])
