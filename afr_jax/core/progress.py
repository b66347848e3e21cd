"""How far a loop is, shown on standard error: a bar on a terminal, log lines elsewhere."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

import tqdm
from absl import logging

from afr_jax.core import distributed

_Item = TypeVar("_Item")


def track(
    items: Iterable[_Item] | int,
    *,
    description: str,
    total: int | None = None,
    force: bool | None = None,
    interval_seconds: float = 10.0,
) -> Iterator[_Item]:
    """Yields the items and shows on standard error how far the loop is.

    A bar on a terminal. Elsewhere nothing, unless forced: then one log line every
    `interval_seconds`.

    Args:
      items: what to loop over; an integer n stands for range(n).
      description: what is being done.
      total: how many items there are, where `len(items)` does not tell.
      force: whether to report without a terminal; default: whether `AFR_PROGRESS` is 1 in the
      environment.
      interval_seconds: between two log lines.

    Yields:
      The items.
    """
    iterable: Iterable[Any] = range(items) if isinstance(items, int) else items
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if not distributed.is_primary():
        yield from iterable
    elif sys.stderr.isatty():
        yield from tqdm.tqdm(iterable, desc=description, total=total, file=sys.stderr)
    elif os.environ.get("AFR_PROGRESS") == "1" if force is None else force:
        yield from _logged(iterable, description, total, interval_seconds)
    else:
        yield from iterable


def _logged(
    iterable: Iterable[_Item], description: str, total: int | None, interval_seconds: float
) -> Iterator[_Item]:
    of_total = "" if total is None else f"/{total}"
    start = last = time.monotonic()
    count = 0
    for item in iterable:
        yield item
        count += 1
        now = time.monotonic()
        if now - last >= interval_seconds or count == total:
            rate = count / max(now - start, 1e-9)
            logging.info("%s: %d%s, %.3g/s", description, count, of_total, rate)
            last = now
