"""The page of a matching study: a query's nearest photos side by side, for each extractor.

One HTML file with its pictures inside; its content policy lets the browser fetch nothing. It holds
no time and no random value, so the same input gives the same page.
"""

import base64
import functools
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from afr_jax.core import files
from afr_jax.data import photos
from afr_jax.evaluation.patches import pictures as patch_pictures
from afr_jax.evaluation.report import page, pictures

_FACE_PX = 150
_PHOTO_PX = 260
# Side of a face's picture, in sides of its box.
_SIDES = 1.5


def write_match_report(
    path: pathlib.Path, report: Mapping[str, files.Json], plots: pathlib.Path
) -> None:
    """Writes the page.

    Args:
        path: of the HTML file; replaced if it is there.
        report: content of the study's result.json (`pubfig_study`).
        plots: folder with `PERSON/EXTRACTOR.png`, of principal components.
    """
    entries = report["answers"]
    people = []
    for person in dict.fromkeys(entry["person"] for entry in entries):
        own = [entry for entry in entries if entry["person"] == person]
        people.append(
            {
                "name": person,
                "photos": [
                    (label, own[0][key]["image"], _picture(own[0][key]["path"], (), _PHOTO_PX))
                    for label, key in (
                        ("looked for (clean)", "query"),
                        ("in the folder, before", "original_photo"),
                        ("in the folder, cloaked", "cloaked_photo"),
                    )
                ],
                "answers": [
                    _answer(entry, report["top_k"])
                    | {"plot": _plot(plots / person / f"{entry['extractor']}.png")}
                    for entry in own
                ],
            }
        )
    rows = report["extractors"]
    verified, before, total = (
        sum(row[key] for row in rows) for key in ("verified", "original_verified", "people")
    )
    html = page.load_template("match_report.html").render(
        people=people,
        rows=rows,
        verified=verified,
        before=before,
        total=total,
        top_k=report["top_k"],
        mode=report["mode"],
        surrogates=report["surrogates"],
        people_matched=report["people_matched"],
        photos_matched=report["photos_matched"],
        not_handled=report["not_handled"],
        command=report.get("command"),
    )
    files.write_atomically(path, html.encode("utf-8", "backslashreplace"), overwrite=True)


def _answer(entry: Mapping[str, files.Json], top_k: int) -> dict[str, files.Json]:
    """What the page shows of one extractor."""
    return {
        **entry,
        "cloaked": _spoken(entry["cloaked"], entry["threshold"]),
        "original": _spoken(entry["original"], entry["threshold"]),
        "near": [
            {
                **one,
                "distance": page.apart(one["distance"], entry["threshold"])[0],
                "is_own": one["person"] == entry["person"],
                "is_apart": one["rank"] > top_k,
                "picture": _picture(one["path"], tuple(one["box"]), _FACE_PX),
            }
            for one in entry["near"]
        ],
    }


def _spoken(place: Mapping[str, files.Json], threshold: float) -> dict[str, files.Json]:
    if place["distance"] is None:
        return {**place, "text": "no face is found in it any more"}
    distance, limit = page.apart(place["distance"], threshold)
    verdict = "same person" if place["verified"] else "another person"
    text = f"rank {place['rank']}, distance {distance}, threshold {limit}: {verdict}"
    return {**place, "text": text}


def _plot(path: pathlib.Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


@functools.lru_cache(maxsize=512)
def _picture(path: str, box: Sequence[float], side_px: int) -> str:
    """A photo, or the face in its box, as text for the page."""
    picture = Image.fromarray(photos.read_photo(path).pixels)
    if box:
        picture = patch_pictures.close_up(picture, np.array(box), sides=_SIDES)
    scale = side_px / max(picture.size)
    width, height = (max(round(side * scale), 1) for side in picture.size)
    return pictures.data_uri(np.asarray(picture), (width, height), lossless=False)
