"""Face detectors that patches for MTCNN were not made for, as functions of a photo.

Each takes `[H, W, 3]` uint8 RGB and returns boxes `[N, 4]` (y0, x0, y1, x1). What is not installed
or has no model file is left out by `available`.
"""

import importlib.util
import pathlib
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import skimage.data
import skimage.feature

from afr_jax.evaluation import reference
from afr_jax.recognition import detect
from afr_jax.recognition.detectors import yunet

Detector = Callable[[np.ndarray], np.ndarray]
_MIN_PX = 24  # Side of the cascades' own window.


def available(
    *, yunet_path: str | None = None, haar_path: str | None = None
) -> dict[str, Detector]:
    """Detectors that can run here.

    Args:
        yunet_path: ONNX file of YuNet (OpenCV's model zoo); None is that of the installed wheel.
        haar_path: XML file of a Haar cascade for frontal faces (OpenCV's data folder).

    Returns:
        name -> detector: "lbp_cascade" and "yunet" always, "dlib_hog" where dlib is installed,
        "haar" where its file is given.

    Raises:
        FileNotFoundError: a file that is given does not exist.
        ValueError: the file of YuNet is damaged or another network's.
    """
    for name, path in (("yunet", yunet_path), ("haar", haar_path)):
        if path is not None and not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"the model file {path} of {name} does not exist")
    found = {"lbp_cascade": _lbp(), "yunet": _yunet(yunet_path)}
    if importlib.util.find_spec("dlib"):
        found["dlib_hog"] = _hog()
    if haar_path is not None:
        found["haar"] = _haar(haar_path)
    return found


def ask_mtcnn(
    other: reference.ReferenceProcess,
    paths: Sequence[pathlib.Path],
    options: detect.DetectorOptions,
) -> tuple[list[float], list[detect.Faces]]:
    """Seconds and faces of PyPI `mtcnn`, for each photo.

    Args:
        other: The running package.
        paths: `.npy` files of photos `[H, W, 3]` uint8.
        options: Settings of the cascade, which are also the package's. It fails on most photos with
            a smallest face other than its default, which its pyramid does not reckon with.

    Returns:
        What the package measured of itself, and its faces.
    """
    answer = other.call(
        "detect",
        paths=[str(path) for path in paths],
        min_face_px=options.min_face_px,
        scale_factor=options.scale_factor,
        thresholds=options.thresholds,
        overlaps=options.overlaps,
    )
    return answer["seconds"], [_faces(rows) for rows in answer["faces"]]


def _boxes(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Boxes from rows of (x, y, width, height)."""
    x, y, width, height = np.asarray(rows, np.float32).reshape(-1, 4).T
    return np.stack([y, x, y + height, x + width], axis=1)


def _lbp() -> Detector:
    """Local binary patterns in a boosted cascade, the file that comes with scikit-image."""
    cascade = skimage.feature.Cascade(skimage.data.lbp_frontal_face_cascade_filename())

    def detect(pixels: np.ndarray) -> np.ndarray:
        limit = min(pixels.shape[:2])
        found = cascade.detect_multi_scale(
            img=pixels,
            scale_factor=1.2,
            step_ratio=1,
            min_size=(_MIN_PX, _MIN_PX),
            max_size=(limit, limit),
        )
        return _boxes([[item[name] for name in ("c", "r", "width", "height")] for item in found])

    return detect


def _hog() -> Detector:
    import dlib  # Optional.

    # Of the library's compiled part the checker sees nothing.
    detector = dlib.get_frontal_face_detector()  # pyrefly: ignore[missing-attribute]

    def detect(pixels: np.ndarray) -> np.ndarray:
        # Enlarged once: its window is 80 px.
        found = detector(np.ascontiguousarray(pixels), 1)
        return _boxes([[f.left(), f.top(), f.width(), f.height()] for f in found])

    return detect


def _yunet(path: str | None) -> Detector:
    detect_fn = yunet.load(path=path)
    return lambda pixels: detect_fn(pixels).boxes


def _haar(path: str) -> Detector:
    # The types that come with the library lack the class.
    cascade = cv2.CascadeClassifier(path)  # pyrefly: ignore[missing-attribute]

    def detect(pixels: np.ndarray) -> np.ndarray:
        gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        found = cascade.detectMultiScale(gray, 1.1, 3, minSize=(_MIN_PX, _MIN_PX))
        return _boxes(found)

    return detect


def _faces(rows: Sequence[Sequence[float]]) -> detect.Faces:
    """Faces from `[N, 16]`: index of the photo, x0, y0, x1, y1, confidence, five x, five y."""
    values = np.asarray(rows, np.float32).reshape(-1, 16)
    landmarks = np.stack([values[:, 11:], values[:, 6:11]], axis=-1)
    return detect.Faces(values[:, [2, 1, 4, 3]], values[:, 5], landmarks)
