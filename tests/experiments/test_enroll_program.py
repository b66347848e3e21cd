"""The enroll and match programs from the outside: galleries, statuses, kills, matches."""

import csv
import os
import shutil
import subprocess
import sys

import lancedb
import numpy as np
import programs
import pytest
import skimage.data
from PIL import Image

from afr_jax.core import files
from afr_jax.recognition import database, embed, pipeline
from afr_jax.recognition.tasks import enroll_gallery, match_queries

_PERSON = 'Eileen O\'Collins, "Zoë"; DROP'

# A process that enrolls with stand-ins: four photos a transaction, and time to be killed between.
_SLOW = """
import sys, time
import pytest
import programs
from afr_jax.core import program
from afr_jax.recognition import embed, pipeline
from afr_jax.recognition.tasks import enroll_gallery

programs.stand_in(pytest.MonkeyPatch())
embed_faces = embed.embed_faces

def embed_slowly(*arguments):
    time.sleep(0.2)
    return embed_faces(*arguments)

embed.embed_faces = embed_slowly
pipeline._GROUP = 4
print("ready", file=sys.stderr, flush=True)
enroll_gallery.run(program.parse(enroll_gallery.EnrollConfig, sys.argv[1:]))
"""


@pytest.fixture
def stand_in(monkeypatch):
    programs.stand_in(monkeypatch)
    monkeypatch.setattr(pipeline, "_GROUP", 4)


def _enroll(*flags):
    """Whether all went well, and the result."""
    result, complete = programs.call(enroll_gallery.EnrollConfig, enroll_gallery.run, *flags)
    return complete, result


def _match(*flags):
    return programs.call(match_queries.MatchConfig, match_queries.run, *flags)


@pytest.fixture
def gallery(tmp_path):
    for person in range(5):
        for number in range(4):
            programs.save_photo(
                tmp_path / "gallery" / f"p{person}" / f"{number}.png", (person, number, 9)
            )
    return tmp_path / "gallery"


def _rows(folder):
    opened = database.open_database(folder)
    entries = opened.entries()
    return {
        image: (identity, tuple(vector[:3]))
        for image, identity, vector in zip(
            entries.images, entries.identities, entries.vectors, strict=True
        )
    }


def _expected(gallery):
    return {
        f"p{person}/{number}.png": (f"p{person}", (person, number, 9))
        for person in range(5)
        for number in range(4)
    }


def test_new_changed_gone_and_replaced_photos(gallery, tmp_path, stand_in):
    flags = [f"--gallery={gallery}", f"--database={tmp_path / 'db'}"]
    complete, result = _enroll(*flags)
    assert (complete, result["added"], result["unchanged"]) == (True, 20, 0)
    assert _rows(tmp_path / "db") == _expected(gallery)
    # One more, one changed, one that has no face now, one removed, one unreadable.
    programs.save_photo(gallery / "p9" / "new.png", (9, 9, 9))
    programs.save_photo(gallery / "p0" / "1.png", (77, 1, 9))
    programs.save_photo(gallery / "p0" / "2.png", (0, 0, 0))
    (gallery / "p1" / "3.png").unlink()
    (gallery / "p2" / "broken.jpg").write_bytes(b"\xff\xd8\xff nonsense")
    programs.save_photo(gallery / "unknown" / "x.png", (5, 5, 5))
    latin = os.fsdecode(b"p2/caf\xe9.png")
    programs.save_photo(gallery / latin, (5, 5, 5))
    complete, result = _enroll(*flags)
    assert not complete
    assert (result["added"], result["changed"], result["unchanged"]) == (1, 1, 17)
    assert {item["image"]: item["reason"][:12] for item in result["not_handled"]} == {
        "p0/2.png": "no face was ",
        "p2/broken.jpg": "the JPEG fil",
        "unknown/x.png": "nobody may b",
        latin: "the name is ",
    }
    rows = _expected(gallery) | {"p9/new.png": ("p9", (9, 9, 9))}
    rows["p0/1.png"] = ("p0", (77, 1, 9))
    del rows["p0/2.png"]
    assert _rows(tmp_path / "db") == rows
    # The removed photo is forgotten when its person is replaced.
    _, result = _enroll(*flags, "--replace")
    del rows["p1/3.png"]
    assert _rows(tmp_path / "db") == rows
    # A person whose photos show no face any more, and one of whom a photo cannot be read.
    for person in ("p3", "p4"):
        for number in range(4):
            programs.save_photo(gallery / person / f"{number}.png", (0, 0, 0))
    (gallery / "p4" / "3.png").write_bytes(b"nonsense")
    _, result = _enroll(*flags, "--replace")
    rows = {image: row for image, row in rows.items() if row[0] != "p3"}
    assert _rows(tmp_path / "db") == rows
    reasons = {item["image"]: item["reason"] for item in result["not_handled"]}
    assert "is not replaced" in reasons["p4"] and "p3" not in reasons
    complete, result = _enroll(
        f"--database={tmp_path / 'db'}", "--delete=p0", "--delete=p9", "--purge"
    )
    assert (complete, result["deleted"], result["identities"]) == (True, 4, 3)


def test_equal_files_renamed_photos_and_other_options(gallery, tmp_path, stand_in):
    flags = [f"--gallery={gallery}", f"--database={tmp_path / 'db'}"]
    shutil.copy(gallery / "p0" / "0.png", gallery / "p0" / "z.png")
    _, result = _enroll(*flags)
    assert (result["added"], result["repeats"], result["enrolled"]) == (20, 1, 20)
    assert _rows(tmp_path / "db") == _expected(gallery)
    # A photo has another name, and another photo has its old one.
    (gallery / "p0" / "z.png").unlink()
    (gallery / "p1" / "0.png").rename(gallery / "p1" / "new.png")
    programs.save_photo(gallery / "p1" / "0.png", (1, 200, 9))
    _, result = _enroll(*flags)
    counts = [result[name] for name in ("added", "changed", "unchanged", "repeats", "enrolled")]
    assert counts == [1, 1, 19, 0, 21]
    rows = _expected(gallery) | {"p1/new.png": ("p1", (1, 0, 9)), "p1/0.png": ("p1", (1, 200, 9))}
    assert _rows(tmp_path / "db") == rows
    for option in ("--min_confidence=0.95", "--min_face_px=40"):
        _, result = _enroll(*flags, option)
        assert (result["added"], result["changed"], result["unchanged"]) == (0, 21, 0)
        _, result = _enroll(*flags, option)
        assert (result["changed"], result["unchanged"]) == (0, 21)
    assert _rows(tmp_path / "db") == rows


@pytest.mark.parametrize("replace", [True, False])
def test_damaged_and_repeated_rows_are_made_again(gallery, tmp_path, stand_in, caplog, replace):
    flags = [f"--gallery={gallery}", f"--database={tmp_path / 'db'}"]
    _enroll(*flags)
    table = lancedb.connect(tmp_path / "db").open_table(database.TABLE)
    table.add(table.to_arrow())  # As two processes without locks leave it.
    table.update(where="image = 'p1/2.png'", values={"identity": "p3"})
    assert table.count_rows() == 40
    answer = _match(f"--queries={gallery / 'p0'}", f"--database={tmp_path / 'db'}")
    assert "2 rows of" in answer and "damaged" in answer
    complete, result = _enroll(*flags, *["--replace"] * replace)
    assert complete and result["enrolled"] == 20
    assert "2 damaged rows and 19 repeated ones are dropped" in caplog.text
    assert _rows(tmp_path / "db") == _expected(gallery)


def test_a_second_run_is_refused_while_one_enrolls(gallery, tmp_path, stand_in, start_process):
    flags = [f"--gallery={gallery}", f"--database={tmp_path / 'db'}"]
    script = _SLOW.replace("time.sleep(0.2)", "print('on', flush=True); sys.stdin.readline()")
    child = start_process(
        [sys.executable, "-c", script, *flags],
        cwd=programs.ROOT,
        env=os.environ | {"PYTHONPATH": f"{programs.ROOT}:{programs.ROOT / 'tests'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout.readline() == "on\n"
    for some in (flags, [*flags, "--replace"], [flags[1], "--delete=p0"], [flags[1], "--purge"]):
        answer = programs.call(enroll_gallery.EnrollConfig, enroll_gallery.run, *some)
        assert f"in use by process {child.pid}" in answer
    child.stdin.close()
    assert child.wait() == 0
    assert _rows(tmp_path / "db") == _expected(gallery)


def test_a_csv_names_the_people(gallery, tmp_path, stand_in):
    table = tmp_path / "people.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["image", "identity"], ["p0/0.png", _PERSON], ["p1/1.png", "李雷"]])
    _enroll(f"--gallery={gallery}", f"--csv={table}", f"--database={tmp_path / 'db'}")
    rows = _rows(tmp_path / "db")
    assert rows == {"p0/0.png": (_PERSON, (0, 0, 9)), "p1/1.png": ("李雷", (1, 1, 9))}


def test_matching_goes_on_and_names_what_no_table_can_hold(
    gallery, tmp_path, stand_in, monkeypatch
):
    _enroll(f"--gallery={gallery}", f"--database={tmp_path / 'db'}")
    bad = os.fsdecode(b"caf\xe9.png")
    names = ["=1+1.png", "-a,b.png", "two\nlines.png", bad, "x.png", "y.png"]
    for number, name in enumerate(names):
        programs.save_photo(tmp_path / "queries" / name, (1, number % 4, 9))
    flags = [f"--queries={tmp_path / 'queries'}", f"--database={tmp_path / 'db'}", "--top_k=1"]
    straight, complete = _match(*flags, f"--workdir={tmp_path / 'straight'}")
    assert not complete and straight["faces"] == 5
    assert straight["not_handled"] == [{"image": bad, "reason": "the name is not Unicode"}]
    rows = files.read_csv(tmp_path / "straight" / "matches.csv", ["query"])
    assert sorted(name for _, (name,) in rows) == sorted({*names} - {bad})

    embed_faces, calls = embed.embed_faces, []

    def embed_once(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed_faces(*arguments)

    monkeypatch.setattr(embed, "embed_faces", embed_once)
    with pytest.raises(KeyboardInterrupt):
        _match(*flags, f"--workdir={tmp_path / 'out'}")
    _match(*flags, f"--workdir={tmp_path / 'out'}")
    assert len(calls) == 3
    tables = [(tmp_path / name / "matches.csv").read_bytes() for name in ("out", "straight")]
    assert tables[0] == tables[1]


def _kill_until_done(gallery, folder, *, num_kills, seed):
    """Kills the program at random moments after its start; returns the rows after each."""
    rng = np.random.default_rng(seed)
    flags = [f"--gallery={gallery}", f"--database={folder}"]
    counts = []
    for _ in range(num_kills):
        child = subprocess.Popen(
            [sys.executable, "-c", _SLOW, *flags],
            cwd=programs.ROOT,
            env=os.environ | {"PYTHONPATH": f"{programs.ROOT}:{programs.ROOT / 'tests'}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in child.stderr:
            if line == "ready\n":
                break
        try:
            child.wait(rng.uniform(0.0, 1.5))
        except subprocess.TimeoutExpired:
            child.kill()
        child.wait()
        child.stderr.close()
        try:
            rows = _rows(folder)
        except database.DatabaseError:
            rows = {}  # Killed before there was a table.
        expected = _expected(gallery)
        assert all(expected[image] == row for image, row in rows.items())
        counts.append(len(rows))
    return counts


@pytest.mark.parametrize(
    "num_kills", [2, pytest.param(10, marks=pytest.mark.slow)], ids=["two", "ten"]
)
def test_killed_enrollments_leave_whole_rows_and_are_completed(
    gallery, tmp_path, stand_in, num_kills
):
    counts = _kill_until_done(gallery, tmp_path / "db", num_kills=num_kills, seed=num_kills)
    assert counts == sorted(counts)
    complete, result = _enroll(f"--gallery={gallery}", f"--database={tmp_path / 'db'}")
    assert complete and result["added"] + result["unchanged"] == 20
    assert _rows(tmp_path / "db") == _expected(gallery)


def test_wrong_usage(gallery, tmp_path, stand_in):
    _enroll(f"--gallery={gallery}", f"--database={tmp_path / 'db'}")
    (tmp_path / "empty").mkdir()
    cases = {
        "enroll": [
            ([f"--gallery={gallery}"], "--database is needed"),
            ([f"--database={tmp_path / 'db'}"], "one of --gallery and --delete"),
            (["--gallery=x", f"--database={tmp_path / 'new'}"], "x does not exist"),
            ([f"--gallery={tmp_path / 'empty'}", f"--database={tmp_path / 'n'}"], "no photo"),
            ([f"--database={tmp_path / 'db'}", "--delete=nobody"], "no identity 'nobody'"),
            ([f"--database={tmp_path / 'no'}", "--delete=p0"], "there is no database"),
        ],
        "match": [
            ([f"--queries={gallery}", f"--database={tmp_path / 'no'}"], "there is no database"),
            ([f"--database={tmp_path / 'db'}"], "--queries is needed"),
            ([f"--queries={tmp_path / 'empty'}", f"--database={tmp_path / 'db'}"], "no photos"),
        ],
    }
    doors = {
        "enroll": (enroll_gallery.EnrollConfig, enroll_gallery.run),
        "match": (match_queries.MatchConfig, match_queries.run),
    }
    for program, lines in cases.items():
        for flags, part in lines:
            answer = programs.call(*doors[program], *flags)
            assert isinstance(answer, str) and part in answer, (flags, answer)
    assert len(_rows(tmp_path / "db")) == 20


def test_from_portraits_to_matches(tmp_path):
    """Both with the real detector and extractor; enrollment as a program of its own."""
    portrait = Image.fromarray(skimage.data.astronaut()[:256, 96:352])
    folder = tmp_path / "gallery" / _PERSON
    folder.mkdir(parents=True)
    portrait.save(folder / "face.png")
    programs.save_photo(tmp_path / "gallery" / "nobody" / "sky.png", (90, 120, 200), size=(64, 64))
    flags = [f"--gallery={tmp_path / 'gallery'}", f"--database={tmp_path / 'db'}"]
    (tmp_path / "gallery" / "nobody" / "sky.json").write_text("{}")
    done, result = programs.run("enroll", *flags)
    assert done.returncode == 3 and result["enrolled"] == result["skipped"] == 1, done.stderr
    assert result["not_handled"] == [{"image": "nobody/sky.png", "reason": "no face was found"}]

    queries = tmp_path / "queries"
    queries.mkdir()
    portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(queries / "mirrored.jpg")
    programs.save_photo(queries / "sky.png", (90, 120, 200), size=(64, 64))
    (queries / "film.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    database_flag = f"--database={tmp_path / 'db'}"
    result, complete = _match(
        f"--queries={queries}", database_flag, f"--workdir={tmp_path / 'out'}"
    )
    assert not complete
    assert result["queries"] == {"ok": 1, "no_face": 1, "unreadable": 0} and result["skipped"] == 1
    assert result["identified"] == 1 and result["metric"] == "euclidean"
    with open(result["matches"], encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["query"], row["rank"], row["matched"]) == ("mirrored.jpg", "1", "1")
    assert row["identity"] == row["decision"] == _PERSON
    assert row["image"] == f"{_PERSON}/face.png" and row["threshold"] == "0.6"
    assert 0.0 < float(row["distance"]) < 0.6
    # A face is about where it was enrolled, mirrored.
    box, query_box = (np.array(row[name].split(), float) for name in ("box", "query_box"))
    np.testing.assert_allclose(query_box[[0, 2]], box[[0, 2]], atol=12)
    np.testing.assert_allclose(255 - query_box[[3, 1]], box[[1, 3]], atol=12)

    strict = [f"--workdir={tmp_path / 'strict'}", "--threshold=0.01"]
    result, complete = _match(f"--queries={queries / 'mirrored.jpg'}", database_flag, *strict)
    assert complete and result["unknown"] == 1
    # A link out of the folder of queries is not followed.
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "out.jpg").symlink_to(queries / "mirrored.jpg")
    result, complete = _match(f"--queries={linked}", database_flag, *strict)
    assert not complete and result["queries"]["unreadable"] == 1
    assert "leads out" in result["not_handled"][0]["reason"]
