"""A tracker that trains its extractor on what it collected: the whole network and a linear head.

The network starts from the extractor's weights, the head from logistic regression on its
embeddings. BatchNorm keeps its running statistics: with a few photos of each person those of a
batch would say little. All extractors of the registry can be trained so.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from afr_jax.core import images, parallel
from afr_jax.evaluation.attackers import trackers
from afr_jax.models.extractors import registry
from afr_jax.models.weights import conversion
from afr_jax.training import optimizers


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How the tracker trains.

    Attributes:
        num_epochs: passes over the enrolled chips, >= 0.
        batch_size: chips of a step, >= 1.
        learning_rate: of AdamW at the start; a cosine takes it to zero.
    """

    num_epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.num_epochs < 0 or self.batch_size < 1 or not self.learning_rate > 0:
            raise ValueError(f"{self}: epochs from 0, batches from 1, a rate above 0")


def train(
    extractor: registry.Extractor,
    variables: conversion.Variables,
    chips: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    options: TrainingOptions = TrainingOptions(),
    seed: int = 0,
    report_fn: Callable[[int], None] | None = None,
    mesh: parallel.Mesh | None = None,
    backend: parallel.Backend = "jit",
) -> Callable[[np.ndarray], np.ndarray]:
    """Trains an extractor and a head to tell people apart.

    Args:
        extractor: its conventions.
        variables: where its network starts.
        chips: `[N, S, S, 3]` uint8, aligned for it.
        labels: `[N]` int in [0, num_classes).
        num_classes: K.
        options: of the training.
        seed: of the order of chips, which are mirrored at random.
        report_fn: called with the number of steps that were taken since (progress).
        mesh: The devices that share the chips where no step is taken; None for all of this process.
        backend: As of `parallel.map_batches`.

    Returns:
        A function of chips `[Q, S, S, 3]` uint8 to logits `[Q, K]`.
    """
    labels = np.asarray(labels)
    params = {"net": variables["params"]}
    frozen = {name: leaf for name, leaf in variables.items() if name != "params"}
    size = min(options.batch_size, len(chips))
    mesh = mesh or parallel.make_mesh(devices=jax.local_devices())
    # One size of batches for all numbers of chips.
    embed_fn, logits_fn = (
        parallel.map_batches(
            fn,
            mesh,
            in_axes=(None, None, 0),
            batch_size=(size,),
            of="batch",
            backend=backend,
            static={"extractor": extractor},
        )
        for fn in (_embed, _judge)
    )
    own = embed_fn(params, frozen, chips)
    head = trackers.fit_head(own, labels, num_classes)
    params["head"] = {"weights": jnp.asarray(head.weights), "bias": jnp.asarray(head.bias)}
    steps = max(len(chips) // size, 1)
    optimizer = optimizers.OptimizerOptions(
        name="adamw",
        learning_rate=options.learning_rate,
        num_steps=max(steps * options.num_epochs, 1),
        weight_decay=0.0,
    )
    state = optimizers.make_optimizer(optimizer).init(params)
    rng = np.random.default_rng(seed)
    for _ in range(options.num_epochs):
        order = rng.permutation(len(chips))
        for step in range(steps):
            rows = order[step * size : (step + 1) * size]
            mirrored = rng.random(size) < 0.5
            some = np.where(mirrored[:, None, None, None], chips[rows][:, :, ::-1], chips[rows])
            params, state = _step(
                params, state, frozen, some, labels[rows], extractor=extractor, options=optimizer
            )
            if report_fn is not None:
                report_fn(1)
    return functools.partial(logits_fn, params, frozen)


def _embed(
    params: conversion.Variables,
    frozen: conversion.Variables,
    chips: jax.Array,
    *,
    extractor: registry.Extractor,
) -> jax.Array:
    vectors = registry.embed(extractor, {"params": params["net"], **frozen}, images.to_float(chips))
    length = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.maximum(length, 1e-12)


def _judge(
    params: conversion.Variables,
    frozen: conversion.Variables,
    chips: jax.Array,
    *,
    extractor: registry.Extractor,
) -> jax.Array:
    vectors = _embed(params, frozen, chips, extractor=extractor)
    return vectors @ params["head"]["weights"] + params["head"]["bias"][None]


@functools.partial(jax.jit, static_argnames=("extractor", "options"))
def _step(
    params: conversion.Variables,
    state: optax.OptState,
    frozen: conversion.Variables,
    chips: jax.Array,
    labels: jax.Array,
    *,
    extractor: registry.Extractor,
    options: optimizers.OptimizerOptions,
) -> tuple[conversion.Variables, optax.OptState]:
    def loss_fn(params: conversion.Variables) -> jax.Array:
        logits = _judge(params, frozen, chips, extractor=extractor)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    return optimizers.step(jax.grad(loss_fn)(params), state, params, options=options)
