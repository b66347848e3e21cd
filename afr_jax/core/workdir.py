"""The folder of one run: config.json, metrics.jsonl and result.json; made, claimed, checked."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import TypeVar

from afr_jax.core import distributed, files, options, progress
from afr_jax.core.runtime import object_store

_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The folder of one run: config.json, metrics.jsonl and result.json; see `open_workdir`.

    Attributes:
      path: the absolute folder.
      resumed: whether the folder held the config of an earlier run when it was opened.
      lock: keeps other processes out, as long as the run has this object.
    """

    path: pathlib.Path
    resumed: bool = False
    lock: files.FolderLock | None = dataclasses.field(default=None, repr=False, compare=False)

    def append_metrics(self, metrics: Mapping[str, object]) -> None:
        """Appends one line to metrics.jsonl; by convention it has an integer "step"."""
        if distributed.is_primary():
            files.append_sealed(self.path / "metrics.jsonl", metrics)

    def read_metrics(self) -> list[dict[str, files.Json]]:
        """Returns the lines of metrics.jsonl, without their checksums.

        A last line that a killed run left torn is left out, and so are damaged ones, with a warning
        that counts them.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        lines, _, num_damaged = files.read_sealed_lines(path)
        if num_damaged:
            progress.warn(path, f"{num_damaged} damaged lines are left out")
        return lines

    def truncate_metrics(self, step: int) -> None:
        """Drops the lines whose "step" lies after `step`: what a resumed run will measure again."""
        if distributed.is_primary() and (self.path / "metrics.jsonl").exists():
            kept = [line for line in self.read_metrics() if line.get("step", step) <= step]
            text = b"".join(map(files.sealed_line, kept))
            files.write_atomically(self.path / "metrics.jsonl", text, overwrite=True)

    def write_result(self, result: Mapping[str, object]) -> None:
        """Writes result.json."""
        if distributed.is_primary():
            text = object_store.named(json.dumps(files.to_jsonable(result)))
            files.write_json(self.path / "result.json", json.loads(text))


@contextlib.contextmanager
def claimed(
    folder: str | os.PathLike[str],
    *,
    below: Iterable[str | os.PathLike[str]] = (),
    is_shared: bool = False,
) -> Generator[None]:
    """Makes a folder of outputs, and keeps other processes from writing to it in the body.

    What killed runs left of half-written files there is removed.

    Args:
      folder: of the outputs.
      below: folders below it that are written to as well.
      is_shared: whether others may have it likewise (`core/runtime/claims.py`).

    Raises:
      UsageError: another process works in the folder, or it cannot be used.
    """
    lock = _claim(folder, below, is_shared=is_shared) if distributed.is_primary() else None
    distributed.barrier(f"the folder {folder} is claimed")
    yield
    del lock


def open_workdir(
    path: str | os.PathLike[str] | None,
    config: object,
    *,
    resumable: Iterable[str] | None = None,
    is_shared: bool = False,
) -> Workdir:
    """Creates or reopens the folder of a run and makes sure that it is the same run, once.

    Args:
      path: the folder, or its address in an object store; None is a usage error.
      config: the resolved options, a dict or a dataclass; written to config.json.
      resumable: keys that may change when a run is resumed (the number of steps, say). Nested keys
        are written with dots: "model.width". By default those that an options class says.
      is_shared: whether other processes that ask for it likewise may have it, too.

    Returns:
      The work directory, `resumed` if it held a config.

    Raises:
      UsageError: if the folder belongs to a run with another config, another process works in it,
        or it cannot be used.
    """
    if path is None:
        raise options.UsageError("--workdir is needed")
    if resumable is None:
        is_options = dataclasses.is_dataclass(config)
        resumable = (*options.resumable(type(config)), "workdir") if is_options else ()
    if object_store.is_address(path):
        if distributed.process_count() > 1:
            raise options.UsageError(
                f"--workdir={path}: several processes need a folder they share"
            )
        folder = object_store.Mirror(os.fspath(path)).folder
    else:
        folder = pathlib.Path(path).expanduser().absolute()
    name = object_store.named(str(folder))
    new = files.to_jsonable(config)
    known = folder / "config.json"
    lock = None

    def open_it() -> bool:
        nonlocal lock
        try:
            folder.mkdir(parents=True, exist_ok=True)
            below = [path for path, _, _ in os.walk(folder)]
            lock = _claim(folder, below, is_shared=is_shared)
            old = files.parse_json(known.read_text(encoding="utf-8")) if known.exists() else None
            if old is not None:
                _check_same_run(name, _flatten(old), _flatten(new), frozenset(resumable))
            files.write_json(known, new)
        except (OSError, ValueError) as error:
            raise options.UsageError(f"cannot use the work directory {name}: {error}") from error
        return old is not None

    return Workdir(folder, distributed.decide(open_it), lock)


def load_or_compute(path: str | os.PathLike[str], compute_fn: Callable[[], object]) -> files.Json:
    """The value of a JSON file; if there is none yet, what a function returns, which is written.

    So a study keeps its cells: what a killed run has finished is not computed again. The file has
    a checksum; a damaged one is computed anew, with a warning.

    Args:
      path: of the file.
      compute_fn: returns what `files.to_jsonable` can write.

    Returns:
      The value as JSON has it, also when it was just computed.
    """
    known = distributed.decide(lambda: read_or_none(path, files.read_sealed))
    if known is not None:
        return known["value"]
    value = files.to_jsonable(compute_fn())
    if distributed.is_primary():
        files.write_sealed(path, {"value": value})
    return json.loads(json.dumps(value))


def note(path: str | os.PathLike[str], digests: Mapping[str, str | None]) -> list[str]:
    """Notes in a file what a run is made of; what has changed since an earlier run noted it.

    Args:
      path: of the file.
      digests: by name, None of what is not there.

    Returns:
      The names that differ, sorted; none where nothing was noted before.
    """
    known = load_or_compute(path, lambda: digests)
    return sorted(
        name for name in {*known, *digests} if known.get(name, "") != digests.get(name, "")
    )


def read_or_none(
    path: str | os.PathLike[str], read_fn: Callable[[str | os.PathLike[str]], _Value]
) -> _Value | None:
    """What a function reads from a file that an earlier run may have left.

    Args:
      path: of the file.
      read_fn: raises FileNotFoundError where there is none, ValueError where it is damaged.

    Returns:
      What it returns; None where there is no file, and, with a warning, where it is damaged.
    """
    try:
        return read_fn(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        progress.warn(path, f"made again: {error}")
        return None


def _claim(
    folder: str | os.PathLike[str],
    below: Iterable[str | os.PathLike[str]] = (),
    *,
    is_shared: bool = False,
) -> files.FolderLock | None:
    """The lock, which one of several processes takes for all; None where there are none."""
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        lock = files.lock_folder(folder, is_shared=is_shared)
    except files.InUseError as error:
        raise options.UsageError(str(error)) from error
    except OSError as error:
        raise options.UsageError(f"cannot use the folder {folder}: {error}") from error
    for each in {pathlib.Path(folder), *map(pathlib.Path, below)}:
        files.remove_partials(each)
    return lock


_KEY = 32  # Hexadecimal digits of a name.


class Kept:
    """What a run has found so far, so that the next run of a killed one goes on from there.

    Each thing found is a JSON file (`load_or_compute`) under a name that says all it depends on:
    another input or other options are another file, and nothing has to be checked.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        """Takes the folder, which is made if need be; None keeps nothing."""
        self._folder = None if folder is None else pathlib.Path(folder)
        self._used: set[str] = set()
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return self._folder is not None

    def has(self, dependencies: object) -> bool:
        """Whether something is kept that depends on this."""
        return self._folder is not None and (self._folder / _key(dependencies)).exists()

    def load_or_compute(
        self, dependencies: object, compute_fn: Callable[[], object], *, anew: bool = False
    ) -> files.Json:
        """What was found, or what a function returns, which is kept then.

        Args:
            dependencies: all that it depends on: what `files.to_jsonable` takes.
            compute_fn: returns likewise; what it raises is raised, and nothing is kept.
            anew: whether to compute it in any case.
        """
        if self._folder is None:
            return files.to_jsonable(compute_fn())
        path = self._folder / _key(dependencies)
        self._used.add(path.name)
        if anew:
            path.unlink(missing_ok=True)
        return load_or_compute(path, compute_fn)

    def drop_unused(self) -> None:
        """Deletes what this run had no use for, when it has come to its end."""
        for path in self._files():
            if path.name not in self._used:
                path.unlink(missing_ok=True)

    def delete(self) -> None:
        """Deletes all of it, and the folder if nothing else is there."""
        for path in self._files():
            path.unlink(missing_ok=True)
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    def _files(self) -> list[pathlib.Path]:
        if self._folder is None:
            return []
        return list(self._folder.glob(f"{'[0-9a-f]' * _KEY}.json"))


def _key(dependencies: object) -> str:
    """Name of the file of what depends on this."""
    text = json.dumps(files.to_jsonable(dependencies), sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:_KEY]}.json"


def _flatten(config: object, prefix: str = "") -> dict[str, files.Json]:
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    flat = {}
    for name, value in config.items():
        flat.update(_flatten(value, f"{prefix}.{name}" if prefix else name))
    return flat


def _check_same_run(
    folder: str,
    old: dict[str, files.Json],
    new: dict[str, files.Json],
    resumable: frozenset[str],
) -> None:
    absent = "absent"
    differing = [
        f"{name} (was {json.dumps(old.get(name, absent))}, is {json.dumps(new.get(name, absent))})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, absent) != new.get(name, absent) and name not in resumable
    ]
    if differing:
        raise options.UsageError(
            f"{folder} holds a run with another config: {'; '.join(differing)}. "
            "Give the old values, or another --workdir."
        )
