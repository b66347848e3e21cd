"""Frames of one person: who is on them, which frames are taken, altered copies to fill them up.

The person is found, and frames without one are left out, before anything is drawn on them. Host
code around the detector; photos are `[H, W, 3]` uint8, boxes `[4]` (y0, x0, y1, x1) and landmarks
`[5, 2]` (y, x) in pixels.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from afr_jax.data import video
from afr_jax.models import mtcnn
from afr_jax.recognition import detect

# Looser than any detector that is judged, so that a frame is not left out because it is hard.
SEARCH = detect.DetectorOptions(scale_factor=0.82, thresholds=(0.6, 0.7, 0.7))
NO_FACE = "no face of the person"
_MIN_TRACK_OVERLAP = 0.2
# Between the name of a frame and the number of an altered copy of it.
_COPY = "_copy"
_SWAPPED = [1, 0, 2, 4, 3]  # Landmarks in a mirrored photo.


class Person(NamedTuple):
    """A frame with a person.

    Attributes:
        name: Of the frame.
        pixels: `[H, W, 3]` uint8.
        box: `[4]` of the face.
        landmarks: `[5, 2]` of the face.
        is_altered: Whether it is an altered copy of a frame (`alter`).
    """

    name: str
    pixels: np.ndarray
    box: np.ndarray
    landmarks: np.ndarray
    is_altered: bool = False


def as_frames(frames: video.Frames | Sequence[video.Frame] | np.ndarray) -> list[video.Frame]:
    """Named frames from whatever holds frames.

    Args:
        frames: What `video.read_frames` returns, a list of frames, or an array `[N, H, W, 3]`
            uint8, whose frames are named after their numbers.

    Raises:
        TypeError: Something else.
        ValueError: An array that is not `[N, H, W, 3]` uint8, or no frame.
    """
    if isinstance(frames, Iterable) and not isinstance(frames, np.ndarray):
        named = list(frames.frames if isinstance(frames, video.Frames) else frames)
        wrong = next((each for each in named if not isinstance(each, video.Frame)), None)
        if wrong is not None:
            raise TypeError(f"frames: {type(wrong).__name__} is not a `video.Frame`")
        if not named:
            raise ValueError("frames: there is none")
        return named
    if not isinstance(frames, np.ndarray):
        raise TypeError(
            "frames must be what `read_frames` returns, a list of frames or an array, "
            f"got {type(frames).__name__}"
        )
    if not len(frames):
        raise ValueError("frames: there is none")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        shape = list(frames.shape)
        raise ValueError(f"frames are {frames.dtype} {shape}, must be uint8 [N, H, W, 3]")
    return [video.Frame(f"{number:04d}", pixels) for number, pixels in enumerate(frames)]


def find_person(
    variables: mtcnn.Variables,
    frames: Sequence[video.Frame],
    *,
    is_film: bool,
    options: detect.DetectorOptions = SEARCH,
) -> tuple[list[Person], list[tuple[str, str]]]:
    """Finds one person in frames.

    The person is the most confident face of all frames. In a film it is followed from there, both
    ways, by overlap with its last box; in photos it is the most confident face of each.

    Args:
        variables: Those of MTCNN's three networks.
        frames: In order.
        is_film: Whether neighboring frames follow each other.
        options: Settings of the search.

    Returns:
        The frames with that person, in order, and (name, reason) of those without.
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
    lost = [(frame.name, NO_FACE) for n, frame in enumerate(frames) if n not in chosen]
    return people, lost


def alter(generator: np.random.Generator, person: Person, *, number: int) -> Person:
    """An altered copy of a frame: mirrored or not, up to 1.4 times as near, up to 15 % lighter.

    Args:
        generator: Decides how it is altered.
        person: The frame.
        number: Appended to its name.
    """
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
    # Pixel centers lie half a pixel inside the area that is enlarged.
    shift = zoom * (0.5 - low) - 0.5
    box = (box.reshape(2, 2) * zoom + shift).ravel().astype(np.float32)
    landmarks = (landmarks * zoom + shift).astype(np.float32)
    return Person(f"{person.name}{_COPY}{number}", pixels, box, landmarks, True)


def source_of(name: str) -> str:
    """Name of the frame that an altered copy was made of."""
    return name.rpartition(_COPY)[0]


def fill_up(people: Sequence[Person], total: int, *, seed: int = 0) -> list[Person]:
    """The frames, and altered copies of them in turns, until there are `total`."""
    generator = np.random.default_rng(seed)
    filled = list(people)
    while people and len(filled) < total:
        number = len(filled)
        filled.append(alter(generator, people[number % len(people)], number=number))
    return filled


def choose(people: Sequence[Person], total: int, *, seed: int | None) -> list[Person]:
    """So many frames, evenly spread.

    Args:
        people: Frames to choose from.
        total: How many are wanted.
        seed: Of the altered copies that fill up what is missing (`fill_up`); None for no copies.
    """
    some = [people[index] for index in video.spread(len(people), min(total, len(people)))]
    return some if seed is None else fill_up(some, total, seed=seed)
