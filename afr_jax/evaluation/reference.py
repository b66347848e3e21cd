"""Reference implementations to measure against: a driver in another Python, kept alive.

Both sides measure themselves, so neither the pipe nor the start of the interpreter counts. The
protocol is that of `experiments/reference/serving.py`: one JSON object a line, the driver's first
line names its versions; arrays travel as `.npy` files.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import tempfile
import types
from collections.abc import Generator

from afr_jax.core import files, options

# The drivers come with the checkout, not with the installed package.
DRIVERS = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "reference"
_TAIL_LINES = 15
_END_SECONDS = 5


class ReferenceProcessError(Exception):
    """The program could not be started, ended or failed; the message says what it wrote last."""


class ReferenceProcess:
    """A running driver that answers requests; use it as a context manager."""

    def __init__(self, python: str | os.PathLike[str], script: str | os.PathLike[str]) -> None:
        """Starts the program and waits until it is ready.

        Args:
            python: the interpreter, of an environment that has the program's libraries.
            script: the program.

        Raises:
            ReferenceProcessError: it does not start.
        """
        self._name = pathlib.Path(script).name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # Closed by `close`.
        # Neither our modules and compiler options nor another interpreter's library may get into
        # its way: TensorFlow's XLA stops at options that it does not know.
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "PYTHONHOME", "XLA_FLAGS")
        }
        try:
            self._process = subprocess.Popen(
                [os.fspath(python), os.fspath(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                encoding="utf-8",
                env=environment,
            )
        except OSError as error:
            self._errors.close()
            raise ReferenceProcessError(f"{python} cannot be started: {error.strerror}") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        try:
            self._versions = self._read()["versions"]
        except BaseException:
            self.close()
            raise

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the program's interpreter and libraries."""
        return dict(self._versions)

    def call(self, command: str, **arguments: files.Json) -> dict[str, files.Json]:
        """Sends a request and waits for its answer.

        Args:
            command: one that the program knows.
            **arguments: of the command, as JSON can say them.

        Returns:
            The answer.

        Raises:
            ReferenceProcessError: the command failed, or the program has ended.
        """
        try:
            self._stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._stdin.flush()
        except (OSError, ValueError) as error:
            raise ReferenceProcessError(f"{self._name} has ended:\n{self._tail()}") from error
        answer = self._read()
        if "error" in answer:
            raise ReferenceProcessError(f"{self._name} {command}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the program; a second call has no effect."""
        if self._errors.closed:
            return
        for pipe in (self._stdin, self._stdout):
            # What was still to be written is of no interest.
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            self._process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> "ReferenceProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> dict[str, files.Json]:
        line = self._stdout.readline()
        try:
            return json.loads(line)
        except ValueError as error:
            raise ReferenceProcessError(f"{self._name} has ended:\n{self._tail()}") from error

    def _tail(self) -> str:
        """The last lines that the program wrote to its standard error."""
        self._errors.seek(0)
        text = self._errors.read().decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-_TAIL_LINES:])


@dataclasses.dataclass(frozen=True)
class ReferenceOptions:
    """Where the reference implementations run."""

    reference_python: str | None = options.option(
        None,
        "Python of an environment with the originals (experiments/reference/README.md); without it "
        "they are not asked",
        aliases=("peer_python",),
        resumable=True,
    )

    @contextlib.contextmanager
    def start(self, driver: str) -> Generator[ReferenceProcess]:
        """Starts a driver, and ends it with the context.

        Args:
            driver: name of a file in `DRIVERS`.

        Yields:
            The running driver.

        Raises:
            options.UsageError: `reference_python` is not given, or the driver does not start.
        """
        if self.reference_python is None:
            raise options.UsageError(
                "--reference_python is needed; see experiments/reference/README.md"
            )
        if not (DRIVERS / driver).is_file():
            raise options.UsageError(f"there is no {DRIVERS / driver}: drivers are in a checkout")
        try:
            process = ReferenceProcess(
                pathlib.Path(self.reference_python).expanduser(), DRIVERS / driver
            )
        except ReferenceProcessError as error:
            raise options.UsageError(f"--reference_python: {error}") from error
        with process:
            yield process

    def open(self, driver: str) -> contextlib.AbstractContextManager[ReferenceProcess | None]:
        """As `start`, but gives None without `reference_python`."""
        return contextlib.nullcontext() if self.reference_python is None else self.start(driver)
