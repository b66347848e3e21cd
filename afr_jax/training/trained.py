"""Extractors that were trained here: the table of architectures, and weights with a card.

A trained or hardened extractor is two files in a folder: `extractor.safetensors`, the variables of
the network without its head, and `extractor.json`, a `Card` with all that is needed to use it:
architecture, input, alignment, threshold, and what it was trained on and reached.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from afr_jax.core import files
from afr_jax.models.classifiers import resnet
from afr_jax.models.extractors import inception_resnet, mobilefacenet, registry
from afr_jax.models.weights import conversion

CARD_NAME = "extractor.json"
WEIGHTS_NAME = "extractor.safetensors"
# All networks here see 2 x - 1 for x in [0, 1].
INPUT_SCALE, INPUT_OFFSET = 2.0, -1.0
_CARD_VERSION = 1
# In a card: that of its weights.
_CHECKSUM = "weights_sha256"
# Blocks of each stage and whether they are bottlenecks; 6 and 10 layers are for CPUs.
_RESNETS = {
    "resnet6": ((1, 1), False),
    "resnet10": ((1, 1, 1, 1), False),
    "resnet18": ((2, 2, 2, 2), False),
    "resnet50": ((3, 4, 6, 3), True),
}
ARCHITECTURES = (*_RESNETS, "inception_resnet", "mobilefacenet")


@dataclasses.dataclass(frozen=True)
class Card:
    """What is known of a trained extractor.

    Attributes:
        architecture: one of `ARCHITECTURES`.
        input_px: side of its chips.
        embedding_size: D.
        width: channels of the first stage of a ResNet, ignored elsewhere.
        stem: of a ResNet, "cifar" or "imagenet".
        template: landmarks (y, x) in a chip; None where they are not known, then photos cannot be
            aligned for it.
        threshold: L2 distance of unit embeddings (of a `base`: in its own metric), below which two
            chips are one person; None where it was not measured.
        identities: names it was trained on.
        head: what it was trained for.
        scores: what it reached, by name.
        training: settings of the run.
        base: name of the extractor of the registry that was hardened, whose network, input and
            alignment it has; then `architecture` is the same name, and `width` and `stem` count for
            nothing.
    """

    architecture: str
    input_px: int
    embedding_size: int
    width: int = 64
    stem: resnet.Stem = "cifar"
    template: tuple[tuple[float, float], ...] | None = None
    threshold: float | None = None
    identities: tuple[str, ...] = ()
    head: str = "softmax"
    scores: Mapping[str, files.Json] = dataclasses.field(default_factory=dict)
    training: Mapping[str, files.Json] = dataclasses.field(default_factory=dict)
    base: str | None = None


def default_input_px(architecture: str) -> int:
    """Side of the chips that an architecture is made for; 64 for ResNets, which take any."""
    sizes = {
        "inception_resnet": inception_resnet.INPUT_SIZE,
        "mobilefacenet": mobilefacenet.INPUT_SIZE,
    }
    return sizes.get(architecture, 64)


def make_network(
    architecture: str,
    *,
    input_px: int,
    embedding_size: int = 512,
    width: int = 64,
    stem: resnet.Stem = "cifar",
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> nn.Module:
    """The network of an architecture: chips in [-1, 1] to embeddings.

    Raises:
        ValueError: an unknown name, or a size that it cannot have.
    """
    if architecture in _RESNETS:
        num_blocks, bottleneck = _RESNETS[architecture]
        backbone = resnet.ResNet(num_blocks, bottleneck, width, stem, None, dtype)
        return resnet.FaceResNet(backbone, embedding_size)
    if architecture == "inception_resnet":
        # Its unpadded convolutions and poolings leave nothing of a smaller image.
        _check(embedding_size == 512 and input_px >= 80, "embeddings of 512 and 80 px or more")
        return inception_resnet.InceptionResnetV1(dtype=dtype)
    if architecture == "mobilefacenet":
        _check(input_px == 112, "chips of 112 px")
        return mobilefacenet.MobileFaceNet(embedding_size=embedding_size, dtype=dtype)
    raise ValueError(f"no architecture {architecture!r}; there are: {', '.join(ARCHITECTURES)}")


def base_card(name: str) -> Card:
    """The card of what was hardened from an extractor of the registry, without scores.

    Raises:
        ValueError: there is no such entry.
    """
    entry = registry.get(name)
    return Card(
        architecture=name,
        input_px=entry.input_px,
        embedding_size=entry.embedding_size,
        template=entry.template,
        threshold=getattr(entry.thresholds, entry.metric),
        head="none",
        base=name,
    )


def write_extractor(
    folder: str | os.PathLike[str],
    card: Card,
    variables: conversion.Variables,
    *,
    dtype: str | None = None,
) -> pathlib.Path:
    """Writes a trained extractor, over an earlier one if there is one.

    Args:
        folder: exists.
        card: about it.
        variables: {"params", "batch_stats"} of its network.
        dtype: "float16" halves the file; None keeps what the arrays have.

    Returns:
        The path of the card.
    """
    folder = pathlib.Path(folder)
    host = jax.device_get(variables)
    checksum = conversion.write_safetensors(folder / WEIGHTS_NAME, host, dtype=dtype)
    scale, offset = INPUT_SCALE, INPUT_OFFSET
    if card.base is not None:
        entry = registry.get(card.base)
        scale, offset = entry.input_scale, entry.input_offset
    fields = {"version": _CARD_VERSION, "weights": WEIGHTS_NAME, "input_scale": scale}
    # A run may end between the two writes.
    fields |= {"input_offset": offset, _CHECKSUM: checksum, **dataclasses.asdict(card)}
    files.write_sealed(folder / CARD_NAME, fields)
    return folder / CARD_NAME


def read_card(path: str | os.PathLike[str]) -> Card:
    """Reads a card, from its path or that of its folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no such card.
    """
    return _read_card(_card_path(path))[0]


def _read_card(path: pathlib.Path) -> tuple[Card, str | None]:
    """A card, and the checksum of its weights; earlier versions wrote none."""
    try:
        fields = files.parse_json(path.read_text(encoding="utf-8"))
        if "checksum" in fields:  # Earlier versions wrote none.
            fields = files.unseal(fields)
        if fields.pop("version") != _CARD_VERSION:
            raise ValueError("another version")
        for name in ("weights", "input_scale", "input_offset"):
            del fields[name]
        checksum = fields.pop(_CHECKSUM, None)
        if fields["template"] is not None:
            fields["template"] = tuple((float(y), float(x)) for y, x in fields["template"])
        fields["identities"] = tuple(fields["identities"])
        return Card(**fields), checksum
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no trained extractor {path}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no card of a trained extractor: {error}") from error


def read_extractor(path: str | os.PathLike[str]) -> registry.Extractor:
    """A trained extractor, to be used like those of the registry.

    Args:
        path: of the card or its folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no such card, or does not say how photos are aligned for it.
    """
    path = _card_path(path)
    card, checksum = _read_card(path)
    if card.template is None:
        raise ValueError(f"{path} does not say how photos are aligned for the extractor")
    load = functools.partial(_read_variables, path.with_name(WEIGHTS_NAME), card, checksum)
    if card.base is not None:
        entry = registry.get(card.base)
        own = {entry.metric: card.threshold}
        return dataclasses.replace(
            entry,
            name=f"hardened:{path.parent.name}",
            thresholds=registry.Thresholds(**{name: own.get(name) for name in registry.METRICS}),
            load=load,
            read=None,
            source=str(path),
            nearest_other=None,
        )
    return registry.Extractor(
        name=f"trained:{path.parent.name}",
        module=_network(card),
        input_px=card.input_px,
        template=card.template,
        input_scale=INPUT_SCALE,
        input_offset=INPUT_OFFSET,
        embedding_size=card.embedding_size,
        normalized=True,
        thresholds=registry.Thresholds(None, card.threshold, None),
        load=load,
        source=str(path),
        license="as its training data",
    )


def _network(card: Card) -> nn.Module:
    if card.base is not None:
        return registry.get(card.base).module
    return make_network(
        card.architecture,
        input_px=card.input_px,
        embedding_size=card.embedding_size,
        width=card.width,
        stem=card.stem,
    )


def _read_variables(path: pathlib.Path, card: Card, checksum: str | None) -> conversion.Variables:
    shapes = conversion.shapes(_network(card), card.input_px)
    return conversion.read_safetensors(path, shapes, checksum=checksum)


def _card_path(path: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(path)
    return path / CARD_NAME if path.is_dir() else path


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"this architecture needs {what}")
