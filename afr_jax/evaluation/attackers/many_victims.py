"""Many small victims at once: one step vmapped over seeds and data sets, runs split over devices.

A run takes the steps of `victims.victim_step` from the start of `victims.init_run`, so its curve is
that of `victims.train_victim` but by rounding.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import parallel
from afr_jax.evaluation.attackers import victims
from afr_jax.evaluation.metrics import learnability
from afr_jax.models import heads
from afr_jax.perturb import stepping
from afr_jax.training import trainer


def train_many(
    image_sets: np.ndarray,
    labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    set_of_run: Sequence[int],
    seed_of_run: Sequence[int],
    num_classes: int,
    options: victims.VictimOptions,
    mesh: parallel.Mesh,
    report_fn: Callable[[int, np.ndarray], None] | None = None,
) -> list[learnability.Curve]:
    """Trains R small victims at once: the step vmapped over runs, the runs split over the devices.

    Args:
        image_sets: `[D, N, H, W, 3]` uint8: the training set as each method leaves it.
        labels: `[N]`.
        test_images: `[M, H, W, 3]` uint8, clean.
        test_labels: `[M]`.
        set_of_run: `[R]`, which of the D sets.
        seed_of_run: `[R]`.
        num_classes: of the data.
        options: of all victims.
        mesh: of the runs; R is filled up to a multiple of its devices with repeated runs.
        report_fn: called after each epoch with its number and the test accuracies `[R]`.

    Returns:
        The curve of each run, equal to those of `victims.train_victim` but by rounding.
    """
    stored = np.stack([options.stored(images) for images in image_sets])
    test_images = options.tested(test_images)
    num_runs, num_examples = len(set_of_run), stored.shape[1]
    shape = stored.shape[2:]
    recipe = victims.make_recipe(
        options, num_classes=num_classes, num_examples=num_examples, image_px=shape[0]
    )
    numbers, _ = parallel.pad_batch(np.arange(num_runs), mesh.devices.size)
    sets = np.asarray(set_of_run, np.int32)[numbers]
    starts = [victims.init_run(seed_of_run[n], num_examples, options) for n in numbers.tolist()]
    keys = jnp.stack([key for key, _ in starts])
    states = jax.vmap(lambda k: trainer.init_state(k, recipe, image_shape=shape))(keys)
    keys, states, sets = parallel.shard_batch((keys, states, sets), mesh)
    data = parallel.replicate((stored, np.asarray(labels, np.int32)), mesh)
    per_epoch, length = starts[0][1].steps_per_epoch, stepping.chunk_length()
    static = {"recipe": recipe, "countermeasure": options.in_training}
    curves = np.full((2, options.num_epochs, num_runs), np.nan, np.float32)

    def advance(states: trainer.TrainState, steps: range) -> tuple[trainer.TrainState, jax.Array]:
        # [R, B, length]
        rows = np.stack(
            [np.stack([batches.rows(s) for s in steps], axis=1) for _, batches in starts]
        )
        rows = np.pad(rows, ((0, 0), (0, 0), (0, length - len(steps))), mode="edge")
        rows = parallel.shard_batch(rows, mesh)
        return _many_steps(keys, states, sets, data, rows, np.int32(len(steps)), **static)

    for epoch in range(options.num_epochs):
        states, accuracies = stepping.drive(
            advance,
            states,
            steps=range(epoch * per_epoch, (epoch + 1) * per_epoch),
            length=length,
            axis=1,
        )
        trained = accuracies.mean(axis=1)
        scores = _many_scores(states, test_images, test_labels, recipe, mesh)
        curves[0, epoch], curves[1, epoch] = trained[:num_runs], scores[:num_runs]
        if report_fn is not None:
            report_fn(epoch + 1, scores[:num_runs])
    return [learnability.Curve(curves[0, :, run], curves[1, :, run]) for run in range(num_runs)]


@functools.partial(jax.jit, static_argnames=("recipe", "countermeasure"), donate_argnames="states")
def _many_steps(keys, states, sets, data, rows, count, *, recipe, countermeasure):
    """The first `count` steps of R runs on rows `[R, B, length]`; accuracies `[R, length]`."""
    all_images, all_labels = data

    def run(key, state, number, run_rows):
        def one(state, row):
            images = all_images[number, row]
            labels = all_labels[row]
            return victims.victim_step(
                key, state, images, labels, recipe=recipe, countermeasure=countermeasure
            )

        return stepping.take(one, state, run_rows.T, length=run_rows.shape[1], count=count)

    return jax.vmap(run)(keys, states, sets, rows)


def _many_scores(states, images, labels, recipe, mesh, batch_size=512) -> np.ndarray:
    """Test accuracy of each run, `[R]`; the devices share the runs, each sees all images."""

    def correct(states, images, labels):
        placed = parallel.replicate((images, labels), mesh)
        return _many_correct(states, *placed, recipe=recipe)

    map_fn = parallel.map_batches(
        correct, mesh, in_axes=(None, 0, 0), batch_size=batch_size, of="batch", backend="host"
    )
    return map_fn(states, images, np.asarray(labels, np.int32)).sum(axis=0) / len(images)


@functools.partial(jax.jit, static_argnames="recipe")
def _many_correct(states, images, labels, *, recipe):
    """Whether each of R runs is right about each image, `[B, R]`."""

    def one(state):
        outputs, _ = trainer.forward(state.params, state.batch_stats, images, recipe=recipe)
        return heads.judge(recipe.head, state.params["head"], outputs, labels).correct

    return jax.vmap(one, out_axes=1)(states)
