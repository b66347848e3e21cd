"""Photos that patches are trained on, as arrays: scenes of a face, and the levels that see it.

A photo with a face becomes a `Scene`: the region around the face, where the patches lie, how bright
paper is there, and which pyramid levels of the detector could see the face.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from afr_jax.core import images, options, parallel
from afr_jax.methods.patches import placement
from afr_jax.recognition import detect

CELL = 12  # Side of P-Net's window in pixels of a level.
# Windows count whose center lies within the face, and a tenth of their own side beyond it.
BEYOND = 0.1
_REGION_STEP = 32


@dataclasses.dataclass(frozen=True)
class LevelOptions:
    """Which pyramid levels a patch is trained on.

    Attributes:
        min_face_px: Side of the smallest face that the detectors to be blinded look for.
        scale_factors: Those of their pyramids; the levels of all of them are drawn from.
        window_ratios: P-Net windows count from the first to the last of these sides, in sides of
            the face (the square root of its box's area), in rising order; levels are drawn apart,
            equally often, between each two neighbors.
        draws: Levels drawn in a view between two neighbors.
        scale_jitter: The photo is enlarged by a factor in [1 - jitter, 1 + jitter].
    """

    min_face_px: float = 20.0
    scale_factors: tuple[float, ...] = options.option(
        (0.709, 0.82, 0.9, 0.95), "scale factors of the detectors' pyramids, between 0 and 1"
    )
    window_ratios: tuple[float, ...] = (0.45, 0.8, 1.25, 2.0)
    draws: int = 2
    scale_jitter: float = 0.1

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in itertools.pairwise(self.window_ratios))
        if len(self.window_ratios) < 2 or not rising or not self.window_ratios[0] > 0:
            raise ValueError(f"window_ratios is {self.window_ratios}, must rise from above 0")
        if not self.scale_factors or not all(0 < factor < 1 for factor in self.scale_factors):
            raise ValueError(f"scale_factors is {self.scale_factors}, must lie in (0, 1)")
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}, must be at least 1")
        if not 0 <= self.scale_jitter < 0.5:
            raise ValueError(f"scale_jitter is {self.scale_jitter}, must lie in [0, 0.5)")

    def crop_px(self, group: int) -> int:
        """Side of the cut of a level between the window ratios `group` and `group + 1`."""
        ratio = self.window_ratios[group] / (1 + self.scale_jitter)
        return 2 * int(np.ceil(CELL * (1 / ratio + 1 + 2 * BEYOND) / 2)) + 2

    def region_sides(self, group: int) -> float:
        """Side of the photo's part that cells of such a cut look at, in sides of the face."""
        ratio = self.window_ratios[group + 1] / (1 - self.scale_jitter)
        return 1 + (1 + 2 * BEYOND) * ratio


class Scene(NamedTuple):
    """A photo with a face, as arrays; of a batch, every leaf has a leading axis.

    Attributes:
        region: The part around the face, `[S, S, 3]` uint8.
        origin: Where it begins in the photo, `[2]` (y, x).
        size: Rows and columns of the photo, `[2]`.
        center: Middle of the face, `[2]` (y, x).
        side: That of the face, in pixels.
        grids: Corners of each patch by its name, `[R + 1, C + 1, 3]` in photo pixels.
        paper: Color of white paper there, `[3]`.
        levels: Rows and columns of pyramid levels, `[L, 2]` for each group.
        counts: How many of them are real, for each group.
    """

    region: parallel.AnyArray
    origin: parallel.AnyArray
    size: parallel.AnyArray
    center: parallel.AnyArray
    side: parallel.AnyArray
    grids: dict[str, parallel.AnyArray]
    paper: parallel.AnyArray
    levels: tuple[parallel.AnyArray, ...]
    counts: tuple[parallel.AnyArray, ...]


def make_scenes(placed: Sequence[placement.Placed], level_options: LevelOptions) -> Scene:
    """A batch of scenes from photos of any sizes.

    Args:
        placed: Photos with patches placed, at least one.
        level_options: Which levels matter.

    Returns:
        NumPy arrays with a leading axis.

    Raises:
        ValueError: There is no photo, or a face that no level of the detectors sees.
    """
    if not placed:
        raise ValueError("no photo to train on")
    sides = [float(np.sqrt(np.prod(item.box[2:] - item.box[:2]))) for item in placed]
    num_groups = len(level_options.window_ratios) - 1
    widest = max(level_options.region_sides(group) for group in range(num_groups))
    region = images.bucket_size(int(np.ceil(widest * max(sides))) + 2, (_REGION_STEP,))
    tables = [
        _levels(item.pixels.shape, side, level_options)
        for item, side in zip(placed, sides, strict=True)
    ]
    length = max(len(levels) for table in tables for levels in table)
    scenes = []
    for item, side, table in zip(placed, sides, tables, strict=True):
        size = np.array(item.pixels.shape[:2])
        center = (item.box[:2] + item.box[2:]) / 2
        origin = np.clip(np.round(center - region / 2), 0, np.maximum(size - region, 0)).astype(int)
        cut = item.pixels[origin[0] :, origin[1] :][:region, :region]
        scenes.append(
            Scene(
                region=images.pad_to(cut, (region, region)),
                origin=origin.astype(np.float32),
                size=size.astype(np.float32),
                center=center.astype(np.float32),
                side=np.asarray(side, np.float32),
                grids=dict(item.grids),
                paper=item.paper,
                levels=tuple(np.resize(levels, (length, 2)) for levels in table),
                counts=tuple(np.asarray(len(levels), np.int32) for levels in table),
            )
        )
    return jax.tree.map(lambda *leaves: np.stack(leaves), *scenes)


def _levels(shape: tuple[int, ...], side: float, level_options: LevelOptions) -> list[np.ndarray]:
    """Rows and columns `[L, 2]` of the levels of all pyramids, by group, finest first."""
    height, width = shape[:2]
    found = set()
    for factor in level_options.scale_factors:
        detector = detect.DetectorOptions(
            min_face_px=level_options.min_face_px, scale_factor=factor
        )
        scales = detect.pyramid_scales(height, width, detector)
        found |= set(zip(scales, detect.level_sizes(height, width, scales), strict=True))
    groups = []
    for low, high in itertools.pairwise(level_options.window_ratios):
        rows = [size for scale, size in sorted(found) if low <= CELL / scale / side < high]
        groups.append(np.array(rows[::-1], np.float32).reshape(-1, 2))
    if not any(map(len, groups)):
        raise ValueError(f"a face of {side:.0f} px is seen on no level of the detectors")
    # A group that the pyramids do not reach is trained on its neighbors' levels.
    full = [levels for levels in groups if len(levels)]
    return [levels if len(levels) else full[0] for levels in groups]
