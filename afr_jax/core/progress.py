"""What a run says on standard error: how far it is, and which inputs it cannot handle.

Who shows that elsewhere listens (`told_to`).
"""

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from typing import Any, TypeVar

import tqdm
from absl import logging

from afr_jax.core import distributed, files, interrupts

_Item = TypeVar("_Item")
# Takes what is being done, how many steps of it are, and how many there will be, if known.
Listener = Callable[[str, int, int | None], None]
_listeners: list[Listener] = []


@contextlib.contextmanager
def told_to(listener: Listener) -> Generator[None]:
    """Lets a function of the caller hear how far loops are, in place of standard error.

    Args:
        listener: called at the start of each loop of the body and after each of its steps, in the
            thread that takes them.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def track(
    items: Iterable[_Item],
    *,
    description: str,
    total: int | None = None,
    interval_seconds: float = 30.0,
) -> Iterator[_Item]:
    """Yields the items and shows how far the loop is; see `counter`.

    Args:
        items: What to loop over.
        description: What is being done.
        total: How many items there are, where `len(items)` does not tell.
        interval_seconds: Time between two log lines.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with counter(total, description=description, interval_seconds=interval_seconds) as advance:
        for item in items:
            interrupts.check()
            yield item
            advance(1)


@contextlib.contextmanager
def counter(
    total: int | None,
    *,
    description: str,
    done: int = 0,
    unit: str = "it",
    interval_seconds: float = 30.0,
) -> Generator[Callable[[int], Any]]:
    """Shows how far something is that is counted by hand.

    On a terminal a bar. Elsewhere, as in the log of a batch job, a line at most every
    `interval_seconds` with the count, the rate and the time left, and a last one if there were
    any. Of several processes only the first one shows anything.

    Args:
        total: What the count will be at the end; None where nobody knows.
        description: What is being done.
        done: What an earlier, interrupted run has counted already.
        unit: What is counted, for the bar.
        interval_seconds: Time between two log lines.

    Yields:
        A function to be called with the number of steps that were just taken, in any thread.
    """
    if not distributed.is_primary():
        yield lambda steps: None
    elif _listeners:
        yield _one_at_a_time(_Told(total, description, done).advance)
    elif sys.stderr.isatty():
        with tqdm.tqdm(total=total, desc=description, initial=done, unit=unit) as bar:
            yield _one_at_a_time(bar.update)
    else:
        lines = _Lines(total, description, done, interval_seconds)
        yield _one_at_a_time(lines.advance)
        lines.end()


def _one_at_a_time(advance_fn: Callable[[int], Any]) -> Callable[[int], Any]:
    """The same function for several threads, which call it one after the other."""
    lock = threading.Lock()

    @functools.wraps(advance_fn)
    def advance(steps: int) -> None:
        with lock:
            advance_fn(steps)

    return advance


@logging.skip_log_prefix
def warn(subject: object, reason: object) -> None:
    """Logs in one line why an input was not handled; the others go on.

    Args:
        subject: The input: a photo's path or name, a person.
        reason: What is wrong with it.
    """
    logging.warning("%s: %s", files.printable(subject), files.printable(reason))


class _Told:
    """What the listeners hear about a count."""

    def __init__(self, total: int | None, description: str, done: int) -> None:
        self._total, self._description, self._count = total, description, done
        self.advance(0)

    def advance(self, steps: int) -> None:
        """Counts, and tells."""
        self._count += steps
        for listener in _listeners:
            listener(self._description, self._count, self._total)


class _Lines:
    """Log lines about a count."""

    def __init__(self, total: int | None, description: str, done: int, interval: float) -> None:
        self._total, self._description, self._interval = total, description, interval
        self._first = self._count = self._shown = done
        self._start = self._last = time.monotonic()

    def advance(self, steps: int) -> None:
        """Counts, and writes a line if it is time."""
        self._count += steps
        if time.monotonic() - self._last >= self._interval:
            self._write()

    def end(self) -> None:
        """Writes the last line, if lines were written and it says something new."""
        if self._first != self._shown != self._count:
            self._write()

    def _write(self) -> None:
        now = time.monotonic()
        rate = (self._count - self._first) / max(now - self._start, 1e-9)
        text = f"{self._description}: {self._count}"
        if self._total is not None:
            text += f" of {self._total}"
        text += f", {rate:.3g}/s"
        if self._total is not None and rate > 0 and self._count < self._total:
            text += f", {_duration((self._total - self._count) / rate)} left"
        logging.info("%s", text)
        self._last, self._shown = now, self._count


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
