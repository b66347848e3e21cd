"""How often MTCNN misses a person who wears patches: judgements, rates, changes of the scene.

A frame is missed if the full cascade finds no face whose box overlaps that person's box on the
clean frame by `MIN_OVERLAP`.
"""

import dataclasses
import io
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np
from PIL import Image

from afr_jax.core import files, parallel, progress
from afr_jax.data import video
from afr_jax.evaluation.metrics import intervals
from afr_jax.methods.patches import people, placement, print_sheet, scenes, training
from afr_jax.models import mtcnn
from afr_jax.recognition import detect

# Least intersection over union of a found box and the person's: below half, for boxes of patched
# faces are drawn worse, and well above that of a neighbor's.
MIN_OVERLAP = 0.3
STAGES = ("pnet", "rnet", "onet")
_LEVELS = scenes.LevelOptions()


class Rate(TypedDict):
    """How many frames are missed: counts, share (None of no frames), Wilson interval of 95 %."""

    missed: int
    total: int
    rate: float | None
    low: float
    high: float
    survival: NotRequired[dict[str, float]]


class SizeRate(Rate):
    """The rate among faces whose side lies between two, in pixels."""

    from_px: float
    to_px: float


class Survivors(TypedDict):
    """P-Net's proposals that overlap the person's box: what a first network still gives away.

    Attributes:
        frames: how many were looked at, and `with_some` of them have such proposals.
        per_frame: median number of them.
        sides: quartiles of their sides, in sides of the person's box: the levels of the pyramid.
        away: quartiles of the distance between the middles, likewise: cells beside the patch.
    """

    frames: int
    with_some: int
    per_frame: float
    sides: list[float] | None
    away: list[float] | None


# Rates by scale factor, and under "mean" the mean of their shares.
RateTable = dict[str, Rate | float | None]


@dataclasses.dataclass(frozen=True)
class Misdetection:
    """How often a person is missed, without and with patches.

    Attributes:
        clean: Rates by scale factor of the detector's pyramid, with the share of frames that
            survive each network, and their mean.
        patched: The same with the patches on the face.
        names: Of the N frames.
        clean_frames: Frames `[H, W, 3]` uint8.
        patched_frames: The same with the patches on the face.
        skipped: (name, reason) of frames without the person, or without room for the patches.
    """

    clean: RateTable
    patched: RateTable
    names: list[str]
    clean_frames: list[np.ndarray]
    patched_frames: list[np.ndarray]
    skipped: list[tuple[str, str]]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `misdetection.json` and `frames/{clean,patched}/*.png`; existing ones go."""
        folder = pathlib.Path(folder)
        for number, name in enumerate(self.names):
            save_frame(folder, name, self.clean_frames[number], self.patched_frames[number])
        table = {"clean": self.clean, "patched": self.patched, "skipped": self.skipped}
        files.write_json(folder / "misdetection.json", table)


def misdetection(
    detector: mtcnn.Variables,
    frames: video.Frames | Sequence[video.Frame] | np.ndarray,
    patches: training.TrainedPatches,
    *,
    is_film: bool = True,
    scale_factors: Sequence[float] = _LEVELS.scale_factors,
    min_face_px: float = _LEVELS.min_face_px,
) -> Misdetection:
    """Draws patches on a person and measures how often the detector misses the face.

    Frames that the patches were trained on say nothing of their worth: give others.

    Args:
        detector: The variables of MTCNN's three networks, as `Recognizer.detector` holds them.
        frames: What `read_frames` returns, a list of frames, or an array `[N, H, W, 3]` uint8.
        patches: What `train_patches` returns.
        is_film: Whether the frames follow each other, so that the person is followed from the
            surest frame on; else the person is the surest face of each.
        scale_factors: Of the pyramids that are tried, in (0, 1).
        min_face_px: Side of the smallest face that the detector looks for, in pixels.

    Returns:
        Rates with their intervals, and the frames.

    Raises:
        TypeError: `frames` or `patches` is something else.
        ValueError: No frame shows a face that the patches can be placed on.
    """
    if not isinstance(patches, training.TrainedPatches):
        kind = type(patches).__name__
        raise TypeError(f"patches must be what `train_patches` returns, got {kind}")
    shown, lost = people.find_person(detector, people.as_frames(frames), is_film=is_film)
    placed, left_out = placement.place_all(shown, patches.placement)
    skipped = [*lost, *left_out]
    if not placed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped)
        raise ValueError(f"there is no frame to measure on ({reasons})")
    pictures, tables = {}, {}
    for kind, worn in (("clean", None), ("patched", patches.patches)):
        pictures[kind] = [placement.wear(frame, worn) for frame in placed]
        tables[kind] = summarize(
            judge_factors(
                detector,
                pictures[kind],
                [frame.box for frame in placed],
                scale_factors=scale_factors,
                min_face_px=min_face_px,
            )
        )
    return Misdetection(
        clean=tables["clean"],
        patched=tables["patched"],
        names=[frame.name for frame in placed],
        clean_frames=pictures["clean"],
        patched_frames=pictures["patched"],
        skipped=skipped,
    )


def save_frame(folder: pathlib.Path, name: str, clean: np.ndarray, patched: np.ndarray) -> None:
    """Writes a frame without and with patches as `frames/{clean,patched}/NAME.png`."""
    for kind, pixels in (("clean", clean), ("patched", patched)):
        path = folder / "frames" / kind / f"{name}.png"
        files.write_atomically(path, print_sheet.png(pixels), overwrite=True)


def judge(
    variables: mtcnn.Variables,
    photos: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    *,
    scale_factor: float,
    min_face_px: float = 20.0,
) -> np.ndarray:
    """What is left of a person after each network of the cascade.

    Args:
        variables: Those of MTCNN's three networks.
        photos: `[H, W, 3]` uint8 each.
        boxes: `[4]`, where the person's face is in each.
        scale_factor: Of the pyramid.
        min_face_px: Side of the smallest face that is looked for, in pixels.

    Returns:
        `[N, 3]` bool: whether P-Net's proposals, R-Net's survivors and the final faces hold a box
        of the person.
    """
    options = detect.DetectorOptions(min_face_px=min_face_px, scale_factor=scale_factor)

    def one(pair: tuple[np.ndarray, np.ndarray]) -> list[bool]:
        pixels, box = pair
        stages = detect.detect_stages(variables, pixels, options=options)
        return [
            is_found(found, box) for found in (stages.proposals, stages.refined, stages.faces.boxes)
        ]

    pairs = list(zip(photos, boxes, strict=True))
    return np.array(parallel.thread_map(one, pairs), bool).reshape(-1, len(STAGES))


def judge_factors(
    variables: mtcnn.Variables,
    photos: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    *,
    scale_factors: Sequence[float],
    min_face_px: float = 20.0,
) -> dict[str, np.ndarray]:
    """What `judge` says, by scale factor of the detector's pyramid."""
    return {
        str(factor): judge(variables, photos, boxes, scale_factor=factor, min_face_px=min_face_px)
        for factor in progress.track(scale_factors, description="scale factors")
    }


def survivors(proposals: Sequence[np.ndarray], boxes: Sequence[np.ndarray]) -> Survivors:
    """Where P-Net still proposes the person.

    Args:
        proposals: `[N, 4]` of each frame, `detect.Stages.proposals`.
        boxes: `[4]`, where the person's face is in each.
    """
    counts, sides, away = [], [], []
    for found, box in zip(proposals, boxes, strict=True):
        own = found[detect.overlap(np.asarray(found), box[None])[:, 0] >= MIN_OVERLAP]
        counts.append(len(own))
        side = np.sqrt(np.prod(box[2:] - box[:2]))
        sides.append(np.sqrt(np.prod(own[:, 2:] - own[:, :2], axis=1)) / side)
        middles = (own[:, :2] + own[:, 2:] - box[:2] - box[2:]) / 2
        away.append(np.linalg.norm(middles, axis=1) / side)

    def quartiles(parts: list[np.ndarray]) -> list[float] | None:
        values = np.concatenate([np.zeros(0), *parts])
        return np.quantile(values, [0.25, 0.5, 0.75]).tolist() if len(values) else None

    return {
        "frames": len(counts),
        "with_some": int(np.count_nonzero(counts)),
        "per_frame": float(np.median(counts)) if counts else 0.0,
        "sides": quartiles(sides),
        "away": quartiles(away),
    }


def is_found(found: np.ndarray, box: np.ndarray) -> bool:
    """Whether one of the boxes `[N, 4]` is that of the person `[4]`."""
    return bool(detect.overlap(np.asarray(found), box[None]).max(initial=0.0) >= MIN_OVERLAP)


def sources_of(frames: Sequence[people.Person | placement.Placed]) -> list[str]:
    """Names of the frames that these are, or are altered copies of."""
    return [people.source_of(frame.name) if frame.is_altered else frame.name for frame in frames]


def rate(misses: np.ndarray, *, sources: Sequence[str] | None = None) -> Rate:
    """Share of missed frames, with its Wilson interval of 95 %.

    Args:
        misses: `[N]` bool.
        sources: `[N]` names of the frames that these are, or are altered copies of: copies hang
            together, and the interval is that of as many frames as there are names. By default
            every frame counts.
    """
    missed, total = int(np.sum(misses)), np.size(misses)
    groups = None if sources is None else len(set(sources))
    low, high = intervals.wilson_interval(missed, total, num_groups=groups)
    share = missed / total if total else None
    return {"missed": missed, "total": total, "rate": share, "low": low, "high": high}


def summarize(
    judged: Mapping[str, np.ndarray], *, sources: Sequence[str] | None = None
) -> RateTable:
    """Rates of one variant.

    Args:
        judged: `[N, 3]` bool of `judge`, by scale factor.
        sources: As of `rate`.

    Returns:
        For each factor the rate of missed frames and the share of frames that survive each network;
        under "mean" the mean rate over the factors.
    """
    table: RateTable = {}
    rates: list[float] = []
    for factor, found in judged.items():
        missed = rate(~found[:, -1], sources=sources)
        if missed["rate"] is not None:
            rates.append(missed["rate"])
        survival = {name: float(np.mean(found[:, k])) for k, name in enumerate(STAGES)}
        table[factor] = {**missed, "survival": survival}
    table["mean"] = float(np.mean(rates)) if rates and len(rates) == len(judged) else None
    return table


def by_size(
    judged: Mapping[str, np.ndarray], sides: np.ndarray, *, sources: Sequence[str] | None = None
) -> list[SizeRate]:
    """Rates of one variant by thirds of the faces' sides `[N]` px, over all factors.

    A frame's factors hang together: the interval has the means of the ends of theirs. `sources` are
    as of `rate`.
    """
    names = np.arange(len(sides)).astype(str) if sources is None else np.array(sources)
    edges = np.quantile(sides, [0, 1 / 3, 2 / 3, 1])
    rows: list[SizeRate] = []
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = (sides >= low) & ((sides < high) if number < 2 else (sides <= high))
        misses = np.stack([~found[inside, -1] for found in judged.values()])
        ends = []
        for one in misses:
            found = rate(one, sources=names[inside].tolist())
            ends.append((found["low"], found["high"]))
        row: SizeRate = {"from_px": float(low), "to_px": float(high), **rate(misses)}
        row["low"], row["high"] = np.mean(ends, axis=0).tolist()
        rows.append(row)
    return rows


def relight(pixels: np.ndarray, gain: float) -> np.ndarray:
    """A photo `[H, W, 3]` uint8 in another light."""
    return np.clip(np.round(pixels * gain), 0, 255).astype(np.uint8)


def recompress(pixels: np.ndarray, quality: int) -> np.ndarray:
    """A photo `[H, W, 3]` uint8 after JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def rescale(pixels: np.ndarray, factor: float) -> np.ndarray:
    """A photo `[H, W, 3]` uint8 enlarged or shrunk by a factor."""
    size = [max(1, round(length * factor)) for length in pixels.shape[1::-1]]
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
