"""Listings of identity trees and CSVs, fingerprints and near-duplicate removal."""

import csv
import io
import os
import pathlib

import numpy as np
import programs
import pytest
import scipy.fft
from PIL import Image

from afr_jax.data import array_records, identities, pairs
from afr_jax.recognition import collect
from afr_jax.recognition.tasks import collect_photos

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def _picture(seed, size=(64, 48)):
    """A smooth random picture."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def _save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def _problems(listing):
    return {problem.name: problem.reason for problem in listing.problems}


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_tree(tmp_path, prefix):
    """LFW has identities in the root, VGGFace2 below the splits."""
    for name in ("Ann B/1.png", "Ann B/2.png", "n000002/a.png", "Zo\u0308e/x.png"):
        _save(tmp_path / prefix / name, _picture(0))
    (tmp_path / prefix / "empty").mkdir()
    (tmp_path / "readme.jpg").write_text("no photo")
    for name in ("readme.txt", "Ann B/notes.txt", "Ann B/Thumbs.db"):
        (tmp_path / prefix / name).write_text("no photo")
    (tmp_path / ".hidden").mkdir()
    listing = identities.list_tree(tmp_path)
    names = ["Ann B/1.png", "Ann B/2.png", "Zo\u0308e/x.png", "n000002/a.png"]
    assert listing.sample_ids == [prefix + name for name in names]
    # The composed form of the name: the same identity on every file system.
    assert listing.identities == ("Ann B", "Z\u00f6e", "n000002")
    np.testing.assert_array_equal(listing.labels, [0, 0, 1, 2])
    problems = _problems(listing)
    assert "no identity" in problems["readme.jpg"] and listing.num_skipped == 3
    assert "no photos" in problems[f"{prefix}empty"] and len(problems) == 2
    frequent = listing.with_photos(2)
    assert frequent.identities == ("Ann B",)
    assert "1 photos" in _problems(frequent)["n000002"]


def test_trees_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        identities.list_tree(tmp_path / "missing")
    with pytest.raises(ValueError, match="no photo"):
        identities.list_tree(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="folder"):
        identities.list_tree(tmp_path / "file")


def test_a_csv(tmp_path):
    root = tmp_path / "photos"
    for name in ("a.png", "deep/b.png"):
        _save(root / name, _picture(0))
    _save(tmp_path / "outside.png", _picture(0))
    table = tmp_path / "table.csv"
    rows = [
        "image,other,identity",
        "deep/b.png,1,Ann",
        " a.png ,2, Zo\u0308e",
        "a.png,3,Ann",
        "missing.png,4,Ann",
        ",5,Ann",
        "a.png,6,",
        "../outside.png,7,Ann",
        "./deep/b.png,8,Ann",
        "a.png",
    ]
    table.write_text("\n".join(rows), encoding="utf-8-sig")
    listing = identities.list_csv(table, root)
    assert [(s.sample_id, s.identity) for s in listing.samples] == [
        ("a.png", "Z\u00f6e"),
        ("deep/b.png", "Ann"),
    ]
    problems = _problems(listing)
    parts = {4: "as Z\u00f6e", 5: "not exist", 6: "no image", 7: "no identity", 8: "outside"}
    for row, part in {**parts, 9: "listed before", 10: "no identity"}.items():
        assert part in problems[f"row {row}"], row
    assert len(problems) == 7


@pytest.mark.parametrize(
    "text, part",
    [
        ("image,name\na.png,Ann", "no column identity"),
        ("", "no column identity and no column image"),
        ("image,identity\n", "no usable row"),
        ("image,identity\nb.png,Ann", "row 2 b.png: the file does not exist"),
        ("image,identity\n\xff", "UTF-8"),
    ],
)
def test_wrong_csvs(tmp_path, text, part):
    (tmp_path / "table.csv").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=part):
        identities.list_csv(tmp_path / "table.csv", tmp_path)
    with pytest.raises(FileNotFoundError):
        identities.list_csv(tmp_path / "missing.csv", tmp_path)


def test_reading_squares(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    _save(tmp_path / "a" / "wide.png", wide)
    (tmp_path / "a" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    listing, images = identities.read_samples(identities.list_tree(tmp_path), 8)
    assert listing.sample_ids == ["a/wide.png"] and images.shape == (1, 8, 8, 3)
    # The central square is the bright part.
    assert (images == 200).all()
    assert "damaged" in _problems(listing)["a/broken.jpg"]
    checked = identities.without_unreadable(identities.list_tree(tmp_path))
    assert checked == listing
    (tmp_path / "a" / "wide.png").unlink()
    with pytest.raises(ValueError, match="none of 1"):
        identities.read_samples(identities.list_tree(tmp_path), 8)


def test_the_hash_is_that_of_the_cosine_transform():
    pixels = _picture(3, (64, 64))
    gray = np.asarray(Image.fromarray(pixels).convert("L"), np.float64)
    # 64 px to 32: box averaging is the mean of 2 x 2 pixels, rounded to bytes as Pillow does.
    thumbnail = np.floor(gray.reshape(32, 2, 32, 2).mean(axis=(1, 3)) + 0.5)
    low = scipy.fft.dctn(thumbnail, type=2)[1:9, 1:9].reshape(-1)
    expected = int("".join("1" if value > np.median(low) else "0" for value in low), 2)
    assert collect.perceptual_hash(pixels) == expected
    assert bin(expected).count("1") == 32


def test_hashes_of_changed_photos_stay_near_and_of_others_do_not():
    near, far = [], []
    for seed in range(20):
        pixels = _picture(seed, (120, 90))
        image, buffer = Image.fromarray(pixels), io.BytesIO()
        image.save(buffer, "JPEG", quality=60)
        changed = [
            np.asarray(image.resize((60, 45), Image.Resampling.BICUBIC)),
            np.asarray(Image.open(buffer)),
            np.clip(pixels * 0.8 + 10, 0, 255).astype(np.uint8),
        ]
        bits = collect.perceptual_hash(pixels)
        near += [(bits ^ collect.perceptual_hash(other)).bit_count() for other in changed]
        far.append((bits ^ collect.perceptual_hash(_picture(seed + 100, (120, 90)))).bit_count())
    assert np.mean(np.array(near) <= collect.DEFAULT_DISTANCE) > 0.95
    assert min(far) > 8


def test_near_pairs_against_all_pairs():
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**63, 300, dtype=np.uint64)
    for copy in range(100):
        flips = generator.choice(64, generator.integers(0, 9), replace=False)
        change = sum(1 << int(bit) for bit in flips)
        bits[200 + copy] = bits[generator.integers(200)] ^ np.uint64(change)
    distance = np.bitwise_count(bits[:, None] ^ bits[None])
    first, second = np.triu_indices(300, 1)
    for limit in (0, 4, 8):
        close = distance[first, second] <= limit
        expected = np.stack([first, second, distance[first, second]], axis=1)[close]
        np.testing.assert_array_equal(collect.near_pairs(bits, limit), expected)
    assert collect.near_pairs(bits[:0], 4).shape == (0, 3)
    with pytest.raises(ValueError, match="max_distance"):
        collect.near_pairs(bits, 17)


def test_repeats_are_dropped_for_the_largest_photo(tmp_path):
    pixels = _picture(0, (120, 120))
    small = np.asarray(Image.fromarray(pixels).resize((60, 60), Image.Resampling.BICUBIC))
    _save(tmp_path / "Ann" / "large.png", pixels)
    _save(tmp_path / "Ann" / "a_copy.png", small)
    _save(tmp_path / "Bea" / "copy_of_ann.png", small)
    _save(tmp_path / "Bea" / "other.png", _picture(1))
    _save(tmp_path / "Bea" / "twin.webp", _picture(1), lossless=True)
    (tmp_path / "Bea" / "half.jpg").write_bytes(b"\xff\xd8\xff")
    listing = identities.list_tree(tmp_path)
    found = collect.collect(listing)
    assert found.listing.sample_ids == ["Ann/large.png", "Bea/other.png"]
    by_id = {repeat.sample_id: repeat for repeat in found.repeats}
    copy, stolen = by_id["Ann/a_copy.png"], by_id["Bea/copy_of_ann.png"]
    assert copy.kept == stolen.kept == "Ann/large.png"
    assert not copy.exact and copy.distance <= 4
    assert copy.same_identity and not stolen.same_identity
    assert by_id["Bea/twin.webp"] == collect.Repeat("Bea/twin.webp", "Bea/other.png", 0, True, True)
    problems = _problems(found.listing)
    assert problems["Ann/a_copy.png"] == "repeats Ann/large.png"
    assert "damaged" in problems["Bea/half.jpg"]
    exact = collect.collect(listing, max_distance=None)
    assert {repeat.sample_id for repeat in exact.repeats} == {
        "Bea/copy_of_ann.png",
        "Bea/twin.webp",
    }


def test_chains_do_not_collapse():
    """The first and the last of three photos differ by more than the limit: both stay."""
    samples = [identities.Sample(f"{i}", "Ann", pathlib.Path(f"{i}")) for i in range(3)]
    prints = [
        collect.Fingerprint(bytes([i]), bits, 100)
        for i, bits in enumerate((0, 0b1111, 0b1111_1111))
    ]
    repeats = collect.find_repeats(samples, prints, max_distance=4)
    assert [(repeat.sample_id, repeat.kept, repeat.distance) for repeat in repeats] == [
        ("1", "0", 4)
    ]


def test_balanced_pairs():
    for labels in (np.arange(60) % 6, np.arange(3000) % 700):
        rows, same = pairs.balanced_pairs(labels, max_pairs=200, seed=1)
        assert len(rows) == 200 and same.sum() == 100
        np.testing.assert_array_equal(labels[rows[:, 0]] == labels[rows[:, 1]], same)
        assert len({tuple(sorted(row)) for row in rows.tolist()}) == 200
        assert (rows[:, 0] != rows[:, 1]).all()
    assert len(pairs.balanced_pairs(np.zeros(5), max_pairs=10)[0]) == 0


def test_pairs_from_a_csv(tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("image_a,image_b,same\na.png,b.png,1\na.png,c.png,0\n")
    names, same = pairs.read_pairs(table)
    assert names == [("a.png", "b.png"), ("a.png", "c.png")] and same.tolist() == [True, False]
    for text, part in (
        ("image_a,same\n", "no column image_b"),
        ("image_a,image_b,same\na,b,1\na,b,yes\n", "row 3"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=part):
            pairs.read_pairs(table)
    with pytest.raises(FileNotFoundError):
        pairs.read_pairs(tmp_path / "missing.csv")


def _run_program(*flags):
    """Result and whether all could be used, or the message of wrong usage."""
    return programs.call(collect_photos.CollectConfig, collect_photos.run, *flags)


def test_the_program(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    for seed in range(3):
        _save(data / "Ann" / f"{seed}.png", _picture(seed))
        _save(data / "Bea" / f"{seed}.png", _picture(seed + 10))
    _save(data / "Bea" / "copy.png", _picture(0))
    (data / "Bea" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (data / "Bea" / "page.html").write_text("<html>")
    before = {path: path.read_bytes() for path in data.rglob("*.*")}
    flags = [f"--data={data}", f"--output_dir={out}", "--records=people", "--held_out=0.5"]
    result, complete = _run_program(*flags)
    assert not complete
    assert (result["photos"], result["kept"], result["identities"]) == (8, 6, 2)
    assert result["repeats"] == {"exact": 1, "near": 0, "of_another_identity": 1}
    (problem,) = result["not_handled"]
    assert problem["image"] == "Bea/broken.jpg" and result["skipped"] == 1
    with open(out / "repeats.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["image"], row["kept"], row["same_identity"]) == ("Bea/copy.png", "Ann/0.png", "0")
    # What is written is a listing again.
    listing = identities.list_csv(out / "photos.csv", data)
    assert len(listing.samples) == 6 and not listing.problems
    splits = [
        array_records.open_source(out / "records", "people", split) for split in ("train", "test")
    ]
    assert sum(map(len, splits)) == 6
    assert {path: path.read_bytes() for path in data.rglob("*.*")} == before
    assert "another name" in _run_program(*flags)
    listed = (out / "photos.csv").read_bytes()
    message = _run_program(f"--data={data}", f"--csv={out / 'photos.csv'}", f"--output_dir={out}")
    assert "is where the result goes" in message and (out / "photos.csv").read_bytes() == listed
    assert "--data is needed" in _run_program(f"--output_dir={out}")
    toy, _ = _run_program(f"--data={data}", f"--output_dir={tmp_path / 'toy'}", "--max_photos=2")
    assert toy["photos"] == 2


def test_a_collection_that_was_killed_goes_on(tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    for seed in range(5):
        _save(data / "Ann" / f"{seed}.png", _picture(seed))
    (data / "Ann" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    _run_program(f"--data={data}", f"--output_dir={tmp_path / 'straight'}")
    monkeypatch.setattr(collect, "_GROUP", 2)
    read, fingerprint = [], collect.fingerprint

    def count(pixels):
        read.append(1)
        if len(read) == 4:
            raise KeyboardInterrupt
        return fingerprint(pixels)

    monkeypatch.setattr(collect, "fingerprint", count)
    with pytest.raises(KeyboardInterrupt):
        _run_program(f"--data={data}", f"--output_dir={out}")
    read[:] = [1] * 4
    _run_program(f"--data={data}", f"--output_dir={out}")
    assert len(read) - 4 == 3
    for name in ("photos.csv", "repeats.csv"):
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_photos_whose_names_no_table_can_hold_are_named(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    bad = os.fsdecode(b"caf\xe9.png")
    for number, name in enumerate(["=1+1.png", "-a,b.png", "two\nlines.png", bad]):
        _save(data / "Ann" / name, _picture(number))
    result, complete = _run_program(f"--data={data}", f"--output_dir={out}")
    assert not complete and result["kept"] == 3
    assert result["not_handled"] == [{"image": f"Ann/{bad}", "reason": "the name is not Unicode"}]
    listing = identities.list_csv(out / "photos.csv", data)
    assert len(listing.samples) == 3 and not listing.problems
