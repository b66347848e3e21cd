r"""Makes a folder of images unlearnable: noise by sample id or class, and the images with it.

    python -m experiments.make_unlearnable --data=photos --output_dir=out/unlearnable
    python -m experiments.make_unlearnable --data=cifar10 --cifar10_dir=cifar-10-batches-bin \
        --method=error_min --granularity=sample --output_dir=out/cifar10_error_min

--data is a folder with one folder of images per class; cifar10, read from --cifar10_dir; or
tfds:NAME, a TFDS data set in --tfds_dir with an image and a class label, stored as ArrayRecord
(tfds:NAME:SPLIT, or --split; the training set by default). Writes into --output_dir:
  images/<class>/<id>.png   the protected images, lossless, in the folders of the originals
  noise.npz                 names (sample ids or classes), signed gray levels, settings; with
                            --noise_format=array_record a TFDS data set in noise/ instead
  result.json               what was done, the course of the search, files that were left out

All images have one size, --image_px; by default that of the commonest square images. Images of
other sizes are left out with a reason, or cropped and resized with --resize. Gray images become
RGB; transparency is dropped. What is left out is not protected: it is named, and the exit code is
3.

--method: error_min (Huang et al. 2021), its controls random and error_max, and rem, tap, lsp, cuda.
Searches train a source network (--architecture) on the machine's devices and are resumed from the
work folder (default: <output_dir>/work). Without search flags the published values for CIFAR-10
hold; data sets with fewer images than a batch of 512 want a smaller --batch_size.

This hides nothing from a model that is already trained, and little from a victim that also gets
clean photos, trains on grayscale or JPEG copies, or trains adversarially: experiments.train_victim
measures that.

Expected: a tree of 10,000 images of CIFAR-10 through --method=lsp in 33 seconds on two busy CPU
cores. error_min for the 50,000 images of CIFAR-10 with ResNet-18: 9 rounds, 3.5 minutes on an H200
that two other runs shared.
--toy: a tiny network, two rounds, seconds.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from absl import flags, logging

from afr_jax.core import checkpoint, files, parallel, program, workdir
from afr_jax.data import image_sets, noise_files
from afr_jax.evaluation.attackers import victims
from afr_jax.evaluation.metrics import learnability
from afr_jax.methods.unlearnable import recipes, search
from afr_jax.models.classifiers import registry

_DATA = flags.DEFINE_string(
    "data", None, "folder with one folder of images per class, cifar10, or tfds:NAME[:SPLIT]"
)
_CIFAR10 = flags.DEFINE_string("cifar10_dir", None, "folder of CIFAR-10, for --data=cifar10")
_TFDS = flags.DEFINE_string(
    "tfds_dir", None, "folder of TFDS data sets; default ~/tensorflow_datasets"
)
_SPLIT = flags.DEFINE_string("split", "train", "part of CIFAR-10 or of a TFDS set")
_NUM_IMAGES = flags.DEFINE_integer(
    "num_images", None, "at most so many images, drawn evenly from the classes; default: all", 1
)
_OUTPUT = flags.DEFINE_string("output_dir", None, "folder of the results; originals stay")
_FORMAT = flags.DEFINE_enum(
    "noise_format", "npz", ["npz", "array_record"], "how the noise is stored"
)
_METHOD = flags.DEFINE_enum("method", "error_min", recipes.METHODS, "how noise is made")
_GRANULARITY = flags.DEFINE_enum(
    "granularity", "sample", ["sample", "class"], "one noise an image, or one a class"
)
_EPSILON = flags.DEFINE_float(
    "epsilon", 8.0, "budget in gray levels of 255, largest change of a value (lsp: see its docs)", 1
)
_IMAGE_PX = flags.DEFINE_integer(
    "image_px", None, "side of the images; default: the commonest square", 8
)
_RESIZE = flags.DEFINE_bool("resize", False, "crop and resize images of other sizes")
_ARCHITECTURE = flags.DEFINE_enum(
    "architecture", "resnet18", registry.NAMES, "source network of a search"
)
_WIDTH = flags.DEFINE_integer("width", None, "channels of its first stage; default: published", 1)
_STEM = flags.DEFINE_enum(
    "stem", "cifar", ["cifar", "imagenet"], "its first layers: cifar for about 32 px, or imagenet"
)
_BFLOAT16 = flags.DEFINE_bool("bfloat16", False, "compute in bfloat16")
_BATCH = flags.DEFINE_integer("batch_size", None, "images of a step of the search", 1)
_ROUNDS = flags.DEFINE_integer("max_rounds", None, "at most so many rounds of the search", 1)
_TRAIN_STEPS = flags.DEFINE_integer("train_steps", None, "network steps in a round", 0)
_SOURCE_STEPS = flags.DEFINE_integer(
    "source_steps", None, "network steps on clean images before the first round", 0
)
_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "noise steps of an image in a round", 1)
_STEP_LEVELS = flags.DEFINE_float("step_levels", None, "size of a noise step, gray levels")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.1, "of the source network")


def make_unlearnable_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    if not _DATA.value or not _OUTPUT.value:
        raise program.UsageError("--data and --output_dir are needed")
    output = pathlib.Path(_OUTPUT.value).expanduser().absolute()
    try:
        recipes.check(_METHOD.value, _GRANULARITY.value)
        options = _options()
        data = _read(output)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise program.UsageError(str(error)) from error
    settings = {
        "data": _DATA.value,
        "num_images": len(data.sample_ids),
        "image_px": data.images.shape[1],
        "classes": len(data.classes),
        "method": _METHOD.value,
        "granularity": _GRANULARITY.value,
        "epsilon_levels": _EPSILON.value,
        "search": options,
        "source": _source(),
        "seed": flags.FLAGS.seed,
    }
    work = workdir.open_workdir(flags.FLAGS.workdir or output / "work", settings)
    made = _make(data, options, work)
    noise = made.noise
    if _FORMAT.value == "npz":
        noise_files.write_noise(output / "noise.npz", noise, files.to_jsonable(settings))
    else:
        noise_files.write_noise_records(output / "noise", noise, files.to_jsonable(settings))
    of_sample = [data.classes[label] for label in data.labels]
    protected = noise_files.apply(data.images, noise, data.sample_ids, of_sample)
    noise_files.write_images(output / "images", data.sample_ids, protected)
    rows = noise_files.rows_for(noise, data.sample_ids, of_sample)
    change = np.abs(protected.astype(np.int16) - data.images).max(initial=0)
    result = {
        "settings": settings,
        "images": len(data.sample_ids),
        "largest_change_levels": int(change),
        "budget": made.report["budget"],
        "training_errors": made.report.get("training_errors"),
        "converged": made.report.get("converged"),
        "linear_probe": _probe(noise.levels[rows], data.labels),
        "output_dir": output,
        "not_handled": [{"image": p.name, "reason": p.reason} for p in data.problems],
        "note": "Noise within the budget; whether a victim learns is what train_victim measures.",
    }
    work.write_result(result)
    files.write_json(output / "result.json", result)
    return result, program.EXIT_PARTIAL if data.problems else program.EXIT_OK


def _read(output: pathlib.Path) -> image_sets.ImageSet:
    if _DATA.value != "cifar10" and not _DATA.value.startswith("tfds:"):
        root = pathlib.Path(_DATA.value).expanduser().absolute()
        images = output / "images"
        if root == images or images in root.parents or root in (output, *output.parents):
            raise ValueError(
                f"--output_dir={output} and --data={root} lie within each other: the results would "
                "be taken for originals"
            )
    data = image_sets.read(
        _DATA.value,
        cifar10_dir=_CIFAR10.value,
        tfds_dir=_TFDS.value,
        split=_SPLIT.value,
        image_px=_IMAGE_PX.value,
        resize=_RESIZE.value,
    )
    if _NUM_IMAGES.value is not None:
        rows = image_sets.spread_rows(data.labels, _NUM_IMAGES.value, seed=flags.FLAGS.seed)
        data = image_sets.take(data, rows)
    if len(data.classes) < 2 and _METHOD.value in recipes.SEARCHED:
        raise ValueError(f"--method={_METHOD.value} needs two classes or more")
    return data


def _options() -> search.SearchOptions | None:
    """The search with what the flags say; None for a method without one."""
    if _METHOD.value not in recipes.SEARCHED:
        return None
    changes = {
        "epsilon_levels": _EPSILON.value,
        "batch_size": _BATCH.value,
        "max_rounds": _ROUNDS.value,
        "train_steps": _TRAIN_STEPS.value,
        "source_steps": _SOURCE_STEPS.value,
        "num_steps": _NUM_STEPS.value,
        "step_levels": _STEP_LEVELS.value,
    }
    if flags.FLAGS.toy:
        changes |= {"batch_size": 16, "max_rounds": 2, "num_steps": 2}
    changes = {name: value for name, value in changes.items() if value is not None}
    options = recipes.published(_METHOD.value, _GRANULARITY.value)
    if flags.FLAGS.toy:
        shorter = {"source_steps": 4, "train_steps": 4, "adversary_steps": 2, "views": 1}
        changes |= {name: min(n, getattr(options, name)) for name, n in shorter.items()}
    return dataclasses.replace(options, **changes)


def _source() -> victims.VictimOptions | None:
    """The source network as the options of a training."""
    if _METHOD.value not in recipes.SEARCHED:
        return None
    return victims.VictimOptions(
        architecture="small_resnet" if flags.FLAGS.toy else _ARCHITECTURE.value,
        width=4 if flags.FLAGS.toy else _WIDTH.value,
        stem=_STEM.value,
        learning_rate=_LEARNING_RATE.value,
        augmented=False,
        bfloat16=_BFLOAT16.value,
    )


def _make(
    data: image_sets.ImageSet, options: search.SearchOptions | None, work: workdir.Workdir
) -> recipes.Made:
    shared = {
        "method": _METHOD.value,
        "granularity": _GRANULARITY.value,
        "epsilon_levels": _EPSILON.value,
        "seed": flags.FLAGS.seed,
    }
    if options is None:
        return recipes.make(data, **shared)
    recipe = victims.source_recipe(
        _source(), num_classes=len(data.classes), image_px=data.images.shape[1]
    )

    def report(number: int, error: float) -> None:
        logging.info("round %d: training error on noisy images %.4f", number, error)
        work.append_metrics({"step": number, "training_error": error})

    with checkpoint.Checkpoints(work.path / "checkpoints") as checkpoints:
        work.truncate_metrics(checkpoints.latest_step() or 0)
        return recipes.make(
            data,
            **shared,
            options=options,
            recipe=recipe,
            mesh=parallel.make_mesh(),
            checkpoints=checkpoints,
            report_fn=report,
        )


def _probe(levels: np.ndarray, labels: np.ndarray) -> float | None:
    """Held-out accuracy of a linear classifier on the noise alone, of at most 2,000 samples."""
    rows = image_sets.spread_rows(labels, 2000)
    if len(rows) < 4 or len(np.unique(labels)) < 2:
        return None
    # Large images are averaged over blocks: the classifier needs few features.
    factor = max(1, levels.shape[1] // 32)
    side = levels.shape[1] // factor
    cut = levels[rows][:, : side * factor, : side * factor].astype(np.float32)
    blocks = cut.reshape(len(rows), side, factor, side, factor, 3).mean(axis=(2, 4))
    return learnability.linear_probe(blocks, labels[rows])


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(make_unlearnable_program)
