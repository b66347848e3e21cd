"""Listing of photo files in folders, and names of outputs.

What is in the files is the matter of photos.py. Host code: no JAX here.
"""

import dataclasses
import errno
import os
import pathlib
import stat
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence

NOT_UNICODE = "the name is not Unicode"
_SYSTEM_NAMES = (".ds_store", "thumbs.db", "desktop.ini")


@dataclasses.dataclass(frozen=True)
class PhotoInput:
    """A file to read.

    Attributes:
        path: Absolute path of the file.
        relative: Path below the folder it was found in; the name of a file given by itself.
        problem: Why it must not be read, or None.
        in_folder: Whether it was found in a folder, rather than given by itself.
    """

    path: pathlib.Path
    relative: pathlib.PurePosixPath
    problem: str | None = None
    in_folder: bool = False

    @property
    def is_of_the_system(self) -> bool:
        """Whether an operating system put it into the folder, beside the photos."""
        return self.in_folder and self.path.name.casefold() in _SYSTEM_NAMES


def list_photos(
    paths: Sequence[str | os.PathLike[str]],
    *,
    exclude: Sequence[str | os.PathLike[str]] = (),
    with_system_files: bool = False,
) -> list[PhotoInput]:
    """Lists the files among and below the given paths, photos or not.

    Left out below folders: hidden files and folders, the files that systems put beside photos,
    special files and linked folders. A link to a file is listed, with a problem if it is broken or
    leads out of the folder. A file that is reached twice is listed once, where it comes first. A
    folder that cannot be read is listed itself, with that problem.

    Args:
        paths: Files and folders; folders are searched with all folders below them.
        exclude: Files to leave out, and folders to leave out where they lie strictly inside one of
            the given folders. Paths that do not exist are allowed.
        with_system_files: Whether .DS_Store, Thumbs.db and desktop.ini are listed.

    Returns:
        The files, in the order of `paths`, within a folder sorted by relative path.

    Raises:
        FileNotFoundError: If one of `paths` does not exist.
    """
    excluded = {pathlib.Path(path).resolve() for path in exclude}
    found: dict[pathlib.Path, PhotoInput] = {}
    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        if path.is_dir():
            pairs = _files_below(path.resolve(), excluded)
        else:
            target = path.resolve()
            path = path.parent.resolve() / path.name
            item = PhotoInput(path, pathlib.PurePosixPath(path.name))
            pairs = iter([] if target in excluded else [(target, item)])
        for target, item in sorted(pairs, key=lambda pair: pair[1].relative.as_posix()):
            found.setdefault(target, item)
    return [item for item in found.values() if with_system_files or not item.is_of_the_system]


def find_below(root: str | os.PathLike[str], name: str) -> PhotoInput:
    """A file that a table names below a folder, for tables that come from somebody else.

    Args:
        root: The folder.
        name: Path below it; the problem says so if there is no such file, or if the path or a link
            leads out of the folder.
    """
    root = pathlib.Path(root).resolve()
    path = root / name
    relative = pathlib.PurePosixPath(pathlib.Path(os.path.relpath(path, root)).as_posix())
    problem = None
    try:
        if root not in path.resolve().parents:
            problem = f"lies outside {root}"
        elif not path.is_file():
            problem = "the file does not exist"
    except (OSError, RuntimeError, ValueError) as error:  # A circle of links, a null character.
        problem = f"cannot be looked up: {getattr(error, 'strerror', None) or error}"
    return PhotoInput(path, relative, problem)


def is_unicode(name: str) -> bool:
    """Whether a name can stand in a file of text: names on disk may be any bytes."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def output_paths(
    inputs: Sequence[PhotoInput],
    output_dir: str | os.PathLike[str],
    *,
    suffix: str | Callable[[PhotoInput], str] = "_cloaked.png",
    taken: Mapping[str, str] | None = None,
) -> list[pathlib.Path]:
    """Names one output per input: `<output_dir>/<relative folder>/<stem><suffix>`.

    No two names are equal, also where case or the Unicode form of accents does not count, and none
    is that of an input. If the name is in use, the next choices are `<stem>_<extension><suffix>`,
    `<stem>_<extension>_2<suffix>`, `.._3` and so on.

    Args:
        inputs: Files from `list_photos`; earlier ones choose first.
        output_dir: Folder of the outputs.
        suffix: End of the names, or what gives it for an input.
        taken: Output of an earlier run by input, str(input.path) to its path. Its inputs keep their
            name, the others avoid it.

    Returns:
        The paths, one per input.
    """
    taken = taken or {}
    used = {_folded(path) for path in (*taken.values(), *(item.path for item in inputs))}
    outputs = []
    for item in inputs:
        if str(item.path) in taken:
            outputs.append(pathlib.Path(taken[str(item.path)]))
            continue
        folder = pathlib.Path(output_dir, *item.relative.parent.parts)
        end = suffix if isinstance(suffix, str) else suffix(item)
        names = (f"{name}{end}" for name in _stems(item.relative))
        output = next(folder / name for name in names if _folded(folder / name) not in used)
        used.add(_folded(output))
        outputs.append(output)
    return outputs


def stem_with_extension(relative: pathlib.PurePosixPath) -> str:
    """`<stem>_<extension>`, which names an output where another one has the stem alone."""
    extension = relative.suffix[1:]
    return f"{relative.stem}_{extension}" if extension else relative.stem


def _files_below(
    root: pathlib.Path, excluded: set[pathlib.Path]
) -> Iterator[tuple[pathlib.Path, PhotoInput]]:
    """Yields every file below a resolved folder with its target, which tells duplicates."""
    excluded = {path for path in excluded if root in path.parents}
    unreadable: list[OSError] = []
    for folder, folder_names, file_names in os.walk(root, onerror=unreadable.append):
        here = pathlib.Path(folder)
        folder_names[:] = [
            name
            for name in folder_names
            if not name.startswith(".") and here / name not in excluded
        ]
        for name in file_names:
            if name.startswith(".") and name.casefold() not in _SYSTEM_NAMES:
                continue
            path = here / name
            target, problem = _target_of(path, root)
            if target is not None and excluded.isdisjoint((path, target, *target.parents)):
                yield target, PhotoInput(path, _relative(path, root), problem, in_folder=True)
    for error in unreadable:
        path = pathlib.Path(error.filename)
        problem = "the folder cannot be read"
        yield path, PhotoInput(path, _relative(path, root), problem, in_folder=True)


def _target_of(path: pathlib.Path, root: pathlib.Path) -> tuple[pathlib.Path | None, str | None]:
    """Returns the file that a path stands for, None for special files, and a problem, if any."""
    try:
        target = path.resolve(strict=True)
        if not stat.S_ISREG(target.stat().st_mode):
            return None, None
    except (OSError, RuntimeError):  # RuntimeError: links in a circle, up to Python 3.12.
        return path, "a symbolic link that leads nowhere" if path.is_symlink() else None
    if root not in target.parents:
        return path, "a symbolic link that leads out of the folder"
    return target, None


def _relative(path: pathlib.Path, root: pathlib.Path) -> pathlib.PurePosixPath:
    return pathlib.PurePosixPath(path.relative_to(root).as_posix())


def _stems(relative: pathlib.PurePosixPath) -> Iterator[str]:
    yield relative.stem
    stem = stem_with_extension(relative)
    if stem != relative.stem:
        yield stem
    number = 2
    while True:
        yield f"{stem}_{number}"
        number += 1


def _folded(path: str | os.PathLike[str]) -> str:
    """Returns a key that is equal for paths which some file systems take for the same."""
    return unicodedata.normalize("NFC", os.path.abspath(path)).casefold()
