"""The patch attack's programs from the outside: files, result, resumption, wrong usage."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import programs
import pytest
from PIL import Image

_ROOT = pathlib.Path(__file__).resolve().parents[2]

# Prints the usage error of every command line, without training anything.
_DRIVER = """
import json, sys
from absl import flags
from absl.testing import flagsaver
from afr_jax.core import program
from experiments import attack_detector
program.define_flags()
flags.FLAGS(["attack_detector"])
for line in json.loads(sys.argv[1]):
    with flagsaver.flagsaver():
        flags.FLAGS(["attack_detector", *line])
        try:
            attack_detector.attack_program()
        except program.UsageError as error:
            print(json.dumps(str(error)))
"""

# Places patches on two frames, one of which they leave: how many are left, and what is said.
_PLACER = """
import json
import numpy as np
from afr_jax.core import program
from afr_jax.evaluation.metrics import misdetection
from afr_jax.methods.patches import attack as patches_attack
from experiments import attack_detector
pixels = np.full((200, 200, 3), 128, np.uint8)
points = np.array([[80, 80], [80, 120], [105, 100], [125, 82], [125, 118]], np.float32)
inside = misdetection.Person("inside", pixels, np.array([60, 70, 140, 130.0]), points)
outside = inside._replace(name="outside", landmarks=points + np.array([[0, 100]], np.float32))
options = patches_attack.PatchOptions()
shown = attack_detector._People([inside, outside], [("before", "no face")])
count = len(attack_detector._placed(shown, options, None))
try:
    attack_detector._placed(attack_detector._People([outside], []), options, None)
except program.UsageError as error:
    print(json.dumps([count, shown.skipped, str(error)]))
"""


def _call(*command):
    return subprocess.run(
        [sys.executable, *command], cwd=_ROOT, env=os.environ, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("attack") / "work"


@pytest.fixture(scope="module")
def attack(work):
    command = ["-m", "experiments.attack_detector", "--toy", f"--workdir={work}"]
    return [_call(*command) for _ in range(2)]


def test_toy_run_writes_everything_it_promises(attack, work):
    assert attack[0].returncode == 0, attack[0].stderr
    assert attack[0].stdout.count("\n") == 1
    result = json.loads(attack[0].stdout)
    assert result == json.loads((work / "result.json").read_text()) | {
        name: result[name] for name in ("command", "training")
    }
    assert result["test"]["num_frames"] == 2
    variants = result["test"]["variants"]
    assert set(variants) == {"trained", "clean", "black", "white", "noise", "untrained"}
    assert variants["clean"]["0.709"]["missed"] == 0
    low, high = result["settings"]["options"]["ink"]
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


def test_a_second_run_goes_on_where_the_first_ended(attack, work):
    assert attack[1].returncode == 0, attack[1].stderr
    first, second = (json.loads(done.stdout) for done in attack)
    assert first["test"] == second["test"]
    steps = [json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_a_frame_that_a_patch_leaves_is_skipped_with_its_reason():
    done = _call("-c", _PLACER)
    assert done.returncode == 0, done.stderr
    count, skipped, message = json.loads(done.stdout)
    assert count == 1
    assert [name for name, _ in skipped] == ["before", "outside"]
    assert "is not in it" in skipped[1][1]
    assert "on no frame" in message


def test_wrong_usage_is_named(tmp_path):
    Image.new("RGB", (64, 64), (80, 120, 200)).save(tmp_path / "sky.png")
    (tmp_path / "film.mkv").write_bytes(b"no film")
    (tmp_path / "grids.json").write_text("[]")
    sky = f"--train={tmp_path / 'sky.png'}"
    where = f"--workdir={tmp_path / 'work'}"
    lines = [
        ([where], "--train is needed"),
        ([where, f"--train={tmp_path / 'missing'}"], "missing"),
        ([where, f"--train={tmp_path / 'film.mkv'}"], "film.mkv has no frame"),
        ([where, sky, "--toy"], "shows no face"),
        (["--scale_factors=1.5"], "must lie in (0, 1)"),
        (["--off=colour"], "no part 'colour'"),
        (["--margin=2"], "margin is 2"),
        (["--face_width_mm=20"], "--face_width_mm"),
        ([f"--corners={tmp_path / 'grids.json'}"], "no corner grids"),
        (["--yunet=nowhere.onnx"], "nowhere.onnx"),
    ]
    # Each line has a folder of its own: another configuration is refused as well.
    commands = [
        [flag if flag != where else f"{where}{number}" for flag in line]
        for number, (line, _) in enumerate(lines)
    ]
    done = _call("-c", _DRIVER, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    for message, (_, part) in zip(messages, lines, strict=True):
        assert part in message


def test_the_ablation_measures_its_rows_once(tmp_path):
    flags = ["--toy", f"--workdir={tmp_path / 'work'}"]
    # In the second run nothing is trained.
    (first, code), (second, _), *refused = programs.drive(
        "patch_ablation.ablation_program",
        flags,
        flags,
        [f"--workdir={tmp_path}", "--rows=full,colour"],
        [f"--workdir={tmp_path}", "--scale_factor=2"],
        [f"--workdir={tmp_path}"],
    )
    assert code == 0 and first["rows"] == second["rows"]
    assert set(first["rows"]) == {"clean", "full", "no noise"}
    for name, row in first["rows"].items():
        assert row["total"] == first["num_test"] and 0 <= row["low"] <= row["rate"] <= row["high"]
        assert ("training" in row) == (name != "clean")
    table = (tmp_path / "work" / "ablation.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| clean", "| full", "| no noise"]
    for message, part in zip(refused, ["no 'colour'", "scale_factor is 2", "--train"], strict=True):
        assert part in message


def test_the_speed_of_epochs_is_extrapolated_to_a_run(tmp_path):
    (result, code), refused = programs.drive(
        "patch_speed.speed_program",
        ["--toy", f"--workdir={tmp_path / 'work'}"],
        [f"--workdir={tmp_path}"],
    )
    assert code == 0 and "--train is needed" in refused
    epochs, minutes = result["rows"][0], result["rows"][1]
    assert epochs["quantity"] == "s per epoch" and minutes["quantity"] == "minutes for 2000 epochs"
    assert minutes["ours"]["median"] == pytest.approx(epochs["ours"]["median"] * 2000 / 60)
    assert all(row["ours"]["low"] > 0 for row in result["rows"])
    assert (tmp_path / "work" / "speed.md").read_text().count("\n") == 6
