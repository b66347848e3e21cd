"""The last words of a cloaking run: report.json as lines for a person."""

from collections.abc import Iterator, Mapping
from typing import Any

from afr_jax.evaluation.report import page as report_lib


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Says what was done to each photo, what each extractor makes of each face, and the counts.

    Args:
        report: content of report.json.

    Yields:
        Lines without an end.
    """
    for image in report["images"]:
        if image["status"] != "cloaked":
            yield f"{image['image']}: {image['status']} ({image['reason']})"
            continue
        yield f"{image['image']}: cloaked, {image['output']}"
        for number, face in enumerate(image["faces"], start=1):
            if face["status"] != "cloaked":
                yield f"  face {number}: {face['status']} ({face['reason']})"
                continue
            yield f"  face {number}: DSSIM {face['dssim']:.4f}"
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


def _role(made_against: bool) -> str:
    return "the cloak was made against it" if made_against else "not used to make the cloak"


def _verdict(entry: Mapping[str, Any]) -> str:
    same = report_lib.still_same_person(entry)
    if same is None:
        return f"no distance ({entry['reason']})"
    distance, threshold = report_lib.apart(entry["distance"], entry["threshold"])
    verdict = "still the same" if same else "another"
    return f"{distance} of {threshold}, {verdict} person at this threshold"


def _count(tally: Mapping[str, Any]) -> str:
    faces = "face" if tally["num_measured"] == 1 else "faces"
    missing = f" ({tally['num_missing']} without a distance)" if tally["num_missing"] else ""
    return f"{tally['num_moved']} of {tally['num_measured']} {faces}{missing}"
