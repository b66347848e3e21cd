"""What a browser may ask of the server, and the names of what it sends.

Names of uploads are text for people and seeds of randomness, never paths: files lie under names of
our own.
"""

import pathlib
import unicodedata
from collections.abc import Iterable

MEGABYTE = 1_000_000
MOST_PHOTO_BYTES = 100 * MEGABYTE
# Files of one tool in one browser, and of a folder of people.
MOST_PHOTOS, MOST_FOLDER_FILES = 40, 1000
# Uploads at once, sessions, and jobs that wait; for all browsers together.
MOST_UPLOADS, MOST_SESSIONS, MOST_JOBS = 6, 40, 100
# Free space of the disk that uploads leave.
FREE_BYTES = 500 * MEGABYTE
MOST_JSON_BYTES = 1_000_000
_MOST_NAME = 120


class Refused(Exception):
    """What the server does not do; the message says why, for the person at the browser.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, *, status: int = 400) -> None:
        """Takes the message."""
        super().__init__(message)
        self.status = status


def clean_name(name: str) -> str:
    """The last part of a name without what no file name should have; never empty."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    kept = "".join(
        each for each in unicodedata.normalize("NFC", last) if unicodedata.category(each)[0] != "C"
    )
    kept = kept.strip().lstrip(".")
    if len(kept) > _MOST_NAME:
        suffix = pathlib.PurePosixPath(kept).suffix[:10]
        kept = kept[: _MOST_NAME - len(suffix)] + suffix
    return kept or "file"


def unique_name(name: str, taken: Iterable[str]) -> str:
    """The name, or `stem (2).end` and so on where it is taken, whatever the case."""
    used = {each.casefold() for each in taken}
    path = pathlib.PurePosixPath(name)
    number, found = 2, name
    while found.casefold() in used:
        found = f"{path.stem} ({number}){path.suffix}"
        number += 1
    return found


def split_path(path: str) -> list[str]:
    """The parts of a relative path from an archive or a folder.

    Raises:
        Refused: it is absolute, or leads out of its folder.
    """
    parts = path.replace("\\", "/").split("/")
    is_absolute = not parts[0] or (len(parts[0]) == 2 and parts[0][1] == ":")
    if is_absolute or ".." in parts or "\0" in path:
        raise Refused(f"the name {path[:80]!r} leads out of its folder: nothing of it is used")
    return [part for part in parts if part not in ("", ".")]
