"""How patches are printed and worn: amounts against NumPy, rates by amount, the plot."""

import io

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from afr_jax.evaluation.metrics import misdetection
from afr_jax.evaluation.patches import handling
from afr_jax.methods.patches import placement


@pytest.fixture
def frame():
    """A face of 40 px, and a flat patch of 4 x 2 cells at its left."""
    rows, columns = np.mgrid[0:5, 0:3].astype(np.float32)
    grid = np.stack([30 + 3 * rows, 20 + 3 * columns, np.zeros_like(rows)], axis=-1)
    box = np.array([20, 10, 60, 50], np.float32)
    pixels = np.full((80, 70, 3), 90, np.uint8)
    return placement.Placed(pixels, box, {"left": grid}, np.ones(3, np.float32))


@pytest.mark.parametrize(
    "how, amount, expected",
    [
        ("across", 0.1, lambda y, x: (y, x + 4)),
        ("down", -0.2, lambda y, x: (y - 8, x)),
        ("size", 1.4, lambda y, x: (36 + 1.4 * (y - 36), 23 + 1.4 * (x - 23))),
        ("rolled", 90.0, lambda y, x: (36 + (x - 23), 23 - (y - 36))),
        ("bent away", 60.0, lambda y, x: (y, 23 + (x - 23) / 2)),
    ],
)
def test_patches_are_worn_otherwise(frame, how, amount, expected):
    moved = handling.worn(frame, how, amount).grids["left"]
    y, x = np.moveaxis(frame.grids["left"][..., :2], -1, 0)
    found = [np.stack(expected(y, x), axis=-1)]
    if how == "rolled":  # To either side.
        found.append(np.stack([72 - found[0][..., 0], 46 - found[0][..., 1]], axis=-1))
    assert any(np.allclose(moved[..., :2], each, atol=1e-3) for each in found)
    # As planned where the curve says so.
    unit, amounts = handling.CURVES[how]
    planned = 1.0 if how == "size" else 0.0
    assert planned in amounts and unit
    still = handling.worn(frame, how, planned).grids["left"]
    np.testing.assert_allclose(still, frame.grids["left"], atol=1e-5)


def test_printers_press_tones_and_spread_ink():
    patch = np.random.default_rng(0).random((20, 30)).astype(np.float32)
    np.testing.assert_allclose(handling.Printer().print(patch), patch, atol=0.5 / 255 + 1e-6)
    printer = handling.Printer(black=0.2, white=0.9, gain=2.0, blur=0.05)
    tones = np.round(patch * 255) / 255
    expected = scipy.ndimage.gaussian_filter(0.2 + 0.7 * tones**2, 1.5, mode="nearest")
    np.testing.assert_allclose(printer.print(patch), expected, atol=1e-5)
    for each in handling.PRINTERS.values():
        out = each.print(patch)
        assert out.shape == patch.shape and 0 <= out.min() and out.max() <= 1


def test_rates_by_amount_and_printer(frame, monkeypatch):
    """A detector that misses the face while the patch's middle is where it was planned."""
    asked = []

    def judge(variables, photos, boxes, *, scale_factor):
        asked.append(scale_factor)
        is_dark = [photo[36, 23].mean() < 60 for photo in photos]
        return np.array([[True, True, not dark] for dark in is_dark])

    monkeypatch.setattr(misdetection, "judge", judge)
    patches = {"left": np.zeros((8, 4), np.float32)}
    found = handling.measure(None, [frame, frame], patches, scale_factor=0.8)
    assert set(asked) == {0.8} and found["num_frames"] == 2
    across = {point["at"]: point for point in found["curves"]["across"]["points"]}
    assert across[0.0]["missed"] == across[0.0]["total"] == 2 and across[0.2]["missed"] == 0
    assert 0 < across[0.0]["low"] < 1 and across[0.0]["high"] == pytest.approx(1)
    # The ink of the last is too light for this detector: 0.3 of 255.
    assert [row["missed"] for row in found["printers"].values()] == [2, 2, 2, 0]
    picture = np.asarray(Image.open(io.BytesIO(handling.plot(found))).convert("L"))
    assert picture.shape[1] > 1000 and picture.std() > 10
