"""The detect program from the outside: statuses, boxes, drawings, wrong usage."""

import json

import numpy as np
import programs
import pytest
import skimage.data
from PIL import Image

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
