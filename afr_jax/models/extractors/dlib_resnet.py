"""dlib's face recognition ResNet-29 in Flax, and the reader of its serialised weights.

The network is `dlib_face_recognition_resnet_model_v1` (Davis King, 2017): a 29-convolution residual
network that maps a 150 x 150 face chip to a 128-d descriptor. Two photos show the same person below
an L2 distance of 0.6. The `.dat` file is dlib's own serialization; it is read here as plain data,
nothing in it is executed.

Every convolution of the file is followed by an affine layer (a frozen BatchNorm); the reader folds
it into the convolution, so the parameters are kernels and biases alone.
"""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.models import conv, layers
from afr_jax.models.weights import conversion, installed

INPUT_SIZE = 150
EMBEDDING_SIZE = 128
# Channel means subtracted by dlib's `input_rgb_image` layer, RGB in 0..255.
_CHANNEL_MEANS = (122.782, 117.001, 104.298)
# (channels, number of blocks); the first block of every stage but the first halves the resolution.
_STAGES = ((32, 3), (64, 4), (128, 3), (256, 3), (256, 1))


class DlibResNet(nn.Module):
    """Face chips to descriptors.

    `__call__` takes images `[B, 150, 150, 3]`, float RGB in [0, 255], and returns descriptors
    `[B, 128]`, float32. They are not normalized (their L2 norm is about 1.4), as in dlib.
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Descriptors `[B, 128]` of images `[B, 150, 150, 3]` in [0, 255]."""
        x = (images - jnp.array(_CHANNEL_MEANS, images.dtype).reshape(1, 1, 1, 3)) / 256.0
        x = nn.relu(_conv(32, 7, "VALID", "conv_0", stride=2)(x))
        x = layers.max_pool(x, 3, 2)
        index = 1
        for stage, (channels, num_blocks) in enumerate(_STAGES):
            for block in range(num_blocks):
                down = stage > 0 and (block == 0)
                x = _residual_block(x, channels, down, index)
                index += 2
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(EMBEDDING_SIZE, use_bias=False, name="fc")(x)


def find_weights() -> pathlib.Path:
    """Path of the weight file in the installed `face_recognition_models` wheel (not imported).

    Raises:
        FileNotFoundError: the package or the file is missing; the message says how to get it.
    """
    return installed.find_files("dlib")[0]


def read_weights(path: pathlib.Path | str) -> conversion.Variables:
    """Reads dlib's `.dat` file into the variables of `DlibResNet`.

    Format: strings and integers carry their byte count (an integer's control byte holds the count
    in the low nibble and the sign in bit 7); a tensor is version 2, four sizes and raw
    little-endian float32. A convolution (`con_4`) stores kernel `[out, in, rows, columns]` and bias
    in one vector, an affine layer (`affine_`) gamma and beta, the last layer (`fc_2`) a
    `[256, 128]` matrix.

    Args:
        path: the file.

    Returns:
        `{"params": {...}}`, float32, kernels HWIO with the affine layers folded in.

    Raises:
        ValueError: the file is not this network (too few layers, wrong sizes, truncated).
    """
    data = pathlib.Path(path).read_bytes()
    shapes = jax.tree.map(
        lambda leaf: leaf.shape,
        jax.eval_shape(
            DlibResNet().init,
            jax.random.key(0),
            jax.ShapeDtypeStruct((1, INPUT_SIZE, INPUT_SIZE, 3), jnp.float32),
        ),
    )["params"]
    vectors = {tag: _tagged_vectors(data, tag) for tag in (b"con_4", b"affine_", b"fc_2")}
    num_convs = sum(name.startswith("conv_") for name in shapes)
    found = (len(vectors[b"con_4"]), len(vectors[b"affine_"]), len(vectors[b"fc_2"]))
    if found != (num_convs, num_convs, 1):
        raise ValueError(
            f"{path} is not dlib's face recognition ResNet: expected {num_convs} convolutions, "
            f"{num_convs} affine layers and 1 matrix, found {found[0]}, {found[1]} and {found[2]}"
        )
    params = {}
    for i, (con, affine) in enumerate(zip(vectors[b"con_4"], vectors[b"affine_"], strict=True)):
        rows, columns, num_in, num_out = shapes[f"conv_{i}"]["kernel"]
        count = rows * columns * num_in * num_out
        if con.size != count + num_out or affine.size != 2 * num_out:
            raise ValueError(
                f"{path}: convolution {i} has {con.size} values and {affine.size} affine values, "
                f"expected {count + num_out} and {2 * num_out}"
            )
        kernel = con[:count].reshape(num_out, num_in, rows, columns).transpose(2, 3, 1, 0)
        gamma, beta = affine[:num_out], affine[num_out:]
        params[f"conv_{i}"] = {"kernel": kernel * gamma, "bias": con[count:] * gamma + beta}
    matrix = vectors[b"fc_2"][0]
    if matrix.size != np.prod(shapes["fc"]["kernel"]):
        raise ValueError(f"{path}: the output matrix has {matrix.size} values, expected 256 x 128")
    params["fc"] = {"kernel": matrix.reshape(shapes["fc"]["kernel"])}
    return {"params": params}


def _residual_block(x: jax.Array, channels: int, down: bool, index: int) -> jax.Array:
    """Two 3 x 3 convolutions and a parameter-free shortcut, zero-padded to the larger shape."""
    padding, stride = ("VALID", 2) if down else ("SAME", 1)
    y = nn.relu(_conv(channels, 3, padding, f"conv_{index}", stride=stride)(x))
    y = _conv(channels, 3, "SAME", f"conv_{index + 1}")(y)
    if down:
        x = nn.avg_pool(x, (2, 2), (2, 2), padding="VALID")
        rows, columns = max(x.shape[1], y.shape[1]), max(x.shape[2], y.shape[2])
        x, y = (_zero_pad(z, rows, columns, channels) for z in (x, y))
    return nn.relu(x + y)


def _conv(channels: int, side: int, padding: str, name: str, *, stride: int = 1) -> nn.Conv:
    return nn.Conv(
        channels,
        (side, side),
        stride,
        padding=padding,
        conv_general_dilated_cls=conv.Convolution,
        name=name,
    )


def _zero_pad(x: jax.Array, rows: int, columns: int, channels: int) -> jax.Array:
    """Appends zeros to rows, columns and channels of `[B, H, W, C]`."""
    return jnp.pad(
        x, ((0, 0), (0, rows - x.shape[1]), (0, columns - x.shape[2]), (0, channels - x.shape[3]))
    )


def _tagged_vectors(data: bytes, tag: bytes) -> list[np.ndarray]:
    """The first tensor after every layer tag, flattened, in file order."""
    marker = bytes((1, len(tag))) + tag
    vectors = []
    for match in re.finditer(re.escape(marker), data):
        at = match.end()
        if tag == b"fc_2":
            # The matrix follows the layer's own settings: take the first place that holds a tensor
            # of its size.
            at = next(
                (
                    i
                    for i in range(at, min(at + 256, len(data)))
                    if _tensor_size(data, i) == 256 * 128
                ),
                len(data),
            )
        vector = _read_tensor(data, at)
        if vector is not None:
            vectors.append(vector)
    return vectors


def _read_integer(data: bytes, at: int) -> tuple[int, int]:
    """A dlib integer and the offset behind it."""
    count = data[at] & 0x0F
    value = int.from_bytes(data[at + 1 : at + 1 + count], "little")
    return (-value if data[at] & 0x80 else value), at + 1 + count


def _tensor_header(data: bytes, at: int) -> tuple[int, int] | None:
    """Number of values and offset of the first one, None where no tensor starts here."""
    try:
        version, at = _read_integer(data, at)
        sizes = []
        for _ in range(4):
            size, at = _read_integer(data, at)
            sizes.append(size)
    except IndexError:
        return None
    count = int(np.prod(sizes)) if version == 2 and min(sizes) > 0 else 0
    return (count, at) if 0 < count <= (len(data) - at) // 4 else None


def _tensor_size(data: bytes, at: int) -> int:
    header = _tensor_header(data, at)
    return header[0] if header else 0


def _read_tensor(data: bytes, at: int) -> np.ndarray | None:
    header = _tensor_header(data, at)
    return np.frombuffer(data, "<f4", header[0], header[1]).astype(np.float32) if header else None
