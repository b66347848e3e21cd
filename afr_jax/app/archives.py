"""Photos out of zip files that strangers made: bounded, below names of our own."""

import os
import pathlib
import stat
import struct
import zipfile
import zlib
from typing import NamedTuple

from afr_jax.app import limits

_MOST_ENTRIES = 20_000
_MOST_BYTES = 2_000 * limits.MEGABYTE
# Photos hardly shrink. Small archives may.
_MOST_RATIO, _SMALL_BYTES = 100, 50 * limits.MEGABYTE
_MOST_DIRECTORY_BYTES = 8 * limits.MEGABYTE
_END = struct.Struct("<4s4H2LH")
_CHUNK = 1 << 20
_PHOTO_ENDS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    *(".heic", ".heif", ".hif"),
)


class Member(NamedTuple):
    """A photo of an archive.

    Attributes:
        parts: of its path in the archive.
        path: of its content, under a name of our own.
    """

    parts: tuple[str, ...]
    path: pathlib.Path


class Unpacked(NamedTuple):
    """The photos of an archive, by their paths in it, and how many other files lie beside them."""

    members: list[Member]
    num_skipped: int


def unpack_photos(
    archive: pathlib.Path, folder: pathlib.Path, *, most: int = _MOST_ENTRIES
) -> Unpacked:
    """Unpacks the photos of a zip file.

    Everything is judged by the archive's own list first, and counted again while it is unpacked, as
    that list may lie. Archives within it are not opened.

    Args:
        archive: the zip file.
        folder: for the contents; made if need be.
        most: photos it may hold.

    Raises:
        limits.Refused: it is no zip file, damaged or encrypted; too much is in it; an entry is a
            link, or its name leads out of the archive.
    """
    try:
        _check_directory(archive)
        with zipfile.ZipFile(archive) as opened:
            entries = [entry for entry in opened.infolist() if not entry.is_dir()]
            _check(entries, archive.stat().st_size)
            chosen = [(limits.split_path(entry.filename), entry) for entry in entries]
            photos = [(parts, entry) for parts, entry in chosen if _is_photo(parts)]
            if len(photos) > most:
                raise limits.Refused(f"the zip file holds {len(photos)} photos, at most {most} go")
            folder.mkdir(parents=True, exist_ok=True)
            left, members = _MOST_BYTES, []
            for number, (parts, entry) in enumerate(sorted(photos, key=lambda pair: pair[0])):
                # Only ends of this list get into a path.
                end = pathlib.PurePosixPath(parts[-1]).suffix.lower()
                path = folder / f"{number:05d}{end}"
                left -= _unpack(opened, entry, path, min(left, limits.MOST_PHOTO_BYTES))
                members.append(Member(tuple(parts), path))
            return Unpacked(members, len(entries) - len(photos))
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise limits.Refused("the zip file is damaged, or none at all") from error
    except (NotImplementedError, RuntimeError) as error:  # Of other methods, or encrypted.
        raise limits.Refused("the zip file is encrypted or packed in an unknown way") from error


def _check_directory(archive: pathlib.Path) -> None:
    """Refuses a list of entries that alone would fill the memory, before it is read."""
    with archive.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 16) - _END.size))
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise limits.Refused("it is no zip file")
    # What stands there would count in place of the numbers below; who has fewer entries needs none.
    if tail[max(at - 20, 0) :].startswith(b"PK\x06\x07"):
        raise limits.Refused("the zip file is of the kind for many entries or gigabytes (ZIP64)")
    _, _, _, _, count, directory_bytes, _, _ = _END.unpack_from(tail, at)
    if directory_bytes > _MOST_DIRECTORY_BYTES or count > _MOST_ENTRIES:
        raise limits.Refused(f"the zip file has too many entries; at most {_MOST_ENTRIES} go")


def _check(entries: list[zipfile.ZipInfo], archive_bytes: int) -> None:
    if len(entries) > _MOST_ENTRIES:
        raise limits.Refused(f"the zip file has {len(entries)} entries, at most {_MOST_ENTRIES} go")
    total = sum(entry.file_size for entry in entries)
    if total > _MOST_BYTES or total > max(_SMALL_BYTES, _MOST_RATIO * archive_bytes):
        raise limits.Refused("the zip file unpacks to far more than it may: it looks like a bomb")
    for entry in entries:
        if entry.flag_bits & 1:
            raise limits.Refused("the zip file is encrypted")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise limits.Refused("the zip file holds links")


def _unpack(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: pathlib.Path, most: int) -> int:
    """Writes the content of an entry, and returns its size."""
    size = 0
    with opened.open(entry) as source, path.open("xb") as target:
        while chunk := source.read(_CHUNK):
            size += len(chunk)
            if size > most:
                raise limits.Refused("the zip file unpacks to far more than it may")
            target.write(chunk)
    return size


def _is_photo(parts: list[str]) -> bool:
    is_hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not is_hidden and pathlib.PurePosixPath(parts[-1]).suffix.lower() in _PHOTO_ENDS
