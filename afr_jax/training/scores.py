"""How good a training run is: accuracy, embeddings, nearest class centres.

The network runs with its running statistics and without augmentation; examples are rows of a data
set on the devices (`trainer.place_data`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import parallel
from afr_jax.data import sampling
from afr_jax.training import trainer


def evaluate(
    state: trainer.TrainState,
    data: trainer.Data,
    *,
    recipe: trainer.Recipe,
    mesh: parallel.Mesh,
    rows: np.ndarray | None = None,
    batch_size: int = 256,
) -> dict[str, float]:
    """Accuracy and mean loss of examples, with running statistics, without augmentation.

    Not for a head of triplets, whose judgement depends on the batch (`nearest_centre_accuracy`).

    Args:
        state: between two steps.
        data: from `place_data`.
        recipe: the run.
        mesh: of the run.
        rows: `[M]` of the data; by default all.
        batch_size: rounded up to a multiple of the devices.

    Returns:
        {"accuracy", "loss", "count"}.
    """
    sums = []
    for part, mask in _parts(data, rows, mesh, batch_size):
        placed = parallel.shard_batch(_local((part, mask)), mesh)
        sums.append(_sums(state, data, *placed, recipe=recipe))
    correct, loss, count = np.sum(np.array(jax.device_get(sums), np.float64), axis=0).tolist()
    return {"accuracy": correct / count, "loss": loss / count, "count": int(count)}


def embed(
    state: trainer.TrainState,
    data: trainer.Data,
    *,
    recipe: trainer.Recipe,
    mesh: parallel.Mesh,
    rows: np.ndarray | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """Embeddings (or logits) `[M, D]` float32 of examples, as `evaluate` takes them."""
    parts = []
    for part, mask in _parts(data, rows, mesh, batch_size):
        placed = parallel.shard_batch(_local(part), mesh)
        outputs = _embed_rows(state, data, placed, recipe=recipe, mesh=mesh)
        parts.append(np.asarray(outputs)[mask])
    return np.concatenate(parts)


def nearest_centre_accuracy(
    embeddings: np.ndarray,
    labels: np.ndarray,
    known_embeddings: np.ndarray,
    known_labels: np.ndarray,
) -> float:
    """Share of examples whose nearest class centre (unit vectors, by cosine) is their own.

    Args:
        embeddings: `[M, D]`.
        labels: `[M]`.
        known_embeddings: `[N, D]` of examples that the centres are the mean directions of.
        known_labels: `[N]`.
    """
    classes = np.unique(known_labels)
    known = _unit(known_embeddings)
    centres = _unit(np.stack([known[known_labels == label].mean(axis=0) for label in classes]))
    nearest = classes[np.argmax(_unit(embeddings) @ centres.T, axis=1)]
    return float(np.mean(nearest == labels))


@functools.partial(jax.jit, static_argnames="recipe")
def _sums(state, data, rows, mask, *, recipe):
    """Correct examples, summed losses and their number `[3]`, of masked rows `[B]`."""
    images, labels = (jnp.take(leaf, rows, axis=0, mode="clip") for leaf in data)
    outputs, _ = trainer.forward(state.params, state.batch_stats, images, recipe=recipe)
    judged = recipe.head.apply({"params": state.params["head"]}, outputs, labels)
    losses = jnp.where(mask, judged.losses, 0.0)
    return jnp.stack([jnp.sum(judged.correct & mask), jnp.sum(losses), jnp.sum(mask)])


@functools.partial(jax.jit, static_argnames=("recipe", "mesh"))
def _embed_rows(state, data, rows, *, recipe, mesh):
    images = jnp.take(data.images, rows, axis=0, mode="clip")
    outputs, _ = trainer.forward(state.params, state.batch_stats, images, recipe=recipe)
    return jax.lax.with_sharding_constraint(outputs, parallel.replicated(mesh))


def _parts(data: trainer.Data, rows: np.ndarray | None, mesh: parallel.Mesh, batch_size: int):
    """Yields rows and mask of batches of one size, the last one filled up."""
    rows = np.arange(len(data.labels)) if rows is None else np.asarray(rows)
    num_devices = mesh.devices.size
    batch_size = min(batch_size, len(rows))
    batch_size = -(-batch_size // num_devices) * num_devices
    for start in range(0, len(rows), batch_size):
        yield parallel.pad_batch(rows[start : start + batch_size].astype(np.int32), batch_size)


def _local(tree):
    """This process's share of rows of a batch."""
    return jax.tree.map(sampling.local_rows, tree)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
