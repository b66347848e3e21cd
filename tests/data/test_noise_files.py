"""Labeled sets and noise by id: stable ids, exact budgets, same bytes, odd files."""

import errno
import io
import os
import pathlib
import resource
import signal
import sys
import tempfile
import weakref
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from afr_jax.core import interrupts
from afr_jax.data import array_records, identities, image_sets, noise_files, photos


def _save(path, pixels, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def tree(tmp_path):
    """Two classes: good images, a gray one, one of another size, half a file, texts, a stray."""
    generator = np.random.default_rng(0)
    for name in ("cat/a.png", "cat/b.png", "dog/a.png", "dog/c.png"):
        _save(tmp_path / name, generator.integers(0, 256, (16, 16, 3)).astype(np.uint8))
    _save(tmp_path / "dog/gray.png", np.full((16, 16, 3), 77, np.uint8), "L")
    _save(tmp_path / "dog/large.png", np.full((30, 20, 3), 9, np.uint8))
    _save(tmp_path / "dog/wide.bmp", np.full((16, 16, 3), 200, np.uint8))
    (tmp_path / "cat/half.png").write_bytes((tmp_path / "cat/a.png").read_bytes()[:200])
    for name in ("cat/notes.txt", "cat/text.png"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "stray.png").write_bytes((tmp_path / "cat/a.png").read_bytes())
    return tmp_path


def test_a_tree_keeps_what_fits_and_names_the_rest(tree):
    data = image_sets.load_image_folder(tree)
    ids = ("cat/a", "cat/b", "dog/a", "dog/c", "dog/gray", "dog/wide")
    assert data.sample_ids == ids
    assert data.classes == ("cat", "dog") and data.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert (data.images[4] == 77).all() and (data.images[5] == 200).all()
    np.testing.assert_array_equal(data.images[0], np.asarray(Image.open(tree / "cat/a.png")))
    reasons = {problem.name: problem.reason for problem in data.problems}
    assert reasons["dog/large.png"] == "is 30 x 20 px, not 16 x 16"
    assert "damaged" in reasons["cat/half.png"] and "not a photo" in reasons["cat/text.png"]
    assert "stray.png" in reasons and len(reasons) == 4
    resized = image_sets.load_image_folder(tree, resize=True)
    assert "dog/large" in resized.sample_ids and resized.images.shape == (7, 16, 16, 3)


def test_two_files_that_differ_in_their_extension_get_two_ids(tree):
    (tree / "cat/a.bmp").write_bytes((tree / "dog/wide.bmp").read_bytes())
    assert image_sets.load_image_folder(tree).sample_ids[:3] == ("cat/a", "cat/a_png", "cat/b")


def test_unusable_trees_say_why(tree, tmp_path):
    with pytest.raises(ValueError, match="64 x 64"):
        image_sets.load_image_folder(tree, image_px=64)
    with pytest.raises(FileNotFoundError):
        image_sets.load_image_folder(tmp_path / "missing")
    known = image_sets.load_image_folder(tree, classes=("dog", "emu"))
    assert set(known.labels) == {0} and known.classes == ("dog", "emu")
    assert any(problem.reason == "cat is none of the classes" for problem in known.problems)


@pytest.fixture
def cifar_file(tmp_path):
    """A folder with a test set of 20 images in CIFAR-10's binary form, and the images."""
    images = np.random.default_rng(1).integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    labels = (np.arange(20) % 10).astype(np.uint8)
    records = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(20, -1)], 1)
    (tmp_path / "bin").mkdir()
    for name in ("test_batch.bin", *(f"data_batch_{number}.bin" for number in range(1, 6))):
        records.tofile(tmp_path / "bin" / name)
    return tmp_path / "bin", images


def test_images_of_cifar10_are_filed_under_their_classes(cifar_file, tmp_path):
    folder, images = cifar_file
    data = image_sets.read_cifar10(folder, split="test")
    row = data.sample_ids.index("cat/test_00013")
    np.testing.assert_array_equal(data.images[row], images[13])
    assert data.classes[data.labels[row]] == "cat"
    assert list(data.sample_ids) == sorted(data.sample_ids)
    again = image_sets.read("cifar10", cifar10_dir=str(folder), split="test")
    assert again.sample_ids == data.sample_ids
    with pytest.raises(FileNotFoundError):
        image_sets.read_cifar10(tmp_path / "missing")
    with pytest.raises(ValueError, match="cifar10_dir"):
        image_sets.read("cifar10")


def _same(data, other):
    assert data.sample_ids == other.sample_ids and data.classes == other.classes
    np.testing.assert_array_equal(data.labels, other.labels)
    np.testing.assert_array_equal(data.images, other.images)


def test_a_tfds_set_is_the_tree_it_was_made_from(tree, tmp_path_factory):
    """Damaged files, other sizes and gray images included; the order of the records is another."""
    folder = tmp_path_factory.mktemp("sets")
    listing = identities.list_tree(tree)
    listing = listing.without([identities.Omission("cat/text.png", "")])
    examples = [
        array_records.Example(sample.sample_id, sample.path.read_bytes(), sample.identity)
        for sample in listing.samples
    ]
    (tree / "cat/text.png").unlink()
    (tree / "stray.png").unlink()
    found = {}
    for name, rows in (("few", slice(None)), ("again", slice(None, None, -1))):
        array_records.write_examples(
            {"whole": iter(examples[rows])}, ("dog", "cat"), folder, name=name
        )
        found[name] = image_sets.read(f"tfds:{name}:whole", tfds_dir=str(folder))
    expected = image_sets.load_image_folder(tree)
    for data in found.values():
        _same(data, expected)
        assert sorted(data.problems, key=lambda p: p.name) == list(expected.problems)
    resized = image_sets.read_records(folder, "few", split="whole", resize=True)
    _same(resized, image_sets.load_image_folder(tree, resize=True))
    for source, match in (("few", "splits"), ("few:test", "splits"), ("many", "no data set many")):
        with pytest.raises((FileNotFoundError, ValueError), match=match):
            image_sets.read(f"tfds:{source}", tfds_dir=str(folder))


def test_photos_are_reduced_before_all_are_read(tmp_path, monkeypatch):
    for number in range(30):
        _save(tmp_path / f"tree/cat/{number:02d}.png", np.full((40, 50, 3), number, np.uint8))
    listing = identities.list_tree(tmp_path / "tree")
    array_records.write_listing(listing, tmp_path / "sets", name="cats")
    whole, num_held = [], []

    decode_photo = photos.decode_photo

    def watched(data, **options):
        photo = decode_photo(data, **options)
        whole.append(weakref.ref(photo.pixels))
        num_held.append(sum(pixels() is not None for pixels in whole))
        return photo

    monkeypatch.setattr(photos, "decode_photo", watched)
    for source in (str(tmp_path / "tree"), "tfds:cats"):
        data = image_sets.read(source, tfds_dir=str(tmp_path / "sets"), image_px=16, resize=True)
        assert data.images.shape == (30, 16, 16, 3)
        np.testing.assert_array_equal(data.images[:, 5, 5, 0], np.arange(30))
        assert len(num_held) == 30 and max(num_held) < 20
        whole.clear()
        num_held.clear()


def _write_set(folder, name, features, examples):
    keyed = ((str(number), example) for number, example in enumerate(examples))
    return array_records.write_records({"train": keyed}, features, folder, name=name)


def test_foreign_tfds_sets(tmp_path):
    """Ids of their own or none, gray images, names that are no folders, features that are wrong."""
    label = tfds.features.ClassLabel(names=["b/c", "a"])
    gray = tfds.features.Image(shape=(12, 12, 1))
    names = ("x/1", "/../y", "z.png")

    def example(number):
        buffer = io.BytesIO()
        Image.new("L", (12, 12), number).save(buffer, "PNG")
        buffer.seek(0)
        return {"image": buffer, "label": number % 2}

    features = {"image": gray, "label": label}
    named = [example(number) | {"id": name} for number, name in enumerate(names)]
    named += [example(1) | {"id": "y"}, example(1) | {"id": "w", "label": -1}]
    _write_set(tmp_path, "named", features | {"id": tfds.features.Text()}, named)
    data = image_sets.read_records(tmp_path, "named")
    assert data.sample_ids == ("a/y", "b_c/x_1", "b_c/z") and data.classes == ("a", "b_c")
    assert data.images.shape == (3, 12, 12, 3) and data.labels.tolist() == [0, 1, 1]
    reasons = [(problem.name, problem.reason.split()[0]) for problem in data.problems]
    assert reasons == [("a/y", "has"), ("unlabelled/w", "unlabelled")]
    assert data.images[:, 5, 5].tolist() == [[1] * 3, [0] * 3, [2] * 3]
    _write_set(tmp_path, "unnamed", features, map(example, range(3)))
    ids = image_sets.read_records(tmp_path, "unnamed").sample_ids
    assert sorted(name.split("/")[1] for name in ids) == [f"train_0000{n}" for n in range(3)]
    _write_set(tmp_path, "text", {"label": tfds.features.Text()}, [{"label": "a"}])
    with pytest.raises(ValueError, match="label of classes"):
        image_sets.read_records(tmp_path, "text")
    # TFDS's own default form, which TensorFlow alone reads.
    info = tmp_path / "named/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match="stored as tfrecord"):
        image_sets.read_records(tmp_path, "named")


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


def _set(ids, images):
    """An image set with the classes that its ids name."""
    classes = tuple(sorted({name.split("/")[0] for name in ids}))
    labels = np.array([classes.index(name.split("/")[0]) for name in ids], np.int32)
    return image_sets.ImageSet(tuple(ids), images, labels, classes)


def test_noise_belongs_to_ids_and_keeps_its_sign():
    images = np.array([0, 3, 250, 255], np.uint8).reshape(4, 1, 1, 1).repeat(3, axis=3)
    levels = np.array([-5, 5, 8, -8], np.int16).reshape(4, 1, 1, 1).repeat(3, axis=3)
    noise = noise_files.Noise(("p/a", "p/b", "q/a", "q/b"), levels, "sample")
    ids = ["q/b", "p/b", "new/x", "p/a"]
    made = noise.apply(_set(ids, images)).images
    # 0 - 8 and 255 - 5 clip or not; the unknown sample keeps its pixels.
    assert made[:, 0, 0, 0].tolist() == [0, 8, 250, 250]
    order = [2, 0, 3, 1]
    again = noise.apply(_set([ids[i] for i in order], images[order])).images
    np.testing.assert_array_equal(again, made[order])
    by_class = noise_files.Noise(("p", "q"), levels[:2], "class")
    made = by_class.apply(_set(ids, images)).images
    assert made[:, 0, 0, 0].tolist() == [5, 0, 250, 250]
    with pytest.raises(ValueError, match="does not fit"):
        noise.apply(_set(["p/a"], np.zeros((1, 2, 2, 3), np.uint8)))


@pytest.mark.parametrize("largest", [8, 200])
def test_noise_files_round_trip_with_equal_bytes(tmp_path, largest):
    levels = np.random.default_rng(2).integers(-largest, largest + 1, (3, 4, 4, 3)).astype(np.int16)
    noise = noise_files.Noise(("a", "c", "ä/b"), levels, "sample", {"seed": 3})
    for name in ("one", "two"):
        noise.save(tmp_path / f"{name}.npz")
        noise.save(tmp_path / name)
    for name in ("one.npz", "one"):
        found = noise_files.read_noise(tmp_path / name)
        assert found.names == noise.names and found.granularity == "sample"
        assert found.settings == {"seed": 3} and found.levels.dtype == np.int16
        np.testing.assert_array_equal(found.levels, levels)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    files = [path for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) == 4  # One shard and three of metadata.
    for path in files:
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == other.read_bytes()


def test_records_do_not_depend_on_the_order_of_features(tmp_path, monkeypatch):
    """Which differs from process to process."""
    levels = np.arange(36, dtype=np.int16).reshape(3, 2, 2, 3)
    noise = noise_files.Noise(("a", "b", "c"), levels, "sample")
    noise.save(tmp_path / "one")

    def backwards(serializer, example):
        whole = serializer.get_tf_example(example)
        features = sorted(whole.features.feature.items(), reverse=True)
        parts = [type(whole)(features={"feature": dict([item])}) for item in features]
        return b"".join(part.SerializeToString() for part in parts)

    monkeypatch.setattr(tfds.core.ExampleSerializer, "serialize_example", backwards)
    noise.save(tmp_path / "two")
    (one,), (two,) = ((tmp_path / name).rglob("*.array_record*") for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    np.testing.assert_array_equal(noise_files.read_noise(tmp_path / "two").levels, levels)


@pytest.mark.parametrize("name", ["noise.npz", "noise"])
def test_damaged_noise_is_told_and_never_other_noise(tmp_path, name):
    levels = np.random.default_rng(2).integers(-8, 9, (5, 8, 8, 3)).astype(np.int16)
    noise = noise_files.Noise(tuple("abcde"), levels, "sample", {"seed": 3})
    noise.save(tmp_path / name)
    place = tmp_path / name
    paths = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    rng, num_told = np.random.default_rng(0), 0
    for path in paths:
        whole = path.read_bytes()
        used = len(whole.rstrip(b"\0"))
        for bit in rng.choice(8 * used, 30, replace=False):
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            try:
                found = noise_files.read_noise(place)
            except (ValueError, FileNotFoundError) as error:
                assert str(place) in str(error)
                num_told += 1
                continue
            assert found.names == noise.names and found.granularity == "sample"
            assert found.settings == {"seed": 3}
            np.testing.assert_array_equal(found.levels, levels)
        path.write_bytes(whole)
    assert num_told > 10


def test_killed_runs_leave_no_records(tmp_path, monkeypatch):
    """Nor does writing leave anything in the folder for temporary files."""
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    noise = noise_files.Noise(("a",), np.ones((1, 2, 2, 3), np.int16), "sample")
    for name in (".noise.partial/noise/1.0.0", "sets/noise/incomplete.QWERTY_1.0.0"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x").touch()
    noise.save(tmp_path / "noise")
    assert {path.name for path in tmp_path.iterdir()} == {"noise", "sets", "temp"}
    assert not list((tmp_path / "temp").iterdir())
    features = {"name": tfds.features.Text()}
    examples = {"train": [("a", {"name": "a"})]}
    array_records.write_records(examples, features, tmp_path / "sets", name="noise")
    assert [path.name for path in (tmp_path / "sets" / "noise").iterdir()] == ["1.0.0"]


def _noise(level):
    return noise_files.Noise(("a",), np.full((1, 2, 2, 3), level, np.int16), "sample")


def _level(folder):
    return noise_files.read_noise(folder).levels.max()


@pytest.mark.parametrize("name", ["photos/mine.jpg", "1.0.0/mine.jpg", ".mine", "1.0.0/old/"])
def test_folders_of_anything_but_noise_are_not_replaced(tmp_path, name):
    folder = tmp_path / "out"
    folder.mkdir()
    _noise(1).save(folder)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if name.endswith("/") else path.write_text("mine")
    with pytest.raises(FileExistsError, match=str(folder)):
        _noise(2).save(folder)
    assert path.exists() and _level(folder) == 1
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file"):
        _noise(2).save(tmp_path / "file")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "file"}


def test_noise_that_is_not_replaced_returns(tmp_path, monkeypatch):
    folder, partial = tmp_path / "noise", tmp_path / ".noise.partial"
    _noise(1).save(folder)
    rename = pathlib.Path.rename

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "full")

    def rename_others(path, target):
        return fail() if path == partial / "noise" else rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", rename_others)
        with pytest.raises(OSError, match="full"):
            _noise(2).save(folder)
    assert _level(folder) == 1 and list(tmp_path.iterdir()) == [folder]
    # As a run leaves it that is killed between the two.
    partial.mkdir()
    folder.rename(partial / "old")
    with monkeypatch.context() as patch:
        patch.setattr(array_records, "write_records", fail)
        with pytest.raises(OSError, match="full"):
            _noise(2).save(folder)
    assert _level(folder) == 1 and list(tmp_path.iterdir()) == [folder]


def test_a_signal_while_noise_is_replaced_raises_behind_it(tmp_path, monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)
    folder = tmp_path / "noise"
    _noise(1).save(folder)
    rename = pathlib.Path.rename

    def interrupted_rename(path, target):
        if path == folder:
            os.kill(os.getpid(), signal.SIGTERM)
        return rename(path, target)

    try:
        interrupts.raise_and_remember()
        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "rename", interrupted_rename)
            with pytest.raises(interrupts.Interrupted):
                _noise(2).save(folder)
    finally:
        interrupts.raise_and_remember()  # Forgets the signal.
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert _level(folder) == 2 and list(tmp_path.iterdir()) == [folder]


def test_records_of_noise_keep_their_names_through_shuffling_and_resharding(tmp_path):
    levels = np.arange(40, dtype=np.int16)[:, None, None, None] - np.zeros((2, 2, 3), np.int16)
    noise = noise_files.Noise(tuple(f"c/{number:02d}" for number in range(40)), levels, "sample")
    order = np.random.default_rng(0).permutation(40)
    shuffled = noise._replace(
        names=tuple(noise.names[row] for row in order), levels=noise.levels[order]
    )
    folder = tmp_path / "noise"
    for source, num_shards in ((noise, 1), (shuffled, 1), (shuffled, 7)):
        # Each takes the place of the one before.
        noise_files.write_noise_records(folder, source, num_shards=num_shards)
        assert len(list(folder.rglob("*.array_record*"))) == num_shards
        found = noise_files.read_noise(folder)
        assert found.names == noise.names
        np.testing.assert_array_equal(found.levels, noise.levels)
    assert [path.name for path in tmp_path.iterdir()] == ["noise"]
    # Another reader of TFDS gets what belongs together, in an order of its own.
    examples = array_records.open_source(tmp_path, "noise", "noise")
    pairs = [(examples[row]["name"].decode(), examples[row]["levels"]) for row in range(40)]
    assert [name for name, _ in pairs] != list(noise.names)
    assert all((values == int(name[2:])).all() for name, values in pairs)


def test_other_files_are_no_noise(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, levels=np.zeros(3))
    for name, data in (("text", b"no archive"), ("other", buffer.getvalue())):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="no noise file"):
            noise_files.read_noise(tmp_path / name)
    (tmp_path / "folder").mkdir()
    for name in ("missing.npz", "folder"):
        with pytest.raises(FileNotFoundError, match=name):
            noise_files.read_noise(tmp_path / name)
    features = {"name": tfds.features.Text()}
    array_records.write_records({"train": [("a", {"name": "a"})]}, features, tmp_path, name="names")
    with pytest.raises(ValueError, match="no noise file"):
        noise_files.read_noise(tmp_path / "names")


def test_written_images_are_lossless_and_keep_their_folders(tmp_path):
    images = np.random.default_rng(3).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    ids = ("cat/a", "cat/b", "dog/a")
    _set(ids, images).save(tmp_path)
    data = image_sets.load_image_folder(tmp_path)
    assert data.sample_ids == ids
    np.testing.assert_array_equal(data.images, images)


@pytest.mark.parametrize(
    "shape, num_bytes, match",
    [((1 << 40,), 16, "not as many values"), ((600 << 20,), 600 << 20, "unpack to")],
)
def test_noise_files_that_are_not_what_they_say_are_refused_by_their_headers(
    tmp_path, shape, num_bytes, match
):
    path, header = tmp_path / "noise.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|i1", "fortran_order": False, "shape": shape}
    )
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
        archive.open("levels.npy", "w") as member,
    ):
        member.write(header.getvalue())
        for start in range(0, num_bytes, 1 << 20):
            member.write(bytes(min(1 << 20, num_bytes - start)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=match):
        noise_files.read_noise(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_records_of_noise_that_unpack_to_too_much_are_refused(tmp_path):
    _noise(1).save(tmp_path / "noise")
    path = tmp_path / "noise/1.0.0/features.json"
    path.write_text(path.read_text().replace('"2"', '"16384"'))
    with pytest.raises(ValueError, match="unpack to"):
        noise_files.read_noise(tmp_path / "noise")
