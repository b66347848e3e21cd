"""Labelled sets and noise by id: stable ids, exact budgets, same bytes, odd files."""

import io

import numpy as np
import pytest
from PIL import Image

from afr_jax.data import image_sets, noise_files


def _save(path, pixels, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def tree(tmp_path):
    """Two classes: good images, a grey one, one of another size, half a file, a text, a stray."""
    generator = np.random.default_rng(0)
    for name in ("cat/a.png", "cat/b.png", "dog/a.png", "dog/c.png"):
        _save(tmp_path / name, generator.integers(0, 256, (16, 16, 3)).astype(np.uint8))
    _save(tmp_path / "dog/grey.png", np.full((16, 16, 3), 77, np.uint8), "L")
    _save(tmp_path / "dog/large.png", np.full((30, 20, 3), 9, np.uint8))
    _save(tmp_path / "dog/wide.bmp", np.full((16, 16, 3), 200, np.uint8))
    (tmp_path / "cat/half.png").write_bytes((tmp_path / "cat/a.png").read_bytes()[:200])
    (tmp_path / "cat/notes.txt").write_text("no image")
    (tmp_path / "stray.png").write_bytes((tmp_path / "cat/a.png").read_bytes())
    return tmp_path


def test_a_tree_keeps_what_fits_and_names_the_rest(tree):
    data = image_sets.read_tree(tree)
    ids = ("cat/a", "cat/b", "dog/a", "dog/c", "dog/grey", "dog/wide")
    assert data.sample_ids == ids
    assert data.classes == ("cat", "dog") and data.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert (data.images[4] == 77).all() and (data.images[5] == 200).all()
    np.testing.assert_array_equal(data.images[0], np.asarray(Image.open(tree / "cat/a.png")))
    reasons = {problem.name: problem.reason for problem in data.problems}
    assert reasons["dog/large.png"] == "is 30 x 20 px, not 16 x 16"
    assert "damaged" in reasons["cat/half.png"] and "not a photo" in reasons["cat/notes.txt"]
    assert "stray.png" in reasons and len(reasons) == 4
    resized = image_sets.read_tree(tree, resize=True)
    assert "dog/large" in resized.sample_ids and resized.images.shape == (7, 16, 16, 3)


def test_two_files_that_differ_in_their_extension_get_two_ids(tree):
    (tree / "cat/a.bmp").write_bytes((tree / "dog/wide.bmp").read_bytes())
    assert image_sets.read_tree(tree).sample_ids[:3] == ("cat/a", "cat/a_png", "cat/b")


def test_unusable_trees_say_why(tree, tmp_path):
    with pytest.raises(ValueError, match="64 x 64"):
        image_sets.read_tree(tree, image_px=64)
    with pytest.raises(FileNotFoundError):
        image_sets.read_tree(tmp_path / "missing")
    known = image_sets.read_tree(tree, classes=("dog", "emu"))
    assert set(known.labels) == {0} and known.classes == ("dog", "emu")
    assert any(problem.reason == "cat is none of the classes" for problem in known.problems)


def test_cifar10_binary_and_mosaics(tmp_path):
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (1000, 32, 32, 3)).astype(np.uint8)
    labels = (np.arange(1000) % 10).astype(np.uint8)
    records = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(1000, -1)], 1)
    (tmp_path / "binary").mkdir()
    records.tofile(tmp_path / "binary/test_batch.bin")
    (tmp_path / "mosaics").mkdir()
    grid = images.reshape(25, 40, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(800, 1280, 3)
    Image.fromarray(grid).save(tmp_path / "mosaics/test_00.webp", lossless=True)
    np.savez(tmp_path / "mosaics/test_labels.npz", label=labels)
    found = [image_sets.read_cifar10(tmp_path / n, split="test") for n in ("binary", "mosaics")]
    for data in found:
        row = data.sample_ids.index("cat/test_00013")
        np.testing.assert_array_equal(data.images[row], images[13])
        assert data.classes[data.labels[row]] == "cat"
        assert list(data.sample_ids) == sorted(data.sample_ids)
    np.testing.assert_array_equal(found[0].images, found[1].images)
    with pytest.raises(FileNotFoundError, match="cifar-10-binary"):
        image_sets.read_cifar10(tmp_path)


@pytest.mark.shared
def test_the_shared_mosaics_are_cifar10(shared):
    data = image_sets.read_cifar10(shared / "data/cifar10", split="test")
    assert data.images.shape == (10000, 32, 32, 3)
    assert np.bincount(data.labels).tolist() == [1000] * 10


def test_rows_are_spread_over_the_classes():
    labels = np.array([0] * 50 + [1] * 5 + [2] * 50)
    rows = image_sets.spread_rows(labels, 15)
    assert np.bincount(labels[rows]).tolist() == [5, 5, 5]
    assert np.bincount(labels[image_sets.spread_rows(labels, 25)]).tolist() == [10, 5, 10]
    assert (image_sets.spread_rows(labels, 15) == rows).all() and len(set(rows)) == 15


def test_levels_are_rounded_and_stay_within_the_budget():
    values = np.array([-9.0, -8.0, -0.6, 0.4, 7.9, 8.4]) / 255
    levels = noise_files.to_levels(values, limit_levels=8)
    assert levels.tolist() == [-8, -8, -1, 0, 8, 8]
    assert noise_files.to_levels(values, limit_levels=7.5).max() == 7


def test_noise_belongs_to_ids_and_keeps_its_sign(tmp_path):
    images = np.array([0, 3, 250, 255], np.uint8).reshape(4, 1, 1, 1).repeat(3, axis=3)
    levels = np.array([-5, 5, 8, -8], np.int16).reshape(4, 1, 1, 1).repeat(3, axis=3)
    noise = noise_files.Noise(("p/a", "p/b", "q/a", "q/b"), levels, "sample")
    ids, classes = ["q/b", "p/b", "new/x", "p/a"], ["q", "p", "new", "p"]
    made = noise_files.apply(images, noise, ids, classes)
    # 0 - 8 and 255 - 5 clip or not; the unknown sample keeps its pixels.
    assert made[:, 0, 0, 0].tolist() == [0, 8, 250, 250]
    order = [2, 0, 3, 1]
    again = noise_files.apply(
        images[order], noise, [ids[i] for i in order], [classes[i] for i in order]
    )
    np.testing.assert_array_equal(again, made[order])
    by_class = noise_files.Noise(("p", "q"), levels[:2], "class")
    assert noise_files.apply(images, by_class, ids, classes)[:, 0, 0, 0].tolist() == [
        5,
        0,
        250,
        250,
    ]
    with pytest.raises(ValueError, match="does not fit"):
        noise_files.apply(np.zeros((1, 2, 2, 3), np.uint8), noise, ["p/a"], ["p"])


@pytest.mark.parametrize("largest", [8, 200])
def test_noise_files_round_trip_with_equal_bytes(tmp_path, largest):
    levels = np.random.default_rng(2).integers(-largest, largest + 1, (3, 4, 4, 3)).astype(np.int16)
    noise = noise_files.Noise(("a", "ä/b", "c"), levels, "sample")
    for name in ("one.npz", "two.npz"):
        noise_files.write_noise(tmp_path / name, noise, {"seed": 3})
    found, settings = noise_files.read_noise(tmp_path / "one.npz")
    assert found.names == noise.names and settings == {"seed": 3}
    np.testing.assert_array_equal(found.levels, levels)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_other_files_are_no_noise(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, levels=np.zeros(3))
    for name, data in (("text", b"no archive"), ("other", buffer.getvalue())):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="no noise file"):
            noise_files.read_noise(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        noise_files.read_noise(tmp_path / "missing.npz")


def test_written_images_are_lossless_and_keep_their_folders(tmp_path):
    images = np.random.default_rng(3).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    ids = ("cat/a", "cat/b", "dog/a")
    noise_files.write_images(tmp_path, ids, images)
    data = image_sets.read_tree(tmp_path)
    assert data.sample_ids == ids
    np.testing.assert_array_equal(data.images, images)
