"""Gray pictures on a printable PDF page, each at its true size in millimetres.

A page of PDF 1.4 (ISO 32000-1), written directly: a print must not depend on how some library
scales its figures. Host code: no JAX here.
"""

import zlib
from collections.abc import Mapping

import numpy as np

PAGE_MM = (297.0, 210.0)  # Height and width of A4 (ISO 216).
_POINTS_PER_MM = 72 / 25.4
_MARGIN_MM, _GAP_MM, _LINE_MM = 15.0, 12.0, 6.0


def pdf(
    pictures: Mapping[str, np.ndarray],
    sizes_mm: Mapping[str, tuple[float, float]],
    *,
    note: str = "",
) -> bytes:
    """One A4 page with pictures below each other, their names and sizes, and a 50 mm ruler.

    Args:
        pictures: name -> `[h, w]` uint8, 0 black.
        sizes_mm: name -> height and width on paper.
        note: a line of ASCII text at the top.

    Returns:
        The file.

    Raises:
        ValueError: the pictures do not fit on the page.
    """
    height, width = PAGE_MM
    top = height - _MARGIN_MM
    draws, images = [], []
    for line in (note, "Print at 100 %, without fitting to the page. The bar is 50 mm long."):
        draws.append(_text(line, top))
        top -= _LINE_MM
    draws.append(f"{_points(_MARGIN_MM, top - 1, 50, 1)} re f")
    top -= _GAP_MM
    for number, (name, picture) in enumerate(pictures.items()):
        tall, wide = sizes_mm[name]
        if wide > width - 2 * _MARGIN_MM or top - tall - _LINE_MM < _MARGIN_MM:
            raise ValueError(f"{name}, {tall:.0f} x {wide:.0f} mm, does not fit on an A4 page")
        draws.append(_text(f"{name}: {tall:.1f} mm high, {wide:.1f} mm wide", top))
        low = top - 2 - tall
        left, bottom, across, up = _points(_MARGIN_MM, low, wide, tall).split()
        draws.append(f"q {across} 0 0 {up} {left} {bottom} cm /I{number} Do Q")
        images.append(picture)
        top = low - _GAP_MM
    return _file("\n".join(draws).encode("ascii"), images, (height, width))


def _points(*lengths_mm: float) -> str:
    return " ".join(f"{length * _POINTS_PER_MM:.4f}" for length in lengths_mm)


def _text(line: str, top: float) -> str:
    escaped = line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
    return f"BT /F 9 Tf {_points(_MARGIN_MM, top)} Td ({escaped}) Tj ET"


def _file(content: bytes, images: list[np.ndarray], page_mm: tuple[float, float]) -> bytes:
    names = " ".join(f"/I{number} {number + 6} 0 R" for number in range(len(images)))
    box = f"0 0 {_points(page_mm[1], page_mm[0])}"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        (
            f"<< /Type /Page /Parent 2 0 R /MediaBox [{box}] /Contents 4 0 R /Resources "
            f"<< /Font << /F 5 0 R >> /XObject << {names} >> >> >>"
        ).encode(),
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for picture in images:
        data = zlib.compress(np.ascontiguousarray(picture, np.uint8).tobytes())
        head = (
            f"<< /Type /XObject /Subtype /Image /Width {picture.shape[1]} "
            f"/Height {picture.shape[0]} /ColorSpace /DeviceGray /BitsPerComponent 8 "
            f"/Filter /FlateDecode /Length {len(data)} >>"
        )
        objects.append(head.encode() + b"\nstream\n" + data + b"\nendstream")
    whole, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(whole))
        whole += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    tail = b"xref\n0 %d\n0000000000 65535 f \n%s" % (size, table)
    tail += b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (size, len(whole))
    return whole + tail
