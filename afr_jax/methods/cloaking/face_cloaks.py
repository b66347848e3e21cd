"""What methods that cloak faces share: faces, surrogates, limits, and the loop over a batch.

A method is a config (`CloakConfig`): it says what a change of one face gains (`problem`), and the
rest is here. Functions work on face canvases (`afr_jax.recognition.align.Canvas`); whole photos are
in `afr_jax.methods.cloaking.photo_cloaks`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from afr_jax.core import ssim
from afr_jax.models.extractors import registry
from afr_jax.perturb import loop, penalties, projections
from afr_jax.recognition import align


class Surrogate(NamedTuple):
    """An extractor that a cloak is made against (static): zoo entry and the warp's box average."""

    extractor: registry.Extractor
    pool: int


class FaceView(NamedTuple):
    """How one surrogate sees one face.

    Attributes:
        transform: `[2, 3]`, chip to canvas.
        own: `[D]`, embedding of the clean face.
        to_person: `[D]`, from `own` to the mean over clean faces of the same person; zeros where
            no other face of the person is known.
        target: `[D]`, embedding of another person.
    """

    transform: jax.Array
    own: jax.Array
    to_person: jax.Array
    target: jax.Array


class Face(NamedTuple):
    """One face to cloak; a batch has a leading axis on every leaf.

    Attributes:
        image: canvas `[S, S, 3]`, float in [0, 1].
        limit: `[S, S]`, largest change of each pixel in [0, 1] units; 0 where none is allowed.
        boxes: `[2, 4]` int (y0, x0, y1, x1) on the canvas: the region that may change, and the
            detector's box inside it. The budget holds for both, so that a wide region cannot dilute
            the distortion of the face.
        views: one for each surrogate.
        has_target: float, 1 where `target` counts, else 0.
        gray: float, 1 where the change must be equal in all channels, else 0.
        budget: float, largest DSSIM; `cloak_faces` fills it in.
    """

    image: jax.Array
    limit: jax.Array
    boxes: jax.Array
    views: tuple[FaceView, ...]
    has_target: jax.Array
    gray: jax.Array
    budget: jax.Array | float = 0.0


class CloakConfig(Protocol):
    """A method with its options: frozen and hashable, a static argument of jitted functions.

    Attributes:
        dssim_budget: largest DSSIM of a face, > 0.
        linf_limit: largest change of a pixel, in [0, 1] units.
        num_steps: gradient steps, >= 0.
        start_noise: half width of the uniform start, in [0, 1] units (a distance from the own
            embedding has no gradient at zero).
    """

    dssim_budget: float
    linf_limit: float
    num_steps: int
    start_noise: float

    def problem(
        self,
        variables: tuple[dict, ...],
        face: Face,
        reference: ssim.SsimReference,
        surrogates: tuple[Surrogate, ...],
    ) -> loop.Problem:
        """The search for a change `[S, S, 3]` of one face (without batch axis).

        The budget to keep is `face.budget`: the config's own is not passed on, so that a compiled
        program serves all budgets.

        Args:
            variables: of each surrogate's module.
            face: to cloak.
            reference: of its canvas.
            surrogates: static.
        """


def cloak_faces(
    keys: jax.Array,
    variables: tuple[dict, ...],
    faces: Face,
    *,
    surrogates: tuple[Surrogate, ...],
    config: CloakConfig,
    report_fn: Callable[[int], None] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cloaks a batch of faces.

    Args:
        keys: `[B]`, one for each face: a face's result depends on its own key alone.
        variables: of each surrogate's module.
        faces: the batch; the views' `own` embeddings and `budget` need not be filled in, they are
            computed here and taken from the config.
        surrogates: static; compiled programs are shared by all batches of one shape.
        config: the method.
        report_fn: called with the number of steps taken, for progress.

    Returns:
        The changes `[B, S, S, 3]` in [0, 1] units, within all limits and budgets, and the distances
        from the clean embedding that they reach, `[B, number of surrogates]`.
    """
    own = embed_faces(variables, faces, surrogates)
    views = [view._replace(own=vector) for view, vector in zip(faces.views, own, strict=True)]
    # The budget goes with the faces, so that all budgets share a compiled program.
    budgets = jnp.full(len(faces.image), config.dssim_budget, jnp.float32)
    faces = faces._replace(views=tuple(views), budget=budgets)
    config = dataclasses.replace(config, dssim_budget=1.0)
    references = _references(faces.image)
    state = _start(keys, faces, references, config)

    def advance(state, num_steps):
        return _advance(
            keys, variables, faces, references, state, surrogates, config, num_steps=num_steps
        )

    state = loop.drive(advance, state, num_steps=config.num_steps, report_fn=report_fn)
    delta, score = loop.best(state)
    # Where no iterate met the budget, nothing is changed: honest, and rare.
    delta = jnp.where(jnp.isfinite(score)[:, None, None, None], delta, 0.0)
    reached = embed_faces(variables, faces._replace(image=faces.image + delta), surrogates)
    distances = [registry.distance(new, old) for new, old in zip(reached, own, strict=True)]
    return delta, jnp.stack(distances, axis=1)


@functools.partial(jax.jit, static_argnames="surrogates")
def embed_faces(
    variables: tuple[dict, ...], faces: Face, surrogates: tuple[Surrogate, ...]
) -> tuple[jax.Array, ...]:
    """Embeddings `[B, D]` of a batch of faces as they are, one array for each surrogate.

    Args:
        variables: of each surrogate's module.
        faces: the batch.
        surrogates: static.
    """
    found = []
    for surrogate, params, view in zip(surrogates, variables, faces.views, strict=True):
        chips = jax.vmap(functools.partial(chip, surrogate))(faces.image, view.transform)
        found.append(registry.embed(surrogate.extractor, params, chips))
    return tuple(found)


def dssim(cloaked: jax.Array, face: Face, reference: ssim.SsimReference) -> jax.Array:
    """DSSIM of a canvas `[S, S, 3]`: the larger of those of the face's two boxes."""
    similarity = ssim.ssim_map(cloaked, reference)
    return jnp.maximum(*(ssim.box_dssim(similarity, box) for box in face.boxes))


def within_budget(
    gain: jax.Array, dssim: jax.Array, weight: jax.Array, face: Face, **metrics: jax.Array
) -> loop.Evaluation:
    """What a gain is worth under the budget.

    Args:
        gain: of a change, scalar.
        dssim: of the change.
        weight: multiplier of the DSSIM penalty.
        face: with its budget.
        **metrics: others to record.

    Returns:
        loss = weight * dssim / budget - gain, score = -gain within the budget and inf outside,
        metrics `dssim`, `spent` (dssim / budget), `gain` and the others.
    """
    spent = dssim / face.budget
    score = jnp.where(dssim <= face.budget, -gain, jnp.inf)
    found = {"dssim": dssim, "spent": spent, "gain": gain, **metrics}
    return loop.Evaluation(weight * spent - gain, score, found)


def make_problem(
    loss_fn: Callable[[jax.Array, jax.Array, jax.Array], loop.Evaluation],
    tx: optax.GradientTransformation,
    face: Face,
    *,
    memory: float = 0.0,
) -> loop.Problem:
    """A loss of `within_budget` with its step, the face's limits, and the penalty's multiplier.

    Args:
        loss_fn: as of `loop.Problem`.
        tx: likewise.
        face: without batch axis.
        memory: as of `loop.Problem`. DSSIM of small changes is nearly a quadratic form, so averages
            of changes within the budget are within it, too, and spend less of it.
    """
    return loop.Problem(
        loss_fn=loss_fn,
        tx=tx,
        project_fn=lambda delta: project(delta, face),
        # Aims a little below the budget, so that the iterates around it are kept.
        control=penalties.hold_below("spent", 0.97, start=0.5, rate=0.2),
        memory=memory,
    )


def project(delta: jax.Array, face: Face) -> jax.Array:
    """The nearest allowed change: gray where asked, within the pixel limits and the image box."""
    delta = jnp.where(face.gray > 0, projections.gray(delta), delta)
    delta = projections.linf_box(delta, face.limit[..., None])
    return projections.image_box(delta, face.image)


def chip(surrogate: Surrogate, image: jax.Array, transform: jax.Array) -> jax.Array:
    """The chip `[side, side, 3]` that a surrogate sees of a canvas `[S, S, 3]`."""
    return align.warp(image, transform, size=surrogate.extractor.input_px, pool=surrogate.pool)


@jax.jit
def _references(images):
    return jax.vmap(ssim.ssim_reference)(images)


@functools.partial(jax.jit, static_argnames="config")
def _start(keys, faces, references, config):
    def one(key, face, reference):
        shape = face.image.shape
        noise = jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * config.start_noise
        return loop.start(config.problem((), face, reference, ()), noise)

    return jax.vmap(one)(keys, faces, references)


@functools.partial(
    jax.jit, static_argnames=("surrogates", "config", "num_steps"), donate_argnames="state"
)
def _advance(keys, variables, faces, references, state, surrogates, config, *, num_steps):
    def one(key, face, reference, state):
        problem = config.problem(variables, face, reference, surrogates)
        return loop.advance(key, problem, state, num_steps=num_steps)

    return jax.vmap(one)(keys, faces, references, state)
