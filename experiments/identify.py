"""Measures identification on a folder of people: closed set and open set.

    python -m experiments.identify --data=lfw --extractors=dlib --workdir=out/identify

--data is a folder with a folder of photos for each person. People with at least --min_photos photos
are enrolled with half of them (drawn by --seed); their other photos are probes. People with a
single photo are strangers: probes of nobody who is enrolled. Every photo is detected once and
embedded by each extractor. A photo without a face is not enrolled, and as a probe it counts as
missed.

For each extractor: rank-1 and rank-5 (closed set), and the detection-and-identification rate at
1 % and 0.1 % false positive identifications (open set), with 95 % intervals (bootstrap over
people); `identification.png` has the curves. --extractors takes several names; --weights gives
files for those whose weights are not at hand, as NAME=FILE.

Expected on LFW (212 people enrolled, 300 strangers) with dlib: rank-1 0.98, 3 minutes on two CPU
cores. --toy takes 4 people and 4 strangers.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from afr_jax.core import program, progress, workdir
from afr_jax.data import identities
from afr_jax.evaluation.metrics import identification, intervals
from afr_jax.evaluation.report import figures
from afr_jax.models.extractors import registry
from afr_jax.recognition import match, pipeline

_DATA = flags.DEFINE_string("data", None, "folder with a folder of photos for each person")
_EXTRACTORS = flags.DEFINE_list(
    "extractors", ["dlib"], f"of {', '.join(registry.EXTRACTORS)}, or folders of trained ones"
)
_WEIGHTS = flags.DEFINE_list("weights", [], "weight files: NAME=FILE, or FILE for one extractor")
_METRIC = flags.DEFINE_enum(
    "metric", None, registry.METRICS, "how embeddings are compared; default: as each extractor's"
)
_MIN_PHOTOS = flags.DEFINE_integer("min_photos", 5, "photos of a person to be enrolled", 2)

_FPIRS = (1e-2, 1e-3)


class _Split(NamedTuple):
    """Photos as (path, person): enrolled, probes of the enrolled, probes of strangers."""

    gallery: list[tuple[pathlib.Path, str]]
    probes: list[tuple[pathlib.Path, str]]
    strangers: list[tuple[pathlib.Path, str]]


def identify_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    split = _split()
    try:
        weights = pipeline.parse_weights(_WEIGHTS.value, _EXTRACTORS.value)
        recognizer = pipeline.load(_EXTRACTORS.value, weights=weights)
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(str(error)) from error
    work = workdir.open_workdir(
        flags.FLAGS.workdir or "out/identify",
        {
            "data": _DATA.value,
            "extractors": _EXTRACTORS.value,
            "metric": _METRIC.value,
            "min_photos": _MIN_PHOTOS.value,
            "seed": flags.FLAGS.seed,
            "toy": flags.FLAGS.toy,
        },
    )
    photos = [pair for part in split for pair in part]
    found = pipeline.recognize(recognizer, [path for path, _ in photos])
    found = list(progress.track(found, description="photos", total=len(photos)))
    root = pathlib.Path(_DATA.value).resolve()
    problems = [
        {"image": item.path.relative_to(root), "reason": item.problem}
        for item in found
        if item.problem
    ]
    rows, curves = [], {}
    for name, extractor in recognizer.extractors.items():
        metric = _METRIC.value or extractor.metric
        scores = _scores(split, [item.embeddings[name] for item in found], metric)
        curves[name] = identification.rate_curve(scores)
        rows.append({"extractor": name, "metric": metric, **_row(scores, split)})
    provenance = program.provenance("experiments.identify")
    result = {
        **provenance,
        "people_enrolled": len({person for _, person in split.gallery}),
        "photos_enrolled": len(split.gallery),
        "probes": len(split.probes),
        "strangers": len(split.strangers),
        "rows": rows,
        "not_handled": problems,
    }
    _plot(work.path / "identification.png", curves)
    work.write_result(result)
    return result, program.EXIT_PARTIAL if problems else program.EXIT_OK


def _split() -> _Split:
    if not _DATA.value:
        raise program.UsageError(
            "--data is needed: a folder with a folder of photos for each person"
        )
    try:
        listing = identities.list_tree(_DATA.value)
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(f"--data: {error}") from error
    people: dict[str, list[pathlib.Path]] = {}
    for sample in listing.samples:
        people.setdefault(sample.identity, []).append(sample.path)
    known = [name for name in sorted(people) if len(people[name]) >= _MIN_PHOTOS.value]
    single = [name for name in sorted(people) if len(people[name]) == 1]
    if flags.FLAGS.toy:
        known, single = known[:4], single[:4]
    if not known or not single:
        raise program.UsageError(
            f"--data={_DATA.value} has {len(known)} people with {_MIN_PHOTOS.value} photos or more "
            f"and {len(single)} with a single one: both are needed"
        )
    rng = np.random.default_rng(flags.FLAGS.seed)
    split = _Split([], [], [(people[name][0], name) for name in single])
    for name in known:
        order = rng.permutation(len(people[name]))
        half = len(order) // 2
        split.gallery.extend((people[name][i], name) for i in sorted(order[:half]))
        split.probes.extend((people[name][i], name) for i in sorted(order[half:]))
    return split


def _scores(split, embeddings, metric) -> identification.Identification:
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

    def distances(parts):
        table = np.full((len(parts), len(gallery)), np.inf)
        seen = np.array([len(vectors) > 0 for vectors in parts])
        table[np.ix_(seen, enrolled)] = match.pairwise(np.concatenate(parts), rows, metric=metric)
        return table

    probe_labels = np.array([number[person] for _, person in split.probes])
    return identification.identification(
        distances(probes), probe_labels, distances(strangers), labels
    )


def _row(scores: identification.Identification, split: _Split) -> dict[str, Any]:
    people = [person for _, person in split.probes]
    hits = (scores.ranks == 1).astype(np.float64)
    row: dict[str, Any] = {
        "rank_1": identification.rank_rate(scores, 1),
        "rank_1_interval": intervals.grouped_interval(hits, people),
        "rank_5": identification.rank_rate(scores, 5),
    }
    for fpir in _FPIRS:
        threshold = identification.threshold_at_fpir(scores, fpir)
        found = (hits > 0) & (scores.mates < threshold)
        row[f"dir_at_fpir_{fpir:g}"] = identification.identification_rate(scores, fpir)
        row[f"dir_at_fpir_{fpir:g}_interval"] = intervals.grouped_interval(found, people)
        row[f"threshold_at_fpir_{fpir:g}"] = threshold
    return row


def _plot(path: pathlib.Path, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    figure, axes = figures.pyplot().subplots(figsize=(5, 4), layout="constrained")
    for name, (fpir, rate) in curves.items():
        axes.step(np.maximum(fpir, 1e-3), rate, where="post", label=name)
    axes.set(xscale="log", xlim=(2e-3, 1), ylim=(0, 1.01))
    axes.set(xlabel="false positive identification rate", ylabel="identification rate (DIR)")
    axes.grid(alpha=0.3)
    axes.legend()
    figures.save(figure, path)


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(identify_program)
