"""From photos with detected faces to cloaked photos, at the photos' own resolution.

Every face is cut out on a canvas of a bucket size, so faces of many photos share a batch and a
compiled program; its change is brought back to the photo's pixels, rounded to 8 bits, and scaled
until the final pixels meet the budget (`budget`). Nothing outside the face regions
changes.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import cv2
import jax
import numpy as np
from flax.typing import VariableDict

from afr_jax.core import images, parallel, progress
from afr_jax.core.perception import measures, ssim
from afr_jax.data import photos as data_photos
from afr_jax.methods.cloaking import budget, face_cloaks
from afr_jax.models import mtcnn
from afr_jax.models.extractors import registry
from afr_jax.recognition import align, detect, embed, match

# Sides of face canvases. A face region larger than the last one carries its change at a whole
# fraction of its resolution and is enlarged: what extractors see is coarser still.
_CANVAS_SIZES = (160, 224, 320)
# Changes fade in over this share of a region's side, so that no edge shows.
_FADE = 0.06
# The detector's box grows by this share of its sides; the region holds it and every chip, with the
# fade around them.
_MARGIN = 0.05
# Surrogates sample photos that are this much less reduced than trackers here: a tracker's grid of
# averages is shifted, its landmarks may tip the factor, others do not average at all; what is
# blurrier than this sampling is among the random views.
_SHARPER = 0.5


# A face is near to the person below this many times a surrogate's `reach`
# (`experiments/results/fawkes_attempts.md`).
_NEAR = 1.1
# Of the JPEG after which cloaks are judged, too, as services compress what is uploaded.
JPEG_QUALITY = 75
# Where a cloaked face is looked for again: the box with so many of its sides around it; a face from
# this share of it on; and the overlap from which on it is the face.
_AROUND, _SMALLEST_AGAIN, _SAME_FACE = 0.5, 0.4, 0.4
# Faces that are cloaked side by side on a CPU: one alone leaves processors idle between its sums.
_FACES_AT_ONCE = 2
# Rounds of enlarging changes so that their averages come out right (Irani and Peleg 1991).
_BACK_PROJECTIONS = 4
# The share of the limit of color difference that luma alone may take, and the largest change of
# chroma beside the limit of its low-passed mean.
_LUMA_SHARE = 0.9
_CHROMA_PEAK = 1.25


class PhotoFaces(NamedTuple):
    """A photo to cloak.

    Attributes:
        name: identifies the photo; seeds its randomness, so that no other photo influences it.
        pixels: `[H, W, 3]` uint8.
        gray: the change must be equal in all channels.
        visible: `[H, W]` bool, False where the photo is fully transparent and must not change; or
            None.
        faces: to cloak, all others stay as they are.
    """

    name: str
    pixels: np.ndarray
    gray: bool
    visible: np.ndarray | None
    faces: detect.Faces


class CloakedFace(NamedTuple):
    """What was done to one face.

    Attributes:
        region: `[4]` int (y0, x0, y1, x1), all that changed for this face.
        box: `[4]` int, the detector's box within the photo.
        distances: from the clean embedding by surrogate, before the change is rounded to 8 bits and
            fitted to the budget.
        budget: what it was fitted to.
    """

    region: np.ndarray
    box: np.ndarray
    distances: dict[str, float]
    budget: budget.Budget


class _Plan(NamedTuple):
    """A face on its canvas, before it is batched."""

    photo: int
    region: np.ndarray
    box: np.ndarray
    canvas: align.Canvas
    pools: tuple[int, ...]
    face: face_cloaks.Face
    seed: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Surrogates:
    """The extractors that a cloak is made against, with their variables, in one order."""

    extractors: tuple[registry.Extractor, ...]
    variables: tuple[VariableDict, ...]


def is_large_enough(boxes: np.ndarray) -> np.ndarray:
    """Which faces can be cloaked: the longer side of the box has 24 pixels, the shorter one 12.

    DSSIM needs 11 pixels, and no recognizer gets anywhere with a smaller face.

    Args:
        boxes: `[N, 4]`.

    Returns:
        `[N]` bool.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    return (sides.max(axis=1, initial=0) >= 24) & (sides.min(axis=1, initial=np.inf) >= 12)


def cloak_photos(
    key: jax.Array,
    surrogates: Surrogates,
    photos: Sequence[PhotoFaces],
    *,
    config: face_cloaks.CloakMethod,
    targets: Mapping[str, np.ndarray] | None = None,
    detector: mtcnn.Variables | None = None,
    mesh: parallel.Mesh | None = None,
    report_fn: Callable[[int], None] | None = None,
) -> list[tuple[np.ndarray, list[CloakedFace]]]:
    """Cloaks the faces of some photos together.

    Faces of these photos that show the same person are moved away from what they have in common,
    so one call should have all photos of a person, and they influence each other. The budget may
    have relief: faces that a surrogate still places near to the person in the final pixels, or in
    these after JPEG, are cloaked once more within its limits.

    Args:
        key: of the run.
        surrogates: to cloak against.
        photos: with their faces.
        config: of the optimisation.
        targets: target embedding `[D]` by extractor name, the same for all faces; None to repel
            only.
        detector: that finds faces again, as trackers do, where the budget has relief; without it
            they are judged at the landmarks that they had.
        mesh: devices to spread faces over; by default all.
        report_fn: called with numbers of finished face steps, for progress, by any thread.

    Returns:
        For each photo its final pixels `[H, W, 3]` uint8 and what was done to each face, in order.
    """
    plans = [
        _plan(surrogates.extractors, photo, index, number, targets, config)
        for index, photo in enumerate(photos)
        for number in range(len(photo.faces.boxes))
    ]
    mesh = parallel.make_mesh() if mesh is None else mesh
    plans = _introduce(key, surrogates, plans, config, mesh)
    deltas: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    distances: dict[int, dict[str, float]] = {}
    names = [extractor.name for extractor in surrogates.extractors]

    def search(
        numbers: Sequence[int], limits: budget.Budget, report_fn: Callable[[int], None] | None
    ) -> None:
        def cloak(batch: _Batch) -> tuple[np.ndarray, np.ndarray]:
            some = [_within(plans[numbers[i]], limits, config) for i in batch.indices]
            return jax.device_get(
                _cloak_batch(key, surrogates, some, batch.size, config, limits, mesh, report_fn)
            )

        batches = _batches([plans[i] for i in numbers], mesh.size)
        if mesh.size == 1 and jax.default_backend() == "cpu":
            cloaked = parallel.thread_stream(cloak, batches, width=_FACES_AT_ONCE)
        else:
            cloaked = map(cloak, batches)
        for batch, found in zip(batches, cloaked, strict=True):
            indices = [numbers[i] for i in batch.indices]
            for i, delta, reached in zip(indices, *found, strict=False):
                if i in deltas and not delta.any():
                    continue  # Nothing met the wider limits; what met the others is left.
                deltas[i] = _to_photo_size(plans[i], photos[plans[i].photo], delta, config)
                distances[i] = dict(zip(names, map(float, reached), strict=True))

    search(range(len(plans)), config.budget, report_fn)
    budgets = [config.budget] * len(plans)
    own = [[i for i, plan in enumerate(plans) if plan.photo == at] for at in range(len(photos))]

    def fit(index: int) -> np.ndarray:
        return budget.fit_together(
            photos[index].pixels,
            [plans[i].region for i in own[index]],
            [plans[i].box for i in own[index]],
            [deltas[i] for i in own[index]],
            budgets=[budgets[i] for i in own[index]],
        )

    finals = parallel.thread_map(fit, range(len(photos)))
    relief = config.budget.relief
    if relief is not None and plans:
        near = np.flatnonzero(_are_near(surrogates, detector, plans, photos, finals)).tolist()
        if near and report_fn is not None:
            total = len(near) * config.num_steps
            with progress.counter(total, description="face steps, wider limits") as again_fn:
                search(near, relief, again_fn)
        else:
            search(near, relief, None)
        for i in near:
            budgets[i] = relief
        wider = sorted({plans[i].photo for i in near})
        for index, final in zip(wider, parallel.thread_map(fit, wider), strict=True):
            finals[index] = final
    return [
        (
            final,
            [CloakedFace(plans[i].region, plans[i].box, distances[i], budgets[i]) for i in some],
        )
        for final, some in zip(finals, own, strict=True)
    ]


def change_faces(
    photo: PhotoFaces,
    extractors: Sequence[registry.Extractor],
    change_fn: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    limits: budget.Budget,
) -> tuple[np.ndarray, list[CloakedFace]]:
    """Adds a change that is at hand to each face, the largest multiple of it within the budget.

    Args:
        photo: with its faces.
        extractors: whose chips lie in the regions that change.
        change_fn: takes a face's region `[4]` int and landmarks `[5, 2]`, returns its change
            `[h, w, 3]` in gray levels.
        limits: of a face.

    Returns:
        As `cloak_photos` for one photo.
    """
    final, faces = photo.pixels, []
    for number, landmarks in enumerate(photo.faces.landmarks):
        region, inner = face_region(photo, extractors, number)
        change = change_fn(region, landmarks)
        if photo.gray:
            change = change.mean(axis=-1, keepdims=True)
        if photo.visible is not None:
            y0, x0, y1, x1 = region
            change = change * photo.visible[y0:y1, x0:x1, None]
        final = budget.fit_alone(final, photo.pixels, region, inner, change, budget=limits)
        faces.append(CloakedFace(region, inner, {}, limits))
    return final, faces


def face_region(
    photo: PhotoFaces, extractors: Sequence[registry.Extractor], number: int
) -> tuple[np.ndarray, np.ndarray]:
    """The piece of a photo that may change for a face, and the detector's box.

    All methods are limited and measured on it: it is what extractors see of the face and, as a
    cloak fades, a margin as wide as the fade, which so lies outside what is seen.

    Args:
        photo: with its faces.
        extractors: whose chips the piece holds.
        number: of the face.

    Returns:
        Both `[4]` int (y0, x0, y1, x1), within the photo.
    """
    box, landmarks = photo.faces.boxes[number], photo.faces.landmarks[number]
    bounds = [
        align.chip_bounds(align.chip_transform(each, landmarks), each.input_px)
        for each in extractors
    ]
    region = _region(box, bounds, photo.pixels.shape)
    return region, np.concatenate(align.integer_bounds(box, photo.pixels.shape))


def _plan(
    extractors: Sequence[registry.Extractor],
    photo: PhotoFaces,
    index: int,
    number: int,
    targets: Mapping[str, np.ndarray] | None,
    config: face_cloaks.CloakMethod,
) -> _Plan:
    """Region, canvas and arrays of one face."""
    region, box = face_region(photo, extractors, number)
    transforms = [
        align.chip_transform(extractor, photo.faces.landmarks[number]) for extractor in extractors
    ]
    factor = -(-int((region[2:] - region[:2]).max()) // _CANVAS_SIZES[-1])
    # Large faces have the largest canvas, on which SSIMULACRA2 is held.
    sizes = _CANVAS_SIZES if factor == 1 else _CANVAS_SIZES[-1:]
    canvas = align.cut_canvas(photo.pixels, region, factor=factor, bucket_sizes=sizes)
    side = canvas.image.shape[0]
    free = images.pad_to(_limit(photo, number, region, factor), (side, side))
    crops, pools = [], []
    for extractor, transform in zip(extractors, transforms, strict=True):
        moved = align.canvas_transform(transform, canvas)
        pools.append(align.pool_factor(align.transform_scale(moved) - _SHARPER))
        empty = np.zeros(extractor.embedding_size, np.float32)
        target = empty if targets is None else np.asarray(targets[extractor.name], np.float32)
        crops.append(face_cloaks.FaceCrop(moved.astype(np.float32), empty, empty, target))
    inner = np.concatenate([box[:2] - region[:2], box[2:] - region[:2]])
    boxes = np.array([[0, 0, *canvas.size], _canvas_box(inner, factor, canvas.size)], np.int32)
    face = face_cloaks.Face(
        image=canvas.image,
        limit=free * config.linf_limit,
        luma=free,
        chroma=free,
        boxes=boxes,
        crops=tuple(crops),
        has_target=np.asarray(targets is not None, np.float32),
        gray=np.asarray(photo.gray, np.float32),
        is_coarse=np.asarray(factor > 1),
    )
    seed = (zlib.crc32(photo.name.encode("utf-8", "surrogateescape")), number)
    return _Plan(index, region, box, canvas, tuple(pools), face, seed)


def _within(plan: _Plan, limits: budget.Budget, config: face_cloaks.CloakMethod) -> _Plan:
    """A plan whose colors change no further at any pixel than some limits allow."""
    face = plan.face
    luma, chroma = _color_limits(plan.canvas.image, limits, config)
    return plan._replace(face=face._replace(luma=face.luma * luma, chroma=face.chroma * chroma))


class _Batch(NamedTuple):
    """Indices of faces that share a call, and how many faces it takes."""

    indices: list[int]
    size: int


def _batches(plans: Sequence[_Plan], num_devices: int) -> list[_Batch]:
    """Batches of faces of one canvas and one `pools`, in few sizes: each is a program to compile.

    On CPU, where every face costs its full time, each device has one at a time; on accelerators
    batches are full or single.
    """
    full = num_devices
    if jax.default_backend() != "cpu":
        full *= max(64 // num_devices, 1)
    buckets: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for i, plan in enumerate(plans):
        buckets.setdefault((plan.canvas.image.shape[0], plan.pools), []).append(i)
    batches = []
    for indices in buckets.values():
        while indices:
            size = num_devices if len(indices) <= num_devices else full
            batches.append(_Batch(indices[:size], size))
            indices = indices[size:]
    return batches


def _cloak_batch(
    key: jax.Array,
    surrogates: Surrogates,
    plans: list[_Plan],
    size: int,
    config: face_cloaks.CloakMethod,
    limits: budget.Budget,
    mesh: parallel.Mesh,
    report_fn: Callable[[int], None] | None,
) -> tuple[jax.Array, jax.Array]:
    """Changes on the canvases of faces of one bucket, and the distances that they reach."""
    faces, filled, statics = _stack(surrogates, plans, size, mesh)
    return face_cloaks.cloak_faces(
        _keys(key, filled, mesh),
        parallel.replicate(surrogates.variables, mesh),
        faces,
        surrogates=statics,
        config=config,
        limits=limits,
        report_fn=(lambda steps: report_fn(steps * len(plans))) if report_fn else None,
    )


def _stack(
    surrogates: Surrogates, plans: list[_Plan], size: int, mesh: parallel.Mesh
) -> tuple[face_cloaks.Face, list[_Plan], tuple[face_cloaks.Surrogate, ...]]:
    """Faces of one bucket as a batch on the devices, their plans, and the static surrogates."""
    # The last face is repeated to fill the batch.
    filled = [*plans, *[plans[-1]] * (size - len(plans))]
    faces = jax.tree.map(lambda *leaves: np.stack(leaves), *[plan.face for plan in filled])
    statics = tuple(
        face_cloaks.Surrogate(extractor, pool)
        for extractor, pool in zip(surrogates.extractors, plans[0].pools, strict=True)
    )
    return parallel.shard_batch(faces, mesh), filled, statics


def _keys(key: jax.Array, plans: Sequence[_Plan], mesh: parallel.Mesh) -> jax.Array:
    seeds = np.array([plan.seed for plan in plans], np.uint32)
    return parallel.shard_batch(_folded(key, seeds), mesh)


@jax.jit
def _folded(key: jax.Array, seeds: jax.Array) -> jax.Array:
    """The keys `[B]` of faces from their seeds `[B, 2]`."""
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.fold_in(key, seed[0]), seed[1]))(
        seeds
    )


def _introduce(
    key: jax.Array,
    surrogates: Surrogates,
    plans: list[_Plan],
    config: face_cloaks.CloakMethod,
    mesh: parallel.Mesh,
) -> list[_Plan]:
    """Plans whose faces know the person that they belong to.

    Two faces belong together if their distance, in thresholds and averaged over the surrogates, is
    below 1.
    """
    if len(plans) < 2:
        return plans
    variables = parallel.replicate(surrogates.variables, mesh)
    embeddings = [
        np.zeros((len(plans), extractor.embedding_size), np.float32)
        for extractor in surrogates.extractors
    ]
    for batch in _batches(plans, mesh.size):
        some = [plans[i] for i in batch.indices]
        faces, filled, statics = _stack(surrogates, some, batch.size, mesh)
        found = jax.device_get(
            face_cloaks.embed_faces(
                _keys(key, filled, mesh), variables, faces, surrogates=statics, config=config
            )
        )
        for vectors, new in zip(embeddings, found, strict=True):
            vectors[batch.indices] = new[: len(some)]
    apart = np.mean(
        [
            match.pairwise(vectors, vectors, metric="euclidean") / extractor.threshold
            for extractor, vectors in zip(surrogates.extractors, embeddings, strict=True)
        ],
        axis=0,
    )
    share = (apart < 1) / np.sum(apart < 1, axis=1, keepdims=True)
    steps = [(share @ vectors - vectors).astype(np.float32) for vectors in embeddings]
    introduced = []
    for number, plan in enumerate(plans):
        crops = tuple(
            crop._replace(to_person=step[number])
            for crop, step in zip(plan.face.crops, steps, strict=True)
        )
        introduced.append(plan._replace(face=plan.face._replace(crops=crops)))
    return introduced


def _are_near(
    surrogates: Surrogates,
    detector: mtcnn.Variables | None,
    plans: Sequence[_Plan],
    photos: Sequence[PhotoFaces],
    finals: Sequence[np.ndarray],
) -> np.ndarray:
    """Which faces `[len(plans)]` a surrogate still places near to the person.

    In the final photos, or in these after JPEG.
    """
    compressed = parallel.thread_map(
        lambda final: data_photos.through_jpeg(final, quality=JPEG_QUALITY), finals
    )
    known = [photos[plan.photo].faces.landmarks[plan.seed[1]] for plan in plans]
    faces = [
        (photos[plan.photo].pixels, landmarks) for plan, landmarks in zip(plans, known, strict=True)
    ]
    for pixels in (finals, compressed):
        some = [(pixels[plan.photo], plan.box, at) for plan, at in zip(plans, known, strict=True)]
        again = parallel.thread_map(lambda face: _found_again(detector, *face), some)
        faces += [(each, at) for (each, _, _), at in zip(some, again, strict=True)]
    near = np.zeros(len(plans), bool)
    for number, extractor in enumerate(surrogates.extractors):
        vectors = embed.embed_faces(extractor, surrogates.variables[number], faces)
        own, *changed = vectors.reshape(3, len(plans), -1)
        person = own + np.stack([plan.face.crops[number].to_person for plan in plans])
        apart = np.linalg.norm(np.stack(changed) - person[None], axis=-1).min(axis=0)
        near |= apart < _NEAR * extractor.reach
    return near


def _found_again(
    detector: mtcnn.Variables | None, pixels: np.ndarray, box: np.ndarray, landmarks: np.ndarray
) -> np.ndarray:
    """The landmarks `[5, 2]` where a detector finds a face again, or those that it had.

    Args:
        detector: or None.
        pixels: `[H, W, 3]` uint8, of the photo as it is now.
        box: `[4]` int (y0, x0, y1, x1) of the face.
        landmarks: `[5, 2]` that it had.
    """
    if detector is None:
        return landmarks
    y0, x0, y1, x1 = np.concatenate(align.integer_bounds(_grown(box, _AROUND), pixels.shape))
    # The levels that a tracker looks at, without the finest where the face is large.
    settings = detect.DetectorOptions()
    levels = math.log((box[2:] - box[:2]).min() * _SMALLEST_AGAIN / settings.min_face_px)
    skipped = max(math.floor(-levels / math.log(settings.scale_factor)), 0)
    settings = dataclasses.replace(
        settings, min_face_px=settings.min_face_px / settings.scale_factor**skipped
    )
    around = np.ascontiguousarray(pixels[y0:y1, x0:x1])
    found = detect.detect_faces(detector, around, options=settings)
    shift = np.array([y0, x0], np.float32)
    overlaps = detect.overlap(found.boxes + np.tile(shift, 2), box[None].astype(np.float32))[:, 0]
    if overlaps.max(initial=0) < _SAME_FACE:
        return landmarks
    return found.landmarks[int(overlaps.argmax())] + shift


def _limit(photo: PhotoFaces, number: int, region: np.ndarray, factor: int) -> np.ndarray:
    """Share of the largest change that each pixel of a region may take, `[h, w]` in [0, 1].

    Fades to zero towards the region's edges (not towards the photo's own), and is zero where
    another face is nearer, so that the changes of two faces never add up, and where the photo is
    transparent. With a factor, for every block of so many pixels.
    """
    low, high = region[:2], region[2:]
    shape = np.array(photo.pixels.shape[:2])
    grids, ramps = [], []
    for axis in range(2):
        centers = np.arange(low[axis], high[axis], factor) + (factor - 1) / 2
        fade = max(_FADE * (high[axis] - low[axis]), factor)
        before = np.inf if low[axis] == 0 else centers - low[axis] + 0.5
        after = np.inf if high[axis] == shape[axis] else high[axis] - centers - 0.5
        grids.append(centers)
        ramps.append(np.clip(np.minimum(before, after) / fade, 0, 1) * np.ones(len(centers)))
    limit = ramps[0][:, None] * ramps[1][None, :]
    boxes = photo.faces.boxes
    if len(boxes) > 1:
        centers, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).max(1)
        apart = [
            (grids[0][:, None] - center[0]) ** 2 + (grids[1][None, :] - center[1]) ** 2
            for center in centers
        ]
        apart = np.stack(apart) / sides[:, None, None] ** 2
        limit = limit * (np.argmin(apart, axis=0) == number)
    if photo.visible is not None:
        visible = photo.visible[low[0] : high[0], low[1] : high[1]].astype(np.float32)
        extra = [(0, -n % factor) for n in visible.shape]
        blocks = np.pad(visible, extra).reshape(len(grids[0]), factor, len(grids[1]), factor)
        limit = limit * blocks.min(axis=(1, 3))
    return limit.astype(np.float32)


def _color_limits(
    image: np.ndarray, limits: budget.Budget, config: face_cloaks.CloakMethod
) -> tuple[np.ndarray | float, float]:
    """Largest change of luma `[S, S]` and of chroma at the pixels of a canvas, in [0, 1] units."""
    luma, chroma = config.linf_limit, 1.0
    if limits.ciede2000 is not None:
        tolerance = measures.gray_tolerance(np.round(image * 255).astype(np.uint8))
        luma = np.minimum(_LUMA_SHARE * limits.ciede2000 * tolerance / 255, luma)
    if limits.chroma is not None:
        chroma = _CHROMA_PEAK * limits.chroma / 255
    return luma, chroma


def _to_photo_size(
    plan: _Plan, photo: PhotoFaces, delta: np.ndarray, config: face_cloaks.CloakMethod
) -> tuple[np.ndarray, np.ndarray]:
    """A canvas change as one of the region's pixels `[h, w, 3]`, free of a shift; and limits."""
    rows, columns = plan.canvas.size
    delta, factor = delta[:rows, :columns], plan.canvas.factor
    height, width = plan.region[2:] - plan.region[:2]
    limit = _limit(photo, plan.seed[1], plan.region, 1)[..., None] * config.linf_limit
    if factor > 1:
        delta = _enlarged(delta, factor)[:height, :width]
        delta = np.clip(delta, -limit, limit)
    # A faint shift of the whole region would show as a rectangle.
    total = limit.sum()
    if total > 0:
        delta = delta - limit * (delta.sum(axis=(0, 1), keepdims=True) / total)
    return np.clip(delta, -limit, limit), limit


def _enlarged(delta: np.ndarray, factor: int) -> np.ndarray:
    """A change `[h, w, 3]` at `factor` times its size: smooth, with the averages that it had.

    Bicubic enlargement alone blurs, and extractors would see less of a change than the search did.
    """
    rows, columns, _ = delta.shape
    large, left = np.zeros((rows * factor, columns * factor, 3), np.float32), delta
    for _ in range(_BACK_PROJECTIONS):
        large += cv2.resize(left, large.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        left = delta - large.reshape(rows, factor, columns, factor, 3).mean(axis=(1, 3))
    return large


def _region(box: np.ndarray, chip_bounds: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """The piece `[4]` int of a photo that holds a face's box and chips, and the fade."""
    bounds = np.array([_grown(box, _MARGIN), *chip_bounds])
    seen = np.concatenate([bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)])
    return np.concatenate(align.integer_bounds(_grown(seen, _FADE / (1 - 2 * _FADE)), shape))


def _grown(box: np.ndarray, margin: float) -> np.ndarray:
    """A box with a margin on all sides, as a share of its sides."""
    sides = np.tile(box[2:] - box[:2], 2)
    return box + sides * np.array([-1, -1, 1, 1]) * margin


def _canvas_box(box: np.ndarray, factor: int, size: tuple[int, int]) -> np.ndarray:
    """A box of the region on the canvas, rounded outwards, at least a window wide where it fits."""
    low, high = box[:2] // factor, -(-box[2:] // factor)
    whole = np.array(size)
    low = np.maximum(np.minimum(low, high - ssim.WINDOW), 0)
    return np.concatenate([low, np.minimum(np.maximum(high, low + ssim.WINDOW), whole)])
