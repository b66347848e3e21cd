"""How photos are protected in the cells of an evaluation: noise, our cloaks, PyPI `fawkes`.

All of them change the main face of a photo within one DSSIM budget, measured on the 8-bit photo as
`photo_cloaks.face_dssim` does.
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.evaluation import reference
from afr_jax.methods.cloaking import face_cloaks, fawkes, lowkey, photo_cloaks
from afr_jax.models.extractors import registry
from afr_jax.recognition import align, chips, pipeline

# The cloaks that are made here, and the options of each.
CLOAKS = {"fawkes": fawkes.FawkesConfig, "lowkey": lowkey.LowKeyConfig}
METHODS = ("none", "noise", *CLOAKS, "fawkes_pypi")
# Halvings of the interval that a change's scale lies in, when it is fitted to its budget.
_ROUNDS = 14
# Standard deviation of noise before it is fitted, in gray levels.
_NOISE_LEVELS = 8.0
# Regions are warped at sides that are multiples of this, to share compiled programs.
_SIDE_STEP = 64
# The detector's box grows by this share of its sides, as for cloaks.
_MARGIN = 0.05
# The learning rate of the package's low mode, as in the benchmark.
_PEER_BATCH, _PEER_LEARNING_RATE = 4, 25.0

Protected = list[tuple[np.ndarray, list[photo_cloaks.CloakedFace]]]
ProtectFn = Callable[[Sequence[photo_cloaks.PhotoFaces]], Protected]


class Cell(NamedTuple):
    """One way to protect photos.

    Attributes:
        method: of `METHODS`.
        surrogates: names of the extractors that it works against; empty for none and noise.
        budget: DSSIM of a face; None for none.
    """

    method: str
    surrogates: tuple[str, ...] = ()
    budget: float | None = None

    @property
    def name(self) -> str:
        """Unique among cells, usable as a file name."""
        parts = [self.method]
        if self.surrogates:
            parts.append("+".join(file_name(name) for name in self.surrogates))
        if self.budget is not None:
            parts.append(f"{self.budget:g}")
        return "-".join(parts)


def file_name(extractor: str) -> str:
    """An extractor's name, or the last part of its folder, for the names of files."""
    return pathlib.PurePath(extractor).name


def cloak_config(method: str, budget: float, *, num_steps: int | None) -> face_cloaks.CloakConfig:
    """The options of a cloak.

    Args:
        method: of `CLOAKS`.
        budget: DSSIM of a face.
        num_steps: None for the method's own number.
    """
    steps = {} if num_steps is None else {"num_steps": num_steps}
    return CLOAKS[method](dssim_budget=budget, **steps)


def cloak_options() -> dict[str, dict[str, Any]]:
    """The options that a cloak has by itself, but for the budget, by method."""
    found = {}
    for name in CLOAKS:
        found[name] = dataclasses.asdict(cloak_config(name, 1.0, num_steps=None))
        del found[name]["dssim_budget"]
    return found


def protect_fn(
    cell: Cell,
    recognizer: pipeline.Recognizer,
    *,
    covered: Sequence[registry.Extractor],
    package: reference.Peer | None,
    folder: pathlib.Path,
    num_steps: int | None,
    seed: int,
) -> ProtectFn:
    """How the photos of a cell are protected.

    Args:
        cell: of any method but `none`.
        recognizer: has the cell's surrogates among its extractors.
        covered: extractors whose chips noise covers.
        package: `experiments/reference/fawkes_driver.py`, for `fawkes_pypi`; it takes as many
            steps as our cloak.
        folder: for what is given to the package.
        num_steps: of a cloak, None for the method's own number.
        seed: of all randomness.

    Returns:
        A function of photos with their faces to what `photo_cloaks.cloak_photos` returns.
    """
    extractors = tuple(recognizer.extractors[name] for name in cell.surrogates)
    variables = tuple(recognizer.variables[name] for name in cell.surrogates)

    def protect(faces: Sequence[photo_cloaks.PhotoFaces]) -> Protected:
        if cell.method == "noise":
            return [add_noise(face, covered, cell.budget, seed=seed) for face in faces]
        if cell.method == "fawkes_pypi":
            steps = cloak_config("fawkes", cell.budget, num_steps=num_steps).num_steps
            return cloak_by_package(
                package, folder, faces, extractors[0], cell.budget, num_steps=steps, seed=seed
            )
        return photo_cloaks.cloak_photos(
            jax.random.key(seed),
            photo_cloaks.Surrogates(extractors, variables),
            faces,
            config=cloak_config(cell.method, cell.budget, num_steps=num_steps),
        )

    return protect


def add_noise(
    photo: photo_cloaks.PhotoFaces,
    extractors: Sequence[registry.Extractor],
    budget: float,
    *,
    seed: int = 0,
) -> tuple[np.ndarray, list[photo_cloaks.CloakedFace]]:
    """Gaussian noise of every pixel's channels, as much as the DSSIM budget allows.

    Args:
        photo: with its faces.
        extractors: whose chips the noise covers.
        budget: DSSIM of a face.
        seed: of the noise, with the photo's name.

    Returns:
        As `photo_cloaks.cloak_photos` for one photo.
    """
    generator = np.random.default_rng([seed, zlib.crc32(photo.name.encode())])

    def change(region, landmarks):
        return generator.normal(0.0, _NOISE_LEVELS, (*(region[2:] - region[:2]), 3))

    return _change_faces(photo, extractors, budget, change)


def cloak_by_package(
    package: reference.Peer,
    folder: pathlib.Path,
    faces: Sequence[photo_cloaks.PhotoFaces],
    extractor: registry.Extractor,
    budget: float,
    *,
    num_steps: int,
    seed: int = 0,
) -> Protected:
    """Cloaks by PyPI `fawkes`: its optimiser on dlib's chips, with dlib's net.

    The package's own extractors cannot be downloaded any more. The change of a chip is brought back
    to the photo by the inverse warp, and fitted to the budget there, as ours is.

    Args:
        package: `experiments/reference/fawkes_driver.py`.
        folder: where chips are put for the package.
        faces: photos with their faces.
        extractor: dlib's.
        budget: DSSIM, of the package's chips and of the photo's faces.
        num_steps: of the package's optimiser.
        seed: of its start.

    Returns:
        As `photo_cloaks.cloak_photos`.
    """
    cut = [
        chips.extractor_chip(extractor, photo.pixels, landmarks)
        for photo in faces
        for landmarks in photo.faces.landmarks
    ]
    # The package's compiled net has one batch size.
    cut = np.stack(cut + cut[-1:] * (-len(cut) % _PEER_BATCH))
    source, output = folder / "chips.npy", folder / "cloaked.npy"
    np.save(source, cut)
    package.call(
        "cloak",
        chips=str(source),
        output=str(output),
        dssim=budget,
        steps=num_steps,
        batch=_PEER_BATCH,
        learning_rate=_PEER_LEARNING_RATE,
        graph_mode=True,
        seed=seed,
    )
    changes = iter(np.load(output).astype(np.float32) - cut)

    def change(region, landmarks):
        return _unwarped(next(changes), extractor, region, landmarks)

    return [_change_faces(photo, (extractor,), budget, change) for photo in faces]


def _change_faces(photo, extractors, budget, change_fn):
    """Adds a change to each face, the largest multiple of it that meets the budget."""
    final, faces = photo.pixels, []
    for box, landmarks in zip(photo.faces.boxes, photo.faces.landmarks, strict=True):
        region = _region(extractors, box, landmarks, photo.pixels.shape)
        inner = np.concatenate(align.integer_bounds(box, photo.pixels.shape))
        final, dssim = _fitted(
            final, photo.pixels, region, inner, change_fn(region, landmarks), budget, photo
        )
        faces.append(photo_cloaks.CloakedFace(region, inner, {}, dssim))
    return final, faces


def _region(extractors, box, landmarks, shape) -> np.ndarray:
    """The piece `[4]` int of a photo that the box and all chips lie in, as for cloaks."""
    grown = box + np.tile(box[2:] - box[:2], 2) * np.array([-1, -1, 1, 1]) * _MARGIN
    bounds = [grown]
    for extractor in extractors:
        transform = align.chip_transform(extractor, landmarks)
        bounds.append(align.chip_bounds(transform, extractor.input_px))
    bounds = np.array(bounds)
    whole = np.concatenate([bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)])
    return np.concatenate(align.integer_bounds(whole, shape))


def _unwarped(change, extractor, region, landmarks) -> np.ndarray:
    """A chip's change `[S, S, 3]` on the pixels `[h, w, 3]` of a region, zero outside the chip."""
    transform = align.chip_transform(extractor, landmarks)
    inverse = np.linalg.inv(transform[:, :2])
    shift = inverse @ (region[:2] - transform[:, 2])
    back = np.concatenate([inverse, shift[:, None]], axis=1)
    height, width = region[2:] - region[:2]
    pool = align.pool_factor(align.transform_scale(back))
    side = -(-int(max(height, width)) // _SIDE_STEP) * _SIDE_STEP
    whole = _warp(jnp.asarray(change), jnp.asarray(back), size=side, pool=pool)
    return np.asarray(whole)[:height, :width]


_warp = jax.jit(align.warp, static_argnames=("size", "pool"))


def _fitted(base, original, region, box, change, budget, photo):
    """`base` with a multiple of a change in a region, and the DSSIM of its 8-bit pixels."""
    y0, x0, y1, x1 = region
    if photo.gray:
        change = change.mean(axis=-1, keepdims=True)
    if photo.visible is not None:
        change = change * photo.visible[y0:y1, x0:x1, None]

    def changed(scale):
        final = base.copy()
        piece = np.round(base[y0:y1, x0:x1] + scale * change)
        final[y0:y1, x0:x1] = np.clip(piece, 0, 255).astype(np.uint8)
        return final, photo_cloaks.face_dssim(original, final, region, box)

    # Twice as much at a time until it is too much, then halving.
    low, high = 0.0, 1.0
    while changed(high)[1] <= budget and high < 64:
        low, high = high, 2 * high
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if changed(middle)[1] <= budget else (low, middle)
    return changed(low)
