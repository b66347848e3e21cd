import numpy as np
import pytest
import skimage.data
import ssimulacra2
from PIL import Image

from afr_jax.core.perception import measures

_PHOTO = skimage.data.astronaut()[20:180, 150:290]


def _shifted(cb=0.0, cr=0.0, luma=0.0):
    """The photo with every pixel moved in JFIF's Y, Cb and Cr, in gray levels."""
    step = np.array([1.402 * cr, -0.344136 * cb - 0.714136 * cr, 1.772 * cb]) + luma
    room = np.clip(_PHOTO, 40, 215)
    return room, np.round(room + step).astype(np.uint8)


def test_nothing_is_seen_of_no_change():
    seen = measures.measure(_PHOTO, _PHOTO)
    assert seen.psnr is None
    assert seen._replace(psnr=0.0) == (100.0, 100.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)


def test_ssimulacra2_is_the_package_s_on_files(tmp_path):
    noise = np.random.default_rng(0).integers(-9, 10, _PHOTO.shape)
    final = np.clip(_PHOTO + noise, 0, 255).astype(np.uint8)
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path, image in zip(paths, (_PHOTO, final), strict=True):
        Image.fromarray(image).save(path)
    known = ssimulacra2.compute_ssimulacra2(*paths)
    assert measures.measure(_PHOTO, final).ssimulacra2 == pytest.approx(known, abs=1e-6)
    assert 0 < known < 95


@pytest.mark.parametrize("cb, cr", [(6.0, 0.0), (0.0, -5.0), (3.0, 4.0)])
def test_tint_is_the_change_of_smooth_chroma_and_no_other(cb, cr):
    assert measures.tint(*_shifted(cb, cr)) == pytest.approx(np.hypot(cb, cr), abs=0.3)
    assert measures.tint(*_shifted(luma=8.0)) < 1e-3
    room, tinted = _shifted(cb, cr)
    # What changes sign from pixel to pixel is no tint.
    sign = np.indices(room.shape[:2]).sum(0) % 2
    checkered = np.where(sign[..., None], tinted, 2 * room.astype(int) - tinted).astype(np.uint8)
    assert measures.tint(room, checkered) < 0.2


def test_gray_tolerance_is_about_one_ciede2000():
    gray = np.repeat(np.arange(20, 236, dtype=np.uint8).reshape(12, 18, 1), 3, axis=2)
    steps = measures.gray_tolerance(gray)
    lighter = np.clip(gray + np.round(3 * steps)[..., None], 0, 255).astype(np.uint8)
    found = measures.ciede2000(gray, lighter) / (np.round(3 * steps) / steps)
    np.testing.assert_allclose(found, 1.0, atol=0.15)


def test_flip_is_symmetric_and_grows():
    room, once = _shifted(luma=4.0)
    _, twice = _shifted(luma=8.0)
    assert 0 < measures.flip(room, once) < measures.flip(room, twice) < 1
    assert measures.flip(room, once) == pytest.approx(measures.flip(once, room), rel=0.05)


def test_the_signal_to_noise_ratio():
    room, final = _shifted(luma=5.0)
    seen = measures.measure(room, final)
    assert seen.psnr == pytest.approx(20 * np.log10(255 / 5))
    assert seen.linf == 5


def test_large_photos_are_compared_as_they_are_shown():
    large = np.kron(_PHOTO, np.ones((8, 8, 1), np.uint8))
    for most_px in (224, 512):
        first, second = measures.shown(large, 255 - large, most_px=most_px)
        assert first.shape == (most_px, round(most_px * large.shape[1] / large.shape[0]), 3)
        np.testing.assert_allclose(first.mean(), large.mean(), atol=0.5)
        np.testing.assert_allclose(first.astype(int) + second, 255, atol=1)
    assert measures.shown(_PHOTO, _PHOTO)[0] is _PHOTO


def test_limits_hold_at_224_pixels_and_a_closer_look_sees_more():
    large = np.kron(_PHOTO, np.ones((3, 3, 1), np.uint8))
    noise = np.random.default_rng(0).normal(size=(*_PHOTO.shape[:2], 1)) * 4
    final = np.clip(large + np.kron(noise, np.ones((3, 3, 1))), 0, 255).astype(np.uint8)
    seen = measures.measure(large, final)
    assert seen.ssimulacra2 == measures.ssimulacra2(*measures.shown(large, final))
    assert seen.ssimulacra2_close == measures.ssimulacra2(large, final) < seen.ssimulacra2 - 5
    small = measures.measure(_PHOTO, _shifted(luma=2.0)[1])
    assert small.ssimulacra2_close == small.ssimulacra2
