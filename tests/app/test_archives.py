"""Zip files of strangers: what is taken out of them, and what is refused."""

import contextlib
import io
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from afr_jax.app import archives, limits


def _photo(color="red", size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def _archive(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def test_photos_come_out_under_names_of_our_own(tmp_path):
    members = [
        ("anna/b.png", _photo("red")),
        ("anna/a.JPG", b"\xff\xd8\xff damaged"),
        ("bo/<b>&.png", _photo("blue")),
        ("bo/notes.txt", b"hello"),
        ("__MACOSX/anna/._b.png", b"x"),
        ("bo/.hidden.png", b"x"),
        ("bo/inner.zip", b"PK"),
    ]
    found = archives.unpack_photos(_archive(tmp_path / "a.zip", members), tmp_path / "out")
    assert [member.parts for member in found.members] == [
        ("anna", "a.JPG"),
        ("anna", "b.png"),
        ("bo", "<b>&.png"),
    ]
    assert found.num_skipped == 4
    names = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    assert names == ["00000.jpg", "00001.png", "00002.png"]
    assert found.members[2].path.read_bytes() == members[2][1]


@pytest.mark.parametrize(
    "name", ["../a.png", "x/../../a.png", "/etc/a.png", "..\\a.png", "C:\\a.png", "C:/a.png"]
)
def test_names_that_lead_out_are_refused(tmp_path, name):
    path = _archive(tmp_path / "a.zip", [("b.png", _photo()), (name, _photo())])
    with pytest.raises(limits.Refused, match="leads out"):
        archives.unpack_photos(path, tmp_path / "in" / "out")
    assert [each for each in tmp_path.rglob("*.png")] == []


def test_links_and_encrypted_entries_are_refused(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with pytest.raises(limits.Refused, match="links"):
        archives.unpack_photos(_archive(tmp_path / "a.zip", [(link, "/etc/passwd")]), tmp_path)
    path = _archive(tmp_path / "b.zip", [("a.png", _photo())])
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(signature) + offset] |= 1
    path.write_bytes(data)
    with pytest.raises(limits.Refused, match="encrypted"):
        archives.unpack_photos(path, tmp_path / "out")


def test_bombs_are_refused_by_what_they_say(tmp_path):
    zeros = bytes(60 * limits.MEGABYTE)
    path = _archive(tmp_path / "a.zip", [("a.png", zeros)], compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < limits.MEGABYTE
    with pytest.raises(limits.Refused, match="bomb"):
        archives.unpack_photos(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bombs_that_lie_about_their_size_are_stopped(tmp_path, monkeypatch):
    # zipfile stops at the size that the list of entries says: the limit does not depend on that.
    monkeypatch.setattr(archives, "_MOST_BYTES", 1000)
    monkeypatch.setattr(archives, "_check", lambda entries, archive_bytes: None)
    noise = np.random.default_rng(0).bytes(2000)
    path = _archive(tmp_path / "a.zip", [("a.png", noise)])
    with pytest.raises(limits.Refused, match="far more"):
        archives.unpack_photos(path, tmp_path / "out")


def test_many_entries_are_refused_before_they_are_read(tmp_path, monkeypatch):
    path = _archive(tmp_path / "a.zip", [(f"{n}.png", b"") for n in range(30)])
    monkeypatch.setattr(archives, "_MOST_ENTRIES", 20)
    with pytest.raises(limits.Refused, match="too many entries"):
        archives.unpack_photos(path, tmp_path / "out")
    monkeypatch.setattr(archives, "_MOST_ENTRIES", 100)
    with pytest.raises(limits.Refused, match="at most 3 go"):
        archives.unpack_photos(path, tmp_path / "out", most=3)
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x05\x06")
    struct.pack_into("<L", data, at + 12, 2**31)
    path.write_bytes(data)
    with pytest.raises(limits.Refused, match="too many entries"):
        archives.unpack_photos(path, tmp_path / "out")


@pytest.mark.parametrize("seed", range(40))
def test_damaged_archives_are_refused_or_read(tmp_path, seed):
    members = [(f"a/{n}.png", _photo(size=(20 + n, 9))) for n in range(4)]
    path = _archive(tmp_path / "a.zip", members, compression=zipfile.ZIP_DEFLATED)
    generator = np.random.default_rng(seed)
    data = bytearray(path.read_bytes())
    if seed % 2:
        data = data[: generator.integers(len(data))]
    else:
        data[generator.integers(len(data))] ^= 1 << generator.integers(8)
    path.write_bytes(data)
    with contextlib.suppress(limits.Refused):
        archives.unpack_photos(path, tmp_path / "out")
    assert all((tmp_path / "out") in each.parents for each in tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    "name, cleaned",
    [
        ("a.png", "a.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\photos\\a.png", "a.png"),
        ("a\0b\n\u202ec.png", "abc.png"),
        ("..", "file"),
        ("", "file"),
        (".htaccess", "htaccess"),
        ("<img src=x>.jpg", "<img src=x>.jpg"),
    ],
)
def test_names_are_cleaned(name, cleaned):
    assert limits.clean_name(name) == cleaned


def test_long_and_repeated_names():
    assert len(limits.clean_name("x" * 500 + ".jpeg")) == 120
    assert limits.clean_name("x" * 500 + ".jpeg").endswith(".jpeg")
    assert limits.unique_name("a.png", ["A.png", "a (2).png"]) == "a (3).png"


def test_numbers_for_gigabytes_do_not_go_round_the_check(tmp_path):
    """A ZIP64 locator before the end makes readers take other numbers than those at the end."""
    path = _archive(tmp_path / "a.zip", [("a.png", _photo())])
    data = path.read_bytes()
    at = data.rfind(b"PK\x05\x06")
    path.write_bytes(data[:at] + b"PK\x06\x07" + bytes(16) + data[at:])
    with pytest.raises(limits.Refused, match="ZIP64"):
        archives.unpack_photos(path, tmp_path / "out")
