"""The train_victim program on synthetic trees."""

import json

import numpy as np
import programs
import pytest

from afr_jax.data import noise_files
from afr_jax.evaluation.unlearnable import victim


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    for name in ("train", "test"):
        data = programs.save_synthetic(folder / name, 80, side=8, split=name)
    (folder / "test" / "class_00" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    levels = np.full((4, 8, 8, 3), 8, np.int16)
    noise_files.Noise(data.classes, levels, "class", {"method": "flat"}).save(folder / "noise")
    return folder


def test_the_program_measures_writes_and_resumes(trees, tmp_path):
    flags = [f"--data={trees / 'train'}", f"--test_data={trees / 'test'}", "--toy"]
    flags += [f"--noise={trees / 'noise'}", "--poison_rate=0.5", "--poison_classes=class_01"]
    flags += ["--countermeasure=grayscale", f"--workdir={tmp_path / 'work'}", "--noaugment"]
    result, complete = programs.call_alone(victim.TrainVictimConfig, victim.run, *flags)
    assert not complete
    assert json.loads((tmp_path / "work/result.json").read_text()) == result
    assert (result["train_images"], result["protected_images"], result["test_images"]) == (
        80,
        10,
        80,
    )
    assert 0 <= result["last_accuracy"] <= result["peak_accuracy"] <= 1
    assert result["last_interval"][0] <= result["last_accuracy"] <= result["last_interval"][1]
    assert result["noise_settings"] == {"method": "flat"}
    assert [item["image"] for item in result["not_handled"]] == ["class_00/broken.png"]
    assert len((tmp_path / "work/curve.csv").read_text().splitlines()) == 3
    assert (tmp_path / "work/curve.png").stat().st_size > 5000
    assert programs.call_alone(victim.TrainVictimConfig, victim.run, *flags)[0] == result
    # The newest checkpoint and a line of the metrics are damaged: what comes out stays the same.
    lines = (tmp_path / "work/metrics.jsonl").read_bytes()
    (tmp_path / "work/metrics.jsonl").write_bytes(lines.replace(b'"step": 2', b'"step": 9'))
    checkpoints = tmp_path / "work/checkpoints"
    data = [path for path in (checkpoints / "2").rglob("d/*") if path.is_file()]
    largest = max(data, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    assert programs.call_alone(victim.TrainVictimConfig, victim.run, *flags)[0] == result
    assert (tmp_path / "work/metrics.jsonl").read_bytes() == lines
    assert {path.name for path in checkpoints.iterdir()} == {"1", "2", "damaged-2"}


def test_wrong_usage_is_said(trees, tmp_path):
    tree, work = f"--data={trees / 'train'}", f"--workdir={tmp_path / 'work'}"
    cases = [
        ([], "--data"),
        (["--data=missing"], "missing"),
        (["--data=cifar10"], "--cifar10_dir"),
        ([tree], "--test_data"),
        ([tree, f"--test_data={trees / 'train'}", "--poison_rate=0.5"], "--noise"),
        ([tree, "--epochs=0"], "--epochs"),
    ]
    for flags, part in cases:
        answer = programs.call_alone(victim.TrainVictimConfig, victim.run, *flags, work)
        assert isinstance(answer, str) and part in answer, (flags, answer)
