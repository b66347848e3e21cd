"""What one victim learns from clean, protected or partly protected images, as a program asks it."""

import dataclasses
import pathlib

import numpy as np
from absl import logging

from afr_jax.core import checkpoint, distributed, options, workdir
from afr_jax.data import image_sets, noise_files
from afr_jax.evaluation.attackers import victims
from afr_jax.evaluation.metrics import learnability

_TOY = {"architecture": "small_resnet", "width": 4, "epochs": 2, "batch_size": 16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainVictimConfig(options.Config):
    r"""Trains a victim on clean, protected or partly protected images and measures what it learns.

        python -m experiments.train_victim --data=out/unlearnable/images --test_data=clean_test
        python -m experiments.train_victim --data=cifar10 --cifar10_dir=cifar-10-batches-bin \
            --noise=out/cifar10_error_min/noise.npz --countermeasure=grayscale --workdir=out/victim

    --data is the training set, as in make_unlearnable: a folder with one folder of images per
    class, cifar10, or tfds:NAME[:SPLIT]. It is used as it is, or with --noise, which is added by
    sample id or class to a share of the samples (--poison_rate), all or of some classes
    (--poison_classes=cat,dog). --test_data holds clean images of the same classes; with
    --data=cifar10 it is CIFAR-10's test set.

    --countermeasure: what the victim does against the noise. Conversions of its stored images
    (grayscale, jpeg10, jpeg50, jpeg75, blur, denoise, bit_depth), which --convert_test also does to
    what it is tested on; or changes in training (cutout, mixup, cutmix, randaugment, adversarial:
    PGD-10 with 8 gray levels).

    Writes into --workdir `result.json` with the clean test accuracy of the last and of the best
    epoch and Wilson's 95 % intervals, `curve.csv`, `curve.png`; resumed after any epoch. Exit code
    3 if files of the data could not be used (each is named). --toy: a tiny network, two epochs.
    """

    shares_work = True

    data: image_sets.DataOptions = options.group(image_sets.DataOptions)
    test_data: str | None = options.option(None, "clean images of the same classes; like --data")
    noise: str | None = options.option(
        None, "noise.npz or folder noise of make_unlearnable, to be added to --data"
    )
    poison_rate: float = options.option(
        1.0, "share of the samples that get the noise", at_least=0, at_most=1
    )
    poison_classes: tuple[str, ...] = options.option((), "classes that get the noise; default: all")
    victim: victims.VictimOptions = options.group(victims.VictimOptions)
    workdir: str | None = options.option("out/victim", options.WORKDIR_HELP)

    def toy(self) -> "TrainVictimConfig":
        """A tiny network and two epochs."""
        return options.fill_defaults(self, _TOY)


def run(config: TrainVictimConfig) -> options.Outcome:
    """Trains the victim and writes what it learned.

    Raises:
        options.UsageError: options that do not go together, or data that cannot be used.
    """
    clean = config.data.read(seed=config.seed)
    test_data = config.test_data or ("cifar10" if config.data.data == "cifar10" else None)
    if not test_data:
        raise options.UsageError("--test_data is needed: clean images of the same classes")
    test_set = config.data.read_like(test_data, clean)
    with options.usage(""):
        train_set, num_protected, noise_settings = _with_noise(config, clean)
    settings = {
        "data": config.data.data,
        "test_data": config.test_data,
        "images": len(train_set.labels),
        "train_sha256": train_set.digest(),
        "test_sha256": test_set.digest(),
        "noise": config.noise,
        "poison_rate": config.poison_rate,
        "poison_classes": config.poison_classes,
        "victim": config.victim,
        "seed": config.seed,
    }
    work = workdir.open_workdir(config.workdir, settings)

    def report(epoch: int, train_accuracy: float, test_accuracy: float) -> None:
        logging.info("epoch %d: train %.4f, clean %.4f", epoch, train_accuracy, test_accuracy)
        accuracies = {"train_accuracy": train_accuracy, "test_accuracy": test_accuracy}
        work.append_metrics({"step": epoch, **accuracies})

    with checkpoint.Checkpoints(work.path / "checkpoints") as checkpoints:
        work.truncate_metrics(checkpoints.latest_step() or 0)
        victim = victims.train_victim(
            train_set,
            test_set,
            options=config.victim,
            seed=config.seed,
            checkpoints=checkpoints,
            report_fn=report,
        )
    if not distributed.is_primary():
        return options.Outcome({})
    not_handled = [*clean.not_handled(), *test_set.not_handled()]
    result = {
        **victim.summary._asdict(),
        "last_interval": victim.last_interval,
        "peak_interval": victim.peak_interval,
        "chance": 1 / len(train_set.classes),
        "train_images": len(train_set.labels),
        "protected_images": num_protected,
        "test_images": len(test_set.labels),
        "settings": settings,
        "noise_settings": noise_settings,
        "not_handled": not_handled,
    }
    learnability.write_curves(work.path / "curve.csv", {"victim": victim.curve})
    name = f"{config.victim.network.architecture}, {config.victim.countermeasure}"
    learnability.plot_curves(
        work.path / "curve.png",
        {"clean test images": victim.curve},
        title=f"{name}: {100 * victim.last_accuracy:.1f} %",
    )
    work.write_result(result)
    return options.Outcome(result, complete=not not_handled)


def _with_noise(
    config: TrainVictimConfig, clean: image_sets.ImageSet
) -> tuple[image_sets.ImageSet, int, object]:
    """Training images, how many of them have the noise, and how that was made."""
    if config.noise is None:
        if config.poison_rate < 1 or config.poison_classes:
            raise ValueError("--poison_rate and --poison_classes need --noise and clean --data")
        return clean, 0, None
    noise = noise_files.read_noise(pathlib.Path(config.noise).expanduser())
    unknown = sorted(set(config.poison_classes) - set(clean.classes))
    if unknown:
        raise ValueError(f"--poison_classes: {', '.join(unknown)} not among the classes of --data")
    missing = np.flatnonzero(noise.rows_of(clean) < 0)
    if len(missing):
        raise ValueError(
            f"--noise has none for {len(missing)} of {len(clean.labels)} samples, such as "
            f"{clean.sample_ids[missing[0]]}"
        )
    images, is_protected = victims.protect_part(
        clean.images,
        noise.apply(clean).images,
        clean.labels,
        rate=config.poison_rate,
        classes=[clean.classes.index(name) for name in config.poison_classes] or None,
        seed=config.seed,
    )
    return clean._replace(images=images), int(is_protected.sum()), noise.settings
