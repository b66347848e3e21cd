"""Fawkes: moves the embedding of a face away while the photo keeps looking the same.

Shan, Wenger, Zhang, Li, Zheng, Zhao: "Fawkes: Protecting Privacy against Unauthorized Deep Learning
Models", USENIX Security 2020. What differs from the paper and from the authors' code, and why:

* The perturbation lives on the photo's own pixels and the chip is warped out of them inside the
  loop (the code perturbs a 112 px crop and pastes an enlarged difference).
* Objective: away from the face's own clean embedding (as the code's last release), towards a target
  identity (as the paper), or both; summed over extractors, each in units of its own threshold.
* The DSSIM budget is held by a multiplier for each face inside the compiled loop; only iterates
  within the budget are kept (the code accepts 10 % more).
* Boxes instead of tanh space: pixels at 0 and 255 keep their gradient.

Functions here work on face canvases (`afr_jax.recognition.align.Canvas`); whole photos are in
`afr_jax.methods.cloak`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from afr_jax.core import ssim
from afr_jax.models import zoo
from afr_jax.perturb import controls, loop, projections
from afr_jax.recognition import align

# DSSIM budgets by mode. The paper's budget is 0.007; low is that of the last release's low mode,
# and high that of its mid mode.
MODES = {"low": 0.004, "mid": 0.007, "high": 0.012}


@dataclasses.dataclass(frozen=True)
class FawkesConfig:
    """Options of the optimisation.

    Attributes:
        dssim_budget: largest DSSIM of a face, > 0.
        num_steps: gradient steps, >= 0.
        learning_rate: of Adam at the start, in [0, 1] units; a cosine takes it to a tenth.
        linf_limit: largest change of a pixel, in [0, 1] units.
        repel_weight: weight of the distance from the own clean embedding.
        attract_weight: weight of the distance to the target embedding, where there is a target.
        align_jitter: standard deviation of the random misalignment of the chip at each step, as a
            share of its side (shift, and rotation and scale about its centre): the tracker's
            landmarks differ a little from ours. 0 switches it off.
        start_noise: half width of the uniform start, in [0, 1] units (the objective has no gradient
            at zero).
    """

    dssim_budget: float = MODES["mid"]
    num_steps: int = 100
    learning_rate: float = 3 / 255
    linf_limit: float = 24 / 255
    repel_weight: float = 1.0
    attract_weight: float = 1.0
    align_jitter: float = 0.007
    start_noise: float = 1 / 255

    def __post_init__(self):
        for name in ("dssim_budget", "learning_rate", "linf_limit", "start_noise"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must lie in (0, 1]")
        for name in ("num_steps", "repel_weight", "attract_weight", "align_jitter"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 0")


class Surrogate(NamedTuple):
    """An extractor that a cloak is made against (static): zoo entry and the warp's box average."""

    extractor: zoo.Extractor
    pool: int


class FaceView(NamedTuple):
    """How one surrogate sees one face: transform `[2, 3]` chip to canvas, and embeddings `[D]`."""

    transform: jax.Array
    own: jax.Array
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
        grey: float, 1 where the change must be equal in all channels, else 0.
    """

    image: jax.Array
    limit: jax.Array
    boxes: jax.Array
    views: tuple[FaceView, ...]
    has_target: jax.Array
    grey: jax.Array


def cloak_faces(
    keys: jax.Array,
    variables: tuple[dict, ...],
    faces: Face,
    *,
    surrogates: tuple[Surrogate, ...],
    config: FawkesConfig,
    report_fn: Callable[[int], None] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cloaks a batch of faces.

    Args:
        keys: `[B]`, one for each face: a face's result depends on its own key alone.
        variables: of each surrogate's module.
        faces: the batch; the views' `own` embeddings need not be filled in, they are computed here.
        surrogates: static; compiled programs are shared by all batches of one shape.
        config: options.
        report_fn: called with the number of steps taken, for progress.

    Returns:
        The changes `[B, S, S, 3]` in [0, 1] units, within all limits and budgets, and the distances
        from the clean embedding that they reach, `[B, number of surrogates]`.
    """
    transforms = tuple(view.transform for view in faces.views)
    own = _embed_batch(variables, faces.image, transforms, surrogates)
    views = [view._replace(own=vector) for view, vector in zip(faces.views, own, strict=True)]
    faces = faces._replace(views=tuple(views))
    references = _references(faces.image)
    state = _start(keys, faces, config)

    def advance(state, num_steps):
        return _advance(
            keys, variables, faces, references, state, surrogates, config, num_steps=num_steps
        )

    state = loop.drive(advance, state, num_steps=config.num_steps, report_fn=report_fn)
    delta, score = loop.best(state)
    # Where no iterate met the budget, nothing is changed: honest, and rare.
    delta = jnp.where(jnp.isfinite(score)[:, None, None, None], delta, 0.0)
    reached = _embed_batch(variables, faces.image + delta, transforms, surrogates)
    distances = [zoo.distance(new, old) for new, old in zip(reached, own, strict=True)]
    return delta, jnp.stack(distances, axis=1)


def evaluate(
    key: jax.Array,
    delta: jax.Array,
    weight: jax.Array,
    variables: tuple[dict, ...],
    face: Face,
    reference: ssim.SsimReference,
    *,
    surrogates: tuple[Surrogate, ...],
    config: FawkesConfig,
) -> loop.Evaluation:
    """Loss, score and metrics of one face's change (equation 2 of the paper, repelling by default).

    Args:
        key: of the random misalignment.
        delta: `[S, S, 3]`.
        weight: multiplier of the DSSIM penalty.
        variables: of each surrogate's module.
        face: without batch axis.
        reference: of the canvas.
        surrogates: static.
        config: options.

    Returns:
        loss = weight * dssim / budget - gain, score = -gain within the budget and inf outside,
        metrics `dssim`, `gain` and `distances` `[number of surrogates]`.
    """
    cloaked = face.image + delta
    similarity = ssim.ssim_map(cloaked, reference)
    dssim = jnp.maximum(*(ssim.box_dssim(similarity, box) for box in face.boxes))
    distances, gain = [], 0.0
    for surrogate, params, view in zip(surrogates, variables, face.views, strict=True):
        transform = view.transform
        if config.align_jitter > 0:
            side = surrogate.extractor.input_px
            transform = align.jitter_transform(key, transform, side, spread=config.align_jitter)
        embedding = _embed(surrogate, params, cloaked, transform)
        scale = 1 / (surrogate.extractor.threshold * len(surrogates))
        away = zoo.distance(embedding, view.own)
        left = zoo.distance(embedding, view.target)
        distances.append(away)
        gain += config.repel_weight * away * scale
        gain -= config.attract_weight * face.has_target * left * scale
    loss = weight * dssim / config.dssim_budget - gain
    score = jnp.where(dssim <= config.dssim_budget, -gain, jnp.inf)
    metrics = {"dssim": dssim, "gain": gain, "distances": jnp.stack(distances)}
    return loop.Evaluation(loss, score, metrics)


def project(delta: jax.Array, face: Face) -> jax.Array:
    """The nearest allowed change: grey where asked, within the pixel limits and the image box."""
    delta = jnp.where(face.grey > 0, projections.grey(delta), delta)
    delta = projections.linf_box(delta, face.limit[..., None])
    return projections.image_box(delta, face.image)


def step(config: FawkesConfig) -> optax.GradientTransformation:
    """Adam with a cosine schedule."""
    schedule = optax.cosine_decay_schedule(
        config.learning_rate, max(config.num_steps, 1), alpha=0.1
    )
    return optax.adam(schedule, b1=0.9, b2=0.99)


def _problem(variables, face, reference, surrogates, config) -> loop.Problem:
    def loss_fn(delta, weight, key):
        return evaluate(
            key, delta, weight, variables, face, reference, surrogates=surrogates, config=config
        )

    return loop.Problem(
        loss_fn=loss_fn,
        tx=step(config),
        project_fn=lambda delta: project(delta, face),
        # Aims a little below the budget, so that the iterates around it are kept.
        control=controls.hold_below("dssim", 0.97 * config.dssim_budget, start=0.5, rate=0.2),
    )


@functools.partial(jax.jit, static_argnames="surrogates")
def _embed_batch(variables, canvases, transforms, surrogates):
    """Embeddings `[B, D]` of canvases `[B, S, S, 3]` by each surrogate."""
    return tuple(
        jax.vmap(functools.partial(_embed, surrogate, params))(canvases, transform)
        for surrogate, params, transform in zip(surrogates, variables, transforms, strict=True)
    )


@jax.jit
def _references(images):
    return jax.vmap(ssim.ssim_reference)(images)


@functools.partial(jax.jit, static_argnames="config")
def _start(keys, faces, config):
    def one(key, face):
        shape = face.image.shape
        noise = jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * config.start_noise
        return loop.start(_problem((), face, (), (), config), noise)

    return jax.vmap(one)(keys, faces)


@functools.partial(
    jax.jit, static_argnames=("surrogates", "config", "num_steps"), donate_argnames="state"
)
def _advance(keys, variables, faces, references, state, surrogates, config, *, num_steps):
    def one(key, face, reference, state):
        problem = _problem(variables, face, reference, surrogates, config)
        return loop.advance(key, problem, state, num_steps=num_steps)

    return jax.vmap(one)(keys, faces, references, state)


def _embed(surrogate, params, image, transform):
    """Embedding `[D]` of one canvas."""
    side = surrogate.extractor.input_px
    chip = align.warp(image, transform, size=side, pool=surrogate.pool)
    return zoo.embed(surrogate.extractor, params, chip[None])[0]
