"""A whole training run of patches: starts, checkpoints, progress, choice of the best start."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from afr_jax.core import checkpoint, parallel, progress, workdir
from afr_jax.methods.patches import attack, placement
from afr_jax.methods.patches import scenes as patches_scenes
from afr_jax.perturb import loop

# Parts of the random views that can be switched off: name -> (options, its fields and neutral
# values).
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "light": ("views", {"light": 0.0}),
    "contrast": ("views", {"contrast": 0.0}),
    "colour_cast": ("views", {"colour_cast": 0.0}),
    "noise": ("views", {"noise": 0.0}),
    "blur": ("views", {"blur_px": 0.0}),
    "jpeg": ("views", {"jpeg_quality": None}),
    "turn": ("turns", {"turn_degrees": 0.0, "scale": 0.0, "shift": 0.0}),
    "print": ("turns", {"print_contrast": 0.0}),
    "scale": ("levels", {"scale_jitter": 0.0}),
}
_NUM_CHECKPOINTS = 10


class Trained(NamedTuple):
    """Patches on 8-bit values / 255 in [0, 1], the best start's random ones, and a record."""

    patches: dict[str, np.ndarray]
    start: dict[str, np.ndarray]
    record: dict[str, Any]


def without(options: attack.PatchOptions, names: Sequence[str]) -> attack.PatchOptions:
    """Options without some parts of the random views (`PARTS`).

    Raises:
        ValueError: there is no such part.
    """
    for name in names:
        if name not in PARTS:
            raise ValueError(f"there is no part {name!r} of the views, only {', '.join(PARTS)}")
        field, changes = PARTS[name]
        part = dataclasses.replace(getattr(options, field), **changes)
        options = dataclasses.replace(options, **{field: part})
    return options


def train(
    key: jax.Array,
    variables: dict,
    placed: Sequence[placement.Placed],
    options: attack.PatchOptions,
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
        options: of the training.
        work: the run's folder.
        num_starts: how many.

    Returns:
        The patches of the start that does best on views of the same photos that no start has seen.
    """
    start_key, train_key = jax.random.split(key)
    scenes = patches_scenes.make_scenes(placed, options.levels)
    devices = jax.local_devices()
    while len(placed) % len(devices):
        devices = devices[:-1]
    mesh = parallel.make_mesh(devices=devices)
    scenes = parallel.shard_batch(scenes, mesh)
    trainer = attack.make_trainer(train_key, parallel.replicate(variables, mesh), scenes, options)
    states = parallel.replicate(trainer.start_fn(start_key, num_starts), mesh)
    first = jax.tree.map(np.asarray, states.delta)
    chunk = max(options.num_steps // _NUM_CHECKPOINTS, loop.chunk_length())
    with checkpoint.Checkpoints(work.path / "checkpoints") as saved:
        restored = saved.restore(states)
        done, states = (0, states) if restored is None else restored
        work.truncate_metrics(done)
        begin, taken = time.perf_counter(), 0
        for _ in progress.track(range(done, options.num_steps, chunk), description="training"):
            length = min(chunk, options.num_steps - done)
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
    files = attack.to_files(jax.tree.map(lambda p: p[best], states.delta), options)
    after_first = taken - min(chunk, taken)
    return Trained(
        patches={name: patch.astype(np.float32) / 255 for name, patch in files.items()},
        start={name: patch[best] for name, patch in first.items()},
        record={
            "epochs": options.num_steps,
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
