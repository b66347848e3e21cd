"""The compiled pieces of the noise search: steps on a batch of noise, steps of the source network.

What they make together, and from where, is in `noise_search`. Data sets are `trainer.Data`, images
uint8; noise is float32 in [0, 1] units, `[N, H, W, 3]` by image or `[K, H, W, 3]` by class; theta
is the pair (params, batch_stats) of a source network.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from afr_jax.core import images as image_ops
from afr_jax.core import parallel
from afr_jax.data import augmentation
from afr_jax.perturb import loop, sign_descent
from afr_jax.training import trainer


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """How noise is searched; see `unlearnable.published` for the values of the papers.

    Attributes:
        granularity: one noise an image, or one a class.
        ascend: raise the loss instead of lowering it.
        permuted: towards the label of another class (a fixed permutation) instead of the own one.
        epsilon_levels: largest absolute value of the noise, gray levels.
        step_levels: of a signed step, gray levels.
        num_steps: T, signed steps of one pass.
        source_steps: optimiser steps of theta on clean images before the first round.
        train_steps: M, optimiser steps of theta on noisy images in each round.
        class_share: share of the images that a pass of class-wise noise looks at.
        batch_size: of both kinds of steps.
        max_rounds: at most so many rounds.
        stop_error: rounds end once the training error is below it (above it with `ascend`); None
            uses them all. With `permuted` the error is that of the other labels.
        views: random crops and flips of an image that a step averages over; 0 for the image itself.
        adversary_levels: radius of the inner adversary, gray levels; 0 for none.
        adversary_step_levels: its step size.
        adversary_steps: its steps.
    """

    granularity: Literal["sample", "class"] = "sample"
    ascend: bool = False
    permuted: bool = False
    epsilon_levels: float = 8.0
    step_levels: float = 0.8
    num_steps: int = 20
    source_steps: int = 0
    train_steps: int = 10
    class_share: float = 1.0
    batch_size: int = 512
    max_rounds: int = 20
    stop_error: float | None = 0.01
    views: int = 0
    adversary_levels: float = 0.0
    adversary_step_levels: float = 0.8
    adversary_steps: int = 10

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        if self.granularity not in ("sample", "class"):
            raise ValueError(f"granularity is {self.granularity!r}, must be 'sample' or 'class'")
        if not 0 < self.epsilon_levels <= 255 or self.step_levels <= 0:
            raise ValueError(
                f"epsilon_levels is {self.epsilon_levels} and step_levels {self.step_levels}, but "
                "they must lie in (0, 255] and above 0"
            )
        if min(self.num_steps, self.batch_size, self.max_rounds) < 1:
            raise ValueError("num_steps, batch_size and max_rounds must be at least 1")
        if min(self.source_steps, self.train_steps, self.views, self.adversary_levels) < 0:
            raise ValueError("source_steps, train_steps, views, adversary_levels: from 0 on")
        if not 0 < self.class_share <= 1:
            raise ValueError(f"class_share is {self.class_share}, but must lie in (0, 1]")


class Batch(NamedTuple):
    """Noise at work, of each image of a batch.

    Attributes:
        images: `[B, H, W, 3]` float in [0, 1].
        labels: `[B]` int32.
        targets: `[B]` int32, labels that the loss is taken of.
        mask: `[B]` bool, False for rows that only fill the batch up.
        deltas: `[B, H, W, 3]` float.
    """

    images: jax.Array
    labels: jax.Array
    targets: jax.Array
    mask: jax.Array
    deltas: jax.Array


@functools.partial(jax.jit, static_argnames=("recipe", "options", "mesh"), donate_argnames="noise")
def refine_batches(
    key: jax.Array,
    theta: tuple,
    data: trainer.Data,
    noise: jax.Array,
    rows: jax.Array,
    target_of: jax.Array,
    *,
    recipe: trainer.Recipe,
    options: SearchOptions,
    mesh: parallel.Mesh,
) -> jax.Array:
    """All signed steps of some batches, one batch after another, in one call.

    Args:
        key: of the pass.
        theta: source network.
        data: on the devices.
        noise: donated.
        rows: `[B, S]` int32 of S batches, split over the devices by B; N and above for no image.
        target_of: `[K]` int32, target of each class.
        recipe: source network.
        options: of the search.
        mesh: of the run.

    Returns:
        The noise after them.
    """

    def one(noise, row):
        work = start_batch(data, noise, row, target_of, options=options)
        work = advance_batch(
            key,
            theta,
            work,
            jnp.zeros((), jnp.int32),
            recipe=recipe,
            options=options,
            num_steps=options.num_steps,
        )
        return store_batch(noise, work, row, options=options, mesh=mesh), None

    return jax.lax.scan(one, noise, rows.T)[0]


@functools.partial(jax.jit, static_argnames="options")
def start_batch(
    data: trainer.Data,
    noise: jax.Array,
    rows: jax.Array,
    target_of: jax.Array,
    *,
    options: SearchOptions,
) -> Batch:
    """Looks up the images of `rows` `[B]` and their noise."""
    mask = rows < len(data.labels)
    images, labels = (jnp.take(leaf, rows, axis=0, mode="clip") for leaf in data)
    deltas = _noise_of(noise, rows, labels, options)
    return Batch(image_ops.to_float(images), labels, target_of[labels], mask, deltas)


@functools.partial(
    jax.jit, static_argnames=("recipe", "options", "num_steps"), donate_argnames="work"
)
def advance_batch(
    key: jax.Array,
    theta: tuple,
    work: Batch,
    first_step: jax.Array,
    *,
    recipe: trainer.Recipe,
    options: SearchOptions,
    num_steps: int = 1,
) -> Batch:
    """Takes signed steps; a pass can be cut between any two, since a step has its own key.

    Args:
        key: of the pass.
        theta: source network.
        work: donated.
        first_step: int32 scalar, number of the first of these steps.
        recipe: source network.
        options: of the search.
        num_steps: to take.
    """
    direction = -1.0 if options.ascend else 1.0

    def loss_fn(delta, key):
        shown = sign_descent.seen(work.images, delta)
        if not options.views:
            return direction * _summed_loss(theta, shown, work.targets, recipe)
        total = 0.0
        for view_key in jax.random.split(key, options.views):
            view = _robust_view(view_key, theta, shown, work.targets, direction, recipe, options)
            total += direction * _summed_loss(theta, view, work.targets, recipe)
        return total / options.views

    problem = sign_descent.problem(
        loss_fn, limit=options.epsilon_levels / 255, step_size=options.step_levels / 255
    )
    state = loop.start(problem, work.deltas)._replace(step=jnp.asarray(first_step, jnp.int32))
    state, _ = loop.advance(key, problem, state, num_steps=num_steps)
    return work._replace(deltas=state.delta)


@functools.partial(jax.jit, static_argnames=("options", "mesh"), donate_argnames="noise")
def store_batch(
    noise: jax.Array,
    work: Batch,
    rows: jax.Array,
    *,
    options: SearchOptions,
    mesh: parallel.Mesh,
) -> jax.Array:
    """The noise (donated) after a batch; `rows` `[B]` as in `start_batch`."""
    if options.granularity == "sample":
        noise = noise.at[rows].set(work.deltas, mode="drop")
    else:
        limit = options.epsilon_levels / 255
        noise = class_means(noise, work.deltas, work.labels, work.mask, limit=limit)
    return jax.lax.with_sharding_constraint(noise, parallel.replicated(mesh))


def class_means(
    noise: jax.Array, deltas: jax.Array, labels: jax.Array, mask: jax.Array, *, limit: float
) -> jax.Array:
    """Class-wise noise after a batch: the mean over a class's images, within the ball.

    Args:
        noise: `[K, H, W, 3]` before it.
        deltas: `[B, H, W, 3]` of the images.
        labels: `[B]` int32.
        mask: `[B]` bool, which images count.
        limit: largest absolute value.

    Returns:
        `[K, H, W, 3]`; classes without an image in the batch keep their noise.
    """
    weight = mask.astype(noise.dtype)
    counts = jax.ops.segment_sum(weight, labels, len(noise)).reshape(-1, 1, 1, 1)
    sums = jax.ops.segment_sum(deltas * weight.reshape(-1, 1, 1, 1), labels, len(noise))
    means = sums / jnp.maximum(counts, 1.0)
    return jnp.clip(jnp.where(counts > 0, means, noise), -limit, limit)


@functools.partial(
    jax.jit, static_argnames=("recipe", "options", "mesh", "clean"), donate_argnames="state"
)
def train_chunk(
    key: jax.Array,
    state: trainer.TrainState,
    data: trainer.Data,
    noise: jax.Array,
    rows: jax.Array,
    *,
    recipe: trainer.Recipe,
    options: SearchOptions,
    mesh: parallel.Mesh,
    clean: bool = False,
) -> trainer.TrainState:
    """Optimiser steps of the source network on images with their noise.

    Args:
        key: of the whole search.
        state: donated.
        data: on the devices.
        noise: of the data.
        rows: `[B, steps]` int32, split over the devices by B.
        recipe: source network; its augmentation is not used.
        options: of the search.
        mesh: of the run.
        clean: without noise, views and adversary.
    """
    recipe = dataclasses.replace(recipe, augmentation=augmentation.Augmentation())

    def one(state, row):
        images, labels = (jnp.take(leaf, row, axis=0, mode="clip") for leaf in data)
        images = image_ops.to_float(images)
        if not clean:
            images = jnp.clip(images + _noise_of(noise, row, labels, options), 0.0, 1.0)
        if options.views and not clean:
            view_key = jax.random.fold_in(jax.random.fold_in(key, state.step), 1)
            theta = state.params, state.batch_stats
            images = _robust_view(view_key, theta, images, labels, 1.0, recipe, options)
        state, _ = trainer.train_step(key, state, images, labels, recipe=recipe)
        return jax.lax.with_sharding_constraint(state, parallel.replicated(mesh)), None

    if rows.shape[1] == 1:
        return one(state, rows[:, 0])[0]
    return jax.lax.scan(one, state, rows.T)[0]


@functools.partial(jax.jit, static_argnames=("recipe", "options"))
def count_correct(
    theta: tuple,
    data: trainer.Data,
    noise: jax.Array,
    rows: jax.Array,
    mask: jax.Array,
    target_of: jax.Array,
    *,
    recipe: trainer.Recipe,
    options: SearchOptions,
) -> jax.Array:
    """How many noisy images of the masked rows `[B]` are taken for their targets."""
    images, labels = (jnp.take(leaf, rows, axis=0, mode="clip") for leaf in data)
    noisy = jnp.clip(image_ops.to_float(images) + _noise_of(noise, rows, labels, options), 0.0, 1.0)
    outputs, _ = trainer.forward(*theta, noisy, recipe=recipe)
    judged = recipe.head.apply({"params": theta[0]["head"]}, outputs, target_of[labels])
    return jnp.sum(judged.correct & mask)


def _robust_view(key, theta, images, labels, direction, recipe, options):
    """A random crop and flip, with the inner adversary's change on top of it (no gradient)."""
    view_key, adversary_key = jax.random.split(key)
    views = augmentation.augment_batch(view_key, images, options=augmentation.CIFAR)
    if not options.adversary_levels:
        return views
    attacked = sign_descent.adversarial(
        adversary_key,
        lambda shown: direction * _summed_loss(theta, shown, labels, recipe),
        jax.lax.stop_gradient(views),
        limit=options.adversary_levels / 255,
        step_size=options.adversary_step_levels / 255,
        num_steps=options.adversary_steps,
    )
    return views + jax.lax.stop_gradient(attacked - views)


def _summed_loss(theta, images, labels, recipe):
    """Sum of the losses with running statistics; theta is (params, batch_stats)."""
    outputs, _ = trainer.forward(*theta, images, recipe=recipe)
    judged = recipe.head.apply({"params": theta[0]["head"]}, outputs, labels)
    return jnp.sum(judged.losses)


def _noise_of(noise, rows, labels, options):
    index = rows if options.granularity == "sample" else labels
    return jnp.take(noise, index, axis=0, mode="clip")
