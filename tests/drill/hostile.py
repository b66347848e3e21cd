"""Files that would run code, read another file or fill the memory, if they were believed."""

import csv
import io
import json
import os
import pathlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable

import h5py
import numpy as np
import onnx_writer as onnx
import tflite_writer
import torch_writer as torch
from PIL import Image

from afr_jax.data import array_records

from . import corpus

# What code that is run would leave beside the file.
MARKER = "marker"
_DEEP = "[" * 100_000 + "]" * 100_000


# Code.


def _running_pickle(path: pathlib.Path) -> bytes:
    """A pickle that makes a file beside itself, if it is let."""
    command = str(path.with_name(MARKER)).encode()
    return b"cpathlib\nPath\n(S'" + command + b"'\ntRp0\n0cbuiltins\ngetattr\n(g0\nS'touch'\ntR(tR."


def _pickle_alone(path: pathlib.Path) -> None:
    path.write_bytes(b"\x80\x02" + _running_pickle(path))


def _pickle_in_torch(path: pathlib.Path) -> None:
    path.write_bytes(torch.archive(_running_pickle(path), {}))


def _pickle_in_npz(path: pathlib.Path) -> None:
    header = io.BytesIO()
    fields = {"descr": "|O", "fortran_order": False, "shape": ()}
    np.lib.format.write_array_header_1_0(header, fields)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a", "names", "levels", "granularity", "settings"):
            archive.writestr(f"{name}.npy", header.getvalue() + _running_pickle(path))


def _pickle_in_old_torch(path: pathlib.Path) -> None:
    magic, protocol, system = 0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}
    parts = [pickle.dumps(value, 2) for value in (magic, protocol, system)]
    path.write_bytes(b"".join(parts) + _running_pickle(path) + pickle.dumps([], 2))


def _pickle_as_state(path: pathlib.Path) -> None:
    """An object whose state is set by a function of another module."""
    call = torch.name("os", "system") + b"(" + torch.text(f"touch {path.with_name(MARKER)}") + b"tR"
    path.write_bytes(torch.archive(torch.index(torch.dictionary({torch.text("a"): call})), {}))


def _pickle_of_the_reader(path: pathlib.Path) -> None:
    """Names what the reader itself is made of, to change it."""
    call = torch.name("afr_jax.models.weights.torch_files", "pathlib.Path")
    call += b"(" + torch.text(str(path.with_name(MARKER))) + b"tR"
    path.write_bytes(torch.archive(torch.index(torch.dictionary({torch.text("a"): call})), {}))


def _records_of_a_class(path: pathlib.Path) -> None:
    """TFDS imports the module of a class that a data set names; here it is in the path."""
    records(path)
    module = path.parent / "hostile_module.py"
    module.write_text(f"open({str(path.with_name(MARKER))!r}, 'w')\n")
    _edit(path, "features.json", b"tensorflow_datasets.core.features.text_feature.Text")


def _records_of_a_legacy_class(path: pathlib.Path) -> None:
    records(path)
    (path / "x" / "1.0.0" / "features.json").write_text(
        json.dumps({"type": "antigravity.Feature", "content": {}})
    )


def _lambda_in_keras(path: pathlib.Path) -> None:
    """A layer whose function is code of Python, as Keras saves it; it has no arrays."""
    keras(path, shape=(4,), dtype=h5py.string_dtype())
    with h5py.File(path, "a") as file:
        layer = {"class_name": "Lambda", "config": {"function": ["4wEAAAA=", None, None]}}
        file.attrs["model_config"] = json.dumps({"config": {"layers": [layer]}})


# Memory.


def _stride_bomb(path: pathlib.Path) -> None:
    tensor = torch.tensor("0", (1 << 15, 1 << 16), strides=(0, 0), size=1)
    index = torch.index(torch.dictionary({torch.text("a"): tensor}))
    path.write_bytes(torch.archive(index, {"0": bytes(4)}))


def _npz_bomb(path: pathlib.Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("a", "levels"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                fields = {"descr": "|i1", "fortran_order": False, "shape": (1 << 20, 40, 40, 1)}
                np.lib.format.write_array_header_1_0(member, fields)
                for _ in range(1600):
                    member.write(bytes(1 << 20))


def _noise_bomb(path: pathlib.Path) -> None:
    """Noise of little data and many zeros."""
    _npz_bomb(path)
    with zipfile.ZipFile(path, "a") as archive:
        for name, value in (
            ("names", np.array(["a"])),
            ("granularity", np.array("sample")),
            ("settings", np.array("{}")),
        ):
            member = io.BytesIO()
            np.save(member, value)
            archive.writestr(f"{name}.npy", member.getvalue())


def _keras_bomb(path: pathlib.Path) -> None:
    keras(path, shape=(1 << 31,), dtype="f4", chunks=(1 << 20,), compression="gzip")


def _torch_bomb(path: pathlib.Path) -> None:
    """Values of zeros, deflated, as torch never writes them."""
    index = torch.index(torch.dictionary({torch.text("a"): torch.tensor("0", (1 << 29,))}))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("x/data.pkl", index)
        with archive.open("x/data/0", "w", force_zip64=True) as member:
            for _ in range(2048):
                member.write(bytes(1 << 20))


def _many_tensors(path: pathlib.Path) -> None:
    """One small storage, taken as many arrays."""
    arrays = {
        torch.text(f"a{row}"): torch.tensor("0", (1 << 10, 1 << 6), size=1 << 16)
        for row in range(20_000)
    }
    path.write_bytes(torch.archive(torch.index(torch.dictionary(arrays)), {"0": bytes(1 << 18)}))


def _doubling_pickle(path: pathlib.Path) -> None:
    """Lists of two times the list before: 2 ** 40 entries, if somebody walks through them."""
    value = b"]q\x00" + b"".join(
        b"](h" + bytes([row]) + b"h" + bytes([row]) + b"eq" + bytes([row + 1]) for row in range(40)
    )
    path.write_bytes(torch.archive(b"\x80\x02" + value + b".", {}))


def _long_pickle(path: pathlib.Path) -> None:
    """A text that says to be of 4 GB."""
    path.write_bytes(torch.archive(b"\x80\x02X" + struct.pack("<I", 0xFFFFFFF0) + b"a.", {}))


def _npy_header(path: pathlib.Path) -> None:
    """A header of half a gigabyte, of spaces."""
    header = np.lib.format.magic(2, 0) + struct.pack("<I", 1 << 29)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w", force_zip64=True) as member,
    ):
        member.write(header)
        for _ in range(512):
            member.write(b" " * (1 << 20))


def _npy_shape(path: pathlib.Path) -> None:
    """A shape without its values."""
    header = io.BytesIO()
    fields = {"descr": "<f8", "fortran_order": False, "shape": (1 << 20, 1 << 20)}
    np.lib.format.write_array_header_1_0(header, fields)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header.getvalue() + bytes(8))


def _npz_of_one_member(path: pathlib.Path) -> None:
    """A directory that names one member a thousand times: each is small, all together are not."""
    member = io.BytesIO()
    np.save(member, np.zeros((1 << 10, 1 << 11)))
    single = io.BytesIO()
    with zipfile.ZipFile(single, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0000.npy", member.getvalue())
    data = single.getvalue()
    start = data.index(b"PK\1\2")
    local, entry = data[:start], data[start : data.index(b"PK\5\6")]
    entries = [entry.replace(b"0000.npy", f"{row:04}.npy".encode()) for row in range(1000)]
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1000, 1000, len(entry) * 1000, len(local), 0)
    path.write_bytes(local + b"".join(entries) + end)


def _keras_fill(path: pathlib.Path) -> None:
    """An array that was never written: HDF5 makes it of its fill value."""
    keras(path, shape=(1 << 31,), dtype="f4")


def _keras_plugin(path: pathlib.Path) -> None:
    """Values packed by a filter that HDF5 would look for in a library on the disk."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = ["a"]
        file.create_group("a").attrs["weight_names"] = ["a/kernel:0"]
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_chunk((4,))
        made.set_filter(32004, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((4,))
        file.create_group("a/a")
        h5py.h5d.create(file["a/a"].id, b"kernel:0", h5py.h5t.IEEE_F32LE, space, made)


def _onnx_dims(path: pathlib.Path) -> None:
    """Dimensions of 2 ** 62 values."""
    onnx.write(path, [[(1, 1 << 31), (1, 1 << 31), (2, 1), (8, "a"), (9, bytes(8))]])


def _onnx_negative(path: pathlib.Path) -> None:
    onnx.write(path, [[(1, -2), (1, -2), (2, 1), (8, "a"), (9, bytes(16))]])


def _onnx_blocks(path: pathlib.Path) -> None:
    """Few bytes, dequantized in blocks of many."""
    sides = (1 << 16, 1 << 15)
    tensors = [
        onnx.tensor("q", np.zeros(4, np.int8)),
        onnx.tensor("s", np.ones(sides[:1], np.float32)),
    ]
    tensors[0][0] = (1, sides[0] * sides[1])
    node = onnx.node("DequantizeLinear", ["q", "s"], ["a"], block_size=1 << 15)
    onnx.write(path, tensors, [node])


def _tflite_bomb(path: pathlib.Path) -> None:
    """Many arrays that share the bytes of one."""
    side = 1 << 20
    shared = [(f"a{row}", (side,), 9, 0) for row in range(1, 4000)]
    tflite_writer.write(path, [("a0", (side,), 9, bytes(side)), *shared])


def _tflite_vector(path: pathlib.Path) -> None:
    """A list that says to be longer than the file."""
    data = bytearray(tflite_writer.write(path, [("a", (64,), 9, b"\x07" * 64)]).read_bytes())
    place = data.index(b"\x07" * 64) - 4
    data[place : place + 4] = struct.pack("<I", 0x7FFFFFFF)
    path.write_bytes(data)


def _overlapping_safetensors(path: pathlib.Path) -> None:
    """A thousand arrays of the same bytes."""
    num_bytes = 1 << 22
    one = {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [0, num_bytes]}
    header = json.dumps({f"a{row}": one for row in range(1000)}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes))


def _safetensors_overflow(path: pathlib.Path) -> None:
    one = {"dtype": "F32", "shape": [1 << 33, 1 << 33], "data_offsets": [0, 8]}
    header = json.dumps({"a": one}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def _compressed_records(path: pathlib.Path) -> None:
    """A photo of many pixels as an example of a data set."""
    records(path)
    for part in (path / "x" / "1.0.0").glob("*array_record*"):
        part.write_bytes(b"\0" * 64 + struct.pack("<Q", 1 << 60) * 8192)


def _photo_of_zeros(path: pathlib.Path) -> None:
    """A text of two gigabytes in a PNG of a few pixels."""
    packer = zlib.compressobj(1)
    text = b"Comment\0\0" + b"".join(packer.compress(bytes(1 << 20)) for _ in range(2048))
    body = b"zTXt" + text + packer.flush()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = corpus.encoded(Image.new("RGB", (8, 8)), "png")
    path.write_bytes(data[:33] + chunk + data[33:])


def _film_of_zeros(path: pathlib.Path) -> None:
    """A still picture as a film of 65,535 x 65,535."""
    images = [Image.new("L", (8, 8), value) for value in (10, 200)]
    data = bytearray(corpus.encoded(images[0], "gif", save_all=True, append_images=images[1:]))
    data[6:10] = b"\xff" * 4
    path.write_bytes(data)


# Other files.


def _keras_link(path: pathlib.Path) -> None:
    with h5py.File(path.with_name("other.h5"), "w") as file:
        file["values"] = np.ones(4, np.float32)
    keras(path, link=h5py.ExternalLink("other.h5", "values"))


def _keras_outside(path: pathlib.Path) -> None:
    path.with_name("raw").write_bytes(bytes(16))
    keras(path, shape=(4,), dtype="f4", external=[(str(path.with_name("raw")), 0, 16)])


def keras(path: pathlib.Path, **options: object) -> None:
    """Keras weights of one array: what `create_dataset` takes, or a link in its place."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = ["a"]
        group = file.create_group("a")
        group.attrs["weight_names"] = ["a/kernel:0"]
        if "link" in options:
            group["a/kernel:0"] = options["link"]
        else:
            group.create_dataset("a/kernel:0", **options)


def _onnx_outside(path: pathlib.Path) -> None:
    path.with_name("net.data").write_bytes(bytes(8))
    onnx.write(path, [[(1, 2), (2, 1), (8, "a"), (13, [(1, "location"), (2, "net.data")])]])


def _long_safetensors(path: pathlib.Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 4 << 30]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))


def _keras_soft_link(path: pathlib.Path) -> None:
    """A path within the file that leads to itself."""
    keras(path, link=h5py.SoftLink("/a/a/kernel:0"))


def _keras_virtual(path: pathlib.Path) -> None:
    """An array put together of those of other files."""
    with h5py.File(path.with_name("other.h5"), "w") as file:
        file["values"] = np.ones(4, np.float32)
    layout = h5py.VirtualLayout(shape=(4,), dtype="f4")
    layout[:] = h5py.VirtualSource(str(path.with_name("other.h5")), "values", shape=(4,))
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = ["a"]
        group = file.create_group("a")
        group.attrs["weight_names"] = ["a/kernel:0"]
        group.create_group("a").create_virtual_dataset("kernel:0", layout)


def _onnx_absolute(path: pathlib.Path) -> None:
    onnx.write(path, [[(1, 2), (2, 1), (8, "a"), (13, [(1, "location"), (2, "/etc/passwd")])]])


def _records_elsewhere(path: pathlib.Path) -> None:
    """A data set whose files lie outside of its folder."""
    records(path)
    records(path.with_name("other"))
    info = path / "x" / "1.0.0" / "dataset_info.json"
    fields = json.loads(info.read_text())
    outside = path.with_name("other") / "x" / "1.0.0"
    for split in fields["splits"]:
        split["filepathTemplate"] = f"{outside}/x-{{SPLIT}}.array_record-{{SHARD_X_OF_Y}}"
    info.write_text(json.dumps(fields))


def _photo_is_a_link(path: pathlib.Path) -> None:
    path.symlink_to("/dev/zero")


def _photo_is_a_pipe(path: pathlib.Path) -> None:
    os.mkfifo(path)


def _postscript(path: pathlib.Path) -> None:
    """A program that an interpreter of PostScript would run."""
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n("
        + bytes(path.with_name(MARKER))
        + b") (w) file closefile\n"
    )


def _svg(path: pathlib.Path) -> None:
    path.write_text("<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>")


# Text.


def _deep_json(path: pathlib.Path) -> None:
    path.write_text('{"a": {"left_cheek": ' + "[" * 100_000 + "]" * 100_000 + "}}")


def _deep_pickle(path: pathlib.Path) -> None:
    path.write_bytes(torch.archive(b"\x80\x02" + b"(" * 200_000 + b"l" * 10 + b".", {}))


def _looped_pickle(path: pathlib.Path) -> None:
    loop: dict = {}
    loop["state_dict"] = loop
    path.write_bytes(torch.archive(pickle.dumps(loop, 2), {}))


def _long_cell(path: pathlib.Path) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["image_a", "image_b", "same"], ["a" * 10**6, "b", "1"]])


def _wide_corners(path: pathlib.Path) -> None:
    path.write_text('{"a": {"left_cheek": [[[1e999, 1], [1, 2]], [[1, 2], [3, 4]]]}}')


def _deep_line(path: pathlib.Path) -> None:
    """A record that the parser takes, and that is too deep to be written."""
    path.write_text('{"a": ' + "[" * 700 + "]" * 700 + ', "checksum": 1}')


def _deep_settings(path: pathlib.Path) -> None:
    """Noise with settings without end."""
    arrays = {
        "names": np.array(["a"]),
        "levels": np.zeros((1, 2, 2, 3), np.int16),
        "granularity": np.array("sample"),
        "settings": np.array(_DEEP),
    }
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _long_number(path: pathlib.Path) -> None:
    path.write_text('{"a": {"left_cheek": [[[' + "9" * 10**6 + ", 1], [1, 2]], [[1, 2], [3, 4]]]}}")


def _ragged_corners(path: pathlib.Path) -> None:
    path.write_text('{"a": {"left_cheek": [[[1, 2], [1]], [[1, 2], 3]]}}')


def _null_cell(path: pathlib.Path) -> None:
    path.write_bytes(b"image_a,image_b,same\na\0b,b,1\n\xff\xfe,b,0\n")


def _many_columns(path: pathlib.Path) -> None:
    path.write_text(",".join(["image"] * 200_000) + "\n" + "," * 200_000 + "\n")


def _deep_card(path: pathlib.Path) -> None:
    path.write_text('{"version": ' + _DEEP + "}")


def _card_of_a_path(path: pathlib.Path) -> None:
    """A card that names an architecture as a path."""
    fields = {"version": 1, "weights": "../../secret", "architecture": "../../etc/passwd"}
    path.write_text(json.dumps(fields | {"template": 3, "identities": 7}))


def records(path: pathlib.Path) -> None:
    """A small data set of images, `x` below the path."""
    image = np.full((8, 8, 3), 90, np.uint8)
    names = [f"{name}/{row}" for name in "ab" for row in "01"]
    examples = [array_records.Example(name, image, name[0]) for name in names]
    array_records.write_examples({"train": examples}, ("a", "b"), path, name="x")


def _edit(path: pathlib.Path, name: str, old: bytes) -> None:
    """Names a class of a module that lies beside the data set in the place of another."""
    file = path / "x" / "1.0.0" / name
    data = file.read_bytes()
    assert old in data, data
    file.write_bytes(data.replace(old, b"hostile_module.Feature"))


KINDS: dict[str, tuple[str, Callable[[pathlib.Path], None]]] = {
    # Code.
    "a pickle that runs": ("torch", _pickle_alone),
    "a pickle that runs, in a torch archive": ("torch", _pickle_in_torch),
    "a pickle that runs, in torch's old format": ("torch, old format", _pickle_in_old_torch),
    "a pickle that runs, in an npz": ("npz", _pickle_in_npz),
    "a pickle that runs, in noise": ("noise", _pickle_in_npz),
    "a pickle that runs, in cached arrays": ("cached arrays", _pickle_in_npz),
    "a pickle that calls the system": ("torch", _pickle_as_state),
    "a pickle that names the reader": ("torch", _pickle_of_the_reader),
    "records of a class to be imported": ("records", _records_of_a_class),
    "records of an old class to be imported": ("records", _records_of_a_legacy_class),
    "a Keras layer of code": ("Keras", _lambda_in_keras),
    "a photo in PostScript": ("photo", _postscript),
    "a film in PostScript": ("film", _postscript),
    # Memory.
    "a deep pickle": ("torch", _deep_pickle),
    "a pickle that holds itself": ("torch", _looped_pickle),
    "a pickle that doubles": ("torch", _doubling_pickle),
    "a pickle of a long text": ("torch", _long_pickle),
    "strides of zero": ("torch", _stride_bomb),
    "torch values of zeros": ("torch", _torch_bomb),
    "an npz of zeros": ("npz", _npz_bomb),
    "an npz with a long header": ("npz", _npy_header),
    "an npz of a shape alone": ("npz", _npy_shape),
    "an npz of one member many times": ("npz", _npz_of_one_member),
    "cached arrays of zeros": ("cached arrays", _npz_bomb),
    "noise of zeros": ("noise", _noise_bomb),
    "an HDF5 of few chunks": ("Keras", _keras_bomb),
    "an HDF5 of a fill value": ("Keras", _keras_fill),
    "ONNX dimensions without values": ("ONNX", _onnx_dims),
    "ONNX dimensions below zero": ("ONNX", _onnx_negative),
    "ONNX blocks of few values": ("ONNX", _onnx_blocks),
    "TFLite arrays of the same bytes": ("TFLite", _tflite_bomb),
    "a TFLite list longer than the file": ("TFLite", _tflite_vector),
    "a safetensors header of 4 GB": ("safetensors", _long_safetensors),
    "safetensors arrays of the same bytes": ("safetensors", _overlapping_safetensors),
    "a safetensors shape that overflows": ("safetensors", _safetensors_overflow),
    "records of lengths without end": ("records", _compressed_records),
    "a photo with a text of zeros": ("photo", _photo_of_zeros),
    "a film of many pixels": ("film", _film_of_zeros),
    # Other files.
    "an HDF5 link to another file": ("Keras", _keras_link),
    "an HDF5 link to itself": ("Keras", _keras_soft_link),
    "an HDF5 array in another file": ("Keras", _keras_outside),
    "an HDF5 array of other files": ("Keras", _keras_virtual),
    "an HDF5 filter of a library": ("Keras", _keras_plugin),
    "an ONNX array in another file": ("ONNX", _onnx_outside),
    "an ONNX array at an absolute path": ("ONNX", _onnx_absolute),
    "records in another folder": ("records", _records_elsewhere),
    "a photo that is a device": ("photo", _photo_is_a_link),
    "a photo that is a pipe": ("photo", _photo_is_a_pipe),
    "a photo in SVG": ("photo", _svg),
    # Text.
    "deep JSON as corners": ("corners", _deep_json),
    "deep JSON as a record": ("cloak record", _deep_json),
    "deep JSON that can be parsed": ("cloak record", _deep_line),
    "deep JSON in noise": ("noise", _deep_settings),
    "deep JSON as a card": ("card", _deep_card),
    "a card that is a path": ("card", _card_of_a_path),
    "corners that are infinite": ("corners", _wide_corners),
    "corners of a million digits": ("corners", _long_number),
    "corners of different lengths": ("corners", _ragged_corners),
    "a cell of a million letters": ("pairs", _long_cell),
    "a cell with a null": ("pairs", _null_cell),
    "columns without end": ("pairs", _many_columns),
}
