"""Noise by sample id, and protected images: what the generators of unlearnable data write.

Noise is signed and in whole grey levels, so that what is written stays within a budget exactly. It
belongs to stable sample ids (see `image_sets`) or to class names, never to a position in a loader.
Host code.
"""

import io
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from afr_jax.core import parallel
from afr_jax.data import photo_files

Granularity = Literal["sample", "class"]


class Noise(NamedTuple):
    """Noise that is added to 8-bit images.

    Attributes:
        names: M sample ids, or class names.
        levels: `[M, H, W, 3]` int16, signed grey levels.
        granularity: "sample" or "class": what `names` are.
    """

    names: tuple[str, ...]
    levels: np.ndarray
    granularity: Granularity


def to_levels(values: np.ndarray, *, limit_levels: float | None = None) -> np.ndarray:
    """Noise in [0, 1] units as whole levels, rounded to nearest, clipped to +- the limit.

    Args:
        values: any shape, float.
        limit_levels: grey levels; None for no limit.

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
    levels = noise.levels
    fits = np.abs(levels).max(initial=0) <= 127
    arrays = {
        "names": np.array(noise.names, np.str_),
        "levels": levels.astype(np.int8) if fits else levels,
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
    photo_files.write_atomically(path, buffer.getvalue(), overwrite=True)


def read_noise(path: str | os.PathLike[str]) -> tuple[Noise, dict[str, Any]]:
    """Reads what `write_noise` wrote: the noise and its settings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = tuple(str(name) for name in archive["names"])
            levels = archive["levels"].astype(np.int16)
            granularity = str(archive["granularity"])
            settings = json.loads(str(archive["settings"]))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no noise file: {error}") from error
    if granularity not in ("sample", "class") or levels.ndim != 4 or len(names) != len(levels):
        raise ValueError(f"{path} is no noise file: {granularity} noise {levels.shape}")
    return Noise(names, levels, granularity), settings


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
        photo_files.write_atomically(path, buffer.getvalue(), overwrite=True)

    parallel.overlapped(write, range(len(sample_ids)), width=num_threads)
