"""Jobs of the page: a queue, and one worker process that takes them in turn."""

import collections
import dataclasses
import json
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from absl import logging

from afr_jax.app import app_program, limits
from afr_jax.core import files

# How long a worker may take to stop by itself, and to end with the server.
_PATIENCE_S, _END_S = 4.0, 3.0
_KILLED = "the system stopped the work, most likely as memory ran out; try fewer or smaller files"
ACTIVE = ("waiting", "running", "stopping")


@dataclasses.dataclass
class PageJob:
    """One piece of work.

    Attributes:
        kind: of `worker.TASKS`.
        tool: page that it belongs to.
        payload: of the task.
        folder: for what it writes.
        id: of the job.
        state: "waiting", "running", "stopping", "done", "failed" or "cancelled".
        result: of the task.
        message: why it failed.
        stages: what is being done -> (steps done, all steps), the last one that spoke last.
    """

    kind: str
    tool: str
    payload: Mapping[str, files.Json]
    folder: pathlib.Path
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    state: str = "waiting"
    result: dict[str, files.Json] | None = None
    message: str | None = None
    stages: dict[str, tuple[int, int | None]] = dataclasses.field(default_factory=dict)
    _started: float = 0.0
    _ended: float | None = None
    # Of the stage that spoke last: its first step and when that was taken.
    _first: tuple[str, int, float] = ("", 0, 0.0)

    @property
    def is_active(self) -> bool:
        """Whether it waits or is worked on."""
        return self.state in ACTIVE

    def start(self) -> None:
        """Notes that it is worked on."""
        self.state, self._started = "running", time.monotonic()

    def end(self, state: str, *, message: str | None = None) -> None:
        """Notes how it ended."""
        self.state, self.message, self._ended = state, message, time.monotonic()

    def advance(self, stage: str, done: int, total: int | None) -> None:
        """Notes how far it is."""
        self.stages.pop(stage, None)
        self.stages[stage] = (done, total)
        # The first step compiles: what it takes says nothing of the others.
        if self._first[0] != stage or done <= 1:
            self._first = (stage, done, time.monotonic())

    def describe(self, *, ahead: int) -> dict[str, files.Json]:
        """What the page shows of it.

        Args:
            ahead: jobs before it.
        """
        now = time.monotonic() if self._ended is None else self._ended
        stage, left = None, None
        if self.stages:
            stage, (done, total) = next(reversed(self.stages.items()))
            _, first, since = self._first
            if total and done > first:
                left = (now - since) / (done - first) * (total - done)
        return {
            "id": self.id,
            "kind": self.kind,
            "state": self.state,
            "message": self.message,
            "result": self.result,
            "stage": stage,
            "stages": {name: list(pair) for name, pair in self.stages.items()},
            "seconds": now - self._started if self._started else 0.0,
            "seconds_left": left,
            "ahead": ahead,
        }


class Worker:
    """The queue and the process. All methods may be called from any thread."""

    def __init__(self, config: app_program.AppConfig) -> None:
        """Takes the options of the page."""
        self._config = config
        self._changed = threading.Condition()
        self._queue: collections.deque[PageJob] = collections.deque()
        self._running: PageJob | None = None
        self._process: subprocess.Popen[str] | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self.extractors: list[dict[str, files.Json]] = []
        self.trouble: str | None = None
        self.on_end: Callable[[PageJob], None] = lambda job: None
        self.on_trouble: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Starts the process."""
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Of the process, None where there is none."""
        return None if self._process is None else self._process.pid

    def submit(self, job: PageJob) -> None:
        """Queues a job.

        Raises:
            limits.Refused: too many wait.
        """
        with self._changed:
            if len(self._queue) >= limits.MOST_JOBS:
                raise limits.Refused("too much work is waiting; try again later", status=429)
            self._queue.append(job)
            self._changed.notify_all()

    def cancel(self, job: PageJob) -> None:
        """Stops a job: a waiting one at once, a running one soon."""
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
                job.end("cancelled")
                self._changed.notify_all()
                self.on_end(job)
            elif job is self._running and job.state == "running":
                job.state = "stopping"
                self._send({"do": "cancel", "job": job.id})
                timer = threading.Timer(_PATIENCE_S, self._kill_if_running, [job])
                timer.daemon = True
                timer.start()

    def ahead_of(self, job: PageJob) -> int:
        """How many jobs come before one."""
        with self._changed:
            if job not in self._queue:
                return 0
            return self._queue.index(job) + (self._running is not None)

    def close(self) -> None:
        """Ends the process and the thread."""
        with self._changed:
            self._is_closed = True
            self._queue.clear()
            if self._process is not None:
                self._process.kill()
            self._changed.notify_all()
        self._thread.join(_END_S)

    def _work(self) -> None:
        """Keeps a process, and takes the jobs in turn; the thread's loop."""
        while not self._is_closed and self.trouble is None:
            process = self._launch()
            while process.poll() is None and not self._is_closed:
                with self._changed:
                    while not self._queue and not self._is_closed and process.poll() is None:
                        self._changed.wait(1.0)
                    if self._is_closed or not self._queue or process.poll() is not None:
                        continue
                    job = self._running = self._queue.popleft()
                    job.start()
                self._take(process, job)
                with self._changed:
                    self._running = None
                    self._changed.notify_all()
                self.on_end(job)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
            process.wait()
        with self._changed:
            waiting = list(self._queue)
            self._queue.clear()
        for job in waiting:
            job.end("failed", message=self.trouble or "the server ends")
        if self.trouble is not None:
            self.on_trouble()

    def _launch(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "afr_jax.app.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            # Ctrl-C in a terminal is for the server, which then ends the worker.
            start_new_session=True,
        )
        with self._changed:
            self._process = process
            if self._is_closed:
                process.kill()
        self._send(dataclasses.asdict(self._config))
        for message in self._messages(process):
            if message["event"] == "useless":
                self.trouble = message["message"]
            else:
                self.extractors = message["extractors"]
            break
        else:
            if not self._is_closed:
                self.trouble = "the process that does the work does not start; see the terminal"
        with self._changed:
            self._changed.notify_all()
        return process

    def _take(self, process: "subprocess.Popen[str]", job: PageJob) -> None:
        self._send(
            {
                "do": "job",
                "job": job.id,
                "kind": job.kind,
                "folder": os.fspath(job.folder),
                "payload": dict(job.payload),
            }
        )
        for message in self._messages(process):
            if message.get("job") != job.id:
                continue
            if message["event"] == "progress":
                job.advance(message["stage"], message["done"], message["total"])
                continue
            # Whoever asked to stop does not want what was just finished.
            is_stopped = job.state == "stopping" or message["event"] == "cancelled"
            if message["event"] == "done" and not is_stopped:
                job.result = message["result"]
                job.end("done")
            else:
                state = "cancelled" if is_stopped else "failed"
                job.end(state, message=None if is_stopped else message["message"])
            return
        was_asked = job.state == "stopping" or self._is_closed
        if not was_asked:
            logging.warning("the worker ended with code %s", process.poll())
        job.end("cancelled" if was_asked else "failed", message=None if was_asked else _KILLED)

    def _messages(self, process: "subprocess.Popen[str]") -> Iterator[dict[str, files.Json]]:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                yield json.loads(line)
            except ValueError:  # A line that a killed process did not finish.
                return

    def _send(self, message: Mapping[str, object]) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        try:
            process.stdin.write(json.dumps(files.to_jsonable(message)) + "\n")
            process.stdin.flush()
        except (OSError, ValueError):  # It is gone: whoever waits for its answer sees that.
            logging.debug("the worker is gone")

    def _kill_if_running(self, job: PageJob) -> None:
        with self._changed:
            process = self._process
            if job is self._running and process is not None and process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
