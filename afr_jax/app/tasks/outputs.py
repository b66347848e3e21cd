"""What a task hands to the server beside its figures: files of its folder, by key."""

import pathlib
import zipfile
from collections.abc import Iterable

from afr_jax.core import files

_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".gif": "image/gif",
    ".pdf": "application/pdf",
    ".zip": "application/zip",
    ".json": "application/json",
}
# Archives with the same content are the same file.
_DATE = (1980, 1, 1, 0, 0, 0)


def output(path: str, *, name: str | None = None) -> dict[str, files.Json]:
    """An entry of a result's `outputs`.

    Args:
        path: below the job's folder, of our own making.
        name: for people who save it.
    """
    suffix = pathlib.PurePosixPath(path).suffix
    return {"path": path, "type": _TYPES[suffix], "name": name or pathlib.PurePosixPath(path).name}


def write_zip(path: pathlib.Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Writes a zip file of (name, content); photos are stored as they are."""
    with zipfile.ZipFile(path, "x") as archive:
        for name, data in members:
            entry = zipfile.ZipInfo(name, _DATE)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
