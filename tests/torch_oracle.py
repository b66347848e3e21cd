"""Layers of torch in NumPy, double precision, on images `[B, C, H, W]`: the oracle of readers.

A `Net` makes its arrays as it is run, at random from the names that the original's state dict has
for them, and keeps them in `state`: what is written to a file afterwards is in the original's
format, and the result is what the original would say.
"""

import make_extractor_references as references
import numpy as np

_SEED = 11


class Net:
    """Layers that take an array, and the name of their arrays in the state dict."""

    def __init__(self) -> None:
        """Without arrays."""
        self.state: dict[str, np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...], kernel: bool = False) -> np.ndarray:
        """An array of the state dict, double precision."""
        if name not in self.state:
            # Only kernels need to keep the size of what goes through them.
            fan_in = references.random_weights.torch_fan_in(shape) if kernel else 100
            array = references.random_weights.random_array(_SEED, name, shape, fan_in)
            self.state[name] = np.asarray(array, np.float32)
        return self.state[name].astype(np.float64)

    def conv(self, x, name, outputs, side, *, stride=1, padding=0, depthwise=False, bias=False):
        """`Conv2d`; with `depthwise` every channel by itself."""
        inputs = x.shape[1]
        shape = (outputs, 1 if depthwise else inputs, side, side)
        kernel = self.array(f"{name}.weight", shape, kernel=True)
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        rows = np.lib.stride_tricks.sliding_window_view(x, (side, side), (2, 3))
        rows = rows[:, :, ::stride, ::stride]
        if depthwise:
            y = np.einsum("bchwij,cij->bchw", rows, kernel[:, 0])
        else:
            y = np.moveaxis(np.tensordot(rows, kernel, ((1, 4, 5), (1, 2, 3))), -1, 1)
        if bias:
            y = y + self.array(f"{name}.bias", (outputs,))[:, None, None]
        return y

    def norm(self, x, name, *, epsilon=1e-5, affine=True):
        """`BatchNorm1d` or `BatchNorm2d`, outside of training."""
        channels = x.shape[1]
        shape = (channels,) + (1,) * (x.ndim - 2)
        scale = self.array(f"{name}.weight", (channels,)) if affine else np.ones(channels)
        bias = self.array(f"{name}.bias", (channels,)) if affine else np.zeros(channels)
        mean = self.array(f"{name}.running_mean", (channels,))
        variance = self.array(f"{name}.running_var", (channels,))
        self.state[f"{name}.num_batches_tracked"] = np.array(7)
        scale = scale / np.sqrt(variance + epsilon)
        return x * scale.reshape(shape) + (bias - mean * scale).reshape(shape)

    def layer_norm(self, x, name):
        """`LayerNorm` over the last axis."""
        scale, bias = (self.array(f"{name}.{leaf}", x.shape[-1:]) for leaf in ("weight", "bias"))
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias

    def prelu(self, x, name):
        """`PReLU` with a slope a channel."""
        slope = self.array(f"{name}.weight", (x.shape[1],))[:, None, None]
        return np.where(x > 0, x, slope * x)

    def linear(self, x, name, outputs, *, bias=True):
        """`Linear` over the last axis."""
        y = x @ self.array(f"{name}.weight", (outputs, x.shape[-1]), kernel=True).T
        return y + self.array(f"{name}.bias", (outputs,)) if bias else y


def sigmoid(x):
    """The logistic function."""
    return 1 / (1 + np.exp(-x))


def adaface(net: Net, x: np.ndarray, blocks, widths, *, squeeze: bool = False) -> np.ndarray:
    """AdaFace's network, or with `squeeze` FRBench's IR-SE: images `[B, 3, 112, 112]`, `[B, 512]`.

    The units of all stages are in one list, `body`.
    """
    x = net.conv(x, "input_layer.0", widths[0], 3, padding=1)
    x = net.prelu(net.norm(x, "input_layer.1"), "input_layer.2")
    number = 0
    for count, width in zip(blocks, widths, strict=True):
        for stride in (2,) + (1,) * (count - 1):
            name = f"body.{number}"
            short = x[:, :, ::stride, ::stride]
            if x.shape[1] != width:
                short = net.conv(x, f"{name}.shortcut_layer.0", width, 1, stride=stride)
                short = net.norm(short, f"{name}.shortcut_layer.1")
            inside = f"{name}.res_layer"
            y = net.norm(x, f"{inside}.0")
            y = net.conv(y, f"{inside}.1", width, 3, padding=1)
            if squeeze:
                y = net.prelu(y, f"{inside}.2")
                y = net.conv(y, f"{inside}.3", width, 3, stride=stride, padding=1)
                y = net.norm(y, f"{inside}.4")
                mean = y.mean((2, 3), keepdims=True)
                mean = np.maximum(net.conv(mean, f"{inside}.5.fc1", width // 16, 1), 0)
                y = y * sigmoid(net.conv(mean, f"{inside}.5.fc2", width, 1))
            else:
                y = net.prelu(net.norm(y, f"{inside}.2"), f"{inside}.3")
                y = net.conv(y, f"{inside}.4", width, 3, stride=stride, padding=1)
                y = net.norm(y, f"{inside}.5")
            x = y + short
            number += 1
    if squeeze:
        x = net.norm(x, "bn2").reshape(len(x), -1)
        return net.norm(net.linear(x, "fc", 512), "features")
    x = net.norm(x, "output_layer.0").reshape(len(x), -1)
    return net.norm(net.linear(x, "output_layer.3", 512), "output_layer.4", affine=False)


def iresnet(net: Net, x: np.ndarray, blocks, widths, *, frbench: bool = False) -> np.ndarray:
    """InsightFace's network, or with `frbench` FRBench's `ir`, which has other names outside."""
    first = ("input_layer.0", "input_layer.1", "input_layer.2")
    first = first if frbench else ("conv1", "bn1", "prelu")
    before, last = ("bn_o1", "bn_o2") if frbench else ("bn2", "features")
    x = net.conv(x, first[0], widths[0], 3, padding=1)
    x = net.prelu(net.norm(x, first[1]), first[2])
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
        for number in range(count):
            name, stride = f"layer{stage}.{number}", 1 if number else 2
            short = x
            if not number:
                short = net.conv(x, f"{name}.downsample.0", width, 1, stride=stride)
                short = net.norm(short, f"{name}.downsample.1")
            y = net.conv(net.norm(x, f"{name}.bn1"), f"{name}.conv1", width, 3, padding=1)
            y = net.prelu(net.norm(y, f"{name}.bn2"), f"{name}.prelu")
            y = net.conv(y, f"{name}.conv2", width, 3, stride=stride, padding=1)
            x = net.norm(y, f"{name}.bn3") + short
    x = net.norm(x, before).reshape(len(x), -1)
    return net.norm(net.linear(x, "fc", 512), last)


def frbench_mobilefacenet(net: Net, x: np.ndarray) -> np.ndarray:
    """FRBench's MobileFaceNet with channel attention."""

    def unit(x, name, outputs, side, *, active=True, **options):
        x = net.norm(net.conv(x, f"{name}.conv", outputs, side, **options), f"{name}.bn")
        return net.prelu(x, f"{name}.prelu") if active else x

    def block(x, name, width, outputs, stride, residual):
        y = unit(x, f"{name}.conv_expand", width, 1)
        y = unit(y, f"{name}.conv_dw", width, 3, stride=stride, padding=1, depthwise=True)
        y = unit(y, f"{name}.conv_project", outputs, 1, active=False)
        taps = {64: 3, 128: 5}[outputs]
        kernel = net.array(f"{name}.eca.conv.weight", (1, 1, taps), kernel=True)[0, 0]
        # `Conv1d` does not turn its kernel over.
        mixed = np.stack([np.convolve(each, kernel[::-1], "same") for each in y.mean((2, 3))])
        y = y * sigmoid(mixed)[:, :, None, None]
        return x + y if residual else y

    x = unit(x, "conv1", 64, 3, stride=2, padding=1)
    x = unit(x, "conv2_dw", 64, 3, padding=1, depthwise=True)
    stages = (("23", "3", 128, 64, 4, 128), ("34", "4", 256, 128, 6, 256))
    for down, same, width, outputs, count, inner in (*stages, ("45", "5", 512, 128, 2, 256)):
        x = block(x, f"conv_{down}", width, outputs, 2, False)
        for number in range(count):
            x = block(x, f"conv_{same}.layers.{number}", inner, outputs, 1, True)
    x = unit(x, "conv_6_sep", 512, 1)
    x = unit(x, "output_layer.conv_dw", 512, 7, depthwise=True, active=False)
    x = net.linear(x.reshape(len(x), -1), "output_layer.fc", 512, bias=False)
    return net.norm(x, "output_layer.bn")


def foamliu_mobilefacenet(net: Net, x: np.ndarray) -> np.ndarray:
    """foamliu's MobileFaceNet: images RGB in [0, 1], `[B, 128]`."""

    def unit(x, name, outputs, side=1, *, most=6.0, **options):
        x = net.norm(net.conv(x, f"{name}.0", outputs, side, **options), f"{name}.1")
        return np.clip(x, 0, most)

    means, deviations = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    x = (x - means[:, None, None]) / deviations[:, None, None]
    x = unit(x, "conv1", 64, 3, stride=2, padding=1)
    x = net.conv(x, "dw_conv.depthwise", 64, 3, padding=1, depthwise=True)
    x = np.maximum(net.norm(x, "dw_conv.bn1"), 0)
    x = np.maximum(net.norm(net.conv(x, "dw_conv.pointwise", 64, 1), "dw_conv.bn2"), 0)
    blocks = [(128, 64, 2)] + [(128, 64, 1)] * 4 + [(256, 128, 2)] + [(256, 128, 1)] * 6
    blocks += [(512, 128, 2)] + [(256, 128, 1)] * 2
    for number, (width, outputs, stride) in enumerate(blocks):
        name = f"features.{number}.conv"
        y = unit(x, f"{name}.0", width)
        y = unit(y, f"{name}.1", width, 3, stride=stride, padding=1, depthwise=True)
        y = net.norm(net.conv(y, f"{name}.2", outputs, 1), f"{name}.3")
        x = x + y if stride == 1 else y
    x = unit(x, "conv2", 512)
    x = net.norm(net.conv(x, "gdconv.depthwise", 512, 7, depthwise=True), "gdconv.bn")
    x = net.norm(net.conv(x, "conv3", 128, 1, bias=True), "bn")
    return x.reshape(len(x), -1)


def vit(net: Net, x: np.ndarray, width: int, depth: int, heads: int) -> np.ndarray:
    """InsightFace's vision transformer."""
    x = net.conv(x, "patch_embed.proj", width, 9, stride=9, bias=True)
    x = x.reshape(len(x), width, -1).transpose(0, 2, 1)
    x = x + net.array("pos_embed", (1, *x.shape[1:]))
    net.array("mask_token", (1, 1, width))
    for number in range(depth):
        name = f"blocks.{number}"
        qkv = net.linear(
            net.layer_norm(x, f"{name}.norm1"), f"{name}.attn.qkv", 3 * width, bias=False
        )
        found = []
        for head in range(heads):
            place = slice(head * width // heads, (head + 1) * width // heads)
            query, key, value = (
                qkv[..., i * width : (i + 1) * width][..., place] for i in range(3)
            )
            scores = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(width // heads))
            found.append(scores / scores.sum(-1, keepdims=True) @ value)
        x = x + net.linear(np.concatenate(found, -1), f"{name}.attn.proj", width)
        y = net.linear(net.layer_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1", 4 * width)
        x = x + net.linear(np.clip(y, 0, 6), f"{name}.mlp.fc2", width)
    x = net.layer_norm(x, "norm").reshape(len(x), -1)
    x = net.norm(net.linear(x, "feature.0", width, bias=False), "feature.1", epsilon=2e-5)
    return net.norm(net.linear(x, "feature.2", 512, bias=False), "feature.3", epsilon=2e-5)
