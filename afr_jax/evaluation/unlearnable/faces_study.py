"""The face study: what a recognizer learns of people whose photos carry noise."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
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
from afr_jax.evaluation.attackers import victims
from afr_jax.evaluation.metrics import learnability
from afr_jax.evaluation.unlearnable import faces
from afr_jax.methods.unlearnable import recipes
from afr_jax.models import mtcnn
from afr_jax.models.classifiers import registry
from afr_jax.training import trainer

_SETTINGS = ("clean", "partial", "full")
_TOY = {
    "image_px": 32,
    "num_auxiliary": 2,
    "num_protected": 1,
    "max_pairs": 40,
    "architecture": "small_resnet",
    "width": 8,
    "stem": "cifar",
    "epochs": 16,
    "batch_size": 16,
    "augment": False,
    "train_steps": 20,
    "max_rounds": 10,
}
_NOTE = (
    "Accuracy is of classification among the victim's people; a low one does not hide a person "
    "from a matcher that enrolls clean photos."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlearnableFacesConfig(options.Config):
    r"""The face study: what a recognizer learns of people whose photos carry noise.

        python -m experiments.unlearnable_faces --data=faces --pairs=lfw_pairs.csv --images=lfw \
            --setting=all --seeds=0,1,2 --workdir=out/faces

    After Huang et al. 2021, section 4.3. --data has one folder of face crops per identity. Some
    people (--num_auxiliary) are used to find noise only; of the others, the victim's people,
    --num_protected are protected in the setting `partial`, all of them in `full`, nobody in
    `clean`; `all` runs the three. The noise is by class, as published, or by sample. The victim,
    --architecture, is trained from scratch to tell its people apart and is judged on clean photos
    that it has not seen:

        accuracy of protected and of clean people, among all of the victim's people;
        verification of strangers, the pairs of --pairs (columns image_a, image_b, same; paths below
        --images): ROC, AUC, EER and 10-fold accuracy of its features. Their photos are detected
        and aligned, or, with --crop=center or where no face is found, cut from the middle. The
        same of the networks before any training says how far down it could go.

    A person is lost to classification, yet the features learned from others still tell them apart:
    in `partial` the AUC hardly falls. Noise like this does not hide anyone from a matcher with
    enrollment.

    Every trained victim is a file in `cells/`, so a run that was cut goes on where it stopped.
    Writes `result.json` and `roc.png`. Exit code 3: some photos could not be used. --toy: synthetic
    pictures unless there is --data, seconds.
    """

    shares_work = True

    data: str | None = options.option(None, "folder with one folder of face crops per identity")
    pairs: str | None = options.option(None, "CSV with the columns image_a, image_b, same")
    images: str = options.option(".", "folder that the paths of --pairs are below")
    max_pairs: int = options.option(0, "at most so many rows of --pairs; 0: all", at_least=0)
    crop: Literal["detect", "center", "centre"] = options.option(
        "detect", "how faces of --pairs are cut out of their photos (centre is center)"
    )
    setting: Literal["clean", "partial", "full", "all"] = options.option(
        "all", "who carries noise", resumable=True
    )
    seeds: tuple[int, ...] = options.option(
        (0,), "of the division of people, noise and victim", at_least=0, resumable=True
    )
    num_auxiliary: int = options.option(8, "people for the noise alone", at_least=1)
    num_protected: int = options.option(4, "people protected in `partial`", at_least=1)
    max_photos: int | None = options.option(
        None, "at most so many photos a person; default: all", at_least=4
    )
    max_people: int | None = options.option(
        None, "at most so many people, drawn by --seed; default: all", at_least=3
    )
    granularity: noise_files.Granularity = options.option("class", "of the noise")
    noise_steps: int | None = options.option(
        None, "of the noise in a round; default: 1 by class, 20 by sample", at_least=1
    )
    held_out: float = options.option(
        0.2, "share of a person's photos for testing", at_least=0, at_most=0.9
    )
    image_px: int = options.option(
        112, "side of the crops that the networks see, pixels", at_least=16
    )
    victim: victims.VictimOptions = options.group(
        victims.VictimOptions,
        network=registry.ClassifierOptions("inception_resnet_v1", stem="imagenet"),
        num_epochs=50,
        batch_size=64,
        learning_rate=0.05,
    )
    epsilon: float = options.option(
        16.0, "budget of the noise, gray levels of 255", at_least=1, at_most=255
    )
    max_rounds: int = options.option(30, "of the search for noise, at most", at_least=1)
    stop_error: float = options.option(
        0.1, "training error that ends the search; 0: all rounds are done", at_least=0, at_most=1
    )
    train_steps: int = options.option(30, "network steps in a round", at_least=1)
    workdir: str | None = options.option("out/faces", options.WORKDIR_HELP)
    is_toy: bool = False

    def toy(self) -> "UnlearnableFacesConfig":
        """A small network, few people; synthetic pictures where there is no --data."""
        return dataclasses.replace(options.fill_defaults(self, _TOY), is_toy=True)

    def noise(self) -> recipes.ErrorMin:
        """The search for noise, with the paper's values for faces; the source is the victim's."""
        found = recipes.ErrorMin(
            granularity=self.granularity,
            epsilon=self.epsilon / 255,
            network=self.victim.network,
            learning_rate=self.victim.learning_rate,
        )
        steps = found.search_options().num_steps if self.noise_steps is None else self.noise_steps
        return found.with_search(
            num_steps=steps,
            step_size=self.epsilon / 10 / 255,
            class_share=1.0,
            stop_error=self.stop_error or None,
            batch_size=self.victim.batch_size,
            train_steps=self.train_steps,
            max_rounds=self.max_rounds,
        )


def run(config: UnlearnableFacesConfig) -> options.Outcome:
    """Trains the victims of all settings and seeds, and says what they learned.

    Raises:
        options.UsageError: data that cannot be used, or too few people.
    """
    if not config.seeds:
        raise options.UsageError("--seeds must not be empty")
    settings = _SETTINGS if config.setting == "all" else (config.setting,)
    data = _read(config)
    with options.usage("--data"):
        divisions = {
            seed: faces.divide(
                data,
                num_auxiliary=config.num_auxiliary,
                num_protected=config.num_protected,
                held_out=config.held_out,
                seed=seed,
            )
            for seed in config.seeds
        }
    resolved = {
        "data": config.data,
        "pairs": config.pairs,
        "images": config.images,
        "crop": config.crop,
        "people": len(data.classes),
        "max_people": config.max_people,
        "photos": len(data.labels),
        "photos_sha256": files.digest_of({"images": data.images, "labels": data.labels}),
        "max_pairs": config.max_pairs,
        "num_auxiliary": config.num_auxiliary,
        "num_protected": config.num_protected,
        "held_out": config.held_out,
        "image_px": data.images.shape[1],
        "victim": config.victim,
        "search": config.noise().search_options(),
        "toy": config.is_toy,
    }
    work = workdir.open_workdir(config.workdir, resolved)
    pairs = distributed.primary_first(lambda: _read_pairs(config, data.images.shape[1], work))
    setup = _Setup(config, pairs, work)
    todo = list(itertools.product(config.seeds, settings))

    def train(own: Sequence[tuple[int, str]]) -> list[Mapping[str, files.Json]]:
        return [
            workdir.load_or_compute(
                work.path / "cells" / f"{setting}-seed{seed}.json",
                lambda setting=setting, seed=seed: _cell(setup, divisions[seed], setting, seed),
            )
            for seed, setting in progress.track(own, description="victims")
        ]

    distributed.split_work(todo, train)
    if not distributed.is_primary():
        return options.Outcome({})
    cells: dict[str, list[Mapping[str, files.Json]]] = {setting: [] for setting in settings}
    with distributed.alone():
        for (_, setting), cell in zip(todo, train(todo), strict=True):
            cells[setting].append(cell)
        untrained = [_untrained(setup, division, seed) for seed, division in divisions.items()]
    untrained = [scores for scores in untrained if scores is not None]
    not_handled = data.not_handled()
    if pairs is not None:
        not_handled += [problem.as_result() for problem in pairs.problems]
        lines = cells | {"untrained": [scores._asdict() for scores in untrained]}
        _plot(work.path / "roc.png", lines, config.victim.network.architecture)
    result = {
        **program.provenance("experiments.unlearnable_faces", config=config),
        "config": resolved,
        "seeds": config.seeds,
        "settings": {
            setting: _summary(found) | _kept(found, cells.get("clean"), untrained)
            for setting, found in cells.items()
        },
        "untrained": _summary([each._asdict() for each in untrained]) if untrained else None,
        "pairs": None if pairs is None else len(pairs.same),
        "pair_photos_without_face": None if pairs is None else pairs.without_face,
        "not_handled": not_handled,
        "note": _NOTE,
    }
    work.write_result(result)
    return options.Outcome(result, complete=not not_handled)


class _Setup(NamedTuple):
    """What all cells have in common."""

    config: UnlearnableFacesConfig
    pairs: faces.StrangerPairs | None
    work: workdir.Workdir


def _read(config: UnlearnableFacesConfig) -> image_sets.ImageSet:
    if config.data is not None:
        with options.usage("--data"):
            data = image_sets.load_image_folder(
                pathlib.Path(config.data).expanduser(), image_px=config.image_px, resize=True
            )
    elif config.is_toy:
        data = image_sets.synthetic(config.seed, 288, num_classes=6)
    else:
        raise options.UsageError(
            "--data is needed: a folder with one folder of face crops per identity"
        )
    generator = np.random.default_rng(config.seed)
    if config.max_people is not None:
        # The first of one order, so that a larger study has the people of a smaller one.
        drawn = np.random.default_rng(config.seed).permutation(data.classes)[: config.max_people]
        data = faces.people(data, drawn.tolist())
    if config.max_photos is None:
        return data
    rows = [np.flatnonzero(data.labels == label) for label in range(len(data.classes))]
    rows = [generator.permutation(own)[: config.max_photos] for own in rows]
    return image_sets.take(data, np.concatenate(rows))


def _read_pairs(
    config: UnlearnableFacesConfig, side: int, work: workdir.Workdir
) -> faces.StrangerPairs | None:
    """The pairs with their crops, which are kept in the work directory; None without --pairs."""
    if not config.pairs:
        return None
    with options.usage(""):
        detector = None
        if config.crop == "detect":
            detector = mtcnn.load_variables()
        return faces.read_pairs(
            pathlib.Path(config.pairs).expanduser(),
            pathlib.Path(config.images).expanduser(),
            side,
            detector=detector,
            kept=work.path / f"pairs_{side}px.npz",
            limit=config.max_pairs or None,
            progress_fn=lambda names: progress.track(names, description="photos of pairs"),
        )


def _cell(
    setup: _Setup, division: faces.Division, setting: str, seed: int
) -> Mapping[str, files.Json]:
    """Noise, victim and scores of one setting and seed."""
    options_of_victim = setup.config.victim
    training, held_out = division.training, division.held_out
    protected = {"clean": (), "partial": division.protected, "full": training.classes}[setting]
    name, errors = f"{setting}-seed{seed}", None
    if protected:
        noise = _noise(setup, division, protected, name, seed)
        training, errors = noise.apply(training), noise.settings["training_errors"]
    with checkpoint.Checkpoints(setup.work.path / "victims" / name) as checkpoints:
        victim = victims.train_victim(
            training,
            held_out,
            options=options_of_victim,
            seed=seed,
            checkpoints=checkpoints,
            report_fn=lambda epoch, trained, held: logging.info(
                "%s epoch %d: train %.3f, held out %.3f", name, epoch, trained, held
            ),
        )
    state = jax.device_get(victim.state)
    net = options_of_victim.network.make(len(training.classes))
    logits = faces.embeddings(net, state, options_of_victim.tested(held_out.images))
    correct = (np.argmax(logits, axis=1) == held_out.labels).astype(np.float64)
    is_chosen = np.isin(held_out.labels, [training.classes.index(n) for n in division.protected])
    cell = {
        "setting": setting,
        "seed": seed,
        "auxiliary": division.auxiliary,
        "protected": division.protected,
        "training_photos": len(training.labels),
        "held_out_photos": len(held_out.labels),
        "accuracy_of_protected_people": correct[is_chosen].mean(),
        "accuracy_of_other_people": correct[~is_chosen].mean(),
        "summary": victim.summary,
        "search_errors": errors,
    }
    scores = _verify(setup, state)
    return cell if scores is None else cell | scores._asdict()


def _noise(
    setup: _Setup, division: faces.Division, protected: Sequence[str], name: str, seed: int
) -> noise_files.Noise:
    """Noise of the protected people, found beside the auxiliary ones."""
    path = setup.work.path / "noise" / f"{name}.npz"
    if (known := workdir.read_or_none(path, noise_files.read_noise)) is not None:
        return known
    data = faces.people(division.search, (*division.auxiliary, *protected))
    with checkpoint.Checkpoints(setup.work.path / "searches" / name) as checkpoints:
        found = recipes.make_unlearnable(
            data,
            config=setup.config.noise(),
            seed=seed,
            checkpoints=checkpoints,
            report_fn=lambda number, error: logging.info(
                "%s: round %d, training error %.3f", name, number, error
            ),
        )
    names = sorted(protected)
    if found.granularity == "sample":
        names = faces.people(division.training, protected).sample_ids
    rows = [found.names.index(name) for name in names]
    noise = noise_files.Noise(
        tuple(names), found.levels[rows], found.granularity, found.settings["report"]
    )
    noise.save(path)
    return noise


def _verify(setup: _Setup, state: trainer.TrainState) -> faces.StrangerScores | None:
    """Verification of strangers by a network's features; None without pairs."""
    if setup.pairs is None:
        return None
    net = setup.config.victim.network.make(None)
    return setup.pairs.scores(faces.embeddings(net, state, setup.pairs.crops))


def _untrained(setup: _Setup, division: faces.Division, seed: int) -> faces.StrangerScores | None:
    """Verification by a victim's network before any training: what noise could bring it to."""
    if setup.pairs is None:
        return None
    images = division.training.images
    recipe = victims.make_recipe(
        setup.config.victim,
        num_classes=len(division.training.classes),
        num_examples=len(images),
        image_px=images.shape[1],
    )
    state = trainer.init_state(
        jax.random.key(seed), recipe, image_shape=images.shape[1:], mesh=parallel.make_mesh()
    )
    return _verify(setup, jax.device_get(state))


def _summary(cells: Sequence[Mapping[str, files.Json]]) -> dict[str, files.Json]:
    """Mean, least and largest over the seeds of each figure."""
    names = ("accuracy_of_protected_people", "accuracy_of_other_people", "auc", "eer")
    summary: dict[str, files.Json] = {}
    for name in (*names, "pair_accuracy"):
        values = [cell[name] for cell in cells if name in cell]
        if values:
            summary[name] = {"mean": np.mean(values), "low": min(values), "high": max(values)}
    return summary | {"seeds": len(cells)}


def _kept(
    cells: Sequence[Mapping[str, files.Json]],
    clean: Sequence[Mapping[str, files.Json]] | None,
    untrained: Sequence[faces.StrangerScores],
) -> dict[str, files.Json]:
    """What is left of the AUC that clean training adds to an untrained network's, a share."""
    if not clean or not untrained:
        return {}
    if any(best["auc"] == floor.auc for best, floor in zip(clean, untrained, strict=True)):
        return {}  # Training added nothing.
    values = [
        (cell["auc"] - floor.auc) / (best["auc"] - floor.auc)
        for cell, best, floor in zip(cells, clean, untrained, strict=True)
    ]
    spread = {"mean": np.mean(values), "low": min(values), "high": max(values)}
    return {"share_of_trained_auc": spread}


def _plot(
    path: pathlib.Path, cells: Mapping[str, Sequence[Mapping[str, files.Json]]], architecture: str
) -> None:
    lines = {}
    for setting, found in cells.items():
        mean = np.mean([cell["roc"]["tar"] for cell in found], axis=0)
        area = np.mean([cell["auc"] for cell in found])
        lines[f"{setting}, AUC {area:.3f}"] = (found[0]["roc"]["far"], mean)
    learnability.plot_rocs(path, lines, title=f"{architecture}: mean over seeds")
