"""Patches on photos: where they lie on a face, how bright paper is there, drawing them.

A patch is `[h, w]` float in [0, 1], 0 black and 1 the paper's white. Host code around one compiled
function; photos are `[H, W, 3]` uint8.
"""

import types
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import images, progress
from afr_jax.methods.patches import geometry, markers, people
from afr_jax.perturb import warps

# Share of the face's pixels that are darker than paper would be in their place.
_PAPER_QUANTILE = 0.98
_DIMMEST_PAPER = 0.35
_MASK_COLOR = (0.78, 0.88, 0.93)  # Pale blue, as medical masks are.
_WINDOW_STEP = 16


class Placed(NamedTuple):
    """A frame with a person, and where the patches lie on it.

    Attributes:
        pixels: `[H, W, 3]` uint8; with the mask, where the patch is worn on one.
        box: `[4]` (y0, x0, y1, x1) of the face.
        grids: Corners `[R + 1, C + 1, 3]` (y, x, depth) of the cells of each patch, in pixels.
        paper: Color `[3]` in [0, 1] that white paper has there.
        name: Of the frame.
        is_altered: Whether the frame is an altered copy (`people.alter`).
    """

    pixels: np.ndarray
    box: np.ndarray
    grids: dict[str, np.ndarray]
    paper: np.ndarray
    name: str = ""
    is_altered: bool = False


class Corners(NamedTuple):
    """Where patches are said to be worn, instead of by the face's landmarks.

    Attributes:
        marker: "aruco" or "chessboard": printed markers are looked for; None for `grids`.
        grids: Corner grids by frame and patch, as `markers.read_grids` reads them.
    """

    marker: str | None = None
    grids: Mapping[str, Mapping[str, np.ndarray]] = types.MappingProxyType({})

    def find(self, person: people.Person, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Grids `[R + 1, C + 1, 2]` of the patches on a frame, by name.

        Raises:
            ValueError: A marker is not seen, or no grid is given for the frame.
        """
        if self.marker == "aruco":
            return markers.find_aruco(person.pixels, names)
        if self.marker == "chessboard":
            return markers.find_chessboards(person.pixels, names)
        if person.name not in self.grids:
            raise ValueError("the file of corners does not name it")
        return self.grids[person.name]


def place(
    pixels: np.ndarray,
    box: np.ndarray,
    landmarks: np.ndarray,
    *,
    placement: str,
    grids: Mapping[str, np.ndarray] | None = None,
) -> Placed:
    """Places the patches of a placement on a face; for a mask, paints the mask first.

    Args:
        pixels: `[H, W, 3]` uint8.
        box: `[4]` of the face.
        landmarks: `[5, 2]` (y, x) of the face.
        placement: One of `geometry.PLACEMENTS`.
        grids: Corners `[R + 1, C + 1, 2]` (y, x) of each patch, to use instead of the landmarks.

    Returns:
        The photo and where the patches are.

    Raises:
        ValueError: A patch lies outside the photo, or the landmarks show no face.
    """
    areas = geometry.PLACEMENTS[placement]
    paper = paper_color(pixels, box)
    pose = geometry.estimate_pose(landmarks)
    if placement == "mask" and grids is None:
        color = np.asarray(_MASK_COLOR, np.float32) * paper
        mask = {"mask": np.broadcast_to(color, (1, 1, 3))}
        grid = {"mask": geometry.face_grid(pose, geometry.MASK)}
        pixels = draw(pixels, mask, grid)
    if grids is None:
        found = {name: geometry.face_grid(pose, area) for name, area in areas.items()}
    elif set(grids) != set(areas):
        raise ValueError(f"grids are given for {sorted(grids)}, needed for {sorted(areas)}")
    else:
        found = {
            name: np.pad(np.asarray(grid, np.float32)[..., :2], [(0, 0), (0, 0), (0, 1)])
            for name, grid in grids.items()
        }
    limit = np.array(pixels.shape[:2]) - 1.0
    for name, grid in found.items():
        middle = grid[..., :2].reshape(-1, 2).mean(axis=0)
        if not ((middle >= 0) & (middle <= limit)).all():
            raise ValueError(f"the middle of {name}, {np.round(middle).tolist()}, is not in it")
    return Placed(pixels, np.asarray(box, np.float32), found, paper)


def place_all(
    frames: Sequence[people.Person], placement: str, *, corners: Corners | None = None
) -> tuple[list[Placed], list[tuple[str, str]]]:
    """Places the patches on every frame that has room for them.

    Args:
        frames: Frames with a person.
        placement: One of `geometry.PLACEMENTS`.
        corners: Where the patches are; by default the landmarks say it.

    Returns:
        The frames with the patches placed, and (name, reason) of those that are left out.
    """
    names = sorted(geometry.PLACEMENTS[placement])
    found, skipped = [], []
    for person in frames:
        try:
            grids = corners.find(person, names) if corners else None
            placed = place(
                person.pixels, person.box, person.landmarks, placement=placement, grids=grids
            )
        except ValueError as error:
            progress.warn(person.name, f"left out: {error}")
            skipped.append((person.name, str(error)))
            continue
        found.append(placed._replace(name=person.name, is_altered=person.is_altered))
    return found, skipped


def paper_color(pixels: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Color `[3]` in [0, 1] that white paper has beside a face: as bright as its brightest parts.

    Args:
        pixels: `[H, W, 3]` uint8.
        box: `[4]` (y0, x0, y1, x1) of the face.
    """
    y0, x0 = np.maximum(np.floor(box[:2]).astype(int), 0)
    y1, x1 = np.ceil(box[2:]).astype(int)
    face = pixels[y0 : y1 + 1, x0 : x1 + 1].reshape(-1, 3)
    if not len(face):
        return np.ones(3, np.float32)
    bright = np.quantile(face / 255.0, _PAPER_QUANTILE, axis=0)
    return np.clip(bright, _DIMMEST_PAPER, 1.0).astype(np.float32)


def draw(
    pixels: np.ndarray, textures: Mapping[str, np.ndarray], grids: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Draws textures on a whole photo.

    Args:
        pixels: `[H, W, 3]` uint8.
        textures: Each texture `[h, w, 1 or 3]` in [0, 1], by its name.
        grids: Corners `[R + 1, C + 1, 3]` of each, in pixels.

    Returns:
        The photo `[H, W, 3]` uint8 with the textures on it.
    """
    pixels = np.array(pixels)
    for name, texture in textures.items():
        flat = grids[name][..., :2].reshape(-1, 2)
        low, high = np.floor(flat.min(axis=0)) - 2, np.ceil(flat.max(axis=0)) + 3
        side = images.bucket_size(int((high - low).max()), (_WINDOW_STEP,))
        window = [min(side, length) for length in pixels.shape[:2]]
        room = np.array(pixels.shape[:2]) - window
        y, x = np.clip(np.round((low + high - window) / 2), 0, room).astype(int)
        part = (slice(y, y + window[0]), slice(x, x + window[1]))
        origin = np.array([y, x], np.float32)
        texture = np.asarray(texture, np.float32)
        pixels[part] = _paste_uint8(pixels[part], texture, grids[name], origin)
    return pixels


def wear(placed: Placed, patches: Mapping[str, np.ndarray] | None) -> np.ndarray:
    """A frame `[H, W, 3]` uint8 with patches `[h, w]` in [0, 1] on it; None leaves it as it is."""
    if patches is None:
        return placed.pixels
    return draw(placed.pixels, printed(patches, placed.paper), placed.grids)


def printed(patches: Mapping[str, np.ndarray], paper: np.ndarray) -> dict[str, np.ndarray]:
    """Patches `[h, w]` as colored textures `[h, w, 3]`, printed on paper of a color `[3]`."""
    return {name: patch[..., None] * paper.reshape(1, 1, 3) for name, patch in patches.items()}


@jax.jit
def _paste_uint8(
    pixels: jax.Array, texture: jax.Array, grid: jax.Array, origin: jax.Array
) -> jax.Array:
    image = pixels.astype(jnp.float32) / 255.0
    return images.to_uint8(warps.paste(image, texture, grid, origin=origin))
