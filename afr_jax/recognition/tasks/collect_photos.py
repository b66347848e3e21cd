"""Looking through a collection of photos: who is on them, what is unreadable, what repeats."""

import dataclasses
import pathlib
from typing import Any

from afr_jax.core import distributed, files, options, progress, workdir
from afr_jax.data import array_records, identities, sampling
from afr_jax.recognition import collect


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectConfig(options.Config):
    """Looks through a collection of photos: who is on them, what is unreadable, what repeats.

        python -m experiments.collect --data=scraped --output_dir=out/collection

    --data is a folder with a folder of photos for each person, at any depth, or, with --csv, a
    folder of photos and a CSV with the columns image, identity (paths below --data). In the output
    folder:

        photos.csv   image, identity: what is left, ready as --csv of the other programs
        repeats.csv  image, kept, distance, exact, same_identity: which photo was dropped for which
        records/     with --records: an ArrayRecord data set for TFDS and Grain, split train, test

    Repeats are equal pixels, and photos whose perceptual hashes of 64 bits differ by --max_distance
    bits at most: resized, recompressed and slightly recolored copies, but no crops. Of each the one
    with the most pixels stays. A repeat that is filed under another person is reported as such: one
    of the two is wrong. No photo is moved, changed or deleted. What was read is kept in .collect/
    there, or in --workdir: a killed run goes on where it was.

    Exit codes: 0 done; 2 wrong usage; 3 done, but some photos or rows could not be used. --toy
    looks at the first 100 photos.
    """

    shares_work = True

    data: str | None = options.option(None, "folder of photos")
    csv: str | None = options.option(None, "CSV with the columns image, identity; paths in --data")
    output_dir: str = options.option("out/collect", "folder for what is written")
    max_distance: int = options.option(
        collect.DEFAULT_DISTANCE,
        "of repeats, in bits; -1: equal pixels only",
        at_least=-1,
        at_most=16,
    )
    min_photos: int = options.option(1, "people with fewer are left out at the end", at_least=1)
    max_photos: int = options.option(0, "look at the first so many; 0: all", at_least=0)
    records: str | None = options.option(None, "name of an ArrayRecord data set to write")
    held_out: float = options.option(0.2, "share of its split test", at_least=0, at_most=0.9)

    def toy(self) -> "CollectConfig":
        """The first 100 photos."""
        return dataclasses.replace(self, max_photos=min(self.max_photos or 100, 100))


def run(config: CollectConfig) -> options.Outcome:
    """Reads all photos and writes which are left and which repeat another.

    Raises:
        options.UsageError: no data or a wrong one, an output folder that cannot be used.
    """
    if config.data is None:
        raise options.UsageError(
            "--data is needed: a folder with a folder of photos for each person"
        )
    output = pathlib.Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise options.UsageError(f"--output_dir={output} is not a folder")
    with options.usage(""):
        listing = identities.list_people(config.data, table=config.csv)
    for name in ("photos.csv", "repeats.csv"):
        place = output / name
        if config.csv is not None and place.exists() and place.samefile(config.csv):
            raise options.UsageError(f"--csv={config.csv} is where the result goes: --output_dir")
    if config.max_photos:
        listing = dataclasses.replace(listing, samples=listing.samples[: config.max_photos])
    work = workdir.open_workdir(config.workdir, config) if config.workdir else None
    own = output / ".collect" if work is None else work.path
    with workdir.claimed(output):
        collect.share(listing, kept=own / "kept")
        if not distributed.is_primary():
            return options.Outcome({})
        with (
            distributed.alone(),
            progress.counter(len(listing.samples), description="reading") as advance,
        ):
            distance = None if config.max_distance < 0 else config.max_distance
            found = collect.collect(
                listing, max_distance=distance, report_fn=advance, kept=own / "kept"
            )
            result, is_complete = _write(config, listing, found, output)
    if work is not None:
        work.write_result(result)
    return options.Outcome(result, is_complete)


def _write(
    config: CollectConfig,
    listing: identities.Listing,
    found: collect.Collection,
    output: pathlib.Path,
) -> tuple[dict[str, Any], bool]:
    """Writes what was found; returns the result, and whether all photos could be used."""
    kept = found.listing.with_photos(config.min_photos)
    files.write_csv(
        output / "photos.csv",
        ("image", "identity"),
        [(sample.sample_id, sample.identity) for sample in kept.samples],
    )
    files.write_csv(
        output / "repeats.csv",
        ("image", *collect.Repeat._fields[1:]),
        [
            [int(value) if isinstance(value, bool) else value for value in repeat]
            for repeat in found.repeats
        ],
    )
    repeated = {repeat.sample_id for repeat in found.repeats}
    problems = [problem for problem in kept.problems if problem.name not in repeated]
    result: dict[str, Any] = {
        "photos": len(listing.samples),
        "kept": len(kept.samples),
        "identities": len(kept.identities),
        "repeats": {
            "exact": sum(repeat.exact for repeat in found.repeats),
            "near": sum(not repeat.exact for repeat in found.repeats),
            "of_another_identity": sum(not repeat.same_identity for repeat in found.repeats),
        },
        "skipped": listing.num_skipped,
        "records": None,
    }
    if config.records is not None:
        result["records"], unreadable = _write_records(config, kept, output, config.records)
        problems += unreadable
    result["not_handled"] = [problem.as_result() for problem in problems]
    files.write_json(output / "result.json", result)
    return result, not problems


def _write_records(
    config: CollectConfig, listing: identities.Listing, output: pathlib.Path, name: str
) -> tuple[str, list[identities.Omission]]:
    _, held_out = sampling.split_by_id(
        listing.sample_ids, held_out=config.held_out, seed=config.seed, labels=listing.labels
    )
    try:
        folder, problems = array_records.write_listing(
            listing, output / "records", name=name, held_out_rows=held_out.tolist()
        )
    except (FileExistsError, ValueError) as error:
        raise options.UsageError(f"--records: {error}") from error
    return str(folder), problems
