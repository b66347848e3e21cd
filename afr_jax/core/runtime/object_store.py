"""Work folders in an object store: a run works in a local copy, which is kept the same there.

Orbax writes checkpoints to file systems and to Google's store alone (0.12), and locks, renames and
appended lines are nothing that object stores have. So what a run has left there is fetched when it
opens its folder, and a thread brings there what the run has written since: every few seconds, after
each checkpoint, and at the end. The copy goes with the run.
"""

import contextlib
import os
import pathlib
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence

from absl import logging
from etils import epath

from afr_jax.core import options

_SCHEMES = ("s3", "gs")
_ADDRESS = re.compile(r"[a-z][a-z0-9]*://")
# What is being written, and locks.
_PASSING = re.compile(r"\.lock|\.claims|.*\.partial|.*\.orbax-checkpoint-tmp.*")
# The first tells whether a checkpoint is whole: it is there before the others, and for as long as
# any of them. The other one is what Orbax writes at last.
_CHECKSUMS, _LAST = "checksums.json", "_CHECKPOINT_METADATA"
_PAUSE_S = 5.0
_open: list["Mirror"] = []


def is_address(path: str | os.PathLike[str] | None) -> bool:
    """Whether this is an address in a store, as `s3://bucket/run`, and no folder."""
    return path is not None and _ADDRESS.match(os.fspath(path)) is not None


def named(text: str) -> str:
    """A text with the addresses of open folders in place of their local copies."""
    for mirror in _open:
        text = text.replace(str(mirror.folder), mirror.address)
    return text


def push_soon() -> None:
    """Lets what was written to open folders be brought to the store at once, in the background."""
    for mirror in _open:
        mirror.wake()


def close_all() -> None:
    """Brings everything to the store, and removes the local copies.

    Raises:
        OSError: the store does not take it; the local copy stays, and is named.
    """
    while _open:
        _open.pop().close()


class Mirror:
    """A folder in a store and its local copy; open until `close_all`.

    Attributes:
        address: of the folder in the store.
        folder: the local copy.
    """

    def __init__(self, address: str) -> None:
        """Fetches what is there.

        Args:
            address: of a folder, which need not exist, in a bucket that does.

        Raises:
            UsageError: there is no such bucket, no access to it, or no library for such addresses.
        """
        scheme = address.partition("://")[0]
        if scheme not in _SCHEMES:
            known = " and ".join(f"{name}://" for name in _SCHEMES)
            raise options.UsageError(f"cannot use {address}: {known} are what there is")
        self.address = address.rstrip("/")
        self._known: dict[str, tuple[int, int]] = {}
        self._is_over, self._is_due = threading.Event(), threading.Event()
        self._pushing = threading.Lock()
        self._remote = epath.Path(self.address)
        self._place = pathlib.Path(tempfile.mkdtemp(prefix="afr-run-"))
        self.folder, self._stage = self._place / "run", self._place / "pushed"
        self.folder.mkdir()
        try:
            self._check_access()
            for path in _files(self._remote):
                self._fetch(path)
        except Exception as error:  # Each store has errors of its own.
            shutil.rmtree(self._place)
            text = f"cannot use {address}: {error or type(error).__name__}"
            raise options.UsageError(text) from error
        self._thread = threading.Thread(target=self._work, name="object store", daemon=True)
        self._thread.start()
        _open.append(self)

    def wake(self) -> None:
        """Lets the thread look at once."""
        self._is_due.set()

    def push(self) -> None:
        """Brings to the store what has changed, and removes there what is gone.

        Checkpoints come last: a run goes on from the newest one, and needs the rest beside it.
        """
        with self._pushing:
            now = dict(sorted(self._local(), key=lambda item: _order(item[0])))
            changed = [name for name, state in now.items() if self._known.get(name) != state]
            # What a push that failed has left there may be older.
            shutil.rmtree(self._stage, ignore_errors=True)
            self._link_checkpoints(changed)
            for name in changed:
                if self._put(name):
                    self._known[name] = now[name]
            shutil.rmtree(self._stage, ignore_errors=True)
            for name in sorted(self._known.keys() - now.keys(), key=_order, reverse=True):
                (self._remote / name).unlink(missing_ok=True)
                del self._known[name]

    def close(self) -> None:
        """Pushes for the last time, and removes the local copy."""
        self._is_over.set()
        self._is_due.set()
        self._thread.join()
        try:
            self.push()
        except Exception as error:
            text = f"{self.address} does not take what is left in {self.folder}: {error}"
            raise OSError(text) from error
        shutil.rmtree(self._place, ignore_errors=True)

    def _work(self) -> None:
        while not self._is_over.is_set():
            self._is_due.wait(_PAUSE_S)
            self._is_due.clear()
            try:
                self.push()
            except Exception as error:  # It may go better the next time; the last one tells.
                text = "%s cannot be reached now: %s"
                logging.log_every_n_seconds(logging.WARNING, text, 60, self.address, error)

    def _check_access(self) -> None:
        """Raises what writing will raise, before there is any work."""
        probe = self._remote / ".probe"
        probe.write_bytes(b"")
        probe.unlink()

    def _local(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Files of the copy by their names below it, with what tells that one has changed."""
        for root, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not _PASSING.fullmatch(name)]
            for name in names:
                path = pathlib.Path(root, name)
                try:
                    state = path.stat()
                except FileNotFoundError:  # A checkpoint that makes way.
                    continue
                if not _PASSING.fullmatch(name):
                    key = path.relative_to(self.folder).as_posix()
                    yield key, (state.st_size, state.st_mtime_ns)

    def _link_checkpoints(self, names: Sequence[str]) -> None:
        """Keeps files of checkpoints until they are brought away; the run drops old ones."""
        for name in filter(_is_of_checkpoint, names):
            (self._stage / name).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # It is gone, or there are no links here.
                os.link(self.folder / name, self._stage / name)

    def _put(self, name: str) -> bool:
        """Whether the file was still there."""
        staged = self._stage / name
        try:
            source = (staged if staged.exists() else self.folder / name).open("rb")
        except FileNotFoundError:
            return False
        with source, (self._remote / name).open("wb") as to:
            shutil.copyfileobj(source, to)
        return True

    def _fetch(self, path: epath.Path) -> None:
        name = path.relative_to(self._remote).as_posix()
        local = self.folder / name
        if self.folder.resolve() not in local.resolve().parents:
            raise ValueError(f"it holds {name!r}, which leads out of it")
        local.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as source, local.open("wb") as to:
            shutil.copyfileobj(source, to)
        state = local.stat()
        self._known[name] = state.st_size, state.st_mtime_ns


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """All files below a folder that may be missing."""
    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _is_of_checkpoint(name: str) -> bool:
    return any(part.isdecimal() for part in name.split("/"))


def _order(name: str) -> tuple[bool, int, str]:
    """In which order files are brought to the store, by their names below the folder."""
    last = name.rpartition("/")[2]
    return _is_of_checkpoint(name), (last != _CHECKSUMS) + (last == _LAST), name
