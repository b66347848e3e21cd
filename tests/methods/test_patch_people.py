"""Frames of one person: who is followed through a film, altered copies."""

import numpy as np
import pytest

from afr_jax.data import video
from afr_jax.methods.patches import people
from afr_jax.recognition import detect


def _faces(*boxes):
    """Faces of falling confidence."""
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    confidences = np.linspace(0.99, 0.8, len(boxes)).astype(np.float32)
    points = np.repeat(boxes[:, None, :2], 5, axis=1)
    return detect.Faces(boxes, confidences, points)


@pytest.fixture
def film(monkeypatch):
    """Six frames: a person who moves to the right, a bystander who is surer of being a face."""
    shown = [_faces([10, 10 + 4 * n, 40, 40 + 4 * n], [10, 200, 40, 230]) for n in range(6)]
    shown[2] = _faces()
    # In frame 3 the bystander comes first.
    shown[3] = _faces([10, 200, 40, 230], [10, 22, 40, 52])
    shown[0].confidences[0] = 0.999
    monkeypatch.setattr(detect, "detect_photos", lambda *args, **options: shown)
    return [video.Frame(f"f{n}", np.zeros((60, 240, 3), np.uint8)) for n in range(6)]


def test_a_person_is_followed_through_a_film(film):
    found, lost = people.find_person({}, film, is_film=True)
    assert [one.name for one in found] == ["f0", "f1", "f3", "f4", "f5"]
    assert lost == [("f2", people.NO_FACE)]
    assert [one.box[1] for one in found] == [10, 14, 22, 26, 30]
    found, _ = people.find_person({}, film, is_film=False)
    assert found[2].box[1] == 200


def test_no_frames_and_no_faces(monkeypatch):
    monkeypatch.setattr(detect, "detect_photos", lambda *args, **options: [_faces()])
    frame = video.Frame("a", np.zeros((8, 8, 3), np.uint8))
    assert people.find_person({}, [frame], is_film=True) == ([], [("a", people.NO_FACE)])


@pytest.mark.parametrize(
    "frames, names",
    [
        (np.zeros((2, 4, 4, 3), np.uint8), ["0000", "0001"]),
        ([video.Frame("a", np.zeros((4, 4, 3), np.uint8))], ["a"]),
        (video.Frames([video.Frame("b", np.zeros((4, 4, 3), np.uint8))], []), ["b"]),
    ],
)
def test_frames_come_in_any_form(frames, names):
    assert [frame.name for frame in people.as_frames(frames)] == names


def test_frames_in_another_range_are_refused():
    with pytest.raises(ValueError, match="must be uint8"):
        people.as_frames(np.zeros((2, 4, 4, 3), np.float32))


def test_altered_copies_keep_box_and_landmarks_on_the_face():
    generator = np.random.default_rng(0)
    pixels = np.zeros((120, 160, 3), np.uint8)
    landmarks = np.array([[40, 60], [40, 80], [50, 70], [60, 62], [60, 78]], np.float32)
    for y, x in landmarks.astype(int):
        pixels[y - 1 : y + 2, x - 1 : x + 2] = 200
    person = people.Person("p", pixels, np.float32([30, 50, 70, 90]), landmarks)
    copies = people.fill_up([person], 8, seed=1)
    assert [copy.is_altered for copy in copies] == [False] + [True] * 7
    for copy in [people.alter(generator, person, number=n) for n in range(6)] + copies:
        assert copy.pixels.shape == pixels.shape
        # The picture's left comes first, also in a mirrored photo.
        assert copy.landmarks[0, 1] < copy.landmarks[1, 1]
        for y, x in copy.landmarks:
            near = copy.pixels[int(y) - 3 : int(y) + 5, int(x) - 3 : int(x) + 5, 0].astype(float)
            rows, columns = np.indices(near.shape)
            centre = [(near * grid).sum() / near.sum() for grid in (rows, columns)]
            np.testing.assert_allclose(
                [centre[0] + int(y) - 3, centre[1] + int(x) - 3], [y, x], atol=0.6
            )
        low, high = copy.landmarks.min(0), copy.landmarks.max(0)
        assert (low >= copy.box[:2]).all() and (high <= copy.box[2:]).all()


@pytest.mark.parametrize(
    "total, seed, names, altered",
    [(2, 1, "ab", 0), (3, 1, "abc", 0), (5, 1, "abc", 2), (5, None, "abc", 0)],
)
def test_altered_copies_fill_up_what_is_missing(total, seed, names, altered):
    pixels, box = np.zeros((90, 120, 3), np.uint8), np.float32([30, 50, 70, 90])
    landmarks = np.float32([[44, 62], [44, 78], [52, 70], [60, 63], [60, 77]])
    persons = [people.Person(name, pixels, box, landmarks) for name in "abc"]
    found = people.choose(persons, total, seed=seed)
    assert [one.name for one in found if not one.is_altered] == list(names)
    assert sum(one.is_altered for one in found) == altered
