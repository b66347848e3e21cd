"""What the worker does for each page, with stand-ins for the networks where they do not matter."""

import io
import json
import zipfile

import numpy as np
import programs
import pytest
from PIL import Image

from afr_jax.app import app_program, limits, orders, words
from afr_jax.app.tasks import cloaking, dataset, models, outputs, pair, patches, people
from afr_jax.core import options, parallel, progress
from afr_jax.data import image_sets, video
from afr_jax.evaluation.unlearnable import protect
from afr_jax.methods.cloaking import face_filter
from afr_jax.methods.unlearnable import recipes

_RESULTS = programs.ROOT / "experiments" / "results"


@pytest.fixture(scope="module")
def loaded():
    return models.Models(app_program.AppConfig(surrogates=("dlib",)).toy())


def _entry(path, name=None):
    return {"path": str(path), "name": name or path.name}


def _check_outputs(result, folder):
    """Every file that a result names is there, inside of its folder."""
    for entry in result["outputs"].values():
        path = folder / entry["path"]
        assert path.is_file() and folder in path.resolve().parents
    json.dumps(result)


def test_a_pair_gets_a_verdict_of_each_extractor(loaded, monkeypatch, tmp_path):
    programs.stand_in(monkeypatch)
    programs.save_photo(tmp_path / "a.png", (200, 0, 0))
    programs.save_photo(tmp_path / "b.png", (200, 0, 1))
    programs.save_photo(tmp_path / "c.png", (0, 200, 0))
    programs.save_photo(tmp_path / "none.png", (0, 0, 0))
    a, b, c = (_entry(tmp_path / f"{name}.png") for name in "abc")
    near = pair.run(loaded, tmp_path, {"first": a, "second": b})
    far = pair.run(loaded, tmp_path, {"first": a, "second": c})
    assert [v["name"] for v in near["verdicts"]] == ["dlib"]
    assert far["verdicts"][0]["same"] is False and far["verdicts"][0]["share"] > 1
    assert near["faces"] == [1, 1] and near["names"] == ["a.png", "b.png"]
    _check_outputs(near, tmp_path)
    with pytest.raises(limits.Refused, match=r"^none.png: no face"):
        pair.run(loaded, tmp_path, {"first": a, "second": _entry(tmp_path / "none.png")})
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(limits.Refused, match=r"^torn.jpg: .*damaged"):
        pair.run(loaded, tmp_path, {"first": _entry(tmp_path / "torn.jpg"), "second": a})


def _save_people(folder):
    for name, color in {"anna/1": (200, 0, 0), "anna/2": (200, 9, 0), "bo/1": (0, 200, 0)}.items():
        programs.save_photo(folder / f"{name}.png", color)
    (folder / "bo" / "2.png").write_bytes(b"no photo")


@pytest.mark.parametrize("is_zip", [True, False])
def test_the_nearest_of_many_people_are_found(loaded, monkeypatch, tmp_path, is_zip):
    programs.stand_in(monkeypatch)
    _save_people(tmp_path / "people")
    found = sorted((tmp_path / "people").rglob("*.png"))
    names = [path.relative_to(tmp_path / "people").as_posix() for path in found]
    query = tmp_path / "query.png"
    programs.save_photo(query, (201, 1, 0))
    payload = {"query": _entry(query), "zip": None, "people": []}
    if is_zip:
        payload["zip"] = str(tmp_path / "people.zip")
        with zipfile.ZipFile(payload["zip"], "w") as archive:
            for path, name in zip(found, names, strict=True):
                archive.write(path, f"all/{name}")
    else:
        payload["people"] = [_entry(path, name) for path, name in zip(found, names, strict=True)]
    job = tmp_path / "job"
    job.mkdir()
    result = people.run(loaded, job, payload)
    (extractor,) = result["extractors"]
    assert (extractor["people"], extractor["photos"]) == (2, 3)
    (face,) = extractor["faces"]
    assert [match["person"] for match in face["matches"]] == ["anna", "anna", "bo"]
    assert face["matches"][0]["image"] == "anna/1.png" and face["matches"][0]["rank"] == 1
    assert result["num_problems"] == 1 and result["problems"][0].startswith("bo/2.png: ")
    _check_outputs(result, job)


def test_nobody_to_look_among_is_said(loaded, monkeypatch, tmp_path):
    programs.stand_in(monkeypatch)
    programs.save_photo(tmp_path / "query.png", (200, 0, 0))
    programs.save_photo(tmp_path / "black.png", (0, 0, 0))
    payload = {"query": _entry(tmp_path / "query.png"), "zip": None, "people": []}
    with pytest.raises(limits.Refused, match="no photo among"):
        people.run(loaded, tmp_path, payload)
    payload["people"] = [_entry(tmp_path / "black.png", "anna/1.png")]
    with pytest.raises(limits.Refused, match="no photo of these people"):
        people.run(loaded, tmp_path, payload)


def _data_zip(path, *, num_images=24, side=32):
    data = image_sets.synthetic(0, num_images, num_classes=3, side=side)
    with zipfile.ZipFile(path, "w") as archive:
        for sample, pixels in zip(data.sample_ids, data.images, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            archive.writestr(f"set/{sample}.png", buffer.getvalue())
        archive.writestr("set/class_00/torn.png", b"\x89PNG\r\n\x1a\n")
        archive.writestr("set/readme.txt", b"hello")
    return data


def test_a_protected_set_has_the_images_of_the_program(loaded, tmp_path):
    data = _data_zip(tmp_path / "set.zip")
    payload = {"zip": str(tmp_path / "set.zip"), "method": "lsp", "side_px": 32, "tried": False}
    job = tmp_path / "job"
    job.mkdir()
    heard = []
    with progress.told_to(lambda *words: heard.append(words)):
        result = dataset.run(loaded, job, payload)
    assert (result["num_images"], result["num_classes"]) == (24, 3)
    assert result["num_problems"] == 1 and result["problems"][0].startswith("class_00/torn.png: ")
    assert heard and result["victims"] == []
    _check_outputs(result, job)
    data.save(tmp_path / "data")
    config = protect.MakeUnlearnableConfig(
        data=image_sets.DataOptions(data=str(tmp_path / "data")),
        output_dir=str(tmp_path / "out"),
        method="lsp",
    )
    protect.run(config)
    with zipfile.ZipFile(job / "protected.zip") as archive:
        names = archive.namelist()
        assert sorted(names) == [f"{sample}.png" for sample in data.sample_ids]
        for name in names:
            expected = np.asarray(Image.open(tmp_path / "out" / "images" / name))
            found = np.asarray(Image.open(io.BytesIO(archive.read(name))))
            np.testing.assert_array_equal(found, expected)


def test_what_a_set_is_worth_is_tried_on_images_that_were_not_trained_on(
    loaded, monkeypatch, one_device, tmp_path
):
    # As a process of its own has it; four devices on few cores wait for each other.
    monkeypatch.setattr(parallel, "make_mesh", lambda: one_device)
    monkeypatch.setattr(dataset, "_VICTIMS", dataset._VICTIMS[:2])
    _data_zip(tmp_path / "set.zip")
    payload = {"zip": str(tmp_path / "set.zip"), "method": "lsp", "side_px": 32}
    job = tmp_path / "job"
    job.mkdir()
    result = dataset.run(loaded, job, {**payload, "tried": True})
    assert [victim["words"] for victim in result["victims"]] == [
        "the images as they are",
        "the protected images",
    ]
    assert all(0 <= victim["accuracy"] <= 100 for victim in result["victims"])
    assert {victim["num_test"] for victim in result["victims"]} == {6}


@pytest.mark.parametrize(
    "names, words",
    [
        (["a.png"], "folder of images for each of two classes"),
        (["x/a.png"], "two classes"),
        (["x/a.txt", "y/b.txt"], "two classes"),
    ],
)
def test_sets_that_are_none_are_refused(loaded, tmp_path, names, words):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    payload = {"zip": str(tmp_path / "set.zip"), "method": "lsp", "side_px": 32, "tried": False}
    with pytest.raises(limits.Refused, match=words):
        dataset.run(loaded, tmp_path, payload)
    with pytest.raises(limits.Refused, match="no such choice"):
        dataset.run(loaded, tmp_path, payload | {"method": "rm"})


def test_one_film_is_divided_and_its_figures_are_those_of_the_study(loaded, monkeypatch, tmp_path):
    frames = [video.Frame(f"f_{n}", np.full((8, 8, 3), n, np.uint8)) for n in range(10)]
    monkeypatch.setattr(video, "sample_film", lambda path, count: frames)
    seen = []

    def run(config):
        seen.append(config)
        row = {"rate": 0.5, "low": 0.2, "high": 0.8}
        table = {"0.709": row, "0.6": row | {"rate": None}, "mean": 0.5}
        result = {
            "test": {"variants": {"trained": table, "clean": table}, "num_frames": 4},
            "training": {"num_frames": 6},
            "pictures": {"paper_mm": {}},
            "robustness": {"num_frames": 4, "JPEG 50": {"clean": row, "trained": row}},
            "num_skipped": 0,
        }
        return options.Outcome(result)

    monkeypatch.setattr(patches.study, "run", run)
    payload = {"train": {"path": "x"}, "test": None, "placement": "mask", "length": "full"}
    payload["face_width_mm"] = "150"
    result = patches.run(loaded, tmp_path, payload)
    (config,) = seen
    assert config.patches.placement == "mask" and config.face_width_mm == 150
    counts = [len(list((tmp_path / part).iterdir())) for part in ("train", "test")]
    assert counts == [6, 4] and result["is_same_film"]
    assert result["factors"] == ["0.709", "0.6"]
    assert result["rows"][0] == {
        "name": "the trained patches",
        "cells": [
            {"rate": 50, "low": 20, "high": 80},
            {"rate": None, "low": None, "high": None},
        ],
    }
    assert result["checks"] == [
        {"name": "JPEG 50", "clean": 50, "trained": 50, "is_detector": False}
    ]

    def new_folder():
        folder = tmp_path / f"other_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return folder

    for wrong in ({"face_width_mm": "nan"}, {"face_width_mm": ""}, {"placement": "nose"}):
        with pytest.raises(limits.Refused):
            patches.run(loaded, new_folder(), payload | wrong)


def test_boxes_are_those_of_the_programs_option():
    text = cloaking._boxes([[1.5, 2.25, 10.0, 20.125], [0.1, 0.2, 0.3, 0.4]])
    found = face_filter.FaceFilter(faces=text).boxes
    np.testing.assert_allclose(found, [[1.5, 2.25, 10.0, 20.125], [0.1, 0.2, 0.3, 0.4]], rtol=1e-12)


def test_chosen_faces_become_boxes_only_where_they_are_not_the_usual_ones():
    faces = [
        {"box": [0, 0, 9, 9], "chosen": True, "free": True},
        {"box": [0, 9, 9, 19], "chosen": False, "free": True},
        {"box": [0, 20, 2, 22], "chosen": False, "free": False},
    ]
    assert orders._boxes(faces, [0]) is None
    assert orders._boxes(faces, [0, 2, 7, -1, "x", 0]) is None
    assert orders._boxes(faces, [1, 0]) == [[0, 0, 9, 9], [0, 9, 9, 19]]
    with pytest.raises(limits.Refused):
        orders._boxes(faces, [2])


def test_archives_of_the_same_content_are_the_same_file(tmp_path):
    for name in "ab":
        outputs.write_zip(tmp_path / name, [("x.png", b"1"), ("y.png", b"2")])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_choices_of_a_cloak_are_those_of_the_program(loaded):
    flow = loaded.flow({"mode": "low", "format": "jpeg"})
    assert (flow.method.mode, flow.file_format, flow.method.num_steps) == ("low", "jpeg", 4)
    assert flow.surrogates == ("dlib",)
    with pytest.raises(options.UsageError, match="no extractor"):
        loaded.flow({"surrogates": ["dlib", "../x"]})


def test_the_words_of_the_modes_are_what_was_measured():
    draws = ("protection_modes.json", "protection_second_draw.json")
    rows = [row for name in draws for row in json.loads((_RESULTS / name).read_text())["table"]]
    plain = {"method": "fawkes", "tracker": "nearest", "countermeasure": "none", "transfer": True}
    plain |= {"surrogates": "dlib+sface", "leak": 0}
    for mode, shown in words.MODES.items():
        wanted = {**plain, "budget": mode}
        shares = [
            round(100 * row["protection"])
            for row in rows
            if all(row[key] == value for key, value in wanted.items())
            # Other ways of aligning and embedding, and trackers that adapt, are not spoken of.
            and "@" not in row["extractor"]
            and "adaptive" not in row["extractor"]
        ]
        assert len(shares) == 6
        assert (shown.least, shown.most) == (min(shares), max(shares)), mode


def test_methods_of_the_page_are_the_librarys():
    assert set(dataset._METHODS) <= set(recipes.METHODS)
    for name in dataset._METHODS:
        assert dataset._method(name, 8, False).name == name
