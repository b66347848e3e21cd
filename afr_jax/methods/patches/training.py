"""Training of patches: the problem, several starts side by side, checkpoints, the best start.

One epoch is one step: every training photo once, in one random view, at `LevelOptions.draws` random
levels of each group. A patch is `[h, w]` float in [0, 1], 0 black and 1 the paper's white.
"""

import contextlib
import dataclasses
import functools
import operator
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from afr_jax.core import checkpoint, files, images, parallel, progress
from afr_jax.core import workdir as workdirs
from afr_jax.data import video
from afr_jax.methods.patches import geometry, loss, people, placement, print_sheet, scenes, views
from afr_jax.methods.patches.config import PatchConfig
from afr_jax.models import mtcnn
from afr_jax.perturb import loop, stepping, steps

_NUM_CHECKPOINTS = 10
# The first part of the published schedule takes no account of total variation.
_TV_FREE_SHARE = 0.05


class TrainingRecord(NamedTuple):
    """How a training went.

    Attributes:
        epochs: Steps of the training.
        seconds_per_epoch: Without the first steps, which include compilation; None if there were no
            others.
        start_losses: The networks' parts of the loss of each start, which the best is chosen by;
            None if there is one start.
        chosen_start: Number of the best start.
        num_devices: Devices that the photos were split over.
        ink: Darkest and lightest 8-bit value of each patch.
    """

    epochs: int
    seconds_per_epoch: float | None
    start_losses: np.ndarray | None
    chosen_start: int
    num_devices: int
    ink: dict[str, dict[str, int]]


@dataclasses.dataclass(frozen=True)
class TrainedPatches:
    """Trained patches, ready to print.

    Attributes:
        placement: Where they are worn, one of `geometry.PLACEMENTS`.
        patches: `[h, w]` float32 in [0, 1] on 8-bit values, by name.
        start: What they were before the training.
        record: How the training went.
        skipped: (name, reason) of frames that were not trained on.
    """

    placement: str
    patches: dict[str, np.ndarray]
    start: dict[str, np.ndarray]
    record: TrainingRecord
    skipped: tuple[tuple[str, str], ...] = ()

    def save(
        self, folder: str | os.PathLike[str], *, face_width_mm: float = geometry.FACE_WIDTH_MM
    ) -> dict[str, tuple[float, float]]:
        """Writes `patches/*.png` and `patches.pdf`, a page that is true to size.

        Args:
            folder: Where the files go; existing ones are replaced.
            face_width_mm: Width of the face across the cheekbones, in [80, 220] mm.

        Returns:
            Height and width of each patch on paper, in millimeters.

        Raises:
            ValueError: `face_width_mm` is out of its range.
        """
        folder = pathlib.Path(folder)
        areas = geometry.PLACEMENTS[self.placement]
        sizes = {
            name: geometry.paper_size(area, face_width_mm=face_width_mm)
            for name, area in areas.items()
        }
        pictures = {name: np.round(255 * self.patches[name]).astype(np.uint8) for name in areas}
        for name, picture in pictures.items():
            path = folder / "patches" / f"{name}.png"
            files.write_atomically(path, print_sheet.png(picture), overwrite=True)
        note = f"{self.placement}, for a face {face_width_mm:.0f} mm wide"
        page = print_sheet.pdf(pictures, sizes, note=note)
        files.write_atomically(folder / "patches.pdf", page, overwrite=True)
        return sizes


def random_patches(key: jax.Array, config: PatchConfig) -> loss.Patches:
    """Patches of independent uniform noise within the ink's limits: a start, and a control."""
    shapes = config.shapes()
    keys = jax.random.split(key, len(shapes))
    low, high = config.ink
    return {
        name: jax.random.uniform(one, shapes[name], minval=low, maxval=high)
        for one, name in zip(keys, sorted(shapes), strict=True)
    }


def make_rules(config: PatchConfig) -> loop.Rules:
    """How patches move: within the limits of the ink, by the config's optimizer.

    The last patches are kept, as published: a loss on random views would pick a lucky view rather
    than a good patch.
    """
    if config.optimizer == "adam":
        tx = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.epochs))
    else:
        tx = steps.published_patch_steps(config.epochs)
    return loop.Rules(
        tx=tx,
        project_fn=lambda patches: jax.tree.map(lambda p: jnp.clip(p, *config.ink), patches),
        keep="last",
    )


def make_problem(
    variables: mtcnn.Variables,
    batch: scenes.Scene,
    config: PatchConfig,
    *,
    sizes: views.Sizes,
    mask: jax.Array | None = None,
) -> loop.Problem:
    """The patches' training as a problem of the perturbation loop.

    Total variation counts from a share of the steps on.

    Args:
        variables: Those of MTCNN's three networks.
        batch: What `scenes.make_scenes` returns.
        config: How the patches are trained.
        sizes: What `views.view_sizes` says of the batch.
        mask: `[B]` bool, the scenes that count; None for all.
    """

    def loss_fn(
        patches: loss.Patches, weights: tuple[()], key: jax.Array, step: jax.Array
    ) -> loop.Evaluation:
        del weights
        parts = loss.loss_parts(
            key, variables, patches, batch, config=config, sizes=sizes, mask=mask
        )
        with_tv = step >= _TV_FREE_SHARE * config.epochs
        total = (
            parts.pnet
            + config.stage_weight * parts.stages
            + jnp.where(with_tv, config.tv_weight, 0.0) * parts.variation
            + config.black_weight * parts.black
        )
        return loop.Evaluation(total, total, {"loss": total, **parts._asdict()})

    return loop.Problem(loss_fn, make_rules(config))


class Trainer(NamedTuple):
    """Compiled training of several starts side by side.

    start_fn: `key, number of starts -> states`, every leaf with the starts as leading axis;
    advance_fn: `states, number of steps -> states, metrics [starts, length]`, where one program
    serves all numbers up to the length of a chunk (`stepping`), and the entries behind them are
    zeros; judge_fn: `patches of the states -> [starts]`, the networks' parts of the loss on views
    that are the same for all and not those of the training.
    """

    start_fn: Callable[[jax.Array, int], loop.State]
    advance_fn: Callable[[loop.State, int], tuple[loop.State, loop.Metrics]]
    judge_fn: Callable[[loss.Patches], jax.Array]


def make_trainer(
    key: jax.Array,
    variables: mtcnn.Variables,
    batch: scenes.Scene,
    config: PatchConfig,
    *,
    mask: jax.Array | None = None,
    num_judged: int = 8,
) -> Trainer:
    """Compiles the training of patches on a batch of scenes.

    Args:
        key: Decides the training's views; the same when a run is resumed.
        variables: Those of MTCNN's three networks.
        batch: What `scenes.make_scenes` returns; `parallel` may have placed it over devices.
        config: How the patches are trained.
        mask: `[B]` bool, the scenes that count, placed as they are; None for all.
        num_judged: Views of every scene that `judge_fn` takes.

    Returns:
        The functions.
    """
    sizes = views.view_sizes(parallel.fetch(batch), config.turns)
    train_key, judge_key = jax.random.split(key)

    @functools.partial(jax.jit, static_argnames="num_starts")
    def start(key: jax.Array, num_starts: int) -> loop.State:
        begin = functools.partial(loop.start, make_rules(config))
        keys = jax.random.split(key, num_starts)
        return jax.vmap(lambda one: begin(random_patches(one, config)))(keys)

    @functools.partial(jax.jit, static_argnames="length", donate_argnums=0)
    def advance(
        states: loop.State,
        variables: mtcnn.Variables,
        batch: scenes.Scene,
        mask: jax.Array | None,
        count: jax.Array | int,
        length: int,
    ) -> tuple[loop.State, Mapping[str, jax.Array]]:
        def one(state: loop.State) -> tuple[loop.State, Mapping[str, jax.Array]]:
            problem = make_problem(variables, batch, config, sizes=sizes, mask=mask)
            return loop.advance(train_key, problem, state, num_steps=length, count=count)

        return jax.vmap(one)(states)

    @jax.jit
    def judge(
        patches: loss.Patches,
        variables: mtcnn.Variables,
        batch: scenes.Scene,
        mask: jax.Array | None,
        key: jax.Array,
    ) -> jax.Array:
        def one(patches: loss.Patches) -> jax.Array:
            parts = loss.loss_parts(
                key, variables, patches, batch, config=config, sizes=sizes, mask=mask
            )
            return parts.pnet + config.stage_weight * parts.stages

        return jax.vmap(one)(patches)

    def advance_some(
        states: loop.State, num_steps: int
    ) -> tuple[loop.State, Mapping[str, jax.Array]]:
        length = max(num_steps, stepping.chunk_length())
        return advance(states, variables, batch, mask, np.int32(num_steps), length)

    def judge_all(patches: loss.Patches) -> jax.Array:
        keys = jax.random.split(judge_key, num_judged)
        costs = (judge(patches, variables, batch, mask, one) for one in keys)
        return functools.reduce(operator.add, costs) / num_judged

    return Trainer(start_fn=start, advance_fn=advance_some, judge_fn=judge_all)


def to_files(patches: Mapping[str, jax.Array], config: PatchConfig) -> dict[str, np.ndarray]:
    """Patches as 8-bit gray, rounded and still within the ink's limits."""
    low, high = np.ceil(255 * config.ink[0]), np.floor(255 * config.ink[1])
    return {
        name: np.clip(np.asarray(images.to_uint8(patch)), low, high).astype(np.uint8)
        for name, patch in patches.items()
    }


def train(
    key: jax.Array,
    variables: mtcnn.Variables,
    placed: Sequence[placement.Placed],
    config: PatchConfig,
    *,
    work: workdirs.Workdir,
) -> TrainedPatches:
    """Trains patches on photos, `config.starts` random starts side by side.

    The photos are split over the devices; where their number does not divide, photos that do not
    count fill the last ones up. A stopped run goes on from its last checkpoint in `work`; the mean
    loss goes to metrics.jsonl.

    Args:
        key: Decides all randomness.
        variables: Those of MTCNN's three networks.
        placed: Photos with the patches placed.
        config: How the patches are trained.
        work: The run's folder.

    Returns:
        The patches of the start that does best on views of the same photos that no start has seen.
    """
    start_key, train_key = jax.random.split(key)
    mesh = parallel.make_mesh()
    batch, mask = parallel.pad_batch(scenes.make_scenes(placed, config.levels), mesh.devices.size)
    batch = parallel.spread(batch, mesh)
    mask = None if mask.all() else parallel.spread(mask, mesh)
    variables = parallel.replicate(variables, mesh)
    trainer = make_trainer(train_key, variables, batch, config, mask=mask)
    states = parallel.replicate(trainer.start_fn(start_key, config.starts), mesh)
    first = jax.tree.map(np.asarray, states.delta)
    span = max(config.epochs // _NUM_CHECKPOINTS, stepping.chunk_length())
    with checkpoint.Checkpoints(work.path / "checkpoints") as saved:
        restored = saved.restore(states)
        done, states = (0, states) if restored is None else restored
        work.truncate_metrics(done)
        begin, taken = time.perf_counter(), 0
        for first_step in progress.track(range(done, config.epochs, span), description="training"):
            part = range(first_step, min(first_step + span, config.epochs))
            states, metrics = stepping.drive(
                lambda states, steps: trainer.advance_fn(states, len(steps)),
                states,
                steps=part,
                axis=1,
            )
            if not taken:
                # The first steps include compilation: the pace is measured behind them.
                begin = time.perf_counter()
            taken += len(part)
            # Means over starts and steps, summed up step after step.
            losses = {name: float(values.T.ravel().mean()) for name, values in metrics.items()}
            work.append_metrics({"step": part.stop, **losses})
            saved.save(part.stop, states)
    seconds = time.perf_counter() - begin
    judged = np.asarray(trainer.judge_fn(states.delta)) if config.starts > 1 else None
    best = 0 if judged is None else int(np.nanargmin(judged))
    pictures = to_files(jax.tree.map(lambda p: p[best], states.delta), config)
    after_first = taken - min(span, taken)
    return TrainedPatches(
        placement=config.placement,
        patches={name: patch.astype(np.float32) / 255 for name, patch in pictures.items()},
        start={name: patch[best] for name, patch in first.items()},
        record=TrainingRecord(
            epochs=config.epochs,
            seconds_per_epoch=seconds / after_first if after_first else None,
            start_losses=judged,
            chosen_start=best,
            num_devices=mesh.devices.size,
            ink={
                name: {"darkest": int(patch.min()), "lightest": int(patch.max())}
                for name, patch in pictures.items()
            },
        ),
    )


def train_patches(
    detector: mtcnn.Variables,
    frames: video.Frames | Sequence[video.Frame] | np.ndarray,
    *,
    config: PatchConfig | None = None,
    key: jax.Array | int = 0,
    is_film: bool = True,
    workdir: str | os.PathLike[str] | None = None,
) -> TrainedPatches:
    """Trains patches that hide the person of some frames from the detector.

    Every frame that shows the person is trained on; 20 are plenty.

    Args:
        detector: The variables of MTCNN's three networks, as `Recognizer.detector` holds them.
        frames: What `read_frames` returns, a list of frames, or an array `[N, H, W, 3]` uint8.
        config: How the patches are trained; by default as `PatchConfig` says.
        key: Decides all randomness; a number stands for `jax.random.key` of it.
        is_film: Whether the frames follow each other, so that the person is followed from the
            surest frame on; else the person is the surest face of each.
        workdir: Folder for checkpoints and metrics, from which a stopped run goes on; by default
            none are kept.

    Returns:
        The patches.

    Raises:
        TypeError: `frames` is something else.
        ValueError: No frame shows a face that the patches can be placed on.
        options.UsageError: `workdir` belongs to another run.
    """
    config = PatchConfig() if config is None else config
    shown, lost = people.find_person(detector, people.as_frames(frames), is_film=is_film)
    placed, left_out = placement.place_all(shown, config.placement)
    if not placed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in (*lost, *left_out))
        raise ValueError(f"there is no frame to train on ({reasons})")
    key = jax.random.key(key) if isinstance(key, int) else key
    with contextlib.ExitStack() as stack:
        folder = workdir or stack.enter_context(tempfile.TemporaryDirectory())
        # Patches of one person's frames are no start for another's.
        data = {str(i): frame.pixels for i, frame in enumerate(shown)}
        settings = {
            "patches": config,
            "frames": files.digest_of(data),
            "is_film": is_film,
            "key": np.asarray(jax.random.key_data(key)).tolist(),
        }
        work = workdirs.open_workdir(folder, settings)
        trained = train(key, detector, placed, config, work=work)
    return dataclasses.replace(trained, skipped=(*lost, *left_out))
