"""Weight files of other libraries as named arrays; nothing in a file is ever executed.

The kind of a file is told by its content, not by its name. Which array belongs where is the matter
of the module of each network.
"""

import os
import pathlib
import zipfile

import h5py
import numpy as np
import safetensors
import safetensors.numpy

from afr_jax.models.weights import onnx_files, torch_files

_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZIP = b"PK\x03\x04"


def kind_of(path: str | os.PathLike[str]) -> str:
    """Kind of a weight file: "torch", "keras", "npz", "safetensors", "onnx" or "unknown".

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
        except (zipfile.BadZipFile, OSError, NotImplementedError):
            # The directory of a zip is at its end: cut off in a truncated one.
            return "torch" if b"data.pkl" in head else "npz"
        return "torch" if any(name.endswith("/data.pkl") for name in names) else "npz"
    return "unknown"


def read_arrays(path: str | os.PathLike[str]) -> tuple[str, dict[str, np.ndarray]]:
    """The arrays of a weight file.

    Args:
        path: a torch state dict (`.pt`, `.pth`, both of torch's formats), Keras weights (`.h5`),
            `.npz`, safetensors or ONNX.

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
    }
    if kind not in readers:
        raise ValueError(
            f"{path} is not a weight file that can be read: neither torch, Keras (HDF5), npz, "
            "safetensors nor ONNX"
        )
    return kind, readers[kind](path)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return safetensors.numpy.load(pathlib.Path(path).read_bytes())
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        # A member of the archive that is no array comes as bytes.
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("it holds other things than arrays")
        return arrays
    # Whatever zip, zlib and the header of an array raise: the file is damaged or no npz.
    except Exception as error:
        raise ValueError(f"{path} is not a readable npz file: {error}") from error


def _read_keras(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Keras's own layout: the groups name their layers, the layers their arrays, in order."""
    try:
        with h5py.File(path, "r") as file:
            root = file.get("model_weights", file)
            if "layer_names" not in root.attrs:
                raise ValueError("it holds no Keras weights")
            arrays = {}
            for layer in map(_text, root.attrs["layer_names"]):
                group = root[layer]
                for name in map(_text, group.attrs["weight_names"]):
                    leaf = name.rpartition("/")[2].partition(":")[0]
                    arrays[f"{layer}/{leaf}"] = np.asarray(group[name])
            return arrays
    except Exception as error:
        raise ValueError(f"{path} is not a readable Keras weight file: {error}") from error


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name
