"""The last words of a cloaking run: report.json as lines for a person."""

from collections.abc import Iterator, Mapping, Sequence

from afr_jax.core import files
from afr_jax.evaluation.report import page as report_lib


def lines(report: Mapping[str, files.Json]) -> Iterator[str]:
    """Says what was done to each photo, what each extractor makes of each face, and the counts.

    Args:
        report: content of report.json.

    Yields:
        Lines without an end.
    """
    if "yunet" not in report["settings"].get("detectors", ("yunet",)):
        yield (
            "no second detector looked: a face that MTCNN misses carries no cloak and is not named"
        )
    for image in report["images"]:
        reason = "" if image["reason"] is None else f" ({image['reason']})"
        output = "" if image["output"] is None else f", {image['output']}"
        yield f"{image['image']}: {image['status']}{output}{reason}"
        for number, face in enumerate(image["faces"], start=1):
            if face["status"] != "cloaked":
                place, reason = _place(face["box"]), face["reason"]
                yield f"  face {number} at {place}: {face['status']} ({reason})"
                continue
            lost = "" if face.get("found_again", True) else "; not found again in the written photo"
            seen = face.get("visibility") or {}
            likeness = f", SSIMULACRA2 {seen['ssimulacra2']:.0f}" if seen else ""
            if seen and (close := seen.get("ssimulacra2_close")) not in (None, seen["ssimulacra2"]):
                likeness += f" ({close:.0f} looked at closely)"
            yield f"  face {number}: DSSIM {face['dssim']:.4f}{likeness}{lost}"
            for name, entry in face["extractors"].items():
                after = report_lib.after_jpeg(entry) or {"reason": "not looked at"}
                yield (
                    f"    {name} ({_role(entry['surrogate'])}): {_verdict(entry)}; "
                    f"after JPEG 75: {_verdict(after)}"
                )
    rows = report_lib.count_moved(report["images"])
    for row in rows:
        yield (
            f"{row['name']} ({_role(row['made_against'])}): another person at its threshold: "
            f"{_count(row['written'])}; after JPEG 75: {_count(row['after'])}"
        )
    if rows and all(row["made_against"] for row in rows):
        yield (
            "the cloak was judged only by the extractors it was made against; "
            "--check=NAME,... asks others"
        )


def _place(box: Sequence[int]) -> str:
    y0, x0, y1, x1 = box
    return f"x {x0}, y {y0}, {x1 - x0} x {y1 - y0} px"


def _role(made_against: bool) -> str:
    return "the cloak was made against it" if made_against else "not used to make the cloak"


def _verdict(entry: Mapping[str, files.Json]) -> str:
    same = report_lib.still_same_person(entry)
    if same is None:
        return f"no distance ({entry['reason']})"
    distance, threshold = report_lib.apart(entry["distance"], entry["threshold"])
    verdict = "still the same" if same else "another"
    return f"{distance} of {threshold}, {verdict} person at this threshold"


def _count(tally: Mapping[str, files.Json]) -> str:
    faces = "face" if tally["num_measured"] == 1 else "faces"
    missing = f" ({tally['num_missing']} without a distance)" if tally["num_missing"] else ""
    return f"{tally['num_moved']} of {tally['num_measured']} {faces}{missing}"
