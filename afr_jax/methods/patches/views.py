"""Random views of scenes, and the parts of the pyramid around the face that P-Net is given.

`view` draws the patches on a scene as a camera may see them; `level_crops` cuts, out of some levels
of the photo's pyramid, what lies around the face. A cut equals the same part of the whole level, so
nothing is lost but what the patch cannot change.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import images, parallel
from afr_jax.methods.patches import scenes
from afr_jax.models import mtcnn
from afr_jax.perturb import transformations, warps

# Side of the part of a view that gets noise, blur and JPEG, in sides of the face: the patches and
# what the finest levels look at.
_INNER = 2.1
# Blocks that a patch is cut into along each side where some are blank, and what they show.
_BLOCKS, _BLANK = 6, 0.5


@dataclasses.dataclass(frozen=True)
class TurnOptions:
    """How far a worn patch is from where its grid says; 0 switches a part off.

    Attributes:
        turn_degrees: Largest turn of the grids about each axis.
        scale: Largest change of their size, as a share.
        shift: Largest shift, in sides of the face.
        print_contrast: How much lighter black and darker white may come out, in [0, 1] units.
    """

    turn_degrees: float = 8.0
    scale: float = 0.05
    shift: float = 0.02
    print_contrast: float = 0.1


class Sizes(NamedTuple):
    """Static sides in photo pixels of what `view` computes, the same for a batch.

    Attributes:
        window: That of the part that a patch may cover.
        inner: That of the part about the face that the camera's noise, blur and JPEG are computed
            for.
    """

    window: int
    inner: int


class View(NamedTuple):
    """A random view of a scene.

    Attributes:
        inner: The face and the patches, `[s, s, 3]` in [0, 1].
        low: Where they begin in the region, `[2]` int.
        outer: The region around them, `[S, S, 3]`, zero where the inner part lies.
    """

    inner: jax.Array
    low: jax.Array
    outer: jax.Array


def view(
    key: jax.Array,
    patches: Mapping[str, jax.Array],
    scene: scenes.Scene,
    *,
    turns: TurnOptions,
    views: transformations.ViewOptions,
    sizes: Sizes,
    erased: float = 0.0,
) -> View:
    """Draws patches on a scene, in a random view.

    Args:
        key: Decides the view.
        patches: Each patch `[h, w]` in [0, 1], by its name.
        scene: One scene, without a leading axis.
        turns: How the patches move.
        views: How the photo varies.
        sizes: What `view_sizes` says of the batch that the scene is of.
        erased: Share of the blocks of each patch that are blank, at random.
    """
    keys = jax.random.split(key, 6)
    region = jnp.astype(scene.region, jnp.float32) / 255.0
    low = _low(scene, region.shape[0], sizes.inner)
    inner = jax.lax.dynamic_slice(region, (low[0], low[1], 0), (sizes.inner, sizes.inner, 3))
    angles = jnp.deg2rad(turns.turn_degrees) * _even(keys[0], (3,))
    scale = 1 + turns.scale * _even(keys[1])
    shift = turns.shift * jnp.asarray(scene.side) * _even(keys[2], (2,))
    ends = turns.print_contrast * jax.random.uniform(keys[3], (2,))
    origin, window = scene.origin + low, (sizes.window, sizes.window)
    # In units of the paper's color a patch is gray: one channel to draw instead of three.
    paper = jnp.reshape(scene.paper, (1, 1, 3))
    inner = inner / paper
    for number, name in enumerate(sorted(patches)):
        if erased:
            own_key = jax.random.fold_in(jax.random.fold_in(key, 6), number)
            patches = {**patches, name: _without_blocks(own_key, patches[name], erased)}
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


def _without_blocks(key: jax.Array, patch: jax.Array, share: float) -> jax.Array:
    """A patch `[h, w]` with some blocks blank."""
    is_kept = jax.random.bernoulli(key, 1 - share, (_BLOCKS, _BLOCKS))
    rows, columns = (jnp.arange(count) * _BLOCKS // count for count in patch.shape)
    return jnp.where(is_kept[rows][:, columns], patch, _BLANK)


def view_sizes(batch: scenes.Scene, turns: TurnOptions) -> Sizes:
    """Sides that fit every scene of a batch, however the patches are turned.

    Args:
        batch: What `scenes.make_scenes` returns, as NumPy arrays.
        turns: How far they may be turned.
    """
    largest = 0.0
    for grids in batch.grids.values():
        flat = grids[..., :2].reshape(len(grids), -1, 2)
        # A turn in the plane lengthens a side by at most its sine times the other.
        extent = (flat.max(axis=1) - flat.min(axis=1)).max(axis=-1)
        depth = grids[..., 2].reshape(len(grids), -1)
        extent = extent + (extent + np.ptp(depth, axis=1)) * np.sin(np.deg2rad(turns.turn_degrees))
        shift = 2 * turns.shift * batch.side
        largest = max(largest, float(((1 + turns.scale) * extent + shift).max()))
    window = images.bucket_size(int(largest) + 4, (8,))
    inner = images.bucket_size(int(np.ceil(_INNER * batch.side.max())), (16,))
    return Sizes(window, min(max(inner, window), batch.region.shape[1]))


class Crops(NamedTuple):
    """Cuts of levels of one size.

    Attributes:
        pixels: `[K, n, n, 3]` in [0, 1].
        sizes: True rows and columns, `[K, 2]` int.
        masks: Which P-Net cells look at the face, `[K, m, m]` bool.
    """

    pixels: jax.Array
    sizes: jax.Array
    masks: jax.Array


def level_crops(
    key: jax.Array, seen: View, scene: scenes.Scene, level_options: scenes.LevelOptions
) -> tuple[Crops, ...]:
    """Cuts around the face out of random levels of the pyramid of a photo, for each group.

    Args:
        key: Decides the levels, and how much the photo is enlarged.
        seen: A view of the scene.
        scene: The scene that it is of.
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

    def apply(self, part: jax.Array, origin: parallel.AnyArray) -> jax.Array:
        """The cuts `[K, n, n, 3]` of a photo that is zero outside a part `[s, s, 3]` of it."""

        def weights(start: jax.Array, ratio: jax.Array, low: jax.Array) -> jax.Array:
            at = (low + jnp.arange(part.shape[0], dtype=jnp.float32)).reshape(1, 1, -1)
            end = (start + ratio[:, None])[..., None]
            covered = jnp.minimum(end, at + 1) - jnp.maximum(start[..., None], at)
            return jnp.clip(covered, 0.0, 1.0) / ratio.reshape(-1, 1, 1)

        by_row = weights(self.rows, self.ratios[:, 0], origin[0])
        by_column = weights(self.columns, self.ratios[:, 1], origin[1])
        pixels = jnp.einsum("kip,pqc->kiqc", by_row, part)
        return jnp.einsum("kiqc,kjq->kijc", pixels, by_column)


def _cut_level(shapes: parallel.AnyArray, scene: scenes.Scene, side: int) -> _Cut:
    """Where to cut levels of `shapes` `[K, 2]`: around the face."""
    ratios = jnp.asarray(scene.size[None] / shapes)
    middle = (scene.center[None] + 0.5) / ratios
    # P-Net's cells lie on even pixels of a level, so cuts begin there.
    last = 2 * jnp.ceil(jnp.maximum(shapes - side, 0) / 2)
    first = jnp.clip(2 * jnp.round((middle - side / 2) / 2), 0, last)
    starts, near = [], []
    for axis in range(2):
        ratio, begin = ratios[:, axis, None], first[:, axis, None]
        starts.append((begin + jnp.arange(side, dtype=jnp.float32)[None]) * ratio)
        cells = 2 * jnp.arange(mtcnn.map_size(side), dtype=jnp.float32)[None]
        centers = (begin + cells + scenes.CELL / 2 + 0.5) * ratio - 0.5
        reach = 0.5 * scene.side + scenes.BEYOND * scenes.CELL * ratio
        near.append(jnp.abs(centers - scene.center[axis]) <= reach)
    sizes = jnp.minimum(shapes - first, side).astype(jnp.int32)
    return _Cut(starts[0], starts[1], ratios, sizes, near[0][:, :, None] & near[1][:, None, :])


def _low(scene: scenes.Scene, whole: int, part: int) -> jax.Array:
    """First row and column of a part of the region, about the face."""
    low = jnp.round(scene.center - scene.origin - part / 2)
    return jnp.clip(low, 0, whole - part).astype(jnp.int32)


def _even(key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
