"""Files that are read as data, damaged or hostile: weights, noise, pairs, corners, state of runs.

    python -m tests.drill.readers FOLDER SEED FIRST LAST

reads the cases FIRST to LAST - 1 and writes two JSON lines for each, one before and one after, so
that who started it knows which one it did not survive.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import onnx_writer as onnx
import tflite_writer
from PIL import Image

from afr_jax.core import checkpoint, files, workdir
from afr_jax.data import image_sets, noise_files, pairs, photos, video
from afr_jax.methods.patches import markers
from afr_jax.models.weights import conversion, formats
from afr_jax.recognition import database, entries
from afr_jax.training import trained

from . import ROOT, corpus, hostile, processes, tally

# What reading a case may lead to.
SAME, OTHER, REFUSED = "same", "other", "refused"
_ARRAYS = {"a.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "a.bias": np.ones(2)}
_FLOATS = {name: np.float32(array) for name, array in _ARRAYS.items()}
_MOST_MB, _LIMIT_SECONDS = 1000.0, 300.0
# Cases of one process.
_CASES = 100


class Reader(NamedTuple):
    """A kind of file or folder, and what reads it.

    Attributes:
        write: writes a whole one at a path.
        read: the units of its content, texts that are equal where the content is.
        errors: what reading may raise.
        is_checked: whether no damage may change the content unseen. Units may then be missing
            where the reader says that it leaves out what is damaged: `may_lack`.
        may_lack: whether units may be missing.
        earlier: units that may stand for those of the whole one.
    """

    write: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], Sequence[str]]
    errors: tuple[type[Exception], ...] = (ValueError,)
    is_checked: bool = False
    may_lack: bool = False
    earlier: Callable[[], Sequence[str]] = list


class Case(NamedTuple):
    """A damaged or hostile file.

    Attributes:
        reader: name in `READERS`.
        kind: how it was made.
        allowed: of `SAME`, `OTHER` and `REFUSED`.
        path: the file or folder.
        whole: units of the whole one.
    """

    reader: str
    kind: str
    allowed: Sequence[str]
    path: pathlib.Path
    whole: Sequence[str]


def run(workdir: pathlib.Path, counts: tally.Tally, *, inputs: int, seed: int) -> None:
    """Reads so many damaged files, and each hostile one, in processes of their own."""
    total = inputs + len(hostile.KINDS)
    first = 0
    while first < total:
        last = min(first + _CASES, total)
        flags = [str(workdir / str(first)), *map(str, (seed, first, last))]
        command = [sys.executable, "-m", "tests.drill.readers", *flags]
        ended = processes.Running(command, workdir / f"log_{first}").end(
            limit_seconds=_LIMIT_SECONDS
        )
        begun = None
        for line in map(json.loads, ended.out.splitlines()):
            if "outcome" not in line:
                begun = line
                counts.count("files", line["reader"], line["kind"])
                continue
            begun = None
            _judge(line, counts)
            first = line["case"] + 1
        if begun is not None or ended.code:
            line = begun or {"reader": "process", "kind": "process", "case": first}
            counts.fault(
                "hangs" if ended.hung else "crashes",
                "files",
                line["reader"],
                line["kind"],
                subject=f"case {line['case']} of seed {seed}",
                text=f"exit code {ended.code}: {ended.last_words}",
            )
            first = line["case"] + 1


def _judge(line: dict, counts: tally.Tally) -> None:
    faults = {"crash": "crashes", SAME: "wrong", REFUSED: "wrong", OTHER: "lost"}
    found = []
    if line["outcome"] not in line["allowed"]:
        is_hostile = line["kind"] in hostile.KINDS
        fault = "wrong" if is_hostile and line["outcome"] == OTHER else faults[line["outcome"]]
        found.append((fault, f"{line['outcome']}: {line['text']}"))
    if line["marker"]:
        found.append(("escaped", "it ran code, or read another file"))
    counts.peak("files", line["reader"], line["grown_mb"])
    if line["grown_mb"] > _MOST_MB:
        found.append(("memory", f"{line['grown_mb']:.0f} MB"))
    for fault, text in found:
        counts.fault(
            fault,
            "files",
            line["reader"],
            line["kind"],
            subject=f"case {line['case']}",
            text=text,
        )


def cases(folder: pathlib.Path, *, seed: int, first: int, last: int) -> Iterator[Case]:
    """Makes the cases of a seed, one after the other: first the hostile files, then damage."""
    names = list(READERS)
    whole = {}
    for index in range(first, last):
        place = folder / str(index)
        place.mkdir(parents=True)
        if index < len(hostile.KINDS):
            kind = list(hostile.KINDS)[index]
            reader, write = hostile.KINDS[kind]
            write(place / "file")
            yield Case(reader, kind, [REFUSED], place / "file", [])
            continue
        reader = names[index % len(names)]
        if reader not in whole:
            READERS[reader].write(folder / f"whole_{reader}")
            units = READERS[reader].read(_copied(folder / f"whole_{reader}", place / "whole"))
            whole[reader] = list(units)
        path = _copied(folder / f"whole_{reader}", place / "file")
        kind = _damage(path, np.random.default_rng((seed, index)))
        is_checked = READERS[reader].is_checked
        allowed = [SAME, REFUSED] if is_checked else [SAME, OTHER, REFUSED]
        yield Case(reader, kind, allowed, path, whole[reader])


def read(case: Case) -> tuple[str, str]:
    """Reads a case: `SAME`, `OTHER`, `REFUSED` or "crash", and the message of the latter two."""
    reader = READERS[case.reader]
    try:
        units = list(reader.read(case.path))
    except reader.errors as error:
        text = str(error)
        # People get it as one line.
        is_one_line = 0 < len(text.strip()) and len(text.splitlines()) == 1 and len(text) < 2000
        return REFUSED if is_one_line else "crash", text[:300]
    except BaseException as error:
        return "crash", f"{type(error).__name__}: {error}"[:300]
    known = [*case.whole, *reader.earlier()]
    lacks = reader.may_lack and not list(_left_over(units, known))
    return SAME if units == list(case.whole) or lacks else OTHER, ""


def _left_over(units: Sequence[str], whole: Sequence[str]) -> Iterator[str]:
    rest = list(whole)
    for unit in units:
        if unit in rest:
            rest.remove(unit)
        else:
            yield unit


def _damage(path: pathlib.Path, random: np.random.Generator) -> str:
    """Damages a file, or one of a folder; returns how."""
    if path.is_dir():
        below = sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)
        path = below[random.integers(len(below))]
    data = path.read_bytes()
    start = int(random.integers(len(data)))
    end = min(len(data), start + int(random.integers(1, 65)))
    way = int(random.choice(5, p=[0.5, 0.2, 0.1, 0.1, 0.1]))
    if way == 0:
        data = corpus.flip_bits(data, random)
    elif way == 1:
        data = data[:start]
    elif way == 2:
        data = data[:start] + data[end:]
    elif way == 3:
        data = data[:end] + data[start:]
    else:
        data = data[:start] + random.bytes(end - start) + data[end:]
    path.write_bytes(data)
    return ("a bit flipped", "truncated", "a part lost", "a part doubled", "overwritten")[way]


def _copied(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    copy = shutil.copytree if source.is_dir() else shutil.copyfile
    return pathlib.Path(copy(source, target))


def _digest(value: object) -> str:
    if isinstance(value, np.ndarray):
        value = f"{value.dtype} {value.shape} {value.tobytes().hex()}"
    return hashlib.sha256(repr(value).encode()).hexdigest()


# Weight files, and others that programs are given.


def _weights(path: pathlib.Path) -> list[str]:
    arrays = formats.read_arrays(path)[1]
    return [_digest((name, _digest(array))) for name, array in arrays.items()]


def _write_npz(path: pathlib.Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **_ARRAYS)


def _write_safetensors(path: pathlib.Path) -> None:
    conversion.write_safetensors(path, {"params": {"a": _ARRAYS["a.weight"]}})


def _write_onnx(path: pathlib.Path) -> None:
    onnx.write(path, [onnx.tensor(name, array) for name, array in _ARRAYS.items()])


def _reference(name: str) -> Callable[[pathlib.Path], None]:
    def write(path: pathlib.Path) -> None:
        path.write_bytes((ROOT / "tests" / "references" / name).read_bytes())

    return write


def _noise() -> noise_files.Noise:
    levels = np.random.default_rng(0).integers(-8, 9, (6, 8, 8, 3)).astype(np.int16)
    names = tuple(f"a/{row}" for row in range(6))
    return noise_files.Noise(names, levels, "sample", {"epsilon": 8})


def _read_noise(path: pathlib.Path) -> list[str]:
    noise = noise_files.read_noise(path)
    return [_digest((noise.names, noise.granularity, dict(noise.settings), _digest(noise.levels)))]


def _write_pairs(path: pathlib.Path) -> None:
    rows = [(f"a{row}.jpg", f'b "{row}", c.jpg', row % 2) for row in range(20)]
    files.write_csv(path, ["image_a", "image_b", "same"], rows)


def _read_pairs(path: pathlib.Path) -> list[str]:
    names, same = pairs.read_pairs(path)
    return [_digest((names, same.tolist()))]


def _write_corners(path: pathlib.Path) -> None:
    grid = [[[y, x] for x in (1.5, 2.5)] for y in (3.5, 4.5)]
    files.write_json(path, {f"{row}.jpg": {"left_cheek": grid} for row in range(3)})


def _read_corners(path: pathlib.Path) -> list[str]:
    grids = markers.read_grids(path)
    return [
        _digest((photo, name, _digest(grid)))
        for photo, of_photo in grids.items()
        for name, grid in of_photo.items()
    ]


def _read_film(path: pathlib.Path) -> list[str]:
    film = path.with_suffix(".gif")  # Films are told by their names.
    shutil.copyfile(path, film)
    found = video.read_frames(film)
    # A film that breaks off is listed, and keeps the frames before.
    return [_digest((frame.name, _digest(frame.pixels))) for frame in found.frames]


def _write_film(path: pathlib.Path) -> None:
    images = [Image.new("RGB", (40, 30), (shade, 90, 20)) for shade in (10, 120, 200)]
    with path.open("wb") as file:
        file.write(corpus.encoded(images[0], "gif", save_all=True, append_images=images[1:]))


def _read_records(path: pathlib.Path) -> list[str]:
    sys.path.insert(0, str(path.parent))  # Where a module that it names would be found.
    try:
        data = image_sets.read_records(path, "x", split="train")
        return [_digest((data.sample_ids, _digest(data.images), _digest(data.labels)))]
    finally:
        sys.path.remove(str(path.parent))


def _write_card(path: pathlib.Path) -> None:
    folder = path.with_name("trained")
    folder.mkdir(parents=True, exist_ok=True)
    card = trained.Card("resnet18", 64, 8, identities=("a", "b"))
    trained.write_extractor(folder, card, {"params": {"a": _ARRAYS["a.weight"]}})
    shutil.copyfile(folder / trained.CARD_NAME, path)


# State of runs.


def _write_record(path: pathlib.Path) -> None:
    fields = {"source": "a.jpg", "output": "a_cloaked.png", "pending": False, "judges": None}
    files.write_sealed(path, {**fields, "image": {"faces": [{"dssim": 0.004, "box": [1.5] * 4}]}})


def _write_metrics(path: pathlib.Path) -> None:
    path.mkdir()
    for step in range(20):
        workdir.Workdir(path).append_metrics({"step": step, "loss": 1 / (step + 1)})


def _read_cell(path: pathlib.Path) -> list[str]:
    value = workdir.load_or_compute(path, lambda: "made again")
    # To make it again is as good as to say that it is damaged.
    return [] if value == "made again" else [_digest(value)]


def _tree(step: int) -> dict[str, np.ndarray]:
    return {"a": np.full((4, 5), step, np.float32), "b": np.arange(step, step + 9)}


def _write_checkpoints(path: pathlib.Path) -> None:
    with checkpoint.Checkpoints(path) as saved:
        for step in (1, 2):
            saved.save(step, _tree(step))


def _read_checkpoints(path: pathlib.Path) -> list[str]:
    with checkpoint.Checkpoints(path) as saved:
        found = saved.restore(_tree(0))
    if found is None:
        return []
    return [_checkpoint_unit(*found)]


def _checkpoint_unit(step: int, tree: dict[str, np.ndarray]) -> str:
    return _digest((step, {name: _digest(np.asarray(leaf)) for name, leaf in tree.items()}))


_TAG = entries.ExtractorTag("dlib", "0" * 16, 8, "euclidean")


def _write_database(path: pathlib.Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    numbers = range(len(vectors))
    faces = entries.Entries(
        [f"person {row // 3}" for row in numbers],
        [f"{row}.jpg" for row in numbers],
        [f"{row:064x}" for row in numbers],
        [0 for _ in numbers],
        np.tile(np.float32([1, 2, 9, 8]), (len(vectors), 1)),
        vectors,
        ["mtcnn" for _ in numbers],
    )
    database.open_database(path, tag=_TAG, create=True).append(faces)


def _read_database(path: pathlib.Path) -> list[str]:
    found = database.open_database(path, tag=_TAG).entries()
    arrays = _digest(np.asarray(found.boxes)), _digest(np.asarray(found.vectors))
    return [_digest((*(list(column) for column in found if isinstance(column, list)), *arrays))]


READERS: dict[str, Reader] = {
    "torch": Reader(_reference("torch.pt"), _weights),
    "torch, old format": Reader(_reference("torch_legacy.pt"), _weights),
    "Keras": Reader(_reference("keras.h5"), _weights),
    "npz": Reader(_write_npz, _weights),
    "safetensors": Reader(_write_safetensors, _weights),
    "ONNX": Reader(_write_onnx, _weights),
    "TFLite": Reader(
        lambda path: tflite_writer.write(
            path, [tflite_writer.tensor(name, array) for name, array in _FLOATS.items()]
        ),
        _weights,
    ),
    "card": Reader(
        _write_card, lambda path: [_digest(dataclasses.asdict(trained.read_card(path)))]
    ),
    "photo": Reader(
        lambda path: path.write_bytes(corpus.encoded(Image.new("RGB", (40, 30)), "png")),
        lambda path: [_digest(photos.read_photo(path).pixels)],
        (photos.PhotoError,),
    ),
    "film": Reader(_write_film, _read_film, (video.VideoError,)),
    "records": Reader(hostile.records, _read_records, (ValueError, FileNotFoundError)),
    "pairs": Reader(_write_pairs, _read_pairs),
    "corners": Reader(_write_corners, _read_corners),
    "noise": Reader(
        lambda path: noise_files.write_noise(path, _noise()), _read_noise, is_checked=True
    ),
    "noise records": Reader(
        lambda path: noise_files.write_noise_records(path, _noise()),
        _read_noise,
        (ValueError, FileNotFoundError),
        is_checked=True,
    ),
    "cloak record": Reader(
        _write_record, lambda path: [_digest(files.read_sealed(path))], is_checked=True
    ),
    "cached arrays": Reader(
        lambda path: files.write_arrays(path, _ARRAYS),
        lambda path: [
            _digest((name, _digest(array))) for name, array in files.read_arrays(path).items()
        ],
        is_checked=True,
    ),
    "cell of a study": Reader(
        lambda path: files.write_sealed(path, {"value": {"accuracy": 0.25}}),
        _read_cell,
        is_checked=True,
        may_lack=True,
    ),
    "metrics": Reader(
        _write_metrics,
        lambda path: [_digest(line) for line in workdir.Workdir(path).read_metrics()],
        is_checked=True,
        may_lack=True,
    ),
    "checkpoints": Reader(
        _write_checkpoints,
        _read_checkpoints,
        is_checked=True,
        may_lack=True,
        earlier=lambda: [_checkpoint_unit(1, _tree(1))],
    ),
    "database": Reader(_write_database, _read_database, (database.DatabaseError,), is_checked=True),
}


def main() -> None:
    """Reads the cases of the command line."""
    folder, seed, first, last = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])
    out = sys.stdout
    sys.stdout = sys.stderr
    for index, case in zip(
        itertools.count(first), cases(folder, seed=seed, first=first, last=last), strict=False
    ):
        line = {"case": index, "reader": case.reader, "kind": case.kind}
        print(json.dumps(line), file=out, flush=True)
        # The peak so far counts for nothing: it is set to what is held now.
        with contextlib.suppress(OSError):
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = processes.peak_mb()
        outcome, text = read(case)
        grown = processes.peak_mb() - before
        line |= {"outcome": outcome, "allowed": case.allowed, "text": text}
        line |= {"grown_mb": grown, "marker": (case.path.parent / hostile.MARKER).exists()}
        print(json.dumps(line), file=out, flush=True)


if __name__ == "__main__":
    main()
