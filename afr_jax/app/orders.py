"""What a page may send and ask for, checked: kinds of uploads, and orders that become jobs."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from afr_jax.app import limits, sessions
from afr_jax.core import files
from afr_jax.data import photos
from afr_jax.methods.cloaking import budget

# Roles of uploads: (tool, role) -> what it is.
_ROLES = {
    ("cloak", "photo"): "photo",
    ("check", "first"): "photo",
    ("check", "second"): "photo",
    ("check", "query"): "photo",
    ("check", "people"): "photo",
    ("check", "zip"): "zip",
    ("patch", "train"): "film",
    ("patch", "test"): "film",
    ("protect", "zip"): "zip",
}
_FILM_ENDS = (*(".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg", ".gif", ".webp"),)
_MANY = {"photo": limits.MOST_PHOTOS, "people": limits.MOST_FOLDER_FILES}
_FORMATS = ("png", "jpeg")


@dataclasses.dataclass(frozen=True)
class UploadKind:
    """What a file that arrives is.

    Attributes:
        tool: page that it belongs to.
        role: what it is for.
        name: cleaned; of a folder's file its path below it.
        suffix: of the file that it is written to.
        most_bytes: of the file.
        most_files: of this role.
        is_photo: whether its first bytes must be those of a photo.
        is_single: whether it replaces an earlier one.
    """

    tool: str
    role: str
    name: str
    suffix: str
    most_bytes: int
    most_files: int
    is_photo: bool
    is_single: bool


@dataclasses.dataclass(frozen=True)
class Order:
    """A job that was asked for; see `jobs.Job`."""

    tool: str
    kind: str
    payload: Mapping[str, files.Json]


def upload_kind(tool: str, role: str, name: str, *, max_upload_mb: int) -> UploadKind:
    """What a file that arrives is.

    Args:
        tool: page that it comes from.
        role: what it is for.
        name: as the browser has it.
        max_upload_mb: of films and archives.

    Raises:
        limits.Refused: there is no such role, or the name has the wrong end.
    """
    kind = _ROLES.get((tool, role))
    if kind is None:
        raise limits.Refused("there is no such place for a file")
    parts = limits.split_path(name) if role == "people" else [name]
    cleaned = "/".join(limits.clean_name(part) for part in parts) or "file"
    suffix = pathlib.PurePosixPath(cleaned).suffix.lower()
    if kind == "film" and suffix not in _FILM_ENDS:
        ends = ", ".join(_FILM_ENDS)
        raise limits.Refused(f"{cleaned} is no film in a supported format ({ends})")
    if kind == "zip" and suffix != ".zip":
        raise limits.Refused(f"{cleaned} is no zip file")
    most = limits.MOST_PHOTO_BYTES if kind == "photo" else max_upload_mb * limits.MEGABYTE
    return UploadKind(
        tool=tool,
        role=role,
        name=cleaned,
        suffix=suffix if kind != "photo" else "",
        most_bytes=most,
        most_files=_MANY.get(role, 1),
        is_photo=kind == "photo",
        is_single=role not in _MANY,
    )


def check_photo(path: pathlib.Path) -> None:
    """Checks the first bytes of a photo.

    Raises:
        limits.Refused: they are of no format that is read.
    """
    if photos.format_of_file(path) is None:
        raise limits.Refused("not a photo in a supported format (JPEG, PNG, WebP, BMP, TIFF, HEIC)")


def read_order(session: sessions.Session, body: Mapping[str, files.Json]) -> Order:
    """The job that a page asks for.

    Args:
        session: of the page.
        body: of the request: `kind`, and the page's choices.

    Raises:
        limits.Refused: files are missing, or a choice is none.
    """
    kind = body.get("kind")
    if kind == "cloak":
        return Order("cloak", kind, _cloak(session, body))
    if kind == "pair":
        first, second = (_one(session, "check", role) for role in ("first", "second"))
        return Order("check", kind, {"first": _file(first), "second": _file(second)})
    if kind == "people":
        return Order("check", kind, _people(session))
    if kind == "patch":
        train = _one(session, "patch", "train")
        test = session.files_of("patch", role="test")
        return Order(
            "patch",
            kind,
            {
                "train": _file(train),
                "test": _file(test[0]) if test else None,
                "placement": _word(body, "placement"),
                "length": _word(body, "length"),
                "face_width_mm": _word(body, "face_width_mm"),
            },
        )
    if kind == "protect":
        side = _word(body, "side_px")
        payload = {
            "zip": str(_one(session, "protect", "zip").path),
            "method": _word(body, "method"),
            "side_px": int(side) if side.isdecimal() and len(side) < 5 else 0,
            "tried": bool(body.get("tried")),
        }
        return Order("protect", kind, payload)
    raise limits.Refused("there is no such work")


def _cloak(session: sessions.Session, body: Mapping[str, files.Json]) -> dict[str, files.Json]:
    mode, file_format = _word(body, "mode"), _word(body, "format")
    if mode not in budget.MODES or file_format not in _FORMATS:
        raise limits.Refused("there is no such choice")
    chosen = body.get("faces")
    surrogates = body.get("surrogates")
    if not isinstance(chosen, dict) or not isinstance(surrogates, list):
        raise limits.Refused("the request cannot be read")
    if not surrogates:
        raise limits.Refused("choose at least one recognizer to cloak against")
    entries = []
    for upload in session.files_of("cloak"):
        result = None if upload.look is None else upload.look.result
        numbers = chosen.get(upload.id)
        if result is None or not isinstance(numbers, list) or not numbers:
            continue
        entries.append({**_file(upload), "faces": _boxes(result["faces"], numbers)})
    if not entries:
        raise limits.Refused("no face is chosen")
    return {
        "photos": entries,
        "mode": mode,
        "format": file_format,
        "surrogates": [str(name) for name in surrogates],
    }


def _boxes(
    faces: Sequence[Mapping[str, files.Json]], numbers: Sequence[files.Json]
) -> list[list[float]] | None:
    """Boxes of the chosen faces; None where they are those that are cloaked anyway."""
    usual = {number for number, face in enumerate(faces) if face["chosen"]}
    chosen = {number for number in numbers if isinstance(number, int) and 0 <= number < len(faces)}
    chosen = {number for number in chosen if faces[number]["free"]}
    if not chosen:
        raise limits.Refused("no face is chosen")
    return None if chosen == usual else [faces[number]["box"] for number in sorted(chosen)]


def _people(session: sessions.Session) -> dict[str, files.Json]:
    query = _one(session, "check", "query")
    archive = session.files_of("check", role="zip")
    folder = session.files_of("check", role="people")
    if not archive and not folder:
        raise limits.Refused("choose a folder or a zip file of people first")
    return {
        "query": _file(query),
        "zip": str(archive[0].path) if archive else None,
        "people": [] if archive else [_file(upload) for upload in folder],
    }


def _one(session: sessions.Session, tool: str, role: str) -> sessions.Upload:
    found = session.files_of(tool, role=role)
    if not found:
        raise limits.Refused("a file is missing: choose it first")
    return found[0]


def _file(upload: sessions.Upload) -> dict[str, files.Json]:
    return {"path": str(upload.path), "name": upload.name}


def _word(body: Mapping[str, files.Json], name: str) -> str:
    value = body.get(name)
    return str(value) if isinstance(value, (str, int, float)) else ""
