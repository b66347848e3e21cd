"""Looks through a collection of photos: who is on them, what is unreadable, what repeats.

    python -m experiments.collect --data=scraped --output_dir=out/collection

--data is a folder with a folder of photos for each person, at any depth, or, with --csv, a folder
of photos and a CSV with the columns image, identity (paths below --data). In the output folder:

    photos.csv   image, identity: what is left, ready as --csv of the other programs
    repeats.csv  image, kept, distance, exact, same_identity: which photo was dropped for which
    records/     with --records: an ArrayRecord data set for TFDS and Grain, split train and test

Repeats are equal pixels, and photos whose perceptual hashes of 64 bits differ by --max_distance
bits at most: resized, recompressed and slightly recolored copies, but no crops. Of each the one
with the most pixels stays. A repeat that is filed under another person is reported as such: one of
the two is wrong. No photo is moved, changed or deleted.

Expected on two CPU cores: about 1.5 ms for a crop of 112 px, 10 ms for a photo of a megapixel.
Exit codes: 0 done; 2 wrong usage; 3 done, but some photos or rows could not be used. --toy looks at
the first 100 photos.
"""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import flags

from afr_jax.core import files, program
from afr_jax.data import array_records, identities, sampling
from afr_jax.recognition import collect

_DATA = flags.DEFINE_string("data", None, "folder of photos")
_CSV = flags.DEFINE_string("csv", None, "CSV with the columns image, identity; paths in --data")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "out/collect", "folder for what is written")
_DISTANCE = flags.DEFINE_integer(
    "max_distance", collect.DEFAULT_DISTANCE, "of repeats, in bits; -1: equal pixels only", -1, 16
)
_MIN_PHOTOS = flags.DEFINE_integer("min_photos", 1, "people with fewer are left out at the end", 1)
_RECORDS = flags.DEFINE_string("records", None, "name of an ArrayRecord data set to write")
_HELD_OUT = flags.DEFINE_float("held_out", 0.2, "share of its split test", 0.0, 0.9)

_TOY_PHOTOS = 100


def collect_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    if _DATA.value is None:
        raise program.UsageError(
            "--data is needed: a folder with a folder of photos for each person"
        )
    output = pathlib.Path(_OUTPUT_DIR.value)
    if output.exists() and not output.is_dir():
        raise program.UsageError(f"--output_dir={output} is not a folder")
    listing = _list_photos()
    with tqdm.tqdm(total=len(listing.samples), desc="reading", disable=None) as bar:
        distance = None if _DISTANCE.value < 0 else _DISTANCE.value
        found = collect.collect(listing, max_distance=distance, report_fn=bar.update)
    kept = found.listing.with_photos(_MIN_PHOTOS.value)
    rows = [(sample.sample_id, sample.identity) for sample in kept.samples]
    _write_csv(output / "photos.csv", ("image", "identity"), rows)
    _write_csv(output / "repeats.csv", ("image", *collect.Repeat._fields[1:]), found.repeats)
    repeated = {repeat.sample_id for repeat in found.repeats}
    problems = [problem for problem in kept.problems if problem.name not in repeated]
    result = {
        "photos": len(listing.samples),
        "kept": len(kept.samples),
        "identities": len(kept.identities),
        "repeats": {
            "exact": sum(repeat.exact for repeat in found.repeats),
            "near": sum(not repeat.exact for repeat in found.repeats),
            "of_another_identity": sum(not repeat.same_identity for repeat in found.repeats),
        },
        "records": None,
    }
    if _RECORDS.value is not None:
        result["records"], unreadable = _write_records(kept, output)
        problems += unreadable
    result["not_handled"] = [dataclasses.asdict(problem) for problem in problems]
    files.write_json(output / "result.json", result)
    return result, program.EXIT_PARTIAL if problems else program.EXIT_OK


def _list_photos() -> identities.Listing:
    try:
        if _CSV.value is not None:
            listing = identities.list_csv(_CSV.value, _DATA.value)
        else:
            listing = identities.list_tree(_DATA.value)
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(str(error)) from error
    if flags.FLAGS.toy:
        return identities.Listing(listing.samples[:_TOY_PHOTOS], listing.problems)
    return listing


def _write_records(
    listing: identities.Listing, output: pathlib.Path
) -> tuple[str, list[identities.Problem]]:
    _, held_out = sampling.split_by_id(
        listing.sample_ids,
        held_out=_HELD_OUT.value,
        seed=flags.FLAGS.seed,
        labels=listing.labels,
    )
    try:
        folder, problems = array_records.write_listing(
            listing, output / "records", name=_RECORDS.value, held_out_rows=held_out.tolist()
        )
    except (FileExistsError, ValueError) as error:
        raise program.UsageError(f"--records: {error}") from error
    return str(folder), problems


def _write_csv(path: pathlib.Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    for row in rows:
        writer.writerow([int(v) if isinstance(v, (bool, np.bool_)) else v for v in row])
    files.write_atomically(path, text.getvalue().encode(), overwrite=True)


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(collect_program)
