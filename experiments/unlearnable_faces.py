r"""The face study: what a recognizer learns of people whose photos carry class-wise noise.

    python -m experiments.unlearnable_faces --data=faces --pairs=lfw_pairs.csv --images=lfw \
        --setting=all --seeds=0,1,2 --workdir=out/faces

After Huang et al. 2021, section 4.3. --data has one folder of face crops per identity. Some people
(--num_auxiliary) are used to find noise only; of the others, the victim's people, --num_protected
are protected in the setting `partial`, all of them in `full`, nobody in `clean`; `all` runs the
three. The victim, --architecture, is trained from scratch to tell its people apart and is judged on
clean photos that it has not seen:
  accuracy of protected and of clean people, among all of the victim's people;
  verification of strangers, the pairs of --pairs (columns image_a, image_b, same; paths below
  --images): ROC, AUC, EER and 10-fold accuracy of its features. Their photos are detected and
  aligned, or, with --crop=centre or where no face is found, cut from the middle. The same of
  the networks before any training says how far down it could go.

Published (Inception-ResNet-v1 on WebFace, 50 of 10,575 people protected): accuracy of protected
people 16 % against 86 % of clean ones; AUC 0.5321 with all people protected against 0.9975. A
person is lost to classification, yet the features learned from others still tell them apart: in
`partial` the AUC hardly falls. Noise like this does not hide anyone from a matcher with enrolment.

Every trained victim is a file in `cells/`, so a run that was cut goes on where it stopped. Writes
`result.json` and `roc.png`. Inception-ResNet-v1 wants an accelerator (not measured); on two CPU
cores add --architecture=small_resnet --width=32 --image_px=48 --max_photos=150 --epochs=25
--stop_error=0 --max_rounds=15: about 10 minutes of one core for a seed. --toy: made-up pictures,
seconds.
"""

import dataclasses
import itertools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from afr_jax.core import checkpoint, files, parallel, program, progress, workdir
from afr_jax.data import image_sets, noise_files
from afr_jax.evaluation.attackers import victims
from afr_jax.evaluation.metrics import learnability, verification
from afr_jax.evaluation.unlearnable import faces
from afr_jax.methods.unlearnable import recipes, search
from afr_jax.models import mtcnn
from afr_jax.models.classifiers import registry
from afr_jax.training import trainer

_DATA = flags.DEFINE_string("data", None, "folder with one folder of face crops per identity")
_PAIRS = flags.DEFINE_string("pairs", None, "CSV with the columns image_a, image_b, same")
_IMAGES = flags.DEFINE_string("images", ".", "folder that the paths of --pairs are below")
_CROP = flags.DEFINE_enum(
    "crop", "detect", ["detect", "centre"], "how faces of --pairs are cut out of their photos"
)
_SETTING = flags.DEFINE_enum(
    "setting", "all", ["clean", "partial", "full", "all"], "who carries noise"
)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "of the division of people, noise and victim")
_AUXILIARY = flags.DEFINE_integer("num_auxiliary", 8, "people for the noise alone", 1)
_PROTECTED = flags.DEFINE_integer("num_protected", 4, "people protected in `partial`", 1)
_MAX_PHOTOS = flags.DEFINE_integer("max_photos", None, "at most so many photos a person", 4)
_HELD_OUT = flags.DEFINE_float("held_out", 0.2, "share of a person's photos for testing", 0, 0.9)
_IMAGE_PX = flags.DEFINE_integer("image_px", 112, "side of the crops that the networks see", 16)
_ARCHITECTURE = flags.DEFINE_enum(
    "architecture", "inception_resnet_v1", registry.NAMES, "of victim and source"
)
_WIDTH = flags.DEFINE_integer("width", None, "channels of its first stage; default: published", 1)
_STEM = flags.DEFINE_enum("stem", "imagenet", ["cifar", "imagenet"], "first layers of a ResNet")
_EPSILON = flags.DEFINE_float("epsilon", 16.0, "budget of the noise, gray levels", 1)
_ROUNDS = flags.DEFINE_integer("max_rounds", 30, "of the search for noise, at most", 1)
_STOP_ERROR = flags.DEFINE_float(
    "stop_error", 0.1, "training error that ends the search; 0: all rounds are done", 0, 1
)
_TRAIN_STEPS = flags.DEFINE_integer("train_steps", 30, "network steps in a round", 1)
_EPOCHS = flags.DEFINE_integer("epochs", 50, "of the victim's training", 1)
_BATCH = flags.DEFINE_integer("batch_size", 64, "images of a step", 2)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.05, "of victim and source")
_BFLOAT16 = flags.DEFINE_bool("bfloat16", False, "compute in bfloat16")

_SETTINGS = ("clean", "partial", "full")


def faces_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    settings_to_run = _SETTINGS if _SETTING.value == "all" else (_SETTING.value,)
    try:
        seeds = [int(seed) for seed in _SEEDS.value]
        victim, search = _options()
        data = _read()
        config = {
            "data": _DATA.value,
            "pairs": _PAIRS.value,
            "images": _IMAGES.value,
            "crop": _CROP.value,
            "people": len(data.classes),
            "photos": len(data.labels),
            "num_auxiliary": _count(_AUXILIARY.value, 2),
            "num_protected": _count(_PROTECTED.value, 1),
            "held_out": _HELD_OUT.value,
            "image_px": data.images.shape[1],
            "victim": victim,
            "search": search,
            "toy": flags.FLAGS.toy,
        }
        studies = {seed: _divide(data, seed) for seed in seeds}
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(str(error)) from error
    work = workdir.open_workdir(flags.FLAGS.workdir or "out/faces", config)
    (work.path / "cells").mkdir(exist_ok=True)
    pairs = _pairs(data.images.shape[1], work)
    todo = list(itertools.product(seeds, settings_to_run))
    for seed, setting in progress.track(todo, description="victims"):
        path = work.path / "cells" / f"{setting}-seed{seed}.json"
        if not path.exists():
            files.write_json(path, _cell(studies[seed], setting, seed, victim, search, pairs, work))
    cells = {
        setting: [
            json.loads((work.path / "cells" / f"{setting}-seed{seed}.json").read_text())
            for seed in seeds
        ]
        for setting in settings_to_run
    }
    problems = [{"image": p.name, "reason": p.reason} for p in data.problems]
    problems += (
        [] if pairs is None else [{"image": p.name, "reason": p.reason} for p in pairs.problems]
    )
    untrained = [] if pairs is None else _untrained(studies, victim, pairs)
    result = {
        **program.provenance("experiments.unlearnable_faces"),
        "config": config,
        "seeds": seeds,
        "settings": {setting: _summary(found) for setting, found in cells.items()},
        "untrained": _summary(untrained) if untrained else None,
        "pairs": None if pairs is None else len(pairs.same),
        "pair_photos_without_face": None if pairs is None else pairs.without_face,
        "not_handled": problems,
        "note": "Accuracy is of classification among the victim's people; a low one does not hide "
        "a person from a matcher that enrols clean photos.",
    }
    if pairs is not None:
        _plot(work.path / "roc.png", {**cells, "untrained": untrained}, victim.architecture)
    work.write_result(result)
    return result, program.EXIT_PARTIAL if problems else program.EXIT_OK


def _options() -> tuple[victims.VictimOptions, search.SearchOptions]:
    """Options of the victim, and of the search with the paper's values for faces."""
    toy = flags.FLAGS.toy
    victim = victims.VictimOptions(
        architecture="small_resnet" if toy else _ARCHITECTURE.value,
        width=8 if toy else _WIDTH.value,
        stem="cifar" if toy else _STEM.value,
        num_epochs=16 if toy else _EPOCHS.value,
        batch_size=16 if toy else _BATCH.value,
        learning_rate=_LEARNING_RATE.value,
        augmented=not toy,
        bfloat16=_BFLOAT16.value,
    )
    search = dataclasses.replace(
        recipes.published("error_min", "class"),
        epsilon_levels=_EPSILON.value,
        step_levels=_EPSILON.value / 10,
        class_share=1.0,
        stop_error=_STOP_ERROR.value or None,
        batch_size=victim.batch_size,
        train_steps=20 if toy else _TRAIN_STEPS.value,
        max_rounds=10 if toy else _ROUNDS.value,
    )
    return victim, search


def _count(value: int, in_toy: int) -> int:
    return in_toy if flags.FLAGS.toy else value


def _read() -> image_sets.ImageSet:
    if flags.FLAGS.toy and not _DATA.value:
        return image_sets.synthetic(flags.FLAGS.seed, 288, num_classes=6)
    if not _DATA.value:
        raise ValueError("--data is needed: a folder with one folder of face crops per identity")
    root = pathlib.Path(_DATA.value).expanduser()
    side = 32 if flags.FLAGS.toy else _IMAGE_PX.value
    data = image_sets.load_image_folder(root, image_px=side, resize=True)
    if _MAX_PHOTOS.value is None:
        return data
    rows = [np.flatnonzero(data.labels == label) for label in range(len(data.classes))]
    generator = np.random.default_rng(flags.FLAGS.seed)
    rows = [generator.permutation(own)[: _MAX_PHOTOS.value] for own in rows]
    return image_sets.take(data, np.concatenate(rows))


def _divide(data: image_sets.ImageSet, seed: int) -> faces.Study:
    return faces.divide(
        data,
        num_auxiliary=_count(_AUXILIARY.value, 2),
        num_protected=_count(_PROTECTED.value, 1),
        held_out=_HELD_OUT.value,
        seed=seed,
    )


def _cell(study, setting, seed, victim, search, pairs, work) -> dict[str, Any]:
    """Noise, victim and scores of one setting and seed."""
    mesh = parallel.make_mesh()
    training = study.training
    protected = {"clean": (), "partial": study.protected, "full": training.classes}[setting]
    images, errors = training.images, None
    if protected:
        noise, errors = _noise(study, protected, setting, seed, victim, search, work, mesh)
        of_sample = [training.classes[label] for label in training.labels]
        images = noise_files.apply(images, noise, training.sample_ids, of_sample)
    num_classes = len(training.classes)
    name = f"{setting}-seed{seed}"
    with checkpoint.Checkpoints(work.path / "victims" / name) as checkpoints:
        curve, state = victims.train_victim(
            images,
            training.labels,
            study.held_out.images,
            study.held_out.labels,
            num_classes=num_classes,
            options=victim,
            seed=seed,
            mesh=mesh,
            checkpoints=checkpoints,
            report_fn=lambda epoch, trained, held: logging.info(
                "%s epoch %d: train %.3f, held out %.3f", name, epoch, trained, held
            ),
        )
    # One device's copy serves the small forward passes below.
    state = jax.tree.map(jnp.asarray, jax.device_get(state))
    correct = _correct(state, study.held_out, num_classes, victim)
    is_chosen = np.isin(study.held_out.labels, [training.classes.index(n) for n in study.protected])
    cell = {
        "setting": setting,
        "seed": seed,
        "auxiliary": study.auxiliary,
        "protected": study.protected,
        "training_photos": len(training.labels),
        "held_out_photos": len(study.held_out.labels),
        "accuracy_of_protected_people": correct[is_chosen].mean(),
        "accuracy_of_other_people": correct[~is_chosen].mean(),
        "summary": learnability.summary(curve),
        "search_errors": errors,
    }
    return cell | ({} if pairs is None else _verification(state, pairs, victim))


def _noise(study, protected, setting, seed, victim, search, work, mesh):
    """Class-wise noise of the protected people, found beside the auxiliary ones."""
    path = work.path / "noise" / f"{setting}-seed{seed}.npz"
    if path.exists():
        noise, settings = noise_files.read_noise(path)
        return noise, settings["training_errors"]
    data = faces.people(study.search, (*study.auxiliary, *protected))
    recipe = victims.source_recipe(
        victim, num_classes=len(data.classes), image_px=data.images.shape[1]
    )
    with checkpoint.Checkpoints(work.path / "searches" / path.stem) as checkpoints:
        made = recipes.make(
            data,
            method="error_min",
            granularity="class",
            epsilon_levels=_EPSILON.value,
            seed=seed,
            options=search,
            recipe=recipe,
            mesh=mesh,
            checkpoints=checkpoints,
            report_fn=lambda number, error: logging.info(
                "%s: round %d, training error %.3f", path.stem, number, error
            ),
        )
    rows = [made.noise.names.index(name) for name in sorted(protected)]
    noise = noise_files.Noise(tuple(sorted(protected)), made.noise.levels[rows], "class")
    report = files.to_jsonable(made.report)
    noise_files.write_noise(path, noise, report)
    return noise, report["training_errors"]


def _network(victim: victims.VictimOptions, num_classes: int | None):
    return registry.classifier(
        victim.architecture,
        num_classes=num_classes,
        width=victim.width,
        stem=victim.stem,
        dtype=jnp.bfloat16 if victim.bfloat16 else jnp.float32,
    )


def _correct(state, held_out, num_classes, victim) -> np.ndarray:
    """Which held-out photos are classified rightly, `[N]` float."""
    logits = faces.embeddings(_network(victim, num_classes), state, held_out.images)
    return (np.argmax(logits, axis=1) == held_out.labels).astype(np.float64)


def _verification(state, pairs: faces.Pairs, victim) -> dict[str, Any]:
    vectors = faces.embeddings(_network(victim, None), state, pairs.crops)
    distances = np.linalg.norm(vectors[pairs.rows[:, 0]] - vectors[pairs.rows[:, 1]], axis=1)
    curve = verification.roc(distances, pairs.same)
    # A hundred points draw the curve as well as thousands.
    grid = np.linspace(0, 1, 101)
    return {
        "auc": verification.auc(curve),
        "eer": verification.equal_error_rate(curve),
        "pair_accuracy": verification.fold_accuracies(distances, pairs.same).mean(),
        "roc": {"far": grid, "tar": [verification.tar_at_far(curve, far) for far in grid]},
    }


def _untrained(studies, victim, pairs) -> list[dict[str, Any]]:
    """Verification by the victims' networks before any training: what noise could bring it to."""
    cells = []
    for seed, study in studies.items():
        images = study.training.images
        recipe = victims.make_recipe(
            victim,
            num_classes=len(study.training.classes),
            num_examples=len(images),
            image_px=images.shape[1],
        )
        key = jax.random.key(seed)
        state = trainer.init_state(
            key, recipe, image_shape=images.shape[1:], mesh=parallel.make_mesh()
        )
        state = jax.tree.map(jnp.asarray, jax.device_get(state))
        cells.append(_verification(state, pairs, victim))
    return cells


def _pairs(side: int, work: workdir.Workdir) -> faces.Pairs | None:
    """The pairs with their crops, which are kept in the work folder; None without --pairs."""
    if not _PAIRS.value:
        return None
    try:
        detector = None
        if _CROP.value == "detect":
            detector = jax.tree.map(jnp.asarray, mtcnn.read_weights(mtcnn.find_weights()))
        return faces.read_pairs(
            pathlib.Path(_PAIRS.value).expanduser(),
            pathlib.Path(_IMAGES.value).expanduser(),
            side,
            detector=detector,
            kept=work.path / f"pairs_{side}px.npz",
            limit=40 if flags.FLAGS.toy else None,
            progress_fn=lambda names: progress.track(names, description="photos of pairs"),
        )
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(str(error)) from error


def _summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and largest over the seeds of each figure."""
    names = ("accuracy_of_protected_people", "accuracy_of_other_people", "auc", "eer")
    summary = {}
    for name in (*names, "pair_accuracy"):
        values = [cell[name] for cell in cells if name in cell]
        if values:
            summary[name] = {"mean": np.mean(values), "low": min(values), "high": max(values)}
    return summary | {"seeds": len(cells)}


def _plot(path: pathlib.Path, cells: dict[str, list[dict[str, Any]]], architecture: str) -> None:
    lines = {}
    for setting, found in cells.items():
        mean = np.mean([cell["roc"]["tar"] for cell in found], axis=0)
        area = np.mean([cell["auc"] for cell in found])
        lines[f"{setting}, AUC {area:.3f}"] = (found[0]["roc"]["far"], mean)
    learnability.plot_rocs(path, lines, title=f"{architecture}: mean over seeds")


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(faces_program)
