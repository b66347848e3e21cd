"""Photos from files, folders, arrays and PIL images: decoding to upright RGB, encoding again.

A decoded photo is uint8 in 0..255, layout [H, W, 3], RGB, upright; alpha, gray mode and color
profile travel beside it, so that what is written back differs from the source in its pixels only.
Pixels of wide-gamut photos are not converted: they stay in the space their profile describes.

Listing photos of folders and naming outputs is in photo_files.py; conversion to float images in
[0, 1] is done by the callers. Host code: no JAX here, never called from a traced function.
"""

import contextlib
import dataclasses
import hashlib
import io
import math
import mmap
import os
import pathlib
import re
import stat
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeVar

import cv2
import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from afr_jax.core import backend
from afr_jax.data import photo_files

_MAX_FILE_BYTES = 1 << 30  # 100 megapixels of 16-bit RGBA are 0.8 GB
_HEADER_BYTES = 32
_STRIP_BYTES = 1 << 25
# Pixels that a group of photos has at most, unless it is one photo: 300 MB.
GROUP_PIXELS = 100_000_000

_SIGNATURES = (
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG\r\n\x1a\n"),
    ("WebP", rb"RIFF.{4}WEBP"),
    ("TIFF", rb"II[*+]\0|MM\0[*+]"),
    ("HEIC", rb".{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)"),
    ("GIF", rb"GIF8[79]a"),
    ("BMP", rb"BM"),
)
# Files with these names are photos that can be damaged or of a format that is not read; others in a
# folder are photos only if their content is.
_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".tif", ".tiff"),
    *(".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
# Pillow's readers are constructed directly: Image.open would read formats that are not meant (EPS
# runs Ghostscript), and judges sizes by the process-wide Image.MAX_IMAGE_PIXELS. The JPEG reader
# takes the first frame of an MPO file, as wanted.
_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}

# What keep_metadata keeps. Not in the list: tags that describe the source file's layout, and blocks
# that can hold a preview of the source (maker note, Photoshop resources; the thumbnail directory).
_EXIF_TAGS = (
    *(0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x013C, 0x8298),  # description .. copyright
    *(0x011A, 0x011B, 0x0128),  # resolution
    *(0x4746, 0x4749, 0x9C9B, 0x9C9C, 0x9C9D, 0x9C9E, 0x9C9F),  # rating, Windows title .. subject
)
_EXIF_DROPPED = {0x927C, 0xA005, 0xA002, 0xA003}  # maker note, interoperability, width, height

_warnings_lock = threading.Lock()
_Item = TypeVar("_Item")


# What is read of a note that a program left in a file, in characters.
_MAX_NOTE = 200
# JPEG files of photos that were none: of this quality, chroma whole (4:4:4).
_NEW_JPEG_QUALITY = 95


class PhotoError(Exception):
    """A file that cannot be taken as a photo; the message is a short reason without the path."""


class JpegSettings(NamedTuple):
    """How a JPEG file was encoded.

    Attributes:
        tables: Quantization tables of 64 numbers, by component; the last one is that of the rest.
        subsampling: Of chroma: 0 for 4:4:4, 1 for 4:2:2, 2 for 4:2:0.
        progressive: Whether it shows coarse first.
    """

    tables: tuple[tuple[int, ...], ...]
    subsampling: int
    progressive: bool


@dataclasses.dataclass(frozen=True)
class Photo:
    """A decoded photo.

    Attributes:
        pixels: RGB, upright, uint8 [H, W, 3].
        alpha: Opacity, uint8 [H, W], 255 is opaque; None if the file has none.
        gray: Whether the file was grayscale; the three channels are then equal.
        icc_profile: Profile of `pixels` to write back; None stands for sRGB.
        exif: EXIF block without orientation, thumbnail and maker note, for `keep_metadata`.
        name: Path below the folder it was found in, the name of its file, or "photo_<number>".
        jpeg: How the file was encoded; None where it was no JPEG file of three colors or gray.
        note: What a program wrote into the file: the comment of JPEG, the software of PNG.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    gray: bool = False
    icc_profile: bytes | None = None
    exif: bytes | None = None
    name: str = ""
    jpeg: JpegSettings | None = None
    note: str | None = None


# One photo: pixels [H, W, 3] uint8, the path of a file, a PIL image of any mode, or a decoded one.
PhotoLike = np.ndarray | str | os.PathLike[str] | Image.Image | Photo


class PhotoSource(NamedTuple):
    """A photo that was asked for and is not decoded yet.

    Attributes:
        name: See `Photo.name`.
        photo: What `as_photo` takes.
        problem: Why it must not be read, or None.
    """

    name: str
    photo: PhotoLike
    problem: str | None = None

    @classmethod
    def of(cls, item: photo_files.PhotoInput) -> "PhotoSource":
        """A file that was listed."""
        return cls(item.relative.as_posix(), item.path, item.problem)


class PhotoFiles(NamedTuple):
    """The files among and below some paths.

    Attributes:
        inputs: Photos, readable or not.
        num_skipped: Files in folders that are no photos, by name and by content.
    """

    inputs: list[photo_files.PhotoInput]
    num_skipped: int


# One or several, also the path of a folder.
PhotosLike = PhotoLike | PhotoSource | Iterable[PhotoLike | PhotoSource]


def list_photos(
    paths: Sequence[str | os.PathLike[str]], *, exclude: Sequence[str | os.PathLike[str]] = ()
) -> PhotoFiles:
    """Lists the photos among and below the given paths, and counts what lies beside them.

    A file in a folder is a photo if it has the name of one, or the first bytes; others, such as
    .DS_Store, sidecar files and films, are counted as skipped. A file given by itself is listed.

    Args:
        paths: Files and folders; see `photo_files.list_photos`.
        exclude: Likewise.

    Raises:
        FileNotFoundError: If one of `paths` does not exist.
    """
    found = photo_files.list_photos(paths, exclude=exclude, with_system_files=True)
    inputs = [item for item in found if not _is_skipped(item)]
    return PhotoFiles(inputs, len(found) - len(inputs))


def _is_skipped(item: photo_files.PhotoInput) -> bool:
    """Whether a file is no photo by its name and by its content."""
    if not item.in_folder or item.problem is not None:
        return False
    if item.is_of_the_system:
        return True
    if item.path.suffix.lower() in _SUFFIXES:
        return False
    try:
        with item.path.open("rb") as file:
            return _known_format(file.read(_HEADER_BYTES)) is None
    except OSError:  # Readers say what is wrong with it.
        return False


def list_sources(photos: PhotosLike) -> list[PhotoSource]:
    """Lists photos of any form; files are not decoded.

    Args:
        photos: One photo or several: arrays `[H, W, 3]` uint8 (several also as `[N, H, W, 3]`),
            paths of files and folders (`list_photos`), PIL images, decoded photos;
            sources stay what they are.

    Raises:
        FileNotFoundError: If a path does not exist.
    """
    found: list[PhotoSource] = []
    for number, photo in enumerate(_listed(photos)):
        if isinstance(photo, (str, os.PathLike)):
            path = pathlib.Path(photo).expanduser()
            found += map(PhotoSource.of, list_photos([path]).inputs)
        elif isinstance(photo, PhotoSource):
            found.append(photo)
        else:
            name = photo.name if isinstance(photo, Photo) else ""
            found.append(PhotoSource(name or f"photo_{number}", photo))
    return found


def _listed(photos: PhotosLike) -> list[PhotoLike | PhotoSource]:
    """One photo or several as a list."""
    if isinstance(photos, (str, os.PathLike, Image.Image, Photo, PhotoSource)):
        return [photos]
    if isinstance(photos, np.ndarray):
        return list(photos) if photos.ndim == 4 else [photos]
    if not isinstance(photos, Iterable):
        raise TypeError(_wrong_type(photos))
    return list(photos)


def _wrong_type(photo: object) -> str:
    return f"a photo must be an array, a path or a PIL image, got {type(photo).__name__}"


def read_photos(photos: PhotosLike) -> list[Photo]:
    """Reads photos of any form; files in folders that are no photos are passed over.

    Args:
        photos: See `list_sources`.

    Raises:
        FileNotFoundError: If a path does not exist.
        PhotoError: If a photo is damaged; the message begins with its name.
        ValueError: If an array is not uint8 [H, W, 3].
    """
    found = []
    for source in list_sources(photos):
        try:
            found.append(dataclasses.replace(read_source(source), name=source.name))
        except PhotoError as error:
            raise PhotoError(f"{source.name}: {error}") from error
    return found


def read_source(source: PhotoSource) -> Photo:
    """Reads one source of `list_sources`.

    Raises:
        PhotoError: If it must not be read or cannot be decoded.
        TypeError, ValueError: See `as_photo`; the message begins with the photo's name.
    """
    if source.problem is not None:
        raise PhotoError(source.problem)
    try:
        return as_photo(source.photo)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{source.name}: {error}") from error


def as_photo(photo: PhotoLike) -> Photo:
    """One photo in any form as a decoded one.

    Raises:
        PhotoError: If a file or a PIL image cannot be decoded.
        TypeError: If it is nothing that can be a photo.
        ValueError: If an array is not uint8 [H, W, 3], or empty.
    """
    if isinstance(photo, Photo):
        return photo
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size:
            raise ValueError(f"a photo must be uint8 [H, W, 3], got {photo.dtype} {photo.shape}")
        return Photo(photo)
    if isinstance(photo, Image.Image):
        try:
            return _from_pillow(photo.copy())
        except Exception as error:  # As in `decode_photo`.
            raise PhotoError("the image is damaged or incomplete") from error
    if not isinstance(photo, (str, os.PathLike)):  # The system takes a number for an open file.
        raise TypeError(_wrong_type(photo))
    return dataclasses.replace(read_photo(photo), name=pathlib.Path(photo).name)


def read_photo(path: str | os.PathLike[str], *, max_pixels: int | None = None) -> Photo:
    """Reads a photo file; see `decode_photo`.

    Raises:
        PhotoError: If the file cannot be read, or is not a photo that can be decoded.
    """
    return decode_photo(read_photo_bytes(path), max_pixels=max_pixels)


def read_photo_bytes(path: str | os.PathLike[str]) -> bytes:
    """Reads the bytes of a photo file, once it looks like one.

    Only the first bytes of other files are read, however large they are.

    Raises:
        PhotoError: If the file cannot be read, or its first bytes are of no supported format.
    """
    try:
        # Only regular files are opened: a named pipe would wait for its writer for ever.
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise PhotoError("it is a folder, not a file")
        if not stat.S_ISREG(mode):
            raise PhotoError("it is not a regular file")
        with pathlib.Path(path).open("rb") as file:
            header = file.read(_HEADER_BYTES)
            _format_of(header)
            if os.fstat(file.fileno()).st_size > _MAX_FILE_BYTES:
                raise PhotoError(f"the file is larger than {_MAX_FILE_BYTES >> 20} MiB")
            return header + file.read()
    except FileNotFoundError as error:
        raise PhotoError("the file does not exist") from error
    except PermissionError as error:
        raise PhotoError("no permission to read the file") from error
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a null character in the path
        raise PhotoError("the file cannot be read") from error


def decode_photo(data: bytes, *, max_pixels: int | None = None) -> Photo:
    """Decodes the bytes of a JPEG, PNG, WebP, BMP, TIFF, HEIC or still GIF file.

    16-bit gray is scaled by 1 / 257 and rounded; 16-bit color keeps its high bytes (Pillow has no
    other way). Gray without a fixed range (32-bit integers, floats) is scaled by the smallest of
    the usual ranges that holds the brightest pixel; see `_WIDE_RANGES`. CMYK goes to sRGB, through
    the embedded profile if there is one. Of several photos in an MPO or HEIC file the main one is
    taken. A HEIC file is turned as its own properties say, and what EXIF says of that is passed
    over, as the format asks: cameras write both, and would have it turned twice.

    Args:
        data: Content of the file.
        max_pixels: Largest width times height, judged by the header before decoding; by default
            `backend.most_pixels()`. Pillow refuses WebP and TIFF files above twice its
            Image.MAX_IMAGE_PIXELS in any case.

    Returns:
        The photo, with at least one pixel.

    Raises:
        PhotoError: If the content is no supported still image, is damaged or too large.
    """
    file_format = _format_of(data[:_HEADER_BYTES])
    reader = _reader(file_format)
    max_pixels = backend.most_pixels() if max_pixels is None else max_pixels
    too_large = f"the image has more than {max_pixels / 1e6:g} megapixels (--max_megapixels)"
    try:
        with warnings_ignored():
            image = reader(io.BytesIO(data))
            num_frames = 1 if file_format == "HEIC" else getattr(image, "n_frames", 1)
        if image.width * image.height > max_pixels:
            raise PhotoError(too_large)
        if num_frames > 1:
            if file_format == "TIFF":
                raise PhotoError(f"a document of {num_frames} pages, not a single photo")
            raise PhotoError(f"an animated image of {num_frames} frames, not a single photo")
        if file_format == "WebP":
            size, info = image.size, image.info
            del image  # It holds the canvases of a film.
            image = _decode_webp(data, size, info)
        photo = _decode(image, file_format, data)
        _drop(image)
        return photo
    except PhotoError:
        raise
    except Image.DecompressionBombError as error:
        raise PhotoError(too_large) from error
    except MemoryError as error:
        raise PhotoError("not enough memory to decode the image") from error
    except Exception as error:
        # Readers meet damaged content with any of a dozen types, from OSError to ZeroDivisionError.
        raise PhotoError(f"the {file_format} file is damaged or incomplete") from error


def digest_of(photo: PhotoLike | PhotoSource) -> str:
    """SHA-256 of a photo's file, or of its pixels where there is none; empty if unreadable."""
    try:
        if isinstance(photo, PhotoSource):
            is_file = photo.problem is None and isinstance(photo.photo, (str, os.PathLike))
            photo = photo.photo if is_file else read_source(photo)
        if isinstance(photo, (str, os.PathLike)):
            return hashlib.sha256(read_photo_bytes(photo)).hexdigest()
        pixels = as_photo(photo).pixels
        return digest_of_pixels(pixels)
    except PhotoError:
        return ""


def digest_of_pixels(pixels: np.ndarray) -> str:
    """SHA-256 of pixels `[H, W, 3]` uint8 and their shape, hexadecimal."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def num_pixels(photo: PhotoLike | PhotoSource) -> int:
    """Width times height of a photo by its header, before it is decoded; 0 of what is no photo."""
    if isinstance(photo, PhotoSource):
        photo = photo.photo if photo.problem is None else ""
    if isinstance(photo, Photo):
        photo = photo.pixels
    if isinstance(photo, np.ndarray):
        return math.prod(photo.shape[:2])
    if isinstance(photo, Image.Image):
        return photo.width * photo.height
    file_format = format_of_file(photo)
    if file_format is None:
        return 0
    try:
        with pathlib.Path(photo).open("rb") as file, warnings_ignored():
            image = _reader(file_format)(file)
            return image.width * image.height
    except Exception:  # As in `decode_photo`, which says what is wrong.
        return 0


def in_groups(
    items: Iterable[_Item],
    *,
    most: int,
    photo_fn: Callable[[_Item], PhotoLike | PhotoSource],
) -> Iterator[list[_Item]]:
    """Cuts photos into groups that memory holds, by their headers: always the same groups.

    Args:
        items: of photos, in order.
        most: items of a group.
        photo_fn: the photo of an item.

    Yields:
        Groups of at most `GROUP_PIXELS` pixels, or of one photo.
    """
    group: list[_Item] = []
    held = 0
    for item in items:
        size = min(num_pixels(photo_fn(item)), backend.most_pixels())
        if group and (len(group) == most or held + size > GROUP_PIXELS):
            yield group
            group, held = [], 0
        group.append(item)
        held += size
    if group:
        yield group


def through_jpeg(pixels: np.ndarray, *, quality: int) -> np.ndarray:
    """Pixels as they come back from a JPEG file, chroma halved (4:2:0).

    Args:
        pixels: uint8 [H, W, 3].
        quality: Of the file, 1 to 95.

    Returns:
        uint8 [H, W, 3].
    """
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    _drop(image)
    buffer.seek(0)
    image = JpegImagePlugin.JpegImageFile(buffer)
    pixels = _to_array(image, "RGB")
    _drop(image)
    return pixels


def encode_png(
    photo: Photo, pixels: np.ndarray, *, keep_metadata: bool = False, note: str | None = None
) -> bytes:
    """Encodes new pixels as PNG, with alpha, gray mode and color profile of the photo.

    Args:
        photo: What was decoded.
        pixels: What replaces `photo.pixels`: uint8, of its shape [H, W, 3]. For a gray photo the
            ITU-R 601 luma is written, which is any of the channels where they are equal.
        keep_metadata: Whether `photo.exif` is written: camera, date, and place, too. Comments and
            XMP are never written.
        note: Text for programs that read the file, as `Photo.note`.

    Returns:
        The content of a PNG file.

    Raises:
        ValueError: If `pixels` does not have the shape of `photo.pixels` or is not uint8.
    """
    image = _with_mode_of(photo, pixels)
    if photo.alpha is not None:
        image.putalpha(Image.fromarray(photo.alpha))
    buffer = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    if note is not None:
        info.add_text("Software", note)
    exif = photo.exif if keep_metadata else None
    image.save(buffer, "PNG", icc_profile=photo.icc_profile, exif=exif, pnginfo=info)
    _drop(image)
    return buffer.getvalue()


def encode_jpeg(
    photo: Photo, pixels: np.ndarray, *, keep_metadata: bool = False, note: str | None = None
) -> bytes:
    """Encodes new pixels as JPEG: as the photo's own file was, where that is known.

    The tables and the halving of chroma are those of the photo's file, so blocks whose pixels did
    not change lose next to nothing. For other photos: quality 95, 4:4:4.

    Args:
        photo: What was decoded.
        pixels: As in `encode_png`.
        keep_metadata: As in `encode_png`.
        note: As in `encode_png`.

    Returns:
        The content of a JPEG file.

    Raises:
        ValueError: As in `encode_png`; or the photo has transparent pixels, which JPEG has not.
    """
    image = _with_mode_of(photo, pixels)
    if photo.alpha is not None:
        raise ValueError("JPEG files have no transparency; PNG has")
    settings: dict[str, Any] = {"quality": _NEW_JPEG_QUALITY, "subsampling": 0}
    if photo.jpeg is not None:
        settings = {
            "qtables": [list(table) for table in photo.jpeg.tables],
            "subsampling": photo.jpeg.subsampling,
            "progressive": photo.jpeg.progressive,
        }
    if photo.icc_profile:
        settings["icc_profile"] = photo.icc_profile
    if keep_metadata and photo.exif:
        settings["exif"] = photo.exif
    if note is not None:
        settings["comment"] = note
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", optimize=True, **settings)
    _drop(image)
    return buffer.getvalue()


def format_of_file(path: str | os.PathLike[str]) -> str | None:
    """Name of a photo file's format ("JPEG", "PNG", ..) by its first bytes; None for no photo."""
    try:
        if not pathlib.Path(path).is_file():
            return None
        with pathlib.Path(path).open("rb") as file:
            return _known_format(file.read(_HEADER_BYTES))
    except (OSError, ValueError):  # ValueError: a null character in the path
        return None


def _with_mode_of(photo: Photo, pixels: np.ndarray) -> Image.Image:
    """New pixels of a photo as an image of its mode, gray or RGB."""
    if pixels.dtype != np.uint8 or pixels.shape != photo.pixels.shape:
        raise ValueError(
            f"pixels must be uint8 {photo.pixels.shape}, got {pixels.dtype} {pixels.shape}"
        )
    image = Image.fromarray(pixels)
    return image.convert("L") if photo.gray else image


def _format_of(header: bytes) -> str:
    """Names the format of a file by its first bytes; PhotoError if it is none of ours."""
    if not header:
        raise PhotoError("the file is empty")
    if file_format := _known_format(header):
        return file_format
    raise PhotoError("not a photo in a supported format (JPEG, PNG, WebP, BMP, TIFF, HEIC)")


def _known_format(header: bytes) -> str | None:
    """Names the format of a file by its first bytes; None if it is none of ours."""
    formats = (name for name, signature in _SIGNATURES if re.match(signature, header, re.DOTALL))
    return next(formats, None)


def _reader(file_format: str) -> Callable[[BinaryIO], ImageFile.ImageFile]:
    if file_format != "HEIC":
        return _READERS[file_format]
    try:
        import pillow_heif  # Optional: a compiled codec that not every platform has.
    except ImportError as error:
        raise PhotoError("HEIC photos need the Python package pillow-heif") from error
    return pillow_heif.HeifImageFile


@contextlib.contextmanager
def warnings_ignored() -> Generator[None]:
    """Ignores warnings about odd headers and large sizes, which are decided upon here.

    The filters belong to the process, hence one thread at a time.
    """
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _drop(image: Image.Image) -> None:
    """Frees the pixels of an image that is not needed any more: Pillow's refer to themselves."""
    is_large = image.width * image.height * 4 > _STRIP_BYTES
    image.close()
    if is_large:
        backend.give_back_memory()


def _decode(image: Image.Image, file_format: str, data: bytes) -> Photo:
    # TIFF alone warns while it decodes; threads may decode the pixels of the others in parallel.
    with warnings_ignored() if file_format == "TIFF" else contextlib.nullcontext():
        image.load()
    _repair_transparent_color(image, file_format, data)
    # Pillow gives 16-bit gray with alpha (PNG color type 4) as RGBA of equal channels.
    return _from_pillow(image, is_gray=file_format == "PNG" and data[25] == 4)


def _decode_webp(data: bytes, size: tuple[int, int], info: dict[Any, Any]) -> Image.Image:
    """The image of a still WebP file: Pillow reads all as films, with five copies of the pixels."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.shape[:2] != size[::-1]:
        raise ValueError("the file is damaged")
    strip = max(_STRIP_BYTES // pixels[0].nbytes, 1)
    for top in range(0, len(pixels), strip):  # From BGR, without another copy.
        rows = pixels[top : top + strip]
        rows[..., :3] = rows[..., 2::-1].copy()
    image = Image.fromarray(pixels)
    image.info = dict(info)
    return image


def _from_pillow(image: Image.Image, *, is_gray: bool = False) -> Photo:
    """The photo of a loaded image, which is changed."""
    icc_profile = image.info.get("icc_profile")
    jpeg, note = _jpeg_settings(image), _note(image)
    with warnings_ignored():
        exif = _make_upright(image)
    if image.mode in _WIDE_RANGES:
        pixels, alpha = _from_wide_gray(image)
        gray = True
    else:
        gray = is_gray or image.mode in ("1", "L", "LA", "La")
        pixels, alpha = _from_eight_bits(image, icc_profile)
        if image.mode in ("CMYK", "LAB"):
            icc_profile = None  # The pixels are sRGB now.
    # Bytes 16 to 20 of a profile name the space of the pixels; 36 to 40 are its signature.
    fits = icc_profile and (icc_profile[16:20], icc_profile[36:40]) == (
        b"GRAY" if gray else b"RGB ",
        b"acsp",
    )
    return Photo(pixels, alpha, gray, icc_profile if fits else None, exif, jpeg=jpeg, note=note)


def _jpeg_settings(image: Image.Image) -> JpegSettings | None:
    """How the file of an image was encoded, where it is JPEG of gray or three colors."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.mode not in ("L", "RGB"):
        return None
    tables = tuple(tuple(image.quantization[key]) for key in sorted(image.quantization))
    if not 1 <= len(tables) <= 4 or any(len(table) != 64 for table in tables):
        return None
    # Rare forms, such as 4:4:0, are -1; whole chroma loses nothing of theirs.
    subsampling = max(JpegImagePlugin.get_sampling(image), 0)
    return JpegSettings(tables, subsampling, bool(image.info.get("progressive")))


def _note(image: Image.Image) -> str | None:
    """The text that a program left in a file, cut to what is worth reading."""
    note = image.info.get(
        "comment" if isinstance(image, JpegImagePlugin.JpegImageFile) else "Software"
    )
    if isinstance(note, bytes):
        note = note[:_MAX_NOTE].decode("utf-8", "replace")
    return note[:_MAX_NOTE] if isinstance(note, str) and note else None


def _make_upright(image: Image.Image) -> bytes | None:
    """Applies the EXIF orientation to the image in place and returns what else EXIF says, if any.

    A damaged block is dropped, since the pixels are fine without it.
    """
    try:
        ImageOps.exif_transpose(image, in_place=True)
        source = image.getexif()
        kept = Image.Exif()
        for tag in _EXIF_TAGS:
            if tag in source:
                kept[tag] = source[tag]
        for directory in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            fields = source.get_ifd(directory).items()
            if fields := {tag: value for tag, value in fields if tag not in _EXIF_DROPPED}:
                kept[directory] = fields
        return kept.tobytes() if len(kept) else None
    except Exception:
        return None


def _repair_transparent_color(image: Image.Image, file_format: str, data: bytes) -> None:
    """Brings PNG's transparent color, in units of the file, to the 8 bits that pixels now have."""
    color = image.info.get("transparency")
    if file_format != "PNG" or color is None:
        return
    depth = data[24]
    if image.mode == "L":
        image.info["transparency"] = color * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16:
        image.info["transparency"] = tuple(level >> 8 for level in color)


# Brightest value of white, by mode; the first one that holds the brightest pixel counts.
_WIDE_RANGES = {
    "I;16": (65535,),
    "I;16L": (65535,),
    "I;16B": (65535,),
    "I;16N": (65535,),
    "I": (255, 65535, 2**31 - 1),
    "F": (1.0, 255.0, 65535.0),
}


def _from_wide_gray(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    levels = np.asarray(image)
    alpha = None
    if "transparency" in image.info:
        alpha = np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)
    ranges = _WIDE_RANGES[image.mode]
    if getattr(image, "tag_v2", {}).get(TiffImagePlugin.BITSPERSAMPLE) == (12,):
        ranges = (4095,)
    values = np.nan_to_num(levels.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    white = next((end for end in ranges if values.max() <= end), ranges[-1])
    gray = np.floor(np.clip(values / white, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2), alpha


def _from_eight_bits(
    image: Image.Image, icc_profile: bytes | None
) -> tuple[np.ndarray, np.ndarray | None]:
    if image.mode == "CMYK":
        image = _cmyk_to_srgb(image, icc_profile)
    elif image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return _to_array(image, "RGB"), None
    rgba = _to_array(image, "RGBA")
    return rgba[:, :, :3].copy(), rgba[:, :, 3].copy()


def _to_array(image: Image.Image, mode: str) -> np.ndarray:
    """Pixels of an image in a mode, strip by strip: NumPy's own way takes three copies.

    Large ones are mapped memory, which the system gets back when they are dropped, whatever
    `backend.keep_freed_memory` says: it is meant for what is needed again at once.
    """
    shape = (image.height, image.width, len(mode))
    pixels = np.empty(shape, np.uint8) if math.prod(shape) <= _STRIP_BYTES else _mapped(shape)
    rows = max(1, _STRIP_BYTES // (image.width * len(mode)))
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        is_whole = rows >= image.height
        strip = image if is_whole else image.crop((0, top, image.width, bottom))
        pixels[top:bottom] = np.asarray(strip if strip.mode == mode else strip.convert(mode))
    return pixels


def _mapped(shape: tuple[int, ...]) -> np.ndarray:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, math.prod(shape), flags), np.uint8).reshape(shape)


def _cmyk_to_srgb(image: Image.Image, icc_profile: bytes | None) -> Image.Image:
    if icc_profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass  # A damaged profile, or one for another space: as if there were none.
    return image.convert("RGB")
