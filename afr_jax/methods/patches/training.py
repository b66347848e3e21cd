"""Training of patches: the problem, several starts side by side, checkpoints, the best start.

One epoch is one step: every training photo once, in one random view, at `LevelOptions.draws` random
levels of each group. A patch is `[h, w]` float in [0, 1], 0 black and 1 the paper's white.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from afr_jax.core import checkpoint, images, parallel, progress, workdir
from afr_jax.methods.patches import loss, placement, scenes
from afr_jax.methods.patches.config import PatchConfig
from afr_jax.perturb import loop, steps

_NUM_CHECKPOINTS = 10
# The first part of the published schedule takes no account of total variation.
_TV_FREE_SHARE = 0.05


class Trained(NamedTuple):
    """Patches on 8-bit values / 255 in [0, 1], the best start's random ones, and a record."""

    patches: dict[str, np.ndarray]
    start: dict[str, np.ndarray]
    record: dict[str, Any]


def random_patches(key: jax.Array, config: PatchConfig) -> loss.Patches:
    """Patches of independent uniform noise within the ink's limits: a start, and a control."""
    shapes = config.shapes()
    keys = jax.random.split(key, len(shapes))
    low, high = config.ink
    return {
        name: jax.random.uniform(one, shapes[name], minval=low, maxval=high)
        for one, name in zip(keys, sorted(shapes), strict=True)
    }


def make_problem(
    variables: chex.ArrayTree,
    batch: scenes.Scene,
    config: PatchConfig,
    *,
    sizes: scenes.Sizes,
) -> loop.Problem:
    """The patches' training as a problem of the perturbation loop.

    The control is the number of steps taken, which switches total variation on. The score falls
    with every step, so that the last patches are kept, as published: a loss on random views would
    pick a lucky view rather than a good patch.
    """
    if config.optimizer == "adam":
        tx = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.epochs))
    else:
        tx = steps.published_patch_steps(config.epochs)

    def loss_fn(patches, count, key):
        parts = loss.loss_parts(key, variables, patches, batch, config=config, sizes=sizes)
        with_tv = count >= _TV_FREE_SHARE * config.epochs
        total = (
            parts.pnet
            + config.stage_weight * parts.stages
            + jnp.where(with_tv, config.tv_weight, 0.0) * parts.variation
            + config.black_weight * parts.black
        )
        score = jnp.where(jnp.isfinite(total), -count.astype(jnp.float32), jnp.inf)
        return loop.Evaluation(total, score, {"loss": total, **parts._asdict()})

    return loop.Problem(
        loss_fn=loss_fn,
        tx=tx,
        project_fn=lambda patches: jax.tree.map(lambda p: jnp.clip(p, *config.ink), patches),
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
    judge_fn: Callable[[loss.Patches], jax.Array]


def make_trainer(
    key: jax.Array,
    variables: chex.ArrayTree,
    batch: scenes.Scene,
    config: PatchConfig,
    *,
    num_judged: int = 8,
) -> Trainer:
    """Compiles the training of patches on a batch of scenes.

    Args:
        key: Decides the training's views; the same when a run is resumed.
        variables: Those of MTCNN's three networks.
        batch: What `scenes.make_scenes` returns; `parallel` may have placed it over devices.
        config: How the patches are trained.
        num_judged: Views of every scene that `judge_fn` takes.

    Returns:
        The functions.
    """
    sizes = scenes.view_sizes(jax.tree.map(np.asarray, batch), config.turns)
    train_key, judge_key = jax.random.split(key)

    def problem(variables, batch):
        return make_problem(variables, batch, config, sizes=sizes)

    @functools.partial(jax.jit, static_argnames="num_starts")
    def start(key, variables, batch, num_starts):
        begin = functools.partial(loop.start, problem(variables, batch))
        keys = jax.random.split(key, num_starts)
        return jax.vmap(lambda one: begin(random_patches(one, config)))(keys)

    @functools.partial(jax.jit, static_argnames="num_steps", donate_argnums=0)
    def advance(states, variables, batch, num_steps):
        def one(state):
            whole = problem(variables, batch)
            return loop.advance(train_key, whole, state, num_steps=num_steps)

        return jax.vmap(one)(states)

    @jax.jit
    def judge(patches, variables, batch, key):
        def one(patches):
            parts = loss.loss_parts(key, variables, patches, batch, config=config, sizes=sizes)
            return parts.pnet + config.stage_weight * parts.stages

        return jax.vmap(one)(patches)

    def judge_all(patches):
        keys = jax.random.split(judge_key, num_judged)
        return sum(judge(patches, variables, batch, one) for one in keys) / num_judged

    return Trainer(
        start_fn=lambda key, num_starts: start(key, variables, batch, num_starts),
        advance_fn=lambda states, num_steps: advance(states, variables, batch, num_steps),
        judge_fn=judge_all,
    )


def to_files(patches: Mapping[str, jax.Array], config: PatchConfig) -> dict[str, np.ndarray]:
    """Patches as 8-bit gray, rounded and still within the ink's limits."""
    low, high = np.ceil(255 * config.ink[0]), np.floor(255 * config.ink[1])
    return {
        name: np.clip(np.asarray(images.to_uint8(patch)), low, high).astype(np.uint8)
        for name, patch in patches.items()
    }


def train(
    key: jax.Array,
    variables: chex.ArrayTree,
    placed: Sequence[placement.Placed],
    config: PatchConfig,
    *,
    work: workdir.Workdir,
    num_starts: int = 1,
) -> Trained:
    """Trains patches on photos, several random starts side by side.

    The photos are split over the devices, as far as their number allows. A stopped run goes on from
    its last checkpoint in `work`; the mean loss goes to metrics.jsonl.

    Args:
        key: of all randomness.
        variables: of the three networks.
        placed: the photos.
        config: of the training.
        work: the run's folder.
        num_starts: how many.

    Returns:
        The patches of the start that does best on views of the same photos that no start has seen.
    """
    start_key, train_key = jax.random.split(key)
    batch = scenes.make_scenes(placed, config.levels)
    devices = jax.local_devices()
    while len(placed) % len(devices):
        devices = devices[:-1]
    mesh = parallel.make_mesh(devices=devices)
    batch = parallel.shard_batch(batch, mesh)
    trainer = make_trainer(train_key, parallel.replicate(variables, mesh), batch, config)
    states = parallel.replicate(trainer.start_fn(start_key, num_starts), mesh)
    first = jax.tree.map(np.asarray, states.delta)
    chunk = max(config.epochs // _NUM_CHECKPOINTS, loop.chunk_length())
    with checkpoint.Checkpoints(work.path / "checkpoints") as saved:
        restored = saved.restore(states)
        done, states = (0, states) if restored is None else restored
        work.truncate_metrics(done)
        begin, taken = time.perf_counter(), 0
        for _ in progress.track(range(done, config.epochs, chunk), description="training"):
            length = min(chunk, config.epochs - done)
            states, losses = _advance(trainer, states, length)
            if not taken:
                # The first steps include compilation: the pace is measured behind them.
                begin = time.perf_counter()
            taken += length
            done += length
            work.append_metrics({"step": done, **losses})
            saved.save(done, states)
    seconds = time.perf_counter() - begin
    judged = np.asarray(trainer.judge_fn(states.delta)) if num_starts > 1 else None
    best = 0 if judged is None else int(np.nanargmin(judged))
    files = to_files(jax.tree.map(lambda p: p[best], states.delta), config)
    after_first = taken - min(chunk, taken)
    return Trained(
        patches={name: patch.astype(np.float32) / 255 for name, patch in files.items()},
        start={name: patch[best] for name, patch in first.items()},
        record={
            "epochs": config.epochs,
            "seconds_per_epoch": seconds / after_first if after_first else None,
            "start_losses": judged,
            "chosen_start": best,
            "num_devices": len(devices),
            "ink": {
                name: {"darkest": int(patch.min()), "lightest": int(patch.max())}
                for name, patch in files.items()
            },
        },
    )


def _advance(trainer, states, length):
    """`length` steps in calls of the backend's chunk length; mean metrics over starts and steps."""
    totals: dict[str, float] = {}
    pieces = []
    taken = 0
    while taken < length:
        part = min(loop.chunk_length(), length - taken)
        states, metrics = trainer.advance_fn(states, part)
        pieces.append(metrics)
        taken += part
    for name in pieces[0]:
        values = np.concatenate([np.asarray(piece[name]).ravel() for piece in pieces])
        totals[name] = float(values.mean())
    return states, totals
