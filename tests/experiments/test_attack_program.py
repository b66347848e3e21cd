"""The patch attack's programs from a command line: files, result, resumption, wrong usage."""

import json

import numpy as np
import programs
import pytest
from PIL import Image

from afr_jax.core import files
from afr_jax.evaluation.patches import ablation, study
from afr_jax.methods.patches import people, placement


def _attack(*flags):
    return programs.call(study.AttackConfig, study.run, *flags)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("attack") / "work"


@pytest.fixture(scope="module")
def runs(work):
    """A toy run, and the same again."""
    return [_attack("--toy", f"--workdir={work}") for _ in range(2)]


def test_toy_run_writes_everything_it_promises(runs, work):
    result, complete = runs[0]
    assert complete
    stored = json.loads((work / "result.json").read_text())
    assert result == stored | {name: result[name] for name in ("command", "training")}
    assert result["test"]["num_frames"] == 2
    variants = result["test"]["variants"]
    assert set(variants) == {"trained", "clean", "black", "white", "noise", "untrained"}
    assert variants["clean"]["0.709"]["missed"] == 0
    low, high = result["settings"]["patches"]["ink"]
    for side in ("left_cheek", "right_cheek"):
        patch = np.asarray(Image.open(work / "patches" / f"{side}.png"))
        assert patch.ndim == 2 and len(patch) == 12
        assert 255 * low <= patch.min() and patch.max() <= 255 * high
    for name in ("portrait_8", "portrait_24"):
        clean, patched = (
            np.asarray(Image.open(work / "frames" / kind / f"{name}.png")).astype(int)
            for kind in ("clean", "patched")
        )
        changed = np.abs(clean - patched).max(axis=-1) > 8
        assert 0.01 < changed.mean() < 0.2
    assert (work / "patches.pdf").read_bytes().startswith(b"%PDF")
    for name in ("misdetection.png", "contact_sheet.png", "patched.gif"):
        Image.open(work / name).verify()


def test_a_second_run_goes_on_where_the_first_ended(runs, work):
    (first, _), (second, complete) = runs
    assert complete and first["test"] == second["test"]
    steps = [json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_other_frames_are_not_taken_up(runs, work):
    for kind in ("train", "test"):
        path = work / f"{kind}_frames.json"
        whole = path.read_text()
        known = files.read_sealed(path)["value"]
        name = sorted(known)[-1]
        files.write_sealed(path, {"value": known | {name: "of another frame"}})
        message = _attack("--toy", f"--workdir={work}")
        assert f"--{kind}: frames are others" in str(message) and name in str(message)
        path.write_text(whole)


def test_old_names_of_flags_hold():
    config = study.program.parse(
        study.AttackConfig, ["--optimiser=adam", "--peer_python=python3", "--epochs=7"]
    )
    assert config.patches.optimizer == "adam" and config.patches.epochs == 7
    assert config.originals.reference_python == "python3"


def test_a_frame_that_a_patch_leaves_is_skipped_with_its_reason():
    pixels = np.full((200, 200, 3), 128, np.uint8)
    points = np.array([[80, 80], [80, 120], [105, 100], [125, 82], [125, 118]], np.float32)
    inside = people.Person("inside", pixels, np.array([60, 70, 140, 130.0]), points)
    outside = inside._replace(name="outside", landmarks=points + np.array([[0, 100]], np.float32))
    placed, skipped = placement.place_all([inside, outside], "cheeks")
    assert [frame.name for frame in placed] == ["inside"]
    assert [name for name, _ in skipped] == ["outside"]
    assert "is not in it" in skipped[0][1]
    corners = placement.Corners(grids={"other": {}})
    placed, skipped = placement.place_all([inside], "cheeks", corners=corners)
    assert not placed and "does not name it" in skipped[0][1]


def test_wrong_usage_is_named(tmp_path):
    Image.new("RGB", (64, 64), (80, 120, 200)).save(tmp_path / "sky.png")
    (tmp_path / "film.mkv").write_bytes(b"no film")
    (tmp_path / "grids.json").write_text("[]")
    sky = f"--train={tmp_path / 'sky.png'}"
    lines = [
        ([], "--train is needed"),
        ([f"--train={tmp_path / 'missing'}"], "missing"),
        ([f"--train={tmp_path / 'film.mkv'}"], "film.mkv has no frame"),
        ([sky, "--toy"], "shows no face"),
        (["--scale_factors=1.5"], "--scale_factors is (1.5,), must lie in (0, 1)"),
        (["--off=colour"], "--off is 'colour', must be one of light"),
        (["--margin=2"], "--margin is 2"),
        (["--face_width_mm=20"], "--face_width_mm"),
        ([f"--corners={tmp_path / 'grids.json'}"], "no corner grids"),
        (["--yunet=nowhere.onnx"], "nowhere.onnx"),
    ]
    for number, (flags, part) in enumerate(lines):
        # Each line has a folder of its own: another configuration is refused as well.
        message = _attack(*flags, f"--workdir={tmp_path / str(number)}")
        assert isinstance(message, str) and part in message, (flags, message)
    # The work directory of a mistyped name can be used with the right one.
    for flags in ([f"--train={tmp_path / 'mistyped'}"], [f"--transfer={tmp_path / 'x'}", sky]):
        assert "does not exist" in str(_attack(*flags, f"--workdir={tmp_path / 'out'}"))
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_ablation_measures_its_rows_once(tmp_path, monkeypatch):
    def run(*flags):
        return programs.call(ablation.AblationConfig, ablation.run, *flags)

    flags = ["--toy", "--rows=full,black", f"--workdir={tmp_path / 'work'}"]
    first, complete = run(*flags)
    monkeypatch.setattr(ablation.training, "train", None)  # In the second run nothing is trained.
    second, _ = run(*flags)
    assert complete and first["rows"] == second["rows"]
    assert set(first["rows"]) == {"clean", "full", "black"}
    for name, row in first["rows"].items():
        assert row["total"] == first["num_test"] and 0 <= row["low"] <= row["rate"] <= row["high"]
        assert ("training" in row) == (name == "full")
    table = (tmp_path / "work" / "ablation.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| clean", "| full", "| black"]
    for flag, part in [("--rows=full,colour", "'colour'"), ("--scale_factor=2", "scale_factor is")]:
        assert part in run(f"--workdir={tmp_path}", flag)
    assert "--train is needed" in run(f"--workdir={tmp_path}")
