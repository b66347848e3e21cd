"""The published photos of an evaluation's cells: protected in some way, written once.

They lie in a folder as PNG, each with a record of what was done. Photos are worked on in groups
that share batches, so a run that was cut goes on with the first group that lacks a file, and gives
the same bytes. All methods that work here change the main face of a photo within the cell's budget,
measured on the 8-bit photo (`budget.Budget`).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import NotRequired, TypedDict, cast

import jax
import numpy as np

from afr_jax.core import files, options, workdir
from afr_jax.core.perception import measures
from afr_jax.data import identities, photos
from afr_jax.evaluation import fawkes_package, reference
from afr_jax.evaluation.cloaking import cells, cloak_files
from afr_jax.methods.cloaking import budget, noise, photo_cloaks
from afr_jax.models import lpips, mtcnn
from afr_jax.models.extractors import registry
from afr_jax.recognition import detect, pipeline

# What became of a photo: its pixels and main face, or why it is published as it was.
OneProtected = tuple[np.ndarray, list[photo_cloaks.CloakedFace]] | str
ProtectFn = Callable[[Sequence[photo_cloaks.PhotoFaces]], Sequence[OneProtected]]

# Radius of an iris, of the distance between the eyes (5.9 of 63 mm).
_IRIS = 5.9 / 63
# Photos that are worked on together: all those of a person should lie in one group, and many photos
# fill the batches better.
_GROUP = 60


class PublishedRecord(TypedDict):
    """What was done to a photo.

    Attributes:
        problem: why it is as it was, or None.
        region: (y0, x0, y1, x1), all that changed; only without a problem, as the others.
        box: the detector's.
        dssim: of the face.
        visibility: `measures.Visibility` of the region, `iris_chroma`, the tint of the irises, and
            `lpips`, None where its weights are not installed.
    """

    problem: str | None
    region: NotRequired[list[int]]
    box: NotRequired[list[int]]
    dssim: NotRequired[float]
    visibility: NotRequired[dict[str, float | None]]


def parse_given(values: Sequence[str]) -> dict[cells.CloakCell, pathlib.Path]:
    """Reads the command line's folders of photos that other programs protected, each a cell.

    Args:
        values: `NAME=FOLDER`, or `NAME@BUDGET=FOLDER` with the budget that is said of them.

    Raises:
        ValueError: a value is none of them, a name is a method of ours or no name of a file, two
            are the same, or a budget does not lie in (0, 1].
    """
    found: dict[cells.CloakCell, pathlib.Path] = {}
    for value in values:
        title, equals, path = value.partition("=")
        name, at, amount = title.partition("@")
        if not (equals and name and path) or not name.replace("-", "_").isidentifier():
            raise ValueError(f"{value!r} must be NAME=FOLDER or NAME@BUDGET=FOLDER")
        if name in cells.METHODS:
            raise ValueError(f"{name!r} is a method that is made here")
        cell = cells.CloakCell(name, (), cells.parse_budget(amount) if at else None)
        if cell in found:
            raise ValueError(f"{title!r} is there twice")
        found[cell] = pathlib.Path(path).expanduser()
    return found


def protect_fn(
    cell: cells.CloakCell,
    recognizer: pipeline.Recognizer,
    *,
    package: reference.ReferenceProcess | None,
    folder: pathlib.Path,
    num_steps: int | None,
    seed: int,
) -> ProtectFn:
    """How the photos of a cell are protected.

    Args:
        cell: of any method but `none`.
        recognizer: has the cell's surrogates among its extractors.
        package: the driver of PyPI `fawkes`, for `fawkes_pypi`; it takes as many steps as our
            cloak.
        folder: for what is given to the package.
        num_steps: of a cloak, None for the method's own number.
        seed: of all randomness.

    Raises:
        ValueError: the method is `none`, or there is no driver for `fawkes_pypi`.

    Returns:
        A function of photos with their faces to what became of each.
    """
    if cell.budget is None:
        raise ValueError(f"{cell.name} has no budget to protect photos within")
    if cell.method == "fawkes_pypi" and package is None:
        raise ValueError(f"{cell.name} needs the driver of PyPI `fawkes`")
    limit = cell.budget
    limits = cells.limits_of(limit)
    extractors = tuple(recognizer.extractors[name] for name in cell.surrogates)
    variables = tuple(recognizer.variables[name] for name in cell.surrogates)

    def protect(faces: Sequence[photo_cloaks.PhotoFaces]) -> Sequence[OneProtected]:
        if cell.method == "noise":
            return [noise.add_noise(face, _usual(), limits=limits, seed=seed) for face in faces]
        if package is not None and cell.method == "fawkes_pypi":
            steps = cells.cloak_method("fawkes", limit, num_steps=num_steps).num_steps
            return fawkes_package.cloak(
                package, folder, faces, extractors[0], limits, num_steps=steps, seed=seed
            )
        return photo_cloaks.cloak_photos(
            jax.random.key(seed),
            photo_cloaks.Surrogates(extractors, variables),
            faces,
            config=cells.cloak_method(cell.method, limit, num_steps=num_steps),
            detector=recognizer.detector,
        )

    return protect


def _usual() -> tuple[registry.Extractor, ...]:
    """The default surrogates, whatever trackers a run has.

    Noise goes where their chips lie, and there other programs' changes are measured.
    """
    return tuple(registry.get(name) for name in cloak_files.DEFAULT_SURROGATES)


def check_given(
    folder: pathlib.Path, given: identities.Copies, samples: Sequence[identities.Sample]
) -> None:
    """Notes which protected photos a cell takes, and refuses others than those noted before.

    Args:
        folder: of the cell.
        given: the protected photos.
        samples: the originals.

    Raises:
        options.UsageError: the cell was made of other files.
    """
    now = {}
    for sample in samples:
        copy = given.of(sample.sample_id)
        now[sample.sample_id] = None if copy is None else photos.digest_of(copy.path)
    changed = workdir.note(folder / "given.json", now)
    if changed:
        raise options.UsageError(
            f"--cloaked: {folder.name} was made of other files ({changed[0]} and "
            f"{len(changed) - 1} more); give them another name or another --workdir"
        )


def given_fn(folder: pathlib.Path, given: identities.Copies) -> ProtectFn:
    """How photos are protected that another program protected: as they are, measured like ours.

    Args:
        folder: of them, for messages.
        given: what is in it.
    """

    def take(photo: photo_cloaks.PhotoFaces) -> OneProtected:
        sample = given.of(photo.name)
        if sample is None:
            return f"is not in {folder}"
        pixels = photos.read_photo(sample.path).pixels
        if pixels.shape != photo.pixels.shape:
            sides = [
                f"{width} x {height}" for height, width, _ in (pixels.shape, photo.pixels.shape)
            ]
            return f"has {sides[0]} pixels in {folder}, the original {sides[1]}"
        if np.array_equal(pixels, photo.pixels):
            return f"is unchanged in {folder}"
        region, box = photo_cloaks.face_region(photo, _usual(), 0)
        return pixels, [photo_cloaks.CloakedFace(region, box, {}, budget.Budget(dssim=1.0))]

    return lambda faces: [take(photo) for photo in faces]


def write_photos(
    folder: pathlib.Path,
    samples: Sequence[identities.Sample],
    detector: mtcnn.Variables,
    protect_fn: ProtectFn,
    *,
    group: int = _GROUP,
    report_fn: Callable[[int], None] | None = None,
) -> tuple[list[pathlib.Path], list[PublishedRecord]]:
    """Protects photos that are not there yet.

    Only the main face of a photo is protected. A photo without one, or with one that is too small,
    is written as it is, and its record says why.

    Args:
        folder: of the cell; photos go to `photos/<sample id>.png`.
        samples: the photos.
        detector: variables of MTCNN's networks.
        protect_fn: protects the faces of some photos.
        group: photos that are worked on together; the bytes depend on it.
        report_fn: called with the number of photos that were finished since, those of an earlier
            run included.

    Returns:
        Paths and records of all photos, in order.
    """
    paths = [folder / "photos" / f"{sample.sample_id}.png" for sample in samples]
    for start in range(0, len(samples), group):
        part = slice(start, start + group)
        if None in [_known(path) for path in paths[part]]:
            _write_group(samples[part], paths[part], detector, protect_fn)
        if report_fn is not None:
            report_fn(len(paths[part]))
    known = [files.read_sealed(_record_path(path)) for path in paths]
    return paths, cast(list[PublishedRecord], known)


def _known(path: pathlib.Path) -> files.Json:
    """The record of a photo that is there; None if it is to be made."""
    return workdir.read_or_none(_record_path(path), files.read_sealed) if path.exists() else None


def _write_group(
    samples: Sequence[identities.Sample],
    paths: Sequence[pathlib.Path],
    detector: mtcnn.Variables,
    protect_fn: ProtectFn,
) -> None:
    originals = [photos.read_photo(sample.path) for sample in samples]
    tasks, records = [], []
    for sample, photo in zip(samples, originals, strict=True):
        found = detect.main_face(detect.detect_faces(detector, photo.pixels), photo.pixels.shape)
        problem = None if len(found.boxes) else pipeline.NO_FACE
        if problem is None and not photo_cloaks.is_large_enough(found.boxes).all():
            problem = "the face is too small to be protected"
        records.append({"problem": problem})
        if problem is None:
            visible = None if photo.alpha is None else photo.alpha > 0
            task = photo_cloaks.PhotoFaces(
                sample.sample_id, photo.pixels, photo.gray, visible, found
            )
            tasks.append(task)
    results = zip(tasks, protect_fn(tasks) if tasks else [], strict=True)
    for path, photo, record in zip(paths, originals, records, strict=True):
        pixels = photo.pixels
        task, found = next(results) if record["problem"] is None else (None, None)
        if isinstance(found, str):
            record["problem"] = found
        elif task is not None and found is not None:
            pixels, (face,) = found
            landmarks = task.faces.landmarks[0]
            y0, x0, y1, x1 = face.region
            pair = photo.pixels[y0:y1, x0:x1], pixels[y0:y1, x0:x1]
            record.update(
                region=face.region,
                box=face.box,
                dssim=budget.face_dssim(photo.pixels, pixels, face.region, face.box),
                visibility={
                    **measures.measure(*pair)._asdict(),
                    "iris_chroma": _iris_tint(photo.pixels, pixels, landmarks, face.region),
                    "lpips": lpips.measure(*pair),
                },
            )
        # The record goes first: a photo that is there has one.
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_sealed(_record_path(path), record)
        if photo.gray and np.ptp(pixels, axis=-1).any():  # Colored by another program.
            photo = dataclasses.replace(photo, gray=False)
        files.write_atomically(path, photos.encode_png(photo, pixels), overwrite=True)


def _iris_tint(
    original: np.ndarray, final: np.ndarray, landmarks: np.ndarray, region: np.ndarray
) -> float:
    """Tint of the discs about both eyes that are as wide as irises, of a face's region."""
    y0, x0, y1, x1 = region
    eyes = landmarks[:2]
    radius = max(_IRIS * float(np.linalg.norm(eyes[1] - eyes[0])), 1.0)
    places = np.moveaxis(np.mgrid[y0:y1, x0:x1], 0, -1)[:, :, None]
    where = (np.linalg.norm(places - eyes, axis=-1) <= radius).any(axis=-1)
    return measures.tint(original[y0:y1, x0:x1], final[y0:y1, x0:x1], where=where)


def _record_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".json")
