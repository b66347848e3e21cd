"""Photos that are whole, damaged, mislabeled, odd or hostile, with what programs may say of each.

What may be said: "face", "no_face", "unreadable", or "absent" where a folder's listing must not
name the file. Input `k` of a seed is always the same.
"""

import functools
import io
import os
import pathlib
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pillow_heif
import skimage.data
from PIL import Image, PngImagePlugin

FACE, NO_FACE, UNREADABLE, ABSENT = "face", "no_face", "unreadable", "absent"
_READABLE = (FACE, NO_FACE)

_FORMATS = ("jpg", "png", "webp", "tif", "bmp", "gif", "heic")
_PILLOW = {"jpg": "JPEG", "tif": "TIFF", "heic": "HEIF"}
# An HTML page that would run it has to have escaped it.
SCRIPT = "<img src=x onerror=alert(1)>"


class Item(NamedTuple):
    """An input.

    Attributes:
        name: its path below the folder.
        kind: how it was made: a name of `KINDS`.
        allowed: what may be said of it.
    """

    name: str
    kind: str
    allowed: Sequence[str]


_Maker = Callable[[pathlib.Path, str, np.random.Generator], tuple[str, Sequence[str]]]


class Kind(NamedTuple):
    """A way to make inputs.

    Attributes:
        make: writes one below a folder, with a stem of its own; returns its name and what may be
            said of it.
        weight: how often it is made.
        is_large: whether it declares many pixels; such inputs have a folder of their own.
    """

    make: _Maker
    weight: int = 4
    is_large: bool = False


def make(folder: pathlib.Path, count: int, *, seed: int, is_large: bool = False) -> list[Item]:
    """Writes inputs below a folder, all kinds in turn as their weights say."""
    kinds = {name: kind for name, kind in KINDS.items() if kind.is_large == is_large}
    most = max(kind.weight for kind in kinds.values())
    turn = [name for pass_ in range(most) for name in kinds if kinds[name].weight > pass_]
    items = []
    for index in range(count):
        name = turn[index % len(turn)]
        random = np.random.default_rng((seed, index, is_large))
        made, allowed = kinds[name].make(folder, f"{index:04}", random)
        items.append(Item(made, name, allowed))
    return items


def portrait(random: np.random.Generator) -> Image.Image:
    """A face, 256 pixels wide, in other light each time."""
    crop = Image.fromarray(skimage.data.astronaut()[:256, 96:352])
    if random.integers(2):
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain = random.uniform(0.85, 1.1)
    return crop.point([min(255, round(value * gain)) for value in range(256)] * 3)


def encoded(image: Image.Image, extension: str, **options: object) -> bytes:
    """The content of a file of an image."""
    buffer = io.BytesIO()
    if extension == "heic":
        pillow_heif.from_pillow(image).save(buffer, quality=90)
    else:
        image.save(buffer, _PILLOW.get(extension, extension.upper()), **options)
    return buffer.getvalue()


def _any_format(random: np.random.Generator) -> tuple[str, bytes]:
    extension = _FORMATS[random.integers(len(_FORMATS))]
    return extension, encoded(portrait(random), extension)


def _whole(folder, stem, random):
    extension, data = _any_format(random)
    return _write(folder, f"{stem}.{extension}", data), [FACE]


def _without_face(folder, stem, random):
    low, high = random.integers(0, 256, (2, 1, 1, 3))
    slope = np.linspace(0, 1, 96)[:, None, None]
    pixels = np.broadcast_to(low + slope * (high - low), (96, 128, 3)).astype(np.uint8)
    return _write(folder, f"{stem}.png", encoded(Image.fromarray(pixels), "png")), [NO_FACE]


def _truncated(folder, stem, random):
    extension, data = _any_format(random)
    cut = int(len(data) * random.uniform(0.1, 0.85))
    return _write(folder, f"{stem}.{extension}", data[:cut]), [UNREADABLE]


def _flipped(folder, stem, random):
    extension, data = _any_format(random)
    data = flip_bits(data, random, count=int(random.integers(1, 9)))
    return _write(folder, f"{stem}.{extension}", data), [*_READABLE, UNREADABLE]


def _garbled(folder, stem, random):
    extension, data = _any_format(random)
    start = int(random.integers(len(data)))
    block = random.bytes(min(64, len(data) - start))
    data = data[:start] + block + data[start + len(block) :]
    return _write(folder, f"{stem}.{extension}", data), [*_READABLE, UNREADABLE]


def _mislabeled(folder, stem, random):
    extension, data = _any_format(random)
    others = [name for name in _FORMATS if name != extension]
    return _write(folder, f"{stem}.{others[random.integers(len(others))]}", data), [FACE]


def _colors(folder, stem, random):
    image = portrait(random)
    gray16 = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    choices = [
        ("png", image.convert("L")),
        ("png", image.convert("LA")),
        ("png", image.convert("RGBA")),
        ("png", image.quantize(256)),
        ("png", gray16),
        ("jpg", image.convert("CMYK")),
        ("jpg", image.convert("L")),
        ("tif", image.convert("CMYK")),
        ("tif", gray16),
        ("webp", image.convert("RGBA")),
    ]
    extension, image = choices[random.integers(len(choices))]
    return _write(folder, f"{stem}.{extension}", encoded(image, extension)), [FACE]


def _metadata(folder, stem, random):
    image = portrait(random)
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", SCRIPT, zip=True)
    choices = [
        encoded(image.rotate(90), "jpg", exif=exif.tobytes()),
        encoded(image, "jpg", exif=b"Exif\0\0" + random.bytes(200)),
        encoded(image, "jpg", icc_profile=random.bytes(400)),
        encoded(image, "png", icc_profile=random.bytes(400)),
        encoded(image, "png", pnginfo=text),
        encoded(image, "jpg", comment=SCRIPT.encode()),
        encoded(image, "jpg") + encoded(image, "png"),
        encoded(image, "jpg") + b"PK\3\4" + random.bytes(2000),
    ]
    return _write(folder, f"{stem}.jpg", choices[random.integers(len(choices))]), [FACE]


def _tiny(folder, stem, random):
    sizes = [(1, 1), (2, 1), (1, 300), (300, 1), (11, 11), (12, 12), (13, 40), (1, 20000)]
    size = sizes[random.integers(len(sizes))]
    image = Image.new("RGB", size, tuple(random.integers(0, 256, 3).tolist()))
    return _write(folder, f"{stem}.png", encoded(image, "png")), [NO_FACE]


def _animated(folder, stem, random):
    frames = [portrait(random), portrait(random).rotate(5), portrait(random).rotate(9)]
    extension = ("gif", "webp", "png", "tif")[random.integers(4)]
    data = encoded(frames[0], extension, save_all=True, append_images=frames[1:])
    return _write(folder, f"{stem}.{extension}", data), [UNREADABLE]


def _empty(folder, stem, random):
    extension = _FORMATS[random.integers(len(_FORMATS))]
    return _write(folder, f"{stem}.{extension}", b""), [UNREADABLE]


def _no_photo(folder, stem, random):
    contents = [
        b"no photo\n" * 40,
        b"<html><script>alert(1)</script></html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(marker) (w) file closefile\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
        b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R.",
        random.bytes(3000),
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\xff\xff\xff\xffWEBP",
    ]
    data = contents[random.integers(len(contents))]
    return _write(folder, f"{stem}.jpg", data), [UNREADABLE]


def _beside(folder, stem, random):
    names = [f"{stem}.txt", f"{stem}.json", f"{stem}.html", f"{stem}.mp4", f".{stem}.jpg", stem]
    return _write(folder, names[random.integers(len(names))], b"{}"), [ABSENT]


def _folder(folder, stem, random):
    name = f"{stem}.jpg"
    (folder / name).mkdir()
    if random.integers(2):
        return name, [ABSENT]
    return _write(folder, f"{name}/inner.png", encoded(portrait(random), "png")), [FACE]


def _link(folder, stem, random):
    name = f"{stem}.jpg"
    way = random.integers(4)
    if way == 0:
        outside = folder.parent / f"{folder.name}_outside"
        outside.mkdir(exist_ok=True)
        _write(outside, name, encoded(portrait(random), "jpg"))
        (folder / name).symlink_to(outside / name)
    elif way == 1:
        (folder / name).symlink_to("nowhere.jpg")
    elif way == 2:
        (folder / name).symlink_to(name)
    else:
        os.mkfifo(folder / name)
        return name, [ABSENT]
    return name, [UNREADABLE]


def _name(folder, stem, random):
    names = [
        f"{SCRIPT}{stem}.png",
        f"=1+{stem}.png",
        f"@SUM({stem}).png",
        f"+{stem}.png",
        f"-rf {stem}.png",
        f'{stem},"quoted".png',
        f"{stem}\nnewline.png",
        f"{stem}\ttab.png",
        f"{stem}%s{{}}$HOME`id`;.png",
        f"{stem}\u202egnp.gif",
        f"{stem} e\u0301\u00e9 \U0001f600.png",
        f"{stem} .png",
        f"{stem}" + "n" * (255 - len(stem) - 4) + ".png",
        os.fsdecode(f"{stem}".encode() + b"\xff\xfe.png"),
        "/".join([stem] * 40) + ".png",
    ]
    name = names[random.integers(len(names))]
    allowed = [FACE]
    if len(os.fsencode(name.rpartition("/")[2])) > 240:
        # There may be no room for the name of an output.
        allowed = [FACE, "failed", UNREADABLE]
    return _write(folder, name, encoded(portrait(random), "png")), allowed


def _huge(folder, stem, random):
    """Headers that declare many pixels, and files of few bytes that have them."""
    makers = (
        ("jpg", lambda: _declared_jpeg(9900, 9900)),
        ("png", lambda: _flat_png(9990, 9990)),
        ("jpg", lambda: _declared_jpeg(65000, 65000)),
        ("tif", lambda: encoded(_flat(9800, 9990), "tif", compression="tiff_deflate")),
        ("webp", lambda: encoded(_flat(16383, 6000).convert("RGB"), "webp", method=0)),
        ("png", lambda: _flat_png(2**31 - 1, 1, rows=1)),
        ("gif", lambda: encoded(_flat(9800, 9990), "gif")),
        ("bmp", lambda: _declared_bmp(30000, 3300)),
        ("png", lambda: _flat_png(60, 1_600_000)),
    )
    extension, data_fn = makers[int(stem) % len(makers)]
    return _write(folder, f"{stem}.{extension}", data_fn()), [NO_FACE, UNREADABLE]


KINDS: dict[str, Kind] = {
    "whole": Kind(_whole),
    "no face": Kind(_without_face, weight=2),
    "truncated": Kind(_truncated, weight=6),
    "bits flipped": Kind(_flipped, weight=6),
    "block overwritten": Kind(_garbled, weight=6),
    "mislabeled": Kind(_mislabeled),
    "gray, alpha, CMYK, 16 bit": Kind(_colors),
    "odd metadata": Kind(_metadata),
    "tiny": Kind(_tiny, weight=3),
    "animated": Kind(_animated, weight=2),
    "empty": Kind(_empty, weight=1),
    "no photo": Kind(_no_photo, weight=3),
    "beside photos": Kind(_beside, weight=2),
    "folder named as a photo": Kind(_folder, weight=1),
    "link or pipe": Kind(_link, weight=2),
    "odd name": Kind(_name),
    "many pixels": Kind(_huge, is_large=True),
}


def flip_bits(data: bytes, random: np.random.Generator, *, count: int = 1) -> bytes:
    """The data with some bits flipped."""
    changed = bytearray(data)
    for place in random.integers(0, len(data), count):
        changed[place] ^= 1 << int(random.integers(8))
    return bytes(changed)


def _write(folder: pathlib.Path, name: str, data: bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return name


def _flat(width: int, height: int) -> Image.Image:
    return Image.new("L", (width, height), 90)


@functools.cache
def _declared_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header says that it is large; decoders fill in gray."""
    data = bytearray(encoded(Image.new("RGB", (64, 64), (120, 90, 60)), "jpg"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@functools.cache
def _flat_png(width: int, height: int, *, rows: int | None = None) -> bytes:
    """A gray PNG of one color, with fewer rows than it declares if asked for."""
    row = b"\0" + b"Z" * min(width, 1 << 20)
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(row) for _ in range(height if rows is None else rows))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", data + packer.flush()), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _declared_bmp(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "bmp"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)
