"""The loss of gray patches that hide a face from MTCNN: face probabilities, smoothness, black area.

Kaziakhmedov, Kireev, Melnikov, Pautov, Petiushko: "Real-world attack on MTCNN face detection
system", 2019. The loss is P-Net's face probability at every cell that looks at the face, on the
levels that the detector really uses, plus total variation and a penalty on black. It differs from
the authors' code in what keeps that from working: levels are area averages, those of all evaluated
scale factors count, the hinge begins below the detector's threshold, patches bend with the head,
and an epoch sees every photo in one new random view. Beyond the paper the face probabilities of
R-Net and O-Net are added: P-Net with its four pyramids went on proposing the face, patches of this
size only made the later networks reject it.

A patch is `[h, w]` float in [0, 1], 0 black and 1 the paper's white.
"""

import functools
import operator
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from afr_jax.core import images
from afr_jax.methods.patches import scenes, views
from afr_jax.methods.patches.config import PatchConfig
from afr_jax.models import mtcnn

Patches = dict[str, jax.Array]
# What R-Net and O-Net are given: side in pixels; of the squares, drawn at random as the networks
# before them place theirs, the sides and the largest shift, in sides of the face; how many a view.
_STAGES = {
    "rnet": (mtcnn.RNet(), 24, (0.8, 1.5), 0.2),
    "onet": (mtcnn.ONet(), 48, (1.0, 1.3), 0.1),
}
_STAGE_DRAWS = 2


class Parts(NamedTuple):
    """The parts of the loss, each a scalar, before their weights.

    Attributes:
        pnet: P-Net's excess over the margin.
        stages: The same of R-Net and O-Net.
        variation: Total variation of the patches.
        black: Their distance from white.
    """

    pnet: jax.Array
    stages: jax.Array
    variation: jax.Array
    black: jax.Array


def total_variation(patch: jax.Array) -> jax.Array:
    """Mean absolute difference of vertical, plus that of horizontal neighbors, of `[h, w]`."""
    return jnp.mean(jnp.abs(jnp.diff(patch, axis=0))) + jnp.mean(jnp.abs(jnp.diff(patch, axis=1)))


def blackness(patch: jax.Array) -> jax.Array:
    """Mean squared distance of `[h, w]` from white: the paper's penalty on black area."""
    return jnp.mean((1 - patch) ** 2)


def excess(scores: jax.Array, masks: jax.Array, config: PatchConfig) -> jax.Array:
    """What cells with too high a face probability cost.

    Args:
        scores: Face probabilities `[N, h, w]` of the cells of N levels.
        masks: `[N, h, w]` bool; cells outside cost nothing.
        config: Its `margin` and `loss` count.

    Returns:
        The cost of each level, `[N]`.
    """
    chex.assert_rank([scores, masks], 3)
    over = jnp.where(masks, jnp.maximum(scores - config.margin, 0.0), 0.0)
    return jnp.sum(over**2, axis=(1, 2)) if config.loss == "l2" else jnp.max(over, axis=(1, 2))


def loss_parts(
    key: jax.Array,
    variables: mtcnn.Variables,
    patches: Patches,
    batch: scenes.Scene,
    *,
    config: PatchConfig,
    sizes: views.Sizes,
    mask: jax.Array | None = None,
) -> Parts:
    """The loss of patches on one random view of every scene.

    Args:
        key: Of the views; scene i draws from `fold_in(key, i)`, whatever the devices.
        variables: Those of MTCNN's three networks.
        patches: Each patch `[h, w]` in [0, 1], by its name.
        batch: Scenes, which may be split over devices.
        config: How the loss is made up.
        sizes: What `views.view_sizes` says of the batch.
        mask: `[B]` bool, the scenes that count (others fill a batch up); None for all.

    Returns:
        The parts, means over the scenes that count and levels.
    """

    def one(number: jax.Array, scene: scenes.Scene) -> tuple[tuple[views.Crops, ...], jax.Array]:
        view_key, level_key, box_key = jax.random.split(jax.random.fold_in(key, number), 3)
        seen = views.view(
            view_key,
            patches,
            scene,
            turns=config.turns,
            views=config.views,
            sizes=sizes,
            erased=config.erased,
        )
        stages = jnp.zeros(())
        if config.stage_weight:
            stages = _stage_cost(box_key, variables, seen, scene, config.margin)
        return views.level_crops(level_key, seen, scene, config.levels), stages

    groups, stages = jax.vmap(one)(jnp.arange(batch.side.shape[0]), batch)
    costs = []
    for crops in groups:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), crops)
        pixels = mtcnn.normalize(255.0 * flat.pixels)
        scores = mtcnn.propose(variables.pnet, pixels, flat.sizes)[0]
        cells = jnp.arange(scores.shape[1])[None, :]
        inside = mtcnn.map_size(flat.sizes)[:, :, None] > cells[:, None, :]
        masks = flat.masks & inside[:, 0, :, None] & inside[:, 1, None, :]
        costs.append(_mean(excess(scores, masks, config), mask))
    printed = patches.values()
    return Parts(
        pnet=functools.reduce(operator.add, costs) / len(costs),
        stages=_mean(stages, mask),
        variation=functools.reduce(operator.add, map(total_variation, printed)) / len(patches),
        black=functools.reduce(operator.add, map(blackness, printed)) / len(patches),
    )


def _mean(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Mean of `[B * K]` values, those of a scene side by side, over the scenes that count."""
    if mask is None:
        return jnp.mean(values)
    by_scene = values.reshape(mask.shape[0], -1)
    total = jnp.sum(jnp.where(mask[:, None], by_scene, 0.0))
    return total / (jnp.sum(mask) * by_scene.shape[1])


def _stage_cost(
    key: jax.Array, variables: mtcnn.Variables, seen: views.View, scene: scenes.Scene, margin: float
) -> jax.Array:
    """Hinged face probabilities of R-Net and O-Net on random squares about the face."""
    total = jnp.zeros(())
    size = jnp.array(seen.inner.shape[:2])
    middle = scene.center - scene.origin - seen.low
    normal = mtcnn.normalize(255.0 * seen.inner)
    for number, (name, (net, pixels, sides, shift)) in enumerate(_STAGES.items()):
        keys = jax.random.split(jax.random.fold_in(key, number))
        low, high = sides
        side = scene.side * jax.random.uniform(keys[0], (_STAGE_DRAWS, 1), minval=low, maxval=high)
        moved = scene.side * shift * jax.random.uniform(keys[1], (2, _STAGE_DRAWS, 1), minval=-1.0)
        places = (jnp.arange(pixels, dtype=jnp.float32) / (pixels - 1) - 0.5)[None]
        rows, columns = (middle[axis] + moved[axis] + places * side for axis in range(2))
        crops = images.bilinear_crops(normal, rows, columns, size)
        scores = net.apply(getattr(variables, name), crops)[0]
        total = total + jnp.mean(jnp.maximum(scores - margin, 0.0) ** 2)
    return total
