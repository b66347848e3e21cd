"""The study with one cloaked photo in a person's folder: what it answers, writes and refuses."""

import csv
import json
import pathlib
import shutil

import numpy as np
import programs
import pytest
from PIL import Image

from afr_jax.evaluation.cloaking import embeddings, folder_matching, pubfig_study
from afr_jax.models.extractors import registry


def _call(*flags):
    return programs.call(pubfig_study.PubFigConfig, pubfig_study.run, *flags)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    """The embedding of a photo is its color."""
    programs.stand_in(monkeypatch)


@pytest.fixture
def data(tmp_path):
    """Four people in a color each, with three photos."""
    colors = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (160, 160, 40))
    for person, color in enumerate(colors):
        for number in range(3):
            path = tmp_path / "people" / f"p{person}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 24), color).save(path)
    return tmp_path / "people"


@pytest.fixture
def cloaked(tmp_path):
    """Of p0 a photo in the color of p1, of p1 one that is as it was."""
    for person, number, color in (("p0", 1, (40, 200, 40)), ("p1", 0, (40, 200, 40))):
        path = tmp_path / "cloaked" / person / f"{number}_cloaked.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (24, 24), color).save(path)
    return tmp_path / "cloaked"


def _flags(data, cloaked, out):
    return (
        *(f"--data={data}", f"--cloaked={cloaked}", f"--workdir={out}", "--people=2"),
        *("--extractors=dlib", "--top_k=2"),
    )


@pytest.fixture
def answers(data, cloaked, tmp_path):
    result, complete = _call(*_flags(data, cloaked, tmp_path / "out"))
    assert complete and not result["not_handled"]
    return json.loads((tmp_path / "out" / "result.json").read_text())


def test_a_cloak_that_works_and_one_that_does_nothing(answers, data):
    moved, same = answers["answers"]
    assert moved["cloaked_photo"]["image"] == "p0/1_cloaked.png"
    assert moved["original_photo"]["image"] == "p0/1.png"
    assert moved["query"]["image"] in ("p0/0.png", "p0/2.png")
    # p0 has two photos left and is found by the other; the cloaked one lies among those of p1.
    assert moved["is_found"] and moved["nearest"]["image"].startswith("p0/")
    assert not moved["cloaked"]["verified"] and not moved["cloaked"]["in_top"]
    assert moved["original"]["verified"] and moved["original"]["found_alone"]
    colors = {
        name: np.asarray(Image.open(path))[0, 0].astype(float)
        for name, path in {
            "query": moved["query"]["path"],
            "cloaked": moved["cloaked_photo"]["path"],
            "original": moved["original_photo"]["path"],
        }.items()
    }
    for kind in ("cloaked", "original"):
        repeated = np.resize(colors[kind], 128) - np.resize(colors["query"], 128)
        assert moved[kind]["distance"] == pytest.approx(np.linalg.norm(repeated), rel=1e-5)
    assert same["cloaked"] == same["original"] and same["person"] == "p1"


def test_counts_are_those_of_the_answers(answers):
    (row,) = answers["extractors"]
    assert (row["people"], row["is_found"], row["made_against"]) == (2, 2, None)
    assert (row["verified"], row["original_verified"]) == (
        sum(entry["cloaked"]["verified"] for entry in answers["answers"]),
        sum(entry["original"]["verified"] for entry in answers["answers"]),
    )


def test_the_csv_is_that_of_deepface_find(answers, tmp_path):
    with open(tmp_path / "out" / "matches" / "p0" / "dlib.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(folder_matching.FIND_COLUMNS)
    # All photos but the original and both queries, and the cloaked one.
    names = [row["identity"] for row in rows]
    entry = answers["answers"][0]
    assert len(rows) == len(set(names)) == 10 and "p0/1_cloaked.png" in names
    assert not {"p0/1.png", entry["query"]["image"]} & set(names)
    distances = [float(row["distance"]) for row in rows]
    assert distances == sorted(distances) and float(rows[0]["threshold"]) == 0.6
    assert [int(rows[0][f"target_{side}"]) for side in "xywh"] == [2, 1, 6, 8]
    assert names.index("p0/1_cloaked.png") + 1 == entry["cloaked"]["rank"]


def test_the_page_shows_the_nearest_and_the_cloaked_photo(answers, tmp_path):
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<li class=") == sum(len(entry["near"]) for entry in answers["answers"])
    assert page.count('<li class="cloak"') == 2
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert str(tmp_path) not in page


def test_a_second_run_embeds_nothing_and_a_changed_photo_is_refused(
    answers, data, cloaked, tmp_path, monkeypatch
):
    def embed(*arguments):
        raise AssertionError("embedded again")

    monkeypatch.setattr(embeddings, "_embed", embed)
    flags = _flags(data, cloaked, tmp_path / "out")
    _call(*flags)
    again = json.loads((tmp_path / "out" / "result.json").read_text())
    assert again["answers"] == answers["answers"]
    Image.new("RGB", (24, 24), (9, 9, 9)).save(cloaked / "p0" / "1_cloaked.png")
    assert "p0/1_cloaked.png has changed" in _call(*flags)


def test_what_cannot_be_used_is_named(data, cloaked, tmp_path):
    (cloaked / "p2").mkdir()
    Image.new("RGB", (24, 24), (1, 2, 3)).save(cloaked / "p2" / "7_cloaked.png")
    (cloaked / "p2" / "8_cloaked.png").write_bytes(b"no photo")
    result, complete = _call(*_flags(data, cloaked, tmp_path / "out"))
    assert not complete
    named = {item["image"]: item["reason"] for item in result["not_handled"]}
    assert named["p2/7_cloaked.png"] == "its original is not in --data"
    assert set(named) == {"p2/7_cloaked.png", "p2/8_cloaked.png"}


def test_a_cloak_without_a_face_is_an_answer_and_a_query_without_one_is_not(
    data, cloaked, tmp_path
):
    black = Image.new("RGB", (24, 24))
    black.save(cloaked / "p0" / "1_cloaked.png")
    for number in (1, 2):
        black.save(data / "p1" / f"{number}.png")
    result, complete = _call(*_flags(data, cloaked, tmp_path / "out"))
    (entry,) = json.loads((tmp_path / "out" / "result.json").read_text())["answers"]
    assert entry["person"] == "p0" and entry["cloaked"]["rank"] is None
    assert not entry["cloaked"]["verified"] and entry["original"]["verified"]
    assert not complete and result["not_handled"][0]["reason"] == "no face was found"


def test_wrong_usage_is_named(data, cloaked, tmp_path):
    common = (f"--data={data}", "--extractors=dlib")
    assert "--data is needed" in _call()
    wrong = {
        "2 others to enroll": ("--gallery_people=2",),
        "no extractor 'magic'": ("--extractors=magic",),
        "must have one name": (f"--extractors={tmp_path / 'a' / 'x'},{tmp_path / 'b' / 'x'}",),
        "surrogates must name": ("--surrogates=",),
        "nowhere does not exist": (f"--cloaked={tmp_path / 'nowhere'}",),
        "4 such people": (f"--cloaked={cloaked}", "--people=4"),
    }
    for number, (expected, flags) in enumerate(wrong.items()):
        assert expected in _call(*common, f"--workdir={tmp_path / str(number)}", *flags)


def test_all_is_every_extractor_with_weights(monkeypatch):
    monkeypatch.setattr(registry, "present", lambda: ("sface", "dlib"))
    config = pubfig_study.PubFigConfig(weights=("mobilefacenet_192=file",))
    assert pubfig_study._names(config)[0] == ["dlib", "sface", "mobilefacenet_192"]


def test_toy_cloaks_two_people(tmp_path, monkeypatch):
    monkeypatch.undo()
    result, complete = _call("--toy", f"--workdir={tmp_path}")
    assert complete and len(result["people"]) == 2
    (row,) = result["extractors"]
    assert row["made_against"] and row["original_verified"] == 2
    assert len(list(pathlib.Path(tmp_path).glob("cloaked/**/*.png"))) == 2
    shutil.rmtree(tmp_path / "photos")  # As a run that was killed while it embedded.
    again, _ = _call("--toy", f"--workdir={tmp_path}")
    assert again["extractors"] == result["extractors"]
