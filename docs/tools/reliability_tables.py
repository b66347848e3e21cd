"""Tables of the reliability drill: what was tried, and what went wrong."""

import collections
from collections.abc import Iterator, Mapping
from typing import Any

from docs.tools import markdown
from docs.tools.markdown import table

_FAULTS = ("crashes", "hangs", "wrong", "lost", "changed", "escaped", "memory")
_STATE = (
    *("noise", "noise records", "cloak record", "cached arrays", "cell of a study", "metrics"),
    *("checkpoints", "database"),
)
_DAMAGE = ("a bit flipped", "truncated", "a part lost", "a part doubled", "overwritten")


@table("drill", "drill.json")
def drill() -> str:
    """Inputs and faults of each series and program."""
    sums: dict[tuple[str, str], dict[str, Any]] = {}
    for row in _rows("rows"):
        if row["series"] == "files":
            continue
        known = sums.setdefault((row["series"], row["program"]), {"peak_mb": 0})
        for name in ("inputs", *_FAULTS):
            known[name] = known.get(name, 0) + row[name]
        peaks = (known["peak_mb"], row["peak_mb"])
        known["peak_mb"] = None if None in peaks else max(peaks)
    lines = [
        [series, f"`{program}`", *_cells(row), _peak(row)]
        for (series, program), row in sums.items()
    ]
    head = ("series", "program", "inputs", *_FAULTS, "peak MB")
    return markdown.render(head, lines, right=len(_FAULTS) + 2)


@table("drill_files", "drill.json")
def drill_files() -> str:
    """Files and state that were damaged or hostile, by what they were."""
    groups: dict[str, collections.Counter] = {
        "state of runs, a bit flipped": collections.Counter(),
        "state of runs, damaged otherwise": collections.Counter(),
        "other files, damaged": collections.Counter(),
        "hostile files": collections.Counter(),
    }
    for row in _rows("kinds"):
        if row["series"] != "files":
            continue
        is_state = row["program"] in _STATE
        if row["kind"] not in _DAMAGE:
            name = "hostile files"
        elif is_state:
            is_flip = row["kind"] == "a bit flipped"
            name = f"state of runs, {'a bit flipped' if is_flip else 'damaged otherwise'}"
        else:
            name = "other files, damaged"
        groups[name].update({key: row[key] for key in ("inputs", *_FAULTS)})
    peak = max(row["peak_mb"] for row in _rows("rows") if row["series"] == "files")
    lines = [[name, *_cells(count)] for name, count in groups.items()]
    head = ("files", "inputs", *_FAULTS)
    text = markdown.render(head, lines, right=len(_FAULTS) + 1)
    return f"{text}\n\nMost memory that reading one of them took: {peak:,} MB."


def _rows(name: str) -> Iterator[Mapping[str, Any]]:
    for run in markdown.result("drill")["runs"]:
        yield from run[name]


def _cells(row: Mapping[str, int]) -> list[str]:
    return [f"{row[name]:,}" for name in ("inputs", *_FAULTS)]


def _peak(row: Mapping[str, Any]) -> str:
    return "at most 2,500" if row["peak_mb"] is None else f"{row['peak_mb']:,}"
