"""The detect program from the outside: statuses, boxes, drawings, wrong usage."""

import errno
import io
import json
import os
import sys
import threading
import time

import numpy as np
import programs
import pytest
import skimage.data
from PIL import Image

from afr_jax.core import files
from afr_jax.recognition import detect
from afr_jax.recognition.tasks import detect_photos


def _call(*flags):
    return programs.call(detect_photos.DetectConfig, detect_photos.run, *flags)


@pytest.fixture
def stand_in(monkeypatch):
    """A detector without compilation: one face in every photo, but 40 rows break it."""

    def detect_faces(variables, pixels, *, options):
        if len(pixels) == 40:
            raise ZeroDivisionError("odd")
        points = np.zeros((1, 5, 2), np.float32)
        return detect.Faces(np.array([[1, 2, 9, 8]], np.float32), np.ones(1, np.float32), points)

    monkeypatch.setattr(detect, "detect_faces", detect_faces)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A face, no face, no photo, half a photo; the outputs go below the same folder."""
    folder = tmp_path_factory.mktemp("photos")
    portrait = Image.fromarray(skimage.data.astronaut()[:256, 96:352])
    (folder / "wörk").mkdir()
    portrait.save(folder / "wörk" / "face.jpg", quality=95)
    Image.new("RGB", (64, 48), (90, 120, 200)).save(folder / "sky.png")
    (folder / "notes.txt").write_text("no photo")
    (folder / "text.jpg").write_text("no photo")
    (folder / "half.jpg").write_bytes((folder / "wörk" / "face.jpg").read_bytes()[:2000])
    return folder


@pytest.fixture(scope="module")
def runs(photos):
    """A process and a run in this one with the same flags: (it, bytes of faces.json) each."""
    flags = [f"--images={photos}", f"--output_dir={photos / 'out'}", "--toy", "--draw"]
    done, _ = programs.run("detect", *flags)
    first = (photos / "out" / "faces.json").read_bytes()
    again = _call(*flags)
    return (done, first), (again, (photos / "out" / "faces.json").read_bytes())


def test_every_file_gets_its_status_and_the_result_names_the_bad_ones(runs):
    done, data = runs[0]
    records = {record["image"]: record for record in json.loads(data)["images"]}
    assert {name: record["status"] for name, record in records.items()} == {
        "wörk/face.jpg": "ok",
        "sky.png": "no_face",
        "text.jpg": "unreadable",
        "half.jpg": "unreadable",
    }
    assert records["sky.png"]["reason"] is None and records["sky.png"]["faces"] == []
    assert "not a photo" in records["text.jpg"]["reason"]
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert (result["num_images"], result["num_faces"], result["skipped"]) == (4, 1, 1)
    assert sorted(item["image"] for item in result["not_handled"]) == ["half.jpg", "text.jpg"]


def test_box_and_landmarks_lie_on_the_face(runs):
    report = json.loads(runs[0][1])
    (face,) = next(r for r in report["images"] if r["image"] == "wörk/face.jpg")["faces"]
    y0, x0, y1, x1 = face["box"]
    assert face["confidence"] > 0.9
    points = np.array(face["landmarks"])
    assert points.shape == (5, 2)
    # Eyes, nose and mouth corners of the portrait as a person marks them, (y, x).
    marked = np.array([[100, 107], [101, 149], [126, 129], [138, 106], [139, 148]])
    assert np.abs(points - marked).max() < 8
    assert (points > [y0, x0]).all() and (points < [y1, x1]).all()
    assert report["settings"]["min_face_px"] == 80


def test_a_second_run_writes_the_same_and_does_not_look_at_its_own_files(runs):
    assert runs[0][1] == runs[1][1]
    assert runs[1][0] == (json.loads(runs[0][0].stdout), False)


def test_drawings_show_the_face_and_leave_the_rest(runs, photos):
    del runs
    drawn = np.asarray(Image.open(photos / "out" / "wörk" / "face_faces.jpg").convert("RGB"))
    source = np.asarray(Image.open(photos / "wörk" / "face.jpg"))
    change = np.abs(drawn.astype(int) - source).max(axis=-1)
    assert drawn.shape == source.shape
    assert change.max() > 100
    assert (change > 60).mean() < 0.05
    assert (photos / "out" / "sky_faces.jpg").exists()
    assert not (photos / "out" / "half_faces.jpg").exists()


def test_a_photo_that_breaks_the_detector_does_not_stop_the_others(tmp_path, stand_in):
    for name, rows in (("a", 30), ("b", 40), ("c", 50)):
        Image.new("RGB", (30, rows)).save(tmp_path / f"{name}.png")
    result, complete = _call(f"--images={tmp_path}", f"--output_dir={tmp_path / 'out'}")
    assert not complete
    assert result["summary"] == {"ok": 2, "no_face": 0, "unreadable": 0, "failed": 1}
    assert result["not_handled"][0]["reason"] == "ZeroDivisionError: odd"
    images = json.loads((tmp_path / "out" / "faces.json").read_text())["images"]
    assert [record["status"] for record in images] == ["ok", "failed", "ok"]
    assert images[0]["faces"] == [
        {"box": [1.0, 2.0, 9.0, 8.0], "confidence": 1.0, "landmarks": [[0.0, 0.0]] * 5}
    ]


def test_defaults_namesakes_and_wrong_usage(tmp_path, stand_in):
    for folder in ("one", "two", "empty"):
        (tmp_path / folder).mkdir()
    for folder in ("one", "two"):
        Image.new("RGB", (30, 30)).save(tmp_path / folder / "a.png")
    out = f"--output_dir={tmp_path / 'out'}"
    one, two = tmp_path / "one", tmp_path / "two"
    lines = (
        [out, f"--workdir={tmp_path / 'work'}"],
        [out, f"--images={one},{two}"],
        [out, f"--images={tmp_path / 'missing'}"],
        [out, f"--images={tmp_path / 'empty'}"],
        [out, "--thresholds=0.6,0.7"],
        [out, "--thresholds=0.6,0.7,much"],
        [out, "--min_face_px=3"],
        [out, "--scale_factor=1"],
        [f"--output_dir={one}", f"--images={one}", "--draw"],
        [f"--output_dir={one / 'a.png'}", f"--images={two}"],
    )
    (portrait, complete), (_, again), *messages = [_call(*line) for line in lines]
    assert complete and again
    assert portrait["num_images"] == 1
    assert json.loads((tmp_path / "work" / "result.json").read_text()) == portrait
    images = json.loads((tmp_path / "out" / "faces.json").read_text())["images"]
    assert [record["image"] for record in images] == [
        (folder / "a.png").as_posix() for folder in (one, two)
    ]
    parts = ["missing", "holds no photos", "thresholds", "much", "min_face_px", "scale_factor"]
    for message, part in zip(messages, [*parts, "--draw", "a.png"], strict=True):
        assert part in message


@pytest.fixture
def five(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (30, 30 + number)).save(folder / f"{number}.png")
    return folder


def _seen(monkeypatch):
    """Rows of the photos that the detector looks at."""
    seen, detect_faces = [], detect.detect_faces
    monkeypatch.setattr(
        detect,
        "detect_faces",
        lambda variables, pixels, **rest: (
            seen.append(len(pixels)) or detect_faces(variables, pixels, **rest)
        ),
    )
    return seen


@pytest.mark.parametrize("draw", ["--draw", "--nodraw"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "disk full", "x")])
def test_a_run_that_ends_early_keeps_what_it_found(
    five, tmp_path, stand_in, monkeypatch, draw, error
):
    """Told to stop, or the disk full: the next run looks at the rest, and ends the same."""
    flags = [f"--images={five}", draw]
    _call(*flags, f"--output_dir={tmp_path / 'straight'}")
    out = tmp_path / "out"
    write_atomically, lock = files.write_atomically, threading.Lock()

    def write(path, data, **options):
        with lock:
            if path.suffix == ".json" and len(list(out.rglob("*.json"))) == 2:
                raise error
            write_atomically(path, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", write)
        with pytest.raises(type(error)):
            _call(*flags, f"--output_dir={out}")
    assert not (out / "faces.json").exists() and len(list(out.rglob("*.json"))) == 2
    seen = _seen(monkeypatch)
    _call(*flags, f"--output_dir={out}")
    assert len(seen) == 3
    names = sorted(path.name for path in (tmp_path / "straight").glob("[!.]*"))
    assert sorted(path.name for path in out.glob("[!.]*")) == names
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_what_was_found_holds_for_the_same_photo_and_options_alone(
    five, tmp_path, stand_in, monkeypatch
):
    seen = _seen(monkeypatch)

    def rows(*flags):
        seen.clear()
        _call(f"--images={five}", f"--output_dir={tmp_path / 'out'}", *flags)
        return sorted(seen)

    assert rows() == [30, 31, 32, 33, 34] and not rows()
    Image.new("RGB", (30, 90)).save(five / "1.png")
    assert rows() == [90]
    assert len(rows("--min_face_px=50")) == 5
    assert len(rows("--min_face_px=50", "--draw")) == 5 and not rows("--min_face_px=50", "--draw")
    (tmp_path / "out" / "3_faces.jpg").unlink()
    assert rows("--min_face_px=50", "--draw") == [33]


def test_a_drawing_whose_name_is_too_long_is_that_photos_trouble(five, tmp_path, stand_in):
    (five / "1.png").rename(five / f"{'n' * 251}.png")
    result, complete = _call(f"--images={five}", f"--output_dir={tmp_path / 'out'}", "--draw")
    assert not complete and result["summary"]["ok"] == 4
    (problem,) = result["not_handled"]
    assert problem["image"].startswith("nnn") and "File name too long" in problem["reason"]


def test_a_batch_job_says_how_far_it_is(five, tmp_path, stand_in, monkeypatch, caplog):
    """As each photo is done, not when all have been handed out."""
    clock = iter(range(0, 100_000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level("INFO", logger="absl"):
        _call(f"--images={five}", f"--output_dir={tmp_path / 'out'}")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("photos: 3 of 5, ") and lines[-1].startswith("photos: 5 of 5")


def test_hostile_names_are_handled(five, tmp_path, stand_in):
    names = [os.fsdecode(b"caf\xe9.png"), "a,b.png", "two\nlines.png", "-dash.png", "=1+1.png"]
    for path, name in zip(sorted(five.iterdir()), names, strict=True):
        path.rename(five / name)
    listed = ",".join(f'"{five / name}"' for name in names if "\n" not in name)
    for images in (five, listed):
        result, complete = _call(f"--images={images}", f"--output_dir={tmp_path / 'out'}")
        assert complete
        found = json.loads((tmp_path / "out" / "faces.json").read_text())["images"]
        assert {entry["image"] for entry in found} <= set(names)
        assert result["num_images"] == len(found) >= 4


def test_a_drawing_of_a_photo_that_jpeg_cannot_hold_is_reduced():
    none = detect.Faces(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 5, 2)))
    for shape, expected in (((70_000, 60), (56, 65_500)), ((65_500, 20), (20, 65_500))):
        drawing = detect_photos.draw_faces(np.zeros((*shape, 3), np.uint8), none)
        assert Image.open(io.BytesIO(drawing)).size == expected
