"""The one table of face extractors: how each one wants its chips, and what its distances mean.

An extractor maps an aligned chip to an embedding. Everything that differs between extractors is a
field of `Extractor`; nothing else in the code base knows a model by name.
"""

import dataclasses
from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from afr_jax.models import dlib_resnet


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A face extractor and its conventions.

    Attributes:
        name: key in the table.
        module: Flax module, chips `[B, S, S, 3]` in its own range to embeddings `[B, D]`.
        input_px: side S of its chips.
        template: where the five landmarks lie in a chip, (y, x) in pixels, picture's left first.
        input_scale: its input is input_scale * x + input_offset for x in [0, 1].
        input_offset: see input_scale.
        embedding_size: D.
        normalised: whether embeddings are scaled to unit length before distances are taken.
        threshold: L2 distance below which two chips are taken for the same person.
        load: reads the variables of the module (no network access; raises FileNotFoundError with
            what to do).
        source: where the weights come from.
        licence: of the weights.
    """

    name: str
    module: nn.Module
    input_px: int
    template: tuple[tuple[float, float], ...]
    input_scale: float
    input_offset: float
    embedding_size: int
    normalised: bool
    threshold: float
    load: Callable[[], dict]
    source: str
    licence: str


EXTRACTORS = {
    "dlib": Extractor(
        name="dlib",
        module=dlib_resnet.DlibResNet(),
        input_px=dlib_resnet.INPUT_SIZE,
        # Median place of MTCNN-like landmarks in dlib's own 5-point chips over 310 LFW photos.
        template=((44.5, 46.6), (44.3, 99.7), (77.0, 72.9), (102.7, 49.5), (102.6, 97.3)),
        input_scale=255.0,
        input_offset=0.0,
        embedding_size=dlib_resnet.EMBEDDING_SIZE,
        normalised=False,
        threshold=0.6,
        load=lambda: dlib_resnet.read_weights(dlib_resnet.find_weights()),
        source="PyPI face_recognition_models 0.3.0, dlib_face_recognition_resnet_model_v1.dat",
        licence="CC0-1.0",
    ),
}


def get(name: str) -> Extractor:
    """The extractor of a name.

    Raises:
        ValueError: there is none; the message lists the table.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"no extractor {name!r}; there are: {', '.join(sorted(EXTRACTORS))}")
    return EXTRACTORS[name]


def embed(extractor: Extractor, variables: dict, chips: jax.Array) -> jax.Array:
    """Embeddings of aligned chips.

    Args:
        extractor: entry of the table.
        variables: of its module.
        chips: `[B, S, S, 3]` float RGB in [0, 1].

    Returns:
        `[B, D]` float32, of unit length where `extractor.normalised`.
    """
    side = extractor.input_px
    chex.assert_shape(chips, (None, side, side, 3))
    inputs = chips * extractor.input_scale + extractor.input_offset
    embeddings = extractor.module.apply(variables, inputs)
    if extractor.normalised:
        length = jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
        embeddings = embeddings / jnp.maximum(length, 1e-12)
    return embeddings


def distance(embeddings: jax.Array, others: jax.Array) -> jax.Array:
    """L2 distance `[...]` of embeddings `[..., D]`; the gradient is zero where they coincide."""
    squared = jnp.sum((embeddings - others) ** 2, axis=-1)
    apart = squared > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)
