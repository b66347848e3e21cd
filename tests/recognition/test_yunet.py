"""The second detector: where it finds the portrait's face, its conventions, and wrong files."""

import concurrent.futures

import numpy as np
import pytest
import skimage.data

from afr_jax.models.extractors import sface
from afr_jax.recognition import detect
from afr_jax.recognition.detectors import yunet

# Of MTCNN, see `test_detect.py`; a person can check them on the photo.
_BOX = np.float32([[63.7, 181.6, 171.1, 264.6]])
_LANDMARKS = [[100.1, 203.5], [102.2, 245.4], [126.4, 224.2], [138.6, 201.8], [140.4, 244.4]]


@pytest.fixture(scope="module")
def detect_fn():
    return yunet.load()


def test_the_portrait_has_its_face_where_mtcnn_finds_it(detect_fn):
    faces = detect_fn(skimage.data.astronaut())
    assert faces.boxes.shape == (1, 4) and faces.landmarks.shape == (1, 5, 2)
    for field in faces:
        assert field.dtype == np.float32
    assert detect.overlap(faces.boxes, _BOX)[0, 0] > 0.8
    # The order of the five is the same: no other two are so close.
    np.testing.assert_allclose(faces.landmarks[0], _LANDMARKS, atol=5)
    assert 0.9 < faces.confidences[0] <= 1


def test_boxes_lie_within_the_photo_most_confident_first(detect_fn):
    portrait = skimage.data.astronaut()
    # A face cut off at the top and the left, beside a whole one.
    pixels = np.concatenate([portrait[80:300, 200:420], portrait[20:240, 100:320]], axis=1)
    faces = detect_fn(pixels)
    assert len(faces.boxes) == 2
    assert np.all(np.diff(faces.confidences) <= 0)
    assert np.all(faces.boxes >= 0) and np.all(faces.boxes <= 439)
    assert np.all(faces.boxes[:, :2] < faces.boxes[:, 2:])
    assert np.any(faces.boxes == 0)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (64, 64), (33, 200)])
def test_a_photo_without_faces_gives_empty_arrays(detect_fn, shape):
    faces = detect_fn(np.zeros((*shape, 3), np.uint8))
    for field, empty in zip(faces, detect.no_faces(), strict=True):
        assert field.shape == empty.shape


def test_a_doubtful_face_counts_by_its_confidence():
    portrait = skimage.data.astronaut()
    confidence = yunet.load()(portrait).confidences[0]
    assert len(yunet.load(min_confidence=confidence - 0.01)(portrait).boxes) == 1
    assert len(yunet.load(min_confidence=confidence + 0.01)(portrait).boxes) == 0
    with pytest.raises(ValueError, match=r"min_confidence is 1.5"):
        yunet.load(min_confidence=1.5)


def test_threads_share_a_detector(detect_fn):
    portrait = skimage.data.astronaut()
    photos = [portrait, portrait[:256, 64:400]] * 4
    alone = [detect_fn(pixels) for pixels in photos]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(detect_fn, photos))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.onnx"):
        yunet.load(path=tmp_path / "none.onnx")
    path = tmp_path / "cut.onnx"
    for data in (b"", b"no network", yunet.find_weights().read_bytes()[:50_000]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"cut.onnx is not a readable YuNet"):
            yunet.load(path=path)
    with pytest.raises(ValueError, match="is not a readable YuNet"):
        yunet.load(path=sface.find_weights())
