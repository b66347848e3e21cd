"""Scores of face identification, closed set and open set.

Closed set: every probe's person is enrolled; the score is the rank at which the person is found.
Open set: some probes show nobody who is enrolled; a detector threshold trades false positive
identifications against misses (Grother et al., NIST FRVT part 2, IR 8271: FPIR and TPIR, the latter
also called the detection and identification rate, DIR). Float64 NumPy on the host; the inputs are
distances, smaller is more alike.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Identification(NamedTuple):
    """What P probes of enrolled people and U probes of unknown people met in a gallery.

    Attributes:
        ranks: `[P]` rank of the person's own nearest face among all people, 1 is best.
        mates: `[P]` distance to the person's own nearest face.
        nearest: `[P]` distance to the nearest face of anybody.
        strangers: `[U]` distance of an unknown person's probe to the nearest face of anybody.
    """

    ranks: np.ndarray
    mates: np.ndarray
    nearest: np.ndarray
    strangers: np.ndarray


def identification(
    known: np.ndarray, known_labels: np.ndarray, strangers: np.ndarray, gallery_labels: np.ndarray
) -> Identification:
    """Reduces distances to what the scores need.

    A person is as far as the nearest of the person's enrolled faces. A probe without a face has
    infinite distances: it is found at no rank, and is never identified.

    Args:
        known: `[P, N]` distances of probes of enrolled people to the gallery's N faces.
        known_labels: `[P]` int, who they are.
        strangers: `[U, N]` distances of probes of people who are not enrolled.
        gallery_labels: `[N]` int.

    Raises:
        ValueError: a probe's person has no face in the gallery, or the shapes do not fit.
    """
    known, strangers = np.asarray(known, np.float64), np.asarray(strangers, np.float64)
    known_labels, gallery_labels = np.asarray(known_labels), np.asarray(gallery_labels)
    people, member = np.unique(gallery_labels, return_inverse=True)
    expected = len(known_labels), len(gallery_labels)
    if known.shape != expected or strangers.shape[1:] != expected[1:]:
        raise ValueError(f"distances {known.shape} and {strangers.shape}, expected {expected}")
    if absent := sorted(set(known_labels.tolist()) - set(people.tolist())):
        raise ValueError(f"probes of people who are not enrolled: {absent[:5]}")
    to_people = np.full((len(known), len(people)), np.inf)
    for person in range(len(people)):
        to_people[:, person] = known[:, member == person].min(axis=1, initial=np.inf)
    own = to_people[np.arange(len(known)), np.searchsorted(people, known_labels)]
    # A tie with somebody else counts against the person.
    ranks = np.sum(to_people <= own[:, None], axis=1)
    ranks = np.where(np.isfinite(own), ranks, len(people) + 1)
    return Identification(
        ranks,
        own,
        to_people.min(axis=1, initial=np.inf),
        strangers.min(axis=1, initial=np.inf),
    )


def rank_rate(found: Identification, rank: int) -> float:
    """Closed set: share of probes whose person is among the `rank` nearest people."""
    return float(np.mean(found.ranks <= rank))


def threshold_at_fpir(found: Identification, fpir: float) -> float:
    """Largest threshold at which the share of strangers nearer than it is at most `fpir`."""
    strangers = np.sort(found.strangers)
    allowed = int(np.floor(fpir * len(strangers) + 1e-9))
    return float(strangers[allowed]) if allowed < len(strangers) else float("inf")


def identification_rate(found: Identification, fpir: float) -> float:
    """Open set: DIR at a false positive identification rate.

    The share of known probes that are nearest to their own person, below the threshold at which at
    most the share `fpir` of the strangers comes nearer to anybody.
    """
    return rate_at_threshold(found, threshold_at_fpir(found, fpir))[0]


def identification_interval(
    found: Identification,
    people: Sequence[str],
    strangers: Sequence[str],
    fpir: float,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of `identification_rate`.

    The enrolled people and the strangers are drawn anew, each with all their probes; the threshold
    is that of the strangers that were drawn, so that the few who decide it count.

    Args:
        found: P and U probes.
        people: `[P]` who is on the probes of the enrolled.
        strangers: `[U]` who is on the others.
        fpir: of the threshold.
        confidence: the coverage, in (0, 1).
        num_resamples: how often people are drawn.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        (low, high).
    """
    generator = np.random.default_rng(seed)
    order = np.argsort(found.strangers, kind="stable")
    distances = found.strangers[order]
    members = [np.unique(names, return_inverse=True)[1] for names in (people, strangers)]

    def weights(member: np.ndarray) -> np.ndarray:
        count = member.max() + 1
        return np.bincount(generator.integers(count, size=count), minlength=count)[member]

    rates = np.empty(num_resamples)
    for number in range(num_resamples):
        own, others = weights(members[0]), np.cumsum(weights(members[1])[order])
        at = np.searchsorted(others, np.floor(fpir * others[-1] + 1e-9), side="right")
        threshold = distances[at] if at < len(distances) else np.inf
        hits = (found.ranks == 1) & (found.mates < threshold)
        rates[number] = (own @ hits) / own.sum()
    low, high = np.quantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def rate_at_threshold(found: Identification, threshold: float) -> tuple[float, float]:
    """DIR and FPIR of a given threshold."""
    hit = (found.ranks == 1) & (found.mates < threshold)
    return float(np.mean(hit)), float(np.mean(found.strangers < threshold))


def rate_curve(found: Identification) -> tuple[np.ndarray, np.ndarray]:
    """FPIR `[M]` and DIR `[M]` over all thresholds that strangers' distances give, rising."""
    thresholds = np.unique(found.strangers[np.isfinite(found.strangers)])
    hits = np.sort(np.where(found.ranks == 1, found.mates, np.inf))
    strangers = np.sort(found.strangers)
    fpir = np.searchsorted(strangers, thresholds, side="left") / len(strangers)
    rate = np.searchsorted(hits, thresholds, side="left") / len(hits)
    return fpir, rate
