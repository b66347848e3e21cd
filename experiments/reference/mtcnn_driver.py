"""Serves PyPI `mtcnn` (TensorFlow); run by the references' Python, see README.md."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import time

import numpy as np
import serving
from mtcnn import MTCNN


def main() -> None:
    """Serves `detect`."""
    detector = MTCNN()

    def detect(
        paths: list[str],
        min_face_px: float,
        scale_factor: float,
        thresholds: list[float],
        overlaps: list[float],
    ) -> dict:
        """Seconds and faces `[N, 16]` (0, x0, y0, x1, y1, confidence, 5 x, 5 y) of each photo."""
        seconds, faces = [], []
        for path in paths:
            pixels = np.load(path)
            start = time.perf_counter()
            found = detector.detect_faces(
                pixels,
                box_format="xyxy",
                output_type="numpy",
                min_face_size=min_face_px,
                scale_factor=scale_factor,
                threshold_pnet=thresholds[0],
                threshold_rnet=thresholds[1],
                threshold_onet=thresholds[2],
                nms_pnet1=overlaps[0],
                nms_pnet2=overlaps[1],
                nms_rnet=overlaps[2],
                nms_onet=overlaps[3],
            )
            seconds.append(time.perf_counter() - start)
            faces.append(np.asarray(found).reshape(-1, 16).tolist())
        return {"seconds": seconds, "faces": faces}

    serving.serve(serving.versions("mtcnn", "tensorflow", "keras", "numpy"), {"detect": detect})


if __name__ == "__main__":
    main()
