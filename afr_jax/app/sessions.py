"""Sessions: what one browser has sent and asked for, in a temporary folder that goes with it."""

import contextlib
import dataclasses
import errno
import os
import pathlib
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Generator

from afr_jax.app import jobs, limits
from afr_jax.core import files, options

# A closed page may be a reload; a page that is silent may be frozen by its browser.
CLOSED_S, SILENT_S = 20.0, 3600.0


@dataclasses.dataclass
class Upload:
    """A file that a browser sent.

    Attributes:
        tool: page that it belongs to.
        role: what it is for: "photo", "first", "people" and so on.
        name: cleaned, for people; see `limits`.
        path: where it lies.
        num_bytes: its size.
        id: of the upload.
        look: the job that looked at it, for photos to cloak.
    """

    tool: str
    role: str
    name: str
    path: pathlib.Path
    num_bytes: int
    id: str
    look: jobs.PageJob | None = None


class Session:
    """One browser.

    Attributes:
        id: secret; the value of its cookie.
        token: secret that its requests repeat, which other sites cannot know.
        folder: for its files.
        uploads: by id.
        jobs: the last one by tool, and by id those that look at photos.
        reserved: bytes that are on their way.
        is_closed: whether its folder is gone, or about to go.
    """

    def __init__(self, root: pathlib.Path) -> None:
        """Takes the folder of all sessions."""
        self.id, self.token = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        self.folder = root / secrets.token_hex(16)
        self.uploads: dict[str, Upload] = {}
        self.jobs: dict[str, jobs.PageJob] = {}
        self.reserved = 0
        self.is_closed = False
        self._pages: dict[str, float] = {}
        self._heard = time.monotonic()
        self._left: float | None = None

    def hear(self, page: str | None) -> None:
        """Notes that one of its pages is there."""
        self._heard = time.monotonic()
        self._left = None
        if page and (page in self._pages or len(self._pages) < limits.MOST_SESSIONS):
            self._pages[page] = self._heard

    def leave(self, page: str) -> None:
        """Notes that a page was closed, or is being loaded again."""
        self._pages.pop(page, None)
        recent = time.monotonic() - SILENT_S
        self._pages = {name: heard for name, heard in self._pages.items() if heard > recent}
        if not self._pages:
            self._left = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether nobody looks at it any more."""
        now = time.monotonic()
        is_left = self._left is not None and now - self._left > CLOSED_S
        return is_left or now - self._heard > SILENT_S

    @property
    def num_bytes(self) -> int:
        """Size of its uploads, those on their way included."""
        return self.reserved + sum(upload.num_bytes for upload in self.uploads.values())

    def files_of(self, tool: str, *, role: str | None = None) -> list[Upload]:
        """Uploads of a page, in the order of their names."""
        own = [
            upload
            for upload in self.uploads.values()
            if upload.tool == tool and role in (None, upload.role)
        ]
        return sorted(own, key=lambda upload: upload.name)

    def find_job(self, job_id: str) -> jobs.PageJob | None:
        """One of its jobs, None if there is none of this id."""
        looks = [upload.look for upload in self.uploads.values()]
        for job in (*self.jobs.values(), *looks):
            if job is not None and job.id == job_id:
                return job
        return None

    def all_jobs(self) -> list[jobs.PageJob]:
        """Every job of it."""
        looks = [upload.look for upload in self.uploads.values() if upload.look is not None]
        return [*self.jobs.values(), *looks]


class Store:
    """All sessions, in a folder that is locked while the server lives."""

    def __init__(self, temp_dir: str | None, worker: jobs.Worker) -> None:
        """Makes the folder, and deletes what killed servers left beside it.

        Raises:
            options.UsageError: there can be no such folder.
        """
        self._worker = worker
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        worker.on_end = self._forget_late
        with _usage():
            base = _private_base(pathlib.Path(temp_dir or tempfile.gettempdir()))
            _remove_leftovers(base)
            self.root = base / secrets.token_hex(8)
            self.root.mkdir(mode=0o700)
            self._hold = files.lock_folder(self.root)

    def get(self, session_id: str | None) -> Session | None:
        """The session of a cookie."""
        return self._sessions.get(session_id or "")

    def create(self) -> Session:
        """A new session.

        Raises:
            limits.Refused: there are too many.
        """
        with self._lock:
            if len(self._sessions) >= limits.MOST_SESSIONS:
                # Whoever only looked at a page makes room.
                for old in list(self._sessions.values()):
                    if not old.uploads and not old.jobs and not old.reserved:
                        old.is_closed = True
                        del self._sessions[old.id]
                        break
                else:
                    raise limits.Refused("too many browsers use this page", status=503)
            session = Session(self.root)
            self._sessions[session.id] = session
            return session

    def sweep(self) -> None:
        """Deletes sessions that are over."""
        for session in list(self._sessions.values()):
            if session.is_over:
                self.drop(session)

    def drop(self, session: Session) -> None:
        """Deletes a session with its files and stops its jobs."""
        with self._lock:
            session.is_closed = True
            self._sessions.pop(session.id, None)
        active = [job for job in session.all_jobs() if job.is_active]
        for job in active:
            self._worker.cancel(job)
        shutil.rmtree(session.folder, ignore_errors=True)

    def close(self) -> None:
        """Deletes everything; the worker has ended."""
        self._sessions.clear()
        shutil.rmtree(self.root, ignore_errors=True)
        del self._hold

    def _forget_late(self, job: jobs.PageJob) -> None:
        """Deletes what a job wrote after its session was dropped."""
        open_folders = {session.folder for session in list(self._sessions.values())}
        folder = job.folder.parent
        if folder not in open_folders:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _usage() -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise options.UsageError(f"--temp_dir: {files.printable(error)}") from error


def _private_base(parent: pathlib.Path) -> pathlib.Path:
    """A folder of this user that nobody else can look into."""
    user = os.getuid() if hasattr(os, "getuid") else ""
    base = parent.expanduser() / f"afr_jax-app-{user}"
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = base.lstat()
    if base.is_symlink() or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
        raise PermissionError(errno.EPERM, "belongs to somebody else", str(base))
    base.chmod(0o700)
    return base


def _remove_leftovers(base: pathlib.Path) -> None:
    """Deletes the folders of servers that are not alive."""
    for folder in base.iterdir():
        if folder.is_dir() and not folder.is_symlink():
            try:
                hold = files.lock_folder(folder)
            except files.InUseError:
                continue
            if hold is None:  # Nobody can say here whether its server lives.
                continue
            shutil.rmtree(folder, ignore_errors=True)
            del hold
