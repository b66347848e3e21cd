"""Photo files: what is decoded and encoded, and how files are found, named and written."""

import errno
import io
import os
import pathlib
import random
import re
import stat
import struct
import sys
import threading
import warnings
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms, ImageOps, JpegImagePlugin, PngImagePlugin

from afr_jax.core import files
from afr_jax.data import identities, photo_files, photos

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LOSSLESS = {
    "PNG": {},
    "WEBP": {"lossless": True, "exact": True},
    "BMP": {},
    "TIFF": {},
    "TIFF lzw": {"compression": "tiff_lzw"},
}
LOSSY = {"JPEG": {"quality": 95, "subsampling": 0}, "HEIF": {"quality": 95, "chroma": 444}}
ALL = {**LOSSLESS, **LOSSY, "GIF": {}}


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _blocks() -> np.ndarray:
    """Upright [32, 48, 3], six flat blocks, no symmetry; flat so that lossy formats keep it."""
    colors = [[250, 20, 20], [20, 200, 20], [20, 20, 220], [240, 240, 240], [10, 10, 10]]
    colors = np.array([*colors, [220, 220, 30]], np.uint8).reshape(2, 3, 3)
    return colors.repeat(16, axis=0).repeat(16, axis=1)


def _bytes(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if kind == "HEIF":
        pillow_heif.register_heif_opener()
    if kind == "GIF":
        image = image.quantize(256)
    buffer = io.BytesIO()
    image.save(buffer, kind.split()[0], **{**ALL.get(kind, {}), **options})
    return buffer.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width, height, depth, color_type, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG file by its parts, for what Pillow does not write; a row starts with its filter."""
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    body = b"".join(chunks) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + body


def _tiff(fields: dict[int, tuple[int, ...]], samples: bytes) -> bytes:
    """A TIFF file of one strip; fields hold up to two numbers of 16 bits."""
    entries = {**fields, 273: (150,), 277: (len(fields[258]),), 278: (1,), 279: (len(samples),)}
    table = b"".join(
        struct.pack("<HHI", tag, 3, len(values))
        + struct.pack("<2H", *values, *[0, 0][len(values) :])
        for tag, values in sorted(entries.items())
    )
    data = b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)
    return data.ljust(150, b"\0") + samples


def _profile(space: bytes) -> bytes:
    """The header of a color profile, enough to tell the space of its pixels."""
    header = bytearray(132)
    header[0:4] = struct.pack(">I", 132)
    header[12:24] = b"mntr" + space + b"XYZ "
    header[36:40] = b"acsp"
    return bytes(header)


def _cmyk_profile() -> bytes:
    """A valid CMYK profile of a strange press: white without cyan, black with it, whatever else."""
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    white = b"XYZ \0\0\0\0" + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    matrix = struct.pack(">9I", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    nodes = b"".join(bytes([0 if cyan else 255, 128, 128]) * 8 for cyan in (0, 1))
    lut = b"mft1\0\0\0\0\4\3\2\0" + matrix + bytes(range(256)) * 4 + nodes + bytes(range(256)) * 3
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0x\0\0\0", b"wtpt": white, b"A2B0": lut}
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">2I", 132 + 12 * len(tags) + len(body), len(data))
        body += data
    header = bytearray(128)
    header[0:4] = struct.pack(">I", 128 + len(table) + len(body))
    header[8:12] = bytes([2, 0x40, 0, 0])
    header[12:24] = b"prtrCMYKLab "
    header[36:40] = b"acsp"
    header[68:80] = struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return bytes(header) + table + body


def _exif(orientation: int = 1, kind: str = "") -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Maker"
    if kind == "TIFF lzw":
        return exif  # Pillow cannot write the other directories there.
    exif[0x8769] = {0x9003: "2024:05:06 07:08:09", 0x927C: b"PREVIEW" * 4, 0xA002: 48}
    exif[0x8825] = {1: "N", 2: (48.0, 51.0, 29.5)}
    return exif


def _exif_of(png: bytes) -> Image.Exif:
    return Image.open(io.BytesIO(png)).getexif()


# Decoding: formats, orientation


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_are_exact(kind):
    pixels = _noise(9, 14, 3)
    photo = photos.decode_photo(_bytes(pixels, kind))
    np.testing.assert_array_equal(photo.pixels, pixels)
    assert photo.pixels.dtype == np.uint8 and photo.pixels.flags.writeable
    assert photo.alpha is None and not photo.gray and photo.exif is None


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_formats_are_close(kind):
    photo = photos.decode_photo(_bytes(_blocks(), kind))
    # The codecs change flat colors by a few levels; swapped channels or blocks change them by 200.
    np.testing.assert_allclose(photo.pixels.astype(int), _blocks(), atol=12)


def test_still_gif_is_read():
    np.testing.assert_array_equal(photos.decode_photo(_bytes(_blocks(), "GIF")).pixels, _blocks())


# What a camera stores of an upright image, by EXIF 2.3 section 4.6.4: the visual side that the
# stored row 0, then the stored column 0 stand for.
STORED = {
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda upright: upright[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "TIFF lzw", "JPEG", "HEIF"])
def test_orientation_is_applied_and_gone(kind, orientation):
    stored = np.ascontiguousarray(STORED[orientation](_blocks()))
    data = _bytes(stored, kind, exif=_exif(orientation, kind).tobytes())
    photo = photos.decode_photo(data)
    assert photo.pixels.shape == (32, 48, 3)
    np.testing.assert_allclose(photo.pixels.astype(int), _blocks(), atol=12 if kind in LOSSY else 0)
    png = photos.encode_png(photo, photo.pixels, keep_metadata=True)
    assert 0x0112 not in _exif_of(png) and _exif_of(png)[0x010F] == "Maker"
    np.testing.assert_array_equal(photos.decode_photo(png).pixels, photo.pixels)


def test_exif_alone_does_not_turn_heic():
    """The writer here makes a property of the format of it, as cameras do, so the bytes change."""
    data = _bytes(_blocks(), "HEIF", exif=_exif(1).tobytes())
    for before, after in (
        (b"\x12\x01\x03\x00\x01\x00\x00\x00\x01\x00", b"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00"),
        (b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x01", b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06"),
    ):
        changed = data.replace(before, after)
        if changed != data:
            break
    assert changed != data
    np.testing.assert_array_equal(
        photos.decode_photo(changed).pixels, photos.decode_photo(data).pixels
    )


def test_orientation_turns_alpha_and_wide_gray_too():
    rgba = _noise(6, 10, 4)
    photo = photos.decode_photo(_bytes(rgba, exif=_exif(6).tobytes()))
    np.testing.assert_array_equal(photo.alpha, np.rot90(rgba[:, :, 3], -1))
    levels = np.arange(60, dtype=np.uint16).reshape(6, 10) * 257
    for kind in ("PNG", "TIFF"):
        photo = photos.decode_photo(_bytes(levels, kind, exif=_exif(8).tobytes()))
        np.testing.assert_array_equal(photo.pixels[:, :, 1], np.rot90(levels // 257))


def test_mpo_gives_its_first_frame():
    frames = {"save_all": True, "append_images": [Image.new("RGB", (48, 32))]}
    data = _bytes(_blocks(), "MPO", **frames, **LOSSY["JPEG"])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    np.testing.assert_allclose(photos.decode_photo(data).pixels.astype(int), _blocks(), atol=12)


# Decoding: gray, alpha, palettes, other color spaces


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "HEIF"])
def test_gray_is_gray_again(kind):
    levels = _blocks()[:, :, 0]
    photo = photos.decode_photo(_bytes(levels, kind))
    assert photo.gray and (photo.pixels == photo.pixels[:, :, :1]).all()
    np.testing.assert_allclose(photo.pixels[:, :, 0].astype(int), levels, atol=2)
    image = Image.open(io.BytesIO(photos.encode_png(photo, photo.pixels)))
    assert image.mode == "L"
    np.testing.assert_array_equal(image, photo.pixels[:, :, 0])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_one_bit_is_black_and_white(kind):
    bits = _noise(5, 11) > 127
    photo = photos.decode_photo(_bytes(Image.fromarray(bits), kind))
    np.testing.assert_array_equal(photo.pixels[:, :, 2], bits * 255)
    # BMP has no gray: its two colors are a palette, which Pillow reads as bits where it can.
    assert photo.gray


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled_not_clipped(kind):
    levels = np.array([[0, 128, 129, 256, 257, 32767, 32768, 65406, 65407, 65535]], np.uint16)
    photo = photos.decode_photo(_bytes(levels, kind))
    expected = [0, 0, 1, 1, 1, 127, 128, 254, 255, 255]  # round(level / 257)
    assert photo.gray and photo.pixels[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    "levels, expected",
    [
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-5, 2**30, 2**31 - 1]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[-3, 127.6, 200]], np.float32), [0, 128, 200]),
        (np.array([[np.nan, 257, 65535]], np.float32), [0, 1, 255]),
        (np.array([[np.inf, 0, 1]], np.float32), [0, 0, 255]),
        (np.zeros((1, 3), np.float32), [0, 0, 0]),
    ],
)
def test_gray_without_fixed_range(levels, expected):
    photo = photos.decode_photo(_bytes(levels, "TIFF"))
    assert photo.gray and photo.pixels[0, :, 0].tolist() == expected


def test_twelve_bit_gray_tiff_reaches_white():
    samples = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00])  # 0, 2048, 4095, 0 of 12 bits each
    data = _tiff({256: (4,), 257: (1,), 258: (12,), 259: (1,), 262: (1,)}, samples)
    assert photos.decode_photo(data).pixels[0, :, 0].tolist() == [0, 128, 255, 0]


def test_sixteen_bit_color():
    rows = b"\0" + struct.pack(">6H", 65535, 0, 0x8034, 0x0100, 0x00FF, 0xFE00)
    photo = photos.decode_photo(_png(2, 1, 16, 2, rows))
    assert photo.pixels.tolist() == [[[255, 0, 128], [1, 0, 254]]]
    rows = b"\0" + struct.pack(">4H", 65535, 0x80FF, 0x0700, 65535)
    photo = photos.decode_photo(_png(2, 1, 16, 4, rows))  # Gray with alpha.
    assert photo.gray and photo.pixels[0, :, 0].tolist() == [255, 7]
    assert photo.alpha.tolist() == [[128, 255]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_exact_there_and_back(kind):
    rgba = _noise(7, 12, 4)
    photo = photos.decode_photo(_bytes(rgba, kind))
    np.testing.assert_array_equal(photo.pixels, rgba[:, :, :3])
    np.testing.assert_array_equal(photo.alpha, rgba[:, :, 3])
    new = 255 - photo.pixels
    image = Image.open(io.BytesIO(photos.encode_png(photo, new)))
    assert image.mode == "RGBA"
    np.testing.assert_array_equal(image, np.dstack([new, rgba[:, :, 3]]))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_with_alpha_there_and_back(kind):
    gray_alpha = _noise(7, 12, 2)
    photo = photos.decode_photo(_bytes(Image.fromarray(gray_alpha), kind))
    assert photo.gray
    np.testing.assert_array_equal(photo.pixels, gray_alpha[:, :, :1].repeat(3, axis=2))
    image = Image.open(io.BytesIO(photos.encode_png(photo, photo.pixels)))
    assert image.mode == "LA"
    np.testing.assert_array_equal(image, gray_alpha)


def test_premultiplied_gray_tiff():
    fields = {256: (2,), 257: (1,), 258: (8, 8), 259: (1,), 262: (1,), 338: (1,)}
    photo = photos.decode_photo(_tiff(fields, bytes([100, 128, 50, 255])))
    assert photo.alpha.tolist() == [[128, 255]] and photo.gray
    assert photo.pixels[0, :, 0].tolist() == [199, 50]  # 100 * 255 / 128 = 199.2


def test_palettes():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L")
    image = Image.frombytes("P", (3, 1), image.tobytes())
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    colors = [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    expected = {None: None, 1: [[255, 0, 255]], bytes([7, 255, 99]): [[7, 255, 99]]}
    for transparency, alpha in expected.items():
        options = {} if transparency is None else {"transparency": transparency}
        photo = photos.decode_photo(_bytes(image, **options))
        assert photo.pixels.tolist() == colors and not photo.gray
        assert (photo.alpha if alpha is None else photo.alpha.tolist()) == alpha


@pytest.mark.parametrize(
    "depth, color_type, row, color, gray, alpha",
    [
        (1, 0, b"\x50", [1], [0, 255, 0, 255], [255, 0, 255, 0]),
        (2, 0, b"\x1b", [3], [0, 85, 170, 255], [255, 255, 255, 0]),
        (8, 0, bytes([5, 6, 7, 8]), [7], [5, 6, 7, 8], [255, 255, 0, 255]),
        (16, 0, struct.pack(">4H", 0, 257, 258, 65535), [258], [0, 1, 1, 255], [255, 255, 0, 255]),
        (8, 2, bytes([9] * 3 + [8] * 9), [9] * 3, [9, 8, 8, 8], [0, 255, 255, 255]),
        (
            16,
            2,
            struct.pack(">12H", *[1000] * 3, *[2000] * 9),
            [1000] * 3,
            [3, 7, 7, 7],
            [0, 255, 255, 255],
        ),
    ],
)
def test_png_transparent_color(depth, color_type, row, color, gray, alpha):
    chunk = _chunk(b"tRNS", struct.pack(f">{len(color)}H", *color))
    photo = photos.decode_photo(_png(4, 1, depth, color_type, b"\0" + row, chunk))
    assert photo.pixels[0, :, 0].tolist() == gray
    assert photo.alpha.tolist() == [alpha]
    assert photo.gray == (color_type == 0)


INKS = np.array([[[255, 0, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255], [0, 0, 0, 0]]], np.uint8)


@pytest.mark.parametrize("profile", [None, b"no profile", SRGB, _profile(b"CMYK")])
def test_cmyk_without_a_usable_profile(profile):
    image = Image.frombytes("CMYK", (4, 1), INKS.tobytes())
    photo = photos.decode_photo(_bytes(image, "TIFF", icc_profile=profile))
    assert photo.pixels.tolist() == [[[0, 255, 255], [255, 255, 0], [0, 0, 0], [255, 255, 255]]]
    assert photo.icc_profile is None and not photo.gray


def test_cmyk_goes_through_its_profile():
    image = Image.frombytes("CMYK", (4, 1), INKS.tobytes()).resize((64, 16), 0)
    for kind in ("TIFF", "JPEG"):
        photo = photos.decode_photo(_bytes(image, kind, icc_profile=_cmyk_profile()))
        assert photo.pixels[8, 8].max() < 8  # Cyan, black on that press.
        assert photo.pixels[8, 24:].min() > 247  # Yellow, black and paper: white there.
        assert photo.icc_profile is None


@pytest.mark.parametrize("mode", ["YCbCr", "LAB"])
def test_other_color_spaces(mode):
    color = {"YCbCr": (76, 85, 255), "LAB": (138, 128 + 81, 128 + 70)}[mode]  # Red.
    photo = photos.decode_photo(_bytes(Image.new(mode, (16, 16), color), "TIFF"))
    np.testing.assert_allclose(photo.pixels[8, 8].astype(int), [254, 0, 0], atol=12)


# Profiles and metadata


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG", "HEIF"])
def test_profile_is_carried_over(kind):
    photo = photos.decode_photo(_bytes(_blocks(), kind, icc_profile=SRGB))
    assert photo.icc_profile == SRGB
    png = photos.encode_png(photo, photo.pixels)
    assert Image.open(io.BytesIO(png)).info["icc_profile"] == SRGB


@pytest.mark.parametrize(
    "shape, profile, kept",
    [
        ((8, 8), _profile(b"GRAY"), True),
        ((8, 8, 2), _profile(b"GRAY"), True),
        ((8, 8), SRGB, False),
        ((8, 8, 3), _profile(b"GRAY"), False),
        ((8, 8, 4), _profile(b"CMYK"), False),
        ((8, 8, 3), b"RGB " * 40, False),
    ],
)
def test_only_fitting_profiles_are_carried_over(shape, profile, kept):
    photo = photos.decode_photo(_bytes(Image.fromarray(_noise(*shape)), icc_profile=profile))
    assert photo.icc_profile == (profile if kept else None)
    info = Image.open(io.BytesIO(photos.encode_png(photo, photo.pixels))).info
    assert info.get("icc_profile") == photo.icc_profile


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG", "HEIF"])
def test_metadata_goes_unless_kept(kind):
    data = _bytes(_blocks(), kind, exif=_exif().tobytes())
    photo = photos.decode_photo(data)
    assert not _exif_of(photos.encode_png(photo, photo.pixels))
    exif = _exif_of(photos.encode_png(photo, photo.pixels, keep_metadata=True))
    assert exif[0x010F] == "Maker"
    assert exif.get_ifd(0x8769) == {0x9003: "2024:05:06 07:08:09"}
    assert exif.get_ifd(0x8825) == {1: "N", 2: (48.0, 51.0, 29.5)}
    assert set(exif) == {0x010F, 0x8769, 0x8825}  # No layout tags of a TIFF file.


def test_thumbnail_of_the_source_is_never_kept():
    maker = struct.pack("<HHI4s", 0x010F, 2, 4, b"abc\0")
    thumbnail = b"\xff\xd8UNCLOAKED"
    fields = struct.pack("<HHII", 0x0201, 4, 1, 56) + struct.pack("<HHII", 0x0202, 4, 1, 11)
    exif = b"II*\0" + struct.pack("<IH", 8, 1) + maker + struct.pack("<I", 26)
    exif += struct.pack("<H", 2) + fields + bytes(4) + thumbnail
    data = _bytes(_blocks(), "JPEG", exif=b"Exif\0\0" + exif)
    assert _exif_of(data).get_ifd(-1)[0x0202] == 11
    photo = photos.decode_photo(data)
    png = photos.encode_png(photo, photo.pixels, keep_metadata=True)
    assert _exif_of(png)[0x010F] == "abc"
    assert b"UNCLOAKED" in data and b"UNCLOAKED" not in png


def test_text_and_xmp_are_dropped():
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "whereabouts")
    text.add_itxt("XML:com.adobe.xmp", "<x>whereabouts</x>")
    data = _bytes(_blocks(), pnginfo=text)
    photo = photos.decode_photo(data)
    assert data.count(b"whereabouts") == 2
    assert b"whereabouts" not in photos.encode_png(photo, photo.pixels, keep_metadata=True)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0no such thing",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0" + b"II*\0\x08\0\0\0\x02\0\x0f\x01\x02\0\xff\0\0\0\xff\xff\0\0",
        _exif(1).tobytes()[:70],
    ],
)
def test_damaged_exif_does_not_harm(exif):
    for kind in ("JPEG", "PNG", "WEBP"):
        photo = photos.decode_photo(_bytes(_blocks(), kind, exif=exif))
        assert photo.pixels.shape == (32, 48, 3)
        photos.encode_png(photo, photo.pixels, keep_metadata=True)


def test_partly_damaged_exif_still_tells_the_orientation():
    fields = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x010F, 2, 255, 9999)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + fields + bytes(4)
    with pytest.warns(UserWarning, match="Skipping tag"):
        assert _exif_of(_bytes(_blocks(), "JPEG", exif=exif))[0x0112] == 6
    assert photos.decode_photo(_bytes(_blocks(), "PNG", exif=exif)).pixels.shape == (48, 32, 3)


def test_encode_png_checks_pixels():
    photo = photos.decode_photo(_bytes(_noise(4, 5, 3)))
    for pixels in (_noise(5, 4, 3), _noise(4, 5), _noise(4, 5, 3).astype(np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            photos.encode_png(photo, pixels)
    turned = _noise(5, 4, 3).swapaxes(0, 1)  # Not contiguous.
    png = photos.encode_png(photo, turned)
    np.testing.assert_array_equal(photos.decode_photo(png).pixels, turned)
    assert png == photos.encode_png(photo, turned)


# Encoding to JPEG


def _grain(*shape: int) -> np.ndarray:
    """Smooth colors with grain: what a photo is to an encoder."""
    levels = np.random.default_rng(1).normal(128, 20, (*shape, 1)) * [1.0, 0.9, 0.8]
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    levels += 60 * np.sin(rows / 9)[..., None] + 40 * np.cos(columns / 7)[..., None]
    return np.clip(levels, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [40, 75, 92])
def test_jpeg_is_encoded_as_its_file_was(quality, subsampling, progressive):
    options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
    data = _bytes(_grain(64, 80), "JPEG", **options)
    photo = photos.decode_photo(data)
    again = photos.encode_jpeg(photo, photo.pixels)
    images = [Image.open(io.BytesIO(each)) for each in (data, again)]
    assert images[0].quantization == images[1].quantization
    assert JpegImagePlugin.get_sampling(images[1]) == subsampling
    assert bool(images[1].info.get("progressive")) == progressive
    assert len(again) < 1.1 * len(data)
    change = np.abs(photos.decode_photo(again).pixels.astype(int) - photo.pixels)
    # A file of quality 95 instead would lose more.
    assert change.mean() < 0.6


def test_gray_jpeg_stays_gray():
    data = _bytes(_grain(32, 32)[:, :, 0], "JPEG", quality=80)
    photo = photos.decode_photo(data)
    image = Image.open(io.BytesIO(photos.encode_jpeg(photo, photo.pixels)))
    assert image.mode == "L" and image.quantization == Image.open(io.BytesIO(data)).quantization


def test_other_photos_become_jpeg_of_high_quality():
    photo = photos.decode_photo(_bytes(_grain(32, 32)))
    assert photo.jpeg is None
    data = photos.encode_jpeg(photo, photo.pixels)
    expected = Image.open(io.BytesIO(_bytes(_grain(32, 32), "JPEG", quality=95, subsampling=0)))
    assert Image.open(io.BytesIO(data)).quantization == expected.quantization
    assert photos.decode_photo(data).jpeg.subsampling == 0


def test_jpeg_has_no_transparency():
    photo = photos.decode_photo(_bytes(_noise(8, 8, 4)))
    with pytest.raises(ValueError, match="no transparency"):
        photos.encode_jpeg(photo, photo.pixels)


def test_jpeg_keeps_profile_and_metadata_as_png_does():
    data = _bytes(_blocks(), "JPEG", icc_profile=SRGB, exif=_exif(6).tobytes(), comment="here")
    photo = photos.decode_photo(data)
    written = photos.encode_jpeg(photo, photo.pixels)
    assert Image.open(io.BytesIO(written)).info["icc_profile"] == SRGB
    assert not _exif_of(written) and b"here" not in written
    written = photos.encode_jpeg(photo, photo.pixels, keep_metadata=True)
    assert _exif_of(written)[0x010F] == "Maker" and 0x0112 not in _exif_of(written)
    assert b"here" not in written


@pytest.mark.parametrize("encode_fn", [photos.encode_png, photos.encode_jpeg])
def test_a_note_is_read_again(encode_fn):
    photo = photos.decode_photo(_bytes(_blocks()))
    assert photo.note is None
    assert photos.decode_photo(encode_fn(photo, photo.pixels)).note is None
    assert photos.decode_photo(encode_fn(photo, photo.pixels, note="by me")).note == "by me"


def test_notes_of_others_are_cut_and_need_not_be_text():
    data = _bytes(_blocks(), "JPEG", comment=b"\xff" * 60_000)
    assert len(photos.decode_photo(data).note) == 200


@pytest.mark.parametrize("kind, expected", [("PNG", "PNG"), ("JPEG", "JPEG"), (None, None)])
def test_the_format_is_that_of_the_first_bytes(tmp_path, kind, expected):
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"no photo" if kind is None else _bytes(_blocks(), kind))
    assert photos.format_of_file(path) == expected
    assert photos.format_of_file(tmp_path) is photos.format_of_file(tmp_path / "none") is None


# What is no photo


def _refused(data: bytes, **options) -> str:
    with pytest.raises(photos.PhotoError) as caught:
        photos.decode_photo(data, **options)
    return str(caught.value)


@pytest.mark.parametrize("data", [b"\0", b"hello, world", b"%PDF-1.7", b"%!PS-Adobe-3.0 EPSF-3.0"])
def test_other_files_are_refused(data):
    assert _refused(data).startswith("not a photo in a supported format")
    assert _refused(b"") == "the file is empty"


@pytest.mark.parametrize("kind", ALL)
def test_truncated_files_are_refused(kind):
    data = _bytes(_noise(40, 40, 3), kind)
    for length in (16, 40, len(data) // 2, len(data) * 9 // 10):
        reason = _refused(data[:length])
        assert reason.endswith("file is damaged or incomplete"), (length, reason)
        assert reason == _refused(data[:length])


def test_zero_size_is_refused():
    for width, height in ((0, 4), (4, 0)):
        assert "damaged" in _refused(_png(width, height, 8, 2, b""))


@pytest.mark.parametrize(
    "kind, options",
    [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})],
)
def test_several_frames_are_refused(kind, options):
    frames = [Image.fromarray(frame) for frame in _noise(3, 8, 8, 3)]
    data = _bytes(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    what = "a document of 3 pages" if kind == "TIFF" else "an animated image of 3 frames"
    assert _refused(data) == f"{what}, not a single photo"


def test_large_images_are_refused_by_their_header():
    limit = Image.MAX_IMAGE_PIXELS
    reason = "the image has more than 100 megapixels (--max_megapixels)"
    # There are no pixels in these files: decoding would fail for another reason.
    for width, height in ((10001, 10000), (13000, 13000), (2**31 - 1, 2**31 - 1)):
        assert _refused(_png(width, height, 1, 0, b"")) == reason
    assert "damaged" in _refused(_png(10000, 10000, 1, 0, b"\0"))
    canvas = struct.pack("<I", 16383)[:3] * 2
    webp = b"WEBPVP8X" + struct.pack("<II", 10, 0) + canvas
    assert _refused(b"RIFF" + struct.pack("<I", len(webp)) + webp) == reason
    bits = Image.new("1", (10200, 10200))
    assert _refused(_bytes(bits)) == reason
    assert Image.MAX_IMAGE_PIXELS == limit


@pytest.mark.parametrize("kind", ALL)
def test_the_limit_is_ours_not_pillows(kind, monkeypatch):
    data = _bytes(_blocks(), kind)
    reason = "the image has more than 0.001535 megapixels (--max_megapixels)"
    assert _refused(data, max_pixels=32 * 48 - 1) == reason
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 48 - 1)  # Warnings are errors here.
    assert photos.decode_photo(data, max_pixels=32 * 48).pixels.shape == (32, 48, 3)


def test_no_heic_without_its_package(monkeypatch):
    data = _bytes(_blocks(), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert _refused(data) == "HEIC photos need the Python package pillow-heif"


def test_lack_of_memory_is_a_reason(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", fail)
    assert _refused(_bytes(_blocks())) == "not enough memory to decode the image"


@pytest.mark.parametrize("kind", ALL)
def test_flipped_bytes_give_a_photo_or_a_reason(kind):
    generator = random.Random(kind)
    options = {"exif": _exif(6, kind).tobytes(), "icc_profile": SRGB}
    if kind in ("GIF", "BMP"):
        options = {}
    original = _bytes(_noise(12, 12, 3), kind, **options)
    num_refused = 0
    for step in range(120):
        data = bytearray(original)
        # The first half of the trials hits the headers.
        end = len(data) if step % 2 else min(len(data), 400)
        for _ in range(generator.choice((1, 1, 2, 8))):
            data[generator.randrange(8, end)] = generator.randrange(256)
        try:
            photo = photos.decode_photo(bytes(data), max_pixels=100_000)
        except photos.PhotoError as error:
            num_refused += 1
            assert 5 < len(str(error)) < 90
        else:
            assert photo.pixels.dtype == np.uint8 and photo.pixels.shape[2] == 3
            photos.encode_png(photo, photo.pixels, keep_metadata=True)
    assert num_refused > 0


def test_threads_decode_alike_and_leave_the_warning_filters():
    data = {kind: _bytes(_blocks(), kind, exif=_exif(1).tobytes()) for kind in ("TIFF", "JPEG")}
    expected = {kind: photos.decode_photo(data[kind]).pixels for kind in data}
    filters, failures = list(warnings.filters), []

    def work(kind):
        failures.extend(
            kind
            for _ in range(20)
            if not np.array_equal(photos.decode_photo(data[kind]).pixels, expected[kind])
        )

    threads = [threading.Thread(target=work, args=(kind,)) for kind in ("TIFF", "JPEG") * 2]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # Threads take turns often enough to meet.
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures and warnings.filters == filters


# Reading files


def test_read_photo_equals_decode_photo(tmp_path):
    path = tmp_path / "a b\nÄ é.jpg"  # A PNG with a wrong extension: the content counts.
    path.write_bytes(_bytes(_noise(5, 6, 3)))
    np.testing.assert_array_equal(photos.read_photo(path).pixels, _noise(5, 6, 3))
    np.testing.assert_array_equal(photos.read_photo(str(path)).pixels, _noise(5, 6, 3))
    assert photos.read_photo_bytes(path) == path.read_bytes()
    with pytest.raises(photos.PhotoError, match="megapixels"):
        photos.read_photo(path, max_pixels=29)


def _unreadable(path) -> str:
    with pytest.raises(photos.PhotoError) as caught:
        photos.read_photo(path)
    return str(caught.value)


def test_unreadable_files(tmp_path, monkeypatch):
    assert _unreadable(tmp_path) == "it is a folder, not a file"
    assert _unreadable(tmp_path / "none.png") == "the file does not exist"
    assert _unreadable("a\0b.png") == "the file cannot be read"
    assert _unreadable(tmp_path / ("n" * 300)) == "the file cannot be read"
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jpg")
        assert _unreadable(tmp_path / "pipe.jpg") == "it is not a regular file"
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    assert _unreadable(path) == "the file is empty"
    for error, reason in (
        (PermissionError(errno.EACCES, "denied"), "no permission to read the file"),
        (OSError(errno.EIO, "broken disk"), "the file cannot be read"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(pathlib.Path, "open", fail)
        assert _unreadable(path) == reason


def test_other_large_files_are_not_read(tmp_path):
    for name, start in (("film.mp4", b"\0\0\0\x20ftypisom"), ("scan.bmp", b"BM")):
        with open(tmp_path / name, "wb") as file:
            file.write(start)
            file.truncate(1 << 40)  # Sparse: reading it would need a terabyte of memory.
    assert _unreadable(tmp_path / "film.mp4").startswith("not a photo")
    assert _unreadable(tmp_path / "scan.bmp") == "the file is larger than 1024 MiB"


# Writing files


def _names(folder: pathlib.Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("overwrite", [False, True])
def test_write_atomically(tmp_path, overwrite):
    path = tmp_path / "new" / "folder" / "a b\né.png"
    old = os.umask(0o027)
    try:
        files.write_atomically(path, b"one", overwrite=overwrite)
    finally:
        os.umask(old)
    assert path.read_bytes() == b"one" and _names(path.parent) == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    if overwrite:
        files.write_atomically(str(path), b"two", overwrite=True)
        assert path.read_bytes() == b"two"
    else:
        with pytest.raises(FileExistsError):
            files.write_atomically(path, b"two")
        assert path.read_bytes() == b"one"
    assert _names(path.parent) == [path.name]


class _FullDisk(io.FileIO):
    """A file of which only the first bytes fit."""

    def write(self, data):
        super().write(data[:2])
        raise OSError(errno.ENOSPC, "disk full")


def _full(*_):
    raise OSError(errno.ENOSPC, "disk full")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("where", ["write", "fsync"])
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, where, existing):
    path = tmp_path / "a.png"
    if existing:
        path.write_bytes(b"old")
    if where == "write":
        monkeypatch.setattr(pathlib.Path, "open", lambda path, mode: _FullDisk(path, mode[0]))
    else:
        monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(OSError, match="disk full") as caught:
        files.write_atomically(path, b"new", overwrite=existing)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert _names(tmp_path) == (["a.png"] if existing else [])
    assert not existing or path.read_bytes() == b"old"


def _no_links(*_):
    raise PermissionError(errno.EPERM, "no hard links")


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_comes_up_meanwhile_wins(tmp_path, monkeypatch, links):
    path = tmp_path / "a.png"
    monkeypatch.setattr(os, "fsync", lambda _: path.write_bytes(b"other"))
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    with pytest.raises(FileExistsError):
        files.write_atomically(path, b"mine")
    assert path.read_bytes() == b"other" and _names(tmp_path) == ["a.png"]


@pytest.mark.parametrize("links", [True, False])
def test_one_of_many_writers_wins(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    path, wins, barrier = tmp_path / "a.png", [], threading.Barrier(8)

    def work(number):
        barrier.wait()
        try:
            files.write_atomically(path, bytes([number]) * 1000)
            wins.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1 and path.read_bytes() == bytes(wins) * 1000
    assert _names(tmp_path) == ["a.png"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_failed_publication_leaves_nothing(tmp_path, monkeypatch, overwrite):
    monkeypatch.setattr(os, "link", _no_links)
    monkeypatch.setattr(os, "replace", _full)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(tmp_path / "a.png", b"data", overwrite=overwrite)
    assert _names(tmp_path) == []


def test_the_temporary_file_is_hidden_and_beside_the_final_one(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.extend(_names(tmp_path)))
    files.write_atomically(tmp_path / ("n" * 250), b"data")
    assert len(seen) == 1 and seen[0].startswith(".") and seen[0].endswith(".partial")
    assert photo_files.list_photos([tmp_path])[0].path.name == "n" * 250


def test_impossible_paths(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "file" / "b" / "a.png"):
        with pytest.raises(NotADirectoryError):
            files.write_atomically(path, b"data")
    with pytest.raises(IsADirectoryError):
        files.write_atomically(tmp_path / "folder", b"data", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        files.write_atomically(tmp_path / "link", b"data")
    assert _names(tmp_path) == ["file", "folder", "link"]


# Finding files


def _tree(root: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def _relatives(inputs) -> list[str]:
    return [str(item.relative) for item in inputs]


def test_list_photos_is_recursive_sorted_and_skips_hidden(tmp_path):
    names = ["b.jpg", "a/z.png", "a/B.txt", "a/é x\n.heic", "a.jpg", "A.jpg", "a-b/c.jpg", "noext"]
    skipped = [".hidden.jpg", ".git/a.jpg", "a/.x/b.jpg", "a/Thumbs.db", "desktop.ini"]
    root = _tree(tmp_path / "in put", *names, *skipped)
    inputs = photo_files.list_photos([root])
    assert _relatives(inputs) == sorted(names)
    assert all(item.path == root.resolve() / item.relative for item in inputs)
    assert all(item.problem is None for item in inputs)


def test_files_that_are_no_photos_by_name_and_content_are_skipped(tmp_path):
    root = _tree(tmp_path, "a.jpg", "b.heic", "page.html", "s/.DS_Store", "s/Thumbs.db", ".hidden")
    (root / "a.json").write_bytes(b"")
    (root / "photo").write_bytes(b"\xff\xd8\xff")
    (root / "s" / "film.MOV").write_bytes(b"\0\0\0\x14ftypqt  ")
    (root / "s" / "empty.JPG").touch()
    inputs, num_skipped = photos.list_photos([root])
    # Damaged files with a photo's name count as photos, as does a photo under any name.
    assert _relatives(inputs) == ["a.jpg", "b.heic", "photo", "s/empty.JPG"] and num_skipped == 5
    given, num_skipped = photos.list_photos([root / "page.html", root / "s" / "Thumbs.db"])
    assert _relatives(given) == ["page.html", "Thumbs.db"] and num_skipped == 0
    assert [item.name for item in photos.list_sources(root)] == _relatives(inputs)


def test_given_order_is_kept_and_duplicates_go(tmp_path, monkeypatch):
    root = _tree(tmp_path, "z/b.jpg", "z/a.jpg", "c/d.jpg", ".hidden.jpg")
    monkeypatch.chdir(root)
    paths = ["z/b.jpg", str(root / "z"), root / "c" / "..", "./z/a.jpg", ".hidden.jpg"]
    inputs = photo_files.list_photos(paths)
    assert _relatives(inputs) == ["b.jpg", "a.jpg", "c/d.jpg", ".hidden.jpg"]
    expected = ["z/b.jpg", "z/a.jpg", "c/d.jpg", ".hidden.jpg"]
    assert [item.path for item in inputs] == [root.resolve() / name for name in expected]


def test_missing_paths_are_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        photo_files.list_photos([tmp_path, tmp_path / "none"])
    assert caught.value.filename == str(tmp_path / "none")
    assert photo_files.list_photos([]) == [] == photo_files.list_photos([tmp_path])


def test_exclusions(tmp_path):
    root = _tree(tmp_path / "in", "a.jpg", "out/b.jpg", "out/deep/c.jpg", "d/out/e.jpg")

    def listed(*exclude, paths=(root,)):
        return _relatives(photo_files.list_photos(paths, exclude=exclude))

    everything = ["a.jpg", "d/out/e.jpg", "out/b.jpg", "out/deep/c.jpg"]
    assert listed(root / "out") == ["a.jpg", "d/out/e.jpg"]
    assert listed(root / "d" / ".." / "a.jpg") == everything[1:]
    assert listed(root) == listed(tmp_path) == listed(root / "none") == everything
    assert listed(root, root / "a.jpg") == everything[1:]
    assert listed(root / "out", paths=[root / "out"]) == ["b.jpg", "deep/c.jpg"]
    assert listed(root / "a.jpg", paths=[root / "a.jpg"]) == []
    assert listed(root / "out", paths=[root / "out" / "b.jpg"]) == ["b.jpg"]


def test_links(tmp_path):
    outside = _tree(tmp_path / "elsewhere", "secret.jpg")
    root = _tree(tmp_path / "in", "real.jpg", "sub/other.jpg", "skip/s.jpg")
    (root / "alias.jpg").symlink_to("real.jpg")
    (root / "leaves.jpg").symlink_to(outside / "secret.jpg")
    (root / "broken.jpg").symlink_to("nowhere.jpg")
    (root / "circle.jpg").symlink_to("circle.jpg")
    (root / "skipped.jpg").symlink_to("skip/s.jpg")
    (root / "sub" / "loop").symlink_to(root)
    (root / "folder").symlink_to(outside)
    inputs = photo_files.list_photos([root], exclude=[root / "skip"])
    assert {str(item.relative): item.problem for item in inputs} == {
        "alias.jpg": None,  # real.jpg is the same file.
        "broken.jpg": "a symbolic link that leads nowhere",
        "circle.jpg": "a symbolic link that leads nowhere",
        "leaves.jpg": "a symbolic link that leads out of the folder",
        "sub/other.jpg": None,
    }
    # A link that is given by itself leaves no folder; a folder reached by a link is a folder.
    assert photo_files.list_photos([root / "leaves.jpg"])[0].problem is None
    assert _relatives(photo_files.list_photos([root / "folder"])) == ["secret.jpg"]


def test_special_files_and_unreadable_folders(tmp_path, monkeypatch):
    root = _tree(tmp_path, "a.jpg", "closed/b.jpg").resolve()
    os.mkfifo(root / "pipe.jpg")
    scan = os.scandir

    def guarded(path):
        if str(path) == str(root / "closed"):
            raise PermissionError(errno.EACCES, "denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    inputs = photo_files.list_photos([root])
    assert [(str(item.relative), item.problem) for item in inputs] == [
        ("a.jpg", None),
        ("closed", "the folder cannot be read"),
    ]


# Naming outputs


def _inputs(*names: str) -> list[photo_files.PhotoInput]:
    root = pathlib.Path("/in")
    return [photo_files.PhotoInput(root / name, pathlib.PurePosixPath(name)) for name in names]


@pytest.mark.parametrize(
    "names, expected",
    [
        (["a.jpg", "s/b.tar.gz", "noext"], ["a", "s/b.tar", "noext"]),
        (["a.jpg", "a.png", "s/a.jpg"], ["a", "a_png", "s/a"]),
        (["a.jpg", "A.JPG", "A.jpg"], ["a", "A_JPG", "A_jpg_2"]),
        (["a.jpg", "a.png", "a.PNG", "A.Png"], ["a", "a_png", "a_PNG_2", "A_Png_3"]),
        (["a_png.jpg", "a.jpg", "a.png"], ["a_png", "a", "a_png_2"]),
        (["a", "A", "ä.jpg", "a\u0308.jpg"], ["a", "A_2", "ä", "a\u0308_jpg"]),
        (["S/a.jpg", "s/a.jpg"], ["S/a", "s/a_jpg"]),
        (["a b\n.jpg", ".jpg", ".png"], ["a b\n", ".jpg", ".png"]),
    ],
)
def test_output_paths(names, expected):
    outputs = photo_files.output_paths(_inputs(*names), "/out")
    assert outputs == [pathlib.Path(f"/out/{name}_cloaked.png") for name in expected]


def test_outputs_are_found_as_copies_of_their_inputs(tmp_path):
    names = ("ann/a.b.jpg", "ann/a.b.png", "ann/c.jpg", "ann/c.webp", "ann/d")
    outputs = photo_files.output_paths(_inputs(*names), tmp_path)
    outputs[0].parent.mkdir()
    for path in outputs:
        path.write_bytes(_bytes(_blocks()))
    copies = identities.list_copies(tmp_path)
    assert [copies.of(name).path for name in names] == outputs


def test_output_paths_of_an_earlier_run_stay():
    taken = {"/in/b/a.png": "/out/b/A_cloaked.png", "/in/gone.jpg": "/out/c_cloaked.png"}
    inputs = _inputs("b/a.jpg", "b/a.png", "c.jpg")
    outputs = photo_files.output_paths(inputs, pathlib.Path("/out"), taken=taken)
    names = ["b/a_jpg_cloaked.png", "b/A_cloaked.png", "c_jpg_cloaked.png"]
    assert outputs == [pathlib.Path("/out") / name for name in names]
    again = {str(item.path): str(path) for item, path in zip(inputs, outputs, strict=True)}
    assert photo_files.output_paths(inputs[::-1], "/out", taken=again) == outputs[::-1]


def test_outputs_never_take_the_name_of_an_input():
    outputs = photo_files.output_paths(
        _inputs("a.jpg", "a_cloaked.png"), "/in", suffix="_cloaked.png"
    )
    names = ["a_jpg_cloaked.png", "a_cloaked_cloaked.png"]
    assert outputs == [pathlib.Path("/in") / name for name in names]
    assert photo_files.output_paths(_inputs("a.jpg"), "/in", suffix=".x")[0].name == "a.x"


def test_sizes_are_told_by_headers(tmp_path, monkeypatch):
    """Before anything is decoded, of every kind of photo."""
    for kind in ALL:
        path = tmp_path / kind.replace(" ", "_")
        path.write_bytes(_bytes(_blocks(), kind))
        assert photos.num_pixels(path) == 32 * 48
    declared = tmp_path / "declared.png"
    declared.write_bytes(_png(10000, 9000, 1, 0, b""))
    assert photos.num_pixels(declared) == 90_000_000
    (tmp_path / "text.jpg").write_text("none")
    for none in (tmp_path / "text.jpg", tmp_path / "absent", tmp_path, "a\0b"):
        assert photos.num_pixels(none) == 0
    assert photos.num_pixels(photos.PhotoSource("a", declared, problem="a link")) == 0
    assert photos.num_pixels(np.zeros((3, 4, 3), np.uint8)) == 12
    assert photos.num_pixels(Image.new("L", (5, 6))) == 30

    def groups(*sizes, most=3):
        items = [np.zeros((1, size, 3), np.uint8) for size in sizes]
        cut = photos.in_groups(items, most=most, photo_fn=lambda item: item)
        return [[item.shape[1] for item in group] for group in cut]

    monkeypatch.setattr(photos, "GROUP_PIXELS", 10)
    assert groups(1, 1, 1, 1, 9, 1, 1) == [[1, 1, 1], [1, 9], [1, 1]]
    assert groups(99, 5, 5, 5) == [[99], [5, 5], [5]]
    assert groups() == []


@pytest.mark.parametrize(
    "name, problem",
    [
        ("a.png", None),
        ("b/../a.png", None),
        ("inner.png", None),
        ("../secret.png", "lies outside"),
        ("b/../../secret.png", "lies outside"),
        ("{root}/secret.png", "lies outside"),
        ("out.png", "lies outside"),
        ("linked/secret.png", "lies outside"),
        ("circle", "cannot be looked up|does not exist"),
        ("a\0.png", "cannot be looked up"),
        ("n" * 300, "cannot be looked up"),
        ("absent.png", "does not exist"),
        ("b", "does not exist"),
        ("", "lies outside"),
    ],
)
def test_tables_name_files_below_their_folder_alone(tmp_path, name, problem):
    root = tmp_path / "photos"
    (root / "b").mkdir(parents=True)
    for path in (root / "a.png", tmp_path / "secret.png"):
        path.write_bytes(_bytes(_blocks()))
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path)
    (root / "inner.png").symlink_to(root / "a.png")
    (root / "circle").symlink_to(root / "circle")
    found = photo_files.find_below(root, name.format(root=tmp_path))
    if problem is None:
        assert found.problem is None and photos.read_photo(found.path).pixels.size
    else:
        assert re.search(problem, found.problem)
        with pytest.raises(photos.PhotoError, match=problem):
            photos.read_source(photos.PhotoSource.of(found))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("settings", [{"lossless": True, "exact": True}, {"quality": 60}])
def test_webp_is_decoded_as_pillow_does(mode, settings):
    """Another reader of the same library; here with what travels beside the pixels."""
    draw = np.random.default_rng(0)
    picture = Image.fromarray(draw.integers(0, 256, (33, 47, len(mode)), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture.save(buffer, "WEBP", exif=exif, icc_profile=profile, **settings)
    photo = photos.decode_photo(buffer.getvalue())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(buffer)))
    np.testing.assert_array_equal(photo.pixels, expected[..., :3])
    assert photo.pixels.shape == (47, 33, 3) and photo.icc_profile == profile
    if mode == "RGBA":
        np.testing.assert_array_equal(photo.alpha, expected[..., 3])
    else:
        assert photo.alpha is None
