"""Listings of who is on which photo, from a folder per identity or from a CSV.

LFW and PubFig have `root/<identity>/<photo>`, VGGFace2 `root/<split>/<identity>/<photo>`: the
identity is the name of the folder that a photo lies in, whatever is above it. A sample's id is its
path below the root, which does not depend on the machine or on the other photos.

Nothing is decoded here; `read_samples` does that.
"""

import dataclasses
import functools
import os
import pathlib
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from afr_jax.core import files, parallel
from afr_jax.data import photo_files, photos

# What the programs put behind the name of a cloaked photo.
CLOAKED = "_cloaked"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A photo of an identity.

    Attributes:
        sample_id: path below the root, with slashes; stable.
        identity: name of who is on it.
        path: absolute path of the file.
    """

    sample_id: str
    identity: str
    path: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Omission:
    """Something that is left out, and why.

    Attributes:
        name: sample id, path below the root or row of the CSV.
        reason: for people.
    """

    name: str
    reason: str

    def as_result(self) -> dict[str, str]:
        """The entry under "not_handled" in results of programs."""
        return {"image": self.name, "reason": self.reason}


@dataclasses.dataclass(frozen=True)
class Listing:
    """The photos of a data set.

    Attributes:
        samples: sorted by sample id; no id twice.
        problems: what was left out.
        num_skipped: files in folders that are no photos.
    """

    samples: tuple[Sample, ...]
    problems: tuple[Omission, ...] = ()
    num_skipped: int = 0

    @functools.cached_property
    def identities(self) -> tuple[str, ...]:
        """Names of all identities, sorted; a label is an index into them."""
        return tuple(sorted({sample.identity for sample in self.samples}))

    @property
    def labels(self) -> np.ndarray:
        """`[N]` int32, in the order of the samples."""
        index = {name: label for label, name in enumerate(self.identities)}
        return np.array([index[sample.identity] for sample in self.samples], np.int32)

    @property
    def sample_ids(self) -> list[str]:
        """In the order of the samples."""
        return [sample.sample_id for sample in self.samples]

    def without(self, problems: Sequence[Omission]) -> "Listing":
        """The listing without the samples that the problems name, and with these problems."""
        names = {problem.name for problem in problems}
        kept = tuple(sample for sample in self.samples if sample.sample_id not in names)
        return Listing(kept, (*self.problems, *problems), self.num_skipped)

    def with_photos(self, min_photos: int) -> "Listing":
        """The identities with at least so many photos; the others become problems."""
        names, counts = np.unique([s.identity for s in self.samples], return_counts=True)
        rare = {str(n): int(c) for n, c in zip(names, counts, strict=True) if c < min_photos}
        kept = tuple(sample for sample in self.samples if sample.identity not in rare)
        reasons = [Omission(n, f"has {c} photos, fewer than {min_photos}") for n, c in rare.items()]
        return Listing(kept, (*self.problems, *reasons), self.num_skipped)


@dataclasses.dataclass(frozen=True)
class Copies:
    """Photos of a folder that are copies of others, such as cloaked ones.

    Attributes:
        samples: by person, and the original's name: STEM, STEM_jpg or STEM.jpg.
        problems: files that cannot be read.
    """

    samples: dict[tuple[str, str], Sample]
    problems: tuple[Omission, ...]

    def of(self, sample_id: str) -> Sample | None:
        """The copy of a photo, by the photo's id; None if there is none."""
        original = pathlib.PurePosixPath(sample_id)
        identity = unicodedata.normalize("NFC", original.parent.name)
        # Of photos that differ in their suffix alone, one has a copy that names its suffix, too.
        names = (original.name, photo_files.stem_with_extension(original), original.stem)
        found = (self.samples.get((identity, name)) for name in names)
        return next((sample for sample in found if sample is not None), None)


def list_people(
    root: str | os.PathLike[str], *, table: str | os.PathLike[str] | None = None
) -> Listing:
    """Lists a folder with one folder per identity, or the photos of a folder that a CSV names.

    Args:
        root: folder of the photos.
        table: see `list_csv`; `list_tree` without one.

    Raises:
        FileNotFoundError: the CSV or the root does not exist.
        ValueError: they hold no usable photo.
    """
    return list_tree(root) if table is None else list_csv(table, root)


def list_tree(root: str | os.PathLike[str]) -> Listing:
    """Lists a folder with one folder per identity, at any depth.

    Files that are no photos by name and content are only counted (`photos.list_photos`). Left out
    with a reason: files directly in the root, identity folders without files, links that lead
    out of the root, names that are not Unicode, which no table could hold. Names of identities are
    put into Unicode's composed form (NFC), so that a data set has the same identities on every file
    system.

    Raises:
        FileNotFoundError: the root does not exist.
        ValueError: it is no folder, or holds no photo in a folder.
    """
    root = pathlib.Path(root)
    _check_folder(root)
    samples, problems, filled = [], [], set()
    found = photos.list_photos([root])
    for item in found.inputs:
        name = item.relative.as_posix()
        filled.update(item.relative.parents)
        if item.problem is not None:
            problems.append(Omission(name, item.problem))
        elif not photo_files.is_unicode(name):
            problems.append(Omission(name, photo_files.NOT_UNICODE))
        elif len(item.relative.parts) == 1:
            problems.append(Omission(name, "lies in no identity's folder"))
        else:
            identity = unicodedata.normalize("NFC", item.relative.parent.name)
            samples.append(Sample(name, identity, item.path))
    for folder, names, _ in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        relative = pathlib.PurePosixPath(pathlib.Path(folder).relative_to(root).as_posix())
        if not names and relative not in filled and relative.parts:
            problems.append(Omission(relative.as_posix(), "the folder holds no photos"))
    if not samples:
        raise ValueError(f"{root} holds no photo in a folder of its identity")
    samples.sort(key=lambda sample: sample.sample_id)
    return Listing(tuple(samples), tuple(problems), found.num_skipped)


def list_copies(root: str | os.PathLike[str]) -> Copies:
    """Lists copies of photos: STEM_cloaked.png is one of the same person's photo STEM.

    STEM.png is one, too, of any photo format, and STEM.jpg.png of STEM.jpg. Of two of one photo
    STEM_cloaked counts.

    Raises:
        FileNotFoundError: the root does not exist.
        ValueError: it is no folder, or holds no photo in a folder.
    """
    usable = without_unreadable(list_tree(pathlib.Path(root).expanduser()))
    found: dict[tuple[str, str], Sample] = {}
    for sample in sorted(usable.samples, key=lambda one: not one.path.stem.endswith(CLOAKED)):
        found.setdefault((sample.identity, sample.path.stem.removesuffix(CLOAKED)), sample)
    return Copies(found, usable.problems)


def list_csv(table: str | os.PathLike[str], root: str | os.PathLike[str]) -> Listing:
    """Lists the photos that a CSV names.

    Left out with the number of their row (the header is row 1): rows without an image or identity,
    of files that do not exist or lie outside the root, and repeated images.

    Args:
        table: UTF-8, with the columns image (path below the root) and identity; others are ignored.
        root: folder of the photos.

    Raises:
        FileNotFoundError: the CSV or the root does not exist.
        ValueError: the root is no folder, the file is no such CSV, or no row is usable.
    """
    root = pathlib.Path(root)
    _check_folder(root)
    root = root.resolve()
    found: dict[str, Sample] = {}
    problems = []
    for number, image, identity in _rows(table):
        item = photo_files.find_below(root, image)
        if not image or not identity:
            reason = "has no image" if not image else "has no identity"
        elif item.problem is not None:
            reason = f"{image}: {item.problem}"
        else:
            sample_id = item.relative.as_posix()
            other = found.setdefault(sample_id, Sample(sample_id, identity, item.path))
            if other.path is item.path:
                continue
            same = other.identity == identity
            reason = f"{image}: listed before" + ("" if same else f", as {other.identity}")
        problems.append(Omission(f"row {number}", reason))
    if not found:
        first = f"; {problems[0].name} {problems[0].reason}" if problems else ""
        raise ValueError(f"{table} has no usable row{first}")
    return Listing(tuple(found[name] for name in sorted(found)), tuple(problems))


def read_square(path: str | os.PathLike[str], side: int) -> np.ndarray:
    """Reads a photo as `[side, side, 3]` uint8: its largest central square, resized.

    The resampling is Pillow's antialiased bilinear one.

    Raises:
        photos.PhotoError: the file cannot be read as a photo.
    """
    return fit_square(photos.read_photo(path).pixels, side)


def fit_square(pixels: np.ndarray, side: int) -> np.ndarray:
    """The largest central square of `[H, W, 3]` uint8, resized to `[side, side, 3]`."""
    height, width, _ = pixels.shape
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    square = pixels[top : top + size, left : left + size]
    if size == side:
        return np.ascontiguousarray(square)
    image = Image.fromarray(square).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image)


def without_unreadable(
    listing: Listing,
    *,
    num_threads: int = 4,
    report_fn: Callable[[int], None] | None = None,
) -> Listing:
    """The listing without the photos that cannot be read, which become problems; reads them all.

    Args:
        listing: what to try.
        num_threads: that decode.
        report_fn: called with the number of photos that were read since (progress).
    """

    def problem_of(sample: Sample) -> Omission | None:
        try:
            photos.read_photo(sample.path)
        except photos.PhotoError as error:
            return Omission(sample.sample_id, str(error))
        return None

    problems = []
    for start in range(0, len(listing.samples), 256):
        part = listing.samples[start : start + 256]
        problems += filter(None, parallel.thread_map(problem_of, part, width=num_threads))
        if report_fn is not None:
            report_fn(len(part))
    return listing.without(problems)


def read_samples(
    listing: Listing, side: int, *, num_threads: int = 4
) -> tuple[Listing, np.ndarray]:
    """Reads all photos of a listing as squares (`read_square`).

    Args:
        listing: what to read.
        side: of the squares, pixels.
        num_threads: that decode.

    Returns:
        The listing without the photos that cannot be read, which become problems, and the others
        `[N, side, side, 3]` uint8 in its order.

    Raises:
        ValueError: none can be read.
    """

    def read(sample: Sample) -> np.ndarray | str:
        try:
            return read_square(sample.path, side)
        except photos.PhotoError as error:
            return str(error)

    results = parallel.thread_map(read, listing.samples, width=num_threads)
    problems = [
        Omission(sample.sample_id, result)
        for sample, result in zip(listing.samples, results, strict=True)
        if isinstance(result, str)
    ]
    pixels = [result for result in results if not isinstance(result, str)]
    if not pixels:
        raise ValueError(f"none of {len(results)} photos can be read; {problems[0].reason}")
    return listing.without(problems), np.stack(pixels)


def _check_folder(root: pathlib.Path) -> None:
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist")
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")


def _rows(table: str | os.PathLike[str]) -> list[tuple[int, str, str]]:
    """(row number, image, identity) of every row, stripped, identities composed."""
    return [
        (number, image.strip(), unicodedata.normalize("NFC", identity.strip()))
        for number, (image, identity) in files.read_csv(table, ("image", "identity"))
    ]
