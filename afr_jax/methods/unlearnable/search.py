"""Noise that is found with a source network: the search behind error_min, error_max, REM and TAP.

Huang et al. 2021, "Unlearnable Examples: Making Personal Data Unexploitable" (ICLR), equation 1:
argmin over theta of E[min over |delta| <= eps of L(f_theta(x + delta), y)]. The alternation is
`source.train` (M optimizer steps of theta on noisy images) and `refine` (one pass of T signed
gradient steps over the noise of all images), until the training error on noisy data falls below a
limit or the rounds are used up. Error-maximizing noise trains theta on clean images first and
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
import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import checkpoint, parallel
from afr_jax.core import images as image_ops
from afr_jax.core import options as options_lib
from afr_jax.data import sampling
from afr_jax.methods.unlearnable import source
from afr_jax.perturb import loop, sign_descent, stepping
from afr_jax.training import trainer

# Tells the randomness of passes over the noise from that of training steps.
_PASS = 0x7FFFFFFF


@dataclasses.dataclass(frozen=True)
class SearchOptions(source.NoiseOptions):
    """How noise is searched; `recipes` has the values of the papers.

    Attributes:
        permuted: Towards the label of another class (a fixed permutation) instead of the own one.
        source_steps: Optimizer steps of theta on clean images before the first round.
        train_steps: M, optimizer steps of theta on noisy images in each round.
        class_share: The share of the images that a pass of class-wise noise looks at.
        batch_size: Images of a step, of both kinds of steps.
        max_rounds: The largest number of rounds.
        stop_error: Rounds end once the training error is below it (above it with `ascend`); None
            uses them all. With `permuted` the error is that of the other labels.
    """

    permuted: bool = False
    source_steps: int = 0
    train_steps: int = 10
    class_share: float = 1.0
    batch_size: int = 512
    max_rounds: int = 20
    stop_error: float | None = 0.01

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        super().__post_init__()
        if min(self.batch_size, self.max_rounds) < 1:
            raise ValueError("batch_size and max_rounds must be at least 1")
        if min(self.source_steps, self.train_steps) < 0:
            raise ValueError("source_steps and train_steps: from 0 on")
        if not 0 < self.class_share <= 1:
            raise ValueError(f"class_share is {self.class_share}, but must lie in (0, 1]")

    @property
    def noise(self) -> source.NoiseOptions:
        """The static part, which compiled programs depend on."""
        return options_lib.narrowed(self, source.NoiseOptions)


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
    options: SearchOptions,
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

    def train_source(state: SearchState, num_steps: int, *, clean: bool = False) -> SearchState:
        theta = source.train(
            state.key,
            state.train,
            data,
            state.noise,
            recipe=recipe,
            options=options.noise,
            mesh=mesh,
            batches=batches,
            num_steps=num_steps,
            clean=clean,
        )
        return state._replace(train=theta)

    found = checkpoints.restore(state) if checkpoints is not None else None
    state = found[1] if found is not None else train_source(state, options.source_steps, clean=True)
    while not _is_done(state, options):
        state = train_source(state, options.train_steps)
        state = refine(state, data, target_of, recipe=recipe, options=options, seed=seed, mesh=mesh)
        error = source.training_error(
            (state.train.params, state.train.batch_stats),
            data,
            state.noise,
            target_of,
            recipe=recipe,
            options=options.noise,
            mesh=mesh,
            batch_size=_batch_size(options, len(images), mesh),
        )
        number = int(state.round)
        errors = np.array(state.errors)
        errors[number] = error
        state = state._replace(
            round=parallel.replicate(np.asarray(number + 1, np.int32), mesh),
            errors=parallel.replicate(errors, mesh),
        )
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
    options: SearchOptions,
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
    theta = trainer.init_state(key, recipe, image_shape=shape, mesh=mesh)
    noise = np.zeros((num_rows, *shape), np.float32)
    errors = np.full(options.max_rounds, np.nan, np.float32)
    key, number, noise, errors = (
        parallel.replicate(part, mesh) for part in (key, np.zeros((), np.int32), noise, errors)
    )
    return SearchState(key, number, theta, noise, errors)


def refine(
    state: SearchState,
    data: trainer.Data,
    target_of: jax.Array,
    *,
    recipe: trainer.Recipe,
    options: SearchOptions,
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
        chunk: batches of one call, by default those of `stepping.chunk_length`; with 1 (on CPU) a
            call takes one signed step. The result does not depend on it but by rounding.
    """
    count = len(data.labels)
    order = np.arange(count)
    if options.granularity == "class":
        order = np.random.default_rng([seed, int(state.round)]).permutation(count)
        order = order[: max(1, round(options.class_share * count))]
    size = _batch_size(options, len(order), mesh)
    # Rows past the end are looked up as the last image and written nowhere.
    rows = np.full(-(-len(order) // size) * size, count, np.int32)
    rows[: len(order)] = order
    rows = rows.reshape(-1, size)
    key = jax.random.fold_in(jax.random.fold_in(state.key, _PASS), state.round)
    theta = state.train.params, state.train.batch_stats
    static = {"recipe": recipe, "options": options.noise}
    length = chunk or stepping.chunk_length()

    def refine_one(noise: jax.Array, numbers: range) -> tuple[jax.Array, None]:
        part = parallel.shard_batch(sampling.local_rows(rows[numbers.start]), mesh)
        own = jax.random.fold_in(key, numbers.start)
        work = start_batch(data, noise, part, target_of, options=options.noise)
        work, _ = stepping.drive(
            lambda work, steps: (
                advance_batch(own, theta, work, np.int32(steps.start), **static),
                None,
            ),
            work,
            steps=range(options.num_steps),
            length=1,
        )
        return store_batch(noise, work, part, options=options.noise, mesh=mesh), None

    def refine_some(noise: jax.Array, numbers: range) -> tuple[jax.Array, None]:
        part, count = rows[numbers.start : numbers.stop].T, np.int32(len(numbers))
        first = np.int32(numbers.start)
        part = np.pad(part, ((0, 0), (0, length - len(numbers))), mode="edge")
        part = parallel.shard_batch(sampling.local_rows(part), mesh)
        noise = refine_batches(
            key, theta, data, noise, part, first, count, target_of, mesh=mesh, **static
        )
        return noise, None

    noise, _ = stepping.drive(
        refine_one if length == 1 else refine_some,
        state.noise,
        steps=range(len(rows)),
        length=length,
    )
    return state._replace(noise=noise)


class NoiseBatch(NamedTuple):
    """Noise at work, of each image of a batch.

    Attributes:
        images: `[B, H, W, 3]` float in [0, 1].
        labels: `[B]` int32.
        targets: `[B]` int32, labels that the loss is taken of.
        mask: `[B]` bool, False for rows that only fill the batch up.
        deltas: `[B, H, W, 3]` float.
    """

    images: jax.Array
    labels: jax.Array
    targets: jax.Array
    mask: jax.Array
    deltas: jax.Array


@functools.partial(jax.jit, static_argnames=("recipe", "options", "mesh"), donate_argnames="noise")
def refine_batches(
    key: jax.Array,
    theta: source.Theta,
    data: trainer.Data,
    noise: jax.Array,
    rows: jax.Array,
    first: jax.Array | int,
    count: jax.Array | int,
    target_of: jax.Array,
    *,
    recipe: trainer.Recipe,
    options: source.NoiseOptions,
    mesh: parallel.Mesh,
) -> jax.Array:
    """All signed steps of some batches, one batch after another, in one call.

    Args:
        key: of the pass.
        theta: source network.
        data: on the devices.
        noise: donated.
        rows: `[B, S]` int32 of S batches, split over the devices by B; N and above for no image.
        first: number of the first batch within the pass: each has its own randomness.
        count: how many of the batches are taken, as of `stepping.take`.
        target_of: `[K]` int32, target of each class.
        recipe: source network.
        options: of the noise.
        mesh: of the run.

    Returns:
        The noise after them.
    """

    def one(noise: jax.Array, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        row, number = batch
        work = start_batch(data, noise, row, target_of, options=options)
        work = advance_batch(
            jax.random.fold_in(key, number),
            theta,
            work,
            jnp.zeros((), jnp.int32),
            recipe=recipe,
            options=options,
            num_steps=options.num_steps,
        )
        return store_batch(noise, work, row, options=options, mesh=mesh), None

    length = rows.shape[1]
    batches = rows.T, first + jnp.arange(length)
    return stepping.take(one, noise, batches, length=length, count=count)[0]


@functools.partial(jax.jit, static_argnames="options")
def start_batch(
    data: trainer.Data,
    noise: jax.Array,
    rows: jax.Array,
    target_of: jax.Array,
    *,
    options: source.NoiseOptions,
) -> NoiseBatch:
    """Looks up the images of `rows` `[B]` and their noise."""
    mask = rows < len(data.labels)
    images, labels = (jnp.take(leaf, rows, axis=0, mode="clip") for leaf in data)
    deltas = source.noise_of(noise, rows, labels, options)
    return NoiseBatch(image_ops.to_float(images), labels, target_of[labels], mask, deltas)


@functools.partial(
    jax.jit, static_argnames=("recipe", "options", "num_steps"), donate_argnames="work"
)
def advance_batch(
    key: jax.Array,
    theta: source.Theta,
    work: NoiseBatch,
    first_step: jax.Array,
    *,
    recipe: trainer.Recipe,
    options: source.NoiseOptions,
    num_steps: int = 1,
) -> NoiseBatch:
    """Takes signed steps; a pass can be cut between any two, since a step has its own key.

    Args:
        key: of the pass.
        theta: source network.
        work: donated.
        first_step: int32 scalar, number of the first of these steps.
        recipe: source network.
        options: of the noise.
        num_steps: to take.
    """
    direction = -1.0 if options.ascend else 1.0

    def loss_fn(delta: jax.Array, key: jax.Array) -> jax.Array:
        shown = sign_descent.seen(work.images, delta)
        if not options.views:
            return direction * source.summed_loss(theta, shown, work.targets, recipe=recipe)
        losses = []
        for view_key in jax.random.split(key, options.views):
            view = source.robust_view(
                view_key, theta, shown, work.targets, direction, recipe=recipe, options=options
            )
            losses.append(direction * source.summed_loss(theta, view, work.targets, recipe=recipe))
        return functools.reduce(operator.add, losses) / options.views

    problem = sign_descent.problem(loss_fn, limit=options.epsilon, step_size=options.step_size)
    state = loop.start(problem.rules, work.deltas)._replace(step=jnp.asarray(first_step, jnp.int32))
    state, _ = loop.advance(key, problem, state, num_steps=num_steps)
    return work._replace(deltas=state.delta)


@functools.partial(jax.jit, static_argnames=("options", "mesh"), donate_argnames="noise")
def store_batch(
    noise: jax.Array,
    work: NoiseBatch,
    rows: jax.Array,
    *,
    options: source.NoiseOptions,
    mesh: parallel.Mesh,
) -> jax.Array:
    """The noise (donated) after a batch; `rows` `[B]` as in `start_batch`."""
    if options.granularity == "sample":
        noise = noise.at[rows].set(work.deltas, mode="drop")
    else:
        noise = class_means(noise, work.deltas, work.labels, work.mask, limit=options.epsilon)
    return jax.lax.with_sharding_constraint(noise, parallel.replicated(mesh))


def class_means(
    noise: jax.Array, deltas: jax.Array, labels: jax.Array, mask: jax.Array, *, limit: float
) -> jax.Array:
    """Class-wise noise after a batch: the mean over a class's images, within the ball.

    Args:
        noise: `[K, H, W, 3]` before it.
        deltas: `[B, H, W, 3]` of the images.
        labels: `[B]` int32.
        mask: `[B]` bool, which images count.
        limit: largest absolute value.

    Returns:
        `[K, H, W, 3]`; classes without an image in the batch keep their noise.
    """
    weight = mask.astype(noise.dtype)
    counts = jax.ops.segment_sum(weight, labels, len(noise)).reshape(-1, 1, 1, 1)
    sums = jax.ops.segment_sum(deltas * weight.reshape(-1, 1, 1, 1), labels, len(noise))
    means = sums / jnp.maximum(counts, 1.0)
    return jnp.clip(jnp.where(counts > 0, means, noise), -limit, limit)


def _targets(seed: int, num_classes: int, options: SearchOptions) -> np.ndarray:
    """Own labels, or each class's successor in a shuffled circle of all classes."""
    if not options.permuted:
        return np.arange(num_classes, dtype=np.int32)
    if num_classes < 2:
        raise ValueError("a permutation of labels needs two classes or more")
    circle = np.random.default_rng([seed, num_classes]).permutation(num_classes)
    targets = np.empty(num_classes, np.int32)
    targets[circle] = np.roll(circle, -1)
    return targets


def _batch_size(options: SearchOptions, count: int, mesh: parallel.Mesh) -> int:
    """The batch, cut to the data and to a multiple of the devices, at least one each."""
    num_devices = mesh.devices.size
    return max(num_devices, min(options.batch_size, count) // num_devices * num_devices)


def _is_done(state: SearchState, options: SearchOptions) -> bool:
    done = int(state.round)
    return done >= options.max_rounds or _met(np.asarray(state.errors)[:done], options)


def _met(errors: np.ndarray, options: SearchOptions) -> bool:
    if not len(errors) or options.stop_error is None:
        return False
    return bool(
        errors[-1] >= options.stop_error if options.ascend else errors[-1] < options.stop_error
    )
