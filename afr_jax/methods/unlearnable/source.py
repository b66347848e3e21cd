"""The source network of a noise search: what it is shown, its training, and its error.

Data sets are `trainer.Data`, images uint8; noise is float32 in [0, 1] units, `[N, H, W, 3]` by
image or `[K, H, W, 3]` by class; theta is the pair (params, batch_stats) of a source network.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import images as image_ops
from afr_jax.core import parallel
from afr_jax.data import augmentation, sampling
from afr_jax.models import heads
from afr_jax.models.weights import conversion
from afr_jax.perturb import sign_descent, stepping
from afr_jax.training import trainer

Theta = tuple[conversion.Variables, conversion.Variables]


@dataclasses.dataclass(frozen=True)
class NoiseOptions:
    """What a noise is and how a network is shown it: static options of compiled programs.

    Attributes:
        granularity: One noise an image, or one a class.
        ascend: Raise the loss instead of lowering it.
        epsilon: The largest absolute value of the noise, in [0, 1] units.
        step_size: The size of a signed step, in [0, 1] units.
        num_steps: T, signed steps of one pass.
        views: Random views of an image that a step averages over; 0 for the image itself.
        view: What a view is: crops and flips by default.
        adversary_radius: The radius of the inner adversary, in [0, 1] units; 0 for none.
        adversary_step_size: The size of its steps, in [0, 1] units.
        adversary_steps: The number of its steps.
    """

    granularity: Literal["sample", "class"] = "sample"
    ascend: bool = False
    epsilon: float = 8 / 255
    step_size: float = 0.8 / 255
    num_steps: int = 20
    views: int = 0
    view: augmentation.Augmentation = augmentation.CIFAR
    adversary_radius: float = 0.0
    adversary_step_size: float = 0.8 / 255
    adversary_steps: int = 10

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        if self.granularity not in ("sample", "class"):
            raise ValueError(f"granularity is {self.granularity!r}, must be 'sample' or 'class'")
        if not 0 < self.epsilon <= 1 or not 0 < self.step_size <= 1:
            raise ValueError(
                f"epsilon is {self.epsilon} and step_size {self.step_size}, but both must lie in "
                "(0, 1]"
            )
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}, but must be at least 1")
        if min(self.views, self.adversary_radius) < 0:
            raise ValueError(
                f"views is {self.views} and adversary_radius {self.adversary_radius}: from 0 on"
            )


def train(
    key: jax.Array,
    state: trainer.TrainState,
    data: trainer.Data,
    noise: jax.Array,
    *,
    recipe: trainer.Recipe,
    options: NoiseOptions,
    mesh: parallel.Mesh,
    batches: sampling.Batches,
    num_steps: int,
    clean: bool = False,
) -> trainer.TrainState:
    """Trains the source network from the host.

    Args:
        key: The key of the whole search.
        state: The network between two steps; donated.
        data: The images, on the devices.
        noise: The noise of the images.
        recipe: Network, head and optimizer; its augmentation is not used.
        options: The noise's, `NoiseOptions` itself and no class derived from it: a constant of the
            compiled program.
        mesh: The devices.
        batches: The rows of each step.
        num_steps: The number of optimizer steps.
        clean: Whether images are shown without noise.
    """
    first, length = int(state.step), stepping.chunk_length()

    def advance(state: trainer.TrainState, steps: range) -> tuple[trainer.TrainState, None]:
        rows = trainer.place_rows(batches, steps, mesh, length=length)
        state = train_chunk(
            key,
            state,
            data,
            noise,
            rows,
            np.int32(len(steps)),
            recipe=recipe,
            options=options,
            mesh=mesh,
            clean=clean,
        )
        return state, None

    steps = range(first, first + num_steps)
    return stepping.drive(advance, state, steps=steps, length=length)[0]


@functools.partial(
    jax.jit, static_argnames=("recipe", "options", "mesh", "clean"), donate_argnames="state"
)
def train_chunk(
    key: jax.Array,
    state: trainer.TrainState,
    data: trainer.Data,
    noise: jax.Array,
    rows: jax.Array,
    count: jax.Array | int,
    *,
    recipe: trainer.Recipe,
    options: NoiseOptions,
    mesh: parallel.Mesh,
    clean: bool = False,
) -> trainer.TrainState:
    """Some steps of `train` in one call.

    Args:
        key: See `train`, as the other arguments.
        state: Donated.
        data: See there.
        noise: See there.
        rows: What `trainer.place_rows` returns, `[B, length]` int32.
        count: How many of the steps are taken, as of `stepping.take`.
        recipe: See `train`, as the others.
        options: See there.
        mesh: See there.
        clean: See there.
    """
    recipe = dataclasses.replace(recipe, augmentation=augmentation.Augmentation())

    def one(state: trainer.TrainState, row: jax.Array) -> tuple[trainer.TrainState, None]:
        images, labels = (jnp.take(leaf, row, axis=0, mode="clip") for leaf in data)
        images = image_ops.to_float(images)
        if not clean:
            images = jnp.clip(images + noise_of(noise, row, labels, options), 0.0, 1.0)
        if options.views:
            view_key = jax.random.fold_in(jax.random.fold_in(key, state.step), 1)
            theta = state.params, state.batch_stats
            images = robust_view(
                view_key, theta, images, labels, 1.0, recipe=recipe, options=options
            )
        state, _ = trainer.train_step(key, state, images, labels, recipe=recipe)
        return jax.lax.with_sharding_constraint(state, parallel.replicated(mesh)), None

    return stepping.take(one, state, rows.T, length=rows.shape[1], count=count)[0]


def training_error(
    theta: Theta,
    data: trainer.Data,
    noise: jax.Array,
    target_of: jax.Array,
    *,
    recipe: trainer.Recipe,
    options: NoiseOptions,
    mesh: parallel.Mesh,
    batch_size: int,
    backend: parallel.Backend = "jit",
) -> float:
    """Share of noisy training images whose largest logit is not that of their target.

    Args:
        theta: The source network.
        data: The images, on the devices.
        noise: The noise of the images.
        target_of: `[K]` int32, the target of each class.
        recipe: The network and its head.
        options: The noise's, as of `train`.
        mesh: The devices.
        batch_size: Images of one call.
        backend: As of `parallel.map_batches`.
    """
    map_fn = parallel.map_batches(
        _correct,
        mesh,
        in_axes=(None, None, None, 0, None),
        batch_size=batch_size,
        of="batch",
        backend=backend,
        static={"recipe": recipe, "options": options},
    )
    rows = np.arange(len(data.labels), dtype=np.int32)
    return 1.0 - float(map_fn(theta, data, noise, rows, target_of).sum()) / len(rows)


def noise_of(
    noise: jax.Array, rows: jax.Array, labels: jax.Array, options: NoiseOptions
) -> jax.Array:
    """The noise `[B, H, W, 3]` of images, by their rows `[B]` or their labels `[B]`."""
    index = rows if options.granularity == "sample" else labels
    return jnp.take(noise, index, axis=0, mode="clip")


def robust_view(
    key: jax.Array,
    theta: Theta,
    images: jax.Array,
    labels: jax.Array,
    direction: float,
    *,
    recipe: trainer.Recipe,
    options: NoiseOptions,
) -> jax.Array:
    """A random view, with the inner adversary's change on top of it (no gradient).

    Args:
        key: The key of the view and the adversary's start.
        theta: The source network.
        images: `[B, H, W, 3]` float in [0, 1].
        labels: `[B]` int32, the labels that the adversary's loss is taken of.
        direction: 1.0 where the adversary raises the loss, -1.0 where it lowers it.
        recipe: The network and its head.
        options: The adversary's.
    """
    view_key, adversary_key = jax.random.split(key)
    views = augmentation.augment_batch(view_key, images, options=options.view)
    if not options.adversary_radius:
        return views
    attacked = sign_descent.adversarial(
        adversary_key,
        lambda shown: direction * summed_loss(theta, shown, labels, recipe=recipe),
        jax.lax.stop_gradient(views),
        limit=options.adversary_radius,
        step_size=options.adversary_step_size,
        num_steps=options.adversary_steps,
    )
    return views + jax.lax.stop_gradient(attacked - views)


def summed_loss(
    theta: Theta, images: jax.Array, labels: jax.Array, *, recipe: trainer.Recipe
) -> jax.Array:
    """The sum of the losses of images `[B, H, W, 3]` in [0, 1], with running statistics."""
    params, batch_stats = theta
    outputs, _ = trainer.forward(params, batch_stats, images, recipe=recipe)
    judged = heads.judge(recipe.head, params["head"], outputs, labels)
    return jnp.sum(judged.losses)


def _correct(
    theta: Theta,
    data: trainer.Data,
    noise: jax.Array,
    rows: jax.Array,
    target_of: jax.Array,
    *,
    recipe: trainer.Recipe,
    options: NoiseOptions,
) -> jax.Array:
    """Whether noisy images of the rows `[B]` are taken for their targets, `[B]`."""
    images, labels = (jnp.take(leaf, rows, axis=0, mode="clip") for leaf in data)
    noisy = jnp.clip(image_ops.to_float(images) + noise_of(noise, rows, labels, options), 0.0, 1.0)
    params, batch_stats = theta
    outputs, _ = trainer.forward(params, batch_stats, noisy, recipe=recipe)
    judged = heads.judge(recipe.head, params["head"], outputs, target_of[labels])
    return judged.correct
