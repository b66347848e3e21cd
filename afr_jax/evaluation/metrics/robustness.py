"""How far small perturbations move an extractor's embeddings, and what that does to verification.

Chips are uint8, perturbations those of projected gradient descent against the extractor itself
(`hardening.worst_case`): the worst case for it, not what a cloak made elsewhere does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import images as image_ops
from afr_jax.core import parallel
from afr_jax.evaluation.metrics import verification
from afr_jax.models.extractors import registry
from afr_jax.models.weights import conversion
from afr_jax.recognition import training_photos
from afr_jax.training import hardening


def embed_chips(
    variables: conversion.Variables,
    chips: np.ndarray,
    *,
    extractor: registry.Extractor,
    mesh: parallel.Mesh,
    batch_size: int = 32,
    backend: parallel.Backend = "jit",
) -> np.ndarray:
    """Embeddings `[N, D]` float32 of chips `[N, S, S, 3]` uint8, in batches over the devices.

    Args:
        variables: of the extractor, from `parallel.replicate`.
        chips: aligned for it.
        extractor: whose.
        mesh: of the devices.
        batch_size: Chips of one call, filled up to a multiple of the devices.
        backend: As of `parallel.map_batches`.
    """
    map_fn = parallel.map_batches(
        _embed,
        mesh,
        in_axes=(None, 0),
        batch_size=batch_size,
        of="batch",
        backend=backend,
        static={"extractor": extractor},
    )
    return map_fn(variables, chips)


def attacked_embeddings(
    key: jax.Array,
    variables: conversion.Variables,
    chips: np.ndarray,
    anchors: np.ndarray,
    directions: np.ndarray,
    *,
    extractor: registry.Extractor,
    attack: hardening.Attack,
    mesh: parallel.Mesh,
    batch_size: int = 16,
    backend: parallel.Backend = "jit",
) -> np.ndarray:
    """Embeddings `[N, D]` float32 of chips under the worst perturbation.

    Args:
        key: of the random starts.
        variables: of the extractor, from `parallel.replicate`.
        chips: `[N, S, S, 3]` uint8.
        anchors: `[N, D]`, embeddings to get away from, or nearer to.
        directions: `[N]`, 1 for away and -1 for nearer.
        extractor: under attack.
        attack: the search.
        mesh: of the devices.
        batch_size: Chips of one call, filled up to a multiple of the devices.
        backend: As of `parallel.map_batches`.
    """
    # The search is driven from the host, where chunks of steps are short on CPUs; `pmap` takes it
    # as one program.
    on_host = backend == "jit"
    map_fn = parallel.map_batches(
        _attacked,
        mesh,
        in_axes=(None, None, 0, 0, 0, 0),
        batch_size=batch_size,
        of="batch",
        backend="host" if on_host else backend,
        static={"extractor": extractor, "attack": attack, "mesh": mesh if on_host else None},
    )
    return map_fn(
        key,
        variables,
        np.arange(len(chips)),
        chips,
        np.asarray(anchors, np.float32),
        np.asarray(directions, np.float32),
    )


def _attacked(
    key: jax.Array,
    variables: conversion.Variables,
    numbers: jax.Array,
    chips: jax.Array,
    anchors: jax.Array,
    directions: jax.Array,
    *,
    extractor: registry.Extractor,
    attack: hardening.Attack,
    mesh: parallel.Mesh | None,
) -> jax.Array:
    """Embeddings of a batch under attack; every chip's number decides its start.

    Without a mesh the batch is traced, and the search is one chunk.
    """
    rows = (numbers, chips, anchors, directions)
    numbers, chips, anchors, directions = rows if mesh is None else parallel.spread(rows, mesh)
    images = image_ops.to_float(chips)
    delta = hardening.worst_case(
        jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers),
        variables,
        images,
        anchors,
        extractor=extractor,
        attack=attack,
        directions=directions,
        chunk=attack.num_steps if mesh is None else None,
    )
    return _embed(variables, jnp.clip(images + delta, 0.0, 1.0), extractor=extractor)


def shift_scores(
    key: jax.Array,
    variables: conversion.Variables,
    original: conversion.Variables,
    chips: np.ndarray,
    *,
    extractor: registry.Extractor,
    attack: hardening.Attack,
    mesh: parallel.Mesh,
) -> dict[str, float]:
    """How far embeddings move, in units of the extractor's threshold, means over chips.

    Args:
        key: of the attack.
        variables: of the extractor as it is now.
        original: before it was hardened.
        chips: `[N, S, S, 3]` uint8.
        extractor: both are of.
        attack: the search.
        mesh: of the devices.

    Returns:
        {"chips", "attacked": from the own clean embedding, "drift": of clean embeddings from those
        of the original}.
    """
    options = {"extractor": extractor, "mesh": mesh}
    clean = embed_chips(variables, chips, **options)
    before = embed_chips(original, chips, **options)
    away = np.ones(len(chips))
    moved = attacked_embeddings(key, variables, chips, clean, away, attack=attack, **options)
    unit = extractor.threshold
    return {
        "chips": len(chips),
        "attacked": float(np.mean(np.linalg.norm(moved - clean, axis=1)) / unit),
        "drift": float(np.mean(np.linalg.norm(clean - before, axis=1)) / unit),
    }


def pair_scores(
    key: jax.Array,
    variables: conversion.Variables,
    pairs: training_photos.Pairs,
    *,
    extractor: registry.Extractor,
    attack: hardening.Attack,
    mesh: parallel.Mesh,
    num_attacked: int,
) -> dict[str, float]:
    """Verification of pairs, clean and with the second photo of each attacked.

    The attacker takes the second photo of one person away from the first (dodging), that of another
    person towards it (impersonation). Attacked pairs are judged by the threshold that is best on
    all clean ones.

    Args:
        key: of the attack.
        variables: of the extractor.
        pairs: chips for it.
        extractor: under attack.
        attack: the search.
        mesh: of the devices.
        num_attacked: pairs that are attacked, half of each kind, evenly spread; 0 for none.

    Returns:
        {"pairs", "accuracy" (10-fold), "auc", "threshold" (the best)} and, with `num_attacked`,
        {"attacked_pairs", "attacked_clean_accuracy" (those pairs without noise),
        "attacked_accuracy", "dodged", "impersonated" (shares of each kind)}.
    """
    options = {"extractor": extractor, "mesh": mesh}
    embeddings = embed_chips(variables, pairs.images, **options)
    first, second = (embeddings[pairs.rows[:, side]] for side in (0, 1))
    distances = np.linalg.norm(first - second, axis=1)
    threshold = verification.best_threshold(distances, pairs.same)
    scores = {
        "pairs": len(pairs.rows),
        "accuracy": float(verification.fold_accuracies(distances, pairs.same).mean()),
        "auc": verification.auc(verification.roc(distances, pairs.same)),
        "threshold": threshold,
    }
    if not num_attacked:
        return scores
    rows = np.concatenate(
        [_spread(pairs.same == kind, num_attacked // 2) for kind in (True, False)]
    )
    same = pairs.same[rows]
    moved = attacked_embeddings(
        key,
        variables,
        pairs.images[pairs.rows[rows, 1]],
        first[rows],
        np.where(same, 1.0, -1.0),
        attack=attack,
        **options,
    )
    attacked = np.linalg.norm(moved - first[rows], axis=1)
    return scores | {
        "attacked_pairs": len(rows),
        "attacked_clean_accuracy": verification.accuracy(distances[rows], same, threshold),
        "attacked_accuracy": verification.accuracy(attacked, same, threshold),
        "dodged": float(np.mean(attacked[same] >= threshold)),
        "impersonated": float(np.mean(attacked[~same] < threshold)),
    }


def _spread(mask: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows that a mask holds, evenly spread; at least one."""
    rows = np.flatnonzero(mask)
    return rows[np.linspace(0, len(rows) - 1, min(max(count, 1), len(rows))).astype(int)]


@functools.partial(jax.jit, static_argnames="extractor")
def _embed(
    variables: conversion.Variables, images: jax.Array, *, extractor: registry.Extractor
) -> jax.Array:
    images = image_ops.to_float(images) if images.dtype == jnp.uint8 else images
    return registry.embed(extractor, variables, images)
