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

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import checkpoint, parallel
from afr_jax.core import images as image_ops
from afr_jax.data import augmentation, sampling
from afr_jax.evaluation.attackers import countermeasures
from afr_jax.evaluation.metrics import learnability
from afr_jax.models import heads
from afr_jax.models.classifiers import registry
from afr_jax.perturb import sign_descent, stepping
from afr_jax.training import optimizers, scores, trainer

# Adversarial training of the same authors: PGD-10, epsilon 8, step 2 gray levels.
_ATTACK = {"limit": 8 / 255, "step_size": 2 / 255, "num_steps": 10}
# DeVries and Taylor 2017 on CIFAR-10: half of the side.
_CUTOUT_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class VictimOptions:
    """A victim's training.

    Attributes:
        architecture: of `registry.NAMES`.
        width: see `registry.classifier`.
        stem: "cifar" or "imagenet".
        num_epochs: of training.
        batch_size: of a step, cut to the data.
        learning_rate: at the start.
        weight_decay: of kernels.
        augmented: crop after padding by an eighth of the side, and flip.
        countermeasure: one of `countermeasures.IN_TRAINING`, or "none".
        bfloat16: compute in bfloat16; parameters and statistics stay float32.
    """

    architecture: str = "resnet18"
    width: int | None = None
    stem: str = "cifar"
    num_epochs: int = 60
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    augmented: bool = True
    countermeasure: str = "none"
    bfloat16: bool = False

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        if self.architecture not in registry.NAMES:
            raise ValueError(
                f"architecture is {self.architecture!r}, but must be one of "
                f"{', '.join(registry.NAMES)}"
            )
        if self.countermeasure not in ("none", *countermeasures.IN_TRAINING):
            raise ValueError(
                f"countermeasure is {self.countermeasure!r}, but must be none or one of "
                f"{', '.join(countermeasures.IN_TRAINING)}"
            )
        if min(self.num_epochs, self.batch_size) < 1:
            raise ValueError("num_epochs and batch_size must be at least 1")


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
    net = registry.classifier(
        options.architecture,
        num_classes=num_classes,
        width=options.width,
        stem=options.stem,
        dtype=jnp.bfloat16 if options.bfloat16 else jnp.float32,
    )
    changes = {}
    if options.augmented:
        changes = {"pad_px": max(1, image_px // 8), "flip_probability": 0.5}
    if options.countermeasure == "cutout":
        changes["cutout_px"] = round(image_px * _CUTOUT_SHARE)
    steps = max(1, num_examples // min(options.batch_size, num_examples)) * options.num_epochs
    optimizer = optimizers.OptimizerOptions(
        learning_rate=options.learning_rate,
        num_steps=steps,
        weight_decay=options.weight_decay,
    )
    return trainer.Recipe(net, heads.Logits(), optimizer, augmentation.Augmentation(**changes))


def source_recipe(options: VictimOptions, *, num_classes: int, image_px: int) -> trainer.Recipe:
    """The source network of a noise search: the same nets, a learning rate that does not fall.

    Args:
        options: architecture, learning rate and decay count.
        num_classes: of the data.
        image_px: side of the images.
    """
    recipe = make_recipe(options, num_classes=num_classes, num_examples=1, image_px=image_px)
    optimizer = dataclasses.replace(recipe.optimizer, schedule="constant")
    return dataclasses.replace(
        recipe, optimizer=optimizer, augmentation=augmentation.Augmentation()
    )


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
) -> tuple[trainer.TrainState, jax.Array]:
    """One step of a victim; to be traced.

    Args:
        key: of the whole run.
        state: between two steps.
        images: `[B, H, W, 3]` uint8.
        labels: `[B]` int32.
        recipe: the run.
        countermeasure: in training, or "none".

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
            change_key, lambda x: _summed_loss(state, x, labels, recipe), images, **_ATTACK
        )
        mixed = mixed._replace(images=attacked)
    else:
        mix_fn = {"mixup": countermeasures.mixup, "cutmix": countermeasures.cutmix}[countermeasure]
        mixed = mix_fn(change_key, images)

    def loss_fn(params):
        outputs, batch_stats = trainer.forward(
            params,
            state.batch_stats,
            mixed.images,
            recipe=recipe,
            train=True,
            dropout_key=dropout_key,
        )
        head = {"params": params["head"]}
        first = recipe.head.apply(head, outputs, labels)
        second = recipe.head.apply(head, outputs, labels[mixed.other])
        losses = mixed.share * first.losses + (1 - mixed.share) * second.losses
        return jnp.mean(losses), (first.correct, batch_stats)

    gradient, (correct, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    state = trainer.apply_gradient(state, gradient, batch_stats, recipe=recipe)
    return state, jnp.mean(correct.astype(jnp.float32))


def train_victim(
    images: np.ndarray,
    labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    options: VictimOptions,
    seed: int,
    mesh: parallel.Mesh,
    checkpoints: checkpoint.Checkpoints | None = None,
    report_fn: Callable[[int, float, float], None] | None = None,
) -> tuple[learnability.Curve, trainer.TrainState]:
    """Trains one victim.

    Args:
        images: `[N, H, W, 3]` uint8, of the training set.
        labels: `[N]`.
        test_images: `[M, H, W, 3]` uint8, clean.
        test_labels: `[M]`.
        num_classes: of the data.
        options: of the victim.
        seed: of initial parameters, orders and augmentation.
        mesh: devices that share every batch.
        checkpoints: saves state and curve after each epoch, and resumes from the last.
        report_fn: called after each epoch with its number, training and test accuracy.

    Returns:
        The curve and the trained state.
    """
    recipe = make_recipe(
        options, num_classes=num_classes, num_examples=len(images), image_px=images.shape[1]
    )
    data = trainer.place_data(images, labels, mesh)
    test = trainer.place_data(test_images, test_labels, mesh)
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
        score = scores.evaluate(state, test, recipe=recipe, mesh=mesh)["accuracy"]
        curve.train_accuracy[epoch], curve.test_accuracy[epoch] = accuracy, score
        if checkpoints is not None:
            checkpoints.save(epoch + 1, (state, curve))
        if report_fn is not None:
            report_fn(epoch + 1, accuracy, score)
    return curve, state


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
    static = {"recipe": recipe, "countermeasure": options.countermeasure}

    def advance(state: trainer.TrainState, steps: range) -> tuple[trainer.TrainState, jax.Array]:
        rows = trainer.place_rows(batches, steps, mesh, length=length)
        return _steps(key, state, data, rows, np.int32(len(steps)), **static)

    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    state, accuracies = stepping.drive(advance, state, steps=steps, length=length)
    return state, float(np.mean(accuracies))


@functools.partial(jax.jit, static_argnames=("recipe", "countermeasure"), donate_argnames="state")
def _steps(key, state, data, rows, count, *, recipe, countermeasure):
    """The first `count` steps on rows `[B, length]`; training accuracies `[length]`."""

    def one(state, row):
        images, labels = (jnp.take(leaf, row, axis=0, mode="clip") for leaf in data)
        return victim_step(key, state, images, labels, recipe=recipe, countermeasure=countermeasure)

    return stepping.take(one, state, rows.T, length=rows.shape[1], count=count)


def _summed_loss(state, images, labels, recipe):
    """Sum of the losses with running statistics."""
    outputs, _ = trainer.forward(state.params, state.batch_stats, images, recipe=recipe)
    judged = recipe.head.apply({"params": state.params["head"]}, outputs, labels)
    return jnp.sum(judged.losses)
