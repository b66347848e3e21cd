import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from scipy import ndimage

from afr_jax.core.perception import flicker, measures

_PHOTO = skimage.data.astronaut()[20:180, 150:290]


def _change(sigma, amplitude, seed=0):
    """Gray noise of a scale, of a root mean square in gray levels."""
    noise = np.random.default_rng(seed).normal(size=_PHOTO.shape[:2])
    noise = ndimage.gaussian_filter(noise, sigma)
    return (amplitude * noise / noise.std())[..., None]


def _flicker(final):
    image, original = (jnp.asarray(x, jnp.float32) / 255 for x in (final, _PHOTO))
    return float(flicker.flicker(image, original, size=jnp.array(_PHOTO.shape[:2])))


def test_the_formula_in_float64():
    final = _PHOTO + _change(1.0, 5.0)
    luma = 100 * ((final - _PHOTO) / 255) @ np.array(flicker.LUMA)
    sigma = 67 * np.sqrt(0.0047 / (2 * np.pi**2))
    seen = ndimage.gaussian_filter(luma, sigma, radius=3, mode="constant")
    known = 0.0432 * np.mean((seen**2 + 0.22**2) ** 0.35 - 0.22**0.7)
    assert _flicker(final) == pytest.approx(known, rel=1e-4)


def test_it_orders_gray_changes_as_flip_does():
    changes = [_change(s, a) for s in (0.5, 1.0, 2.0, 4.0) for a in (1.5, 3.0, 6.0)]
    finals = [np.clip(np.round(_PHOTO + change), 0, 255).astype(np.uint8) for change in changes]
    ours, theirs = (
        np.array([fn(final) for final in finals])
        for fn in (_flicker, lambda final: measures.flip(_PHOTO, final))
    )
    order = [np.argsort(np.argsort(values)) for values in (ours, theirs)]
    assert np.corrcoef(order)[0, 1] > 0.9


def test_no_change_costs_nothing_and_has_a_gradient():
    image = jnp.asarray(_PHOTO, jnp.float32) / 255
    size = jnp.array(_PHOTO.shape[:2])
    value, slope = jax.value_and_grad(lambda x: flicker.flicker(x, image, size=size))(image)
    assert abs(float(value)) < 1e-6 and np.isfinite(slope).all()


def test_only_the_part_that_counts_is_the_mean_s():
    image = jnp.zeros((40, 40, 3)).at[:20, :20].set(0.05)
    half = flicker.flicker(image, jnp.zeros_like(image), size=jnp.array([20, 40]))
    whole = flicker.flicker(image, jnp.zeros_like(image), size=jnp.array([40, 40]))
    np.testing.assert_allclose(half, 2 * whole, rtol=1e-5)


def test_pixels_that_are_two_wide_of_what_is_shown():
    """A coarse change flickers as what it is enlarged to, but for what the enlarging adds."""
    change = _change(2.0, 5.0) / 255 * np.ones(3)
    shown = np.kron(change, np.ones((2, 2, 1)))
    coarse, fine = (
        float(flicker.flicker(jnp.asarray(x), np.zeros_like(x), size=x.shape[:2], is_coarse=two))
        for x, two in ((change, True), (shown, False))
    )
    assert coarse == pytest.approx(fine, rel=0.03)
    assert coarse > 1.02 * float(flicker.flicker(jnp.asarray(change), 0.0, size=change.shape[:2]))
