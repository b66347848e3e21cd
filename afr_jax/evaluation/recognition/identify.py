"""Face identification on a folder of people: closed set and open set."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from afr_jax.core import distributed, options, program, progress, workdir
from afr_jax.data import identities
from afr_jax.evaluation.metrics import identification, intervals
from afr_jax.evaluation.report import figures
from afr_jax.models.extractors import registry
from afr_jax.recognition import match, pipeline, shared_options

_FPIRS = (1e-2, 1e-3)

# Figures of an extractor by name; intervals are (low, high).
Row = Mapping[str, str | float | tuple[float, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdentifyConfig(options.Config):
    """Measures identification on a folder of people: closed set and open set.

        python -m experiments.identify --data=lfw --extractors=dlib --workdir=out/identify

    --data is a folder with a folder of photos for each person. People with at least --min_photos
    photos are enrolled with half of them (drawn by --seed); their other photos are probes. People
    with a single photo are strangers: probes of nobody who is enrolled. Every photo is detected
    once and embedded by each extractor. A photo without a face is not enrolled, and as a probe it
    counts as missed.

    For each extractor: rank-1 and rank-5 (closed set), and the detection-and-identification rate at
    1 % and 0.1 % false positive identifications (open set), with 95 % intervals (bootstrap over
    people); `identification.png` has the curves. --extractors takes several names; --weights gives
    files for those whose weights are not at hand, as NAME=FILE. `kept/` holds what was found in
    groups of photos, so that a killed run goes on where it was.

    --toy takes 4 people and 4 strangers.
    """

    shares_work = True

    data: str | None = options.option(None, "folder with a folder of photos for each person")
    recognition: shared_options.ExtractorsOptions = options.group(shared_options.ExtractorsOptions)
    metric: str | None = options.option(
        None,
        "how embeddings are compared; default: as each extractor's",
        choices=tuple(registry.METRICS),
    )
    min_photos: int = options.option(5, "photos of a person to be enrolled", at_least=2)
    max_people: int = options.option(
        0, "enroll the first so many, and as many strangers; 0: all", at_least=0
    )
    workdir: str | None = options.option("out/identify", options.WORKDIR_HELP)

    def toy(self) -> "IdentifyConfig":
        """Four people and four strangers."""
        return dataclasses.replace(self, max_people=min(self.max_people or 4, 4))


class IdentificationSplit(NamedTuple):
    """Photos as (path, person): enrolled, probes of the enrolled, probes of strangers."""

    gallery: list[tuple[pathlib.Path, str]]
    probes: list[tuple[pathlib.Path, str]]
    strangers: list[tuple[pathlib.Path, str]]

    @property
    def paths(self) -> list[pathlib.Path]:
        """Of all photos, in this order."""
        return [path for part in self for path, _ in part]


class IdentificationReport(NamedTuple):
    """How well extractors identify the people of a folder.

    Attributes:
        split: who was enrolled, and who was looked for.
        rows: rates with their intervals, for each extractor.
        curves: FPIR and DIR over all thresholds (`identification.rate_curve`), by extractor.
        problems: photos without a face, with the reason.
    """

    split: IdentificationSplit
    rows: tuple[Row, ...]
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]]
    problems: tuple[tuple[pathlib.Path, str], ...]

    def save_plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the curves."""
        figure, axes = figures.pyplot().subplots(figsize=(5, 4), layout="constrained")
        for name, (fpir, rate) in self.curves.items():
            axes.step(np.maximum(fpir, 1e-3), rate, where="post", label=name)
        axes.set(xscale="log", xlim=(2e-3, 1), ylim=(0, 1.01))
        axes.set(xlabel="false positive identification rate", ylabel="identification rate (DIR)")
        axes.grid(alpha=0.3)
        axes.legend()
        figures.save(figure, pathlib.Path(path))


def run(config: IdentifyConfig) -> options.Outcome:
    """Splits the people of a folder, enrolls and probes, and writes rates and curves.

    Raises:
        options.UsageError: no data, people missing, an unknown extractor or weights.
    """
    if not config.data:
        raise options.UsageError(
            "--data is needed: a folder with a folder of photos for each person"
        )
    with options.usage(f"--data={config.data}"):
        split = split_people(
            config.data,
            min_photos=config.min_photos,
            max_people=config.max_people,
            seed=config.seed,
        )
    recognizer = config.recognition.load()
    work = workdir.open_workdir(config.workdir, config)
    kept = work.path / "kept"
    pipeline.share(recognizer, split.paths, kept=kept)
    if not distributed.is_primary():
        return options.Outcome({})
    with distributed.alone():
        report = identify_split(recognizer, split, metric=config.metric, kept=kept)
    root = pathlib.Path(config.data).resolve()
    result = {
        **program.provenance("experiments.identify", config=config),
        "people_enrolled": len({person for _, person in split.gallery}),
        "photos_enrolled": len(split.gallery),
        "probes": len(split.probes),
        "strangers": len(split.strangers),
        "rows": report.rows,
        "not_handled": [
            {"image": path.relative_to(root), "reason": reason} for path, reason in report.problems
        ],
    }
    report.save_plot(work.path / "identification.png")
    work.write_result(result)
    return options.Outcome(result, complete=not report.problems)


def identify(
    recognizer: pipeline.Recognizer,
    data: str | os.PathLike[str],
    *,
    metric: str | None = None,
    min_photos: int = 5,
    seed: int = 0,
) -> IdentificationReport:
    """Measures closed- and open-set identification on a folder with a folder for each person.

    Args:
        recognizer: from `pipeline.load_recognizer`.
        data: the folder.
        metric: one of `registry.METRICS`; each extractor's own by default.
        min_photos: photos of a person to be enrolled; people with one photo are strangers.
        seed: of the draw of enrolled photos.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it has nobody to enroll, or no strangers.
    """
    split = split_people(data, min_photos=min_photos, seed=seed)
    return identify_split(recognizer, split, metric=metric)


def split_people(
    data: str | os.PathLike[str], *, min_photos: int = 5, max_people: int = 0, seed: int = 0
) -> IdentificationSplit:
    """Draws half of the photos of each person for the gallery; the others are probes.

    Args:
        data: folder with a folder of photos for each person.
        min_photos: photos of a person to be enrolled; people with one photo are strangers.
        max_people: the first so many by name, of either kind; 0 for all.
        seed: of the draws.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it has nobody to enroll, or no strangers.
    """
    people: dict[str, list[pathlib.Path]] = {}
    for sample in identities.list_tree(data).samples:
        people.setdefault(sample.identity, []).append(sample.path)
    known = [name for name in sorted(people) if len(people[name]) >= min_photos]
    single = [name for name in sorted(people) if len(people[name]) == 1]
    known, single = known[: max_people or None], single[: max_people or None]
    if not known or not single:
        raise ValueError(
            f"{len(known)} people with {min_photos} photos or more and {len(single)} with a single "
            "one: both are needed"
        )
    rng = np.random.default_rng(seed)
    split = IdentificationSplit([], [], [(people[name][0], name) for name in single])
    for name in known:
        order = rng.permutation(len(people[name]))
        half = len(order) // 2
        split.gallery.extend((people[name][i], name) for i in sorted(order[:half]))
        split.probes.extend((people[name][i], name) for i in sorted(order[half:]))
    return split


def identify_split(
    recognizer: pipeline.Recognizer,
    split: IdentificationSplit,
    *,
    metric: str | None = None,
    kept: str | os.PathLike[str] | None = None,
) -> IdentificationReport:
    """Measures identification on people who are split already; see `identify`.

    Args:
        recognizer: from `pipeline.load_recognizer`.
        split: who is enrolled, and who is looked for.
        metric: one of `registry.METRICS`; each extractor's own by default.
        kept: as of `pipeline.recognize`.
    """
    sources = split.paths
    found = list(
        progress.track(
            pipeline.recognize(recognizer, sources, kept=kept),
            description="photos",
            total=len(sources),
        )
    )
    rows, curves = [], {}
    for name, extractor in recognizer.extractors.items():
        own = metric or extractor.metric
        scores = _scores(split, [item.embeddings[name] for item in found], own)
        curves[name] = identification.rate_curve(scores)
        rows.append({"extractor": name, "metric": own, **_row(scores, split)})
    problems = [
        (path, item.problem) for path, item in zip(sources, found, strict=True) if item.problem
    ]
    return IdentificationReport(split, tuple(rows), curves, tuple(problems))


def _scores(
    split: IdentificationSplit, embeddings: Sequence[np.ndarray], metric: str
) -> identification.Identification:
    """What the probes met; photos without a face are as far as can be."""
    ends = np.cumsum([len(part) for part in split])
    gallery, probes, strangers = (
        embeddings[end - len(part) : end] for part, end in zip(split, ends, strict=True)
    )
    names = sorted({person for _, person in split.gallery})
    number = {name: index for index, name in enumerate(names)}
    labels = np.array([number[person] for _, person in split.gallery])
    enrolled = np.array([len(vectors) > 0 for vectors in gallery])
    rows = np.concatenate(gallery)

    def distances(parts: Sequence[np.ndarray]) -> np.ndarray:
        table = np.full((len(parts), len(gallery)), np.inf)
        seen = np.array([len(vectors) > 0 for vectors in parts])
        table[np.ix_(seen, enrolled)] = match.pairwise(np.concatenate(parts), rows, metric=metric)
        return table

    probe_labels = np.array([number[person] for _, person in split.probes])
    return identification.identification(
        distances(probes), probe_labels, distances(strangers), labels
    )


def _row(scores: identification.Identification, split: IdentificationSplit) -> Row:
    people, strangers = ([name for _, name in part] for part in (split.probes, split.strangers))
    hits = (scores.ranks == 1).astype(np.float64)
    row: dict[str, str | float | tuple[float, float]] = {
        "rank_1": identification.rank_rate(scores, 1),
        "rank_1_interval": intervals.grouped_interval(hits, people),
        "rank_5": identification.rank_rate(scores, 5),
    }
    for fpir in _FPIRS:
        row[f"dir_at_fpir_{fpir:g}"] = identification.identification_rate(scores, fpir)
        row[f"dir_at_fpir_{fpir:g}_interval"] = identification.identification_interval(
            scores, people, strangers, fpir
        )
        row[f"threshold_at_fpir_{fpir:g}"] = identification.threshold_at_fpir(scores, fpir)
    return row
