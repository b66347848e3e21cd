"""Victims: partial protection, resuming, many at once, countermeasures; the program outside."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from afr_jax.core import checkpoint, parallel
from afr_jax.data import image_sets, noise_files
from afr_jax.evaluation import many_victims, victims

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_OPTIONS = victims.VictimOptions(
    "small_resnet", width=4, num_epochs=2, batch_size=20, augmented=False
)


def _mesh(count=1):
    return parallel.make_mesh(devices=jax.devices()[:count])


@pytest.fixture(scope="module")
def sets():
    return tuple(image_sets.made_up(0, 80, side=8, split=split) for split in ("train", "test"))


def _train(sets, options=_OPTIONS, images=None, count=1, **changes):
    train_set, test_set = sets
    return victims.train_victim(
        train_set.images if images is None else images,
        train_set.labels,
        test_set.images,
        test_set.labels,
        num_classes=4,
        options=options,
        mesh=_mesh(count),
        **{"seed": 0} | changes,
    )


@pytest.fixture(scope="module")
def straight(sets):
    return _train(sets)


def test_a_part_is_protected_by_rate_and_class():
    clean = np.zeros((100, 1, 1, 3), np.uint8)
    labels = np.arange(100) % 4
    smaller, larger = (
        victims.protect_part(clean, clean + 9, labels, rate=rate)[1] for rate in (0.2, 0.7)
    )
    assert smaller.sum() == 20 and larger.sum() == 70 and (larger | ~smaller).all()
    images, chosen = victims.protect_part(clean, clean + 9, labels, rate=0.4, classes=[1, 3])
    assert chosen.sum() == 20 and set(labels[chosen]) == {1, 3}
    np.testing.assert_array_equal(images[:, 0, 0, 0], chosen * 9)
    with pytest.raises(ValueError, match="rate"):
        victims.protect_part(clean, clean, labels, rate=1.5)


def test_a_resumed_victim_equals_the_straight_one(sets, straight, tmp_path):
    one = dataclasses.replace(_OPTIONS, num_epochs=2)

    class _Stop(Exception):
        pass

    def stop(epoch, *_):
        raise _Stop

    with checkpoint.Checkpoints(tmp_path / "a") as checkpoints:
        with pytest.raises(_Stop):
            _train(sets, one, checkpoints=checkpoints, report_fn=stop)
        assert checkpoints.latest_step() == 1
        curve, state = _train(sets, one, checkpoints=checkpoints)
    np.testing.assert_array_equal(curve.test_accuracy, straight[0].test_accuracy)
    for new, old in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(straight[1].params), strict=True
    ):
        np.testing.assert_array_equal(new, old)


def test_many_victims_equal_single_ones(sets, straight):
    train_set, test_set = sets
    darker = (train_set.images // 2).astype(np.uint8)
    curves = many_victims.train_many(
        np.stack([train_set.images, darker]),
        train_set.labels,
        test_set.images,
        test_set.labels,
        set_of_run=[1, 0, 0],
        seed_of_run=[0, 0, 3],
        num_classes=4,
        options=_OPTIONS,
        mesh=_mesh(2),
    )
    single = [_train(sets, images=darker)[0], straight[0], _train(sets, seed=3)[0]]
    for many, one in zip(curves, single, strict=True):
        # Convolutions of several runs are summed in another order: a few of 80 images may turn.
        np.testing.assert_allclose(many.train_accuracy, one.train_accuracy, atol=0.05)
        np.testing.assert_allclose(many.test_accuracy, one.test_accuracy, atol=0.08)


@pytest.mark.parametrize("countermeasure", ["cutmix", "randaugment", "adversarial"])
def test_countermeasures_in_training_run_and_stay_finite(sets, countermeasure):
    options = dataclasses.replace(_OPTIONS, num_epochs=1, countermeasure=countermeasure)
    curve, state = _train(sets, options)
    assert np.isfinite(curve.train_accuracy).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_options_are_checked():
    for change in ({"architecture": "alexnet"}, {"countermeasure": "jpeg10"}, {"num_epochs": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(_OPTIONS, **change)


@pytest.fixture(scope="module")
def trees(tmp_path_factory, sets):
    folder = tmp_path_factory.mktemp("trees")
    for name, data in zip(("train", "test"), sets, strict=True):
        noise_files.write_images(folder / name, data.sample_ids, data.images)
    (folder / "test" / "class_00" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    levels = np.full((4, 8, 8, 3), 8, np.int16)
    noise = noise_files.Noise(sets[0].classes, levels, "class")
    noise_files.write_noise(folder / "noise.npz", noise, {"method": "flat"})
    return folder


def _run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.train_victim", *map(str, arguments)],
        cwd=_ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )


def test_the_program_measures_writes_and_resumes(trees, tmp_path):
    flags = [f"--data={trees / 'train'}", f"--test_data={trees / 'test'}", "--toy"]
    flags += [f"--noise={trees / 'noise.npz'}", "--poison_rate=0.5", "--poison_classes=class_01"]
    flags += ["--countermeasure=grayscale", f"--workdir={tmp_path / 'work'}", "--noaugment"]
    done = _run(*flags)
    assert done.returncode == 3, done.stderr
    result = json.loads(done.stdout)
    assert json.loads((tmp_path / "work/result.json").read_text()) == result
    assert (result["train_images"], result["protected_images"], result["test_images"]) == (
        80,
        10,
        80,
    )
    assert 0 <= result["last_accuracy"] <= result["peak_accuracy"] <= 1
    assert result["noise_settings"] == {"method": "flat"}
    assert [item["image"] for item in result["not_handled"]] == ["class_00/broken.png"]
    assert len((tmp_path / "work/curve.csv").read_text().splitlines()) == 3
    assert (tmp_path / "work/curve.png").stat().st_size > 5000
    again = _run(*flags)
    assert json.loads(again.stdout) == result


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--data"),
        (["--data=missing"], "missing"),
        (["--data=cifar10"], "--cifar10_dir"),
        (["--data=TRAIN"], "--test_data"),
        (["--data=TRAIN", "--test_data=TRAIN", "--poison_rate=0.5"], "--noise"),
    ],
)
def test_wrong_usage_is_said(trees, tmp_path, arguments, message):
    arguments = [item.replace("TRAIN", str(trees / "train")) for item in arguments]
    done = _run(*arguments, f"--workdir={tmp_path / 'work'}")
    assert done.returncode == 2 and message in done.stderr, done.stderr
