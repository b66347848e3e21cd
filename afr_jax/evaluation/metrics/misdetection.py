"""How often a detector misses a person: frames, views of them, judgements and rates.

A frame is missed if the full cascade finds no face whose box overlaps that person's box on the
clean frame by `MIN_OVERLAP`. The person is found, and frames without one are left out, before
anything is drawn on them.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from afr_jax.core import parallel
from afr_jax.data import video
from afr_jax.evaluation.metrics import intervals
from afr_jax.models import mtcnn
from afr_jax.recognition import detect

# Least intersection over union of a found box and the person's: below half, for boxes of patched
# faces are drawn worse, and well above that of a neighbour's.
MIN_OVERLAP = 0.3
STAGES = ("pnet", "rnet", "onet")
# Looser than any detector that is judged, so that a frame is not left out because it is hard.
SEARCH = detect.DetectorOptions(scale_factor=0.82, thresholds=(0.6, 0.7, 0.7))
_MIN_TRACK_OVERLAP = 0.2
_SWAPPED = [1, 0, 2, 4, 3]  # Landmarks in a mirrored photo.


class Person(NamedTuple):
    """A frame with the person's box `[4]` and landmarks `[5, 2]`; whether it is an altered view."""

    name: str
    pixels: np.ndarray
    box: np.ndarray
    landmarks: np.ndarray
    is_altered: bool = False


def find_person(
    variables: mtcnn.Variables,
    frames: Sequence[video.Frame],
    *,
    is_film: bool,
    options: detect.DetectorOptions = SEARCH,
) -> tuple[list[Person], list[str]]:
    """One person in frames.

    The person is the most confident face of all frames. In a film it is followed from there, both
    ways, by overlap with its last box; in photos it is the most confident face of each.

    Args:
        variables: of the three networks.
        frames: in order.
        is_film: whether neighbouring frames follow each other.
        options: of the search.

    Returns:
        The frames with that person, in order, and the names of those without.
    """
    found = detect.detect_photos(variables, [frame.pixels for frame in frames], options=options)
    best = [faces.confidences.max(initial=-1.0) for faces in found]
    chosen: dict[int, int] = {}
    start = int(np.argmax(best)) if len(best) else 0
    for numbers in (range(start, len(frames)), range(start - 1, -1, -1)):
        last = found[start].boxes[:1] if best and best[start] >= 0 else None
        for number in numbers:
            faces = found[number]
            if last is None or not len(faces.boxes):
                continue
            overlaps = detect.overlap(faces.boxes, last)[:, 0]
            index = int(np.argmax(overlaps)) if is_film else int(np.argmax(faces.confidences))
            if not is_film or overlaps[index] >= _MIN_TRACK_OVERLAP:
                chosen[number] = index
                last = faces.boxes[index : index + 1]
    people = [
        Person(*frames[number], found[number].boxes[index], found[number].landmarks[index])
        for number, index in sorted(chosen.items())
    ]
    return people, [frame.name for n, frame in enumerate(frames) if n not in chosen]


def alter(generator: np.random.Generator, person: Person, *, number: int) -> Person:
    """Another view of a frame: mirrored or not, up to 1.4 times as near, up to 15 % lighter."""
    pixels, box, landmarks = person.pixels, person.box, person.landmarks
    height, width = pixels.shape[:2]
    if generator.random() < 0.5:
        pixels = pixels[:, ::-1]
        box = np.array([box[0], width - 1 - box[3], box[2], width - 1 - box[1]], np.float32)
        landmarks = landmarks[_SWAPPED] * [1, -1] + [0, width - 1]
    zoom = generator.uniform(1.0, 1.4)
    side = np.array([height, width]) / zoom
    middle = (box[:2] + box[2:]) / 2 + generator.uniform(-0.05, 0.05, 2) * side
    low = np.clip(middle - side / 2, 0, [height, width] - side)
    area = (low[1], low[0], low[1] + side[1], low[0] + side[0])
    zoomed = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=area)
    light = generator.uniform(0.85, 1.15)
    pixels = np.clip(np.round(np.asarray(zoomed) * light), 0, 255).astype(np.uint8)
    # Pixel centres lie half a pixel inside the area that is enlarged.
    shift = zoom * (0.5 - low) - 0.5
    box = (box.reshape(2, 2) * zoom + shift).ravel().astype(np.float32)
    landmarks = (landmarks * zoom + shift).astype(np.float32)
    return Person(f"{person.name}_view{number}", pixels, box, landmarks, True)


def fill_up(people: Sequence[Person], total: int, *, seed: int = 0) -> list[Person]:
    """The frames, and altered views of them, in turns, until there are `total`."""
    generator = np.random.default_rng(seed)
    filled = list(people)
    while people and len(filled) < total:
        number = len(filled)
        filled.append(alter(generator, people[number % len(people)], number=number))
    return filled


def choose(people: Sequence[Person], total: int, *, seed: int | None) -> list[Person]:
    """So many frames, evenly spread; with a seed, views fill up what is missing (`fill_up`)."""
    some = [people[index] for index in video.spread(len(people), min(total, len(people)))]
    return some if seed is None else fill_up(some, total, seed=seed)


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
        variables: of the three networks.
        photos: `[H, W, 3]` uint8 each.
        boxes: `[4]`, where the person's face is in each.
        scale_factor: of the pyramid.
        min_face_px: of the detector.

    Returns:
        `[N, 3]` bool: whether P-Net's proposals, R-Net's survivors and the final faces hold a box
        of the person.
    """
    options = detect.DetectorOptions(min_face_px=min_face_px, scale_factor=scale_factor)

    def one(pair):
        pixels, box = pair
        stages = detect.detect_stages(variables, pixels, options=options)
        return [
            is_found(found, box) for found in (stages.proposals, stages.refined, stages.faces.boxes)
        ]

    pairs = list(zip(photos, boxes, strict=True))
    return np.array(parallel.thread_map(one, pairs), bool).reshape(-1, len(STAGES))


def is_found(found: np.ndarray, box: np.ndarray) -> bool:
    """Whether one of the boxes `[N, 4]` is that of the person `[4]`."""
    return bool(detect.overlap(np.asarray(found), box[None]).max(initial=0.0) >= MIN_OVERLAP)


def rate(misses: np.ndarray) -> dict[str, Any]:
    """Share of missed frames `[N]` bool, with its Wilson interval of 95 %."""
    missed, total = int(np.sum(misses)), int(np.size(misses))
    low, high = intervals.wilson_interval(missed, total)
    share = missed / total if total else None
    return {"missed": missed, "total": total, "rate": share, "low": low, "high": high}


def summarise(judged: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Rates of one variant.

    Args:
        judged: scale factor -> `[N, 3]` bool of `judge`.

    Returns:
        For each factor the rate of missed frames and the share of frames that survive each network;
        under "mean" the mean rate over the factors.
    """
    table = {}
    for factor, found in judged.items():
        survival = {name: float(np.mean(found[:, k])) for k, name in enumerate(STAGES)}
        table[factor] = {**rate(~found[:, -1]), "survival": survival}
    rates = [row["rate"] for row in table.values()]
    return {**table, "mean": float(np.mean(rates)) if rates and None not in rates else None}


def by_size(judged: Mapping[str, np.ndarray], sides: np.ndarray) -> list[dict[str, Any]]:
    """Rates of one variant by thirds of the faces' sides `[N]` px, over all factors."""
    edges = np.quantile(sides, [0, 1 / 3, 2 / 3, 1])
    rows = []
    for number, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        inside = (sides >= low) & ((sides < high) if number < 2 else (sides <= high))
        misses = np.concatenate([~found[inside, -1] for found in judged.values()])
        rows.append({"from_px": float(low), "to_px": float(high), **rate(misses)})
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
