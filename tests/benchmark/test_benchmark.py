"""The benchmark: turns and tables, agreement of detectors, the program."""

import json
import os
import pathlib
import stat
import sys

import numpy as np
import programs
import pytest
import skimage.data
from PIL import Image

from afr_jax.benchmark import cloaking, database, detection, folder, program, timing
from afr_jax.benchmark import photos as photo_source
from afr_jax.core import options
from afr_jax.evaluation import reference
from afr_jax.evaluation.attackers import other_detectors
from afr_jax.models import mtcnn
from afr_jax.models.extractors import registry
from afr_jax.recognition import detect


@pytest.fixture(scope="module")
def stub_python(tmp_path_factory):
    """An interpreter that runs the stub whatever program it is given."""
    path = tmp_path_factory.mktemp("stub") / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{programs.STUB_DRIVER}"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_sides_take_turns_and_the_first_run_does_not_count():
    calls = []

    def side(name):
        def run():
            calls.append(name)
            return float(len(calls))

        return run

    times = timing.take_turns({"a": side("a"), "b": side("b")}, repeats=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert times == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}


def test_ratios_are_taken_round_by_round():
    row = timing.compare("detection", "ms", [10.0, 20.0, 40.0], [20.0, 60.0, 60.0])
    assert row["ours"] == {"median": 20, "low": 10, "high": 40, "samples": [10, 20, 40]}
    assert row["ratio"]["samples"] == [2.0, 3.0, 1.5]
    assert timing.compare("detection", "ms", [1.0], None)["ratio"] is None


def test_table():
    rows = [
        timing.compare("a", "ms", [1.0, 2.0, 3.0], [2.0, 8.0, 3000.4]),
        timing.state("a", "share", 0.98765, None),
    ]
    assert timing.table(rows).splitlines() == [
        "|   |       |    ours |  reference | reference / ours |",
        "| - | ----- | ------: | ---------: | ---------------: |",
        "| a | ms    | 2 (1-3) | 8 (2-3000) |       4 (2-1000) |",
        "| a | share |   0.988 |            |                  |",
    ]


def _faces(*rows, shift=0.0):
    """Faces of (y0, x0, side, confidence), all landmarks in the middle, moved right by `shift`."""
    values = np.array(rows, np.float32).reshape(-1, 4)
    boxes = np.concatenate([values[:, :2], values[:, :2] + values[:, 2:3]], axis=1)
    middle = values[:, :2] + values[:, 2:3] / 2 + np.array([0.0, shift], np.float32)
    return detect.Faces(boxes, values[:, 3], np.repeat(middle[:, None], 5, axis=1))


@pytest.mark.parametrize(
    "ours, theirs, found, known",
    [
        ([(0, 0, 20, 0.99)], [(0, 0, 20, 0.99)], [True], [True]),
        # 20 x 19 of 20 x 20 pixels are 0.95, two boxes moved by 2 share 18 / 22.
        ([(0, 0, 20, 0.99)], [(0, 2, 20, 0.99)], [False], [False]),
        # Who is unsure is not asked, but counts as an answer.
        ([(0, 0, 20, 0.99)], [(0, 0, 20, 0.85)], [True], []),
        ([(0, 0, 20, 0.99), (50, 50, 20, 0.95)], [(50, 50, 20, 1.0)], [False, True], [True]),
        ([], [(0, 0, 20, 0.99)], [], [False]),
        ([(0, 0, 20, 0.99)], [], [False], []),
        ([], [], [], []),
    ],
)
def test_agreement(ours, theirs, found, known):
    result = detection.compare(_faces(*ours), _faces(*theirs))
    assert result.ours.tolist() == found
    assert result.theirs.tolist() == known
    assert len(result.landmark_errors) == sum(found)


def test_landmark_errors_are_shares_of_the_references_width():
    ours, theirs = _faces((50, 50, 40, 1), (0, 0, 20, 1)), _faces((0, 0, 20, 1), (50, 50, 40, 1))
    theirs.landmarks[0, 3] += [3.0, 4.0]
    errors = detection.compare(ours, theirs).landmark_errors
    np.testing.assert_allclose(errors, [0.0, 0.25], atol=1e-6)


def test_faces_of_the_package_are_read():
    with reference.ReferenceProcess(sys.executable, programs.STUB_DRIVER) as other:
        paths = [pathlib.Path("a.npy")]
        seconds, (faces,) = other_detectors.ask_mtcnn(other, paths, detect.DetectorOptions())
    assert seconds == [0.5]
    assert faces.boxes.tolist() == [[20, 10, 70, 50]]
    assert faces.landmarks[0].tolist() == [[30 + i, 20 + i] for i in range(5)]


def test_chips_are_the_given_faces_then_shaken_ones():
    extractor = registry.get("dlib")
    pixels = skimage.data.astronaut()
    points = np.array([[100, 204], [102, 245], [126, 224], [139, 202], [140, 244]], np.float32)
    chips = cloaking.cut_chips(extractor, [(pixels, points)], 3, seed=1)
    assert chips.shape == (3, 150, 150, 3) and chips.dtype == np.uint8
    # The point between the eyes lies in the chip where the template has it.
    middle = np.mean(extractor.template[:2], axis=0).round().astype(int)
    np.testing.assert_allclose(chips[0][tuple(middle)], pixels[101, 224], atol=25)
    gaps = np.abs(np.diff(chips.astype(int), axis=0)).mean(axis=(1, 2, 3))
    assert (gaps > 1).all() and (gaps < 40).all()
    again = cloaking.cut_chips(extractor, [(pixels, points)], 3, seed=1)
    np.testing.assert_array_equal(chips, again)


def _run(*flags):
    """The result and whether it is complete, of a toy run in this process; or a message."""
    return programs.call(program.BenchmarkConfig, program.run, "--toy", *flags)


def test_benchmark_with_references(tmp_path, stub_python, monkeypatch, capfd):
    # The old name of the flag.
    flags = [f"--peer_python={stub_python}", f"--workdir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["benchmark", "--toy", *flags])
    result, complete = _run(*flags)
    assert complete
    assert json.loads((tmp_path / "result.json").read_text()) == result
    rows = {(row["row"].split(",")[0], row["quantity"]): row for row in result["rows"]}
    speed = rows["detection", "ms per photo"]
    assert speed["peer"]["median"] == 500
    assert speed["ratio"]["median"] == pytest.approx(
        np.median([500 / sample for sample in speed["ours"]["samples"]])
    )
    # The stub's face is nobody's.
    assert rows["detection", "share of them that the other finds"]["peer"] == 0
    assert rows["cloaking", "ms per face and step"]["peer"]["median"] == pytest.approx(5e4)
    assert rows["cloaking", "mean distance by dlib"]["ours"] > 0
    assert 0 < rows["cloaking", "largest DSSIM"]["ours"] < 0.008
    assert rows["cloaking", "share of a step outside the net"]["ours"]["high"] < 1
    assert result["note"] is None
    assert set(result["peers"]) == {"detection", "cloaking"}
    table = (tmp_path / "benchmark.md").read_text()
    assert table in capfd.readouterr().err
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(result["rows"]) and len(set(map(len, lines))) == 1
    assert result["command"] == (
        "python -m experiments.benchmark --toy --peer_python=$REFERENCE_PYTHON --workdir=$WORKDIR"
    )
    assert str(tmp_path) not in json.dumps(result) and str(stub_python) not in json.dumps(result)


def test_benchmark_without_references_says_how_to_get_them(tmp_path, capfd):
    flags = ["--rows=detection,database", "--repeats=1", "--num_photos=1"]
    result, complete = _run(*flags, f"--workdir={tmp_path}")
    assert complete and all(row["peer"] is None for row in result["rows"])
    assert {row["row"].split(",")[0] for row in result["rows"]} == {"detection", "database"}
    assert "experiments/reference/README.md" in result["note"]
    assert result["note"] in (tmp_path / "benchmark.md").read_text()
    assert result["note"] in capfd.readouterr().err


def test_a_folder_is_detected_cold_and_warm(tmp_path, stub_python):
    flags = ["--rows=folder", "--repeats=1", f"--reference_python={stub_python}"]
    result, complete = _run(*flags, f"--workdir={tmp_path}")
    assert complete
    cold, warm = result["rows"]
    assert (cold["quantity"], warm["quantity"]) == ("s, cold", "s, warm")
    # The stub takes half a second for each of two photos.
    assert cold["peer"]["samples"] == warm["peer"]["samples"] == [1.0]
    found = result["folder"]
    assert cold["ours"]["median"] == found["cold"]["seconds"]
    for each in (found["cold"], found["warm"]):
        assert 3 <= each["programs"] <= 8 and 0 < each["compile_seconds"] < each["seconds"]
        assert each["peak_bytes"] > 1e8
    assert found["yunet_seconds"]["median"] > 0


def test_photos_of_a_folder_are_cloaked_cold_and_warm(tmp_path, monkeypatch):
    started = []

    def start(command, cache):
        started.append((command[0], cache.name, cache.exists()))
        cache.mkdir(exist_ok=True)
        return folder._Run(100.0 - len(started), 5, 1.0, 1 << 30)

    monkeypatch.setattr(folder, "_start", start)
    flags = ["--rows=folder", "--repeats=2", "--folder_cloaks=1", "--folder_group=1"]
    result, _ = _run(*flags, f"--workdir={tmp_path}")
    cloaks = [each[1:] for each in started if each[0] == "cloak"]
    caches = ("0000_cache", "group_cache")
    assert cloaks == [(cache, is_full) for cache in caches for is_full in (False, True, True)]
    for name, key, first in (
        ("cloak, 1 of ", "cloak", 99.0),
        ("cloak, a photo of 1 MP", "group", 96.0),
    ):
        rows = {row["quantity"]: row for row in result["rows"] if row["row"].startswith(name)}
        assert rows["s, cold"]["ours"]["samples"] == [first]
        assert rows["s, warm"]["ours"]["samples"] == [first - 1, first - 2]
        assert result["folder"][f"{key}_warm"]["seconds"] == first - 2


def test_the_large_photo_has_three_large_faces():
    pixels = photo_source.group(1.2)
    assert abs(pixels.size / 3e6 - 1.2) < 0.01
    found = detect.detect_faces(mtcnn.load_variables(), pixels)
    sides = found.boxes[:, 2] - found.boxes[:, 0]
    assert len(sides) == 3 and sides.min() > 0.12 * pixels.shape[1]


def test_a_database_that_is_kept_has_vectors_of_one_seed(tmp_path):
    small = {"dimension": 8, "num_probes": 8, "repeats": 1, "keep": True}
    rows = database.measure(tmp_path, [60], **small)
    assert database.measure(tmp_path, [60], **small)[0]["row"] == rows[0]["row"]
    with pytest.raises(options.UsageError, match="vectors of --seed=0"):
        database.measure(tmp_path, [60], seed=1, **small)


@pytest.mark.parametrize("side", [(60, 400), (400, 60), (300, 300), (1, 1)])
def test_photos_of_any_size_are_the_middle_of_others(side):
    pixels = np.full((*side, 3), 200, np.uint8)
    shapes = [photo_source.of_any_size(pixels, (0, number)).shape for number in range(20)]
    areas = [rows * columns for rows, columns, _ in shapes]
    assert 0.9e5 < min(areas) < 3e5 and 2e6 < max(areas) < 4.5e6
    if side == (300, 300):
        ratios = [columns / rows for rows, columns, _ in shapes]
        assert 0.65 < min(ratios) < 0.8 and 1.3 < max(ratios) < 1.52


def test_agreement_of_detectors_lists_every_disagreement(tmp_path, stub_python):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(6):
        Image.new("RGB", (60, 80), (90, 120, 200)).save(photos / f"{number}.png")
    (photos / "5.png").write_text("no photo")
    flags = [f"--images={photos}", f"--reference_python={stub_python}"]
    flags += ["--rows=detector_agreement", f"--workdir={tmp_path / 'out'}"]
    result, complete = _run(*flags)
    assert complete
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    found = result["detector_agreement"]
    counts = {"ours": 0, "ours_found": 0, "theirs": 2, "theirs_found": 0}
    assert found["confident_faces"] == counts
    first = {"image": "0.png", "found_by": "theirs", "box": [20, 10, 70, 50], "best_iou": 0}
    assert found["disagreements"][0] == first | {"confidence": pytest.approx(0.99)}
    assert [item["image"] for item in found["disagreements"]] == ["0.png", "3.png"]
    result, complete = _run("--max_photos=6", *flags)
    assert not complete
    assert [item["image"] for item in result["detector_agreement"]["unreadable"]] == ["5.png"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rows=detection,speed"], "'speed', must be one of detection, folder, cloaking"),
        (["--peer_python=no/python", "--rows=detection"], "no/python cannot be started"),
        (["--rows=detector_agreement", "--images=tests"], "--reference_python is needed"),
        (["--rows=detector_agreement"], "--images is needed"),
        (["--rows=extractor_agreement"], "--reference_python is needed"),
        (["--rows=extractor_agreement", "--networks=openface,nobody"], "'nobody', must be one of"),
        (["--rows=extractor_agreement", "--mobilefacenet=nowhere"], "there is no nowhere/mobile"),
    ],
)
def test_wrong_usage(tmp_path, flags, message):
    answer = _run(f"--workdir={tmp_path}", *flags)
    assert isinstance(answer, str) and message in answer, answer
    assert not (tmp_path / "result.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    "AFR_REFERENCE_PYTHON" not in os.environ, reason="AFR_REFERENCE_PYTHON is not set"
)
def test_the_real_references_work_and_attack_the_same_net(tmp_path):
    extractor = registry.get("dlib")
    points = np.array([[100, 204], [102, 245], [126, 224], [139, 202], [140, 244]], np.float32)
    chips = cloaking.cut_chips(extractor, [(skimage.data.astronaut(), points)], 2)
    np.save(tmp_path / "chips.npy", chips)
    with reference.ReferenceProcess(
        os.environ["AFR_REFERENCE_PYTHON"], reference.DRIVERS / "fawkes_driver.py"
    ) as other:
        theirs = other.call("embed", chips=str(tmp_path / "chips.npy"))["embeddings"]
    ours = registry.embed(extractor, extractor.load(), chips.astype(np.float32) / 255)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.save(tmp_path / "photo.npy", skimage.data.astronaut())
    with reference.ReferenceProcess(
        os.environ["AFR_REFERENCE_PYTHON"], reference.DRIVERS / "mtcnn_driver.py"
    ) as other:
        options = detect.DetectorOptions()
        _, (faces,) = other_detectors.ask_mtcnn(other, [tmp_path / "photo.npy"], options)
    np.testing.assert_allclose(faces.landmarks[0], points, atol=2)
