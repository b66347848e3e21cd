"""Which cells the pictures of an evaluation show, and what is in them."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from afr_jax.evaluation.cloaking import methods, plots, scores
from afr_jax.evaluation.cloaking import study as cloaking_study
from afr_jax.evaluation.cloaking.methods import Cell
from afr_jax.evaluation.cloaking.views import Views


def shown_cells(
    cells: Sequence[Cell], names: Sequence[str], *, method: str = "fawkes"
) -> dict[str, Cell]:
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
        best = max((name not in cell.surrogates, len(cell.surrogates)) for cell in pool)
        own = [c for c in pool if (name not in c.surrogates, len(c.surrogates)) == best]
        own.sort(key=lambda cell: cell.budget or 0.0)
        shown[name] = own[len(own) // 2]
    return shown


def draw(
    study: cloaking_study.Study,
    shown: Mapping[str, tuple[Cell, Mapping[str, Views]]],
    folder: pathlib.Path,
    *,
    num_others: int = 4,
) -> None:
    """Draws `embeddings.png` and `distances.png`: for each extractor a cell and its views."""
    clouds, found = [], []
    person = study.split.protected[0].identity
    for name, (cell, views) in shown.items():
        scene = study.scenes[name]
        title = f"{methods.file_name(name)}; {cell.name}"
        label = study.split.identities.index(person)
        own = scene.owners == label
        chosen = [n for n in dict.fromkeys(s.identity for s in study.split.gallery)]
        counts = {n: sum(s.identity == n for s in study.split.gallery) for n in chosen}
        chosen = sorted(chosen, key=lambda n: -counts[n])[:num_others]
        clouds.append(
            plots.Cloud(
                f"{title}\n{person}",
                _vectors(scene.published, own),
                _vectors(views[name], own),
                _vectors(scene.probes, scene.people == label),
                {
                    other: _vectors(
                        scene.gallery, scene.others == study.split.identities.index(other)
                    )
                    for other in chosen
                },
            )
        )
        before, after, others = [], [], []
        cases = scores.galleries(scene, scores.enrol(scene, views[name], leak=0.0))
        for one, (table, labels) in zip(study.split.protected, cases, strict=True):
            number = study.split.identities.index(one.identity)
            rows = scene.people == number
            before.append(scene.to_published[rows][:, scene.owners == number].min(axis=1))
            after.append(table[:, labels == number].min(axis=1))
            others.append(table[:, labels != number].min(axis=1))
        parts = (np.concatenate(part) for part in (before, after, others))
        found.append(plots.Distances(title, *parts, scene.extractor.threshold))
    plots.plot_embeddings(folder / "embeddings.png", clouds)
    plots.plot_distances(folder / "distances.png", found)


def _vectors(views: Views, rows: np.ndarray) -> np.ndarray:
    return views.vectors[rows & views.found]
