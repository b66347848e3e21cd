"""The make_unlearnable and unlearnable_study programs from the outside, on toy data."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from afr_jax.data import image_sets, noise_files

_ROOT = pathlib.Path(__file__).resolve().parent.parent

# Calls a program with several command lines in one process; prints what it says of each.
_DRIVER = """
import importlib, json, sys
from absl import flags
from absl.testing import flagsaver
from afr_jax.core import run

program = importlib.import_module(f"experiments.{sys.argv[1]}")
run.define_flags()
flags.FLAGS(["program"])
for line in json.loads(sys.argv[3]):
    with flagsaver.flagsaver():
        flags.FLAGS(["program", *line])
        try:
            print(json.dumps(getattr(program, sys.argv[2])()[0]))
        except run.UsageError as error:
            print(json.dumps(str(error)))
"""


def _messages(module, function, lines):
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, module, function, json.dumps(lines)],
        cwd=_ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _run(module, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
        cwd=_ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    result = json.loads(done.stdout) if done.stdout else None
    return done, result


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Three classes of eight images; a grey one, a larger one and half a file among them."""
    folder = tmp_path_factory.mktemp("tree")
    data = image_sets.made_up(0, 24, num_classes=3)
    noise_files.write_images(folder, data.sample_ids, data.images)
    Image.new("L", (16, 16), 90).save(folder / "class_00/grey.png")
    Image.new("RGB", (40, 30), (9, 9, 9)).save(folder / "class_01/large.png")
    (folder / "class_02/half.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
    return folder


@pytest.fixture(scope="module")
def made(tree, tmp_path_factory):
    """A search, its process, result and output folder."""
    output = tmp_path_factory.mktemp("made") / "out"
    return *_run("make_unlearnable", f"--data={tree}", f"--output_dir={output}", "--toy"), output


def test_images_noise_and_result_belong_together(made, tree):
    done, result, output = made
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("\n") == 1
    protected = image_sets.read_tree(output / "images")
    originals = image_sets.read_tree(tree)
    assert protected.sample_ids == originals.sample_ids and len(protected.sample_ids) == 25
    noise, settings = noise_files.read_noise(output / "noise.npz")
    assert noise.names == originals.sample_ids and settings["method"] == "error_min"
    change = protected.images.astype(int) - originals.images
    assert np.abs(change).max() <= 8 and (change < 0).any() and (change > 0).any()
    names = [originals.classes[label] for label in originals.labels]
    again = noise_files.apply(originals.images, noise, originals.sample_ids, names)
    np.testing.assert_array_equal(again, protected.images)
    assert result["largest_change_levels"] == np.abs(change).max()
    reasons = {item["image"]: item["reason"] for item in result["not_handled"]}
    assert sorted(reasons) == ["class_01/large.png", "class_02/half.png"]
    assert reasons["class_01/large.png"] == "is 30 x 40 px, not 16 x 16"


def test_originals_stay_and_a_second_run_writes_the_same(made, tree):
    _, result, output = made
    before = {
        path: path.read_bytes()
        for path in [*tree.rglob("*.png"), *output.rglob("*.*")]
        if path.is_file() and "work" not in path.parts
    }
    done, again = _run("make_unlearnable", f"--data={tree}", f"--output_dir={output}", "--toy")
    assert again == result, done.stderr
    assert all(path.read_bytes() == data for path, data in before.items())


def test_wrong_usage_is_said(tree, tmp_path):
    output = f"--output_dir={tmp_path / 'out'}"
    cases = [
        ([output], "--data"),
        ([f"--data={tree}", f"--output_dir={tree / 'out'}"], "within each other"),
        ([f"--data={tree}", output, "--method=cuda"], "one filter a class"),
        ([f"--data={tree}", output, "--image_px=64"], "64 x 64"),
    ]
    lines = [arguments for arguments, _ in cases]
    messages = _messages("make_unlearnable", "make_unlearnable_program", lines)
    for message, (_, part) in zip(messages, cases, strict=True):
        assert part in message


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The toy study in bfloat16, and then in float32: (result, work folder) of each."""
    folder = tmp_path_factory.mktemp("study")
    found = {}
    for name, flags in (("float32", []), ("bfloat16", ["--bfloat16", "--granularities=class"])):
        work = folder / name
        done, result = _run(
            "unlearnable_study", "--toy", "--methods=error_min,random", f"--workdir={work}", *flags
        )
        assert done.returncode == 0, done.stderr
        found[name] = result, work
    return found


def test_a_victim_learns_clean_data_and_not_error_min_data(study):
    """The acceptance run in small: made-up images, four classes."""
    result, _ = study["float32"]
    last = {row["data"]: row["last_accuracy"] for row in result["rows"]}
    assert last["clean"] > 0.8, last
    for granularity in ("sample", "class"):
        assert last[f"error_min {granularity}"] < 0.6, last
        assert last[f"random {granularity}"] > last[f"error_min {granularity}"] + 0.15, last
    assert all(result["verdict"].values()), result["verdict"]


def test_bfloat16_does_not_change_the_conclusion(study):
    result, _ = study["bfloat16"]
    assert result["settings"]["victim"]["bfloat16"]
    last = {row["data"]: row["last_accuracy"] for row in result["rows"]}
    assert last["clean"] > 0.8 and last["error_min class"] < 0.6, last


def test_a_study_goes_on_cell_by_cell(study):
    result, work = study["float32"]
    cells = sorted((work / "cells").iterdir())
    assert len(cells) == 5
    times = {path: path.stat().st_mtime_ns for path in cells[1:]}
    first = cells[0].read_bytes()
    cells[0].unlink()
    done, again = _run(
        "unlearnable_study", "--toy", "--methods=error_min,random", f"--workdir={work}"
    )
    assert done.returncode == 0, done.stderr
    assert cells[0].read_bytes() == first
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert again["rows"] == result["rows"]
    for name in ("matrix.csv", "matrix.png", "curves.csv", "curves.png", "result.json"):
        assert (work / name).stat().st_size > 100
