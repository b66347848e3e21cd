"""Ctrl-C (SIGINT) and SIGTERM that are never lost: what a program does when it is told to stop.

While a program works, a signal raises `Interrupted` wherever the main thread is. That alone can be
lost: an exception that is raised inside a callback of the garbage collector, say, is printed and
forgotten. So the signal is also remembered, and loops `check` between their steps. Before and after
the work, during imports and exit, nothing is to be tidied up and a signal ends the process at once.

A signal that the process was started to ignore, as shells do for jobs in the background, stays
ignored. No other module of ours is imported here: it comes before everything else.
"""

import os
import signal
import sys
import threading
import types
from collections.abc import Callable

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_received: list[int] = []


class Interrupted(KeyboardInterrupt):
    """The process was told to stop.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        """Takes the number of the signal."""
        super().__init__(number)
        self.number = number


def end_at_once() -> None:
    """Lets a signal end the process with its exit code, 130 or 143: for imports and exit."""
    _handle_with(_end)


def raise_and_remember() -> None:
    """Lets a signal raise `Interrupted`, at once and at every `check`: for the work."""
    _received.clear()
    _handle_with(_raise)


def check() -> None:
    """Raises `Interrupted` if a signal came; loops call it between steps, in any thread."""
    if _received:
        raise Interrupted(_received[0])


def told(error: KeyboardInterrupt) -> int:
    """Says on standard error that the work was interrupted.

    Args:
        error: what ended it.

    Returns:
        The exit code.
    """
    number = error.number if isinstance(error, Interrupted) else signal.SIGINT
    print(_WORDS[signal.Signals(number)], file=sys.stderr)
    return 128 + number


def _handle_with(handler: Callable[[int, types.FrameType | None], None]) -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # Python lets no other thread decide.
    for number in _WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _end(number: int, frame: types.FrameType | None) -> None:
    del frame
    os.write(2, f"{_WORDS[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)


def _raise(number: int, frame: types.FrameType | None) -> None:
    del frame
    _received.append(number)
    raise Interrupted(number)
