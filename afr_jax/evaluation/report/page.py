"""The page a person reads after cloaking: report.json and the photos as one HTML file.

`cloak_report_html` returns the page as a string, `write_cloak_report` streams it to a file, one
photo in memory at a time. The page needs nothing beside it: style, script and pictures are inside,
and its content policy lets the browser fetch nothing else. It holds no time and no random value, so
the same input gives the same page.

Every number comes from `report` (measured by the caller on the final 8-bit files), except what is
counted here on the pixels: how many changed outside the cloaked boxes, and whether any did at all.
Photos are uint8 [H, W, 3] RGB, upright; boxes are [y0, x0, y1, x1] in their pixels. The page never
claims more than `report` has measured: a face counts as moved in an extractor only if the recorded
distance reaches the threshold and the recorded verdict agrees.
"""

import base64
import collections
import hashlib
import math
import pathlib
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import jinja2
import numpy as np

from afr_jax.core import files
from afr_jax.evaluation.report import pictures

LoadPair = Callable[[Mapping[str, files.Json]], "tuple[np.ndarray, np.ndarray] | None"]

# Statuses of photos that have an output.
_WRITTEN = ("cloaked", "partly_cloaked")
_IMAGE_STATUSES = {
    "cloaked": "cloaked",
    "partly_cloaked": "cloaked in part",
    "already_cloaked": "cloaked already",
    "no_face": "no face found",
    "unreadable": "unreadable",
    "failed": "failed",
}


def still_same_person(entry: Mapping[str, files.Json]) -> bool | None:
    """Whether an extractor still takes the cloaked face for the person on the clean one.

    Args:
      entry: one value of a face's `extractors`: `distance`, `threshold` and, where it is known,
        `same_person`.

    Returns:
      False only if the distance is at least the threshold and `same_person` does not say otherwise;
      None if the distance or the threshold is missing or not finite.
    """
    distance, threshold = _number(entry.get("distance")), _number(entry.get("threshold"))
    if distance is None or threshold is None:
        return None
    return distance < threshold or bool(entry.get("same_person", False))


def after_jpeg(entry: Mapping[str, files.Json]) -> dict[str, files.Json] | None:
    """What an extractor's entry says of the face after JPEG quality 75, in the entry's own form.

    Args:
      entry: as in `still_same_person`, perhaps with `after_jpeg75`.

    Returns:
      `after_jpeg75` with the entry's threshold, or None if that was not looked at.
    """
    after = entry.get("after_jpeg75")
    return None if after is None else {**after, "threshold": entry.get("threshold")}


def count_moved(images: Sequence[Mapping[str, files.Json]]) -> list[dict[str, files.Json]]:
    """Counts for each extractor the faces that are another person at its threshold.

    Args:
      images: of report.json.

    Returns:
      A row for each extractor, those that the cloaks were made against first: `name`;
      `made_against`, None where the report does not say; `threshold`, text; `written` and `after`
      (None if no face was looked at after JPEG quality 75), each with `num_measured`, `num_moved`,
      `num_missing` (faces without a distance), `share` and `median` of the distances, texts.
    """
    found: dict[str, list[Mapping[str, files.Json]]] = {}
    for image in images:
        for face in _cloaked_faces(image):
            for name, entry in (face.get("extractors") or {}).items():
                found.setdefault(name, []).append(entry)
    rows = []
    for name, entries in found.items():
        compressed = [after for entry in entries if (after := after_jpeg(entry)) is not None]
        found_thresholds = {_number(entry.get("threshold")) for entry in entries}
        thresholds = [each for each in found_thresholds if each is not None]
        rows.append(
            {
                "name": name,
                "made_against": entries[0].get("surrogate"),
                "threshold": ", ".join(f"{threshold:.2f}" for threshold in sorted(thresholds)),
                "written": _tally(entries),
                "after": _tally(compressed) if compressed else None,
            }
        )
    return sorted(rows, key=lambda row: (row["made_against"] is False, row["name"]))


def _tally(entries: Sequence[Mapping[str, files.Json]]) -> dict[str, files.Json]:
    measured = [entry for entry in entries if still_same_person(entry) is not None]
    num_moved = sum(still_same_person(entry) is False for entry in measured)
    distances = [float(entry["distance"]) for entry in measured]
    return {
        "num_measured": len(measured),
        "num_moved": num_moved,
        "num_missing": len(entries) - len(measured),
        "share": f"{100 * num_moved / len(measured):.0f}\N{NO-BREAK SPACE}%" if measured else None,
        "median": f"{statistics.median(distances):.2f}" if measured else None,
    }


def apart(distance: float, threshold: float) -> tuple[str, str]:
    """Both numbers with two digits, or as many as it takes to tell them apart."""
    for digits in range(2, 7):
        texts = f"{distance:.{digits}f}", f"{threshold:.{digits}f}"
        if texts[0] != texts[1]:
            return texts
    return f"{distance:.2f}", f"{threshold:.2f}"


def cloak_report_html(
    report: Mapping[str, files.Json], load_pair: LoadPair, *, preview_px: int = 900
) -> str:
    """The report of a cloaking run as one self-contained HTML page.

    Args:
      report: the content of report.json: `images`, `settings` and optionally `summary`.
        `settings["reencoding"]`, where present and not empty, is a sentence on which re-encodings
        were modelled or checked; without it the page says that none was.
      load_pair: takes the record of a cloaked image and returns (original, cloaked), both uint8
        [H, W, 3] and upright, or None if they cannot be read. Called once for each cloaked image,
        in order, when its turn comes.
      preview_px: limit of the long side of each picture, in pixels.

    Returns:
      The page.

    Raises:
      ValueError: if preview_px is below 16, or load_pair returns anything but uint8 [H, W, 3].
    """
    return "".join(
        load_template("cloak_report.html").generate(_page(report, load_pair, preview_px))
    )


def write_cloak_report(
    path: pathlib.Path | str,
    report: Mapping[str, files.Json],
    load_pair: LoadPair,
    *,
    preview_px: int = 900,
) -> None:
    """Writes the page of `cloak_report_html` to a file, holding one photo at a time.

    Args:
      path: the file; replaced if it is there.
      report: as in `cloak_report_html`.
      load_pair: as in `cloak_report_html`.
      preview_px: as in `cloak_report_html`.
    """
    page = _page(report, load_pair, preview_px)
    parts = load_template("cloak_report.html").generate(page)
    files.write_parts_atomically(path, (part.encode() for part in parts), overwrite=True)


def load_template(name: str) -> jinja2.Template:
    """A page of `templates/`; everything that is put into it is escaped.

    Args:
      name: of the file.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = _sha256
    return environment.get_template(name)


def _page(
    report: Mapping[str, files.Json], load_pair: LoadPair, preview_px: int
) -> dict[str, files.Json]:
    if preview_px < 16:
        raise ValueError(f"preview_px must be at least 16, got {preview_px}")
    records = report.get("images") or []
    report = _printable(report)
    images, settings = report.get("images") or [], report.get("settings") or {}
    rows = count_moved(images)
    axis = _axis(images)
    counts = collections.Counter(image.get("status") for image in images)
    statuses = list(_IMAGE_STATUSES) + sorted(
        str(status) for status in counts if status not in _IMAGE_STATUSES
    )
    heads = [_head(number, image) for number, image in enumerate(images, 1)]
    return {
        "num_images": len(images),
        "counts": [
            {"status": status, "label": _status_label(status), "count": counts.get(status, 0)}
            for status in statuses
        ],
        "num_cloaked": counts["cloaked"],
        "num_partly": counts["partly_cloaked"],
        "has_second_detector": "yunet" in _names(settings.get("detectors") or ["yunet"]),
        "num_faces_cloaked": sum(len(_cloaked_faces(image)) for image in images),
        "num_already": counts["already_cloaked"],
        "already": [head for head in heads if head["status"] == "already_cloaked"],
        "not_cloaked": [
            head for head in heads if not head["cloaked"] and head["status"] != "already_cloaked"
        ],
        "partly_cloaked": [head for head in heads if head["cloaked"] and head["left_faces"]],
        "extractors": rows,
        "surrogates": _names(settings.get("surrogates")),
        "others": [row["name"] for row in rows if row["made_against"] is False],
        "all_made_against": bool(rows) and all(row["made_against"] for row in rows),
        "reencoding": settings.get("reencoding"),
        "settings": [
            (key, _plain(value)) for key, value in settings.items() if key != "reencoding"
        ],
        "summary": [(key, _plain(value)) for key, value in (report.get("summary") or {}).items()],
        "heads": [head for head in heads if head["cloaked"]],
        "photos": _photos(records, images, heads, load_pair, preview_px, settings, axis),
        "gain": pictures.GAIN,
        "gain_limit": (255 - pictures.MID_GRAY) // pictures.GAIN,
    }


def _photos(
    records: Sequence[Mapping[str, files.Json]],
    images: Sequence[Mapping[str, files.Json]],
    heads: Sequence[Mapping[str, files.Json]],
    load_pair: LoadPair,
    preview_px: int,
    settings: Mapping[str, files.Json],
    axis: float,
) -> Iterator[dict[str, files.Json]]:
    """Yields one cloaked photo after the other, its pictures encoded."""
    for record, image, head in zip(records, images, heads, strict=True):
        if not head["cloaked"]:
            continue
        faces = [
            _face(number, face, settings, axis)
            for number, face in enumerate(image.get("faces") or [], 1)
        ]
        photo = {**head, "faces": faces, "pictures": None, "problem": None}
        pair = load_pair(record)
        if pair is None:
            photo["problem"] = "The two files could not be read again for this page."
        elif pair[0].shape != pair[1].shape:
            photo["problem"] = (
                "The two files differ in size, so they cannot be laid over one another."
            )
        else:
            photo["pictures"] = pictures.photo_pictures(*pair, faces, preview_px)
        del pair
        yield photo


def _head(number: int, image: Mapping[str, files.Json]) -> dict[str, files.Json]:
    """What the lists at the top of the page say about an image."""
    name = str(image.get("image"))
    faces = image.get("faces") or []
    verdicts = [
        still_same_person(view)
        for face in _cloaked_faces(image)
        for entry in (face.get("extractors") or {}).values()
        for view in (entry, after_jpeg(entry))
        if view is not None
    ]
    return {
        "id": f"photo-{number}",
        "name": re.split(r"[/\\]", name)[-1] or name,
        "path": name,
        "output": image.get("output"),
        "is_jpeg": str(image.get("output")).endswith(".jpg"),
        "cloaked": image.get("status") in _WRITTEN,
        "status": image.get("status"),
        "label": _status_label(image.get("status")),
        "reason": image.get("reason"),
        "num_faces": len(faces),
        "left_faces": [
            {
                "number": index,
                "status": face.get("status"),
                "reason": face.get("reason"),
                "box": _box(face.get("box")),
            }
            for index, face in enumerate(faces, 1)
            if face.get("status") != "cloaked"
        ],
        "num_checks": len(verdicts),
        "num_moved": sum(verdict is False for verdict in verdicts),
    }


# What people see of a change, in words: key, name, digits, the limit's key, its words.
_VISIBLE = (
    (
        "ssimulacra2",
        "Likeness as people see it (SSIMULACRA2, up to 224 pixels wide; 100 is equal)",
        ".0f",
        "at least",
    ),
    ("ssimulacra2_close", "The same, up to 512 pixels wide", ".0f", None),
    ("ciede2000_mean", "Difference of color (CIEDE2000), mean", ".2f", None),
    ("ciede2000_p99", "The same, at 99 % of the pixels", ".2f", "at most"),
    ("chroma", "Tint (low-passed chroma), levels", ".2f", "at most"),
    ("flip", "Seen when the photos alternate (FLIP)", ".3f", "at most"),
    ("lpips", "Distance of a network's features (LPIPS)", ".3f", None),
    ("psnr", "Signal to noise, dB", ".1f", None),
)


def _visible(
    found: Mapping[str, files.Json], limits: Mapping[str, files.Json]
) -> list[dict[str, str]]:
    """Names and figures of what people see of a change."""
    lines = []
    for key, name, digits, words in _VISIBLE:
        value = _number(found.get(key))
        if value is None:
            continue
        limit = _number(limits.get({"ciede2000_p99": "ciede2000"}.get(key, key)))
        text = f"{value:{digits}}"
        if words is not None and limit is not None:
            text += f" ({words} {limit:g})"
        lines.append({"name": name, "value": text})
    return lines


def _face(
    number: int,
    face: Mapping[str, files.Json],
    settings: Mapping[str, files.Json],
    axis: float,
) -> dict[str, files.Json]:
    """The figures of one face, formatted."""
    # Reports of earlier versions have the limits of all faces alone.
    usual = settings.get("budget") or {"dssim": settings.get("dssim_budget")}
    limits = face.get("limits") or usual
    budget = _number(limits.get("dssim"))
    dssim, linf = _number(face.get("dssim")), _number(face.get("linf"))
    mean, confidence = _number(face.get("mean_difference")), _number(face.get("confidence"))
    view: dict[str, files.Json] = {
        "number": number,
        "cloaked": face.get("status") == "cloaked",
        "status": face.get("status"),
        "reason": face.get("reason"),
        "is_lost": face.get("found_again") is False,
        "is_relieved": budget is not None and budget > (_number(usual.get("dssim")) or budget),
        "box": _box(face.get("box")),
        "detection": _box(face.get("detection")),
        "confidence": None if confidence is None else f"{confidence:.3f}",
        "linf": None if linf is None else f"{linf * 255:.3g}",
        "mean": None if mean is None else f"{mean:.3g}",
        "dssim": None,
        "crop": None,
        "extractors": [],
    }
    if dssim is not None:
        shown: dict[str, files.Json] = {"value": f"{dssim:.5f}", "budget": None}
        if budget is not None and budget > 0:
            scale = max(budget, dssim) * 1.02
            shown |= {
                "budget": f"{budget:.5f}",
                "over": dssim > budget,
                "bar": _percent(dssim / scale),
                "mark": _percent(budget / scale),
            }
        view["dssim"] = shown
    view["visible"] = _visible(face.get("visibility") or {}, limits)
    if view["cloaked"]:
        view["extractors"] = [
            _extractor(name, entry, axis) for name, entry in (face.get("extractors") or {}).items()
        ]
    return view


def _extractor(name: str, entry: Mapping[str, files.Json], axis: float) -> dict[str, files.Json]:
    after, before = after_jpeg(entry), _number(entry.get("distance_before_budget"))
    written = _verdict(entry)
    view: dict[str, files.Json] = {
        "name": name,
        "metric": entry.get("metric"),
        "made_against": entry.get("surrogate"),
        "written": written,
        "after": None if after is None else _verdict(after),
        "before": None if before is None else f"{before:.2f}",
        "chart": None,
    }
    if written["same"] is None:
        return view
    threshold = float(entry["threshold"])
    if threshold > 0:

        def place(distance: float | None) -> str | None:
            return None if distance is None else _percent(distance / threshold / axis)

        view["chart"] = {
            "bar": place(float(entry["distance"])),
            "after": place(_number((after or {}).get("distance"))),
            "mark": _percent(1 / axis),
            "before": place(before),
        }
    return view


def _verdict(entry: Mapping[str, files.Json]) -> dict[str, files.Json]:
    same = still_same_person(entry)
    if same is None:
        return {"same": None, "reason": entry.get("reason")}
    distance, threshold = apart(float(entry["distance"]), float(entry["threshold"]))
    return {"same": same, "distance": distance, "threshold": threshold}


def _axis(images: Sequence[Mapping[str, files.Json]]) -> float:
    """End of every distance axis on the page, in thresholds: the longest bar and some air."""
    longest = 1.5
    for image in images:
        for face in _cloaked_faces(image):
            for entry in (face.get("extractors") or {}).values():
                threshold = _number(entry.get("threshold"))
                if threshold is None or threshold <= 0:
                    continue
                distances = [entry.get(key) for key in ("distance", "distance_before_budget")]
                distances.append((after_jpeg(entry) or {}).get("distance"))
                longest = max(longest, *((_number(d) or 0.0) / threshold for d in distances))
    return 1.08 * longest


def _cloaked_faces(image: Mapping[str, files.Json]) -> list[Mapping[str, files.Json]]:
    if image.get("status") not in _WRITTEN:
        return []
    return [face for face in image.get("faces") or [] if face.get("status") == "cloaked"]


def _box(box: Sequence[float] | None) -> tuple[int, int, int, int] | None:
    """The whole pixels a box touches, or None where there is no proper box."""
    if box is None or len(box) != 4 or any(_number(side) is None for side in box):
        return None
    y0, x0, y1, x1 = box
    whole = (math.floor(y0), math.floor(x0), math.ceil(y1), math.ceil(x1))
    return whole if whole[0] < whole[2] and whole[1] < whole[3] else None


def _number(value: files.Json) -> float | None:
    """A finite number, or None."""
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return None
    return float(value)


def _percent(fraction: float) -> str:
    return f"{100 * min(max(fraction, 0.0), 1.0):.2f}%"


def _names(value: files.Json) -> list[str]:
    if value is None:
        return []
    parts = value.split(",") if isinstance(value, str) else value
    return [str(part).strip() for part in parts if str(part).strip()]


def _status_label(status: files.Json) -> str:
    return _IMAGE_STATUSES.get(status, str(status))


def _plain(value: files.Json) -> str:
    """A setting's value as a person would write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_plain(item)}" for key, item in value.items()) or "none"
    return str(value)


def _printable(value: files.Json) -> files.Json:
    """A copy whose strings can be written as UTF-8: file names on disk need not be valid text."""
    if isinstance(value, str):
        return files.printable(value)
    if isinstance(value, Mapping):
        return {_printable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_printable(item) for item in value]
    return value


def _sha256(text: str) -> str:
    """The hash by which the page's content policy admits its own style and script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
