"""How the processes of a distributed run talk, and how they end together: never one without others.

They talk through the key-value store of `jax.distributed`, which process 0 has. A thread in each
process looks there once a second. Where another process was told to stop, has failed or is silent,
the thread interrupts this one as a signal would, and ends it where that does not help.
"""

import atexit
import contextlib
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from absl import logging
from jax._src import distributed as jax_distributed

from afr_jax.core import interrupts

if TYPE_CHECKING:
    from jax._src.lib import _jax

# A process is taken for dead after so long without a sign of life. The second is the limit of JAX's
# own watch, which ends processes with SIGABRT and is there for what this one misses. JAX asks for a
# sign twice in that time, so it may strike after half of it: that half is longer than a silence and
# `_GRACE_S`.
_SILENCE_S, LONGEST_SILENCE_S = 30.0, 104
_LOOK_S = 1.0
# How long a process may take to end after it was interrupted, and how long process 0, without which
# JAX aborts the others, waits for them.
_GRACE_S, _FAREWELL_S = 20.0, 25.0
_ALIVE, _ENDED, _LEFT, _SAID = "afr/alive", "afr/ended", "afr/left", "afr/said"


class Ending(NamedTuple):
    """Why a run ends.

    Attributes:
        code: exit code of all processes.
        reason: for people, one line.
    """

    code: int
    reason: str


class _Group(threading.Thread):
    """The thread, and what it knows."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__(name="process group", daemon=True)
        self.index, self.count = index, count
        self.ending: Ending | None = None
        self._is_told = False
        self._is_over = threading.Event()
        self._lost: set[int] = set()
        self._alive: dict[int, tuple[str, float]] = {}

    def run(self) -> None:
        """Looks, until the process ends."""
        number = 0
        while not self._is_over.is_set() and self.ending is None:
            number += 1
            try:
                _put(f"{_ALIVE}/{self.index}", str(number))
                self._look()
            except Exception:  # The store is gone, and with it process 0; or this one is ending.
                self._end(Ending(1, "process 0, which holds the run together, does not answer"))
            signaled = interrupts.received()
            if signaled is not None:
                self.tell(128 + signaled, "was told to stop")
            self._is_over.wait(_LOOK_S)

    def end_in_peace(self) -> None:
        """Looks no more; the others need not miss this process."""
        self._is_over.set()
        self.join()
        with contextlib.suppress(Exception):  # Process 0 may be gone.
            _put(f"{_LEFT}/{self.index}", "")

    def tell(self, code: int, reason: str) -> Ending:
        """Tells the others, once, that this process ends; returns what is left to say of it."""
        if not self._is_told:
            self._is_told = True
            _put(f"{_ENDED}/{self.index}", f"{code} process {self.index} {reason}")
        return Ending(code, "")

    def told_by_others(self) -> Ending | None:
        """What another process has told."""
        for index, text in _listed(_ENDED).items():
            if index != self.index:
                code, reason = text.split(" ", 1)
                return Ending(int(code), reason)
        return None

    def leave(self) -> None:
        """Says good-bye; process 0 lets the others leave first."""
        with contextlib.suppress(Exception):  # Process 0 may be gone.
            _put(f"{_LEFT}/{self.index}", "")
            end = time.monotonic() + _FAREWELL_S
            while not self.index and time.monotonic() < end:
                time.sleep(_LOOK_S / 4)
                if len(self._lost | _listed(_LEFT).keys()) == self.count:
                    return

    def _look(self) -> None:
        if (ending := self.told_by_others()) is not None:
            self._end(ending)
            return
        now = time.monotonic()
        left = _listed(_LEFT)
        for index, number in _listed(_ALIVE).items():
            if index in left:
                continue
            if self._alive.get(index, ("", 0.0))[0] != number:
                self._alive[index] = number, now
            elif now - self._alive[index][1] > _SILENCE_S:
                self._lost.add(index)
                self._end(Ending(1, f"process {index} has not answered for {_SILENCE_S:.0f} s"))
                return

    def _end(self, ending: Ending) -> None:
        """Interrupts the main thread; ends the process if that does not."""
        self.ending = ending
        interrupts.interrupt()
        time.sleep(_GRACE_S)
        leave_at_once(ending)


_group: _Group | None = None
_leaving = threading.Lock()


def join(index: int, count: int) -> None:
    """Begins to watch over the processes of a run; JAX has joined them already.

    Args:
        index: of this process.
        count: of all.
    """
    global _group
    _group = _Group(index, count)
    _group.start()
    # Before JAX leaves, which has said at an earlier time that it wants to be called at the end.
    atexit.register(_group.end_in_peace)


def is_joined() -> bool:
    """Whether this process belongs to such a run."""
    return _group is not None


def ended_by_others() -> Ending | None:
    """Why this process was interrupted, if others are the reason."""
    return None if _group is None else _group.ending


def fail(code: int, reason: str) -> None:
    """Ends this process and the others with it; without others it returns.

    Args:
        code: exit code.
        reason: what others say: "process 3 REASON".
    """
    if _group is not None:
        with contextlib.suppress(Exception):  # Process 0 may be gone.
            # A connection that broke is not why the run ends, if the other process said why.
            leave_at_once(_group.told_by_others() or _group.ending or _group.tell(code, reason))
        leave_at_once(Ending(code, ""))


def leave_at_once(ending: Ending) -> None:
    """Ends the process without waiting for the others, as the end of JAX does.

    The main thread and that of the group may both want to; the first one says why, and has time.
    """
    is_first = _leaving.acquire(timeout=_FAREWELL_S)
    if ending.reason and is_first:
        print(f"error: {ending.reason}", file=sys.stderr)
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    if _group is not None:
        _group.leave()
    os._exit(ending.code)


def exchange(meeting: int, text: str) -> list[str]:
    """What each process says at a meeting, in their order; waits for all.

    Args:
        meeting: number of it; the same in all processes, rising.
        text: of this process.
    """
    if _group is None:
        raise RuntimeError("there is no run of several processes")
    _put(f"{_SAID}/{meeting}/{_group.index}", text)
    found = [_poll(f"{_SAID}/{meeting}/{index}") for index in range(_group.count)]
    # Whoever is here has been at the meeting before: all have heard what was said there.
    _client().key_value_delete(f"{_SAID}/{meeting - 1}/{_group.index}")
    return found


def _poll(key: str) -> str:
    """The value of a key, as soon as there is one; a signal comes through."""
    while True:
        interrupts.check()
        try:
            return _client().blocking_key_value_get(key, int(1000 * _LOOK_S))
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _put(key: str, text: str) -> None:
    _client().key_value_set(key, text, allow_overwrite=True)


def _listed(folder: str) -> dict[int, str]:
    """The values below a key, by the number of the process that has put them there."""
    return {int(key.rsplit("/", 1)[1]): text for key, text in _client().key_value_dir_get(folder)}


def _client() -> "_jax.DistributedRuntimeClient":
    # JAX has no public name for it; Orbax takes the same way.
    return jax_distributed.global_state.client
