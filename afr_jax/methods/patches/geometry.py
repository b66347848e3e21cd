"""Where patches lie on a face: a generic head, its pose from five landmarks, and grids of corners.

The head is an ellipsoid with five landmarks, in millimeters: x to the picture's right, y down, z
towards the camera, origin between the eyes. A patch is a rectangle of paper bent around it; its
grid of cells, projected into the photo, is what `afr_jax.perturb.warps` draws. Host code in
float64; the results are `[R + 1, C + 1, 3]` arrays (y, x, depth) in photo pixels.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy import optimize
from scipy.spatial import transform

# Frontal proportions: the median face of 310 LFW photos in dlib's chips (eyes at 46.6 and 99.7 px,
# nose and mouth 32.6 and 58.2 px below them, mouth corners 47.8 px apart), with 63 mm between the
# eyes (the adult mean, Dodgson 2004). Depths: the tip of the nose 26 mm before the eyes and the
# mouth corners 2 mm, as in common generic head models.
LANDMARKS_MM = np.array(
    [[-31.5, 0.0, 0.0], [31.5, 0.0, 0.0], [0.0, 38.6, 26.0], [-28.3, 69.0, 2.0], [28.3, 69.0, 2.0]]
)
# An ellipsoid through the eyes and the mouth corners; 140 mm is the width of an adult head across
# the cheekbones.
_CENTER_MM = np.array([0.0, 35.0, -66.8])
_RADII_MM = np.array([70.0, 110.0, 80.0])
# Nothing is laid further around the head than this share of its half width.
_REACH = 0.92
FACE_WIDTH_MM = 2 * _RADII_MM[0]

# Weight of the prior that a head is seen straight on, against landmark errors in eye distances: a
# turn of 0.5 radians costs as much as an error of 0.05.
_PRIOR = 0.1


@dataclasses.dataclass(frozen=True)
class Area:
    """A rectangle of paper on the head.

    Attributes:
        left_mm: Where it begins, in x.
        right_mm: Where it ends, in x.
        top_mm: Its upper edge, in y.
        bottom_mm: Its lower edge, in y.
        off_mm: Its distance from the skin.
        cells: Rows and columns of its grid.
    """

    left_mm: float
    right_mm: float
    top_mm: float
    bottom_mm: float
    off_mm: float = 0.0
    cells: tuple[int, int] = (4, 4)


# Patches keep clear of the nose, on the outer cheeks and the lower mask: closer to it plain black
# ones alone hide the face, and a training would show nothing. The larger pair goes nearer to both
# limits, for faces on which the small one is not enough: plain black does more there as well.
PLACEMENTS = {
    "cheeks": {
        "left_cheek": Area(-64.0, -34.0, 26.0, 80.0),
        "right_cheek": Area(34.0, 64.0, 26.0, 80.0),
    },
    "wide_cheeks": {
        "left_cheek": Area(-66.0, -30.0, 22.0, 86.0),
        "right_cheek": Area(30.0, 66.0, 22.0, 86.0),
    },
    "mask": {"mask": Area(-52.0, 52.0, 42.0, 97.0, off_mm=12.0, cells=(4, 8))},
}
# The medical mask that the patch of the placement "mask" is printed on.
MASK = Area(-65.0, 65.0, 20.0, 106.0, off_mm=10.0, cells=(4, 8))


class Pose(NamedTuple):
    """A head seen by weak perspective.

    Attributes:
        rotation: From the head's axes to the camera's, `[3, 3]`.
        scale: Pixels per millimeter.
        origin: The point between the eyes, `[2]` (y, x) in pixels.
    """

    rotation: np.ndarray
    scale: float
    origin: np.ndarray


def estimate_pose(landmarks: np.ndarray) -> Pose:
    """Pose of the generic head from five landmarks.

    Least squares over pitch, yaw, roll, log scale and shift, with a weak prior for a frontal view:
    a flat set of points tells small turns badly.

    Args:
        landmarks: `[5, 2]` (y, x) in pixels: eye, eye, nose, mouth corner, mouth corner, the
            picture's left first.

    Returns:
        The pose.

    Raises:
        ValueError: The landmarks are not finite or fall together.
    """
    points = np.asarray(landmarks, np.float64)[:, ::-1]
    eyes = points[1] - points[0]
    size = np.linalg.norm(eyes)
    if not np.isfinite(points).all() or size < 1:
        raise ValueError(f"landmarks {np.asarray(landmarks).tolist()} show no face")
    start_scale = max(size, np.linalg.norm(points[3:].mean(0) - points[:2].mean(0)) * 63 / 69) / 63
    roll = np.arctan2(eyes[1], eyes[0])
    start = np.array([0.0, 0.0, roll, np.log(start_scale), *points[:2].mean(axis=0)])

    def residuals(values: np.ndarray) -> np.ndarray:
        turned = _rotation(values[:3]).apply(LANDMARKS_MM)
        seen = np.exp(values[3]) * turned[:, :2] + values[4:]
        prior = _PRIOR * np.array([values[0], values[1], values[3] - np.log(start_scale)])
        return np.concatenate([(seen - points).ravel() / size, prior])

    # Angles and the log scale are of the order of 1, shifts of that of the face.
    fit = optimize.least_squares(
        residuals, start, x_scale=[1, 1, 1, 1, size, size], xtol=1e-12, ftol=1e-12, gtol=1e-12
    )
    values = fit.x
    return Pose(_rotation(values[:3]).as_matrix(), float(np.exp(values[3])), values[[5, 4]])


def face_grid(pose: Pose, area: Area) -> np.ndarray:
    """Corners of an area's cells in the photo.

    Args:
        pose: That of the head.
        area: A rectangle on it.

    Returns:
        `[R + 1, C + 1, 3]` float32 (y, x, depth) in pixels.
    """
    seen = _surface(area) @ pose.rotation.T * pose.scale
    seen[..., :2] += pose.origin[::-1]
    return seen[..., [1, 0, 2]].astype(np.float32)


def paper_size(area: Area, *, face_width_mm: float = FACE_WIDTH_MM) -> tuple[float, float]:
    """Height and width in millimeters of the paper for an area, for a face of the given width.

    The paper's width follows the head's curve at half its height.

    Args:
        area: A rectangle on the head.
        face_width_mm: Width of the face across the cheekbones, in [80, 220].

    Raises:
        ValueError: `face_width_mm` is out of its range.
    """
    if not 80 <= face_width_mm <= 220:
        raise ValueError(f"face_width_mm is {face_width_mm}, must lie in [80, 220]")
    points = _surface(dataclasses.replace(area, cells=(64, 64)))

    def length(line: np.ndarray) -> float:
        return float(np.linalg.norm(np.diff(line, axis=0), axis=1).sum())

    scale = face_width_mm / FACE_WIDTH_MM
    return scale * length(points[:, 32]), scale * length(points[32])


def _surface(area: Area) -> np.ndarray:
    """Points `[R + 1, C + 1, 3]` (x, y, z) mm of the area's corners on the head.

    Columns are spread evenly along the head's curve, as on paper that is bent around it.
    """
    radii = _RADII_MM + area.off_mm
    rows, columns = area.cells
    y = np.linspace(area.top_mm, area.bottom_mm, rows + 1)
    waist = np.sqrt(np.maximum(1 - ((y - _CENTER_MM[1]) / radii[1]) ** 2, 0))
    points = np.zeros((rows + 1, columns + 1, 3))
    for row, share in enumerate(waist):
        reach = _REACH * radii[0] * share
        first, last = np.clip([area.left_mm, area.right_mm], -reach, reach)
        fine = np.linspace(first, last, 257)
        bent = np.sqrt(np.maximum(1 - (fine / (radii[0] * share)) ** 2, 1e-4))
        depth = radii[2] * share * bent
        arc = np.concatenate([[0], np.cumsum(np.hypot(np.diff(fine), np.diff(depth)))])
        x = np.interp(np.linspace(0, arc[-1], columns + 1), arc, fine)
        points[row] = np.stack([x, np.full_like(x, y[row]), np.interp(x, fine, depth)], axis=1)
    points[..., 2] += _CENTER_MM[2]
    return points


def _rotation(angles: np.ndarray) -> transform.Rotation:
    """Turn of (x, y, z) by pitch, then yaw, then roll, in radians."""
    return transform.Rotation.from_euler("xyz", angles)
