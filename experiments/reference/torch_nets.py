"""IResNet and MobileFaceNet in torch, for the benchmark's row `extractor_agreement`.

Layouts and state-dict names are InsightFace's (`arcface_torch`); `GraphNet` computes a network from
the list of its layers (ncnn's vocabulary), which is the published form of MobileFaceNet-y1.
"""

import json

import numpy as np
import torch
from torch import nn


class IResNet(nn.Module):
    """Images `[B, 3, 112, 112]` in [-1, 1] to embeddings `[B, 512]`."""

    def __init__(self, blocks: tuple[int, ...]) -> None:
        """Makes the network with `blocks` residual units a stage."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        width = 64
        for stage, count in enumerate(blocks):
            units = []
            for number in range(count):
                units.append(_Unit(width, 64 << stage, 2 if number == 0 else 1))
                width = 64 << stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*units))
        self.bn2 = nn.BatchNorm2d(512)
        self.fc = nn.Linear(512 * 7 * 7, 512)
        self.features = nn.BatchNorm1d(512)

    def forward(self, images):
        """Embeddings of the images."""
        x = self.prelu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(self.bn2(x).flatten(1)))


class _Unit(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.conv1(self.bn1(x))
        y = self.bn3(self.conv2(self.prelu(self.bn2(y))))
        return y + (x if self.downsample is None else self.downsample(x))


class _Layers(nn.Module):
    """Modules in a row, under the name that InsightFace gives them."""

    def __init__(self, *modules, residual=False):
        super().__init__()
        self.layers = nn.Sequential(*modules)
        self.residual = residual

    def forward(self, x):
        y = self.layers(x)
        return x + y if self.residual else y


def _conv(inputs, outputs, kernel, stride=1, padding=0, groups=1, active=True):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    activation = [nn.PReLU(outputs)] if active else []
    return _Layers(conv, nn.BatchNorm2d(outputs), *activation)


def _bottleneck(inputs, outputs, width, stride):
    return _Layers(
        _conv(inputs, width, 1),
        _conv(width, width, 3, stride, 1, groups=width),
        _conv(width, outputs, 1, active=False),
        residual=stride == 1,
    )


class MobileFaceNet(nn.Module):
    """Images `[B, 3, 112, 112]` in [-1, 1] to embeddings `[B, 128]`: widths of the paper."""

    def __init__(self) -> None:
        """Makes the network."""
        super().__init__()
        self.layers = nn.ModuleList(
            [
                _conv(3, 64, 3, 2, 1),
                _conv(64, 64, 3, 1, 1, groups=64),
                _bottleneck(64, 64, 128, 2),
                _Layers(*[_bottleneck(64, 64, 128, 1) for _ in range(4)]),
                _bottleneck(64, 128, 256, 2),
                _Layers(*[_bottleneck(128, 128, 256, 1) for _ in range(6)]),
                _bottleneck(128, 128, 512, 2),
                _Layers(*[_bottleneck(128, 128, 256, 1) for _ in range(2)]),
            ]
        )
        self.conv_sep = _conv(128, 512, 1)
        self.features = _Layers(
            _conv(512, 512, 7, groups=512, active=False),
            nn.Flatten(),
            nn.Linear(512, 128, bias=False),
            nn.BatchNorm1d(128),
        )

    def forward(self, images):
        """Embeddings of the images."""
        for layer in self.layers:
            images = layer(images)
        return self.features(self.conv_sep(images))


class GraphNet(nn.Module):
    """A network from its list of layers: images `[B, 3, H, W]`, RGB in 0..255, to embeddings."""

    def __init__(self, graph: str, arrays: str) -> None:
        """Reads the list (`.json`) and the arrays, called <layer>/<w|b|s|m|v|a> (`.npz`)."""
        super().__init__()
        with open(graph, encoding="utf-8") as file:
            self._graph = json.load(file)
        with np.load(arrays) as file:
            self._arrays = {name: torch.from_numpy(file[name]) for name in file.files}

    def forward(self, images):
        """Embeddings of the images."""
        values = {}
        for layer in self._graph:
            inputs = [values[name] for name in layer["inputs"] if name in values]
            kind = layer["type"]
            if kind == "Input":
                value = images
            elif kind == "Split":
                values.update({f"{layer['name']}_{i}": inputs[0] for i in range(2)})
                values.update({name: inputs[0] for name in layer["outputs"]})
                continue
            else:
                value = getattr(self, f"_{kind.lower()}")(layer, *inputs)
            values[layer["outputs"][0]] = value
        return value

    def _array(self, layer, leaf):
        return self._arrays[f"{layer['name']}/{leaf}"]

    def _binaryop(self, layer, x, *others):
        parameters = layer["params"]
        other = parameters["2"] if parameters.get("1") else others[0]
        return {0: torch.add, 1: torch.sub, 2: torch.mul}[parameters["0"]](x, other)

    def _convolution(self, layer, x):
        parameters = layer["params"]
        options = {"stride": parameters["3"], "padding": parameters["4"]}
        groups = parameters.get("7", 1)
        return nn.functional.conv2d(x, self._array(layer, "w"), groups=groups, **options)

    _convolutiondepthwise = _convolution

    def _batchnorm(self, layer, x):
        shape = (1, -1, *[1] * (x.ndim - 2))
        mean, variance, scale, shift = (self._array(layer, n).reshape(shape) for n in "mvsb")
        # The variances contain the epsilon.
        return (x - mean) / variance.sqrt() * scale + shift

    def _prelu(self, layer, x):
        return nn.functional.prelu(x, self._array(layer, "a"))

    def _innerproduct(self, layer, x):
        return x.flatten(1) @ self._array(layer, "w").T + self._array(layer, "b")
