r"""What victims learn from unlearnable data: methods x granularity x countermeasures x seeds.

    python -m experiments.studies.unlearnable_study --cifar10_dir=cifar-10-batches-bin \
        --workdir=out/study

trains a small ResNet on 3,000 images of CIFAR-10, clean, with random, error-maximising and
error-minimising noise, by sample and by class, and measures what each victim knows of clean test
images after every epoch: the reduced form of Huang et al. 2021, figure 2, for two CPU cores. Single
cells of it on a busy machine, last epoch: clean 50 %, error_min 22 % by sample and by class (chance
10 %); the same noise by sample left a victim with crops and flips 35 % (clean: 55 %).
On an accelerator the whole matrix (with --bfloat16 on an H200 a victim took 83 s, a search for
error_min by sample 3.5 minutes, beside other runs):

    python -m experiments.studies.unlearnable_study --scale=full --cifar10_dir=... \
        --workdir=out/matrix \
        --methods=error_min,error_max,random,rem,tap,lsp,cuda --seeds=0,1,2 \
        --countermeasures=none,grayscale,jpeg10,jpeg50,jpeg75,blur,bit_depth,cutout,mixup,cutmix,randaugment,adversarial

Other axes: --architectures (of victims), --poison_rates (the share of training images that is
protected), --at_once (victims trained together in one vmapped program, for small nets on
accelerators). The images and all noise are made with the run's seeds: a cell of seed s is a victim
of seed s on noise of seed s.

Every cell is a file `cells/<name>.json` in the work folder, every noise one in `noise/`: a run that
was cut goes on where it stopped, and more seeds or methods can be added to a finished one. Writes
`result.json`, `matrix.csv`, `matrix.png` (heat map of last accuracies, mean over seeds),
`curves.csv` and `curves.png`. --toy: made-up images of 16 px, four classes, seconds.
"""

import dataclasses
import itertools
import json
from typing import Any, NamedTuple

import numpy as np
from absl import flags, logging

from afr_jax.core import checkpoint, files, parallel, program, progress, workdir
from afr_jax.data import image_sets, noise_files
from afr_jax.evaluation.attackers import countermeasures, many_victims, victims
from afr_jax.evaluation.metrics import learnability
from afr_jax.evaluation.unlearnable import matrix
from afr_jax.methods.unlearnable import recipes, search
from afr_jax.models.classifiers import registry

_CIFAR10 = flags.DEFINE_string("cifar10_dir", None, "folder of CIFAR-10")
_SCALE = flags.DEFINE_enum(
    "scale", "reduced", ["reduced", "full"], "small net and few images, or the published setting"
)
_METHODS = flags.DEFINE_list("methods", ["error_min", "error_max", "random"], "besides clean data")
_GRANULARITIES = flags.DEFINE_list("granularities", ["sample", "class"], "of the noise")
_COUNTERMEASURES = flags.DEFINE_list("countermeasures", ["none"], "of the victims")
_ARCHITECTURES = flags.DEFINE_list("architectures", [], "of the victims; default: the source's")
_RATES = flags.DEFINE_list("poison_rates", ["1"], "shares of the training images with noise")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "of noise and victims")
_EPSILON = flags.DEFINE_float("epsilon", 8.0, "budget of the noise, gray levels", 1)
_AT_ONCE = flags.DEFINE_integer("at_once", 1, "victims trained together", 1)
_BFLOAT16 = flags.DEFINE_bool("bfloat16", False, "compute in bfloat16")


class _Scale(NamedTuple):
    """The setting of all cells."""

    train_images: int | None
    test_images: int | None
    victim: victims.VictimOptions
    search: dict[str, dict[str, Any]]


_REDUCED_SEARCH = {"batch_size": 128, "train_steps": 20, "max_rounds": 15}
_REDUCED_ROBUST = _REDUCED_SEARCH | {"views": 1, "adversary_steps": 3}
_REDUCED_SOURCE = {"batch_size": 128, "source_steps": 400, "class_share": 1.0}
_SCALES = {
    "reduced": _Scale(
        train_images=3000,
        test_images=1000,
        victim=victims.VictimOptions(
            "small_resnet",
            width=32,
            stem="imagenet",
            num_epochs=10,
            batch_size=64,
            augmented=False,
        ),
        search={
            "error_min/sample": _REDUCED_SEARCH
            | {"max_rounds": 8, "num_steps": 4, "step_levels": 2.0, "stop_error": None},
            "error_min/class": _REDUCED_SEARCH | {"step_levels": 1.6, "class_share": 1.0},
            "error_max/sample": _REDUCED_SOURCE
            | {"max_rounds": 1, "num_steps": 8, "step_levels": 2.0},
            "error_max/class": _REDUCED_SOURCE | {"max_rounds": 8, "step_levels": 1.6},
            "rem/sample": _REDUCED_ROBUST
            | {"max_rounds": 8, "train_steps": 40, "num_steps": 4, "step_levels": 2.0},
            "rem/class": _REDUCED_ROBUST | {"class_share": 1.0},
            "tap/sample": _REDUCED_SOURCE | {"max_rounds": 4},
            "tap/class": _REDUCED_SOURCE | {"max_rounds": 30},
        },
    ),
    "full": _Scale(None, None, victims.VictimOptions(), {}),
    "toy": _Scale(
        train_images=320,
        test_images=320,
        victim=victims.VictimOptions(
            "small_resnet", width=8, num_epochs=12, batch_size=32, augmented=False
        ),
        search={
            f"{method}/{granularity}": {
                "batch_size": 32,
                "train_steps": 0 if method in ("error_max", "tap") else 20,
                "source_steps": 60 if method in ("error_max", "tap") else 0,
                "num_steps": 4 if granularity == "sample" else 1,
                "step_levels": 2.0,
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


def study_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    scale = _SCALES["toy" if flags.FLAGS.toy else _SCALE.value]
    scale = scale._replace(victim=dataclasses.replace(scale.victim, bfloat16=_BFLOAT16.value))
    try:
        cells = _cells(scale)
        train_set, test_set = _read(scale)
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(str(error)) from error
    settings = {
        "scale": "toy" if flags.FLAGS.toy else _SCALE.value,
        "victim": scale.victim,
        "search": scale.search,
        "epsilon_levels": _EPSILON.value,
        "seed": flags.FLAGS.seed,
        "train_images": len(train_set.labels),
        "test_images": len(test_set.labels),
    }
    work = workdir.open_workdir(flags.FLAGS.workdir or "out/study", settings)
    mesh = parallel.make_mesh()
    groups: dict[tuple[str, str], list[matrix.Cell]] = {}
    for cell in cells:
        if not (work.path / "cells" / cell.file_name).exists():
            groups.setdefault((cell.architecture, cell.countermeasure), []).append(cell)
    total = sum(map(len, groups.values()))
    parts = [
        group[start : start + _AT_ONCE.value]
        for group in groups.values()
        for start in range(0, len(group), _AT_ONCE.value)
    ]
    logging.info("%d of %d cells to do", total, len(cells))
    for part in progress.track(parts, description="victims"):
        _train_cells(part, scale, train_set, test_set, work, mesh)
    curves = {cell: _read_cell(work, cell) for cell in cells}
    chance = 1 / len(train_set.classes)
    rows = matrix.rows_of(curves)
    result = {
        **program.provenance("experiments.studies.unlearnable_study"),
        "settings": settings,
        "chance": chance,
        "interval_of_one_half": learnability.interval(0.5, len(test_set.labels)),
        "rows": rows,
        "verdict": matrix.verdict(rows, chance),
    }
    title = f"{len(train_set.labels)} training images"
    matrix.write(work.path, curves, rows, title=title)
    work.write_result(result)
    return result, program.EXIT_OK


def _cells(scale: _Scale) -> list[matrix.Cell]:
    try:
        rates = [float(rate) for rate in _RATES.value]
        seeds = [int(seed) for seed in _SEEDS.value]
    except ValueError as error:
        raise ValueError(f"--poison_rates and --seeds must be numbers: {error}") from error
    if not seeds or not all(0 < rate <= 1 for rate in rates):
        raise ValueError("--seeds must not be empty, --poison_rates lie in (0, 1]")
    architectures = _ARCHITECTURES.value or [scale.victim.architecture]
    _check_names("architectures", architectures, registry.NAMES)
    _check_names("countermeasures", _COUNTERMEASURES.value, countermeasures.NAMES)
    _check_names("methods", _METHODS.value, recipes.METHODS)
    _check_names("granularities", _GRANULARITIES.value, ("sample", "class"))
    kinds = [("clean", "none", 1.0)]
    for method, granularity in itertools.product(_METHODS.value, _GRANULARITIES.value):
        if (method, granularity) != ("cuda", "sample"):
            kinds += [(method, granularity, rate) for rate in rates]
    axes = itertools.product(architectures, _COUNTERMEASURES.value, seeds, kinds)
    return [matrix.Cell(*kind, change, name, seed) for name, change, seed, kind in axes]


def _check_names(flag: str, names: list[str], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"--{flag}: {name!r} is none of {', '.join(known)}")


def _read(scale: _Scale) -> tuple[image_sets.ImageSet, image_sets.ImageSet]:
    if flags.FLAGS.toy:
        train_set = image_sets.synthetic(flags.FLAGS.seed, scale.train_images)
        test_set = image_sets.synthetic(flags.FLAGS.seed, scale.test_images, split="test")
        return train_set, test_set
    if not _CIFAR10.value:
        raise ValueError("--cifar10_dir is needed: the folder of CIFAR-10")
    found = []
    for split, count in (("train", scale.train_images), ("test", scale.test_images)):
        data = image_sets.read_cifar10(_CIFAR10.value, split=split)
        if count is not None:
            rows = image_sets.spread_rows(data.labels, count, seed=flags.FLAGS.seed)
            data = image_sets.take(data, rows)
        found.append(data)
    return found[0], found[1]


def _train_cells(cells, scale, train_set, test_set, work, mesh) -> None:
    """Trains the victims of cells that differ in nothing but noise, rate and seed."""
    first = cells[0]
    in_training = first.countermeasure in countermeasures.IN_TRAINING
    options = dataclasses.replace(
        scale.victim,
        architecture=first.architecture,
        width=scale.victim.width if first.architecture == scale.victim.architecture else None,
        countermeasure=first.countermeasure if in_training else "none",
    )

    def converted(images: np.ndarray) -> np.ndarray:
        return images if in_training else countermeasures.convert(first.countermeasure, images)

    images = [converted(_images_of(cell, scale, train_set, work, mesh)) for cell in cells]
    test_images = converted(test_set.images)
    num_classes = len(train_set.classes)
    if len(cells) == 1:
        curve, _ = victims.train_victim(
            images[0],
            train_set.labels,
            test_images,
            test_set.labels,
            num_classes=num_classes,
            options=options,
            seed=first.seed,
            mesh=mesh,
        )
        curves = [curve]
    else:
        curves = many_victims.train_many(
            np.stack(images),
            train_set.labels,
            test_images,
            test_set.labels,
            set_of_run=range(len(cells)),
            seed_of_run=[cell.seed for cell in cells],
            num_classes=num_classes,
            options=options,
            mesh=mesh,
        )
    (work.path / "cells").mkdir(exist_ok=True)
    for cell, curve in zip(cells, curves, strict=True):
        summary = learnability.summary(curve)
        logging.info("%s: last %.3f, peak %.3f", cell.file_name, *summary[:2])
        record = {"cell": cell, "summary": summary, "curve": curve}
        files.write_json(work.path / "cells" / cell.file_name, record)


def _images_of(cell, scale, train_set, work, mesh) -> np.ndarray:
    """The training images of a cell before any countermeasure."""
    if cell.method == "clean":
        return train_set.images
    of_sample = [train_set.classes[label] for label in train_set.labels]
    noise = _noise_of(cell, scale, train_set, work, mesh)
    protected = noise_files.apply(train_set.images, noise, train_set.sample_ids, of_sample)
    images, _ = victims.protect_part(
        train_set.images, protected, train_set.labels, rate=cell.rate, seed=cell.seed
    )
    return images


def _noise_of(cell, scale, train_set, work, mesh) -> noise_files.Noise:
    """The noise of a cell, made once."""
    name = f"{cell.method}-{cell.granularity}-seed{cell.seed}"
    path = work.path / "noise" / f"{name}.npz"
    if path.exists():
        return noise_files.read_noise(path)[0]
    options, recipe = None, None
    if cell.method in recipes.SEARCHED:
        options = _search_options(cell, scale)
        source = dataclasses.replace(scale.victim, augmented=False)
        recipe = victims.source_recipe(
            source, num_classes=len(train_set.classes), image_px=train_set.images.shape[1]
        )
    with checkpoint.Checkpoints(work.path / "searches" / name) as checkpoints:
        made = recipes.make(
            train_set,
            method=cell.method,
            granularity=cell.granularity,
            epsilon_levels=_EPSILON.value,
            seed=cell.seed,
            options=options,
            recipe=recipe,
            mesh=mesh,
            checkpoints=checkpoints,
            report_fn=lambda number, error: logging.info(
                "%s: round %d, training error %.3f", name, number, error
            ),
        )
    settings = {"cell": cell, "search": options, "report": made.report}
    noise_files.write_noise(path, made.noise, files.to_jsonable(settings))
    return made.noise


def _search_options(cell: matrix.Cell, scale: _Scale) -> search.SearchOptions:
    changes = scale.search.get(f"{cell.method}/{cell.granularity}", {})
    published = recipes.published(cell.method, cell.granularity)
    return dataclasses.replace(published, **changes)


def _read_cell(work: workdir.Workdir, cell: matrix.Cell) -> learnability.Curve:
    record = json.loads((work.path / "cells" / cell.file_name).read_text(encoding="utf-8"))
    curve = record["curve"]
    return learnability.Curve(*(np.array(curve[name], np.float32) for name in curve))


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(study_program)
