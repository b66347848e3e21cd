"""Frames of people for the studies of patches: from films, folders and photos, or a sample."""

import pathlib
from collections.abc import Sequence

import skimage.data

from afr_jax.core import options
from afr_jax.data import video
from afr_jax.methods.patches import people
from afr_jax.models import mtcnn
from afr_jax.recognition import detect

_SAMPLE_PX = 160

Skipped = list[tuple[str, str]]


def check_paths(flag: str, paths: Sequence[str]) -> None:
    """Checks that all paths of a flag exist.

    Raises:
        options.UsageError: One does not.
    """
    for path in paths:
        if not pathlib.Path(path).expanduser().exists():
            raise options.UsageError(f"--{flag}: {path} does not exist")


def read_people(
    variables: mtcnn.Variables,
    flag: str,
    paths: Sequence[str],
    *,
    max_frames: int | None = None,
    search: detect.DetectorOptions = people.SEARCH,
) -> tuple[list[people.Person], Skipped]:
    """The person of each path, in all frames that show them.

    Args:
        variables: Those of MTCNN's three networks.
        flag: Name of the option that gave the paths, for messages.
        paths: Films, folders and photos.
        max_frames: Most frames of each path, evenly spread; None for all.
        search: Settings of the detector.

    Returns:
        The frames, and (name, reason) of those that are left out.

    Raises:
        options.UsageError: There is no path, one cannot be read, or none shows a face.
    """
    if not paths:
        raise options.UsageError(f"--{flag} is needed")
    found: list[people.Person] = []
    skipped: Skipped = []
    for path in paths:
        place = pathlib.Path(path).expanduser()
        try:
            frames = video.read_frames([place], max_frames=max_frames)
        except (FileNotFoundError, video.VideoError) as error:
            raise options.UsageError(f"--{flag}: {error}") from error
        shown, lost = people.find_person(
            variables, frames.frames, is_film=place.is_file(), options=search
        )
        found += shown
        skipped += [*frames.skipped, *lost]
    if not found:
        raise options.UsageError(f"--{flag}={','.join(paths)} shows no face")
    return found, skipped


def sample_people(
    variables: mtcnn.Variables,
    shifts: Sequence[int],
    *,
    search: detect.DetectorOptions = people.SEARCH,
) -> tuple[list[people.Person], Skipped]:
    """The sample portrait, cut out at some shifts in pixels: small photos for a first try."""
    portrait = skimage.data.astronaut()[:256, 128:384]
    frames = [
        video.Frame(f"portrait_{n}", portrait[n : n + _SAMPLE_PX, n : n + _SAMPLE_PX])
        for n in shifts
    ]
    return people.find_person(variables, frames, is_film=False, options=search)
