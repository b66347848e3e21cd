"""How good a training run is: accuracy, embeddings, nearest class centers.

The network runs with its running statistics and without augmentation; examples are rows of a data
set on the devices (`trainer.place_data`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import parallel
from afr_jax.models import heads
from afr_jax.models.weights import conversion
from afr_jax.training import trainer


def evaluate(
    state: trainer.TrainState,
    data: trainer.Data,
    *,
    recipe: trainer.Recipe,
    mesh: parallel.Mesh,
    rows: np.ndarray | None = None,
    batch_size: int = 256,
    backend: parallel.Backend = "jit",
) -> dict[str, float]:
    """Accuracy and mean loss of examples, with running statistics, without augmentation.

    Not for a head of triplets, whose judgement depends on the batch (`nearest_center_accuracy`).

    Args:
        state: between two steps.
        data: from `place_data`.
        recipe: the run.
        mesh: of the run.
        rows: `[M]` of the data; by default all.
        batch_size: Examples of one call, filled up to a multiple of the devices.
        backend: As of `parallel.map_batches`.

    Returns:
        {"accuracy", "loss", "count"}.
    """
    rows = _all_rows(data) if rows is None else np.asarray(rows, np.int32)
    map_fn = _map_rows(_judge, recipe, mesh, batch_size, backend)
    correct, losses = map_fn(state.params, state.batch_stats, data, rows)
    return {
        "accuracy": float(np.mean(correct, dtype=np.float64)),
        "loss": float(np.mean(losses, dtype=np.float64)),
        "count": len(rows),
    }


def embed(
    state: trainer.TrainState,
    data: trainer.Data,
    *,
    recipe: trainer.Recipe,
    mesh: parallel.Mesh,
    rows: np.ndarray | None = None,
    batch_size: int = 256,
    backend: parallel.Backend = "jit",
) -> np.ndarray:
    """Embeddings (or logits) `[M, D]` float32 of examples, as `evaluate` takes them."""
    rows = _all_rows(data) if rows is None else np.asarray(rows, np.int32)
    map_fn = _map_rows(_outputs, recipe, mesh, batch_size, backend)
    return map_fn(state.params, state.batch_stats, data, rows)


def nearest_center_accuracy(
    embeddings: np.ndarray,
    labels: np.ndarray,
    known_embeddings: np.ndarray,
    known_labels: np.ndarray,
) -> float:
    """Share of examples whose nearest class center (unit vectors, by cosine) is their own.

    Args:
        embeddings: `[M, D]`.
        labels: `[M]`.
        known_embeddings: `[N, D]` of examples that the centers are the mean directions of.
        known_labels: `[N]`.
    """
    classes = np.unique(known_labels)
    known = _unit(known_embeddings)
    centers = _unit(np.stack([known[known_labels == label].mean(axis=0) for label in classes]))
    nearest = classes[np.argmax(_unit(embeddings) @ centers.T, axis=1)]
    return float(np.mean(nearest == labels))


def _map_rows(
    fn: Callable[..., parallel.PyTree],
    recipe: trainer.Recipe,
    mesh: parallel.Mesh,
    batch_size: int,
    backend: parallel.Backend,
) -> Callable[..., parallel.PyTree]:
    """Maps `fn(params, batch_stats, data, rows)` over rows of the data."""
    return parallel.map_batches(
        fn,
        mesh,
        in_axes=(None, None, None, 0),
        batch_size=batch_size,
        of="batch",
        backend=backend,
        static={"recipe": recipe},
    )


def _judge(
    params: conversion.Variables,
    batch_stats: conversion.Variables,
    data: trainer.Data,
    rows: jax.Array,
    *,
    recipe: trainer.Recipe,
) -> tuple[jax.Array, jax.Array]:
    """Whether each example of the rows `[B]` is told correctly, and its loss."""
    outputs = _outputs(params, batch_stats, data, rows, recipe=recipe)
    labels = jnp.take(data.labels, rows, axis=0, mode="clip")
    judged = heads.judge(recipe.head, params["head"], outputs, labels)
    return judged.correct, judged.losses


def _outputs(
    params: conversion.Variables,
    batch_stats: conversion.Variables,
    data: trainer.Data,
    rows: jax.Array,
    *,
    recipe: trainer.Recipe,
) -> jax.Array:
    images = jnp.take(data.images, rows, axis=0, mode="clip")
    return trainer.forward(params, batch_stats, images, recipe=recipe)[0]


def _all_rows(data: trainer.Data) -> np.ndarray:
    return np.arange(len(data.labels), dtype=np.int32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
