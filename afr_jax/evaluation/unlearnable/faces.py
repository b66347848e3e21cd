"""Data of the face study: who is protected, what a victim trains on, faces of verification pairs.

Huang et al. 2021, section 4.3: class-wise noise is found on the photos of the people to protect and
of auxiliary people who are not in the victim's data; the victim trains on protected and clean
people, and is judged on clean photos that it has not seen. Host code, but for the embeddings.
"""

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from PIL import Image

from afr_jax.core import files, parallel, workdir
from afr_jax.core import images as image_ops
from afr_jax.data import identities, image_sets, pairs, photo_files, photos
from afr_jax.evaluation.metrics import verification
from afr_jax.models import mtcnn
from afr_jax.models.weights import conversion
from afr_jax.recognition import align, detect
from afr_jax.training import trainer

# Five points (y, x) of ArcFace's crops of 112 px, as insightface publishes them; eyes, nose, mouth.
_TEMPLATE = np.array(
    [
        (51.6963, 38.2946),
        (51.5014, 73.5318),
        (71.7366, 56.0252),
        (92.3655, 41.5493),
        (92.2041, 70.7299),
    ]
)
_TEMPLATE_PX = 112
# Of a photo's shorter side: in LFW's 250 px the template covers about 134 px, 8 px over the middle.
_CENTER_SHARE = 134 / 250
_CENTER_RISE = 8 / 250


class Division(NamedTuple):
    """Who is who, and which photos are for what.

    Attributes:
        auxiliary: names, used for the noise alone.
        protected: names that get noise where only a part is protected.
        clean: names of the victim's other people.
        search: photos of auxiliary and victim's people that noise is found with.
        training: photos of the victim's people, clean.
        held_out: other photos of them, clean.
    """

    auxiliary: tuple[str, ...]
    protected: tuple[str, ...]
    clean: tuple[str, ...]
    search: image_sets.ImageSet
    training: image_sets.ImageSet
    held_out: image_sets.ImageSet


class StrangerPairs(NamedTuple):
    """Verification pairs of strangers.

    Attributes:
        crops: `[M, S, S, 3]` uint8, a face of each photo.
        rows: `[P, 2]`, the photos of each pair.
        same: `[P]` bool, whether they are of one person.
        without_face: photos in which no face was found, and which were cut from the middle.
        problems: photos that cannot be read; their pairs are left out.
    """

    crops: np.ndarray
    rows: np.ndarray
    same: np.ndarray
    without_face: int
    problems: tuple[identities.Omission, ...]

    def scores(self, vectors: np.ndarray) -> "StrangerScores":
        """How well vectors `[M, D]` of the photos, of unit length, tell the pairs apart."""
        distances = np.linalg.norm(vectors[self.rows[:, 0]] - vectors[self.rows[:, 1]], axis=1)
        curve = verification.roc(distances, self.same)
        # A hundred points draw the curve as well as thousands.
        grid = np.linspace(0, 1, 101)
        return StrangerScores(
            auc=verification.auc(curve),
            eer=verification.equal_error_rate(curve),
            pair_accuracy=float(verification.fold_accuracies(distances, self.same).mean()),
            roc={"far": grid, "tar": np.array([verification.tar_at_far(curve, f) for f in grid])},
        )


class StrangerScores(NamedTuple):
    """Verification of strangers by some features.

    Attributes:
        auc: area under the ROC curve.
        eer: equal error rate.
        pair_accuracy: 10-fold, at the best threshold of the other folds.
        roc: "far" and "tar" `[101]`, false and true acceptance rates.
    """

    auc: float
    eer: float
    pair_accuracy: float
    roc: Mapping[str, np.ndarray]


def divide(
    data: image_sets.ImageSet,
    *,
    num_auxiliary: int,
    num_protected: int,
    held_out: float = 0.2,
    seed: int = 0,
) -> Division:
    """Divides people at random into three groups, and each victim's person's photos in two.

    Args:
        data: photos by identity.
        num_auxiliary: people for the noise alone.
        num_protected: people who are protected.
        held_out: share of a person's photos that the victim is judged on.
        seed: of both divisions.

    Raises:
        ValueError: too few people or photos.
    """
    names = [data.classes[i] for i in np.random.default_rng(seed).permutation(len(data.classes))]
    num_clean = len(names) - num_auxiliary - num_protected
    if min(num_auxiliary, num_clean) < 1 or num_protected < 1:
        raise ValueError(
            f"{len(names)} people cannot be {num_auxiliary} auxiliary ones, {num_protected} "
            "protected ones and at least one clean one"
        )
    auxiliary = tuple(sorted(names[:num_auxiliary]))
    protected = tuple(sorted(names[num_auxiliary : num_auxiliary + num_protected]))
    clean = tuple(sorted(names[num_auxiliary + num_protected :]))
    known, unknown = _split(data.labels, held_out=held_out, seed=seed)
    victims = (*protected, *clean)
    division = Division(
        auxiliary,
        protected,
        clean,
        search=people(image_sets.take(data, known), (*auxiliary, *victims)),
        training=people(image_sets.take(data, known), victims),
        held_out=people(image_sets.take(data, unknown), victims),
    )
    for name in victims:
        for part in (division.training, division.held_out):
            if part.classes.index(name) not in part.labels:
                raise ValueError(f"{name} has too few photos to train on some and test on others")
    return division


def _split(labels: np.ndarray, *, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each person's photos for training, and for judging: the share, and one at least."""
    parts = [], []
    for label in np.unique(labels):
        rows = np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label))
        count = max(1, round(held_out * len(rows)))
        parts[0].append(rows[count:])
        parts[1].append(rows[:count])
    known, unknown = (np.sort(np.concatenate(rows)) for rows in parts)
    return known, unknown


def people(data: image_sets.ImageSet, names: Sequence[str]) -> image_sets.ImageSet:
    """The photos of some people, with labels among these alone."""
    classes = tuple(sorted(names))
    index = {name: label for label, name in enumerate(classes)}
    rows = [row for row, label in enumerate(data.labels) if data.classes[label] in index]
    part = image_sets.take(data, rows)
    labels = np.array([index[data.classes[label]] for label in part.labels], np.int32)
    return part._replace(labels=labels, classes=classes)


def aligned(pixels: np.ndarray, landmarks: np.ndarray, side: int) -> np.ndarray:
    """A photo's face as the training crops show it.

    Args:
        pixels: `[H, W, 3]` uint8.
        landmarks: `[5, 2]` (y, x).
        side: of the crop.

    Returns:
        `[side, side, 3]` uint8.
    """
    (row_y, row_x) = align.similarity_transform(landmarks, _TEMPLATE)
    scale = _TEMPLATE_PX / side
    # Pillow samples at the centers of pixels, (x + 0.5, y + 0.5); ours lie at whole numbers.
    shift = (scale - 1) / 2
    (yy, yx, y0), (xy, xx, x0) = row_y, row_x
    y0, x0 = y0 + (yy + yx) * shift, x0 + (xy + xx) * shift
    xx, xy, yx, yy = (value * scale for value in (xx, xy, yx, yy))
    data = (xx, xy, x0 + 0.5 - 0.5 * (xx + xy), yx, yy, y0 + 0.5 - 0.5 * (yx + yy))
    image = Image.fromarray(pixels)
    return np.asarray(
        image.transform((side, side), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    )


def centered(pixels: np.ndarray, side: int) -> np.ndarray:
    """The middle of a photo as LFW shows it, where no face is looked for, `[side, side, 3]`."""
    height, width, _ = pixels.shape
    size = max(1, round(min(height, width) * _CENTER_SHARE))
    top = max(0, (height - size) // 2 - round(min(height, width) * _CENTER_RISE))
    left = (width - size) // 2
    return identities.fit_square(pixels[top : top + size, left : left + size], side)


def cut_face(
    detector: mtcnn.Variables | None, pixels: np.ndarray, side: int
) -> tuple[np.ndarray, bool]:
    """The main face of a photo, aligned; its middle where there is none.

    Args:
        detector: variables of MTCNN; None takes the middle.
        pixels: `[H, W, 3]` uint8.
        side: of the crop.

    Returns:
        `[side, side, 3]` uint8, and whether a face was found.
    """
    if detector is not None:
        faces = detect.main_face(detect.detect_faces(detector, pixels), pixels.shape)
        if len(faces.boxes):
            return aligned(pixels, faces.landmarks[0], side), True
    return centered(pixels, side), False


def read_pairs(
    table: pathlib.Path,
    root: pathlib.Path,
    side: int,
    *,
    detector: mtcnn.Variables | None,
    kept: pathlib.Path,
    limit: int | None = None,
    progress_fn: Callable[[list[str]], Iterable[str]] = list,
) -> StrangerPairs:
    """Reads pairs and cuts the faces of their photos, once.

    Args:
        table: CSV with the columns image_a, image_b, same (0 or 1).
        root: folder that its paths are below.
        side: of the crops.
        detector: see `cut_face`.
        kept: `.npz` that the crops are written to, and read from if it exists.
        limit: take so many pairs only.
        progress_fn: wraps the loop over photos.

    Raises:
        ValueError: no such table, fewer than 20 pairs or of one kind only, or no readable photo.
    """
    try:
        named, same = pairs.read_pairs(table)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    named, same = named[:limit], same[:limit]
    if len(named) < 20 or same.all() or not same.any():
        raise ValueError(f"{table} needs 20 pairs or more, of both kinds")
    names = sorted({name for pair in named for name in pair})
    known = workdir.read_or_none(kept, files.read_arrays)
    if known is not None:
        crops, found, unreadable = (known[name] for name in ("crops", "found", "unreadable"))
    else:
        crops = np.zeros((len(names), side, side, 3), np.uint8)
        found, unreadable = np.zeros((2, len(names)), bool)
        for row, name in enumerate(progress_fn(names)):
            try:
                source = photos.PhotoSource.of(photo_files.find_below(root, name))
                pixels = photos.read_source(source).pixels
            except photos.PhotoError:
                unreadable[row] = True
                continue
            crops[row], found[row] = cut_face(detector, pixels, side)
        made = {"crops": crops, "found": found, "unreadable": unreadable}
        files.write_arrays(kept, made)
    row_of = {name: row for row, name in enumerate(names)}
    rows = np.array([[row_of[first], row_of[second]] for first, second in named])
    usable = ~unreadable[rows].any(axis=1)
    if not usable.any() or same[usable].all() or not same[usable].any():
        raise ValueError(f"too few photos of {table} can be read below {root}")
    problems = tuple(
        identities.Omission(names[row], "cannot be read; its pairs are left out")
        for row in np.flatnonzero(unreadable)
    )
    without_face = int((~found & ~unreadable).sum())
    return StrangerPairs(crops, rows[usable], same[usable], without_face, problems)


def embeddings(
    net: nn.Module,
    state: trainer.TrainState,
    images: np.ndarray,
    *,
    batch_size: int = 128,
    mesh: parallel.Mesh | None = None,
    backend: parallel.Backend = "jit",
) -> np.ndarray:
    """Features of a trained classifier's network, before its last layer, of unit length.

    Args:
        net: the classifier's network with `num_classes=None`, which shares its parameters.
        state: of the trained classifier.
        images: `[N, S, S, 3]` uint8.
        batch_size: Images of one call, filled up to a multiple of the devices.
        mesh: The devices; None for all of this process.
        backend: As of `parallel.map_batches`.

    Returns:
        `[N, D]` float32.
    """
    variables = {"params": state.params["net"], "batch_stats": state.batch_stats}
    map_fn = parallel.map_batches(
        _features,
        mesh or parallel.make_mesh(devices=jax.local_devices()),
        in_axes=(None, 0),
        batch_size=batch_size,
        of="batch",
        backend=backend,
        static={"net": net},
    )
    vectors = map_fn(variables, images)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _features(
    variables: conversion.Variables, images: jax.Array, *, net: nn.Module
) -> parallel.PyTree:
    return net.apply(variables, image_ops.to_float(images), train=False)
