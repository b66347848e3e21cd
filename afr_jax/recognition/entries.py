"""Rows of the reference database, their form as an Arrow table, and whether they are whole."""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from afr_jax.core import files
from afr_jax.recognition import match

_METADATA_KEY = b"afr_jax"
# Texts of a row: columns of the table, fields of `Entries` and of the checksum in this order.
_TEXTS = {
    "identity": "identities",
    "image": "images",
    "digest": "digests",
    "made": "made",
}
# How far the length of a stored unit vector may be from one.
_UNIT_TOLERANCE = 1e-3


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
        made: `[N]` what decided the row beside the extractor: detector and alignment.
    """

    identities: Sequence[str]
    images: Sequence[str]
    digests: Sequence[str]
    faces: Sequence[int]
    boxes: np.ndarray
    vectors: np.ndarray
    made: Sequence[str]

    @property
    def keys(self) -> list[tuple[str, str, int]]:
        """What no two rows of a table share: identity, digest of the photo and face."""
        return list(zip(self.identities, self.digests, self.faces, strict=True))


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
            pa.field("made", pa.string()),
            pa.field("checksum", pa.int64()),
        ],
        metadata={_METADATA_KEY: json.dumps(tag._asdict())},
    )


def read_tag(found: pa.Schema, uri: str) -> ExtractorTag:
    """What made the embeddings of a table with these columns.

    Raises:
        DatabaseError: it is no table of ours.
    """
    try:
        fields = files.parse_json((found.metadata or {})[_METADATA_KEY])
        tag = ExtractorTag(**fields)
        expected = schema(tag)
    except (KeyError, TypeError, ValueError) as error:
        raise DatabaseError(f"the table in {uri} was not made by afr_jax") from error
    if not found.equals(expected):
        names = ", ".join(sorted(set(expected.names) ^ set(found.names))) or "their types"
        raise DatabaseError(
            f"the table in {uri} has other columns than expected ({names}): "
            "enroll into another database"
        )
    return tag


def to_table(entries: Entries, tag: ExtractorTag) -> pa.Table:
    """Entries as rows of a table.

    Raises:
        DatabaseError: vectors that are not finite, of another size or, where the extractor's are,
            not of unit length; an identity or image without a name, or an identity called
            `match.UNKNOWN`.
    """
    count = len(entries.identities)
    vectors = np.ascontiguousarray(entries.vectors, np.float32)
    boxes = np.ascontiguousarray(entries.boxes, np.float32)
    if vectors.shape != (count, tag.embedding_size) or boxes.shape != (count, 4):
        raise DatabaseError(
            f"{count} entries with vectors {vectors.shape} and boxes {boxes.shape}; "
            f"embeddings here have size {tag.embedding_size}"
        )
    if not _is_sound(vectors, tag).all():
        raise DatabaseError("an embedding is not finite, or not of unit length")
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
            pa.array(entries.made, pa.string()),
            pa.array(_checksums(entries._replace(boxes=boxes, vectors=vectors), tag), pa.int64()),
        ],
        schema=schema(tag),
    )


def from_table(rows: pa.Table, tag: ExtractorTag) -> tuple[Entries, np.ndarray]:
    """The faces of rows with all columns, and `[N]` bool: which of them are as they were written.

    A row is not where its checksum differs, or where its vector is none of the extractor's.
    """
    texts = {
        field: [
            value.decode(errors="replace") for value in rows[name].cast(pa.binary()).to_pylist()
        ]
        for name, field in _TEXTS.items()
    }
    entries = Entries(
        faces=rows["face"].to_pylist(),
        boxes=matrix(rows["box"], 4),
        vectors=matrix(rows["vector"], tag.embedding_size),
        **texts,
    )
    is_equal = rows["checksum"].to_numpy() == np.array(_checksums(entries, tag), np.int64)
    return entries, is_equal & _is_sound(entries.vectors, tag)


def matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """A column of lists of `width` float32 as `[N, width]`."""
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    flat = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return flat.reshape(-1, width).astype(np.float32, copy=False)


def _is_sound(vectors: np.ndarray, tag: ExtractorTag) -> np.ndarray:
    """`[N]` bool: whether each vector is finite, and of unit length where the extractor's are."""
    with np.errstate(invalid="ignore"):
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        is_unit = np.abs(lengths - 1) <= _UNIT_TOLERANCE
    return is_unit if tag.metric == "euclidean_l2" else np.isfinite(lengths)


def _checksums(entries: Entries, tag: ExtractorTag) -> list[int]:
    """A number for each row that depends on all of it."""
    texts = zip(*(getattr(entries, field) for field in _TEXTS.values()), entries.faces, strict=True)
    found = []
    for text, box, vector in zip(texts, entries.boxes, entries.vectors, strict=True):
        digest = hashlib.sha256(json.dumps([*text, *tag]).encode())
        digest.update(box.tobytes() + vector.tobytes())
        found.append(int.from_bytes(digest.digest()[:8], "big", signed=True))
    return found


def _lists(matrix: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])
