"""Runs the drill, prints its table, and writes drill.json into the work directory.

    python -m tests.drill --inputs=1000 --seed=0 --workdir=out/drill

The other counts follow from --inputs. Exit code 1: something was found.
"""

import argparse
import json
import pathlib
import shutil
import signal
import sys
import time

from afr_jax.core import provenance

from . import photo_series, readers, run_series, tally


def main() -> int:
    """Runs the series that were asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.drill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--inputs", type=int, default=1000, help="damaged photos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("out/drill"))
    parser.add_argument(
        "--series", default=",".join([*SERIES, *RUNS]), help="which of them, with commas"
    )
    parser.add_argument(
        "--programs", default="", help="of signals, races and disks, with commas; default: all"
    )
    parser.add_argument("--keep", action="store_true", help="keep what was made and written")
    given = parser.parse_args()
    chosen = given.series.split(",")
    if unknown := set(chosen) - SERIES.keys() - RUNS.keys():
        parser.error(f"no such series: {', '.join(sorted(unknown))}")

    wanted = given.programs.split(",") if given.programs else [p.name for p in PROGRAMS]
    programs = [program for program in PROGRAMS if program.name in wanted]
    if len(programs) < len(wanted):
        parser.error(f"--programs must be of {', '.join(program.name for program in PROGRAMS)}")

    signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    counts = tally.Tally()
    folder = given.workdir.absolute()
    for name in chosen:
        place = folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        if name in RUNS:
            run_fn, share = RUNS[name]
            rounds = max(2, given.inputs // share)
            run_fn(place, counts, rounds=rounds, seed=given.seed, programs=programs)
        else:
            SERIES[name](place, counts, given.inputs, given.seed)
        if not given.keep:
            shutil.rmtree(place, ignore_errors=True)
    rows = counts.result()
    names = {"WORKDIR": str(given.workdir)}
    measured = {
        **provenance.provenance("tests.drill", sys.argv[1:], names=names),
        "seconds": round(time.monotonic() - start),
        "inputs": given.inputs,
        "seed": given.seed,
        **rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(measured, indent=2, ensure_ascii=True)
    (folder / "drill.json").write_text(text + "\n")
    print(tally.table(counts.by_program()))
    for name, reason in counts.not_run.items():
        print(f"not run: {name}: {reason}")
    return int(bool(counts.faults))


PROGRAMS = run_series.PROGRAMS
# Series of disturbed runs, and how many inputs stand for a round of one.
RUNS = {
    "signals": (run_series.signals, 5),
    "races": (run_series.races, 10),
    "disks": (run_series.disks, 25),
}
# The others by name; each takes its folder, the counts, the number of photos, and the seed.
SERIES = {
    "photos": lambda place, counts, inputs, seed: photo_series.run(
        place, counts, inputs=inputs, seed=seed
    ),
    "large_photos": lambda place, counts, inputs, seed: photo_series.run(
        place, counts, inputs=inputs, seed=seed, is_large=True
    ),
    "files": lambda place, counts, inputs, seed: readers.run(
        place, counts, inputs=inputs, seed=seed
    ),
    "clocks": lambda place, counts, inputs, seed: run_series.clocks(place, counts),
}


if __name__ == "__main__":
    sys.exit(main())
