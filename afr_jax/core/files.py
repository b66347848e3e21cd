"""Files that are written whole or not at all, by one process at a time, and values as JSON."""

import contextlib
import csv
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import pathlib
import re
import secrets
import socket
import threading
import time
import weakref
import zipfile
import zlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import IO, Any

import jax
import numpy as np
from absl import logging

try:
    import fcntl
except ImportError:  # There are no such locks on Windows.
    fcntl = None

_LOCK_NAME = ".lock"
_HERE = f" on {socket.gethostname()}:"
_PATIENCE_S = 120
_PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial")
# What reading a damaged zip archive raises.
_DAMAGED = (
    *(OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile),
    *(RuntimeError, NotImplementedError),
)
# Trained weights hardly shrink: compressed files are a tenth smaller, those of halves and zeros a
# few times. Small ones may be anything.
_MOST_EXPANSION = 20
_SMALL_BYTES = 1 << 26
# The locks of this process, by folder, as long as somebody holds them.
_held: weakref.WeakValueDictionary[tuple[str, bool], "FolderLock"] = weakref.WeakValueDictionary()
_held_guard = threading.Lock()

# Errors of the place where files are written, not of one name in it: a disk that is full,
# read-only, broken or gone. Whoever writes many files need not try the next one.
_OF_THE_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
    *(errno.ESTALE, errno.ENODEV, errno.ENOTCONN),
)
# Cells that spreadsheets take for formulas, behind any number of the marks that keep them text.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_MARKED = re.compile(r"'+[=+\-@\t\r]")
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
        OSError: If the file cannot be written, such as when the disk is full; names `path`.
    """
    write_parts_atomically(path, [data], overwrite=overwrite)


def write_parts_atomically(
    path: str | os.PathLike[str], parts: Iterable[bytes], *, overwrite: bool = False
) -> None:
    """`write_atomically` of data that come part by part; an error of their maker leaves no file."""
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # It would be taken for an existing output.
        raise NotADirectoryError(
            errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)
        ) from error
    partial = None
    try:
        with naming(path):
            partial, file = _open_partial(path)
            with file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
                if overwrite:
                    os.replace(partial, path)
                else:
                    _publish_new(partial, path)
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Generator[None]:
    """Lets errors of writing name the file that people know.

    The system names none when a disk is full, or a hidden one; libraries of formats hide what it
    said in errors of their own.

    Args:
        path: of the file or folder that is written in the body.

    Raises:
        OSError: what the body raised, with the path.
    """
    try:
        yield
    except InUseError:
        raise
    except OSError as error:
        if error.filename is not None and not str(error.filename).endswith(".partial"):
            raise
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
    except Exception as error:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), os.fspath(path)) from error
        raise


class InUseError(OSError):
    """Another process works in the folder."""


class FolderLock:
    """A process's hold on a folder, from `lock_folder`.

    It ends with the last reference to it, or with the process, however that ends.
    """

    def __init__(self, file: IO[bytes], path: pathlib.Path) -> None:
        """Takes the open file that is locked, and its path."""
        self._end = weakref.finalize(self, _unlock, file, path, os.getpid())


def lock_folder(folder: str | os.PathLike[str], *, is_shared: bool = False) -> FolderLock | None:
    """Takes hold of a folder, so that no other process does.

    The lock is `flock` on a hidden file in the folder, so that one of a killed process is none. The
    same process may take it more than once. That of a process on another machine is waited for, two
    minutes at most: a file server needs them to learn that a machine is gone.

    Args:
        folder: It exists.
        is_shared: Whether others may have it likewise, and keep only those out who would have it
            alone.

    Returns:
        The hold; None where the file system has no locks.

    Raises:
        InUseError: Another process has it; the message names it.
        OSError: The file of the lock cannot be written.
    """
    key = os.path.realpath(folder), is_shared
    for second in range(_PATIENCE_S + 1):
        try:
            with _held_guard:
                lock = _held.get(key)
                if lock is None and fcntl is not None:
                    lock = _take_lock(pathlib.Path(folder), is_shared=is_shared)
                    if lock is not None:
                        _held[key] = lock
            return lock
        except InUseError as error:
            if _HERE in str(error) or second == _PATIENCE_S:
                raise
            if not second:
                logging.info("waiting, as %s", error)
            time.sleep(1)
    raise AssertionError("the last try returns or raises")


def remove_partials(folder: str | os.PathLike[str]) -> None:
    """Removes what killed processes left of `write_atomically` in a folder, not in those below."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if _PARTIAL.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError), open(entry.path, "rb") as file:
                    if _lock_file(file):
                        os.unlink(entry.path)


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


def parse_json(text: str | bytes) -> Json:
    """The value that JSON text says.

    Raises:
        ValueError: It says none, or one that no writer of ours makes: lists within lists without
            end.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("damaged: lists within lists without end") from error


def seal(fields: Mapping[str, object]) -> dict[str, Json]:
    """Fields as JSON can say them, with a checksum over them, for `unseal`."""
    plain = to_jsonable(fields)
    return {**plain, "checksum": _checksum(plain)}


def unseal(fields: Json) -> dict[str, Json]:
    """The fields that were sealed.

    Raises:
        ValueError: They are not as they were written.
    """
    if not isinstance(fields, dict):
        raise ValueError("damaged: it is no JSON object")
    plain = {name: value for name, value in fields.items() if name != "checksum"}
    try:
        checksum = _checksum(plain)
    except RecursionError as error:
        raise ValueError("damaged: lists within lists without end") from error
    if fields.get("checksum") != checksum:
        raise ValueError("damaged: its checksum is another one")
    return plain


def write_sealed(path: str | os.PathLike[str], fields: Mapping[str, object]) -> None:
    """Writes a JSON file with a checksum, for `read_sealed`; see `write_json`."""
    write_json(path, seal(fields))


def read_sealed(path: str | os.PathLike[str]) -> dict[str, Json]:
    """The fields of a file by `write_sealed`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged.
    """
    return unseal(parse_json(pathlib.Path(path).read_bytes()))


def append_sealed(path: str | os.PathLike[str], fields: Mapping[str, object]) -> None:
    """Appends fields with a checksum to a file, as a line of JSON, for `read_sealed_lines`."""
    with naming(path), open(path, "a+b") as file:
        # Of a line that a killed run left torn, this one must not become the end.
        is_torn = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * is_torn + sealed_line(fields))


def sealed_line(fields: Mapping[str, object]) -> bytes:
    """Fields with a checksum as a line of JSON."""
    return json.dumps(seal(fields), allow_nan=False).encode() + b"\n"


def read_sealed_lines(
    path: str | os.PathLike[str], *, start: int = 0
) -> tuple[list[dict[str, Json]], int, int]:
    """What `append_sealed` has written; a last line without an end is left for later.

    Args:
        path: of the file.
        start: byte to begin at, the end of an earlier call.

    Returns:
        (the fields of each line, the byte where the last one ends, number of damaged lines left
        out).
    """
    with open(path, "rb") as file:
        file.seek(start)
        *whole, rest = file.read().split(b"\n")
        end = file.tell() - len(rest)
    lines, num_damaged = [], 0
    for line in whole:
        try:
            lines += [unseal(parse_json(line))] if line else []
        except ValueError:
            num_damaged += 1
    return lines, end, num_damaged


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name and a checksum as an `.npz`, over an earlier one, for `read_arrays`."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, checksum=np.array(digest_of(arrays)), **arrays)
    write_atomically(path, buffer.getvalue(), overwrite=True)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a file by `write_arrays`, by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_npz(archive, os.path.getsize(path))
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
        checksum = str(arrays.pop("checksum"))
    except FileNotFoundError:
        raise
    except _DAMAGED as error:
        raise ValueError(f"damaged: {error}") from error
    if checksum != digest_of(arrays):
        raise ValueError("damaged: its checksum is another one")
    return arrays


def check_expansion(num_bytes: int, file_bytes: int, *, small: int = _SMALL_BYTES) -> None:
    """Checks that what a file unpacks to is not absurdly larger than the file.

    Args:
        num_bytes: of the arrays, as headers say.
        file_bytes: of the file.
        small: what a file may unpack to, however small it is.

    Raises:
        ValueError: it is.
    """
    if num_bytes > max(small, _MOST_EXPANSION * file_bytes):
        raise ValueError(f"{file_bytes} bytes say that they unpack to {num_bytes}")


def check_npz(archive: zipfile.ZipFile, file_bytes: int, *, small: int = _SMALL_BYTES) -> None:
    """Checks the arrays of an `.npz` by their headers, before one is unpacked.

    Args:
        archive: the open file.
        file_bytes: its size.
        small: as of `check_expansion`.

    Raises:
        ValueError: it is a bomb; or a member holds objects, or not as many values as it says.
    """
    members = archive.infolist()
    check_expansion(sum(max(0, info.file_size) for info in members), file_bytes, small=small)
    for info in members:
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            readers = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            if version not in readers:
                raise ValueError(f"{info.filename} is of an unknown version")
            shape, _, dtype = readers[version](member)
            if dtype.hasobject:
                raise ValueError(f"{info.filename} holds objects, which would have to be executed")
            if math.prod(shape) * dtype.itemsize != info.file_size - member.tell():
                raise ValueError(f"{info.filename} has not as many values as its shape says")


def digest_of(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays with their names, types and shapes, in the order of the names."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def write_csv(
    path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    """Writes a CSV file (UTF-8, lines end in a line feed) whole or not at all.

    Cells with commas, quotes and line ends are quoted as RFC 4180 says. Text that spreadsheets
    would run as a formula, because it begins with =, +, -, @, a tab or a carriage return, gets an
    apostrophe before it, unless it is a number; `read_csv` takes it off again.

    Args:
      path: the file; an existing one is replaced.
      header: names of the columns.
      rows: values of each row.
    """
    lines = []
    for row in (header, *rows):
        # The writer quotes what stands in its line end: with "\n" alone, no carriage return.
        line = io.StringIO()
        csv.writer(line, lineterminator="\r\n").writerow(map(_cell, row))
        lines.append(line.getvalue().removesuffix("\r\n"))
    text = "".join(f"{line}\n" for line in lines)
    write_atomically(path, text.encode("utf-8", "backslashreplace"), overwrite=True)


def read_csv(
    path: str | os.PathLike[str], columns: Sequence[str]
) -> list[tuple[int, tuple[str, ...]]]:
    """Reads some columns of a CSV file in UTF-8, as `write_csv` or anybody else wrote it.

    Returns:
      For each row its number (the header is row 1) and its cells, in the order of `columns`; a cell
      that is missing is empty.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such CSV, or lacks a column.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = sorted(set(columns) - set(reader.fieldnames or ()))
            if missing:
                raise ValueError(f"{path} has no column {' and no column '.join(missing)}")
            return [
                (reader.line_num, tuple(_unmarked(row[name] or "") for name in columns))
                for row in reader
            ]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV in UTF-8: {error}") from error


def is_of_the_disk(error: OSError) -> bool:
    """Whether an error of writing is that of a disk, full or read-only, say, not of one file."""
    return error.errno in _OF_THE_DISK


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


def _checksum(plain: Json) -> str:
    """The same for equal values, however the file writes them."""
    text = json.dumps(plain, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _take_lock(folder: pathlib.Path, *, is_shared: bool) -> FolderLock | None:
    path = folder / _LOCK_NAME
    while True:
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(path.open("a+b"))
            try:
                if not _lock_file(file, is_shared=is_shared):
                    return None
            except BlockingIOError as error:
                file.seek(0)
                holder = (
                    printable(file.read(200).decode(errors="replace")) or f"another process{_HERE}"
                )
                message = f"{folder} is in use by {holder} let it finish first"
                raise InUseError(message) from error
            # Whoever had it may have removed the file meanwhile.
            if _is_there(file, path):
                file.truncate(0)
                file.write(f"process {os.getpid()}{_HERE}".encode())
                file.flush()
                opened.pop_all()
                return FolderLock(file, path)


def _is_there(file: IO[bytes], path: pathlib.Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _unlock(file: IO[bytes], path: pathlib.Path, process: int) -> None:
    if os.getpid() == process:  # A fork has but a copy.
        with contextlib.suppress(OSError):
            if _lock_file(file):  # Nobody shares it.
                path.unlink()
    file.close()


def _lock_file(file: IO[bytes], *, is_shared: bool = False) -> bool:
    """Whether the file system has locks, and the file one now.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return fcntl is not None
    except BlockingIOError:
        raise
    except OSError:
        return False


def _open_partial(path: pathlib.Path) -> tuple[pathlib.Path, IO[bytes]]:
    """A new hidden file beside another, locked, so that `remove_partials` lets it be."""
    while True:
        partial = path.with_name(f".{secrets.token_hex(8)}.partial")
        file = partial.open("xb")
        with contextlib.suppress(BlockingIOError):
            if not _lock_file(file) or _is_there(file, partial):
                return partial, file
        file.close()  # It was taken for a leftover before it was locked.


def _cell(value: object) -> object:
    if not isinstance(value, str) or not _FORMULA.match(value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def _unmarked(cell: str) -> str:
    return cell[1:] if _MARKED.match(cell) else cell


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
