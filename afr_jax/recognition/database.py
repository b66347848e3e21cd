"""Stage 4 of face recognition: the reference database of enrolled faces, in LanceDB.

A database is a folder, or an address in an object store (`s3://bucket/faces`, `gs://...`; LanceDB
takes the credentials from the environment), that holds one table. A row is a face: its embedding,
whose it is, the photo and the box it was cut from, and which extractor with which weights made the
embedding. All rows of a table come from one extractor; another one is refused.

Every change is one transaction of the table: a reader, or the next run after a kill, sees all of it
or nothing. A folder is changed by one process at a time; others are refused. No two rows are the
same face of the same photo of a person. Each row has a checksum; what is not as it was written is
refused on reading, and `repair` drops it. Boxes are `[y0, x0, y1, x1]` in pixels of the upright
photo.
"""

import contextlib
import datetime
import math
import os
import pathlib
import re
import typing
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa

from afr_jax.core import files
from afr_jax.recognition import entries as recognition_entries
from afr_jax.recognition import match
from afr_jax.recognition.entries import DatabaseError, Entries, ExtractorTag, Hits

# Imported where it is used: it takes as long as JAX, and few programs have a database.
if typing.TYPE_CHECKING:
    import lancedb
    import lancedb.query

TABLE = "faces"
# From this many rows on searches go through an index (an exact one takes under 50 ms below it).
INDEX_FROM = 100_000
_INDEX = "vector_idx"
# Up to so many rows an exact search keeps the table in memory, on the accelerator, too; of a larger
# one it reads so many at a time (134 MB in vectors of 128 numbers).
_ROWS_IN_MEMORY, _ROWS_OF_SHARD = 1 << 20, 1 << 18
# Each addition makes a file, and each file costs time in every query: so many, and they are joined.
_MAX_ADDED_FILES = 20
# Rows that one condition names, and rows whose bytes are looked for after a purge.
_ROWS_AT_ONCE, _PURGE_SAMPLE = 1000, 32
# Shorter texts are found by chance.
_TELLING = 6
# The one file of a table that keeps its name.
_HINT = "latest_version_hint.json"
_MAX_PARTITIONS = 4096


class Database:
    """A table of enrolled faces; from `open_database`."""

    def __init__(
        self, connection: "lancedb.DBConnection", table: "lancedb.table.Table", uri: str
    ) -> None:
        """Reads what made the table's embeddings."""
        self.uri = uri
        self._folder = _folder_of(uri)
        self._connection = connection
        self._table = table
        self.tag = recognition_entries.read_tag(table.schema, uri)
        self._num_added = 0
        self._entries: tuple[int, Entries] | None = None
        self._gallery: tuple[Entries, match.Gallery] | None = None

    def __repr__(self) -> str:
        """The address, the extractor and the number of faces."""
        return f"Database({self.uri!r}, extractor={self.tag.name!r}, {len(self)} faces)"

    def __len__(self) -> int:
        """Number of faces."""
        with _naming_damage(self.uri):
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

    @contextlib.contextmanager
    def hold(self) -> Generator[None]:
        """Keeps other processes from changing the database in the body; it may be nested.

        What they changed before is seen. Changes do it themselves: it is for several that belong
        together. A database in an object store has no lock.

        Raises:
            DatabaseError: another process changes it now.
        """
        with _held(self._folder), files.naming(self.uri):
            self._table.checkout_latest()
            yield

    def images(self) -> dict[str, tuple[str, str, str]]:
        """SHA-256 of the file, identity and `made` of every enrolled photo, by the photo's name."""
        rows = self._scan(["image", "digest", "identity", "made"])
        return {
            row["image"]: (row["digest"], row["identity"], row["made"]) for row in rows.to_pylist()
        }

    def identities(self) -> dict[str, int]:
        """Number of faces of every identity, by name, sorted."""
        counts = self._scan(["identity"])["identity"].value_counts().to_pylist()
        return dict(sorted((count["values"], count["counts"]) for count in counts))

    def entries(self) -> Entries:
        """All faces, in the order of their enrollment; kept in memory until the table changes.

        Raises:
            DatabaseError: rows are not as they were written.
        """
        version = self._table.version
        if self._entries is None or self._entries[0] != version:
            self._entries = version, self._whole(self._scan(self._table.schema.names))
        return self._entries[1]

    def append(self, entries: Entries) -> None:
        """Adds faces; those that are there already, of the same photo and person, are replaced.

        Raises:
            DatabaseError: vectors that are none of the extractor's, an empty identity.
        """
        rows = recognition_entries.to_table(entries, self.tag)
        with self.hold():
            digests = ", ".join(map(_quoted, sorted(set(entries.digests))))
            query = self._table.search().where(f"digest IN ({digests})")
            known = query.select(["identity", "digest", "face"]).to_arrow().to_pylist()
            known = {(row["identity"], row["digest"], row["face"]) for row in known}
            if known.isdisjoint(entries.keys):
                self._table.add(_without_repeats(rows))
                self._num_added += 1
                if self._num_added % _MAX_ADDED_FILES == 0:
                    self._table.optimize()
            else:
                self._merge(rows, None)

    def repair(self) -> tuple[int, int]:
        """Drops rows that are not as they were written, and such as stand for the same face.

        Returns:
            The number of each kind.
        """
        with self.hold():
            damaged, repeated, known = [], [], set()
            for batch in self._batches(self._table.schema.names):
                rows = pa.Table.from_batches([batch])
                entries, is_whole = recognition_entries.from_table(rows, self.tag)
                numbers = rows["_rowid"].to_pylist()
                for key, whole, row in zip(entries.keys, is_whole, numbers, strict=True):
                    if not whole:
                        damaged.append(row)
                    elif key in known:
                        repeated.append(row)
                    else:
                        known.add(key)
            useless = damaged + repeated
            for start in range(0, len(useless), _ROWS_AT_ONCE):
                part = ", ".join(map(str, useless[start : start + _ROWS_AT_ONCE]))
                self._table.delete(f"_rowid IN ({part})")
        return len(damaged), len(repeated)

    def replace_images(self, entries: Entries) -> None:
        """Puts faces in the place of everything enrolled from the same photos."""
        names = ", ".join(map(_quoted, sorted(set(entries.images))))
        rows = recognition_entries.to_table(entries, self.tag)
        with self.hold():
            self._merge(rows, f"image IN ({names})")

    def replace_identity(self, identity: str, entries: Entries) -> None:
        """Puts the faces of one identity in the place of all that are enrolled for it.

        Raises:
            DatabaseError: as `append`; entries of another identity.
        """
        if set(entries.identities) != {identity}:
            raise DatabaseError(f"the entries are not all of {identity!r}")
        rows = recognition_entries.to_table(entries, self.tag)
        with self.hold():
            self._merge(rows, f"identity = {_quoted(identity)}")

    def delete_images(self, names: Iterable[str]) -> None:
        """Deletes everything enrolled from some photos; those that are not there do not matter."""
        if names := sorted(set(names)):
            with self.hold():
                self._table.delete(f"image IN ({', '.join(map(_quoted, names))})")

    def delete_identities(self, names: Iterable[str], *, purge: bool = False) -> int:
        """Deletes all faces of some identities.

        Deleted rows are not found any more, but their bytes stay on the disk until LanceDB gets
        round to rewriting their files.

        Args:
            names: of the identities; all must be there.
            purge: rewrite the table without them, and drop all its earlier versions, those of
                earlier deletions too. Nobody else may be reading the database.

        Returns:
            Number of faces deleted.

        Raises:
            DatabaseError: an identity is not enrolled, then nothing was deleted; or bytes remain on
                the disk after a purge.
        """
        names = sorted(set(names))
        with self.hold():
            enrolled = self.identities()
            if absent := [name for name in names if name not in enrolled]:
                raise DatabaseError(f"{self.uri} has no identity {', '.join(map(repr, absent))}")
            gone = None
            if names:
                condition = f"identity IN ({', '.join(map(_quoted, names))})"
                rows = self._table.search().where(condition).limit(_PURGE_SAMPLE)
                rows = rows.select(self._table.schema.names).to_arrow()
                gone, _ = recognition_entries.from_table(rows, self.tag)
                self._table.delete(condition)
            if purge:
                self._purge()
                if gone is not None:
                    self._check_gone(gone)
        return sum(enrolled[name] for name in names)

    def maintain(self) -> None:
        """Joins small files, and keeps the index fit for the number of rows; call after enrollment.

        Below `INDEX_FROM` rows there is none. The index is trained again when the table has
        doubled, else new rows are added to it.
        """
        from lancedb.index import IvfFlat

        with self.hold():
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

        Without an index all distances are computed on the accelerator (`match.top_k`); a table of
        more than a million rows goes through its memory in shards, once for each call. With one
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
            DatabaseError: nobody is enrolled, the probes are of another size, or an entry that was
                found is not as it was written.
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
            if len(self) > _ROWS_IN_MEMORY and len(probes):
                return self._search_shards(probes, k, metric)
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
        return _hits(entries, found.index, found.distances)

    def _search_shards(self, probes: np.ndarray, k: int, metric: str) -> Hits:
        numbers: list[np.ndarray] = []

        def shards() -> Iterator[np.ndarray]:
            for rows in self._shards():
                numbers.append(rows["_rowid"].to_numpy())
                yield recognition_entries.matrix(rows["vector"], self.tag.embedding_size)

        found = match.top_k_of_shards(probes, shards(), k=k, metric=metric)
        wanted = np.concatenate(numbers)[found.index]
        rows = self._take(np.unique(wanted))
        entries = self._whole(rows)
        at = {number: place for place, number in enumerate(rows["_rowid"].to_pylist())}
        places = np.vectorize(at.__getitem__, otypes=[np.int64])(wanted)
        return _hits(entries, places, found.distances)

    def _shards(self) -> Iterator[pa.Table]:
        """Vectors and numbers of all rows, so many at a time as an exact search takes."""
        kept: list[pa.RecordBatch] = []
        num_kept = 0
        for batch in self._batches(["vector"]):
            while len(batch) + num_kept >= _ROWS_OF_SHARD:
                part = batch.slice(0, _ROWS_OF_SHARD - num_kept)
                batch = batch.slice(len(part))
                yield pa.Table.from_batches([*kept, part])
                kept, num_kept = [], 0
            kept.append(batch)
            num_kept += len(batch)
        if num_kept:
            yield pa.Table.from_batches(kept)

    def _take(self, numbers: np.ndarray) -> pa.Table:
        """Rows with all columns and their numbers, in any order."""
        parts = []
        for start in range(0, len(numbers), _ROWS_AT_ONCE):
            query = self._table.take_row_ids(numbers[start : start + _ROWS_AT_ONCE].tolist())
            query = query.select(self._table.schema.names).with_row_id()
            with _naming_damage(self.uri):
                parts.append(query.to_arrow())
        return pa.concat_tables(parts)

    def _search_index(self, probes: np.ndarray, k: int, num_probes: int) -> Hits:
        identities, images, boxes, distances = [], [], [], []
        for probe in probes:
            query = typing.cast(
                "lancedb.query.LanceVectorQueryBuilder",
                self._table.search(probe, vector_column_name="vector"),
            )
            query = query.distance_type("l2").nprobes(num_probes).limit(k)
            with _naming_damage(self.uri):
                rows = query.select([*self._table.schema.names, "_distance"]).to_arrow()
            if rows.num_rows < k:  # The cells looked through hold too few.
                found = self.search(probe[None], k=k, exact=True)
                identities += found.identities
                images += found.images
                boxes.append(found.boxes[0])
                distances.append(found.distances[0])
                continue
            entries = self._whole(rows)
            identities.append(list(entries.identities))
            images.append(list(entries.images))
            boxes.append(entries.boxes)
            # LanceDB's "l2" is the squared distance; that of unit vectors is the metric's.
            squared = rows["_distance"].to_numpy()
            distances.append(np.sqrt(np.maximum(squared, 0)).astype(np.float32))
        return Hits(identities, images, np.stack(boxes), np.stack(distances))

    def _has_index(self) -> bool:
        return any(index.name == _INDEX for index in self._table.list_indices())

    def _scan(self, columns: list[str]) -> pa.Table:
        with _naming_damage(self.uri):
            return self._table.search().select(columns).to_arrow()

    def _batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        """Columns of all rows and their numbers, `_rowid`."""
        with _naming_damage(self.uri):
            yield from self._table.search().select(names).with_row_id(True).to_batches()

    def _whole(self, rows: pa.Table) -> Entries:
        """The faces of rows with all columns; raises DatabaseError where one is damaged."""
        entries, is_whole = recognition_entries.from_table(rows, self.tag)
        if not is_whole.all():
            count, first = np.sum(~is_whole), entries.images[int(np.argmin(is_whole))]
            raise DatabaseError(
                f"{count} rows of {self.uri} are damaged, the first of {first!r}: enroll the "
                "gallery again, which makes them anew"
            )
        return entries

    def _merge(self, rows: pa.Table, scope: str | None) -> None:
        """Puts rows in the place of the same faces, and of all others in a scope."""
        merge = (
            self._table.merge_insert(["identity", "digest", "face"])
            .when_matched_update_all()
            .when_not_matched_insert_all()
        )
        if scope is not None:
            merge = merge.when_not_matched_by_source_delete(scope)
        merge.execute(_without_repeats(rows))

    def _purge(self) -> None:
        """Rewrites the table, and removes the files of all its earlier versions."""
        earlier = _files_below(self._folder and self._folder / f"{TABLE}.lance")
        schema = self._table.schema
        kept = self._table.search().select(schema.names).to_batches()
        reader = pa.RecordBatchReader.from_batches(
            schema, (batch.select(schema.names).cast(schema) for batch in kept)
        )
        self._table = self._connection.create_table(TABLE, reader, schema=schema, mode="overwrite")
        # LanceDB drops what is older than now: nothing, if the clock was set back meanwhile. But no
        # file from before is one of a table that was written as a whole.
        for path in earlier:
            if path.name != _HINT:
                path.unlink(missing_ok=True)
        if self._folder is None:
            self._table.optimize(cleanup_older_than=datetime.timedelta(0), delete_unverified=True)
            if len(self._table.list_versions()) > 1:
                raise DatabaseError(f"earlier versions remain in {self.uri}: purge once more")
        self.maintain()

    def _check_gone(self, gone: Entries) -> None:
        """Raises DatabaseError if bytes of deleted rows are still in a file of the folder."""
        rest = self._scan(["identity", "image", "digest"])
        kept = "\n".join(text for column in rest.columns for text in column.to_pylist())
        texts = {*gone.identities, *gone.images, *gone.digests}
        wanted = [text.encode() for text in texts if len(text) >= _TELLING and text not in kept]
        wanted += [
            vector.tobytes()
            for vector, digest in zip(gone.vectors, gone.digests, strict=True)
            if digest not in kept
        ]
        for path in _files_below(self._folder):
            data = path.read_bytes()
            if any(piece in data for piece in wanted):
                raise DatabaseError(f"bytes of what was deleted remain in {path}")


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
    import lancedb

    uri = os.fspath(uri)
    try:
        folder = _folder_of(uri)
        if folder is not None and not uri.startswith("file://"):
            uri = str(folder)
        if folder is not None and not create and not folder.is_dir():
            raise DatabaseError(f"there is no database {uri}")
        options = dict(storage_options) if storage_options else None
        connection = lancedb.connect(uri, storage_options=options)
        try:
            table = connection.open_table(TABLE)
        except ValueError as error:
            if not create or tag is None:
                raise DatabaseError(f"{uri} holds no reference database ({error})") from error
            with _held(folder):
                table = connection.create_table(
                    TABLE, schema=recognition_entries.schema(tag), exist_ok=True
                )
        database = Database(connection, table, uri)
    except DatabaseError:
        raise
    except Exception as error:  # As in `_naming_damage`.
        raise DatabaseError(f"{uri} cannot be used as a database: {error}") from error
    if tag is not None:
        database.check_tag(tag)
    return database


def num_partitions(count: int) -> int:
    """Cells of an index over so many rows: their square root, within bounds."""
    return min(max(round(math.sqrt(count)), 16), _MAX_PARTITIONS)


@contextlib.contextmanager
def _naming_damage(uri: str) -> Generator[None]:
    """Says which database it is that LanceDB cannot read; it has many errors for damaged files."""
    try:
        yield
    except DatabaseError:
        raise
    except Exception as error:
        raise DatabaseError(f"{uri} cannot be read, and may be damaged: {error}") from error


@contextlib.contextmanager
def _held(folder: pathlib.Path | None) -> Generator[None]:
    """Keeps other processes from changing a folder; nothing where there is none."""
    lock = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = files.lock_folder(folder)
        except files.InUseError as error:
            raise DatabaseError(str(error)) from error
    yield
    del lock


def _folder_of(uri: str) -> pathlib.Path | None:
    """The folder that an address stands for; None where it is in an object store."""
    if uri.startswith("file://"):
        return pathlib.Path(urllib.request.url2pathname(urllib.parse.urlsplit(uri).path))
    # One letter is a drive.
    if re.match(r"^[A-Za-z][A-Za-z0-9+.-]+://", uri):
        return None
    return pathlib.Path(uri).expanduser().absolute()


def _hits(entries: Entries, index: np.ndarray, distances: np.ndarray) -> Hits:
    """Entries by their places `[Q, k]`, at distances `[Q, k]`."""
    return Hits(
        [[entries.identities[i] for i in row] for row in index],
        [[entries.images[i] for i in row] for row in index],
        entries.boxes[index],
        distances,
    )


def _files_below(folder: pathlib.Path | None) -> list[pathlib.Path]:
    paths = folder.rglob("*") if folder is not None else ()
    return [path for path in paths if path.is_file()]


def _without_repeats(rows: pa.Table) -> pa.Table:
    """The first row of each face."""
    columns = (rows[name].to_pylist() for name in ("identity", "digest", "face"))
    first: dict[tuple[str, str, int], int] = {}
    for number, key in enumerate(zip(*columns, strict=True)):
        first.setdefault(key, number)
    return rows if len(first) == rows.num_rows else rows.take(list(first.values()))


def _spoken(tag: ExtractorTag) -> str:
    return f"{tag.name} (weights {tag.weights[:12]}, {tag.embedding_size} numbers)"


def _quoted(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"
