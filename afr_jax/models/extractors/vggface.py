"""VGG-Face in Flax, and the reader of its Keras weights.

Parkhi, Vedaldi, Zisserman: "Deep Face Recognition", BMVC 2015. The embedding is that of the
`deepface` package: the second hidden layer behind its ReLU. The weights take BGR; `deepface`, whose
thresholds the registry has, gives them values in [0, 1] and subtracts no mean.
"""

import os

import flax.linen as nn
import jax

from afr_jax.models import layers
from afr_jax.models.weights import conversion, formats

INPUT_SIZE = 224
EMBEDDING_SIZE = 4096
# Channels of the 3 x 3 convolutions; a 2 x 2 max pooling follows each stage.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_DROPOUT_RATE = 0.5


class VggFace(nn.Module):
    """Chips `[B, 224, 224, 3]`, BGR in [0, 1], to embeddings `[B, 4096]`, not of unit length."""

    @nn.compact
    def __call__(self, chips: jax.Array, *, train: bool = False) -> jax.Array:
        """Embeddings; `train` needs the `dropout` key."""
        x = chips
        for stage, widths in enumerate(_STAGES, start=1):
            for number, features in enumerate(widths, start=1):
                x = nn.relu(nn.Conv(features, (3, 3), padding=1, name=f"conv{stage}_{number}")(x))
            x = layers.max_pool(x, 2, 2)
        x = nn.relu(nn.Dense(EMBEDDING_SIZE, name="fc6")(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(_DROPOUT_RATE, deterministic=not train)(x)
        return nn.relu(nn.Dense(EMBEDDING_SIZE, name="fc7")(x))


def read_weights(path: str | os.PathLike[str]) -> conversion.Variables:
    """Reads the variables of `VggFace` from a Keras file (`vgg_face_weights.h5` of `deepface`).

    Args:
        path: the file. Keras numbers the layers anew in every process, so they are taken in their
            order, not by name; the classifier at the end is left out.

    Returns:
        `{"params": ...}`, float32.

    Raises:
        ValueError: the file is damaged or does not hold this network.
    """
    kind, arrays = formats.read_arrays(path)
    if kind != "keras":
        raise ValueError(f"{path} is no Keras weight file, the only form of VGG-Face that is read")
    scopes = [
        f"conv{stage}_{number}"
        for stage, widths in enumerate(_STAGES, start=1)
        for number in range(1, len(widths) + 1)
    ] + ["fc6", "fc7", "classifier"]
    found = list(dict.fromkeys(name.rpartition("/")[0] for name in arrays))
    ours = {theirs: scope for theirs, scope in zip(found, scopes, strict=False)}
    renamed = {}
    for name, array in arrays.items():
        layer, _, leaf = name.rpartition("/")
        renamed[f"{ours.get(layer, layer)}/{leaf}"] = array

    def entry(leaf: tuple[str, ...], shape: tuple[int, ...]) -> conversion.Entry:
        name = "/".join(leaf[1:])
        # In the file the hidden layers are convolutions of 7 x 7 and of 1 x 1.
        stored = {"fc6/kernel": (7, 7, 512, 4096), "fc7/kernel": (1, 1, 4096, 4096)}
        return conversion.Entry(name, stored.get(name, shape), lambda array: array.reshape(shape))

    shapes = {"params": conversion.shapes(VggFace(), INPUT_SIZE)["params"]}
    return conversion.fill(
        path, shapes, renamed, entry, ignore_fn=lambda name: name.startswith("classifier/")
    )
