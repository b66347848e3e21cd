"""The identify and verify programs from the outside, with a stand-in for detector and extractor."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

_ROOT = pathlib.Path(__file__).resolve().parent.parent

# The embedding is the colour of the photo's first pixel; a black photo has no face.
_DRIVER = """
import json, sys
import numpy as np
from absl import flags
from absl.testing import flagsaver
from afr_jax.core import run
from afr_jax.recognition import detect, embed
import experiments.{program} as program

def detect_faces(variables, pixels, *, options):
    found = detect.Faces(
        np.array([[1, 2, 9, 8]], np.float32),
        np.ones(1, np.float32),
        np.arange(10, dtype=np.float32).reshape(1, 5, 2),
    )
    return found if pixels.max() else detect.no_faces()

def embed_faces(extractor, variables, faces):
    vectors = [np.resize(pixels[0, 0], extractor.embedding_size) for pixels, _ in faces]
    return np.array(vectors, np.float32).reshape(-1, extractor.embedding_size)

detect.detect_faces, embed.embed_faces = detect_faces, embed_faces
run.define_flags()
flags.FLAGS(["program"])
for line in json.loads(sys.argv[1]):
    with flagsaver.flagsaver():
        flags.FLAGS(["program", *line])
        try:
            result = program.{program}_program()
        except run.UsageError as error:
            result = str(error)
        print(json.dumps(run.to_jsonable(result)))
"""


def _drive(program, *lines):
    lines = json.dumps([[str(flag) for flag in line] for line in lines])
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER.format(program=program), lines],
        cwd=_ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _save(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Eight people of six photos in colours of their own, and ten strangers."""
    root = tmp_path_factory.mktemp("people")
    rng = np.random.default_rng(0)
    for person in range(8):
        for number in range(6):
            colour = np.array([20 + 25 * person, 100, 50]) + rng.integers(-2, 3, 3)
            _save(root / f"p{person}" / f"{number}.png", tuple(int(c) for c in colour))
    for stranger in range(10):
        _save(root / f"s{stranger}" / "0.png", (20 + 20 * stranger, 200, 200))
    # A stranger who looks like person 3, and a probe or enrolled photo without a face.
    _save(root / "double" / "0.png", (95, 100, 50))
    _save(root / "p7" / "5.png", (0, 0, 0))
    return root


def test_identification_of_well_separated_people(people, tmp_path):
    (result, code), toy, no_strangers = _drive(
        "identify",
        [f"--data={people}", f"--workdir={tmp_path / 'out'}"],
        [f"--data={people}", f"--workdir={tmp_path / 'toy'}", "--toy"],
        [f"--data={people}", "--min_photos=7", f"--workdir={tmp_path / 'none'}"],
    )
    assert code == 3
    assert result["not_handled"] == [{"image": "p7/5.png", "reason": "no face was found"}]
    assert (result["people_enrolled"], result["photos_enrolled"]) == (8, 24)
    assert (result["probes"], result["strangers"]) == (24, 11)
    (row,) = result["rows"]
    # Everyone is found but for the black photo, if that is among the probes.
    assert row["rank_1"] in (1.0, pytest.approx(23 / 24))
    # The double comes as near as p3's own photos, so no threshold lets p3 in at 1 %.
    assert row["dir_at_fpir_0.01"] < row["rank_1"]
    assert row["rank_1_interval"][0] <= row["rank_1"] <= row["rank_1_interval"][1]
    assert (tmp_path / "out" / "identification.png").stat().st_size > 5000
    assert toy[0]["people_enrolled"] == 4 and toy[0]["strangers"] == 4
    assert "both are needed" in no_strangers


def test_verification_in_every_metric(people, tmp_path):
    pairs = [
        (f"p{person}/{number}.png", f"p{person + step}/{number + 1}.png", 1 - step)
        for person in range(7)
        for number in range(3)
        for step in (0, 1)
    ]
    table = tmp_path / "pairs.csv"
    rows = ["image_a,image_b,same", *(",".join(map(str, pair)) for pair in pairs)]
    table.write_text("\n".join(rows))
    common = [f"--pairs={table}", f"--images={people}"]
    results = _drive(
        "verify",
        [*common, f"--workdir={tmp_path / 'a'}"],
        [*common, f"--workdir={tmp_path / 'b'}", "--metric=cosine", "--threshold=0.01"],
        [f"--pair={people / 'p0/0.png'},{people / 'p0/1.png'}", "--threshold=15"],
        [f"--pair={people / 'p0/0.png'},{people / 'p7/5.png'}"],
        [f"--pair={people / 'p0/0.png'}"],
        [*common, "--pair=a,b"],
    )
    (plain, code), (cosine, _), (pair, _), (no_face, no_face_code), one, both = results
    assert code == 0 and plain["accuracy"] == plain["auc"] == 1.0 and plain["eer"] == 0.0
    assert plain["similarity_metric"] == "euclidean" and 5 < plain["best_threshold"] < 25 * 7
    assert cosine["similarity_metric"] == "cosine" and cosine["best_threshold"] < 0.1
    assert cosine["threshold"] == 0.01
    keys = {"verified", "distance", "threshold", "model", "similarity_metric", "facial_areas"}
    assert keys | {"time"} <= set(pair) and pair["model"] == "dlib"
    assert pair["verified"] is (pair["distance"] < 15.0)
    assert pair["facial_areas"] == {"img1": [1, 2, 9, 8], "img2": [1, 2, 9, 8]}
    assert no_face["verified"] is None and "no face was found" in no_face["reason"]
    assert no_face_code == 3
    assert "two photos" in one and "one of --pair and --pairs" in both
