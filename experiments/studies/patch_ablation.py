"""Says what each part of the MTCNN patch attack is worth, one training run a row.

    python -m experiments.studies.patch_ablation --train=me_monday.mp4 --test=me_tuesday.mp4
        --workdir=out/patch_ablation

Rows (--rows, default all): "full"; "no NAME" for each part of the random views; "no views" without
any; total variation and black area at other weights; the maximum loss; Adam; only the levels of one
scale factor, or only coarse ones; 1, 5 and 20 training frames; 4 starts. Each row is a run of
--epochs epochs (fewer than the attack's 2,000: the table compares rows, it does not repeat the
attack), measured on --test_frames frames at --scale_factor. "black" is no training but a plain
black patch, which a trained one should beat.

Rows that are done are kept in the work folder, and a stopped run goes on with the next. Writes
`result.json` and `ablation.md`. Expected on two CPU cores: 3 minutes a row. --toy: two rows of a
few epochs, on a sample portrait, in a minute.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data
from absl import flags

from afr_jax.core import files, program, progress, workdir
from afr_jax.data import video
from afr_jax.evaluation.metrics import misdetection
from afr_jax.evaluation.patches import study
from afr_jax.methods.patches import config, geometry, placement, scenes, training
from afr_jax.models import mtcnn

_TRAIN = flags.DEFINE_list("train", [], "films, folders and photos to train on")
_TEST = flags.DEFINE_list("test", [], "films, folders and photos to measure on")
_ROWS = flags.DEFINE_list("rows", [], "rows of the table; default: all")
_PLACEMENT = flags.DEFINE_enum(
    "placement", "cheeks", list(geometry.PLACEMENTS), "where patches are worn"
)
_EPOCHS = flags.DEFINE_integer("epochs", 200, "of every row", lower_bound=1)
_TRAIN_FRAMES = flags.DEFINE_integer("train_frames", 20, "frames to train on", lower_bound=1)
_TEST_FRAMES = flags.DEFINE_integer("test_frames", 40, "frames to measure on", lower_bound=1)
_FACTOR = flags.DEFINE_float("scale_factor", 0.82, "of the detector that is measured")

_COARSE = (1.0, 2.0)
_TOY_ROWS, _TOY_EPOCHS, _TOY_FACE_PX = ("full", "no noise"), 3, 60


@dataclasses.dataclass(frozen=True)
class _Row:
    """Options of a run, its number of frames (None for all) and of starts."""

    options: config.PatchConfig
    num_frames: int | None = None
    num_starts: int = 1


def ablation_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    rows = _rows()
    toy = flags.FLAGS.toy
    chosen = _ROWS.value or ([*_TOY_ROWS] if toy else [*rows, "black"])
    unknown = [name for name in chosen if name not in rows and name != "black"]
    if unknown:
        raise program.UsageError(f"--rows: no {unknown[0]!r}, only {', '.join([*rows, 'black'])}")
    settings = {
        "options": rows["full"].options,
        "train": _TRAIN.value,
        "test": _TEST.value,
        "train_frames": _TRAIN_FRAMES.value,
        "test_frames": _TEST_FRAMES.value,
        "scale_factor": _FACTOR.value,
        "seed": flags.FLAGS.seed,
        "toy": toy,
    }
    try:
        variables = jax.tree.map(jnp.asarray, mtcnn.read_weights(mtcnn.find_weights()))
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(str(error)) from error
    work = workdir.open_workdir(flags.FLAGS.workdir or "out/patch_ablation", settings)
    train = _frames(variables, "train", _TRAIN.value, _TRAIN_FRAMES.value)
    test = _frames(variables, "test", _TEST.value, _TEST_FRAMES.value)
    table = {"clean": _rates(variables, test, None)}
    for name in progress.track(chosen, description="rows"):
        table[name] = _kept(name, rows, variables, train, test, work)
    result = {
        **program.provenance("experiments.studies.patch_ablation"),
        "settings": settings,
        "epochs": rows["full"].options.epochs,
        "num_train": len(train),
        "num_test": len(test),
        "rows": table,
    }
    text = _table(table)
    print(text, file=sys.stderr)
    files.write_atomically(work.path / "ablation.md", text.encode(), overwrite=True)
    work.write_result(result)
    return result, program.EXIT_OK


def _rows() -> dict[str, _Row]:
    toy = flags.FLAGS.toy
    try:
        levels = scenes.LevelOptions()
        if toy:
            levels = scenes.LevelOptions(
                min_face_px=_TOY_FACE_PX, scale_factors=(_FACTOR.value,), draws=1
            )
        full = config.PatchConfig(
            placement=_PLACEMENT.value,
            epochs=min(_EPOCHS.value, _TOY_EPOCHS) if toy else _EPOCHS.value,
            patch_px=12 if toy else config.PatchConfig.patch_px,
            levels=levels,
        )
        if not 0 < _FACTOR.value < 1:
            raise ValueError(f"--scale_factor is {_FACTOR.value}, must lie in (0, 1)")
    except ValueError as error:
        raise program.UsageError(str(error)) from error

    def change(**changes):
        return _Row(dataclasses.replace(full, **changes))

    def change_levels(**changes):
        return change(levels=dataclasses.replace(levels, **changes))

    rows = {"full": _Row(full)}
    for name in config.PARTS:
        rows[f"no {name}"] = _Row(full.without([name]))
    rows["no views"] = _Row(full.without(list(config.PARTS)))
    for weight in (0.0, 1.0):
        rows[f"total variation {weight}"] = change(tv_weight=weight)
    for weight in (0.1, 1.0):
        rows[f"black area {weight}"] = change(black_weight=weight)
    rows["maximum loss"] = change(loss="max")
    rows["P-Net alone"] = change(stage_weight=0.0)
    rows["Adam"] = change(optimizer="adam")
    rows["levels of 0.709 only"] = change_levels(scale_factors=(0.709,))
    rows["coarse levels only"] = change_levels(window_ratios=_COARSE)
    for count in (1, 5):
        rows[f"{count} frames"] = _Row(full, num_frames=count)
    rows["4 starts"] = _Row(full, num_starts=4)
    return rows


def _frames(variables, flag, paths, count) -> list[study.Shown]:
    """Evenly spread frames of the person of each path, with the patches placed."""
    if not paths and flags.FLAGS.toy:
        portrait = skimage.data.astronaut()[:160, 128:288]
        films = [([video.Frame("portrait", portrait)], False)]
    elif not paths:
        raise program.UsageError(f"--{flag} is needed")
    else:
        try:
            places = [pathlib.Path(path).expanduser() for path in paths]
            films = [(video.read_frames([place]).frames, place.is_file()) for place in places]
        except (FileNotFoundError, video.VideoError) as error:
            raise program.UsageError(f"--{flag}: {error}") from error
    people = []
    for frames, is_film in films:
        people += misdetection.find_person(variables, frames, is_film=is_film)[0]
    if not people:
        raise program.UsageError(f"--{flag} shows no face")
    shown = []
    for number in video.spread(len(people), min(count, len(people))):
        one = people[number]
        place = placement.place(one.pixels, one.box, one.landmarks, placement=_PLACEMENT.value)
        shown.append(study.Shown(one, place))
    return shown


def _kept(name, rows, variables, train, test, work) -> dict[str, Any]:
    """A row of the table, from the work folder if it was measured before."""
    folder = work.path / "rows" / name.replace(" ", "_")
    try:
        return json.loads((folder / "row.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass  # Not measured yet.
    if name == "black":
        options = rows["full"].options
        shapes = options.shapes()
        patches = {
            part: np.full(shape, options.ink[0], np.float32) for part, shape in shapes.items()
        }
        record = {}
    else:
        row = rows[name]
        count = min(row.num_frames or len(train), len(train))
        placed = [train[number].placed for number in video.spread(len(train), count)]
        trained = training.train(
            jax.random.key(flags.FLAGS.seed), variables, placed, row.options,
            work=workdir.open_workdir(folder, row), num_starts=row.num_starts,
        )  # fmt: skip
        patches, record = trained.patches, {"training": trained.record}
    mean = float(np.mean([patch.mean() for patch in patches.values()]))
    found = {**_rates(variables, test, patches), "mean_grey": mean, **record}
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "row.json", found)
    return found


def _rates(variables, test, patches) -> dict[str, Any]:
    found = misdetection.judge(
        variables,
        [study.worn(frame, patches) for frame in test],
        [frame.placed.box for frame in test],
        scale_factor=_FACTOR.value,
        min_face_px=_TOY_FACE_PX if flags.FLAGS.toy else 20.0,
    )
    return misdetection.rate(~found[:, -1])


def _table(table: dict[str, dict[str, Any]]) -> str:
    lines = ["| row | missed | 95 % interval | mean gray |", "|---|--:|--:|--:|"]
    for name, row in table.items():
        gray = f"{row['mean_grey']:.2f}" if "mean_grey" in row else ""
        interval = f"{row['low']:.2f}-{row['high']:.2f}"
        lines.append(f"| {name} | {row['rate']:.2f} | {interval} | {gray} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(ablation_program)
