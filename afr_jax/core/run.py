"""What every program shares: flags, exit codes, the work directory, progress, the result line.

A program is a module of `experiments/`:

    run.define_flags()
    _STEPS = flags.DEFINE_integer("num_steps", 40, "gradient steps per photo")

    def run_experiment() -> tuple[dict, int]:
        work = run.open_workdir(flags.FLAGS.workdir, {"num_steps": _STEPS.value})
        ...
        work.write_result(result)
        return result, run.EXIT_OK

    if __name__ == "__main__":
        run.main(run_experiment)

Standard output carries the result as one JSON line and nothing else; all other output goes to
standard error. With several processes only process 0 writes files and the line.
"""

import contextlib
import dataclasses
import json
import logging as std_logging
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
import tqdm
from absl import app, flags, logging

from afr_jax.core import distributed, machine

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_PARTIAL = 3
_EXIT_INTERRUPTED = 130

_Item = TypeVar("_Item")

# Flags defined here belong to the program that calls `define_flags`, so that its --help lists them.
flags.disclaim_key_flags()


class UsageError(Exception):
    """Wrong usage: the program prints the message and exits with code 2, without a traceback."""


def define_flags() -> None:
    """Defines the flags of all programs: --workdir, --seed, --toy, --one_process_per_node."""
    flags.DEFINE_string(
        "workdir",
        None,
        "folder for config.json, metrics.jsonl, result.json; resumed if it has them",
    )
    flags.DEFINE_integer("seed", 0, "seed of all randomness of the run")
    flags.DEFINE_bool("toy", False, "shrink data, networks and steps: seconds on a CPU")
    flags.DEFINE_bool(
        "one_process_per_node", False, "under SLURM: one process drives all GPUs of its node"
    )


def main(
    run_fn: Callable[[], tuple[Mapping[str, Any], int]], *, argv: Sequence[str] | None = None
) -> NoReturn:
    """Runs an experiment as a program and exits.

    Parses the flags, settles compiler options and memory, joins the cluster if there is one,
    switches the compilation cache on, calls `run_fn` and prints its result as one JSON line, the
    last of standard output. Exit codes: what `run_fn` returns; 2 for wrong flags, extra arguments
    or a `UsageError`; 130 when interrupted; 1 with a traceback for everything else.

    Args:
      run_fn: reads its flags and returns (result, exit code).
      argv: the command line with the program's name first; default `sys.argv`.
    """

    def call(_: Sequence[str]) -> int:
        try:
            machine.choose_compiler_options()
            machine.keep_freed_memory()
            _join_cluster()
            enable_compilation_cache()
            with contextlib.redirect_stdout(sys.stderr):
                result, exit_code = run_fn()
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USAGE
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return _EXIT_INTERRUPTED
        if distributed.is_primary():
            print(json.dumps(to_jsonable(result), allow_nan=False), flush=True)
        return exit_code

    logging.get_absl_logger().addFilter(_is_worth_showing)
    app.run(call, argv=None if argv is None else list(argv), flags_parser=_parse_flags)
    raise AssertionError("absl.app.run returned")


def provenance(module: str) -> dict[str, Any]:
    """Says how the result of this program came about; see `machine.provenance`.

    Paths below $AFR_SHARED, of --workdir and of --peer_python appear under these names.

    Args:
      module: the program, "experiments.benchmark" say.
    """
    values = flags.FLAGS
    names = {"AFR_SHARED": os.environ.get("AFR_SHARED"), "WORKDIR": values.workdir}
    if "peer_python" in values:
        names["PEER_PYTHON"] = values.peer_python
    return machine.provenance(module, sys.argv[1:], names=names)


def enable_compilation_cache() -> pathlib.Path | None:
    """Lets compiled programs persist between processes.

    The folder is `JAX_COMPILATION_CACHE_DIR` if set, else `afr_jax/xla` in `XDG_CACHE_HOME` or
    `~/.cache`. An unusable folder only costs the cache; a bucket (gs://...) is left to JAX.

    Returns:
      The local folder in use, or None.
    """
    configured = jax.config.jax_compilation_cache_dir
    if configured and "://" in configured:
        return None
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    try:
        folder = pathlib.Path(configured or os.path.join(cache_home, "afr_jax", "xla")).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:
        logging.info("no compilation cache: %s", error)
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The folder of one run: config.json, metrics.jsonl and result.json; see `open_workdir`.

    Attributes:
      path: the absolute folder.
      resumed: whether the folder held the config of an earlier run when it was opened.
    """

    path: pathlib.Path
    resumed: bool = False

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl; by convention it has an integer "step"."""
        if distributed.is_primary():
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(to_jsonable(metrics), allow_nan=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl, without a last line that a killed run left torn."""
        try:
            text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.split("\n")[:-1] if line]

    def truncate_metrics(self, step: int) -> None:
        """Drops the lines whose "step" lies after `step`: what a resumed run will measure again."""
        if distributed.is_primary() and (self.path / "metrics.jsonl").exists():
            kept = [line for line in self.read_metrics() if line.get("step", step) <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            _write_atomically(self.path / "metrics.jsonl", text)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes result.json."""
        if distributed.is_primary():
            write_json(self.path / "result.json", result)


def open_workdir(
    path: str | os.PathLike[str] | None, config: Any, *, resumable: Iterable[str] = ()
) -> Workdir:
    """Creates or reopens the folder of a run and makes sure that it is the same run.

    Args:
      path: the folder; None is a usage error.
      config: the resolved options, a dict or a dataclass; written to config.json.
      resumable: keys that may change when a run is resumed (the number of steps, say). Nested keys
        are written with dots: "model.width".

    Returns:
      The work directory, `resumed` if it held a config.

    Raises:
      UsageError: if the folder belongs to a run with another config, or cannot be used.
    """
    if path is None:
        raise UsageError("--workdir is needed")
    folder = pathlib.Path(path).expanduser().absolute()
    new = to_jsonable(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        old = None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot use the work directory {folder}: {error}") from error
    if old is not None:
        _check_same_run(folder, _flatten(old), _flatten(new), frozenset(resumable))
    if distributed.is_primary():
        write_json(folder / "config.json", new)
    return Workdir(folder, resumed=old is not None)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file so that readers see the old one or the new one, never a part.

    Args:
      path: the file.
      value: see `to_jsonable`.
    """
    text = json.dumps(to_jsonable(value), indent=2, allow_nan=False)
    _write_atomically(pathlib.Path(path), text + "\n")


def to_jsonable(value: Any) -> Any:
    """Turns a value into what JSON can say.

    Arrays become lists, scalars Python numbers, NaN and infinities null, dataclasses and
    NamedTuples dicts, paths text.

    Raises:
      TypeError: for anything else.
    """
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_jsonable(getattr(value, field.name)) for field in fields}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return to_jsonable(value._asdict())
    if isinstance(value, Mapping):
        return {str(name): to_jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [to_jsonable(item) for item in sorted(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        array = np.asarray(value)
        # The small float types of accelerators are foreign to numpy ("V") and to JSON.
        return to_jsonable(
            (array.astype(np.float32) if array.dtype.kind == "V" else array).tolist()
        )
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


def progress(
    items: Iterable[_Item] | int,
    *,
    description: str,
    total: int | None = None,
    force: bool | None = None,
    interval_seconds: float = 10.0,
) -> Iterator[_Item]:
    """Yields the items and shows on standard error how far the loop is.

    A bar on a terminal. Elsewhere nothing, unless forced: then one log line every
    `interval_seconds`.

    Args:
      items: what to loop over; an integer n stands for range(n).
      description: what is being done.
      total: how many items there are, where `len(items)` does not tell.
      force: whether to report without a terminal; default: whether `AFR_PROGRESS` is 1 in the
      environment.
      interval_seconds: between two log lines.

    Yields:
      The items.
    """
    iterable: Iterable[Any] = range(items) if isinstance(items, int) else items
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    if not distributed.is_primary():
        yield from iterable
    elif sys.stderr.isatty():
        yield from tqdm.tqdm(iterable, desc=description, total=total, file=sys.stderr)
    elif os.environ.get("AFR_PROGRESS") == "1" if force is None else force:
        yield from _logged(iterable, description, total, interval_seconds)
    else:
        yield from iterable


def _logged(
    iterable: Iterable[_Item], description: str, total: int | None, interval_seconds: float
) -> Iterator[_Item]:
    of_total = "" if total is None else f"/{total}"
    start = last = time.monotonic()
    count = 0
    for item in iterable:
        yield item
        count += 1
        now = time.monotonic()
        if now - last >= interval_seconds or count == total:
            rate = count / max(now - start, 1e-9)
            logging.info("%s: %d%s, %.3g/s", description, count, of_total, rate)
            last = now


def _join_cluster() -> None:
    one_process = "one_process_per_node" in flags.FLAGS and flags.FLAGS.one_process_per_node
    try:
        distributed.maybe_initialize(one_process_per_node=one_process)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _is_worth_showing(record: std_logging.LogRecord) -> bool:
    # Orbax logs some 50 lines of level INFO around each checkpoint.
    return record.levelno >= std_logging.WARNING or "orbax" not in record.pathname


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the flags; wrong ones exit with code 2, help with 0 (absl exits with 1 for both)."""
    try:
        remaining = flags.FLAGS(argv)
    except flags.Error as error:
        print(f"error: {error}\nPass --help for the flags.", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except SystemExit:
        sys.exit(EXIT_OK)
    if len(remaining) > 1:
        extra = " ".join(remaining[1:])
        print(f"error: unexpected arguments: {extra}\nPass --help for the flags.", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    return remaining


def _write_atomically(path: pathlib.Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    flat = {}
    for name, value in config.items():
        flat.update(_flatten(value, f"{prefix}.{name}" if prefix else name))
    return flat


def _check_same_run(
    folder: pathlib.Path, old: dict[str, Any], new: dict[str, Any], resumable: frozenset[str]
) -> None:
    absent = "absent"
    differing = [
        f"{name} (was {json.dumps(old.get(name, absent))}, is {json.dumps(new.get(name, absent))})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, absent) != new.get(name, absent) and name not in resumable
    ]
    if differing:
        raise UsageError(
            f"{folder} holds a run with another config: {'; '.join(differing)}. "
            "Give the old values, or another --workdir."
        )
