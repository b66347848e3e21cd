"""Victims: classifiers trained on clean, protected or partly protected images, epoch by epoch.

One run is `train_victim`; many small ones at once are in `many_victims`. The recipe is Huang et al.
2021's for CIFAR-10: SGD 0.1, momentum 0.9, weight decay 5e-4, cosine to zero, batch 128, crop and
flip, no normalization.

Images are uint8 on the devices; accuracy is measured on clean test images after every epoch, as are
the last and the peak of the curve (`learnability`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import checkpoint, parallel
from afr_jax.core import images as image_ops
from afr_jax.core import options as options_lib
from afr_jax.data import augmentation, image_sets, sampling
from afr_jax.evaluation.attackers import countermeasures
from afr_jax.evaluation.metrics import learnability
from afr_jax.models import heads
from afr_jax.models.classifiers import registry
from afr_jax.models.weights import conversion
from afr_jax.perturb import sign_descent, stepping
from afr_jax.training import optimizers, scores, trainer

# Adversarial training of the same authors: PGD-10, epsilon 8, step 2 gray levels, that is, steps
# that add up to 2.5 times the radius.
_ATTACK_LIMIT, _ATTACK_REACH = 8 / 255, 2.5
# DeVries and Taylor 2017 on CIFAR-10: half of the side.
_CUTOUT_SHARE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class VictimOptions:
    """A victim: its network, its training, and what it does against the noise."""

    network: registry.ClassifierOptions = options_lib.group(registry.ClassifierOptions)
    num_epochs: int = options_lib.option(
        60, "passes over the training images", at_least=1, flag="epochs"
    )
    batch_size: int = options_lib.option(128, "images of a step, cut to the data", at_least=1)
    learning_rate: float = options_lib.option(0.1, "at the start; falls to zero along a cosine")
    weight_decay: float = options_lib.option(5e-4, "of kernels", at_least=0)
    augmented: bool = options_lib.option(
        True, "random flips, and crops after padding by an eighth of the side", flag="augment"
    )
    countermeasure: str = options_lib.option(
        "none", "what the victim does against the noise", choices=countermeasures.NAMES
    )
    attack_steps: int = options_lib.option(
        10, "steps of adversarial training, 20 gray levels in all", at_least=1
    )
    convert_test: bool = options_lib.option(True, "conversions are done to the test images, too")

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        options_lib.check(self)

    @property
    def in_training(self) -> str:
        """The countermeasure if it acts in the steps of the training, else "none"."""
        is_in_training = self.countermeasure in countermeasures.IN_TRAINING
        return self.countermeasure if is_in_training else "none"

    @property
    def step_options(self) -> dict[str, Any]:
        """The arguments of `victim_step` that are constants of the program."""
        return {"countermeasure": self.in_training, "attack_steps": self.attack_steps}

    def stored(self, images: np.ndarray) -> np.ndarray:
        """Training images `[N, H, W, 3]` uint8 as the victim stores them."""
        if self.countermeasure in countermeasures.IN_TRAINING:
            return images
        return countermeasures.convert(self.countermeasure, images)

    def tested(self, images: np.ndarray) -> np.ndarray:
        """Test images `[M, H, W, 3]` uint8 as the victim is shown them."""
        return self.stored(images) if self.convert_test else images


class Victim(NamedTuple):
    """A trained victim and what it learned.

    Attributes:
        curve: accuracies of all epochs.
        summary: what the curve comes to.
        num_test_images: that the accuracies were measured on.
        state: the trained network.
    """

    curve: learnability.Curve
    summary: learnability.Summary
    num_test_images: int
    state: trainer.TrainState

    @property
    def last_accuracy(self) -> float:
        """On clean test images, after the last epoch."""
        return self.summary.last_accuracy

    @property
    def last_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of it."""
        return learnability.interval(self.summary.last_accuracy, self.num_test_images)

    @property
    def peak_accuracy(self) -> float:
        """On clean test images, the largest after any epoch."""
        return self.summary.peak_accuracy

    @property
    def peak_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of it."""
        return learnability.interval(self.summary.peak_accuracy, self.num_test_images)


def make_recipe(
    options: VictimOptions, *, num_classes: int, num_examples: int, image_px: int
) -> trainer.Recipe:
    """What of a victim is no array.

    Args:
        options: of the victim.
        num_classes: of the data.
        num_examples: of the data: with the batch they give the length of the schedule.
        image_px: side of the images.
    """
    net = options.network.make(num_classes)
    changes = augmentation.Augmentation(
        pad_px=max(1, image_px // 8) if options.augmented else 0,
        flip_probability=0.5 if options.augmented else 0.0,
        cutout_px=round(image_px * _CUTOUT_SHARE) if options.countermeasure == "cutout" else 0,
    )
    steps = max(1, num_examples // min(options.batch_size, num_examples)) * options.num_epochs
    optimizer = optimizers.OptimizerOptions(
        learning_rate=options.learning_rate,
        num_steps=steps,
        weight_decay=options.weight_decay,
    )
    return trainer.Recipe(net, heads.Logits(), optimizer, changes)


def protect_part(
    clean: np.ndarray,
    protected: np.ndarray,
    labels: np.ndarray,
    *,
    rate: float = 1.0,
    classes: Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """A training set of which only a part is protected.

    Args:
        clean: `[N, H, W, 3]` uint8.
        protected: likewise.
        labels: `[N]`.
        rate: share of the samples (of the chosen classes) that are protected, drawn by seed; a
            larger rate protects those of a smaller one and more.
        classes: labels that may be protected; None for all.
        seed: of the draw.

    Returns:
        The images, and which of them are protected, `[N]` bool.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}, but must lie in [0, 1]")
    eligible = np.isin(labels, labels if classes is None else list(classes))
    members = np.flatnonzero(eligible)
    order = np.random.default_rng(seed).permutation(members)
    chosen = np.zeros(len(labels), bool)
    chosen[order[: round(rate * len(members))]] = True
    return np.where(chosen.reshape(-1, 1, 1, 1), protected, clean), chosen


def victim_step(
    key: jax.Array,
    state: trainer.TrainState,
    images: jax.Array,
    labels: jax.Array,
    *,
    recipe: trainer.Recipe,
    countermeasure: str = "none",
    attack_steps: int = 10,
) -> tuple[trainer.TrainState, jax.Array]:
    """One step of a victim; to be traced.

    Args:
        key: of the whole run.
        state: between two steps.
        images: `[B, H, W, 3]` uint8.
        labels: `[B]` int32.
        recipe: the run.
        countermeasure: in training, or "none".
        attack_steps: of adversarial training.

    Returns:
        The state after it, and the training accuracy before it, a scalar. With mixed images that is
        by their first label.
    """
    if countermeasure in ("none", "cutout"):
        state, metrics = trainer.train_step(key, state, images, labels, recipe=recipe)
        return state, metrics.accuracy
    step_key = jax.random.fold_in(key, state.step)
    augment_key, change_key, dropout_key = jax.random.split(step_key, 3)
    images = augmentation.augment_batch(
        augment_key, image_ops.to_float(images), options=recipe.augmentation
    )
    count = images.shape[0]
    mixed = countermeasures.Mixed(images, jnp.arange(count), jnp.ones((count,)))
    if countermeasure == "randaugment":
        keys = jax.random.split(change_key, count)
        mixed = mixed._replace(images=jax.vmap(countermeasures.randaugment)(keys, images))
    elif countermeasure == "adversarial":
        attacked = sign_descent.adversarial(
            change_key,
            lambda shown: _summed_loss(state, shown, labels, recipe),
            images,
            limit=_ATTACK_LIMIT,
            step_size=_ATTACK_REACH * _ATTACK_LIMIT / attack_steps,
            num_steps=attack_steps,
        )
        mixed = mixed._replace(images=attacked)
    elif countermeasure == "ueraser":
        worst = countermeasures.worst_views(
            change_key, images, lambda shown: _losses(state, shown, labels, recipe)
        )
        mixed = mixed._replace(images=worst)
    else:
        mix_fn = {"mixup": countermeasures.mixup, "cutmix": countermeasures.cutmix}[countermeasure]
        mixed = mix_fn(change_key, images)

    def loss_fn(
        params: conversion.Variables,
    ) -> tuple[jax.Array, tuple[jax.Array, conversion.Variables]]:
        outputs, batch_stats = trainer.forward(
            params,
            state.batch_stats,
            mixed.images,
            recipe=recipe,
            train=True,
            dropout_key=dropout_key,
        )
        first = heads.judge(recipe.head, params["head"], outputs, labels)
        second = heads.judge(recipe.head, params["head"], outputs, labels[mixed.other])
        losses = mixed.share * first.losses + (1 - mixed.share) * second.losses
        return jnp.mean(losses), (first.correct, batch_stats)

    gradient, (correct, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    state = trainer.apply_gradient(state, gradient, batch_stats, recipe=recipe)
    return state, jnp.mean(correct.astype(jnp.float32))


def train_victim(
    train_set: image_sets.ImageSet,
    test_set: image_sets.ImageSet,
    *,
    options: VictimOptions | None = None,
    seed: int = 0,
    mesh: parallel.Mesh | None = None,
    checkpoints: checkpoint.Checkpoints | None = None,
    report_fn: Callable[[int, float, float], None] | None = None,
) -> Victim:
    """Trains one victim.

    Args:
        train_set: The training images, protected or not.
        test_set: Clean images of the same classes and size.
        options: The victim; by default `VictimOptions()`, ResNet-18 as published for CIFAR-10.
        seed: The seed of initial parameters, orders and augmentation.
        mesh: The devices that share every batch; by default all.
        checkpoints: Saves state and curve after each epoch, and resumes from the last.
        report_fn: Called after each epoch with its number, training and test accuracy.

    Raises:
        TypeError: A set is something else.
        ValueError: The sets do not fit together.
    """
    image_sets.check(train_set, name="train_set")
    image_sets.check(test_set, name="test_set")
    if (train_set.classes, train_set.images.shape[1:]) != (
        test_set.classes,
        test_set.images.shape[1:],
    ):
        raise ValueError("training and test images must have the same classes and size")
    options = options or VictimOptions()
    mesh = mesh or parallel.make_mesh()
    images = options.stored(train_set.images)
    num_classes = len(train_set.classes)
    recipe = make_recipe(
        options, num_classes=num_classes, num_examples=len(images), image_px=images.shape[1]
    )
    data = trainer.place_data(images, train_set.labels, mesh)
    test = trainer.place_data(options.tested(test_set.images), test_set.labels, mesh)
    key, batches = init_run(seed, len(images), options, multiple=mesh.devices.size)
    state = trainer.init_state(key, recipe, image_shape=images.shape[1:], mesh=mesh)
    blank = np.full(options.num_epochs, np.nan, np.float32)
    curve = learnability.Curve(blank, blank.copy())
    found = checkpoints.restore((state, curve)) if checkpoints is not None else None
    done = 0
    if found is not None:
        done, (state, curve) = found
        curve = learnability.Curve(*(np.array(leaf) for leaf in curve))
    for epoch in range(done, options.num_epochs):
        state, accuracy = run_epoch(
            key, state, data, batches, epoch, recipe=recipe, options=options, mesh=mesh
        )
        found = scores.evaluate(state, test, recipe=recipe, mesh=mesh)
        check_loss(found["loss"], epoch)
        score = found["accuracy"]
        curve.train_accuracy[epoch], curve.test_accuracy[epoch] = accuracy, score
        if checkpoints is not None:
            checkpoints.save(epoch + 1, (state, curve))
        if report_fn is not None:
            report_fn(epoch + 1, accuracy, score)
    return Victim(curve, learnability.summary(curve), len(test_set.labels), state)


def check_loss(loss: float, epoch: int) -> None:
    """Refuses a victim whose accuracy says nothing, for it learned no numbers.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"the victim's loss is {loss} after epoch {epoch + 1}, its accuracy says nothing: does "
            "its architecture suit images of this size, and the learning rate the data?"
        )


def init_run(
    seed: int, num_examples: int, options: VictimOptions, *, multiple: int = 1
) -> tuple[jax.Array, sampling.ShuffledBatches]:
    """Key and batches of a run; batches are cut to the data and to a multiple of the devices."""
    size = min(options.batch_size, num_examples) // multiple * multiple
    if not size:
        raise ValueError(f"{num_examples} examples cannot be split over {multiple} devices")
    return jax.random.key(seed), sampling.ShuffledBatches(num_examples, size, seed)


def run_epoch(
    key: jax.Array,
    state: trainer.TrainState,
    data: trainer.Data,
    batches: sampling.ShuffledBatches,
    epoch: int,
    *,
    recipe: trainer.Recipe,
    options: VictimOptions,
    mesh: parallel.Mesh,
) -> tuple[trainer.TrainState, float]:
    """One epoch of a victim, from the host.

    Args:
        key: of the whole run.
        state: donated.
        data: on the devices.
        batches: rows of each step.
        epoch: its number, from 0 on.
        recipe: the run.
        options: of the victim.
        mesh: of the run.

    Returns:
        The state after it, and the mean training accuracy.
    """
    per_epoch, length = batches.steps_per_epoch, stepping.chunk_length()
    static = {"recipe": recipe, **options.step_options}

    def advance(state: trainer.TrainState, steps: range) -> tuple[trainer.TrainState, jax.Array]:
        rows = trainer.place_rows(batches, steps, mesh, length=length)
        return _steps(key, state, data, rows, np.int32(len(steps)), **static)

    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    state, accuracies = stepping.drive(advance, state, steps=steps, length=length)
    return state, float(np.mean(accuracies))


@functools.partial(
    jax.jit, static_argnames=("recipe", "countermeasure", "attack_steps"), donate_argnames="state"
)
def _steps(
    key: jax.Array,
    state: trainer.TrainState,
    data: trainer.Data,
    rows: jax.Array,
    count: jax.Array | int,
    *,
    recipe: trainer.Recipe,
    countermeasure: str,
    attack_steps: int,
) -> tuple[trainer.TrainState, jax.Array]:
    """The first `count` steps on rows `[B, length]`; training accuracies `[length]`."""

    def one(state: trainer.TrainState, row: jax.Array) -> tuple[trainer.TrainState, jax.Array]:
        images, labels = (jnp.take(leaf, row, axis=0, mode="clip") for leaf in data)
        return victim_step(
            key,
            state,
            images,
            labels,
            recipe=recipe,
            countermeasure=countermeasure,
            attack_steps=attack_steps,
        )

    return stepping.take(one, state, rows.T, length=rows.shape[1], count=count)


def _summed_loss(
    state: trainer.TrainState, images: jax.Array, labels: jax.Array, recipe: trainer.Recipe
) -> jax.Array:
    """Sum of the losses with running statistics."""
    return jnp.sum(_losses(state, images, labels, recipe))


def _losses(
    state: trainer.TrainState, images: jax.Array, labels: jax.Array, recipe: trainer.Recipe
) -> jax.Array:
    """The losses `[B]` with running statistics."""
    outputs, _ = trainer.forward(state.params, state.batch_stats, images, recipe=recipe)
    return heads.judge(recipe.head, state.params["head"], outputs, labels).losses
