"""Random weights and chips that any Python makes alike from a seed; needs NumPy alone.

The drivers fill the original networks with them, the tests ours: stored references are a few
numbers then, not a network. An array depends on its name in the original's weight file, so a layer
in the wrong place cannot go unnoticed.
"""

import math
import zlib

import numpy as np


def random_array(seed: int, name: str, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    """The weights of one array, float32.

    Args:
        seed: of the network.
        name: in the weight file; its last part tells the kind of the array.
        shape: in the weight file.
        fan_in: number of inputs of each output, of a kernel.

    Returns:
        Kernels are uniform of variance 2 / fan_in; scales, variances and slopes lie well above
        zero; all other arrays are uniform in [-0.1, 0.1].
    """
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).random(shape, np.float32)
    leaf = name.replace("/", ".").rpartition(".")[2]
    if leaf in ("running_var", "moving_variance"):
        return 0.5 + values
    if leaf in ("running_mean", "moving_mean", "bias", "beta"):
        return 0.2 * values - np.float32(0.1)
    # One axis: the scale of a BatchNorm or the slope of a PReLU.
    if leaf == "gamma" or len(shape) == 1:
        return 0.5 + np.float32(0.5) * values
    return (2 * values - 1) * np.float32(math.sqrt(6 / fan_in))


def torch_fan_in(shape: tuple[int, ...]) -> int:
    """Number of inputs of each output of a torch kernel, `[out, in, ...]`."""
    return math.prod(shape[1:])


def keras_fan_in(shape: tuple[int, ...]) -> int:
    """Number of inputs of each output of a Keras kernel, `[..., in, out]`."""
    # A locally connected kernel begins with the number of places.
    return math.prod(shape[1:-1] if len(shape) == 3 else shape[:-1])


def random_chips(seed: int, count: int, side: int) -> np.ndarray:
    """Chips `[N, S, S, 3]` float32 in [0, 1], smooth and rough parts mixed."""
    generator = np.random.default_rng([seed, side])
    coarse = generator.random((count, 4, 4, 3), np.float32)
    cells = np.arange(side) * 4 // side
    fine = generator.random((count, side, side, 3), np.float32)
    return 0.7 * coarse[:, cells][:, :, cells] + np.float32(0.3) * fine
