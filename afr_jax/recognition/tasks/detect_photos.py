"""Face detection on folders of photos: faces.json with boxes and landmarks, and drawings."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from PIL import Image, ImageDraw

from afr_jax.core import backend, distributed, files, options, parallel, progress, workdir
from afr_jax.core.runtime import claims
from afr_jax.data import photo_files, photos
from afr_jax.models import mtcnn
from afr_jax.recognition import detect, shared_options

_TOY_FACE_PX = 80
# Photos that a run with --join claims at once.
_GROUP = 8
# The longest side that Pillow writes as JPEG.
_JPEG_PX = 65_500
_FACE_COLOR, _POINT_COLOR = (255, 64, 64), (64, 255, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectConfig(options.Config):
    """Finds faces: boxes, confidences and five landmarks of every photo.

        python -m experiments.detect --images=photos --output_dir=found --draw

    writes `found/faces.json` and, with --draw, `found/<folders>/<stem>_faces.jpg` with everything
    drawn in. Without flags it looks at a sample portrait and writes to `out/detect`. An existing
    faces.json is replaced, in one piece. The same photos give the same file. What was found in each
    photo is kept in `found/.detect`, or in --workdir: a killed run goes on where it was. Photos of
    more than 25 megapixels are looked at reduced. With --join any number of runs of one command
    share the photos.

        {"images": [{"image", "status", "reason", "faces": [{"box", "confidence", "landmarks"}]}],
         "settings": {...}}

    `status` is `ok`, `no_face`, `unreadable` or `failed`, the last two with a reason; the program
    then goes on, and ends with exit code 3. Files in folders that are no photos are counted as
    skipped in the result line. Boxes are [y0, x0, y1, x1] and landmarks (y, x) in
    pixels of the upright photo: eye, eye, nose, mouth corner, mouth corner, the picture's left
    first. --toy looks for faces from 80 px on, which compiles in seconds.
    """

    shares_work = True

    images: tuple[str, ...] = options.option(
        (), "photos and folders of photos; default: a sample portrait", resumable=True
    )
    output_dir: str = options.option(
        "out/detect", "folder for faces.json and drawings", resumable=True
    )
    draw: bool = options.option(
        False, "also write each photo with its faces drawn in", resumable=True
    )
    join: bool = options.option(False, claims.JOIN_HELP, resumable=True)
    detector: detect.DetectorOptions = options.group(detect.DetectorOptions)

    def toy(self) -> "DetectConfig":
        """Large faces only."""
        smallest = max(self.detector.min_face_px, _TOY_FACE_PX)
        return dataclasses.replace(
            self, detector=dataclasses.replace(self.detector, min_face_px=smallest)
        )


class FaceRecord(NamedTuple):
    """A face of faces.json, rounded to a hundredth of a pixel and a millionth of confidence.

    Attributes:
        box: `[y0, x0, y1, x1]`.
        confidence: in [0, 1].
        landmarks: five (y, x).
    """

    box: list[float]
    confidence: float
    landmarks: list[list[float]]


class PhotoRecord(NamedTuple):
    """What was found in one photo: an entry of faces.json.

    Attributes:
        image: its path below the folder that was given.
        status: `ok`, `no_face`, `unreadable` or `failed`.
        reason: for the last two.
        faces: of the photo, most confident first.
    """

    image: str
    status: str
    reason: str | None
    faces: Sequence[FaceRecord]


def run(config: DetectConfig) -> options.Outcome:
    """Detects the faces of all photos, and writes faces.json and the drawings.

    Raises:
        options.UsageError: photos that do not exist, or an output folder that cannot be used.
    """
    output_dir = pathlib.Path(config.output_dir).expanduser().absolute()
    inputs, num_skipped = _inputs(config, output_dir)
    drawings = photo_files.output_paths(inputs, output_dir, suffix="_faces.jpg")
    with options.usage(""):
        variables = mtcnn.load_variables()
    folder = pathlib.Path(config.workdir or output_dir / ".detect").expanduser().absolute()
    place = folder / "kept"
    with contextlib.ExitStack() as held:
        shared = held.enter_context(claims.Claims(folder if config.join else None))
        with shared.hold("the folder"):
            work = (
                workdir.open_workdir(config.workdir, config, is_shared=config.join)
                if config.workdir
                else None
            )
            below = [place, *(drawing.parent for drawing in drawings)]
            held.enter_context(workdir.claimed(output_dir, below=below, is_shared=config.join))
        kept = workdir.Kept(place)
        look_fn = functools.partial(_look_at_all, config, variables, kept)
        pairs = list(zip(inputs, drawings, strict=True))
        if config.join:
            shared.work_off(
                [pairs[start : start + _GROUP] for start in range(0, len(pairs), _GROUP)],
                look_fn,
                name_fn=lambda pair: pair[1].relative_to(output_dir).as_posix(),
                is_done_fn=functools.partial(_is_known, config, kept),
                description="photos",
            )
        else:
            distributed.split_work(pairs, look_fn)
        if not distributed.is_primary():
            return options.Outcome({})
        with distributed.alone():
            records = look_fn(pairs)
            files.write_json(
                output_dir / "faces.json", {"images": records, "settings": config.detector}
            )
            if not config.join:  # Others may look at other photos.
                kept.drop_unused()
    statuses = ("ok", "no_face", "unreadable", "failed")
    not_handled = [
        {"image": record.image, "status": record.status, "reason": record.reason}
        for record in records
        if record.status in ("unreadable", "failed")
    ]
    result = {
        "num_images": len(records),
        "num_faces": sum(len(record.faces) for record in records),
        "summary": {name: sum(r.status == name for r in records) for name in statuses},
        "skipped": num_skipped,
        "not_handled": not_handled,
        "faces": "faces.json",
        "output_dir": config.output_dir,
    }
    if work is not None:
        work.write_result(result)
    return options.Outcome(result, complete=not not_handled)


def look(
    variables: mtcnn.Variables,
    source: photo_files.PhotoInput,
    *,
    options: detect.DetectorOptions,
    drawing: str | os.PathLike[str] | None = None,
    kept: workdir.Kept | None = None,
) -> PhotoRecord:
    """What there is to say about one photo; nothing that is wrong with it raises.

    Args:
        variables: of the detector.
        source: the file.
        options: of the detector.
        drawing: where the photo is written with its faces drawn in; None for nowhere.
        kept: what earlier runs found; None for nothing.

    Raises:
        OSError: the disk is full or read-only, say: see `files.is_of_the_disk`.
    """
    kept = workdir.Kept(None) if kept is None else kept
    name = source.relative.as_posix()
    try:
        if source.problem is not None:
            raise photos.PhotoError(source.problem)
        data = photos.read_photo_bytes(source.path)

        def find() -> list[FaceRecord]:
            pixels = photos.decode_photo(data).pixels
            found = detect.detect_faces(variables, pixels, options=options)
            if drawing is not None:
                files.write_atomically(drawing, draw_faces(pixels, found), overwrite=True)
            return _face_records(found)

        faces = kept.load_or_compute(
            _dependencies(data, options, drawing),
            find,
            anew=drawing is not None and not pathlib.Path(drawing).exists(),
        )
    except photos.PhotoError as error:
        record = PhotoRecord(name, "unreadable", str(error), [])
    except OSError as error:
        if files.is_of_the_disk(error):
            raise
        record = PhotoRecord(name, "failed", f"could not be written: {error}", [])
    except Exception as error:  # One photo's trouble must not cost the others theirs.
        logging.exception("could not work on %s", files.printable(source.path))
        record = PhotoRecord(name, "failed", f"{type(error).__name__}: {error}", [])
    else:
        return PhotoRecord(name, "ok" if faces else "no_face", None, faces)
    progress.warn(source.path, f"{record.status} ({record.reason})")
    return record


def _dependencies(
    data: bytes, options: detect.DetectorOptions, drawing: str | os.PathLike[str] | None
) -> list[object]:
    """All that the faces of a file depend on."""
    return [hashlib.sha256(data).hexdigest(), options, drawing, backend.most_pixels()]


def _is_known(
    config: DetectConfig, kept: workdir.Kept, pair: tuple[photo_files.PhotoInput, pathlib.Path]
) -> bool:
    """Whether an earlier run or another one has looked at a photo, or nobody can."""
    source, drawing = pair
    if source.problem is not None:
        return True
    try:
        data = photos.read_photo_bytes(source.path)
    except (photos.PhotoError, OSError):
        return True
    is_drawn = not config.draw or drawing.exists()
    return is_drawn and kept.has(
        _dependencies(data, config.detector, drawing if config.draw else None)
    )


def _face_records(faces: detect.Faces) -> list[FaceRecord]:
    # What lies beyond is rounding of the processor.
    return [
        FaceRecord(
            np.round(box.astype(float), 2).tolist(),
            round(float(confidence), 6),
            np.round(points.astype(float), 2).tolist(),
        )
        for box, confidence, points in zip(*faces, strict=True)
    ]


def draw_faces(pixels: np.ndarray, faces: detect.Faces) -> bytes:
    """A JPEG of the photo `[H, W, 3]` uint8 with boxes, landmarks and confidences drawn in.

    A photo with a side that JPEG cannot have is reduced to the largest that it can.
    """
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    width = max(1, round(max(pixels.shape[:2]) / 400))
    for box, confidence, points in zip(*faces, strict=True):
        y0, x0, y1, x1 = (float(value) for value in box)
        pen.rectangle((x0, y0, x1, y1), outline=_FACE_COLOR, width=width)
        label, size = f"{confidence:.3f}", max(10, round((x1 - x0) / 5))
        # Above the box, or below its upper edge where the photo ends.
        anchor = "lb" if y0 > size else "lt"
        pen.text((x0, y0), label, fill=_FACE_COLOR, font_size=size, anchor=anchor)
        for y, x in points.tolist():
            pen.circle((x, y), 1.5 * width, fill=_POINT_COLOR)
    picture.thumbnail((_JPEG_PX, _JPEG_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _inputs(config: DetectConfig, output_dir: pathlib.Path) -> photos.PhotoFiles:
    """All photos to look at; what an earlier run wrote is none of them."""
    paths = config.images or (shared_options.sample_portrait(),)
    resolved = [pathlib.Path(path).expanduser().resolve() for path in paths]
    if config.draw and output_dir.resolve() in resolved:
        raise options.UsageError(
            "--draw needs an --output_dir that is not itself a folder of --images"
        )
    own = [output_dir, output_dir / "faces.json"]
    return shared_options.list_photos(paths, flag="images", exclude=own)


def _look_at_all(
    config: DetectConfig,
    variables: mtcnn.Variables,
    kept: workdir.Kept,
    pairs: Sequence[tuple[photo_files.PhotoInput, pathlib.Path]],
) -> list[PhotoRecord]:
    def record_of(pair: tuple[photo_files.PhotoInput, pathlib.Path]) -> PhotoRecord:
        source, drawing = pair
        return look(
            variables,
            source,
            options=config.detector,
            drawing=drawing if config.draw else None,
            kept=kept,
        )

    stream = parallel.thread_stream(
        record_of,
        pairs,
        width=detect.PHOTOS_AT_ONCE,
        weight_fn=lambda pair: photos.num_pixels(photos.PhotoSource.of(pair[0])),
        limit=detect.PIXELS_AT_ONCE,
    )
    found = list(progress.track(stream, description="photos", total=len(pairs)))
    return _tell_namesakes_apart(found, [source for source, _ in pairs])


def _tell_namesakes_apart(
    records: Sequence[PhotoRecord], inputs: Sequence[photo_files.PhotoInput]
) -> list[PhotoRecord]:
    """Gives photos of several folders that share a name their whole path."""
    counts = collections.Counter(record.image for record in records)
    return [
        record._replace(image=source.path.as_posix()) if counts[record.image] > 1 else record
        for record, source in zip(records, inputs, strict=True)
    ]
