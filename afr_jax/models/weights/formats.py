"""Weight files of other libraries as named arrays; nothing in a file is ever executed.

The kind of a file is told by its content, not by its name. Which array belongs where is the matter
of the module of each network.
"""

import json
import os
import pathlib
import zipfile

import h5py
import numpy as np
import safetensors.numpy

from afr_jax.core import files
from afr_jax.models.weights import checks, onnx_files, tflite_files, torch_files

# In the metadata of a safetensors file: `files.digest_of` its arrays.
CHECKSUM = "sha256"
_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZIP = b"PK\x03\x04"
# Filters of HDF5 itself: deflate, shuffle, Fletcher's checksum, szip, n-bit, scale and offset.
# Another one would be looked for in a library on disk.
_FILTERS = (1, 2, 3, 4, 5, 6)


def kind_of(path: str | os.PathLike[str]) -> str:
    """Kind of a weight file.

    One of "torch", "keras", "npz", "safetensors", "onnx", "tflite" and "unknown".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder or a device.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no weight file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(_HDF5):
        return "keras"
    if tflite_files.is_tflite(head):
        return "tflite"
    if torch_files.is_legacy(head):
        return "torch"
    # A header of JSON behind its length; the length of a real header has six zero bytes or so.
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "safetensors"
    if onnx_files.is_onnx(head):
        return "onnx"
    if head.startswith(_ZIP):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        # The directory of a zip is at its end: cut off in a truncated file, or damaged.
        except Exception:
            return "torch" if b"data.pkl" in head else "npz"
        return "torch" if any(name.endswith("/data.pkl") for name in names) else "npz"
    return "unknown"


def read_arrays(path: str | os.PathLike[str]) -> tuple[str, dict[str, np.ndarray]]:
    """The arrays of a weight file.

    Args:
        path: a torch state dict (`.pt`, `.pth`, both of torch's formats), Keras weights (`.h5`),
            `.npz`, safetensors, ONNX or TensorFlow Lite.

    Returns:
        The kind of the file (see `kind_of`), and the arrays in the order of the file. Names are
        those of the file; an array of Keras is called "layer/array".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, or holds more than arrays.
    """
    kind = kind_of(path)
    readers = {
        "torch": torch_files.read_state_dict,
        "keras": _read_keras,
        "npz": _read_npz,
        "safetensors": read_safetensors,
        "onnx": onnx_files.read_arrays,
        "tflite": tflite_files.read_arrays,
    }
    if kind not in readers:
        raise ValueError(
            f"{path} is not a weight file that can be read: neither torch, Keras (HDF5), npz, "
            "safetensors, ONNX nor TensorFlow Lite"
        )
    return kind, readers[kind](path)


def read_safetensors(
    path: str | os.PathLike[str], *, checksum: str | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file; checked where its metadata have a `CHECKSUM`.

    Args:
        path: the file.
        checksum: what a card beside the file has noted of its arrays; None where it has not.

    Raises:
        ValueError: the file is damaged, or not the one of the card.
    """
    try:
        data = pathlib.Path(path).read_bytes()
        arrays = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found = files.digest_of(arrays)
        if header.get("__metadata__", {}).get(CHECKSUM) not in (None, found):
            raise ValueError("its checksum is another one")
        if checksum not in (None, found):
            raise ValueError("its arrays are not those of the card beside it")
        return arrays
    except Exception as error:
        raise checks.unreadable(path, "safetensors file", error) from error


def _read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            files.check_npz(archive, os.path.getsize(path))
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    # Whatever zip, zlib and the header of an array raise: the file is damaged or no npz.
    except Exception as error:
        raise checks.unreadable(path, "npz file", error) from error


def _read_keras(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Keras's own layout: the groups name their layers, the layers their arrays, in order."""
    try:
        with h5py.File(path, "r") as file:
            root = _child(file, "model_weights") if "model_weights" in file else file
            if "layer_names" not in root.attrs:
                raise ValueError("it holds no Keras weights")
            found = {}
            for layer in map(_text, root.attrs["layer_names"]):
                group = _child(root, layer)
                for name in map(_text, group.attrs["weight_names"]):
                    leaf = name.rpartition("/")[2].partition(":")[0]
                    found[f"{layer}/{leaf}"] = _checked(_child(group, name), name)
            # A chunk that was never written takes no room in the file.
            num_bytes = sum(dataset.nbytes for dataset in found.values())
            files.check_expansion(num_bytes, os.path.getsize(path))
            return {name: np.asarray(dataset) for name, dataset in found.items()}
    except Exception as error:
        raise checks.unreadable(path, "Keras weight file", error) from error


def _child(group: h5py.Group | h5py.Dataset, name: str) -> h5py.Group | h5py.Dataset:
    """What lies in a group under a path, where no part of the path leads out of the file."""
    found = group
    for part in filter(None, name.split("/")):
        if not isinstance(found, h5py.Group) or not isinstance(
            found.get(part, getlink=True), h5py.HardLink
        ):
            raise ValueError(f"{name!r} is missing, or lies in another file")
        found = found[part]
    return found


def _checked(dataset: h5py.Group | h5py.Dataset, name: str) -> h5py.Dataset:
    """An array whose values lie in the file and need no plugin to be read."""
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "fiu":
        raise ValueError(f"{name!r} is no array of numbers")
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"the values of {name!r} lie in another file")
    made = dataset.id.get_create_plist()
    filters = {made.get_filter(index)[0] for index in range(made.get_nfilters())}
    if not filters <= set(_FILTERS):
        raise ValueError(f"{name!r} is packed by a filter that is not part of HDF5")
    return dataset


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name
