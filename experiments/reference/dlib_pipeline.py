"""dlib's own pipeline on verification pairs: the yardstick of `experiments.verify`."""

import dataclasses
import pathlib

import dlib
import numpy as np
from PIL import Image

from afr_jax.core import options, program, progress, workdir
from afr_jax.data import pairs
from afr_jax.evaluation.metrics import verification
from afr_jax.models.extractors import dlib_resnet
from afr_jax.recognition import training_photos

_FARS = (1e-2, 1e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DlibPipelineConfig(options.Config):
    """dlib's own pipeline on verification pairs.

        python -m experiments.reference.dlib_pipeline --pairs=lfw_pairs.csv --images=lfw

    HOG detector (one upsampling), 5-point shape predictor, dlib's chip and dlib's network; needs
    dlib (`pip install dlib-bin`). Same scores as `experiments.verify`, with the same code. Where
    HOG finds no face, the whole photo counts as the face, which is kinder to dlib than a rejected
    pair. Writes `result.json`. Expected: five minutes for 3,000 LFW pairs on two cores. --toy: the
    first 40 pairs.
    """

    verified: training_photos.PairOptions = options.group(training_photos.PairOptions)
    max_pairs: int = options.option(0, "at most so many rows of --pairs; 0: all", at_least=0)
    workdir: str | None = options.option("out/dlib", options.WORKDIR_HELP)

    def toy(self) -> "DlibPipelineConfig":
        """The first 40 pairs."""
        return options.fill_defaults(self, {"max_pairs": 40})


def run(config: DlibPipelineConfig) -> options.Outcome:
    """Verifies the pairs.

    Raises:
        options.UsageError: there is no such file of pairs.
    """
    if config.verified.pairs is None:
        raise options.UsageError("--pairs is needed")
    with options.usage("--pairs"):
        rows, same = pairs.read_pairs(config.verified.pairs)
    if config.max_pairs:
        rows, same = rows[: config.max_pairs], same[: config.max_pairs]
    work = workdir.open_workdir(config.workdir, config)
    weights = dlib_resnet.find_weights()
    detector = dlib.get_frontal_face_detector()
    predictor = dlib.shape_predictor(str(weights.parent / "shape_predictor_5_face_landmarks.dat"))
    network = dlib.face_recognition_model_v1(str(weights))
    descriptors, missed = {}, 0
    names = sorted({name for row in rows for name in row})
    for name in progress.track(names, description="photos"):
        image = Image.open(pathlib.Path(config.verified.images) / name)
        pixels = np.asarray(image.convert("RGB"))
        found = detector(pixels, 1)
        missed += not found
        points = predictor(pixels, _main_box(found, pixels.shape))
        descriptors[name] = np.array(network.compute_face_descriptor(pixels, points))
    distances = np.array([np.linalg.norm(descriptors[a] - descriptors[b]) for a, b in rows])
    curve = verification.roc(distances, same)
    accuracies = verification.fold_accuracies(distances, same)
    result = {
        "pipeline": f"dlib {dlib.__version__}: HOG, 5 points, ResNet",
        "pairs": len(rows),
        "photos": len(names),
        "photos_without_hog_face": missed,
        "accuracy": float(accuracies.mean()),
        "accuracy_std": float(accuracies.std(ddof=1)),
        "accuracy_at_threshold": verification.accuracy(distances, same, 0.6),
        "auc": verification.auc(curve),
        "eer": verification.equal_error_rate(curve),
        "tar_at_far": {f"{far:g}": verification.tar_at_far(curve, far) for far in _FARS},
    }
    work.write_result(result)
    return options.Outcome(result)


def _main_box(found: "dlib.rectangles", shape: tuple[int, ...]) -> "dlib.rectangle":
    """The face that is large and central; the whole photo if there is none."""
    center = np.array(shape[1::-1]) / 2

    def weight(face: "dlib.rectangle") -> float:
        place = np.array([face.center().x, face.center().y])
        return face.area() - 2 * np.sum((place - center) ** 2)

    return max(found, key=weight, default=dlib.rectangle(0, 0, shape[1], shape[0]))


if __name__ == "__main__":
    program.main(DlibPipelineConfig, run)
