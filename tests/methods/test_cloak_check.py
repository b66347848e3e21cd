"""What is measured on a cloaked photo, against reading and recognizing its files again."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from afr_jax.data import photos
from afr_jax.methods.cloaking import budget as budget_lib
from afr_jax.methods.cloaking import check, photo_cloaks
from afr_jax.models.extractors import registry
from afr_jax.recognition import detect, embed, pipeline
from afr_jax.recognition.detectors import union

_SIDE = 16
_POINTS = np.array([[20, 15], [20, 30], [27, 22], [34, 16], [34, 29]], np.float32)
_OPTIONS = union.UnionOptions()
_LIMITS = budget_lib.Budget(0.9)


class _Dense(nn.Module):
    """All pixels of the chip, mixed at random."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(4)(images.reshape(len(images), -1))


def _extractor(name, threshold):
    dlib = registry.get("dlib")
    return registry.Extractor(
        name=name,
        module=_Dense(),
        input_px=_SIDE,
        template=tuple((y * _SIDE / 150, x * _SIDE / 150) for y, x in dlib.template),
        input_scale=1.0,
        input_offset=0.0,
        embedding_size=4,
        normalized=False,
        thresholds=registry.Thresholds(threshold, None, None),
        load=dlib.load,
        source="made up",
        license="none",
    )


def _variables(seed):
    return _Dense().init(jax.random.key(seed), jnp.zeros((1, _SIDE, _SIDE, 3)))


@pytest.fixture
def recognizer(monkeypatch):
    """Two faces, 50 px apart, whose landmarks depend on the pixels; a black corner hides one.

    In a black photo there is none.
    """

    def detect_faces(variables, pixels, *, options):
        if not pixels.any():
            return detect.no_faces()
        shift = np.array([0.0, 50.0])[:, None] * [0, 1]
        jitter = pixels.astype(np.float64).mean() % 1
        faces = detect.Faces(
            np.array([[10, 10, 40, 40], [10, 60, 40, 90]], np.float32),
            np.array([0.99, 0.95], np.float32),
            (_POINTS + shift[:, None] + jitter).astype(np.float32),
        )
        return faces if pixels[0, 0].any() else detect.select_faces(faces, np.array([1]))

    monkeypatch.setattr(detect, "detect_faces", detect_faces)
    # No distance is below the first threshold, and any is below the second.
    extractors = {"near": _extractor("near", 1e-9), "far": _extractor("far", 1e9)}
    variables = {name: _variables(seed) for seed, name in enumerate(extractors)}
    return pipeline.Recognizer({}, detect.DetectorOptions(), extractors, variables)


@pytest.fixture
def photo(recognizer):
    """A photo with its faces, and the same with both faces changed."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 216, (8, 13, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((104, 64), Image.Resampling.BICUBIC)).copy()
    final = pixels.copy()
    final[5:45, 5:95] += rng.integers(0, 12, (40, 90, 3), np.uint8)
    faces = detect.detect_faces({}, pixels, options=_OPTIONS)
    return photo_cloaks.PhotoFaces("p", pixels, False, None, faces), final


def _cloaked(limits):
    boxes = np.array([[10, 10, 40, 40], [10, 60, 40, 90]])
    regions = np.array([[5, 5, 45, 45], [5, 45, 45, 95]])
    return [
        photo_cloaks.CloakedFace(region, box, {"near": 2.0 + number}, limits)
        for number, (region, box) in enumerate(zip(regions, boxes, strict=True))
    ]


def _check(recognizer, photo, final, *, limits=_LIMITS, **options):
    defaults = {"surrogates": ["near"], "options": _OPTIONS}
    cloaked = _cloaked(limits)
    return check.check_photo(recognizer, None, photo, final, cloaked, **(defaults | options))


def test_verdicts_are_those_of_the_written_files(recognizer, photo, tmp_path):
    original, final = photo
    Image.fromarray(original.pixels).save(tmp_path / "original.png")
    Image.fromarray(final).save(tmp_path / "final.png")
    Image.fromarray(final).save(tmp_path / "final.jpg", quality=75)  # Pillow's default is 4:2:0.
    paths = [tmp_path / name for name in ("original.png", "final.png", "final.jpg")]
    found = list(pipeline.recognize(recognizer, paths, which="all"))
    records = _check(recognizer, original, final)
    assert [record["status"] for record in records] == ["cloaked", "cloaked"]
    for name in ("near", "far"):
        clean, written, compressed = (item.embeddings[name] for item in found)
        for number, record in enumerate(records):
            entry = record["extractors"][name]
            expected = np.linalg.norm(written[number] - clean[number])
            assert entry["distance"] == pytest.approx(expected, rel=1e-4)
            assert expected > 0.01
            after = np.linalg.norm(compressed[number] - clean[number])
            # Another decoder's rounding would move it by more.
            assert entry["after_jpeg75"]["distance"] == pytest.approx(after, rel=1e-4)
            assert abs(after - expected) > 1e-3
            assert entry["same_person"] == (name == "far")
            assert entry["after_jpeg75"]["same_person"] == (name == "far")
            assert entry["after_jpeg75"]["reason"] is None
            assert entry["surrogate"] == (name == "near")
            assert entry["threshold"] == recognizer.extractors[name].threshold
    before = [
        r["extractors"][n]["distance_before_budget"] for r in records for n in ("near", "far")
    ]
    assert before == [2.0, None, 3.0, None]


def test_a_face_is_held_to_its_own_limits(recognizer, photo):
    original, final = photo
    for dssim, status in ((0.9, "cloaked"), (1e-6, "failed")):
        limits = budget_lib.Budget(dssim, relief=budget_lib.Budget(0.95))
        records = _check(recognizer, original, final, limits=limits)
        assert [record["status"] for record in records] == [status] * 2
        assert [record["limits"]["dssim"] for record in records] == [dssim] * 2
        assert [record["limits"]["relief"] for record in records] == [None] * 2


def test_a_face_lost_to_jpeg_is_said_to_be(recognizer, photo, monkeypatch):
    original, final = photo
    whole = _check(recognizer, original, final)

    def through_jpeg(pixels, *, quality):
        pixels = pixels.copy()
        pixels[0, 0] = 0  # Hides the first face.
        return pixels

    monkeypatch.setattr(photos, "through_jpeg", through_jpeg)
    records = _check(recognizer, original, final)
    lost, kept = (record["extractors"]["near"]["after_jpeg75"] for record in records)
    reason = "the face was not found again"
    assert lost == {"distance": None, "same_person": None, "reason": reason}
    hidden = final.copy()
    hidden[0, 0] = 0
    landmarks = detect.detect_faces({}, hidden, options=_OPTIONS).landmarks[0]
    pairs = [(original.pixels, original.faces.landmarks[1]), (hidden, landmarks)]
    extractor = recognizer.extractors["near"]
    clean, again = embed.embed_faces(extractor, recognizer.variables["near"], pairs)
    assert kept["distance"] == pytest.approx(np.linalg.norm(again - clean), rel=1e-4)
    assert kept["same_person"] is False
    for record, one in zip(records, whole, strict=True):
        assert record["status"] == "cloaked"
        assert record["extractors"]["near"]["distance"] == one["extractors"]["near"]["distance"]


def test_a_face_lost_in_the_written_file_is_measured_where_it_was(recognizer, photo):
    original, final = photo
    final[0, 0] = 0  # Hides the first face.
    outside = original.pixels.copy()
    outside[0, 0] = 0
    original = original._replace(pixels=outside)
    lost, found = _check(recognizer, original, final)
    assert (lost["found_again"], found["found_again"]) == (False, True)
    assert lost["status"] == found["status"] == "cloaked" and lost["reason"] is None
    landmarks = original.faces.landmarks[0]
    pairs = [(original.pixels, landmarks), (final, landmarks)]
    extractor = recognizer.extractors["near"]
    clean, again = embed.embed_faces(extractor, recognizer.variables["near"], pairs)
    distance = lost["extractors"]["near"]["distance"]
    assert distance == pytest.approx(np.linalg.norm(again - clean), rel=1e-4)


def test_the_second_detector_finds_again_what_the_first_misses(recognizer, photo):
    original, final = photo
    final[0, 0] = 0
    moved = original.faces.landmarks[:1] + 1
    theirs = detect.Faces(original.faces.boxes[:1], np.float32([0.9]), moved)
    seen = check._find_again({}, lambda pixels: theirs, original.faces, final, _OPTIONS)
    np.testing.assert_array_equal(seen[0], moved[0])
    assert seen[1] is not None


def test_a_face_without_a_change_is_not_cloaked(recognizer, photo):
    original, final = photo
    final[:, :45] = original.pixels[:, :45]
    unchanged, other = _check(recognizer, original, final)
    assert (unchanged["status"], other["status"]) == ("unchanged", "cloaked")
    assert unchanged["reason"] == "no change within the budget was found"


@pytest.mark.parametrize(
    "budget, leak, reason",
    [
        (1e-6, 0, "of its budget (DSSIM at most 1e-06)"),
        (0.9, 1, "pixels outside the face regions changed"),
    ],
)
def test_broken_promises_fail(recognizer, photo, budget, leak, reason):
    original, final = photo
    final[-1, -1] += np.uint8(leak)
    for record in _check(recognizer, original, final, limits=budget_lib.Budget(budget)):
        assert record["status"] == "failed" and reason in record["reason"]


def _through_jpeg(pixels):
    return photos.through_jpeg(pixels, quality=90)


def test_after_jpeg_the_rest_is_that_of_the_original_in_jpeg(recognizer, photo):
    original, final = photo
    final[5:45, 5:95] ^= 24  # What 90 leaves of it must differ.
    written, plain = _through_jpeg(final), _through_jpeg(original.pixels)
    records = _check(recognizer, original, written, reencoded=plain)
    assert [record["status"] for record in records] == ["cloaked", "cloaked"]
    for record in _check(recognizer, original, written):
        assert record["reason"] == "pixels outside the face regions changed"
    written = written.copy()
    written[-1, -1] ^= 1
    for record in _check(recognizer, original, written, reencoded=plain):
        assert record["reason"] == "pixels outside the face regions changed"
    for record in _check(recognizer, original, plain, reencoded=plain):
        assert record["status"] == "unchanged"


def test_judging_again_gives_what_judging_at_once_gives(recognizer, photo):
    original, final = photo
    at_once = _check(recognizer, original, final)
    alone = {"near": recognizer.extractors["near"]}
    skipped = {"status": "skipped", "reason": "tiny"}
    first = [*_check(recognizer._replace(extractors=alone), original, final), skipped]
    assert [list(record["extractors"]) for record in first[:2]] == [["near"], ["near"]]
    again = check.judge_again(
        recognizer,
        None,
        original.pixels,
        original.faces,
        final,
        first,
        surrogates=["near"],
        options=_OPTIONS,
    )
    assert again == [*at_once, skipped]
