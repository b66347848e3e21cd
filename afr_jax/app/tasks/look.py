"""Looks at a photo that is to be cloaked: a small picture of it, and its faces."""

import pathlib
from collections.abc import Mapping

from afr_jax.app.tasks import models, outputs, pictures
from afr_jax.core import files
from afr_jax.data import photos

_TOO_SMALL = "it is too small to be recognized"


def run(
    loaded: models.Models, folder: pathlib.Path, payload: Mapping[str, files.Json]
) -> dict[str, files.Json]:
    """Finds the faces of a photo.

    Args:
        loaded: the networks.
        folder: for the picture.
        payload: `path` and `name` of the photo.

    Returns:
        `width`, `height`; `already`, whether it is cloaked already; `faces`, each with its `box`
        (y0, x0, y1, x1), whether it is `chosen` unless somebody says otherwise, whether it is
        `free` to be chosen, and the `reason` where it is not chosen.

    Raises:
        photos.PhotoError: it cannot be read.
    """
    photo = photos.read_photo(payload["path"])
    flow = loaded.flow({})
    found = flow.find_faces(payload["name"], photo)
    faces = [
        {"box": box.tolist(), "chosen": True, "free": True, "reason": None}
        for box in found.task.faces.boxes
    ]
    faces += [
        {
            "box": record["detection"],
            "chosen": False,
            "free": record["reason"] != _TOO_SMALL,
            "reason": record["reason"],
        }
        for record in found.skipped
    ]
    (folder / "preview.jpg").write_bytes(pictures.preview(photo))
    height, width = photo.pixels.shape[:2]
    return {
        "width": width,
        "height": height,
        "already": flow.is_output(photo),
        "faces": faces,
        "outputs": {"preview": outputs.output("preview.jpg")},
    }
