"""Loaders of data that does not fit on a device: threads decode while the device computes.

A loader yields the batches of `afr_jax.data.sampling`, each by its step. So the batches do not
depend on the number of threads, a loader starts anywhere (`first_step`, or `get_state` and
`set_state` of its iterator), every process decodes its own share, and a run from files takes the
same steps as a run with the data set on the device. Grain does the threads, the order and the
position. Small data sets are better loaded whole (`identities.read_samples`).
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import grain
import numpy as np

from afr_jax.data import identities, sampling


class ExampleSource(Protocol):
    """A data set with random access, also from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        """Image `[S, S, 3]` uint8 and label of an example."""
        ...


class FileSource(ExampleSource):
    """The photos of a listing, decoded when they are asked for, as squares."""

    def __init__(self, listing: identities.Listing, side: int) -> None:
        """Takes a listing whose photos can all be read.

        Args:
            listing: see `collect` for one without unreadable photos.
            side: of the images, pixels.
        """
        self._samples, self._labels, self._side = listing.samples, listing.labels, side

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self._samples[index].path
        return identities.read_square(path, self._side), int(self._labels[index])


class HostBatch(NamedTuple):
    """This process's share of the batch of a step.

    Attributes:
        step: its number.
        images: `[B / processes, S, S, 3]` uint8.
        labels: `[B / processes]` int32.
    """

    step: int
    images: np.ndarray
    labels: np.ndarray


def batch_iterator(
    source: ExampleSource,
    batches: sampling.Batches,
    *,
    num_steps: int,
    first_step: int = 0,
    num_threads: int = 8,
) -> grain.DatasetIterator:
    """The batches of some steps, in order; an iterator over `HostBatch`.

    Args:
        source: the data set; the same in every process.
        batches: rows of each step.
        num_steps: up to which step, counted from 0.
        first_step: the first one.
        num_threads: each decodes one batch at a time; as many batches lie ready at most.

    Returns:
        A Grain iterator. Its `get_state()` is a position that `set_state` of any iterator with the
        same arguments goes back to, whatever its number of threads.
    """
    if not 0 <= first_step <= num_steps:
        raise ValueError(f"first_step is {first_step}, but must lie in [0, {num_steps}]")
    steps = grain.MapDataset.range(first_step, num_steps).map(_loader(source, batches))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    return iter(steps.to_iter_dataset(options))


def _loader(source: ExampleSource, batches: sampling.Batches) -> Callable[[int], HostBatch]:
    def load(step: int) -> HostBatch:
        rows = sampling.local_rows(batches.rows(step))
        images, labels = zip(*(source[int(row)] for row in rows), strict=True)
        return HostBatch(step, np.stack(images), np.array(labels, np.int32))

    return load
