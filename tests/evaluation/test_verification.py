"""Verification scores against definitions written out pair by pair."""

import csv
import json

import numpy as np
import programs
import pytest
import skimage.data
from PIL import Image

from afr_jax.evaluation.metrics import verification
from afr_jax.evaluation.recognition import verify
from afr_jax.methods.cloaking import targets


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    same = rng.random(200) < 0.5
    distances = np.where(same, rng.normal(0.5, 0.12, 200), rng.normal(0.8, 0.12, 200)).round(2)
    return distances, same


def test_roc_counts_pairs(pairs):
    distances, same = pairs
    curve = verification.roc(distances, same)
    for threshold, far, tar in zip(*curve, strict=True):
        accepted = distances <= threshold
        assert far == pytest.approx(np.mean(accepted[~same]))
        assert tar == pytest.approx(np.mean(accepted[same]))


def test_auc_is_the_chance_that_a_same_pair_is_nearer(pairs):
    distances, same = pairs
    gap = distances[~same][:, None] - distances[same][None, :]
    expected = np.mean((gap > 0) + 0.5 * (gap == 0))
    assert verification.auc(verification.roc(distances, same)) == pytest.approx(expected)


def test_equal_error_rate_and_tar(pairs):
    distances, same = pairs
    curve = verification.roc(distances, same)
    rate = verification.equal_error_rate(curve)
    gaps = [
        abs(np.mean(distances[~same] <= t) - np.mean(distances[same] > t))
        for t in np.arange(0, 1.5, 0.005)
    ]
    threshold = np.arange(0, 1.5, 0.005)[int(np.argmin(gaps))]
    assert rate == pytest.approx(np.mean(distances[same] > threshold), abs=0.02)
    for far in (0.0, 0.01, 0.1):
        allowed = [t for t in np.unique(distances) if np.mean(distances[~same] <= t) <= far]
        expected = max((np.mean(distances[same] <= t) for t in allowed), default=0.0)
        assert verification.tar_at_far(curve, far) == pytest.approx(expected)


def test_best_threshold_and_folds(pairs):
    distances, same = pairs
    best = verification.accuracy(distances, same, verification.best_threshold(distances, same))
    assert best == max(verification.accuracy(distances, same, t) for t in np.arange(0, 1.5, 0.005))
    folds = verification.fold_accuracies(distances, same)
    assert folds.shape == (10,) and best - 0.1 < folds.mean() <= best
    held = np.zeros(200, bool)
    for kind in (True, False):
        held[np.flatnonzero(same == kind)[3::10]] = True
    threshold = verification.best_threshold(distances[~held], same[~held])
    assert folds[3] == verification.accuracy(distances[held], same[held], threshold)


def test_folds_hold_both_kinds_in_whatever_order_the_pairs_come(pairs):
    distances, same = pairs
    expected = verification.fold_accuracies(distances, same)
    kinds = np.flatnonzero(same), np.flatnonzero(~same)
    count = min(map(len, kinds))
    alternating = np.stack([kind[:count] for kind in kinds], axis=1).ravel()
    rest = np.concatenate([kind[count:] for kind in kinds])
    for order in (np.concatenate(kinds), np.concatenate([alternating, rest])):
        found = verification.fold_accuracies(distances[order], same[order])
        np.testing.assert_array_equal(found, expected)


def test_perfect_and_missing_pairs():
    same = np.array([True, True, False, False])
    curve = verification.roc(np.array([0.1, 0.2, 0.8, 0.9]), same)
    assert verification.auc(curve) == 1.0 and verification.equal_error_rate(curve) == 0.0
    # A pair without a face is never accepted, at any threshold.
    curve = verification.roc(np.array([0.1, np.inf, 0.8, 0.9]), same)
    assert curve.tar.max() == 0.5
    # Where no threshold makes both errors equal, pairs without a face are told apart by chance: of
    # the last step from (FAR 1/4, TAR 1/2) to (1, 1) the part of 1/5.
    distances = np.array([0.1, 0.2, np.inf, np.inf, 0.05, np.inf, np.inf, np.inf])
    curve = verification.roc(distances, np.arange(8) < 4)
    assert verification.equal_error_rate(curve) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="both needed"):
        verification.roc(np.ones(3), np.ones(3, bool))
    with pytest.raises(ValueError, match="NaN"):
        verification.roc(np.array([0.1, np.nan]), np.array([True, False]))


def test_farthest_identity_follows_the_nearest_photo():
    own = {"net": np.array([[0.0, 0.0], [4.0, 0.0]])}
    # "b" is far from the mean photo, but one photo lies on it; "c" is farthest from its nearest.
    gallery = {"a": [1.0, 0.0], "b": [4.0, 0.5], "c": [2.0, 3.0]}
    gallery = {name: {"net": np.array(vector)} for name, vector in gallery.items()}
    assert targets.farthest_identity(own, gallery, {"net": 0.6}) == "c"
    with pytest.raises(ValueError, match="gallery"):
        targets.farthest_identity(own, {}, {"net": 0.6})
    np.testing.assert_array_equal(targets.centroid(np.array([[1.0, 2], [3, 4]])), [2, 3])
    with pytest.raises(ValueError, match="face"):
        targets.centroid(np.zeros((0, 2)))


def _verify(tmp_path, *flags):
    """Result and whether all could be handled, or the message of wrong usage."""
    flags = [f"--workdir={tmp_path / 'work'}", *flags]
    return programs.call(verify.VerifyConfig, verify.run, *flags)


def test_a_pair(tmp_path):
    portrait = Image.fromarray(skimage.data.astronaut()[0:260, 100:360])
    portrait.save(tmp_path / "a.png")
    portrait.rotate(8, Image.BICUBIC).save(tmp_path / "b.jpg", quality=80)
    result, complete = _verify(tmp_path, f"--pair={tmp_path / 'a.png'},{tmp_path / 'b.jpg'}")
    assert complete
    assert result["verified"] and 0 < result["distance"] < result["threshold"] == 0.6


def test_pairs(tmp_path):
    portrait = Image.fromarray(skimage.data.astronaut()[0:260, 100:360])
    portrait.save(tmp_path / "a.png")
    portrait.rotate(8, Image.BICUBIC).save(tmp_path / "b.jpg", quality=80)
    Image.new("RGB", (200, 200), (10, 200, 30)).save(tmp_path / "none.png")
    rows = [("a.png", "b.jpg", 1)] * 12 + [("a.png", "none.png", 0)] * 10
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image_a", "image_b", "same"), *rows])
    result, complete = _verify(
        tmp_path, f"--pairs={tmp_path / 'pairs.csv'}", f"--images={tmp_path}"
    )
    assert not complete
    assert result["accuracy"] == 1.0 and result["auc"] == 1.0
    assert [entry["image"] for entry in result["not_handled"]] == ["none.png"]
    assert json.loads((tmp_path / "work" / "result.json").read_text())["pairs"] == 22
    assert (tmp_path / "work" / "roc.png").stat().st_size > 0


def test_wrong_usage(tmp_path):
    (tmp_path / "bad.csv").write_text("x,y\n1,2\n")
    assert "image_a" in _verify(tmp_path, f"--pairs={tmp_path / 'bad.csv'}")
    assert "--pair" in _verify(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    message = _verify(tmp_path, f"--pair={tmp_path / 'a.png'},{tmp_path / 'absent.png'}")
    assert "--pair: " in message and "absent.png is not a file" in message


@pytest.mark.shared
@pytest.mark.slow
def test_lfw_accuracy(shared, tmp_path):
    data = shared / "data"
    result, _ = _verify(tmp_path, f"--pairs={data / 'lfw_pairs.csv'}", f"--images={data / 'lfw'}")
    assert result["accuracy"] >= 0.988
