"""Stage 2a of face recognition: MTCNN, from a photo to face boxes, confidences and five landmarks.

The cascade follows the PyPI `mtcnn` 1.0 package (same levels, thresholds and suppression), so that
its results agree face by face. Pyramid levels are packed into tiles of one size, so few compiled
programs serve photos of all sizes; what lies between them is NumPy and OpenCV.

Boxes are `[y0, x0, y1, x1]` in pixels, landmarks `[5, 2]` as (y, x): eye, eye, nose, mouth corner,
mouth corner, the person's right (the picture's left) first.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import cv2
import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from afr_jax.core import backend, parallel
from afr_jax.core import options as options_lib
from afr_jax.data import photos as data_photos
from afr_jax.models import mtcnn
from afr_jax.models.weights import conversion

MIN_FACE_HELP = "side of the smallest face looked for, pixels"

# A cell of P-Net looks at a square of 12 px; its neighbor at one 2 px further on.
_CELL, _STRIDE = 12, 2
# Pyramid levels are cut into pieces that P-Net sees in square tiles of this side, small ones
# several to a tile.
_TILE_PX = 128
_TILE_CELLS = (_TILE_PX - 2 + 1) // 2 - 4
# OpenCV leaves out what a mean takes of a pixel up to this share.
_LEAST_SHARE = 1e-3
# Photos that are looked at side by side, as one leaves processors idle between its programs, and
# their pixels.
PHOTOS_AT_ONCE, PIXELS_AT_ONCE = 4, 40_000_000
# Overlaps of boxes that are in memory at once.
_OVERLAPS_AT_ONCE = 1 << 16
# A photo of more pixels is looked at reduced by the whole factor that brings it below.
_MOST_PIXELS = 25_000_000
# After a photo of more bytes, what was allocated for it is given back to the system.
_GIVEN_BACK_BYTES = 1 << 25


class _Batches(NamedTuple):
    """How many inputs one call of each network takes, few and many; the last call is filled up."""

    tiles: tuple[int, int]
    rnet: tuple[int, int]
    onet: tuple[int, int]


_CPU_BATCHES = _Batches(tiles=(1, 4), rnet=(16, 64), onet=(4, 16))
_ACCELERATOR_BATCHES = _Batches(tiles=(16, 128), rnet=(64, 512), onet=(16, 128))


@dataclasses.dataclass(frozen=True)
class DetectorOptions:
    """Settings of the cascade; the defaults are those of the PyPI package.

    Attributes:
        min_face_px: side of the smallest face looked for, >= 12.
        scale_factor: ratio between pyramid levels, in (0, 1).
        thresholds: three, least face probability of P-, R- and O-Net.
        overlaps: four, largest overlap of two survivors: within a level, across levels, after
            R-Net, after O-Net; no flag.
    """

    min_face_px: float = options_lib.option(20.0, MIN_FACE_HELP, at_least=_CELL)
    scale_factor: float = options_lib.option(0.709, "ratio of the sizes looked for, in (0, 1)")
    thresholds: tuple[float, ...] = options_lib.option(
        (0.6, 0.7, 0.8), "least face probability of P-, R- and O-Net, in [0, 1]"
    )
    overlaps: tuple[float, float, float, float] = (0.5, 0.7, 0.7, 0.7)

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not self.min_face_px >= _CELL:
            raise ValueError(f"min_face_px is {self.min_face_px}, must be at least {_CELL}")
        if not 0.0 < self.scale_factor < 1.0:
            raise ValueError(f"scale_factor is {self.scale_factor}, must lie in (0, 1)")
        for name, count in (("thresholds", 3), ("overlaps", 4)):
            values = getattr(self, name)
            if len(values) != count or not all(0.0 <= value <= 1.0 for value in values):
                raise ValueError(f"{name} is {values}, must be {count} numbers in [0, 1]")


class Faces(NamedTuple):
    """The N faces of one photo, most confident first, as host arrays of float32.

    boxes `[N, 4]` (y0, x0, y1, x1) within the photo, confidences `[N]`, landmarks `[N, 5, 2]`
    (y, x).
    """

    boxes: np.ndarray
    confidences: np.ndarray
    landmarks: np.ndarray


class Stages(NamedTuple):
    """Boxes `[N, 4]` that are left after P-Net and after R-Net, and the faces after O-Net."""

    proposals: np.ndarray
    refined: np.ndarray
    faces: Faces


class _Piece(NamedTuple):
    """A part of a pyramid level, and where it lies in a tile; rows and columns in pixels.

    Attributes:
        level: number of the level.
        start: (row, column) of its first pixel in the level.
        size: rows and columns.
        tile: number of the tile.
        place: (row, column) of its first pixel in the tile, even numbers.
    """

    level: int
    start: tuple[int, int]
    size: tuple[int, int]
    tile: int
    place: tuple[int, int]


class _Corners(NamedTuple):
    """What crops of a photo are interpolated from; K crops of S x S pixels.

    Attributes:
        pixels: `[4, K, S, S]` uint32, the four that surround each place, packed (`_packed`): upper
            left, upper right, lower left, lower right.
        parts: `[K, 2, S]` float32, how far below the upper row, right of the left column.
        inside: `[K, 2, S]` bool, which rows and columns lie within the photo.
    """

    pixels: np.ndarray | jax.Array
    parts: np.ndarray | jax.Array
    inside: np.ndarray | jax.Array


class _Candidates(NamedTuple):
    """Boxes `[K, 4]` and falling scores `[K]`, float32 arrays of the host."""

    boxes: np.ndarray
    scores: np.ndarray


def pyramid_scales(height: int, width: int, options: DetectorOptions) -> tuple[float, ...]:
    """Scales of the image pyramid, finest first.

    Zhang et al. 2016, section II-A, as in the authors' release: the first level maps the smallest
    face to 12 px; each next one is smaller by `scale_factor`, as long as the photo's shorter side
    keeps 12 px.
    """
    first = _CELL / options.min_face_px
    scales = []
    while int(min(height, width) * first * options.scale_factor ** len(scales)) >= _CELL:
        scales.append(first * options.scale_factor ** len(scales))
    return tuple(scales)


def level_sizes(height: int, width: int, scales: tuple[float, ...]) -> tuple[tuple[int, int], ...]:
    """Rows and columns of every level: the scaled photo, rounded down as the PyPI package does."""
    return tuple((int(height * scale), int(width * scale)) for scale in scales)


def detect_faces(
    variables: mtcnn.Variables,
    photo: data_photos.PhotoLike,
    *,
    options: DetectorOptions = DetectorOptions(),
) -> Faces:
    """Finds the faces of one photo.

    Args:
        variables: of the three networks (`mtcnn.load_variables`).
        photo: `[H, W, 3]` uint8 RGB, the path of a file, or a PIL image.
        options: settings of the cascade.

    Returns:
        The faces; empty arrays where there is none.

    Raises:
        PhotoError: the photo cannot be read.
    """
    pixels = photo if isinstance(photo, np.ndarray) else data_photos.as_photo(photo).pixels
    return detect_stages(variables, pixels, options=options).faces


def detect_stages(
    variables: mtcnn.Variables, pixels: np.ndarray, *, options: DetectorOptions = DetectorOptions()
) -> Stages:
    """Finds the faces of one photo, and says what was left after each network.

    Args:
        variables: of the three networks (`mtcnn.read_weights`).
        pixels: `[H, W, 3]` uint8 RGB.
        options: settings of the cascade.

    Returns:
        The boxes after each network's threshold and suppression; those of the first two are squares
        and may reach out of the photo. Photos of more than 25 megapixels are averaged over 2 x 2
        pixels or more before, which bounds memory: so much larger is then the smallest face.
    """
    chex.assert_rank(pixels, 3)
    chex.assert_type(pixels, np.uint8)
    height, width, _ = pixels.shape
    if not pyramid_scales(height, width, options):
        return _nothing()
    factor = math.ceil(math.sqrt(height * width / _MOST_PIXELS))
    if factor > 1:
        found = detect_stages(variables, reduced(pixels, factor), options=options)
        shift = (factor - 1) / 2
        proposals, refined = (boxes * factor + shift for boxes in found[:2])
        return Stages(proposals, refined, enlarged(found.faces, factor))
    batches = _CPU_BATCHES if jax.default_backend() == "cpu" else _ACCELERATOR_BATCHES
    found, levels = _propose(variables.pnet, pixels, batches.tiles, options)
    if pixels.nbytes > _GIVEN_BACK_BYTES:
        backend.give_back_memory()
    found = _take(found, _survivors(found.boxes, options.overlaps[0], groups=levels))
    found = _take(found, _survivors(found.boxes, options.overlaps[1]))
    proposed = found = found._replace(boxes=_square(found.boxes))

    packed = _packed(pixels)
    scores, regression = _in_batches(
        _rnet, variables.rnet, packed, found.boxes, side=24, batches=batches.rnet
    )
    found = _ranked(_move(found.boxes, regression), scores, options.thresholds[1])[0]
    found = _take(found, _survivors(found.boxes, options.overlaps[2]))
    refined = found = found._replace(boxes=_square(found.boxes))

    scores, regression, points = _in_batches(
        _onet, variables.onet, packed, found.boxes, side=48, batches=batches.onet
    )
    low = found.boxes[:, None, :2]
    sides = found.boxes[:, None, 2:] - low + 1
    landmarks = points.reshape(-1, 2, 5).transpose(0, 2, 1)[..., ::-1] * sides + low - 1
    found, order = _ranked(_move(found.boxes, regression), scores, options.thresholds[2])
    kept = _survivors(found.boxes, options.overlaps[3], of_smaller=True)
    limit = np.array([height, width, height, width], np.float32) - 1
    boxes = np.clip(found.boxes[kept], 0, limit)
    faces = Faces(boxes, found.scores[kept], landmarks[order][kept].astype(np.float32))
    return Stages(proposed.boxes, refined.boxes, faces)


def detect_photos(
    variables: mtcnn.Variables,
    photos: Sequence[data_photos.PhotoLike],
    *,
    options: DetectorOptions = DetectorOptions(),
) -> list[Faces]:
    """Finds the faces of some photos, a few at a time: one alone does not fill the machine.

    Args:
        variables: of the three networks.
        photos: as `detect_faces` takes them, of any sizes.
        options: settings of the cascade.

    Returns:
        The faces of each photo, equal to those of `detect_faces`.
    """
    return list(
        parallel.thread_stream(
            lambda photo: detect_faces(variables, photo, options=options),
            photos,
            width=PHOTOS_AT_ONCE,
            weight_fn=data_photos.num_pixels,
            limit=PIXELS_AT_ONCE,
        )
    )


def select_faces(faces: Faces, index: np.ndarray) -> Faces:
    """The faces at an index or mask."""
    return Faces(*(field[index] for field in faces))


def main_face(faces: Faces, shape: tuple[int, ...]) -> Faces:
    """The face that the photo is of: large and central; none where there is none.

    Largest area minus twice the squared distance of its center from the photo's (the rule of David
    Sandberg's facenet for LFW).
    """
    if not len(faces.boxes):
        return faces
    low, high = faces.boxes[:, :2], faces.boxes[:, 2:]
    apart = np.sum(((low + high) / 2 - np.array(shape[:2]) / 2) ** 2, axis=1)
    best = int(np.argmax(np.prod(high - low, axis=1) - 2 * apart))
    return select_faces(faces, np.array([best]))


def reduced(pixels: np.ndarray, factor: int) -> np.ndarray:
    """A photo `[H, W, 3]` at 1 / `factor` of its size, by averaging."""
    size = (pixels.shape[1] // factor, pixels.shape[0] // factor)
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))


def enlarged(faces: Faces, factor: int) -> Faces:
    """Faces of a `reduced` photo in pixels of the whole; a pixel's middle is half a pixel in."""
    shift = (factor - 1) / 2
    return Faces(
        (faces.boxes * factor + shift).astype(np.float32),
        faces.confidences,
        (faces.landmarks * factor + shift).astype(np.float32),
    )


def no_faces() -> Faces:
    """What a photo without faces gives: empty arrays."""
    return Faces(
        np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros((0, 5, 2), np.float32)
    )


def overlap(boxes: np.ndarray, others: np.ndarray, *, of_smaller: bool = False) -> np.ndarray:
    """Intersection over union of every pair of boxes (or over the smaller area).

    Args:
        boxes: `[N, 4]` (y0, x0, y1, x1).
        others: `[M, 4]`.
        of_smaller: divide by the smaller of the two areas instead of the union.

    Returns:
        `[N, M]` in [0, 1], float; 0 where both areas vanish.
    """
    dtype = np.result_type(boxes, others, np.float32)
    boxes, others = (np.ascontiguousarray(each.T, dtype) for each in (boxes, others))
    # In place: to allocate arrays takes as long as their numbers.
    whole = np.empty((boxes.shape[1], others.shape[1]), dtype)
    sides = []
    for low, high in ((0, 2), (1, 3)):
        np.maximum(boxes[low, :, None], others[low], out=whole)
        side = np.minimum(boxes[high, :, None], others[high])
        side -= whole
        sides.append(np.maximum(side, 0, out=side))
    shared = np.multiply(*sides, out=sides[0])
    area, other_area = ((each[2] - each[0]) * (each[3] - each[1]) for each in (boxes, others))
    if of_smaller:
        np.minimum(area[:, None], other_area, out=whole)
    else:
        np.add(area[:, None], other_area, out=whole)
        whole -= shared
    if min(area.min(initial=1), other_area.min(initial=1)) <= 0:
        np.maximum(whole, np.finfo(dtype).tiny, out=whole)
    return np.divide(shared, whole, out=shared)


def _propose(
    variables: conversion.Variables,
    pixels: np.ndarray,
    batches: tuple[int, int],
    options: DetectorOptions,
) -> tuple[_Candidates, np.ndarray]:
    """P-Net's proposals on all levels of a photo, best first, and the level of each."""
    height, width, _ = pixels.shape
    scales = pyramid_scales(height, width, options)
    sizes = level_sizes(height, width, scales)
    pieces, num_tiles = _layout(sizes)
    image = pixels.astype(np.float32)
    levels = [_resize(image, size) for size in sizes]
    del image
    calls = _calls(num_tiles, batches)
    # The call that has a tile, and its number there.
    at = [(call, row) for call, (_, size) in enumerate(calls) for row in range(size)]
    by_call: list[list[_Piece]] = [[] for _ in calls]
    for piece in pieces:
        by_call[at[piece.tile][0]].append(piece)
    called = [
        _pnet(variables, *_tiles(levels, some, *call))
        for some, call in zip(by_call, calls, strict=True)
    ]
    del levels
    # Fetched at the end, so that no call waits for the one before.
    outputs = [tuple(map(np.asarray, leaves)) for leaves in called]
    maps = [
        (np.zeros(shape, np.float32), np.zeros((*shape, 4), np.float32))
        for shape in (tuple(mtcnn.map_size(side) for side in size) for size in sizes)
    ]
    for piece in pieces:
        rows, columns = (mtcnn.map_size(side) for side in piece.size)
        call, row = at[piece.tile]
        from_cells = row, *_cells(piece.place, rows, columns)
        to_cells = _cells(piece.start, rows, columns)
        for whole, part in zip(maps[piece.level], outputs[call], strict=True):
            whole[to_cells] = part[from_cells]
    found = [_of_level(*level, scale, options) for level, scale in zip(maps, scales, strict=True)]
    numbers = np.repeat(np.arange(len(found)), [len(candidates.scores) for candidates in found])
    boxes, scores = (np.concatenate(leaves) for leaves in zip(*found, strict=True))
    ranked, order = _ranked(boxes, scores, options.thresholds[0])
    return ranked, numbers[order]


def _calls(count: int, sizes: tuple[int, int]) -> list[tuple[int, int]]:
    """The calls of a network that take `count` inputs: the first of each, and how many it takes.

    As many as it can take, and what is left few at a time, so that little is filled up.
    """
    few, many = sizes
    calls, start = [], 0
    while start < count:
        calls.append((start, few if count - start <= min(3 * few, many - 1) else many))
        start += calls[-1][1]
    return calls


def _tiles(
    levels: Sequence[np.ndarray], pieces: Sequence[_Piece], first: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` tiles from `first` on with their pieces, and which cells have all their pixels."""
    tiles = np.zeros((count, _TILE_PX, _TILE_PX, 3), np.float32)
    own = np.zeros((count, _TILE_PX - 2, _TILE_PX - 2), bool)
    for piece in pieces:
        (row, column), (rows, columns), (y, x) = piece.start, piece.size, piece.place
        part = levels[piece.level][row : row + rows, column : column + columns]
        tiles[piece.tile - first, y : y + rows, x : x + columns] = part
        own[piece.tile - first, y : y + rows - 2, x : x + columns - 2] = True
    return tiles, own


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A level of the pyramid `[h, w, 3]`, normalized, by averaging areas of a float image.

    Rows by a sparse product, as OpenCV goes through both axes at once and takes twice as long.
    """
    height, width, channels = image.shape
    rows = (_averages(size[0], height) @ image.reshape(height, -1)).reshape(-1, width, channels)
    level = np.asarray(cv2.resize(rows, size[::-1], interpolation=cv2.INTER_AREA))
    level -= 127.5
    level /= 128.0
    return level


@functools.lru_cache(maxsize=512)
def _averages(size: int, count: int) -> sparse.csr_array:
    """The means over `size` equal parts of `count` pixels, a matrix `[size, count]`.

    As OpenCV's INTER_AREA has them: a pixel counts by its share in a part.
    """
    width = count / size
    edges = np.arange(size + 1)[:, None] * width
    taps = math.ceil(width) + 1
    columns = np.floor(edges[:-1]).astype(np.int32) + np.arange(taps, dtype=np.int32)
    shares = np.minimum(columns + 1, edges[1:]) - np.maximum(columns, edges[:-1])
    means = np.where(shares > _LEAST_SHARE, shares / width, 0).astype(np.float32)
    columns = np.minimum(columns, count - 1)  # Beyond the last one shares are zero.
    starts = np.arange(0, size * taps + 1, taps, dtype=np.int32)
    return sparse.csr_array((means.ravel(), columns.ravel(), starts), shape=(size, count))


def _of_level(
    scores: np.ndarray, regression: np.ndarray, scale: float, options: DetectorOptions
) -> _Candidates:
    """The cells `[h, w]` of a level above the threshold, as boxes in pixels of the photo."""
    cells = np.argwhere(scores > options.thresholds[0])
    # A cell covers [2 i + 1, 2 i + 12]; the regression is (x0, y0, x1, y1) in units of that side.
    corners = np.concatenate([cells * _STRIDE + 1, cells * _STRIDE + _CELL], axis=1)
    found = regression[*cells.T]
    boxes = (corners + found[:, [1, 0, 3, 2]] * (_CELL - 1)) / scale
    return _Candidates(boxes.astype(np.float32), scores[*cells.T])


def _cells(start: tuple[int, int], rows: int, columns: int) -> tuple[slice, slice]:
    """The cells of a piece that begins at a pixel."""
    row, column = (pixel // _STRIDE for pixel in start)
    return slice(row, row + rows), slice(column, column + columns)


@functools.lru_cache(maxsize=256)
def _layout(sizes: tuple[tuple[int, int], ...]) -> tuple[tuple[_Piece, ...], int]:
    """Cuts levels into pieces and packs them into tiles, the tall ones first, shelf by shelf.

    Neighbors overlap, so that every cell of a level lies in one piece whole. Places are even, so
    that cells of a piece are cells of the tile.

    Args:
        sizes: rows and columns of each level.

    Returns:
        The pieces in the order of their levels, and the number of tiles.
    """
    step = _TILE_CELLS * _STRIDE
    parts = []
    for level, (height, width) in enumerate(sizes):
        starts = [range(0, max(side - (_CELL - 2), 1), step) for side in (height, width)]
        for row, column in itertools.product(*starts):
            size = min(_TILE_PX, height - row), min(_TILE_PX, width - column)
            if min(size) >= _CELL - 1:
                parts.append((level, (row, column), size))
    parts.sort(key=lambda part: part[2], reverse=True)
    shelves: list[list[int]] = []  # Tile, first row, rows, first free column.
    used: list[int] = []  # Rows of each tile that shelves have taken.
    pieces = []
    for level, start, size in parts:
        rows, columns = (side + side % 2 for side in size)
        for shelf in shelves:
            if rows <= shelf[2] and shelf[3] + columns <= _TILE_PX:
                break
        else:
            tile = next((i for i, taken in enumerate(used) if taken + rows <= _TILE_PX), len(used))
            if tile == len(used):
                used.append(0)
            shelf = [tile, used[tile], rows, 0]
            shelves.append(shelf)
            used[tile] += rows
        pieces.append(_Piece(level, start, size, shelf[0], (shelf[1], shelf[3])))
        shelf[3] += columns
    return tuple(sorted(pieces)), len(used)


_pnet = jax.jit(mtcnn.propose)


@jax.jit
def _rnet(variables: conversion.Variables, corners: _Corners) -> parallel.PyTree:
    return mtcnn.RNet().apply(variables, _interpolated(corners))


@jax.jit
def _onet(variables: conversion.Variables, corners: _Corners) -> parallel.PyTree:
    return mtcnn.ONet().apply(variables, _interpolated(corners))


def _in_batches(
    net_fn: Callable[..., Any],
    variables: conversion.Variables,
    packed: np.ndarray,
    boxes: np.ndarray,
    *,
    side: int,
    batches: tuple[int, int],
) -> tuple[np.ndarray, ...]:
    """What a network makes of the crops of any number of boxes, so many at a time."""
    outputs = []
    for start, size in _calls(max(len(boxes), 1), batches):
        some = boxes[start : start + size]
        some = np.concatenate([some, np.zeros((size - len(some), 4), boxes.dtype)])
        outputs.append(net_fn(variables, _corners(packed, some, side)))
    return tuple(
        np.concatenate([np.asarray(leaf) for leaf in leaves])[: len(boxes)]
        for leaves in zip(*outputs, strict=True)
    )


def _ranked(
    boxes: np.ndarray, scores: np.ndarray, threshold: float
) -> tuple[_Candidates, np.ndarray]:
    """The boxes whose score is above the threshold, best first, and their index."""
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > threshold]
    return _Candidates(boxes[order], scores[order]), order


def _survivors(
    boxes: np.ndarray, limit: float, *, groups: np.ndarray | None = None, of_smaller: bool = False
) -> np.ndarray:
    """Index of the boxes that overlap no better one (of their group) by more than `limit`.

    As in the PyPI package, a box that is itself dropped still suppresses. Boxes come best first.
    """
    groups = np.zeros(len(boxes), int) if groups is None else groups
    kept = np.ones(len(boxes), bool)
    for group in np.unique(groups):
        index = np.flatnonzero(groups == group)
        step = max(1, _OVERLAPS_AT_ONCE // max(len(index), 1))
        for start in range(0, len(index), step):
            some = index[start : start + step]
            better = index[: start + len(some)]
            hit = overlap(boxes[some], boxes[better], of_smaller=of_smaller) > limit
            hit &= better[None] < some[:, None]
            kept[some] = ~hit.any(axis=1)
    return np.flatnonzero(kept)


def _take(candidates: _Candidates, index: np.ndarray) -> _Candidates:
    return _Candidates(*(field[index] for field in candidates))


def _square(boxes: np.ndarray) -> np.ndarray:
    """Boxes widened to squares about their centers."""
    low, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    side = np.max(sides, axis=1, keepdims=True, initial=0)
    low = low + (sides - side) / 2
    return np.concatenate([low, low + side], axis=1)


def _move(boxes: np.ndarray, regression: np.ndarray) -> np.ndarray:
    """Adds a network's regression (x0, y0, x1, y1, in box sides plus one pixel) to boxes."""
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    return boxes + regression[:, [1, 0, 3, 2]] * np.tile(sides, (1, 2))


def _packed(pixels: np.ndarray) -> np.ndarray:
    """A photo `[H, W]` whose pixels are one number of 32 bits: fetched faster than three of 8."""
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA).view(np.uint32)[..., 0]


def _corners(packed: np.ndarray, boxes: np.ndarray, side: int) -> _Corners:
    """What crops `[K, side, side, 3]` of boxes `[K, 4]` are made of, by `_interpolated`."""
    size = np.array(packed.shape, np.float32)
    steps = np.arange(side, dtype=np.float32) / (side - 1)
    low, high = (corner * ((size - 1) / size) for corner in (boxes[:, :2], boxes[:, 2:]))
    at = low[:, :, None] + (high - low)[:, :, None] * steps  # [K, 2, side]
    limit = size.astype(int)[:, None] - 1
    first = np.clip(np.floor(at).astype(int), 0, limit)
    index = (first[:, 0] * packed.shape[1])[:, :, None] + first[:, 1, None]
    flat, pixels = packed.ravel(), np.empty((4, *index.shape), np.uint32)
    # On the last row or column the part of the next is 0, whatever is there. Of mode "raise", NumPy
    # would fill another array first.
    for place, ahead in enumerate((0, 1, packed.shape[1], packed.shape[1] + 1)):
        flat[min(ahead, flat.size - 1) :].take(index, out=pixels[place], mode="clip")
    return _Corners(pixels, (at - first).astype(np.float32), (at >= 0) & (at <= limit))


def _interpolated(corners: _Corners) -> jax.Array:
    """Crops `[K, S, S, 3]`, normalized, as TensorFlow's `crop_and_resize` makes them.

    Bilinear, with the corners of a box in the middles of the outer pixels; gray (0) outside of the
    photo.
    """

    def planes(pixels: jax.Array, parts: jax.Array, inside: jax.Array) -> jax.Array:
        down, right = parts[:, 0, :, None], parts[:, 1, None]
        is_own = inside[:, 0, :, None] & inside[:, 1, None]
        found = []
        for shift in range(0, 24, 8):  # The lowest byte is red.
            upper, upper_right, lower, lower_right = (pixels >> shift & 255).astype(jnp.float32)
            upper, lower = (
                upper + (upper_right - upper) * right,
                lower + (lower_right - lower) * right,
            )
            color = mtcnn.normalize(upper + (lower - upper) * down)
            found.append(jnp.where(is_own, color, 0.0))
        return jnp.stack(found)

    return backend.apart(planes, *map(jnp.asarray, corners)).transpose(1, 2, 3, 0)


def _nothing() -> Stages:
    faces = no_faces()
    return Stages(faces.boxes, faces.boxes, faces)
