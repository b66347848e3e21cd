"""The photos of a training run: read or aligned once, split, with pairs to verify.

What can go wrong with the user's data raises ValueError with a message for people.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Collection

import numpy as np

from afr_jax.core import distributed, files, options, parallel, workdir
from afr_jax.data import identities, pairs, photo_files, photos, sampling
from afr_jax.models import mtcnn
from afr_jax.recognition import chips

MIN_PAIRS = 20


@dataclasses.dataclass(frozen=True)
class PairOptions:
    """Pairs of photos that verification is measured on."""

    pairs: str | None = options.option(None, "CSV image_a, image_b, same: pairs to verify")
    images: str = options.option(".", "folder that the paths of --pairs are below")


@dataclasses.dataclass(frozen=True)
class FaceSet:
    """Photos of people, split into training and held-out ones.

    Attributes:
        listing: N photos.
        side: of the images.
        images: `[N, side, side, 3]` uint8; None where they stay in their files.
        training: rows `[M]`.
        held_out: the other rows.
    """

    listing: identities.Listing
    side: int
    images: np.ndarray | None
    training: np.ndarray
    held_out: np.ndarray

    @property
    def training_labels(self) -> np.ndarray:
        """`[M]` int32."""
        return self.listing.labels[self.training]

    @property
    def held_out_labels(self) -> np.ndarray:
        """`[N - M]` int32."""
        return self.listing.labels[self.held_out]

    def images_of(self, rows: np.ndarray) -> np.ndarray:
        """Images `[R, side, side, 3]` uint8 of some rows, read now if they are in files.

        Raises:
            ValueError: one of them cannot be read.
        """
        if self.images is not None:
            return self.images[rows]
        some = self.sub_listing(rows)
        readable, images = identities.read_samples(some, self.side)
        if len(readable.samples) < len(rows):
            problem = readable.problems[0]
            raise ValueError(f"{problem.name}: {problem.reason}; all streamed photos must be fine")
        return images

    def sub_listing(self, rows: np.ndarray) -> identities.Listing:
        """The listing of some rows, in their order."""
        return identities.Listing(tuple(self.listing.samples[row] for row in rows))


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of photos to verify.

    Attributes:
        images: `[N, S, S, 3]` uint8.
        rows: `[M, 2]` of the images.
        same: `[M]` bool, whether they show one person.
        problems: photos that could not be used; their pairs are left out.
    """

    images: np.ndarray
    rows: np.ndarray
    same: np.ndarray
    problems: tuple[identities.Omission, ...] = ()


def split_faces(
    listing: identities.Listing,
    images: np.ndarray | None,
    *,
    side: int,
    held_out: float = 0.2,
    seed: int = 0,
) -> FaceSet:
    """Splits photos by their ids (`sampling.split_by_id`); everybody keeps one for training.

    Raises:
        ValueError: there are fewer than two people.
    """
    if len(listing.identities) < 2:
        raise ValueError("photos of two people at least are needed")
    training, held = sampling.split_by_id(
        listing.sample_ids, held_out=held_out, seed=seed, labels=listing.labels
    )
    return FaceSet(listing, side, images, training, held)


def aligned_faces(
    detector: mtcnn.Variables,
    listing: identities.Listing,
    side: int,
    cache: str | os.PathLike[str],
    *,
    report_fn: Callable[[int], None] | None = None,
) -> tuple[identities.Listing, np.ndarray]:
    """`chips.aligned_chips` in ArcFace's alignment, kept in a file, since detection takes time.

    Args:
        detector: variables of MTCNN's networks.
        listing: the photos.
        side: of the chips.
        cache: an `.npz` file; read if it is there, else written.
        report_fn: called with the number of photos that were handled since (progress).

    Raises:
        ValueError: the file is of other photos, or no photo shows a face.
    """
    template = chips.template_for(side)

    def make() -> tuple[identities.Listing, np.ndarray]:
        return chips.aligned_chips(detector, listing, template, side, report_fn=report_fn)

    return kept_chips(cache, listing, side, make)


def kept_chips(
    cache: str | os.PathLike[str],
    listing: identities.Listing,
    side: int,
    make_fn: Callable[[], tuple[identities.Listing, np.ndarray]],
) -> tuple[identities.Listing, np.ndarray]:
    """Chips from a file, or made and written to it, since detection takes time.

    Args:
        cache: an `.npz` file; read if it is there, else written.
        listing: the photos.
        side: of the chips `[..., side, side, 3]`.
        make_fn: gives the listing without the photos that show no face, and an array of each.

    Returns:
        What `make_fn` gives.

    Raises:
        ValueError: the file is of other photos or another size.
    """
    return distributed.primary_first(lambda: _kept_chips(cache, listing, side, make_fn))


def _kept_chips(
    cache: str | os.PathLike[str],
    listing: identities.Listing,
    side: int,
    make_fn: Callable[[], tuple[identities.Listing, np.ndarray]],
) -> tuple[identities.Listing, np.ndarray]:
    kept = workdir.read_or_none(cache, files.read_arrays)
    if kept is not None:
        problems = [identities.Omission(str(n), str(r)) for n, r in kept["problems"]]
        found, images = listing.without(problems), kept["images"]
        same_photos = found.sample_ids == kept["sample_ids"].tolist()
        # Files of before have no digests.
        same_photos &= "digests" not in kept or kept["digests"].tolist() == _digests(found)
        if not same_photos or images.shape[-2] != side:
            raise ValueError(f"{cache} is of other photos or another size: remove it")
        return found, images
    found, images = make_fn()
    problems = [(p.name, p.reason) for p in found.problems[len(listing.problems) :]]
    arrays = {
        "images": images,
        "sample_ids": np.array(found.sample_ids),
        "digests": np.array(_digests(found), str),
        "problems": np.array(problems, str).reshape(-1, 2),
    }
    files.write_arrays(cache, arrays)
    return found, images


def _digests(listing: identities.Listing) -> list[str]:
    return parallel.thread_map(lambda sample: photos.digest_of(sample.path), listing.samples)


def held_out_pairs(faces: FaceSet, *, max_pairs: int = 1000, seed: int = 0) -> Pairs | None:
    """Pairs of held-out photos, half of them of one person; None where there are too few."""
    rows, same = pairs.balanced_pairs(faces.held_out_labels, max_pairs=max_pairs, seed=seed)
    if len(rows) < MIN_PAIRS:
        return None
    return Pairs(faces.images_of(faces.held_out), rows, same)


def listed_pairs(
    table: str | os.PathLike[str],
    root: str | os.PathLike[str],
    side: int,
    *,
    detector: mtcnn.Variables | None = None,
) -> Pairs:
    """The pairs of a CSV (`afr_jax.data.pairs`).

    Args:
        table: the CSV.
        root: folder that its paths are below.
        side: of the images.
        detector: to align the photos; None takes them for crops.

    Raises:
        FileNotFoundError: there is no such CSV.
        ValueError: it is no such CSV, or too few pairs are usable.
    """

    def read(listing: identities.Listing) -> tuple[identities.Listing, np.ndarray]:
        if detector is None:
            return identities.read_samples(listing, side)
        return chips.aligned_chips(detector, listing, chips.template_for(side), side)

    return pairs_through(table, root, read)


def pairs_through(
    table: str | os.PathLike[str],
    root: str | os.PathLike[str],
    read_fn: Callable[[identities.Listing], tuple[identities.Listing, np.ndarray]],
    *,
    known_people: Collection[str] = (),
) -> Pairs:
    """The pairs of a CSV, with images that a function makes of its photos.

    Args:
        table: the CSV.
        root: folder that its paths are below; a photo that lies elsewhere is not read.
        read_fn: takes the listing of all photos to the listing of the usable ones and their images
            `[N, S, S, 3]` uint8.
        known_people: names of folders; pairs with a photo of one are left out, as they were
            trained on.

    Raises:
        FileNotFoundError: there is no such CSV.
        ValueError: it is no such CSV, or too few pairs are usable.
    """
    names, same = pairs.read_pairs(table)
    kept = [
        all(pathlib.PurePath(n).parent.name not in known_people for n in pair) for pair in names
    ]
    names, same = [pair for pair, keep in zip(names, kept, strict=True) if keep], same[kept]
    samples, lost = [], []
    for name in sorted({name for pair in names for name in pair}):
        item = photo_files.find_below(root, name)
        if item.problem is None:
            samples.append(identities.Sample(name, "", item.path))
        else:
            lost.append(identities.Omission(name, item.problem))
    if not samples:
        reason = f"; {lost[0].name} {lost[0].reason}" if lost else ""
        raise ValueError(f"{table} has no pairs of photos below {root}{reason}")
    found, images = read_fn(identities.Listing(tuple(samples)))
    row_of = {name: row for row, name in enumerate(found.sample_ids)}
    usable = np.array([a in row_of and b in row_of for a, b in names], bool)
    rows = [(row_of[a], row_of[b]) for a, b in names if a in row_of and b in row_of]
    if len(rows) < MIN_PAIRS or same[usable].all() or not same[usable].any():
        raise ValueError(f"{table} needs {MIN_PAIRS} usable pairs or more, of both kinds")
    problems = (*lost, *found.problems)
    return Pairs(images, np.array(rows, np.int32), same[usable], problems)


def generated_faces(side: int, seed: int) -> tuple[identities.Listing, np.ndarray]:
    """Four people of 30 pictures `[120, side, side, 3]`: a pattern of each, shifted and noisy.

    For trials that need no data; the files of the listing do not exist.
    """
    generator = np.random.default_rng(seed)
    coarse = generator.uniform(40, 215, (4, 4, 4, 3))
    patterns = coarse.repeat(side // 4 + 1, axis=1).repeat(side // 4 + 1, axis=2)
    samples, images = [], []
    for person in range(4):
        for number in range(30):
            row, column = generator.integers(0, 4, 2)
            crop = patterns[person, row : row + side, column : column + side]
            images.append(np.clip(crop + generator.normal(0, 25, crop.shape), 0, 255))
            name = f"person_{person}/{number:02d}.png"
            samples.append(identities.Sample(name, f"person_{person}", pathlib.Path(name)))
    return identities.Listing(tuple(samples)), np.stack(images).astype(np.uint8)
