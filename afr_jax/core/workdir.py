"""The folder of one run: config.json, metrics.jsonl and result.json; made, reopened, checked."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping

from afr_jax.core import distributed, files, options


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The folder of one run: config.json, metrics.jsonl and result.json; see `open_workdir`.

    Attributes:
      path: the absolute folder.
      resumed: whether the folder held the config of an earlier run when it was opened.
    """

    path: pathlib.Path
    resumed: bool = False

    def append_metrics(self, metrics: Mapping[str, object]) -> None:
        """Appends one line to metrics.jsonl; by convention it has an integer "step"."""
        if distributed.is_primary():
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(files.to_jsonable(metrics), allow_nan=False) + "\n")

    def read_metrics(self) -> list[dict[str, files.Json]]:
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
            files.write_atomically(self.path / "metrics.jsonl", text.encode(), overwrite=True)

    def write_result(self, result: Mapping[str, object]) -> None:
        """Writes result.json."""
        if distributed.is_primary():
            files.write_json(self.path / "result.json", result)


def open_workdir(
    path: str | os.PathLike[str] | None, config: object, *, resumable: Iterable[str] | None = None
) -> Workdir:
    """Creates or reopens the folder of a run and makes sure that it is the same run.

    Args:
      path: the folder; None is a usage error.
      config: the resolved options, a dict or a dataclass; written to config.json.
      resumable: keys that may change when a run is resumed (the number of steps, say). Nested keys
        are written with dots: "model.width". By default those that an options class says.

    Returns:
      The work directory, `resumed` if it held a config.

    Raises:
      UsageError: if the folder belongs to a run with another config, or cannot be used.
    """
    if path is None:
        raise options.UsageError("--workdir is needed")
    if resumable is None:
        is_options = dataclasses.is_dataclass(config)
        resumable = (*options.resumable(type(config)), "workdir") if is_options else ()
    folder = pathlib.Path(path).expanduser().absolute()
    new = files.to_jsonable(config)
    known = folder / "config.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = json.loads(known.read_text(encoding="utf-8")) if known.exists() else None
        if old is not None:
            _check_same_run(folder, _flatten(old), _flatten(new), frozenset(resumable))
        if distributed.is_primary():
            files.write_json(known, new)
    except options.UsageError:
        raise
    except (OSError, ValueError) as error:
        raise options.UsageError(f"cannot use the work directory {folder}: {error}") from error
    return Workdir(folder, resumed=old is not None)


def load_or_compute(path: str | os.PathLike[str], compute_fn: Callable[[], object]) -> files.Json:
    """The value of a JSON file; if there is none yet, what a function returns, which is written.

    So a study keeps its cells: what a killed run has finished is not computed again.

    Args:
      path: of the file.
      compute_fn: returns what `files.to_jsonable` can write.

    Returns:
      The value as JSON has it, also when it was just computed.
    """
    path = pathlib.Path(path)
    if not path.exists():
        value = compute_fn()
        if not distributed.is_primary():
            return json.loads(json.dumps(files.to_jsonable(value)))
        files.write_json(path, value)
    return json.loads(path.read_text(encoding="utf-8"))


def _flatten(config: object, prefix: str = "") -> dict[str, files.Json]:
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    flat = {}
    for name, value in config.items():
        flat.update(_flatten(value, f"{prefix}.{name}" if prefix else name))
    return flat


def _check_same_run(
    folder: pathlib.Path,
    old: dict[str, files.Json],
    new: dict[str, files.Json],
    resumable: frozenset[str],
) -> None:
    absent = "absent"
    differing = [
        f"{name} (was {json.dumps(old.get(name, absent))}, is {json.dumps(new.get(name, absent))})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, absent) != new.get(name, absent) and name not in resumable
    ]
    if differing:
        raise options.UsageError(
            f"{folder} holds a run with another config: {'; '.join(differing)}. "
            "Give the old values, or another --workdir."
        )
