"""CIFAR-10 from the binary archive, a folder per class, or mosaics; as arrays.

Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images". The archive is read in its
binary form (records of one label byte and 3 x 1,024 pixel bytes, channel by channel); the pickled
one would have to be executed to be read. Sample ids are "train/00000" and so on, in the order of
the source.
"""

import gzip
import io
import os
import pathlib
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from afr_jax.core import files
from afr_jax.data import identities

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
# The address that the data set's own page gives for the binary version.
_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_RECORD = 1 + 3 * 32 * 32
_FILE_BYTES = 10_000 * _RECORD
# Of the six files and some text beside them.
_ARCHIVE_BYTES = 7 * _FILE_BYTES
_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
_MOSAIC = (25, 40)  # rows and columns of images


class Cifar10Images(NamedTuple):
    """Images in memory.

    Attributes:
        images: `[N, H, W, 3]` uint8 RGB.
        labels: `[N]` int32, indices into `classes`.
        sample_ids: N stable names.
        classes: names of the classes.
    """

    images: np.ndarray
    labels: np.ndarray
    sample_ids: tuple[str, ...]
    classes: tuple[str, ...]


def load(source: str | os.PathLike[str], split: str) -> Cifar10Images:
    """Reads a split from whatever a path holds.

    Args:
        source: the archive `cifar-10-binary.tar.gz`; a folder with its `.bin` files; a folder of
            mosaics (`read_mosaics`); or a folder with `train` and `test`, each with one folder of
            images per class.
        split: "train" or "test".

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: it is none of these, or damaged.
    """
    if split not in _FILES:
        raise ValueError(f"split is {split!r}, but must be 'train' or 'test'")
    source = pathlib.Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    if source.is_file() or list(source.rglob("test_batch.bin")):
        return read_binary(source, split)
    if (source / f"{split}_labels.npz").exists():
        return read_mosaics(source, split)
    if (source / split).is_dir():
        return read_folders(source / split, split=split)
    raise ValueError(
        f"{source} holds no CIFAR-10: neither .bin files (of {_URL}) nor mosaics nor folders train "
        "and test"
    )


def read_binary(source: str | os.PathLike[str], split: str) -> Cifar10Images:
    """Reads the binary version: the archive, or a folder with its files at any depth.

    Raises:
        ValueError: a file is missing, damaged, too large or has no whole number of records, or a
            label is above 9.
    """
    source = pathlib.Path(source)
    read = _read_archive if source.is_file() else _read_folder
    found = read(source, _FILES[split])
    data = b"".join(_whole(name, found[name]) for name in _FILES[split])
    records = np.frombuffer(data, np.uint8).reshape(-1, _RECORD)
    labels = records[:, 0].astype(np.int32)
    if labels.max() >= len(CLASSES):
        raise ValueError(f"{source}: a label is {labels.max()}, but CIFAR-10 has 0 to 9")
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Cifar10Images(np.ascontiguousarray(images), labels, _ids(split, len(labels)), CLASSES)


def read_mosaics(source: str | os.PathLike[str], split: str) -> Cifar10Images:
    """Reads images that were joined to mosaics of 25 rows of 40, a thousand in each file.

    The files are `<split>_00.webp` and so on (any lossless format); `<split>_labels.npz` has the
    array `label` and may have `classes`.

    Args:
        source: the folder.
        split: "train" or "test".

    Raises:
        ValueError: files are missing, damaged or have another size than the labels say, or a label
            is of no class.
    """
    source = pathlib.Path(source)
    labels_path = source / f"{split}_labels.npz"
    try:
        with zipfile.ZipFile(labels_path) as archive:
            files.check_npz(archive, labels_path.stat().st_size)
        with np.load(labels_path, allow_pickle=False) as table:
            labels = table["label"]
            names = table.get("classes", CLASSES)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ValueError(f"{labels_path} is damaged, or not a table of labels: {error}") from error
    classes = tuple(map(str, names))
    if not np.isin(labels, np.arange(len(classes))).all():
        raise ValueError(f"{labels_path}: a label is none of 0 to {len(classes) - 1}")
    labels = labels.astype(np.int32)
    rows, columns = _MOSAIC
    parts = []
    for path in sorted(source.glob(f"{split}_[0-9]*.*")):
        try:
            with Image.open(path, formats=("WEBP", "PNG")) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:  # Pillow's of damaged files.
            raise ValueError(f"{path} is damaged, or no WebP or PNG: {error}") from error
        if pixels.shape != (rows * 32, columns * 32, 3):
            raise ValueError(f"{path} has shape {pixels.shape}, but must be {rows * 32} x 1280 x 3")
        parts.append(pixels.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 1, 3, 4))
    count = sum(len(part) * columns for part in parts)
    if count < len(labels) or not len(labels):
        raise ValueError(f"{source} has {count} {split} images, but {len(labels)} labels")
    images = np.concatenate(parts).reshape(-1, 32, 32, 3)[: len(labels)]
    return Cifar10Images(images, labels, _ids(split, len(labels)), classes)


def read_folders(
    root: str | os.PathLike[str], *, split: str = "train", side: int = 32
) -> Cifar10Images:
    """Reads a folder with one folder of images per class; ids are `<split>/<path>`.

    Raises:
        ValueError: there is no image, or one that cannot be read.
    """
    listing = identities.list_tree(root)
    readable, images = identities.read_samples(listing, side)
    if len(readable.samples) < len(listing.samples):
        problem = readable.problems[-1]
        raise ValueError(f"{root}/{problem.name}: {problem.reason}")
    ids = tuple(f"{split}/{name}" for name in readable.sample_ids)
    return Cifar10Images(images, readable.labels, ids, readable.identities)


def _read_archive(source: pathlib.Path, names: Sequence[str]) -> dict[str, bytes]:
    found = {}
    try:
        with gzip.open(source) as packed:  # Its last bytes are the checksum of all.
            unpacked = packed.read(_ARCHIVE_BYTES + 1)
        if len(unpacked) > _ARCHIVE_BYTES:
            raise ValueError(f"{source} unpacks to more than CIFAR-10, {_ARCHIVE_BYTES} bytes")
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
            for member in archive:
                name = pathlib.PurePosixPath(member.name).name
                if member.isfile() and name in names and name not in found:
                    content = archive.extractfile(member)
                    assert content is not None  # It is a file.
                    found[name] = content.read(_FILE_BYTES + 1)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{source} is no tar.gz archive, or damaged: {error}") from error
    for name in names:
        if name not in found:
            raise ValueError(f"{source} has no {name}; is it the binary version of CIFAR-10?")
    return found


def _read_folder(source: pathlib.Path, names: Sequence[str]) -> dict[str, bytes]:
    found = {}
    for name in names:
        paths = sorted(source.rglob(name))
        if not paths:
            raise ValueError(f"{source} has no {name}")
        with paths[0].open("rb") as file:
            found[name] = file.read(_FILE_BYTES + 1)
    return found


def _whole(name: str, data: bytes) -> bytes:
    if len(data) > _FILE_BYTES:
        raise ValueError(f"{name} has more than {_FILE_BYTES} bytes, as no file of CIFAR-10 has")
    if not data or len(data) % _RECORD:
        raise ValueError(f"{name} has {len(data)} bytes, which is no multiple of {_RECORD}")
    return data


def _ids(split: str, count: int) -> tuple[str, ...]:
    return tuple(f"{split}/{number:05d}" for number in range(count))
