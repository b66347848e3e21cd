"""Tables of recognition: verification, identification, agreement with the originals."""

from collections.abc import Mapping, Sequence
from typing import Any

from docs.tools import markdown
from docs.tools.markdown import number, percent, percent_range, table


@table("lfw_pairs", "lfw_pairs.json")
def lfw_pairs() -> str:
    """Verification of LFW pairs."""
    measured = markdown.result("lfw_pairs")
    names = {
        "dlib": "MTCNN, `dlib`",
        "facenet_casia": "MTCNN, `facenet_casia`",
        "mobilefacenet": "MTCNN, `mobilefacenet`",
        "dlib_itself": "dlib's own: HOG, 5 points, ResNet",
    }
    lines = []
    for key, name in names.items():
        row = measured[key]
        deviation = number(100 * row["accuracy_std"], digits=2)
        lines.append(
            [
                name,
                f"{number(100 * row['accuracy'], digits=2)} ± {deviation} %",
                number(row["auc"], digits=4),
                percent(row["eer"], digits=2),
                percent(row["tar_at_far"]["0.01"], digits=1),
                percent(row["tar_at_far"]["0.001"], digits=1),
            ]
        )
    head = ("pipeline", "accuracy", "AUC", "EER", "TAR at FAR 1 %", "TAR at FAR 0.1 %")
    return markdown.render(head, lines, right=5)


@table("identification_lfw", "identification_lfw.json")
def identification_lfw() -> str:
    """Identification of LFW people."""
    lines = [
        [
            f"`{row['extractor']}`",
            *(
                percent_range(row[key], *row[f"{key}_interval"], digits=1)
                for key in ("rank_1", "dir_at_fpir_0.01", "dir_at_fpir_0.001")
            ),
        ]
        for row in markdown.result("identification_lfw")["rows"]
    ]
    head = ("extractor", "rank 1", "DIR at FPIR 1 %", "DIR at FPIR 0.1 %")
    return markdown.render(head, lines, right=3)


@table("train_24_people", "train_24_people_cpu.json")
def train_24_people() -> str:
    """A small extractor trained on a CPU."""
    measured = markdown.result("train_24_people_cpu")
    photos, pairs = measured["photos"], measured["verification"]
    lines = [
        ["people", str(measured["identities"])],
        ["crops for training; held out", f"{photos['training']:,}; {photos['held_out']:,}"],
        ["steps", f"{measured['steps']:,}"],
        ["accuracy on held-out crops", percent(measured["held_out_accuracy"], digits=1)],
        [f"accuracy on {pairs['pairs']:,} held-out pairs", percent(pairs["accuracy"], digits=1)],
        ["AUC of them", number(pairs["auc"], digits=3)],
    ]
    return markdown.render((measured["architecture"], ""), lines, right=1)


@table("detector_agreement", "detector_agreement.json")
def detector_agreement() -> str:
    """The detector beside PyPI mtcnn."""
    measured = markdown.result("detector_agreement")["detector_agreement"]
    faces, error = measured["confident_faces"], measured["landmark_error"]
    lines = [
        ["photos", str(measured["num_photos"])],
        ["confident faces of ours, found by `mtcnn`", f"{faces['ours_found']} of {faces['ours']}"],
        ["of `mtcnn`, found by ours", f"{faces['theirs_found']} of {faces['theirs']}"],
        ["landmarks: median difference, of the box width", f"{error['median']:.1e}"],
        ["landmarks: largest difference", percent(error["largest"], digits=1)],
    ]
    return markdown.render(("our MTCNN and PyPI `mtcnn`", ""), lines, right=1)


@table("extractor_agreement", "extractor_agreement.json")
def extractor_agreement() -> str:
    """Each network beside another framework's."""
    lines = [
        [f"`{row['network']}`", row["format"], str(row["dimensions"]), f"{row['error']:.1e}"]
        for row in markdown.result("extractor_agreement")["rows"]
    ]
    head = ("network", "weights written as", "embedding", "largest difference")
    return markdown.render(head, lines, right=2)


@table("face_coverage", "face_coverage.json")
def face_coverage() -> str:
    """Faces that are cloaked, named or lost, by source."""
    lines = [
        [
            _FACE_SOURCES.get(row["source"], row["source"]),
            *(f"{row[key]:,}" for key in ("photos", "sure", "taken", "named", "lost")),
            str(row["false_safety"]),
        ]
        for row in _by_kind(markdown.result("face_coverage")["rows"])
    ]
    head = ("photos of", "photos", "sure faces", "cloaked", "named", "neither", "false safety")
    return markdown.render(head, lines, right=6)


@table("face_coverage_annotated", "face_coverage.json")
def face_coverage_annotated() -> str:
    """Annotated faces that each detector finds, and false faces."""
    measured = markdown.result("face_coverage")
    (row,) = (row for row in measured["rows"] if row["annotated"])
    found = [
        (name, row[f"{key}_annotated"])
        for name, key in (("MTCNN", "mtcnn"), ("YuNet", "yunet"), ("the two together", "taken"))
    ]
    lines = [
        [f"annotated faces found by {name}", f"{count} of {row['annotated']}"]
        for name, count in found
    ]
    false = measured["false_faces"], measured["false_faces_min_px"]
    totals = row["taken_in_all"], row["taken_min_px"]
    lines += [
        [
            f"false among the faces taken, {size}",
            f"{wrong} of {total} ({percent(wrong / total, digits=1)})",
        ]
        for size, wrong, total in zip(("all sizes", "60 px and more"), false, totals, strict=True)
    ]
    return markdown.render(("WIDER FACE", ""), lines, right=1)


_FACE_SOURCES = {"wider": "WIDER FACE", "lfw": "LFW"}


def _by_kind(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of photos, and the sum of those of films."""
    kept = [dict(row) for row in rows if row["source"] in _FACE_SOURCES]
    films = [row for row in rows if row["source"] not in _FACE_SOURCES]
    total = {key: sum(row[key] for row in films) for key in films[0] if key != "source"}
    return [*kept, {"source": f"{len(films)} films", **total}]
