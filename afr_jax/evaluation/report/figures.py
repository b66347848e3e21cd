"""Matplotlib on a machine without a display: figures that end as PNG files."""

import io
import os
import types
from typing import TYPE_CHECKING

import matplotlib

from afr_jax.core import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 120


def pyplot() -> types.ModuleType:
    """`matplotlib.pyplot`, drawing into memory."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as module  # After the backend is chosen.

    return module


def save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG, over an earlier one if there is one, and closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DPI, format="png")
    pyplot().close(figure)
    files.write_atomically(path, buffer.getvalue(), overwrite=True)
