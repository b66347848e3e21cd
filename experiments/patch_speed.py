"""Times epochs of the MTCNN patch attack, beside the same loop written plainly in PyTorch.

    python -m experiments.patch_speed --train=me.mp4 --peer_python=peers/bin/python

Both sides take epochs over the same 20 frames and as many levels of the pyramid a frame, forward
and backward. Ours cuts the levels around the face and draws light, blur, noise, JPEG and turns of
the grid; the other side (experiments/reference/patch_driver.py: eager, facenet-pytorch's P-Net)
works on whole levels with noise alone, so it does less of the one and more of the other. Both have
P-Net's loss alone, as published; a second row times our default, with R-Net and O-Net. The
environment:

    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 torchvision requests tqdm pillow
    peers/bin/pip install --no-deps facenet-pytorch==2.6.0

Writes `result.json` and the table of standard error, `speed.md`, into the work folder, by default
`out/patch_speed`. --starts=64 on a GPU times that many starts side by side, without the other side.
Measure on an idle machine. Expected on two CPU cores: 5 minutes with the other side; --toy: one
portrait, a few epochs, a minute.
"""

import dataclasses
import pathlib
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data
from absl import flags

from afr_jax.benchmark import timing
from afr_jax.core import files, program, workdir
from afr_jax.data import video
from afr_jax.evaluation import reference
from afr_jax.evaluation.metrics import misdetection
from afr_jax.methods.patches import config, placement, training
from afr_jax.methods.patches import scenes as patches_scenes
from afr_jax.models import mtcnn
from afr_jax.perturb import stepping

_TRAIN = flags.DEFINE_list("train", [], "films, folders and photos to take frames from")
_FRAMES = flags.DEFINE_integer("frames", 20, "frames of an epoch", lower_bound=1)
_EPOCHS = flags.DEFINE_integer("epochs", 10, "epochs that are timed together", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "timed runs of each side", lower_bound=1)
_STARTS = flags.DEFINE_integer("starts", 1, "random starts side by side", lower_bound=1)
_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python of an environment with PyTorch")

_SCRIPT = pathlib.Path(__file__).resolve().parent / "reference" / "patch_driver.py"
_EPOCHS_OF_A_RUN = 2000


def speed_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    try:
        variables = jax.tree.map(jnp.asarray, mtcnn.read_weights(mtcnn.find_weights()))
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(str(error)) from error
    default = config.PatchConfig()
    options = dataclasses.replace(default, stage_weight=0.0)
    settings = {
        "train": _TRAIN.value,
        "frames": _FRAMES.value,
        "epochs": _EPOCHS.value,
        "repeats": _REPEATS.value,
        "starts": _STARTS.value,
        "options": options,
        "toy": flags.FLAGS.toy,
    }
    work = workdir.open_workdir(
        flags.FLAGS.workdir or "out/patch_speed", settings, resumable=("epochs", "repeats")
    )
    placed = _placed(variables)
    epochs, repeats = (2, 1) if flags.FLAGS.toy else (_EPOCHS.value, _REPEATS.value)
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "ours": _ours(variables, placed, options, epochs),
            "default": _ours(variables, placed, default, epochs),
        }
        versions = None
        if _PEER_PYTHON.value is None:
            times = timing.take_turns(sides, repeats=repeats)
        else:
            try:
                other = reference.Peer(pathlib.Path(_PEER_PYTHON.value).expanduser(), _SCRIPT)
            except reference.PeerError as error:
                raise program.UsageError(f"--peer_python: {error}") from error
            with other:
                sides["theirs"] = _theirs(other, placed, options, epochs, pathlib.Path(folder))
                times = timing.take_turns(sides, repeats=repeats)
                versions = other.versions
    rows = []
    names = {"ours": "P-Net's loss, as published", "default": "with R-Net and O-Net, the default"}
    for side, name in names.items():
        others = times.get("theirs") if side == "ours" else None
        rows.append(timing.compare(name, "s per epoch", times[side], others))
        minutes = [value * _EPOCHS_OF_A_RUN / 60 for value in times[side]]
        quantity = f"minutes for {_EPOCHS_OF_A_RUN} epochs"
        rows.append(timing.state(name, quantity, timing.spread(minutes), None))
    result = {
        **program.provenance("experiments.patch_speed"),
        "settings": settings,
        "num_frames": len(placed),
        "frame_size": placed[0].pixels.shape[:2],
        "levels_per_frame": options.levels.draws * (len(options.levels.window_ratios) - 1),
        "peer": versions,
        "rows": rows,
    }
    text = timing.table(rows)
    print(text, file=sys.stderr)
    files.write_atomically(work.path / "speed.md", f"{text}\n".encode(), overwrite=True)
    work.write_result(result)
    return result, program.EXIT_OK


def _placed(variables: dict) -> list[placement.Placed]:
    if flags.FLAGS.toy and not _TRAIN.value:
        frames = [video.Frame("portrait", skimage.data.astronaut()[:256, 96:352])]
        shown, _ = misdetection.find_person(variables, frames, is_film=False)
    elif not _TRAIN.value:
        raise program.UsageError("--train is needed")
    else:
        shown = []
        for path in _TRAIN.value:
            place = pathlib.Path(path).expanduser()
            try:
                frames = video.read_frames([place], max_frames=_FRAMES.value).frames
            except (FileNotFoundError, video.VideoError) as error:
                raise program.UsageError(f"--train: {error}") from error
            shown += misdetection.find_person(variables, frames, is_film=place.is_file())[0]
    if not shown:
        raise program.UsageError("--train shows no face")
    shown = [one for one in shown if one.pixels.shape == shown[0].pixels.shape]
    chosen = [shown[n] for n in video.spread(len(shown), min(_FRAMES.value, len(shown)))]
    return [
        placement.place(one.pixels, one.box, one.landmarks, placement="cheeks") for one in chosen
    ]


def _ours(variables, placed, options, epochs):
    scenes = jax.tree.map(jnp.asarray, patches_scenes.make_scenes(placed, options.levels))
    trainer = training.make_trainer(jax.random.key(0), variables, scenes, options)
    chunk = min(stepping.chunk_length(), epochs)

    def measure():
        states = trainer.start_fn(jax.random.key(1), _STARTS.value)
        states, _ = trainer.advance_fn(states, chunk)
        jax.block_until_ready(states)
        start, done = time.perf_counter(), 0
        while done < epochs:
            states, _ = trainer.advance_fn(states, chunk)
            done += chunk
        jax.block_until_ready(states)
        return (time.perf_counter() - start) / done

    return measure


def _theirs(other, placed, options, epochs, folder):
    photos = np.stack([item.pixels for item in placed])
    np.save(folder / "photos.npy", photos)
    np.save(folder / "coordinates.npy", np.stack([_coordinates(item) for item in placed]))
    scenes = patches_scenes.make_scenes(placed, options.levels)
    # As many levels a frame as ours draws, from all its groups, spread alike.
    levels = [
        [
            table[number][index].astype(int).tolist()
            for table, counts in zip(scenes.levels, scenes.counts, strict=True)
            for index in video.spread(
                int(counts[number]), min(counts[number], options.levels.draws)
            )
        ]
        for number in range(len(placed))
    ]
    shape = next(iter(options.shapes().values()))

    def measure():
        answer = other.call(
            "train",
            photos=str(folder / "photos.npy"),
            coordinates=str(folder / "coordinates.npy"),
            levels=levels,
            patch=[len(placed[0].grids), *shape],
            epochs=epochs,
        )
        return answer["seconds"] / epochs

    return measure


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


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(speed_program)
