"""Batches of steps, splits by id, loaders, ArrayRecord data sets and CIFAR-10 in all its forms."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from afr_jax.data import array_records, cifar10, identities, loaders, sampling


def test_every_epoch_has_every_example_once_in_another_order():
    batches = sampling.ShuffledBatches(12, 4, seed=5)
    assert batches.steps_per_epoch == 3
    epochs = [np.concatenate([batches.rows(3 * e + s) for s in range(3)]) for e in range(3)]
    for rows in epochs:
        assert sorted(rows) == list(range(12))
    assert len({rows.tobytes() for rows in epochs}) == 3
    np.testing.assert_array_equal(batches.rows(7), sampling.ShuffledBatches(12, 4, 5).rows(7))
    assert not np.array_equal(batches.rows(7), sampling.ShuffledBatches(12, 4, 6).rows(7))
    # What does not fill a batch is another part each time.
    odd = sampling.ShuffledBatches(13, 4)
    left_out = {
        (set(range(13)) - set(np.concatenate([odd.rows(3 * e + s) for s in range(3)]))).pop()
        for e in range(20)
    }
    assert len(left_out) > 5
    assert sampling.ShuffledBatches(3, 8).batch_size == 3


def test_batches_of_identities():
    labels = tuple(np.repeat(np.arange(5), [2, 4, 4, 6, 9]))
    batches = sampling.IdentityBatches(labels, 3, 4, seed=1)
    seen = set()
    for step in range(40):
        rows = batches.rows(step)
        found, counts = np.unique(np.array(labels)[rows], return_counts=True)
        assert rows.shape == (12,) and len(found) == 3 and (counts == 4).all()
        # Nothing is repeated where there are enough photos.
        for label in found[found > 0]:
            of_label = rows[np.array(labels)[rows] == label]
            assert len(set(of_label)) == 4
        seen |= set(rows)
    assert seen == set(range(25))
    np.testing.assert_array_equal(
        batches.rows(3), sampling.IdentityBatches(labels, 3, 4, seed=1).rows(3)
    )
    with pytest.raises(ValueError, match="examples_per_identity"):
        sampling.IdentityBatches(labels, 3, 0)


def test_a_sample_stays_on_its_side_of_the_split():
    ids = [f"person_{i % 50}/{i:04d}.jpg" for i in range(5000)]
    training, held = sampling.split_by_id(ids, held_out=0.2, seed=0)
    assert sorted([*training, *held]) == list(range(5000))
    # Binomial with 5,000 draws: the standard deviation is 28.
    assert abs(len(held) - 1000) < 120
    fewer = ids[1::2]
    _, held_of_fewer = sampling.split_by_id(fewer, held_out=0.2, seed=0)
    assert {fewer[i] for i in held_of_fewer} == {ids[i] for i in held} & set(fewer)
    _, other = sampling.split_by_id(ids, held_out=0.2, seed=1)
    assert set(other) != set(held)
    with pytest.raises(ValueError, match="held_out"):
        sampling.split_by_id(ids, held_out=1.2)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Three identities with 4 photos each of one color, in three formats and sizes."""
    root = tmp_path_factory.mktemp("tree")
    for person in range(3):
        folder = root / f"person {person}"
        folder.mkdir()
        for number, suffix in enumerate(("jpg", "png", "webp", "png")):
            size = (20 + number, 20)
            color = (80 * person, 20, 200 - 60 * person)
            Image.new("RGB", size, color).save(folder / f"{number}.{suffix}")
    return root


def test_loaders_give_the_batches_of_the_steps_and_resume(tree):
    listing = identities.list_tree(tree)
    source = loaders.FileSource(listing, 8)
    _, images = identities.read_samples(listing, 8)
    batches = sampling.ShuffledBatches(12, 5, seed=2)

    def iterate(**options):
        return loaders.batch_iterator(source, batches, num_steps=7, **options)

    straight = list(iterate(num_threads=1))
    assert [batch.step for batch in straight] == list(range(7))
    for batch in straight:
        rows = batches.rows(batch.step)
        np.testing.assert_array_equal(batch.images, images[rows])
        np.testing.assert_array_equal(batch.labels, listing.labels[rows])
    many = iterate(num_threads=6)
    for _ in range(3):
        next(many)
    state = many.get_state()
    again = iterate(num_threads=2)
    again.set_state(state)
    for rest in (list(many), list(again), list(iterate(first_step=3))):
        assert [batch.step for batch in rest] == [3, 4, 5, 6]
        for one, other in zip(rest, straight[3:], strict=True):
            np.testing.assert_array_equal(one.images, other.images)
    with pytest.raises(ValueError, match="first_step"):
        iterate(first_step=8)


def test_a_listing_as_array_records(tree, tmp_path):
    (tree / "person 0" / "broken.jpg").write_bytes(b"\xff\xd8\xff no photo")
    listing = identities.list_tree(tree)
    (tree / "person 0" / "broken.jpg").unlink()
    ids = listing.sample_ids
    held = [ids.index("person 1/2.webp")]
    folder, problems = array_records.write_listing(
        listing, tmp_path, name="few", held_out_rows=held
    )
    assert [problem.name for problem in problems] == ["person 0/broken.jpg"]
    assert list(folder.glob("few-train.array_record*"))
    assert array_records.classes_of(tmp_path, "few") == ("person 0", "person 1", "person 2")
    examples = array_records.open_source(tmp_path, "few", "train")
    found = {}
    for index in range(len(examples)):
        example = examples[index]
        found[example["sample_id"].decode()] = example
    assert sorted(found) == sorted(set(ids) - {"person 0/broken.jpg", "person 1/2.webp"})
    for name, example in found.items():
        expected = np.asarray(Image.open(tree / name).convert("RGB"))
        np.testing.assert_array_equal(example["image"], expected)
        assert f"person {example['label']}" == name.split("/")[0]
    (held_example,) = [array_records.open_source(tmp_path, "few", "test")[0]]
    assert held_example["sample_id"] == b"person 1/2.webp"
    with pytest.raises(FileExistsError, match="another name"):
        array_records.write_listing(listing, tmp_path, name="few")
    with pytest.raises(ValueError, match="splits"):
        array_records.open_source(tmp_path, "few", "validation")
    with pytest.raises(FileNotFoundError, match="no data set many"):
        array_records.open_source(tmp_path, "many", "train")


def _cifar(count, seed):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return images, generator.integers(0, 10, count).astype(np.uint8)


def _records(images, labels):
    """The binary format as its page describes it: label, red plane, green plane, blue plane."""
    return b"".join(
        bytes([label]) + b"".join(image[..., c].tobytes() for c in range(3))
        for image, label in zip(images, labels, strict=True)
    )


def _write_archive(path, parts):
    with tarfile.open(path, "w:gz") as file:
        for name, data in parts.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))


def test_the_binary_archive_of_cifar10(tmp_path):
    images, labels = _cifar(12, 0)
    names = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
    parts = {
        name: _records(images[2 * i : 2 * i + 2], labels[2 * i : 2 * i + 2])
        for i, name in enumerate(names)
    }
    archive = tmp_path / "cifar-10-binary.tar.gz"
    unpacked = tmp_path / "unpacked" / "cifar-10-batches-bin"
    unpacked.mkdir(parents=True)
    _write_archive(archive, parts)
    for name, data in parts.items():
        (unpacked / name).write_bytes(data)
    for source in (archive, tmp_path / "unpacked"):
        train, test = (cifar10.load(source, split) for split in ("train", "test"))
        np.testing.assert_array_equal(train.images, images[:10])
        np.testing.assert_array_equal(train.labels, labels[:10])
        np.testing.assert_array_equal(test.images, images[10:])
        assert test.sample_ids == ("test/00000", "test/00001") and test.classes[9] == "truck"
    (unpacked / "test_batch.bin").write_bytes(b"torn")
    with pytest.raises(ValueError, match="multiple of 3073"):
        cifar10.load(tmp_path / "unpacked", "test")
    archive.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="archive"):
        cifar10.load(archive, "test")


def test_mosaics_and_folders_of_cifar10(tmp_path):
    images, labels = _cifar(1000, 1)
    mosaics = tmp_path / "mosaics"
    mosaics.mkdir()
    for split in ("train", "test"):
        rows = [np.concatenate(list(images[40 * r : 40 * r + 40]), axis=1) for r in range(25)]
        Image.fromarray(np.concatenate(rows)).save(mosaics / f"{split}_00.webp", lossless=True)
        np.savez(mosaics / f"{split}_labels.npz", label=labels)
    train = cifar10.load(mosaics, "train")
    np.testing.assert_array_equal(train.images, images)
    np.testing.assert_array_equal(train.labels, labels)
    assert train.sample_ids[:2] == ("train/00000", "train/00001")
    folders = tmp_path / "folders"
    for split, rows in (("train", range(20)), ("test", range(20, 26))):
        for row in rows:
            folder = folders / split / cifar10.CLASSES[labels[row]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[row]).save(folder / f"{row:02d}.png")
    found = cifar10.load(folders, "train")
    by_id = {
        f"train/{cifar10.CLASSES[labels[row]]}/{row:02d}.png": images[row] for row in range(20)
    }
    assert set(found.sample_ids) == set(by_id)
    for name, image in zip(found.sample_ids, found.images, strict=True):
        np.testing.assert_array_equal(image, by_id[name])
    for wrong, match in (
        (np.zeros(2000, np.int64), "2000 labels"),
        (np.full(1000, 10), "none of 0 to 9"),
        (np.full(1000, -1), "none of 0 to 9"),
        (np.full(1000, 1 << 32), "none of 0 to 9"),
        (np.zeros(1 << 27, np.int8), "unpack to"),
    ):
        np.savez_compressed(mosaics / "train_labels.npz", label=wrong)
        with pytest.raises(ValueError, match=match):
            cifar10.load(mosaics, "train")
    for name, data in (("train_labels.npz", b"PK\3\4"), ("test_00.webp", b"RIFF")):
        (mosaics / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            cifar10.load(mosaics, name.partition("_")[0])


def test_damaged_and_oversized_cifar10(tmp_path, monkeypatch):
    images, labels = _cifar(2, 3)
    names = ("test_batch.bin", *(f"data_batch_{i}.bin" for i in range(1, 6)))
    parts = dict.fromkeys(names, _records(images, labels))
    archive, folder = tmp_path / "cifar-10-binary.tar.gz", tmp_path / "folder"
    _write_archive(archive, parts)
    whole = archive.read_bytes()
    np.testing.assert_array_equal(cifar10.load(archive, "test").images, images)
    # The file of the split comes first; the checksum comes last.
    for damaged in (whole[:-8], whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            cifar10.load(archive, "test")
    parts["test_batch.bin"] = bytes(10_001 * 3073)
    _write_archive(archive, parts)
    folder.mkdir()
    for name, data in parts.items():
        (folder / name).write_bytes(data)
    for source in (archive, folder):
        assert len(cifar10.load(source, "train").labels) == 10
        with pytest.raises(ValueError, match="more than 30730000 bytes"):
            cifar10.load(source, "test")
    monkeypatch.setattr(cifar10, "_ARCHIVE_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="unpacks to more"):
        cifar10.load(archive, "train")


def test_what_is_no_cifar10(tmp_path):
    with pytest.raises(FileNotFoundError):
        cifar10.load(tmp_path / "missing", "train")
    with pytest.raises(ValueError, match="no CIFAR-10"):
        cifar10.load(tmp_path, "train")
    with pytest.raises(ValueError, match="split"):
        cifar10.load(tmp_path, "validation")


@pytest.mark.shared
def test_the_mosaics_at_hand(shared):
    test = cifar10.load(shared / "data" / "cifar10", "test")
    assert test.images.shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(test.labels), np.full(10, 1000))
