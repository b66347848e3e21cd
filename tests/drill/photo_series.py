"""Folders of damaged photos for the programs that read photos, judged photo by photo."""

import csv
import hashlib
import json
import pathlib
import stat
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from afr_jax.core import files
from afr_jax.data import photo_files

from . import corpus, processes, tally

# Photos of one process; a process that crashes is run again on each half, to find the photo.
_PHOTOS, _LARGE_PHOTOS = 120, 9
_LIMIT_SECONDS = 900.0
_MOST_MB = 2500.0


class Program(NamedTuple):
    """A program that reads a folder of photos.

    Attributes:
        name: of the program.
        flags_fn: its flags for a folder of photos and one of outputs.
        statuses_fn: what it said of each photo, by name, of its outputs and its result.
        has_tables: whether names that are not Unicode are refused, as no table holds them.
    """

    name: str
    flags_fn: Callable[[pathlib.Path, pathlib.Path], list[str]]
    statuses_fn: Callable[[pathlib.Path, dict], dict[str, str]]
    has_tables: bool = False


def run(
    workdir: pathlib.Path,
    counts: tally.Tally,
    *,
    inputs: int,
    seed: int,
    is_large: bool = False,
    programs: Sequence[str] = ("detect", "cloak", "match"),
) -> None:
    """Makes the photos and gives them to each program.

    Of `inputs` photos one in 25 declares many pixels: those that `is_large` asks for.
    """
    num_large = inputs // 25
    total, most = (num_large, _LARGE_PHOTOS) if is_large else (inputs - num_large, _PHOTOS)
    if "match" in programs:
        _enroll_somebody(workdir)
    for first in range(0, total, most):
        folder = workdir / f"photos_{first}"
        folder.mkdir(parents=True)
        # The seed of a part is its place, so that a part can be made alone.
        items = corpus.make(folder, min(most, total - first), seed=seed + first, is_large=is_large)
        before = _digests(folder)
        for name in programs:
            _judge(PROGRAMS[name](workdir), folder, items, workdir / name / folder.name, counts)
            _compare(before, _digests(folder), name, items, counts)


def _judge(
    program: Program,
    folder: pathlib.Path,
    items: Sequence[corpus.Item],
    output: pathlib.Path,
    counts: tally.Tally,
) -> None:
    """Runs a program on a folder; counts its photos, and what is wrong."""
    ended = processes.program(program.name, program.flags_fn(folder, output), output / "log").end(
        limit_seconds=_LIMIT_SECONDS
    )
    for item in items:
        counts.count(_series(item), program.name, item.kind, peak_mb=ended.peak_mb)

    def fault(fault: str, item: corpus.Item | None, text: str) -> None:
        subject = f"{folder.name}/{item.name}" if item else folder.name
        kind = item.kind if item else "folder"
        counts.fault(fault, _series(items[0]), program.name, kind, subject=subject, text=text)

    if ended.peak_mb > _MOST_MB:
        fault("memory", None, f"{ended.peak_mb:.0f} MB")
    if ended.hung:
        return fault("hangs", None, f"no end after {_LIMIT_SECONDS:g} s")
    if ended.crashed:
        fault("crashes", None, f"exit code {ended.code}: {ended.last_words}")
    if ended.code not in (0, 3):
        return None
    try:
        said = program.statuses_fn(output, json.loads(ended.out))
    except (OSError, ValueError, KeyError) as error:
        return fault("wrong", None, f"no outputs: {type(error).__name__}: {error}")
    said = {files.printable(name): status for name, status in said.items()}
    for item in items:
        status = said.pop(files.printable(item.name), corpus.ABSENT)
        is_refused = program.has_tables and not photo_files.is_unicode(item.name)
        allowed = [corpus.UNREADABLE] if is_refused else item.allowed
        if status not in allowed:
            fault("wrong", item, f"{status}, not {' or '.join(allowed)}")
    for name in said:
        fault("wrong", None, f"{name} is named, which is no photo of the folder")
    has_problems = any(item.allowed == [corpus.UNREADABLE] for item in items)
    if has_problems and ended.code != 3:
        fault("wrong", None, f"exit code {ended.code} with photos that cannot be read")
    for page in output.glob("*.html"):
        if corpus.SCRIPT in page.read_text(errors="replace"):
            fault("wrong", None, f"{page.name} would run what a photo is named")
    return None


def _series(item: corpus.Item) -> str:
    return "large_photos" if corpus.KINDS[item.kind].is_large else "photos"


def _compare(
    before: dict[str, str],
    after: dict[str, str],
    name: str,
    items: Sequence[corpus.Item],
    counts: tally.Tally,
) -> None:
    kinds = {item.name: item.kind for item in items}
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            kind = kinds.get(path, "folder")
            series = _series(items[0])
            counts.fault("changed", series, name, kind, subject=path, text="not as it was")


def _digests(folder: pathlib.Path) -> dict[str, str]:
    """What lies below a folder, by name."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        is_file = stat.S_ISREG(mode)
        content = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else ""
        found[str(path.relative_to(folder))] = f"{mode:o} {content}"
    return found


def _enroll_somebody(workdir: pathlib.Path) -> None:
    person = workdir / "people" / "Somebody"
    if person.exists():
        return
    person.mkdir(parents=True)
    corpus.portrait(np.random.default_rng(0)).save(person / "a.png")
    flags = [f"--gallery={person.parent}", f"--database={workdir / 'database'}"]
    ended = processes.program("enroll", flags, workdir / "enroll").end(limit_seconds=_LIMIT_SECONDS)
    if ended.code:
        raise RuntimeError(f"nobody could be enrolled: {ended.err}")


def _detect(workdir: pathlib.Path) -> Program:
    def statuses(output: pathlib.Path, result: dict) -> dict[str, str]:
        del result
        records = json.loads((output / "faces.json").read_text())["images"]
        return {
            record["image"]: corpus.FACE if record["status"] == "ok" else record["status"]
            for record in records
        }

    return Program(
        "detect",
        lambda folder, output: [f"--images={folder}", f"--output_dir={output}", "--toy", "--draw"],
        statuses,
    )


def _cloak(workdir: pathlib.Path) -> Program:
    def statuses(output: pathlib.Path, result: dict) -> dict[str, str]:
        del result
        records = json.loads((output / "report.json").read_text())["images"]
        is_face = ("cloaked", "partly_cloaked", "already_cloaked")
        return {
            record["image"]: corpus.FACE if record["status"] in is_face else record["status"]
            for record in records
        }

    def flags(folder: pathlib.Path, output: pathlib.Path) -> list[str]:
        few = ["--num_steps=1", "--surrogates=dlib"]
        return [f"--images={folder}", f"--output_dir={output}", *few]

    return Program("cloak", flags, statuses)


def _match(workdir: pathlib.Path) -> Program:
    def statuses(output: pathlib.Path, result: dict) -> dict[str, str]:
        said = {
            problem["image"]: corpus.NO_FACE
            if problem["reason"].startswith("no face")
            else corpus.UNREADABLE
            for problem in result["not_handled"]
        }
        with (output / "matches.csv").open(newline="") as file:
            # A cell that a spreadsheet would run begins with an apostrophe.
            rows = [row["query"].removeprefix("'") for row in csv.DictReader(file)]
        return said | dict.fromkeys(rows, corpus.FACE)

    def flags(folder: pathlib.Path, output: pathlib.Path) -> list[str]:
        database = f"--database={workdir / 'database'}"
        return [f"--queries={folder}", database, f"--workdir={output}", "--min_face_px=80"]

    return Program("match", flags, statuses, has_tables=True)


PROGRAMS: dict[str, Callable[[pathlib.Path], Program]] = {
    "detect": _detect,
    "cloak": _cloak,
    "match": _match,
}
