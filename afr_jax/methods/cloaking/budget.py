"""What a cloak may cost: limits of what is seen of it, and changes fitted to them.

Limits hold on the final 8-bit pixels of every face. A change is `[h, w, 3]` of a region (y0, x0,
y1, x1) of the photo. Rounding to 8 bits and regions that overlap make what a scaled change costs
uneven, so it is fitted by trying.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from afr_jax.core import parallel
from afr_jax.core.perception import measures, ssim
from afr_jax.recognition import detect

# DSSIM of Shan et al. 2020, section 5.
PUBLISHED_DSSIM = 0.007
# Flicker beside FLIP: what changes of luma within the budgets have, and a little room.
_FLICKER_SHARE = 0.27
# How much more SSIMULACRA2 may lose on a large face looked at closely than at its limit's size.
_CLOSER = 1.6
# Rounds of fitting several changes together, and how many of them may enlarge a change.
_ROUNDS, _GROWING_ROUNDS = 32, 4
# What a change above the budget shrinks to at least, in a round of the first half and the second:
# some measures hardly follow small steps.
_SHRINK, _SHRINK_LATE = 0.98, 0.85
# Halvings of the interval that the scale of a single change lies in, and its largest scale.
_HALVINGS, _LARGEST_SCALE = 14, 64


Mode = Literal["low", "mid", "high"]


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits of a face's change; those that are None do not count.

    A search holds DSSIM and flicker, and clips colors at every pixel; the rest is held by fitting.
    SSIMULACRA2 is no aim of a search: it hardly counts fine noise, which a search that may spend it
    finds out (`experiments/results/fawkes_attempts.md`).

    Attributes:
        dssim: Largest DSSIM of the region that changes and of the detector's box, in (0, 1].
        ciede2000: Largest 99th percentile of CIEDE2000 in the region.
        chroma: Largest mean change of low-passed chroma in the region (`measures.tint`), gray
            levels.
        flip: Largest mean FLIP of the region.
        ssimulacra2: Least SSIMULACRA2 of the region, below 100.
        views: How much of a search's random views the budget pays for, in (0, 1]: the less may
            change, the less there is to spend on what a tracker only might do to a photo.
        relief: Limits in place of these for a face whose change, fitted to these, leaves it near to
            the person (`photo_cloaks.cloak_photos`); None where there are none.
    """

    dssim: float
    ciede2000: float | None = None
    chroma: float | None = None
    flip: float | None = None
    ssimulacra2: float | None = None
    views: float = 1.0
    relief: "Budget | None" = None

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: a limit is out of its range.
        """
        if not 0 < self.dssim <= 1:
            raise ValueError(f"dssim_budget is {self.dssim}, must lie in (0, 1]")
        for name in ("ciede2000", "chroma", "flip"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}, must be above 0")
        if self.ssimulacra2 is not None and not 0 < self.ssimulacra2 < 100:
            raise ValueError(f"ssimulacra2 is {self.ssimulacra2}, must lie in (0, 100)")
        if not 0 < self.views <= 1:
            raise ValueError(f"views is {self.views}, must lie in (0, 1]")

    @property
    def flicker(self) -> float | None:
        """What a search may spend of `flicker.flicker`: FLIP is about its limit then. Or None."""
        return None if self.flip is None else _FLICKER_SHARE * self.flip

    @property
    def lost(self) -> float | None:
        """What a search may spend of `ssimulacra2.lost` on a face that is large; or None."""
        return None if self.ssimulacra2 is None else _CLOSER * (100 - self.ssimulacra2)

    @property
    def ease(self) -> float:
        """The share of their full strength that random views have, in (0, 1].

        It is `views`, and less where DSSIM must be below the paper's.
        """
        return min(self.dssim / PUBLISHED_DSSIM, 1.0) * self.views

    def spent(
        self, original: np.ndarray, final: np.ndarray, region: np.ndarray, box: np.ndarray
    ) -> float:
        """The largest share of a limit that a face's change takes; at most 1 within the budget.

        Args:
            original: `[H, W, 3]` uint8.
            final: `[H, W, 3]` uint8.
            region: `[4]` int, all that may have changed.
            box: `[4]` int, the detector's.
        """
        y0, x0, y1, x1 = region
        pair = measures.shown(original[y0:y1, x0:x1], final[y0:y1, x0:x1])
        shares = [face_dssim(original, final, region, box) / self.dssim]
        if self.ciede2000 is not None:
            shares.append(float(np.percentile(measures.ciede2000(*pair), 99)) / self.ciede2000)
        if self.chroma is not None:
            shares.append(measures.tint(*pair) / self.chroma)
        if self.flip is not None:
            shares.append(measures.flip(*pair) / self.flip)
        # The slow one, where it can still matter.
        if self.ssimulacra2 is not None and max(shares) <= 1:
            shares.append((100 - measures.ssimulacra2(*pair)) / (100 - self.ssimulacra2))
        return max(shares)

    def share(self, dssim: float, seen: measures.Visibility) -> float:
        """`spent` of a change that is measured already.

        Args:
            dssim: `face_dssim`.
            seen: of the region.
        """
        pairs = [
            (dssim, self.dssim),
            (seen.ciede2000_p99, self.ciede2000),
            (seen.chroma, self.chroma),
            (seen.flip, self.flip),
        ]
        if self.ssimulacra2 is not None:
            pairs.append((100 - seen.ssimulacra2, 100 - self.ssimulacra2))
        return max(value / limit for value, limit in pairs if limit is not None)

    def __str__(self) -> str:
        """The limits in words."""
        words = {
            "dssim": "DSSIM at most {:g}",
            "ciede2000": "CIEDE2000 at most {:g} at 99 % of the pixels",
            "chroma": "low-passed chroma at most {:g} gray levels",
            "flip": "FLIP at most {:g}",
            "ssimulacra2": "SSIMULACRA2 at least {:g}",
        }
        limits = dataclasses.asdict(self)
        return ", ".join(
            text.format(limits[name]) for name, text in words.items() if limits[name] is not None
        )


# Of single faces in mode low: what mode mid allows, but still not told apart side by side.
_RELIEF = Budget(0.016, ciede2000=4.5, chroma=0.4, flip=0.045, ssimulacra2=80.0, views=0.4)
# In what people see. By its author, SSIMULACRA2 of 85 is not told apart in a flip test, of 80 not
# side by side, and of 70 it is hard to notice without the original.
MODES: dict[str, Budget] = {
    "low": Budget(
        0.012, ciede2000=4.0, chroma=0.4, flip=0.042, ssimulacra2=85.0, views=0.2, relief=_RELIEF
    ),
    "mid": Budget(0.016, ciede2000=4.5, chroma=0.4, flip=0.045, ssimulacra2=78.0),
    "high": Budget(0.026, ciede2000=6.5, chroma=0.6, flip=0.065, ssimulacra2=70.0),
}


def choose(mode: str | None, dssim: float | None) -> Budget:
    """The budget of a mode, or in place of it a limit of DSSIM.

    Raises:
        ValueError: there is no such mode, or the limit is out of its range.
    """
    if dssim is not None:
        return Budget(dssim=dssim)
    if mode not in MODES:
        raise ValueError(f"there is no mode {mode!r}, only {', '.join(MODES)}")
    return MODES[mode]


def face_dssim(
    original: np.ndarray, cloaked: np.ndarray, region: np.ndarray, box: np.ndarray
) -> float:
    """DSSIM of a face: the larger of those over its region and over the detector's box.

    Args:
        original: `[H, W, 3]` uint8.
        cloaked: `[H, W, 3]` uint8.
        region: `[4]` int.
        box: `[4]` int.
    """
    boxes = np.stack([region, box])
    (y0, x0), (y1, x1) = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    return ssim.dssim_uint8(
        original[y0:y1, x0:x1], cloaked[y0:y1, x0:x1], boxes=boxes - np.array([y0, x0, y0, x0])
    )


def fit_together(
    pixels: np.ndarray,
    regions: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    changes: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    budgets: Sequence[Budget],
) -> np.ndarray:
    """Adds the changes of all faces, each scaled until it fits its budget.

    At first a change below the budget may grow by up to half (rounding and enlarging lose some of
    it), within its pixel limits; later, changes only shrink: those of a face above the budget and
    of the faces whose regions overlap it.

    Args:
        pixels: of the photo, `[H, W, 3]` uint8.
        regions: `[4]` int of each face.
        boxes: `[4]` int of each face.
        changes: `[h, w, 3]` of each region in [0, 1] units, and the limits `[h, w, 1]` of its size.
        budgets: of each face.

    Returns:
        The final pixels.
    """
    whole = pixels.copy()
    if not len(regions):
        return whole
    # All that changes or is measured, so that a large photo costs no more than its faces.
    corners = np.concatenate([regions, boxes])
    (top, left), (bottom, right) = corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)
    shift = np.array([top, left, top, left])
    regions, boxes = ([box - shift for box in some] for some in (regions, boxes))
    pixels = pixels[top:bottom, left:right]
    scales = np.ones(len(regions))
    best, best_spent = pixels, 0.0
    areas = np.array(regions, np.float64)
    neighbors = (detect.overlap(areas, areas) > 0) | np.eye(len(regions), dtype=bool)
    for fit_round in range(_ROUNDS):
        final = pixels.astype(np.int16)
        for (y0, x0, y1, x1), (delta, limit), scale in zip(regions, changes, scales, strict=True):
            levels = np.round(np.clip(scale * delta, -limit, limit) * 255.0)
            final[y0:y1, x0:x1] += levels.astype(np.int16)
        final = np.clip(final, 0, 255).astype(np.uint8)
        spent = spent_together(pixels, final, regions, boxes, budgets)
        if np.all(spent <= 1) and spent.sum() >= best_spent:
            best, best_spent = final, spent.sum()
        if np.all((spent >= 0.995) & (spent <= 1)):
            break
        if fit_round >= _GROWING_ROUNDS and np.all(spent <= 1):
            break
        wanted = np.sqrt(0.998 / np.maximum(spent, 1e-9))
        if fit_round < _GROWING_ROUNDS:
            scales = np.minimum(scales * np.clip(wanted, 0.5, 1.25), 1.5)
        else:
            most = _SHRINK if fit_round < _ROUNDS // 2 else _SHRINK_LATE
            shrunk = np.minimum(wanted, most)
            least = np.where(neighbors & (spent > 1), shrunk, 1.0).min(axis=1)
            scales = scales * np.maximum(least, 0.5)
    whole[top:bottom, left:right] = best
    return whole


def spent_together(
    original: np.ndarray,
    final: np.ndarray,
    regions: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    budgets: Sequence[Budget],
) -> np.ndarray:
    """`Budget.spent` of each of a photo's faces, `[N]`.

    Args:
        original: `[H, W, 3]` uint8.
        final: `[H, W, 3]` uint8.
        regions: `[4]` int of each face.
        boxes: `[4]` int of each face.
        budgets: of each face.
    """

    def spent(number: int) -> float:
        return budgets[number].spent(original, final, regions[number], boxes[number])

    return np.array(parallel.thread_map(spent, range(len(regions))))


def fit_alone(
    pixels: np.ndarray,
    original: np.ndarray,
    region: np.ndarray,
    box: np.ndarray,
    change: np.ndarray,
    *,
    budget: Budget,
) -> np.ndarray:
    """Adds the largest multiple of one face's change that meets the budget.

    Args:
        pixels: of the photo as it is, other faces' changes included, `[H, W, 3]` uint8.
        original: of the photo, to measure against.
        region: `[4]` int.
        box: `[4]` int.
        change: `[h, w, 3]` or `[h, w, 1]` of the region, in gray levels.
        budget: of the face.

    Returns:
        The final pixels.
    """
    y0, x0, y1, x1 = region

    def changed(scale: float) -> np.ndarray:
        final = pixels.copy()
        piece = np.round(pixels[y0:y1, x0:x1] + scale * change)
        final[y0:y1, x0:x1] = np.clip(piece, 0, 255).astype(np.uint8)
        return final

    def fits(scale: float) -> bool:
        return budget.spent(original, changed(scale), region, box) <= 1

    return changed(_largest(fits))


def _largest(fits_fn: Callable[[float], bool]) -> float:
    """The largest scale that fits: twice as much at a time until it is too much, then halving."""
    low, high = 0.0, 1.0
    while fits_fn(high) and high < _LARGEST_SCALE:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits_fn(middle) else (low, middle)
    return low
