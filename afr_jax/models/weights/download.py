"""Weight files that lie on the net: fetched once into a cache, checked, and read from there.

A fetch that broke off goes on where it stopped if the hash of the whole is known. A file has its
name only when it is whole and its hash is right.

The cache is `afr_jax/weights` in `XDG_CACHE_HOME` or the system's place for caches. A file that
somebody has put there is used as it is, so a machine without network needs nothing else.
"""

import contextlib
import functools
import logging
import pathlib
import zipfile
import zlib
from typing import NamedTuple

import pooch
import requests

from afr_jax.core import files


class Source(NamedTuple):
    """Where a weight file comes from.

    Attributes:
        url: address; empty where its authors offer none that a program can fetch.
        file_name: of the file in the cache.
        sha256: of what the address serves, hexadecimal, where its publishers tell it; else None.
        member: name of the file in the zip archive that the address serves, or None.
        hint: where people get the file if there is no address.
    """

    url: str
    file_name: str
    sha256: str | None = None
    member: str | None = None
    hint: str = ""


# Of a server's next bytes.
_TIMEOUT_S = 30
# Bytes at a time; at most so many are fetched again after a break.
_CHUNK = 1 << 16
_KERAS_FACENET = "https://github.com/faustomorales/keras-facenet/releases/download/v0.3.1/"
_DEEPFACE = "https://github.com/serengil/deepface_models/releases/download/v1.0/"
_INSIGHTFACE = (
    "InsightFace's model zoo (github.com/deepinsight/insightface, recognition/arcface_torch) links "
    "to the backbone.pth files"
)

_ADAFACE = "AdaFace's page (github.com/mk-minchul/AdaFace) links to the .ckpt files"
_FRBENCH = "FRBench's releases (github.com/HKU-TASR/FRBench) have the archives with the .pth files"
_FOAMLIU = (
    "its page (github.com/foamliu/MobileFaceNet) has a scripted network; the state dict that its "
    "export.py writes beside it is what is read"
)
_MOBILEFACENET_TF = (
    "the network is MobileFaceNet_TF (github.com/sirius-ai/MobileFaceNet_TF) with 192 numbers, a "
    ".tflite of about 5 MB"
)
_LVFACE = "LVFace's authors publish the .pt and .onnx files on Hugging Face (ByteDance/LVFace)"

# By extractor. Addresses and hashes of FaceNet: package keras-facenet 0.3.1; the other addresses:
# package deepface 0.0.103, which publishes no hashes.
SOURCES = {
    "facenet_vggface2": Source(
        f"{_KERAS_FACENET}20180402-114759-weights.h5",
        "facenet_20180402-114759.h5",
        "8b71e7045497e841c00ee568f031d1a4d30908fceadf6884aef2dec4d545202b",
    ),
    "facenet_casia": Source(
        f"{_KERAS_FACENET}20180408-102900-weights.h5",
        "facenet_20180408-102900.h5",
        "af526097bd89ff84dda94dc071ff39c4cf39922cf0a9d9dea652853cda9616be",
    ),
    "vggface": Source(f"{_DEEPFACE}vgg_face_weights.h5", "vgg_face_weights.h5"),
    "openface": Source(f"{_DEEPFACE}openface_weights.h5", "openface_weights.h5"),
    "deepface": Source(
        "https://github.com/swghosh/DeepFace/releases/download/weights-vggface2-2d-aligned/"
        "VGGFace2_DeepFace_weights_val-0.9034.h5.zip",
        "VGGFace2_DeepFace_weights_val-0.9034.h5",
        member="VGGFace2_DeepFace_weights_val-0.9034.h5",
    ),
    "arcface_r50": Source("", "arcface_r50.pth", hint=_INSIGHTFACE),
    "arcface_r100": Source("", "arcface_r100.pth", hint=_INSIGHTFACE),
    "adaface_ir50": Source("", "adaface_ir50.ckpt", hint=_ADAFACE),
    "adaface_ir101": Source("", "adaface_ir101.ckpt", hint=_ADAFACE),
    "frbench_irse50": Source("", "frbench_irse50.pth", hint=_FRBENCH),
    "frbench_irse100": Source("", "frbench_irse100.pth", hint=_FRBENCH),
    "frbench_mobilefacenet": Source("", "frbench_mobilefacenet.pth", hint=_FRBENCH),
    **{f"lvface_{size}": Source("", f"lvface_{size}.pt", hint=_LVFACE) for size in "tsbl"},
    "foamliu_mobilefacenet": Source("", "foamliu_mobilefacenet.pt", hint=_FOAMLIU),
    "mobilefacenet_192": Source("", "mobilefacenet_192.tflite", hint=_MOBILEFACENET_TF),
    "mobilefacenet": Source(
        "",
        "mobilefacenet_y1_ms1m.npz",
        hint="the network is MobileFaceNet-y1 of InsightFace's model zoo, arrays by layer name",
    ),
}


def cache_folder() -> pathlib.Path:
    """The folder of the cache; it need not exist."""
    return pathlib.Path(pooch.os_cache("afr_jax")) / "weights"


def find(name: str, *, folder: pathlib.Path | None = None) -> pathlib.Path:
    """Path of an extractor's weight file in the cache.

    Args:
        name: key in `SOURCES`.
        folder: of the cache; by default `cache_folder`.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = (folder or cache_folder()) / SOURCES[name].file_name
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    return path


def fetch(
    name: str, *, folder: pathlib.Path | None = None, source: Source | None = None
) -> pathlib.Path:
    """Path of an extractor's weight file, fetched if it is not in the cache.

    Args:
        name: key in `SOURCES`.
        folder: of the cache; by default `cache_folder`.
        source: where the file comes from; by default what `SOURCES` has.

    Raises:
        FileNotFoundError: it is not in the cache and cannot be fetched; the message has the address
            and the place to put the file at.
        ValueError: what the address served is not the file that was published.
    """
    source = source or SOURCES[name]
    folder = folder or cache_folder()
    path = folder / source.file_name
    if path.is_file():
        return path
    if not source.url:
        raise FileNotFoundError(
            f"the weights of {name} have no address to fetch them from: {source.hint}; name your "
            f"file, or put it at {path}"
        )
    pooch.get_logger().setLevel(logging.ERROR)
    known = None if source.sha256 is None else f"sha256:{source.sha256}"
    archive = None if source.member is None else f"{source.file_name}.zip"
    file_name = archive or source.file_name
    part = folder / f".{file_name}.part"
    download_fn = functools.partial(_download, part=part, may_resume=known is not None)
    try:
        found = pooch.retrieve(
            source.url, known, fname=file_name, path=folder, downloader=download_fn
        )
    except (requests.RequestException, OSError) as error:
        kept = part.stat().st_size if known and part.is_file() else 0
        raise FileNotFoundError(
            f"the weights of {name} could not be fetched from {source.url} ({_reason(error)})"
            f"{f'; {kept} bytes are kept, another try goes on from there' if kept else ''}; or "
            f"fetch them yourself and put {'the unpacked file' if archive else 'the file'} at "
            f"{path}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"what {source.url} served for {name} does not have the SHA-256 {source.sha256}: it "
            "was dropped"
        ) from error
    if source.member is not None:
        _unpack(pathlib.Path(found), source.member, path)
    return path


def _download(
    url: str, output_file: str, _: object, *, part: pathlib.Path, may_resume: bool
) -> None:
    """Fetches an address into a file, from where an earlier try broke off (pooch's protocol).

    Only this process writes to `output_file`: it takes what an earlier one left at `part`, and
    leaves its own there if it breaks off.

    Raises:
        requests.RequestException: the server is not there, refuses, or ends too early.
    """
    own = pathlib.Path(output_file)
    if may_resume:
        with contextlib.suppress(FileNotFoundError):
            part.replace(own)
    try:
        _append(url, own)
    except BaseException:
        if may_resume and own.stat().st_size:
            own.replace(part)
        raise


def _append(url: str, path: pathlib.Path) -> None:
    """Writes what a file lacks of what an address serves, or all of it."""
    start = path.stat().st_size if path.exists() else 0
    # Bytes as they are stored: a length that can be checked, and a place to go on from.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
        is_rest = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if start and (response.status_code != requests.codes.partial_content or not is_rest):
            # The server cannot go on, or has nothing beyond: all of it again.
            start = 0
            if response.status_code == requests.codes.range_not_satisfiable:
                path.write_bytes(b"")
                return _append(url, path)
        response.raise_for_status()
        size = response.headers.get("Content-Length", "")
        total = start + int(size) if size.isdigit() else None
        with open(path, "ab" if start else "wb") as file:
            for chunk in response.iter_content(_CHUNK):
                file.write(chunk)
    found = path.stat().st_size
    if total is not None and found != total:
        raise requests.ConnectionError(f"the server sent {found} of {total} bytes")
    return None


def _reason(error: Exception) -> str:
    """A short reason: the answer of a server, or the kind of the error."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"{response.status_code} {response.reason}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the server ended before all was sent"
    cause = error.args[0] if error.args else ""
    return cause if isinstance(cause, str) and cause.startswith("the ") else type(error).__name__


def _unpack(archive: pathlib.Path, member: str, path: pathlib.Path) -> None:
    """Writes one file of an archive to a path, whole or not at all, and drops the archive."""
    try:
        with zipfile.ZipFile(archive) as file:
            (inside,) = (n for n in file.namelist() if pathlib.PurePosixPath(n).name == member)
            with file.open(inside) as source:
                parts = iter(lambda: source.read(_CHUNK), b"")
                files.write_parts_atomically(path, parts, overwrite=True)
    except FileNotFoundError:
        # Another process may have unpacked and dropped it meanwhile.
        if not path.is_file():
            raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        archive.unlink(missing_ok=True)
        raise ValueError(f"{archive} is not an archive with {member}: it was dropped") from error
    archive.unlink(missing_ok=True)
