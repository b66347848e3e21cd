"""Enrolling a gallery of people into a reference database, and removing people from one."""

import dataclasses
import pathlib
import time

from afr_jax.core import distributed, options, progress, workdir
from afr_jax.data import identities
from afr_jax.recognition import database, shared_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnrollConfig(options.Config):
    """Enrolls a gallery of people into a reference database.

        python -m experiments.enroll --gallery=people --database=out/people
        python -m experiments.enroll --database=out/people --delete="Ann Example"

    --gallery is a folder with a folder of photos for each person, whose name is the identity, or,
    with --csv, a folder of photos and a CSV with the columns image, identity (paths below
    --gallery). The face that each photo is of (large and central) is detected, aligned and
    embedded, and written with its identity, photo, box, extractor and the fingerprint of the
    extractor's weights. --database is a folder, or an address in an object store
    (s3://bucket/people; LanceDB reads the credentials from the environment).

    Running it again enrolls what is new, what has changed and what was made with another
    --min_face_px or --min_confidence; a killed run is completed that way. A photo is known by its
    path below --gallery; of equal files of a person one is enrolled. Rows that are damaged or stand
    for one face are dropped first. --replace makes the database hold for each person of the gallery
    exactly the photos that are in the gallery now.

    --delete removes people; with --purge also the bytes of their rows and all earlier versions of
    the database, while nobody else uses it, and the files are then searched for what was deleted;
    --purge alone does that for earlier deletions. A database holds embeddings of one extractor with
    one set of weights; others are refused. While one process enrolls or deletes, others that would
    change the same folder are refused (in an object store nothing keeps them apart).

    Several processes of a job share the photos, and need a --workdir: what each finds, embeddings
    included, waits in its folder `kept` until process 0 has enrolled it.

    The result names every photo that could not be enrolled, and why. Exit codes: 0 done; 2 wrong
    usage; 3 done, but some photos could not be enrolled. --toy enrolls the first 8 photos.
    """

    shares_work = True

    gallery: str | None = options.option(None, "folder with a folder of photos for each person")
    csv: str | None = options.option(
        None, "CSV with the columns image, identity; paths in --gallery", resumable=True
    )
    database: str | None = options.option(None, "folder or object-store address of the database")
    extraction: shared_options.ExtractorOptions = options.group(shared_options.ExtractorOptions)
    detection: shared_options.FaceOptions = options.group(shared_options.FaceOptions)
    replace: bool = options.option(
        False, "drop what else is enrolled of the gallery's people", resumable=True
    )
    delete: tuple[str, ...] = options.option(
        (), "identity to remove; may be repeated", is_repeated=True, resumable=True
    )
    purge: bool = options.option(
        False, "with --delete: also from the disk, history included", resumable=True
    )
    max_photos: int = options.option(0, "enroll the first so many; 0: all", at_least=0)

    def toy(self) -> "EnrollConfig":
        """The first 8 photos."""
        return dataclasses.replace(self, max_photos=min(self.max_photos or 8, 8))


def run(config: EnrollConfig) -> options.Outcome:
    """Enrolls a gallery, or deletes people.

    Raises:
        options.UsageError: no database, a wrong gallery, another extractor than the database's.
    """
    if not config.database:
        raise options.UsageError("--database is needed")
    if not config.gallery and not distributed.is_primary():
        return options.Outcome({})
    if bool(config.gallery) == bool(config.delete or config.purge):
        raise options.UsageError("give one of --gallery and --delete")
    try:
        with options.usage(""):
            if config.gallery:
                return _enroll(config, config.gallery, config.database)
            return _delete(config, config.database)
    except database.DatabaseError as error:
        raise options.UsageError(str(error)) from error


def _enroll(config: EnrollConfig, gallery: str, place: str) -> options.Outcome:
    listing = identities.list_people(gallery, table=config.csv)
    if config.max_photos:
        listing = dataclasses.replace(listing, samples=listing.samples[: config.max_photos])
    work = None
    if config.workdir:
        detection = [f"detection.{field.name}" for field in dataclasses.fields(config.detection)]
        resumable = (*options.resumable(EnrollConfig), *detection, "workdir", "seed")
        work = workdir.open_workdir(config.workdir, config, resumable=resumable)
    start = time.perf_counter()
    recognizer = config.extraction.load(min_face_px=config.detection.min_face_px)
    kept = _kept(work)
    confidence = config.detection.min_confidence
    if kept is not None:
        recognizer.share_gallery(
            listing, place, replace=config.replace, min_confidence=confidence, kept=kept
        )
    if not distributed.is_primary():
        return options.Outcome({})
    with distributed.alone():
        done = recognizer.enroll(
            listing, place, replace=config.replace, min_confidence=confidence, kept=kept
        )
    for problem in done.problems:
        progress.warn(problem.name, problem.reason)
    result = {
        "database": done.database.uri,
        "extractor": done.database.tag.name,
        "weights": done.database.tag.weights,
        "added": done.added,
        "changed": done.changed,
        "unchanged": done.unchanged,
        "repeats": done.repeats,
        "enrolled": len(done.database),
        "identities": len(done.database.identities()),
        "skipped": listing.num_skipped,
        "seconds": time.perf_counter() - start,
        "not_handled": [problem.as_result() for problem in done.problems],
    }
    if work is not None:
        work.write_result(result)
    return options.Outcome(result, complete=not done.problems)


def _kept(work: workdir.Workdir | None) -> pathlib.Path | None:
    """Where processes leave what they find, until it is enrolled; None for one that starts."""
    if work is None:
        if distributed.process_count() > 1:
            raise options.UsageError(
                "--workdir is needed where processes share the work: what each finds waits there"
            )
        return None
    kept = work.path / "kept"
    return kept if distributed.process_count() > 1 or kept.exists() else None


def _delete(config: EnrollConfig, place: str) -> options.Outcome:
    reference = database.open_database(place)
    deleted = reference.delete_identities(config.delete, purge=config.purge)
    return options.Outcome(
        {
            "database": reference.uri,
            "deleted": deleted,
            "enrolled": len(reference),
            "identities": len(reference.identities()),
        }
    )
