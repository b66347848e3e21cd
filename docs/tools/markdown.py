"""Markdown tables of result files: reading the files, and formatting their figures."""

import csv
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

RESULTS = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "results"


class Table(NamedTuple):
    """A table that pages can show between markers.

    Attributes:
        make: returns the table's Markdown.
        sources: names of the result files it is made of.
        has_source_line: whether pages name the sources below the table.
    """

    make: Callable[[], str]
    sources: tuple[str, ...]
    has_source_line: bool = True


TABLES: dict[str, Table] = {}


def table(name: str, *sources: str, has_source_line: bool = True) -> Callable:
    """Registers the function below as the table of that name.

    Args:
        name: what pages write between `<!-- table: ` and ` -->`.
        *sources: names of the result files that it reads.
        has_source_line: whether pages name the sources below the table.
    """

    def register(make: Callable[[], str]) -> Callable[[], str]:
        TABLES[name] = Table(make, sources, has_source_line)
        return make

    return register


@functools.cache
def result(name: str) -> Mapping[str, Any]:
    """The content of a JSON result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


@functools.cache
def records(name: str) -> Sequence[Mapping[str, str]]:
    """The rows of a CSV result file."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return tuple(csv.DictReader(file))


def render(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: int = 0) -> str:
    """A Markdown table.

    Args:
        head: titles of the columns.
        rows: cells, as many in each row as there are columns.
        right: how many columns, counted from the right, are aligned to the right.
    """
    assert all(len(row) == len(head) for row in rows), (head, rows)
    rule = ["---"] * (len(head) - right) + ["---:"] * right
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def percent(share: float, *, digits: int = 0) -> str:
    """A percentage: 63 % of 0.63."""
    return f"{number(100 * share, digits=digits)} %"


def percents(*shares: float) -> str:
    """Several percentages in a cell whose table says the unit: 63 / 68 of 0.63 and 0.68."""
    return " / ".join(number(100 * share) for share in shares)


def percent_range(middle: float, low: float, high: float, *, digits: int = 0) -> str:
    """A percentage with its interval: 63 % (42-83) of 0.63, 0.42 and 0.83."""
    low_text, high_text = (number(100 * value, digits=digits) for value in (low, high))
    return f"{percent(middle, digits=digits)} ({low_text}-{high_text})"


def spread(timing: Mapping[str, float]) -> str:
    """A timing with median, low and high, three digits that count: 34.9 (32.1-37.6)."""
    return f"{short(timing['median'])} ({short(timing['low'])}-{short(timing['high'])})"


def short(value: float) -> str:
    """A positive number with three digits that count, at least whole ones."""
    if value >= 100:
        return f"{value:,.0f}"
    digits = 1 if value >= 10 else 2 if value >= 1 else 3
    return number(value, digits=digits)


def number(value: float, *, digits: int = 0) -> str:
    """A number with that many decimals; no minus before zero."""
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def bold(text: str, is_bold: bool = True) -> str:
    """The text in bold where asked for."""
    return f"**{text}**" if is_bold else text


EXTRACTORS = {
    "dlib": "dlib",
    "facenet_casia": "FaceNet CASIA",
    "mobilefacenet": "MobileFaceNet",
}


def extractors(names: str) -> str:
    """Readable names of extractors joined by a plus sign."""
    parts = names.split("+")
    if len(parts) == len(EXTRACTORS):
        return "all three"
    return " + ".join(EXTRACTORS[part] for part in parts)
