"""Patches as a printer makes them and as people wear them: curves of what that costs.

Training draws small turns, shifts and inks at random (`methods/patches/views.py`); here one thing
at a time is changed, further than that, and the detector is asked again.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from matplotlib import figure

from afr_jax.evaluation.metrics import misdetection
from afr_jax.methods.patches import placement
from afr_jax.models import mtcnn
from afr_jax.perturb import warps


class Printer(NamedTuple):
    """What becomes of a patch on paper; as shares of the paper's white and of the patch.

    Attributes:
        black: what the darkest ink reflects.
        white: what bare paper reflects, beside the brightest paper.
        gain: exponent of the tones between: above 1 dots grow and mid tones get darker.
        blur: standard deviation of the spread of ink and of the lens, of the patch's longer side.
    """

    black: float = 0.0
    white: float = 1.0
    gain: float = 1.0
    blur: float = 0.0

    def print(self, patch: np.ndarray) -> np.ndarray:
        """The patch `[h, w]` in [0, 1] as it comes out, of 256 tones."""
        toned = (np.round(255 * np.asarray(patch, np.float32)) / 255) ** self.gain
        inked = self.black + (self.white - self.black) * toned
        return scipy.ndimage.gaussian_filter(inked, self.blur * max(patch.shape), mode="nearest")


PRINTERS = {
    "as trained": Printer(),
    "good laser printer": Printer(black=0.08, white=0.97, gain=1.1, blur=0.01),
    "ordinary printer": Printer(black=0.15, white=0.93, gain=1.25, blur=0.02),
    "poor printer": Printer(black=0.3, white=0.85, gain=1.5, blur=0.04),
}

# How patches are worn otherwise than planned, and the unit of the numbers.
CURVES: dict[str, tuple[str, tuple[float, ...]]] = {
    "across": ("sides of the face", (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2)),
    "down": ("sides of the face", (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2)),
    "rolled": ("degrees", (-30.0, -15.0, 0.0, 15.0, 30.0)),
    "bent away": ("degrees", (0.0, 15.0, 30.0, 45.0)),
    "size": ("of what was planned", (0.6, 0.8, 1.0, 1.2, 1.4)),
}


def worn(frame: placement.Placed, how: str, amount: float) -> placement.Placed:
    """A frame with its patches worn in another way.

    Args:
        frame: as planned.
        how: of `CURVES`. All patches move to the same side; each is rolled, bent (about its
            vertical axis) and sized about its own middle.
        amount: in the unit of the curve.
    """
    side = float(np.sqrt(np.prod(frame.box[2:] - frame.box[:2])))
    angles, scale, shift = np.zeros(3, np.float32), 1.0, np.zeros(2, np.float32)
    if how == "size":
        scale = amount
    elif how in ("across", "down"):
        shift[int(how == "across")] = amount * side
    else:
        angles[{"bent away": 1, "rolled": 2}[how]] = np.deg2rad(amount)
    grids = {
        name: np.asarray(
            warps.turn_grid(grid, jnp.asarray(angles), scale=scale, shift=jnp.asarray(shift))
        )
        for name, grid in frame.grids.items()
    }
    return frame._replace(grids=grids)


def measure(
    variables: mtcnn.Variables,
    frames: Sequence[placement.Placed],
    patches: Mapping[str, np.ndarray],
    *,
    scale_factor: float,
) -> dict[str, Any]:
    """Rates of missed frames by how patches are worn and printed.

    Args:
        variables: those of MTCNN's three networks.
        frames: with the patches placed.
        patches: each `[h, w]` in [0, 1], by name.
        scale_factor: of the detector's pyramid.

    Returns:
        "curves": for each of `CURVES` its "unit" and "points", rates with the amount as "at";
        "printers": rates by name; "num_frames", "scale_factor".
    """

    def rate(
        shown: Sequence[placement.Placed], some: Mapping[str, np.ndarray]
    ) -> misdetection.Rate:
        found = misdetection.judge(
            variables,
            [placement.wear(frame, some) for frame in shown],
            [frame.box for frame in shown],
            scale_factor=scale_factor,
        )
        return misdetection.rate(~found[:, -1], sources=misdetection.sources_of(shown))

    def points(how: str, amounts: Sequence[float]) -> list[dict[str, Any]]:
        return [
            {"at": amount, **rate([worn(frame, how, amount) for frame in frames], patches)}
            for amount in amounts
        ]

    return {
        "num_frames": len(frames),
        "scale_factor": scale_factor,
        "curves": {
            how: {"unit": unit, "points": points(how, amounts)}
            for how, (unit, amounts) in CURVES.items()
        },
        "printers": {
            name: rate(frames, {part: printer.print(patch) for part, patch in patches.items()})
            for name, printer in PRINTERS.items()
        },
    }


def plot(measured: Mapping[str, Any]) -> bytes:
    """PNG of the curves of `measure`, with 95 % intervals."""
    curves = measured["curves"]
    canvas = figure.Figure(figsize=(2.6 * len(curves), 2.8), layout="constrained")
    for axes, (how, curve) in zip(
        canvas.subplots(1, len(curves), sharey=True), curves.items(), strict=True
    ):
        at, rates, low, high = (
            [point[key] for point in curve["points"]] for key in ("at", "rate", "low", "high")
        )
        axes.plot(at, rates, marker="o")
        axes.fill_between(at, low, high, alpha=0.2)
        axes.set(title=how, xlabel=curve["unit"], ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    canvas.axes[0].set_ylabel("missed frames")
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
