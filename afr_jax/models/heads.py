"""What a network is trained for: softmax, ArcFace, CosFace, triplets, or its own logits.

A head is a linen module that takes embeddings `[B, D]` and labels `[B]` and returns a `Judged`: the
loss of each example and whether it was recognized. Its parameters, if any, are trained with the
network and dropped afterwards. All arithmetic is float32, whatever the network computes in.
"""

import math
from typing import Literal, NamedTuple, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from afr_jax.models.weights import conversion


class Judged(NamedTuple):
    """What a head says of a batch.

    Attributes:
        losses: `[B]` float32; the batch's loss is their mean.
        correct: `[B]` bool, whether the largest logit is that of the label. For triplets: whether
            the nearest other example of the batch has the same label.
    """

    losses: jax.Array
    correct: jax.Array


class Logits(nn.Module):
    """For networks that end in logits themselves; no parameters.

    Attributes:
        label_smoothing: share of the target that is spread evenly over all classes, in [0, 1).
    """

    label_smoothing: float = 0.0

    def __call__(self, embeddings: jax.Array, labels: jax.Array) -> Judged:
        """Judges logits `[B, K]` by labels `[B]`."""
        return _judge(self.logits(embeddings), labels, self.label_smoothing)

    def logits(self, embeddings: jax.Array) -> jax.Array:
        """`[B, K]` float32, the input."""
        return embeddings.astype(jnp.float32)


class Softmax(nn.Module):
    """A linear classifier with cross entropy.

    Attributes:
        num_classes: K.
        label_smoothing: see `Logits`.
    """

    num_classes: int
    label_smoothing: float = 0.0

    def setup(self) -> None:
        """Makes the layer."""
        self.classifier = nn.Dense(self.num_classes)

    def __call__(self, embeddings: jax.Array, labels: jax.Array) -> Judged:
        """Judges embeddings `[B, D]` by labels `[B]`."""
        return _judge(self.logits(embeddings), labels, self.label_smoothing)

    def logits(self, embeddings: jax.Array) -> jax.Array:
        """`[B, K]` float32."""
        return self.classifier(embeddings.astype(jnp.float32))


class AngularMargin(nn.Module):
    """Cross entropy over scaled cosines to class centers, the label's made harder by a margin.

    The label's cosine c = cos(t) becomes cos(t + angle) - cosine, all are multiplied by the scale.
    ArcFace (Deng et al. 2019) has an angle of 0.5, CosFace (Wang et al. 2018) a cosine of 0.35,
    both a scale of 64. Past t = pi - angle, where cos(t + angle) would rise again, it is c - angle
    * sin(angle), as in the authors' code: the logit falls with t everywhere. No arccosine is taken:
    cos(t + angle) = c cos(angle) - sqrt(1 - c^2) sin(angle), with a gradient that is finite at
    c = -1 and 1.

    Attributes:
        num_classes: K.
        scale: of the cosines.
        angle: additive margin of the angle, radians, in [0, pi / 2).
        cosine: subtractive margin of the cosine.
    """

    num_classes: int
    scale: float = 64.0
    angle: float = 0.5
    cosine: float = 0.0

    def setup(self) -> None:
        """Checks the margins."""
        if not (0 <= self.angle < math.pi / 2 and self.scale > 0):
            raise ValueError(
                f"angle is {self.angle} and scale {self.scale}, but they must lie in [0, pi / 2) "
                "and above 0"
            )

    @nn.compact
    def cosines(self, embeddings: jax.Array) -> jax.Array:
        """Cosines `[B, K]` of embeddings `[B, D]` and class centers."""
        # Any scale of the initial centers gives the same cosines.
        shape = (self.num_classes, embeddings.shape[-1])
        centers = self.param("centres", nn.initializers.normal(1.0), shape)
        return unit(embeddings.astype(jnp.float32)) @ unit(centers).T

    def logits(self, embeddings: jax.Array) -> jax.Array:
        """`[B, K]` float32 without a margin, for evaluation."""
        return self.scale * self.cosines(embeddings)

    def __call__(self, embeddings: jax.Array, labels: jax.Array) -> Judged:
        """Judges embeddings `[B, D]` by labels `[B]`; `correct` is without the margin."""
        cosines = self.cosines(embeddings)
        own = jnp.take_along_axis(cosines, labels[:, None], axis=1)
        harder = with_margin(own, angle=self.angle, cosine=self.cosine)
        is_own = jnp.arange(self.num_classes)[None, :] == labels[:, None]
        logits = self.scale * jnp.where(is_own, harder, cosines)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return Judged(losses, jnp.argmax(cosines, axis=-1) == labels)


class Triplet(nn.Module):
    """Triplet loss over unit embeddings, triplets mined in the batch; no parameters.

    Batches should hold several photos of each identity. Anchors without a positive or a negative in
    the batch have a loss of zero.

    Attributes:
        margin: of the L2 distances.
        mining: "hard" (Hermans et al. 2017: farthest positive, nearest negative) or "semihard"
            (Schroff et al. 2015, here one triplet an anchor: farthest positive, and the nearest
            negative beyond it; the farthest of all where none is).
    """

    margin: float = 0.3
    mining: Literal["hard", "semihard"] = "semihard"

    def __call__(self, embeddings: jax.Array, labels: jax.Array) -> Judged:
        """Judges embeddings `[B, D]` by labels `[B]`."""
        return triplet_loss(embeddings, labels, margin=self.margin, mining=self.mining)


def judge(
    head: nn.Module, params: conversion.Variables, embeddings: jax.Array, labels: jax.Array
) -> Judged:
    """What a head with its parameters says of embeddings `[B, D]` and labels `[B]`."""
    return cast(Judged, head.apply({"params": params}, embeddings, labels))


def with_margin(own: jax.Array, *, angle: float = 0.5, cosine: float = 0.0) -> jax.Array:
    """cos(arccos(own) + angle) - cosine, continued so that it rises with `own` everywhere.

    Args:
        own: cosines of any shape; rounding past -1 and 1 is allowed.
        angle: in [0, pi / 2), radians.
        cosine: subtracted.
    """
    square = 1.0 - own**2
    # Below this sin(t) the curve is taken for flat: its gradient grows without bound there.
    is_apart = square > 1e-8
    sine = jnp.where(is_apart, jnp.sqrt(jnp.where(is_apart, square, 1.0)), 0.0)
    turned = own * math.cos(angle) - sine * math.sin(angle)
    continued = own - angle * math.sin(angle)
    return jnp.where(own > -math.cos(angle), turned, continued) - cosine


def triplet_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    *,
    margin: float = 0.3,
    mining: Literal["hard", "semihard"] = "semihard",
) -> Judged:
    """max(0, margin + positive - negative) of each anchor, distances between unit embeddings.

    Args:
        embeddings: `[B, D]` float, of any length.
        labels: `[B]` int.
        margin: at least 0.
        mining: see `Triplet`.
    """
    chex.assert_rank([embeddings, labels], [2, 1])
    if mining not in ("hard", "semihard"):
        raise ValueError(f"mining is {mining!r}, but must be 'hard' or 'semihard'")
    points = unit(embeddings.astype(jnp.float32))
    squared = jnp.maximum(2.0 - 2.0 * points @ points.T, 0.0)
    # The gradient of the root has no bound at zero, where two photos have one embedding.
    is_apart = squared > 1e-8
    distances = jnp.where(is_apart, jnp.sqrt(jnp.where(is_apart, squared, 1.0)), 0.0)
    same = labels[:, None] == labels[None, :]
    itself = jnp.eye(labels.size, dtype=bool)
    is_positive, is_negative = same & ~itself, ~same
    positive = jnp.max(jnp.where(is_positive, distances, -jnp.inf), axis=1)
    nearest = jnp.min(jnp.where(is_negative, distances, jnp.inf), axis=1)
    if mining == "hard":
        negative = nearest
    else:
        beyond = jnp.where(is_negative & (distances > positive[:, None]), distances, jnp.inf)
        negative = jnp.min(beyond, axis=1)
        farthest = jnp.max(jnp.where(is_negative, distances, -jnp.inf), axis=1)
        negative = jnp.where(jnp.isfinite(negative), negative, farthest)
    is_triplet = jnp.any(is_positive, axis=1) & jnp.any(is_negative, axis=1)
    gap = jnp.where(is_triplet, positive, 0.0) - jnp.where(is_triplet, negative, 0.0)
    losses = jnp.where(is_triplet, jnp.maximum(gap + margin, 0.0), 0.0)
    closest_positive = jnp.min(jnp.where(is_positive, distances, jnp.inf), axis=1)
    return Judged(losses, is_triplet & (closest_positive < nearest))


def unit(vectors: jax.Array) -> jax.Array:
    """Vectors `[..., D]` scaled to length 1; the gradient is zero at the zero vector."""
    squared = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squared, 1e-12))


def _judge(logits: jax.Array, labels: jax.Array, label_smoothing: float) -> Judged:
    chex.assert_rank([logits, labels], [2, 1])
    if label_smoothing:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return Judged(losses, jnp.argmax(logits, axis=-1) == labels)
