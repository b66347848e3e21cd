"""Looks for the faces of a photo among people: each enrolled from a folder of photos."""

import pathlib
from collections.abc import Mapping

import numpy as np

from afr_jax.app import archives, limits
from afr_jax.app.tasks import models, outputs, pictures
from afr_jax.core import files
from afr_jax.data import photos
from afr_jax.evaluation.report import page
from afr_jax.recognition import pipeline

_TOP = 5
_MOST_SHOWN_PROBLEMS = 20
# A photo and the parts of its path as it was sent.
_Photo = tuple[tuple[str, ...], pathlib.Path]


def run(
    loaded: models.Models, folder: pathlib.Path, payload: Mapping[str, files.Json]
) -> dict[str, files.Json]:
    """Enrolls people and matches a photo against them, by each extractor.

    Args:
        loaded: the networks.
        folder: for databases and pictures of faces.
        payload: `query` with `path` and `name`; `people`, photos with `path` and `name`, or the
            path of a `zip` of them. A photo's folder is its person; one without is a person.

    Returns:
        `extractors`, each with the faces of the query and their matches; `problems`; `outputs`.

    Raises:
        limits.Refused: nobody could be enrolled, or the photo shows no face.
    """
    found = _found(payload, folder)
    people: dict[str, list[photos.PhotoSource]] = {}
    paths: dict[str, pathlib.Path] = {}
    for parts, path in found:
        person = parts[-2] if len(parts) > 1 else pathlib.PurePosixPath(parts[-1]).stem
        name = limits.unique_name(parts[-1], [source.name for source in people.get(person, [])])
        people.setdefault(person, []).append(photos.PhotoSource(name, path))
        paths[f"{person}/{name}"] = path
    query = photos.PhotoSource(payload["query"]["name"], pathlib.Path(payload["query"]["path"]))
    shown: dict[str, files.Json] = {}
    pixels = _pixels(query)
    results, problems = [], []
    for name, extractor in loaded.recognizer.extractors.items():
        alone = loaded.recognizer._replace(
            extractors={name: extractor},
            variables={name: loaded.recognizer.variables[name]},
        )
        enrolled = alone.enroll(people, folder / f"database_{len(results)}")
        problems = [f"{each.name}: {each.reason}" for each in enrolled.problems]
        if not enrolled.added:
            raise limits.Refused("no photo of these people shows a face that can be used")
        report = alone.match([query], enrolled, top_k=_TOP)
        seen = report.queries[0].found
        if seen.problem is not None:
            raise limits.Refused(f"{query.name}: {seen.problem}")
        if not results:
            for number, box in enumerate(seen.faces.boxes):
                (folder / f"query_{number}.jpg").write_bytes(pictures.face(pixels, box))
                shown[f"query_{number}"] = outputs.output(f"query_{number}.jpg")
        results.append(
            {
                "name": name,
                "people": len(people),
                "photos": enrolled.added,
                "faces": [
                    _face(number, report, len(results), paths, shown, folder)
                    for number in range(len(seen.faces.boxes))
                ],
            }
        )
    return {
        "extractors": results,
        "problems": problems[:_MOST_SHOWN_PROBLEMS],
        "num_problems": len(problems),
        "query": query.name,
        "outputs": shown,
    }


def _pixels(query: photos.PhotoSource) -> np.ndarray:
    try:
        return photos.read_source(query).pixels
    except photos.PhotoError as error:
        raise limits.Refused(f"{query.name}: {error}") from error


def _found(payload: Mapping[str, files.Json], folder: pathlib.Path) -> list[_Photo]:
    """The people's photos."""
    if payload.get("zip"):
        unpacked = archives.unpack_photos(
            pathlib.Path(payload["zip"]), folder / "people", most=limits.MOST_FOLDER_FILES
        )
        found = [(member.parts, member.path) for member in unpacked.members]
    else:
        found = [
            (tuple(limits.split_path(each["name"])), pathlib.Path(each["path"]))
            for each in payload["people"]
        ]
    if not found:
        raise limits.Refused("there is no photo among these files")
    return found


def _face(
    number: int,
    report: pipeline.MatchReport,
    extractor: int,
    paths: Mapping[str, pathlib.Path],
    shown: dict[str, files.Json],
    folder: pathlib.Path,
) -> dict[str, files.Json]:
    """The matches of a query face, with a picture of each."""
    matches = []
    for match in report.matches:
        if match.face != number:
            continue
        key = f"match_{extractor}_{number}_{match.rank}"
        pixels = photos.read_photo(paths[match.image]).pixels
        (folder / f"{key}.jpg").write_bytes(pictures.face(pixels, match.box))
        shown[key] = outputs.output(f"{key}.jpg")
        distance, threshold = page.apart(match.distance, match.threshold)
        matches.append(
            {
                "rank": match.rank,
                "person": match.identity,
                "image": match.image,
                "distance": distance,
                "threshold": threshold,
                "matched": match.matched,
                "picture": key,
            }
        )
    return {"number": number, "matches": matches}
