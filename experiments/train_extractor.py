"""Trains a face extractor from photos of some people.

    python -m experiments.train_extractor --data=faces --workdir=out/extractor

--data is a folder with a folder of photos for each person (with --csv: a folder of photos and a CSV
with the columns image, identity). Photos are taken for aligned crops and resized, unless --align
detects the face of each and aligns it. A fifth of the photos, chosen by a hash of their paths, is
held out; on them accuracy (who of the known people is it?) and verification (are two photos of one
person?) are measured during training, or verification on --pairs, a CSV with the columns image_a,
image_b, same, paths below --images. A killed run goes on where it was. In the work directory:

    extractor.safetensors, extractor.json   the network and what it is (its card)
    result.json, metrics.jsonl, curve.png   what was measured
    checkpoints/                            to resume; may be deleted afterwards

Held-out photos show people who were trained on: the figures do not say how well strangers are told
apart. Give --pairs of strangers for that.

Expected for 24 people with 4,600 crops for training: minutes on one GPU with the default flags
(ResNet-18 at 64 px, 30 epochs). On two idle CPU cores about ten minutes with

    --architecture=resnet10 --width=16 --input_px=48 --batch_size=64 --epochs=20

--toy trains on generated images in seconds.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags, logging

from afr_jax.core import checkpoint, parallel, program, workdir
from afr_jax.data import augmentation, identities, loaders, sampling
from afr_jax.evaluation.metrics import verification
from afr_jax.evaluation.report import figures
from afr_jax.models import heads, mtcnn
from afr_jax.recognition import chips, training_photos
from afr_jax.training import optimizers, streaming, trained, trainer
from afr_jax.training import scores as training_scores

_DATA = flags.DEFINE_string("data", None, "folder with a folder of photos for each person")
_CSV = flags.DEFINE_string("csv", None, "CSV with the columns image, identity; paths in --data")
_ARCHITECTURE = flags.DEFINE_enum("architecture", "resnet18", trained.ARCHITECTURES, "the network")
_WIDTH = flags.DEFINE_integer("width", 64, "channels of a ResNet's first stage", 1)
_STEM = flags.DEFINE_enum(
    "stem", "cifar", ["cifar", "imagenet"], "of a ResNet: imagenet shrinks images 4 times at once"
)
_INPUT_PX = flags.DEFINE_integer("input_px", 0, "side of the images; 0: as the network wants", 0)
_EMBEDDING = flags.DEFINE_integer(
    "embedding_size", 0, "numbers of an embedding; 0: 128 for mobilefacenet, else 512", 0
)
_HEAD = flags.DEFINE_enum(
    "head", "softmax", ["softmax", "arcface", "cosface", "triplet"], "what is learned for"
)
_SCALE = flags.DEFINE_float("scale", 32.0, "of the cosines of arcface and cosface", 1.0)
_MARGIN = flags.DEFINE_float(
    "margin", -1.0, "arcface: radians, default 0.5; cosface: 0.35; triplet: distance, 0.3"
)
_MINING = flags.DEFINE_enum("mining", "semihard", ["semihard", "hard"], "of triplets")
_PHOTOS_PER_PERSON = flags.DEFINE_integer("photos_per_person", 4, "in a batch of triplets", 2)
_SMOOTHING = flags.DEFINE_float("label_smoothing", 0.0, "of the softmax head", 0.0, 0.5)
_OPTIMIZER = flags.DEFINE_enum("optimizer", "sgd", ["sgd", "adamw"], "optimizer")
_RATE = flags.DEFINE_float("learning_rate", 0.0, "largest; 0: 0.02 for sgd, 0.001 for adamw", 0.0)
_DECAY = flags.DEFINE_float("weight_decay", 5e-4, "of kernels", 0.0)
_CLIP = flags.DEFINE_float("clip_norm", 5.0, "largest norm of the gradient; 0: none", 0.0)
_WARMUP = flags.DEFINE_float("warmup_epochs", 1.0, "of rising learning rate; then a cosine", 0.0)
_EPOCHS = flags.DEFINE_integer("epochs", 30, "passes over the training photos", 1)
_BATCH = flags.DEFINE_integer("batch_size", 128, "photos per step, over all devices", 2)
_AUGMENT = flags.DEFINE_bool("augment", True, "random zoom, flip, light and color")
_BF16 = flags.DEFINE_bool("bf16", False, "compute in bfloat16; parameters stay float32")
_ALIGN = flags.DEFINE_bool("align", False, "detect and align faces; else photos are crops")
_MIN_PHOTOS = flags.DEFINE_integer("min_photos", 2, "people with fewer photos are left out", 1)
_HELD_OUT = flags.DEFINE_float("held_out", 0.2, "share of the photos that is held out", 0.0, 0.9)
_PAIRS = flags.DEFINE_string("pairs", None, "CSV image_a, image_b, same: pairs to verify")
_IMAGES = flags.DEFINE_string("images", ".", "folder that the paths of --pairs are below")
_EVAL = flags.DEFINE_integer("eval_epochs", 1, "epochs between two evaluations", 1)
_LOG = flags.DEFINE_integer("log_steps", 20, "steps that a line of metrics.jsonl is the mean of", 1)
_DEVICE_MIB = flags.DEFINE_integer(
    "device_data_mib", 8192, "larger training sets stay in files and are streamed", 0
)

_MARGINS = {"arcface": 0.5, "cosface": 0.35, "triplet": 0.3, "softmax": 0.0}
# Training photos that the centres of people are taken from, for triplets.
_MAX_KNOWN = 20_000
_FARS = (1e-2, 1e-3)
_TOY = {"architecture": "resnet6", "width": 8, "input_px": 16, "epochs": 6, "batch_size": 16}


def train_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    settings = _settings()
    work = workdir.open_workdir(
        flags.FLAGS.workdir, settings, resumable=("eval_epochs", "log_steps")
    )
    mesh = parallel.make_mesh()
    if settings["batch_size"] % mesh.devices.size:
        count = mesh.devices.size
        raise program.UsageError(
            f"--batch_size={settings['batch_size']} is no multiple of {count} devices"
        )
    faces = _read_faces(settings, work)
    pairs = _read_pairs(settings, faces)
    batches = _batches(settings, faces)
    recipe = _recipe(settings, len(faces.listing.identities), batches.steps_per_epoch)
    template = _template(settings, faces)
    state = _train(settings, work, mesh, faces, pairs, batches, recipe)
    scores = _evaluate(settings, mesh, faces, pairs, recipe, state)
    card = _write_card(settings, work, faces, template, state, scores)
    _plot(work)
    problems = [*faces.listing.problems, *(pairs.problems if pairs else ())]
    result = {
        **program.provenance("experiments.train_extractor"),
        "architecture": settings["architecture"],
        "head": settings["head"],
        "steps": int(state.step),
        "identities": len(faces.listing.identities),
        "photos": {"training": len(faces.training), "held_out": len(faces.held_out)},
        **scores,
        "extractor": str(card),
        "not_handled": [dataclasses.asdict(problem) for problem in problems],
    }
    work.write_result(result)
    return result, program.EXIT_PARTIAL if problems else program.EXIT_OK


def _settings() -> dict[str, Any]:
    """All flags that make the run, resolved."""
    toy = flags.FLAGS.toy
    if not toy and _DATA.value is None:
        raise program.UsageError(
            "--data is needed: a folder with a folder of photos for each person"
        )
    names = [
        *("data", "csv", "architecture", "width", "stem", "input_px", "embedding_size", "head"),
        *("scale", "margin", "mining", "photos_per_person", "label_smoothing", "optimizer"),
        *("learning_rate", "weight_decay", "clip_norm", "warmup_epochs", "epochs", "batch_size"),
        *("augment", "bf16", "align", "min_photos", "held_out", "pairs", "images"),
        *("eval_epochs", "log_steps", "seed", "toy"),
    ]
    settings = {name: flags.FLAGS[name].value for name in names}
    if toy:
        settings |= {
            name: value for name, value in _TOY.items() if not flags.FLAGS[name].present
        } | {"data": None, "csv": None, "align": False, "pairs": None}
    architecture = settings["architecture"]
    settings["input_px"] = settings["input_px"] or trained.default_input_px(architecture)
    small = 128 if architecture == "mobilefacenet" else 512
    settings["embedding_size"] = settings["embedding_size"] or (32 if toy else small)
    default_rate = {"sgd": 0.02, "adamw": 1e-3}[settings["optimizer"]]
    settings["learning_rate"] = settings["learning_rate"] or default_rate
    if settings["margin"] < 0:
        settings["margin"] = _MARGINS[settings["head"]]
    if settings["margin"] > 1.5:
        raise program.UsageError(
            f"--margin={settings['margin']} is more than an angle or distance of 1.5"
        )
    try:
        _network(settings)
    except ValueError as error:
        raise program.UsageError(f"--architecture={architecture}: {error}") from error
    return settings


def _network(settings: dict[str, Any]):
    names = ("input_px", "embedding_size", "width", "stem")
    dtype = jnp.bfloat16 if settings["bf16"] else jnp.float32
    return trained.make_network(
        settings["architecture"], dtype=dtype, **{name: settings[name] for name in names}
    )


def _recipe(settings: dict[str, Any], num_classes: int, steps_per_epoch: int) -> trainer.Recipe:
    margin, scale = settings["margin"], settings["scale"]
    num_steps = settings["epochs"] * steps_per_epoch
    try:
        head = {
            "softmax": heads.Softmax(num_classes, settings["label_smoothing"]),
            "arcface": heads.AngularMargin(num_classes, scale, margin, 0.0),
            "cosface": heads.AngularMargin(num_classes, scale, 0.0, margin),
            "triplet": heads.Triplet(margin, settings["mining"]),
        }[settings["head"]]
        optimizer = optimizers.OptimizerOptions(
            name=settings["optimizer"],
            learning_rate=settings["learning_rate"],
            num_steps=num_steps,
            warmup_steps=min(round(settings["warmup_epochs"] * steps_per_epoch), num_steps - 1),
            weight_decay=settings["weight_decay"],
            clip_norm=settings["clip_norm"],
        )
    except ValueError as error:
        raise program.UsageError(str(error)) from error
    return trainer.Recipe(
        net=_network(settings),
        head=head,
        optimizer=optimizer,
        augmentation=augmentation.FACES if settings["augment"] else augmentation.Augmentation(),
        input_scale=trained.INPUT_SCALE,
        input_offset=trained.INPUT_OFFSET,
    )


def _read_faces(settings: dict[str, Any], work: workdir.Workdir) -> training_photos.Faces:
    """Lists the photos, splits them, and reads them unless they are too many."""
    side = settings["input_px"]
    try:
        if settings["toy"]:
            listing, images = training_photos.generated_faces(side, settings["seed"])
        else:
            listing, images = _list_faces(settings), None
            is_small = len(listing.samples) * side * side * 3 <= _DEVICE_MIB.value << 20
            if settings["align"]:
                cache = work.path / "chips.npz"
                with tqdm.tqdm(total=len(listing.samples), desc="aligning", disable=None) as bar:
                    listing, images = training_photos.aligned_faces(
                        _detector(), listing, side, cache, report_fn=bar.update
                    )
            elif is_small:
                listing, images = identities.read_samples(listing, side)
            else:
                with tqdm.tqdm(total=len(listing.samples), desc="checking", disable=None) as bar:
                    listing = identities.without_unreadable(listing, report_fn=bar.update)
        return training_photos.split_faces(
            listing, images, side=side, held_out=settings["held_out"], seed=settings["seed"]
        )
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(f"--data={settings['data']}: {error}") from error


def _list_faces(settings: dict[str, Any]) -> identities.Listing:
    if settings["csv"] is not None:
        listing = identities.list_csv(settings["csv"], settings["data"])
    else:
        listing = identities.list_tree(settings["data"])
    listing = listing.with_photos(settings["min_photos"])
    if not listing.samples:
        raise ValueError(f"nobody has --min_photos={settings['min_photos']} photos")
    return listing


def _detector() -> dict:
    try:
        return jax.tree.map(jnp.asarray, mtcnn.read_weights(mtcnn.find_weights()))
    except FileNotFoundError as error:
        raise program.UsageError(str(error)) from error


def _read_pairs(
    settings: dict[str, Any], faces: training_photos.Faces
) -> training_photos.Pairs | None:
    """The pairs of --pairs, or pairs of held-out photos; None where there are too few."""
    try:
        if settings["pairs"] is None:
            return training_photos.held_out_pairs(faces, seed=settings["seed"])
        detector = _detector() if settings["align"] else None
        return training_photos.listed_pairs(
            settings["pairs"], settings["images"], faces.side, detector=detector
        )
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(f"--pairs: {error}") from error


def _batches(settings: dict[str, Any], faces: training_photos.Faces) -> sampling.Batches:
    size, seed = settings["batch_size"], settings["seed"]
    if settings["head"] != "triplet":
        if len(faces.training) < size:
            raise program.UsageError(
                f"--batch_size={size} is more than the {len(faces.training)} training photos"
            )
        return sampling.ShuffledBatches(len(faces.training), size, seed)
    per_person = settings["photos_per_person"]
    labels = tuple(faces.training_labels.tolist())
    num_people = len(faces.listing.identities)
    if size % per_person or size // per_person > num_people:
        raise program.UsageError(
            f"a batch of triplets has --photos_per_person={per_person} photos each of at most "
            f"{num_people} people: --batch_size={size} is not possible"
        )
    return sampling.IdentityBatches(labels, size // per_person, per_person, seed)


def _train(settings, work, mesh, faces, pairs, batches, recipe) -> trainer.TrainState:
    """Trains from the newest checkpoint, or from the start, to the last step."""
    side = faces.side
    key = jax.random.key(settings["seed"])
    state = trainer.init_state(key, recipe, image_shape=(side, side, 3), mesh=mesh)
    if faces.images is not None:
        images = faces.images[faces.training]
        data = trainer.place_data(images, faces.training_labels, mesh)
    per_epoch, total = batches.steps_per_epoch, recipe.optimizer.num_steps
    with checkpoint.Checkpoints(work.path / "checkpoints") as checkpoints:
        step, state = checkpoints.restore(state) or (0, state)
        work.truncate_metrics(step)
        if faces.images is None:
            source = loaders.FileSource(faces.sub_listing(faces.training), side)
            stream = loaders.batch_iterator(source, batches, num_steps=total, first_step=step)
        bar = tqdm.tqdm(total=total, initial=step, desc="training", unit="step", disable=None)
        while step < total:
            # Never beyond the end of an epoch, where there may be an evaluation.
            num_steps = min(_LOG.value, per_epoch - step % per_epoch)
            options = {"recipe": recipe, "mesh": mesh, "num_steps": num_steps}
            options["report_fn"] = bar.update
            if faces.images is None:
                state, metrics = streaming.run_streamed(key, state, stream, **options)
            else:
                state, metrics = trainer.run_steps(key, state, data, batches=batches, **options)
            step += num_steps
            line = {"step": step, "epoch": step / per_epoch}
            line |= {name: float(np.mean(values)) for name, values in metrics._asdict().items()}
            epoch, is_inside = divmod(step, per_epoch)
            if not is_inside and (epoch % _EVAL.value == 0 or step == total):
                line |= _evaluate(settings, mesh, faces, pairs, recipe, state)
                logging.info("epoch %d: %s", epoch, _summary(line))
            work.append_metrics(line)
            if not is_inside:
                checkpoints.save(step, state)
        bar.close()
    return state


def _evaluate(settings, mesh, faces, pairs, recipe, state) -> dict[str, Any]:
    """Accuracy on held-out photos and verification of pairs."""
    scores: dict[str, Any] = {"held_out_accuracy": None, "verification": None}
    options = {"recipe": recipe, "mesh": mesh}
    if len(faces.held_out):
        labels = faces.held_out_labels
        data = trainer.place_data(faces.images_of(faces.held_out), labels, mesh)
        if settings["head"] == "triplet":
            known, known_labels = (a[:_MAX_KNOWN] for a in (faces.training, faces.training_labels))
            known_data = trainer.place_data(faces.images_of(known), known_labels, mesh)
            scores["held_out_accuracy"] = training_scores.nearest_centre_accuracy(
                training_scores.embed(state, data, **options),
                labels,
                training_scores.embed(state, known_data, **options),
                known_labels,
            )
        else:
            found = training_scores.evaluate(state, data, **options)
            scores["held_out_accuracy"], scores["held_out_loss"] = found["accuracy"], found["loss"]
    if pairs is not None:
        data = trainer.place_data(pairs.images, np.zeros(len(pairs.images)), mesh)
        embeddings = training_scores.embed(state, data, **options)
        scores["verification"] = _verification(embeddings, pairs)
    return scores


def _verification(embeddings: np.ndarray, pairs: training_photos.Pairs) -> dict[str, Any]:
    units = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    distances = np.linalg.norm(units[pairs.rows[:, 0]] - units[pairs.rows[:, 1]], axis=1)
    curve = verification.roc(distances, pairs.same)
    return {
        "pairs": len(pairs.rows),
        "accuracy": float(verification.fold_accuracies(distances, pairs.same).mean()),
        "auc": verification.auc(curve),
        "eer": verification.equal_error_rate(curve),
        "tar_at_far": {f"{far:g}": verification.tar_at_far(curve, far) for far in _FARS},
        "threshold": verification.best_threshold(distances, pairs.same),
    }


def _summary(line: dict[str, Any]) -> str:
    parts = [f"loss {line['loss']:.3f}"]
    if line["held_out_accuracy"] is not None:
        parts.append(f"held-out accuracy {line['held_out_accuracy']:.3f}")
    if line["verification"] is not None:
        parts.append(f"verification {line['verification']['accuracy']:.3f}")
    return ", ".join(parts)


def _template(settings: dict[str, Any], faces: training_photos.Faces):
    """Where landmarks lie in the chips, so that photos can be aligned for the network later."""
    if settings["align"]:
        return chips.template_for(faces.side)
    if settings["toy"]:
        return None
    # The crops were aligned by somebody else: measure how.
    rows = np.linspace(0, len(faces.training) - 1, min(48, len(faces.training))).astype(int)
    crops = faces.images_of(faces.training[rows])
    try:
        template = chips.measured_template(_detector(), crops)
    except program.UsageError as error:
        logging.warning("%s", error)
        template = None
    if template is None:
        logging.warning("the alignment of the crops could not be measured: the card will lack it")
    return template


def _write_card(settings, work, faces, template, state, scores) -> pathlib.Path:
    measured = scores["verification"]
    card = trained.Card(
        architecture=settings["architecture"],
        input_px=faces.side,
        embedding_size=settings["embedding_size"],
        width=settings["width"],
        stem=settings["stem"],
        template=template,
        threshold=None if measured is None else measured["threshold"],
        identities=faces.listing.identities,
        head=settings["head"],
        scores=scores,
        training=settings,
    )
    variables = {"params": state.params["net"], "batch_stats": state.batch_stats}
    return trained.write_extractor(work.path, card, variables)


def _plot(work: workdir.Workdir) -> None:
    lines = work.read_metrics()
    figure, (top, bottom) = figures.pyplot().subplots(
        2, figsize=(6, 6), sharex=True, layout="constrained"
    )
    epochs = [line["epoch"] for line in lines]
    top.plot(epochs, [line["loss"] for line in lines], label="training")
    top.set(ylabel="loss", yscale="log")
    bottom.plot(epochs, [line["accuracy"] for line in lines], label="training, augmented")
    measured = [line for line in lines if line.get("held_out_accuracy") is not None]
    accuracies = [line["held_out_accuracy"] for line in measured]
    bottom.plot([line["epoch"] for line in measured], accuracies, label="held out")
    verified = [line for line in lines if line.get("verification")]
    accuracies = [line["verification"]["accuracy"] for line in verified]
    bottom.plot([line["epoch"] for line in verified], accuracies, label="verification of pairs")
    bottom.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.02))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.legend()
    figures.save(figure, work.path / "curve.png")


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(train_program)
