"""The reference database: transactions, replacing, refusing, searching."""

import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow as pa
import pytest

from afr_jax.recognition import database
from afr_jax.recognition import entries as recognition_entries

_TAG = database.ExtractorTag("dlib", "ab" * 32, 8, "euclidean")
_STRANGE = ["O'Brien", 'a "quoted" one', "Zoë; DROP TABLE faces", "new\nline", "100 %", "李雷", " "]


def _entries(names, *, seed=0, size=8, first=0):
    rng = np.random.default_rng(seed)
    count = len(names)
    return database.Entries(
        identities=list(names),
        images=[f"{name}/{first + i}.jpg" for i, name in enumerate(names)],
        digests=[f"{i:064x}" for i in range(count)],
        faces=[0] * count,
        boxes=rng.uniform(0, 100, (count, 4)).astype(np.float32),
        vectors=rng.normal(size=(count, size)).astype(np.float32),
        made=["as now"] * count,
    )


@pytest.fixture
def filled(tmp_path):
    opened = database.open_database(tmp_path / "db", tag=_TAG, create=True)
    opened.append(_entries(["ann", "bob", "ann"]))
    return opened


def test_what_is_appended_is_read_back(filled):
    entries = _entries(["ann", "bob", "ann"])
    again = database.open_database(filled.uri, tag=_TAG).entries()
    assert again.identities == entries.identities and again.images == entries.images
    np.testing.assert_array_equal(again.vectors, entries.vectors)
    np.testing.assert_array_equal(again.boxes, entries.boxes)
    assert filled.identities() == {"ann": 2, "bob": 1} and "3 faces" in repr(filled)
    assert filled.images()["bob/1.jpg"] == (entries.digests[1], "bob", "as now")


@pytest.mark.parametrize("name", _STRANGE)
def test_strange_names_are_enrolled_replaced_and_deleted_exactly(filled, name):
    filled.append(_entries([name], seed=1))
    filled.replace_identity(name, _entries([name, name], seed=2, first=5))
    assert filled.identities() == {"ann": 2, "bob": 1, name: 2}
    kept = filled.entries()
    mine = [i for i, identity in enumerate(kept.identities) if identity == name]
    np.testing.assert_array_equal(kept.vectors[mine], _entries([name] * 2, seed=2).vectors)
    assert filled.delete_identities([name]) == 2
    assert filled.identities() == {"ann": 2, "bob": 1}


def test_replacing_a_photo_drops_its_old_faces_only(filled):
    entries = _entries(["ann"], seed=3)._replace(digests=["new"])
    filled.replace_images(entries)
    assert filled.images()["ann/0.jpg"] == ("new", "ann", "as now")
    assert filled.identities() == {"ann": 2, "bob": 1}
    filled.delete_images(["ann/0.jpg", "not there"])
    assert filled.identities() == {"ann": 1, "bob": 1}


def test_another_extractor_or_other_weights_are_refused(filled):
    for other in (_TAG._replace(name="facenet_casia"), _TAG._replace(weights="cd" * 32)):
        with pytest.raises(database.DatabaseError, match="cannot be mixed"):
            database.open_database(filled.uri, tag=other, create=True)
    assert len(filled) == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"identities": ["ann", ""]}, "without a name"),
        ({"identities": ["ann", "unknown"]}, "nobody may be called 'unknown'"),
        ({"vectors": np.full((2, 8), np.nan, np.float32)}, "not finite"),
        ({"vectors": np.zeros((2, 9), np.float32)}, "size 8"),
        ({"boxes": np.zeros((1, 4), np.float32)}, "boxes"),
    ],
)
def test_bad_entries_change_nothing(filled, change, message):
    with pytest.raises(database.DatabaseError, match=message):
        filled.append(_entries(["ann", "bob"])._replace(**change))
    assert len(filled) == 3


def test_replacing_one_person_with_another_is_refused(filled):
    with pytest.raises(database.DatabaseError, match="not all of 'bob'"):
        filled.replace_identity("bob", _entries(["ann"]))


def test_deleting_somebody_unknown_deletes_nobody(filled):
    with pytest.raises(database.DatabaseError, match="'carl'"):
        filled.delete_identities(["ann", "carl"])
    assert len(filled) == 3


@pytest.mark.parametrize("purge", [True, False])
def test_purging_removes_the_bytes(filled, tmp_path, purge):
    vector = _entries(["ann", "bob", "ann"]).vectors[1].tobytes()

    def is_on_disk():
        files = [path for path in (tmp_path / "db").rglob("*") if path.is_file()]
        return any(vector in path.read_bytes() for path in files)

    assert is_on_disk()
    assert filled.delete_identities(["bob"], purge=purge) == 1
    assert is_on_disk() is not purge
    again = database.open_database(filled.uri, tag=_TAG)
    assert again.identities() == filled.identities() == {"ann": 2}


@pytest.mark.parametrize("deleted_before", [True, False])
def test_a_purge_does_not_depend_on_the_clock(filled, tmp_path, monkeypatch, deleted_before):
    """LanceDB's own clean-up drops nothing, as where the clock was set back."""
    gone = _entries(["ann", "bob", "ann"])
    if deleted_before:
        filled.delete_identities(["bob"])
        assert _remains(tmp_path, gone.vectors[1].tobytes())
    monkeypatch.setattr(type(filled._table), "optimize", lambda table, **options: None)
    filled.delete_identities([] if deleted_before else ["bob"], purge=True)
    for piece in (b"bob", gone.digests[1].encode(), gone.vectors[1].tobytes()):
        assert not _remains(tmp_path, piece)
    again = database.open_database(filled.uri, tag=_TAG)
    assert again.identities() == filled.identities() == {"ann": 2}
    again.append(_entries(["carl"], seed=4))
    assert len(filled.entries().images) == 2 and len(again.entries().images) == 3


def test_a_purge_that_leaves_bytes_is_an_error(filled, monkeypatch):
    monkeypatch.setattr(type(filled._table), "optimize", lambda table, **options: None)
    monkeypatch.setattr(pathlib.Path, "unlink", lambda path, **options: None)
    with pytest.raises(database.DatabaseError, match=r"what was deleted remain in .*\.lance"):
        filled.delete_identities(["bob"], purge=True)


def _remains(folder, piece):
    return any(piece in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_no_face_is_there_twice(filled):
    entries = _entries(["ann", "bob", "ann"])
    renamed = entries._replace(images=["ann/new.jpg", "bob/1.jpg", "ann/2.jpg"])
    filled.append(renamed)
    assert sorted(filled.entries().images) == sorted(renamed.images)
    twice = _entries(["cem", "cem"])._replace(digests=["e" * 64] * 2)
    filled.append(twice)
    assert filled.identities() == {"ann": 2, "bob": 1, "cem": 1}
    # The same photo of another person, or another face of it, is another row.
    filled.append(entries._replace(identities=["bob", "ann", "bob"]))
    filled.append(entries._replace(faces=[1, 1, 1]))
    assert filled.identities() == {"ann": 5, "bob": 4, "cem": 1}


def _add_unchecked(opened, entries, **columns):
    rows = recognition_entries.to_table(entries, opened.tag)
    for name, values in columns.items():
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(
            at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type)
        )
    opened._table.add(rows)


def test_rows_that_are_there_twice_are_dropped(filled):
    """As two processes without locks leave them."""
    entries = _entries(["ann", "bob", "ann"])
    _add_unchecked(filled, entries)
    _add_unchecked(filled, entries)
    assert len(filled) == 9
    assert filled.repair() == (0, 6) and filled.repair() == (0, 0)
    assert filled.entries().images == entries.images


@pytest.mark.parametrize(
    "columns",
    [
        {"identity": ["carl"]},
        {"image": ["bob/x.jpg"]},
        {"vector": [[1.0] * 8]},
        {"vector": [[float("inf")] * 8]},
        {"box": [[1.0] * 4]},
        {"checksum": [0]},
        {"made": ["otherwise"]},
    ],
    ids=str,
)
def test_a_row_that_is_not_as_it_was_written_is_refused_and_dropped(filled, columns):
    _add_unchecked(filled, _entries(["bob"], seed=3, first=7), **columns)
    with pytest.raises(database.DatabaseError, match=r"1 rows of .* damaged, the first of 'bob/"):
        filled.search(_entries(["x"]).vectors, k=1)
    assert filled.repair() == (1, 0)
    assert filled.entries().identities == ["ann", "bob", "ann"]


def test_vectors_of_another_length_are_refused_where_they_are_unit(tmp_path):
    tag = _TAG._replace(metric="euclidean_l2")
    opened = database.open_database(tmp_path, tag=tag, create=True)
    entries = _entries(["ann", "bob"])
    unit = entries.vectors / np.linalg.norm(entries.vectors, axis=1, keepdims=True)
    opened.append(entries._replace(vectors=unit))
    for vectors in (0 * unit, 1.01 * unit):
        with pytest.raises(database.DatabaseError, match="unit length"):
            opened.append(entries._replace(vectors=vectors.astype(np.float32)))
    np.testing.assert_array_equal(opened.entries().vectors, unit)


def test_flipped_bits_are_named_or_harmless(filled):
    folder, rng, num_named = pathlib.Path(filled.uri), np.random.default_rng(0), 0
    expected = filled.entries()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        whole = path.read_bytes()
        for bit in rng.choice(8 * len(whole), 15, replace=False):
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            try:
                found = database.open_database(folder, tag=_TAG).entries()
            except database.DatabaseError:
                num_named += 1
                continue
            assert found[:4] == expected[:4] and found.made == expected.made
            np.testing.assert_array_equal(found.vectors, expected.vectors)
            np.testing.assert_array_equal(found.boxes, expected.boxes)
        path.write_bytes(whole)
    assert num_named


def test_one_process_changes_a_database_at_a_time(filled, start_process):
    script = textwrap.dedent(
        """
        import sys
        from afr_jax.recognition import database

        opened = database.open_database(sys.argv[1])
        with opened.hold():
            print("held", flush=True)
            sys.stdin.readline()
            opened.delete_identities(["ann"])
        print("done", flush=True)
        sys.stdin.readline()
        """
    )
    child = start_process(
        [sys.executable, "-c", script, filled.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == "held\n"
    changes = [
        lambda: filled.append(_entries(["carl"], first=9)),
        lambda: filled.replace_images(_entries(["ann"])),
        lambda: filled.replace_identity("ann", _entries(["ann"])),
        lambda: filled.delete_images(["ann/0.jpg"]),
        lambda: filled.delete_identities(["bob"]),
        filled.maintain,
        filled.repair,
    ]
    for change in changes:
        with pytest.raises(database.DatabaseError, match=f"in use by process {child.pid}"):
            change()
    assert filled.identities() == {"ann": 2, "bob": 1}  # Readers need not wait.
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "done\n"
    filled.append(_entries(["carl"], first=9))
    assert filled.identities() == {"bob": 1, "carl": 1}  # What the other did is seen.


def test_a_folder_that_is_no_database(tmp_path):
    with pytest.raises(database.DatabaseError, match="there is no database"):
        database.open_database(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(database.DatabaseError, match="file"):
        database.open_database(tmp_path / "file", tag=_TAG, create=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(database.DatabaseError, match="holds no reference database"):
        database.open_database(tmp_path / "empty")


def test_somebody_elses_table_is_refused(tmp_path):
    import lancedb

    table = pa.table({"vector": pa.array([[1.0]], pa.list_(pa.float32(), 1))})
    lancedb.connect(tmp_path).create_table(database.TABLE, table)
    with pytest.raises(database.DatabaseError, match="not made by afr_jax"):
        database.open_database(tmp_path)


def test_an_empty_database_cannot_be_searched(tmp_path):
    opened = database.open_database(tmp_path, tag=_TAG, create=True)
    with pytest.raises(database.DatabaseError, match="nobody is enrolled"):
        opened.search(np.zeros((1, 8), np.float32), k=1)
    with pytest.raises(database.DatabaseError, match="size 8"):
        opened.search(np.zeros((1, 9), np.float32), k=1)


def test_exact_search_by_numpy(filled):
    entries = filled.entries()
    probes = np.random.default_rng(5).normal(size=(4, 8)).astype(np.float32)
    hits = filled.search(probes, k=9)
    apart = np.linalg.norm(probes[:, None].astype(np.float64) - entries.vectors[None], axis=-1)
    order = np.argsort(apart, axis=1)
    np.testing.assert_allclose(hits.distances, np.sort(apart, axis=1), rtol=1e-5)
    assert hits.images == [[entries.images[i] for i in row] for row in order]
    assert hits.identities == [[entries.identities[i] for i in row] for row in order]
    np.testing.assert_array_equal(hits.boxes, entries.boxes[order])
    none = filled.search(probes[:0], k=2)
    assert none.identities == [] and none.distances.shape == (0, 2)


def test_many_additions_leave_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "_MAX_ADDED_FILES", 3)
    opened = database.open_database(tmp_path, tag=_TAG, create=True)
    for number in range(10):
        opened.append(_entries([f"p{number}"], seed=number, first=number))
        assert opened._table.stats()["fragment_stats"]["num_fragments"] <= 3
    assert opened.entries().identities == [f"p{number}" for number in range(10)]


def test_a_table_beyond_memory_is_searched_in_shards(tmp_path, monkeypatch):
    opened = database.open_database(tmp_path, tag=_TAG, create=True)
    for number in range(5):  # Shards and files of the table end at different rows.
        opened.append(_entries([f"p{number}"] * 300, seed=number, first=300 * number))
    opened.delete_images(["p1/300.jpg"])
    probes = np.random.default_rng(7).normal(size=(20, 8)).astype(np.float32)
    kept = {metric: opened.search(probes, k=3, metric=metric) for metric in ("euclidean", "cosine")}
    monkeypatch.setattr(database, "_ROWS_IN_MEMORY", 1000)
    monkeypatch.setattr(database, "_ROWS_OF_SHARD", 256)
    monkeypatch.setattr(opened, "_search_exactly", None)
    for metric, expected in kept.items():
        found = opened.search(probes, k=3, metric=metric)
        assert found[:2] == expected[:2]
        np.testing.assert_array_equal(found.boxes, expected.boxes)
        np.testing.assert_array_equal(found.distances, expected.distances)
    every = opened.search(probes[:1], k=2000)  # More than one query for rows takes.
    assert len(set(every.images[0])) == 1499


def test_the_index_finds_what_the_exact_search_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "INDEX_FROM", 2000)
    opened = database.open_database(tmp_path, tag=_TAG, create=True)
    opened.append(_entries(["p"] * 1999))
    opened.maintain()
    probes = np.random.default_rng(7).normal(size=(20, 8)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened, "_search_index", None)  # Below the limit there is no index to use.
        opened.search(probes, k=1)
    opened.append(_entries(["q"] * 3001, seed=1))
    opened.maintain()
    exact = opened.search(probes, k=3, exact=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened, "_search_exactly", None)  # The index is used.
        # All cells looked through: nothing is missed.
        found = opened.search(probes, k=3, num_probes=200)
        few = opened.search(probes, k=3, num_probes=8)
    assert found.images == exact.images
    np.testing.assert_allclose(found.distances, exact.distances, rtol=1e-4)
    np.testing.assert_allclose(found.boxes, exact.boxes)
    first = [a[0] == b[0] for a, b in zip(few.images, exact.images, strict=True)]
    assert np.mean(first) >= 0.5
    # Rows that came after the index was made are found as well.
    new = _entries(["r"], seed=9)
    opened.append(new)
    assert opened.search(new.vectors, k=1).identities == [["r"]]
    assert opened.search(probes, k=3, metric="cosine").distances.shape == (20, 3)


def test_kills_while_appending_leave_whole_rows(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        import numpy as np
        from afr_jax.recognition import database

        tag = database.ExtractorTag("dlib", "ab" * 32, 64, "euclidean")
        opened = database.open_database(sys.argv[1], tag=tag, create=True)
        print("open", flush=True)
        number = len(opened)
        while True:
            count = 2000
            opened.append(
                database.Entries(
                    ["p"] * count,
                    [f"{number + i}" for i in range(count)],
                    [f"{number + i}" for i in range(count)],
                    [0] * count,
                    np.zeros((count, 4), np.float32),
                    np.repeat(np.arange(number, number + count, dtype=np.float32)[:, None], 64, 1),
                    [""] * count,
                )
            )
            number += count
        """
    )
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE
        )
        child.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(rng.uniform(0.05, 0.5))
        child.kill()
        child.wait()
        child.stdout.close()
        opened = database.open_database(tmp_path)
        entries = opened.entries()
        counts.append(len(entries.images))
        assert counts[-1] % 2000 == 0
        numbers = np.array([int(image) for image in entries.images])
        np.testing.assert_array_equal(np.sort(numbers), np.arange(counts[-1]))
        np.testing.assert_array_equal(entries.vectors, np.repeat(numbers[:, None], 64, 1))
    assert counts[-1] > 0 and counts == sorted(counts)


@pytest.mark.parametrize("scheme", ["file://{}", "memory://faces"])
def test_an_address_serves_as_well_as_a_folder(tmp_path, scheme):
    uri = scheme.format(tmp_path / "db")
    opened = database.open_database(uri, tag=_TAG, create=True)
    opened.append(_entries(["ann", "bob"]))
    opened.replace_identity("bob", _entries(["bob"] * 3, first=4))
    assert opened.identities() == {"ann": 1, "bob": 3}
    assert opened.search(_entries(["x"]).vectors, k=1).distances.shape == (1, 1)
    if scheme.startswith("file"):  # What is in memory is gone with its connection.
        assert database.open_database(uri, tag=_TAG).identities() == {"ann": 1, "bob": 3}
