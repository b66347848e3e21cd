"""What other packages say of the sample portrait: the oracles of the model and detector tests.

    python tests/make_references.py dlib      # needs dlib-bin and face_recognition_models
    python tests/make_references.py mtcnn     # needs mtcnn and tensorflow

The first writes tests/references/dlib_descriptors.npz, the second mtcnn_faces.json beside it. The
tests make the same images from the portrait by `chips` and `scenes`, so only results are stored.
"""

import json
import pathlib
import sys

import numpy as np
import skimage.data

DESCRIPTORS = pathlib.Path(__file__).parent / "references" / "dlib_descriptors.npz"
FACES = pathlib.Path(__file__).parent / "references" / "mtcnn_faces.json"


def chips() -> np.ndarray:
    """`[4, 150, 150, 3]` uint8: the face from near and from far, its mirror image, no face."""
    photo = skimage.data.astronaut()
    near = photo[85:160, 186:261].repeat(2, axis=0).repeat(2, axis=1)
    face = photo[40:190, 150:300]
    return np.stack([near, face, face[:, ::-1], halve(photo[200:500, 100:400])])


def scenes() -> dict[str, np.ndarray]:
    """Photos by name, uint8: the portrait, and seven faces of two sizes, some of them mirrored."""
    photo = skimage.data.astronaut()
    face = photo[20:220, 110:310]
    small = halve(face)
    quarters = np.block([[[small], [small[:, ::-1]]], [[small[:, ::-1]], [small]]])
    return {
        "portrait": photo,
        "seven": np.block([[[face], [quarters]], [[face[:, ::-1]], [face]]]),
    }


def halve(pixels: np.ndarray) -> np.ndarray:
    """A photo of even sides, uint8, at half its size: the rounded mean of every 2 x 2 pixels."""
    rows, columns = pixels.shape[0] // 2, pixels.shape[1] // 2
    mean = pixels.reshape(rows, 2, columns, 2, 3).mean(axis=(1, 3))
    return np.round(mean).astype(np.uint8)


def _write_descriptors() -> None:
    import dlib

    from afr_jax.models.extractors import dlib_resnet

    net = dlib.face_recognition_model_v1(str(dlib_resnet.find_weights()))
    descriptors = [net.compute_face_descriptor(np.ascontiguousarray(chip)) for chip in chips()]
    np.savez(DESCRIPTORS, descriptors=np.array(descriptors, np.float32))


def _write_faces() -> None:
    import mtcnn

    detector = mtcnn.MTCNN()
    found = {}
    for name, photo in scenes().items():
        # Columns: image, box (x, y, x, y), confidence, five x, five y.
        rows = detector.detect_faces(photo, output_type="numpy", box_format="xyxy")
        found[name] = [
            {
                "box": np.array(row[[2, 1, 4, 3]], float).round(3).tolist(),
                "confidence": round(float(row[5]), 5),
                "landmarks": np.array([row[11:16], row[6:11]], float).T.round(3).tolist(),
            }
            for row in sorted(rows, key=lambda row: -row[5])
        ]
    FACES.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    {"dlib": _write_descriptors, "mtcnn": _write_faces}[sys.argv[1]]()
