"""TFDS data sets as ArrayRecord files: written and read without TensorFlow.

A data set has the splits it is given; each example is {"image": uint8 [H, W, 3], "label": int,
"sample_id": bytes}. Images are stored encoded, losslessly where they are not the file itself.

    array_records.write_listing(listing, "records", name="lfw")
    source = array_records.open_source("records", "lfw", "train")
    source[0]["image"]
"""

import contextlib
import io
import os
import pathlib
import re
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2

from afr_jax.core import files
from afr_jax.data import identities, photos

# Names of a field in each way that a message of TFDS can be written as JSON.
_CLASS_KEYS = frozenset({"pythonClassName", "python_class_name", "type"})
_PATH_KEYS = frozenset({"filepathTemplate", "filepath_template"})


class Example(NamedTuple):
    """An image to store.

    Attributes:
        sample_id: unique in the data set.
        image: content of a JPEG or PNG file, or pixels `[H, W, 3]` uint8.
        label: name of its class.
    """

    sample_id: str
    image: bytes | np.ndarray
    label: str


class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder of examples that are already at hand; see `write_records`."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded; TFDS would look for checksums with a package that it does not require.
    url_infos = None

    def __init__(
        self,
        *,
        data_dir: str | os.PathLike[str],
        dataset_name: str,
        features: Mapping[str, tfds.features.FeatureConnector],
        splits: Mapping[str, Iterable[tuple[str, Mapping[str, object]]]],
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        """Takes what is to be written; see `write_records`."""
        self.name = dataset_name
        self._features, self._splits, self._metadata = features, splits, metadata
        super().__init__(data_dir=os.fspath(data_dir), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        supervised = ("image", "label") if {"image", "label"} <= set(self._features) else None
        return _LocalInfo(
            builder=self,
            features=tfds.features.FeaturesDict(dict(self._features)),
            supervised_keys=supervised,
            metadata=tfds.core.MetadataDict(self._metadata or {}),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, Mapping[str, object]]]]:
        del dl_manager
        return {split: iter(examples) for split, examples in self._splits.items()}

    def _generate_examples(self) -> None:
        """Not called: the splits are iterators already."""

    def _example_writer(self) -> writer.ExampleWriter:
        return _SameBytes(file_format=self.info.file_format)


class _LocalInfo(tfds.core.DatasetInfo):
    """Is not asked of TFDS's bucket, for which TFDS makes a temporary folder that stays."""

    def initialize_from_bucket(self) -> None:
        """Does nothing."""


class _SameBytes(writer.ExampleWriter):
    """Writes equal examples as equal bytes: the order of their features differs by process."""

    def write(
        self, path: str | os.PathLike[str], examples: Iterable[tuple[Any, bytes]]
    ) -> list[Any] | None:
        protos: Any = tf_example_pb2  # Its classes are made when it is imported.

        def in_order() -> Iterator[tuple[Any, bytes]]:
            for key, data in examples:
                example = protos.Example.FromString(data)
                yield key, example.SerializeToString(deterministic=True)

        return super().write(path, in_order())


def write_records(
    splits: Mapping[str, Iterable[tuple[str, Mapping[str, object]]]],
    features: Mapping[str, tfds.features.FeatureConnector],
    data_dir: str | os.PathLike[str],
    *,
    name: str,
    metadata: Mapping[str, object] | None = None,
    num_shards: int | None = None,
) -> pathlib.Path:
    """Writes a data set of any features; the same examples give the same bytes.

    Args:
        splits: (unique key, features by name) of the examples of each split, read once. TFDS
            stores them in the order of the keys' hashes.
        features: what an example consists of.
        data_dir: folder of data sets; this one goes to `<data_dir>/<name>/1.0.0`.
        name: letters, digits and underscores.
        metadata: kept beside the examples; what JSON can say.
        num_shards: files of a split; by default as many as TFDS finds right.

    Returns:
        The folder of the data set.

    Raises:
        FileExistsError: it is there already.
        files.InUseError: another process writes to the folder of data sets.
    """
    pathlib.Path(data_dir).mkdir(parents=True, exist_ok=True)
    lock = files.lock_folder(data_dir)
    builder = Records(
        data_dir=data_dir, dataset_name=name, features=features, splits=splits, metadata=metadata
    )
    folder = pathlib.Path(builder.data_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it, or choose another name")
    for left in folder.parent.glob(f"incomplete.*_{folder.name}"):  # By a killed run.
        shutil.rmtree(left)
    tfds.disable_progress_bar()  # A dozen for each split, also where there is no terminal.
    config = tfds.download.DownloadConfig(num_shards=num_shards)
    with files.naming(folder):
        builder.download_and_prepare(download_config=config)
    del lock
    return folder


def write_examples(
    splits: Mapping[str, Iterable[Example]],
    classes: Sequence[str],
    data_dir: str | os.PathLike[str],
    *,
    name: str,
) -> pathlib.Path:
    """Writes a data set of labeled images.

    Args:
        splits: examples of each split ("train", ...), read once.
        classes: names, in the order of the labels.
        data_dir: folder of data sets.
        name: of the data set.

    Returns:
        The folder of the data set.

    Raises:
        FileExistsError: it is there already.
    """
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=tuple(classes)),
        "sample_id": tfds.features.Text(),
    }
    keyed = {split: map(_keyed, examples) for split, examples in splits.items()}
    return write_records(keyed, features, data_dir, name=name)


def write_listing(
    listing: identities.Listing,
    data_dir: str | os.PathLike[str],
    *,
    name: str,
    held_out_rows: Sequence[int] = (),
) -> tuple[pathlib.Path, list[identities.Omission]]:
    """Writes the photos of a listing, split "train", and "test" for held-out rows.

    JPEG and PNG files go in as they are if they are upright RGB; others as PNG of what is read.

    Returns:
        The folder of the data set, and the photos that could not be read and were left out.
    """
    problems: list[identities.Omission] = []

    def examples(rows: list[int] | np.ndarray) -> Iterator[Example]:
        for row in rows:
            sample = listing.samples[row]
            try:
                image = _photo_image(photos.read_photo_bytes(sample.path))
            except photos.PhotoError as error:
                problems.append(identities.Omission(sample.sample_id, str(error)))
                continue
            yield Example(sample.sample_id, image, sample.identity)

    held = sorted(set(held_out_rows))
    splits = {"train": examples(np.setdiff1d(np.arange(len(listing.samples)), held))}
    if held:
        splits["test"] = examples(held)
    return write_examples(splits, listing.identities, data_dir, name=name), problems


def open_source(
    data_dir: str | os.PathLike[str], name: str, split: str, *, decode: bool = True
) -> Sequence[dict[str, Any]]:
    """The examples of a split, by random access; what `write_examples` wrote or TFDS prepared.

    Args:
        data_dir: folder of data sets.
        name: of the data set, or "name/config"; its newest version is opened.
        split: its name.
        decode: False leaves "image" as the bytes of its file, so that a damaged one is no error.

    Raises:
        FileNotFoundError: there is no such data set.
        ValueError: it has no such split, or has no random access (is not stored as ArrayRecord).
    """
    builder = _builder(data_dir, name)
    if split not in builder.info.splits:
        raise ValueError(f"{name} has the splits {sorted(builder.info.splits)}, not {split!r}")
    stored = builder.info.file_format.value if builder.info.file_format else "nothing known"
    if stored != "array_record":
        raise ValueError(
            f"{name} is stored as {stored}, which needs TensorFlow; prepare it with "
            'tfds.builder(..., file_format="array_record")'
        )
    decoders: Any = None if decode else {"image": tfds.decode.SkipDecoding()}
    read: Any = builder.as_data_source  # Wrapped; its stated type lacks the builder itself.
    return read(split, decoders=decoders)


def classes_of(data_dir: str | os.PathLike[str], name: str) -> tuple[str, ...]:
    """Names of the classes of a data set of images, in the order of its labels.

    Raises:
        FileNotFoundError: there is no such data set.
        ValueError: it has no 8-bit images, or no labels of classes.
    """
    features = features_of(data_dir, name)
    image, label = features.get("image"), features.get("label")
    is_usual = isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8
    if not is_usual or not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(f"{name} has {sorted(features)}; needed: image of uint8, label of classes")
    return tuple(label.names)


def features_of(data_dir: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """What an example consists of; raises as `open_source` does."""
    return dict(_builder(data_dir, name).info.features.items())


def metadata_of(data_dir: str | os.PathLike[str], name: str) -> dict[str, files.Json]:
    """What was given to `write_records` as metadata; raises as `open_source` does."""
    return dict(_builder(data_dir, name).info.metadata or {})


@contextlib.contextmanager
def damage_named(data_dir: str | os.PathLike[str], name: str) -> Generator[None]:
    """Lets errors of reading a damaged data set in the body, which are of any kind, name it.

    Raises:
        FileNotFoundError: as in the body.
        ValueError: as in the body, or the data set is damaged.
    """
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and len(str(error).splitlines()) == 1:
            raise
        reason = files.printable(error)
        raise ValueError(f"{name} in {data_dir} is damaged: {reason}") from error


def find_folder(data_dir: str | os.PathLike[str], name: str) -> str:
    """The folder of the newest version of a data set, "name" or "name/config".

    Raises:
        FileNotFoundError: there is none.
    """
    root = pathlib.Path(data_dir) / name
    versions = {}
    for info in root.glob("*/dataset_info.json"):
        if tfds.core.Version.is_valid(info.parent.name):
            versions[tfds.core.Version(info.parent.name)] = info.parent
    if not versions:
        raise FileNotFoundError(f"{data_dir} holds no data set {name}")
    return os.fspath(versions[max(versions)])


def _builder(data_dir: str | os.PathLike[str], name: str) -> tfds.core.DatasetBuilder:
    """Reads what a data set says of itself.

    TFDS imports the module of every class that the files name, so it gets only its own to read, and
    it opens what they name as files of records, wherever that lies.
    """
    folder = pathlib.Path(find_folder(data_dir, name))
    for file, keys, pattern in (
        ("features.json", _CLASS_KEYS, r"tensorflow_datasets\.[\w.]+|[^.]*"),
        ("dataset_info.json", _PATH_KEYS, r"[^/\\]*"),
    ):
        if (folder / file).exists():
            content = files.parse_json((folder / file).read_bytes())
            for value in _values_of(content, keys):
                if isinstance(value, str) and not re.fullmatch(pattern, value):
                    raise ValueError(f"{folder / file} names {value!r}, which is not of TFDS")
    return tfds.builder_from_directory(str(folder))


def _values_of(content: files.Json, keys: frozenset[str]) -> Iterator[files.Json]:
    """Values of keys at any depth."""
    rest = [content]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            yield from (value[key] for key in value.keys() & keys)
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)


def _keyed(example: Example) -> tuple[str, dict[str, Any]]:
    image = io.BytesIO(_encoded(example.image))
    fields = {"image": image, "label": example.label, "sample_id": example.sample_id}
    return example.sample_id, fields


def _encoded(image: bytes | np.ndarray) -> bytes:
    if isinstance(image, bytes):
        return image
    return photos.encode_png(photos.Photo(image), image)


def _photo_image(data: bytes) -> bytes | np.ndarray:
    """The file itself where a plain reader sees the same pixels, else the pixels."""
    photo = photos.decode_photo(data)
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            is_plain = image.mode == "RGB" and np.array_equal(np.asarray(image), photo.pixels)
    except (OSError, SyntaxError):
        is_plain = False
    return data if is_plain else photo.pixels
