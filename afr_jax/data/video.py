"""Frames of films and folders: GIF and WebP by Pillow, other films by PyAV, folders as photos.

Host code: no JAX here. Frames are `[H, W, 3]` uint8 RGB.
"""

import contextlib
import os
import pathlib
from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageSequence

from afr_jax.core import backend, interrupts
from afr_jax.data import photo_files, photos

_PILLOW_FILMS = (".gif", ".webp", ".apng")
_FILMS = (".mkv", ".mp4", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
# Of the machine's memory, what the frames of one path may take; compressed, films are 100 times
# smaller.
_MEMORY_SHARE = 0.25
# Other formats are lists of further files and addresses, which nobody asked for.
_FILM_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v",
    "protocol_whitelist": "file",
}
# Frames of a film that samples are taken of: 13 minutes.
_MOST_SAMPLED = 20_000


class VideoError(Exception):
    """A film that cannot be read; the message says which and why."""


class Frame(NamedTuple):
    """A picture `[H, W, 3]` uint8 and its name: `<stem>_<number>`, or that of the photo's file."""

    name: str
    pixels: np.ndarray


class Frames(NamedTuple):
    """Frames in order, and what could not be read: (name, reason) each."""

    frames: list[Frame]
    skipped: list[tuple[str, str]]


def read_frames(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    max_frames: int | None = None,
) -> Frames:
    """Frames of films, folders of photos and photos.

    Args:
        paths: one or several files and folders; films in folders are read too.
        max_frames: of each of `paths`, evenly spread; None for all.

    Returns:
        The frames in the order of the paths. Photos that cannot be read are skipped, with the
        reason; a film that breaks off keeps the frames before, and is listed. So is one that is too
        long: the frames of a path take a quarter of the machine's memory at most.

    Raises:
        FileNotFoundError: one of `paths` does not exist.
        VideoError: one of `paths` has no frame that can be read.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames is {max_frames}, must be at least 1")
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    frames: list[Frame] = []
    skipped: list[tuple[str, str]] = []
    for path in paths:
        found, bad = _read_one(pathlib.Path(path))
        if not found:
            reason = "; ".join(f"{name}: {why}" for name, why in bad) or "it is empty"
            raise VideoError(f"{path} has no frame that can be read ({reason})")
        count = min(max_frames or len(found), len(found))
        frames.extend(found[index] for index in spread(len(found), count))
        skipped.extend(bad)
    return Frames(_told_apart(frames), skipped)


def _told_apart(frames: Sequence[Frame]) -> list[Frame]:
    """The frames, later ones of a name that is taken with a number behind it."""
    taken: set[str] = set()
    found = []
    for frame in frames:
        name, number = frame.name, 1
        while name in taken:
            number += 1
            name = f"{frame.name}_{number}"
        taken.add(name)
        found.append(frame._replace(name=name))
    return found


def spread(total: int, count: int) -> list[int]:
    """`count` of the numbers below `total`, evenly spread from the first on."""
    if not 0 <= count <= total:
        raise ValueError(f"count is {count}, must lie in [0, total={total}]")
    return [number * total // count for number in range(count)]


def sample_film(path: str | os.PathLike[str], count: int, *, max_px: int = 1280) -> list[Frame]:
    """Some frames of a film, evenly spread; no more than twice as many are held at a time.

    Args:
        path: of a film or an animated GIF or WebP, by its name.
        count: of the frames, at least 1.
        max_px: longer sides are reduced to this.

    Returns:
        The frames in order, fewer where the film has fewer. One that breaks off gives what comes
        before, and of one of more than 20,000 frames the rest is not looked at.

    Raises:
        VideoError: it has no frame that can be read.
    """
    path = pathlib.Path(path)
    is_animation = path.suffix.lower() in _PILLOW_FILMS
    kept: list[Frame] = []
    stride = 1
    try:
        with contextlib.closing((_pillow_frames if is_animation else _film_frames)(path)) as film:
            for number, pixels in zip(range(_MOST_SAMPLED), film, strict=False):
                interrupts.check()
                if len(kept) == 2 * count and number % stride == 0:
                    kept, stride = kept[::2], 2 * stride
                if number % stride == 0:
                    image = Image.fromarray(pixels)
                    image.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
                    kept.append(Frame(f"{path.stem}_{number:04d}", np.asarray(image)))
    except VideoError:
        if not kept:
            raise
    if not kept:
        raise VideoError("it holds no pictures")
    return [kept[index] for index in spread(len(kept), min(count, len(kept)))]


def _read_one(path: pathlib.Path) -> tuple[list[Frame], list[tuple[str, str]]]:
    frames: list[Frame] = []
    skipped: list[tuple[str, str]] = []
    room = int(_MEMORY_SHARE * backend.memory_bytes())
    for item in photo_files.list_photos([path]):
        suffix = item.path.suffix.lower()
        try:
            if item.problem is not None:
                raise photos.PhotoError(item.problem)
            if suffix in _PILLOW_FILMS:
                pictures = _pillow_frames(item.path)
            elif suffix in _FILMS:
                pictures = _film_frames(item.path)
            else:
                pictures = iter([photos.read_photo(item.path).pixels])
            for number, pixels in enumerate(pictures):
                if pixels.nbytes > room:
                    raise VideoError(f"no memory for its frames from number {number} on")
                room -= pixels.nbytes
                is_film = suffix in (*_PILLOW_FILMS, *_FILMS)
                name = f"{item.path.stem}_{number:04d}" if is_film else item.path.stem
                frames.append(Frame(name, pixels))
        except (photos.PhotoError, VideoError) as error:
            skipped.append((item.relative.as_posix(), str(error)))
    return frames, skipped


def _pillow_frames(path: pathlib.Path) -> Generator[np.ndarray]:
    try:
        with photos.warnings_ignored():
            # Of other formats Pillow would have some read by programs outside, PostScript say.
            film = Image.open(path, formats=("GIF", "WEBP", "PNG"))
        with film:
            _check_size(film.width, film.height)
            for frame in ImageSequence.Iterator(film):
                yield np.asarray(frame.convert("RGB"))
    except VideoError:
        raise
    # Damaged content is met with any of a dozen types, as in `photos.decode_photo`.
    except Exception as error:
        raise VideoError(f"not a film that can be read to its end: {error}") from error


def _film_frames(path: pathlib.Path) -> Generator[np.ndarray]:
    import av  # Late: its libraries take time to load, and few runs read films.

    try:
        with av.open(str(path), options=_FILM_OPTIONS) as film:
            if not film.streams.video:
                raise VideoError("it holds no pictures")
            _check_size(film.streams.video[0].width, film.streams.video[0].height)
            for frame in film.decode(video=0):
                _check_size(frame.width, frame.height)
                yield frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"not a film that can be read to its end: {error}") from error


def _check_size(width: int, height: int) -> None:
    most = backend.most_pixels()
    if width * height > most:
        raise VideoError(f"its frames have more than {most / 1e6:g} megapixels (--max_megapixels)")
