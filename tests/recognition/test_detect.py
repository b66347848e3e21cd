"""The detector against the PyPI package it follows, and its parts against NumPy."""

import json

import chex
import cv2
import jax
import jax.numpy as jnp
import make_references
import numpy as np
import pytest
import skimage.data

from afr_jax.models import mtcnn
from afr_jax.recognition import detect


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


@pytest.mark.parametrize("batch", [1, 4])
def test_filling_up_batches_does_not_change_the_faces(variables, face_photo, monkeypatch, batch):
    whole = detect.detect_faces(variables, face_photo)
    batches = detect._Batches((batch, batch), (batch, 7 * batch), (batch, 3 * batch))
    monkeypatch.setattr(detect, "_CPU_BATCHES", batches)
    faces = detect.detect_faces(variables, face_photo)
    _assert_same_faces(faces, whole, pixels=0.001, confidence=1e-6)


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


def test_photos_of_any_size_share_six_programs(variables, face_photo):
    with pytest.MonkeyPatch.context() as patch:
        # Each for few and for many inputs.
        for name, count in (("_pnet", 2), ("_rnet", 2), ("_onet", 2)):
            traced = chex.assert_max_traces(getattr(detect, name).__wrapped__, n=count)
            patch.setattr(detect, name, jax.jit(traced))
        rng = np.random.default_rng(0)
        for height, width in [(230, 240), (97, 401), (640, 333), (13, 700), (300, 300)]:
            photo = rng.integers(0, 255, (height, width, 3), np.uint8)
            photo[: min(height, 230), : min(width, 240)] = face_photo[:height, :width]
            for factor in (0.709, 0.9):
                options = detect.DetectorOptions(scale_factor=factor)
                detect.detect_faces(variables, photo, options=options)


def test_a_large_photo_is_looked_at_reduced_and_the_face_is_where_it_is(
    variables, face_photo, monkeypatch
):
    whole = detect.detect_faces(variables, face_photo)
    seen = []
    propose = detect._propose
    monkeypatch.setattr(
        detect, "_propose", lambda *some: seen.append(some[1].shape) or propose(*some)
    )
    monkeypatch.setattr(detect, "_MOST_PIXELS", face_photo.shape[0] * face_photo.shape[1] // 4)
    faces = detect.detect_faces(variables, face_photo)
    assert seen == [(115, 120, 3)]
    # Of 107 px, at half of the size.
    _assert_same_faces(faces, whole, pixels=6.0, confidence=0.02)


def test_overlaps_in_memory_do_not_grow_with_the_square_of_the_boxes(monkeypatch):
    boxes = np.tile(np.float32([[0, 0, 10, 10]]), (500, 1))
    boxes += np.arange(500, dtype=np.float32)[:, None]
    whole = detect._survivors(boxes, 0.3)
    sizes = []
    overlap = detect.overlap

    def measured(*some, **options):
        sizes.append(overlap(*some, **options))
        return sizes[-1]

    monkeypatch.setattr(detect, "overlap", measured)
    monkeypatch.setattr(detect, "_OVERLAPS_AT_ONCE", 4000)
    np.testing.assert_array_equal(detect._survivors(boxes, 0.3), whole)
    assert max(found.size for found in sizes) <= 4000


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
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_overlap(dtype, of_smaller):
    boxes, others = _random_boxes(12), _random_boxes(7, seed=1)
    # Equal, inside, touching, and without area.
    others[:4] = [boxes[0], boxes[1], [*boxes[2][2:], 200, 200], [5, 5, 5, 5]]
    others[1, 2:] = others[1, :2] + 1
    boxes, others = boxes.astype(dtype), others.astype(dtype)
    shares = detect.overlap(boxes, others, of_smaller=of_smaller)
    assert shares.dtype == (np.float32 if dtype == np.float32 else np.float64)
    expected = [[_overlap(box, other, of_smaller) for other in others] for box in boxes]
    np.testing.assert_allclose(shares, expected, atol=1e-5)
    assert shares[0, 0] == pytest.approx(1.0) and shares[2, 2] == 0


def test_overlap_of_two_boxes_without_area_is_zero():
    point = np.float32([[5, 5, 5, 5]])
    assert detect.overlap(point, point) == 0
    assert detect.overlap(point, point, of_smaller=True) == 0


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    "count, limit, of_smaller", [(40, 0.2, False), (300, 0.3, True), (1, 0.5, False)]
)
def test_suppression(count, limit, of_smaller, grouped):
    rng = np.random.default_rng(2)
    boxes = _random_boxes(count, seed=3)
    groups = rng.integers(0, 3, count) if grouped else None
    kept = detect._survivors(boxes, limit, groups=groups, of_smaller=of_smaller)
    expected = np.ones(count, bool)
    for i in range(count):
        for j in range(i):
            # Box j counts whether or not it is itself dropped.
            same = not grouped or groups[i] == groups[j]
            if same and _overlap(boxes[i], boxes[j], of_smaller) > limit:
                expected[i] = False
    assert count == 1 or 0 < expected.sum() < count
    np.testing.assert_array_equal(kept, np.flatnonzero(expected))


def test_a_suppressed_box_still_suppresses():
    """A chain: the second is dropped by the first, the third overlaps only the second."""
    boxes = np.float32([[0, 0, 10, 10], [0, 4, 10, 14], [0, 8, 10, 18]])
    np.testing.assert_array_equal(detect._survivors(boxes, 0.3), [0])


# The pyramid.


@pytest.mark.parametrize(
    "sizes",
    [
        ((12, 12),),
        ((256, 256), (255, 257), (13, 1000), (11, 300)),
        ((503, 747), (356, 529), (253, 375), (179, 266), (127, 188), (90, 133), (17, 25), (12, 17)),
        ((1024, 768), (12, 4000)),
    ],
)
def test_every_cell_of_every_level_lies_in_one_piece_and_no_pieces_overlap(sizes):
    pieces, num_tiles = detect._layout(sizes)
    cells = [np.zeros([max(int(mtcnn.map_size(side)), 0) for side in size], int) for size in sizes]
    tiles = np.zeros((num_tiles, detect._TILE_PX, detect._TILE_PX), int)
    for piece in pieces:
        rows, columns = (int(mtcnn.map_size(side)) for side in piece.size)
        cells[piece.level][detect._cells(piece.start, rows, columns)] += 1
        (y, x), (height, width) = piece.place, piece.size
        assert y % 2 == x % 2 == piece.start[0] % 2 == piece.start[1] % 2 == 0
        assert np.all(np.add(piece.start, piece.size) <= sizes[piece.level])
        # An odd side keeps a line free, which pooling looks at.
        assert y + height + height % 2 <= detect._TILE_PX
        assert x + width + width % 2 <= detect._TILE_PX
        tiles[piece.tile, y : y + height + height % 2, x : x + width + width % 2] += 1
    assert tiles.max() == 1 and np.all(tiles.any(axis=(1, 2)))
    for size, counted in zip(sizes, cells, strict=True):
        assert counted.size == 0 or min(size) < 12 or (counted == 1).all()


@pytest.mark.parametrize("tile_px", [128, 64])
def test_proposals_are_those_of_whole_levels(variables, face_photo, monkeypatch, tile_px):
    """P-Net on each level by itself, sides odd and even, against the tiles."""
    photo = face_photo[:201, :178]
    options = detect.DetectorOptions(min_face_px=30, thresholds=(0.2, 0.7, 0.8))
    monkeypatch.setattr(detect, "_TILE_PX", tile_px)
    monkeypatch.setattr(detect, "_TILE_CELLS", (tile_px - 1) // 2 - 4)
    detect._layout.cache_clear()
    found, levels = detect._propose(variables.pnet, photo, (1, 3), options)
    detect._layout.cache_clear()
    scales = detect.pyramid_scales(*photo.shape[:2], options)
    expected_boxes, expected_scores, expected_levels = [], [], []
    for number, scale in enumerate(scales):
        ((height, width),) = detect.level_sizes(*photo.shape[:2], (scale,))
        level = cv2.resize(np.float32(photo), (width, height), interpolation=cv2.INTER_AREA)
        outputs = jax.jit(mtcnn.PNet().apply)(
            variables.pnet, mtcnn.normalize(level)[None], jnp.array([[height, width]])
        )
        scores, regression = (np.asarray(leaf) for leaf in outputs)
        for row, column in np.argwhere(scores[0] > options.thresholds[0]):
            x0, y0, x1, y1 = regression[0, row, column].astype(float) * 11
            low, high = 2 * np.array([row, column]) + 1, 2 * np.array([row, column]) + 12
            box = [low[0] + y0, low[1] + x0, high[0] + y1, high[1] + x1]
            expected_boxes.append(np.array(box) / scale)
            expected_scores.append(float(scores[0, row, column]))
            expected_levels.append(number)
    assert len(expected_scores) > 20
    order = np.argsort(-np.array(expected_scores), kind="stable")
    np.testing.assert_allclose(found.scores, np.array(expected_scores)[order], atol=1e-5)
    # Equal scores may change places.
    by_box = np.lexsort(np.round(found.boxes.T, 1))
    by_expected = np.lexsort(np.round(np.array(expected_boxes).T, 1))
    np.testing.assert_allclose(
        found.boxes[by_box], np.array(expected_boxes)[by_expected], atol=0.01
    )
    np.testing.assert_array_equal(np.sort(levels), expected_levels)


@pytest.mark.parametrize("height, width", [(458, 640), (37, 1003), (200, 200)])
def test_small_levels_are_averaged_as_by_opencv(height, width):
    """The levels that do not go through OpenCV, to the last bits."""
    image = np.random.default_rng(0).uniform(0, 255, (height, width, 3)).astype(np.float32)
    for scale in (0.34, 0.3, 0.25, 0.1301, 0.06):
        size = int(height * scale), int(width * scale)
        expected = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        level = detect._resize(image, size)
        assert level.flags.c_contiguous and level.dtype == np.float32
        np.testing.assert_allclose(level, mtcnn.normalize(expected), atol=2e-6)


def test_square_keeps_centres_and_the_longer_side():
    boxes = _random_boxes(20)
    squares = detect._square(boxes)
    np.testing.assert_allclose(
        squares[:, :2] + squares[:, 2:], boxes[:, :2] + boxes[:, 2:], atol=1e-4
    )
    sides = squares[:, 2:] - squares[:, :2]
    longest = np.max(boxes[:, 2:] - boxes[:, :2], axis=1)
    np.testing.assert_allclose(sides, np.stack([longest, longest], axis=1), atol=1e-4)


def test_move_adds_shares_of_the_sides():
    """x and y have different sides, so a swap would show."""
    moved = detect._move(np.float32([[10, 20, 29, 59]]), np.float32([[0.1, 0.2, 0.3, 0.4]]))
    # Sides of 20 rows and 40 columns, counted in pixels; the network says x0, y0, x1, y1.
    np.testing.assert_allclose(
        moved, [[10 + 0.2 * 20, 20 + 0.1 * 40, 29 + 0.4 * 20, 59 + 0.3 * 40]]
    )


@pytest.mark.parametrize("count", [0, 1, 8, 13, 19])
def test_a_network_sees_all_crops_in_batches(count, monkeypatch):
    crops = np.random.default_rng(0).normal(size=(count + 1, 3, 3, 3)).astype(np.float32)
    seen = []

    def net_fn(scale, batch):
        seen.append(len(batch))
        return scale * batch.sum(axis=(1, 2, 3)), batch[:, 0, 0]

    monkeypatch.setattr(detect, "_corners", lambda packed, boxes, side: packed[boxes[:, 0]])
    boxes = np.tile(np.arange(count)[:, None], 4)
    sums, corners = detect._in_batches(net_fn, 2.0, crops, boxes, side=3, batches=(2, 8))
    # As many as fit, the rest few at a time where that is less.
    assert seen == {0: [2], 1: [2], 8: [8], 13: [8, 2, 2, 2], 19: [8, 8, 2, 2]}[count]
    np.testing.assert_allclose(sums, 2 * crops[:count].sum(axis=(1, 2, 3)), rtol=1e-6)
    np.testing.assert_array_equal(corners, crops[:count, 0, 0])


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
    photo = np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)
    # Inside, enlarged, over each edge, wholly outside.
    boxes = np.float32(
        [[3, 4, 30, 31], [5.3, 8, 12, 14], [-6, -8, 20, 18], [20, 30, 60, 70], [90, 90, 99, 99]]
    )
    crops = detect._interpolated(detect._corners(detect._packed(photo), boxes, 24))
    image = mtcnn.normalize(photo.astype(float))
    expected = [_crop_and_resize(image, box.astype(float), 24) for box in boxes]
    np.testing.assert_allclose(crops, expected, atol=2e-4)
    assert crops.dtype == np.float32 and not np.any(crops[4])
