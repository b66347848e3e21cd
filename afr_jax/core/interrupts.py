"""Ctrl-C (SIGINT) and SIGTERM that are never lost: what a program does when it is told to stop.

While a program works, a signal raises `Interrupted` wherever the main thread is. That alone can be
lost: an exception that is raised inside a callback of the garbage collector, say, is printed and
forgotten, and a library may make an error of its own of it. So the signal is also remembered,
loops `check` between their steps, and an error that ends the work after a signal is put down to it.
Before and after the work, during imports and exit, nothing is to be tidied up and a signal ends the
process at once.

A signal that the process was started to ignore, as shells do for jobs in the background, stays
ignored. No other module of ours is imported here: it comes before everything else.
"""

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Generator

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_received: list[int] = []
# What the process itself ends for, in a thread that will see to it.
_ending: list[int] = []
_deferring: list[bool] = []


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
    """Lets a signal raise `Interrupted`, at once and at every `check`: for the work.

    Where nobody can take what is raised, in callbacks of the garbage collector, it is not printed.
    """
    _received[:] = _ending
    sys.unraisablehook = _say_unless_interrupted
    _handle_with(_raise)


def interrupt() -> None:
    """Interrupts the work as SIGTERM would, from a thread that then ends the process.

    Where there is no work, before it and after, it is only remembered: the main thread may be
    leaving already, and has something to say and others to wait for.
    """
    _ending[:] = [signal.SIGTERM]
    _received.append(signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def check() -> None:
    """Raises `Interrupted` if a signal came; loops call it between steps, in any thread."""
    if _received:
        raise Interrupted(_received[0])


def received() -> int | None:
    """The number of the signal that came while the program worked, if one did."""
    return _received[0] if _received else None


@contextlib.contextmanager
def deferred() -> Generator[None]:
    """Lets a signal that comes in the body raise `Interrupted` behind it: for what must be whole.

    Other libraries start threads that wait for each other; half of them would wait for ever.
    """
    _deferring.append(True)
    try:
        yield
    finally:
        _deferring.pop()
    if not _deferring:
        check()


def told(error: BaseException) -> int | None:
    """Says on standard error that the work was interrupted, if it was.

    Args:
        error: what ended it; any one, as libraries make errors of their own of `Interrupted`.

    Returns:
        The exit code; None if no signal came.
    """
    if isinstance(error, Interrupted):
        number = error.number
    elif _received:
        number = _received[0]
    elif isinstance(error, KeyboardInterrupt):
        number = signal.SIGINT
    else:
        return None
    print(_WORDS[signal.Signals(number)], file=sys.stderr)
    return 128 + number


def _handle_with(handler: Callable[[int, types.FrameType | None], None]) -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # Python lets no other thread decide.
    for number in _WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _say_unless_interrupted(unraisable: "sys.UnraisableHookArgs") -> None:
    """What Python does with exceptions of callbacks, but for ours, which is remembered."""
    if not isinstance(unraisable.exc_value, Interrupted):
        sys.__unraisablehook__(unraisable)


def _end(number: int, frame: types.FrameType | None) -> None:
    del frame
    if _ending:
        return
    os.write(2, f"{_WORDS[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)


def _raise(number: int, frame: types.FrameType | None) -> None:
    del frame
    _received.append(number)
    if not _deferring:
        raise Interrupted(number)
