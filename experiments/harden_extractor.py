"""Hardens a face extractor: fine-tunes it so that small perturbations move its embeddings little.

    python -m experiments.harden_extractor --data=faces --extractor=dlib --workdir=out/hardened

--data are folders with a folder of photos for each person; names are not used, and the face of each
photo is detected and aligned for the extractor, in crops as well. Each step looks for the worst
perturbation of some chips within --epsilon gray levels (--attack_steps signed gradient steps from a
random start) and moves the parameters so that the embedding comes back to the one that the frozen
original gives the clean chip. Statistics of BatchNorm are frozen.

With --perturbation=folder nothing is searched: --cloaks are folders of cloaked versions of the same
photos, and the extractor learns to see through them. That is an adaptive tracker.

A tenth of the photos is held out. On it the result says how far embeddings move under an attack,
and, with --pairs (a CSV with the columns image_a, image_b, same, paths below --images), how well
people are told apart, clean and with the second photo of each pair attacked (pairs with a person of
--data are left out); all of it before and after. A killed run goes on where it was. In the work
directory:

    extractor.safetensors, extractor.json   to be given as --extractor, --surrogates, --trackers
    result.json, metrics.jsonl              what was measured
    chips.npz, pair_chips.npz, checkpoints/ to resume; may be deleted afterwards

A hardened extractor is harder to fool, not impossible to fool: the attack of the evaluation is the
one that it was trained against, and within the same radius unless the flags say otherwise.

--toy hardens a random network on generated images in seconds.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from afr_jax.core import checkpoint, parallel, program, workdir
from afr_jax.data import augmentation, identities, pairs, sampling
from afr_jax.evaluation.metrics import robustness
from afr_jax.models import mtcnn
from afr_jax.models.extractors import registry
from afr_jax.models.weights import conversion
from afr_jax.recognition import chips, hardening_photos, pipeline, training_photos
from afr_jax.training import hardening, optimizers, trained

_DATA = flags.DEFINE_list("data", [], "folders with a folder of photos for each person")
_MAX_PHOTOS = flags.DEFINE_integer("max_photos", 0, "of a person; 0: all", 0)
_EXTRACTOR = flags.DEFINE_string(
    "extractor", "dlib", f"{', '.join(registry.EXTRACTORS)}, or the folder of a trained one"
)
_WEIGHTS = flags.DEFINE_string("weights", None, "file of its weights; default: its usual source")
_PERTURBATION = flags.DEFINE_enum(
    "perturbation", "pgd", ["pgd", "folder"], "searched in each step, or cloaks from --cloaks"
)
_CLOAKS = flags.DEFINE_list("cloaks", [], "folders of cloaked versions of the photos of --data")
_EPSILON = flags.DEFINE_float("epsilon", 4.0, "largest perturbation, gray levels", 0.0)
_ATTACK_STEPS = flags.DEFINE_integer("attack_steps", 10, "of the search of each step", 1)
_CLEAN_WEIGHT = flags.DEFINE_float(
    "clean_weight", 1.0, "of the term that keeps clean embeddings; 0 saves time", 0.0
)
_RATE = flags.DEFINE_float("learning_rate", 1e-4, "largest, of AdamW; a cosine to zero", 0.0)
_DECAY = flags.DEFINE_float("weight_decay", 1e-4, "of kernels", 0.0)
_CLIP = flags.DEFINE_float("clip_norm", 5.0, "largest norm of the gradient; 0: none", 0.0)
_WARMUP = flags.DEFINE_integer("warmup_steps", 20, "of rising learning rate", 0)
_STEPS = flags.DEFINE_integer("num_steps", 2000, "optimizer steps", 1)
_BATCH = flags.DEFINE_integer("batch_size", 32, "chips per step, over all devices", 1)
_AUGMENT = flags.DEFINE_bool("augment", True, "random flip and small shift")
_BFLOAT16 = flags.DEFINE_bool("bfloat16", False, "compute in it; parameters stay float32")
_FLOAT16 = flags.DEFINE_bool("float16_file", True, "store the weights in half the space")
_HELD_OUT = flags.DEFINE_float("held_out", 0.1, "share of the photos that is held out", 0.0, 0.9)
_PAIRS = flags.DEFINE_string("pairs", None, "CSV image_a, image_b, same: pairs to verify")
_IMAGES = flags.DEFINE_string("images", ".", "folder that the paths of --pairs are below")
_ATTACKED = flags.DEFINE_integer("attacked_pairs", 200, "pairs that are attacked; 0: none", 0)
_PROBES = flags.DEFINE_integer("probe_chips", 64, "held-out chips that are attacked", 1)
_TEST_EPSILON = flags.DEFINE_float("test_epsilon", 4.0, "of attacks that measure, gray levels", 0.1)
_TEST_STEPS = flags.DEFINE_integer("test_attack_steps", 10, "of attacks that measure", 1)
_LOG = flags.DEFINE_integer("log_steps", 10, "steps that a line of metrics.jsonl is the mean of", 1)
_SAVE = flags.DEFINE_integer("checkpoint_steps", 50, "steps between two checkpoints", 1)

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
_MEASURING = ("pairs", "images", "attacked_pairs", "probe_chips", "test_epsilon")


@dataclasses.dataclass(frozen=True)
class _Faces:
    """Chips `[N, V, S, S, 3]` uint8, their people's names, training and held-out rows, problems."""

    images: np.ndarray
    people: frozenset[str]
    training: np.ndarray
    held_out: np.ndarray
    problems: tuple[identities.Problem, ...]


def harden_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    settings = _settings()
    mesh = parallel.make_mesh()
    if settings["batch_size"] % mesh.devices.size:
        count = mesh.devices.size
        raise program.UsageError(
            f"--batch_size={settings['batch_size']} is no multiple of {count} devices"
        )
    resumable = (*_MEASURING, "test_attack_steps", "log_steps", "checkpoint_steps", "float16_file")
    work = workdir.open_workdir(flags.FLAGS.workdir, settings, resumable=resumable)
    extractor, card, original = _original(settings, work)
    recipe = _recipe(settings, extractor)
    detector = None if settings["toy"] else _detector()
    faces = _read_faces(settings, work, extractor, detector)
    verified = _read_pairs(settings, work, extractor, detector, faces)
    original = parallel.replicate(jax.tree.map(jnp.asarray, original), mesh)
    state, metrics = _train(settings, work, mesh, faces, recipe, original)
    host = jax.device_get(hardening.with_params(original, state.params))
    if settings["float16_file"]:
        # What is measured is what is stored.
        host = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), host)
    scores = {
        when: _scores(settings, mesh, faces, verified, extractor, variables, original)
        for when, variables in (("before", original), ("after", parallel.replicate(host, mesh)))
    }
    measured = scores["after"]["verification"]
    card = dataclasses.replace(
        card,
        threshold=measured["threshold"] if measured else extractor.threshold,
        scores=scores,
        training=settings,
    )
    dtype = "float16" if settings["float16_file"] else None
    path = trained.write_extractor(work.path, card, host, dtype=dtype)
    problems = [*faces.problems, *(verified.problems if verified else ())]
    result = {
        **program.provenance("experiments.harden_extractor"),
        "extractor": extractor.name,
        "perturbation": settings["perturbation"],
        "steps": int(state.step),
        "photos": {"training": len(faces.training), "held_out": len(faces.held_out)},
        "last": metrics,
        **scores,
        "hardened": str(path.parent),
        "not_handled": [dataclasses.asdict(problem) for problem in problems],
    }
    work.write_result(result)
    return result, program.EXIT_PARTIAL if problems else program.EXIT_OK


def _settings() -> dict[str, Any]:
    """All flags that make the run, resolved."""
    names = [
        *("data", "max_photos", "extractor", "weights", "perturbation", "cloaks", "epsilon"),
        *("attack_steps", "clean_weight", "learning_rate", "weight_decay", "clip_norm"),
        *("warmup_steps", "num_steps", "batch_size", "augment", "bfloat16", "float16_file"),
        *("held_out", "pairs", "images", "attacked_pairs", "probe_chips", "test_epsilon"),
        *("test_attack_steps", "log_steps", "checkpoint_steps", "seed", "toy"),
    ]
    settings = {name: flags.FLAGS[name].value for name in names}
    if settings["toy"]:
        settings |= {
            name: value for name, value in _TOY.items() if not flags.FLAGS[name].present
        } | {"data": [], "pairs": None, "extractor": "toy", "weights": None}
    elif not settings["data"]:
        raise program.UsageError(
            "--data is needed: folders with a folder of photos for each person"
        )
    if (settings["perturbation"] == "folder") != bool(settings["cloaks"]):
        raise program.UsageError("--perturbation=folder and --cloaks=DIR go together")
    if settings["toy"] and settings["cloaks"]:
        raise program.UsageError("--toy has no cloaks")
    return settings


def _original(settings, work) -> tuple[registry.Extractor, trained.Card, dict]:
    """The extractor, the card of what it becomes, and its variables."""
    name = settings["extractor"]
    try:
        if settings["toy"]:
            name = str(_toy_extractor(work))
        extractor = pipeline.find_extractor(name)
        in_zoo = name in registry.EXTRACTORS
        card = trained.base_card(name) if in_zoo else trained.read_card(name)
        return extractor, card, registry.load_variables(extractor, settings["weights"])
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(f"--extractor={settings['extractor']}: {error}") from error


def _toy_extractor(work):
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

    def draw(path, leaf):
        if len(leaf.shape) > 1:
            spread = math.sqrt(2 / math.prod(leaf.shape[:-1]))
            return generator.normal(0, spread, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, conversion.shapes(network, _TOY_PX))
    folder = work.path / "original"
    folder.mkdir(exist_ok=True)
    return trained.write_extractor(folder, card, variables).parent


def _recipe(settings: dict[str, Any], extractor: registry.Extractor) -> hardening.Recipe:
    num_steps = settings["num_steps"]
    try:
        return hardening.Recipe(
            extractor,
            optimizers.OptimizerOptions(
                name="adamw",
                learning_rate=settings["learning_rate"],
                num_steps=num_steps,
                warmup_steps=min(settings["warmup_steps"], num_steps - 1),
                weight_decay=settings["weight_decay"],
                clip_norm=settings["clip_norm"],
            ),
            hardening.Attack(settings["epsilon"] / 255, settings["attack_steps"]),
            clean_weight=settings["clean_weight"],
            augmentation=augmentation.Augmentation(
                pad_px=_SHIFT_PX if settings["augment"] else 0,
                flip_probability=0.5 if settings["augment"] else 0.0,
            ),
            bfloat16=settings["bfloat16"],
        )
    except ValueError as error:
        raise program.UsageError(str(error)) from error


def _detector() -> dict:
    try:
        return jax.tree.map(jnp.asarray, mtcnn.read_weights(mtcnn.find_weights()))
    except FileNotFoundError as error:
        raise program.UsageError(str(error)) from error


def _read_faces(settings, work, extractor, detector) -> _Faces:
    try:
        if settings["toy"]:
            listing, images = training_photos.generated_faces(extractor.input_px, settings["seed"])
            images = images[:, None]
        else:
            listing = hardening_photos.list_photos(
                settings["data"], max_photos=settings["max_photos"]
            )
            read = functools.partial(
                hardening_photos.read_chips, detector, extractor, cloaks=settings["cloaks"]
            )
            listing, images = _kept(work.path / "chips.npz", listing, extractor, read)
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(f"--data={','.join(settings['data'])}: {error}") from error
    training, held_out = sampling.split_by_id(
        listing.sample_ids, held_out=settings["held_out"], seed=settings["seed"]
    )
    size, count = settings["batch_size"], len(training)
    if count < size:
        raise program.UsageError(f"--batch_size={size} is more than the {count} training photos")
    people = frozenset(pathlib.PurePath(name).parent.name for name in listing.sample_ids)
    return _Faces(images, people, training, held_out, listing.problems)


def _read_pairs(settings, work, extractor, detector, faces) -> training_photos.Pairs | None:
    """The pairs of --pairs; with --toy, of held-out chips."""
    if settings["toy"]:
        # Generated people have 30 pictures each.
        labels = faces.held_out // 30
        rows, same = pairs.balanced_pairs(labels, max_pairs=200, seed=settings["seed"])
        return training_photos.Pairs(faces.images[faces.held_out, 0], rows, same)
    if settings["pairs"] is None:
        return None

    def read(listing):
        make = functools.partial(hardening_photos.read_chips, detector, extractor)
        found, images = _kept(work.path / "pair_chips.npz", listing, extractor, make)
        return found, images[:, 0]

    try:
        return training_photos.pairs_through(
            settings["pairs"], settings["images"], read, known_people=faces.people
        )
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(f"--pairs: {error}") from error


def _kept(cache, listing, extractor, read_fn):
    """`training_photos.kept_chips` with a bar."""
    with tqdm.tqdm(total=len(listing.samples), desc="aligning", disable=None) as bar:
        make = functools.partial(read_fn, listing, report_fn=bar.update)
        return training_photos.kept_chips(cache, listing, extractor.input_px, make)


def _train(settings, work, mesh, faces, recipe, original):
    """Trains from the newest checkpoint to the last step; the state, and the last metrics."""
    key = jax.random.key(settings["seed"])
    images = parallel.replicate(faces.images[faces.training], mesh)
    versions = max(images.shape[1] - 1, 1)
    batches = sampling.ShuffledBatches(
        len(faces.training) * versions, settings["batch_size"], settings["seed"]
    )
    state = hardening.init_state(original, recipe, mesh=mesh)
    total, line = settings["num_steps"], {}
    with checkpoint.Checkpoints(work.path / "checkpoints") as checkpoints:
        step, state = checkpoints.restore(state) or (0, state)
        work.truncate_metrics(step)
        bar = tqdm.tqdm(total=total, initial=step, desc="hardening", unit="step", disable=None)
        while step < total:
            # Checkpoints lie at multiples of --checkpoint_steps, wherever a run was cut.
            until_saved = settings["checkpoint_steps"] - step % settings["checkpoint_steps"]
            num_steps = min(settings["log_steps"], until_saved, total - step)
            state, metrics = hardening.run_steps(
                key,
                state,
                original,
                images,
                recipe=recipe,
                mesh=mesh,
                batches=batches,
                num_steps=num_steps,
                report_fn=bar.update,
            )
            step += num_steps
            line = {name: float(np.mean(part)) for name, part in metrics._asdict().items()}
            line = {name: value for name, value in line.items() if math.isfinite(value)}
            work.append_metrics({"step": step, **line})
            if step % settings["checkpoint_steps"] == 0 or step == total:
                checkpoints.save(step, state)
        bar.close()
    lines = work.read_metrics()
    return state, lines[-1] if lines else line


def _scores(settings, mesh, faces, verified, extractor, variables, original) -> dict[str, Any]:
    """What is measured of some variables: shifts of held-out chips, verification of pairs."""
    attack = hardening.Attack(settings["test_epsilon"] / 255, settings["test_attack_steps"])
    options = {"extractor": extractor, "attack": attack, "mesh": mesh}
    key = jax.random.key(settings["seed"])
    scores: dict[str, Any] = {"shift": None, "verification": None}
    if len(faces.held_out):
        count = min(settings["probe_chips"], len(faces.held_out))
        rows = faces.held_out[np.linspace(0, len(faces.held_out) - 1, count).astype(int)]
        scores["shift"] = robustness.shift_scores(
            key, variables, original, faces.images[rows, 0], **options
        )
    if verified is not None:
        scores["verification"] = robustness.pair_scores(
            key, variables, verified, num_attacked=settings["attacked_pairs"], **options
        )
    return scores


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(harden_program)
