"""Faces that two detectors see together: MTCNN and YuNet, each on several sizes of the photo.

One detector alone misses faces and sees some that are none: MTCNN's crops of a face of 500 px skip
most of its pixels, YuNet knows no face above 300 px. So both look at the photo, at half of it, and
so on, and a face counts where one of them is sure and the other confirms it at least doubtfully, or
where one is very sure. What else they see is told as well, so that nobody takes a photo for free of
faces that it has.

This is for who must not miss a face; trackers here detect with `detect.detect_faces` alone.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import chex
import numpy as np
from absl import logging

from afr_jax.core import options as options_lib
from afr_jax.models import mtcnn
from afr_jax.recognition import detect
from afr_jax.recognition.detectors import yunet

# The photo is halved until its longer side is at most the first; YuNet is not asked above the
# second, which takes it a gigabyte, as it knows faces of 10 px.
_COARSEST_PX, _YUNET_PX = 320, 2048
# Faces that MTCNN looks for on halved photos: the finer ones are found a level before.
_COARSE_FACE_PX = 40.0
# Two boxes of one face overlap this much: at two sizes by one detector; by two detectors.
_SAME_BOX_IOU, _SAME_FACE_IOU = 0.4, 0.3
# From this confidence on, the default of the cascade's last network, MTCNN's box and landmarks are
# taken for those of the face: they are what a tracker that aligns by MTCNN uses. A face that it
# alone sees is told from there on, one that YuNet alone sees from the second on.
_MTCNN_PLACES, _YUNET_TELLS = 0.8, 0.7
# Smallest face of a tracker's MTCNN, the default of the package. Faces of other sizes are looked
# for on levels of the same pyramid, so that nothing that it sees is missed between two levels.
_TRACKER_FACE_PX = 20.0


@dataclasses.dataclass(frozen=True)
class Confidences:
    """How sure one detector must be of a face, in [0, 1].

    Attributes:
        doubtful: to confirm another detector's face.
        sure: for a face that the other one confirms.
        very_sure: for a face that the other one does not see.
    """

    doubtful: float
    sure: float
    very_sure: float

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not 0.0 <= self.doubtful <= self.sure <= self.very_sure <= 1.0:
            raise ValueError(f"confidences must rise within [0, 1], got {self}")


@dataclasses.dataclass(frozen=True)
class UnionOptions:
    """Settings of both detectors; the confidences were chosen on annotated photos of WIDER FACE.

    Attributes:
        min_face_px: side of the smallest face looked for at full size, >= 12.
        scale_factor: of MTCNN's pyramids, in (0, 1).
        mtcnn: how sure MTCNN must be.
        yunet: how sure YuNet must be.
    """

    min_face_px: float = options_lib.option(30.0, detect.MIN_FACE_HELP, at_least=12)
    scale_factor: float = 0.709
    mtcnn: Confidences = Confidences(doubtful=0.5, sure=0.9, very_sure=0.999)
    yunet: Confidences = Confidences(doubtful=0.6, sure=0.8, very_sure=0.85)


class Sightings(NamedTuple):
    """The N faces that are seen in one photo, the surest first.

    Attributes:
        faces: their boxes, landmarks and the larger confidence. Places are MTCNN's where it is sure
            enough of them for a tracker, else YuNet's.
        mtcnn: `[N]` float32, MTCNN's confidence, 0 where it sees nothing.
        yunet: `[N]` float32, YuNet's; None if it did not look.
        counts: `[N]` bool, whether the face counts; the others are seen by one detector that is not
            very sure of them, or by two that both doubt them.
    """

    faces: detect.Faces
    mtcnn: np.ndarray
    yunet: np.ndarray | None
    counts: np.ndarray


def load_second() -> yunet.Detector | None:
    """YuNet for `detect_union`; None, with a warning, where its weights are not installed."""
    try:
        return yunet.load(min_confidence=UnionOptions().yunet.doubtful)
    except FileNotFoundError as error:
        logging.warning("no second detector looks for faces: %s", error)
        return None


def detect_union(
    variables: mtcnn.Variables,
    second: yunet.Detector | None,
    pixels: np.ndarray,
    *,
    options: UnionOptions = UnionOptions(),
) -> Sightings:
    """Finds the faces of one photo with both detectors.

    Args:
        variables: of MTCNN.
        second: YuNet (`load_second`), or None: then faces that MTCNN is sure of count.
        pixels: `[H, W, 3]` uint8 RGB.
        options: settings of both.

    Returns:
        What is seen, without faces that one detector doubts much and the other does not see.
    """
    chex.assert_shape(pixels, (None, None, 3))
    chex.assert_type(pixels, np.uint8)
    ours, theirs = [], []
    thresholds = (options.mtcnn.doubtful,) * 3
    for factor, picture in _halves(pixels):
        smallest = _COARSE_FACE_PX if factor > 1 else _of_pyramid(options)
        settings = detect.DetectorOptions(
            min_face_px=smallest, scale_factor=options.scale_factor, thresholds=thresholds
        )
        ours.append(
            detect.enlarged(detect.detect_faces(variables, picture, options=settings), factor)
        )
        if second is not None and max(picture.shape) <= _YUNET_PX:
            theirs.append(detect.enlarged(second(picture), factor))
    first = _joined(ours, sure=options.mtcnn.sure)
    # A long strip is too large for YuNet as it is, and too narrow to be reduced.
    other = _joined(theirs, sure=options.yunet.sure) if theirs else None
    return _matched(first, other, options)


def _of_pyramid(options: UnionOptions) -> float:
    """The smallest face of a level of a tracker's pyramid that finds `min_face_px`."""
    ratio = options.min_face_px / _TRACKER_FACE_PX
    if ratio < 1:
        return options.min_face_px
    steps = math.floor(math.log(ratio) / -math.log(options.scale_factor))
    return _TRACKER_FACE_PX / options.scale_factor**steps


def _halves(pixels: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The photo at 1, 1/2, 1/4 .. of its size, each by averaging, with 1, 2, 4 .."""
    found = [(1, pixels)]
    height, width = pixels.shape[:2]
    factor = 2
    while max(height, width) * 2 / factor > _COARSEST_PX and min(height, width) >= 24 * factor:
        found.append((factor, detect.reduced(pixels, factor)))
        factor *= 2
    return found


def _joined(levels: Sequence[detect.Faces], *, sure: float) -> detect.Faces:
    """One detector's faces of all sizes of a photo, each once, with its largest confidence.

    Its place is that of the largest picture on which the detector is sure of it, else of the one on
    which it is surest.
    """
    boxes, confidences, landmarks = (np.concatenate(leaves) for leaves in zip(*levels, strict=True))
    level = np.repeat(np.arange(len(levels)), [len(faces.boxes) for faces in levels])
    order = np.lexsort((-confidences, np.where(confidences >= sure, level, len(levels))))
    kept: list[int] = []
    best = confidences.copy()
    for i in order.tolist():
        same = detect.overlap(boxes[i : i + 1], boxes[kept])[0]
        if same.size and same.max() > _SAME_BOX_IOU:
            twin = kept[int(same.argmax())]
            best[twin] = max(best[twin], confidences[i])
        else:
            kept.append(i)
    return detect.Faces(boxes[kept], best[kept], landmarks[kept])


def _matched(first: detect.Faces, other: detect.Faces | None, options: UnionOptions) -> Sightings:
    """Joins what the two detectors see, and judges it."""
    if other is None:
        order = np.argsort(-first.confidences, kind="stable")
        order = order[first.confidences[order] >= _MTCNN_PLACES]
        faces = detect.select_faces(first, order)
        return Sightings(faces, faces.confidences, None, faces.confidences >= options.mtcnn.sure)
    same = detect.overlap(first.boxes, other.boxes)
    partner = np.full(len(first.boxes), -1)
    for at in np.argsort(-same, axis=None, kind="stable").tolist():
        i, j = divmod(at, same.shape[1])
        if same[i, j] <= _SAME_FACE_IOU:
            break
        if partner[i] < 0 and j not in partner:
            partner[i] = j
    alone = np.setdiff1d(np.arange(len(other.boxes)), partner)
    places = [*range(len(first.boxes)), *[-1] * len(alone)]
    partners = [*partner.tolist(), *alone.tolist()]
    ours = np.array([first.confidences[i] if i >= 0 else 0 for i in places], np.float32)
    theirs = np.array([other.confidences[j] if j >= 0 else 0 for j in partners], np.float32)
    from_first = (theirs == 0) | (ours >= _MTCNN_PLACES)
    rows = [
        detect.select_faces(first, np.array([i]))
        if own
        else detect.select_faces(other, np.array([j]))
        for i, j, own in zip(places, partners, from_first, strict=True)
    ]
    leaves = zip(*[detect.no_faces(), *rows], strict=True)
    faces = detect.Faces(*(np.concatenate(leaf) for leaf in leaves))
    faces = faces._replace(confidences=np.maximum(ours, theirs))
    both = (ours >= options.mtcnn.doubtful) & (theirs >= options.yunet.doubtful)
    told = (ours >= _MTCNN_PLACES) | (theirs >= _YUNET_TELLS)
    sure = (ours >= options.mtcnn.sure) | (theirs >= options.yunet.sure)
    very_sure = (ours >= options.mtcnn.very_sure) | (theirs >= options.yunet.very_sure)
    counts = (sure & both) | very_sure
    shown = told | sure | both
    order = np.argsort(-faces.confidences, kind="stable")
    order = order[shown[order]]
    return Sightings(detect.select_faces(faces, order), ours[order], theirs[order], counts[order])
