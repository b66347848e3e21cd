"""Records of a cloaking run: which photo became which file, and what was measured on it.

One JSON file for each photo. A resumed run goes by them, and report.json is put together from them:
`image` in a record is a photo's entry there, the rest is for resuming alone. The record of an
output is written before the output itself, so that a killed run knows its own file.

A record has a checksum, and names an output below the output folder. One that is damaged, or names
another file, counts for nothing: its photo is worked on again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict, cast

from afr_jax.core import files, progress
from afr_jax.data import photo_files, photos
from afr_jax.methods.cloaking import check
from afr_jax.recognition import detect

FOLDER = "records"
# Statuses of photos that have an output.
_WRITTEN = ("cloaked", "partly_cloaked")


@dataclasses.dataclass(frozen=True)
class Job:
    """One input with its output and the place of its record.

    Attributes:
        source: the photo.
        output: where its cloaked version goes.
        name: of the output, below the output folder.
        record: the record's file.
    """

    source: photo_files.PhotoInput
    output: pathlib.Path
    name: str
    record: pathlib.Path


class ImageRecord(TypedDict):
    """A photo in report.json.

    Attributes:
        image: its path below the folder it was found in.
        output: of the cloaked photo, below the output folder; None where there is none.
        status: "cloaked", "partly_cloaked" (an output was written, but a face that was not cloaked
            is larger than each one that was), "already_cloaked", "no_face", "unreadable" or
            "failed".
        reason: for a status other than "cloaked", else None.
        faces: all that were seen.
    """

    image: str
    output: str | None
    status: str
    reason: str | None
    faces: list[check.CloakRecord]


class Record(TypedDict):
    """What the file of a job holds; arguments of `write`, and the photo's entry in report.json."""

    source: str
    output: str
    sha256: str | None
    output_sha256: str | None
    pixels_sha256: str | None
    pending: bool
    found: dict[str, list[object]] | None
    judges: dict[str, str] | None
    image: ImageRecord


def list_jobs(
    images: Sequence[str | pathlib.Path],
    output_dir: pathlib.Path,
    workdir: pathlib.Path,
    *,
    file_format: str = "png",
) -> tuple[list[Job], int]:
    """All photos with their outputs, and how many other files lie beside them in folders.

    Products of an earlier run are no inputs, unless there is nothing else.

    Args:
        images: photos and folders of photos.
        output_dir: folder of the outputs, absolute.
        workdir: folder of the run; records lie in its folder `FOLDER`.
        file_format: of the outputs: "png", "jpeg", or "same" for JPEG where the photo is JPEG.

    Raises:
        FileNotFoundError: one of `images` does not exist.
    """
    earlier = {
        known["source"]: str(output_dir / known["output"])
        for known in _readable(workdir, warn_fn=progress.warn)
        if _lies_below(known["output"], output_dir)
    }
    own = [pathlib.Path(path) for path in earlier.values()]
    reports = [output_dir / name for name in ("report.json", "report.html")]
    inputs, num_skipped = photos.list_photos(images, exclude=[output_dir, *own, *reports])
    if not inputs and own:
        inputs, num_skipped = photos.list_photos(images, exclude=[*reports, workdir])

    def suffix(source: photo_files.PhotoInput) -> str:
        is_jpeg = file_format == "jpeg" or (
            file_format == "same" and photos.format_of_file(source.path) == "JPEG"
        )
        return "_cloaked.jpg" if is_jpeg else "_cloaked.png"

    outputs = photo_files.output_paths(inputs, output_dir, suffix=suffix, taken=earlier)
    jobs = []
    for source, output in zip(inputs, outputs, strict=True):
        name = output.relative_to(output_dir).as_posix()
        digest = sha256_of(str(source.path).encode("utf-8", "surrogateescape"))
        jobs.append(Job(source, output, name, workdir / FOLDER / f"{digest[:32]}.json"))
    return jobs, num_skipped


def known_pixels(workdir: pathlib.Path) -> frozenset[str]:
    """`pixels_sha256` of all outputs of a run."""
    found = {known["pixels_sha256"] for known in _readable(workdir)}
    return frozenset(digest for digest in found if digest is not None)


def forget(workdir: pathlib.Path) -> None:
    """Deletes all records of a run."""
    for record in (workdir / FOLDER).glob("*.json"):
        record.unlink()


def read(job: Job) -> Record:
    """The record of a job.

    Raises:
        OSError, ValueError: there is none, it is damaged, or it names another output.
    """
    known = cast(Record, files.read_sealed(job.record))
    if known["output"] != job.name:
        raise ValueError(f"{job.record} names {known['output']}, not {job.name}")
    return known


def write(
    job: Job,
    status: str,
    reason: str | None,
    faces: Sequence[check.CloakRecord],
    *,
    sha256: str | None,
    output_sha256: str | None = None,
    pixels_sha256: str | None = None,
    pending: bool = False,
    found: detect.Faces | None = None,
    judges: dict[str, str] | None = None,
) -> None:
    """Writes the record of a job.

    Args:
        job: the job.
        status: of the photo, as in report.json.
        reason: for a status other than `cloaked`.
        faces: their entries in report.json.
        sha256: of the photo's file; None if it could not be read.
        output_sha256: of the output; by default both are those of the record before.
        pixels_sha256: of its pixels.
        pending: the output has yet to get its name.
        found: the cloaked faces as detected in the photo (`detect.Faces`), to judge them again.
        judges: the extractors that measured: fingerprint of the weights by name.
    """
    job.record.parent.mkdir(exist_ok=True)
    if output_sha256 is None:
        # An earlier output stays one of this run, so that a later one may take its place.
        output_sha256, pixels_sha256 = _recorded_output(job)
    record = {
        "source": str(job.source.path),
        "output": job.name,
        "sha256": sha256,
        "output_sha256": output_sha256,
        "pixels_sha256": pixels_sha256,
        "pending": pending,
        "found": found,
        "judges": judges,
        "image": {
            "image": job.source.relative.as_posix(),
            "output": job.name if status in _WRITTEN else None,
            "status": status,
            "reason": reason,
            "faces": list(faces),
        },
    }
    files.write_sealed(job.record, record)


def is_done(job: Job) -> bool:
    """Whether a record says so and the files are still those it speaks of."""
    try:
        known = read(job)
        image = known["image"]
    except (OSError, ValueError, KeyError):
        return False
    try:
        if image["status"] == "failed" or known.get("pending"):
            return False
        is_readable = job.source.problem is None
        if is_readable and known["sha256"] != sha256_of(photos.read_photo_bytes(job.source.path)):
            return False
        if image["output"] is not None:
            return sha256_of(job.output.read_bytes()) == known["output_sha256"]
        return True
    except photos.PhotoError as error:
        return image["status"] == "unreadable" and image["reason"] == str(error)
    except (OSError, ValueError, KeyError):
        return False


def publish(
    job: Job,
    data: bytes,
    status: str,
    reason: str | None,
    faces: Sequence[check.CloakRecord],
    *,
    overwrite: bool,
    sha256: str,
    pixels_sha256: str,
    found: detect.Faces,
    judges: dict[str, str],
) -> None:
    """Gives an output its name, and writes its record before and after.

    Args:
        job: the job.
        data: content of the output.
        status: as in `write`.
        reason: as in `write`.
        faces: as in `write`.
        overwrite: whether a file of that name that is not of this run is replaced.
        sha256: as in `write`.
        pixels_sha256: as in `write`.
        found: as in `write`.
        judges: as in `write`.

    Raises:
        FileExistsError: there is such a file and it is to stay.
        OSError: the output could not be written.
    """
    output_sha256 = sha256_of(data)
    if job.output.exists() and not overwrite:
        overwrite = sha256_of(job.output.read_bytes()) in (output_sha256, _recorded_output(job)[0])
        if not overwrite:
            raise FileExistsError(job.output)
    write_fn = functools.partial(
        write,
        job,
        status,
        reason,
        faces,
        sha256=sha256,
        output_sha256=output_sha256,
        pixels_sha256=pixels_sha256,
        found=found,
        judges=judges,
    )
    write_fn(pending=True)
    files.write_atomically(job.output, data, overwrite=overwrite)
    if sha256_of(job.output.read_bytes()) != output_sha256:
        raise OSError(0, "the file reads back differently")
    write_fn()


def sha256_of(data: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _readable(
    workdir: pathlib.Path, *, warn_fn: Callable[[object, object], None] | None = None
) -> Iterator[Record]:
    for path in sorted((workdir / FOLDER).glob("*.json")):
        try:
            yield cast(Record, files.read_sealed(path))
        except (OSError, ValueError) as error:
            if warn_fn is not None:
                warn_fn(path, f"the record counts for nothing: {error}")


def _lies_below(name: str, folder: pathlib.Path) -> bool:
    """Whether a name stands for a file below a folder, links followed."""
    return folder.resolve() in (folder / name).resolve().parents


def _recorded_output(job: Job) -> tuple[str | None, str | None]:
    """SHA-256 of the output that the record speaks of, and of its pixels."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        known = read(job)
        return known["output_sha256"], known["pixels_sha256"]
    return None, None
