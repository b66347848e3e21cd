"""Scores of published photos: whom does a tracker take clean probes of the person for?

One person is protected at a time, all others are enrolled clean; only the linear head is trained
once for all protected people, with everybody's published photos as the cell has them. A probe is
protected if it is not identified as its person; probes without a face count as such in every cell
alike. A published photo without a face is not enrolled. Rates come with 95 % bootstrap intervals
over people.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from afr_jax.core import files
from afr_jax.evaluation.attackers import trackers
from afr_jax.evaluation.cloaking.cells import file_name
from afr_jax.evaluation.cloaking.embeddings import Embeddings
from afr_jax.evaluation.cloaking.people import Split
from afr_jax.evaluation.metrics import identification, intervals
from afr_jax.models.extractors import registry
from afr_jax.recognition import match

# A row of the table, as JSON and CSV have it.
Row = dict[str, files.Json]

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_RANKS = (1, 5, 50)


class CleanPhotos(NamedTuple):
    """What one extractor saw of all clean photos, and distances that all cells share.

    Attributes:
        split: who is who.
        name: of the extractor, as it was asked for.
        extractor: its conventions.
        published: the protected people's published photos before any protection.
        probes: their probes.
        gallery: everybody else's photos.
        to_published: `[Q, M]` distances of probes to published photos, infinite without a face.
        to_gallery: `[Q, G]`.
        head: linear head on published and gallery photos, all clean.
    """

    split: Split
    name: str
    extractor: registry.Extractor
    published: Embeddings
    probes: Embeddings
    gallery: Embeddings
    to_published: np.ndarray
    to_gallery: np.ndarray
    head: trackers.Head

    @property
    def people(self) -> np.ndarray:
        """`[Q]` int labels of the probes' people."""
        return self.split.labels(self.split.probes)

    @property
    def owners(self) -> np.ndarray:
        """`[M]` int labels of the published photos' people."""
        return self.split.labels(self.split.published)

    @property
    def others(self) -> np.ndarray:
        """`[G]` int labels of the gallery's photos."""
        return self.split.labels(list(self.split.gallery))


class Mix(NamedTuple):
    """How many photos of a protected person a tracker has; written `10+5`, or `10` without clean.

    Attributes:
        cloaked: the person's first published photos, as they are published.
        clean: the person's last published photos, as they were.
    """

    cloaked: int
    clean: int = 0

    def __str__(self) -> str:
        """As tables have it: 10+5."""
        return f"{self.cloaked}+{self.clean}"


class Exposure(NamedTuple):
    """What a tracker has of the protected people's published photos: by default all, as published.

    Attributes:
        leak: share of them of which the tracker has the clean original instead.
        mix: how many of each person's it has; None for all.
    """

    leak: float = 0.0
    mix: Mix | None = None


ALL = Exposure()


class Enrollment(NamedTuple):
    """The published photos as a tracker has them.

    Attributes:
        vectors: `[M, D]`.
        has: `[M]` bool, which of them it has.
        found: `[M]` bool, in which of these it found a face.
        distances: `[Q, M]` of the probes, infinite where not found.
        leaked: `[M]` bool, which of them are clean.
    """

    vectors: np.ndarray
    has: np.ndarray
    found: np.ndarray
    distances: np.ndarray
    leaked: np.ndarray


def compare_clean(
    split: Split,
    name: str,
    extractor: registry.Extractor,
    published: Embeddings,
    probes: Embeddings,
    gallery: Embeddings,
) -> CleanPhotos:
    """What one extractor saw of the clean photos, from its embeddings; see `CleanPhotos`."""
    clean = CleanPhotos(
        split,
        name,
        extractor,
        published,
        probes,
        gallery,
        distances(probes, published, extractor.metric),
        distances(probes, gallery, extractor.metric),
        trackers.Head(np.zeros(0), np.zeros(0)),
    )
    return clean._replace(head=_fit(clean, published.vectors, published.found, None))


def distances(probes: Embeddings, enrolled: Embeddings, metric: str) -> np.ndarray:
    """`[Q, N]` float64, infinite where either photo has no face."""
    table = np.full((len(probes.found), len(enrolled.found)), np.inf)
    rows, columns = probes.vectors[probes.found], enrolled.vectors[enrolled.found]
    table[np.ix_(probes.found, enrolled.found)] = match.pairwise(rows, columns, metric=metric)
    return table


def leaked_photos(count: int, share: float) -> np.ndarray:
    """Which of some photos are enrolled clean, `[count]` bool: the share, spread evenly.

    Photo i is one if the whole part of share * i rises with it, so that a share of 0.1 among five
    photos of each person is one photo of every other person.
    """
    steps = np.floor(share * np.arange(count + 1) + 1e-9)
    return np.diff(steps) > 0


def parse_mix(text: str) -> Mix:
    """Numbers of cloaked and clean photos, of "10+5", or of "10" for none clean.

    Raises:
        ValueError: it is neither, or no photo at all.
    """
    cloaked, plus, clean = text.partition("+")
    if not (cloaked.isdecimal() and (clean.isdecimal() or not plus)):
        raise ValueError(f"mixes must be like 10 or 10+5 (cloaked+clean photos), not {text!r}")
    mix = Mix(int(cloaked), int(clean or 0))
    if not sum(mix):
        raise ValueError(f"mixes must have a photo, {text!r} has none")
    return mix


def mixed_photos(people: np.ndarray, mix: Mix) -> tuple[np.ndarray, np.ndarray]:
    """Which photos a tracker has, and which of them clean, `[M]` bool each.

    Of a person with too few photos those of the mix that are clean come first.

    Args:
        people: `[M]` int, whose photos they are, in the order in which they are taken.
        mix: how many of each person.
    """
    seen, leaked = np.zeros(len(people), bool), np.zeros(len(people), bool)
    for person in np.unique(people):
        own = np.flatnonzero(people == person)
        leaked[own[len(own) - min(mix.clean, len(own)) :]] = True
        seen[own[: mix.cloaked]] = True
    return seen | leaked, leaked


def enroll(clean: CleanPhotos, protected: Embeddings, *, exposure: Exposure = ALL) -> Enrollment:
    """The published photos as a tracker has them: protected ones, clean ones, or none.

    Args:
        clean: what an extractor saw of the clean photos.
        protected: its embeddings of the published photos as they are in a cell.
        exposure: how many it has, and how many of these clean.
    """
    leaked = leaked_photos(len(protected.found), exposure.leak)
    has = np.ones(len(leaked), bool)
    if exposure.mix is not None:
        has, leaked = mixed_photos(clean.owners, exposure.mix)
    apart = distances(clean.probes, protected, clean.extractor.metric)
    return Enrollment(
        np.where(leaked[:, None], clean.published.vectors, protected.vectors),
        has,
        has & np.where(leaked, clean.published.found, protected.found),
        np.where(has[None], np.where(leaked[None], clean.to_published, apart), np.inf),
        leaked,
    )


def galleries(clean: CleanPhotos, enrollment: Enrollment) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each protected person: distances of the person's probes to all enrolled photos.

    The person's own photos are as the enrollment has them, those of other protected people clean.

    Returns:
        For each person `[q, M + G]`, columns as published and gallery photos, and `[M + G]` labels.
    """
    labels = np.concatenate([clean.owners, clean.others])
    found = []
    for person in _protected(clean.split):
        rows = clean.people == person
        own = np.where(clean.owners == person, enrollment.distances[rows], clean.to_published[rows])
        found.append((np.concatenate([own, clean.to_gallery[rows]], axis=1), labels))
    return found


def score(clean: CleanPhotos, protected: Embeddings, *, exposure: Exposure = ALL) -> list[Row]:
    """A row of scores for each kind of tracker.

    Args:
        clean: what an extractor saw of the clean photos.
        protected: its embeddings of the published photos as they are in a cell.
        exposure: see `enroll`.

    Returns:
        Dicts, see `row`; all with `enrolled`, `not_found` and `leaked`, numbers of published
        photos, and distances of probes to the nearest of the own photos (`own_distance`, quantiles;
        `own_distance_clean` for clean photos) and of others' (`other_distance`).
    """
    enrollment = enroll(clean, protected, exposure=exposure)
    answers: dict[str, list[np.ndarray]] = {kind: [] for kind in trackers.KINDS[:3]}
    ranks, own, own_clean, nearest = [], [], [], []
    limit = clean.extractor.threshold
    cases = galleries(clean, enrollment)
    for person, (table, labels) in zip(_protected(clean.split), cases, strict=True):
        answers["nearest"].append(trackers.nearest(table, labels))
        answers["nearest_threshold"].append(trackers.nearest(table, labels, threshold=limit))
        answers["knn_vote"].append(trackers.knn_vote(table, labels))
        met = identification.identification(
            table, np.full(len(table), person), np.zeros((0, len(labels))), labels
        )
        ranks.append(met.ranks)
        own.append(met.mates)
        rows = clean.people == person
        own_clean.append(clean.to_published[rows][:, clean.owners == person].min(axis=1))
        nearest.append(table[:, labels != person].min(axis=1, initial=np.inf))
    common = {
        "enrolled": int(enrollment.found.sum()),
        "not_found": int((enrollment.has & ~enrollment.found).sum()),
        "leaked": int(enrollment.leaked.sum()),
        "own_distance": _quantiles(own),
        "own_distance_clean": _quantiles(own_clean),
        "other_distance": _quantiles(nearest),
    }
    scored = [
        row(kind, np.concatenate(found), clean.people, np.concatenate(ranks)) | common
        for kind, found in answers.items()
    ]
    guesses, head_ranks = _ask_head(clean, enrollment)
    return [*scored, row("linear_head", guesses, clean.people, head_ranks) | common]


def row(kind: str, answers: np.ndarray, people: np.ndarray, ranks: np.ndarray | None) -> Row:
    """The scores of one tracker.

    Args:
        kind: name of the tracker.
        answers: `[Q]` int, whom it takes each probe for.
        people: `[Q]` int, who they are.
        ranks: `[Q]` of the true person, 1 is best; None where not known.

    Returns:
        `tracker`; `protection`, the share of probes that are not identified, with `low` and `high`;
        numbers of `people` and `probes`; `rank_median` and the shares of probes whose person is
        among the first 1, 5 and 50.
    """
    missed = (answers != people).astype(np.float64)
    low, high = intervals.grouped_interval(missed, people)
    known = {} if ranks is None else {f"rank_{k}": float(np.mean(ranks <= k)) for k in _RANKS}
    return {
        "tracker": kind,
        "protection": float(missed.mean()),
        "low": low,
        "high": high,
        "people": len(np.unique(people)),
        "probes": len(people),
        "rank_median": None if ranks is None else float(np.median(ranks)),
        **known,
    }


def top_matches(clean: CleanPhotos, protected: Embeddings) -> list[Row]:
    """The nearest enrolled photo of every probe, as `DeepFace.find` lists them.

    Args:
        clean: what an extractor saw of the clean photos.
        protected: its embeddings of the published photos as they are in a cell.

    Returns:
        For each probe with a face: extractor, probe, person, rank, identity, image, distance,
        threshold, matched, and `person_rank`, at which the person is found.
    """
    samples = [*clean.split.published, *clean.split.gallery]
    probes = iter(clean.split.probes)
    found = []
    cases = galleries(clean, enroll(clean, protected))
    for person, (table, labels) in zip(_protected(clean.split), cases, strict=True):
        met = identification.identification(
            table, np.full(len(table), person), np.zeros((0, len(labels))), labels
        )
        for own, rank in zip(table, met.ranks, strict=True):
            probe, at = next(probes), int(np.argmin(own))
            if np.isfinite(own[at]):
                found.append(
                    {
                        "extractor": file_name(clean.name),
                        "probe": probe.sample_id,
                        "person": probe.identity,
                        "rank": 1,
                        "identity": samples[at].identity,
                        "image": samples[at].sample_id,
                        "distance": f"{own[at]:.6f}",
                        "threshold": f"{clean.extractor.threshold:.6g}",
                        "matched": int(own[at] < clean.extractor.threshold),
                        "person_rank": int(rank),
                    }
                )
    return found


def _protected(split: Split) -> list[int]:
    return [split.names.index(person.identity) for person in split.protected]


def _fit(
    clean: CleanPhotos, vectors: np.ndarray, found: np.ndarray, start: trackers.Head | None
) -> trackers.Head:
    """The linear head on published photos as given, and the clean gallery."""
    unit = match.unit_length(np.concatenate([vectors, clean.gallery.vectors]))
    labels = np.concatenate([clean.owners, clean.others])
    counted = np.concatenate([found, clean.gallery.found])
    count = len(clean.split.names)
    # From a start that knows the gallery 200 gave no other answers (LFW, MobileFaceNet).
    few = 60 if start is None else 20
    return trackers.fit_head(unit, labels, count, counted=counted, start=start, num_iterations=few)


def _ask_head(clean: CleanPhotos, enrollment: Enrollment) -> tuple[np.ndarray, np.ndarray]:
    """Answers `[Q]` and ranks of the true people `[Q]`."""
    start = trackers.without_classes(clean.head, np.array(_protected(clean.split)))
    head = _fit(clean, enrollment.vectors, enrollment.found, start)
    logits = head.logits(match.unit_length(clean.probes.vectors))
    own = logits[np.arange(len(logits)), clean.people]
    ranks = np.sum(logits >= own[:, None], axis=1)
    ranks = np.where(clean.probes.found, ranks, logits.shape[1] + 1)
    answers = np.where(clean.probes.found, np.argmax(logits, axis=1), trackers.NOBODY)
    return answers, ranks


def _quantiles(parts: Sequence[np.ndarray]) -> list[float] | None:
    """Of the finite ones, None where there are none."""
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    return np.quantile(values, _QUANTILES).tolist() if len(values) else None
