"""A trace of some steps of a program, to be looked at with xprof: what --profile_steps asks for.

A step is what a loop does once: a chunk of the steps of a training or a perturbation
(`perturb/stepping.py`), a batch of `parallel.map_batches`, an item of `parallel.thread_stream`.
"""

import os
import pathlib
import re
import threading

import jax
from absl import logging


class _Trace:
    """Counts steps, and traces from `first` on, before `stop`."""

    def __init__(self, folder: pathlib.Path, first: int, stop: int) -> None:
        self.folder, self.first, self.stop = folder, first, stop
        self.count = 0
        self.is_on = False
        self.lock = threading.Lock()

    def begin_step(self) -> None:
        with self.lock:
            if self.count == self.first:
                self.folder.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(self.folder)
                self.is_on = True
            if self.count == self.stop:
                self.end()
            self.count += 1

    def end(self) -> None:
        if self.is_on:
            self.is_on = False
            jax.profiler.stop_trace()
            logging.info("the trace of steps %d:%d is in %s", self.first, self.stop, self.folder)


_trace: _Trace | None = None


def ask(steps: str, folder: str | os.PathLike[str]) -> None:
    """Asks for a trace.

    Args:
        steps: "A:B", the first step from 0 on, and the one before which the trace ends.
        folder: for the trace.

    Raises:
        ValueError: `steps` says something else.
    """
    global _trace
    found = re.fullmatch(r"(\d+):(\d+)", steps)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(f"{steps!r} is not A:B with A below B, such as 10:20")
    _trace = _Trace(pathlib.Path(folder), int(found[1]), int(found[2]))


def begin_step() -> None:
    """Loops call it before each step."""
    if _trace is not None:
        _trace.begin_step()


def end() -> None:
    """Ends a trace that goes on at the end of the program, and says where there is none."""
    global _trace
    if _trace is not None:
        if _trace.count <= _trace.first:
            logging.warning("there is no trace: the program took but %d steps", _trace.count)
        with _trace.lock:
            _trace.end()
        _trace = None
