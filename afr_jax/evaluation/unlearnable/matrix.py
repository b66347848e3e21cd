"""The matrix of a study of unlearnable data: its cells, the table over seeds, what it says.

A cell is one victim; curves come from `learnability.Curve`. Host code.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

import numpy as np

from afr_jax.core import files
from afr_jax.evaluation.metrics import learnability

# Huang et al. 2021, figure 2.
_IN_FIGURE = ("clean", "random", "error_max", "error_min")


class VictimCell(NamedTuple):
    """One victim.

    Attributes:
        method: of `recipes.METHODS`, or "clean".
        granularity: "sample", "class", or "none" for clean data.
        rate: share of the training images that carry noise.
        countermeasure: of `countermeasures.NAMES`, or "purifier".
        architecture: of `registry.NAMES`.
        seed: of noise and victim.
    """

    method: str
    granularity: str
    rate: float
    countermeasure: str
    architecture: str
    seed: int

    @property
    def data_name(self) -> str:
        """The training set before the victim's countermeasure."""
        if self.method == "clean":
            return "clean"
        share = "" if self.rate == 1 else f" {100 * self.rate:g} %"
        return f"{self.method} {self.granularity}{share}"

    @property
    def file_name(self) -> str:
        """Unique among all cells."""
        data = f"{self.method}-{self.granularity}-{self.rate:g}"
        return f"{data}-{self.countermeasure}-{self.architecture}-seed{self.seed}.json"


class MatrixRow(TypedDict):
    """A row of the table: means over seeds, ends of the last accuracies, epochs of the peaks."""

    data: str
    countermeasure: str
    architecture: str
    seeds: int
    last_accuracy: float
    last_spread: list[float]
    peak_accuracy: float
    peak_epochs: list[int]
    train_accuracy: float


def rows_of(curves: Mapping[VictimCell, learnability.Curve]) -> list[MatrixRow]:
    """Rows of the table: cells that differ in their seed alone, put together.

    Args:
        curves: of finished cells.

    Returns:
        Dicts with data, countermeasure, architecture, number of seeds; last_accuracy and
        peak_accuracy (means over seeds of clean test accuracy), the spread of the last, the epochs
        of the peaks and the mean training accuracy.
    """
    rows: list[MatrixRow] = []
    keys = dict.fromkeys((c.data_name, c.countermeasure, c.architecture) for c in curves)
    for data_name, change, architecture in keys:
        summaries = [
            learnability.summary(curve)
            for cell, curve in curves.items()
            if (cell.data_name, cell.countermeasure, cell.architecture)
            == (data_name, change, architecture)
        ]
        last = np.array([summary.last_accuracy for summary in summaries])
        peak = np.array([summary.peak_accuracy for summary in summaries])
        rows.append(
            {
                "data": data_name,
                "countermeasure": change,
                "architecture": architecture,
                "seeds": len(summaries),
                "last_accuracy": float(last.mean()),
                "last_spread": [float(last.min()), float(last.max())],
                "peak_accuracy": float(peak.mean()),
                "peak_epochs": [summary.peak_epoch for summary in summaries],
                "train_accuracy": float(np.mean([s.last_train_accuracy for s in summaries])),
            }
        )
    return rows


def verdict(rows: Sequence[MatrixRow], chance: float) -> dict[str, bool]:
    """Whether clean data is learned (twice chance), and error_min data is not, with controls.

    Not learned: the last accuracy is below halfway from chance to that of clean data. Only rows
    without a countermeasure and of the first architecture are asked.

    Args:
        rows: from `rows_of`.
        chance: accuracy of guessing.
    """
    plain = {
        row["data"]: row["last_accuracy"]
        for row in rows
        if row["countermeasure"] == "none" and row["architecture"] == rows[0]["architecture"]
    }
    if "clean" not in plain:
        return {}
    halfway = (chance + plain["clean"]) / 2
    judged = {"clean is learned": plain["clean"] > 2 * chance}
    for name, accuracy in plain.items():
        if name.startswith("error_min") and "%" not in name:
            judged[f"{name} is not learned"] = accuracy < halfway
            for other in ("random", "error_max"):
                between = plain.get(name.replace("error_min", other))
                if between is not None:
                    judged[f"{name} is below {other}"] = accuracy < between
    return judged


def write(
    folder: str | os.PathLike[str],
    curves: Mapping[VictimCell, learnability.Curve],
    rows: Sequence[MatrixRow],
    *,
    title: str,
) -> None:
    """Writes `matrix.csv`, the heat map `matrix.png`, `curves.csv` and `curves.png`.

    Args:
        folder: that exists.
        curves: of finished cells.
        rows: theirs, from `rows_of`.
        title: what all cells have in common.
    """
    folder = pathlib.Path(folder)
    table = [list(files.to_jsonable(row).values()) for row in rows]
    files.write_csv(folder / "matrix.csv", list(rows[0]), table)
    names = list(dict.fromkeys(row["data"] for row in rows))
    columns = list(dict.fromkeys((row["architecture"], row["countermeasure"]) for row in rows))
    values = np.full((len(names), len(columns)), np.nan)
    for row in rows:
        column = columns.index((row["architecture"], row["countermeasure"]))
        values[names.index(row["data"]), column] = row["last_accuracy"]
    several = len({architecture for architecture, _ in columns}) > 1
    labels = [f"{name} {change}" if several else change for name, change in columns]
    learnability.plot_matrix(
        folder / "matrix.png", values, names, labels, title=f"clean test accuracy, %; {title}"
    )
    learnability.write_curves(
        folder / "curves.csv", {cell.file_name[:-5]: curve for cell, curve in curves.items()}
    )
    first = next(iter(curves))
    alike = {cell: curve for cell, curve in curves.items() if cell[3:] == first[3:]}
    shown = {
        cell.data_name: curve
        for cell, curve in alike.items()
        if cell.rate == 1 and cell.method in _IN_FIGURE
    }
    learnability.plot_curves(folder / "curves.png", shown, title=f"{first.architecture}, {title}")
