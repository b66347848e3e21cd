"""The table of an evaluation: every cell, countermeasure, extractor and tracker.

The clean photos are looked at once (`open_study`); a cell's photos once for each countermeasure
(`score_cell`). All of it is kept in the run's folder, so that more cells, extractors, trackers or
countermeasures cost only what is new.
"""

import csv
import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from afr_jax.core import files
from afr_jax.data import photos
from afr_jax.evaluation.attackers import tracker_training
from afr_jax.evaluation.cloaking import methods, scores
from afr_jax.evaluation.cloaking import views as cloaking_views
from afr_jax.evaluation.cloaking.methods import Cell
from afr_jax.evaluation.cloaking.split import Split
from afr_jax.evaluation.cloaking.views import Views
from afr_jax.recognition import chips, pipeline

TABLE_COLUMNS = (
    *("method", "surrogates", "budget", "countermeasure", "leak", "tracker", "extractor"),
    *("transfer", "protection", "low", "high", "people", "probes", "rank_median"),
    *("rank_1", "rank_5", "rank_50", "enrolled", "not_found", "leaked", "mean_dssim"),
    *("own_distance_median", "own_distance_clean_median", "other_distance_median"),
)
MATCH_COLUMNS = (
    *("extractor", "probe", "person", "rank", "identity", "image", "distance", "threshold"),
    *("matched", "person_rank"),
)


class Study(NamedTuple):
    """What all cells share.

    Attributes:
        split: who is who.
        recognizer: the detector, and the extractors that trackers use.
        scenes: what each of them saw of the clean photos, by name.
    """

    split: Split
    recognizer: pipeline.Recognizer
    scenes: dict[str, scores.Scene]


def open_study(split: Split, recognizer: pipeline.Recognizer, folder: pathlib.Path) -> Study:
    """Looks at the clean photos, unless that is done.

    Args:
        split: who is who.
        recognizer: the detector, and the extractors that trackers use.
        folder: where views are kept.

    Raises:
        ValueError: an extractor has no threshold.
    """
    samples = [*split.published, *split.probes, *split.gallery]
    views = cloaking_views.look(recognizer, [sample.path for sample in samples], folder)
    ends = np.cumsum([len(split.published), len(split.probes)])
    scenes = {}
    for name, extractor in recognizer.extractors.items():
        # Asked for here, so that a run does not end on it later.
        _ = extractor.threshold
        parts = [
            views[name].take(slice(start, end))
            for start, end in ((0, ends[0]), (ends[0], ends[1]), (ends[1], None))
        ]
        scenes[name] = scores.make_scene(split, name, extractor, *parts)
    return Study(split, recognizer, scenes)


def without_faces(study: Study) -> list[str]:
    """Ids of the clean photos in which no face was found."""
    scene = next(iter(study.scenes.values()))
    found = np.concatenate([scene.published.found, scene.probes.found, scene.gallery.found])
    samples = [*study.split.published, *study.split.probes, *study.split.gallery]
    return [sample.sample_id for sample, seen in zip(samples, found, strict=True) if not seen]


def cell_views(
    study: Study, cell: Cell, paths: Sequence[pathlib.Path], folder: pathlib.Path, change: str
) -> dict[str, Views]:
    """What every extractor sees of a cell's photos after a countermeasure.

    Args:
        study: what all cells share.
        cell: which one.
        paths: of its photos; not looked at for the method `none`, whose photos are the originals.
        folder: where views are kept.
        change: the countermeasure.
    """
    if cell.method == "none":
        if change == "none":
            return {name: scene.published for name, scene in study.scenes.items()}
        paths = [sample.path for sample in study.split.published]
    return cloaking_views.look(study.recognizer, paths, folder, countermeasure=change)


def score_cell(
    study: Study,
    cell: Cell,
    paths: Sequence[pathlib.Path],
    folder: pathlib.Path,
    *,
    countermeasures: Sequence[str],
    leaks: Sequence[float],
) -> list[dict[str, Any]]:
    """Rows of the table for one cell; leaks are scored without a countermeasure.

    Args:
        study: what all cells share.
        cell: which one.
        paths: of its photos.
        folder: where views are kept.
        countermeasures: after which no photo is leaked.
        leaks: shares of clean photos among the published ones, beside 0.

    Returns:
        Dicts as `scores.score` gives them, with the cell, countermeasure, leak and extractor;
        `transfer` says whether the extractor is none of the surrogates.
    """
    cases = [(change, 0.0) for change in countermeasures]
    cases += [("none", leak) for leak in leaks if leak > 0]
    rows = []
    for change, leak in cases:
        views = cell_views(study, cell, paths, folder, change)
        for name, scene in study.scenes.items():
            about = {
                "method": cell.method,
                "surrogates": _joined(cell),
                "budget": cell.budget,
                "countermeasure": change,
                "leak": leak,
                "extractor": methods.file_name(name),
                "transfer": name not in cell.surrogates if cell.surrogates else None,
            }
            rows += [about | found for found in scores.score(scene, views[name], leak=leak)]
    return rows


def end_to_end(
    study: Study,
    cell: Cell,
    paths: Sequence[pathlib.Path],
    folder: pathlib.Path,
    name: str,
    *,
    num_people: int,
    options: tracker_training.TrainingOptions,
    seed: int,
    report_fn: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """The row of a tracker that trains its whole network, for the first protected people.

    One network is trained for them all: their published photos are as the cell has them, everybody
    else's are clean; without countermeasure or leak.

    Args:
        study: what all cells share.
        cell: which one.
        paths: of its photos.
        folder: where views are kept.
        name: of the extractor that the training starts from.
        num_people: whose probes are asked about.
        options: of the training.
        seed: of the training.
        report_fn: as of `tracker_training.train`.
    """
    scene, split = study.scenes[name], study.split
    published = cell_views(study, cell, paths, folder, "none")[name]
    if cell.method == "none":
        paths = [sample.path for sample in split.published]
    asked = [split.identities.index(person.identity) for person in split.protected[:num_people]]
    is_asked = np.isin(scene.owners, asked)
    extractor = scene.extractor
    own = _cut(extractor, paths, published, is_asked)
    clean = _cut(extractor, [s.path for s in split.published], scene.published, ~is_asked)
    others = _cut(extractor, [s.path for s in split.gallery], scene.gallery, True)
    labels = [
        scene.owners[is_asked & published.found],
        scene.owners[~is_asked & scene.published.found],
        scene.others[scene.gallery.found],
    ]
    logits_fn = tracker_training.train(
        extractor,
        study.recognizer.variables[name],
        np.concatenate([own, clean, others]),
        np.concatenate(labels),
        len(split.identities),
        options=options,
        seed=seed,
        report_fn=report_fn,
    )
    is_probe = np.isin(scene.people, asked)
    seen = is_probe & scene.probes.found
    logits = logits_fn(_cut(extractor, [s.path for s in split.probes], scene.probes, is_probe))
    answers = np.full(len(scene.people), -1)
    ranks = np.full(len(scene.people), len(split.identities) + 1)
    answers[seen] = np.argmax(logits, axis=1)
    ranks[seen] = np.sum(logits >= logits[np.arange(len(logits)), scene.people[seen]][:, None], 1)
    return {
        "method": cell.method,
        "surrogates": _joined(cell),
        "budget": cell.budget,
        "countermeasure": "none",
        "leak": 0.0,
        "extractor": methods.file_name(name),
        "transfer": name not in cell.surrogates if cell.surrogates else None,
        "enrolled": int(published.found[is_asked].sum()),
        "not_found": int((~published.found[is_asked]).sum()),
        "leaked": 0,
        **scores.row("end_to_end", answers[is_probe], scene.people[is_probe], ranks[is_probe]),
    }


def write_table(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes `table.csv`: a line for each row, quantiles by their medians."""
    flat = []
    for row in rows:
        medians = {
            f"{name}_median": None if row.get(name) is None else row[name][2]
            for name in ("own_distance", "own_distance_clean", "other_distance")
        }
        flat.append({**row, **medians})
    write_csv(path, TABLE_COLUMNS, flat)


def write_matches(
    study: Study,
    cell: Cell,
    paths: Sequence[pathlib.Path],
    folder: pathlib.Path,
    path: pathlib.Path,
) -> None:
    """Writes the nearest enrolled photo of every probe for every extractor, unedited photos."""
    views = cell_views(study, cell, paths, folder, "none")
    rows = [
        found
        for name, scene in study.scenes.items()
        for found in scores.top_matches(scene, views[name])
    ]
    write_csv(path, MATCH_COLUMNS, rows)


def write_csv(
    path: pathlib.Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Writes some columns of rows as CSV; None is empty, floats have six digits."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = [row.get(column) for column in columns]
        writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])
    files.write_atomically(path, buffer.getvalue().encode(), overwrite=True)


def _joined(cell: Cell) -> str:
    return "+".join(methods.file_name(name) for name in cell.surrogates)


def _cut(extractor, paths, views, wanted) -> np.ndarray:
    """Chips `[N, S, S, 3]` of the wanted photos with a face."""
    side = extractor.input_px
    rows = np.flatnonzero(views.found & wanted)
    cut = [
        chips.extractor_chip(extractor, photos.read_photo(paths[i]).pixels, views.landmarks[i])
        for i in rows
    ]
    return np.stack(cut) if cut else np.zeros((0, side, side, 3), np.uint8)
