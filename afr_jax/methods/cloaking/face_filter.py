"""Which of the faces that are seen in a photo are cloaked, and why the others are not."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from afr_jax.core import options
from afr_jax.methods.cloaking import check, photo_cloaks
from afr_jax.recognition import detect
from afr_jax.recognition.detectors import union

_WHICH = ("all", "largest")
_FORM = "must be all, largest, or boxes as x,y,width,height;x,y,width,height"
_UNSEEN = "no detector sees a face in this box, which was asked for"


@dataclasses.dataclass(frozen=True)
class FaceFilter:
    """Which of the faces that are seen are cloaked."""

    faces: str = options.option("all", "all, largest, or boxes of one photo: x,y,width,height;...")
    min_confidence: float = options.option(
        0.9, "confidence from which MTCNN is sure of a face", at_least=0, at_most=1
    )
    min_face_px: int = options.option(
        0, "smallest face; 0: 30 px, or 1/80 of the longer side if that is more", at_least=0
    )

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: an option is out of its range.
        """
        options.check(self)
        if 0 < self.min_face_px < 20:
            raise ValueError(f"min_face_px is {self.min_face_px}, must be 0 or at least 20")
        _ = self.boxes

    @property
    def boxes(self) -> np.ndarray | None:
        """`[N, 4]` (y0, x0, y1, x1) that were asked for; None for all faces or the largest.

        Raises:
            ValueError: `faces` has none of the three forms.
        """
        if self.faces in _WHICH:
            return None
        try:
            rows = [[float(n) for n in row.split(",")] for row in self.faces.split(";")]
            x, y, width, height = np.array(rows, np.float64).T
        except ValueError as error:
            raise ValueError(f"faces is {self.faces!r}, {_FORM}") from error
        boxes = np.stack([y, x, y + height, x + width], axis=1)
        if not np.all(np.isfinite(boxes)) or min(x.min(), y.min()) < 0 or not np.all(width > 0):
            raise ValueError(f"faces is {self.faces!r}, {_FORM}")
        if not np.all(height > 0):
            raise ValueError(f"faces is {self.faces!r}, {_FORM}")
        return boxes

    def check_photos(self, num_photos: int) -> None:
        """Checks that boxes are asked for in one photo only.

        Raises:
            ValueError: there are several.
        """
        if self.boxes is not None and num_photos > 1:
            raise ValueError(f"faces names boxes of one photo, there are {num_photos}")

    def detector_options(self, shape: Sequence[int]) -> detect.DetectorOptions:
        """MTCNN's options for a photo `[H, W, ...]`."""
        return detect.DetectorOptions(min_face_px=self._smallest(shape))

    def union_options(self, shape: Sequence[int]) -> union.UnionOptions:
        """Options of both detectors for a photo `[H, W, ...]`."""
        usual = union.UnionOptions()
        sure = self.min_confidence
        confidences = dataclasses.replace(
            usual.mtcnn,
            doubtful=min(usual.mtcnn.doubtful, sure),
            sure=sure,
            very_sure=max(usual.mtcnn.very_sure, sure),
        )
        return dataclasses.replace(usual, min_face_px=self._smallest(shape), mtcnn=confidences)

    def reasons(self, seen: union.Sightings, shape: Sequence[int]) -> list[str | None]:
        """For each face that is seen, why it is not cloaked; None for those that are.

        Args:
            seen: the faces.
            shape: of the photo `[H, W, ...]`.
        """
        boxes = seen.faces.boxes
        sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0)
        large = photo_cloaks.is_large_enough(boxes)
        asked = None if self.boxes is None else _nearest(self.boxes, boxes)
        found: list[str | None] = []
        for i in range(len(boxes)):
            reason = None
            if asked is not None and i not in asked:
                reason = "it is not among the faces that were asked for"
            elif asked is None and not seen.counts[i]:
                reason = self._doubt(seen, i)
            elif not large[i]:
                reason = "it is too small to be recognized"
            elif asked is None and sides[i] < self._smallest(shape):
                reason = f"it is smaller than {self._smallest(shape):.0f} px"
            found.append(reason)
        if self.faces == "largest":
            taken = [i for i, reason in enumerate(found) if reason is None]
            best = max(taken, key=lambda i: _area(boxes[i]), default=None)
            for i in taken:
                if i != best:
                    found[i] = "it is not the largest face, which alone was asked for"
        return found

    def unseen(self, seen: union.Sightings) -> list[check.CloakRecord]:
        """Records of the boxes that were asked for and in which no face is seen."""
        if self.boxes is None:
            return []
        hit = _nearest(self.boxes, seen.faces.boxes)
        return [
            {
                "box": [int(side) for side in box],
                "detection": box.tolist(),
                "confidence": 0.0,
                "status": "skipped",
                "reason": _UNSEEN,
            }
            for box, face in zip(self.boxes, hit, strict=True)
            if face is None
        ]

    def _smallest(self, shape: Sequence[int]) -> float:
        return self.min_face_px or max(30, max(shape[:2]) / 80)

    def _doubt(self, seen: union.Sightings, number: int) -> str:
        """Why a face does not count."""
        ours = seen.mtcnn[number]
        if seen.yunet is None:
            return f"confidence {ours:.2f} is below {self.min_confidence}"
        theirs = seen.yunet[number]
        if not theirs or not ours:
            one, confidence, other = (
                ("MTCNN", ours, "YuNet") if not theirs else ("YuNet", theirs, "MTCNN")
            )
            return f"only {one} sees a face here (confidence {confidence:.2f}), {other} does not"
        return f"both detectors doubt it (MTCNN {ours:.2f}, YuNet {theirs:.2f})"


def skipped(seen: union.Sightings, reasons: Sequence[str | None]) -> list[check.CloakRecord]:
    """Records, as in report.json, of the faces that are seen and not cloaked."""
    records: list[check.CloakRecord] = []
    for number, reason in enumerate(reasons):
        if reason is not None:
            box = seen.faces.boxes[number]
            region = np.concatenate([np.floor(box[:2]), np.ceil(box[2:])]).astype(int)
            place = check.place(seen.faces, number, region)
            seers = detectors(seen, number)
            records.append({**place, "status": "skipped", "reason": reason, "detectors": seers})
    return records


def detectors(seen: union.Sightings, number: int) -> dict[str, float | None]:
    """The confidence of each detector that looked, None where it does not see the face."""
    found = {"mtcnn": float(seen.mtcnn[number]) or None}
    if seen.yunet is not None:
        found["yunet"] = float(seen.yunet[number]) or None
    return found


def largest_is_left(records: Sequence[check.CloakRecord]) -> bool:
    """Whether a face of a photo that was not cloaked is larger than each one that was."""

    def largest(*, is_cloaked: bool) -> float:
        areas = [
            _area(np.array(record["detection"]))
            for record in records
            if (record["status"] == "cloaked") == is_cloaked
        ]
        return max(areas, default=0.0)

    return largest(is_cloaked=False) > largest(is_cloaked=True)


def _nearest(asked: np.ndarray, boxes: np.ndarray) -> list[int | None]:
    """For each box that was asked for the face that it overlaps most, None where there is none.

    Of the two, each must hold the other's middle.
    """
    found: list[int | None] = []
    for box in asked:
        held = [
            i
            for i, face in enumerate(boxes)
            if _holds_middle(box, face) and _holds_middle(face, box)
        ]
        same = detect.overlap(box[None], boxes)[0]
        found.append(max(held, key=lambda i: same[i], default=None))
    return found


def _holds_middle(box: np.ndarray, other: np.ndarray) -> bool:
    middle = (other[:2] + other[2:]) / 2
    return bool(np.all(box[:2] <= middle) and np.all(middle <= box[2:]))


def _area(box: np.ndarray) -> float:
    return float(np.prod(box[2:] - box[:2]))
