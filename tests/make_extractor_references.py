"""What the original face extractors say of random chips: the oracles of `test_extractors.py`.

    reference/bin/python tests/make_extractor_references.py [mobilefacenet.json mobilefacenet.npz]

Runs under the Python of the references (experiments/reference/README.md), writes tests/references:
the embeddings of each network, whose weights and chips both sides make from seeds
(`random_weights.py`), and small weight files as torch and Keras write them. With the published
MobileFaceNet, its list of layers and its arrays, also that one's embeddings.
"""

import os
import pathlib
import sys

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np

REFERENCES = pathlib.Path(__file__).parent / "references"
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "experiments" / "reference"))

import random_weights  # noqa: E402

SEED = 7
NUM_CHIPS = 2
# Of an embedding, its first values are kept.
MAX_STORED = 512
# Residual units a stage of an IResNet that compiles fast; it has every kind of layer.
SMALL_BLOCKS = (1, 2, 1, 1)
# Side of the chips, and whether the network takes them in [-1, 1] instead of [0, 1].
NETWORKS = {
    "facenet": (160, True),
    "mobilefacenet": (112, True),
    "arcface_small": (112, True),
    "arcface_r50": (112, True),
    "openface": (96, False),
    "deepface": (152, False),
    "vggface": (224, False),
}


def chips(name: str) -> np.ndarray:
    """Chips `[2, S, S, 3]` in the range of a network."""
    side, is_signed = NETWORKS[name]
    images = random_weights.random_chips(SEED, NUM_CHIPS, side)
    return 2 * images - 1 if is_signed else images


def published_chips() -> np.ndarray:
    """Chips `[2, 112, 112, 3]` in [0, 1] for the published MobileFaceNet."""
    return random_weights.random_chips(SEED, NUM_CHIPS, 112)


def tiny_arrays() -> dict[str, np.ndarray]:
    """Arrays of the small torch files by name: several types, a view and a transposed array."""
    names = {"conv.weight": (3, 2, 3, 3), "norm.running_var": (3,), "norm.bias": (3,)}
    arrays = {
        name: random_weights.random_array(SEED, name, shape, 18) for name, shape in names.items()
    }
    transposed = random_weights.random_array(SEED, "fc.weight", (4, 5), 5).T
    half = random_weights.random_array(SEED, "half.bias", (6,), 1).astype(np.float16)
    return {
        **arrays,
        "norm.num_batches_tracked": np.array(3),
        "fc.weight": transposed,
        "fc.part": transposed[1:, :2],
        "half.bias": half,
        "empty": np.zeros((0, 3), np.float32),
    }


def main() -> None:
    """Writes the references."""
    import extractors_driver
    import tf_keras
    import torch

    REFERENCES.mkdir(exist_ok=True)
    extractors_driver._BLOCKS["arcface_small"] = SMALL_BLOCKS
    found = {}
    for name in NETWORKS:
        network = extractors_driver._make(name, SEED, "", "")
        found[name] = network.embed(chips(name).astype(np.float32))[:, :MAX_STORED]
    if len(sys.argv) == 3:
        network = extractors_driver._make("mobilefacenet_graph", SEED, *sys.argv[1:])
        found["mobilefacenet_y1"] = network.embed(255 * published_chips())
    np.savez_compressed(REFERENCES / "embeddings.npz", **found)

    state = {name: torch.from_numpy(np.array(array)) for name, array in tiny_arrays().items()}
    state["fc.weight"] = state["fc.weight"].T.contiguous().T
    state["fc.part"] = state["fc.weight"][1:, :2]
    module = torch.nn.Module()
    for name, value in state.items():
        module.register_buffer(name.replace(".", "_"), value)
    torch.save(state, REFERENCES / "torch.pt")
    torch.save(state, REFERENCES / "torch_legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(module.state_dict(), REFERENCES / "torch_module.pt")

    keras = tf_keras.Sequential(
        [
            tf_keras.Input((8, 8, 2)),
            tf_keras.layers.Conv2D(3, 3, name="conv"),
            tf_keras.layers.BatchNormalization(name="norm"),
        ]
    )
    for layer in keras.layers:
        values = []
        for weight in layer.weights:
            name = f"{layer.name}/{weight.name.rpartition('/')[2].partition(':')[0]}"
            values.append(random_weights.random_array(SEED, name, tuple(weight.shape), 18))
        layer.set_weights(values)
    keras.save_weights(REFERENCES / "keras.h5")


if __name__ == "__main__":
    main()
