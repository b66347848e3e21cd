"""P-Net, R-Net and O-Net of MTCNN in Flax, and the reader of their weights.

Zhang, Zhang, Li, Qiao: "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional
Networks", IEEE Signal Processing Letters 2016. The weights are those of the `mtcnn` wheel (MIT
license), which go back to the authors' Caffe models. The cascade around the networks is in
`afr_jax.recognition.detect`.

All networks take RGB scaled by (x - 127.5) / 128 from 0..255 (`normalize`).
"""

import functools
import io
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import lz4.frame
import numpy as np

from afr_jax.core import backend, parallel
from afr_jax.models import conv, layers
from afr_jax.models.weights import checks, conversion, installed

# Stands in for minus infinity below every activation: finite, so that masked places cannot turn
# into NaN.
_LOW = -1e6

_Pixels = TypeVar("_Pixels", jax.Array, np.ndarray)
_Size = TypeVar("_Size", int, jax.Array)


class Variables(NamedTuple):
    """Variables of the three networks, `{"params": ...}` each."""

    pnet: conversion.Variables
    rnet: conversion.Variables
    onet: conversion.Variables


class PNet(nn.Module):
    """Proposal network: a 12 x 12 face classifier slid over an image with stride 2."""

    @nn.compact
    def __call__(self, images: jax.Array, extent: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Face probability and box regression at every cell.

        Args:
            images: `[B, H, W, 3]` normalized, zero-padded behind their true size.
            extent: `[B, 2]` int, true rows and columns; or, where several images share a canvas,
                `[B, H - 2, W - 2]` bool, which places of the first convolution are an image's own.

        Returns:
            Probabilities `[B, h, w]` and regressions `[B, h, w, 4]` (x0, y0, x1, y1 in cells of 11
            px), with h = ceil((H - 2) / 2) - 4; cells past `map_size` of an image are meaningless.
        """
        x = _first_pool(
            images, extent, _Weights((3, 3, 3, 10), name="conv_1")(), _Slope(name="prelu_1")(10)
        )
        x = layers.PReLU(name="prelu_2")(_conv(16, 3, "conv_2")(x))
        x = layers.PReLU(name="prelu_3")(_conv(32, 3, "conv_3")(x))
        # One product: as a rule each takes as long.
        (kernel, bias), (face_kernel, face_bias) = (
            _Weights((1, 1, 32, channels), name=name)()
            for channels, name in ((4, "boxes"), (2, "face"))
        )
        heads = jnp.concatenate([kernel, face_kernel], -1)[0, 0]
        x = x @ heads + jnp.concatenate([bias, face_bias]).reshape(1, 1, 1, -1)
        x = x[:, :, : map_size(images.shape[2])]
        return nn.sigmoid(x[..., 5] - x[..., 4]), x[..., :4]


class _Weights(nn.Module):
    """Kernel of a shape and bias of a convolution that is not run by itself."""

    shape: tuple[int, int, int, int]

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), self.shape)
        return kernel, self.param("bias", nn.initializers.zeros, self.shape[-1:])


class _Slope(nn.Module):
    """Parameter of a PReLU, for `_first_pool`."""

    @nn.compact
    def __call__(self, channels: int) -> jax.Array:
        return self.param("slope", nn.initializers.constant(0.25), (channels,))


def propose(
    variables: conversion.Variables, images: jax.Array, extent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What `PNet` with its variables says of images; see its call."""
    return cast(tuple[jax.Array, jax.Array], PNet().apply(variables, images, extent))


class RNet(nn.Module):
    """Refinement network on 24 x 24 crops."""

    @nn.compact
    def __call__(self, crops: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Face probability `[B]` and box regression `[B, 4]` of crops `[B, 24, 24, 3]`."""
        x = layers.PReLU(name="prelu_1")(_conv(28, 3, "conv_1")(crops))
        x = layers.max_pool(layers.pad_for_pool(x, 3, 2, _LOW), 3, 2)
        x = layers.PReLU(name="prelu_2")(_conv(48, 3, "conv_2")(x))
        x = layers.max_pool(x, 3, 2)
        x = layers.PReLU(name="prelu_3")(_conv(64, 2, "conv_3")(x))
        x = layers.PReLU(name="prelu_4")(nn.Dense(128, name="dense")(_flatten(x)))
        logits = nn.Dense(2, name="face")(x)
        return nn.sigmoid(logits[:, 1] - logits[:, 0]), nn.Dense(4, name="boxes")(x)


class ONet(nn.Module):
    """Output network on 48 x 48 crops."""

    @nn.compact
    def __call__(self, crops: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Face probability `[B]`, box regression `[B, 4]` and landmarks `[B, 10]`.

        The crops are `[B, 48, 48, 3]`; the landmarks are five x then five y, as shares of the
        crop's side.
        """
        x = layers.PReLU(name="prelu_1")(_conv(32, 3, "conv_1")(crops))
        x = layers.max_pool(layers.pad_for_pool(x, 3, 2, _LOW), 3, 2)
        x = layers.PReLU(name="prelu_2")(_conv(64, 3, "conv_2")(x))
        x = layers.max_pool(x, 3, 2)
        x = layers.PReLU(name="prelu_3")(_conv(64, 3, "conv_3")(x))
        x = layers.max_pool(layers.pad_for_pool(x, 2, 2, _LOW), 2, 2)
        x = layers.PReLU(name="prelu_4")(_conv(128, 2, "conv_4")(x))
        x = layers.PReLU(name="prelu_5")(nn.Dense(256, name="dense")(_flatten(x)))
        logits = nn.Dense(2, name="face")(x)
        landmarks = nn.Dense(10, name="landmarks")(x)
        return nn.sigmoid(logits[:, 1] - logits[:, 0]), nn.Dense(4, name="boxes")(x), landmarks


# Parameter leaves of each network in the order of the weight file (Keras order: kernel, bias; one
# slope a PReLU).
_FILES = {
    "pnet": (
        PNet(),
        ("conv_1", "prelu_1", "conv_2", "prelu_2", "conv_3", "prelu_3", "boxes", "face"),
        (
            jax.ShapeDtypeStruct((1, 24, 24, 3), jnp.float32),
            jax.ShapeDtypeStruct((1, 2), jnp.int32),
        ),
    ),
    "rnet": (
        RNet(),
        ("conv_1", "prelu_1", "conv_2", "prelu_2", "conv_3", "prelu_3", "dense", "prelu_4")
        + ("boxes", "face"),
        (jax.ShapeDtypeStruct((1, 24, 24, 3), jnp.float32),),
    ),
    "onet": (
        ONet(),
        ("conv_1", "prelu_1", "conv_2", "prelu_2", "conv_3", "prelu_3", "conv_4", "prelu_4")
        + ("dense", "prelu_5", "boxes", "landmarks", "face"),
        (jax.ShapeDtypeStruct((1, 48, 48, 3), jnp.float32),),
    ),
}


def normalize(pixels: _Pixels) -> _Pixels:
    """The networks' input range from RGB in [0, 255]; NumPy arrays stay such."""
    return (pixels - 127.5) / 128.0  # pyrefly: ignore[bad-return]  A float32 array stays one.


def map_size(size: _Size) -> _Size:
    """Number of P-Net cells along an axis of `size` pixels (12 px field, stride 2)."""
    return -((2 - size) // 2) - 4


def find_weights() -> pathlib.Path:
    """Folder of the weight files in the installed `mtcnn` wheel, which is not imported.

    Raises:
        FileNotFoundError: the package or its files are missing; the message says how to get them.
    """
    return installed.find_files("mtcnn")[0].parent


def load_variables() -> Variables:
    """Variables of the networks from the installed `mtcnn` wheel, on the default device.

    Raises:
        FileNotFoundError: the package or its files are missing; the message says how to get them.
        ValueError: a file is damaged.
    """
    return parallel.place(read_weights(find_weights()))


def read_weights(folder: pathlib.Path | str) -> Variables:
    """Reads `pnet.lz4`, `rnet.lz4` and `onet.lz4` into the variables of the three networks.

    Args:
        folder: where the files are.

    Returns:
        Float32 arrays on the host.

    Raises:
        ValueError: a file is damaged, holds anything but plain arrays, or the arrays do not fit the
            network.
    """
    variables = {}
    for name, (module, order, example) in _FILES.items():
        path = pathlib.Path(folder) / f"{name}.lz4"
        arrays = _read_joblib_arrays(path)
        shapes = jax.eval_shape(module.init, jax.random.key(0), *example)["params"]
        leaves = [
            (layer, leaf)
            for layer in order
            for leaf in (("slope",) if layer.startswith("prelu") else ("kernel", "bias"))
        ]
        expected = [shapes[layer][leaf].shape for layer, leaf in leaves]
        # Keras stores the shared slopes of a convolution's PReLU as [1, 1, C].
        found = [a.shape[2:] if a.ndim == 3 and a.shape[:2] == (1, 1) else a.shape for a in arrays]
        if found != expected:
            raise ValueError(f"{path}: arrays {found} do not fit {name}, expected {expected}")
        params: dict[str, dict[str, np.ndarray]] = {}
        for (layer, leaf), shape, array in zip(leaves, expected, arrays, strict=True):
            params.setdefault(layer, {})[leaf] = np.asarray(array, np.float32).reshape(shape)
        variables[name] = {"params": params}
    return Variables(**variables)


def _first_pool(
    images: jax.Array, extent: jax.Array, weights: tuple[jax.Array, jax.Array], slope: jax.Array
) -> jax.Array:
    """Convolution 3 x 3, PReLU and 2 x 2 max pooling of `[B, H, W, 3]`, in one pass.

    A convolution in blocks gives the four values that a pooling window compares; the values are
    those of the three layers.
    """
    kernel, bias = weights
    batch, height, width, _ = images.shape
    # The next convolution takes columns in pairs.
    images = jnp.pad(images, [(0, 0), (0, 0), (0, (2 - width) % 4), (0, 0)])
    values = conv.in_blocks(images, kernel, (2, 2))
    rows, columns = values.shape[1:3]
    if extent.ndim == 3:
        extent = jnp.pad(extent, [(0, 0), (0, 2 * rows + 2 - height), (0, 2 * columns + 2 - width)])
        extent = extent.reshape(batch, rows, 2, columns, 2)

    def pool(values: jax.Array, extent: jax.Array, bias: jax.Array, slope: jax.Array) -> jax.Array:
        pooled = []
        for i, j in itertools.product(range(2), range(2)):
            value = values[:, :, :, i, j] + bias
            value = jnp.maximum(value, 0) + slope * jnp.minimum(value, 0)
            # Padding must not win the last pooling window of an image of odd size.
            if extent.ndim == 5:
                inside = extent[:, :, i, :, j]
            else:
                inside_rows = (2 * jnp.arange(rows) + i)[None] < extent[:, :1] - 2
                inside_columns = (2 * jnp.arange(columns) + j)[None] < extent[:, 1:] - 2
                inside = inside_rows[:, :, None] & inside_columns[:, None, :]
            pooled.append(jnp.where(inside[..., None], value, _LOW))
        largest = functools.reduce(jnp.maximum, pooled)
        # Windows outside reach meaningless cells only, but `winograd` adds rows up: large numbers
        # would take digits from their neighbors.
        return jnp.where(largest == _LOW, 0.0, largest)

    per_channel = (leaf.reshape(1, 1, 1, -1) for leaf in (bias, slope))
    return backend.apart(pool, values, extent, *per_channel)


def _conv(channels: int, kernel: int, name: str) -> nn.Conv:
    return nn.Conv(
        channels,
        (kernel, kernel),
        padding="VALID",
        conv_general_dilated=conv.fast_forward,
        name=name,
    )


def _flatten(x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` to `[B, W * H * C]`: the dense layers stem from column-major Caffe weights."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], -1)


class _ArrayRecord:
    """What a joblib dump says of one array; the array's bytes follow the record in the file."""

    stream: "_Stream"  # Of the unpickler; set on a subclass.
    dtype: Any
    shape: tuple[int, ...]
    order: Literal["C", "F"]

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(state)
        if getattr(self, "subclass", None) is not np.ndarray:
            raise ValueError("only plain arrays are read")
        dtype = np.dtype(self.dtype)
        if dtype.kind not in "fiu":
            raise ValueError(f"only arrays of real numbers are read, not of {dtype}")
        if getattr(self, "numpy_array_alignment_bytes", None) is not None:
            self.stream.read(self.stream.read(1)[0])
        count = int(np.prod(self.shape, dtype=np.int64))
        data = self.stream.read(count * dtype.itemsize)
        self.array = np.frombuffer(data, dtype, count).reshape(self.shape, order=self.order)


class _Stream:
    """A reader without `peek`, so that the unpickler consumes no byte beyond its own records."""

    def __init__(self, data: bytes) -> None:
        stream = io.BytesIO(data)
        self.read, self.readline, self.readinto = stream.read, stream.readline, stream.readinto


class _ArrayUnpickler(checks.Unpickler):
    """Admits the three names that a joblib dump of plain arrays needs: nothing foreign can run."""

    def __init__(self, stream: _Stream) -> None:
        super().__init__(stream)
        self._record = type("_BoundArrayRecord", (_ArrayRecord,), {"stream": stream})

    def find_class(self, module: str, name: str) -> object:
        allowed = {
            ("joblib.numpy_pickle", "NumpyArrayWrapper"): self._record,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        return allowed.get((module, name)) or super().find_class(module, name)


def _read_joblib_arrays(path: pathlib.Path) -> list[np.ndarray]:
    """The arrays of an lz4-compressed joblib dump of a list of plain arrays."""
    try:
        records = _ArrayUnpickler(_Stream(lz4.frame.decompress(path.read_bytes()))).load()
        return [record.array for record in records]
    except FileNotFoundError:
        raise
    except Exception as error:  # Any damage of the file surfaces as one clear error.
        raise ValueError(f"{path} is not a readable MTCNN weight file: {error}") from error
