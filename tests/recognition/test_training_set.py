"""Chips of photos and their alignment, the cache of aligned chips, splits and pairs."""

import numpy as np
import pytest
from PIL import Image

from afr_jax.data import identities
from afr_jax.recognition import chips, detect, training_photos

_SIDE = 32


def _photo(seed, size):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def test_landmarks_at_the_template_give_the_photo_itself():
    photo = _photo(0, _SIDE)
    template = np.array(chips.template_for(_SIDE))
    np.testing.assert_array_equal(chips.face_chip(photo, template, template, _SIDE), photo)


def test_a_photo_of_twice_the_size_is_averaged_and_a_shift_is_followed():
    photo = _photo(1, 2 * _SIDE + 20)
    template = np.array(chips.template_for(_SIDE))
    # Pixel centers of a chip of half the size, at (6, 10) in the photo.
    landmarks = 2 * template + 0.5 + np.array([6, 10])
    chip = chips.face_chip(photo, landmarks, template, _SIDE)
    piece = photo[6 : 6 + 2 * _SIDE, 10 : 10 + 2 * _SIDE].astype(float)
    expected = piece.reshape(_SIDE, 2, _SIDE, 2, 3).mean(axis=(1, 3))
    # The pooling grid may lie between the pixels of the chip: smooth photos hide that.
    assert np.abs(chip - expected).mean() < 3
    with pytest.raises(ValueError, match="face"):
        chips.face_chip(photo, np.zeros((5, 2)), template, _SIDE)


def test_the_template_scales_about_the_corner_of_the_image():
    small, large = (np.array(chips.template_for(side)) for side in (56, 112))
    np.testing.assert_allclose((large + 0.5) / 2, small + 0.5)
    # InsightFace's own 112 px template, (y, x).
    np.testing.assert_allclose(large[2], [71.7366, 56.0252])


@pytest.fixture
def fake_detector(monkeypatch):
    """Finds a face at the template of the whole photo, none in dark ones; counts its calls."""
    calls = []

    def detect_faces(variables, pixels, *, options=None):
        del variables, options
        calls.append(pixels.shape)
        count = int(pixels.mean() > 20)
        points = np.array(chips.template_for(len(pixels)), np.float32)[None]
        box = np.array([[0, 0, len(pixels), len(pixels)]], np.float32)
        return detect.Faces(box[:count], np.ones(count, np.float32), points[:count])

    monkeypatch.setattr(detect, "detect_faces", detect_faces)
    return calls


def _tree(root):
    for person in range(3):
        for number in range(4):
            path = root / f"person_{person}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(_photo(10 * person + number, _SIDE)).save(path)
    Image.new("RGB", (_SIDE, _SIDE)).save(root / "person_0" / "dark.png")
    (root / "person_1" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return identities.list_tree(root)


def test_aligned_faces_are_kept(tmp_path, fake_detector):
    listing, cache = _tree(tmp_path / "faces"), tmp_path / "chips.npz"
    counts = []
    found, images = training_photos.aligned_faces(
        {}, listing, _SIDE, cache, report_fn=counts.append
    )
    assert sum(counts) == 14 and len(found.samples) == 12 and len(fake_detector) == 13
    reasons = {problem.name: problem.reason for problem in found.problems}
    assert reasons["person_0/dark.png"] == "no face was found"
    assert "damaged" in reasons["person_1/broken.png"]
    expected = np.asarray(Image.open(tmp_path / "faces" / found.sample_ids[5]))
    np.testing.assert_array_equal(images[5], expected)
    again, kept = training_photos.aligned_faces({}, listing, _SIDE, cache)
    assert again == found and len(fake_detector) == 13
    np.testing.assert_array_equal(kept, images)
    with pytest.raises(ValueError, match="another size"):
        training_photos.aligned_faces({}, listing, 16, cache)
    with pytest.raises(ValueError, match="other photos"):
        training_photos.aligned_faces({}, listing.with_photos(5), _SIDE, cache)
    Image.fromarray(_photo(99, _SIDE)).save(found.samples[3].path)
    with pytest.raises(ValueError, match="other photos"):
        training_photos.aligned_faces({}, listing, _SIDE, cache)


def test_the_alignment_of_crops_is_measured(fake_detector):
    crops = np.stack([_photo(seed, 40) for seed in range(12)])
    template = chips.measured_template({}, crops)
    np.testing.assert_allclose(template, chips.template_for(40), rtol=1e-5)
    assert chips.measured_template({}, crops[:5]) is None
    # Too small for a detector: it is not asked.
    calls = len(fake_detector)
    assert chips.measured_template({}, crops[:, :24, :24]) is None
    assert len(fake_detector) == calls


def test_everybody_keeps_a_photo_for_training():
    samples = tuple(
        identities.Sample(f"p{i // 2:03d}/{i}.png", f"p{i // 2:03d}", None) for i in range(400)
    )
    images = np.zeros((400, 2, 2, 3), np.uint8)
    faces = training_photos.split_faces(identities.Listing(samples), images, side=2, held_out=0.5)
    assert set(faces.training_labels) == set(range(200))
    assert len(faces.held_out) + len(faces.training) == 400
    assert len(faces.held_out) == len(faces.held_out_labels) > 100
    with pytest.raises(ValueError, match="two people"):
        training_photos.split_faces(identities.Listing(samples[:2]), images[:2], side=2)


def test_listed_pairs(tmp_path):
    listing = _tree(tmp_path / "faces")
    names = [name for name in listing.sample_ids if "dark" not in name]
    rows = [(a, b, int(a[:8] == b[:8])) for a in names for b in names if a < b]
    table = tmp_path / "pairs.csv"
    lines = ["image_a,image_b,same", *(f"{a},{b},{same}" for a, b, same in rows)]
    table.write_text("\n".join(lines))
    found = training_photos.listed_pairs(table, tmp_path / "faces", 8)
    assert found.problems[0].name == "person_1/broken.png"
    usable = [row for row in rows if "broken" not in row[0] + row[1]]
    assert len(found.rows) == len(usable) and found.images.shape == (12, 8, 8, 3)
    np.testing.assert_array_equal(found.same, [bool(same) for _, _, same in usable])

    def read(listing):
        made = np.zeros((len(listing.samples), 8, 8, 3), np.uint8)
        return identities.Listing(listing.samples), made

    # As many pairs as do not touch the person.
    faces = tmp_path / "faces"
    others = training_photos.pairs_through(table, faces, read, known_people={"person_1"})
    assert len(others.rows) == sum("person_1" not in a + b for a, b, _ in rows) < len(rows)
    # A table may be somebody else's: it names files below the folder, or is told so.
    (tmp_path / "person_9").mkdir()
    (tmp_path / "person_9" / "secret.png").write_bytes(b"")
    strange = ["../person_9/secret.png", str(tmp_path / "person_9" / "secret.png")]
    table.write_text("\n".join([*lines, *(f"{names[0]},{name},0" for name in strange)]))
    inside = training_photos.pairs_through(table, faces, read)
    assert len(inside.rows) == len(rows)
    assert [problem.name for problem in inside.problems] == sorted(strange)
    assert all("outside" in problem.reason for problem in inside.problems)
    table.write_text("\n".join(lines[:5]))
    with pytest.raises(ValueError, match="usable pairs"):
        training_photos.listed_pairs(table, tmp_path / "faces", 8)
