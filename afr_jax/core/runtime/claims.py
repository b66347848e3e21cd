"""Work that runs share which were started one by one, and join, leave and die as they like.

Whoever works on something has claimed it: a claim is a lock on a byte of a file in the folder of
the work, so it ends with its process, however that ends, on all machines that see the folder. None
is ever stale, and nobody is in charge.
"""

import contextlib
import errno
import hashlib
import os
import pathlib
import socket
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Self, TypeVar

from absl import logging

from afr_jax.core import distributed, files, interrupts, options, progress

try:
    import fcntl
except ImportError:  # There are no such locks on Windows.
    fcntl = None

JOIN_HELP = "work beside other runs of the same command with --join, on one output folder"
MANIFEST = "manifest.jsonl"
_Item = TypeVar("_Item")
_NAME = ".claims"
_LOOK_S, _TELL_S = 0.2, 30


class Claims:
    """What this process has claimed in a folder; a context manager.

    Only processes keep each other out, not threads of one, which has one object for a folder.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        """Opens the file of the claims.

        Args:
            folder: the same for all runs that share the work; made if need be. None claims nothing,
                for a run that has the work alone.

        Raises:
            UsageError: this is one of several processes of one job.
            OSError: the file cannot be written, or its file system has no such locks.
        """
        self._file = None
        if folder is None:
            return
        if distributed.process_count() > 1:
            raise options.UsageError(
                "--join is for runs that are started one by one; the processes of one job share "
                "the work without it"
            )
        self._manifest = pathlib.Path(folder) / MANIFEST
        self._manifest.parent.mkdir(parents=True, exist_ok=True)
        self._file = (self._manifest.parent / _NAME).open("a+b")
        try:
            with files.naming(self._file.name), self.hold("a first try"):
                pass
        except BaseException:
            self._file.close()
            raise
        # Of what was noted before, and of what others have worked on since.
        self._read_to = self._manifest.stat().st_size if self._manifest.exists() else 0
        self._tried: set[str] = set()

    def __bool__(self) -> bool:
        """Whether there is anybody to share with."""
        return self._file is not None

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Lets go of everything."""
        if self._file is not None:
            self._file.close()

    @contextlib.contextmanager
    def hold(self, name: str) -> Generator[None]:
        """Waits until no other process holds what has this name, and holds it in the body."""
        place = _place_of(f"held {name}")
        while not self._take([place]):
            interrupts.check()
            time.sleep(_LOOK_S)
        try:
            yield
        finally:
            self._let_go([place])

    def work_off(
        self,
        groups: Iterable[Sequence[_Item]],
        work_fn: Callable[[Sequence[_Item]], object],
        *,
        name_fn: Callable[[_Item], str],
        is_done_fn: Callable[[_Item], bool],
        description: str,
    ) -> None:
        """Returns when all items are done, by this process or others; each is in one hand at most.

        Groups that others have in hand are waited for, and taken over where these die. What others
        have worked on while this process was there is not tried again. Of each group that is worked
        on a line of the file `MANIFEST` tells.

        Args:
            groups: of all items, in order.
            work_fn: takes a group, and leaves what it finds in files.
            name_fn: of an item; unique, and the same in all processes.
            is_done_fn: whether nothing is left to do for an item.
            description: of the items, for people.
        """
        waiting = [list(group) for group in groups]
        total = sum(map(len, waiting))
        with progress.counter(total, description=description) as report_fn:
            while waiting:
                left = []
                for group in waiting:
                    interrupts.check()
                    names = [name_fn(item) for item in group]
                    places = [_place_of(f"item {name}") for name in names]
                    if self._take(places):
                        try:
                            if not self._is_tried(names) and not all(map(is_done_fn, group)):
                                self._work_on(group, work_fn, names)
                        finally:
                            self._let_go(places)
                        report_fn(len(group))
                    else:
                        left.append(group)
                if len(left) == len(waiting):
                    text = "waiting for %d groups that others have in hand"
                    logging.log_every_n_seconds(logging.INFO, text, _TELL_S, len(left))
                    time.sleep(_LOOK_S)
                waiting = left

    def _work_on(
        self,
        group: Sequence[_Item],
        work_fn: Callable[[Sequence[_Item]], object],
        names: Sequence[str],
    ) -> None:
        start = time.monotonic()
        work_fn(group)
        fields = {
            "items": names,
            "worker": f"process {os.getpid()} on {socket.gethostname()}",
            "seconds": round(time.monotonic() - start, 3),
        }
        if self:
            with self.hold("the manifest"):
                files.append_sealed(self._manifest, fields)

    def _is_tried(self, names: Sequence[str]) -> bool:
        """Whether the manifest says so, in what was added to it since this process joined."""
        if not self:
            return False
        with contextlib.suppress(FileNotFoundError):
            lines, self._read_to, _ = files.read_sealed_lines(self._manifest, start=self._read_to)
            self._tried.update(*(line["items"] for line in lines))
        return self._tried.issuperset(names)

    def _take(self, places: Sequence[int]) -> bool:
        """Whether all these bytes are this process's now; else none is that was not before."""
        if self._file is None:
            return True
        if fcntl is None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), self._file.name)
        for number, place in enumerate(places):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                self._let_go(places[:number])
                return False
        return True

    def _let_go(self, places: Sequence[int]) -> None:
        if fcntl is not None and self._file is not None and not self._file.closed:
            for place in places:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)


def _place_of(name: str) -> int:
    """The byte that stands for a name, somewhere far behind the end of the file."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8]) >> 2
