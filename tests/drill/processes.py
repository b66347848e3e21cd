"""Programs as processes: how they end, how long they take and how much memory they need.

Who starts the drill in the background passes SIGINT on as ignored, and so would the drill to its
children: `main` sets it anew.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from . import ROOT

_PAUSE_SECONDS = 0.02


class Ended(NamedTuple):
    """A process that has ended.

    Attributes:
        code: exit code; minus the signal where one ended it.
        out: its standard output.
        err: its standard error.
        seconds: from start to end.
        peak_mb: most memory that it held, resident, in MB of a million bytes.
        hung: whether it was ended because its time was up.
    """

    code: int
    out: str
    err: str
    seconds: float
    peak_mb: float
    hung: bool

    @property
    def last_words(self) -> str:
        """The last line of its standard error that says something."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""

    @property
    def crashed(self) -> bool:
        """Whether it ended in no way that programs may end, or showed its inside."""
        return not self.hung and (self.code not in (0, 2, 3) or "Traceback" in self.err)


class Running:
    """A process that was started, the leader of a group; `end` waits for it."""

    def __init__(
        self, command: Sequence[str], log: pathlib.Path, *, env: Mapping[str, str] | None = None
    ) -> None:
        """Starts it; standard output and error go to files beside `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._files = log.with_suffix(".out"), log.with_suffix(".err")
        self.start = time.monotonic()
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def end(self, *, limit_seconds: float, signal_after: tuple[int, float] | None = None) -> Ended:
        """Waits; sends a signal to the process so many seconds after its start, if it still runs.

        With a signal, the limit counts from there.
        """
        deadline = self.start + limit_seconds
        hung, peak = False, 0.0
        while True:
            peak = max(peak, peak_mb(self._process.pid))
            pid, status = os.waitpid(self._process.pid, os.WNOHANG)
            if pid:
                break
            now = time.monotonic()
            if signal_after is not None and now - self.start >= signal_after[1]:
                os.kill(self._process.pid, signal_after[0])
                deadline, signal_after = now + limit_seconds, None
            elif now > deadline and not hung:
                hung = True
                os.killpg(self._process.pid, signal.SIGKILL)
            time.sleep(_PAUSE_SECONDS)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        out, err = (file.read_text("utf-8", "replace") for file in self._files)
        seconds = time.monotonic() - self.start
        return Ended(self._process.returncode, out, err, seconds, peak, hung)


def peak_mb(process: int | str = "self") -> float:
    """Most memory that a process has held so far, resident, in MB; 0 once it has ended.

    What `resource` says of a child counts the memory of who started it.
    """
    return _status_mb(process, "VmHWM")


def held_mb(process: int) -> float:
    """Memory that a process holds now, resident, in MB; 0 once it has ended."""
    return _status_mb(process, "VmRSS")


def _status_mb(process: int | str, field: str) -> float:
    try:
        status = pathlib.Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def program(
    name: str, flags: Sequence[str], log: pathlib.Path, *, env: Mapping[str, str] | None = None
) -> Running:
    """Starts `python -m experiments.<name>`."""
    return Running([sys.executable, "-m", f"experiments.{name}", *flags], log, env=env)
