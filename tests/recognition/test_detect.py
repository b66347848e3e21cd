"""The detector against the PyPI package it follows, its padding, and its parts against NumPy."""

import json

import jax
import jax.numpy as jnp
import make_references
import numpy as np
import pytest
import skimage.data

from afr_jax.core import images
from afr_jax.models import mtcnn
from afr_jax.recognition import detect


@pytest.fixture(scope="module", autouse=True)
def one_bucket():
    """All photos in one bucket: one program to compile, in seconds, instead of one for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detect, "_SIDE_BUCKETS", (512,))
        yield


@pytest.fixture(scope="module")
def variables():
    return mtcnn.read_weights(mtcnn.find_weights())


@pytest.fixture(scope="module")
def face_photo() -> np.ndarray:
    """`[230, 240, 3]`, one face of about 107 x 83 px."""
    return skimage.data.astronaut()[10:240, 110:350]


def _assert_same_faces(faces, others, *, pixels, confidence):
    assert len(faces.boxes) == len(others.boxes)
    np.testing.assert_allclose(faces.boxes, others.boxes, atol=pixels)
    np.testing.assert_allclose(faces.landmarks, others.landmarks, atol=pixels)
    np.testing.assert_allclose(faces.confidences, others.confidences, atol=confidence)


# Whole photos.


@pytest.mark.parametrize("name, count", [("portrait", 1), ("seven", 7)])
def test_faces_are_those_of_the_mtcnn_package(variables, name, count):
    faces = detect.detect_faces(variables, make_references.scenes()[name])
    stored = json.loads(make_references.FACES.read_text())[name]
    expected = detect.Faces(
        *(np.array([face[key] for face in stored]) for key in ("box", "confidence", "landmarks"))
    )
    assert len(stored) == count and faces.confidences.min() > 0.99
    # Stored to 0.0005 px; the cascade in float32 agrees to about as much.
    _assert_same_faces(faces, expected, pixels=0.005, confidence=2e-5)


def test_the_portrait_has_its_face_where_it_is(variables):
    """Figures that a person can check on the photo; the same compiled program as above."""
    faces = detect.detect_faces(variables, skimage.data.astronaut())
    np.testing.assert_allclose(faces.boxes, [[63.7, 181.6, 171.1, 264.6]], atol=0.1)
    landmarks = [[100.1, 203.5], [102.2, 245.4], [126.4, 224.2], [138.6, 201.8], [140.4, 244.4]]
    np.testing.assert_allclose(faces.landmarks, [landmarks], atol=0.1)
    for field in faces:
        assert isinstance(field, np.ndarray) and field.dtype == np.float32


def test_padding_does_not_change_the_faces(variables, face_photo, monkeypatch):
    options = detect.DetectorOptions(min_face_px=100)  # Three levels: quick to compile.
    found = []
    for side in (240, 272):
        monkeypatch.setattr(detect, "_SIDE_BUCKETS", (side,))
        found.append(detect.detect_faces(variables, face_photo, options=options))
    assert len(found[0].boxes) == 1
    # The starts of a level's pixels are known to about 1e-4 px.
    _assert_same_faces(*found, pixels=0.005, confidence=1e-5)


@pytest.mark.parametrize("rows, columns", [(230, 200), (201, 240), (180, 190)])
def test_cropping_the_photo_hardly_moves_the_face(variables, face_photo, rows, columns):
    whole = detect.detect_faces(variables, face_photo)
    # From the upper left, so that coordinates stay.
    crop = face_photo[:rows, :columns].copy()
    faces = detect.detect_faces(variables, crop)
    # Levels of other sizes show the networks other pixels.
    _assert_same_faces(faces, whole, pixels=4.0, confidence=0.02)


def test_a_shifted_crop_shifts_the_face(variables, face_photo):
    whole = detect.detect_faces(variables, face_photo)
    faces = detect.detect_faces(variables, face_photo[20:, 30:].copy())
    moved = detect.Faces(
        faces.boxes + np.tile(np.float32([20, 30]), 2),
        faces.confidences,
        faces.landmarks + np.float32([20, 30]),
    )
    _assert_same_faces(moved, whole, pixels=4.0, confidence=0.02)


def test_another_photo_of_the_bucket_does_not_compile_again(variables, face_photo, no_compilation):
    detect.detect_faces(variables, face_photo)
    with no_compilation():
        detect.detect_faces(variables, face_photo[3:, :-5].copy())
        detect.detect_faces(variables, face_photo[:, ::-1].copy())


def test_a_mirrored_photo_has_mirrored_faces(variables, face_photo):
    faces = detect.detect_faces(variables, face_photo)
    mirrored = detect.detect_faces(variables, face_photo[:, ::-1].copy())
    # The picture's left comes first in both.
    expected = (faces.landmarks * [1, -1] + [0, 239])[:, [1, 0, 2, 4, 3]]
    np.testing.assert_allclose(mirrored.landmarks, expected, atol=4.0)


def test_boxes_are_clipped_to_the_photo(variables, face_photo):
    """A face cut by the photo's edge (its box begins at row 53 of `face_photo`)."""
    cut = face_photo[65:, :].copy()
    faces = detect.detect_faces(variables, cut)
    assert len(faces.boxes) == 1
    assert faces.boxes[0, 0] == 0.0
    assert np.all(faces.boxes[:, 2:] <= np.array(cut.shape[:2]) - 1)


@pytest.mark.parametrize(
    "photo",
    [
        np.zeros((230, 240, 3), np.uint8),
        np.full((230, 240, 3), 255, np.uint8),
        np.random.default_rng(0).integers(0, 256, (230, 240, 3), dtype=np.uint8),
        np.zeros((11, 11, 3), np.uint8),
        np.zeros((12, 12, 3), np.uint8),
        np.zeros((1, 500, 3), np.uint8),
        np.zeros((500, 19, 3), np.uint8),
        np.zeros((0, 0, 3), np.uint8),
    ],
    ids=lambda photo: "x".join(map(str, photo.shape)) + f"-{photo.max(initial=0)}",
)
def test_photos_without_faces(variables, photo):
    faces = detect.detect_faces(variables, photo)
    assert faces.boxes.shape == (0, 4)
    assert faces.confidences.shape == (0,)
    assert faces.landmarks.shape == (0, 5, 2)
    assert all(field.dtype == np.float32 for field in faces)


def test_the_smallest_photo(variables):
    """One cell of one level, in a far larger bucket."""
    photo = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    scales = detect.pyramid_scales(20, 20, detect.DetectorOptions())
    assert detect.level_sizes(20, 20, scales) == ((12, 12),)
    assert len(detect.detect_faces(variables, photo).boxes) == 0


@pytest.mark.parametrize("photo", [np.zeros((50, 50, 3), np.float32), np.zeros((50, 50), np.uint8)])
def test_other_arrays_are_refused(photo):
    with pytest.raises(AssertionError):
        detect.detect_faces({}, photo)


def test_select_faces():
    rng = np.random.default_rng(0)
    faces = detect.Faces(rng.random((3, 4)), rng.random(3), rng.random((3, 5, 2)))
    chosen = detect.select_faces(faces, faces.confidences == faces.confidences[2])
    np.testing.assert_array_equal(chosen.boxes, faces.boxes[2:])
    np.testing.assert_array_equal(chosen.landmarks, faces.landmarks[2:])
    swapped = detect.select_faces(faces, np.array([1, 0]))
    np.testing.assert_array_equal(swapped.confidences, faces.confidences[[1, 0]])


@pytest.mark.parametrize(
    "boxes, best",
    [
        # The larger of two equally central ones.
        ([[40, 40, 60, 60], [30, 30, 70, 70]], 1),
        # The central one of two equal ones; 20 px off center cost 2 * 20^2 px of area.
        ([[0, 0, 40, 40], [30, 30, 70, 70]], 1),
        ([[30, 50, 70, 90], [36, 36, 64, 64]], 0),
        ([[30, 50, 70, 90], [35, 35, 65, 65]], 1),
        ([[0, 0, 5, 5]], 0),
    ],
)
def test_main_face_is_large_and_central(boxes, best):
    boxes = np.array(boxes, np.float32)
    count = len(boxes)
    faces = detect.Faces(boxes, np.linspace(0.9, 0.8, count), np.zeros((count, 5, 2)))
    chosen = detect.main_face(faces, (100, 100, 3))
    np.testing.assert_array_equal(chosen.boxes, boxes[[best]])
    assert chosen.landmarks.shape == (1, 5, 2)


def test_no_face_has_no_main_face(variables):
    none = detect.detect_faces(variables, np.zeros((9, 9, 3), np.uint8))
    assert detect.main_face(none, (9, 9, 3)).boxes.shape == (0, 4)


# The pyramid and the options.


def test_the_pyramid_of_kaziakhmedov():
    """Levels 1 to 3 of a 1280 x 720 photo; the 2019 patch paper rounds the same numbers up."""
    scales = detect.pyramid_scales(720, 1280, detect.DetectorOptions(min_face_px=60))
    assert scales[0] == 0.2
    np.testing.assert_allclose(np.diff(np.log(scales)), np.log(0.709))
    sizes = detect.level_sizes(720, 1280, scales)
    assert sizes[1:4] == ((102, 181), (72, 128), (51, 91))
    exact = np.array([720, 1280]) * np.array(scales)[1:4, None]
    np.testing.assert_array_equal(np.ceil(exact), [(103, 182), (73, 129), (52, 92)])
    assert min(sizes[-1]) >= 12 > min(sizes[-1]) * 0.709


@pytest.mark.parametrize(
    "size, min_face_px, count",
    [
        ((19, 500), 20, 0),
        ((20, 500), 20, 1),
        ((28, 29), 20, 1),
        ((29, 29), 20, 2),
        ((12, 12), 12, 1),
    ],
)
def test_number_of_levels(size, min_face_px, count):
    options = detect.DetectorOptions(min_face_px=min_face_px)
    scales = detect.pyramid_scales(*size, options)
    assert len(scales) == count
    assert all(min(level) >= 12 for level in detect.level_sizes(*size, scales))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"min_face_px": 11.9}, "min_face_px is 11.9"),
        ({"min_face_px": float("nan")}, "min_face_px is nan"),
        ({"scale_factor": 1.0}, "scale_factor is 1.0"),
        ({"scale_factor": 0.0}, "scale_factor is 0.0"),
        ({"thresholds": (0.6, 0.7)}, "thresholds is"),
        ({"thresholds": (0.6, 0.7, 1.1)}, "thresholds is"),
        ({"overlaps": (0.5, 0.7, -0.1, 0.7)}, "overlaps is"),
        ({"overlaps": (0.5, 0.7, 0.7)}, "overlaps is"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        detect.DetectorOptions(**changes)


def test_options_are_hashable():
    assert hash(detect.DetectorOptions()) == hash(detect.DetectorOptions())


# Overlaps and suppression.


def _overlap(box, other, of_smaller):
    height = max(min(box[2], other[2]) - max(box[0], other[0]), 0.0)
    width = max(min(box[3], other[3]) - max(box[1], other[1]), 0.0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    whole = min(areas) if of_smaller else sum(areas) - height * width
    return height * width / whole if whole > 0 else 0.0


def _random_boxes(count, seed=0):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 60, (count, 2))
    return np.concatenate([low, low + rng.uniform(1, 40, (count, 2))], axis=1).astype(np.float32)


@pytest.mark.parametrize("of_smaller", [False, True])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_overlap(kind, of_smaller):
    boxes, others = _random_boxes(12), _random_boxes(7, seed=1)
    # Equal, inside, touching, and without area.
    others[:4] = [boxes[0], boxes[1], [*boxes[2][2:], 200, 200], [5, 5, 5, 5]]
    others[1, 2:] = others[1, :2] + 0.5
    shares = detect.overlap(kind(boxes), kind(others), of_smaller=of_smaller)
    assert isinstance(shares, np.ndarray if kind is np.asarray else jax.Array)
    expected = [[_overlap(box, other, of_smaller) for other in others] for box in boxes]
    np.testing.assert_allclose(shares, expected, atol=1e-5)
    assert shares[0, 0] == pytest.approx(1.0) and shares[2, 2] == 0


def test_overlap_of_two_boxes_without_area_is_zero():
    point = np.float32([[5, 5, 5, 5]])
    assert detect.overlap(point, point) == 0
    assert detect.overlap(jnp.asarray(point), jnp.asarray(point), of_smaller=True)[0, 0] == 0


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    "count, limit, of_smaller", [(40, 0.2, False), (300, 0.3, True), (1, 0.5, False)]
)
def test_suppression(count, limit, of_smaller, grouped):
    rng = np.random.default_rng(2)
    boxes = _random_boxes(count, seed=3)
    scores = np.sort(rng.random(count).astype(np.float32))[::-1].copy()
    mask = rng.random(count) < 0.8
    groups = rng.integers(0, 3, count) if grouped else None
    suppress = jax.jit(detect._suppress, static_argnames=("limit", "of_smaller"))
    kept = suppress(
        detect._Candidates(boxes, scores, mask), limit=limit, groups=groups, of_smaller=of_smaller
    )
    expected = mask.copy()
    for i in range(count):
        for j in range(i):
            # Candidate j counts whether or not it is itself dropped, but not where it is filling.
            same = not grouped or groups[i] == groups[j]
            if mask[j] and same and _overlap(boxes[i], boxes[j], of_smaller) > limit:
                expected[i] = False
    assert count == 1 or 0 < expected.sum() < mask.sum()
    np.testing.assert_array_equal(kept, expected)


def test_a_suppressed_candidate_still_suppresses():
    """A chain: the second is dropped by the first, the third overlaps only the second."""
    boxes = jnp.array([[0.0, 0, 10, 10], [0, 4, 10, 14], [0, 8, 10, 18]])
    candidates = detect._Candidates(boxes, jnp.array([0.9, 0.8, 0.7]), jnp.ones(3, bool))
    kept = jax.jit(detect._suppress, static_argnums=1)(candidates, 0.3)
    np.testing.assert_array_equal(kept, [True, False, False])


def test_cells_behind_the_photo_propose_nothing(variables, face_photo):
    """A face in the padding of a level, which a true canvas does not have, is not seen."""
    scale = 12 / 80
    level = images.resize_area(mtcnn.normalize(jnp.float32(face_photo)), (34, 36))
    propose = jax.jit(detect._level_proposals)
    seen, boxes = propose(variables.pnet, level, jnp.array([34, 36]), scale)
    assert seen.size == 12 * 13 and seen.max() > 0.6
    # The cell's box is that of the face, in pixels of the photo.
    best = boxes[jnp.argmax(seen)]
    face = jnp.array([[53.7, 71.6, 161.1, 154.6]])
    assert detect.overlap(best[None], face)[0, 0] > 0.4
    hidden, _ = propose(variables.pnet, level, jnp.array([14, 36]), scale)
    hidden = np.asarray(hidden).reshape(12, 13)
    assert np.all(hidden[2:] == 0) and np.any(hidden[:2] > 0)


def test_ordering_puts_real_candidates_first():
    scores, mask = jnp.array([0.2, 0.9, 0.5, 0.7]), jnp.array([True, False, True, True])
    candidates = detect._Candidates(_random_boxes(4), scores, mask)
    ordered = detect._sorted(candidates)
    np.testing.assert_allclose(ordered.scores, [0.7, 0.5, 0.2, 0.9])
    np.testing.assert_array_equal(ordered.mask, [True, True, True, False])
    np.testing.assert_array_equal(ordered.boxes, candidates.boxes[np.array([3, 2, 0, 1])])


def test_square_keeps_centres_and_the_longer_side():
    boxes = _random_boxes(20)
    squares = np.asarray(detect._square(boxes))
    np.testing.assert_allclose(
        squares[:, :2] + squares[:, 2:], boxes[:, :2] + boxes[:, 2:], atol=1e-4
    )
    sides = squares[:, 2:] - squares[:, :2]
    longest = np.max(boxes[:, 2:] - boxes[:, :2], axis=1)
    np.testing.assert_allclose(sides, np.stack([longest, longest], axis=1), atol=1e-4)


def test_move_adds_shares_of_the_sides():
    """x and y have different sides, so a swap would show."""
    moved = detect._move(jnp.array([[10.0, 20, 29, 59]]), jnp.array([[0.1, 0.2, 0.3, 0.4]]))
    # Sides of 20 rows and 40 columns, counted in pixels; the network says x0, y0, x1, y1.
    np.testing.assert_allclose(
        moved, [[10 + 0.2 * 20, 20 + 0.1 * 40, 29 + 0.4 * 20, 59 + 0.3 * 40]]
    )


@pytest.mark.parametrize("count, num_real", [(5, 0), (5, 3), (8, 8), (20, 7), (20, 8), (21, 19)])
def test_a_network_sees_all_real_candidates_in_chunks(count, num_real):
    """Chunks of 8; the last one begins earlier where the number is no multiple."""
    boxes = jnp.asarray(_random_boxes(count))
    mask = jnp.arange(count) < num_real
    candidates = detect._Candidates(boxes, jnp.linspace(1.0, 0.5, count), mask)

    def net_fn(boxes):
        return jnp.sum(boxes, axis=1), 2 * boxes

    sums, doubled = jax.jit(lambda found: detect._in_chunks(net_fn, found, 8))(candidates)
    assert sums.shape == (count,) and doubled.shape == (count, 4)
    np.testing.assert_allclose(sums[:num_real], np.sum(boxes[:num_real], axis=1), rtol=1e-6)
    np.testing.assert_array_equal(doubled[:num_real], 2 * boxes[:num_real])


# Crops.


def _crop_and_resize(image, box, side):
    """TensorFlow's `crop_and_resize` of a box given in pixels, divided by the photo's sides."""
    limits = np.array(image.shape[:2]) - 1
    low, high = (box[:2], box[2:]) / np.array(image.shape[:2])
    crop = np.zeros((side, side, image.shape[2]))
    for i, j in np.ndindex(side, side):
        at = low * limits + np.array([i, j]) * (high - low) * limits / (side - 1)
        if np.any(at < 0) or np.any(at > limits):
            continue
        (top, left), (bottom, right) = np.floor(at).astype(int), np.ceil(at).astype(int)
        part = at - np.floor(at)
        upper = image[top, left] * (1 - part[1]) + image[top, right] * part[1]
        lower = image[bottom, left] * (1 - part[1]) + image[bottom, right] * part[1]
        crop[i, j] = upper * (1 - part[0]) + lower * part[0]
    return crop


def test_crops_are_those_of_tensorflow():
    image = np.random.default_rng(0).normal(size=(37, 50, 3))
    canvas = np.full((48, 64, 3), 99.0, np.float32)
    canvas[:37, :50] = image
    # Inside, enlarged, over each edge, wholly outside.
    boxes = np.float32(
        [[3, 4, 30, 31], [5.3, 8, 12, 14], [-6, -8, 20, 18], [20, 30, 60, 70], [90, 90, 99, 99]]
    )
    crops = detect._crops(canvas, jnp.array([37, 50]), boxes, 24)
    expected = [_crop_and_resize(image, box.astype(float), 24) for box in boxes]
    np.testing.assert_allclose(crops, expected, atol=2e-4)
