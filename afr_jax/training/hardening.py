"""Hardening: fine-tuning an extractor so that small perturbations move its embeddings little.

No labels are needed: the target of a chip x is the embedding e = F0(x) that the frozen original
gives it. A step looks for a perturbation delta within a ball in the largest norm that takes
F(x + delta) far from e (projected gradient descent, Madry et al. 2018), then descends

    mean |F(x + delta) - e|^2 + clean_weight * mean |F(x) - e|^2

in units of the extractor's threshold, squared. The first term is that of Schlarmann, Singh, Croce
and Hein 2024, "Robust CLIP". Where perturbed chips are given (cloaks), they take the place of the
search: F learns to see through them, as the adaptive trackers of Radiya-Dixit et al. 2022, "Data
Poisoning Won't Save You", do.

Networks run in inference mode throughout: statistics of BatchNorm stay those of the original, its
scales and biases are trained like all parameters.

A step is a few compiled calls: `harden_batch` and `climb`, which `worst_case` drives, one call for
each step of the search on CPU (`perturb.stepping`). Its randomness is `fold_in(key, step)` and its
rows are a function of its number, so a run can be cut at any step.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from afr_jax.core import images as image_ops
from afr_jax.core import parallel
from afr_jax.data import augmentation as data_augmentation
from afr_jax.data import sampling
from afr_jax.models.extractors import registry
from afr_jax.models.weights import conversion
from afr_jax.perturb import loop, sign_descent, stepping
from afr_jax.training import optimizers, trainer


@dataclasses.dataclass(frozen=True)
class Attack:
    """A search for the worst perturbation of a chip.

    Attributes:
        limit: largest absolute value, in [0, 1] units.
        num_steps: signed gradient steps, from a random start in the ball.
        step_size: of a step; by default 2.5 * limit / num_steps, so that the boundary can be
            reached from anywhere.
    """

    limit: float = 4 / 255
    num_steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not 0 < self.limit <= 1 or self.num_steps < 1:
            raise ValueError(
                f"limit is {self.limit} and num_steps {self.num_steps}, but they must lie in "
                "(0, 1] and be at least 1"
            )
        if self.step_size is not None and self.step_size <= 0:
            raise ValueError(f"step_size is {self.step_size}, but must be above 0")

    @property
    def step(self) -> float:
        """The size of a step."""
        return self.step_size or 2.5 * self.limit / self.num_steps


@dataclasses.dataclass(frozen=True)
class HardeningRecipe:
    """All of a run that is not an array; hashable, static under jit.

    Attributes:
        extractor: what is hardened; its threshold is the unit of distances.
        optimizer: how parameters move.
        attack: the search of each step; not used where perturbed chips are given.
        clean_weight: of the clean term; without it a step costs a pass less.
        augmentation: of chips; a chip and its perturbed version are changed alike.
        bfloat16: compute in bfloat16; parameters, statistics, perturbations and the embeddings of
            the original stay float32.
    """

    extractor: registry.Extractor
    optimizer: optimizers.OptimizerOptions
    attack: Attack = Attack()
    clean_weight: float = 1.0
    augmentation: data_augmentation.Augmentation = data_augmentation.Augmentation()
    bfloat16: bool = False

    def __post_init__(self) -> None:
        """Checks the weight, and that there is a threshold."""
        if self.clean_weight < 0:
            raise ValueError(f"clean_weight is {self.clean_weight}, but must be at least 0")
        self.extractor.threshold  # noqa: B018


class HardeningState(NamedTuple):
    """A run between two steps: steps taken (int32 scalar), parameters, state of the optimizer."""

    step: jax.Array
    params: conversion.Variables
    opt_state: optax.OptState


class HardeningBatch(NamedTuple):
    """Chips of a step: images and perturbations `[B, S, S, 3]`, anchors `[B, D]` of the original.

    Images are float in [0, 1]; a perturbed image lies there, too, once it is clipped.
    """

    images: jax.Array
    delta: jax.Array
    anchors: jax.Array


class HardeningMetrics(NamedTuple):
    """Of a step, before it moved: scalars, or stacked `[steps]`.

    Attributes:
        loss: that is descended.
        shift: mean distance of perturbed chips from the anchors, in thresholds.
        clean_shift: of clean chips; NaN where they have no weight.
        gradient_norm: before clipping.
    """

    loss: jax.Array
    shift: jax.Array
    clean_shift: jax.Array
    gradient_norm: jax.Array


def init_state(
    variables: conversion.Variables, recipe: HardeningRecipe, *, mesh: parallel.Mesh
) -> HardeningState:
    """A state before the first step, a copy on each device.

    Args:
        variables: of the original.
        recipe: the run.
        mesh: of the run.
    """
    # A copy: the state is donated, and the original stays in use.
    params = jax.tree.map(jnp.array, variables["params"])
    opt_state = optimizers.make_optimizer(recipe.optimizer).init(params)
    return parallel.replicate(HardeningState(jnp.zeros((), jnp.int32), params, opt_state), mesh)


def with_params(
    variables: conversion.Variables, params: conversion.Variables
) -> conversion.Variables:
    """Variables with other parameters and the same statistics."""
    return {**variables, "params": params}


def embed(
    variables: conversion.Variables,
    images: jax.Array,
    *,
    extractor: registry.Extractor,
    bfloat16: bool = False,
) -> jax.Array:
    """`registry.embed`, in bfloat16 if asked for.

    Parameters and inputs are then rounded to it, statistics of BatchNorm are not; layers that ask
    for float32 get it.

    Args:
        variables: of the extractor's module.
        images: `[B, S, S, 3]` float in [0, 1].
        extractor: whose.
        bfloat16: see above.

    Returns:
        `[B, D]` float32.
    """
    if not bfloat16:
        return registry.embed(extractor, variables, images)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["params"])
    embeddings = registry.embed(
        extractor, with_params(variables, half), images.astype(jnp.bfloat16)
    )
    return embeddings.astype(jnp.float32)


def worst_case(
    key: jax.Array,
    variables: conversion.Variables,
    images: jax.Array,
    anchors: jax.Array,
    *,
    extractor: registry.Extractor,
    attack: Attack,
    directions: jax.Array | None = None,
    bfloat16: bool = False,
    chunk: int | None = None,
) -> jax.Array:
    """Perturbations that take embeddings far from anchors, or near; called from the host.

    Args:
        key: of the random starts: one of all images, or `[B]`, one of each.
        variables: of the extractor under attack.
        images: `[B, S, S, 3]` float in [0, 1], placed by `parallel.shard_batch` or the like.
        anchors: `[B, D]` float32.
        extractor: under attack.
        attack: the search.
        directions: `[B]` float32, 1 for away from the anchor and -1 for towards it; None is away.
        bfloat16: see `embed`.
        chunk: steps of one call; by default those of `stepping.chunk_length`.

    Returns:
        `[B, S, S, 3]`, within the ball; images + delta is to be clipped to [0, 1].
    """
    chex.assert_rank([images, anchors], [4, 2])
    chex.assert_equal_shape_prefix([images, anchors], 1)
    state = _start(key, images, attack=attack)
    if directions is None:
        directions = jnp.ones_like(anchors[:, 0])
    length = chunk or stepping.chunk_length()

    def advance(state: loop.State, steps: range) -> tuple[loop.State, None]:
        state = climb(
            variables,
            state,
            images,
            anchors,
            directions,
            np.int32(len(steps)),
            extractor=extractor,
            attack=attack,
            bfloat16=bfloat16,
            length=length,
        )
        return state, None

    state, _ = stepping.drive(advance, state, steps=range(attack.num_steps), length=length)
    return loop.best(state).delta


@functools.partial(
    jax.jit,
    static_argnames=("extractor", "attack", "bfloat16", "length"),
    donate_argnames="state",
)
def climb(
    variables: conversion.Variables,
    state: loop.State,
    images: jax.Array,
    anchors: jax.Array,
    directions: jax.Array,
    count: jax.Array | int,
    *,
    extractor: registry.Extractor,
    attack: Attack,
    bfloat16: bool,
    length: int,
) -> loop.State:
    """Some steps of the search of `worst_case`, in one call.

    The only gradient is that with respect to the perturbation. The loss is a sum over images and
    steps are signs, so images do not influence each other.

    Args:
        variables: of the extractor under attack.
        state: of the search, donated.
        images: see `worst_case`, as the others.
        anchors: there.
        directions: there.
        count: how many of the steps are taken, as of `stepping.take`.
        extractor: see `worst_case`, as the others.
        attack: there.
        bfloat16: there.
        length: of a chunk of steps.
    """

    def loss_fn(delta: jax.Array, key: jax.Array) -> jax.Array:
        del key
        seen = sign_descent.seen(images, delta)
        embeddings = embed(variables, seen, extractor=extractor, bfloat16=bfloat16)
        return -jnp.sum(directions * jnp.sum((embeddings - anchors) ** 2, axis=-1))

    problem = sign_descent.problem(loss_fn, limit=attack.limit, step_size=attack.step)
    # The search draws nothing behind its start.
    return loop.advance(jax.random.key(0), problem, state, num_steps=length, count=count)[0]


@functools.partial(jax.jit, static_argnames="attack")
def _start(key: jax.Array, images: jax.Array, *, attack: Attack) -> loop.State:
    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(key, shape, images.dtype, -attack.limit, attack.limit)

    if key.ndim:
        delta = jax.vmap(lambda one: draw(one, images.shape[1:]))(key)
    else:
        delta = draw(key, images.shape)
    return loop.start(sign_descent.rules(limit=attack.limit, step_size=attack.step), delta)


@functools.partial(jax.jit, static_argnames="recipe")
def draw_batch(
    key: jax.Array,
    original: conversion.Variables,
    chips: jax.Array,
    rows: jax.Array,
    *,
    recipe: HardeningRecipe,
) -> HardeningBatch:
    """The chips of a step, augmented, with the embeddings of the original.

    Args:
        key: of the step.
        original: variables of the frozen original.
        chips: `[N, V, S, S, 3]` uint8; of each the clean one and V - 1 perturbed versions.
        rows: `[B]` int32 of N * max(V - 1, 1) examples, each a chip with one of its versions.
        recipe: the run.

    Returns:
        The batch; delta is zero where V is 1.
    """
    versions = max(chips.shape[1] - 1, 1)
    chosen = jnp.take(chips, rows // versions, axis=0, mode="clip")
    # One key an image, the same for its two versions.
    options = recipe.augmentation
    change = functools.partial(data_augmentation.augment_batch, key, options=options)
    images = change(image_ops.to_float(chosen[:, 0]))
    anchors = registry.embed(recipe.extractor, original, images)
    if chips.shape[1] == 1:
        return HardeningBatch(images, jnp.zeros_like(images), anchors)
    version = jnp.broadcast_to(
        (1 + rows % versions)[:, None, None, None, None], chosen[:, :1].shape
    )
    perturbed = jnp.take_along_axis(chosen, version, axis=1)[:, 0]
    return HardeningBatch(images, change(image_ops.to_float(perturbed)) - images, anchors)


@functools.partial(jax.jit, static_argnames=("recipe", "mesh"), donate_argnames="state")
def harden_batch(
    state: HardeningState,
    original: conversion.Variables,
    batch: HardeningBatch,
    *,
    recipe: HardeningRecipe,
    mesh: parallel.Mesh,
) -> tuple[HardeningState, HardeningMetrics]:
    """One optimizer step on one batch with its perturbations.

    Args:
        state: donated.
        original: variables of the frozen original, for the statistics.
        batch: of the step.
        recipe: the run.
        mesh: of the run; the state stays a whole copy on each device.

    Returns:
        The state after it, and what was measured before it.
    """
    unit = recipe.extractor.threshold
    attacked = jnp.clip(batch.images + batch.delta, 0.0, 1.0)

    def squares(params: conversion.Variables, images: jax.Array) -> jax.Array:
        variables = with_params(original, params)
        embeddings = embed(variables, images, extractor=recipe.extractor, bfloat16=recipe.bfloat16)
        return jnp.sum((embeddings - batch.anchors) ** 2, axis=-1) / unit**2

    def loss_fn(params: conversion.Variables) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        perturbed = squares(params, attacked)
        loss, clean_shift = jnp.mean(perturbed), jnp.array(jnp.nan)
        if recipe.clean_weight:
            clean = squares(params, batch.images)
            loss = loss + recipe.clean_weight * jnp.mean(clean)
            clean_shift = jnp.mean(jnp.sqrt(jax.lax.stop_gradient(clean)))
        return loss, (jnp.mean(jnp.sqrt(jax.lax.stop_gradient(perturbed))), clean_shift)

    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (shift, clean_shift)), gradient = value_and_grad(state.params)
    params, opt_state = optimizers.step(
        gradient, state.opt_state, state.params, options=recipe.optimizer
    )
    after = HardeningState(state.step + 1, params, opt_state)
    after = jax.lax.with_sharding_constraint(after, parallel.replicated(mesh))
    return after, HardeningMetrics(loss, shift, clean_shift, optax.tree.norm(gradient))


def run_steps(
    key: jax.Array,
    state: HardeningState,
    original: conversion.Variables,
    chips: jax.Array,
    *,
    recipe: HardeningRecipe,
    mesh: parallel.Mesh,
    batches: sampling.Batches,
    num_steps: int,
    report_fn: Callable[[int], None] | None = None,
) -> tuple[HardeningState, HardeningMetrics]:
    """Takes steps from the host; metrics are fetched once, at the end.

    Args:
        key: of the whole run.
        state: donated; its step says which batches come.
        original: variables of the frozen original, from `parallel.replicate`.
        chips: see `draw_batch`; from `parallel.replicate`. With versions there is no search.
        recipe: the run.
        mesh: of the run.
        batches: rows of each step.
        num_steps: to take, at least 1.
        report_fn: called after each step with 1 (progress).

    Returns:
        The state after them, and the metrics of each, `[num_steps]`, NumPy.

    Raises:
        FloatingPointError: a loss was not finite.
        ValueError: a batch cannot be split over the devices.
    """
    first = int(state.step)

    def advance(state: HardeningState, steps: range) -> tuple[HardeningState, HardeningMetrics]:
        rows = trainer.local_rows(batches.rows(steps.start), mesh)
        rows = parallel.shard_batch(rows, mesh)
        change_key, start_key = jax.random.split(jax.random.fold_in(key, steps.start))
        batch = draw_batch(change_key, original, chips, rows, recipe=recipe)
        if chips.shape[1] == 1:
            delta = worst_case(
                start_key,
                with_params(original, state.params),
                batch.images,
                batch.anchors,
                extractor=recipe.extractor,
                attack=recipe.attack,
                bfloat16=recipe.bfloat16,
            )
            batch = batch._replace(delta=delta)
        return harden_batch(state, original, batch, recipe=recipe, mesh=mesh)

    # A step is a few programs of its own, the search for a perturbation among them.
    state, metrics = stepping.drive(
        advance, state, steps=range(first, first + num_steps), length=1, report_fn=report_fn
    )
    trainer.check_losses(metrics.loss, first_step=first)
    return state, metrics
