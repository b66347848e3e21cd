"""The printable page: true sizes, the same bytes, pictures that fit."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from afr_jax.methods.patches import print_sheet

_PICTURES = {"left": np.zeros((4, 6), np.uint8), "right": np.full((4, 6), 255, np.uint8)}
_SIZES = {"left": (53.0, 47.5), "right": (53.0, 47.5)}


def test_the_pdf_page_has_the_size_it_says():
    data = print_sheet.pdf(_PICTURES, _SIZES, note="for a face (140 mm)")
    assert data.startswith(b"%PDF") and data.rstrip().endswith(b"%%EOF")
    text = data.decode("latin-1")
    box = text.split("/MediaBox [")[1].split("]")[0].split()
    np.testing.assert_allclose([float(v) for v in box], [0, 0, 595.2756, 841.8898], atol=1e-3)
    placed = re.findall(r"q\n([0-9. ]+) cm\n/\S+ Do\nQ", text)
    assert len(placed) == 2
    for line in placed:
        width, _, _, height, left, bottom = (float(word) * 25.4 / 72 for word in line.split())
        np.testing.assert_allclose([width, height], [47.5, 53.0], atol=1e-3)
        assert left > 10 and bottom > 10
    # The ruler: 50 mm.
    (ruler,) = re.findall(r"n [0-9.]+ [0-9.]+ ([0-9.]+) [0-9.]+ re f", text)
    assert float(ruler) * 25.4 / 72 == pytest.approx(50, abs=1e-3)
    assert r"for a face \(140 mm\)" in text and "left: 53.0 mm high, 47.5 mm wide" in text


def test_the_pdf_page_is_the_same_bytes_every_time():
    pages = {print_sheet.pdf(_PICTURES, _SIZES, note="again") for _ in range(2)}
    assert len(pages) == 1


def test_what_does_not_fit_on_the_page_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        print_sheet.pdf({"big": np.zeros((2, 2), np.uint8)}, {"big": (300.0, 100.0)})


def test_png_keeps_every_value():
    picture = np.arange(256, dtype=np.uint8).reshape(8, 32)
    np.testing.assert_array_equal(Image.open(io.BytesIO(print_sheet.png(picture))), picture)
