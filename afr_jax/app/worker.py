"""The process that does the page's work: `python -m afr_jax.app.worker`, started by the server.

It reads JSON lines from standard input: its options, then jobs and what is to be cancelled. It says
in JSON lines on standard output how far it is and what came out. It ends with its server, however
that ends, since its input then does.
"""

import functools
import gc
import json
import os
import pathlib
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from absl import logging

from afr_jax.app import app_program, limits
from afr_jax.app.tasks import cloaking, dataset, look, models, pair, patches, people
from afr_jax.core import backend, files, interrupts, options, progress
from afr_jax.data import photos, video

Task = Callable[[models.Models, pathlib.Path, Mapping[str, files.Json]], dict[str, files.Json]]

TASKS: dict[str, Task] = {
    "look": look.run,
    "cloak": cloaking.run,
    "pair": pair.run,
    "people": people.run,
    "patch": patches.run,
    "protect": dataset.run,
}
_NO_MEMORY = "there is not enough memory for this; try fewer or smaller files"
# Time between two messages about how far a loop is.
_TELL_S = 0.2


class _Channel:
    """The two ends of the conversation with the server."""

    def __init__(self, source: TextIO, target: TextIO) -> None:
        self.inbox: queue.Queue[dict[str, files.Json]] = queue.Queue()
        self._source, self._target = source, target
        self._lock = threading.Lock()
        self._current: str | None = None
        self._last = 0.0

    def say(self, **message: object) -> None:
        with self._lock:
            print(json.dumps(files.to_jsonable(message)), file=self._target, flush=True)

    def tell(self, job: str, stage: str, done: int, total: int | None) -> None:
        """How far a loop is, now and then, and always at its ends."""
        now = time.monotonic()
        if 0 < done != total and now - self._last < _TELL_S:
            return
        self._last = now
        self.say(event="progress", job=job, stage=stage, done=done, total=total)

    def listen(self) -> None:
        """Takes what the server says until it is gone."""
        for line in self._source:
            message = json.loads(line)
            if message["do"] != "cancel":
                self.inbox.put(message)
                continue
            with self._lock:
                if self._current == message["job"]:
                    os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)

    def work_on(self, job: str | None) -> None:
        """Says which job a cancellation may stop."""
        with self._lock:
            self._current = job


def main() -> None:
    """Does one job after the other, until the server is gone."""
    interrupts.end_at_once()
    # What libraries print must not get between the messages.
    target = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    config = app_program.AppConfig(**_tuples(json.loads(sys.stdin.readline())))
    backend.choose_compiler_options()
    backend.keep_freed_memory()
    backend.limit_pixels(config.max_megapixels)
    backend.enable_compilation_cache()
    channel = _Channel(sys.stdin, target)
    try:
        loaded = models.Models(config)
    except (options.UsageError, OSError) as error:
        channel.say(event="useless", message=files.printable(error))
        return
    channel.say(event="ready", extractors=loaded.describe())
    threading.Thread(target=channel.listen, daemon=True).start()
    while True:
        try:
            job = channel.inbox.get()
            _do(channel, loaded, job)
        except KeyboardInterrupt:  # It came too late for its job.
            continue


def _tuples(values: Mapping[str, files.Json]) -> dict[str, files.Json]:
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def _do(channel: _Channel, loaded: models.Models, job: Mapping[str, files.Json]) -> None:
    """Does a job, and says what came of it."""
    name, folder = job["job"], pathlib.Path(job["folder"])
    interrupts.raise_and_remember()
    channel.work_on(name)
    answer: dict[str, object]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with progress.told_to(functools.partial(channel.tell, name)):
            result = TASKS[job["kind"]](loaded, folder, job["payload"])
        interrupts.check()
        answer = {"event": "done", "result": result}
    except KeyboardInterrupt:
        answer = {"event": "cancelled"}
    except (limits.Refused, options.UsageError, photos.PhotoError, video.VideoError) as error:
        answer = {"event": "failed", "message": files.printable(error)}
    except MemoryError:
        answer = {"event": "failed", "message": _NO_MEMORY}
    except Exception as error:  # One job's trouble must not cost the others theirs.
        logging.exception("job %s failed", job["kind"])
        answer = {"event": "failed", "message": _reason(error)}
    channel.work_on(None)
    interrupts.raise_and_remember()
    gc.collect()
    backend.give_back_memory()
    channel.say(job=name, **answer)


def _reason(error: Exception) -> str:
    if "RESOURCE_EXHAUSTED" in str(error):
        return _NO_MEMORY
    if isinstance(error, OSError) and files.is_of_the_disk(error):
        return f"the temporary folder cannot be written: {error.strerror}"
    return f"something went wrong ({type(error).__name__}); the server's terminal says more"


if __name__ == "__main__":
    main()
