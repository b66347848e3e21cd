"""The table of an evaluation: every cell, countermeasure, extractor and tracker.

Clean photos are embedded once (`prepare`), a cell's photos once for each countermeasure, and every
case is scored once: all of it is kept in the run's folder, so that more cells, extractors or
countermeasures cost only what is new.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from afr_jax.core import files, workdir
from afr_jax.data import photos
from afr_jax.evaluation.attackers import tracker_names, tracker_training
from afr_jax.evaluation.cloaking import embeddings, scores
from afr_jax.evaluation.cloaking.cells import CloakCell, file_name
from afr_jax.evaluation.cloaking.embeddings import Embeddings
from afr_jax.evaluation.cloaking.people import Split
from afr_jax.models.extractors import registry
from afr_jax.recognition import chips, pipeline

# Medians over the photos of a cell, as their records have them.
VISIBILITY = (
    "ssimulacra2",
    "ciede2000_mean",
    "ciede2000_p99",
    "chroma",
    "iris_chroma",
    "flip",
    "lpips",
)
TABLE_COLUMNS = (
    *("method", "surrogates", "budget", "countermeasure", "leak", "mix", "tracker", "extractor"),
    *("transfer", "protection", "low", "high", "people", "probes", "rank_median"),
    *("rank_1", "rank_5", "rank_50", "enrolled", "not_found", "leaked", "mean_dssim", *VISIBILITY),
    *("own_distance_median", "own_distance_clean_median", "other_distance_median"),
)
MATCH_COLUMNS = (
    *("extractor", "probe", "person", "rank", "identity", "image", "distance", "threshold"),
    *("matched", "person_rank"),
)


class Setup(NamedTuple):
    """What all cells share.

    Attributes:
        split: who is who.
        recognizer: the detector, and the extractors that trackers use.
        clean: what each of them saw of the clean photos, by name.
    """

    split: Split
    recognizer: pipeline.Recognizer
    clean: dict[str, scores.CleanPhotos]


class CellPhotos(NamedTuple):
    """A cell with its photos.

    Attributes:
        cell: which one.
        paths: of its photos, person by person; not read for the method `none`, whose photos are the
            originals.
        folder: of all that is kept of the cell.
    """

    cell: CloakCell
    paths: list[pathlib.Path]
    folder: pathlib.Path


def prepare(split: Split, recognizer: pipeline.Recognizer, folder: pathlib.Path) -> Setup:
    """Embeds the clean photos, unless that is done.

    Args:
        split: who is who.
        recognizer: the detector, and the extractors that trackers use.
        folder: where embeddings are kept.

    Raises:
        ValueError: an extractor has no threshold.
    """
    samples = [*split.published, *split.probes, *split.gallery]
    found = embeddings.embed_photos(recognizer, [sample.path for sample in samples], folder)
    ends = np.cumsum([len(split.published), len(split.probes)])
    clean = {}
    for name, extractor in recognizer.extractors.items():
        # Asked for here, so that a run does not end on it later.
        _ = extractor.threshold
        parts = [
            found[name].take(slice(start, end))
            for start, end in ((0, ends[0]), (ends[0], ends[1]), (ends[1], None))
        ]
        clean[name] = scores.compare_clean(split, name, extractor, *parts)
    return Setup(split, recognizer, clean)


def without_faces(setup: Setup) -> list[str]:
    """Ids of the clean photos in which no face was found."""
    one = next(iter(setup.clean.values()))
    found = np.concatenate([one.published.found, one.probes.found, one.gallery.found])
    samples = [*setup.split.published, *setup.split.probes, *setup.split.gallery]
    return [sample.sample_id for sample, seen in zip(samples, found, strict=True) if not seen]


def cell_embeddings(setup: Setup, photos_of: CellPhotos, change: str) -> dict[str, Embeddings]:
    """What every extractor sees of a cell's photos after a countermeasure.

    Args:
        setup: what all cells share.
        photos_of: the cell.
        change: the countermeasure.
    """
    paths = photos_of.paths
    if photos_of.cell.method == "none":
        if change == "none":
            return {name: clean.published for name, clean in setup.clean.items()}
        paths = [sample.path for sample in setup.split.published]
    return embeddings.embed_photos(
        setup.recognizer, paths, photos_of.folder / "embeddings", countermeasure=change
    )


def score_cell(
    setup: Setup,
    photos_of: CellPhotos,
    *,
    countermeasures: Sequence[str],
    leaks: Sequence[float],
    mixes: Sequence[scores.Mix] = (),
) -> list[scores.Row]:
    """Rows of the table for one cell; leaks and mixes are scored without a countermeasure.

    Args:
        setup: what all cells share.
        photos_of: the cell.
        countermeasures: after which no photo is leaked.
        leaks: shares of clean photos among the published ones, beside 0.
        mixes: numbers of photos of each person that the tracker has, beside all.

    Returns:
        Dicts as `scores.score` gives them, with the cell, countermeasure, leak, mix and extractor;
        `transfer` says whether the extractor is none of the surrogates.
    """
    cases = [(change, scores.ALL) for change in countermeasures]
    cases += [("none", scores.Exposure(leak=leak)) for leak in leaks if leak > 0]
    cases += [("none", scores.Exposure(mix=mix)) for mix in mixes]
    rows: list[scores.Row] = []
    for change, exposure in cases:
        for name, clean in setup.clean.items():

            def score(
                change: str = change,
                exposure: scores.Exposure = exposure,
                name: str = name,
                clean: scores.CleanPhotos = clean,
            ) -> list[scores.Row]:
                seen = cell_embeddings(setup, photos_of, change)[name]
                about = _about(photos_of.cell, name, change, exposure)
                return [about | found for found in scores.score(clean, seen, exposure=exposure)]

            amount = f"{exposure.leak:g}" if exposure.mix is None else str(exposure.mix)
            kept = f"{change}-{amount}-{file_name(name)}.json"
            rows += workdir.load_or_compute(photos_of.folder / "scores" / kept, score)
    return rows


def end_to_end(
    setup: Setup,
    photos_of: CellPhotos,
    name: str,
    *,
    num_people: int,
    options: tracker_training.TrainingOptions,
    seed: int,
    report_fn: Callable[[int], None] | None = None,
) -> scores.Row:
    """The row of a tracker that trains its whole network, for the first protected people.

    One network is trained for them all: their published photos are as the cell has them, everybody
    else's are clean; without countermeasure or leak.

    Args:
        setup: what all cells share.
        photos_of: the cell.
        name: of the extractor that the training starts from.
        num_people: whose probes are asked about.
        options: of the training.
        seed: of the training.
        report_fn: as of `tracker_training.train`.
    """
    clean, split = setup.clean[name], setup.split
    published = cell_embeddings(setup, photos_of, "none")[name]
    paths = photos_of.paths
    if photos_of.cell.method == "none":
        paths = [sample.path for sample in split.published]
    asked = [split.names.index(person.identity) for person in split.protected[:num_people]]
    is_asked = np.isin(clean.owners, asked)
    extractor = clean.extractor
    own = _cut(extractor, paths, published, is_asked)
    unasked = _cut(extractor, [s.path for s in split.published], clean.published, ~is_asked)
    others = _cut(extractor, [s.path for s in split.gallery], clean.gallery, clean.gallery.found)
    labels = [
        clean.owners[is_asked & published.found],
        clean.owners[~is_asked & clean.published.found],
        clean.others[clean.gallery.found],
    ]
    logits_fn = tracker_training.train(
        extractor,
        setup.recognizer.variables[name],
        np.concatenate([own, unasked, others]),
        np.concatenate(labels),
        len(split.names),
        options=options,
        seed=seed,
        report_fn=report_fn,
    )
    is_probe = np.isin(clean.people, asked)
    seen = is_probe & clean.probes.found
    logits = logits_fn(_cut(extractor, [s.path for s in split.probes], clean.probes, is_probe))
    answers = np.full(len(clean.people), -1)
    ranks = np.full(len(clean.people), len(split.names) + 1)
    answers[seen] = np.argmax(logits, axis=1)
    ranks[seen] = np.sum(logits >= logits[np.arange(len(logits)), clean.people[seen]][:, None], 1)
    return {
        **_about(photos_of.cell, name, "none", scores.ALL),
        "enrolled": int(published.found[is_asked].sum()),
        "not_found": int((~published.found[is_asked]).sum()),
        "leaked": 0,
        **scores.row("end_to_end", answers[is_probe], clean.people[is_probe], ranks[is_probe]),
    }


def write_table(path: pathlib.Path, rows: Sequence[scores.Row]) -> None:
    """Writes `table.csv`: a line for each row, quantiles by their medians."""
    flat = []
    for row in rows:
        medians = {
            f"{name}_median": None if row.get(name) is None else row[name][2]
            for name in ("own_distance", "own_distance_clean", "other_distance")
        }
        flat.append({**row, **medians})
    write_columns(path, TABLE_COLUMNS, flat)


def write_matches(path: pathlib.Path, setup: Setup, photos_of: CellPhotos) -> None:
    """Writes the nearest enrolled photo of every probe for every extractor, unedited photos."""
    seen = cell_embeddings(setup, photos_of, "none")
    rows = [
        found
        for name, clean in setup.clean.items()
        for found in scores.top_matches(clean, seen[name])
    ]
    write_columns(path, MATCH_COLUMNS, rows)


def write_columns(
    path: pathlib.Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]
) -> None:
    """Writes some columns of rows as CSV; None is empty, floats have six digits."""
    values = [[row.get(column) for column in columns] for row in rows]
    short = [[f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in values]
    files.write_csv(path, columns, short)


def _about(cell: CloakCell, name: str, change: str, exposure: scores.Exposure) -> scores.Row:
    return {
        "method": cell.method,
        "surrogates": cell.surrogate_names,
        "budget": cell.budget,
        "countermeasure": change,
        "leak": exposure.leak,
        "mix": None if exposure.mix is None else str(exposure.mix),
        "extractor": file_name(name),
        "transfer": (
            tracker_names.parse(name).extractor not in cell.surrogates if cell.surrogates else None
        ),
    }


def _cut(
    extractor: registry.Extractor,
    paths: Sequence[pathlib.Path],
    seen: Embeddings,
    wanted: np.ndarray,
) -> np.ndarray:
    """Chips `[N, S, S, 3]` of the wanted photos with a face."""
    side = extractor.input_px
    rows = np.flatnonzero(seen.found & wanted)
    cut = [
        chips.extractor_chip(extractor, photos.read_photo(paths[i]).pixels, seen.landmarks[i])
        for i in rows.tolist()
    ]
    return np.stack(cut) if cut else np.zeros((0, side, side, 3), np.uint8)
