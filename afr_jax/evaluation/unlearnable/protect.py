"""Making an image set unlearnable as a program does it: noise, protected images and a report."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
from absl import logging

from afr_jax.core import checkpoint, distributed, files, options, workdir
from afr_jax.data import image_sets, noise_files
from afr_jax.evaluation.metrics import learnability
from afr_jax.methods.unlearnable import recipes
from afr_jax.models.classifiers import registry

_TOY = {"architecture": "small_resnet", "width": 4, "batch_size": 16, "max_rounds": 2}
# Largest values of a search at its toy size.
_TOY_SEARCH = {"num_steps": 2, "source_steps": 4, "train_steps": 4, "views": 1}
_TOY_SEARCH |= {"adversary_steps": 2}


@dataclasses.dataclass(frozen=True)
class SearchChanges:
    """Values of a search where they differ from the published ones."""

    batch_size: int | None = options.option(None, "images of a step of the search", at_least=1)
    max_rounds: int | None = options.option(
        None, "at most so many rounds of the search", at_least=1
    )
    train_steps: int | None = options.option(None, "network steps in a round", at_least=0)
    source_steps: int | None = options.option(
        None, "network steps on clean images before the first round", at_least=0
    )
    num_steps: int | None = options.option(None, "noise steps of an image in a round", at_least=1)
    step_levels: float | None = options.option(None, "size of a noise step, gray levels of 255")
    views: int | None = options.option(
        None, "random crops that a noise step averages over; 0: the image itself", at_least=0
    )
    adversary_steps: int | None = options.option(
        None, "steps of the inner adversary of rem", at_least=0
    )

    def given(self) -> dict[str, files.Json]:
        """The values that are there, as fields of `search.SearchOptions`."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if "step_levels" in given:
            given["step_size"] = given.pop("step_levels") / 255
        return given


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeUnlearnableConfig(options.Config):
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

    All images have one size. Images of other sizes are left out with a reason, or cropped and
    resized with --resize. What is left out is not protected: it is named, and the exit code is 3.

    --method: error_min (Huang et al. 2021), its controls random and error_max, and rem, tap, lsp,
    cuda, aue, aap, uc (which needs no labels: any folders do). Searches train a source network
    (--architecture) on the machine's devices and are resumed from the work directory (default:
    <output_dir>/work). Values of the search that are not given are the published ones for CIFAR-10;
    data sets with fewer images than a batch of 512 want a smaller --batch_size.

    This hides nothing from a model that is already trained, and little from a victim that also gets
    clean photos, trains on grayscale or JPEG copies, or trains adversarially:
    experiments.train_victim measures that. --toy: a tiny network, two rounds, seconds.
    """

    shares_work = True

    data: image_sets.DataOptions = options.group(image_sets.DataOptions)
    output_dir: str | None = options.option(None, "folder of the results; originals stay")
    noise_format: Literal["npz", "array_record"] = options.option(
        "npz", "how the noise is stored", resumable=True
    )
    method: str = options.option("error_min", "how noise is made", choices=tuple(recipes.METHODS))
    granularity: noise_files.Granularity = options.option(
        "sample", "one noise an image, or one a class"
    )
    epsilon: float = options.option(
        8.0,
        "budget in gray levels of 255: the largest change of a value (lsp: scales the L2 norm)",
        at_least=1,
        at_most=255,
    )
    source: registry.ClassifierOptions = options.group(registry.ClassifierOptions)
    search: SearchChanges = options.group(SearchChanges)
    learning_rate: float = options.option(0.1, "of the source network")

    def toy(self) -> "MakeUnlearnableConfig":
        """A tiny network and two rounds."""
        small = options.fill_defaults(self, _TOY)
        kind = recipes.METHODS[self.method]
        if not issubclass(kind, recipes.SearchedNoise):
            return small
        full = kind(granularity=self.granularity).published()
        limits = {name: min(limit, getattr(full, name)) for name, limit in _TOY_SEARCH.items()}
        return options.fill_defaults(small, limits)

    def noise(self) -> recipes.NoiseConfig:
        """The method as the library has it.

        Raises:
            options.UsageError: the options do not go together.
        """
        kind = recipes.METHODS[self.method]
        with options.usage("--method"):
            if not issubclass(kind, recipes.SearchedNoise):
                return kind(granularity=self.granularity, epsilon=self.epsilon / 255)
            found = kind(
                granularity=self.granularity,
                epsilon=self.epsilon / 255,
                network=self.source,
                learning_rate=self.learning_rate,
            )
            return found.with_search(**self.search.given())


def run(config: MakeUnlearnableConfig) -> options.Outcome:
    """Makes the noise and the protected images.

    Raises:
        options.UsageError: options that do not go together, or data that cannot be used.
    """
    if not config.data.data or not config.output_dir:
        raise options.UsageError("--data and --output_dir are needed")
    output = pathlib.Path(config.output_dir).expanduser().absolute()
    method = config.noise()
    _check_places(config.data.data, output)
    data = image_sets.without_unnameable(config.data.read(seed=config.seed))
    if not data.sample_ids:
        raise options.UsageError(f"--data={config.data.data}: {data.problems[-1].reason}")
    if len(data.classes) < 2 and method.needs_classes:
        raise options.UsageError(f"--method={config.method} needs two classes or more")
    settings = {
        "data": config.data.data,
        "num_images": len(data.sample_ids),
        "images_sha256": data.digest(),
        "image_px": data.images.shape[1],
        "classes": len(data.classes),
        **method.describe(),
        "seed": config.seed,
    }
    folders = {(output / "images" / name).parent for name in data.sample_ids}
    with workdir.claimed(output, below=folders):
        return _write(config, data, method, settings, output)


def _write(
    config: MakeUnlearnableConfig,
    data: image_sets.ImageSet,
    method: recipes.NoiseConfig,
    settings: Mapping[str, files.Json],
    output: pathlib.Path,
) -> options.Outcome:
    """Makes the noise and the protected images, and writes all results."""
    work = workdir.open_workdir(config.workdir or output / "work", settings)
    noise = _make(data, method, config.seed, work)
    if not distributed.is_primary():
        return options.Outcome({})
    report = noise.settings["report"]
    noise = noise._replace(settings={**settings, "report": report})
    noise.save(output / ("noise.npz" if config.noise_format == "npz" else "noise"))
    protected = noise.apply(data)
    protected.save(output / "images")
    change = np.abs(protected.images.astype(np.int16) - data.images).max(initial=0)
    result = {
        "settings": settings,
        "images": len(data.sample_ids),
        "largest_change_levels": int(change),
        "budget": report["budget"],
        "training_errors": report.get("training_errors"),
        "converged": report.get("converged"),
        "linear_probe": probe(noise, data),
        "output_dir": output,
        "not_handled": data.not_handled(),
        "note": "Noise within the budget; whether a victim learns is what train_victim measures.",
    }
    work.write_result(result)
    files.write_json(output / "result.json", result)
    return options.Outcome(result, complete=not data.problems)


def probe(
    noise: noise_files.Noise, data: image_sets.ImageSet, *, max_images: int = 2000
) -> float | None:
    """Held-out accuracy of a linear classifier on the noise alone; see `learnability.linear_probe`.

    Args:
        noise: Of the data.
        data: Whose labels are asked for.
        max_images: At most so many are looked at.

    Returns:
        The accuracy in [0, 1]; None where there are too few images or classes.
    """
    rows = image_sets.spread_rows(data.labels, max_images)
    if len(rows) < 4 or len(np.unique(data.labels)) < 2:
        return None
    levels = noise.levels[noise.rows_of(data)[rows]].astype(np.float32)
    # Large images are averaged over blocks: the classifier needs few features.
    factor = max(1, levels.shape[1] // 32)
    side = levels.shape[1] // factor
    cut = levels[:, : side * factor, : side * factor]
    blocks = cut.reshape(len(rows), side, factor, side, factor, 3).mean(axis=(2, 4))
    return learnability.linear_probe(blocks, data.labels[rows])


def _check_places(data: str, output: pathlib.Path) -> None:
    """Refuses results among the originals, and originals among the results."""
    if data == "cifar10" or data.startswith("tfds:"):
        return
    root, images = pathlib.Path(data).expanduser().absolute(), output / "images"
    if root == images or images in root.parents or root in (output, *output.parents):
        raise options.UsageError(
            f"--output_dir={output} and --data={root} lie within each other: the results would be "
            "taken for originals"
        )


def _make(
    data: image_sets.ImageSet, method: recipes.NoiseConfig, seed: int, work: workdir.Workdir
) -> noise_files.Noise:
    def report(number: int, error: float) -> None:
        logging.info("round %d: training error on noisy images %.4f", number, error)
        work.append_metrics({"step": number, "training_error": error})

    if not isinstance(method, recipes.SearchedNoise):
        return recipes.make_unlearnable(data, config=method, seed=seed)
    with checkpoint.Checkpoints(work.path / "checkpoints") as checkpoints:
        work.truncate_metrics(checkpoints.latest_step() or 0)
        return recipes.make_unlearnable(
            data, config=method, seed=seed, checkpoints=checkpoints, report_fn=report
        )
