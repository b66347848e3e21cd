"""Which seen faces are cloaked, what is said of the others, and when a photo is not `cloaked`."""

import numpy as np
import pytest

from afr_jax.methods.cloaking import face_filter
from afr_jax.recognition import detect
from afr_jax.recognition.detectors import union

_SHAPE = (400, 400, 3)
_LARGE, _SMALL, _TINY = (10, 10, 210, 190), (250, 250, 320, 310), (300, 10, 312, 20)


def _seen(*rows, has_second=True):
    """Sightings of (box, MTCNN's confidence, YuNet's, whether it counts)."""
    boxes, ours, theirs, counts = zip(*rows, strict=True)
    ours, theirs = np.array(ours, np.float32), np.array(theirs, np.float32)
    boxes = np.array(boxes, np.float32)
    faces = detect.Faces(boxes, np.maximum(ours, theirs), np.zeros((len(boxes), 5, 2), np.float32))
    return union.Sightings(faces, ours, theirs if has_second else None, np.array(counts))


_FACES = _seen(
    (_SMALL, 0.99, 0.9, True),
    (_LARGE, 0.95, 0.7, True),
    (_TINY, 0.999, 0.9, True),
    ((220, 10, 290, 60), 0.98, 0.0, False),
    ((220, 100, 290, 160), 0.0, 0.82, False),
    ((330, 100, 390, 160), 0.75, 0.7, False),
)


def test_each_face_that_is_left_says_why():
    reasons = face_filter.FaceFilter().reasons(_FACES, _SHAPE)
    assert reasons == [
        None,
        None,
        "it is too small to be recognized",
        "only MTCNN sees a face here (confidence 0.98), YuNet does not",
        "only YuNet sees a face here (confidence 0.82), MTCNN does not",
        "both detectors doubt it (MTCNN 0.75, YuNet 0.70)",
    ]
    records = face_filter.skipped(_FACES, reasons)
    assert [record["reason"] for record in records] == reasons[2:]
    assert records[1]["box"] == [220, 10, 290, 60]
    assert records[1]["detectors"] == {"mtcnn": pytest.approx(0.98), "yunet": None}
    assert records[1]["confidence"] == pytest.approx(0.98)


def test_without_a_second_detector_the_confidence_is_the_reason():
    seen = _seen((_LARGE, 0.85, 0, False), has_second=False)
    (reason,) = face_filter.FaceFilter().reasons(seen, _SHAPE)
    assert reason == "confidence 0.85 is below 0.9"
    assert "yunet" not in face_filter.skipped(seen, [reason])[0]["detectors"]


def test_smallest_face_by_request():
    reasons = face_filter.FaceFilter(min_face_px=80).reasons(_FACES, _SHAPE)
    assert reasons[:2] == ["it is smaller than 80 px", None]


def test_the_largest_face_alone():
    reasons = face_filter.FaceFilter(faces="largest").reasons(_FACES, _SHAPE)
    assert reasons[0] == "it is not the largest face, which alone was asked for"
    assert reasons[1] is None and None not in reasons[2:]


def test_boxes_take_the_faces_in_them_and_no_others():
    # Around the small face, about the doubtful one, and where there is nothing.
    chosen = face_filter.FaceFilter(faces="240,240,80,90;100,330,60,60;0,300,9,9")
    reasons = chosen.reasons(_FACES, _SHAPE)
    asked = "it is not among the faces that were asked for"
    assert reasons == [None, asked, asked, asked, asked, None]
    (unseen,) = chosen.unseen(_FACES)
    assert unseen["box"] == [300, 0, 309, 9] and unseen["status"] == "skipped"
    assert "no detector sees a face" in unseen["reason"]
    with pytest.raises(ValueError, match="boxes of one photo, there are 2"):
        chosen.check_photos(2)


@pytest.mark.parametrize(
    "faces", ["", "some", "1,2,3", "1,2,3,x", "1,2,3,0", "1,2,3,4;5", "-1,2,3,4", "1,2,nan,4"]
)
def test_wrong_boxes_are_named(faces):
    with pytest.raises(ValueError, match=r"faces is .* must be all, largest, or boxes"):
        face_filter.FaceFilter(faces=faces)


def test_a_stricter_confidence_makes_the_first_detector_sure_later():
    options = face_filter.FaceFilter(min_confidence=0.9995).union_options(_SHAPE)
    assert options.mtcnn.sure == options.mtcnn.very_sure == 0.9995
    assert face_filter.FaceFilter(min_confidence=0.3).union_options(_SHAPE).mtcnn.doubtful == 0.3


@pytest.mark.parametrize(
    "statuses, expected",
    [
        (("cloaked", "cloaked"), False),
        (("cloaked", "skipped"), True),
        (("skipped", "cloaked"), False),
        (("cloaked", "unchanged"), True),
    ],
)
def test_the_largest_face_decides(statuses, expected):
    records = [
        {"detection": list(box), "status": status}
        for box, status in zip((_SMALL, _LARGE), statuses, strict=True)
    ]
    assert face_filter.largest_is_left(records) == expected
