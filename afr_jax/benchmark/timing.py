"""Timing of several implementations against each other, and the table of what came out.

A row of the table is a dict: `row`, `quantity`, `ours`, `peer` and `ratio`, the last three a spread
(`spread`), a plain number or None. `ratio` is the peer's time over ours.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def take_turns(sides: Mapping[str, Callable[[], float]], *, repeats: int) -> dict[str, list[float]]:
    """Measures every side `repeats` times, after one run of each that does not count.

    The sides take turns and every second round goes backwards, so that a machine that slows down or
    speeds up meanwhile favours none.

    Args:
        sides: functions that do the work once and return what it took.
        repeats: rounds that count.

    Returns:
        The measurements of each side, in order of the rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for side_fn in sides.values():
        side_fn()
    for number in range(repeats):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            samples[name].append(sides[name]())
    return samples


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, least and largest of measurements, and the measurements themselves."""
    return {
        "median": statistics.median(samples),
        "low": min(samples),
        "high": max(samples),
        "samples": list(samples),
    }


def compare(
    row: str, quantity: str, ours: Sequence[float], peer: Sequence[float] | None
) -> dict[str, Any]:
    """A row on times, with the ratio of each round."""
    ratio = None
    if peer is not None:
        ratio = spread([theirs / own for own, theirs in zip(ours, peer, strict=True)])
        peer = spread(peer)
    return {"row": row, "quantity": quantity, "ours": spread(ours), "peer": peer, "ratio": ratio}


def state(row: str, quantity: str, ours: Any, peer: Any) -> dict[str, Any]:
    """A row on anything but times: numbers, spreads or None."""
    return {"row": row, "quantity": quantity, "ours": ours, "peer": peer, "ratio": None}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table: median (least-largest) of spreads, nothing for None."""
    lines = [["", "", "ours", "peer", "peer / ours"]]
    for row in rows:
        figures = [_figure(row[name]) for name in ("ours", "peer", "ratio")]
        lines.append([row["row"], row["quantity"], *figures])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], "-" * widths[1], *("-" * (n - 1) + ":" for n in widths[2:])])
    return "\n".join(
        "| "
        + " | ".join(_aligned(*cell) for cell in zip(line, widths, range(5), strict=True))
        + " |"
        for line in lines
    )


def _aligned(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column < 2 else text.rjust(width)


def _figure(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        low, high = _number(value["low"]), _number(value["high"])
        return f"{_number(value['median'])} ({low}-{high})"
    return _number(value)


def _number(value: float) -> str:
    """Three significant digits, without an exponent for what is met here."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
