"""Noise that is found with a source network: the search behind error_min, error_max, REM and TAP.

Huang et al. 2021, "Unlearnable Examples: Making Personal Data Unexploitable" (ICLR), equation 1:
argmin over theta of E[min over |delta| <= eps of L(f_theta(x + delta), y)]. The alternation is
`train_round` (M optimiser steps of theta on noisy images) and `refine` (one pass of T signed
gradient steps over the noise of all images), until the training error on noisy data falls below a
limit or the rounds are used up. Error-maximising noise trains theta on clean images first and
ascends; targeted noise descends towards other labels; robust noise (REM) sees random crops and an
inner adversary in both places.

Differences from the authors' code: noise keeps its sign; theta, the noise and the stopping test see
the image clipped to [0, 1]; the order of images is that of their ids, not of a loader.

The noise is float32 in [0, 1] units, `[N, H, W, 3]` by image or `[K, H, W, 3]` by class, and always
within the ball; images are `trainer.Data` on the devices, uint8. State, optimizer, round and key
are one `SearchState`, saved together. With BatchNorm, theta trains on statistics of the batch and
the noise is found with the running ones.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import checkpoint, parallel
from afr_jax.data import sampling
from afr_jax.methods.unlearnable import search_steps
from afr_jax.perturb import loop
from afr_jax.training import trainer


class SearchState(NamedTuple):
    """A search between two rounds.

    Attributes:
        key: of the whole search.
        round: int32 scalar, rounds done.
        train: theta, its statistics and optimizer.
        noise: float32, `[N or K, H, W, 3]`.
        errors: `[max_rounds]` float32, training error on noisy images after each round; NaN for
            rounds to come.
    """

    key: jax.Array
    round: jax.Array
    train: trainer.TrainState
    noise: jax.Array
    errors: jax.Array


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
        noise: `[N or K, H, W, 3]` float32 in [0, 1] units, NumPy.
        errors: training error on noisy images after each round, NumPy.
        converged: whether the limit was met before the rounds were used up.
    """

    noise: np.ndarray
    errors: np.ndarray
    converged: bool


def search(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    recipe: trainer.Recipe,
    options: search_steps.SearchOptions,
    seed: int,
    mesh: parallel.Mesh,
    checkpoints: checkpoint.Checkpoints | None = None,
    report_fn: Callable[[int, float], None] | None = None,
) -> SearchResult:
    """Searches noise for a data set.

    Args:
        images: `[N, H, W, 3]` uint8, in the order of stable ids.
        labels: `[N]` int.
        num_classes: K.
        recipe: source network (with logits of K classes), head and optimizer; its augmentation is
            not used.
        options: of the search.
        seed: of everything random.
        mesh: of the run.
        checkpoints: saves the state after each round, and resumes from the last one.
        report_fn: called after each round with its number and training error.
    """
    data = trainer.place_data(images, labels, mesh)
    rows = len(images) if options.granularity == "sample" else num_classes
    state = init_search(seed, data, recipe, options, num_rows=rows, mesh=mesh)
    batches = sampling.ShuffledBatches(len(images), _batch_size(options, len(images), mesh), seed)
    target_of = jnp.asarray(_targets(seed, num_classes, options))
    found = checkpoints.restore(state) if checkpoints is not None else None
    if found is not None:
        state = found[1]
    else:
        state = _train(
            state, data, batches, options.source_steps, recipe, options, mesh, clean=True
        )
    while not _is_done(state, options):
        state = _train(state, data, batches, options.train_steps, recipe, options, mesh)
        state = refine(state, data, target_of, recipe=recipe, options=options, seed=seed, mesh=mesh)
        error = training_error(state, data, target_of, recipe=recipe, options=options, mesh=mesh)
        number = int(state.round)
        errors = np.array(state.errors)
        errors[number] = error
        state = parallel.replicate(state._replace(round=np.int32(number + 1), errors=errors), mesh)
        if checkpoints is not None:
            checkpoints.save(number + 1, state)
        if report_fn is not None:
            report_fn(number + 1, error)
    errors = np.asarray(state.errors)[: int(state.round)]
    return SearchResult(np.asarray(state.noise), errors, _met(errors, options))


def init_search(
    seed: int,
    data: trainer.Data,
    recipe: trainer.Recipe,
    options: search_steps.SearchOptions,
    *,
    num_rows: int,
    mesh: parallel.Mesh,
) -> SearchState:
    """A search before its first round: fresh theta, noise of zeros.

    Args:
        seed: of everything random.
        data: on the devices.
        recipe: source network and optimizer.
        options: of the search.
        num_rows: images or classes that have a noise each.
        mesh: of the run.
    """
    shape = data.images.shape[1:]
    key = jax.random.key(seed)
    theta = trainer.init_state(key, recipe, image_shape=shape)
    noise = np.zeros((num_rows, *shape), np.float32)
    errors = np.full(options.max_rounds, np.nan, np.float32)
    return parallel.replicate(SearchState(key, np.int32(0), theta, noise, errors), mesh)


def refine(
    state: SearchState,
    data: trainer.Data,
    target_of: jax.Array,
    *,
    recipe: trainer.Recipe,
    options: search_steps.SearchOptions,
    seed: int,
    mesh: parallel.Mesh,
    chunk: int | None = None,
) -> SearchState:
    """One pass of signed steps over the noise of all images, theta fixed.

    Class-wise noise becomes, batch after batch, the mean over the batch's images of the class of
    what their steps made of it; classes that a batch lacks keep theirs.

    Args:
        state: between two rounds.
        data: on the devices.
        target_of: `[K]` int32, the label that images of a class are steered to or away from.
        recipe: source network.
        options: of the search.
        seed: of the order of a class-wise pass.
        mesh: of the run.
        chunk: by default the signed steps of one call on CPU (1), elsewhere all of them for 50
            batches; the result does not depend on it but by rounding.
    """
    count, num_steps = len(data.labels), options.num_steps
    order = np.arange(count)
    if options.granularity == "class":
        order = np.random.default_rng([seed, int(state.round)]).permutation(count)
        order = order[: max(1, round(options.class_share * count))]
    size = _batch_size(options, len(order), mesh)
    # Rows past the end are looked up as the last image and written nowhere.
    rows = np.full(-(-len(order) // size) * size, count, np.int32)
    rows[: len(order)] = order
    rows = rows.reshape(-1, size)
    key = jax.random.fold_in(state.key, state.round)
    theta = state.train.params, state.train.batch_stats
    options = _compiled(options)
    static = {"recipe": recipe, "options": options, "mesh": mesh}
    noise, chunk = state.noise, chunk or loop.chunk_length()
    if chunk == 1:
        for part in rows:
            part = parallel.shard_batch(sampling.local_rows(part), mesh)
            work = search_steps.start_batch(data, noise, part, target_of, options=options)
            for step in range(num_steps):
                work = search_steps.advance_batch(
                    key, theta, work, np.int32(step), recipe=recipe, options=options
                )
            noise = search_steps.store_batch(noise, work, part, options=options, mesh=mesh)
        return state._replace(noise=noise)
    for start in range(0, len(rows), chunk):
        part = sampling.local_rows(rows[start : start + chunk].T.copy())
        part = parallel.shard_batch(part, mesh)
        noise = search_steps.refine_batches(key, theta, data, noise, part, target_of, **static)
    return state._replace(noise=noise)


def training_error(
    state: SearchState,
    data: trainer.Data,
    target_of: jax.Array,
    *,
    recipe: trainer.Recipe,
    options: search_steps.SearchOptions,
    mesh: parallel.Mesh,
) -> float:
    """Share of noisy training images whose largest logit is not that of their target."""
    count = len(data.labels)
    size = _batch_size(options, count, mesh)
    correct, options = [], _compiled(options)
    theta = state.train.params, state.train.batch_stats
    for start in range(0, count, size):
        rows, mask = parallel.pad_batch(
            np.arange(start, min(start + size, count), dtype=np.int32), size
        )
        local = sampling.local_rows(rows), sampling.local_rows(mask)
        placed = parallel.shard_batch(local, mesh)
        correct.append(
            search_steps.count_correct(
                theta, data, state.noise, *placed, target_of, recipe=recipe, options=options
            )
        )
    return 1.0 - float(np.sum(jax.device_get(correct))) / count


def _train(state, data, batches, num_steps, recipe, options, mesh, *, clean=False):
    """Optimiser steps of theta from the host."""
    theta, first, chunk = state.train, int(state.train.step), loop.chunk_length()
    for begin in range(first, first + num_steps, chunk):
        steps = range(begin, min(begin + chunk, first + num_steps))
        rows = np.stack([sampling.local_rows(batches.rows(step)) for step in steps], axis=1)
        theta = search_steps.train_chunk(
            state.key,
            theta,
            data,
            state.noise,
            parallel.shard_batch(rows, mesh),
            recipe=recipe,
            options=_compiled(options),
            mesh=mesh,
            clean=clean,
        )
    return state._replace(train=theta)


def _compiled(options: search_steps.SearchOptions) -> search_steps.SearchOptions:
    """The options without what compiled programs do not depend on: fewer compilations."""
    return dataclasses.replace(
        options,
        permuted=False,
        source_steps=0,
        train_steps=0,
        class_share=1.0,
        batch_size=1,
        max_rounds=1,
        stop_error=None,
    )


def _targets(seed: int, num_classes: int, options: search_steps.SearchOptions) -> np.ndarray:
    """Own labels, or each class's successor in a shuffled circle of all classes."""
    if not options.permuted:
        return np.arange(num_classes, dtype=np.int32)
    if num_classes < 2:
        raise ValueError("a permutation of labels needs two classes or more")
    circle = np.random.default_rng([seed, num_classes]).permutation(num_classes)
    targets = np.empty(num_classes, np.int32)
    targets[circle] = np.roll(circle, -1)
    return targets


def _batch_size(options: search_steps.SearchOptions, count: int, mesh: parallel.Mesh) -> int:
    """The batch, cut to the data and to a multiple of the devices, at least one each."""
    num_devices = mesh.devices.size
    return max(num_devices, min(options.batch_size, count) // num_devices * num_devices)


def _is_done(state: SearchState, options: search_steps.SearchOptions) -> bool:
    done = int(state.round)
    return done >= options.max_rounds or _met(np.asarray(state.errors)[:done], options)


def _met(errors: np.ndarray, options: search_steps.SearchOptions) -> bool:
    if not len(errors) or options.stop_error is None:
        return False
    return bool(
        errors[-1] >= options.stop_error if options.ascend else errors[-1] < options.stop_error
    )
