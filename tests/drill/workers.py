"""Runs that share photos with --join while one of them is killed: what is done, and how often.

    python -m tests.drill.workers --photos=2000 --workdir=out/workers

Prints a row for each case, and writes workers.json into the work directory. Exit code 1: something
was lost or done twice.
"""

import argparse
import collections
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from concurrent import futures
from typing import NamedTuple

import numpy as np
import skimage.data
from PIL import Image

from afr_jax.core import files, provenance
from afr_jax.core.runtime import claims

from . import processes

_SIZE = 200, 160
_FACE_PX = 150
# Photos that a run claims at once, at most.
_GROUP = 8
_LIMIT_S = 3600


class Case(NamedTuple):
    """Photos, runs that share them, and how often the last of these is killed and started again."""

    photos: int
    workers: int
    kills: int


def make_photos(folder: pathlib.Path, count: int) -> None:
    """Writes portraits of one face each, no two of which are equal."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    portrait = Image.fromarray(skimage.data.astronaut()[45:195, 150:300])
    for number in range(count):
        noise = random.integers(0, 64, (_SIZE[1], _SIZE[0], 3), np.uint8)
        photo = Image.fromarray(noise)
        face = portrait.resize((_FACE_PX, _FACE_PX)).rotate(random.uniform(-9, 9))
        photo.paste(face, tuple(random.integers(0, (50, 10)).tolist()))
        photo.save(folder / f"{number:05}.jpg", quality=90)


def run(case: Case, photos: pathlib.Path, folder: pathlib.Path) -> dict[str, object]:
    """Lets `detect` look at photos as a case says; what came of it.

    Args:
        case: the case.
        photos: folder with at least as many.
        folder: new; for the results.
    """
    names = [f"{number:05}.jpg" for number in range(case.photos)]
    given = folder / "photos"
    given.mkdir(parents=True)
    for name in names:
        os.link(photos / name, given / name)
    output = folder / "found"
    flags = ["--toy", f"--images={given}", f"--output_dir={output}", "--join"]
    manifest = output / ".detect" / claims.MANIFEST
    start, killed = time.monotonic(), []

    def started(name: str) -> processes.Running:
        return processes.program("detect", flags, folder / "logs" / name)

    with futures.ThreadPoolExecutor(case.workers) as pool:
        # Each is watched from its start, for the memory that it takes.
        waiting = [
            pool.submit(started(f"worker-{number}").end, limit_seconds=_LIMIT_S)
            for number in range(case.workers - (case.kills > 0))
        ]
        for number in range(case.kills):
            worker = started(f"killed-{number}")
            # When it has done something, and a further part of the photos is done.
            wanted = (number + 1) * case.photos // (case.kills + 2)
            while processes.peak_mb(worker.pid) and (
                len(_items(manifest)) < wanted or not _has_worked(manifest, worker.pid)
            ):
                time.sleep(0.02)
            end = worker.end(limit_seconds=_LIMIT_S, signal_after=(signal.SIGKILL, 0.0))
            killed.append(end.code)
        if case.kills:
            last = started("last")
            waiting.append(pool.submit(last.end, limit_seconds=_LIMIT_S))
        ended = [worker.result() for worker in waiting]
    counts = collections.Counter(_items(manifest))
    images = json.loads((output / "faces.json").read_bytes())["images"]
    found = [image["image"] for image in images if image["status"] in ("ok", "no_face")]
    return {
        **case._asdict(),
        "codes": [each.code for each in ended],
        "killed": killed,
        "results_equal": len({_plain(each.out) for each in ended}) == 1,
        "lost": len(set(names) - set(found)),
        "faces": sum(len(image["faces"]) for image in images),
        "listed_twice": len(found) - len(set(found)),
        "done_twice": sum(count - 1 for count in counts.values()),
        "noted": len(counts),
        "peak_mb": [round(each.peak_mb) for each in ended],
        "seconds": round(time.monotonic() - start),
        "faces_sha256": files.digest_of({"faces": np.frombuffer(_text(images), np.uint8)}),
    }


def faults(rows: list[dict]) -> list[str]:
    """What must not be."""
    found = []
    for row in rows:
        case = f"{row['photos']} photos, {row['workers']} runs, {row['kills']} kills"
        for name in ("lost", "listed_twice", "done_twice"):
            found += [f"{case}: {row[name]} {name}"] * bool(row[name])
        # What a killed run had finished, and had not noted, is not done again.
        if row["noted"] < row["photos"] - _GROUP * row["kills"]:
            found.append(f"{case}: {row['noted']} noted")
        if row["killed"] != [-signal.SIGKILL] * row["kills"]:
            found.append(f"{case}: {row['killed']} were killed")
        if any(row["codes"]) or not row["results_equal"]:
            found.append(f"{case}: exit codes {row['codes']}")
    for count in {row["photos"] for row in rows}:
        if len({row["faces_sha256"] for row in rows if row["photos"] == count}) > 1:
            found.append(f"{count} photos: other faces")
    return found


def _lines(manifest: pathlib.Path) -> list[dict]:
    return files.read_sealed_lines(manifest)[0] if manifest.exists() else []


def _items(manifest: pathlib.Path) -> list[str]:
    return [name for line in _lines(manifest) for name in line["items"]]


def _has_worked(manifest: pathlib.Path, process: int) -> bool:
    return any(line["worker"].startswith(f"process {process} ") for line in _lines(manifest))


def _plain(text: str) -> str:
    """A result line."""
    return text.strip().splitlines()[-1] if text.strip() else ""


def _text(images: object) -> bytes:
    return json.dumps(images, sort_keys=True).encode()


def main() -> int:
    """Runs all cases."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.drill.workers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("out/workers"))
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shutil.rmtree(given.workdir, ignore_errors=True)
    make_photos(given.workdir / "made", given.photos)
    rows = []
    cases = [(given.photos // 4, 1, 0), *((given.photos, *rest) for rest in _CASES)]
    for case in cases:
        place = given.workdir / "-".join(map(str, case))
        rows.append(run(Case(*case), given.workdir / "made", place))
        print(json.dumps(rows[-1]), flush=True)
    wrong = faults(rows)
    names = {"WORKDIR": str(given.workdir)}
    about = provenance.provenance("tests.drill.workers", sys.argv[1:], names=names)
    text = json.dumps({**about, "rows": rows, "faults": wrong}, indent=2)
    (given.workdir / "workers.json").write_text(text + "\n")
    print("\n".join(wrong) or "nothing was lost or done twice")
    return int(bool(wrong))


# Runs and kills.
_CASES = ((1, 0), (2, 0), (3, 2))

if __name__ == "__main__":
    sys.exit(main())
