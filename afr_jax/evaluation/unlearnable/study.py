"""The study of unlearnable data: methods x granularity x countermeasures x seeds, cell by cell."""

import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from absl import logging

from afr_jax.core import (
    checkpoint,
    distributed,
    files,
    options,
    parallel,
    program,
    progress,
    workdir,
)
from afr_jax.data import image_sets, noise_files
from afr_jax.evaluation.attackers import countermeasures, many_victims, purifier, victims
from afr_jax.evaluation.metrics import learnability
from afr_jax.evaluation.unlearnable import matrix
from afr_jax.methods.unlearnable import recipes
from afr_jax.models.classifiers import registry

# Methods whose source network learns clean images, before any round.
_FROM_CLEAN = ("error_max", "tap", "aap", "uc")


class _Scale(NamedTuple):
    """The setting of all cells.

    Attributes:
        train_images: that are protected; None for all.
        test_images: None for all.
        public_images: for a victim's purifier.
        victim: with the first architecture.
        widths: of other architectures, where not the published ones.
        search: changes of the published searches, by method and granularity.
    """

    train_images: int | None
    test_images: int | None
    public_images: int
    victim: victims.VictimOptions
    widths: dict[str, int]
    search: dict[str, dict[str, files.Json]]


# The countermeasure of `purifier`: a conversion of stored images that has to be learned.
_PURIFIER = "purifier"
_TOY_IMAGES = 320
_REDUCED_BATCH = {"batch_size": 100}
_REDUCED_SEARCH = _REDUCED_BATCH | {"train_steps": 20, "stop_error": None}
_REDUCED_SOURCE = _REDUCED_BATCH | {"source_steps": 200, "class_share": 1.0}
_BY_SAMPLE = {"num_steps": 4, "step_size": 2 / 255}
_BY_CLASS = {"step_size": 1.6 / 255, "class_share": 1.0}
_REDUCED = {
    "error_min/sample": _REDUCED_SEARCH | _BY_SAMPLE | {"max_rounds": 8},
    "error_min/class": _REDUCED_SEARCH | _BY_CLASS | {"max_rounds": 10},
    "error_max/sample": _REDUCED_SOURCE | {"max_rounds": 2} | _BY_SAMPLE,
    "error_max/class": _REDUCED_SOURCE | {"max_rounds": 8} | _BY_CLASS,
    "tap/sample": _REDUCED_SOURCE | {"max_rounds": 4, "num_steps": 5, "step_size": 1.6 / 255},
    "tap/class": _REDUCED_SOURCE | {"max_rounds": 15} | _BY_CLASS,
}
_REDUCED |= {
    f"rem/{kind}": _REDUCED[f"error_min/{kind}"] | {"views": 1, "adversary_steps": 2}
    for kind in ("sample", "class")
}
_REDUCED |= {f"aue/{kind}": _REDUCED[f"error_min/{kind}"] for kind in ("sample", "class")}
_REDUCED |= {f"aap/{kind}": _REDUCED[f"tap/{kind}"] for kind in ("sample", "class")}
_REDUCED["uc/class"] = _REDUCED["tap/class"]
_SCALES = {
    "reduced": _Scale(
        train_images=1000,
        test_images=1000,
        public_images=2000,
        victim=victims.VictimOptions(
            network=registry.ClassifierOptions("small_resnet", width=8, stem="imagenet"),
            num_epochs=10,
            batch_size=50,
            augmented=False,
            attack_steps=3,
        ),
        widths={"vgg11": 8, "densenet121": 4},
        search=_REDUCED,
    ),
    "full": _Scale(None, None, 0, victims.VictimOptions(), {}, {}),
    "toy": _Scale(
        train_images=_TOY_IMAGES,
        test_images=_TOY_IMAGES,
        public_images=_TOY_IMAGES,
        victim=victims.VictimOptions(
            network=registry.ClassifierOptions("small_resnet", width=8),
            num_epochs=12,
            batch_size=32,
            augmented=False,
        ),
        widths={},
        search={
            f"{method}/{granularity}": {
                "batch_size": 32,
                "train_steps": 0 if method in _FROM_CLEAN else 20,
                "source_steps": 60 if method in _FROM_CLEAN else 0,
                "num_steps": 4 if granularity == "sample" else 1,
                "step_size": 2 / 255,
                "class_share": 1.0,
                "max_rounds": 4 if granularity == "sample" else 8,
                "stop_error": None,
                "views": 1 if method in ("rem", "aue", "aap") else 0,
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

    trains a small ResNet on 1,000 images of CIFAR-10, clean, with random, error-maximizing and
    error-minimizing noise, by sample and by class, and measures what each victim knows of clean
    test images after every epoch: a reduced form of Huang et al. 2021, figure 2, for a CPU core.
    --scale=full is the published setting, for an accelerator.

    Other axes: --methods and --countermeasures, all with all; --poison_rates of the first method
    (the share of training images that is protected) and further --architectures of victims, on the
    same noise, both without a countermeasure. `purifier`, a countermeasure beside those of
    train_victim, is a denoiser fitted to clean images that are in no other set. The images,
    --train_images of them, are drawn by --seed, all noise and victims by --seeds: a cell of seed s
    is a victim of seed s on noise of seed s. --at_once: victims trained side by side in one vmapped
    program, for small nets on accelerators.

    Every cell is a file `cells/<name>.json` in the work directory, every noise one in `noise/`: a
    run that was cut goes on where it stopped, and more seeds or methods can be added to a finished
    one. Cells are trained seed after seed. With --max_minutes a run ends in time; what is there by
    then is put together, the exit code is 3, and the same command goes on later.

    Writes `result.json`, `matrix.csv`, `matrix.png` (heat map of last accuracies, mean over seeds;
    "-" is not measured), `curves.csv` and `curves.png`. --toy (--scale=toy): synthetic images of 16
    px, four classes, seconds.
    """

    shares_work = True

    cifar10_dir: str | None = options.option(None, "folder of CIFAR-10")
    scale: Literal["reduced", "full", "toy"] = options.option(
        "reduced", "small net and few images, or the published setting"
    )
    train_images: int | None = options.option(
        None, "training images; default: the scale's", at_least=1
    )
    methods: tuple[str, ...] = options.option(
        ("error_min", "error_max", "random"), "besides clean data", choices=tuple(recipes.METHODS)
    )
    granularities: tuple[noise_files.Granularity, ...] = options.option(
        ("sample", "class"), "of the noise"
    )
    countermeasures: tuple[str, ...] = options.option(
        ("none",), "of the victims", choices=(*countermeasures.NAMES, _PURIFIER)
    )
    architectures: tuple[str, ...] = options.option(
        (), "of the victims; default: the source's", choices=registry.NAMES
    )
    poison_rates: tuple[float, ...] = options.option(
        (1.0,), "shares of the training images with noise, above 0", at_least=0, at_most=1
    )
    seeds: tuple[int, ...] = options.option((0,), "of noise and victims", at_least=0)
    epsilon: float = options.option(
        8.0, "budget of the noise, gray levels of 255", at_least=1, at_most=255
    )
    at_once: int = options.option(1, "victims trained together", at_least=1)
    bfloat16: bool = options.option(False, "compute in bfloat16; parameters stay float32")
    max_minutes: float | None = options.option(
        None, "begin no victim after so many minutes; the same command goes on later", at_least=0
    )
    workdir: str | None = options.option("out/study", options.WORKDIR_HELP)

    def toy(self) -> "UnlearnableStudyConfig":
        """The scale `toy`."""
        return dataclasses.replace(self, scale="toy")

    def cells(self) -> list[matrix.VictimCell]:
        """The cells of the study, in the order in which they are trained.

        Raises:
            options.UsageError: there is none, or a rate is 0.
        """
        if not self.seeds or not all(self.poison_rates):
            raise options.UsageError("--seeds must not be empty, --poison_rates lie in (0, 1]")
        data = [("clean", "none")]
        data += [
            pair
            for pair in itertools.product(self.methods, self.granularities)
            if recipes.is_defined(*pair)
        ]
        first, *others = self.architectures or (_SCALES[self.scale].victim.network.architecture,)
        plain = [(*pair, 1.0, change, first) for change in self.countermeasures for pair in data]
        partly = [
            (*pair, rate, "none", first)
            for rate in self.poison_rates
            for pair in data
            if pair[0] in self.methods[:1] and rate < 1
        ]
        elsewhere = [(*pair, 1.0, "none", name) for name in others for pair in data]
        kinds = [*plain, *partly, *elsewhere]
        return [matrix.VictimCell(*kind, seed) for seed in self.seeds for kind in kinds]


def run(config: UnlearnableStudyConfig) -> options.Outcome:
    """Trains the victims of all cells that are not there yet, and puts the table together.

    Raises:
        options.UsageError: no cells, or data that cannot be used.
    """
    scale = _SCALES[config.scale]
    network = dataclasses.replace(scale.victim.network, bfloat16=config.bfloat16)
    if config.train_images is not None:
        scale = scale._replace(train_images=config.train_images)
    scale = scale._replace(victim=dataclasses.replace(scale.victim, network=network))
    cells = config.cells()
    if _PURIFIER in config.countermeasures and not scale.public_images:
        raise options.UsageError(f"--scale={config.scale} leaves no image to train a purifier on")
    data = _read(config, scale)
    settings = {
        "scale": config.scale,
        "victim": scale.victim,
        "widths": scale.widths,
        "search": scale.search,
        "epsilon_levels": config.epsilon,
        "seed": config.seed,
        "train_images": len(data.train.labels),
        "test_images": len(data.test.labels),
        "public_images": scale.public_images,
    }
    work = workdir.open_workdir(config.workdir, settings)
    study = _Study(scale, config.epsilon / 255, data, work)
    begin = time.monotonic()
    train_fn = functools.partial(_train_missing, study, config, begin)
    # All victims of some noise in one process, which makes it.
    by_noise: dict[tuple[str, str, int], list[matrix.VictimCell]] = {}
    for cell in cells:
        by_noise.setdefault((cell.method, cell.granularity, cell.seed), []).append(cell)
    distributed.split_work(
        list(by_noise.values()), lambda own: train_fn(list(itertools.chain(*own)))
    )
    if not distributed.is_primary():
        return options.Outcome({})
    with distributed.alone():
        train_fn(cells)
    records = {cell: study.known(cell) for cell in cells}
    curves = {}
    for cell, record in records.items():
        if record is not None:
            curve = record["curve"]
            curves[cell] = learnability.Curve(*(np.array(curve[k], np.float32) for k in curve))
    if not curves:
        raise options.UsageError("--max_minutes: too few for the first victim")
    chance = 1 / len(data.train.classes)
    rows = matrix.rows_of(curves)
    result = {
        **program.provenance("experiments.studies.unlearnable_study", config=config),
        "settings": settings,
        "cells": len(cells),
        "cells_missing": len(cells) - len(curves),
        "chance": chance,
        "interval_of_one_half": learnability.interval(0.5, len(data.test.labels)),
        "rows": rows,
        "verdict": matrix.verdict(rows, chance),
    }
    matrix.write(work.path, curves, rows, title=f"{len(data.train.labels)} training images")
    work.write_result(result)
    return options.Outcome(result, complete=len(curves) == len(cells))


class _Data(NamedTuple):
    """The images of a study: three sets that have none in common.

    Attributes:
        train: what is protected, and what victims are trained on.
        test: clean.
        purifier_fn: a victim's purifier, which is fitted to the third when first asked for.
    """

    train: image_sets.ImageSet
    test: image_sets.ImageSet
    purifier_fn: Callable[[], purifier.Purifier]


class _Study(NamedTuple):
    """What all cells have in common."""

    scale: _Scale
    epsilon: float
    data: _Data
    work: workdir.Workdir

    def path_of(self, cell: matrix.VictimCell) -> pathlib.Path:
        """Where a finished cell stands."""
        return self.work.path / "cells" / cell.file_name

    def known(self, cell: matrix.VictimCell) -> Mapping[str, Any] | None:
        """The record of a finished cell."""
        known = workdir.read_or_none(self.path_of(cell), files.read_sealed)
        return None if known is None else known["value"]


def _train_missing(
    study: _Study,
    config: UnlearnableStudyConfig,
    begin: float,
    cells: Sequence[matrix.VictimCell],
) -> None:
    """Trains the victims of cells without a record, as long as the time since `begin` allows."""
    missing = [cell for cell in cells if study.known(cell) is None]
    groups: dict[tuple[int, str, str], list[matrix.VictimCell]] = {}
    for cell in missing:
        groups.setdefault((cell.seed, cell.architecture, cell.countermeasure), []).append(cell)
    logging.info("%d of %d cells to do", len(missing), len(cells))
    parts = [
        group[start : start + config.at_once]
        for group in groups.values()
        for start in range(0, len(group), config.at_once)
    ]
    for part in progress.track(parts, description="victims"):
        if config.max_minutes is not None and time.monotonic() - begin > 60 * config.max_minutes:
            logging.info("out of time")
            return
        for cell, curve in zip(part, _train(study, part), strict=True):
            summary = learnability.summary(curve)
            logging.info("%s: last %.3f, peak %.3f", cell.file_name, *summary[:2])
            record = {"cell": cell, "summary": summary, "curve": curve}
            workdir.load_or_compute(study.path_of(cell), lambda r=record: r)


def _read(config: UnlearnableStudyConfig, scale: _Scale) -> _Data:
    if config.scale == "toy":
        train_set, test_set, public = (
            image_sets.synthetic(config.seed, count or _TOY_IMAGES, split=split)
            for split, count in (
                ("train", scale.train_images),
                ("test", scale.test_images),
                ("public", scale.public_images),
            )
        )
        fit_fn = functools.partial(purifier.fit, public.images)
        return _Data(train_set, test_set, functools.cache(fit_fn))
    data = image_sets.DataOptions(data="cifar10", cifar10_dir=config.cifar10_dir)
    train_set, test_set = (
        dataclasses.replace(data, split=split).read() for split in ("train", "test")
    )
    parts = []
    for whole, count in ((train_set, scale.train_images), (test_set, scale.test_images)):
        count = len(whole.labels) if count is None else count
        if count > len(whole.labels):
            raise options.UsageError(f"there are {len(whole.labels)} images, not {count}")
        parts.append(image_sets.spread_rows(whole.labels, count, seed=config.seed))
    rest = np.setdiff1d(np.arange(len(train_set.labels)), parts[0])
    rest = np.random.default_rng(config.seed).permutation(rest)[: scale.public_images]
    return _Data(
        image_sets.take(train_set, parts[0]),
        image_sets.take(test_set, parts[1]),
        functools.cache(functools.partial(purifier.fit, train_set.images[rest])),
    )


def _train(study: _Study, cells: Sequence[matrix.VictimCell]) -> Sequence[learnability.Curve]:
    """Trains the victims of cells that differ in nothing but noise, rate and seed."""
    first, usual = cells[0], study.scale.victim.network
    is_usual = first.architecture == usual.architecture
    network = registry.ClassifierOptions(
        first.architecture,
        width=usual.width if is_usual else study.scale.widths.get(first.architecture),
        stem=usual.stem,
        bfloat16=usual.bfloat16,
    )
    victim = dataclasses.replace(study.scale.victim, network=network)
    sets, test_set = [_training_set(study, cell) for cell in cells], study.data.test
    if first.countermeasure == _PURIFIER:
        *sets, test_set = _purified(study, [*sets, test_set])
    else:
        victim = dataclasses.replace(victim, countermeasure=first.countermeasure)
    if len(cells) == 1:
        found = victims.train_victim(sets[0], test_set, options=victim, seed=first.seed)
        return [found.curve]
    return many_victims.train_many(
        np.stack([data.images for data in sets]),
        study.data.train.labels,
        test_set.images,
        test_set.labels,
        set_of_run=range(len(cells)),
        seed_of_run=[cell.seed for cell in cells],
        num_classes=len(study.data.train.classes),
        options=victim,
        mesh=parallel.make_mesh(),
    )


def _purified(study: _Study, sets: Sequence[image_sets.ImageSet]) -> list[image_sets.ImageSet]:
    """Sets as a purifier leaves them."""
    fitted = study.data.purifier_fn()
    return [one._replace(images=purifier.purify(fitted, one.images)) for one in sets]


def _training_set(study: _Study, cell: matrix.VictimCell) -> image_sets.ImageSet:
    """The training images of a cell before any countermeasure."""
    clean = study.data.train
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
    granularity: noise_files.Granularity = "class" if cell.granularity == "class" else "sample"
    config = recipes.METHODS[cell.method](granularity=granularity, epsilon=study.epsilon)
    if isinstance(config, recipes.SearchedNoise):
        changes = study.scale.search.get(f"{cell.method}/{cell.granularity}", {})
        config = dataclasses.replace(config, network=study.scale.victim.network)
        config = config.with_search(**changes)
    with checkpoint.Checkpoints(study.work.path / "searches" / name) as checkpoints:
        noise = recipes.make_unlearnable(
            study.data.train,
            config=config,
            seed=cell.seed,
            checkpoints=checkpoints,
            report_fn=lambda number, error: logging.info(
                "%s: round %d, training error %.3f", name, number, error
            ),
        )
    noise.save(path)
    return noise
