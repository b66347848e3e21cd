"""Extractors whose weights are ONNX files, against onnxruntime on the same file and chips."""

import jax
import make_extractor_references as references
import make_onnx_references
import numpy as np
import onnx_writer as onnx
import pytest
import torch_oracle
import torch_writer

from afr_jax.models.extractors import iresnet, iresnet_onnx, registry, sface, vit
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
        ([("scalar_op1", [127.5]), ("scalar_op2", [1 / 128])], "missing .*conv_1_batchnorm"),
    ],
)
def test_other_networks_are_refused(tmp_path, tensors, match):
    tensors = [onnx.tensor(name, np.float32(values)) for name, values in tensors]
    path = onnx.write(tmp_path / "net.onnx", tensors)
    with pytest.raises(ValueError, match=match):
        sface.read_weights(path)
    with pytest.raises(ValueError, match="the only form"):
        sface.read_weights(references.REFERENCES / "torch.pt")


# IResNets that torch exported.

_SMALL = iresnet.IResNet((1, 2, 1, 1), widths=(4, 6, 8, 10), embedding_size=12)


class _Export:
    """The graph that torch exports of an IResNet, with random weights.

    `state` is the state dict that it was exported from; `folded` tells whether a BatchNorm is part
    of the convolution before it.
    """

    def __init__(self, module: iresnet.IResNet, *, folded: bool, epsilon: float = 1e-5) -> None:
        self.module, self.folded, self.epsilon = module, folded, epsilon
        self.nodes, self.tensors, self.state = [], [], {}
        self._names = iter(range(1000))

    def fields(self) -> tuple[list, list]:
        """Tensors and nodes."""
        x = self._conv_norm("x", "conv1", "bn1", self.module.widths[0], 3)
        x = self._prelu(x, "prelu", self.module.widths[0])
        before = self.module.widths[0]
        for stage, count in enumerate(self.module.blocks):
            width = self.module.widths[stage]
            for number in range(count):
                name, stride = f"layer{stage + 1}.{number}", 1 if number else 2
                y = self._norm(x, f"{name}.bn1", before)
                y = self._conv_norm(y, f"{name}.conv1", f"{name}.bn2", width, before)
                y = self._prelu(y, f"{name}.prelu", width)
                y = self._conv_norm(y, f"{name}.conv2", f"{name}.bn3", width, width, stride)
                if number == 0:
                    down = f"{name}.downsample"
                    x = self._conv_norm(x, f"{down}.0", f"{down}.1", width, before, stride, 1)
                x = self._node("Add", [y, x])
                before = width
        x = self._norm(x, "bn2", before)
        x = self._node("Flatten", [x], axis=1)
        size = self.module.embedding_size
        matrix = self._array("fc.weight", (size, before * 49))
        names = [self._store(matrix), self._store(self._array("fc.bias", (size,)))]
        x = self._node("Gemm", [x, *names], alpha=1.0, beta=1.0, transB=1)
        self._norm(x, "features", size, result="y")
        return self.tensors, self.nodes

    def _node(self, operator, inputs, result=None, **settings):
        result = result or f"v{next(self._names)}"
        self.nodes.append(onnx.node(operator, inputs, [result], **settings))
        return result

    def _array(self, name, shape):
        fan_in = references.random_weights.torch_fan_in(shape)
        array = references.random_weights.random_array(references.SEED, name, shape, fan_in)
        self.state[name] = array
        return array

    def _store(self, array, name=None):
        name = name or str(next(self._names))
        self.tensors.append(onnx.tensor(name, np.float32(array)))
        return name

    def _statistics(self, name, size):
        leaves = ("weight", "bias", "running_mean", "running_var")
        return [self._array(f"{name}.{leaf}", (size,)) for leaf in leaves]

    def _norm(self, x, name, size, result=None):
        names = [self._store(array) for array in self._statistics(name, size)]
        return self._node("BatchNormalization", [x, *names], result, epsilon=self.epsilon)

    def _prelu(self, x, name, size):
        slope = self._array(f"{name}.weight", (size,))
        return self._node("PRelu", [x, self._store(slope[:, None, None])])

    def _conv_norm(self, x, name, norm, outputs, inputs, stride=1, side=3):
        kernel = self._array(f"{name}.weight", (outputs, inputs, side, side))
        settings = {"strides": [stride] * 2, "pads": [side // 2] * 4, "kernel_shape": [side] * 2}
        settings |= {"group": 1, "dilations": [1, 1]}
        if not self.folded:
            x = self._node("Conv", [x, self._store(kernel)], **settings)
            return self._norm(x, norm, outputs)
        scale, bias, mean, variance = (np.float64(a) for a in self._statistics(norm, outputs))
        scale = scale / np.sqrt(variance + self.epsilon)
        names = [self._store(kernel * scale[:, None, None, None]), self._store(bias - mean * scale)]
        return self._node("Conv", [x, *names], **settings)


def _write_export(path, module, **options):
    tensors, nodes = _Export(module, **options).fields()
    path.write_bytes(onnx.model(onnx.graph(nodes, tensors), operators=11))
    return path


def _embed(module, path):
    variables = iresnet.read_weights(path, module=module)
    chips = 2 * references.published_chips() - 1
    return _unit(np.asarray(jax.jit(module.apply)(variables, chips))), chips


@pytest.mark.parametrize(
    "module, folded",
    [
        (_SMALL, True),
        (_SMALL, False),
        pytest.param(iresnet.IResNet(iresnet.BLOCKS_50), True, marks=pytest.mark.slow),
        pytest.param(iresnet.IResNet(iresnet.BLOCKS_100), True, marks=pytest.mark.slow),
    ],
)
def test_exported_iresnets_equal_onnxruntime(tmp_path, module, folded):
    pytest.importorskip("onnxruntime")
    path = _write_export(tmp_path / "net.onnx", module, folded=folded)
    ours, chips = _embed(module, path)
    theirs = _unit(make_onnx_references.embed(path, chips))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(theirs[0] - theirs[1]).max() > 1e-3


def test_an_export_holds_the_state_dict(tmp_path):
    export = _Export(_SMALL, folded=False, epsilon=2e-5)
    tensors, nodes = export.fields()
    path = onnx.write(tmp_path / "net.onnx", tensors, nodes)
    found = iresnet_onnx.read_state_dict(path, _SMALL.blocks, epsilon=1e-5)
    assert set(found) == set(export.state)
    for name, array in export.state.items():
        shift = 1e-5 if name.endswith("running_var") else 0
        np.testing.assert_allclose(found[name], array + shift, rtol=1e-6)


def test_folded_and_unfolded_exports_are_the_same_network(tmp_path):
    unfolded, _ = _embed(_SMALL, _write_export(tmp_path / "a.onnx", _SMALL, folded=False))
    folded, _ = _embed(_SMALL, _write_export(tmp_path / "b.onnx", _SMALL, folded=True))
    np.testing.assert_allclose(unfolded, folded, atol=1e-5)


def test_nodes_that_do_nothing_are_passed(tmp_path):
    export = _Export(_SMALL, folded=True)
    tensors, nodes = export.fields()
    # Before the first convolution, and on the weights of the last BatchNorm.
    nodes[0] = onnx.node("Conv", ["x0", *_inputs(nodes[0])[1:]], ["c0"], pads=[1] * 4)
    nodes[1] = onnx.node("PRelu", ["c0", "slope"], _outputs(nodes[1]))
    slope = _inputs(export.nodes[-1])[1]
    nodes[-1] = onnx.node(
        "BatchNormalization", [*_inputs(nodes[-1])[:1], "w", *_inputs(nodes[-1])[2:]], ["y"]
    )
    nodes = [
        onnx.node("Cast", ["x"], ["x0"], to=1),
        onnx.node("Unsqueeze", ["flat"], ["slope"]),
        *nodes[:-1],
        onnx.node("Identity", [slope], ["w"]),
        nodes[-1],
    ]
    tensors.append(onnx.tensor("flat", export.state["prelu.weight"]))
    path = onnx.write(tmp_path / "net.onnx", tensors, nodes)
    found = iresnet_onnx.read_state_dict(path, _SMALL.blocks, epsilon=1e-5)
    np.testing.assert_array_equal(found["prelu.weight"], export.state["prelu.weight"])
    np.testing.assert_array_equal(found["features.weight"], export.state["features.weight"])


def _inputs(node):
    return [value for number, value in node if number == 1]


def _outputs(node):
    return [value for number, value in node if number == 2]


def _with_setting(nodes, index, **settings):
    operator = next(value for number, value in nodes[index] if number == 4)
    nodes[index] = onnx.node(operator, _inputs(nodes[index]), _outputs(nodes[index]), **settings)


def _with_operator(nodes, index, operator):
    nodes[index] = onnx.node(operator, _inputs(nodes[index]), _outputs(nodes[index]))


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda nodes: nodes.clear(), "Conv of conv1 is not where"),
        (lambda nodes: nodes.pop(1), "PRelu of prelu is not where"),
        (lambda nodes: nodes.append(nodes[0]), "Conv of conv1 is not where"),
        (lambda nodes: nodes.append(onnx.node("Sub", ["x", "a"], ["b"])), "further .*: Sub"),
        (lambda nodes: nodes.append(onnx.node("Div", ["y", "y"], ["b"])), "features|further"),
        (lambda nodes: _with_setting(nodes, 0, pads=[0] * 4), "other pads than 1"),
        (lambda nodes: _with_setting(nodes, 0, pads=[1] * 4, strides=[2, 2]), "other strides"),
        (lambda nodes: _with_setting(nodes, 0, pads=[1] * 4, group=3), "other group"),
        (lambda nodes: _with_setting(nodes, -2, transB=1, alpha=0.5), "one matrix"),
        (lambda nodes: _with_setting(nodes, -1, epsilon=[1]), "epsilon that is no number"),
        (lambda nodes: _with_setting(nodes, -2), "misshapen"),
        (lambda nodes: _with_operator(nodes, -1, "LpNormalization"), "BatchNormalization of feat"),
    ],
)
def test_other_graphs_are_refused(tmp_path, change, match):
    tensors, nodes = _Export(_SMALL, folded=True).fields()
    change(nodes)
    path = onnx.write(tmp_path / "net.onnx", tensors, nodes)
    with pytest.raises(ValueError, match=match) as error:
        iresnet.read_weights(path, module=_SMALL)
    assert str(path) in str(error.value)


def test_the_export_of_another_depth_is_refused(tmp_path):
    path = _write_export(tmp_path / "net.onnx", _SMALL, folded=True)
    for blocks in ((1, 1, 1, 1), (1, 3, 1, 1), (2, 2, 1, 1)):
        with pytest.raises(ValueError, match="does not hold this network"):
            iresnet.read_weights(path, module=_SMALL.clone(blocks=blocks))
    with pytest.raises(ValueError, match="does not hold this network"):
        iresnet.read_weights(sface.find_weights())


def test_flipped_bits_of_the_graph_raise_nothing_else(tmp_path):
    tensors, nodes = _Export(_SMALL, folded=True).fields()
    head = len(onnx.message([(1, each) for each in nodes]))
    path = tmp_path / "net.onnx"
    data = bytearray(onnx.model(onnx.graph(nodes, tensors)))
    random = np.random.default_rng(0)
    for _ in range(150):
        place, bit = random.integers(20, head), 1 << random.integers(8)
        data[place] ^= bit
        path.write_bytes(data)
        try:
            iresnet_onnx.read_state_dict(path, _SMALL.blocks, epsilon=1e-5)
        except ValueError as error:
            assert str(path) in str(error)
        data[place] ^= bit


# Vision transformers that torch exported.

_TRANSFORMER = vit.FaceTransformer(32, 2, num_heads=4)


class _TransformerExport:
    """The graph that torch exports of a vision transformer: matrices are turned over and renamed.

    `state` is the state dict that it was exported from.
    """

    def __init__(self, module: vit.FaceTransformer) -> None:
        self.nodes, self.tensors = [], []
        self._names = iter(range(1000))
        net = torch_oracle.Net()
        images = np.zeros((1, 3, 112, 112))
        torch_oracle.vit(net, images, module.width, module.depth, module.num_heads)
        self.state = net.state
        self._width, self._heads, self._depth = module.width, module.num_heads, module.depth

    def write(self, path):
        """Writes the file and returns its path."""
        width, heads = self._width, self._heads
        x = self._node("Conv", ["x", *self._keep("patch_embed.proj")], strides=[9, 9])
        x = self._node("Reshape", [x, self._store(np.array([1, width, 144]))])
        x = self._node("Transpose", [x], perm=[0, 2, 1])
        x = self._node("Add", [x, self._store(self.state["pos_embed"], "pos_embed")])
        for number in range(self._depth):
            name = f"blocks.{number}"
            y = self._layer_norm(x, f"{name}.norm1")
            y = self._matrix(y, f"{name}.attn.qkv")
            shape = self._store(np.array([1, 144, 3, heads, width // heads]))
            y = self._node("Transpose", [self._node("Reshape", [y, shape])], perm=[2, 0, 3, 1, 4])
            parts = [
                self._node("Gather", [y, self._store(np.array(index))], axis=0)
                for index in range(3)
            ]
            turned = self._node("Transpose", [parts[1]], perm=[0, 1, 3, 2])
            scores = self._node("MatMul", [parts[0], turned])
            scale = self._store(np.float32((width // heads) ** -0.5))
            scores = self._node("Softmax", [self._node("Mul", [scores, scale])], axis=-1)
            y = self._node(
                "Transpose", [self._node("MatMul", [scores, parts[2]])], perm=[0, 2, 1, 3]
            )
            y = self._node("Reshape", [y, self._store(np.array([1, 144, width]))])
            x = self._node("Add", [x, self._matrix(y, f"{name}.attn.proj")])
            y = self._matrix(self._layer_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
            limits = [self._store(np.float32(limit)) for limit in (0, 6)]
            y = self._matrix(self._node("Clip", [y, *limits]), f"{name}.mlp.fc2")
            x = self._node("Add", [x, y])
        x = self._node("Flatten", [self._layer_norm(x, "norm")], axis=1)
        x = self._norm(self._matrix(x, "feature.0"), "feature.1")
        self._norm(self._matrix(x, "feature.2"), "feature.3", result="y")
        path.write_bytes(onnx.model(onnx.graph(self.nodes, self.tensors), operators=17))
        return path

    def _node(self, operator, inputs, result=None, **settings):
        result = result or f"v{next(self._names)}"
        self.nodes.append(onnx.node(operator, inputs, [result], **settings))
        return result

    def _store(self, array, name=None):
        name = name or f"onnx::{next(self._names)}"
        self.tensors.append(onnx.tensor(name, array))
        return name

    def _keep(self, scope, leaves=("weight", "bias")):
        names = [f"{scope}.{leaf}" for leaf in leaves]
        return [self._store(self.state[name], name) for name in names]

    def _layer_norm(self, x, name):
        return self._node("LayerNormalization", [x, *self._keep(name)], axis=-1, epsilon=1e-5)

    def _norm(self, x, name, result=None):
        names = self._keep(name, ("weight", "bias", "running_mean", "running_var"))
        return self._node("BatchNormalization", [x, *names], result, epsilon=2e-5)

    def _matrix(self, x, name):
        turned = np.ascontiguousarray(self.state[f"{name}.weight"].T)
        y = self._node("MatMul", [x, self._store(turned)])
        if f"{name}.bias" not in self.state:
            return y
        (bias,) = self._keep(name, ("bias",))
        return self._node("Add", [bias, y])


def test_an_exported_transformer_equals_onnxruntime(tmp_path):
    pytest.importorskip("onnxruntime")
    path = _TransformerExport(_TRANSFORMER).write(tmp_path / "net.onnx")
    chips = 2 * references.published_chips() - 1
    theirs = _unit(make_onnx_references.embed(path, chips))
    variables = vit.read_weights(path, module=_TRANSFORMER)
    ours = _unit(np.asarray(jax.jit(_TRANSFORMER.apply)(variables, chips)))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(theirs[0] - theirs[1]).max() > 1e-3


def test_an_exported_transformer_is_its_state_dict(tmp_path):
    export = _TransformerExport(_TRANSFORMER)
    path = export.write(tmp_path / "net.onnx")
    state = torch_writer.write_state_dict(tmp_path / "net.pt", export.state)
    prints = [
        registry.fingerprint(vit.read_weights(each, module=_TRANSFORMER)) for each in (path, state)
    ]
    assert prints[0] == prints[1]
    for other in (_TRANSFORMER.clone(depth=1), _TRANSFORMER.clone(depth=3)):
        with pytest.raises(ValueError, match="does not hold this network's arrays"):
            vit.read_weights(path, module=other)
    with pytest.raises(ValueError, match="does not hold this network's arrays"):
        vit.read_weights(sface.find_weights())


def test_a_graph_that_bites_its_tail_is_refused(tmp_path):
    nodes = [
        onnx.node("Conv", ["b", "w"], ["a"], pads=[1, 1, 1, 1]),
        onnx.node("Identity", ["a"], ["b"]),
        onnx.node("DequantizeLinear", ["w", "w"], ["w"]),
        onnx.node("Reshape", ["w", "w"], ["w"]),
        onnx.node("Add", ["c", "c"], ["c"]),
        onnx.node("MatMul", ["c", "w"], ["c"]),
    ]
    tensors = [onnx.tensor("w", np.ones((1, 1, 3, 3), np.float32))]
    path = onnx.write(tmp_path / "net.onnx", tensors, nodes)
    for read_fn in (iresnet.read_weights, vit.read_weights, sface.read_weights):
        with pytest.raises(ValueError, match=r"net\.onnx"):
            read_fn(path)
