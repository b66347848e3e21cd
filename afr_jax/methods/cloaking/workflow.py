"""Photos through cloaking: read, find faces, cloak, encode, read again, measure.

`cloak` takes photos in any form and returns results in memory. Its steps are those of a `Workflow`,
which a run over many files takes group by group (`afr_jax.methods.cloaking.folder`), so that both
make the same bytes.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from absl import logging

from afr_jax.core import files, parallel, progress
from afr_jax.data import photos
from afr_jax.methods.cloaking import budget, check, face_cloaks, fawkes, photo_cloaks, targets
from afr_jax.methods.cloaking import face_filter as face_filters
from afr_jax.recognition import detect, pipeline
from afr_jax.recognition.detectors import union, yunet

# Photos that are read, detected and cloaked together; of large ones fewer (`photos.in_groups`).
# Their faces share batches, so a group is always worked on as a whole: a resumed run gives the same
# bytes.
GROUP = 8
# Photos are finished side by side as long as they have no more pixels than this together.
_PIXELS_AT_ONCE = 8_000_000
# The note in files that says what they are: `photos.Photo.note`.
NOTE = "cloaked by afr_jax"
FileFormat = Literal["png", "jpeg", "same"]
_ENDS = {".png": (".png",), ".jpg": (".jpg", ".jpeg")}
# Rounds of scaling changes that encoding takes over the budget, the share of it that a guess aims
# at, and the share with which the search is content.
_ENCODINGS, _AIM, _CONTENT = 10, 0.97, 0.9
_ALREADY = "it is an output of a run"
_LEFT = "a face that is not cloaked is larger than each one that is"


class Found(NamedTuple):
    """A photo with its faces.

    Attributes:
        photo: as decoded.
        task: the faces to cloak, perhaps none.
        detectors: for each of them, how confident each detector is of it.
        skipped: records of the others.
        options: of the detectors.
    """

    photo: photos.Photo
    task: photo_cloaks.PhotoFaces
    detectors: list[dict[str, float | None]]
    skipped: list[check.CloakRecord]
    options: union.UnionOptions


class _File(NamedTuple):
    """A file, and the original through the same encoder where that loses something.

    `pixels` and `reencoded` are `[H, W, 3]` uint8 as decoded from the files.
    """

    data: bytes
    suffix: str
    pixels: np.ndarray
    reencoded: np.ndarray | None


Outcome = tuple[np.ndarray, list[photo_cloaks.CloakedFace]] | Exception


@dataclasses.dataclass(frozen=True)
class CloakedPhoto:
    """What became of one photo.

    Attributes:
        image: name of the photo, see `photos.Photo.name`.
        status: "cloaked"; "partly_cloaked", where a face that was not cloaked is larger than each
            one that was; "already_cloaked"; "no_face"; "unreadable"; or "failed", where the cloak
            broke a promise.
        reason: for a status other than "cloaked", else None.
        faces: what was measured on each face of the final 8-bit pixels, as in report.json.
        pixels: `[H, W, 3]` uint8, None unless cloaked, at least in part.
        data: content of the file with gray mode and color profile of the photo, and alpha in PNG,
            None likewise.
        suffix: end of the file's name, ".png" or ".jpg".
    """

    image: str
    status: str
    reason: str | None = None
    faces: list[check.CloakRecord] = dataclasses.field(default_factory=list)
    pixels: np.ndarray | None = dataclasses.field(default=None, repr=False)
    data: bytes | None = dataclasses.field(default=None, repr=False)
    suffix: str = ".png"

    @property
    def distances(self) -> list[dict[str, check.CloakVerdict]]:
        """For each cloaked face, what every extractor makes of it: distance, threshold, verdict."""
        return [face["extractors"] for face in self.faces if face["status"] == "cloaked"]

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the cloaked photo as it was encoded: what was measured holds for this file only.

        Args:
            path: ends in `suffix`.
            overwrite: whether an existing file is replaced.

        Raises:
            ValueError: the photo is not cloaked, or the name ends otherwise.
            FileExistsError: the file is there and is to stay.
        """
        if self.data is None:
            raise ValueError(f"{self.image} is not cloaked: {self.status} ({self.reason})")
        if pathlib.Path(path).suffix.lower() not in _ENDS[self.suffix]:
            raise ValueError(f"{os.fspath(path)}: this cloaked photo is written as {self.suffix}")
        files.write_atomically(path, self.data, overwrite=overwrite)


@dataclasses.dataclass(frozen=True)
class Workflow:
    """The steps from a decoded photo to a measured cloak.

    Attributes:
        recognizer: the detector, the surrogates, and further extractors that only judge; each under
            its own name.
        surrogates: names of the extractors to cloak against.
        method: how.
        second: the second detector (`union.load_second`); None where there is none.
        face_filter: which faces.
        keep_metadata: whether EXIF data are kept, the place included.
        file_format: of the files; "same" is JPEG for JPEG photos, PNG for others.
        marked: whether the files say, to whom reads their metadata, that they are cloaked.
        again: whether photos that are cloaked already are cloaked once more.
    """

    recognizer: pipeline.Recognizer
    surrogates: tuple[str, ...]
    method: face_cloaks.CloakMethod
    second: yunet.Detector | None = None
    face_filter: face_filters.FaceFilter = face_filters.FaceFilter()
    keep_metadata: bool = False
    file_format: FileFormat = "png"
    marked: bool = True
    again: bool = False

    @property
    def detectors(self) -> list[str]:
        """Names of the detectors that look."""
        return ["mtcnn"] if self.second is None else ["mtcnn", "yunet"]

    def is_output(self, photo: photos.Photo, *, known: Collection[str] = ()) -> bool:
        """Whether a photo is cloaked already and is to be left as it is.

        Args:
            photo: as decoded.
            known: `pixels_sha256` of outputs.
        """
        if self.again:
            return False
        return photo.note == NOTE or (
            bool(known) and photos.digest_of_pixels(photo.pixels) in known
        )

    def find_faces(self, name: str, photo: photos.Photo) -> Found:
        """Detects the faces of a photo and divides them into those to cloak and others.

        Args:
            name: identifies the photo, and seeds the randomness of its cloak.
            photo: as decoded.
        """
        shape = photo.pixels.shape
        settings = self.face_filter.union_options(shape)
        seen = union.detect_union(
            self.recognizer.detector, self.second, photo.pixels, options=settings
        )
        reasons = self.face_filter.reasons(seen, shape)
        taken = [number for number, reason in enumerate(reasons) if reason is None]
        task = photo_cloaks.PhotoFaces(
            name=name,
            pixels=photo.pixels,
            gray=photo.gray,
            visible=None if photo.alpha is None else photo.alpha > 0,
            faces=detect.select_faces(seen.faces, np.array(taken, int)),
        )
        skipped = face_filters.skipped(seen, reasons) + self.face_filter.unseen(seen)
        detectors = [face_filters.detectors(seen, number) for number in taken]
        return Found(photo, task, detectors, skipped, settings)

    def choose_target(
        self, target: str, gallery: str | os.PathLike[str] | None, images: Iterator[np.ndarray]
    ) -> targets.Target | None:
        """See `targets.choose`, for the surrogates."""
        own = {name: self.recognizer.extractors[name] for name in self.surrogates}
        return targets.choose(
            self.recognizer._replace(extractors=own),
            target,
            gallery,
            images,
            options_fn=self.face_filter.detector_options,
        )

    def cloak_group(
        self,
        key: jax.Array,
        found: Sequence[Found],
        *,
        target: targets.Target | None = None,
        report_fn: Callable[[int], None] | None = None,
    ) -> Sequence[Outcome]:
        """Cloaks photos together; if that fails, one at a time.

        Args:
            key: of the run.
            found: `GROUP` photos, or what is left of them.
            target: whom the faces are moved towards.
            report_fn: called with numbers of finished face steps, for progress.

        Returns:
            For each photo its final pixels and faces, or what went wrong.
        """
        surrogates = photo_cloaks.Surrogates(
            tuple(self.recognizer.extractors[name] for name in self.surrogates),
            tuple(self.recognizer.variables[name] for name in self.surrogates),
        )
        try:
            return photo_cloaks.cloak_photos(
                key,
                surrogates,
                [item.task for item in found],
                config=self.method,
                targets=None if target is None else target.centroids,
                detector=self.recognizer.detector,
                report_fn=report_fn,
            )
        except Exception as error:  # One photo's trouble must not cost the others theirs.
            if len(found) == 1 or isinstance(error, MemoryError):
                logging.exception("could not cloak %s", [item.task.name for item in found])
                return [error] * len(found)
            logging.warning("working photo by photo after: %s", error)
        alone = [
            self.cloak_group(key, [item], target=target, report_fn=report_fn) for item in found
        ]
        return [outcome for (outcome,) in alone]

    def cloak_all(
        self,
        key: jax.Array,
        sources: Sequence[photos.PhotoSource],
        *,
        target: targets.Target | None = None,
        filters: Mapping[str, face_filters.FaceFilter] | None = None,
    ) -> Iterator[CloakedPhoto]:
        """Cloaks photos group by group, and shows how far it is.

        Args:
            key: of the run.
            sources: the photos, in order.
            target: whom the faces are moved towards.
            filters: which faces of a photo are cloaked, by its name; `face_filter` for the others.

        Yields:
            A result for each photo, in order.
        """
        for group in photos.in_groups(sources, most=GROUP, photo_fn=lambda source: source):
            loaded = parallel.thread_map(functools.partial(_load, self, filters or {}), group)
            found = [item for item in loaded if isinstance(item, Found)]
            total = sum(len(item.task.faces.boxes) for item in found) * self.method.num_steps
            with progress.counter(total, description="face steps") as report_fn:
                outcomes = self.cloak_group(key, found, target=target, report_fn=report_fn)
            finished = self.finish_all(found, dict(enumerate(outcomes)))
            del outcomes
            for item in progress.track(loaded, description="photos"):
                yield next(finished) if isinstance(item, Found) else item

    def finish_all(
        self, found: Sequence[Found], outcomes: dict[int, Outcome]
    ) -> Iterator[CloakedPhoto]:
        """`finish` of several photos, some at a time unless they are large.

        Args:
            found: the photos.
            outcomes: of `cloak_group`, by the photo's number in `found`, those that are wanted.
                They are taken out one by one, so that nothing but `finish` holds an outcome, which
                drops its pixels once they are encoded.

        Returns:
            A result for each of these photos, in order.
        """
        return parallel.thread_stream(
            lambda number: self.finish(found[number], outcomes.pop(number)),
            sorted(outcomes),
            weight_fn=lambda number: found[number].photo.pixels[..., 0].size,
            limit=_PIXELS_AT_ONCE,
        )

    def finish(self, found: Found, outcome: Outcome) -> CloakedPhoto:
        """Encodes a cloaked photo, reads that back, and measures every face on it.

        Args:
            found: the photo.
            outcome: of `cloak_group`.
        """
        name = found.task.name
        if not len(found.task.faces.boxes):
            return CloakedPhoto(name, "no_face", _why_none(found.skipped), found.skipped)
        if isinstance(outcome, Exception):
            return CloakedPhoto(name, "failed", f"{outcome}")
        try:
            cloaked = outcome[1]
            file = self._encode(found.photo, *outcome)
            del outcome
        except ValueError as error:
            return CloakedPhoto(name, "failed", f"{error}")
        written = file.pixels
        records = check.check_photo(
            self.recognizer,
            self.second,
            found.task,
            written,
            cloaked,
            surrogates=self.surrogates,
            options=found.options,
            reencoded=file.reencoded,
        )
        for record, detectors in zip(records, found.detectors, strict=True):
            record["detectors"] = detectors
        problems = [
            f"face {number} of {len(records)}: {record['reason']}"
            for number, record in enumerate(records, start=1)
            if record["status"] != "cloaked"
        ]
        is_broken = any(record["status"] == "failed" for record in records)
        is_empty = all(record["status"] != "cloaked" for record in records)
        records += found.skipped
        if is_broken or is_empty:
            return CloakedPhoto(name, "failed", "; ".join(problems), records)
        if face_filters.largest_is_left(records):
            status, reason = "partly_cloaked", _LEFT
        else:
            status, reason = "cloaked", None
        return CloakedPhoto(name, status, reason, records, written, file.data, file.suffix)

    def _encode(
        self, photo: photos.Photo, pixels: np.ndarray, faces: Sequence[photo_cloaks.CloakedFace]
    ) -> _File:
        """The file of a photo, with changes scaled down where encoding takes them over the budget.

        Raises:
            ValueError: the photo has what the format cannot hold.
        """
        is_jpeg = self.file_format == "jpeg" or (
            self.file_format == "same" and photo.jpeg is not None
        )
        encode_fn = functools.partial(
            photos.encode_jpeg if is_jpeg else photos.encode_png,
            photo,
            keep_metadata=self.keep_metadata,
            note=NOTE if self.marked else None,
        )
        if not is_jpeg:  # What comes back is what went in, which is within the budget.
            data = encode_fn(pixels)
            return _File(data, ".png", photos.decode_photo(data).pixels, None)

        regions, boxes = [face.region for face in faces], [face.box for face in faces]
        limits = [face.budget for face in faces]

        def encoded(scales: np.ndarray) -> tuple[bytes, np.ndarray, np.ndarray]:
            """File, pixels as they come back, and how much of the budget each face takes."""
            data = encode_fn(_scaled(photo.pixels, pixels, faces, scales))
            written = photos.decode_photo(data).pixels
            shares = budget.spent_together(photo.pixels, written, regions, boxes, limits)
            return data, written, shares

        data, written = _fitted(encoded, np.array(regions, np.float64))
        reencoded = photos.decode_photo(encode_fn(photo.pixels)).pixels
        return _File(data, ".jpg", written, reencoded)


def cloak(
    recognizer: pipeline.Recognizer,
    images: photos.PhotosLike,
    *,
    config: face_cloaks.CloakMethod | None = None,
    key: int | jax.Array = 0,
    surrogates: Sequence[str] | None = None,
    target: str | os.PathLike[str] = "repel",
    gallery: str | os.PathLike[str] | None = None,
    face_filter: face_filters.FaceFilter | None = None,
    keep_metadata: bool = False,
    file_format: FileFormat = "png",
    marked: bool = True,
    again: bool = False,
) -> list[CloakedPhoto]:
    """Cloaks photos and measures what that is worth, as `python -m experiments.cloak` does.

    Photos are worked on in groups of 8, or of 100 megapixels, in their order. Faces of one group
    that show the same person are moved away from what they have in common, which carries over
    better to unknown extractors: give all photos of a person together.

    Args:
        recognizer: detector and extractors.
        images: photos in any form, one or several: paths of photos and of folders, PIL images,
            arrays `[H, W, 3]` uint8 in RGB. Files in folders that are no photos are passed over.
        config: the method; default `fawkes.FawkesConfig()`.
        key: of all randomness.
        surrogates: names of the extractors to cloak against, the others only judge; default: all.
        target: "repel"; "farthest" with a gallery; or a folder with photos of another person.
        gallery: folder with a folder of photos for each person.
        face_filter: which faces are cloaked.
        keep_metadata: whether EXIF data of files are kept, the place included.
        file_format: of the results; "jpeg" at the quality of a photo that is JPEG, else 95; "same"
            is JPEG for JPEG files and PNG for others.
        marked: whether a note in the file says that it is cloaked: anybody can read it.
        again: whether photos with that note are cloaked once more; else they are left as they are.

    Returns:
        A result for each photo, in order; those of a folder sorted by their names.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: an array that is no photo, an unknown surrogate, an extractor twice or without a
            threshold, a target that cannot be used, or boxes of faces for several photos.
    """
    recognizer = own_names(recognizer)
    names = tuple(recognizer.extractors if surrogates is None else surrogates)
    if not names or not set(names) <= set(recognizer.extractors):
        known = ", ".join(recognizer.extractors)
        raise ValueError(f"surrogates {', '.join(names)!r} must be among the extractors: {known}")
    targets.check(os.fspath(target), gallery)
    flow = Workflow(
        recognizer,
        names,
        fawkes.FawkesConfig() if config is None else config,
        union.load_second(),
        face_filters.FaceFilter() if face_filter is None else face_filter,
        keep_metadata,
        file_format,
        marked,
        again,
    )
    key = jax.random.key(key) if isinstance(key, int) else key
    sources = photos.list_sources(images)
    flow.face_filter.check_photos(len(sources))
    chosen = flow.choose_target(os.fspath(target), gallery, _readable_pixels(sources))
    return list(flow.cloak_all(key, sources, target=chosen))


def already_cloaked(name: str) -> CloakedPhoto:
    """What becomes of a photo that is an output."""
    return CloakedPhoto(name, "already_cloaked", _ALREADY)


def own_names(recognizer: pipeline.Recognizer) -> pipeline.Recognizer:
    """A recognizer with each extractor under its own name, not that by which it was asked for.

    Raises:
        ValueError: two have one name, or an extractor has no threshold: then nothing can be judged.
    """
    extractors, variables = {}, {}
    for key, extractor in recognizer.extractors.items():
        if extractor.name in extractors:
            raise ValueError(f"{extractor.name} must be named once")
        _ = extractor.threshold  # Raises if it is not known.
        extractors[extractor.name] = extractor
        variables[extractor.name] = recognizer.variables[key]
    return recognizer._replace(extractors=extractors, variables=variables)


def _fitted(
    encode_fn: Callable[[np.ndarray], tuple[bytes, np.ndarray, np.ndarray]], regions: np.ndarray
) -> tuple[bytes, np.ndarray]:
    """File and pixels with the largest changes found that stay within the budget.

    Args:
        encode_fn: from a scale `[N]` of the change of each face to the file, its pixels, and each
            face's share of the budget.
        regions: `[N, 4]`; faces whose regions overlap are scaled together.
    """
    neighbors = detect.overlap(regions, regions) > 0
    scales = np.ones(len(regions))
    low, high = np.zeros_like(scales), np.full_like(scales, np.inf)
    best, best_share = None, -1.0
    for _ in range(_ENCODINGS):
        data, written, shares = encode_fn(scales)
        worst = np.where(neighbors, shares, 0).max(axis=1)
        if np.all(shares <= 1):
            if shares.sum() > best_share:
                best, best_share = (data, written), shares.sum()
            if np.all((worst >= _CONTENT) | (scales == 1)):
                break
        high = np.where(worst > 1, np.minimum(high, scales), high)
        low = np.where(worst > 1, low, np.maximum(low, scales))
        guess = scales * np.clip(np.sqrt(_AIM / np.maximum(worst, 1e-9)), 0.5, 1.0)
        middle = np.where(np.isinf(high), scales, (low + high) / 2)
        scales = np.where((worst > 1) & (low == 0), guess, middle)
    if best is None:  # A change that does not fit is given up.
        best = encode_fn(low)[:2]
    return best


def _scaled(
    original: np.ndarray,
    pixels: np.ndarray,
    faces: Sequence[photo_cloaks.CloakedFace],
    scales: np.ndarray,
) -> np.ndarray:
    """The final pixels with the change of each face's region scaled down."""
    if np.all(scales == 1):
        return pixels
    final = pixels.copy()
    # The smallest scale is the last to be written where regions overlap.
    for number in np.argsort(-scales):
        y0, x0, y1, x1 = faces[number].region
        change = pixels[y0:y1, x0:x1].astype(np.float32) - original[y0:y1, x0:x1]
        piece = np.round(original[y0:y1, x0:x1] + scales[number] * change)
        final[y0:y1, x0:x1] = piece.astype(np.uint8)
    return final


def _why_none(skipped: Sequence[check.CloakRecord]) -> str:
    """Why no face of a photo is cloaked."""
    if not skipped:
        return pipeline.NO_FACE
    return f"none of {len(skipped)} was cloaked: {skipped[0]['reason']}"


def _readable_pixels(sources: Sequence[photos.PhotoSource]) -> Iterator[np.ndarray]:
    for source in sources:
        with contextlib.suppress(photos.PhotoError):
            yield photos.read_source(source).pixels


def _load(
    flow: Workflow, filters: Mapping[str, face_filters.FaceFilter], source: photos.PhotoSource
) -> Found | CloakedPhoto:
    """Reads a photo and finds its faces."""
    flow = dataclasses.replace(flow, face_filter=filters.get(source.name, flow.face_filter))
    try:
        photo = photos.read_source(source)
        if flow.is_output(photo):
            return already_cloaked(source.name)
        return flow.find_faces(source.name, photo)
    except photos.PhotoError as error:
        return CloakedPhoto(source.name, "unreadable", str(error))
