import io

import numpy as np
import pytest
import skimage.data
from PIL import Image

from afr_jax.evaluation.attackers import other_detectors
from afr_jax.evaluation.metrics import misdetection
from afr_jax.evaluation.patches import pictures
from afr_jax.methods.patches import people
from afr_jax.models import mtcnn

_BOX = np.array([10, 10, 30, 30], np.float32)
_EYES = np.array([[15, 15], [15, 25], [20, 20], [25, 15], [25, 25]], np.float32)


def test_somebody_elses_face_is_no_detection_of_the_person():
    box = np.array([10, 10, 50, 50], np.float32)
    assert misdetection.is_found(np.array([[12, 12, 52, 52]], np.float32), box)
    assert not misdetection.is_found(np.array([[10, 80, 50, 120]], np.float32), box)
    assert not misdetection.is_found(np.zeros((0, 4), np.float32), box)


def test_rates_by_factor_stage_and_size():
    found = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    table = misdetection.summarize({"0.709": found, "0.9": np.ones((4, 3), bool)})
    assert (table["0.709"]["missed"], table["0.709"]["total"]) == (3, 4)
    assert table["0.709"]["survival"] == {"pnet": 0.75, "rnet": 0.5, "onet": 0.25}
    np.testing.assert_allclose(table["mean"], 0.375)
    # Wilson's interval of 3 in 4 at 95 %, by hand.
    np.testing.assert_allclose(
        [table["0.709"]["low"], table["0.709"]["high"]], [0.3006, 0.9544], atol=1e-3
    )
    sizes = misdetection.by_size({"0.709": found}, np.array([10.0, 20.0, 30.0, 40.0]))
    assert sum(row["total"] for row in sizes) == 4
    assert [row["missed"] for row in sizes] == [0, 1, 2]
    # The same frames at two factors are no more frames.
    sides = np.array([10.0, 20.0, 30.0, 40.0])
    twice = misdetection.by_size({"0.709": found, "0.9": found}, sides)
    for one, two in zip(sizes, twice, strict=True):
        assert two["rate"] == one["rate"] and (two["low"], two["high"]) == (one["low"], one["high"])


def test_altered_copies_of_a_frame_are_no_more_frames():
    misses = np.array([True, True, True, False])
    frames = [people.Person(name, np.zeros((40, 40, 3), np.uint8), _BOX, _EYES) for name in "abcd"]
    filled = people.fill_up(frames, 40)
    names = misdetection.sources_of(filled)
    assert names == [*"abcd"] * 10
    once = misdetection.rate(misses)
    often = misdetection.rate(np.tile(misses, 10), sources=names)
    assert often["total"] == 40 and often["rate"] == once["rate"]
    assert (often["low"], often["high"]) == (once["low"], once["high"])
    assert misdetection.rate(np.tile(misses, 10))["low"] > once["low"] + 0.2
    judged = {"0.709": np.tile(np.stack([~misses] * 3, axis=1), (10, 1))}
    table = misdetection.summarize(judged, sources=names)
    assert (table["0.709"]["low"], table["0.709"]["high"]) == (once["low"], once["high"])
    sides = np.array([10.0, 20.0, 30.0, 40.0])
    alone = misdetection.by_size({"0.709": judged["0.709"][:4]}, sides)
    for row, one in zip(
        misdetection.by_size(judged, np.tile(sides, 10), sources=names), alone, strict=True
    ):
        assert (row["rate"], row["low"], row["high"]) == (one["rate"], one["low"], one["high"])


def test_what_a_first_network_still_proposes():
    box = np.array([10, 10, 50, 50], np.float32)
    near = np.array([[10, 10, 50, 50], [14, 14, 34, 54], [90, 90, 99, 99]], np.float32)
    found = misdetection.survivors([near, near[2:], np.zeros((0, 4), np.float32)], [box] * 3)
    assert (found["frames"], found["with_some"], found["per_frame"]) == (3, 1, 0.0)
    # Of the same place and size; 20 x 40 pixels, its middle 6 px up and 4 px to the right.
    sides, away = np.array([1.0, np.sqrt(800) / 40]), np.array([0.0, np.hypot(6, 4) / 40])
    quartiles = [0.25, 0.5, 0.75]
    np.testing.assert_allclose(found["sides"], np.quantile(sides, quartiles), rtol=1e-5)
    np.testing.assert_allclose(found["away"], np.quantile(away, quartiles), rtol=1e-5)
    assert misdetection.survivors([near[2:]], [box])["sides"] is None


def test_alterations():
    pixels = np.full((20, 30, 3), 100, np.uint8)
    assert (misdetection.relight(pixels, 1.3) == 130).all()
    assert (misdetection.relight(pixels, 3.0) == 255).all()
    assert misdetection.rescale(pixels, 0.5).shape == (10, 15, 3)
    np.testing.assert_allclose(misdetection.recompress(pixels, 50), 100, atol=3)


def test_other_detectors_find_the_portrait_and_name_missing_files():
    detectors = other_detectors.available()
    assert {"lbp_cascade", "yunet"} <= set(detectors)
    portrait = skimage.data.astronaut()[:256, 96:352]
    box = np.array([72, 88, 158, 154], np.float32)
    for name, detect_fn in detectors.items():
        boxes = detect_fn(portrait)
        assert boxes.shape[1:] == (4,), name
        assert misdetection.is_found(boxes, box), name
        assert detect_fn(np.zeros((64, 64, 3), np.uint8)).shape == (0, 4), name
    with pytest.raises(FileNotFoundError, match=r"nowhere\.onnx of yunet"):
        other_detectors.available(yunet_path="nowhere.onnx")


def test_pictures_are_files_that_open():
    row = {"missed": 1, "total": 2, "rate": 0.5, "low": 0.1, "high": 0.9}
    table = {name: {"0.709": row, "0.9": row, "mean": 0.5} for name in ("trained", "clean")}
    chart = Image.open(io.BytesIO(pictures.bar_chart(table, title="two")))
    assert min(chart.size) > 300
    pixels = np.zeros((40, 60, 3), np.uint8)
    box = np.array([5, 10, 30, 40], np.float32)
    missed = pictures.annotate(pixels, np.zeros((0, 4)), box, is_found=False)
    found = pictures.annotate(pixels, box[None], box, is_found=True)
    assert missed.getpixel((10, 15)) != found.getpixel((10, 15)) != (0, 0, 0)
    near = pictures.close_up(found, box, sides=1.2)
    # 36 px about the middle of the box, at (17.5, 25), moved into the frame.
    assert near.size == (36, 36) and near.getpixel((3, 5)) == found.getpixel((10, 5)) != (0, 0, 0)
    sheet = pictures.contact_sheet([[missed, found], [found]], cell_px=30)
    assert Image.open(io.BytesIO(sheet)).size == (60, 40)
    film = Image.open(io.BytesIO(pictures.film([missed, found], width_px=30)))
    assert film.n_frames == 2


def test_stages_of_a_photo_below_the_smallest_face_are_empty():
    variables = mtcnn.Variables({}, {}, {})
    found = misdetection.judge(
        variables, [np.zeros((8, 8, 3), np.uint8)], [np.zeros(4, np.float32)], scale_factor=0.7
    )
    np.testing.assert_array_equal(found, [[False] * 3])
