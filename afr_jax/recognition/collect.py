"""Stage 1 of face recognition: finding repeats among collected photos.

Scraped data sets hold the same photo many times: as the same pixels, or resized, recompressed and
slightly recolored. The first kind is found by a digest of the pixels, the second by a perceptual
hash of 64 bits: which of the lowest frequencies of a gray 32 x 32 thumbnail lie above their median
(Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", section 3.2.1).
Crops and mirror images of a photo are not found.

Listings of photos come from `afr_jax.data.identities`.
"""

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from afr_jax.core import backend, distributed, files, parallel, workdir
from afr_jax.data import identities, photos

# Among 5,788 aligned crops of 24 people, 206 pairs of one person differ by at most 4 bits of 64 and
# none of two people (15 do by 6); of 200 crops that were saved as JPEG of quality 50, halved,
# doubled or brightened, 96 to 100 % stay within 4.
DEFAULT_DISTANCE = 4
# Photos that are read before what was found is kept.
_GROUP = 256
_THUMBNAIL = 32
_HASH_SIDE = 8


class Fingerprint(NamedTuple):
    """What repeats of a photo share.

    Attributes:
        digest: SHA-256 of the shape and the pixels, hexadecimal.
        bits: the perceptual hash, 64 bits.
        size: number of pixels.
    """

    digest: str
    bits: int
    size: int


class Repeat(NamedTuple):
    """A photo that repeats another one.

    Attributes:
        sample_id: of the photo that is dropped.
        kept: sample id of the photo that stays instead.
        distance: differing bits of the hashes; 0 with `exact`.
        exact: whether all pixels are equal.
        same_identity: whether both are filed under one identity; if not, one of them is wrong.
    """

    sample_id: str
    kept: str
    distance: int
    exact: bool
    same_identity: bool


class Collection(NamedTuple):
    """A listing without repeats and unreadable photos, and which photos were dropped for which."""

    listing: identities.Listing
    repeats: tuple[Repeat, ...]


def collect(
    listing: identities.Listing,
    *,
    max_distance: int | None = DEFAULT_DISTANCE,
    num_threads: int = 4,
    report_fn: Callable[[int], None] | None = None,
    kept: str | os.PathLike[str] | None = None,
) -> Collection:
    """Reads all photos, leaves out what cannot be read and what repeats another photo.

    Of the photos that repeat each other the one with the most pixels stays, of equal ones the first
    by sample id. A dropped photo is compared with photos that stay, never with dropped ones, so
    chains of similar photos do not collapse into one.

    Args:
        listing: what was collected.
        max_distance: of the perceptual hashes; 0 to 16, or None for equal pixels only.
        num_threads: that decode.
        report_fn: called with the number of photos that were read since (progress).
        kept: folder for what was read, so that a later call with the same photos goes on from
            there.
    """
    store = workdir.Kept(kept)
    prints: list[Fingerprint | str] = []
    for part in _groups(listing):
        found = _read_group(store, num_threads, part)
        prints += [item if isinstance(item, str) else Fingerprint(**item) for item in found]
        if report_fn is not None:
            report_fn(len(part))
    store.drop_unused()
    problems = [
        identities.Omission(sample.sample_id, result)
        for sample, result in zip(listing.samples, prints, strict=True)
        if isinstance(result, str)
    ]
    readable = listing.without(problems)
    repeats = find_repeats(
        readable.samples,
        [result for result in prints if not isinstance(result, str)],
        max_distance=max_distance,
    )
    dropped = [
        identities.Omission(repeat.sample_id, f"repeats {repeat.kept}") for repeat in repeats
    ]
    return Collection(readable.without(dropped), tuple(repeats))


def share(
    listing: identities.Listing, *, num_threads: int = 4, kept: str | os.PathLike[str]
) -> None:
    """Lets each of several processes read its share of the photos; one process does nothing.

    `collect` then finds what was read in `kept`, a folder that all see.

    Args:
        listing: the same in all processes.
        num_threads: that decode, in each.
        kept: as of `collect`.
    """
    read_fn = functools.partial(_read_group, workdir.Kept(kept), num_threads)
    distributed.split_work(_groups(listing), lambda own: [read_fn(part) for part in own])


def fingerprint(pixels: np.ndarray) -> Fingerprint:
    """The fingerprint of a photo `[H, W, 3]` uint8."""
    size = pixels.shape[0] * pixels.shape[1]
    return Fingerprint(photos.digest_of_pixels(pixels), perceptual_hash(pixels), size)


def perceptual_hash(pixels: np.ndarray) -> int:
    """The 64-bit hash of a photo `[H, W, 3]` uint8: row by row, the highest bit first.

    The mean of the picture is not among the frequencies, so brightness does not count.
    """
    gray = Image.fromarray(pixels).convert("L")
    # Box averaging, then a smooth reduction: the thumbnails of two sizes of a photo agree.
    thumbnail = gray.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    values = np.asarray(thumbnail, np.float64)
    cosines = _cosines()
    low = (cosines @ values @ cosines.T).reshape(-1)
    above = low > np.median(low)
    return int.from_bytes(np.packbits(above).tobytes(), "big")


def find_repeats(
    samples: Sequence[identities.Sample],
    fingerprints: Sequence[Fingerprint],
    *,
    max_distance: int | None = DEFAULT_DISTANCE,
) -> list[Repeat]:
    """Which photos to drop for which; see `collect`."""
    order = sorted(range(len(samples)), key=lambda i: (-fingerprints[i].size, i))
    first_of: dict[str, int] = {}
    for index in order:
        first_of.setdefault(fingerprints[index].digest, index)
    firsts = list(first_of.values())
    neighbors = _neighbors([fingerprints[i].bits for i in firsts], max_distance)
    # What stays in the place of each first photo of some pixels: (distance, index).
    stays: list[tuple[int, int]] = []
    for place, index in enumerate(firsts):
        near = [
            (distance, firsts[other])
            for other, distance in neighbors[place]
            if stays[other][1] == firsts[other]
        ]
        stays.append(min(near, default=(0, index)))
    replaced = dict(zip(firsts, stays, strict=True))
    repeats = []
    for index in order:
        distance, kept = replaced[first_of[fingerprints[index].digest]]
        if kept != index:
            exact = fingerprints[kept].digest == fingerprints[index].digest
            same = samples[index].identity == samples[kept].identity
            names = samples[index].sample_id, samples[kept].sample_id
            repeats.append(Repeat(*names, distance, exact, same))
    return sorted(repeats)


def near_pairs(bits: np.ndarray, max_distance: int) -> np.ndarray:
    """All pairs of hashes with at most `max_distance` differing bits.

    The 64 bits are cut into `max_distance` + 1 bands: two such hashes are equal in at least one of
    them. So only hashes that share a band are compared: a few million comparisons for 100,000
    hashes at a distance of 4, where all pairs would be five billion.

    Args:
        bits: `[N]` uint64.
        max_distance: 0 to 16.

    Returns:
        `[M, 3]` int64: first, second (first < second) and their distance, sorted, each pair once.
    """
    if not 0 <= max_distance <= 16:
        raise ValueError(f"max_distance is {max_distance}, but must lie in [0, 16]")
    bits = np.asarray(bits, np.uint64)
    edges = np.linspace(0, 64, max_distance + 2).astype(int)
    found = []
    for low, high in itertools.pairwise(edges):
        mask = np.uint64(((1 << int(high - low)) - 1) << int(low))
        band = bits & mask
        order = np.argsort(band, kind="stable")
        _, starts, counts = np.unique(band[order], return_index=True, return_counts=True)
        for start, count in zip(starts[counts > 1], counts[counts > 1], strict=True):
            members = order[start : start + count]
            # Row by row: a bucket of n hashes never takes the memory of n x n distances.
            for place in range(count - 1):
                others = members[place + 1 :]
                distance = np.bitwise_count(bits[members[place]] ^ bits[others])
                near = np.flatnonzero(distance <= max_distance)
                if len(near):
                    first = np.full(len(near), members[place])
                    found.append(np.stack([first, others[near], distance[near]], axis=1))
    if not found:
        return np.zeros((0, 3), np.int64)
    return np.unique(np.concatenate(found).astype(np.int64), axis=0)


def _groups(listing: identities.Listing) -> list[Sequence[identities.Sample]]:
    count = len(listing.samples)
    return [listing.samples[start : start + _GROUP] for start in range(0, count, _GROUP)]


def _read_group(
    store: workdir.Kept, num_threads: int, part: Sequence[identities.Sample]
) -> Sequence[str | dict[str, files.Json]]:
    """The fingerprints of photos as JSON has them, or why one cannot be read."""

    def read(sample: identities.Sample) -> Fingerprint | str:
        try:
            return fingerprint(photos.read_photo(sample.path).pixels)
        except photos.PhotoError as error:
            return str(error)

    def read_all() -> list[Fingerprint | str]:
        stream = parallel.thread_stream(
            read,
            part,
            width=num_threads,
            weight_fn=lambda sample: photos.num_pixels(sample.path),
            limit=photos.GROUP_PIXELS,
        )
        return list(stream)

    digests = [photos.digest_of(sample.path) for sample in part] if store else []
    return store.load_or_compute([digests, backend.most_pixels()], read_all)


def _neighbors(bits: list[int], max_distance: int | None) -> list[list[tuple[int, int]]]:
    """For each hash the earlier ones near it, with their distances."""
    neighbors: list[list[tuple[int, int]]] = [[] for _ in bits]
    if max_distance is not None:
        for first, second, distance in near_pairs(np.array(bits, np.uint64), max_distance):
            neighbors[second].append((int(first), int(distance)))
    return neighbors


@functools.cache
def _cosines() -> np.ndarray:
    """`[8, 32]`: frequencies 1 to 8 of the discrete cosine transform (type 2)."""
    frequency = np.arange(1, _HASH_SIDE + 1)[:, None]
    place = np.arange(_THUMBNAIL)[None, :] + 0.5
    return np.cos(np.pi / _THUMBNAIL * frequency * place)
