"""Rows of the batch of each step: pure functions of a seed and the step's number.

Nothing is remembered between two steps, so a run resumes anywhere by its step alone, and every
process of several computes the same batch and takes its share (`local_rows`). Host code.
"""

import abc
import dataclasses
import functools
import hashlib

import numpy as np

from afr_jax.core import distributed


class Batches(abc.ABC):
    """What gives the rows of each step."""

    @property
    @abc.abstractmethod
    def steps_per_epoch(self) -> int:
        """Steps in which (nearly) every example is seen once."""

    @abc.abstractmethod
    def rows(self, step: int) -> np.ndarray:
        """Rows `[B]` int32 of the data set that make up the batch of a step, from 0 on."""


@dataclasses.dataclass(frozen=True)
class ShuffledBatches(Batches):
    """Every epoch in an order of its own; what does not fill a batch is left out that time.

    Attributes:
        num_examples: in the data set, at least 1.
        batch_size: of a step; cut to `num_examples`.
        seed: of the orders.
    """

    num_examples: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the sizes."""
        _check_positive(num_examples=self.num_examples, batch_size=self.batch_size)
        object.__setattr__(self, "batch_size", min(self.batch_size, self.num_examples))

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data set."""
        return self.num_examples // self.batch_size

    def rows(self, step: int) -> np.ndarray:
        """Rows `[batch_size]` int32 of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _permutation(self.seed, epoch, self.num_examples)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


@dataclasses.dataclass(frozen=True)
class IdentityBatches(Batches):
    """Batches of P identities with K examples each, for losses that compare within a batch.

    Both are drawn anew in each step, without replacement; identities with fewer than K examples
    repeat some.

    Attributes:
        labels: of all examples.
        identities_per_batch: P, cut to the number of identities.
        examples_per_identity: K.
        seed: of the draws.
    """

    labels: tuple[int, ...]
    identities_per_batch: int
    examples_per_identity: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the sizes."""
        _check_positive(
            labels=len(self.labels),
            identities_per_batch=self.identities_per_batch,
            examples_per_identity=self.examples_per_identity,
        )
        num_identities = len(set(self.labels))
        limited = min(self.identities_per_batch, num_identities)
        object.__setattr__(self, "identities_per_batch", limited)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that draw as many examples as there are, at least 1."""
        drawn = self.identities_per_batch * self.examples_per_identity
        return max(1, len(self.labels) // drawn)

    def rows(self, step: int) -> np.ndarray:
        """Rows `[P * K]` int32 of a step, grouped by identity."""
        members = _members(self.labels)
        generator = np.random.default_rng([self.seed, step])
        chosen = generator.choice(len(members), self.identities_per_batch, replace=False)
        count = self.examples_per_identity
        picked = [np.resize(generator.permutation(members[i]), count) for i in chosen]
        return np.concatenate(picked).astype(np.int32)


def local_rows(rows: np.ndarray) -> np.ndarray:
    """This process's share `[B / processes]` of the rows `[B]` of a step.

    Raises:
        ValueError: B is not divisible by the number of processes.
    """
    count = distributed.process_count()
    if len(rows) % count:
        raise ValueError(f"a batch of {len(rows)} cannot be split over {count} processes")
    return np.split(rows, count)[distributed.process_index()]


def split_by_id(
    ids: list[str], *, held_out: float = 0.2, seed: int = 0, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples into a training and a held-out part by their ids alone.

    An example stays on its side whatever else is added to the data set or taken from it, since a
    hash of seed and id decides. The held-out share is therefore met on average only.

    Args:
        ids: stable sample ids.
        held_out: share of the second part, in [0, 1).
        seed: another seed, another split.
        labels: `[N]`; with them a label that would be held out entirely keeps one example for
            training, the one whose draw is nearest.

    Returns:
        Rows of the training and of the held-out part, int32, ascending.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}, but must lie in [0, 1)")
    draws = np.array([_uniform(f"{seed}\n{name}") for name in ids])
    is_held = draws < held_out
    if labels is not None:
        for label in np.setdiff1d(labels, labels[~is_held]):
            rows = np.flatnonzero(labels == label)
            is_held[rows[np.argmax(draws[rows])]] = False
    return np.flatnonzero(~is_held).astype(np.int32), np.flatnonzero(is_held).astype(np.int32)


def _uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count).astype(np.int32)


@functools.lru_cache(maxsize=2)
def _members(labels: tuple[int, ...]) -> list[np.ndarray]:
    order = np.argsort(labels, kind="stable")
    _, starts = np.unique(np.asarray(labels)[order], return_index=True)
    return np.split(order, starts[1:])


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
