"""Stage 3 of face recognition: training a feature extractor, or any image classifier.

The pieces are pure functions over a `TrainState`; what never changes in a run is a `Recipe`, which
is hashable and static under jit. A data set of bytes lies on the device (`place_data`); a call
(`train_chunk`) takes steps on rows of it, with augmentation, BatchNorm over the whole batch of all
devices and donated state, and without a way back to the host. `run_steps` drives the calls: one
step each on CPU, many on accelerators. A step's randomness is `fold_in(key, step)` and its rows are
a function of its number (`afr_jax.data.sampling`), so a run can be cut at any step.

A typical run:

    mesh = parallel.make_mesh()
    data = trainer.place_data(images, labels, mesh)           # [N, H, W, 3] uint8, [N]
    state = trainer.init_state(key, recipe, image_shape=images.shape[1:], mesh=mesh)
    state, metrics = trainer.run_steps(
        key, state, data, recipe=recipe, mesh=mesh, batches=batches, num_steps=100
    )
    measured = scores.evaluate(state, data, recipe=recipe, mesh=mesh)

Images are float RGB in [0, 1] or uint8; what the network itself wants is `Recipe.input_scale` and
`input_offset`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from afr_jax.core import images as image_ops
from afr_jax.core import parallel
from afr_jax.data import augmentation as data_augmentation
from afr_jax.data import sampling
from afr_jax.models import heads
from afr_jax.models.weights import conversion
from afr_jax.perturb import stepping
from afr_jax.training import optimizers


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All of a training run that is not an array; hashable, static under jit.

    Attributes:
        net: linen module, images `[B, H, W, 3]` and `train: bool` to embeddings `[B, D]` (or
            logits). BatchNorm statistics are in "batch_stats"; it may draw from "dropout".
        head: of `afr_jax.models.heads`.
        optimizer: how parameters move.
        augmentation: of training images.
        input_scale: the network sees input_scale * x + input_offset for x in [0, 1].
        input_offset: see `input_scale`.
    """

    net: nn.Module
    head: nn.Module
    optimizer: optimizers.OptimizerOptions
    augmentation: data_augmentation.Augmentation = data_augmentation.Augmentation()
    input_scale: float = 1.0
    input_offset: float = 0.0


class TrainState(NamedTuple):
    """A run between two steps.

    Attributes:
        step: int32 scalar, steps taken.
        params: {"net": ..., "head": ...}.
        batch_stats: of the network; {} where it has none.
        opt_state: of the optimizer.
    """

    step: jax.Array
    params: conversion.Variables
    batch_stats: conversion.Variables
    opt_state: optax.OptState


class Metrics(NamedTuple):
    """Of a step, scalars, or stacked `[steps]`: mean loss, accuracy, norm before clipping, rate."""

    loss: jax.Array
    accuracy: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array


class Data(NamedTuple):
    """A data set on the device: images `[N, H, W, 3]` uint8 or float in [0, 1], labels `[N]`."""

    images: jax.Array
    labels: jax.Array


def init_state(
    key: jax.Array,
    recipe: Recipe,
    *,
    image_shape: tuple[int, ...],
    mesh: parallel.Mesh | None = None,
) -> TrainState:
    """A state before the first step.

    Args:
        key: of the initial parameters; the same key may serve as the key of the steps.
        recipe: the run.
        image_shape: (H, W, 3).
        mesh: where to place copies of it; None leaves it on the default device.
    """
    state: TrainState = _init_state(key, recipe, tuple(image_shape))
    return state if mesh is None else parallel.replicate(state, mesh)


def place_data(images: np.ndarray, labels: np.ndarray, mesh: parallel.Mesh) -> Data:
    """Copies a data set to every device.

    Args:
        images: `[N, H, W, 3]` uint8, or float in [0, 1].
        labels: `[N]` int.
        mesh: of the run.
    """
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    return Data(
        parallel.replicate(np.asarray(images), mesh),
        parallel.replicate(np.asarray(labels, np.int32), mesh),
    )


def forward(
    params: conversion.Variables,
    batch_stats: conversion.Variables,
    images: jax.Array,
    *,
    recipe: Recipe,
    train: bool = False,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, conversion.Variables]:
    """Embeddings (or logits) of the network, without the head.

    Args:
        params: of a state.
        batch_stats: of a state.
        images: `[B, H, W, 3]` uint8, or float in [0, 1].
        recipe: the run.
        train: statistics of the batch and dropout, or the running ones and none.
        dropout_key: with `train`, for networks that draw.

    Returns:
        `[B, D]` float32, and the running statistics, moved with `train`.
    """
    images = image_ops.to_float(images) if images.dtype == jnp.uint8 else images
    inputs = images * recipe.input_scale + recipe.input_offset
    variables = {"params": params["net"], "batch_stats": batch_stats}
    if not train:
        return cast(jax.Array, recipe.net.apply(variables, inputs, train=False)), batch_stats
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    found = recipe.net.apply(variables, inputs, train=True, mutable=["batch_stats"], rngs=rngs)
    outputs, moved = cast(tuple[jax.Array, conversion.Variables], found)
    return outputs, moved.get("batch_stats", batch_stats)


def train_step(
    key: jax.Array, state: TrainState, images: jax.Array, labels: jax.Array, *, recipe: Recipe
) -> tuple[TrainState, Metrics]:
    """One step on one batch; to be traced (`train_chunk` is the compiled entry).

    Args:
        key: of the whole run, the same for every step.
        state: between two steps.
        images: `[B, H, W, 3]` uint8, or float in [0, 1]; augmented here as the recipe says.
        labels: `[B]` int32.
        recipe: the run.

    Returns:
        The state after it, and what was measured before it.
    """
    chex.assert_rank([images, labels], [4, 1])
    chex.assert_equal_shape_prefix([images, labels], 1)
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    images = image_ops.to_float(images) if images.dtype == jnp.uint8 else images
    images = data_augmentation.augment_batch(augment_key, images, options=recipe.augmentation)

    def loss_fn(
        params: conversion.Variables,
    ) -> tuple[jax.Array, tuple[jax.Array, conversion.Variables]]:
        outputs, batch_stats = forward(
            params,
            state.batch_stats,
            images,
            recipe=recipe,
            train=True,
            dropout_key=dropout_key,
        )
        judged = heads.judge(recipe.head, params["head"], outputs, labels)
        return jnp.mean(judged.losses), (judged.correct, batch_stats)

    (loss, (correct, batch_stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params
    )
    metrics = Metrics(
        loss=loss,
        accuracy=jnp.mean(correct.astype(jnp.float32)),
        gradient_norm=optax.tree.norm(gradient),
        learning_rate=jnp.asarray(
            optimizers.learning_rate_fn(recipe.optimizer)(state.step), jnp.float32
        ),
    )
    return apply_gradient(state, gradient, batch_stats, recipe=recipe), metrics


def apply_gradient(
    state: TrainState,
    gradient: conversion.Variables,
    batch_stats: conversion.Variables,
    *,
    recipe: Recipe,
) -> TrainState:
    """Moves the parameters of a state by a gradient of its `params`; for losses of one's own.

    Args:
        state: between two steps.
        gradient: like `state.params`.
        batch_stats: new running statistics.
        recipe: the run.
    """
    params, opt_state = optimizers.step(
        gradient, state.opt_state, state.params, options=recipe.optimizer
    )
    return TrainState(state.step + 1, params, batch_stats, opt_state)


@functools.partial(jax.jit, static_argnames=("recipe", "mesh"), donate_argnames="state")
def train_chunk(
    key: jax.Array,
    state: TrainState,
    data: Data,
    rows: jax.Array,
    count: jax.Array | int,
    *,
    recipe: Recipe,
    mesh: parallel.Mesh,
) -> tuple[TrainState, Metrics]:
    """Takes some steps in one call.

    Args:
        key: of the whole run.
        state: donated.
        data: on the devices.
        rows: from `place_rows`, `[B, length]` int32.
        count: how many of the steps are taken, as of `stepping.take`.
        recipe: the run.
        mesh: of the run; the state stays a whole copy on each device.

    Returns:
        The state after them, and the metrics of each, `[length]`.
    """

    def one(state: TrainState, row: jax.Array) -> tuple[TrainState, Metrics]:
        images, labels = (jnp.take(leaf, row, axis=0, mode="clip") for leaf in data)
        state, metrics = train_step(key, state, images, labels, recipe=recipe)
        return jax.lax.with_sharding_constraint(state, parallel.replicated(mesh)), metrics

    return stepping.take(one, state, rows.T, length=rows.shape[1], count=count)


def run_steps(
    key: jax.Array,
    state: TrainState,
    data: Data,
    *,
    recipe: Recipe,
    mesh: parallel.Mesh,
    batches: sampling.Batches,
    num_steps: int,
    chunk: int | None = None,
    report_fn: Callable[[int], None] | None = None,
) -> tuple[TrainState, Metrics]:
    """Takes steps from the host, in calls of `train_chunk`; metrics are fetched once, at the end.

    Args:
        key: of the whole run.
        state: donated; its step says which batches come.
        data: from `place_data`.
        recipe: the run.
        mesh: of the run.
        batches: rows of each step.
        num_steps: to take, at least 1.
        chunk: steps of one call; by default 1 on CPU and 50 elsewhere. The result depends on it by
            rounding alone.
        report_fn: called after each call with the number of its steps (progress).

    Returns:
        The state after them, and the metrics of each, `[num_steps]`, NumPy.

    Raises:
        FloatingPointError: a loss was not finite.
        ValueError: a batch cannot be split over the devices.
    """
    first, length = int(state.step), chunk or stepping.chunk_length()

    def advance(state: TrainState, steps: range) -> tuple[TrainState, Metrics]:
        rows = place_rows(batches, steps, mesh, length=length)
        return train_chunk(key, state, data, rows, np.int32(len(steps)), recipe=recipe, mesh=mesh)

    state, metrics = stepping.drive(
        advance, state, steps=range(first, first + num_steps), length=length, report_fn=report_fn
    )
    check_losses(metrics.loss, first_step=first)
    return state, metrics


def place_rows(
    batches: sampling.Batches, steps: range, mesh: parallel.Mesh, *, length: int
) -> jax.Array:
    """The rows of the steps of a chunk, on the devices.

    Args:
        batches: rows of each step.
        steps: of the chunk, at least one.
        mesh: of the run.
        length: of a chunk; behind the last step its rows are repeated.

    Returns:
        `[B, length]` int32, split over the devices by B.

    Raises:
        ValueError: a batch cannot be split over the devices.
    """
    rows = np.stack([local_rows(batches.rows(step), mesh) for step in steps], axis=1)
    rows = np.pad(rows, ((0, 0), (0, length - len(steps))), mode="edge")
    return parallel.shard_batch(rows, mesh)


def local_rows(rows: np.ndarray, mesh: parallel.Mesh) -> np.ndarray:
    """This process's share of the rows `[B]` of a step.

    Raises:
        ValueError: B cannot be split over the devices.
    """
    if len(rows) % mesh.devices.size:
        raise ValueError(
            f"a batch of {len(rows)} cannot be split evenly over {mesh.devices.size} devices"
        )
    return sampling.local_rows(rows)


def check_losses(losses: np.ndarray, *, first_step: int) -> None:
    """Checks that training has not diverged.

    Args:
        losses: `[steps]`.
        first_step: number of the first of them, for the message.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    if not np.isfinite(losses).all():
        at = int(np.argmin(np.isfinite(losses)))
        raise FloatingPointError(f"the loss of step {first_step + at} is {losses[at]}")


@functools.partial(jax.jit, static_argnames=("recipe", "image_shape"))
def _init_state(key: jax.Array, recipe: Recipe, image_shape: tuple[int, ...]) -> TrainState:
    net_key, head_key = jax.random.split(key)
    # Two examples: some BatchNorm implementations divide by the number less one.
    images = jnp.zeros((2, *image_shape), jnp.float32)
    variables: conversion.Variables = recipe.net.init(net_key, images, train=False)
    # The head's parameters depend on the shape alone; running the network on constants here would
    # be worked out by the compiler, slowly.
    outputs = jax.eval_shape(lambda v: recipe.net.apply(v, images, train=False), variables)
    outputs = jnp.zeros(outputs.shape, outputs.dtype)
    head = recipe.head.init(head_key, outputs, jnp.zeros(2, jnp.int32))
    params = {"net": variables["params"], "head": head.get("params", {})}
    opt_state = optimizers.make_optimizer(recipe.optimizer).init(params)
    batch_stats = variables.get("batch_stats", {})
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, opt_state)
