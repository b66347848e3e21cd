"""Files that are written whole or not at all, and values as JSON can say them."""

import csv
import dataclasses
import errno
import io
import json
import os
import pathlib
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

# What JSON can say: None, bool, int, float, str, and lists and dicts by str of such values. Type
# checkers take it for anything, as who reads a file knows its keys and they do not.
Json = Any


def write_atomically(path: str | os.PathLike[str], data: bytes, *, overwrite: bool = False) -> None:
    """Writes a file so that its name never stands for a part of the data.

    The data goes to a hidden file `.*.partial` in the same folder, which takes the final name once
    it is on the disk, and is removed on any error. Missing folders are created.

    Args:
        path: Path of the file.
        data: Its content.
        overwrite: Whether an existing file is replaced.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is False, even if it came up meanwhile.
        OSError: If the file cannot be written, such as when the disk is full.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # It would be taken for an existing output.
        raise NotADirectoryError(
            errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)
        ) from error
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(partial, path)
        else:
            _publish_new(partial, path)
    except PermissionError as error:  # It names the hidden file, which says nothing to people.
        raise PermissionError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def printable(text: object) -> str:
    """The text in one line that every stream and every UTF-8 file takes.

    File names on disk need not be valid text, and may hold line ends and controls of terminals;
    such characters are written as escapes.

    Args:
        text: A name, a path or a message.
    """
    escaped = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], escaped)


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Writes a JSON file so that readers see the old one or the new one, never a part.

    Args:
      path: the file.
      value: see `to_jsonable`.
    """
    text = json.dumps(to_jsonable(value), indent=2, allow_nan=False)
    write_atomically(path, f"{text}\n".encode(), overwrite=True)


def write_csv(
    path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    """Writes a CSV file (UTF-8, lines end in a line feed) whole or not at all.

    Args:
      path: the file; an existing one is replaced.
      header: names of the columns.
      rows: values of each row.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode(), overwrite=True)


def to_jsonable(value: object) -> Json:
    """Turns a value into what JSON can say.

    Arrays become lists, scalars Python numbers, NaN and infinities null, dataclasses and
    NamedTuples dicts, paths text.

    Raises:
      TypeError: for anything else.
    """
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_jsonable(getattr(value, field.name)) for field in fields}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return to_jsonable(value._asdict())
    if isinstance(value, Mapping):
        return {str(name): to_jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [to_jsonable(item) for item in sorted(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        array = np.asarray(value)
        # The small float types of accelerators are foreign to numpy ("V") and to JSON.
        return to_jsonable(
            (array.astype(np.float32) if array.dtype.kind == "V" else array).tolist()
        )
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


def _publish_new(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Gives the file its final name unless that exists."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):
        # No hard links here (FAT, some network drives): an empty file claims the name for a moment.
        path.open("xb").close()
        try:
            os.replace(partial, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
