"""What programs hold in memory while a great many photos stream through them.

    python -m tests.drill.memory --photos=100000 --workdir=out/memory

Nearly all photos are 24 x 24 pixels of one color each, every thousandth is a portrait: most of the
work is that of the folder, and its length is what matters. Writes memory.json and memory.png into
the work directory; a killed run goes on with the programs that are not done. Exit code 1: a program
failed.
"""

import argparse
import concurrent.futures
import json
import pathlib
import re
import shutil
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
import skimage.data
from PIL import Image

from afr_jax.core import files, provenance
from afr_jax.evaluation.report import figures

from . import processes

_PROGRAMS = {
    "detect": ("--images={photos}", "--output_dir={out}", "--toy"),
    "enroll": ("--gallery={people}", "--database={out}/base", "--min_face_px=80"),
    "match": (
        *("--queries={photos}", "--database={enrolled}/base", "--workdir={out}"),
        *("--min_face_px=80", "--top_k=1"),
    ),
    "cloak": ("--images={photos}", "--output_dir={out}", "--surrogates=dlib", "--num_steps=1"),
}
_FACE_EVERY, _FACE_PX, _SIDE = 1000, 160, 24
_IN_FOLDER = 1000
_LIMIT_S = 24 * 3600
_SAMPLES = 200


def make_photos(folder: pathlib.Path, count: int) -> None:
    """Writes photos no two of which are equal, a thousand in each folder, as of a person."""
    if folder.exists():
        return
    portrait = Image.fromarray(skimage.data.astronaut()[45:195, 150:300])
    portrait = portrait.resize((_FACE_PX, _FACE_PX))
    random = np.random.default_rng(0)

    def write(place: pathlib.Path, start: int) -> None:
        own = place / f"{start // _IN_FOLDER:04}"
        own.mkdir(parents=True)
        for number in range(start, min(start + _IN_FOLDER, count)):
            if number % _FACE_EVERY:
                color = number & 255, number >> 8 & 255, number >> 16
                photo = Image.new("RGB", (_SIDE, _SIDE), color)
            else:
                photo = portrait.rotate(random.uniform(-9, 9))
                photo.putpixel((0, 0), (number & 255, number >> 8 & 255, number >> 16))
            photo.save(own / f"{number:06}.png")

    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for start in range(0, count, _IN_FOLDER):
        write(unfinished, start)
    unfinished.rename(folder)


def measure(name: str, flags: list[str], log: pathlib.Path) -> dict[str, Any]:
    """Runs a program to its end; how it ended, and what it held at which photo."""
    running = processes.program(name, flags, log)
    samples: list[tuple[int, float]] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(1.0):
            held, count = processes.held_mb(running.pid), _last_count(log.with_suffix(".err"))
            if held and count is not None and (not samples or count > samples[-1][0]):
                samples.append((count, held))

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        ended = running.end(limit_seconds=_LIMIT_S)
        is_over.set()
        watching.result()
    step = -(-len(samples) // _SAMPLES) or 1
    return {
        "program": name,
        "code": ended.code,
        "seconds": round(ended.seconds),
        "peak_mb": round(ended.peak_mb),
        "samples": [[count, round(held)] for count, held in samples[::step]],
        "last_words": ended.last_words if ended.crashed else "",
    }


def _last_count(log: pathlib.Path) -> int | None:
    """How many photos a program has said to be done with."""
    found = re.findall(r"photos: ([\d,]+) of", log.read_text("utf-8", "replace"))
    return int(found[-1].replace(",", "")) if found else None


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Memory over the number of photos, a line for each program."""
    figure, axes = figures.pyplot().subplots(figsize=(6, 4), layout="constrained")
    for row in rows:
        counts, held = np.array(row["samples"]).reshape(-1, 2).T
        axes.plot(counts, held, label=row["program"])
    axes.set(xlabel="photos done", ylabel="resident memory, MB", ylim=(0, None), xlim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    figures.save(figure, path)


def main() -> int:
    """Runs the programs one after the other."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.drill.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--photos", type=int, default=100_000)
    parser.add_argument("--programs", default=",".join(_PROGRAMS))
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("out/memory"))
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    work = given.workdir.absolute()
    photos = work / f"photos-{given.photos}"
    make_photos(photos, given.photos)
    rows = []
    for name in given.programs.split(","):
        known = work / f"{name}-{given.photos}.json"
        if not known.exists():
            out = work / f"{name}-{given.photos}"
            shutil.rmtree(out, ignore_errors=True)
            places = {
                "photos": photos,
                "people": photos,
                "out": out,
                "enrolled": work / f"enroll-{given.photos}",
            }
            flags = [flag.format(**places) for flag in _PROGRAMS[name]]
            start = time.strftime("%H:%M")
            row = measure(name, flags, work / "logs" / name)
            files.write_json(known, row)
            print(f"{start} {name}: {row['peak_mb']} MB, {row['seconds']} s", flush=True)
        rows.append(json.loads(known.read_text()))
    names = {"WORKDIR": str(given.workdir)}
    about = provenance.provenance("tests.drill.memory", sys.argv[1:], names=names)
    text = json.dumps({**about, "photos": given.photos, "rows": rows}, indent=2)
    (work / "memory.json").write_text(text + "\n")
    draw(rows, work / "memory.png")
    failed = [row["program"] for row in rows if row["code"] not in (0, 3)]
    print(f"failed: {', '.join(failed)}" if failed else "all came to their end")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
