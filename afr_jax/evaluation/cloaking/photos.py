"""The photos of an evaluation's cells: cloaked in some way, written one by one, never twice.

A cell is a method, the extractors that it was made against and a DSSIM budget. Its photos lie in a
folder as PNG, each with a record of what was done; photos are worked on in groups that share
batches, so a run that was cut goes on with the first group that lacks a file, and gives the same
bytes.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from afr_jax.core import files
from afr_jax.data import identities, photos
from afr_jax.evaluation.cloaking import methods as cloaking_methods
from afr_jax.evaluation.cloaking.methods import Cell
from afr_jax.methods.cloaking import photo_cloaks
from afr_jax.models import mtcnn
from afr_jax.models.extractors import registry
from afr_jax.recognition import detect

# Photos that are worked on together: all those of a person should lie in one group, and many photos
# fill the batches better.
_GROUP = 60


def surrogate_sets(asked: Sequence[str], trackers: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Sets of surrogates, each once.

    Args:
        asked: names joined by "+"; "all" for every tracker that is of the zoo; "leave_one_out" for
            each of these all others.
        trackers: names and folders of the trackers' extractors.

    Raises:
        ValueError: a set names an extractor twice or none, or "leave_one_out" leaves none.
    """
    pool = tuple(name for name in trackers if name in registry.EXTRACTORS)
    found: list[tuple[str, ...]] = []
    for text in asked:
        if text == "leave_one_out":
            found += [tuple(other for other in pool if other != name) for name in pool]
        else:
            found.append(pool if text == "all" else tuple(text.split("+")))
    for names in found:
        if not all(names) or not names or len(set(names)) < len(names):
            raise ValueError(
                f"surrogates {'+'.join(names)!r}: a set has one extractor or more, each once; "
                f"leave_one_out needs two trackers of the zoo, all needs one"
            )
    return tuple({frozenset(names): names for names in found}.values())


def cells_of(
    methods: Sequence[str],
    surrogate_sets: Sequence[tuple[str, ...]],
    budgets: Sequence[float],
) -> list[Cell]:
    """All cells: the plain ones first, every set of surrogates with every budget.

    Args:
        methods: of `cloaking_methods.METHODS`; `lowkey@0.007` has that budget alone.
        surrogate_sets: what `fawkes` and `lowkey` are made against; `fawkes_pypi` knows dlib alone.
        budgets: DSSIM.

    Raises:
        ValueError: there is no such method, or a method's own budget does not lie in (0, 1].
    """
    cells = []
    parsed = [parse_method(text) for text in methods]
    for method, own in sorted(parsed, key=lambda pair: cloaking_methods.METHODS.index(pair[0])):
        if method == "none":
            cells.append(Cell(method))
            continue
        sets = {"noise": [()], "fawkes_pypi": [("dlib",)]}.get(method, surrogate_sets)
        asked = budgets if own is None else [own]
        cells += [Cell(method, tuple(names), budget) for names in sets for budget in asked]
    return list(dict.fromkeys(cells))


def parse_method(text: str) -> tuple[str, float | None]:
    """A method, and the DSSIM budget that is its own if it has one (`lowkey@0.007`).

    Raises:
        ValueError: there is no such method, or the budget does not lie in (0, 1].
    """
    method, _, own = text.partition("@")
    if method not in cloaking_methods.METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(cloaking_methods.METHODS)}")
    if own and not 0 < float(own) <= 1:
        raise ValueError(f"the budget of {text} must lie in (0, 1]")
    return method, float(own) if own else None


def write_photos(
    folder: pathlib.Path,
    samples: Sequence[identities.Sample],
    detector: mtcnn.Variables,
    protect_fn: cloaking_methods.ProtectFn,
    *,
    group: int = _GROUP,
    report_fn: Callable[[int], None] | None = None,
) -> tuple[list[pathlib.Path], list[dict[str, Any]]]:
    """Protects photos that are not there yet.

    Only the main face of a photo is protected. A photo without one, or with one that is too small,
    is written as it is, and its record says why.

    Args:
        folder: of the cell; photos go to `photos/<sample id>.png`.
        samples: the photos.
        detector: variables of MTCNN's networks.
        protect_fn: protects the faces of some photos.
        group: photos that are worked on together; the bytes depend on it.
        report_fn: called with the number of photos that were finished since, those of an earlier
            run included.

    Returns:
        Paths and records of all photos, in order. A record has `region`, `box`, `dssim`, or
        `problem`.
    """
    paths = [folder / "photos" / f"{sample.sample_id}.png" for sample in samples]
    for start in range(0, len(samples), group):
        part = slice(start, start + group)
        if not all(path.exists() for path in paths[part]):
            _write_group(samples[part], paths[part], detector, protect_fn)
        if report_fn is not None:
            report_fn(len(paths[part]))
    return paths, [json.loads(_record_path(path).read_text()) for path in paths]


def _write_group(samples, paths, detector, protect_fn) -> None:
    originals = [photos.read_photo(sample.path) for sample in samples]
    tasks, records = [], []
    for sample, photo in zip(samples, originals, strict=True):
        found = detect.main_face(detect.detect_faces(detector, photo.pixels), photo.pixels.shape)
        problem = None if len(found.boxes) else "no face was found"
        if problem is None and not photo_cloaks.is_large_enough(found.boxes).all():
            problem = "the face is too small to be protected"
        records.append({"problem": problem})
        if problem is None:
            visible = None if photo.alpha is None else photo.alpha > 0
            task = photo_cloaks.PhotoFaces(
                sample.sample_id, photo.pixels, photo.gray, visible, found
            )
            tasks.append(task)
    results = iter(protect_fn(tasks) if tasks else [])
    for path, photo, record in zip(paths, originals, records, strict=True):
        pixels = photo.pixels
        if record["problem"] is None:
            pixels, (face,) = next(results)
            record.update(region=face.region, box=face.box, dssim=face.dssim)
        # The record goes first: a photo that is there has one.
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(_record_path(path), record)
        files.write_atomically(path, photos.encode_png(photo, pixels), overwrite=True)


def _record_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".json")
