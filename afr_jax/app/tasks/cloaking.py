"""Cloaks photos as `experiments.cloak` does, and says in words what was measured."""

import pathlib
from collections.abc import Mapping, Sequence

import jax

from afr_jax.app import limits
from afr_jax.app.tasks import models, outputs, pictures
from afr_jax.core import files
from afr_jax.data import photos
from afr_jax.evaluation.report import page
from afr_jax.evaluation.report import pictures as report_pictures
from afr_jax.methods.cloaking import check, workflow
from afr_jax.methods.cloaking import face_filter as face_filters

# SSIMULACRA2 from which this holds, by its author's scale.
_LIKENESS = (
    (90, "no difference is seen, even when the two alternate"),
    (85, "hardly anything is seen when the two alternate"),
    (80, "hardly told apart side by side"),
    (70, "hard to notice without the original; seen beside it by who looks closely"),
    (50, "seen side by side"),
    (-1000, "plainly seen"),
)
# Tint that starts to be seen on skin, gray levels.
_TINT = 0.5


def run(
    loaded: models.Models, folder: pathlib.Path, payload: Mapping[str, files.Json]
) -> dict[str, files.Json]:
    """Cloaks photos.

    Args:
        loaded: the networks.
        folder: for the cloaked photos and the pictures of the comparison.
        payload: `photos`, each with `path`, `name` and `faces`, None for all that count or boxes
            (y0, x0, y1, x1); `mode`, `format`, `surrogates`.

    Returns:
        `photos`, in words; `outputs`.
    """
    flow = loaded.flow(payload)
    entries = payload["photos"]
    sources = [photos.PhotoSource(entry["name"], pathlib.Path(entry["path"])) for entry in entries]
    filters = {
        entry["name"]: face_filters.FaceFilter(faces=_boxes(entry["faces"]))
        for entry in entries
        if entry["faces"] is not None
    }
    key = jax.random.key(loaded.config.seed)
    shown, found, members, names = [], {}, [], []
    done = flow.cloak_all(key, sources, filters=filters)
    for number, (source, cloaked) in enumerate(zip(sources, done, strict=True)):
        name = None
        if cloaked.data is not None:
            stem = pathlib.PurePosixPath(source.name).stem
            name = limits.unique_name(f"{stem}_cloaked{cloaked.suffix}", names)
            names.append(name)
            members.append((name, cloaked.data))
            found |= _write(folder, number, name, source, cloaked)
        shown.append(_photo(number, source.name, name, cloaked, flow))
    report = {
        "images": [
            {"image": cloaked["image"], "output": cloaked["output"], **cloaked["record"]}
            for cloaked in shown
        ],
        "settings": {
            "mode": payload["mode"],
            "format": payload["format"],
            "surrogates": flow.surrogates,
            "num_steps": loaded.config.num_steps,
            "seed": loaded.config.seed,
        },
    }
    files.write_json(folder / "report.json", report)
    if members:
        members.append(("report.json", (folder / "report.json").read_bytes()))
        outputs.write_zip(folder / "cloaked.zip", members)
        found["zip"] = outputs.output("cloaked.zip", name="cloaked.zip")
    found["report"] = outputs.output("report.json")
    return {
        "photos": [{key: value for key, value in one.items() if key != "record"} for one in shown],
        "mode": payload["mode"],
        "surrogates": flow.surrogates,
        "judges": [name for name in flow.recognizer.extractors if name not in flow.surrogates],
        "outputs": found,
    }


def _boxes(boxes: Sequence[Sequence[float]]) -> str:
    """Boxes as the option `--faces` has them."""
    return ";".join(f"{x0!r},{y0!r},{x1 - x0!r},{y1 - y0!r}" for y0, x0, y1, x1 in boxes)


def _write(
    folder: pathlib.Path,
    number: int,
    name: str,
    source: photos.PhotoSource,
    cloaked: workflow.CloakedPhoto,
) -> dict[str, files.Json]:
    """Writes a cloaked photo and the pictures of its comparison."""
    assert cloaked.data is not None and cloaked.pixels is not None
    original = photos.read_source(source)
    paths = {
        "file": f"{number}_cloaked{cloaked.suffix}",
        "before": f"{number}_before.png",
        "difference": f"{number}_difference.png",
    }
    (folder / paths["file"]).write_bytes(cloaked.data)
    pictures.write_whole(folder / paths["before"], original.pixels, original)
    change = report_pictures.amplified_difference(original.pixels, cloaked.pixels)
    pictures.write_whole(folder / paths["difference"], change, None)
    return {
        f"{number}_{key}": outputs.output(path, name=name if key == "file" else None)
        for key, path in paths.items()
    }


def _photo(
    number: int,
    image: str,
    output: str | None,
    cloaked: workflow.CloakedPhoto,
    flow: workflow.Workflow,
) -> dict[str, files.Json]:
    record = {"status": cloaked.status, "reason": cloaked.reason, "faces": cloaked.faces}
    height, width = (0, 0) if cloaked.pixels is None else cloaked.pixels.shape[:2]
    return {
        "number": number,
        "image": image,
        "output": output,
        "status": cloaked.status,
        "reason": cloaked.reason,
        "width": width,
        "height": height,
        "faces": [_face(face) for face in cloaked.faces],
        "record": record,
    }


def _face(face: check.CloakRecord) -> dict[str, files.Json]:
    """What the page says of a face."""
    shown: dict[str, files.Json] = {
        "box": face["detection"],
        "status": face["status"],
        "reason": face["reason"],
    }
    if "extractors" not in face:
        return shown
    visibility = face.get("visibility") or {}
    # The page shows large: what is seen closely counts.
    likeness = visibility.get("ssimulacra2_close", visibility.get("ssimulacra2"))
    shown["found_again"] = face.get("found_again", True)
    shown["figures"] = (
        []
        if likeness is None
        else [
            {
                "name": "How alike the two look",
                "value": f"{likeness:.0f} of 100",
                "words": next(words for least, words in _LIKENESS if likeness >= least),
            }
        ]
    )
    shown["figures"] += [
        {
            "name": "Largest change of a pixel",
            "value": f"{255 * face.get('linf', 0.0):.0f} of 255 steps of brightness",
            "words": "most pixels change far less",
        }
    ]
    tint = visibility.get("chroma")
    if tint is not None:
        words = "none that is seen" if tint < _TINT else "may be seen on skin"
        shown["figures"].append(
            {"name": "Tint of the skin", "value": f"{tint:.2f} steps of color", "words": words}
        )
    shown["verdicts"] = [
        _verdict(name, entry) for name, entry in face.get("extractors", {}).items()
    ]
    return shown


def _verdict(name: str, entry: check.CloakVerdict) -> dict[str, files.Json]:
    distance, threshold = page.apart(entry["distance"], entry["threshold"])
    after = page.after_jpeg(entry) or {}
    return {
        "name": name,
        "made_against": entry["surrogate"],
        "same": page.still_same_person(entry),
        "distance": distance,
        "threshold": threshold,
        "share": entry["distance"] / entry["threshold"],
        "after_same": page.still_same_person(after),
        "after": None if after.get("distance") is None else f"{after['distance']:.2f}",
    }
