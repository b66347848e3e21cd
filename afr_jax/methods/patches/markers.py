"""Corner grids of patches from outside: a JSON file, or markers printed on what is worn.

Grids are `[R + 1, C + 1, 2]` (y, x) in photo pixels, by patch, as `placement.place` takes them.
Host code.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from afr_jax.core import files

_BOARD_FLAGS = cv2.CALIB_CB_ADAPTIVE_THRESH | cv2.CALIB_CB_NORMALIZE_IMAGE


def read_grids(path: str | os.PathLike[str]) -> dict[str, dict[str, np.ndarray]]:
    """Grids from a JSON file: `{"photo": {"left_cheek": [[[y, x], ...], ...], ...}, ...}`.

    Args:
        path: The file; photos go by the name of the frame (`data.video.Frame`).

    Returns:
        Grids, float32, by photo and patch.

    Raises:
        ValueError: The file is no JSON of that form; the message says where.
    """
    try:
        content = files.parse_json(pathlib.Path(path).read_text(encoding="utf-8"))
        found = {
            photo: {name: _grid(grid) for name, grid in grids.items()}
            for photo, grids in content.items()
        }
    # Lists within lists without end, values that are no numbers, or have hundreds of digits.
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} holds no corner grids: {error}") from error
    for photo, grids in found.items():
        for name, grid in grids.items():
            if grid.ndim != 3 or min(grid.shape[:2]) < 2 or grid.shape[2] != 2:
                shape = list(grid.shape)
                raise ValueError(f"{path}: {photo}, {name} is {shape}, not [>=2, >=2, 2]")
            if not np.isfinite(grid).all():
                raise ValueError(f"{path}: {photo}, {name} is not finite")
    return found


def _grid(values: files.Json) -> np.ndarray:
    # What is too large is infinite, and refused as that.
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64).astype(np.float32)


def find_aruco(
    pixels: np.ndarray, names: Sequence[str], *, dictionary: str = "DICT_4X4_50"
) -> dict[str, np.ndarray]:
    """Grids of one cell from ArUco markers: marker k, worn upright, lies where patch k goes.

    Args:
        pixels: `[H, W, 3]` uint8.
        names: Those of the patches, in the order of the markers' numbers.
        dictionary: OpenCV's name of the markers' dictionary.

    Returns:
        The grids.

    Raises:
        ValueError: A marker is not seen; the message says which.
    """
    known = cv2.aruco.getPredefinedDictionary(getattr(cv2.aruco, dictionary))
    corners, numbers, _ = cv2.aruco.ArucoDetector(known).detectMarkers(_gray(pixels))
    seen = {} if numbers is None else dict(zip(np.ravel(numbers).tolist(), corners, strict=True))
    grids = {}
    for number, name in enumerate(names):
        if number not in seen:
            raise ValueError(f"marker {number} ({name}) is not seen")
        # Clockwise from the upper left, (x, y).
        upper_left, upper_right, lower_right, lower_left = seen[number].reshape(4, 2)[:, ::-1]
        grids[name] = np.array([[upper_left, upper_right], [lower_left, lower_right]], np.float32)
    return grids


def find_chessboards(
    pixels: np.ndarray, names: Sequence[str], *, corners: tuple[int, int] = (3, 3)
) -> dict[str, np.ndarray]:
    """Grids from printed chessboards, worn as in the paper: one a patch, from left to right.

    Args:
        pixels: `[H, W, 3]` uint8.
        names: Those of the patches, from the picture's left to its right.
        corners: Rows and columns of inner corners of a board, at least 3 each.

    Returns:
        The grids of inner corners.

    Raises:
        ValueError: Fewer boards are seen than there are patches.
    """
    rows, columns = corners
    gray, grids = _gray(pixels).copy(), []
    for _ in names:
        is_seen, points = cv2.findChessboardCorners(gray, (columns, rows), flags=_BOARD_FLAGS)
        if not is_seen:
            raise ValueError(f"{len(grids)} chessboards are seen, {len(names)} are needed")
        grid = _upright(points.reshape(rows, columns, 2)[..., ::-1])
        grids.append(grid)
        # The next search must not find this board again.
        low, high = (f(grid.reshape(-1, 2), axis=0) for f in (np.min, np.max))
        margin = (high - low) / (np.array(corners) - 1)
        y0, x0 = np.maximum(np.floor(low - margin), 0).astype(int)
        y1, x1 = np.ceil(high + margin).astype(int)
        gray[y0:y1, x0:x1] = int(np.median(gray))
    grids.sort(key=lambda grid: grid[..., 1].mean())
    return dict(zip(names, grids, strict=True))


def to_json(grids: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """The text of a file that `read_grids` reads."""
    return json.dumps(
        {
            photo: {name: np.asarray(grid)[..., :2].tolist() for name, grid in named.items()}
            for photo, named in grids.items()
        }
    )


def _upright(grid: np.ndarray) -> np.ndarray:
    """The grid with rows from top to bottom and columns from left to right."""
    if abs(grid[-1, 0, 0] - grid[0, 0, 0]) < abs(grid[0, -1, 0] - grid[0, 0, 0]):
        grid = grid.transpose(1, 0, 2)
    if grid[-1, 0, 0] < grid[0, 0, 0]:
        grid = grid[::-1]
    return np.ascontiguousarray(grid[:, ::-1] if grid[0, -1, 1] < grid[0, 0, 1] else grid)


def _gray(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)
