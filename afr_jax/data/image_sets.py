"""Labelled image sets in memory: a folder per class, or CIFAR-10; every image of one square size.

A sample's id is stable: for a tree the path below its root without the extension ("cat/0001"), for
CIFAR-10 "<class>/<split>_<number>" with the number in the order of the files. Sets are sorted by
id, so nothing depends on the order in which a file system lists them. Host code.
"""

import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from afr_jax.core import parallel
from afr_jax.data import identity_tree, photos

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_SIDE = 32
# Layout of the lossless mosaics: 25 rows x 40 columns of images in a file.
_MOSAIC = (25, 40)


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
    problems: tuple[identity_tree.Problem, ...] = ()


def made_up(
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
    colours = textures.uniform(-1, 1, (num_classes, 3, 3))
    place = np.arange(side) * (2 * np.pi / side)
    labels = np.arange(num_images) % num_classes
    phase = generator.uniform(0, 2 * np.pi, (num_images, 2))
    wave = waves[labels][:, :, :, None]
    rows = wave[:, :, 0] * (place + phase[:, :1])[:, None]
    columns = wave[:, :, 1] * (place + phase[:, 1:])[:, None]
    texture = np.cos(rows[:, :, :, None] + columns[:, :, None, :])
    signal = np.einsum("nwrc,nwk->nrck", texture, colours[labels])
    noise = generator.normal(0, 1, (num_images, side, side, 3))
    images = np.clip(127.5 + 13 * signal + 20 * noise, 0, 255).astype(np.uint8)
    classes = tuple(f"class_{number:02d}" for number in range(num_classes))
    ids = [f"{classes[k]}/{split}_{i:05d}" for i, k in enumerate(labels)]
    order = np.argsort(ids, kind="stable")
    ordered = tuple(ids[row] for row in order)
    return ImageSet(ordered, images[order], labels[order].astype(np.int32), classes)


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


def read_tree(
    root: str | pathlib.Path,
    *,
    image_px: int | None = None,
    resize: bool = False,
    classes: Sequence[str] | None = None,
    num_threads: int = 4,
) -> ImageSet:
    """Reads a folder with one folder per class.

    Grey images become RGB with equal channels, transparency is dropped. Files that cannot be read,
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
    listing = identity_tree.list_tree(root)

    def read(sample: identity_tree.Sample) -> np.ndarray | str:
        try:
            return photos.read_photo(sample.path).pixels
        except photos.PhotoError as error:
            return str(error)

    found = parallel.overlapped(read, listing.samples, width=num_threads)
    shapes = [pixels.shape[:2] for pixels in found if not isinstance(pixels, str)]
    if not shapes:
        raise ValueError(f"{root} holds no image that can be read")
    side = image_px or _commonest_side(shapes)
    classes = tuple(sorted(classes or listing.identities))
    problems, kept = list(listing.problems), {}
    for sample, pixels in zip(listing.samples, found, strict=True):
        if isinstance(pixels, str):
            reason = pixels
        elif sample.identity not in classes:
            reason = f"{sample.identity} is none of the classes"
        elif pixels.shape[:2] != (side, side) and not resize:
            height, width = pixels.shape[:2]
            reason = f"is {height} x {width} px, not {side} x {side}"
        else:
            sample_id = _unused_id(sample.sample_id, kept)
            kept[sample_id] = (identity_tree.fit_square(pixels, side), sample.identity)
            continue
        problems.append(identity_tree.Problem(sample.sample_id, reason))
    if not kept:
        raise ValueError(f"{root} holds no image of {side} x {side} px")
    ids = tuple(sorted(kept))
    index = {name: label for label, name in enumerate(classes)}
    labels = np.array([index[kept[name][1]] for name in ids], np.int32)
    return ImageSet(ids, np.stack([kept[i][0] for i in ids]), labels, classes, tuple(problems))


def read_cifar10(
    folder: str | pathlib.Path, *, split: Literal["train", "test"] = "train"
) -> ImageSet:
    """Reads CIFAR-10, as the official binary version or as lossless mosaics.

    The binary version is `data_batch_{1..5}.bin` and `test_batch.bin` of
    `cifar-10-binary.tar.gz`; mosaics are `{train,test}_NN.webp`, 25 rows x 40 columns of images,
    with `label` in `{train,test}_labels.npz`.

    Raises:
        FileNotFoundError: the folder holds neither.
    """
    folder = pathlib.Path(folder)
    names = sorted(folder.glob("data_batch_[1-5].bin" if split == "train" else "test_batch.bin"))
    mosaics = sorted(folder.glob(f"{split}_[0-9][0-9].webp"))
    if names:
        records = np.concatenate([np.fromfile(name, np.uint8) for name in names])
        records = records.reshape(-1, 1 + 3 * _SIDE * _SIDE)
        labels = records[:, 0].astype(np.int32)
        images = records[:, 1:].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    elif mosaics:
        images = np.concatenate(parallel.overlapped(_read_mosaic, mosaics))
        with np.load(folder / f"{split}_labels.npz", allow_pickle=False) as table:
            labels = table["label"].astype(np.int32)[: len(images)]
    else:
        raise FileNotFoundError(
            f"{folder} holds neither data_batch_1.bin .. test_batch.bin of cifar-10-binary.tar.gz "
            f"(https://www.cs.toronto.edu/~kriz/cifar.html) nor {split}_00.webp .."
        )
    ids = [f"{CIFAR10_CLASSES[k]}/{split}_{i:05d}" for i, k in enumerate(labels)]
    order = np.argsort(ids, kind="stable")
    images = np.ascontiguousarray(images[order])
    return ImageSet(tuple(ids[i] for i in order), images, labels[order], CIFAR10_CLASSES)


def _read_mosaic(path: pathlib.Path) -> np.ndarray:
    rows, columns = _MOSAIC
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    tiles = pixels.reshape(rows, _SIDE, columns, _SIDE, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(-1, _SIDE, _SIDE, 3)


def _commonest_side(shapes: list[tuple[int, int]]) -> int:
    """Of square images, or the commonest shorter side where none is square; ties: the smaller."""
    squares = [height for height, width in shapes if height == width]
    counts = Counter(squares or [min(shape) for shape in shapes])
    return min(counts, key=lambda side: (-counts[side], side))


def _unused_id(name: str, used: dict) -> str:
    """The path without its extension, or with it where two files differ in nothing else."""
    path = pathlib.PurePosixPath(name)
    short = path.with_suffix("").as_posix()
    return short if short not in used else f"{short}_{path.suffix[1:]}"
