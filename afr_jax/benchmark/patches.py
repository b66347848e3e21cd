"""Row `patches`: epochs of our patch attack beside the same loop written plainly in PyTorch.

Both sides take epochs over the same frames and as many levels of the pyramid a frame, forward and
backward. Ours cuts the levels around the face and draws light, blur, noise, JPEG and turns of the
grid; the other side (`experiments/reference/patch_driver.py`: eager, facenet-pytorch's P-Net) works
on whole levels with noise alone, so it does less of the one and more of the other. Both have
P-Net's loss alone, as published; a second row times our default, with R-Net and O-Net. The other
side trains one start, ours as many side by side as `PatchConfig.starts` says.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data

from afr_jax.benchmark import setting, timing
from afr_jax.core import options
from afr_jax.data import video
from afr_jax.evaluation import reference
from afr_jax.methods.patches import people, placement, scenes, training
from afr_jax.methods.patches.config import PatchConfig
from afr_jax.models import mtcnn
from afr_jax.perturb import stepping

DRIVER = "patch_driver.py"
_EPOCHS_OF_A_RUN = 2000


@dataclasses.dataclass(frozen=True)
class PatchesOptions:
    """What is measured in the row `patches`."""

    num_frames: int = options.option(20, "frames of an epoch of patches", at_least=1)
    epochs: int = options.option(10, "epochs of patches that are timed together", at_least=1)
    starts: int = options.option(
        1, "random starts of patches side by side, the reference's is one", at_least=1
    )

    def __post_init__(self) -> None:
        """Checks ranges."""
        options.check(self)


def run(config: PatchesOptions, given: setting.Setting) -> setting.Measured:
    """Frames of a film or photos of one size, or a cut of the sample portrait.

    Raises:
        options.UsageError: No frame can be read, or none shows a face.
    """
    frames = [video.Frame("portrait", skimage.data.astronaut()[:256, 96:352])]
    if given.images:
        try:
            frames = video.read_frames(given.paths, max_frames=config.num_frames).frames
        except video.VideoError as error:
            raise options.UsageError(f"--images: {error}") from error
    chosen = video.spread(len(frames), min(config.num_frames, len(frames)))
    with given.reference.open(DRIVER) as other, options.usage("--images"):
        rows = measure(
            "patches",
            given.detector(),
            [frames[n]._replace(pixels=given.shrunk(frames[n].pixels)) for n in chosen],
            given.folder,
            other,
            config=PatchConfig(starts=config.starts),
            epochs=config.epochs,
            repeats=given.repeats,
            is_film=len(given.paths) == 1,
        )
        return setting.Measured(rows, other.versions if other else {})


def measure(
    row: str,
    variables: mtcnn.Variables,
    frames: Sequence[video.Frame],
    folder: pathlib.Path,
    other: reference.ReferenceProcess | None,
    *,
    config: PatchConfig,
    epochs: int,
    repeats: int,
    is_film: bool = True,
) -> list[timing.Row]:
    """Rows of a table (`timing`): seconds an epoch, and the minutes of a whole run.

    Args:
        row: Begins the names of the rows.
        variables: Those of our detector.
        frames: With a person to train on; of several sizes, those of the first's are taken.
        folder: Where arrays are put for the other side.
        other: The running `DRIVER`; None leaves its column empty.
        config: How patches are trained; `stage_weight` is that of the second row.
        epochs: How many are timed together.
        repeats: Timed runs of each side.
        is_film: Whether the frames follow each other.

    Returns:
        The rows.

    Raises:
        ValueError: No frame shows a face that the patches can be placed on.
    """
    shown, _ = people.find_person(variables, frames, is_film=is_film)
    placed, _ = placement.place_all(shown, config.placement)
    placed = [frame for frame in placed if frame.pixels.shape == placed[0].pixels.shape]
    if not placed:
        raise ValueError("the frames show no face that patches can be placed on")
    published = dataclasses.replace(config, stage_weight=0.0)
    sides = {
        "ours": _ours(variables, placed, published, epochs),
        "default": _ours(variables, placed, config, epochs),
    }
    if other is not None:
        sides["theirs"] = _theirs(other, placed, published, epochs, folder)
    times = timing.take_turns(sides, repeats=repeats)
    rows = []
    names = {"ours": "P-Net's loss, as published", "default": "with R-Net and O-Net, the default"}
    for side, name in names.items():
        label = f"{row}, {len(placed)} frames, {name}"
        others = times.get("theirs") if side == "ours" else None
        rows.append(timing.compare(label, "s per epoch", times[side], others))
        minutes = [value * _EPOCHS_OF_A_RUN / 60 for value in times[side]]
        quantity = f"minutes for {_EPOCHS_OF_A_RUN} epochs"
        rows.append(timing.state(label, quantity, timing.spread(minutes), None))
    return rows


def _ours(
    variables: mtcnn.Variables,
    placed: Sequence[placement.Placed],
    config: PatchConfig,
    epochs: int,
) -> Callable[[], float]:
    batch = jax.tree.map(jnp.asarray, scenes.make_scenes(placed, config.levels))
    trainer = training.make_trainer(jax.random.key(0), variables, batch, config)
    chunk = min(stepping.chunk_length(), epochs)

    def seconds() -> float:
        states = trainer.start_fn(jax.random.key(1), config.starts)
        states, _ = trainer.advance_fn(states, chunk)
        jax.block_until_ready(states)
        start, done = time.perf_counter(), 0
        while done < epochs:
            states, _ = trainer.advance_fn(states, chunk)
            done += chunk
        jax.block_until_ready(states)
        return (time.perf_counter() - start) / done

    return seconds


def _theirs(
    other: reference.ReferenceProcess,
    placed: Sequence[placement.Placed],
    config: PatchConfig,
    epochs: int,
    folder: pathlib.Path,
) -> Callable[[], float]:
    np.save(folder / "photos.npy", np.stack([item.pixels for item in placed]))
    np.save(folder / "coordinates.npy", np.stack([_coordinates(item) for item in placed]))
    batch = scenes.make_scenes(placed, config.levels)
    # As many levels a frame as ours draws, from all its groups, spread alike.
    draws = config.levels.draws
    levels = [
        [
            table[number][index].astype(int).tolist()
            for table, counts in zip(batch.levels, batch.counts, strict=True)
            for index in video.spread(int(counts[number]), min(int(counts[number]), draws))
        ]
        for number in range(len(placed))
    ]
    shape = next(iter(config.shapes().values()))

    def seconds() -> float:
        answer = other.call(
            "train",
            photos=str(folder / "photos.npy"),
            coordinates=str(folder / "coordinates.npy"),
            levels=levels,
            patch=[len(placed[0].grids), *shape],
            epochs=epochs,
        )
        return answer["seconds"] / epochs

    return seconds


def _coordinates(item: placement.Placed) -> np.ndarray:
    """Where in each patch a photo's pixel looks, `[P, H, W, 2]` (x, y) in [-1, 1]; 2: nowhere."""
    found = []
    for name in sorted(item.grids):
        flat = item.grids[name][..., :2].reshape(-1, 2)
        low, high = flat.min(axis=0), flat.max(axis=0)
        places = np.indices(item.pixels.shape[:2]).transpose(1, 2, 0)
        share = 2 * (places - low) / (high - low) - 1
        found.append(np.where(np.abs(share).max(-1, keepdims=True) <= 1, share, 2.0)[..., ::-1])
    return np.stack(found).astype(np.float32)
