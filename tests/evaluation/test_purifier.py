"""The learned purifier against an eigendecomposition, and what it takes away."""

import numpy as np
import pytest

from afr_jax.evaluation.attackers import purifier


@pytest.fixture(scope="module")
def images():
    """Slopes between two colors, with a little texture."""
    generator = np.random.default_rng(4)
    colors = generator.integers(40, 216, (2, 300, 1, 1, 3))
    slopes = np.linspace(0, 1, 8).reshape(1, 8, 1, 1)
    made = colors[0] + slopes * (colors[1] - colors[0]) + generator.normal(0, 2, (300, 8, 8, 3))
    return np.clip(np.rint(made), 0, 255).astype(np.uint8)


def test_it_is_the_wiener_filter_of_the_covariance(images):
    """(C + s^2)^-1 C (x - mean) + mean, in double precision."""
    fitted = purifier.fit(images[:250], limit=0.05)
    pixels = images.reshape(300, -1) / 255.0
    known, mean = pixels[:250], pixels[:250].mean(axis=0)
    covariance = np.cov(known.T)
    gain = np.linalg.solve(covariance + 0.05**2 * np.eye(192), covariance)
    expected = (pixels[250:] - mean) @ gain + mean
    found = purifier.purify(fitted, images[250:])
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found.reshape(50, -1), np.clip(expected, 0, 1) * 255, atol=0.51)


def test_it_takes_noise_away_and_leaves_clean_images(images):
    fitted = purifier.fit(images[:250])
    held = images[250:].astype(np.float64)
    noisy = held + np.random.default_rng(2).choice([-8, 8], held.shape)
    found = purifier.purify(fitted, np.clip(noisy, 0, 255).astype(np.uint8))
    assert ((found - held) ** 2).mean() < 0.25 * 64
    assert np.abs(purifier.purify(fitted, images[250:]) - held).mean() < 2.5
    with pytest.raises(ValueError, match="two or more"):
        purifier.fit(images[:1])
