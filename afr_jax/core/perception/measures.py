"""What people see of a change to a photo: color, contrast and structure, on final 8-bit pixels."""

import io
from typing import NamedTuple

import cv2
import flip_evaluator
import numpy as np
import ssimulacra2 as ssimulacra2_package
from PIL import Image
from skimage import color

from afr_jax.core.perception import ssim

# Cb and Cr of JFIF 1.02 (ITU-R BT.601).
_TO_CHROMA = np.array([[-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
# Images are compared as they are shown: with a longer side above this many pixels, reduced to that.
# SSIMULACRA2 has all six scales from 225 pixels on. With fewer its weights, which are taken in
# order, belong to other scales, and the same change scores some 15 points more: figures of smaller
# and larger images cannot be compared, so that all are taken on one side.
_SHOWN_PX = 224
# The same for a closer look at large images.
_CLOSE_PX = 512
# Standard deviation of the blur under which tints show, as a share of the shorter side.
_TINT_BLUR = 0.02


class Visibility(NamedTuple):
    """How much a change of an image shows; all but DSSIM, PSNR and L-inf at most 224 pixels wide.

    Attributes:
        ssimulacra2: Sneyers' measure (libjxl), 100 for equal images; by its author 90 is not told
            apart in a flicker test, 85 in a flip test, 80 side by side, and 70 is hard to notice
            without the original. It was made for compression, and hardly counts fine noise.
        ssimulacra2_close: the same at most 512 pixels wide; lower for larger images, also because
            there it counts more scales (`shown`).
        dssim: `ssim.dssim_uint8`, 0 for equal images.
        ciede2000_mean: difference of color (CIEDE2000, ISO/CIE 11664-6), mean over the pixels; 1
            is about what can just be told apart side by side.
        ciede2000_p99: the same, its 99th percentile.
        chroma: mean length of the low-passed change of (Cb, Cr), in gray levels: tinted patches.
        flip: LDR-FLIP (Andersson et al., "FLIP: A Difference Evaluator for Alternating Images", HPG
            2020), mean at 67 pixels a degree, in [0, 1].
        psnr: peak signal to noise ratio, dB; None for equal images.
        linf: largest change of a channel, in gray levels.
    """

    ssimulacra2: float
    ssimulacra2_close: float
    dssim: float
    ciede2000_mean: float
    ciede2000_p99: float
    chroma: float
    flip: float
    psnr: float | None
    linf: int


def measure(original: np.ndarray, final: np.ndarray) -> Visibility:
    """Measures a change.

    Args:
        original: `[H, W, 3]` uint8 sRGB, sides of at least 11.
        final: Of the same shape.
    """
    pair = shown(original, final)
    likeness = ssimulacra2(*pair)
    is_small = pair[0] is original
    close = None if is_small else shown(original, final, most_px=_CLOSE_PX)
    differences = ciede2000(*pair)
    change = final.astype(np.float64) - original
    square = float(np.mean(change**2))
    return Visibility(
        ssimulacra2=likeness,
        ssimulacra2_close=likeness if close is None else ssimulacra2(*close),
        dssim=ssim.dssim_uint8(original, final),
        ciede2000_mean=float(differences.mean()),
        ciede2000_p99=float(np.percentile(differences, 99)),
        chroma=tint(*pair),
        flip=flip(*pair),
        psnr=float(10 * np.log10(255**2 / square)) if square else None,
        linf=int(np.abs(change).max()),
    )


def shown(
    original: np.ndarray, final: np.ndarray, *, most_px: int = _SHOWN_PX
) -> tuple[np.ndarray, np.ndarray]:
    """Two images `[H, W, 3]` uint8, reduced by area to a longer side of at most 224 pixels."""
    height, width = original.shape[:2]
    share = most_px / max(height, width)
    if share >= 1:
        return original, final
    size = (max(round(share * width), 1), max(round(share * height), 1))
    first, second = (cv2.resize(x, size, interpolation=cv2.INTER_AREA) for x in (original, final))
    return first, second


def ssimulacra2(original: np.ndarray, final: np.ndarray) -> float:
    """SSIMULACRA2 of two images `[H, W, 3]` uint8 with sides of at least 8; see `Visibility`."""
    files = []
    for image in (original, final):
        files.append(io.BytesIO())
        Image.fromarray(image).save(files[-1], "bmp")
    return float(ssimulacra2_package.compute_ssimulacra2(*files))


def flip(original: np.ndarray, final: np.ndarray) -> float:
    """LDR-FLIP of two images `[H, W, 3]` uint8; see `Visibility`."""
    pair = [image.astype(np.float32) / 255 for image in (original, final)]
    return float(flip_evaluator.evaluate(pair[0], pair[1], "LDR", applyMagma=False)[1])


def ciede2000(original: np.ndarray, final: np.ndarray) -> np.ndarray:
    """Difference of color at every pixel, `[H, W]`, of two images `[H, W, 3]` uint8."""
    return color.deltaE_ciede2000(color.rgb2lab(original), color.rgb2lab(final))


def tint(original: np.ndarray, final: np.ndarray, *, where: np.ndarray | None = None) -> float:
    """Mean length of the low-passed change of (Cb, Cr), in gray levels.

    Args:
        original: `[H, W, 3]` uint8, as the other.
        final: Of the same shape.
        where: `[H, W]` bool, the pixels whose mean is taken, one or more; all by default.
    """
    change = final.astype(np.float32) - original
    chroma = np.stack([change @ row for row in _TO_CHROMA], axis=-1)
    sigma = max(_TINT_BLUR * min(change.shape[:2]), 1.0)
    smooth = cv2.GaussianBlur(chroma, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    length = np.hypot(smooth[..., 0], smooth[..., 1])
    return float((length if where is None else length[where]).mean())


def gray_tolerance(pixels: np.ndarray) -> np.ndarray:
    """By how many gray levels pixels may get lighter or darker for a CIEDE2000 of about 1.

    Args:
        pixels: `[H, W, 3]` uint8.

    Returns:
        `[H, W]` float32, > 0.
    """
    return _tolerances()[cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)]


def _tolerances() -> np.ndarray:
    """`gray_tolerance` of the 256 grays."""
    grays = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    lightness = color.rgb2lab(grays[None])[0, :, 0]
    slope = np.gradient(lightness)
    square = (lightness - 50) ** 2
    return ((1 + 0.015 * square / np.sqrt(20 + square)) / slope).astype(np.float32)
