"""IResNets that torch exported to ONNX, as the state dict that they were exported from.

So InsightFace's packs (buffalo, antelope) and AuraFace come. An export may fold a BatchNorm into
the convolution in front of it, and then names the results by numbers: which array is which follows
from the graph alone. It is walked from the photo to the embedding, and must be an IResNet all the
way; a BatchNorm that was folded comes back as one that adds the bias and changes nothing else.
"""

import collections
import os
from collections.abc import Sequence

import numpy as np

from afr_jax.models.weights import onnx_files

# Do nothing to values, or nothing outside of training.
_PASSED = ("Identity", "Dropout", "Cast")


def read_state_dict(
    path: str | os.PathLike[str], blocks: Sequence[int], *, epsilon: float
) -> dict[str, np.ndarray]:
    """The arrays of an IResNet in an ONNX file, under InsightFace's names in torch.

    Args:
        path: the file.
        blocks: number of residual units of each stage.
        epsilon: that the caller's BatchNorms add to their variances; variances are changed to it.

    Returns:
        The arrays by name, float32.

    Raises:
        ValueError: the file is damaged, or its graph is not this network; the message says where it
            stops to be.
    """
    graph = onnx_files.read_graph(path)
    try:
        return _Walk(graph, epsilon).state_dict(blocks)
    except ValueError as error:
        raise ValueError(f"{path} does not hold this network: {error}") from error


class _Walk:
    """A graph, what was seen of it, and the arrays that were found."""

    def __init__(self, graph: onnx_files.Graph, epsilon: float) -> None:
        self._arrays = dict(graph.arrays)
        self._epsilon = epsilon
        self._found: dict[str, np.ndarray] = {}
        self._left: dict[str, list[onnx_files.Node]] = collections.defaultdict(list)
        same: dict[str, str] = {}
        for node in graph.nodes:
            inputs = [same.get(name, name) for name in node.inputs]
            # A slope becomes one for rows and columns.
            is_slope = node.operator == "Unsqueeze" and inputs[:1] and inputs[0] in self._arrays
            if (node.operator in _PASSED or is_slope) and inputs and node.outputs:
                same[node.outputs[0]] = inputs[0]
                continue
            if node.operator == "Constant":
                continue
            for name in {name for name in inputs if name not in self._arrays}:
                self._left[name].append(node._replace(inputs=tuple(inputs)))
        convolutions = (node for node in graph.nodes if node.operator == "Conv" and node.inputs)
        self._first = next((node.inputs[0] for node in convolutions), "")
        self._first = same.get(self._first, self._first)

    def state_dict(self, blocks: Sequence[int]) -> dict[str, np.ndarray]:
        x = self._conv_norm(self._first, "conv1", "bn1", 1)
        x = self._prelu(x, "prelu")
        for stage, count in enumerate(blocks, start=1):
            for number in range(count):
                name = f"layer{stage}.{number}"
                stride = 2 if number == 0 else 1
                y = self._norm(x, f"{name}.bn1")
                y = self._conv_norm(y, f"{name}.conv1", f"{name}.bn2", 1)
                y = self._prelu(y, f"{name}.prelu")
                y = self._conv_norm(y, f"{name}.conv2", f"{name}.bn3", stride)
                if number == 0:
                    down = f"{name}.downsample"
                    x = self._conv_norm(x, f"{down}.0", f"{down}.1", stride)
                node = self._take(x, "Add", name)
                if sorted(node.inputs) != sorted((x, y)):
                    raise ValueError(f"{name} adds something else to its shortcut")
                self._take(y, "Add", name)
                x = node.outputs[0]
        x = self._norm(x, "bn2")
        x = self._take(x, "Flatten", "fc").outputs[0]
        x = self._matrix(x, "fc")
        if self._left[x]:
            x = self._norm(x, "features")
        else:
            self._set_norm("features", len(self._found["fc.bias"]))
        if rest := [node.operator for nodes in self._left.values() for node in nodes]:
            raise ValueError(f"there are further operations: {', '.join(sorted(set(rest)))}")
        return self._found

    def _take(self, value: str, operator: str, name: str) -> onnx_files.Node:
        """The one node of its kind that works on a value."""
        nodes = [node for node in self._left[value] if node.operator == operator]
        if len(nodes) != 1 or not nodes[0].outputs:
            raise ValueError(f"{operator} of {name} is not where it should be")
        self._left[value].remove(nodes[0])
        return nodes[0]

    def _array(self, node: onnx_files.Node, index: int, name: str) -> np.ndarray:
        array = self._arrays.get(node.inputs[index]) if index < len(node.inputs) else None
        if array is None or array.dtype.kind != "f" or not array.ndim:
            raise ValueError(f"{name} has no stored values")
        return array.astype(np.float32)

    def _conv_norm(self, value: str, name: str, norm: str, stride: int) -> str:
        """A convolution and its BatchNorm, whether it was folded or not."""
        node = self._take(value, "Conv", name)
        kernel = self._found[f"{name}.weight"] = self._array(node, 1, name)
        expected = {"group": 1, "dilations": 1, "strides": stride, "pads": kernel.shape[-1] // 2}
        for setting, number in expected.items():
            if _numbers(node, setting) != {number}:
                raise ValueError(f"{name} has other {setting} than {number}")
        result = node.outputs[0]
        if len(node.inputs) == 2:
            return self._norm(result, norm)
        self._set_norm(norm, len(kernel), bias=self._array(node, 2, name))
        return result

    def _set_norm(self, name: str, size: int, *, bias: np.ndarray | None = None) -> None:
        """A BatchNorm that adds a bias, and nothing else."""
        self._found[f"{name}.weight"] = np.ones(size, np.float32)
        self._found[f"{name}.bias"] = np.zeros(size, np.float32) if bias is None else bias
        self._found[f"{name}.running_mean"] = np.zeros(size, np.float32)
        self._found[f"{name}.running_var"] = np.full(size, 1 - self._epsilon, np.float32)

    def _norm(self, value: str, name: str) -> str:
        node = self._take(value, "BatchNormalization", name)
        leaves = ("weight", "bias", "running_mean", "running_var")
        for index, leaf in enumerate(leaves, start=1):
            self._found[f"{name}.{leaf}"] = self._array(node, index, name)
        own = node.settings.get("epsilon", 1e-5)
        if not isinstance(own, float):
            raise ValueError(f"{name} has an epsilon that is no number")
        self._found[f"{name}.running_var"] += np.float32(own - self._epsilon)
        return node.outputs[0]

    def _prelu(self, value: str, name: str) -> str:
        node = self._take(value, "PRelu", name)
        slope = self._array(node, 1, name)
        # One slope a channel, for all rows and columns.
        if slope.shape != (slope.size, 1, 1) and slope.ndim != 1:
            raise ValueError(f"{name} has not one slope a channel")
        self._found[f"{name}.weight"] = slope.reshape(-1)
        return node.outputs[0]

    def _matrix(self, value: str, name: str) -> str:
        node = self._take(value, "Gemm", name)
        expected = {"transA": 0, "alpha": 1, "beta": 1}
        if any(node.settings.get(name, number) != number for name, number in expected.items()):
            raise ValueError(f"{name} is not one matrix and a bias")
        matrix = self._array(node, 1, name)
        self._found[f"{name}.weight"] = matrix if node.settings.get("transB") else matrix.T
        self._found[f"{name}.bias"] = self._array(node, 2, name)
        return node.outputs[0]


def _numbers(node: onnx_files.Node, setting: str) -> set[int | float]:
    """The different numbers of a convolution's setting; absent ones have ONNX's default."""
    value = node.settings.get(setting, 0 if setting == "pads" else 1)
    return set(value) if isinstance(value, tuple) else {value}
