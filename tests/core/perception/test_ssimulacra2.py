import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data

from afr_jax.core.perception import measures, ssimulacra2

_PHOTO = skimage.data.astronaut()
_reference, _lost = jax.jit(ssimulacra2.reference), jax.jit(ssimulacra2.lost)


def _float(image):
    return jnp.asarray(image, jnp.float32) / 255


def _noisy(image, size, blur, seed=0, channels=3):
    noise = np.random.default_rng(seed).normal(size=(*image.shape[:2], channels))
    if blur:
        noise = cv2.GaussianBlur(noise, (0, 0), blur).reshape(noise.shape)
    noise *= size / noise.std()
    return np.clip(np.round(image + noise), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(320, 320), (233, 225)])
@pytest.mark.parametrize("size, blur", [(2, 0), (6, 0), (3, 1.5), (5, 4.0)])
def test_it_is_the_package_s_measure(shape, size, blur):
    image = _PHOTO[10 : 10 + shape[0], 90 : 90 + shape[1]]
    final = _noisy(image, size, blur)
    known = 100 - measures.ssimulacra2(image, final)
    reference = _reference(_float(image))
    found = _lost(_float(final), reference, size=np.array(shape))
    assert 2 < known
    # Weights below a hundredth are left out.
    assert float(found) == pytest.approx(known, rel=2e-3)


def test_only_the_part_that_counts_is_the_mean_s():
    image = _PHOTO[20:276, 100:356]
    final = _noisy(image, 4, 1.0)
    padded = [np.pad(x, [(0, 64), (0, 64), (0, 0)]) for x in (image, final)]
    found = [
        float(_lost(_float(b), _reference(_float(a)), size=np.array([256, 256])))
        for a, b in ((image, final), padded)
    ]
    assert found[0] == pytest.approx(found[1], rel=0.02)


@pytest.mark.parametrize("size", [1.5, 4.0])
def test_pixels_that_are_two_wide_of_what_is_shown(size):
    image = cv2.resize(_PHOTO[:256, 100:356], (512, 512), interpolation=cv2.INTER_CUBIC)
    small = cv2.resize(image, (256, 256), interpolation=cv2.INTER_AREA)
    change = _noisy(np.full_like(small, 128), size, 1.0, channels=1) - 128.0
    large = cv2.resize(change, (512, 512), interpolation=cv2.INTER_CUBIC)
    known = 100 - measures.ssimulacra2(image, np.clip(image + large, 0, 255).astype(np.uint8))
    found = _lost(
        _float(np.clip(small + change, 0, 255)),
        _reference(_float(small)),
        size=np.array([256, 256]),
        is_coarse=True,
    )
    assert float(found) == pytest.approx(known, rel=0.15)


def test_no_change_costs_nothing_and_the_gradient_is_that_of_differences():
    image = _float(_PHOTO[:230, :230])
    reference, size = _reference(image), jnp.array([230, 230])

    def lost(change):
        return ssimulacra2.lost(image + change, reference, size=size)

    lost_and_slope = jax.jit(jax.value_and_grad(lost))
    value, slope = lost_and_slope(jnp.zeros_like(image))
    assert float(value) < 0.5 and np.isfinite(slope).all()
    rng = np.random.default_rng(1)
    start = jnp.asarray(0.02 * rng.normal(size=image.shape), jnp.float32)
    _, slope = lost_and_slope(start)
    # Not along the gradient: there a few pixels that the fourth norms see take all of the step.
    step = 0.01 * start + 1e-6 * jnp.sign(slope)
    known = (lost_and_slope(start + step)[0] - lost_and_slope(start - step)[0]) / 2
    assert float(known) == pytest.approx(float(jnp.vdot(slope, step)), rel=0.02)
