"""Row `database`: speed and recall of the reference database at sizes that no set of photos has.

The vectors are synthetic: people are random directions on the unit sphere, their faces lie around
them at the angles that a good extractor gives. What is searched for are further faces of enrolled
people, so the nearest neighbor is mostly, but not always, the right person. They are made ten
thousand at a time, each from a seed of its own, so a large database needs no memory for them.
"""

import dataclasses
import pathlib
import resource
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from afr_jax.benchmark import setting, timing
from afr_jax.core import files, options
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
    database_folder: str | None = options.option(
        None, "keeps the databases here and goes on with what an earlier run enrolled"
    )

    def __post_init__(self) -> None:
        """Checks ranges."""
        options.check(self)


def run(config: DatabaseOptions, given: setting.Setting) -> setting.Measured:
    """Reference databases of synthetic vectors; ours alone."""
    kept = config.database_folder
    folder = given.folder if kept is None else pathlib.Path(kept).expanduser()
    rows = measure(
        folder,
        config.num_vectors,
        repeats=given.repeats,
        seed=given.seed,
        keep=kept is not None,
    )
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
    keep: bool = False,
) -> list[timing.Row]:
    """Rows of the table for each number of enrolled vectors.

    Enrolment in transactions of 10,000 vectors, upkeep (joining files, and the index from
    `database.INDEX_FROM` vectors on), queries in a group and one by one, exactly and through the
    index, the index's recall of the exact nearest vector, the size on the disk, and the process's
    largest memory so far. Times are those of the clock, and of the processors that were used.

    Args:
        folder: for the databases; each is removed once it is measured.
        counts: numbers of vectors.
        dimension: of the vectors.
        num_probes: queries.
        index_probes: cells of the index that a query looks through; `Database.search`'s default.
        repeats: timed rounds.
        seed: of the vectors.
        keep: leave the databases there; one that is there already is filled up and measured.

    Returns:
        The rows; ours alone.
    """
    rows = []
    for count in counts:
        name = f"database, {count:,} vectors of {dimension}"
        place = folder / f"database_{count}"
        opened, enrolled, upkeep = _filled(place, count, dimension, seed)
        people = synthetic_vectors(-(-count // _FACES_PER_PERSON), dimension, seed=seed)
        rng = np.random.default_rng(seed + 1)
        owners = rng.integers(len(people), size=num_probes)
        probes = synthetic_faces(people, owners, seed=seed + 2)
        del people
        rows += [
            timing.state(name, "enrolment, vectors per second", 1 / enrolled.wall, None),
            timing.state(
                name, "enrolment, vectors per processor second", 1 / enrolled.processor, None
            ),
            timing.state(name, "upkeep and index, seconds", upkeep.wall, None),
            timing.state(name, "upkeep and index, processor seconds", upkeep.processor, None),
            timing.state(name, "on the disk, bytes per vector", _bytes(place) / count, None),
        ]
        rows += _queries(name, opened, probes, owners, index_probes, repeats)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append(timing.state(name, "largest memory of the process, GiB", peak, None))
        del opened
        if not keep:
            shutil.rmtree(place)
    return rows


def _filled(
    place: pathlib.Path, count: int, dimension: int, seed: int
) -> tuple[database.Database, timing.Took, timing.Took]:
    """A database of synthetic faces, what the enrolment of a face took, and what upkeep took."""
    people = synthetic_vectors(-(-count // _FACES_PER_PERSON), dimension, seed=seed)
    tag = database.ExtractorTag("made", "0" * 64, dimension, "euclidean_l2")
    opened = database.open_database(place, tag=tag, create=True)
    # What an earlier run measured: of how many vectors, and both times of their enrolment.
    notes = place.with_suffix(".json")
    timed, took, upkeep = 0, timing.Took(0.0, 0.0), None
    if notes.exists():
        found = files.read_sealed(notes)
        if found.get("seed", seed) != seed:
            raise options.UsageError(f"--database_folder has vectors of --seed={found['seed']}")
        timed, took = found["timed"], timing.Took(**found["took"])
        upkeep = found["upkeep"] and timing.Took(**found["upkeep"])
    for start in range(len(opened), count, _APPEND):
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
        before = timing.now()
        opened.append(entries)
        spent = timing.now() - before
        timed += len(index)
        took = timing.Took(took.wall + spent.wall, took.processor + spent.processor)
        files.write_sealed(notes, {"seed": seed, "timed": timed, "took": took, "upkeep": None})
    if not timed:  # The run that filled it was killed before it could say how long that took.
        raise options.UsageError(f"--database_folder: nobody timed {place}; delete it")
    if upkeep is None:
        before = timing.now()
        opened.maintain()
        upkeep = timing.now() - before
        files.write_sealed(notes, {"seed": seed, "timed": timed, "took": took, "upkeep": upkeep})
    return opened, timing.Took(took.wall / timed, took.processor / timed), upkeep


def _queries(
    name: str,
    opened: database.Database,
    probes: np.ndarray,
    owners: np.ndarray,
    index_probes: int | None,
    repeats: int,
) -> list[timing.Row]:
    nearest = {}

    def search(kind: str, some: np.ndarray, **how: Any) -> Callable[[], None]:
        def once() -> None:
            nearest[kind] = opened.search(some, k=1, **how)

        return once

    asked = {"exact, in a group": probes, "exact, one by one": probes[:1]}
    sides = {kind: search(kind, some, exact=True) for kind, some in asked.items()}
    has_index = len(opened) >= database.INDEX_FROM
    if has_index:
        kind, some = "index, one by one", {"exact": False, "num_probes": index_probes}
        asked[kind] = probes
        sides[kind] = search(kind, probes, **some)
    rows = []
    for kind, taken in timing.by_both_clocks(sides, repeats=repeats).items():
        for clock, values in zip(("", "processor "), zip(*taken, strict=True), strict=True):
            each = timing.spread([1e3 * value / len(asked[kind]) for value in values])
            rows.append(timing.state(name, f"query {kind}, {clock}ms", each, None))
    right = [f"person {owner}" for owner in owners]
    exact = nearest["exact, in a group"]
    rows.append(timing.state(name, "right person, exact", _agree(exact, right), None))
    if has_index:
        index = nearest["index, one by one"]
        pairs = zip(exact.images, index.images, strict=True)
        recall = float(np.mean([a[0] == b[0] for a, b in pairs]))
        rows.append(timing.state(name, "recall@1 of the index", recall, None))
        rows.append(timing.state(name, "right person, index", _agree(index, right), None))
    return rows


def _agree(hits: database.Hits, right: list[str]) -> float:
    return float(
        np.mean([row[0] == name for row, name in zip(hits.identities, right, strict=True)])
    )


def _bytes(place: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
