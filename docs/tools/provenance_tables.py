"""The table of all result files: when, where and at which commit they were measured."""

from collections.abc import Mapping
from typing import Any

from docs.tools import markdown
from docs.tools.markdown import table

_NAMES = tuple(sorted(path.stem for path in markdown.RESULTS.glob("*.json")))


@table("provenance", *(f"{name}.json" for name in _NAMES), has_source_line=False)
def provenance() -> str:
    """Date, commit and machine of each result file."""
    lines = [[f"`{name}`", *_row(markdown.result(name))] for name in _NAMES]
    return markdown.render(("file", "date", "commit", "machine"), lines)


def _row(measured: Mapping[str, Any]) -> tuple[str, str, str]:
    runs = (
        [measured, *measured.get("added", [])]  # What came later to a file.
        if "date" in measured
        else [
            value
            for entry in measured.values()
            for value in (entry if isinstance(entry, list) else [entry])
            if isinstance(value, Mapping) and "date" in value
        ]
    )
    cells = (
        dict.fromkeys(run.get("date", "") for run in runs),
        dict.fromkeys(f"`{run['commit']}`" for run in runs if "commit" in run),
        dict.fromkeys(_machine(run["machine"]) for run in runs if "machine" in run),
    )
    date, commit, machine = (", ".join(cell) for cell in cells)
    return date, commit, machine


def _machine(machine: Mapping[str, Any]) -> str:
    if machine["device"] != "cpu":
        return f"{machine['device']}, jax {machine['jax']}"
    cores = machine["cores"]
    return f"{machine['processor']}, {cores} core{'s' * (cores > 1)}, jax {machine['jax']}"
