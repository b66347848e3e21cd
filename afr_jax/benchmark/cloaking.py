"""Row `cloaking`: our Fawkes beside the optimizer of the PyPI `fawkes` package.

Both work on aligned chips, with the same net, DSSIM budget, pixel limit, steps and batches. What
each side reached is measured on the rounded 8-bit chips: distances by dlib itself where it is
installed, DSSIM by scikit-image. The package accepts results up to 1.1 times the budget.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data
import skimage.metrics

from afr_jax.benchmark import photos, setting, timing
from afr_jax.core import images, options
from afr_jax.evaluation import reference
from afr_jax.methods.cloaking import face_cloaks, fawkes
from afr_jax.models.extractors import dlib_resnet, registry
from afr_jax.models.weights import conversion
from afr_jax.recognition import align, detect

_CANVAS_SIZES = (192, 256, 320)
# Fixed in the package's code, and the learning rate of its low mode.
_LINF, _REFERENCE_LEARNING_RATE = 15 / 255, 25.0
# The paper's budget, which the package can hold, too.
_DSSIM = 0.007
_BATCH = 4
_MIN_CONFIDENCE = 0.9
DRIVER = "fawkes_driver.py"


@dataclasses.dataclass(frozen=True)
class CloakingOptions:
    """What is measured in the row `cloaking`."""

    num_faces: tuple[int, ...] = options.option(
        (4, 20), "faces for cloaking, measured one by one", at_least=1
    )
    num_steps: int = options.option(40, "gradient steps of a cloak", at_least=1)
    reference_graph: bool = options.option(
        True,
        "compile the net for fawkes (tf.function): faster than the package as it is",
        aliases=("peer_graph",),
    )

    def __post_init__(self) -> None:
        """Checks ranges."""
        options.check(self)


def run(config: CloakingOptions, given: setting.Setting) -> setting.Measured:
    """The surest face of each photo, aligned, through both optimizers.

    Raises:
        options.UsageError: no photo shows a face, or dlib's weights are missing.
    """
    extractor = registry.get("dlib")
    with options.usage("dlib"):
        variables = jax.tree.map(jnp.asarray, extractor.load())
    chips = cut_chips(
        extractor, _faces(given, max(config.num_faces)), max(config.num_faces), seed=given.seed
    )
    cloak = fawkes.FawkesConfig(
        dssim_budget=_DSSIM,
        num_steps=config.num_steps,
        align_shift=0.0,
        align_turn=0.0,
        mirror=False,
    )
    rows = []
    with given.reference.open(DRIVER) as other:
        for count in config.num_faces:
            rows += measure(
                f"cloaking, {count} faces, {config.num_steps} steps",
                extractor,
                variables,
                chips[:count],
                given.folder,
                other,
                config=cloak,
                batch=_BATCH,
                repeats=given.repeats,
                reference_graph=config.reference_graph,
                seed=given.seed,
            )
        return setting.Measured(rows, other.versions if other else {})


def _faces(given: setting.Setting, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Photos with the landmarks of their surest faces."""
    detector, faces = given.detector(), []
    shown = (
        photos.read(given.paths, len(given.paths)) if given.images else [skimage.data.astronaut()]
    )
    for pixels in map(given.shrunk, shown):
        found = detect.detect_faces(detector, pixels)
        if len(found.boxes) and found.confidences[0] >= _MIN_CONFIDENCE:
            faces.append((pixels, found.landmarks[0]))
        if len(faces) == count:
            break
    if not faces:
        raise options.UsageError("--images holds no photo with a face")
    return faces


def cut_chips(
    extractor: registry.Extractor,
    faces: Sequence[tuple[np.ndarray, np.ndarray]],
    count: int,
    *,
    seed: int = 0,
) -> np.ndarray:
    """Aligned chips of faces, used again with their landmarks shaken a little if too few.

    Args:
        extractor: whose chips.
        faces: (photo `[H, W, 3]` uint8, landmarks `[5, 2]` (y, x)) of each face.
        count: number of chips N.
        seed: of the shaking.

    Returns:
        `[N, S, S, 3]` uint8.
    """
    generator = np.random.default_rng(seed)
    chips = []
    for number in range(count):
        pixels, landmarks = faces[number % len(faces)]
        if number >= len(faces):
            span = np.ptp(landmarks, axis=0).max()
            landmarks = landmarks + generator.normal(0.0, 0.04 * span, landmarks.shape)
        transform = align.chip_transform(extractor, landmarks)
        factor = align.pool_factor(align.transform_scale(transform))
        bounds = align.chip_bounds(transform, extractor.input_px)
        canvas = align.cut_canvas(pixels, bounds, factor=factor, bucket_sizes=_CANVAS_SIZES)
        transform = align.canvas_transform(transform, canvas).astype(np.float32)
        chip = align.warp(jnp.asarray(canvas.image), transform, size=extractor.input_px)
        chips.append(np.asarray(images.to_uint8(chip)))
    return np.stack(chips)


def measure(
    row: str,
    extractor: registry.Extractor,
    variables: conversion.Variables,
    chips: np.ndarray,
    folder: pathlib.Path,
    other: reference.ReferenceProcess | None,
    *,
    config: fawkes.FawkesConfig,
    batch: int,
    repeats: int,
    reference_graph: bool = True,
    seed: int = 0,
) -> list[timing.Row]:
    """Rows of the table: milliseconds a face and step, distances, DSSIM.

    A row of ours alone says which share of a step is not the net: one minus the time of the net's
    value and gradient on a batch over the time of a step. That share is the warp, DSSIM, optimizer,
    projections, and the start and the end of a cloak spread over its steps.

    Args:
        row: name of the rows.
        extractor: the net; the package's side knows dlib's alone.
        variables: of the net.
        chips: `[N, S, S, 3]` uint8.
        folder: where chips are put for the package.
        other: the package; None leaves its column empty.
        config: of our Fawkes; budget and steps are also the package's.
        batch: chips that are cloaked together.
        repeats: timed cloaks of all chips by each side.
        reference_graph: compile the net on the package's side (`tf.function`), which the package
            itself does not do and which makes it faster.
        seed: of both sides' random starts.

    Returns:
        The rows.
    """
    per_step = 1e3 / max(config.num_steps, 1) / len(chips)
    source, output = folder / "chips.npy", folder / "cloaked.npy"
    np.save(source, chips)
    cloaked: dict[str, np.ndarray] = {}

    def ours() -> float:
        start = time.perf_counter()
        cloaked["ours"] = cloak_chips(extractor, variables, chips, config, batch, seed)
        return per_step * (time.perf_counter() - start)

    def net() -> float:
        return _net_milliseconds(extractor, variables, chips[:batch], config.num_steps)

    sides = {"ours": ours, "net": net}
    if other is not None:

        def theirs() -> float:
            answer = other.call(
                "cloak",
                chips=str(source),
                output=str(output),
                dssim=_DSSIM,
                steps=config.num_steps,
                batch=batch,
                learning_rate=_REFERENCE_LEARNING_RATE,
                graph_mode=reference_graph,
                seed=seed,
            )
            cloaked["theirs"] = np.load(output)
            return per_step * answer["seconds"]

        sides["theirs"] = theirs
    times = timing.take_turns(sides, repeats=repeats)
    outside = [1 - alone / whole for alone, whole in zip(times["net"], times["ours"], strict=True)]
    judge, embed_fn = _judge(extractor, variables)
    figures = {side: _figures(chips, pixels, judge, embed_fn) for side, pixels in cloaked.items()}
    return [
        timing.compare(row, "ms per face and step", times["ours"], times.get("theirs")),
        timing.state(row, "share of a step outside the net", timing.spread(outside), None),
        *(
            timing.state(row, quantity, value, figures.get("theirs", {}).get(quantity))
            for quantity, value in figures["ours"].items()
        ),
    ]


def cloak_chips(
    extractor: registry.Extractor,
    variables: conversion.Variables,
    chips: np.ndarray,
    config: fawkes.FawkesConfig,
    batch: int,
    seed: int,
) -> np.ndarray:
    """Cloaks uint8 chips `[N, S, S, 3]`, each chip being its own canvas."""
    side = extractor.input_px
    keys = jax.random.split(jax.random.key(seed), len(chips))
    cloaked = []
    for start in range(0, len(chips), batch):
        canvas = images.to_float(jnp.asarray(chips[start : start + batch]))
        count = len(canvas)
        nothing = jnp.zeros((count, extractor.embedding_size))
        crop = face_cloaks.FaceCrop(
            jnp.tile(jnp.eye(2, 3), (count, 1, 1)), own=nothing, to_person=nothing, target=nothing
        )
        faces = face_cloaks.Face(
            image=canvas,
            limit=jnp.full((count, side, side), _LINF),
            luma=jnp.full((count, side, side), _LINF),
            chroma=jnp.ones((count, side, side)),
            boxes=jnp.tile(jnp.array([0, 0, side, side]), (count, 2, 1)),
            crops=(crop,),
            has_target=jnp.zeros(count),
            gray=jnp.zeros(count),
            is_coarse=jnp.zeros(count, bool),
        )
        delta, _ = face_cloaks.cloak_faces(
            keys[start : start + batch],
            (variables,),
            faces,
            surrogates=(face_cloaks.Surrogate(extractor, 1),),
            config=config,
        )
        cloaked.append(np.asarray(images.to_uint8(canvas + delta)))
    return np.concatenate(cloaked)


def _net_milliseconds(
    extractor: registry.Extractor,
    variables: conversion.Variables,
    chips: np.ndarray,
    num_steps: int,
) -> float:
    """Time a face of the net's distance to some embedding and of its gradient, over some steps."""
    canvas = images.to_float(jnp.asarray(chips))
    other = jnp.zeros((len(chips), extractor.embedding_size))
    jax.block_until_ready(_distance_gradient(canvas, variables, other, extractor))
    start = time.perf_counter()
    for _ in range(num_steps):
        jax.block_until_ready(_distance_gradient(canvas, variables, other, extractor))
    return 1e3 * (time.perf_counter() - start) / max(num_steps, 1) / len(chips)


def _total_distance(
    chips: jax.Array,
    variables: conversion.Variables,
    others: jax.Array,
    extractor: registry.Extractor,
) -> jax.Array:
    return jnp.sum(registry.distance(registry.embed(extractor, variables, chips), others))


_distance_gradient = jax.jit(jax.value_and_grad(_total_distance), static_argnames="extractor")


def _judge(
    extractor: registry.Extractor, variables: conversion.Variables
) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """Who measures distances, and how it embeds uint8 chips `[N, S, S, 3]`."""
    try:
        import dlib  # Optional: a judge that shares no code with us.
    except ImportError:
        dlib = None
    if dlib is None or extractor.name != "dlib":

        def embed_fn(chips: np.ndarray) -> np.ndarray:
            return np.asarray(
                registry.embed(extractor, variables, images.to_float(jnp.asarray(chips)))
            )

        return "our net", embed_fn
    # Of the library's compiled part the checker sees nothing.
    # pyrefly: ignore[missing-attribute]
    model = dlib.face_recognition_model_v1(str(dlib_resnet.find_weights()))

    def dlib_fn(chips: np.ndarray) -> np.ndarray:
        return np.array([np.array(model.compute_face_descriptor(chip)) for chip in chips])

    return "dlib", dlib_fn


def _figures(
    chips: np.ndarray, cloaked: np.ndarray, judge: str, embed_fn: Callable[[np.ndarray], np.ndarray]
) -> dict[str, float]:
    distances = np.linalg.norm(embed_fn(cloaked) - embed_fn(chips), axis=1)
    dssims = [
        (
            1
            - skimage.metrics.structural_similarity(
                *pair, channel_axis=-1, gaussian_weights=True, use_sample_covariance=False
            )
        )
        / 2
        for pair in zip(chips, cloaked, strict=True)
    ]
    return {
        f"mean distance by {judge}": float(distances.mean()),
        f"least distance by {judge}": float(distances.min()),
        "mean DSSIM": float(np.mean(dssims)),
        "largest DSSIM": float(np.max(dssims)),
    }
