"""Adversarial fine-tuning of a face extractor: its options, its run, what it reaches."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

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
from afr_jax.data import augmentation, identities, pairs, sampling
from afr_jax.evaluation.metrics import robustness
from afr_jax.models import mtcnn
from afr_jax.models.extractors import registry
from afr_jax.models.weights import conversion
from afr_jax.recognition import chips, hardening_photos, pipeline, training_photos
from afr_jax.training import hardening, shared_options, trained

_TOY = {
    "num_steps": 60,
    "batch_size": 16,
    "attack_steps": 3,
    "epsilon": 8.0,
    "learning_rate": 2e-3,
    "warmup_steps": 2,
    "held_out": 0.3,
    "attacked_pairs": 40,
    "test_epsilon": 8.0,
    "test_attack_steps": 3,
    "checkpoint_steps": 20,
}
_TOY_PX = 16
_TOY_THRESHOLD = 0.5
_SHIFT_PX = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardenExtractorConfig(options.Config):
    """Hardens a face extractor, so that small perturbations move its embeddings little.

        python -m experiments.harden_extractor --data=faces --extractor=dlib --workdir=out/hardened

    --data are folders with a folder of photos for each person; names are not used, and the face of
    each photo is detected and aligned for the extractor, in crops as well. Each step looks for the
    worst perturbation of some chips within --epsilon (--attack_steps signed gradient steps from a
    random start) and moves the parameters so that the embedding comes back to the one that the
    frozen original gives the clean chip. Statistics of BatchNorm are frozen.

    With --perturbation=folder nothing is searched: --cloaks are folders of cloaked versions of the
    same photos, and the extractor learns to see through them. That is an adaptive tracker.

    A tenth of the photos is held out. On it the result says how far embeddings move under an
    attack, and, with --pairs, how well people are told apart, clean and with the second photo of
    each pair attacked (pairs with a person of --data are left out); all of it before and after. A
    killed run goes on where it was. In the work directory:

        extractor.safetensors, extractor.json   to be given as --extractor, --surrogates, --trackers
        result.json, metrics.jsonl              what was measured
        chips.npz, pair_chips.npz, checkpoints/ to resume; may be deleted afterwards

    A hardened extractor is harder to fool, not impossible to fool: the attack of the evaluation is
    the one that it was trained against, and within the same radius unless the flags say otherwise.

    --toy hardens a random network on generated images in seconds. Exit code 3: some photos could
    not be used.
    """

    shares_work = True

    data: tuple[str, ...] = options.option((), "folders with a folder of photos for each person")
    max_photos: int = options.option(0, "photos of a person; 0: all", at_least=0)
    extractor: str = options.option(
        "dlib", f"{', '.join(registry.EXTRACTORS)}, or the folder of a trained one"
    )
    weights: str | None = options.option(None, "file of its weights; default: its usual source")
    perturbation: Literal["pgd", "folder"] = options.option(
        "pgd", "searched in each step, or cloaks from --cloaks"
    )
    cloaks: tuple[str, ...] = options.option((), "folders of cloaked versions of --data's photos")
    epsilon: float = options.option(4.0, "largest perturbation, gray levels of 255", at_least=0)
    attack_steps: int = options.option(10, "steps of each search", at_least=1)
    clean_weight: float = options.option(
        1.0, "weight of the term that keeps clean embeddings; 0 saves time", at_least=0
    )
    update: shared_options.UpdateOptions = options.group(
        shared_options.UpdateOptions, optimizer="adamw", learning_rate=1e-4, weight_decay=1e-4
    )
    warmup_steps: int = options.option(20, "steps of rising learning rate", at_least=0)
    num_steps: int = options.option(2000, "optimizer steps", at_least=1)
    batch: shared_options.BatchOptions = options.group(shared_options.BatchOptions, batch_size=32)
    augment: bool = options.option(True, "random flip and small shift")
    float16_file: bool = options.option(True, "store the weights in half the space", resumable=True)
    held_out: float = options.option(
        0.1, "share of the photos that is held out", at_least=0, at_most=0.9
    )
    verified: training_photos.PairOptions = options.group(training_photos.PairOptions)
    attacked_pairs: int = options.option(
        200, "pairs that are attacked; 0: none", at_least=0, resumable=True
    )
    probe_chips: int = options.option(
        64, "held-out chips that are attacked", at_least=1, resumable=True
    )
    test_epsilon: float = options.option(
        4.0, "of attacks that measure, gray levels of 255", at_least=0.1, resumable=True
    )
    test_attack_steps: int = options.option(
        10, "steps of attacks that measure", at_least=1, resumable=True
    )
    log_steps: int = options.option(
        10, "steps that a line of metrics.jsonl is the mean of", at_least=1, resumable=True
    )
    checkpoint_steps: int = options.option(
        50, "steps between two checkpoints", at_least=1, resumable=True
    )
    is_toy: bool = False

    def toy(self) -> "HardenExtractorConfig":
        """A random network on generated images."""
        return dataclasses.replace(
            options.fill_defaults(self, _TOY),
            data=(),
            verified=training_photos.PairOptions(),
            extractor="toy",
            weights=None,
            is_toy=True,
        )


@dataclasses.dataclass(frozen=True)
class _Faces:
    """Chips `[N, V, S, S, 3]` uint8, their people's names, training and held-out rows, problems."""

    images: np.ndarray
    people: frozenset[str]
    training: np.ndarray
    held_out: np.ndarray
    problems: tuple[identities.Omission, ...]


def run(config: HardenExtractorConfig) -> options.Outcome:
    """Hardens an extractor, or goes on with it.

    Raises:
        options.UsageError: options that do not go together, or data that cannot be used.
    """
    _check(config)
    mesh = parallel.make_mesh()
    config.batch.check_devices(mesh.devices.size)
    work = workdir.open_workdir(config.workdir, config)
    extractor, card, original = _original(config, work)
    recipe = _recipe(config, extractor)
    faces = _read_faces(config, work, extractor)
    verified = _read_pairs(config, work, extractor, faces)
    original = parallel.replicate(jax.tree.map(jnp.asarray, original), mesh)
    state, metrics = _train(config, work, mesh, faces, recipe, original)
    host = parallel.fetch(hardening.with_params(original, state.params))
    if config.float16_file:
        # What is measured is what is stored.
        host = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), host)
    scores = {
        when: _scores(config, mesh, faces, verified, extractor, variables, original)
        for when, variables in (("before", original), ("after", parallel.replicate(host, mesh)))
    }
    if not distributed.is_primary():
        return options.Outcome({})
    measured = scores["after"]["verification"]
    card = dataclasses.replace(
        card,
        threshold=measured["threshold"] if measured else extractor.threshold,
        scores=scores,
        training=files.to_jsonable(config),
    )
    dtype = "float16" if config.float16_file else None
    path = trained.write_extractor(work.path, card, host, dtype=dtype)
    problems = [*faces.problems, *(verified.problems if verified else ())]
    result = {
        **program.provenance("experiments.harden_extractor", config=config),
        "extractor": extractor.name,
        "perturbation": config.perturbation,
        "steps": int(state.step),
        "photos": {"training": len(faces.training), "held_out": len(faces.held_out)},
        "last": metrics,
        **scores,
        "hardened": str(path.parent),
        "not_handled": [problem.as_result() for problem in problems],
    }
    work.write_result(result)
    return options.Outcome(result, complete=not problems)


def _check(config: HardenExtractorConfig) -> None:
    if not config.is_toy and not config.data:
        raise options.UsageError(
            "--data is needed: folders with a folder of photos for each person"
        )
    if (config.perturbation == "folder") != bool(config.cloaks):
        raise options.UsageError("--perturbation=folder and --cloaks=DIR go together")
    if config.is_toy and config.cloaks:
        raise options.UsageError("--toy has no cloaks")


def _original(
    config: HardenExtractorConfig, work: workdir.Workdir
) -> tuple[registry.Extractor, trained.Card, conversion.Variables]:
    """The extractor, the card of what it becomes, and its variables."""
    with options.usage(f"--extractor={config.extractor}"):
        name = config.extractor
        if config.is_toy:
            name = str(distributed.primary_first(lambda: _toy_extractor(work)))
        extractor = pipeline.find_extractor(name)
        is_listed = name in registry.EXTRACTORS
        card = trained.base_card(name) if is_listed else trained.read_card(name)
        return extractor, card, registry.load_variables(extractor, config.weights)


def _toy_extractor(work: workdir.Workdir) -> pathlib.Path:
    """A random network, as `experiments.train_extractor` would leave it."""
    card = trained.Card(
        architecture="resnet6",
        input_px=_TOY_PX,
        embedding_size=32,
        width=8,
        template=chips.template_for(_TOY_PX),
        threshold=_TOY_THRESHOLD,
    )
    network = trained.make_network("resnet6", input_px=_TOY_PX, embedding_size=32, width=8)
    generator = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if len(leaf.shape) > 1:
            spread = math.sqrt(2 / math.prod(leaf.shape[:-1]))
            return generator.normal(0, spread, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, conversion.shapes(network, _TOY_PX))
    folder = work.path / "original"
    folder.mkdir(exist_ok=True)
    return trained.write_extractor(folder, card, variables).parent


def _recipe(
    config: HardenExtractorConfig, extractor: registry.Extractor
) -> hardening.HardeningRecipe:
    with options.usage(""):
        return hardening.HardeningRecipe(
            extractor,
            config.update.over(config.num_steps, warmup_steps=config.warmup_steps),
            hardening.Attack(config.epsilon / 255, config.attack_steps),
            clean_weight=config.clean_weight,
            augmentation=augmentation.Augmentation(
                pad_px=_SHIFT_PX if config.augment else 0,
                flip_probability=0.5 if config.augment else 0.0,
            ),
            bfloat16=config.batch.bfloat16,
        )


def _detector() -> mtcnn.Variables:
    with options.usage("the detector"):
        return mtcnn.load_variables()


def _read_faces(
    config: HardenExtractorConfig,
    work: workdir.Workdir,
    extractor: registry.Extractor,
) -> _Faces:
    with options.usage(f"--data={','.join(config.data)}"):
        if config.is_toy:
            listing, images = training_photos.generated_faces(extractor.input_px, config.seed)
            images = images[:, None]
        else:
            listing = hardening_photos.list_photos(config.data, max_photos=config.max_photos)
            read = functools.partial(
                hardening_photos.read_chips, _detector(), extractor, cloaks=config.cloaks
            )
            listing, images = _kept(work.path / "chips.npz", listing, extractor, read)
    training, held_out = sampling.split_by_id(
        listing.sample_ids, held_out=config.held_out, seed=config.seed
    )
    config.batch.check_images(len(training))
    people = frozenset(pathlib.PurePath(name).parent.name for name in listing.sample_ids)
    return _Faces(images, people, training, held_out, listing.problems)


def _read_pairs(
    config: HardenExtractorConfig,
    work: workdir.Workdir,
    extractor: registry.Extractor,
    faces: _Faces,
) -> training_photos.Pairs | None:
    """The pairs of --pairs; with --toy, of held-out chips."""
    if config.is_toy:
        # Generated people have 30 pictures each.
        labels = faces.held_out // 30
        rows, same = pairs.balanced_pairs(labels, max_pairs=200, seed=config.seed)
        return training_photos.Pairs(faces.images[faces.held_out, 0], rows, same)
    if config.verified.pairs is None:
        return None

    def read(listing: identities.Listing) -> tuple[identities.Listing, np.ndarray]:
        make = functools.partial(hardening_photos.read_chips, _detector(), extractor)
        found, images = _kept(work.path / "pair_chips.npz", listing, extractor, make)
        return found, images[:, 0]

    with options.usage("--pairs"):
        return training_photos.pairs_through(
            config.verified.pairs, config.verified.images, read, known_people=faces.people
        )


def _kept(
    cache: pathlib.Path,
    listing: identities.Listing,
    extractor: registry.Extractor,
    read_fn: Callable[..., tuple[identities.Listing, np.ndarray]],
) -> tuple[identities.Listing, np.ndarray]:
    """`training_photos.kept_chips` with a bar."""
    with progress.counter(len(listing.samples), description="aligning") as report:
        make = functools.partial(read_fn, listing, report_fn=report)
        return training_photos.kept_chips(cache, listing, extractor.input_px, make)


def _train(
    config: HardenExtractorConfig,
    work: workdir.Workdir,
    mesh: parallel.Mesh,
    faces: _Faces,
    recipe: hardening.HardeningRecipe,
    original: conversion.Variables,
) -> tuple[hardening.HardeningState, dict[str, float]]:
    """Trains from the newest checkpoint to the last step; the state, and the last metrics."""
    key = jax.random.key(config.seed)
    images = parallel.replicate(faces.images[faces.training], mesh)
    versions = max(images.shape[1] - 1, 1)
    batches = sampling.ShuffledBatches(
        len(faces.training) * versions, config.batch.batch_size, config.seed
    )
    state = hardening.init_state(original, recipe, mesh=mesh)
    total, line = config.num_steps, {}
    with checkpoint.Checkpoints(work.path / "checkpoints") as checkpoints:
        step, state = checkpoints.restore(state) or (0, state)
        work.truncate_metrics(step)
        with progress.counter(total, description="hardening", done=step, unit="step") as report:
            while step < total:
                # Checkpoints lie at multiples of --checkpoint_steps, wherever a run was cut.
                until_saved = config.checkpoint_steps - step % config.checkpoint_steps
                num_steps = min(config.log_steps, until_saved, total - step)
                state, metrics = hardening.run_steps(
                    key,
                    state,
                    original,
                    images,
                    recipe=recipe,
                    mesh=mesh,
                    batches=batches,
                    num_steps=num_steps,
                    report_fn=report,
                )
                step += num_steps
                line = {name: float(np.mean(part)) for name, part in metrics._asdict().items()}
                line = {name: value for name, value in line.items() if math.isfinite(value)}
                work.append_metrics({"step": step, **line})
                if step % config.checkpoint_steps == 0 or step == total:
                    checkpoints.save(step, state)
    lines = work.read_metrics()
    return state, lines[-1] if lines else line


def _scores(
    config: HardenExtractorConfig,
    mesh: parallel.Mesh,
    faces: _Faces,
    verified: training_photos.Pairs | None,
    extractor: registry.Extractor,
    variables: conversion.Variables,
    original: conversion.Variables,
) -> dict[str, files.Json]:
    """What is measured of some variables: shifts of held-out chips, verification of pairs."""
    attack = hardening.Attack(config.test_epsilon / 255, config.test_attack_steps)
    shared: dict[str, files.Json] = {"extractor": extractor, "attack": attack, "mesh": mesh}
    key = jax.random.key(config.seed)
    scores: dict[str, files.Json] = {"shift": None, "verification": None}
    if len(faces.held_out):
        count = min(config.probe_chips, len(faces.held_out))
        rows = faces.held_out[np.linspace(0, len(faces.held_out) - 1, count).astype(int)]
        scores["shift"] = robustness.shift_scores(
            key, variables, original, faces.images[rows, 0], **shared
        )
    if verified is not None:
        scores["verification"] = robustness.pair_scores(
            key, variables, verified, num_attacked=config.attacked_pairs, **shared
        )
    return scores
