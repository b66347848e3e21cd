"""TFDS data sets as ArrayRecord files: written and read without TensorFlow.

A data set has the splits it is given; each example is {"image": uint8 [H, W, 3], "label": int,
"sample_id": bytes}. Images are stored encoded, losslessly where they are not the file itself.

    array_records.write_listing(listing, "records", name="lfw")
    source = array_records.open_source("records", "lfw", "train")
    source[0]["image"]
"""

import io
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from afr_jax.data import cifar10, identity_tree, photos


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


class ImageFolderRecords(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder of examples that are already at hand; see `write_examples`."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded; TFDS would look for checksums with a package that it does not require.
    url_infos = None

    def __init__(
        self,
        *,
        data_dir: str | os.PathLike[str],
        dataset_name: str,
        classes: Sequence[str],
        splits: Mapping[str, Iterator[Example]],
    ):
        """Takes what is to be written.

        Args:
            data_dir: folder of data sets; this one goes to `<data_dir>/<dataset_name>/1.0.0`.
            dataset_name: letters, digits and underscores.
            classes: names, in the order of the labels.
            splits: examples of each split, read once.
        """
        self.name = dataset_name
        self._classes, self._splits = tuple(classes), splits
        super().__init__(data_dir=os.fspath(data_dir), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Images of classes or identities.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=self._classes),
                    "sample_id": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(part) for split, part in self._splits.items()}

    def _generate_examples(self, examples):
        for example in examples:
            yield (
                example.sample_id,
                {
                    "image": io.BytesIO(_encoded(example.image)),
                    "label": example.label,
                    "sample_id": example.sample_id,
                },
            )


def write_examples(
    splits: Mapping[str, Iterator[Example]],
    classes: Sequence[str],
    data_dir: str | os.PathLike[str],
    *,
    name: str,
) -> pathlib.Path:
    """Writes a data set.

    Args:
        splits: examples of each split ("train", ...).
        classes: names, in the order of the labels.
        data_dir: folder of data sets.
        name: of the data set.

    Returns:
        The folder of the data set.

    Raises:
        FileExistsError: it is there already.
    """
    builder = ImageFolderRecords(
        data_dir=data_dir, dataset_name=name, classes=classes, splits=splits
    )
    if pathlib.Path(builder.data_dir).exists():
        raise FileExistsError(f"{builder.data_dir} exists; remove it, or choose another name")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def write_listing(
    listing: identity_tree.Listing,
    data_dir: str | os.PathLike[str],
    *,
    name: str,
    held_out_rows: Sequence[int] = (),
) -> tuple[pathlib.Path, list[identity_tree.Problem]]:
    """Writes the photos of a listing, split "train", and "test" for held-out rows.

    JPEG and PNG files go in as they are if they are upright RGB; others as PNG of what is read.

    Returns:
        The folder of the data set, and the photos that could not be read and were left out.
    """
    problems: list[identity_tree.Problem] = []

    def examples(rows) -> Iterator[Example]:
        for row in rows:
            sample = listing.samples[row]
            try:
                image = _photo_image(photos.read_photo_bytes(sample.path))
            except photos.PhotoError as error:
                problems.append(identity_tree.Problem(sample.sample_id, str(error)))
                continue
            yield Example(sample.sample_id, image, sample.identity)

    held = sorted(set(held_out_rows))
    splits = {"train": examples(np.setdiff1d(np.arange(len(listing.samples)), held))}
    if held:
        splits["test"] = examples(held)
    return write_examples(splits, listing.identities, data_dir, name=name), problems


def write_cifar10(
    source: str | os.PathLike[str], data_dir: str | os.PathLike[str], *, name: str = "cifar10"
) -> pathlib.Path:
    """Writes both splits of CIFAR-10 from whatever `cifar10.load` reads."""

    def examples(images: cifar10.ImageSet) -> Iterator[Example]:
        for image, label, sample_id in zip(
            images.images, images.labels, images.sample_ids, strict=True
        ):
            yield Example(sample_id, image, images.classes[label])

    sets = {split: cifar10.load(source, split) for split in ("train", "test")}
    splits = {split: examples(images) for split, images in sets.items()}
    return write_examples(splits, sets["train"].classes, data_dir, name=name)


def open_source(
    data_dir: str | os.PathLike[str], name: str, split: str
) -> Sequence[dict[str, object]]:
    """The examples of a split, by random access: {"image", "label", "sample_id"}.

    Raises:
        FileNotFoundError: there is no such data set.
        ValueError: it has no such split.
    """
    try:
        builder = tfds.builder_from_directory(_version_folder(data_dir, name))
    except tfds.core.DatasetNotFoundError as error:
        raise FileNotFoundError(f"{data_dir} holds no data set {name}") from error
    if split not in builder.info.splits:
        raise ValueError(f"{name} has the splits {sorted(builder.info.splits)}, not {split!r}")
    return builder.as_data_source(split)


def classes_of(data_dir: str | os.PathLike[str], name: str) -> tuple[str, ...]:
    """Names of the classes of a data set, in the order of its labels."""
    builder = tfds.builder_from_directory(_version_folder(data_dir, name))
    return tuple(builder.info.features["label"].names)


def _version_folder(data_dir: str | os.PathLike[str], name: str) -> str:
    folder = pathlib.Path(data_dir) / name / str(ImageFolderRecords.VERSION)
    if not (folder / "dataset_info.json").exists():
        raise FileNotFoundError(f"{data_dir} holds no data set {name}")
    return os.fspath(folder)


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
