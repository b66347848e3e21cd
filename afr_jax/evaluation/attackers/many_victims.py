"""Many small victims at once: one step vmapped over seeds and data sets, runs split over devices.

A run takes the steps of `victims.victim_step` from the start of `victims.init_run`, so its curve is
that of `victims.train_victim` but by rounding.
"""

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
    backend: parallel.Backend = "jit",
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
        mesh: of the devices, which share the runs in training and the images in testing.
        backend: As of `parallel.map_batches`.
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
    starts = [victims.init_run(seed, num_examples, options) for seed in seed_of_run]
    keys = jnp.stack([key for key, _ in starts])
    states = jax.vmap(lambda k: trainer.init_state(k, recipe, image_shape=shape))(keys)
    sets = np.asarray(set_of_run, np.int32)
    data = parallel.replicate((stored, np.asarray(labels, np.int32)), mesh)
    test_labels = np.asarray(test_labels, np.int32)
    per_epoch, length = starts[0][1].steps_per_epoch, stepping.chunk_length()
    curves = np.full((2, options.num_epochs, num_runs), np.nan, np.float32)
    steps_fn = parallel.map_batches(
        _steps,
        mesh,
        in_axes=(0, 0, 0, 0, None, None),
        batch_size=num_runs,
        backend=backend,
        static={"recipe": recipe, **options.step_options},
    )
    correct_fn = parallel.map_batches(
        _correct,
        mesh,
        in_axes=(None, 0, 0),
        batch_size=512,
        of="batch",
        backend=backend,
        static={"recipe": recipe},
    )

    def advance(states: trainer.TrainState, steps: range) -> tuple[trainer.TrainState, np.ndarray]:
        # [R, length, B]
        rows = np.stack([np.stack([batches.rows(s) for s in steps]) for _, batches in starts])
        rows = np.pad(rows, ((0, 0), (0, length - len(steps)), (0, 0)), mode="edge")
        return steps_fn(keys, states, sets, rows, data, np.int32(len(steps)))

    for epoch in range(options.num_epochs):
        states, accuracies = stepping.drive(
            advance,
            states,
            steps=range(epoch * per_epoch, (epoch + 1) * per_epoch),
            length=length,
            axis=1,
        )
        trained = accuracies.mean(axis=1)
        scores = correct_fn(states, test_images, test_labels).mean(axis=0)
        victims.check_loss(scores.sum(), epoch)
        curves[0, epoch], curves[1, epoch] = trained, scores
        if report_fn is not None:
            report_fn(epoch + 1, scores)
    return [learnability.Curve(curves[0, :, run], curves[1, :, run]) for run in range(num_runs)]


def _steps(
    key: jax.Array,
    state: trainer.TrainState,
    number: jax.Array,
    rows: jax.Array,
    data: tuple[jax.Array, jax.Array],
    count: jax.Array,
    *,
    recipe: trainer.Recipe,
    countermeasure: str,
    attack_steps: int,
) -> tuple[trainer.TrainState, jax.Array]:
    """The first `count` steps of a run on rows `[length, B]` of one set; accuracies `[length]`."""
    all_images, all_labels = data

    def one(state: trainer.TrainState, row: jax.Array) -> tuple[trainer.TrainState, jax.Array]:
        images, labels = all_images[number, row], all_labels[row]
        return victims.victim_step(
            key,
            state,
            images,
            labels,
            recipe=recipe,
            countermeasure=countermeasure,
            attack_steps=attack_steps,
        )

    return stepping.take(one, state, rows, length=len(rows), count=count)


def _correct(
    states: trainer.TrainState, images: jax.Array, labels: jax.Array, *, recipe: trainer.Recipe
) -> jax.Array:
    """Whether each of R runs is right about each image, `[B, R]` float; NaN without a loss."""

    def one(state: trainer.TrainState) -> jax.Array:
        outputs, _ = trainer.forward(state.params, state.batch_stats, images, recipe=recipe)
        found = heads.judge(recipe.head, state.params["head"], outputs, labels)
        return jnp.where(jnp.isfinite(found.losses), found.correct, jnp.nan)

    return jax.vmap(one, out_axes=1)(states)
