"""The enroll and match programs from the outside: galleries, statuses, kills, matches."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import skimage.data
from PIL import Image

from afr_jax.recognition import database

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PERSON = 'Eileen O\'Collins, "Zoë"; DROP'

# Runs enroll with a detector and an extractor that need no compilation, 4 photos a transaction.
# The embedding is the colour of the photo's first pixel; a black photo has no face.
_DRIVER = """
import sys, time
import numpy as np
from afr_jax.core import run
from afr_jax.recognition import detect, embed, recognise
from experiments import enroll

def detect_faces(variables, pixels, *, options):
    found = detect.Faces(
        np.array([[1, 2, 9, 8]], np.float32),
        np.ones(1, np.float32),
        np.arange(10, dtype=np.float32).reshape(1, 5, 2),
    )
    return found if pixels.max() else detect.no_faces()

def embed_faces(extractor, variables, faces):
    time.sleep(0.2)
    vectors = [np.resize(pixels[0, 0], extractor.embedding_size) for pixels, _ in faces]
    return np.array(vectors, np.float32).reshape(-1, extractor.embedding_size)

detect.detect_faces, embed.embed_faces = detect_faces, embed_faces
enroll._GROUP = recognise._GROUP = 4
print("ready", file=sys.stderr, flush=True)
run.define_flags()
run.main(enroll.enroll_program)
"""


def _call(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=_ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )


def _drive(*flags):
    done = _call("-c", _DRIVER, *flags)
    assert done.returncode in (0, 3), done.stderr
    return done.returncode, json.loads(done.stdout)


def _save(path, colour, *, size=(24, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def gallery(tmp_path):
    for person in range(5):
        for number in range(4):
            _save(tmp_path / "gallery" / f"p{person}" / f"{number}.png", (person, number, 9))
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


def test_new_changed_gone_and_replaced_photos(gallery, tmp_path):
    flags = [f"--gallery={gallery}", f"--database={tmp_path / 'db'}"]
    code, result = _drive(*flags)
    assert (code, result["added"], result["unchanged"]) == (0, 20, 0)
    assert _rows(tmp_path / "db") == _expected(gallery)
    # One more, one changed, one that has no face now, one removed, one unreadable.
    _save(gallery / "p9" / "new.png", (9, 9, 9))
    _save(gallery / "p0" / "1.png", (77, 1, 9))
    _save(gallery / "p0" / "2.png", (0, 0, 0))
    (gallery / "p1" / "3.png").unlink()
    (gallery / "p2" / "broken.jpg").write_bytes(b"\xff\xd8\xff nonsense")
    _save(gallery / "unknown" / "x.png", (5, 5, 5))
    latin = os.fsdecode(b"p2/caf\xe9.png")
    _save(gallery / latin, (5, 5, 5))
    code, result = _drive(*flags)
    assert code == 3
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
    _, result = _drive(*flags, "--replace")
    del rows["p1/3.png"]
    assert _rows(tmp_path / "db") == rows
    code, result = _drive(f"--database={tmp_path / 'db'}", "--delete=p0", "--delete=p9", "--purge")
    assert (code, result["deleted"], result["identities"]) == (0, 4, 4)


def test_a_csv_names_the_people(gallery, tmp_path):
    table = tmp_path / "people.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["image", "identity"], ["p0/0.png", _PERSON], ["p1/1.png", "李雷"]])
    _drive(f"--gallery={gallery}", f"--csv={table}", f"--database={tmp_path / 'db'}")
    rows = _rows(tmp_path / "db")
    assert rows == {"p0/0.png": (_PERSON, (0, 0, 9)), "p1/1.png": ("李雷", (1, 1, 9))}


def _kill_until_done(gallery, folder, *, num_kills, seed):
    """Kills the program at random moments after its start; returns the rows after each."""
    rng = np.random.default_rng(seed)
    flags = [f"--gallery={gallery}", f"--database={folder}"]
    counts = []
    for _ in range(num_kills):
        child = subprocess.Popen(
            [sys.executable, "-c", _DRIVER, *flags],
            cwd=_ROOT,
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
def test_killed_enrolments_leave_whole_rows_and_are_completed(gallery, tmp_path, num_kills):
    counts = _kill_until_done(gallery, tmp_path / "db", num_kills=num_kills, seed=num_kills)
    assert counts == sorted(counts)
    code, result = _drive(f"--gallery={gallery}", f"--database={tmp_path / 'db'}")
    assert code == 0 and result["added"] + result["unchanged"] == 20
    assert _rows(tmp_path / "db") == _expected(gallery)


# Runs one command line after the other in one process; prints what each is told.
_USAGE_DRIVER = """
import importlib, json, sys
from absl import flags
from absl.testing import flagsaver
from afr_jax.core import run

program = importlib.import_module(f"experiments.{sys.argv[1]}")
run.define_flags()
flags.FLAGS(["program"])
for line in json.loads(sys.argv[2]):
    with flagsaver.flagsaver():
        flags.FLAGS(["program", *line])
        try:
            getattr(program, f"{sys.argv[1]}_program")()
        except run.UsageError as error:
            print(json.dumps(str(error)))
"""


def test_wrong_usage(gallery, tmp_path):
    _drive(f"--gallery={gallery}", f"--database={tmp_path / 'db'}")
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
            ([f"--queries={tmp_path / 'empty'}", f"--database={tmp_path / 'db'}"], "no files"),
        ],
    }
    for program, lines in cases.items():
        done = _call("-c", _USAGE_DRIVER, program, json.dumps([flags for flags, _ in lines]))
        told = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(told) == len(lines), done.stderr
        for text, (_, message) in zip(told, lines, strict=True):
            assert message in text
    assert len(_rows(tmp_path / "db")) == 20


def test_from_portraits_to_matches(tmp_path):
    """Both programs with the real detector and extractor."""
    portrait = Image.fromarray(skimage.data.astronaut()[:256, 96:352])
    folder = tmp_path / "gallery" / _PERSON
    folder.mkdir(parents=True)
    portrait.save(folder / "face.png")
    _save(tmp_path / "gallery" / "nobody" / "sky.png", (90, 120, 200), size=(64, 64))
    flags = [f"--gallery={tmp_path / 'gallery'}", f"--database={tmp_path / 'db'}"]
    done = _call("-m", "experiments.enroll", *flags)
    result = json.loads(done.stdout)
    assert done.returncode == 3 and result["enrolled"] == 1, done.stderr
    assert result["not_handled"] == [{"image": "nobody/sky.png", "reason": "no face was found"}]

    queries = tmp_path / "queries"
    queries.mkdir()
    portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(queries / "mirrored.jpg")
    _save(queries / "sky.png", (90, 120, 200), size=(64, 64))
    done = _call(
        *("-m", "experiments.match", f"--queries={queries}", f"--database={tmp_path / 'db'}"),
        f"--workdir={tmp_path / 'out'}",
    )
    assert done.returncode == 3, done.stderr
    result = json.loads(done.stdout)
    assert result["queries"] == {"ok": 1, "no_face": 1, "unreadable": 0}
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

    done = _call(
        *("-m", "experiments.match", f"--queries={queries / 'mirrored.jpg'}"),
        *(f"--database={tmp_path / 'db'}", f"--workdir={tmp_path / 'strict'}", "--threshold=0.01"),
    )
    assert done.returncode == 0 and json.loads(done.stdout)["unknown"] == 1
