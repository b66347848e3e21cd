"""TensorFlow Lite files: good ones, damaged ones, and MobileFaceNet_TF against ai-edge-litert."""

import pathlib

import jax
import make_extractor_references as references
import numpy as np
import pytest
import tflite_writer

from afr_jax.models.extractors import mobilefacenet, registry, sface
from afr_jax.models.weights import conversion, formats, tflite_files

_EXTRACTOR = registry.get("mobilefacenet_192")


# The reader.


def test_arrays_are_read_by_name(tmp_path):
    random = np.random.default_rng(0)
    arrays = {
        f"net/{name}{len(shape)}": (50 * random.normal(size=shape)).astype(name)
        for name in tflite_writer.TYPES
        for shape in ((), (5,), (2, 3, 1, 4))
    }
    tensors = [tflite_writer.tensor(name, array) for name, array in arrays.items()]
    # What is only there while the network runs.
    tensors.insert(1, ("net/relu", (1 << 20, 1 << 10), 0, None))
    kind, found = formats.read_arrays(tflite_writer.write(tmp_path / "net.bin", tensors))
    assert kind == "tflite" and list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


_GOOD = tflite_writer.tensor("a", np.float32([1, 2]))


@pytest.mark.parametrize(
    "tensors, match",
    [
        ([("a", (3,), 0, b"\0" * 8)], "'a' has not as many values"),
        ([("a", (-1, -2), 0, b"\0" * 8)], "'a' has not as many values"),
        ([("a", (1 << 30, 1 << 30), 0, b"\0" * 8)], "'a' has not as many values"),
        ([("a", (2,), 5, b"\0" * 8)], "'a' is of a type"),
        ([_GOOD, _GOOD], "two arrays 'a'"),
        ([("", *_GOOD[1:])], "has no name"),
    ],
)
def test_impossible_arrays_are_refused(tmp_path, tensors, match):
    path = tflite_writer.write(tmp_path / "net.tflite", tensors)
    with pytest.raises(ValueError, match=match) as error:
        tflite_files.read_arrays(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("num_graphs", [0, 2])
def test_files_hold_one_network(tmp_path, num_graphs):
    path = tflite_writer.write(tmp_path / "net.tflite", [_GOOD], num_graphs=num_graphs)
    with pytest.raises(ValueError, match="one network"):
        tflite_files.read_arrays(path)


def test_arrays_that_share_their_bytes_cannot_grow_without_limit(tmp_path):
    array = np.zeros(1 << 20, np.float32)
    path = tmp_path / "net.tflite"
    # All are the same four MiB; 64 MiB are always few enough.
    for count, refused in ((15, False), (100, True)):
        shared = [(f"w{index}", array.shape, 0, 0) for index in range(count)]
        tflite_writer.write(path, [tflite_writer.tensor("w", array), *shared])
        if not refused:
            assert len(tflite_files.read_arrays(path)) == count + 1
            continue
        with pytest.raises(ValueError, match="say that they unpack to"):
            tflite_files.read_arrays(path)


def test_damage_raises_nothing_else(tmp_path):
    values = np.arange(6, dtype=np.float32)
    arrays = [tflite_writer.tensor(f"net/array{index}", values) for index in range(8)]
    good = tflite_writer.write(tmp_path / "net.tflite", arrays).read_bytes()
    path = tmp_path / "damaged.tflite"
    random = np.random.default_rng(0)
    num_refused = 0
    for number in range(300):
        data = bytearray(good)
        if number < 100:
            data = data[: random.integers(8, len(data))]
        for place in random.integers(0, len(data), random.integers(1, 6)):
            data[place] = random.integers(256)
        path.write_bytes(data)
        try:
            tflite_files.read_arrays(path)
        except ValueError as error:
            num_refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert num_refused > 150


# MobileFaceNet_TF.


@pytest.fixture
def weights(shared) -> pathlib.Path:
    """The file with 192 numbers."""
    return shared / "weights" / "mobilefacenet_192.tflite"


def _interpreted(path, chips):
    """What ai-edge-litert makes of two chips in [0, 1]: embeddings `[2, 192]` of unit length."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    network = interpreter.Interpreter(str(path), num_threads=1)
    network.allocate_tensors()
    (given,), (result,) = network.get_input_details(), network.get_output_details()
    network.set_tensor(given["index"], (255 * chips - 127.5) / np.float32(128))
    network.invoke()
    embeddings = network.get_tensor(result["index"]).copy()
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


@pytest.mark.shared
def test_mobilefacenet_tf_equals_the_interpreter(weights):
    variables = registry.load_variables(_EXTRACTOR, weights)
    embed_fn = jax.jit(registry.embed, static_argnums=0)
    random = np.random.default_rng(0)
    noise = random.uniform(size=(2, 112, 112, 3)).astype(np.float32)
    for chips in (np.asarray(references.published_chips(), np.float32), noise):
        ours, theirs = embed_fn(_EXTRACTOR, variables, chips), _interpreted(weights, chips)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert np.abs(theirs[0] - theirs[1]).max() > 1e-2


@pytest.mark.shared
def test_damaged_weights_raise_nothing_else(weights, tmp_path):
    good, path = weights.read_bytes(), tmp_path / "net.tflite"
    random = np.random.default_rng(0)
    # The tables lie at the end of what a converter writes.
    for number in range(40):
        data = bytearray(good)
        if number < 5:
            data = data[: random.integers(8, len(data))]
        first = 0 if number < 15 else len(data) - 100_000
        for place in random.integers(first, len(data), 20):
            data[place] = random.integers(256)
        path.write_bytes(data)
        try:
            registry.load_variables(_EXTRACTOR, path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.shared
def test_own_files_hold_the_same_network(weights, tmp_path):
    variables = registry.load_variables(_EXTRACTOR, weights)
    conversion.write_safetensors(tmp_path / "own.safetensors", variables)
    again = registry.load_variables(_EXTRACTOR, tmp_path / "own.safetensors")
    assert registry.fingerprint(again) == registry.fingerprint(variables)


def test_other_networks_are_refused(tmp_path):
    path = tflite_writer.write(tmp_path / "net.tflite", [_GOOD])
    with pytest.raises(ValueError, match="does not hold this network's arrays"):
        registry.load_variables(_EXTRACTOR, path)
    with pytest.raises(ValueError, match="a TensorFlow Lite file"):
        mobilefacenet.read_weights(path)
    with pytest.raises(ValueError, match="no TensorFlow Lite file"):
        registry.load_variables(_EXTRACTOR, sface.find_weights())
