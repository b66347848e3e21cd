"""The make_unlearnable and unlearnable_study programs from the outside, on toy data."""

import itertools
import json
import types

import numpy as np
import programs
import pytest
from PIL import Image

from afr_jax.core import program
from afr_jax.data import array_records, identities, image_sets, noise_files
from afr_jax.evaluation.unlearnable import protect, study


def _make(*flags):
    return programs.call_alone(protect.MakeUnlearnableConfig, protect.run, *flags)


def _study(*flags):
    return programs.call_alone(study.UnlearnableStudyConfig, study.run, "--toy", *flags)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Three classes of eight images; a gray one, a larger one and half a file among them."""
    folder = tmp_path_factory.mktemp("tree")
    programs.save_synthetic(folder, 24, num_classes=3)
    Image.new("L", (16, 16), 90).save(folder / "class_00/gray.png")
    Image.new("RGB", (40, 30), (9, 9, 9)).save(folder / "class_01/large.png")
    (folder / "class_02/half.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
    return folder


@pytest.fixture(scope="module")
def made(tree, tmp_path_factory):
    """Result of a search, whether it is complete, and its output folder."""
    output = tmp_path_factory.mktemp("made") / "out"
    return *_make(f"--data={tree}", f"--output_dir={output}", "--toy"), output


def test_images_noise_and_result_belong_together(made, tree):
    result, complete, output = made
    assert not complete
    protected = image_sets.load_image_folder(output / "images")
    originals = image_sets.load_image_folder(tree)
    assert protected.sample_ids == originals.sample_ids and len(protected.sample_ids) == 25
    noise = noise_files.read_noise(output / "noise.npz")
    assert noise.names == originals.sample_ids and noise.settings["method"] == "error_min"
    change = protected.images.astype(int) - originals.images
    assert np.abs(change).max() <= 8 and (change < 0).any() and (change > 0).any()
    np.testing.assert_array_equal(noise.apply(originals).images, protected.images)
    assert json.loads((output / "result.json").read_text()) == result
    assert result["largest_change_levels"] == np.abs(change).max()
    reasons = {item["image"]: item["reason"] for item in result["not_handled"]}
    assert sorted(reasons) == ["class_01/large.png", "class_02/half.png"]
    assert reasons["class_01/large.png"] == "is 30 x 40 px, not 16 x 16"


def test_originals_stay_and_a_second_run_writes_the_same(made, tree):
    result, _, output = made
    before = {
        path: path.read_bytes()
        for path in [*tree.rglob("*.png"), *output.rglob("*.*")]
        if path.is_file() and "work" not in path.parts
    }
    assert _make(f"--data={tree}", f"--output_dir={output}", "--toy") == (result, False)
    assert all(path.read_bytes() == data for path, data in before.items())


def test_noise_of_other_images_is_not_taken_up(tmp_path):
    """As many images of as many classes, but not the same ones: rows would not fit."""
    programs.save_synthetic(tmp_path / "tree", 24, num_classes=3)
    flags = [f"--data={tmp_path / 'tree'}", f"--output_dir={tmp_path / 'out'}", "--toy"]
    assert _make(*flags)[1]
    first = min((tmp_path / "tree" / "class_00").iterdir())
    first.rename(first.with_name("zz.png"))
    message = _make(*flags)
    assert "images_sha256" in str(message)


def test_a_tfds_set_is_protected_like_its_tree(tmp_path):
    programs.save_synthetic(tmp_path / "tree", 24, num_classes=3)
    listing = identities.list_tree(tmp_path / "tree")
    array_records.write_listing(listing, tmp_path / "sets", name="toy")
    shared = ["--method=random", f"--tfds_dir={tmp_path / 'sets'}"]
    outputs = [tmp_path / name for name in ("npz", "records", "other")]
    (of_tree, _), (of_set, _), _, message = (
        _make(*flags, *shared)
        for flags in (
            [f"--data={tmp_path / 'tree'}", f"--output_dir={outputs[0]}"],
            ["--data=tfds:toy", f"--output_dir={outputs[1]}", "--noise_format=array_record"],
            ["--data=tfds:toy", f"--output_dir={outputs[2]}", "--seed=1"],
            ["--data=tfds:missing", f"--output_dir={tmp_path / 'none'}"],
        )
    )
    assert "no data set missing" in message
    assert of_tree["images"] == of_set["images"] == 24
    images = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}
        for folder in outputs
    ]
    assert images[0] == images[1] and len(images[0]) == 24
    assert images[0].keys() == images[2].keys() and images[0] != images[2]
    noise, again = (
        noise_files.read_noise(outputs[0] / "noise.npz"),
        noise_files.read_noise(outputs[1] / "noise"),
    )
    assert again.names == noise.names and again.granularity == noise.granularity
    assert again.settings["data"] == "tfds:toy" and again.settings["method"] == "random"
    np.testing.assert_array_equal(again.levels, noise.levels)
    assert not (outputs[1] / "noise.npz").exists()


def test_wrong_usage_is_said(tree, tmp_path):
    output = f"--output_dir={tmp_path / 'out'}"
    cases = [
        ([output], "--data"),
        ([f"--data={tree}", f"--output_dir={tree / 'out'}"], "within each other"),
        ([f"--data={tree}", output, "--method=cuda"], "one filter a class"),
        ([f"--data={tree}", output, "--image_px=64"], "64 x 64"),
    ]
    for flags, part in cases:
        answer = _make(*flags)
        assert isinstance(answer, str) and part in answer, (flags, answer)


def test_flags_reach_the_search():
    flags = ["--method=rem", "--granularity=class", "--epsilon=4", "--views=2", "--step_levels=1.5"]
    config = program.parse(protect.MakeUnlearnableConfig, [*flags, "--width=8"])
    search = config.noise().search_options()
    assert (search.epsilon, search.views, search.step_size) == (4 / 255, 2, 1.5 / 255)
    assert search.train_steps == 250 and config.noise().network.width == 8
    small = config.toy().noise()
    assert small.search_options().train_steps == 4 and small.search_options().views == 2
    assert small.network.architecture == "small_resnet"


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """The toy study in bfloat16, and then in float32: (result, work folder) of each."""
    folder = tmp_path_factory.mktemp("study")
    found = {}
    for name, flags in (("float32", []), ("bfloat16", ["--bfloat16", "--granularities=class"])):
        work = folder / name
        result, complete = _study("--methods=error_min,random", f"--workdir={work}", *flags)
        assert complete
        found[name] = result, work
    return found


def test_a_victim_learns_clean_data_and_not_error_min_data(studies):
    """The acceptance run in small: made-up images, four classes."""
    result, _ = studies["float32"]
    last = {row["data"]: row["last_accuracy"] for row in result["rows"]}
    assert last["clean"] > 0.8, last
    for granularity in ("sample", "class"):
        assert last[f"error_min {granularity}"] < 0.6, last
        assert last[f"random {granularity}"] > last[f"error_min {granularity}"] + 0.15, last
    assert all(result["verdict"].values()), result["verdict"]


def test_bfloat16_does_not_change_the_conclusion(studies):
    result, _ = studies["bfloat16"]
    assert result["settings"]["victim"]["network"]["bfloat16"]
    last = {row["data"]: row["last_accuracy"] for row in result["rows"]}
    assert last["clean"] > 0.8 and last["error_min class"] < 0.6, last


def test_a_study_goes_on_cell_by_cell(studies):
    result, work = studies["float32"]
    cells = sorted((work / "cells").iterdir())
    assert len(cells) == 5
    times = {path: path.stat().st_mtime_ns for path in cells[1:]}
    first = cells[0].read_bytes()
    cells[0].unlink()
    again, _ = _study("--methods=error_min,random", f"--workdir={work}")
    assert cells[0].read_bytes() == first
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert again["rows"] == result["rows"]
    for name in ("matrix.csv", "matrix.png", "curves.csv", "curves.png", "result.json"):
        assert (work / name).stat().st_size > 100


def test_a_study_takes_one_seed_after_the_other():
    flags = ["--methods=error_min,cuda", "--countermeasures=none,purifier", "--seeds=2,1"]
    flags += ["--poison_rates=1,0.5", "--architectures=small_resnet,vgg11"]
    cells = program.parse(study.UnlearnableStudyConfig, flags).cells()
    assert [cell.seed for cell in cells] == [2] * 14 + [1] * 14
    names = [(c.data_name, c.countermeasure, c.architecture) for c in cells[:14]]
    data = ["clean", "error_min sample", "error_min class", "cuda class"]
    assert names[:8] == [(d, c, "small_resnet") for c in ("none", "purifier") for d in data]
    # Other rates of the first method, other architectures of all: without a countermeasure.
    assert names[8:10] == [(f"{d} 50 %", "none", "small_resnet") for d in data[1:3]]
    assert names[10:] == [(d, "none", "vgg11") for d in data]


def test_a_study_ends_with_its_time_and_shows_what_is_there(tmp_path, monkeypatch):
    """A minute goes by with every look at the clock: each run has time for one victim."""
    minutes = itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: 60.0 * next(minutes))
    monkeypatch.setattr(study, "time", clock)
    flags = ["--methods=random", "--granularities=sample", "--countermeasures=purifier"]
    flags += [f"--workdir={tmp_path}", "--train_images=300"]
    assert "--max_minutes" in _study("--max_minutes=0", *flags)
    result, complete = _study("--max_minutes=1", *flags)
    assert not complete and (result["cells"], result["cells_missing"]) == (2, 1)
    assert [row["data"] for row in result["rows"]] == ["clean"]
    assert result["settings"]["train_images"] == 300
    # The purifier leaves what there is to learn.
    assert result["rows"][0]["last_accuracy"] > 0.7
    result, complete = _study("--max_minutes=1", *flags)
    assert complete and result["cells_missing"] == 0
    assert [row["data"] for row in result["rows"]] == ["clean", "random sample"]


def test_studies_refuse_what_they_do_not_know(tmp_path):
    for flags, part in (
        (["--methods=other"], "--methods"),
        (["--poison_rates=0"], "poison_rates"),
        (["--seeds="], "seeds"),
        (["--seeds=x"], "--seeds"),
    ):
        answer = _study(*flags, f"--workdir={tmp_path / 'work'}")
        assert isinstance(answer, str) and part in answer, (flags, answer)
