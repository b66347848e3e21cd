"""Noise by sample id or class: what the makers of unlearnable data write, and images with it.

Noise is signed and in whole gray levels, so that what is written stays within a budget exactly. It
belongs to stable sample ids (see `image_sets`) or to class names, never to a position in a loader
or a file: it is read back in the order of its names, however a file is shuffled or cut into parts.
Host code.
"""

import io
import json
import math
import os
import pathlib
import re
import shutil
import types
import zipfile
from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

import numpy as np
import tensorflow_datasets as tfds

from afr_jax.core import files, interrupts
from afr_jax.data import array_records, image_sets

# What a file may unpack to, however small it is: patterns that samples share shrink to nothing.
_SMALL_BYTES = 1 << 29
_RECORDS = "noise"  # Name of the data set, and of its only split.
# What `write_noise_records` leaves in its folder.
_WRITTEN = re.compile(
    r"1\.0\.0(/((dataset_info|features|metadata)\.json|noise-noise\.array_record-\d+-of-\d+))?"
)

Granularity = Literal["sample", "class"]


class Noise(NamedTuple):
    """Noise that is added to 8-bit images.

    Attributes:
        names: M sample ids, or class names.
        levels: `[M, H, W, 3]` int16, signed gray levels.
        granularity: "sample" or "class": what `names` are.
        settings: how it was made; what JSON can say.
    """

    names: tuple[str, ...]
    levels: np.ndarray
    granularity: Granularity
    settings: Mapping[str, files.Json] = types.MappingProxyType({})

    def rows_of(self, data: image_sets.ImageSet) -> np.ndarray:
        """Row of the noise for each of N samples, `[N]` int64; -1 where it has none."""
        index = {name: row for row, name in enumerate(self.names)}
        if self.granularity == "sample":
            return np.array([index.get(name, -1) for name in data.sample_ids], np.int64)
        of_class = np.array([index.get(name, -1) for name in data.classes], np.int64)
        return of_class[data.labels]

    def apply(self, data: image_sets.ImageSet) -> image_sets.ImageSet:
        """The set with the noise added and clipped to 0..255; samples without noise stay as is.

        Raises:
            ValueError: the noise has another image size.
        """
        if data.images.shape[1:] != self.levels.shape[1:]:
            raise ValueError(
                f"noise {self.levels.shape[1:]} does not fit images {data.images.shape[1:]}"
            )
        rows = self.rows_of(data)
        images = data.images.copy()
        has_noise = np.flatnonzero(rows >= 0)
        # In parts: int16 sums of a whole data set would take three times its memory.
        for part in np.array_split(has_noise, max(1, len(has_noise) // 4096)):
            total = images[part].astype(np.int16) + self.levels[rows[part]]
            images[part] = np.clip(total, 0, 255).astype(np.uint8)
        return data._replace(images=images)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an `.npz`, or under another name a folder of records; `read_noise` reads both.

        Raises:
            FileExistsError: there is a folder of something else.
        """
        write = write_noise if pathlib.Path(path).suffix == ".npz" else write_noise_records
        write(path, self)


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


def write_noise(path: str | os.PathLike[str], noise: Noise) -> None:
    """Writes an `.npz` with names, levels (int8 where they fit), granularity and settings (JSON).

    The same noise gives the same bytes.

    Args:
        path: of the file, replaced atomically.
        noise: what to write.
    """
    arrays = {
        "names": np.array(noise.names, np.str_),
        "levels": _narrow(noise.levels),
        "granularity": np.array(noise.granularity),
        "settings": np.array(json.dumps(files.to_jsonable(noise.settings), sort_keys=True)),
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
    folder: str | os.PathLike[str], noise: Noise, *, num_shards: int | None = None
) -> None:
    """Writes a TFDS data set of ArrayRecord files: "name" and "levels" (int8 where they fit).

    It is `<folder>/1.0.0`; granularity and settings are its metadata. The same noise gives the same
    bytes. Loaders may shuffle and cut it up: an example carries its name.

    Args:
        folder: one of noise is replaced once the new one is complete.
        noise: what to write.
        num_shards: files; by default as many as TFDS finds right.

    Raises:
        FileExistsError: the folder holds something else.
    """
    folder = pathlib.Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
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
    metadata = {
        "granularity": noise.granularity,
        "settings": noise.settings,
        "rows": _digest(noise),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = files.lock_folder(folder.parent)
    _end_partial(partial, folder)  # Of a killed run.
    try:
        _check_replaceable(folder)
        array_records.write_records(
            {_RECORDS: examples},
            features,
            partial,
            name=_RECORDS,
            metadata=files.seal(metadata),
            num_shards=num_shards,
        )
        with interrupts.deferred():
            if folder.exists():
                folder.rename(partial / "old")
            (partial / _RECORDS).rename(folder)
    finally:
        _end_partial(partial, folder)
        del lock


def read_noise(path: str | os.PathLike[str]) -> Noise:
    """Reads what `write_noise` or, if it is a folder, `write_noise_records` wrote.

    Records come in the order of their names. Both kinds have checksums.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is no such file or folder, or damaged.
    """
    try:
        found = _read_records if pathlib.Path(path).is_dir() else _read_archive
        noise = found(pathlib.Path(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist, or is no folder of noise") from error
    except Exception as error:  # The libraries have many errors for damaged files.
        raise ValueError(f"{path} is no noise file: {files.printable(error)}") from error
    shape = noise.levels.shape
    if noise.granularity not in ("sample", "class") or len(shape) != 4:
        raise ValueError(f"{path} is no noise file: {noise.granularity} noise {shape}")
    if len(set(noise.names)) != len(noise.levels):
        raise ValueError(f"{path} is no noise file: {len(noise.levels)} noises, not all of a name")
    return noise


def _check_replaceable(folder: pathlib.Path) -> None:
    """Raises a FileExistsError unless there is nothing but what `write_noise_records` wrote."""
    if not folder.is_dir() and folder.exists():
        raise FileExistsError(f"{folder} is a file; choose another name for the folder of noise")
    for path in folder.rglob("*"):
        name = files.printable(path.relative_to(folder).as_posix())
        if not _WRITTEN.fullmatch(name):
            raise FileExistsError(f"{folder} holds {name}, which is no noise; choose another name")


def _end_partial(partial: pathlib.Path, folder: pathlib.Path) -> None:
    """Removes what an attempt to write has left; a set that it did not replace returns."""
    if (partial / "old").exists() and not folder.exists():
        (partial / "old").rename(folder)
    shutil.rmtree(partial, ignore_errors=True)


def _read_archive(path: pathlib.Path) -> Noise:
    with zipfile.ZipFile(path) as archive:
        files.check_npz(archive, path.stat().st_size, small=_SMALL_BYTES)
        if (member := archive.testzip()) is not None:
            raise ValueError(f"damaged: the checksum of {member} is another one")
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
        names = tuple(str(name) for name in archive["names"])
        levels = archive["levels"].astype(np.int16)
        settings = files.parse_json(str(archive["settings"]))
        granularity = cast(Granularity, str(archive["granularity"]))
        return Noise(names, levels, granularity, settings)


def _read_records(folder: pathlib.Path) -> Noise:
    metadata = array_records.metadata_of(folder.parent, folder.name)
    if "checksum" in metadata:  # Earlier versions wrote none.
        metadata = files.unseal(metadata)
    source = array_records.open_source(folder.parent, folder.name, _RECORDS)
    _check_records(folder, len(source))
    found = {}
    for row in range(len(source)):
        example = source[row]
        found[example["name"].decode()] = example["levels"]
    names = tuple(sorted(found))
    levels = np.stack([found[name] for name in names]).astype(np.int16)
    noise = Noise(names, levels, metadata["granularity"], metadata["settings"])
    if "rows" in metadata and metadata["rows"] != _digest(noise):
        raise ValueError("damaged: the checksum of its rows is another one")
    return noise


def _check_records(folder: pathlib.Path, count: int) -> None:
    """Raises a ValueError if records say that they unpack to absurdly much."""
    levels = array_records.features_of(folder.parent, folder.name)["levels"]
    num_bytes = count * math.prod(levels.shape) * np.dtype(levels.np_dtype).itemsize
    paths = pathlib.Path(array_records.find_folder(folder.parent, folder.name)).iterdir()
    file_bytes = sum(path.stat().st_size for path in paths)
    files.check_expansion(num_bytes, file_bytes, small=_SMALL_BYTES)


def _digest(noise: Noise) -> str:
    """SHA-256 of names and levels, in the order of the names."""
    order = np.argsort(np.array(noise.names, object))
    names = np.array([noise.names[row] for row in order])
    return files.digest_of({"names": names, "levels": noise.levels[order].astype(np.int16)})


def _narrow(levels: np.ndarray) -> np.ndarray:
    return levels.astype(np.int8) if np.abs(levels).max(initial=0) <= 127 else levels
