"""The study of unlearnable data: methods x granularity x countermeasures x seeds, cell by cell."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from absl import logging

from afr_jax.core import checkpoint, files, options, parallel, program, progress, workdir
from afr_jax.data import image_sets, noise_files
from afr_jax.evaluation.attackers import countermeasures, many_victims, victims
from afr_jax.evaluation.metrics import learnability
from afr_jax.evaluation.unlearnable import matrix
from afr_jax.methods.unlearnable import recipes
from afr_jax.models.classifiers import registry


class _Scale(NamedTuple):
    """The setting of all cells."""

    train_images: int | None
    test_images: int | None
    victim: victims.VictimOptions
    search: dict[str, dict[str, files.Json]]


_TOY_IMAGES = 320
_REDUCED_SEARCH = {"batch_size": 128, "train_steps": 20, "max_rounds": 15}
_REDUCED_ROBUST = _REDUCED_SEARCH | {"views": 1, "adversary_steps": 3}
_REDUCED_SOURCE = {"batch_size": 128, "source_steps": 400, "class_share": 1.0}
_SCALES = {
    "reduced": _Scale(
        train_images=3000,
        test_images=1000,
        victim=victims.VictimOptions(
            network=registry.ClassifierOptions("small_resnet", width=32, stem="imagenet"),
            num_epochs=10,
            batch_size=64,
            augmented=False,
        ),
        search={
            "error_min/sample": _REDUCED_SEARCH
            | {"max_rounds": 8, "num_steps": 4, "step_size": 2 / 255, "stop_error": None},
            "error_min/class": _REDUCED_SEARCH | {"step_size": 1.6 / 255, "class_share": 1.0},
            "error_max/sample": _REDUCED_SOURCE
            | {"max_rounds": 1, "num_steps": 8, "step_size": 2 / 255},
            "error_max/class": _REDUCED_SOURCE | {"max_rounds": 8, "step_size": 1.6 / 255},
            "rem/sample": _REDUCED_ROBUST
            | {"max_rounds": 8, "train_steps": 40, "num_steps": 4, "step_size": 2 / 255},
            "rem/class": _REDUCED_ROBUST | {"class_share": 1.0},
            "tap/sample": _REDUCED_SOURCE | {"max_rounds": 4},
            "tap/class": _REDUCED_SOURCE | {"max_rounds": 30},
        },
    ),
    "full": _Scale(None, None, victims.VictimOptions(), {}),
    "toy": _Scale(
        train_images=_TOY_IMAGES,
        test_images=_TOY_IMAGES,
        victim=victims.VictimOptions(
            network=registry.ClassifierOptions("small_resnet", width=8),
            num_epochs=12,
            batch_size=32,
            augmented=False,
        ),
        search={
            f"{method}/{granularity}": {
                "batch_size": 32,
                "train_steps": 0 if method in ("error_max", "tap") else 20,
                "source_steps": 60 if method in ("error_max", "tap") else 0,
                "num_steps": 4 if granularity == "sample" else 1,
                "step_size": 2 / 255,
                "class_share": 1.0,
                "max_rounds": 4 if granularity == "sample" else 8,
                "stop_error": None,
                "views": 1 if method == "rem" else 0,
                "adversary_steps": 2,
            }
            for method in recipes.SEARCHED
            for granularity in ("sample", "class")
        },
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlearnableStudyConfig(options.Config):
    r"""What victims learn from unlearnable data: methods x granularity x countermeasures x seeds.

        python -m experiments.studies.unlearnable_study --cifar10_dir=cifar-10-batches-bin \
            --workdir=out/study

    trains a small ResNet on 3,000 images of CIFAR-10, clean, with random, error-maximizing and
    error-minimizing noise, by sample and by class, and measures what each victim knows of clean
    test images after every epoch: the reduced form of Huang et al. 2021, figure 2, for two CPU
    cores. --scale=full is the published setting, for an accelerator.

    Other axes: --countermeasures and --architectures of victims, --poison_rates (the share of
    training images that is protected), --at_once (victims trained together in one vmapped program,
    for small nets on accelerators). The images are drawn by --seed, all noise and victims by
    --seeds: a cell of seed s is a victim of seed s on noise of seed s.

    Every cell is a file `cells/<name>.json` in the work directory, every noise one in `noise/`: a
    run that was cut goes on where it stopped, and more seeds or methods can be added to a finished
    one. Writes `result.json`, `matrix.csv`, `matrix.png` (heat map of last accuracies, mean over
    seeds), `curves.csv` and `curves.png`. --toy (--scale=toy): synthetic images of 16 px, four
    classes, seconds.
    """

    cifar10_dir: str | None = options.option(None, "folder of CIFAR-10")
    scale: Literal["reduced", "full", "toy"] = options.option(
        "reduced", "small net and few images, or the published setting"
    )
    methods: tuple[str, ...] = options.option(
        ("error_min", "error_max", "random"), "besides clean data", choices=tuple(recipes.METHODS)
    )
    granularities: tuple[noise_files.Granularity, ...] = options.option(
        ("sample", "class"), "of the noise"
    )
    countermeasures: tuple[str, ...] = options.option(
        ("none",), "of the victims", choices=countermeasures.NAMES
    )
    architectures: tuple[str, ...] = options.option(
        (), "of the victims; default: the source's", choices=registry.NAMES
    )
    poison_rates: tuple[float, ...] = options.option(
        (1.0,), "shares of the training images with noise, above 0", at_least=0, at_most=1
    )
    seeds: tuple[int, ...] = options.option((0,), "of noise and victims")
    epsilon: float = options.option(
        8.0, "budget of the noise, gray levels of 255", at_least=1, at_most=255
    )
    at_once: int = options.option(1, "victims trained together", at_least=1)
    bfloat16: bool = options.option(False, "compute in bfloat16; parameters stay float32")
    workdir: str | None = options.option("out/study", options.WORKDIR_HELP)

    def toy(self) -> "UnlearnableStudyConfig":
        """The scale `toy`."""
        return dataclasses.replace(self, scale="toy")

    def cells(self) -> list[matrix.VictimCell]:
        """The cells of the study.

        Raises:
            options.UsageError: there is none, or a rate is 0.
        """
        if not self.seeds or not all(self.poison_rates):
            raise options.UsageError("--seeds must not be empty, --poison_rates lie in (0, 1]")
        kinds = [("clean", "none", 1.0)]
        for method, granularity in itertools.product(self.methods, self.granularities):
            if (method, granularity) != ("cuda", "sample"):
                kinds += [(method, granularity, rate) for rate in self.poison_rates]
        names = self.architectures or (_SCALES[self.scale].victim.network.architecture,)
        axes = itertools.product(names, self.countermeasures, self.seeds, kinds)
        return [matrix.VictimCell(*kind, change, name, seed) for name, change, seed, kind in axes]


def run(config: UnlearnableStudyConfig) -> options.Outcome:
    """Trains the victims of all cells that are not there yet, and puts the table together.

    Raises:
        options.UsageError: no cells, or data that cannot be used.
    """
    scale = _SCALES[config.scale]
    network = dataclasses.replace(scale.victim.network, bfloat16=config.bfloat16)
    scale = scale._replace(victim=dataclasses.replace(scale.victim, network=network))
    cells = config.cells()
    train_set, test_set = _read(config, scale)
    settings = {
        "scale": config.scale,
        "victim": scale.victim,
        "search": scale.search,
        "epsilon_levels": config.epsilon,
        "seed": config.seed,
        "train_images": len(train_set.labels),
        "test_images": len(test_set.labels),
    }
    work = workdir.open_workdir(config.workdir, settings)
    study = _Study(scale, config.epsilon / 255, train_set, test_set, work)
    groups: dict[tuple[str, str], list[matrix.VictimCell]] = {}
    records: dict[matrix.VictimCell, Mapping[str, files.Json]] = {}
    for cell in cells:
        known = workdir.read_or_none(study.path_of(cell), files.read_sealed)
        if known is not None:
            records[cell] = known["value"]
        else:
            groups.setdefault((cell.architecture, cell.countermeasure), []).append(cell)
    logging.info("%d of %d cells to do", sum(map(len, groups.values())), len(cells))
    parts = [
        group[start : start + config.at_once]
        for group in groups.values()
        for start in range(0, len(group), config.at_once)
    ]
    for part in progress.track(parts, description="victims"):
        for cell, curve in zip(part, _train(study, part), strict=True):
            summary = learnability.summary(curve)
            logging.info("%s: last %.3f, peak %.3f", cell.file_name, *summary[:2])
            record = {"cell": cell, "summary": summary, "curve": curve}
            records[cell] = workdir.load_or_compute(study.path_of(cell), lambda r=record: r)
    curves = {}
    for cell in cells:
        curve = records[cell]["curve"]
        curves[cell] = learnability.Curve(*(np.array(curve[name], np.float32) for name in curve))
    chance = 1 / len(train_set.classes)
    rows = matrix.rows_of(curves)
    result = {
        **program.provenance("experiments.studies.unlearnable_study", config=config),
        "settings": settings,
        "chance": chance,
        "interval_of_one_half": learnability.interval(0.5, len(test_set.labels)),
        "rows": rows,
        "verdict": matrix.verdict(rows, chance),
    }
    matrix.write(work.path, curves, rows, title=f"{len(train_set.labels)} training images")
    work.write_result(result)
    return options.Outcome(result)


class _Study(NamedTuple):
    """What all cells have in common."""

    scale: _Scale
    epsilon: float
    train_set: image_sets.ImageSet
    test_set: image_sets.ImageSet
    work: workdir.Workdir

    def path_of(self, cell: matrix.VictimCell) -> pathlib.Path:
        """Where a finished cell stands."""
        return self.work.path / "cells" / cell.file_name


def _read(
    config: UnlearnableStudyConfig, scale: _Scale
) -> tuple[image_sets.ImageSet, image_sets.ImageSet]:
    if config.scale == "toy":
        train_set, test_set = (
            image_sets.synthetic(config.seed, _TOY_IMAGES, split=split)
            for split in ("train", "test")
        )
        return train_set, test_set
    train_set, test_set = (
        image_sets.DataOptions(
            data="cifar10", cifar10_dir=config.cifar10_dir, split=split, num_images=count
        ).read(seed=config.seed)
        for split, count in (("train", scale.train_images), ("test", scale.test_images))
    )
    return train_set, test_set


def _train(study: _Study, cells: Sequence[matrix.VictimCell]) -> Sequence[learnability.Curve]:
    """Trains the victims of cells that differ in nothing but noise, rate and seed."""
    first, usual = cells[0], study.scale.victim.network
    # The width is that of one architecture alone.
    network = registry.ClassifierOptions(
        first.architecture,
        width=usual.width if first.architecture == usual.architecture else None,
        stem=usual.stem,
        bfloat16=usual.bfloat16,
    )
    victim = dataclasses.replace(
        study.scale.victim, network=network, countermeasure=first.countermeasure
    )
    sets = [_training_set(study, cell) for cell in cells]
    if len(cells) == 1:
        found = victims.train_victim(sets[0], study.test_set, options=victim, seed=first.seed)
        return [found.curve]
    return many_victims.train_many(
        np.stack([data.images for data in sets]),
        study.train_set.labels,
        study.test_set.images,
        study.test_set.labels,
        set_of_run=range(len(cells)),
        seed_of_run=[cell.seed for cell in cells],
        num_classes=len(study.train_set.classes),
        options=victim,
        mesh=parallel.make_mesh(),
    )


def _training_set(study: _Study, cell: matrix.VictimCell) -> image_sets.ImageSet:
    """The training images of a cell before any countermeasure."""
    clean = study.train_set
    if cell.method == "clean":
        return clean
    protected = _noise(study, cell).apply(clean)
    images, _ = victims.protect_part(
        clean.images, protected.images, clean.labels, rate=cell.rate, seed=cell.seed
    )
    return clean._replace(images=images)


def _noise(study: _Study, cell: matrix.VictimCell) -> noise_files.Noise:
    """The noise of a cell, made once."""
    name = f"{cell.method}-{cell.granularity}-seed{cell.seed}"
    path = study.work.path / "noise" / f"{name}.npz"
    if (known := workdir.read_or_none(path, noise_files.read_noise)) is not None:
        return known
    kind = recipes.METHODS[cell.method]
    config = kind(
        granularity="class" if cell.granularity == "class" else "sample", epsilon=study.epsilon
    )
    if isinstance(config, recipes.SearchedNoise):
        changes = study.scale.search.get(f"{cell.method}/{cell.granularity}", {})
        config = dataclasses.replace(config, network=study.scale.victim.network)
        config = config.with_search(**changes)
    with checkpoint.Checkpoints(study.work.path / "searches" / name) as checkpoints:
        noise = recipes.make_unlearnable(
            study.train_set,
            config=config,
            seed=cell.seed,
            checkpoints=checkpoints,
            report_fn=lambda number, error: logging.info(
                "%s: round %d, training error %.3f", name, number, error
            ),
        )
    noise.save(path)
    return noise
