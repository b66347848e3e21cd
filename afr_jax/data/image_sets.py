"""Labeled image sets in memory, every image of one square size.

They come from a folder per class, a TFDS data set stored as ArrayRecord, or CIFAR-10. A sample's id
is stable and names its class's folder: for a tree the path below its root without the extension
("cat/0001"), for CIFAR-10 "<class>/<split>_<number>" with the number in the order of the files, for
TFDS "<class>/<id>" (see `read_records`). Sets are sorted by id, so nothing depends on the order in
which a file system lists them or TFDS shuffled them. Host code.
"""

import dataclasses
import io
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from afr_jax.core import files, options, parallel
from afr_jax.data import array_records, cifar10, identities, photos

# Of the usual file systems.
_MOST_NAME_BYTES = 255


class ImageSet(NamedTuple):
    """Images with labels.

    Attributes:
        sample_ids: N stable ids, ascending.
        images: `[N, S, S, 3]` uint8 RGB.
        labels: `[N]` int32, indices into `classes`.
        classes: names, ascending.
        problems: files that are left out, and why.
    """

    sample_ids: tuple[str, ...]
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    problems: tuple[identities.Omission, ...] = ()

    def digest(self) -> str:
        """SHA-256 of ids, images, labels and classes, hexadecimal."""
        names = np.array([*self.sample_ids, "", *self.classes]) if self.sample_ids else np.zeros(0)
        return files.digest_of({"images": self.images, "labels": self.labels, "names": names})

    def not_handled(self) -> list[dict[str, str]]:
        """The problems as results of programs name them."""
        return [problem.as_result() for problem in self.problems]

    def save(self, folder: str | os.PathLike[str], *, num_threads: int = 4) -> None:
        """Writes the images as lossless `<folder>/<sample id>.png`, each atomically.

        Files of other names stay. `load_image_folder` gives the same set again.

        Args:
            folder: root of the tree.
            num_threads: that encode.
        """
        root = pathlib.Path(folder)

        def write(row: int) -> None:
            buffer = io.BytesIO()
            Image.fromarray(self.images[row]).save(buffer, "PNG")
            path = root / f"{self.sample_ids[row]}.png"
            files.write_atomically(path, buffer.getvalue(), overwrite=True)

        parallel.thread_map(write, range(len(self.sample_ids)), width=num_threads)


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which labeled image set a program works on."""

    data: str | None = options.option(
        None, "folder with one folder of images per class, cifar10, or tfds:NAME[:SPLIT]"
    )
    cifar10_dir: str | None = options.option(None, "folder of CIFAR-10, for --data=cifar10")
    tfds_dir: str | None = options.option(
        None, "folder of TFDS data sets; default: ~/tensorflow_datasets"
    )
    split: str = options.option("train", "part of CIFAR-10 or of a TFDS set")
    num_images: int | None = options.option(
        None, "at most so many images, drawn evenly from the classes; default: all", at_least=1
    )
    image_px: int | None = options.option(
        None, "side of the images, pixels; default: the commonest square", at_least=8
    )
    resize: bool = options.option(False, "crop and resize images of other sizes")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        options.check(self)

    def read(self, *, seed: int = 0) -> ImageSet:
        """Reads the set.

        Args:
            seed: of the draw, with `num_images`.

        Raises:
            options.UsageError: there is no such set, or it cannot be used.
        """
        if not self.data:
            raise options.UsageError("--data is needed: a folder, cifar10, or tfds:NAME")
        found = self._read(self.data, self.split, self.image_px, None)
        if self.num_images is None:
            return found
        return take(found, spread_rows(found.labels, self.num_images, seed=seed))

    def read_like(self, data: str, reference: ImageSet, *, split: str = "test") -> ImageSet:
        """Reads another set, of the same classes and image size: test images, say.

        Args:
            data: like the option of this name.
            reference: whose classes and size it has.
            split: of CIFAR-10, and of a TFDS set without one.

        Raises:
            options.UsageError: there is no such set, or it has other classes or sizes.
        """
        side, classes = reference.images.shape[1], reference.classes
        found = self._read(data, split, side, classes)
        if found.classes != classes or found.images.shape[1] != side:
            raise options.UsageError(f"{data} has other classes or image sizes than --data")
        return found

    def _read(
        self, data: str, split: str, image_px: int | None, classes: Sequence[str] | None
    ) -> ImageSet:
        with options.usage(""):
            return read(
                data,
                cifar10_dir=self.cifar10_dir,
                tfds_dir=self.tfds_dir,
                split=split,
                image_px=image_px,
                resize=self.resize,
                classes=classes,
            )


def synthetic(
    seed: int, num_images: int, *, num_classes: int = 4, side: int = 16, split: str = "train"
) -> ImageSet:
    """A toy set: each class is a faint smooth texture of its own, shifted at random, in clutter.

    Args:
        seed: of the textures, the same for both splits, and of the images.
        num_images: in all, spread evenly over the classes.
        num_classes: at least 2.
        side: of the images.
        split: another name, other images of the same textures.
    """
    textures = np.random.default_rng([seed, num_classes, side])
    generator = np.random.default_rng([seed, num_images, len(split), ord(split[0])])
    waves = textures.integers(1, 4, (num_classes, 3, 2)) * textures.choice([-1, 1], (1, 3, 2))
    colors = textures.uniform(-1, 1, (num_classes, 3, 3))
    place = np.arange(side) * (2 * np.pi / side)
    labels = np.arange(num_images) % num_classes
    phase = generator.uniform(0, 2 * np.pi, (num_images, 2))
    wave = waves[labels][:, :, :, None]
    rows = wave[:, :, 0] * (place + phase[:, :1])[:, None]
    columns = wave[:, :, 1] * (place + phase[:, 1:])[:, None]
    texture = np.cos(rows[:, :, :, None] + columns[:, :, None, :])
    signal = np.einsum("nwrc,nwk->nrck", texture, colors[labels])
    noise = generator.normal(0, 1, (num_images, side, side, 3))
    images = np.clip(127.5 + 13 * signal + 20 * noise, 0, 255).astype(np.uint8)
    classes = tuple(f"class_{number:02d}" for number in range(num_classes))
    ids = [f"{classes[k]}/{split}_{i:05d}" for i, k in enumerate(labels)]
    order = np.argsort(ids, kind="stable")
    ordered = tuple(ids[row] for row in order)
    return ImageSet(ordered, images[order], labels[order].astype(np.int32), classes)


def check(data: ImageSet, *, name: str) -> None:
    """Raises a TypeError that says what an argument must be, where it is no image set.

    Args:
        data: What a caller gave.
        name: Of the argument.
    """
    if not isinstance(data, ImageSet):
        kind = type(data).__name__
        raise TypeError(f"{name} must be an ImageSet, as `load_image_folder` returns, got {kind}")


def without_unnameable(data: ImageSet) -> ImageSet:
    """The set without images whose id no file can have; these become problems.

    Names on disk have at most 255 bytes, and `ImageSet.save` adds four to an id.
    """
    kept, problems = [], []
    for row, sample_id in enumerate(data.sample_ids):
        longest = max(len(os.fsencode(f"{part}.png")) for part in sample_id.split("/"))
        if longest > _MOST_NAME_BYTES or "\0" in sample_id:
            problems.append(identities.Omission(sample_id, "no file can have its name and .png"))
        else:
            kept.append(row)
    return (
        take(data, np.array(kept, int))._replace(problems=(*data.problems, *problems))
        if problems
        else data
    )


def take(data: ImageSet, rows: Sequence[int] | np.ndarray) -> ImageSet:
    """The set of some rows, by id again; classes and labels stay what they are."""
    rows = np.asarray(rows)
    rows = rows[np.argsort(np.array(data.sample_ids)[rows], kind="stable")]
    ids = tuple(data.sample_ids[row] for row in rows)
    return data._replace(sample_ids=ids, images=data.images[rows], labels=data.labels[rows])


def spread_rows(labels: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """Rows of `count` random examples, as evenly spread over the classes as they allow."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    # The n-th example of every class comes before the (n + 1)-th of any.
    rank = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        own = order[labels[order] == label]
        rank[own] = np.arange(len(own))
    return np.sort(order[np.argsort(rank[order], kind="stable")][:count])


def read(
    source: str,
    *,
    cifar10_dir: str | None = None,
    tfds_dir: str | None = None,
    split: str = "train",
    image_px: int | None = None,
    resize: bool = False,
    classes: Sequence[str] | None = None,
) -> ImageSet:
    """Reads the set that a word names, as the programs' flags do.

    Args:
        source: "cifar10", "tfds:NAME" or "tfds:NAME:SPLIT", or a folder for `load_image_folder`.
        cifar10_dir: where CIFAR-10 is.
        tfds_dir: folder of TFDS data sets; default `~/tensorflow_datasets`.
        split: of CIFAR-10, and of a TFDS set without one.
        image_px: see `load_image_folder`.
        resize: see `load_image_folder`.
        classes: see `load_image_folder`; CIFAR-10 has its own.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it cannot be used.
    """
    if source == "cifar10":
        if not cifar10_dir:
            raise ValueError("cifar10 needs --cifar10_dir, the folder it is in")
        if split not in ("train", "test"):
            raise ValueError(f"split is {split!r}, but must be 'train' or 'test' for cifar10")
        return read_cifar10(cifar10_dir, split=split)
    if not source.startswith("tfds:"):
        root = pathlib.Path(source).expanduser()
        return load_image_folder(root, image_px=image_px, resize=resize, classes=classes)
    name, _, own_split = source.removeprefix("tfds:").partition(":")
    folder = pathlib.Path(tfds_dir or "~/tensorflow_datasets").expanduser()
    return read_records(
        folder,
        name,
        split=own_split or split,
        image_px=image_px,
        resize=resize,
        classes=classes,
    )


def load_image_folder(
    root: str | pathlib.Path,
    *,
    image_px: int | None = None,
    resize: bool = False,
    classes: Sequence[str] | None = None,
    num_threads: int = 4,
) -> ImageSet:
    """Reads a folder with one folder per class.

    Gray images become RGB with equal channels, transparency is dropped. Files that cannot be read,
    images that are not `image_px` square (without `resize`) and images of unknown classes are left
    out and become problems.

    Args:
        root: the folder.
        image_px: side S; by default that of the commonest square images.
        resize: cut the largest central square of images of other sizes and resize it to S.
        classes: names that labels index; by default those found.
        num_threads: that decode.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no usable image.
    """
    listing = identities.list_tree(root)

    paths = [sample.path for sample in listing.samples]
    read_fn = _pixels_or_reason(photos.read_photo, side=image_px if resize else None)
    found = parallel.thread_map(read_fn, paths, width=num_threads)
    items = [
        _Item(sample.sample_id, sample.identity, pixels)
        for sample, pixels in zip(listing.samples, found, strict=True)
    ]
    names = classes or listing.identities
    return _squares(
        items, names, str(root), image_px=image_px, resize=resize, problems=listing.problems
    )


def read_records(
    data_dir: str | pathlib.Path,
    name: str,
    *,
    split: str = "train",
    image_px: int | None = None,
    resize: bool = False,
    classes: Sequence[str] | None = None,
    num_threads: int = 4,
) -> ImageSet:
    """Reads a TFDS data set with the features "image" (uint8) and "label", without TensorFlow.

    Ids come from the feature "sample_id" or "id", and do not depend on the order of the examples or
    on the number of files: its path, without the extension, if the last folder of that is the
    class, else "<class>/" and the path with "_" for "/". So what `array_records` wrote from a tree
    has the ids of `load_image_folder`. A set without such a feature is numbered in its own order:
    "<class>/<split>_<number>".

    Args:
        data_dir: folder of data sets.
        name: of the set, or "name/config"; its newest version is read.
        split: its name.
        image_px: as in `load_image_folder`, like everything below.
        resize: likewise.
        classes: likewise.
        num_threads: that decode.

    Raises:
        FileNotFoundError: there is no such data set.
        ValueError: no such split or features, not stored as ArrayRecord, no usable image.
    """
    with array_records.damage_named(data_dir, name):
        found_classes = array_records.classes_of(data_dir, name)
        examples = array_records.open_source(data_dir, name, split, decode=False)
    folders = [
        found.replace("/", "_") if found not in (".", "..") else "_" for found in found_classes
    ]
    decode_fn = _pixels_or_reason(photos.decode_photo, side=image_px if resize else None)

    def read_one(row: int) -> _Item:
        with array_records.damage_named(data_dir, name):
            example = examples[row]
        own = example.get("sample_id", example.get("id"))
        own = f"{split}_{row:05d}" if own is None else _text(own)
        label = int(example["label"])
        if label >= len(folders):
            raise ValueError(f"{name} in {data_dir} is damaged: example {row} has label {label}")
        class_name = folders[label] if label >= 0 else "unlabelled"
        return _Item(_path_in_class(own, class_name), class_name, decode_fn(example["image"]))

    items = parallel.thread_map(read_one, range(len(examples)), width=num_threads)
    return _squares(items, classes or folders, f"{name}:{split}", image_px=image_px, resize=resize)


def read_cifar10(
    folder: str | pathlib.Path, *, split: Literal["train", "test"] = "train"
) -> ImageSet:
    """Reads CIFAR-10 from whatever `cifar10.load` reads.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it holds no CIFAR-10, or a damaged one.
    """
    found = cifar10.load(folder, split)
    ids = [f"{found.classes[k]}/{split}_{i:05d}" for i, k in enumerate(found.labels)]
    order = np.argsort(ids, kind="stable")
    images = np.ascontiguousarray(found.images[order])
    return ImageSet(tuple(ids[i] for i in order), images, found.labels[order], found.classes)


class _Item(NamedTuple):
    """An image that was found: its path with extension, its class, pixels or why there are none."""

    name: str
    class_name: str
    pixels: np.ndarray | str


def _pixels_or_reason(
    decode_fn: Callable[..., photos.Photo], *, side: int | None
) -> Callable[..., np.ndarray | str]:
    """Pixels of what is decoded, a square of a side if one is given, or why there are none."""

    def decode(source: str) -> np.ndarray | str:
        try:
            pixels = decode_fn(source).pixels
        except photos.PhotoError as error:
            return str(error)
        return pixels if side is None else identities.fit_square(pixels, side)

    return decode


def _squares(
    items: Iterable[_Item],
    classes: Sequence[str],
    origin: str,
    *,
    image_px: int | None,
    resize: bool,
    problems: Sequence[identities.Omission] = (),
) -> ImageSet:
    """The set of what has one size and a known class; the rest become problems."""
    shapes = [item.pixels.shape[:2] for item in items if not isinstance(item.pixels, str)]
    if not shapes:
        raise ValueError(f"{origin} holds no image that can be read")
    side = image_px or _commonest_side(shapes)
    classes = tuple(sorted(classes))
    problems, kept = list(problems), {}
    for name, class_name, pixels in sorted(items, key=lambda item: item.name):
        sample_id = _unused_id(name, kept)
        if isinstance(pixels, str):
            reason = pixels
        elif class_name not in classes:
            reason = f"{class_name} is none of the classes"
        elif pixels.shape[:2] != (side, side) and not resize:
            height, width = pixels.shape[:2]
            reason = f"is {height} x {width} px, not {side} x {side}"
        elif sample_id in kept:
            reason = "has the id of another image"
        else:
            kept[sample_id] = (identities.fit_square(pixels, side), class_name)
            continue
        problems.append(identities.Omission(name, reason))
    if not kept:
        raise ValueError(f"{origin} holds no image of {side} x {side} px")
    ids = tuple(sorted(kept))
    index = {name: label for label, name in enumerate(classes)}
    labels = np.array([index[kept[name][1]] for name in ids], np.int32)
    return ImageSet(ids, np.stack([kept[i][0] for i in ids]), labels, classes, tuple(problems))


def _path_in_class(name: str, class_name: str) -> str:
    """A relative path whose folder is the class, from an id that may be any text."""
    parts = [part for part in pathlib.PurePosixPath(name).parts if part not in ("/", "..")]
    if len(parts) > 1 and parts[-2] == class_name:
        return "/".join(parts)
    return f"{class_name}/{'_'.join(parts)}"


def _text(value: bytes | str | int) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _commonest_side(shapes: list[tuple[int, int]]) -> int:
    """Of square images, or the commonest shorter side where none is square; ties: the smaller."""
    squares = [height for height, width in shapes if height == width]
    counts = Counter(squares or [min(shape) for shape in shapes])
    return min(counts, key=lambda side: (-counts[side], side))


def _unused_id(name: str, used: Collection[str]) -> str:
    """The path without its extension, or with it where two files differ in nothing else."""
    path = pathlib.PurePosixPath(name)
    short = path.with_suffix("").as_posix()
    return f"{short}_{path.suffix[1:]}" if short in used and path.suffix else short
