"""Stage 4 of face recognition: the reference database of enrolled faces, in LanceDB.

A database is a folder, or an address in an object store (`s3://bucket/faces`, `gs://...`; LanceDB
takes the credentials from the environment), that holds one table. A row is a face: its embedding,
whose it is, the photo and the box it was cut from, and which extractor with which weights made the
embedding. All rows of a table come from one extractor; another one is refused.

Every change is one transaction of the table: a reader, or the next run after a kill, sees all of it
or nothing. Boxes are `[y0, x0, y1, x1]` in pixels of the upright photo.
"""

import datetime
import math
import os
import pathlib
import re
import time
from collections.abc import Iterable, Mapping

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import IvfFlat
from lancedb.query import LanceVectorQueryBuilder

from afr_jax.recognition import entries as recognition_entries
from afr_jax.recognition import match
from afr_jax.recognition.entries import DatabaseError, Entries, ExtractorTag, Hits

TABLE = "faces"
# From this many rows on searches go through an index (an exact one takes under 50 ms below it).
INDEX_FROM = 100_000
_INDEX = "vector_idx"
_MAX_PARTITIONS = 4096


class Database:
    """A table of enrolled faces; from `open_database`."""

    def __init__(
        self, connection: lancedb.DBConnection, table: lancedb.table.Table, uri: str
    ) -> None:
        """Reads what made the table's embeddings."""
        self.uri = uri
        self._connection = connection
        self._table = table
        self.tag = recognition_entries.read_tag(table.schema, uri)
        self._entries: tuple[int, Entries] | None = None
        self._gallery: tuple[Entries, match.Gallery] | None = None

    def __repr__(self) -> str:
        """The address, the extractor and the number of faces."""
        return f"Database({self.uri!r}, extractor={self.tag.name!r}, {len(self)} faces)"

    def __len__(self) -> int:
        """Number of faces."""
        return self._table.count_rows()

    def check_tag(self, tag: ExtractorTag) -> None:
        """Raises DatabaseError if another extractor, or other weights, made the embeddings."""
        if tag != self.tag:
            raise DatabaseError(
                f"{self.uri} holds embeddings of {_spoken(self.tag)}, which cannot be mixed with "
                f"those of {_spoken(tag)}. Use the same extractor and weights, or another database."
            )

    def check_not_empty(self) -> None:
        """Raises DatabaseError if nobody is enrolled."""
        if not len(self):
            raise DatabaseError(f"nobody is enrolled in {self.uri}")

    def images(self) -> dict[str, tuple[str, str]]:
        """SHA-256 of the file, and the identity, of every enrolled photo, by the photo's name."""
        rows = self._scan(["image", "digest", "identity"])
        return {row["image"]: (row["digest"], row["identity"]) for row in rows.to_pylist()}

    def identities(self) -> dict[str, int]:
        """Number of faces of every identity, by name, sorted."""
        counts = self._scan(["identity"])["identity"].value_counts().to_pylist()
        return dict(sorted((count["values"], count["counts"]) for count in counts))

    def entries(self) -> Entries:
        """All faces, in the order of their enrollment; kept in memory until the table changes."""
        version = self._table.version
        if self._entries is None or self._entries[0] != version:
            rows = self._scan(["identity", "image", "digest", "face", "box", "vector"])
            entries = Entries(
                rows["identity"].to_pylist(),
                rows["image"].to_pylist(),
                rows["digest"].to_pylist(),
                rows["face"].to_pylist(),
                recognition_entries.matrix(rows["box"], 4),
                recognition_entries.matrix(rows["vector"], self.tag.embedding_size),
            )
            self._entries = version, entries
        return self._entries[1]

    def append(self, entries: Entries) -> None:
        """Adds faces.

        Raises:
            DatabaseError: vectors that are not finite or of another size, an empty identity.
        """
        self._table.add(recognition_entries.to_table(entries, self.tag))

    def replace_images(self, entries: Entries) -> None:
        """Puts faces in the place of everything enrolled from the same photos."""
        names = ", ".join(map(_quoted, sorted(set(entries.images))))
        self._merge(entries, f"image IN ({names})")

    def replace_identity(self, identity: str, entries: Entries) -> None:
        """Puts the faces of one identity in the place of all that are enrolled for it.

        Raises:
            DatabaseError: as `append`; entries of another identity.
        """
        if set(entries.identities) != {identity}:
            raise DatabaseError(f"the entries are not all of {identity!r}")
        self._merge(entries, f"identity = {_quoted(identity)}")

    def delete_images(self, names: Iterable[str]) -> None:
        """Deletes everything enrolled from some photos; those that are not there do not matter."""
        if names := sorted(set(names)):
            self._table.delete(f"image IN ({', '.join(map(_quoted, names))})")

    def delete_identities(self, names: Iterable[str], *, purge: bool = False) -> int:
        """Deletes all faces of some identities.

        Deleted rows are not found any more, but their bytes stay on the disk until LanceDB gets
        round to rewriting their files.

        Args:
            names: of the identities; all must be there.
            purge: rewrite the table without them, and drop all its earlier versions. Nobody else
                may be using the database.

        Returns:
            Number of faces deleted.

        Raises:
            DatabaseError: an identity is not enrolled; nothing was deleted then.
        """
        names = sorted(set(names))
        enrolled = self.identities()
        if absent := [name for name in names if name not in enrolled]:
            raise DatabaseError(f"{self.uri} has no identity {', '.join(map(repr, absent))}")
        if names:
            self._table.delete(f"identity IN ({', '.join(map(_quoted, names))})")
        if purge:
            kept = self._table.search().select(self._table.schema.names).to_batches()
            schema = self._table.schema
            reader = pa.RecordBatchReader.from_batches(
                schema, (batch.select(schema.names).cast(schema) for batch in kept)
            )
            self._table = self._connection.create_table(
                TABLE, reader, schema=schema, mode="overwrite"
            )
            time.sleep(0.01)  # Everything before this version is then old enough.
            millisecond = datetime.timedelta(milliseconds=1)
            self._table.optimize(cleanup_older_than=millisecond, delete_unverified=True)
            self.maintain()
        return sum(enrolled[name] for name in names)

    def maintain(self) -> None:
        """Joins small files, and keeps the index fit for the number of rows; call after enrollment.

        Below `INDEX_FROM` rows there is none. The index is trained again when the table has
        doubled, else new rows are added to it.
        """
        count = len(self)
        self._table.optimize()
        if count < INDEX_FROM:
            return
        stats = self._table.index_stats(_INDEX) if self._has_index() else None
        # A retrained index has sqrt(N) partitions, so this is the growth by two.
        wanted = num_partitions(count)
        if stats is None or wanted > math.sqrt(2) * num_partitions(stats.num_indexed_rows):
            config = IvfFlat(distance_type="l2", num_partitions=wanted)
            self._table.create_index("vector", config=config, replace=True)

    def search(
        self,
        probes: np.ndarray,
        *,
        k: int,
        metric: str | None = None,
        exact: bool | None = None,
        num_probes: int | None = None,
    ) -> Hits:
        """The nearest entries of each probe.

        Without an index all distances are computed on the accelerator (`match.top_k`). With one
        (IVF: the vectors in cells around k-means centers) only the cells nearest to the probe are
        looked through; distances are exact, but a nearer entry in another cell is missed.

        Args:
            probes: `[Q, D]` float32 embeddings.
            k: entries for each, at most the number enrolled.
            metric: one of `registry.METRICS`; by default that of the extractor. Others than the
                extractor's are searched exactly.
            exact: whether to look at all entries; by default where there is no index.
            num_probes: cells of the index to look through; a quarter of them by default.

        Raises:
            DatabaseError: nobody is enrolled, or the probes are of another size.
        """
        metric = metric or self.tag.metric
        probes = np.asarray(probes, np.float32)
        if probes.ndim != 2 or probes.shape[1] != self.tag.embedding_size:
            raise DatabaseError(
                f"probes of shape {probes.shape} for embeddings of size {self.tag.embedding_size}"
            )
        self.check_not_empty()
        k = min(k, len(self))
        if exact is None:
            exact = metric != self.tag.metric or not self._has_index()
        if exact or not len(probes):
            return self._search_exactly(probes, k, metric)
        if num_probes is None:
            num_probes = max(32, num_partitions(len(self)) // 4)
        return self._search_index(probes, k, num_probes)

    def _search_exactly(self, probes: np.ndarray, k: int, metric: str) -> Hits:
        entries = self.entries()
        kept = self._gallery
        if kept is None or kept[0] is not entries or kept[1].metric != metric:
            self._gallery = kept = entries, match.place(entries.vectors, metric=metric)
        found = match.top_k(probes, kept[1], k=k)
        return Hits(
            [[entries.identities[i] for i in row] for row in found.index],
            [[entries.images[i] for i in row] for row in found.index],
            entries.boxes[found.index],
            found.distances,
        )

    def _search_index(self, probes: np.ndarray, k: int, num_probes: int) -> Hits:
        identities, images, boxes, distances = [], [], [], []
        for probe in probes:
            query = self._table.search(probe, vector_column_name="vector")
            assert isinstance(query, LanceVectorQueryBuilder)
            rows = (
                query.distance_type("l2")
                .nprobes(num_probes)
                .limit(k)
                .select(["identity", "image", "box", "_distance"])
                .to_arrow()
            )
            if rows.num_rows < k:  # The cells looked through hold too few.
                found = self._search_exactly(probe[None], k, self.tag.metric)
                identities += found.identities
                images += found.images
                boxes.append(found.boxes[0])
                distances.append(found.distances[0])
                continue
            identities.append(rows["identity"].to_pylist())
            images.append(rows["image"].to_pylist())
            boxes.append(recognition_entries.matrix(rows["box"], 4))
            # LanceDB's "l2" is the squared distance; that of unit vectors is the metric's.
            squared = rows["_distance"].to_numpy()
            distances.append(np.sqrt(np.maximum(squared, 0)).astype(np.float32))
        return Hits(identities, images, np.stack(boxes), np.stack(distances))

    def _has_index(self) -> bool:
        return any(index.name == _INDEX for index in self._table.list_indices())

    def _scan(self, columns: list[str]) -> pa.Table:
        return self._table.search().select(columns).to_arrow()

    def _merge(self, entries: Entries, scope: str) -> None:
        (
            self._table.merge_insert(["image", "face"])
            .when_matched_update_all()
            .when_not_matched_insert_all()
            .when_not_matched_by_source_delete(scope)
            .execute(recognition_entries.to_table(entries, self.tag))
        )


def open_database(
    uri: str | os.PathLike[str],
    *,
    tag: ExtractorTag | None = None,
    create: bool = False,
    storage_options: Mapping[str, str] | None = None,
) -> Database:
    """Opens a reference database, or makes an empty one.

    Args:
        uri: folder, or address in an object store.
        tag: the extractor that will be used with it.
        create: make it if it is not there; needs `tag`.
        storage_options: passed to LanceDB (credentials, region, endpoint).

    Raises:
        DatabaseError: it is not there, cannot be used, or was made with another extractor or
            other weights.
    """
    uri = os.fspath(uri)
    # (file:///place is a folder written as an address; one letter is a drive.)
    is_folder = re.match(r"^[A-Za-z][A-Za-z0-9+.-]+://", uri) is None
    try:
        if is_folder:
            uri = str(pathlib.Path(uri).expanduser().absolute())
            if not create and not pathlib.Path(uri).is_dir():
                raise DatabaseError(f"there is no database {uri}")
        options = dict(storage_options) if storage_options else None
        connection = lancedb.connect(uri, storage_options=options)
        try:
            table = connection.open_table(TABLE)
        except ValueError as error:
            if not create or tag is None:
                raise DatabaseError(f"{uri} holds no reference database ({error})") from error
            table = connection.create_table(
                TABLE, schema=recognition_entries.schema(tag), exist_ok=True
            )
        database = Database(connection, table, uri)
    except (OSError, RuntimeError, ValueError) as error:
        raise DatabaseError(f"{uri} cannot be used as a database: {error}") from error
    if tag is not None:
        database.check_tag(tag)
    return database


def num_partitions(count: int) -> int:
    """Cells of an index over so many rows: their square root, within bounds."""
    return min(max(round(math.sqrt(count)), 16), _MAX_PARTITIONS)


def _spoken(tag: ExtractorTag) -> str:
    return f"{tag.name} (weights {tag.weights[:12]}, {tag.embedding_size} numbers)"


def _quoted(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"
