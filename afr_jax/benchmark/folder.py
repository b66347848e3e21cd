"""Row `folder`: detection and cloaking in a folder of photos of all sizes, cold and warm.

Ours is the whole program, from its start over decoding to what it writes, with an empty cache of
compiled programs and with a full one. PyPI `mtcnn` and YuNet are called photo by photo; `mtcnn`
gets decoded photos, and its start does not count, but what its first pass takes more than others
does. Nobody else stands beside the cloaks.
"""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from afr_jax.benchmark import detection, setting, timing
from afr_jax.benchmark import photos as photo_source
from afr_jax.core import files, options
from afr_jax.data import photos
from afr_jax.evaluation import reference
from afr_jax.evaluation.attackers import other_detectors
from afr_jax.recognition import detect
from afr_jax.recognition.detectors import yunet

# Exit codes of a program that did its work; 3 where some photo had no face, say.
_DONE = (0, 3)
# What JAX_LOG_COMPILES makes JAX say of each program; one from the cache takes its time, too.
_COMPILED = re.compile(rb"Finished XLA compilation of .* in ([0-9.]+) sec")


@dataclasses.dataclass(frozen=True)
class FolderOptions:
    """What is measured in the row `folder`."""

    folder_photos: int = options.option(150, "photos of the folder", at_least=1)
    folder_cloaks: int = options.option(0, "of these that are cloaked, as well", at_least=0)
    folder_steps: int = options.option(20, "gradient steps of such a cloak", at_least=1)
    folder_group: int = options.option(
        0, "megapixels of a photo of three large faces that is cloaked alone, as well", at_least=0
    )

    def __post_init__(self) -> None:
        """Checks ranges."""
        options.check(self)


class _Run(NamedTuple):
    """What one run of the program took: seconds, programs and their seconds, bytes at its peak."""

    seconds: float
    programs: int
    compile_seconds: float
    peak_bytes: int


def run(config: FolderOptions, given: setting.Setting) -> setting.Measured:
    """Detects the faces of a folder once cold, and warm by turns with the others; cloaks likewise.

    Raises:
        options.UsageError: no photo can be read.
    """
    paths = _make_folder(config.folder_photos, given)
    chosen = paths[: config.folder_cloaks]
    cloaked = _cloak(chosen, [f"--num_steps={config.folder_steps}"], given)
    alone = _cloak(_make_group(config.folder_group, given), ["--format=same"], given)
    sizes = [np.prod(photos.read_photo(path).pixels.shape[:2]) / 1e6 for path in paths]
    name = f"folder, {len(paths)} photos of {min(sizes):.2g}-{max(sizes):.2g} MP"
    command = ["detect", f"--images={given.folder / 'photos'}"]
    cache = given.folder / "cache"
    runs = [_start(command, cache)]
    with given.reference.open(detection.DRIVER) as other:
        pixels = [] if other is None else _decoded(paths)
        first = None if other is None else [_ask(other, pixels)]

        def ours() -> float:
            runs.append(_start(command, cache))
            return runs[-1].seconds

        sides = {"ours": ours, "yunet": lambda: _yunet(paths)}
        if other is not None:
            sides["theirs"] = lambda: _ask(other, pixels)
        times = timing.take_turns(sides, repeats=given.repeats)
        versions = other.versions if other else {}
    rows = [
        timing.compare(name, "s, cold", [runs[0].seconds], first),
        timing.compare(name, "s, warm", times["ours"], times.get("theirs")),
    ]
    details: dict[str, files.Json] = {
        "megapixels": timing.spread(sizes),
        "yunet_seconds": timing.spread(times["yunet"]),
        "cold": runs[0]._asdict(),
        "warm": runs[-1]._asdict(),
    }
    for key, name, found in (
        ("cloak", f"cloak, {len(chosen)} of these photos", cloaked),
        ("group", f"cloak, a photo of {config.folder_group} MP with three large faces", alone),
    ):
        if found:
            cold, *warm = found
            rows.append(timing.compare(name, "s, cold", [cold.seconds], None))
            rows.append(timing.compare(name, "s, warm", [run.seconds for run in warm], None))
            details |= {f"{key}_cold": cold._asdict(), f"{key}_warm": warm[-1]._asdict()}
    return setting.Measured(rows, versions, details)


def _make_folder(count: int, given: setting.Setting) -> list[pathlib.Path]:
    """Writes JPEG files of many sizes and shapes, made of the user's photos or of the portrait."""
    folder = given.folder / "photos"
    folder.mkdir()
    if given.images:
        sources = given.paths
        spread = [sources[number * len(sources) // count] for number in range(count)]
        originals = photo_source.read(spread, count)
    else:
        originals = (photo_source.made(number, 640) for number in range(count))
    paths = []
    for number, pixels in enumerate(originals):
        paths.append(folder / f"{number:04}.jpg")
        made = given.shrunk(photo_source.of_any_size(pixels, (given.seed, number)))
        Image.fromarray(made).save(paths[-1], quality=90)
    if not paths:
        raise options.UsageError("--images holds no readable photo")
    return paths


def _make_group(megapixels: int, given: setting.Setting) -> list[pathlib.Path]:
    """Writes the JPEG file of a large photo, if one is asked for."""
    if not megapixels:
        return []
    path = given.folder / "group.jpg"
    Image.fromarray(given.shrunk(photo_source.group(megapixels))).save(path, quality=90)
    return [path]


def _cloak(
    paths: Sequence[pathlib.Path], flags: Sequence[str], given: setting.Setting
) -> list[_Run]:
    """Cloaks photos with an empty cache, and then with a full one as often as is asked."""
    if not paths:
        return []
    command = ["cloak", f"--images={','.join(map(str, paths))}", *flags]
    cache = given.folder / f"{paths[0].stem}_cache"
    return [_start(command, cache) for _ in range(1 + given.repeats)]


def _start(command: Sequence[str], cache: pathlib.Path) -> _Run:
    """Runs a program with its flags in a process of its own, with a cache of compiled programs."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_LOG_COMPILES": "1"}
    with tempfile.TemporaryDirectory() as output, tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-m", "afr_jax.cli", *command, f"--output_dir={output}"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read()
    if child.returncode not in _DONE:
        raise RuntimeError(f"the program ended with {child.returncode}:\n{said[-2000:].decode()}")
    compiled = [float(found) for found in _COMPILED.findall(said)]
    return _Run(seconds, len(compiled), sum(compiled), used.ru_maxrss << 10)


def _decoded(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """The photos as `.npy` files."""
    decoded = [path.parent.parent / f"{path.stem}.npy" for path in paths]
    for path, array in zip(paths, decoded, strict=True):
        np.save(array, photos.read_photo(path).pixels)
    return decoded


def _ask(other: reference.ReferenceProcess, paths: Sequence[pathlib.Path]) -> float:
    """Seconds that the package takes for the photos."""
    return sum(other_detectors.ask_mtcnn(other, paths, detect.DetectorOptions())[0])


def _yunet(paths: Sequence[pathlib.Path]) -> float:
    """Seconds that YuNet takes for the photos, with decoding."""
    detect_fn = yunet.load()
    start = time.perf_counter()
    for path in paths:
        detect_fn(photos.read_photo(path).pixels)
    return time.perf_counter() - start
