"""Row `database`: speed and recall of the reference database at sizes that no set of photos has.

The vectors are synthetic: people are random directions on the unit sphere, their faces lie around
them at the angles that a good extractor gives. What is searched for are further faces of enrolled
people, so the nearest neighbor is mostly, but not always, the right person.
"""

import dataclasses
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from afr_jax.benchmark import setting, timing
from afr_jax.core import options
from afr_jax.recognition import database, match

# Standard deviation of a face around its person, in units of the vectors' length: faces of one
# person are then 0.85 apart in the median, faces of two people 1.41.
_SPREAD = 0.6
_FACES_PER_PERSON = 10
_APPEND = 10_000


@dataclasses.dataclass(frozen=True)
class DatabaseOptions:
    """What is measured in the row `database`."""

    num_vectors: tuple[int, ...] = options.option(
        (10_000, 100_000, 1_000_000), "sizes of the database, measured one by one", at_least=1
    )

    def __post_init__(self) -> None:
        """Checks ranges."""
        options.check(self)


def run(config: DatabaseOptions, given: setting.Setting) -> setting.Measured:
    """Reference databases of synthetic vectors; ours alone."""
    rows = measure(given.folder, config.num_vectors, repeats=given.repeats, seed=given.seed)
    return setting.Measured(rows)


def synthetic_vectors(num_people: int, dimension: int, *, seed: int = 0) -> np.ndarray:
    """Directions of people, `[num_people, dimension]` float32 of unit length."""
    rng = np.random.default_rng(seed)
    return match.unit_length(rng.standard_normal((num_people, dimension), np.float32))


def synthetic_faces(people: np.ndarray, index: np.ndarray, *, seed: int) -> np.ndarray:
    """A face `[N, dimension]`, of unit length, of each person in `index` `[N]`."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((len(index), people.shape[1]), np.float32)
    return match.unit_length(people[index] + _SPREAD / np.sqrt(people.shape[1]) * noise)


def measure(
    folder: pathlib.Path,
    counts: Sequence[int],
    *,
    dimension: int = 128,
    num_probes: int = 512,
    index_probes: int | None = None,
    repeats: int = 5,
    seed: int = 0,
) -> list[timing.Row]:
    """Rows of the table for each number of enrolled vectors.

    Enrolment in transactions of 10,000 vectors, upkeep (joining files, and the index from
    `database.INDEX_FROM` vectors on), queries in a group and one by one, exactly and through the
    index, the index's recall of the exact nearest vector, and the size on the disk.

    Args:
        folder: for the databases; each is removed once it is measured.
        counts: numbers of vectors.
        dimension: of the vectors.
        num_probes: queries.
        index_probes: cells of the index that a query looks through; `Database.search`'s default.
        repeats: timed rounds.
        seed: of the vectors.

    Returns:
        The rows; ours alone.
    """
    rows = []
    for count in counts:
        name = f"database, {count:,} vectors of {dimension}"
        place = folder / f"database_{count}"
        opened, seconds, upkeep = _filled(place, count, dimension, seed)
        people = synthetic_vectors(-(-count // _FACES_PER_PERSON), dimension, seed=seed)
        rng = np.random.default_rng(seed + 1)
        owners = rng.integers(len(people), size=num_probes)
        probes = synthetic_faces(people, owners, seed=seed + 2)
        rows += [
            timing.state(name, "enrolment, vectors per second", count / seconds, None),
            timing.state(name, "upkeep and index, seconds", upkeep, None),
            timing.state(name, "on the disk, bytes per vector", _bytes(place) / count, None),
        ]
        rows += _queries(name, opened, probes, owners, index_probes, repeats)
        shutil.rmtree(place)
    return rows


def _filled(
    place: pathlib.Path, count: int, dimension: int, seed: int
) -> tuple[database.Database, float, float]:
    """A database of synthetic faces, the seconds of its enrolment and those of its upkeep."""
    people = synthetic_vectors(-(-count // _FACES_PER_PERSON), dimension, seed=seed)
    tag = database.ExtractorTag("made", "0" * 64, dimension, "euclidean_l2")
    opened = database.open_database(place, tag=tag, create=True)
    seconds = 0.0
    for start in range(0, count, _APPEND):
        index = np.arange(start, min(start + _APPEND, count))
        entries = database.Entries(
            identities=[f"person {number // _FACES_PER_PERSON}" for number in index],
            images=[f"{number}.jpg" for number in index],
            digests=[f"{number:064x}" for number in index],
            faces=[0] * len(index),
            boxes=np.zeros((len(index), 4), np.float32),
            vectors=synthetic_faces(people, index // _FACES_PER_PERSON, seed=seed + 3 + start),
            made=[""] * len(index),
        )
        before = time.perf_counter()
        opened.append(entries)
        seconds += time.perf_counter() - before
    before = time.perf_counter()
    opened.maintain()
    return opened, seconds, time.perf_counter() - before


def _queries(
    name: str,
    opened: database.Database,
    probes: np.ndarray,
    owners: np.ndarray,
    index_probes: int | None,
    repeats: int,
) -> list[timing.Row]:
    nearest = {}

    def search(kind: str, some: np.ndarray, **how: Any) -> Callable[[], float]:
        def once() -> float:
            before = time.perf_counter()
            nearest[kind] = opened.search(some, k=1, **how)
            return 1e3 * (time.perf_counter() - before) / len(some)

        return once

    sides = {
        "exact, in a group": search("exact", probes, exact=True),
        "exact, one by one": search("alone", probes[:1], exact=True),
    }
    has_index = len(opened) >= database.INDEX_FROM
    if has_index:
        some = {"exact": False, "num_probes": index_probes}
        sides["index, one by one"] = search("index", probes, **some)
    times = timing.take_turns(sides, repeats=repeats)
    rows = [
        timing.state(name, f"query {kind}, ms", timing.spread(values), None)
        for kind, values in times.items()
    ]
    right = [f"person {owner}" for owner in owners]
    rows.append(timing.state(name, "right person, exact", _agree(nearest["exact"], right), None))
    if has_index:
        images = [row[0] for row in nearest["exact"].images]
        found = [row[0] for row in nearest["index"].images]
        recall = float(np.mean([a == b for a, b in zip(images, found, strict=True)]))
        rows.append(timing.state(name, "recall@1 of the index", recall, None))
        rows.append(
            timing.state(name, "right person, index", _agree(nearest["index"], right), None)
        )
    return rows


def _agree(hits: database.Hits, right: list[str]) -> float:
    return float(
        np.mean([row[0] == name for row, name in zip(hits.identities, right, strict=True)])
    )


def _bytes(place: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
