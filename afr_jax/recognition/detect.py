"""Stage 2a of face recognition: MTCNN, from a photo to face boxes, confidences and five landmarks.

The cascade follows the PyPI `mtcnn` 1.0 package (same levels, thresholds and suppression), so that
its results agree face by face; unlike it, photos are padded to few bucket shapes, so a folder of
many sizes shares its compiled programs, and the stages behind P-Net are one program that loops over
as many candidates as there are.

Boxes are `[y0, x0, y1, x1]` in pixels, landmarks `[5, 2]` as (y, x): eye, eye, nose, mouth corner,
mouth corner, the person's right (the picture's left) first.
"""

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import images, parallel
from afr_jax.core import options as options_lib
from afr_jax.data import photos as data_photos
from afr_jax.models import mtcnn

# Photo sides are padded to these; beyond the last, to its multiples.
_SIDE_BUCKETS = (160, 256, 320, 384, 448, 512, 576, 640, 800, 1024, 1280, 1536, 2048)
# Numbers of P-Net's proposals are padded to these; beyond the last, to its multiples.
_PROPOSAL_BUCKETS = (256, 1024, 2048, 4096)
# Candidates that one step of a stage takes: a stage loops over the real ones, so that no shape
# depends on their number and no time goes into empty places.
_CELL, _STRIDE = 12, 2
MIN_FACE_HELP = "side of the smallest face looked for, pixels"
_REFINE_CHUNK, _OUTPUT_CHUNK, _SUPPRESS_CHUNK = 64, 16, 64


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


class _Candidates(NamedTuple):
    """A fixed number of boxes `[K, 4]`, falling scores `[K]`, and `[K]` bool: which are real."""

    boxes: jax.Array
    scores: jax.Array
    mask: jax.Array


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
        and may reach out of the photo.
    """
    chex.assert_rank(pixels, 3)
    chex.assert_type(pixels, np.uint8)
    height, width = pixels.shape[:2]
    scales = pyramid_scales(height, width, options)
    if not scales:
        return _nothing()
    bucket = images.bucket_size(height, _SIDE_BUCKETS), images.bucket_size(width, _SIDE_BUCKETS)
    size = jnp.array([height, width], jnp.int32)
    canvas = jnp.asarray(images.pad_to(pixels, bucket))
    bucket_scales = pyramid_scales(*bucket, options)
    # Levels that only the bucket is large enough for have size 0 and propose nothing.
    sizes = level_sizes(height, width, scales) + ((0, 0),) * (len(bucket_scales) - len(scales))
    image, maps = _propose(
        variables.pnet, canvas, size, jnp.array(sizes, jnp.int32), bucket_scales, options
    )
    if not (num := int(maps.count)):
        return _nothing()
    num = images.bucket_size(num, _PROPOSAL_BUCKETS)
    proposed, refined, candidates, landmarks = jax.device_get(
        _cascade(variables.rnet, variables.onet, image, size, maps, num, options)
    )
    kept = candidates.mask
    faces = Faces(candidates.boxes[kept], candidates.scores[kept], landmarks[kept])
    return Stages(proposed.boxes[proposed.mask], refined.boxes[refined.mask], faces)


def detect_photos(
    variables: mtcnn.Variables,
    photos: Sequence[data_photos.PhotoLike],
    *,
    options: DetectorOptions = DetectorOptions(),
) -> list[Faces]:
    """Finds the faces of some photos, two photos at a time: one alone does not fill the machine.

    Args:
        variables: of the three networks.
        photos: as `detect_faces` takes them, of any sizes.
        options: settings of the cascade.

    Returns:
        The faces of each photo, equal to those of `detect_faces`.
    """
    return parallel.thread_map(
        lambda photo: detect_faces(variables, photo, options=options), photos
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


def no_faces() -> Faces:
    """What a photo without faces gives: empty arrays."""
    return Faces(
        np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros((0, 5, 2), np.float32)
    )


@typing.overload
def overlap(boxes: np.ndarray, others: np.ndarray, *, of_smaller: bool = ...) -> np.ndarray: ...


@typing.overload
def overlap(boxes: jax.Array, others: jax.Array, *, of_smaller: bool = ...) -> jax.Array: ...


def overlap(
    boxes: np.ndarray | jax.Array, others: np.ndarray | jax.Array, *, of_smaller: bool = False
) -> np.ndarray | jax.Array:
    """Intersection over union of every pair of boxes (or over the smaller area).

    Args:
        boxes: `[N, 4]` (y0, x0, y1, x1).
        others: `[M, 4]`.
        of_smaller: divide by the smaller of the two areas instead of the union.

    Returns:
        `[N, M]` in [0, 1]; 0 where both areas vanish. Also takes and returns NumPy arrays.
    """
    xp = np if isinstance(boxes, np.ndarray) else jnp
    low = xp.maximum(boxes[:, None, :2], others[None, :, :2])
    high = xp.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = xp.prod(xp.maximum(high - low, 0.0), axis=-1)
    area, other_area = (xp.prod(b[:, 2:] - b[:, :2], axis=-1) for b in (boxes, others))
    if of_smaller:
        whole = xp.minimum(area[:, None], other_area[None, :])
    else:
        whole = area[:, None] + other_area[None, :] - shared
    return xp.where(whole > 0, shared / xp.where(whole > 0, whole, 1.0), 0.0)


class _Maps(NamedTuple):
    """P-Net's output over all levels, one entry a cell, and how many scores pass the threshold.

    scores `[P]` (0 outside the photo), boxes `[P, 4]`, levels `[P]`, count a scalar.
    """

    scores: jax.Array
    boxes: jax.Array
    levels: jax.Array
    count: jax.Array


@functools.partial(jax.jit, static_argnames=("scales", "options"))
def _propose(params, canvas, size, sizes, scales, options):
    """Normalized float image `[H, W, 3]` and P-Net's proposals on all levels."""
    height, width, _ = canvas.shape
    image = mtcnn.normalize(canvas.astype(jnp.float32))
    shapes = level_sizes(height, width, scales)
    scores, boxes, levels = [], [], []
    for index, (shape, scale) in enumerate(zip(shapes, scales, strict=True)):
        level = images.resize_area(image, shape, in_size=size, out_size=sizes[index])
        score, box = _level_proposals(params, level, sizes[index], scale)
        scores.append(score)
        boxes.append(box)
        levels.append(jnp.full(score.shape, index, jnp.int32))
    scores = jnp.concatenate(scores)
    count = jnp.sum(scores > options.thresholds[0])
    return image, _Maps(scores, jnp.concatenate(boxes), jnp.concatenate(levels), count)


def _level_proposals(params, level, size, scale):
    """Scores `[P]` and boxes `[P, 4]` (photo pixels) of all cells of one level `[h, w, 3]`."""
    found: Any = mtcnn.PNet().apply(params, level[None], size[None])
    scores, regression = found[0][0], found[1][0]
    rows, columns = scores.shape
    cells = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij"), -1)
    inside = jnp.all(cells < jnp.asarray(mtcnn.map_size(size))[None, None], axis=-1)
    # A cell covers [2 i + 1, 2 i + 12]; the regression is (x0, y0, x1, y1) in units of that side.
    low, high = cells * _STRIDE + 1.0, cells * _STRIDE + float(_CELL)
    side = _CELL - 1.0
    corners = jnp.concatenate([low, high], -1) + regression[..., jnp.array([1, 0, 3, 2])] * side
    return jnp.where(inside, scores, 0.0).ravel(), (corners / scale).reshape(-1, 4)


@functools.partial(jax.jit, static_argnames=("num", "options"))
def _cascade(rnet, onet, image, size, maps, num, options):
    """Suppression of proposals, R-Net and O-Net: what each leaves, and landmarks `[K, 5, 2]`."""
    num = min(num, maps.scores.size)
    scores, index = jax.lax.top_k(maps.scores, num)
    boxes, levels = maps.boxes[index], maps.levels[index]
    found = _Candidates(boxes, scores, scores > options.thresholds[0])
    found = found._replace(mask=_suppress(found, options.overlaps[0], groups=levels))
    found = _sorted(found)
    found = found._replace(mask=_suppress(found, options.overlaps[1]))
    found = proposed = _sorted(found._replace(boxes=_square(found.boxes)))

    def refine(boxes):
        return mtcnn.RNet().apply(rnet, _crops(image, size, boxes, 24))

    scores, regression = _in_chunks(refine, found, _REFINE_CHUNK)
    mask = found.mask & (scores > options.thresholds[1])
    found = _sorted(_Candidates(_move(found.boxes, regression), scores, mask))
    found = found._replace(mask=_suppress(found, options.overlaps[2]))
    found = refined = _sorted(found._replace(boxes=_square(found.boxes)))

    def output(boxes):
        return mtcnn.ONet().apply(onet, _crops(image, size, boxes, 48))

    scores, regression, points = _in_chunks(output, found, _OUTPUT_CHUNK)
    mask = found.mask & (scores > options.thresholds[2])
    low = found.boxes[:, None, :2]
    sides = found.boxes[:, None, 2:] - low + 1
    landmarks = points.reshape(-1, 2, 5).transpose(0, 2, 1)[..., ::-1] * sides + low - 1
    moved = _Candidates(_move(found.boxes, regression), scores, mask)
    order = _order(moved)
    found = _take(moved, order)
    found = found._replace(mask=_suppress(found, options.overlaps[3], of_smaller=True))
    limit = jnp.concatenate([size, size])[None] - 1.0
    final = found._replace(boxes=jnp.clip(found.boxes, 0.0, limit))
    return proposed, refined, final, landmarks[order]


def _in_chunks(net_fn, candidates, size):
    """A network on the real candidates (in front), `size` at a time; zeros for the others."""
    count = candidates.scores.size
    size = min(size, count)
    num_chunks = (jnp.sum(candidates.mask) + size - 1) // size

    def one(number, outputs):
        start = jnp.minimum(number * size, count - size)
        chunk = net_fn(jax.lax.dynamic_slice_in_dim(candidates.boxes, start, size))
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0),
            outputs,
            chunk,
        )

    shapes = jax.eval_shape(net_fn, candidates.boxes)
    outputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.fori_loop(0, num_chunks, one, outputs)


def _suppress(candidates, limit, *, groups=None, of_smaller=False):
    """Mask `[K]` without those that overlap a better candidate (of its group) by more than `limit`.

    As in the PyPI package, a candidate that is itself dropped still suppresses: a product of masks,
    no sequence. Candidates come in falling order of their scores; work ends with the last real one.
    """
    count = candidates.scores.size
    size = min(_SUPPRESS_CHUNK, count)
    index = jnp.arange(count)
    last = jnp.max(jnp.where(candidates.mask, index + 1, 0))
    groups = jnp.zeros_like(index) if groups is None else groups

    def one(number, kept):
        start = jnp.minimum(number * size, count - size)

        def cut(x):
            return jax.lax.dynamic_slice_in_dim(x, start, size)

        hit = overlap(cut(candidates.boxes), candidates.boxes, of_smaller=of_smaller) > limit
        better = index[None] < cut(index)[:, None]
        hit &= candidates.mask[None] & better & (groups[None] == cut(groups)[:, None])
        alive = cut(candidates.mask) & ~jnp.any(hit, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(kept, alive, start, 0)

    return jax.lax.fori_loop(0, (last + size - 1) // size, one, jnp.zeros(count, bool))


def _order(candidates):
    """Real candidates first, by falling score."""
    return jnp.argsort(jnp.where(candidates.mask, -candidates.scores, jnp.inf), stable=True)


def _take(candidates, index):
    return _Candidates(*(field[index] for field in candidates))


def _sorted(candidates):
    return _take(candidates, _order(candidates))


def _square(boxes):
    """Boxes widened to squares about their centers."""
    low, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    side = jnp.max(sides, axis=1, keepdims=True)
    low = low + (sides - side) / 2
    return jnp.concatenate([low, low + side], axis=1)


def _move(boxes, regression):
    """Adds a network's regression (x0, y0, x1, y1, in box sides plus one pixel) to boxes."""
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    return boxes + regression[:, jnp.array([1, 0, 3, 2])] * jnp.tile(sides, (1, 2))


@functools.partial(jax.jit, static_argnames="side")
def _crops(image, size, boxes, side):
    """Crops `[K, side, side, 3]` as TensorFlow's `crop_and_resize`, gray (0) outside the photo."""
    steps = jnp.arange(side, dtype=jnp.float32) / (side - 1)
    shrink = ((size - 1.0) / size)[None]
    low, high = boxes[:, :2] * shrink, boxes[:, 2:] * shrink
    grid = low[:, :, None] + (high - low)[:, :, None] * steps[None, None]
    return images.bilinear_crops(image, grid[:, 0], grid[:, 1], size)


def _nothing() -> Stages:
    faces = no_faces()
    return Stages(faces.boxes, faces.boxes, faces)
