"""Printable gray patches that hide a face from MTCNN.

Kaziakhmedov, Kireev, Melnikov, Pautov, Petiushko: "Real-world attack on MTCNN face detection
system", 2019. The loss is P-Net's face probability at every cell that looks at the face, on the
levels that the detector really uses, plus total variation and a penalty on black. It differs from
the authors' code in what keeps that from working: levels are area averages, those of all evaluated
scale factors count, the hinge begins below the detector's threshold, patches bend with the head,
and an epoch sees every photo in one new random view. Beyond the paper the face probabilities of
R-Net and O-Net are added: P-Net with its four pyramids went on proposing the face, patches of this
size only made the later networks reject it.

A patch is `[h, w]` float in [0, 1], 0 black and 1 the paper's white. One epoch is one step: every
training photo once, in one random view, at `LevelOptions.draws` random levels of each group.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from afr_jax.core import images
from afr_jax.methods.patches import geometry
from afr_jax.methods.patches import scenes as patches_scenes
from afr_jax.models import mtcnn
from afr_jax.perturb import loop, steps, transformations

Patches = dict[str, jax.Array]
# The first part of the published schedule takes no account of total variation.
_TV_FREE_SHARE = 0.05
# What R-Net and O-Net are given: side in pixels; of the squares, drawn at random as the networks
# before them place theirs, the sides and the largest shift, in sides of the face; how many a view.
_STAGES = {
    "rnet": (mtcnn.RNet(), 24, (0.8, 1.5), 0.2),
    "onet": (mtcnn.ONet(), 48, (1.0, 1.3), 0.1),
}
_STAGE_DRAWS = 2


@dataclasses.dataclass(frozen=True)
class PatchOptions:
    """How patches are trained.

    Attributes:
        placement: of `geometry.PLACEMENTS`.
        patch_px: rows of a patch; columns follow from the paper's shape.
        num_steps: epochs.
        optimiser: "mi_fgsm" with the published schedule, or "adam".
        learning_rate: of Adam, in [0, 1] units.
        loss: "l2", the sum of squared excesses over the face's cells of a level, or "max", the
            largest excess.
        margin: face probability from which a cell costs, below the detector's threshold (0.6).
        tv_weight: of total variation, the mean absolute difference of neighbouring texels.
        black_weight: of the mean squared distance from white.
        stage_weight: of R-Net's and O-Net's face probability on squares about the face, which the
            paper does not use; 0 leaves them out.
        ink: (darkest, lightest) value of a texel.
        levels: pyramid levels to draw from.
        turns: how the worn patch moves.
        views: how the photo varies.
    """

    placement: str = "cheeks"
    patch_px: int = 48
    num_steps: int = 2000
    optimiser: str = "mi_fgsm"
    learning_rate: float = 0.06
    loss: str = "l2"
    margin: float = 0.3
    tv_weight: float = 0.1
    black_weight: float = 0.0
    stage_weight: float = 20.0
    ink: tuple[float, float] = (0.05, 0.95)
    levels: patches_scenes.LevelOptions = patches_scenes.LevelOptions()
    turns: patches_scenes.TurnOptions = patches_scenes.TurnOptions()
    views: transformations.ViewOptions = transformations.ViewOptions()

    def __post_init__(self):
        choices = {
            "placement": tuple(geometry.PLACEMENTS),
            "optimiser": ("mi_fgsm", "adam"),
            "loss": ("l2", "max"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be one of {known}")
        if not 0 <= self.ink[0] < self.ink[1] <= 1:
            raise ValueError(f"ink is {self.ink}, must rise within [0, 1]")
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin is {self.margin}, must lie in [0, 1)")
        if self.patch_px < 4 or self.num_steps < 1:
            raise ValueError("a patch has at least 4 rows, a run at least one step")


class Parts(NamedTuple):
    """The parts of the loss, each a scalar, before their weights."""

    pnet: jax.Array
    stages: jax.Array
    variation: jax.Array
    black: jax.Array


def patch_shapes(placement: str, patch_px: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of each patch: square texels on paper."""
    shapes = {}
    for name, area in geometry.PLACEMENTS[placement].items():
        height, width = geometry.paper_size(area)
        shapes[name] = (patch_px, round(patch_px * width / height))
    return shapes


def random_patches(key: jax.Array, options: PatchOptions) -> Patches:
    """Patches of independent uniform noise within the ink's limits: a start, and a control."""
    shapes = patch_shapes(options.placement, options.patch_px)
    keys = jax.random.split(key, len(shapes))
    low, high = options.ink
    return {
        name: jax.random.uniform(one, shapes[name], minval=low, maxval=high)
        for one, name in zip(keys, sorted(shapes), strict=True)
    }


def total_variation(patch: jax.Array) -> jax.Array:
    """Mean absolute difference of vertical, plus that of horizontal neighbours, of `[h, w]`."""
    return jnp.mean(jnp.abs(jnp.diff(patch, axis=0))) + jnp.mean(jnp.abs(jnp.diff(patch, axis=1)))


def blackness(patch: jax.Array) -> jax.Array:
    """Mean squared distance of `[h, w]` from white: the paper's penalty on black area."""
    return jnp.mean((1 - patch) ** 2)


def excess(scores: jax.Array, masks: jax.Array, options: PatchOptions) -> jax.Array:
    """What the cells `[N, h, w]` of N levels cost, `[N]`; cells outside `masks` cost nothing."""
    over = jnp.where(masks, jnp.maximum(scores - options.margin, 0.0), 0.0)
    return jnp.sum(over**2, axis=(1, 2)) if options.loss == "l2" else jnp.max(over, axis=(1, 2))


def loss_parts(
    key: jax.Array,
    variables: dict,
    patches: Patches,
    scenes: patches_scenes.Scene,
    *,
    options: PatchOptions,
    sizes: patches_scenes.Sizes,
) -> Parts:
    """The loss of patches on one random view of every scene.

    Args:
        key: of the views; scene i draws from `fold_in(key, i)`, whatever the devices.
        variables: of the three networks.
        patches: name -> `[h, w]`.
        scenes: a batch, which may be split over devices.
        options: of the training.
        sizes: from `patches_scenes.view_sizes`.

    Returns:
        The parts, means over scenes and levels.
    """

    def one(number, scene):
        view_key, level_key, box_key = jax.random.split(jax.random.fold_in(key, number), 3)
        seen = patches_scenes.view(
            view_key, patches, scene, turns=options.turns, views=options.views, sizes=sizes
        )
        stages = jnp.zeros(())
        if options.stage_weight:
            stages = _stage_cost(box_key, variables, seen, scene, options.margin)
        return patches_scenes.level_crops(level_key, seen, scene, options.levels), stages

    groups, stages = jax.vmap(one)(jnp.arange(scenes.side.shape[0]), scenes)
    costs = []
    for crops in groups:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), crops)
        pixels = mtcnn.normalise(255.0 * flat.pixels)
        scores, _ = mtcnn.PNet().apply(variables["pnet"], pixels, flat.sizes)
        cells = jnp.arange(scores.shape[1])[None, :]
        inside = mtcnn.map_size(flat.sizes)[:, :, None] > cells[:, None, :]
        masks = flat.masks & inside[:, 0, :, None] & inside[:, 1, None, :]
        costs.append(jnp.mean(excess(scores, masks, options)))
    return Parts(
        pnet=sum(costs) / len(costs),
        stages=jnp.mean(stages),
        variation=sum(map(total_variation, patches.values())) / len(patches),
        black=sum(map(blackness, patches.values())) / len(patches),
    )


def make_problem(
    variables: dict,
    scenes: patches_scenes.Scene,
    options: PatchOptions,
    *,
    sizes: patches_scenes.Sizes,
) -> loop.Problem:
    """The patches' training as a problem of the perturbation loop.

    The control is the number of steps taken, which switches total variation on. The score falls
    with every step, so that the last patches are kept, as published: a loss on random views would
    pick a lucky view rather than a good patch.
    """
    if options.optimiser == "adam":
        tx = optax.adam(optax.cosine_decay_schedule(options.learning_rate, options.num_steps))
    else:
        tx = steps.published_patch_steps(options.num_steps)

    def loss_fn(patches, count, key):
        parts = loss_parts(key, variables, patches, scenes, options=options, sizes=sizes)
        with_tv = count >= _TV_FREE_SHARE * options.num_steps
        loss = (
            parts.pnet
            + options.stage_weight * parts.stages
            + jnp.where(with_tv, options.tv_weight, 0.0) * parts.variation
            + options.black_weight * parts.black
        )
        score = jnp.where(jnp.isfinite(loss), -count.astype(jnp.float32), jnp.inf)
        return loop.Evaluation(loss, score, {"loss": loss, **parts._asdict()})

    return loop.Problem(
        loss_fn=loss_fn,
        tx=tx,
        project_fn=lambda patches: jax.tree.map(lambda p: jnp.clip(p, *options.ink), patches),
        control=loop.Control(
            init=lambda: jnp.zeros((), jnp.int32), update=lambda count, evaluation: count + 1
        ),
    )


class Trainer(NamedTuple):
    """Compiled training of several starts side by side.

    start_fn: `key, number of starts -> states`, every leaf with the starts as leading axis;
    advance_fn: `states, number of steps -> states, metrics [starts, steps]`; judge_fn:
    `patches of the states -> [starts]`, the networks' parts of the loss on views that are the same
    for all and not those of the training.
    """

    start_fn: Callable[..., loop.State]
    advance_fn: Callable[..., tuple[loop.State, dict]]
    judge_fn: Callable[[Patches], jax.Array]


def make_trainer(
    key: jax.Array,
    variables: dict,
    scenes: patches_scenes.Scene,
    options: PatchOptions,
    *,
    num_judged: int = 8,
) -> Trainer:
    """Compiles the training of patches on a batch of scenes.

    Args:
        key: of the training's views, the same when a run is resumed.
        variables: of the three networks.
        scenes: from `patches_scenes.make_scenes`; may be placed over devices by `parallel`.
        options: of the training.
        num_judged: views of every scene that `judge_fn` takes.

    Returns:
        The functions.
    """
    sizes = patches_scenes.view_sizes(jax.tree.map(np.asarray, scenes), options.turns)
    train_key, judge_key = jax.random.split(key)

    def problem(variables, scenes):
        return make_problem(variables, scenes, options, sizes=sizes)

    @functools.partial(jax.jit, static_argnames="num_starts")
    def start(key, variables, scenes, num_starts):
        begin = functools.partial(loop.start, problem(variables, scenes))
        keys = jax.random.split(key, num_starts)
        return jax.vmap(lambda one: begin(random_patches(one, options)))(keys)

    @functools.partial(jax.jit, static_argnames="num_steps", donate_argnums=0)
    def advance(states, variables, scenes, num_steps):
        def one(state):
            whole = problem(variables, scenes)
            return loop.advance(train_key, whole, state, num_steps=num_steps)

        return jax.vmap(one)(states)

    @jax.jit
    def judge(patches, variables, scenes, key):
        def one(patches):
            parts = loss_parts(key, variables, patches, scenes, options=options, sizes=sizes)
            return parts.pnet + options.stage_weight * parts.stages

        return jax.vmap(one)(patches)

    def judge_all(patches):
        keys = jax.random.split(judge_key, num_judged)
        return sum(judge(patches, variables, scenes, one) for one in keys) / num_judged

    return Trainer(
        start_fn=lambda key, num_starts: start(key, variables, scenes, num_starts),
        advance_fn=lambda states, num_steps: advance(states, variables, scenes, num_steps),
        judge_fn=judge_all,
    )


def to_files(patches: Mapping[str, jax.Array], options: PatchOptions) -> dict[str, np.ndarray]:
    """Patches as 8-bit gray, rounded and still within the ink's limits."""
    low, high = np.ceil(255 * options.ink[0]), np.floor(255 * options.ink[1])
    return {
        name: np.clip(np.asarray(images.to_uint8(patch)), low, high).astype(np.uint8)
        for name, patch in patches.items()
    }


def _stage_cost(key, variables, seen, scene, margin):
    """Hinged face probabilities of R-Net and O-Net on random squares about the face."""
    total = jnp.zeros(())
    size = jnp.array(seen.inner.shape[:2])
    middle = scene.centre - scene.origin - seen.low
    normal = mtcnn.normalise(255.0 * seen.inner)
    for number, (name, (net, pixels, sides, shift)) in enumerate(_STAGES.items()):
        keys = jax.random.split(jax.random.fold_in(key, number))
        low, high = sides
        side = scene.side * jax.random.uniform(keys[0], (_STAGE_DRAWS, 1), minval=low, maxval=high)
        moved = scene.side * shift * jax.random.uniform(keys[1], (2, _STAGE_DRAWS, 1), minval=-1.0)
        places = (jnp.arange(pixels, dtype=jnp.float32) / (pixels - 1) - 0.5)[None]
        rows, columns = (middle[axis] + moved[axis] + places * side for axis in range(2))
        crops = images.bilinear_crops(normal, rows, columns, size)
        scores = net.apply(variables[name], crops)[0]
        total = total + jnp.mean(jnp.maximum(scores - margin, 0.0) ** 2)
    return total
