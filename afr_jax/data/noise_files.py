"""Noise by sample id, and protected images: what the generators of unlearnable data write.

Noise is signed and in whole gray levels, so that what is written stays within a budget exactly. It
belongs to stable sample ids (see `image_sets`) or to class names, never to a position in a loader
or a file: it is read back in the order of its names, however a file is shuffled or cut into parts.
Host code.
"""

import io
import json
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from afr_jax.core import files, parallel
from afr_jax.data import array_records

_RECORDS = "noise"  # Name of the data set, and of its only split.

Granularity = Literal["sample", "class"]


class Noise(NamedTuple):
    """Noise that is added to 8-bit images.

    Attributes:
        names: M sample ids, or class names.
        levels: `[M, H, W, 3]` int16, signed gray levels.
        granularity: "sample" or "class": what `names` are.
    """

    names: tuple[str, ...]
    levels: np.ndarray
    granularity: Granularity


def to_levels(values: np.ndarray, *, limit_levels: float | None = None) -> np.ndarray:
    """Noise in [0, 1] units as whole levels, rounded to nearest, clipped to +- the limit.

    Args:
        values: any shape, float.
        limit_levels: gray levels; None for no limit.

    Returns:
        The same shape, int16.
    """
    levels = np.rint(np.asarray(values, np.float64) * 255.0)
    if limit_levels is not None:
        levels = np.clip(levels, -np.floor(limit_levels), np.floor(limit_levels))
    return levels.astype(np.int16)


def rows_for(noise: Noise, sample_ids: Sequence[str], class_names: Sequence[str]) -> np.ndarray:
    """Row of the noise for each sample, `[N]`; -1 where it has none.

    Args:
        noise: N samples are looked up in it.
        sample_ids: of the samples.
        class_names: class of each sample, `N` names.
    """
    index = {name: row for row, name in enumerate(noise.names)}
    wanted = sample_ids if noise.granularity == "sample" else class_names
    return np.array([index.get(name, -1) for name in wanted], np.int64)


def apply(
    images: np.ndarray, noise: Noise, sample_ids: Sequence[str], class_names: Sequence[str]
) -> np.ndarray:
    """Adds the noise and clips to 0..255; samples without noise stay what they are.

    Args:
        images: `[N, H, W, 3]` uint8.
        noise: of the same image size.
        sample_ids: of the images.
        class_names: class of each image, `N` names.

    Returns:
        `[N, H, W, 3]` uint8.

    Raises:
        ValueError: the noise has another image size.
    """
    if images.shape[1:] != noise.levels.shape[1:]:
        raise ValueError(f"noise {noise.levels.shape[1:]} does not fit images {images.shape[1:]}")
    rows = rows_for(noise, sample_ids, class_names)
    protected = images.copy()
    has_noise = np.flatnonzero(rows >= 0)
    # In parts: int16 sums of a whole data set would take three times its memory.
    for part in np.array_split(has_noise, max(1, len(has_noise) // 4096)):
        total = images[part].astype(np.int16) + noise.levels[rows[part]]
        protected[part] = np.clip(total, 0, 255).astype(np.uint8)
    return protected


def write_noise(path: str | os.PathLike[str], noise: Noise, settings: Mapping[str, Any]) -> None:
    """Writes an `.npz` with names, levels (int8 where they fit), granularity and settings (JSON).

    The same noise gives the same bytes.

    Args:
        path: of the file, replaced atomically.
        noise: what to write.
        settings: how it was made; what JSON can say.
    """
    arrays = {
        "names": np.array(noise.names, np.str_),
        "levels": _narrow(noise.levels),
        "granularity": np.array(noise.granularity),
        "settings": np.array(json.dumps(settings, sort_keys=True)),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            # A member without a date: equal noise, equal files.
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED
            )
    files.write_atomically(path, buffer.getvalue(), overwrite=True)


def write_noise_records(
    folder: str | os.PathLike[str],
    noise: Noise,
    settings: Mapping[str, Any],
    *,
    num_shards: int | None = None,
) -> None:
    """Writes a TFDS data set of ArrayRecord files: "name" and "levels" (int8 where they fit).

    It is `<folder>/1.0.0`; granularity and settings are its metadata. The same noise gives the same
    bytes. Loaders may shuffle and cut it up: an example carries its name.

    Args:
        folder: replaced once the new one is complete.
        noise: what to write.
        settings: how it was made; what JSON can say.
        num_shards: files; by default as many as TFDS finds right.
    """
    folder = pathlib.Path(folder)
    levels = _narrow(noise.levels)
    encoding = tfds.features.Encoding.ZLIB
    features = {
        "name": tfds.features.Text(),
        "levels": tfds.features.Tensor(
            shape=levels.shape[1:], dtype=levels.dtype, encoding=encoding
        ),
    }
    pairs = zip(noise.names, levels, strict=True)
    examples = ((name, {"name": name, "levels": values}) for name, values in pairs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".noise") as partial:
        array_records.write_records(
            {_RECORDS: examples},
            features,
            partial,
            name=_RECORDS,
            metadata={"granularity": noise.granularity, "settings": dict(settings)},
            num_shards=num_shards,
        )
        if folder.exists():
            folder.rename(pathlib.Path(partial) / "old")
        (pathlib.Path(partial) / _RECORDS).rename(folder)


def read_noise(path: str | os.PathLike[str]) -> tuple[Noise, dict[str, Any]]:
    """Reads what `write_noise` or, if it is a folder, `write_noise_records` wrote.

    Returns:
        The noise, of records in the order of the names, and its settings.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is no such file or folder.
    """
    try:
        found = _read_records if pathlib.Path(path).is_dir() else _read_archive
        noise, settings = found(pathlib.Path(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist, or is no folder of noise") from error
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no noise file: {error}") from error
    shape = noise.levels.shape
    if noise.granularity not in ("sample", "class") or len(shape) != 4:
        raise ValueError(f"{path} is no noise file: {noise.granularity} noise {shape}")
    if len(set(noise.names)) != len(noise.levels):
        raise ValueError(f"{path} is no noise file: {len(noise.levels)} noises, not all of a name")
    return noise, settings


def _read_archive(path: pathlib.Path) -> tuple[Noise, dict[str, Any]]:
    with np.load(path, allow_pickle=False) as archive:
        names = tuple(str(name) for name in archive["names"])
        levels = archive["levels"].astype(np.int16)
        settings = json.loads(str(archive["settings"]))
        granularity: Any = str(archive["granularity"])
        return Noise(names, levels, granularity), settings


def _read_records(folder: pathlib.Path) -> tuple[Noise, dict[str, Any]]:
    metadata = array_records.metadata_of(folder.parent, folder.name)
    source = array_records.open_source(folder.parent, folder.name, _RECORDS)
    found = {}
    for row in range(len(source)):
        example = source[row]
        found[example["name"].decode()] = example["levels"]
    names = tuple(sorted(found))
    levels = np.stack([found[name] for name in names]).astype(np.int16)
    return Noise(names, levels, metadata["granularity"]), metadata["settings"]


def _narrow(levels: np.ndarray) -> np.ndarray:
    return levels.astype(np.int8) if np.abs(levels).max(initial=0) <= 127 else levels


def write_images(
    folder: str | os.PathLike[str],
    sample_ids: Sequence[str],
    images: np.ndarray,
    *,
    num_threads: int = 4,
) -> None:
    """Writes images as lossless `<folder>/<sample id>.png`, each atomically; others stay.

    Args:
        folder: root of the tree.
        sample_ids: relative paths without extension.
        images: `[N, H, W, 3]` uint8.
        num_threads: that encode.
    """
    folder = pathlib.Path(folder)

    def write(row: int) -> None:
        buffer = io.BytesIO()
        Image.fromarray(images[row]).save(buffer, "PNG")
        path = folder / f"{sample_ids[row]}.png"
        files.write_atomically(path, buffer.getvalue(), overwrite=True)

    parallel.thread_map(write, range(len(sample_ids)), width=num_threads)
