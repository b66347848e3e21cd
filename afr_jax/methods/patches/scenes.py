"""Photos that patches are trained and shown on, and the views of them that P-Net is given.

A photo with a face becomes a `Scene`: the region around the face, where the patches lie, how bright
paper is there, and which pyramid levels of the detector could see the face. `level_crops` draws one
random view of a scene and cuts, out of some levels of its pyramid, what lies around the face. A cut
equals the same part of the whole level, so nothing is lost but what the patch cannot change.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import images, options
from afr_jax.methods.patches import placement
from afr_jax.models import mtcnn
from afr_jax.perturb import transformations, warps
from afr_jax.recognition import detect

_CELL = 12  # Side of P-Net's window in pixels of a level.
# Windows count whose center lies within the face, and a tenth of their own side beyond it.
_BEYOND = 0.1
# Side of the part of a view that gets noise, blur and JPEG, in sides of the face: the patches and
# what the finest levels look at.
_INNER = 2.1
_REGION_STEP = 32


@dataclasses.dataclass(frozen=True)
class LevelOptions:
    """Which pyramid levels a patch is trained on.

    Attributes:
        min_face_px: of the detectors to be blinded.
        scale_factors: of their pyramids; the levels of all of them are drawn from.
        window_ratios: P-Net windows count from the first to the last of these sides, in sides of
            the face (the square root of its box's area), in rising order; levels are drawn apart,
            equally often, between each two neighbors.
        draws: levels drawn in a view between two neighbors.
        scale_jitter: the photo is enlarged by a factor in [1 - jitter, 1 + jitter].
    """

    min_face_px: float = 20.0
    scale_factors: tuple[float, ...] = options.option(
        (0.709, 0.82, 0.9, 0.95), "scale factors of the detectors' pyramids, between 0 and 1"
    )
    window_ratios: tuple[float, ...] = (0.45, 0.8, 1.25, 2.0)
    draws: int = 2
    scale_jitter: float = 0.1

    def __post_init__(self):
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
        return 2 * int(np.ceil(_CELL * (1 / ratio + 1 + 2 * _BEYOND) / 2)) + 2

    def region_sides(self, group: int) -> float:
        """Side of the photo's part that cells of such a cut look at, in sides of the face."""
        ratio = self.window_ratios[group + 1] / (1 - self.scale_jitter)
        return 1 + (1 + 2 * _BEYOND) * ratio


@dataclasses.dataclass(frozen=True)
class TurnOptions:
    """How far a worn patch is from where its grid says; 0 switches a part off.

    Attributes:
        turn_degrees: largest turn of the grids about each axis.
        scale: largest change of their size, as a share.
        shift: largest shift, in sides of the face.
        print_contrast: how much lighter black and darker white may come out, in [0, 1] units.
    """

    turn_degrees: float = 8.0
    scale: float = 0.05
    shift: float = 0.02
    print_contrast: float = 0.1


class Scene(NamedTuple):
    """A photo with a face, as arrays; of a batch, every leaf has a leading axis.

    region `[S, S, 3]` uint8 with its origin `[2]` in the photo of `size` `[2]` rows and columns;
    center `[2]` (y, x) and side of the face; grids: name -> `[R + 1, C + 1, 3]` in photo pixels;
    paper `[3]`, color of white paper there; levels: for each group `[L, 2]` rows and columns of
    pyramid levels, and counts, how many of them are real.
    """

    region: jax.Array
    origin: jax.Array
    size: jax.Array
    center: jax.Array
    side: jax.Array
    grids: dict[str, jax.Array]
    paper: jax.Array
    levels: tuple[jax.Array, ...]
    counts: tuple[jax.Array, ...]


def make_scenes(placed: Sequence[placement.Placed], level_options: LevelOptions) -> Scene:
    """A batch of scenes from photos of any sizes.

    Args:
        placed: photos with patches placed, at least one.
        level_options: Which levels matter.

    Returns:
        NumPy arrays with a leading axis.

    Raises:
        ValueError: no photo, or a face that no level of the detectors sees.
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
                side=np.float32(side),
                grids=dict(item.grids),
                paper=item.paper,
                levels=tuple(np.resize(levels, (length, 2)) for levels in table),
                counts=tuple(np.int32(len(levels)) for levels in table),
            )
        )
    return jax.tree.map(lambda *leaves: np.stack(leaves), *scenes)


class Crops(NamedTuple):
    """Cuts of levels of one size.

    pixels `[K, n, n, 3]` in [0, 1], sizes `[K, 2]` int (true rows and columns), masks `[K, m, m]`
    bool: which P-Net cells look at the face.
    """

    pixels: jax.Array
    sizes: jax.Array
    masks: jax.Array


class Sizes(NamedTuple):
    """Static sides in photo pixels of what `view` computes, the same for a batch.

    window: of the part that a patch may cover; inner: of the part about the face that the camera's
    noise, blur and JPEG are computed for.
    """

    window: int
    inner: int


class View(NamedTuple):
    """A random view of a scene.

    inner `[s, s, 3]` in [0, 1]: the face and the patches; low `[2]` int, where it begins in the
    region; outer `[S, S, 3]`: the region around it, zero where the inner part lies.
    """

    inner: jax.Array
    low: jax.Array
    outer: jax.Array


def view(
    key: jax.Array,
    patches: Mapping[str, jax.Array],
    scene: Scene,
    *,
    turns: TurnOptions,
    views: transformations.ViewOptions,
    sizes: Sizes,
) -> View:
    """Patches `[h, w]` on a scene, in a random view."""
    keys = jax.random.split(key, 6)
    region = scene.region.astype(jnp.float32) / 255.0
    low = _low(scene, region.shape[0], sizes.inner)
    inner = jax.lax.dynamic_slice(region, (low[0], low[1], 0), (sizes.inner, sizes.inner, 3))
    angles = jnp.deg2rad(turns.turn_degrees) * _even(keys[0], (3,))
    scale = 1 + turns.scale * _even(keys[1])
    shift = turns.shift * scene.side * _even(keys[2], (2,))
    ends = turns.print_contrast * jax.random.uniform(keys[3], (2,))
    origin, window = scene.origin + low, (sizes.window, sizes.window)
    # In units of the paper's color a patch is gray: one channel to draw instead of three.
    paper = scene.paper.reshape(1, 1, 3)
    inner = inner / paper
    for name in sorted(patches):
        shown = ends[0] + (1 - ends[0] - ends[1]) * patches[name]
        grid = warps.turn_grid(scene.grids[name], angles, scale=scale, shift=shift)
        inner = warps.paste(inner, shown[..., None], grid, window=window, origin=origin)
    inner = inner * paper
    mean = jax.lax.stop_gradient(jnp.mean(inner))
    inner = transformations.random_light(keys[4], inner, views, mean=mean)
    inner = transformations.random_capture(keys[5], inner, views)
    outer = jnp.clip(transformations.random_light(keys[4], region, views, mean=mean), 0.0, 1.0)
    hole = jnp.zeros_like(outer, shape=inner.shape)
    outer = jax.lax.dynamic_update_slice(outer, hole, (low[0], low[1], 0))
    return View(inner, low, jax.lax.stop_gradient(outer))


def view_sizes(scenes: Scene, turns: TurnOptions) -> Sizes:
    """Sides that fit every scene of a batch, however the patches are turned."""
    largest = 0.0
    for grids in scenes.grids.values():
        flat = grids[..., :2].reshape(len(grids), -1, 2)
        # A turn in the plane lengthens a side by at most its sine times the other.
        extent = (flat.max(axis=1) - flat.min(axis=1)).max(axis=-1)
        depth = grids[..., 2].reshape(len(grids), -1)
        extent = extent + (extent + np.ptp(depth, axis=1)) * np.sin(np.deg2rad(turns.turn_degrees))
        shift = 2 * turns.shift * scenes.side
        largest = max(largest, float(((1 + turns.scale) * extent + shift).max()))
    window = images.bucket_size(int(largest) + 4, (8,))
    inner = images.bucket_size(int(np.ceil(_INNER * scenes.side.max())), (16,))
    return Sizes(window, min(max(inner, window), scenes.region.shape[1]))


def level_crops(
    key: jax.Array, seen: View, scene: Scene, level_options: LevelOptions
) -> tuple[Crops, ...]:
    """Cuts around the face out of random levels of the pyramid of a photo, for each group.

    Args:
        key: decides the levels, and how much the photo is enlarged.
        seen: a view of the scene.
        scene: it is of.
        level_options: How levels are drawn.

    Returns:
        One `Crops` a group, of `level_options.draws` levels.
    """
    keys = jax.random.split(key, len(scene.levels))
    whole, inner = seen.outer.shape[0], seen.inner.shape[0]
    widest = max(level_options.region_sides(group) for group in range(len(scene.levels)))
    found = []
    for group, (group_key, levels) in enumerate(zip(keys, scene.levels, strict=True)):
        pick_key, scale_key = jax.random.split(group_key)
        count, draws = scene.counts[group], level_options.draws
        # One level out of each of as many equal parts of the list.
        places = (jnp.arange(draws) + jax.random.uniform(pick_key, (draws,))) / draws
        index = jnp.minimum((places * count).astype(jnp.int32), count - 1)
        grown = 1 + level_options.scale_jitter * _even(scale_key, (draws, 1))
        shapes = jnp.floor(levels[index] * grown + 1e-3)
        side = level_options.crop_px(group)
        cut = _cut_level(shapes, scene, side)
        pixels = cut.apply(seen.inner, scene.origin + seen.low)
        part = 8 * int(np.ceil(level_options.region_sides(group) / widest * whole / 8))
        if part > inner:
            part = min(part, whole)
            low = _low(scene, whole, part)
            around = jax.lax.dynamic_slice(seen.outer, (low[0], low[1], 0), (part, part, 3))
            pixels = pixels + cut.apply(around, scene.origin + low)
        found.append(Crops(pixels, cut.sizes, cut.masks))
    return tuple(found)


class _Cut(NamedTuple):
    """K cuts of levels: first photo row and column `[K, n]` of their pixels; the rest of `Crops`.

    A pixel averages `ratios` `[K, 2]` photo pixels, partly covered ones by the covered part.
    """

    rows: jax.Array
    columns: jax.Array
    ratios: jax.Array
    sizes: jax.Array
    masks: jax.Array

    def apply(self, part: jax.Array, origin: jax.Array) -> jax.Array:
        """The cuts `[K, n, n, 3]` of a photo that is zero outside a part `[s, s, 3]` of it."""

        def weights(start, ratio, low):
            at = (low + jnp.arange(part.shape[0], dtype=jnp.float32)).reshape(1, 1, -1)
            end = (start + ratio[:, None])[..., None]
            covered = jnp.minimum(end, at + 1) - jnp.maximum(start[..., None], at)
            return jnp.clip(covered, 0.0, 1.0) / ratio.reshape(-1, 1, 1)

        by_row = weights(self.rows, self.ratios[:, 0], origin[0])
        by_column = weights(self.columns, self.ratios[:, 1], origin[1])
        pixels = jnp.einsum("kip,pqc->kiqc", by_row, part)
        return jnp.einsum("kiqc,kjq->kijc", pixels, by_column)


def _cut_level(shapes, scene, side):
    """Where to cut levels of `shapes` `[K, 2]`: around the face."""
    ratios = scene.size[None] / shapes
    middle = (scene.center[None] + 0.5) / ratios
    # P-Net's cells lie on even pixels of a level, so cuts begin there.
    last = 2 * jnp.ceil(jnp.maximum(shapes - side, 0) / 2)
    first = jnp.clip(2 * jnp.round((middle - side / 2) / 2), 0, last)
    starts, near = [], []
    for axis in range(2):
        ratio, begin = ratios[:, axis, None], first[:, axis, None]
        starts.append((begin + jnp.arange(side, dtype=jnp.float32)[None]) * ratio)
        cells = 2 * jnp.arange(mtcnn.map_size(side), dtype=jnp.float32)[None]
        centers = (begin + cells + _CELL / 2 + 0.5) * ratio - 0.5
        reach = 0.5 * scene.side + _BEYOND * _CELL * ratio
        near.append(jnp.abs(centers - scene.center[axis]) <= reach)
    sizes = jnp.minimum(shapes - first, side).astype(jnp.int32)
    return _Cut(*starts, ratios, sizes, near[0][:, :, None] & near[1][:, None, :])


def _low(scene, whole, part):
    """First row and column of a part of the region, about the face."""
    low = jnp.round(scene.center - scene.origin - part / 2)
    return jnp.clip(low, 0, whole - part).astype(jnp.int32)


def _levels(shape, side, level_options):
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
        rows = [size for scale, size in sorted(found) if low <= _CELL / scale / side < high]
        groups.append(np.array(rows[::-1], np.float32).reshape(-1, 2))
    if not any(map(len, groups)):
        raise ValueError(f"a face of {side:.0f} px is seen on no level of the detectors")
    # A group that the pyramids do not reach is trained on its neighbors' levels.
    full = [levels for levels in groups if len(levels)]
    return [levels if len(levels) else full[0] for levels in groups]


def _even(key, shape=()):
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
