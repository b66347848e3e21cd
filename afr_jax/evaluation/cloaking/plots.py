"""Plots of an evaluation: protection by budget, embeddings before and after, distances.

Every figure is one PNG with a panel for each extractor, which shows one cell (`shown_cells`).
"""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from afr_jax.evaluation.attackers import tracker_names
from afr_jax.evaluation.cloaking import scores, table
from afr_jax.evaluation.cloaking.cells import CloakCell, file_name, limits_of
from afr_jax.evaluation.cloaking.embeddings import Embeddings
from afr_jax.evaluation.report import figures
from afr_jax.recognition import match

_METHOD_COLORS = {
    "none": "black",
    "noise": "gray",
    "fawkes": "tab:blue",
    "lowkey": "tab:orange",
    "fawkes_pypi": "tab:green",
}
# Of photos that another program protected.
_GIVEN_COLOR = "tab:red"
# Panels of a row.
_MOST_ACROSS = 4
_MARKERS = "osDv^<>P"
_OTHER_COLORS = ("tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")


class Cloud(NamedTuple):
    """Embeddings of one person's photos, and of a few others', by one extractor.

    Attributes:
        title: of the panel.
        before: `[N, D]`, the person's published photos, clean.
        after: `[M, D]`, the same as they are published.
        probes: `[Q, D]`.
        others: embeddings of other people's photos, by name.
    """

    title: str
    before: np.ndarray
    after: np.ndarray
    probes: np.ndarray
    others: Mapping[str, np.ndarray]


class Distances(NamedTuple):
    """Distances of probes by one extractor.

    Attributes:
        title: of the panel.
        before: `[Q]` to the nearest of the person's published photos, clean.
        after: `[Q]` to the nearest of them as they are published.
        others: `[Q]` to the nearest photo of anybody else.
        threshold: of the extractor.
    """

    title: str
    before: np.ndarray
    after: np.ndarray
    others: np.ndarray
    threshold: float


_SEEN = {"mean_dssim": "DSSIM, mean", "ssimulacra2": "SSIMULACRA2 of the face, median"}


def shown_cells(
    cells: Sequence[CloakCell], names: Sequence[str], *, method: str = "fawkes"
) -> dict[str, CloakCell]:
    """The cell that pictures of an extractor show: a transfer one where there is one.

    Of the method's cells, those without the extractor among the surrogates, then those with the
    most surrogates, then the middle budget.

    Args:
        cells: all.
        names: of extractors.
        method: falls back to any but `none`, then to any.

    Returns:
        A cell by the extractor's name.
    """
    pool = [cell for cell in cells if cell.method == method]
    pool = pool or [cell for cell in cells if cell.method != "none"] or list(cells)
    shown = {}
    for name in names:
        extractor = tracker_names.parse(name).extractor
        best = max((extractor not in cell.surrogates, len(cell.surrogates)) for cell in pool)
        own = [c for c in pool if (extractor not in c.surrogates, len(c.surrogates)) == best]
        own.sort(key=lambda cell: limits_of(cell.budget).dssim if cell.budget else 0.0)
        shown[name] = own[len(own) // 2]
    return shown


def draw(
    setup: table.Setup,
    shown: Mapping[str, tuple[CloakCell, Mapping[str, Embeddings]]],
    folder: pathlib.Path,
    *,
    num_others: int = 4,
) -> None:
    """Draws `embeddings.png` and `distances.png`: for each extractor a cell and what it sees."""
    clouds, found = [], []
    person = setup.split.protected[0].identity
    for name, (cell, seen) in shown.items():
        clean = setup.clean[name]
        title = f"{file_name(name)}; {cell.name}"
        label = setup.split.names.index(person)
        own = clean.owners == label
        chosen = [n for n in dict.fromkeys(s.identity for s in setup.split.gallery)]
        counts = {n: sum(s.identity == n for s in setup.split.gallery) for n in chosen}
        chosen = sorted(chosen, key=lambda n: -counts[n])[:num_others]
        clouds.append(
            Cloud(
                f"{title}\n{person}",
                _vectors(clean.published, own),
                _vectors(seen[name], own),
                _vectors(clean.probes, clean.people == label),
                {
                    other: _vectors(clean.gallery, clean.others == setup.split.names.index(other))
                    for other in chosen
                },
            )
        )
        before, after, others = [], [], []
        cases = scores.galleries(clean, scores.enroll(clean, seen[name]))
        for one, (apart, labels) in zip(setup.split.protected, cases, strict=True):
            number = setup.split.names.index(one.identity)
            rows = clean.people == number
            before.append(clean.to_published[rows][:, clean.owners == number].min(axis=1))
            after.append(apart[:, labels == number].min(axis=1))
            others.append(apart[:, labels != number].min(axis=1))
        found.append(
            Distances(
                title,
                before=np.concatenate(before),
                after=np.concatenate(after),
                others=np.concatenate(others),
                threshold=clean.extractor.threshold,
            )
        )
    plot_embeddings(folder / "embeddings.png", clouds)
    plot_distances(folder / "distances.png", found)


def plot_budgets(
    path: str | os.PathLike[str],
    rows: Sequence[scores.Row],
    *,
    axis: Literal["mean_dssim", "ssimulacra2"] = "mean_dssim",
    tracker: str = "nearest",
    countermeasures: tuple[str, str] = ("none", "jpeg75"),
) -> None:
    """Draws protection against what is seen, a line for each method and set of surrogates.

    Markers are filled where the panel's extractor is among the surrogates.

    Args:
        path: of the PNG.
        rows: of the table; those with leaks or mixes and those of other trackers and
            countermeasures are left out.
        axis: what is seen: mean DSSIM, or median SSIMULACRA2 (less to the right).
        tracker: of the rows that are drawn.
        countermeasures: drawn solid with intervals, and dotted.
    """
    rows = [row for row in rows if row["tracker"] == tracker and is_whole(row)]
    names = list(dict.fromkeys(row["extractor"] for row in rows))
    figure, axes = _panels(len(names), height=4.2)
    for panel, name in zip(axes, names, strict=True):
        own = [row for row in rows if row["extractor"] == name]
        sets = list(dict.fromkeys((row["method"], row["surrogates"]) for row in own))
        for number, (method, surrogates) in enumerate(sets):
            marker = _MARKERS[number % len(_MARKERS)]
            is_unseen = any(
                row["transfer"] is not False
                for row in own
                if (row["method"], row["surrogates"]) == (method, surrogates)
            )
            fill = {"markerfacecolor": "white"} if is_unseen else {}
            for countermeasure, style in zip(countermeasures, ("-", ":"), strict=True):
                line = [
                    row
                    for row in own
                    if (row["method"], row["surrogates"]) == (method, surrogates)
                    and row["countermeasure"] == countermeasure
                ]
                if line:
                    label = f"{method}: {surrogates}" if surrogates else method
                    _budget_line(panel, line, style, label, axis, {"marker": marker, **fill})
        panel.set(xlabel=_SEEN[axis], ylim=(-3, 103), title=name)
        panel.locator_params(axis="x", nbins=5)
        if axis == "ssimulacra2":
            panel.invert_xaxis()
        panel.grid(alpha=0.3)
    for panel in axes[::_MOST_ACROSS]:
        panel.set_ylabel(f"probes not identified, % ({tracker})")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    notes = ["hollow: the extractor is none of the surrogates"]
    if any(row["countermeasure"] == countermeasures[1] for row in rows):
        notes.insert(0, f"solid: {countermeasures[0]}, dotted: {countermeasures[1]}")
    figure.suptitle("; ".join(notes), fontsize=9)
    figures.save(figure, path)


def is_whole(row: scores.Row) -> bool:
    """Whether the row's tracker has all published photos, none of them clean."""
    return row["leak"] == 0 and not row.get("mix")


def plot_mixes(
    path: str | os.PathLike[str], rows: Sequence[scores.Row], *, tracker: str = "nearest"
) -> None:
    """Draws protection against the number of the person's photos that the tracker has.

    Above a line for each cell against the number of cloaked photos, none beside them clean; below
    against that of clean photos beside as many cloaked ones as the line says.

    Args:
        path: of the PNG.
        rows: of the table; those without a mix and those of other trackers are left out.
        tracker: of the rows that are drawn.
    """
    rows = [row for row in rows if row["tracker"] == tracker and row.get("mix")]
    names = list(dict.fromkeys(row["extractor"] for row in rows))
    figure, axes = figures.pyplot().subplots(
        2, len(names), figsize=(3.6 * len(names), 7.2), layout="constrained", squeeze=False
    )
    for (above, below), name in zip(axes.T, names, strict=True):
        own = [row for row in rows if row["extractor"] == name]
        for title, line in _by_cell(own).items():
            mixes = {scores.parse_mix(row["mix"]): row for row in line}
            alone = {mix.cloaked: mixes[mix] for mix in sorted(mixes) if not mix.clean}
            _mix_line(above, alone, title)
            for cloaked in sorted({mix.cloaked for mix in mixes if mix.clean}):
                beside = {m.clean: mixes[m] for m in sorted(mixes) if m.cloaked == cloaked}
                _mix_line(below, beside, f"{title}, {cloaked} published")
        above.set(title=name, xlabel="published photos, none clean")
        below.set(xlabel="clean photos beside published ones")
        for panel in (above, below):
            panel.set(ylim=(-3, 103))
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.3)
    for panel in axes[:, 0]:
        panel.set_ylabel(f"probes not identified, % ({tracker})")
    for row_axes in axes:
        row_axes[0].legend(fontsize=7)
    figures.save(figure, path)


def plot_embeddings(path: str | os.PathLike[str], clouds: Sequence[Cloud]) -> None:
    """Draws the first two principal components of clean embeddings, and where cloaks lie in them.

    The components are those of all photos of the panel, so that both kinds of photos count.
    """
    figure, axes = _panels(len(clouds), height=4.4)
    for panel, cloud in zip(axes, clouds, strict=True):
        parts = [cloud.before, cloud.after, cloud.probes, *cloud.others.values()]
        project_fn = principal_components(np.concatenate(parts))
        for color, (name, vectors) in zip(_OTHER_COLORS, cloud.others.items(), strict=False):
            panel.scatter(*project_fn(vectors).T, s=22, color=color, alpha=0.7, label=name)
        panel.scatter(*project_fn(cloud.before).T, s=30, color="tab:blue", label="clean")
        panel.scatter(
            *project_fn(cloud.after).T, s=45, color="tab:red", marker="x", label="published"
        )
        panel.scatter(
            *project_fn(cloud.probes).T, s=30, facecolors="none", edgecolors="black", label="probes"
        )
        panel.set_title(cloud.title, fontsize=9)
        panel.set(xticks=[], yticks=[])
        panel.legend(fontsize=6)
    figures.save(figure, path)


def plot_distances(path: str | os.PathLike[str], found: Sequence[Distances]) -> None:
    """Draws histograms of the distances of probes, before and after, with the threshold."""
    figure, axes = _panels(len(found), height=3.6)
    for panel, item in zip(axes, found, strict=True):
        parts = {
            "own photos, clean": (item.before, "tab:blue"),
            "own photos, published": (item.after, "tab:red"),
            "nearest other person": (item.others, "gray"),
        }
        parts = {name: (v[np.isfinite(v)], color) for name, (v, color) in parts.items()}
        high = max([v.max() for v, _ in parts.values() if len(v)], default=1.0)
        for name, (values, color) in parts.items():
            bins = np.linspace(0, 1.02 * high, 30).tolist()
            panel.hist(values, bins=bins, color=color, alpha=0.55, label=name)
        panel.axvline(item.threshold, color="black", linestyle="--", linewidth=1, label="threshold")
        panel.set_title(item.title, fontsize=9)
        panel.set(xlabel="distance of a probe")
        panel.legend(fontsize=7)
    for panel in axes[::_MOST_ACROSS]:
        panel.set_ylabel("probes")
    figures.save(figure, path)


def principal_components(vectors: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The projection onto the first two principal components of vectors `[N, D]`.

    Returns:
        A function of `[M, D]` unit-length or raw vectors, to `[M, 2]`; vectors are scaled to unit
        length first.
    """
    unit = match.unit_length(np.asarray(vectors, np.float64))
    center = unit.mean(axis=0)
    _, _, axes = np.linalg.svd(unit - center, full_matrices=False)
    return lambda some: (match.unit_length(np.asarray(some, np.float64)) - center) @ axes[:2].T


def _by_cell(rows: Sequence[scores.Row]) -> dict[str, list[scores.Row]]:
    found: dict[str, list[scores.Row]] = {}
    for row in rows:
        parts = [row["method"], row["surrogates"], row["budget"]]
        title = " ".join(str(part) for part in parts if part is not None and part != "")
        found.setdefault(title, []).append(row)
    return found


def _mix_line(panel: Axes, by_count: Mapping[int, scores.Row], label: str) -> None:
    """Protection with its intervals against a number of photos."""
    share, low, high = (
        100 * np.array([row[key] for row in by_count.values()])
        for key in ("protection", "low", "high")
    )
    spread = np.maximum([share - low, high - share], 0)
    panel.errorbar(list(by_count), share, spread, marker="o", markersize=4, capsize=2, label=label)


def _budget_line(
    panel: Axes,
    line: Sequence[scores.Row],
    style: str,
    label: str | None,
    axis: str,
    marker: dict[str, Any],
) -> None:
    color = _METHOD_COLORS.get(line[0]["method"], _GIVEN_COLOR)
    # Of clean photos nothing is seen, nor of a cell none of whose photos could be protected.
    line = [row for row in line if row.get(axis) is not None] or line
    share = 100 * np.array([row["protection"] for row in line])
    if line[0].get(axis) is None:
        label = label if style == "-" else None
        panel.axhline(share[0], color=color, linestyle=style, linewidth=1, label=label)
        return
    order = np.argsort([row[axis] for row in line])
    seen = np.array([row[axis] for row in line])[order]
    if style == ":":
        panel.plot(seen, share[order], style, color=color, markersize=3, **marker)
        return
    low, high = (100 * np.array([row[end] for row in line])[order] for end in ("low", "high"))
    spread = np.maximum([share[order] - low, high - share[order]], 0)
    panel.errorbar(
        seen,
        share[order],
        spread,
        linestyle=style,
        color=color,
        markersize=4,
        capsize=2,
        linewidth=1,
        label=label,
        **marker,
    )


def _panels(count: int, *, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, a few in a row of that height."""
    pyplot = figures.pyplot()
    across = min(max(count, 1), _MOST_ACROSS)
    down = -(-max(count, 1) // across)
    size = 4.6 * across, height * down
    figure, axes = pyplot.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for panel in axes.flat[count:]:
        panel.set_axis_off()
    return figure, list(axes.flat[:count])


def _vectors(seen: Embeddings, rows: np.ndarray) -> np.ndarray:
    return seen.vectors[rows & seen.found]
