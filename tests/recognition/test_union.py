"""What two detectors see together: rules on made faces, and photos on which one of them fails."""

import numpy as np
import pytest
import skimage.data
from PIL import Image

from afr_jax.models import mtcnn
from afr_jax.recognition import detect
from afr_jax.recognition.detectors import union, yunet

_BLACK = np.zeros((200, 200, 3), np.uint8)


@pytest.fixture(scope="module")
def variables():
    return mtcnn.load_variables()


@pytest.fixture(scope="module")
def second():
    return union.load_second()


def _faces(*rows):
    """Faces of (y0, x0, y1, x1, confidence), landmarks where the box begins."""
    values = np.array(rows, np.float32).reshape(-1, 5)
    landmarks = np.repeat(values[:, None, :2], 5, axis=1)
    return detect.Faces(values[:, :4], values[:, 4], landmarks)


def _see(monkeypatch, first, other, *, pixels=_BLACK):
    """What the union makes of faces that each detector gives for every size of the photo."""
    monkeypatch.setattr(detect, "detect_faces", lambda variables, picture, *, options: first)
    return union.detect_union({}, None if other is None else lambda picture: other, pixels)


_BOX, _SHIFTED, _AWAY = (20, 20, 80, 80), (26, 26, 86, 86), (120, 120, 190, 190)


@pytest.mark.parametrize(
    "ours, theirs, counts",
    [
        (0.95, 0.65, True),  # One is sure, the other confirms it.
        (0.6, 0.81, True),
        (0.95, None, False),  # One alone is sure: told.
        (None, 0.82, False),
        (0.9995, None, True),  # One alone is very sure.
        (None, 0.9, True),
        (0.85, None, False),  # One alone is nearly sure: told as well.
        (None, 0.75, False),
        (0.7, 0.65, False),  # Both doubt it: told.
        (0.7, None, None),  # Doubted by one, not seen by the other: dropped.
        (None, 0.65, None),
    ],
)
def test_which_faces_count(monkeypatch, ours, theirs, counts):
    first = _faces(*[] if ours is None else [(*_BOX, ours)])
    other = _faces(*[] if theirs is None else [(*_SHIFTED, theirs)])
    seen = _see(monkeypatch, first, other)
    if counts is None:
        assert not len(seen.faces.boxes)
        return
    assert seen.counts.tolist() == [counts]
    assert seen.mtcnn[0] == np.float32(ours or 0) and seen.yunet[0] == np.float32(theirs or 0)
    assert seen.faces.confidences[0] == np.float32(max(ours or 0, theirs or 0))
    # The place that a tracker uses, where MTCNN is as sure as its default asks for.
    expected = _BOX if (ours or 0) >= 0.8 else _SHIFTED
    np.testing.assert_array_equal(seen.faces.boxes[0], expected)
    np.testing.assert_array_equal(seen.faces.landmarks[0], [expected[:2]] * 5)


def test_a_face_within_another_does_not_confirm_it(monkeypatch):
    strand = (30, 30, 50, 50, 0.98)
    seen = _see(monkeypatch, _faces(strand), _faces((10, 10, 110, 110, 0.93)))
    assert seen.counts.tolist() == [False, True]
    assert seen.yunet.tolist() == [0, np.float32(0.93)]


def test_each_face_is_confirmed_by_one_other(monkeypatch):
    first = _faces((*_BOX, 0.95), (24, 24, 88, 88, 0.94))
    seen = _see(monkeypatch, first, _faces((*_SHIFTED, 0.7)))
    # The two overlap so much that they are one face; the place is that of the surer one.
    np.testing.assert_array_equal(seen.faces.boxes, [_BOX])
    seen = _see(monkeypatch, _faces((*_BOX, 0.95), (*_AWAY, 0.96)), _faces((*_SHIFTED, 0.7)))
    assert seen.mtcnn.tolist() == [np.float32(0.96), np.float32(0.95)]
    assert seen.counts.tolist() == [False, True]


def test_without_a_second_detector_the_first_decides(monkeypatch):
    first = _faces((*_BOX, 0.95), (*_AWAY, 0.85), (0, 100, 30, 130, 0.7))
    seen = _see(monkeypatch, first, None)
    assert seen.yunet is None and seen.counts.tolist() == [True, False]


def test_a_strip_that_the_second_detector_cannot_look_at_is_not_said_to_be_seen(monkeypatch):
    strip = np.zeros((40, 4000, 3), np.uint8)
    seen = _see(monkeypatch, _faces((*_BOX, 0.95)), _faces((*_BOX, 0.95)), pixels=strip)
    assert seen.yunet is None and seen.counts.tolist() == [True]


def test_faces_of_smaller_pictures_lie_in_pixels_of_the_photo(monkeypatch):
    """A detector that finds a gray square wherever it is at least 60 px wide and at most 120."""

    def find(pixels, confidence):
        rows, columns = (np.flatnonzero(pixels[..., 0].max(axis=axis) > 64) for axis in (1, 0))
        if not len(rows) or not 60 <= len(rows) <= 120:
            return detect.no_faces()
        return _faces((rows[0], columns[0], rows[-1] + 1, columns[-1] + 1, confidence))

    monkeypatch.setattr(
        detect, "detect_faces", lambda variables, picture, *, options: find(picture, 0.95)
    )
    shapes = []

    def second(picture):
        shapes.append(picture.shape)
        return find(picture, 0.9)

    pixels = np.zeros((2400, 1000, 3), np.uint8)
    pixels[400:800, 100:500] = 128
    seen = union.detect_union({}, second, pixels)
    assert seen.counts.tolist() == [True]
    np.testing.assert_allclose(seen.faces.boxes, [[400, 100, 800, 500]], atol=4)
    # YuNet is not asked about the largest picture, and no detector about ever smaller ones.
    assert shapes == [(1200, 500, 3), (600, 250, 3), (300, 125, 3)]


@pytest.mark.parametrize("smallest, expected", [(20, 0), (28, 0), (30, 1), (50, 2)])
def test_levels_are_those_of_a_tracker(monkeypatch, smallest, expected):
    asked = []

    def detect_faces(variables, picture, *, options):
        asked.extend(detect.pyramid_scales(*picture.shape[:2], options))
        return detect.no_faces()

    monkeypatch.setattr(detect, "detect_faces", detect_faces)
    union.detect_union({}, None, _BLACK, options=union.UnionOptions(min_face_px=smallest))
    usual = detect.pyramid_scales(200, 200, detect.DetectorOptions())
    np.testing.assert_allclose(asked, usual[expected:], rtol=1e-12)


def test_confidences_rise():
    with pytest.raises(ValueError, match="must rise"):
        union.Confidences(0.9, 0.8, 0.99)


def test_the_portrait_has_one_face_that_both_see(variables, second):
    seen = union.detect_union(variables, second, skimage.data.astronaut())
    assert seen.counts.tolist() == [True]
    # Of MTCNN, see `test_detect.py`.
    box = np.float32([[63.7, 181.6, 171.1, 264.6]])
    assert detect.overlap(seen.faces.boxes, box)[0, 0] > 0.85
    assert seen.mtcnn[0] > 0.99 and seen.yunet[0] > 0.9


def test_without_its_weights_there_is_no_second_detector(monkeypatch):
    def missing():
        raise FileNotFoundError("the YuNet weights were not found: install them")

    monkeypatch.setattr(yunet, "find_weights", missing)
    assert union.load_second() is None


def _photo(shared, name):
    return Image.open(shared / "data" / "lfw" / name[:-5] / f"{name}.jpg").convert("RGB")


def _seen_by(variables, second, pixels):
    """How many faces MTCNN, YuNet and both together see in a photo, at default settings."""
    ours = detect.detect_faces(variables, pixels)
    theirs = second(pixels)
    return len(ours.boxes), len(theirs.boxes), union.detect_union(variables, second, pixels)


@pytest.mark.shared
def test_a_large_face_that_both_miss_at_full_size_is_found(shared, variables, second):
    large = _photo(shared, "Alejandro_Lembo_0001").resize((1316, 1316), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(0).normal(0, 60, (1316, 1316, 3))
    pixels = np.clip(np.asarray(large) + grain, 0, 255).astype(np.uint8)
    ours, theirs, seen = _seen_by(variables, second, pixels)
    assert (ours, theirs) == (0, 0)
    assert seen.counts.tolist() == [True]
    height = seen.faces.boxes[0, 2] - seen.faces.boxes[0, 0]
    assert height > 500


@pytest.mark.shared
def test_a_face_without_its_eyes_is_found(shared, variables, second):
    pixels = np.asarray(_photo(shared, "Ben_Wallace_0001"))[120:].copy()
    ours, theirs, seen = _seen_by(variables, second, pixels)
    assert (ours, theirs) == (0, 1)
    assert seen.counts.tolist() == [True] and seen.mtcnn[0] == 0


@pytest.mark.shared
def test_a_face_behind_bars_is_found(shared, variables, second):
    pixels = np.asarray(_photo(shared, "Kofi_Annan_0001")).copy()
    pixels[:, ::6] = pixels[:, 1::6] = 20
    ours, theirs, seen = _seen_by(variables, second, pixels)
    assert (ours, theirs) == (1, 0)
    assert seen.counts.tolist() == [True] and seen.yunet[0] == 0


@pytest.mark.shared
def test_half_a_face_is_told(shared, variables, second):
    pixels = np.asarray(_photo(shared, "Anna_Kournikova_0008"))[:, :125].copy()
    ours, theirs, seen = _seen_by(variables, second, pixels)
    assert (ours, theirs) == (0, 1)
    assert seen.counts.tolist() == [False] and seen.yunet[0] > 0.8


@pytest.mark.shared
@pytest.mark.parametrize("name", ["Ali_Naimi_0007", "Bill_Frist_0005"])
def test_a_masked_face_is_found(shared, variables, second, name):
    pixels = np.asarray(_photo(shared, name)).copy()
    pixels[140:230] = (60, 140, 160)
    seen = union.detect_union(variables, second, pixels)
    assert seen.counts.tolist() == [True]
