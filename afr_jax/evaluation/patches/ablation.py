"""What each part of the patch attack is worth: one training a row, all measured alike."""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from afr_jax.core import files, options, program, progress, workdir
from afr_jax.data import video
from afr_jax.evaluation.metrics import misdetection
from afr_jax.evaluation.patches import inputs
from afr_jax.methods.patches import placement, training
from afr_jax.methods.patches.config import PARTS, PatchConfig
from afr_jax.models import mtcnn

_COARSE = (1.0, 2.0)
_BLACK = "black"
_TOY_ROWS, _TOY_FACE_PX = ("full", "no noise"), 60


@dataclasses.dataclass(frozen=True)
class AblationRow:
    """One row: how its patches are trained, and on how many of the frames (None for all)."""

    patches: PatchConfig
    num_frames: int | None = None


def make_rows(full: PatchConfig) -> dict[str, AblationRow]:
    """The rows by name, each a change of the full training."""

    def change(**changes: Any) -> AblationRow:
        return AblationRow(dataclasses.replace(full, **changes))

    def change_levels(**changes: Any) -> AblationRow:
        return change(levels=dataclasses.replace(full.levels, **changes))

    rows = {"full": AblationRow(full)}
    for name in PARTS:
        rows[f"no {name}"] = AblationRow(full.without([name]))
    rows["no views"] = AblationRow(full.without(list(PARTS)))
    for weight in (0.0, 1.0):
        rows[f"total variation {weight}"] = change(tv_weight=weight)
    for weight in (0.1, 1.0):
        rows[f"black area {weight}"] = change(black_weight=weight)
    for share in (0.1, 0.3):
        rows[f"blocks erased {share}"] = change(erased=share)
    rows["maximum loss"] = change(loss="max")
    rows["P-Net alone"] = change(stage_weight=0.0)
    rows["Adam"] = change(optimizer="adam")
    rows["levels of 0.709 only"] = change_levels(scale_factors=(0.709,))
    rows["coarse levels only"] = change_levels(window_ratios=_COARSE)
    for count in (1, 5):
        rows[f"{count} frames"] = AblationRow(full, num_frames=count)
    rows["4 starts"] = change(starts=4)
    return rows


ROWS = (*make_rows(PatchConfig()), _BLACK)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationConfig(options.Config):
    """Says what each part of the MTCNN patch attack is worth, one training run a row.

        python -m experiments.studies.patch_ablation --train=monday.mp4 --test=tuesday.mp4

    Rows: "full"; "no NAME" for each part of the random views; "no views" without any; total
    variation and black area at other weights; shares of blocks erased; the maximum loss; P-Net
    alone; Adam; only the levels of one scale factor, or only coarse ones; 1, 5 and 20 training
    frames; 4 starts. Each row is a run of --epochs epochs (fewer than the attack's 2,000: the table
    compares rows, it does not repeat the attack), measured on --test_frames frames at
    --scale_factor. "black" is no training but a plain black patch, which a trained one should beat.

    Rows that are done are kept in --workdir, and a stopped run goes on with the next. Writes
    `result.json` and `ablation.md`. Expected on two CPU cores: 3 minutes a row. --toy: two rows of
    a few epochs, on a sample portrait unless photos are given, in a minute.
    """

    train: tuple[str, ...] = options.option((), "films, folders and photos to train on")
    test: tuple[str, ...] = options.option((), "films, folders and photos to measure on")
    rows: tuple[str, ...] = options.option(
        (), "rows of the table; default: all", choices=ROWS, resumable=True
    )
    train_frames: int = options.option(20, "frames to train on", at_least=1)
    test_frames: int = options.option(40, "frames to measure on", at_least=1)
    scale_factor: float = options.option(
        0.82, "of the detector that is measured, between 0 and 1", at_least=0.1, at_most=0.99
    )
    patches: PatchConfig = options.group(PatchConfig, epochs=200)
    workdir: str | None = options.option("out/patch_ablation", options.WORKDIR_HELP)
    # What no flag says: whether a portrait replaces missing paths.
    has_sample: bool = False

    def toy(self) -> "AblationConfig":
        """Two rows of small patches and a few epochs, a portrait where no photos are given."""
        levels = dataclasses.replace(
            self.patches.levels,
            min_face_px=_TOY_FACE_PX,
            scale_factors=(self.scale_factor,),
            draws=1,
        )
        patches = dataclasses.replace(
            self.patches,
            patch_px=min(self.patches.patch_px, 12),
            epochs=min(self.patches.epochs, 3),
            levels=levels,
        )
        return dataclasses.replace(
            self, rows=self.rows or _TOY_ROWS, patches=patches, has_sample=True
        )


def run(config: AblationConfig) -> options.Outcome:
    """Trains and measures the rows that are not done yet, and writes the table.

    Raises:
        options.UsageError: No frames, or no face in them.
    """
    rows = make_rows(config.patches)
    with options.usage(""):
        variables = mtcnn.load_variables()
    work = workdir.open_workdir(config.workdir, config)
    train = _frames(config, variables, "train", config.train, config.train_frames)
    test = _frames(config, variables, "test", config.test, config.test_frames)

    def rates(patches: dict[str, np.ndarray] | None) -> misdetection.Rate:
        found = misdetection.judge(
            variables,
            [placement.wear(frame, patches) for frame in test],
            [frame.box for frame in test],
            scale_factor=config.scale_factor,
            min_face_px=config.patches.levels.min_face_px,
        )
        return misdetection.rate(~found[:, -1], sources=misdetection.sources_of(test))

    def measure(name: str, folder: pathlib.Path) -> dict[str, object]:
        if name == _BLACK:
            ink = config.patches.ink[0]
            shapes = config.patches.shapes()
            patches = {part: np.full(shape, ink, np.float32) for part, shape in shapes.items()}
            record = {}
        else:
            row = rows[name]
            count = min(row.num_frames or len(train), len(train))
            trained = training.train(
                jax.random.key(config.seed),
                variables,
                [train[number] for number in video.spread(len(train), count)],
                row.patches,
                work=workdir.open_workdir(folder, row),
            )
            patches, record = trained.patches, {"training": trained.record}
        mean = float(np.mean([patch.mean() for patch in patches.values()]))
        return {**rates(patches), "mean_grey": mean, **record}

    table = {"clean": rates(None)}
    for name in progress.track(config.rows or ROWS, description="rows"):
        folder = work.path / "rows" / name.replace(" ", "_")
        table[name] = workdir.load_or_compute(
            folder / "row.json", lambda name=name, folder=folder: measure(name, folder)
        )
    result = {
        **program.provenance("experiments.studies.patch_ablation", config=config),
        "settings": config,
        "epochs": config.patches.epochs,
        "num_train": len(train),
        "num_test": len(test),
        "rows": table,
    }
    text = _page(table)
    print(text, file=sys.stderr)
    files.write_atomically(work.path / "ablation.md", text.encode(), overwrite=True)
    work.write_result(result)
    return options.Outcome(result)


def _frames(
    config: AblationConfig,
    variables: mtcnn.Variables,
    flag: str,
    paths: tuple[str, ...],
    count: int,
) -> list[placement.Placed]:
    """Evenly spread frames of the person of each path, with the patches placed."""
    if config.has_sample and not paths:
        shown, _ = inputs.sample_people(variables, (0,))
    else:
        shown, _ = inputs.read_people(variables, flag, paths)
    some = [shown[number] for number in video.spread(len(shown), min(count, len(shown)))]
    placed, _ = placement.place_all(some, config.patches.placement)
    if not placed:
        raise options.UsageError(f"--{flag}: the patches can be placed on no frame")
    return placed


def _page(table: Mapping[str, Mapping[str, object]]) -> str:
    lines = ["| row | missed | 95 % interval | mean gray |", "|---|--:|--:|--:|"]
    for name, row in table.items():
        gray = f"{row['mean_grey']:.2f}" if "mean_grey" in row else ""
        interval = f"{row['low']:.2f}-{row['high']:.2f}"
        lines.append(f"| {name} | {row['rate']:.2f} | {interval} | {gray} |")
    return "\n".join(lines) + "\n"
