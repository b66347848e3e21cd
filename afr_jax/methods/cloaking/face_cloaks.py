"""What methods that cloak faces share: faces, surrogates, limits, and the loop over a batch.

A method is a config (`CloakMethod`); its static part (`CloakSearch`), a constant of compiled
programs, says what a change of one face gains (`problem`), and the rest is here. Functions work on
face canvases (`afr_jax.recognition.align.Canvas`); whole photos are in
`afr_jax.methods.cloaking.photo_cloaks`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.typing import VariableDict

from afr_jax.core import parallel
from afr_jax.core.perception import flicker, ssim, ssimulacra2
from afr_jax.methods.cloaking import budget
from afr_jax.models import conv
from afr_jax.models.extractors import registry
from afr_jax.perturb import loop, penalties, projections, stepping
from afr_jax.recognition import align


class Surrogate(NamedTuple):
    """An extractor that a cloak is made against (static), and the warp's box average.

    In compiled programs the average is an array: one program serves all of them.
    """

    extractor: registry.Extractor
    pool: int | jax.Array


class FaceCrop(NamedTuple):
    """How one surrogate sees one face.

    Attributes:
        transform: `[2, 3]`, chip to canvas.
        own: `[D]`, embedding of the clean face.
        to_person: `[D]`, from `own` to the mean over clean faces of the same person; zeros where
            no other face of the person is known.
        target: `[D]`, embedding of another person.
    """

    transform: parallel.AnyArray
    own: parallel.AnyArray
    to_person: parallel.AnyArray
    target: parallel.AnyArray


class Face(NamedTuple):
    """One face to cloak; a batch has a leading axis on every leaf.

    Attributes:
        image: canvas `[S, S, 3]`, float in [0, 1].
        limit: `[S, S]`, largest change of each pixel in [0, 1] units; 0 where none is allowed.
        luma: `[S, S]`, the same of its luma alone.
        chroma: `[S, S]`, the same of its Cb and Cr.
        boxes: `[2, 4]` int (y0, x0, y1, x1) on the canvas: the region that may change, and the
            detector's box inside it. The budget holds for both, so that a wide region cannot dilute
            the distortion of the face.
        crops: one for each surrogate.
        has_target: float, 1 where `target` counts, else 0.
        gray: float, 1 where the change must be equal in all channels, else 0.
        is_coarse: bool, whether a pixel is about two wide of what people are shown.
        budget: float, largest DSSIM; `cloak_faces` fills it in.
        flicker: float, largest `flicker.flicker` of the region, or None, with which it is not
            computed; likewise.
        lost: float, largest `ssimulacra2.lost` of the region, or None; likewise.
        ease: float, `Budget.ease`; likewise.
    """

    image: parallel.AnyArray
    limit: parallel.AnyArray
    luma: parallel.AnyArray
    chroma: parallel.AnyArray
    boxes: parallel.AnyArray
    crops: tuple[FaceCrop, ...]
    has_target: parallel.AnyArray
    gray: parallel.AnyArray
    is_coarse: parallel.AnyArray
    budget: parallel.AnyArray | float = 0.0
    flicker: parallel.AnyArray | float | None = None
    lost: parallel.AnyArray | float | None = None
    ease: parallel.AnyArray | float = 1.0


class Reference(NamedTuple):
    """Statistics of a canvas, with which a search compares its changes.

    Attributes:
        structure: for DSSIM.
        tolerance: `ssim.tolerance`, `[S, S, 3]`, whose square is one in the mean over the canvas,
            weighted by the face's limits.
        shown: for SSIMULACRA2; empty where it has no limit, and on canvases that are too small for
            all of its scales.
    """

    structure: ssim.SsimReference
    tolerance: jax.Array
    shown: tuple[ssimulacra2.Scale, ...]


class CloakSearch(Protocol):
    """A method with its static options: frozen and hashable, a constant of compiled programs.

    Attributes:
        num_steps: Gradient steps, >= 0.
        start_noise: Half width of the uniform start, in [0, 1] units (a distance from the own
            embedding has no gradient at zero).
    """

    @property
    def num_steps(self) -> int:
        """See the class."""
        ...

    @property
    def start_noise(self) -> float:
        """See the class."""
        ...

    def rules(self, face: Face, reference: Reference) -> loop.Rules:
        """How the change `[S, S, 3]` of one face moves; mostly `face_cloaks.rules`.

        Args:
            face: The face to cloak, without a batch axis.
            reference: Statistics of its canvas.
        """

    def problem(
        self,
        variables: tuple[VariableDict, ...],
        face: Face,
        reference: Reference,
        surrogates: tuple[Surrogate, ...],
    ) -> loop.Problem:
        """The search for a change `[S, S, 3]` of one face (without batch axis).

        The budget to keep is `face.budget`.

        Args:
            variables: of each surrogate's module.
            face: to cloak.
            reference: of its canvas.
            surrogates: static.
        """


class CloakMethod(CloakSearch, Protocol):
    """A method with all its options.

    Budget and limit are arrays of the faces in compiled programs, which therefore serve all of
    them.

    Attributes:
        budget: What a face's change may cost.
        linf_limit: Largest change of a pixel, in [0, 1] units.
    """

    @property
    def budget(self) -> budget.Budget:
        """See the class."""
        ...

    @property
    def linf_limit(self) -> float:
        """See the class."""
        ...

    @property
    def search(self) -> CloakSearch:
        """The static part, equal for all budgets and limits."""


def check_shares(values: CloakSearch, names: Iterable[str]) -> None:
    """Checks that options lie in (0, 1].

    Raises:
        ValueError: one does not.
    """
    for name in names:
        if not 0 < getattr(values, name) <= 1:
            raise ValueError(f"{name} is {getattr(values, name)}, must lie in (0, 1]")


def cloak_faces(
    keys: jax.Array,
    variables: tuple[VariableDict, ...],
    faces: Face,
    *,
    surrogates: tuple[Surrogate, ...],
    config: CloakMethod,
    limits: budget.Budget | None = None,
    report_fn: Callable[[int], None] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cloaks a batch of faces; threads may do so side by side, as JAX compiles a program once.

    Args:
        keys: `[B]`, one for each face: a face's result depends on its own key alone.
        variables: of each surrogate's module.
        faces: the batch; the crops' `own` embeddings and `budget` need not be filled in, they are
            computed here and taken from the limits.
        surrogates: static; compiled programs are shared by all batches of one shape.
        config: the method.
        limits: of what a face's change may cost; by default the method's budget.
        report_fn: called with the number of steps taken, for progress.

    Returns:
        The changes `[B, S, S, 3]` in [0, 1] units, within all limits and budgets, and the distances
        from the clean embedding that they reach, `[B, number of surrogates]`.
    """
    chex.assert_rank(faces.image, 4)
    chex.assert_equal_shape_prefix([keys, faces.image, faces.limit, faces.boxes], 1)
    search, faces = config.search, _limited(faces, limits or config.budget)
    seen = _look(keys, variables, faces, surrogates, search)
    crops = [
        crop._replace(own=vector) for crop, vector in zip(faces.crops, seen.embeddings, strict=True)
    ]
    faces = faces._replace(crops=tuple(crops))
    length, reported = stepping.chunk_length(), 0
    turned = conv.turn_kernels(variables)

    def advance(state: loop.State, steps: range) -> tuple[loop.State, None]:
        count = np.int32(len(steps))
        return _advance(
            keys,
            turned,
            faces,
            seen.references,
            state,
            count,
            _pools(surrogates),
            _extractors(surrogates),
            search,
            length=length,
        ), None

    def report(count: int) -> None:
        nonlocal reported
        # What comes behind the last step is its evaluation.
        count = min(count, config.num_steps - reported)
        reported += count
        if report_fn is not None and count:
            report_fn(count)

    state, _ = stepping.drive(
        advance, seen.start, steps=range(config.num_steps + 1), length=length, report_fn=report
    )
    delta, score = loop.best(state)
    seen = _look(keys, variables, faces, surrogates, search, change=(delta, score))
    return seen.change, seen.distances


def embed_faces(
    keys: jax.Array,
    variables: tuple[VariableDict, ...],
    faces: Face,
    *,
    surrogates: tuple[Surrogate, ...],
    config: CloakMethod,
) -> tuple[jax.Array, ...]:
    """Embeddings `[B, D]` of a batch of faces as they are, one array for each surrogate.

    It is done by a program of `cloak_faces`, which has the same arguments.
    """
    faces = _limited(faces, config.budget)
    return _look(keys, variables, faces, surrogates, config.search).embeddings


def reference(face: Face) -> Reference:
    """The statistics of the canvas of one face."""
    image = face.image
    is_held = face.lost is not None and image.shape[0] >= ssimulacra2.LEAST_SIDE
    shown = ssimulacra2.reference(image) if is_held else ()
    structure = ssim.ssim_reference(image)
    tolerance = ssim.tolerance(structure)
    free = face.limit[..., None] * jnp.ones_like(tolerance)
    square = jnp.sum(free * tolerance**2) / jnp.maximum(jnp.sum(free), 1e-12)
    return Reference(structure, tolerance / jnp.sqrt(square + 1e-12), shown)


def spent(cloaked: jax.Array, face: Face, reference: Reference) -> jax.Array:
    """The share of the budget that a changed canvas `[S, S, 3]` takes, at most 1 within it.

    That is the largest of the shares of DSSIM, the larger of those of the face's boxes; and of
    flicker and of SSIMULACRA2, where they are held.
    """
    similarity, size = ssim.ssim_map(cloaked, reference.structure), face.boxes[0, 2:]
    dssim = jnp.maximum(*(ssim.box_dssim(similarity, box) for box in face.boxes))
    share = dssim / face.budget
    if face.flicker is not None:
        seen = flicker.flicker(cloaked, face.image, size=size, is_coarse=face.is_coarse)
        share = jnp.maximum(share, seen / face.flicker)
    if reference.shown and face.lost is not None:
        lost = ssimulacra2.lost(cloaked, reference.shown, size=size, is_coarse=face.is_coarse)
        share = jnp.maximum(share, lost / face.lost)
    return share


def within_budget(
    gain: jax.Array, spent: jax.Array, weight: jax.Array, **metrics: jax.Array
) -> loop.Evaluation:
    """What a gain is worth under the budget.

    Args:
        gain: of a change, scalar.
        spent: the share of the budget that it takes.
        weight: multiplier of its penalty.
        **metrics: others to record.

    Returns:
        loss = weight * spent - gain, score = -gain within the budget and inf outside, metrics
        `spent`, `gain` and the others.
    """
    score = jnp.where(spent <= 1, -gain, jnp.inf)
    found = {"spent": spent, "gain": gain, **metrics}
    return loop.Evaluation(weight * spent - gain, score, found)


def rules(
    tx: optax.GradientTransformation, face: Face, *, ema_decay: float | None = None
) -> loop.Rules:
    """A step with the face's limits and the multiplier of the penalty of `within_budget`.

    Args:
        tx: The step.
        face: The face, without a batch axis.
        ema_decay: With it, the average of the changes within the budget is kept, else the best one.
            What small changes cost is nearly a quadratic form, so averages of changes within the
            budget are within it, too, and spend less of it.
    """
    return loop.Rules(
        tx=tx,
        project_fn=lambda delta: project(delta, face),
        # Aims a little below the budget, so that the iterates around it are kept.
        penalties=penalties.hold_below("spent", 0.97, start=0.5, rate=0.2),
        keep="best" if ema_decay is None else "average",
        ema_decay=ema_decay or 0.0,
    )


def project(delta: jax.Array, face: Face) -> jax.Array:
    """The nearest allowed change: gray where asked, within the pixel limits and the image box."""
    gray = projections.linf_box(projections.gray(delta), face.luma[..., None])
    color = projections.luma_chroma_box(delta, face.luma, face.chroma)
    delta = jnp.where(face.gray > 0, gray, color)
    delta = projections.linf_box(delta, face.limit[..., None])
    return projections.image_box(delta, face.image)


def chip(surrogate: Surrogate, image: parallel.AnyArray, transform: parallel.AnyArray) -> jax.Array:
    """The chip `[side, side, 3]` that a surrogate sees of a canvas `[S, S, 3]`."""
    return align.warp(image, transform, size=surrogate.extractor.input_px, pool=surrogate.pool)


def _limited(faces: Face, limits: budget.Budget) -> Face:
    """A batch of faces with what their changes may cost."""
    ones = np.ones(len(faces.image), np.float32)
    return faces._replace(
        budget=ones * limits.dssim,
        flicker=None if limits.flicker is None else ones * limits.flicker,
        lost=None if limits.lost is None else ones * limits.lost,
        ease=ones * limits.ease,
    )


class _Look(NamedTuple):
    """What the surrogates see of a batch of faces, and what its search begins with.

    Attributes:
        change: `[B, S, S, 3]`, what was added to the canvases.
        embeddings: `[B, D]` of each surrogate.
        distances: `[B, number of surrogates]`, from the `own` embeddings.
        references: of the canvases.
        start: of the search.
    """

    change: jax.Array
    embeddings: tuple[jax.Array, ...]
    distances: jax.Array
    references: Reference
    start: loop.State


def _look(
    keys: jax.Array,
    variables: tuple[VariableDict, ...],
    faces: Face,
    surrogates: tuple[Surrogate, ...],
    search: CloakSearch,
    *,
    change: tuple[parallel.AnyArray, parallel.AnyArray] | None = None,
) -> _Look:
    """Looks at faces as they are, or with a change: by one program, as each takes long to compile.

    Where no iterate met the budget, nothing is changed: honest, and rare.
    """
    if change is None:
        shape = faces.image.shape
        change = np.zeros(shape, np.float32), np.full(shape[0], np.inf, np.float32)
    faces, change = parallel.place((faces, change), beside=keys)
    return _look_at(
        keys, variables, faces, change, _pools(surrogates), _extractors(surrogates), search
    )


@functools.partial(jax.jit, static_argnames=("extractors", "search"))
def _look_at(
    keys: jax.Array,
    variables: tuple[VariableDict, ...],
    faces: Face,
    change: tuple[jax.Array, jax.Array],
    pools: tuple[jax.Array, ...],
    extractors: tuple[registry.Extractor, ...],
    search: CloakSearch,
) -> _Look:
    delta, score = change
    added = jnp.where(jnp.isfinite(score)[:, None, None, None], delta, 0.0)
    images = faces.image + added
    embeddings, distances = [], []
    for extractor, pool, params, crop in zip(
        extractors, pools, variables, faces.crops, strict=True
    ):
        chips = jax.vmap(functools.partial(chip, Surrogate(extractor, pool)))(
            images, crop.transform
        )
        embeddings.append(registry.embed(extractor, params, chips))
        distances.append(registry.distance(embeddings[-1], crop.own))
    references = jax.vmap(reference)(faces)

    def start(key: jax.Array, face: Face, reference: Reference) -> loop.State:
        noise = jax.random.uniform(key, face.image.shape, minval=-1.0, maxval=1.0)
        return loop.start(search.rules(face, reference), noise * search.start_noise)

    return _Look(
        added,
        tuple(embeddings),
        jnp.stack(distances, axis=1),
        references,
        jax.vmap(start)(keys, faces, references),
    )


@functools.partial(
    jax.jit, static_argnames=("extractors", "search", "length"), donate_argnames="state"
)
def _advance(
    keys: jax.Array,
    variables: tuple[VariableDict, ...],
    faces: Face,
    references: Reference,
    state: loop.State,
    count: int,
    pools: tuple[jax.Array, ...],
    extractors: tuple[registry.Extractor, ...],
    search: CloakSearch,
    *,
    length: int,
) -> loop.State:
    """The state after `count` steps of a chunk, the same number for all faces."""
    surrogates = tuple(map(Surrogate, extractors, pools))

    def one(key: jax.Array, face: Face, reference: Reference, state: loop.State) -> loop.State:
        problem = search.problem(variables, face, reference, surrogates)
        return loop.advance(key, problem, state, num_steps=length, count=count)[0]

    return jax.vmap(one)(keys, faces, references, state)


def _extractors(surrogates: tuple[Surrogate, ...]) -> tuple[registry.Extractor, ...]:
    return tuple(surrogate.extractor for surrogate in surrogates)


def _pools(surrogates: tuple[Surrogate, ...]) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(surrogate.pool, np.int32) for surrogate in surrogates)
