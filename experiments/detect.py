"""Finds faces: boxes, confidences and five landmarks of every photo.

    python -m experiments.detect --images=photos --output_dir=found --draw

writes `found/faces.json` and, with --draw, `found/<folders>/<stem>_faces.jpg` with everything
drawn in. Without flags it looks at a sample portrait and writes to `out/detect`. An existing
faces.json is replaced, in one piece. The same photos give the same file.

    {"images": [{"image", "status", "reason", "faces": [{"box", "confidence", "landmarks"}]}],
     "settings": {...}}

`status` is `ok`, `no_face`, `unreadable` or `failed`, the last two with a reason; the program then
goes on, and ends with exit code 3. Boxes are [y0, x0, y1, x1] and landmarks (y, x) in pixels of the
upright photo: eye, eye, nose, mouth corner, mouth corner, the picture's left first.

Expected on two CPU cores: 0.2 s for a photo of 640 px, after half a minute of compilation in the
first run. --toy looks for faces from 80 px on, which compiles in seconds.
"""

import collections
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import skimage
from absl import flags, logging
from PIL import Image, ImageDraw

from afr_jax.core import distributed, files, parallel, program, progress, workdir
from afr_jax.data import photo_files, photos
from afr_jax.models import mtcnn
from afr_jax.recognition import detect

_DEFAULTS = detect.DetectorOptions()
_IMAGES = flags.DEFINE_list(
    "images", [], "photos and folders of photos; default: a sample portrait"
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "out/detect", "folder for faces.json and drawings")
_MIN_FACE = flags.DEFINE_float(
    "min_face_px", _DEFAULTS.min_face_px, "side of the smallest face looked for, at least 12"
)
_SCALE_FACTOR = flags.DEFINE_float(
    "scale_factor", _DEFAULTS.scale_factor, "ratio of the sizes looked for, between 0 and 1"
)
_THRESHOLDS = flags.DEFINE_list(
    "thresholds", [str(value) for value in _DEFAULTS.thresholds], "of P-, R- and O-Net, in [0, 1]"
)
_DRAW = flags.DEFINE_bool("draw", False, "also write each photo with its faces drawn in")

_TOY_FACE_PX = 80
_FACE_COLOR, _POINT_COLOR = (255, 64, 64), (64, 255, 64)


def detect_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    options = _options()
    output_dir = pathlib.Path(_OUTPUT_DIR.value).expanduser().absolute()
    inputs = _inputs(output_dir)
    drawings = photo_files.output_paths(inputs, output_dir, suffix="_faces.jpg")
    work = None
    if flags.FLAGS.workdir:
        work = workdir.open_workdir(flags.FLAGS.workdir, {"options": options})
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        variables = jax.tree.map(jax.numpy.asarray, mtcnn.read_weights(mtcnn.find_weights()))
    except (OSError, ValueError) as error:
        raise program.UsageError(str(error)) from error

    def record_of(pair: tuple[photo_files.PhotoInput, pathlib.Path]) -> dict[str, Any]:
        source, drawing = pair
        record = {"image": source.relative.as_posix(), "status": "ok", "reason": None, "faces": []}
        try:
            record.update(_look(variables, source, drawing if _DRAW.value else None, options))
        except photos.PhotoError as error:
            record.update(status="unreadable", reason=str(error))
        except Exception as error:  # One photo's trouble must not cost the others theirs.
            logging.exception("could not work on %s", source.path)
            record.update(status="failed", reason=f"{type(error).__name__}: {error}")
        if record["reason"]:
            logging.warning("%s: %s (%s)", source.path, record["status"], record["reason"])
        return record

    pairs = progress.track(list(zip(inputs, drawings, strict=True)), description="photos")
    records = parallel.thread_map(record_of, pairs)
    _tell_namesakes_apart(records, inputs)
    if distributed.is_primary():
        files.write_json(output_dir / "faces.json", {"images": records, "settings": options})
    result = _result(records)
    if work is not None:
        work.write_result(result)
    return result, program.EXIT_PARTIAL if result["not_handled"] else program.EXIT_OK


def _options() -> detect.DetectorOptions:
    try:
        thresholds = tuple(float(value) for value in _THRESHOLDS.value)
        smallest = max(_MIN_FACE.value, _TOY_FACE_PX) if flags.FLAGS.toy else _MIN_FACE.value
        return detect.DetectorOptions(
            min_face_px=smallest, scale_factor=_SCALE_FACTOR.value, thresholds=thresholds
        )
    except ValueError as error:
        raise program.UsageError(str(error)) from error


def _inputs(output_dir: pathlib.Path) -> list[photo_files.PhotoInput]:
    """All files to look at; what an earlier run wrote is none of them."""
    sample = pathlib.Path(skimage.__file__).parent / "data" / "astronaut.png"
    paths = [pathlib.Path(path).expanduser() for path in _IMAGES.value] or [sample]
    if _DRAW.value and output_dir.resolve() in [path.resolve() for path in paths]:
        raise program.UsageError(
            "--draw needs an --output_dir that is not itself a folder of --images"
        )
    try:
        inputs = photo_files.list_photos(paths, exclude=[output_dir, output_dir / "faces.json"])
    except FileNotFoundError as error:
        raise program.UsageError(f"--images: {error}") from error
    if not inputs:
        raise program.UsageError(f"--images={','.join(_IMAGES.value)} holds no files")
    return inputs


def _look(
    variables: dict,
    source: photo_files.PhotoInput,
    drawing: pathlib.Path | None,
    options: detect.DetectorOptions,
) -> dict[str, Any]:
    """What there is to say about one photo; draws it, where a path is given."""
    if source.problem is not None:
        raise photos.PhotoError(source.problem)
    pixels = photos.read_photo(source.path).pixels
    found = detect.detect_faces(variables, pixels, options=options)
    if drawing is not None and distributed.is_primary():
        files.write_atomically(drawing, draw_faces(pixels, found), overwrite=True)
    # A hundredth of a pixel, a millionth of confidence: beyond that is rounding of the processor.
    faces = [
        {
            "box": np.round(box.astype(float), 2).tolist(),
            "confidence": round(float(confidence), 6),
            "landmarks": np.round(points.astype(float), 2).tolist(),
        }
        for box, confidence, points in zip(*found, strict=True)
    ]
    return {"status": "ok" if faces else "no_face", "faces": faces}


def draw_faces(pixels: np.ndarray, faces: detect.Faces) -> bytes:
    """A JPEG of the photo `[H, W, 3]` uint8 with boxes, landmarks and confidences drawn in."""
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
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _tell_namesakes_apart(
    records: Sequence[dict[str, Any]], inputs: Sequence[photo_files.PhotoInput]
) -> None:
    """Gives photos of several folders that share a name their whole path."""
    counts = collections.Counter(record["image"] for record in records)
    for record, source in zip(records, inputs, strict=True):
        if counts[record["image"]] > 1:
            record["image"] = source.path.as_posix()


def _result(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    statuses = ("ok", "no_face", "unreadable", "failed")
    return {
        "num_images": len(records),
        "num_faces": sum(len(record["faces"]) for record in records),
        "summary": {name: sum(r["status"] == name for r in records) for name in statuses},
        "not_handled": [
            {name: record[name] for name in ("image", "status", "reason")}
            for record in records
            if record["status"] in ("unreadable", "failed")
        ],
        "faces": "faces.json",
        "output_dir": _OUTPUT_DIR.value,
    }


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(detect_program)
