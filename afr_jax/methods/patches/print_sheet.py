"""What patches are printed from: PNG files, and a PDF page with each at its true size."""

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image
from reportlab.lib import pagesizes, units, utils
from reportlab.pdfgen import canvas

_MARGIN_MM, _GAP_MM, _LINE_MM = 15.0, 12.0, 6.0
_FONT_POINTS = 9


def pdf(
    pictures: Mapping[str, np.ndarray],
    sizes_mm: Mapping[str, tuple[float, float]],
    *,
    note: str = "",
) -> bytes:
    """One A4 page with pictures below each other, their names and sizes, and a 50 mm ruler.

    Args:
        pictures: Each picture `[h, w]` uint8, 0 black, by its name.
        sizes_mm: Height and width of each on paper, in millimeters.
        note: A line of ASCII text at the top.

    Returns:
        The file; the same bytes for the same arguments.

    Raises:
        ValueError: The pictures do not fit on the page.
    """
    width, height = (length / units.mm for length in pagesizes.A4)
    buffer = io.BytesIO()
    # Invariant: without the time of day. Uncompressed: a few lines that people and tests can read.
    page = canvas.Canvas(buffer, pagesize=pagesizes.A4, invariant=True, pageCompression=0)
    page.setFont("Helvetica", _FONT_POINTS)
    top = height - _MARGIN_MM
    for line in (note, "Print at 100 %, without fitting to the page. The bar is 50 mm long."):
        page.drawString(_MARGIN_MM * units.mm, top * units.mm, line)
        top -= _LINE_MM
    page.rect(*(length * units.mm for length in (_MARGIN_MM, top - 1, 50, 1)), stroke=0, fill=1)
    top -= _GAP_MM
    for name, picture in pictures.items():
        tall, wide = sizes_mm[name]
        if wide > width - 2 * _MARGIN_MM or top - tall - _LINE_MM < _MARGIN_MM:
            raise ValueError(f"{name}, {tall:.0f} x {wide:.0f} mm, does not fit on an A4 page")
        line = f"{name}: {tall:.1f} mm high, {wide:.1f} mm wide"
        page.drawString(_MARGIN_MM * units.mm, top * units.mm, line)
        low = top - 2 - tall
        image = utils.ImageReader(Image.fromarray(np.ascontiguousarray(picture, np.uint8)))
        page.drawImage(
            image,
            x=_MARGIN_MM * units.mm,
            y=low * units.mm,
            width=wide * units.mm,
            height=tall * units.mm,
        )
        top = low - _GAP_MM
    page.showPage()
    page.save()
    return buffer.getvalue()


def png(picture: np.ndarray) -> bytes:
    """A PNG file of a picture `[h, w]` or `[h, w, 3]` uint8."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
