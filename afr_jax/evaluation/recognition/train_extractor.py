"""Training of a face extractor (stage 3) from photos: its options, its run, what it reaches."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
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
from afr_jax.data import augmentation, identities, loaders, sampling
from afr_jax.evaluation.metrics import verification
from afr_jax.evaluation.report import figures
from afr_jax.models import heads, mtcnn
from afr_jax.recognition import chips, training_photos
from afr_jax.training import scores as training_scores
from afr_jax.training import shared_options, streaming, trained, trainer

_MARGINS = {"arcface": 0.5, "cosface": 0.35, "triplet": 0.3, "softmax": 0.0}
# Training photos that the centers of people are taken from, for triplets.
_MAX_KNOWN = 20_000
_FARS = (1e-2, 1e-3)
_TOY = {
    "architecture": "resnet6",
    "width": 8,
    "input_px": 16,
    "embedding_size": 32,
    "epochs": 6,
    "batch_size": 16,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainExtractorConfig(options.Config):
    """Trains a face extractor from photos of some people.

        python -m experiments.train_extractor --data=faces --workdir=out/extractor

    --data is a folder with a folder of photos for each person (with --csv: a folder of photos and a
    CSV with the columns image, identity). Photos are taken for aligned crops and resized, unless
    --align detects the face of each and aligns it. A fifth of the photos, chosen by a hash of their
    paths, is held out; on them accuracy (who of the known people is it?) and verification (are two
    photos of one person?) are measured during training, or verification on --pairs, a CSV with the
    columns image_a, image_b, same, paths below --images. A killed run goes on where it was. In the
    work directory:

        extractor.safetensors, extractor.json   the network and what it is (its card)
        result.json, metrics.jsonl, curve.png   what was measured
        checkpoints/                            to resume; may be deleted afterwards

    Held-out photos show people who were trained on: the figures do not say how well strangers are
    told apart. Give --pairs of strangers for that.

    Expected for 24 people with 4,600 crops for training: minutes on one GPU with the default flags
    (ResNet-18 at 64 px, 30 epochs). On two idle CPU cores about ten minutes with

        --architecture=resnet10 --width=16 --input_px=48 --batch_size=64 --epochs=20

    --toy trains on generated images in seconds. Exit code 3: some photos could not be used.
    """

    shares_work = True

    data: str | None = options.option(None, "folder with a folder of photos for each person")
    csv: str | None = options.option(None, "CSV with the columns image, identity; paths in --data")
    architecture: str = options.option("resnet18", "the network", choices=trained.ARCHITECTURES)
    width: int = options.option(64, "channels of a ResNet's first stage", at_least=1)
    stem: Literal["cifar", "imagenet"] = options.option(
        "cifar", "of a ResNet; imagenet shrinks images 4 times at once"
    )
    input_px: int = options.option(
        0, "side of the images, pixels; 0: as the network wants", at_least=0
    )
    embedding_size: int = options.option(
        0, "numbers of an embedding; 0: 128 for mobilefacenet, else 512", at_least=0
    )
    head: Literal["softmax", "arcface", "cosface", "triplet"] = options.option(
        "softmax", "what is learned for"
    )
    scale: float = options.option(32.0, "of the cosines of arcface and cosface", at_least=1)
    margin: float | None = options.option(
        None,
        "arcface: radians, default 0.5; cosface: cosine, 0.35; triplet: distance, 0.3",
        at_least=0,
        at_most=1.5,
    )
    mining: Literal["semihard", "hard"] = options.option("semihard", "of triplets")
    photos_per_person: int = options.option(4, "in a batch of triplets", at_least=2)
    label_smoothing: float = options.option(0.0, "of the softmax head", at_least=0, at_most=0.5)
    update: shared_options.UpdateOptions = options.group(shared_options.UpdateOptions)
    warmup_epochs: float = options.option(
        1.0, "epochs of rising learning rate; then a cosine", at_least=0
    )
    epochs: int = options.option(30, "passes over the training photos", at_least=1)
    batch: shared_options.BatchOptions = options.group(shared_options.BatchOptions, batch_size=128)
    augment: bool = options.option(True, "random zoom, flip, light and color")
    align: bool = options.option(False, "detect and align faces; else photos are crops")
    min_photos: int = options.option(2, "people with fewer photos are left out", at_least=1)
    held_out: float = options.option(
        0.2, "share of the photos that is held out", at_least=0, at_most=0.9
    )
    verified: training_photos.PairOptions = options.group(training_photos.PairOptions)
    eval_epochs: int = options.option(
        1, "epochs between two evaluations", at_least=1, resumable=True
    )
    log_steps: int = options.option(
        20, "steps that a line of metrics.jsonl is the mean of", at_least=1, resumable=True
    )
    device_data_mib: int = options.option(
        8192, "larger training sets stay in files and are streamed", at_least=0, resumable=True
    )
    is_toy: bool = False

    def toy(self) -> "TrainExtractorConfig":
        """A small network on generated images."""
        return dataclasses.replace(
            options.fill_defaults(self, _TOY),
            data=None,
            csv=None,
            align=False,
            verified=training_photos.PairOptions(),
            is_toy=True,
        )


def run(config: TrainExtractorConfig) -> options.Outcome:
    """Trains an extractor, or goes on with its training.

    Raises:
        options.UsageError: options that do not go together, or data that cannot be used.
    """
    config = _resolved(config)
    work = workdir.open_workdir(config.workdir, config)
    mesh = parallel.make_mesh()
    config.batch.check_devices(mesh.devices.size)
    faces = _read_faces(config, work)
    pairs = _read_pairs(config, faces)
    batches = _batches(config, faces)
    training = _Training(
        config,
        work,
        mesh,
        faces,
        pairs,
        batches,
        _recipe(config, len(faces.listing.identities), batches.steps_per_epoch),
    )
    template = _template(config, faces)
    state = training.train()
    scores = training.evaluate(state)
    if not distributed.is_primary():
        return options.Outcome({})
    card = _write_card(config, work, faces, template, state, scores)
    _plot(work)
    problems = [*faces.listing.problems, *(pairs.problems if pairs else ())]
    result = {
        **program.provenance("experiments.train_extractor", config=config),
        "architecture": config.architecture,
        "head": config.head,
        "steps": int(state.step),
        "identities": len(faces.listing.identities),
        "photos": {"training": len(faces.training), "held_out": len(faces.held_out)},
        **scores,
        "extractor": str(card),
        "not_handled": [problem.as_result() for problem in problems],
    }
    work.write_result(result)
    return options.Outcome(result, complete=not problems)


def _resolved(config: TrainExtractorConfig) -> TrainExtractorConfig:
    """The options with what they leave to the architecture and the head."""
    if not config.is_toy and config.data is None:
        raise options.UsageError(
            "--data is needed: a folder with a folder of photos for each person"
        )
    architecture = config.architecture
    size = 128 if architecture == "mobilefacenet" else 512
    config = dataclasses.replace(
        config,
        input_px=config.input_px or trained.default_input_px(architecture),
        embedding_size=config.embedding_size or size,
        margin=_MARGINS[config.head] if config.margin is None else config.margin,
    )
    with options.usage(f"--architecture={architecture}"):
        _network(config)
    return config


def _network(config: TrainExtractorConfig) -> nn.Module:
    return trained.make_network(
        config.architecture,
        input_px=config.input_px,
        embedding_size=config.embedding_size,
        width=config.width,
        stem=config.stem,
        dtype=jnp.bfloat16 if config.batch.bfloat16 else jnp.float32,
    )


def _recipe(config: TrainExtractorConfig, num_classes: int, steps_per_epoch: int) -> trainer.Recipe:
    margin, scale = config.margin or 0.0, config.scale
    with options.usage(""):
        head = {
            "softmax": heads.Softmax(num_classes, config.label_smoothing),
            "arcface": heads.AngularMargin(num_classes, scale, margin, 0.0),
            "cosface": heads.AngularMargin(num_classes, scale, 0.0, margin),
            "triplet": heads.Triplet(margin, config.mining),
        }[config.head]
        optimizer = config.update.over(
            config.epochs * steps_per_epoch,
            warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        )
    return trainer.Recipe(
        net=_network(config),
        head=head,
        optimizer=optimizer,
        augmentation=augmentation.FACES if config.augment else augmentation.Augmentation(),
        input_scale=trained.INPUT_SCALE,
        input_offset=trained.INPUT_OFFSET,
    )


def _read_faces(config: TrainExtractorConfig, work: workdir.Workdir) -> training_photos.FaceSet:
    """Lists the photos, splits them, and reads them unless they are too many."""
    side = config.input_px
    with options.usage(f"--data={config.data}"):
        if config.is_toy:
            listing, images = training_photos.generated_faces(side, config.seed)
        else:
            listing, images = _list_faces(config), None
            is_small = len(listing.samples) * side * side * 3 <= config.device_data_mib << 20
            if config.align:
                cache = work.path / "chips.npz"
                with progress.counter(len(listing.samples), description="aligning") as report:
                    listing, images = training_photos.aligned_faces(
                        _detector(), listing, side, cache, report_fn=report
                    )
            elif is_small:
                listing, images = identities.read_samples(listing, side)
            else:
                with progress.counter(len(listing.samples), description="checking") as report:
                    listing = identities.without_unreadable(listing, report_fn=report)
        return training_photos.split_faces(
            listing, images, side=side, held_out=config.held_out, seed=config.seed
        )


def _list_faces(config: TrainExtractorConfig) -> identities.Listing:
    folder = config.data or ""
    if config.csv is not None:
        listing = identities.list_csv(config.csv, folder)
    else:
        listing = identities.list_tree(folder)
    listing = listing.with_photos(config.min_photos)
    if not listing.samples:
        raise ValueError(f"nobody has --min_photos={config.min_photos} photos")
    return listing


def _detector() -> mtcnn.Variables:
    with options.usage("the detector"):
        return mtcnn.load_variables()


def _read_pairs(
    config: TrainExtractorConfig, faces: training_photos.FaceSet
) -> training_photos.Pairs | None:
    """The pairs of --pairs, or pairs of held-out photos; None where there are too few."""
    if config.verified.pairs is None:
        return training_photos.held_out_pairs(faces, seed=config.seed)
    with options.usage("--pairs"):
        detector = _detector() if config.align else None
        return training_photos.listed_pairs(
            config.verified.pairs, config.verified.images, faces.side, detector=detector
        )


def _batches(config: TrainExtractorConfig, faces: training_photos.FaceSet) -> sampling.Batches:
    size, seed = config.batch.batch_size, config.seed
    if config.head != "triplet":
        config.batch.check_images(len(faces.training))
        return sampling.ShuffledBatches(len(faces.training), size, seed)
    per_person = config.photos_per_person
    labels = tuple(faces.training_labels.tolist())
    num_people = len(faces.listing.identities)
    if size % per_person or size // per_person > num_people:
        raise options.UsageError(
            f"a batch of triplets has --photos_per_person={per_person} photos each of at most "
            f"{num_people} people: --batch_size={size} is not possible"
        )
    return sampling.IdentityBatches(labels, size // per_person, per_person, seed)


@dataclasses.dataclass(frozen=True)
class _Training:
    """A run once its photos are read."""

    config: TrainExtractorConfig
    work: workdir.Workdir
    mesh: parallel.Mesh
    faces: training_photos.FaceSet
    pairs: training_photos.Pairs | None
    batches: sampling.Batches
    recipe: trainer.Recipe

    def train(self) -> trainer.TrainState:
        """Trains from the newest checkpoint, or from the start, to the last step."""
        config, faces = self.config, self.faces
        key = jax.random.key(config.seed)
        shape = (faces.side, faces.side, 3)
        state = trainer.init_state(key, self.recipe, image_shape=shape, mesh=self.mesh)
        per_epoch, total = self.batches.steps_per_epoch, self.recipe.optimizer.num_steps
        with checkpoint.Checkpoints(self.work.path / "checkpoints") as checkpoints:
            step, state = checkpoints.restore(state) or (0, state)
            self.work.truncate_metrics(step)
            advance_fn = self._advance_fn(key, step)
            with progress.counter(total, description="training", done=step, unit="step") as report:
                while step < total:
                    # Never beyond the end of an epoch, where there may be an evaluation.
                    num_steps = min(config.log_steps, per_epoch - step % per_epoch)
                    state, metrics = advance_fn(state, num_steps=num_steps, report_fn=report)
                    step += num_steps
                    line = {"step": step, "epoch": step / per_epoch}
                    line |= {
                        name: float(np.mean(values)) for name, values in metrics._asdict().items()
                    }
                    epoch, is_inside = divmod(step, per_epoch)
                    if not is_inside and (epoch % config.eval_epochs == 0 or step == total):
                        line |= self.evaluate(state)
                        logging.info("epoch %d: %s", epoch, _summary(line))
                    self.work.append_metrics(line)
                    if not is_inside:
                        checkpoints.save(step, state)
        return state

    def _advance_fn(
        self, key: jax.Array, step: int
    ) -> Callable[..., tuple[trainer.TrainState, trainer.Metrics]]:
        """Takes a state some steps further, by photos on the device or from their files."""
        faces = self.faces
        shared: dict[str, files.Json] = {"recipe": self.recipe, "mesh": self.mesh}
        if faces.images is not None:
            images = faces.images[faces.training]
            data = trainer.place_data(images, faces.training_labels, self.mesh)
            return lambda state, **steps: trainer.run_steps(
                key, state, data, batches=self.batches, **shared, **steps
            )
        source = loaders.FileSource(faces.sub_listing(faces.training), faces.side)
        stream = loaders.batch_iterator(
            source, self.batches, num_steps=self.recipe.optimizer.num_steps, first_step=step
        )
        return lambda state, **steps: streaming.run_streamed(key, state, stream, **shared, **steps)

    def evaluate(self, state: trainer.TrainState) -> dict[str, files.Json]:
        """Accuracy on held-out photos and verification of pairs."""
        scores: dict[str, files.Json] = {"held_out_accuracy": None, "verification": None}
        faces = self.faces
        shared: dict[str, files.Json] = {"recipe": self.recipe, "mesh": self.mesh}
        if len(faces.held_out):
            labels = faces.held_out_labels
            data = trainer.place_data(faces.images_of(faces.held_out), labels, self.mesh)
            if self.config.head == "triplet":
                known, known_labels = (
                    faces.training[:_MAX_KNOWN],
                    faces.training_labels[:_MAX_KNOWN],
                )
                known_data = trainer.place_data(faces.images_of(known), known_labels, self.mesh)
                scores["held_out_accuracy"] = training_scores.nearest_center_accuracy(
                    training_scores.embed(state, data, **shared),
                    labels,
                    training_scores.embed(state, known_data, **shared),
                    known_labels,
                )
            else:
                found = training_scores.evaluate(state, data, **shared)
                scores |= {"held_out_accuracy": found["accuracy"], "held_out_loss": found["loss"]}
        if self.pairs is not None:
            data = trainer.place_data(
                self.pairs.images, np.zeros(len(self.pairs.images)), self.mesh
            )
            embeddings = training_scores.embed(state, data, **shared)
            scores["verification"] = _verification(embeddings, self.pairs)
        return scores


def _verification(embeddings: np.ndarray, pairs: training_photos.Pairs) -> dict[str, files.Json]:
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


def _summary(line: dict[str, files.Json]) -> str:
    parts = [f"loss {line['loss']:.3f}"]
    if line["held_out_accuracy"] is not None:
        parts.append(f"held-out accuracy {line['held_out_accuracy']:.3f}")
    if line["verification"] is not None:
        parts.append(f"verification {line['verification']['accuracy']:.3f}")
    return ", ".join(parts)


def _template(
    config: TrainExtractorConfig, faces: training_photos.FaceSet
) -> tuple[tuple[float, float], ...] | None:
    """Where landmarks lie in the chips, so that photos can be aligned for the network later."""
    if config.align:
        return chips.template_for(faces.side)
    if config.is_toy:
        return None
    # The crops were aligned by somebody else: measure how.
    rows = np.linspace(0, len(faces.training) - 1, min(48, len(faces.training))).astype(int)
    crops = faces.images_of(faces.training[rows])
    try:
        template = chips.measured_template(mtcnn.load_variables(), crops)
    except FileNotFoundError as error:
        logging.warning("%s", error)
        template = None
    if template is None:
        logging.warning("the alignment of the crops could not be measured: the card will lack it")
    return template


def _write_card(
    config: TrainExtractorConfig,
    work: workdir.Workdir,
    faces: training_photos.FaceSet,
    template: tuple[tuple[float, float], ...] | None,
    state: trainer.TrainState,
    scores: dict[str, files.Json],
) -> pathlib.Path:
    measured = scores["verification"]
    card = trained.Card(
        architecture=config.architecture,
        input_px=faces.side,
        embedding_size=config.embedding_size,
        width=config.width,
        stem=config.stem,
        template=template,
        threshold=None if measured is None else measured["threshold"],
        identities=faces.listing.identities,
        head=config.head,
        scores=scores,
        training=files.to_jsonable(config),
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
