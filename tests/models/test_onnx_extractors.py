"""Extractors whose weights are ONNX files, against onnxruntime on the same file and chips."""

import jax
import make_extractor_references as references
import make_onnx_references
import numpy as np
import onnx_writer as onnx
import pytest

from afr_jax.models.extractors import registry, sface
from afr_jax.models.weights import conversion

_EXTRACTOR = registry.get("sface")


def _unit(embeddings):
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def variables():
    return registry.load_variables(_EXTRACTOR, None)


@pytest.fixture(scope="module")
def embeddings(variables):
    """Of the chips whose embeddings by onnxruntime are stored."""
    embed_fn = jax.jit(registry.embed, static_argnums=0)
    return np.asarray(embed_fn(_EXTRACTOR, variables, references.published_chips()))


def test_sface_equals_what_onnxruntime_said(embeddings):
    with np.load(make_onnx_references.SFACE) as file:
        theirs = _unit(file["embeddings"])
    # Sums of thousands of float32 products in another order.
    np.testing.assert_allclose(embeddings, theirs, atol=1e-5)
    # The oracle sees differences.
    assert np.abs(theirs[0] - theirs[1]).max() > 0.1


def test_sface_equals_onnxruntime(embeddings):
    pytest.importorskip("onnxruntime")
    chips = 255 * references.published_chips()
    theirs = make_onnx_references.embed(sface.find_weights(), chips)
    np.testing.assert_allclose(embeddings, _unit(theirs), atol=1e-5)


def _float_file(variables) -> list[list]:
    """The arrays of SFace as the float file of OpenCV's model zoo names them."""
    arrays = {"scalar_op1": np.float32([127.5]), "scalar_op2": np.float32([1 / 128])}
    fill = conversion.fill

    def note(path, shapes, found, entry_fn, **options):
        arrays.update({name: found[name] for name in found if not name.endswith("_shape")})
        return fill(path, shapes, found, entry_fn, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "fill", note)
        sface.read_weights(sface.find_weights())
    return [onnx.tensor(name, array) for name, array in arrays.items()]


def test_the_float_file_is_read(tmp_path, variables):
    path = onnx.write(tmp_path / "sface.onnx", _float_file(variables))
    found = registry.load_variables(_EXTRACTOR, path)
    assert registry.fingerprint(found) == registry.fingerprint(variables)


@pytest.mark.parametrize(
    "tensors, match",
    [
        ([], "scalar_op1 is not 127.5"),
        ([("scalar_op1", [127.5]), ("scalar_op2", [1.0])], "scalar_op2 is not 0.0078125"),
        ([("scalar_op1", [127.5]), ("scalar_op2", [1 / 128])], "missing .*conv_1_conv2d_weight"),
    ],
)
def test_other_networks_are_refused(tmp_path, tensors, match):
    tensors = [onnx.tensor(name, np.float32(values)) for name, values in tensors]
    path = onnx.write(tmp_path / "net.onnx", tensors)
    with pytest.raises(ValueError, match=match):
        sface.read_weights(path)
    with pytest.raises(ValueError, match="the only form"):
        sface.read_weights(references.REFERENCES / "torch.pt")
