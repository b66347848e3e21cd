"""Timing of several implementations against each other, and the table of what came out.

In the result files the reference implementation's figure is called "peer".
"""

import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypedDict


class Spread(TypedDict):
    """Measurements: their median, least and largest, and all of them in order."""

    median: float
    low: float
    high: float
    samples: list[float]


Figure = Spread | float | int | None


class Row(TypedDict):
    """A row of the table: name, what is measured, our figure, the reference's, and their ratio.

    `ratio` is the reference's time over ours.
    """

    row: str
    quantity: str
    ours: Figure
    peer: Figure
    ratio: Figure


class Took(NamedTuple):
    """Seconds on the clock, and of processors that this process used; from `now`.

    On a machine that others use, too, the second says more than the first.
    """

    wall: float
    processor: float

    def __sub__(self, earlier: "Took") -> "Took":
        return Took(self.wall - earlier.wall, self.processor - earlier.processor)


def now() -> Took:
    """Both clocks; their differences count."""
    return Took(time.perf_counter(), time.process_time())


class Load(NamedTuple):
    """What the machine's processors did until now, in seconds.

    Attributes:
        took: for this process and those that it started and that have ended.
        busy: altogether; None where unknown.
    """

    took: Took
    busy: float | None

    def others(self) -> float | None:
        """Share of the processors that others have used since, 0 to 1; None where unknown.

        Others are also processes that this one started and that still run.
        """
        later = load()
        if self.busy is None or later.busy is None:
            return None
        took = later.took - self.took
        share = (later.busy - self.busy - took.processor) / took.wall / (os.cpu_count() or 1)
        return min(max(share, 0.0), 1.0)


def load() -> Load:
    """The load so far; `busy` is None but on Linux."""
    took = Took(time.perf_counter(), sum(os.times()[:4]))
    try:
        fields = pathlib.Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return Load(took, None)
    user, nice, system, _, _, interrupt, soft_interrupt = map(int, fields[1:8])
    ticks = user + nice + system + interrupt + soft_interrupt
    return Load(took, ticks / os.sysconf("SC_CLK_TCK"))


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


def by_both_clocks(
    sides: Mapping[str, Callable[[], object]], *, repeats: int
) -> dict[str, list[Took]]:
    """What the sides took, by `take_turns`, on the clock and of processors."""
    taken: dict[str, list[Took]] = {name: [] for name in sides}

    def timed(name: str) -> Callable[[], float]:
        def once() -> float:
            before = now()
            sides[name]()
            taken[name].append(now() - before)
            return taken[name][-1].wall

        return once

    take_turns({name: timed(name) for name in sides}, repeats=repeats)
    return {name: found[1:] for name, found in taken.items()}


def spread(samples: Sequence[float]) -> Spread:
    """Median, least and largest of measurements, and the measurements themselves."""
    return {
        "median": statistics.median(samples),
        "low": min(samples),
        "high": max(samples),
        "samples": list(samples),
    }


def compare(
    row: str, quantity: str, ours: Sequence[float], reference: Sequence[float] | None
) -> Row:
    """A row on times, with the ratio of each round; `reference` is None if it was not measured."""
    theirs = ratio = None
    if reference is not None:
        theirs = spread(reference)
        ratio = spread([other / own for own, other in zip(ours, reference, strict=True)])
    return {"row": row, "quantity": quantity, "ours": spread(ours), "peer": theirs, "ratio": ratio}


def state(row: str, quantity: str, ours: Figure, reference: Figure) -> Row:
    """A row on anything but times."""
    return {"row": row, "quantity": quantity, "ours": ours, "peer": reference, "ratio": None}


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: median (least-largest) of spreads, nothing for None."""
    lines = [["", "", "ours", "reference", "reference / ours"]]
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


def _figure(value: Figure) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        low, high = _number(value["low"]), _number(value["high"])
        return f"{_number(value['median'])} ({low}-{high})"
    return _number(value)


def _number(value: float) -> str:
    """Three significant digits, without an exponent for what is met here."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
