"""Matching query photos against a reference database: who is on them?"""

import dataclasses

from afr_jax.core import distributed, options, progress, workdir
from afr_jax.data import photo_files, photos
from afr_jax.models.extractors import registry
from afr_jax.recognition import database, detect, match, pipeline, shared_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchConfig(options.Config):
    """Matches query photos against a reference database: who is on them?

        python -m experiments.enroll --gallery=people --database=out/people
        python -m experiments.match --queries=party --database=out/people --top_k=3

    Every face of every query photo is detected, aligned and embedded with the extractor that the
    database was made with, and compared with all enrolled faces. Writes `matches.csv` into the work
    directory (default `out/match`), a line for each query face and rank:

        query, face, query_box, rank, identity, image, box, distance, threshold, matched, decision

    `distance` is in --metric, `matched` is 1 where it lies below the threshold. `decision` is the
    identity of the nearest enrolled face if that matched, else `unknown`. Boxes are `y0 x0 y1 x1`
    in pixels of the upright photo. `result.json` counts the query photos by status (`ok`,
    `no_face`, `unreadable`) and names those without a face. `kept/` holds what was found in
    groups of photos, embeddings included, so that a killed run goes on where it was.

    --metric: `euclidean` is the distance of the embeddings, `euclidean_l2` that of the embeddings
    scaled to unit length, `cosine` one minus the cosine of their angle. From 100,000 faces on the
    search goes through the database's index, unless --exact.

    Exit codes: 0 done; 2 wrong usage; 3 done, but some queries could not be read or have no face.
    """

    shares_work = True

    queries: tuple[str, ...] = options.option((), "photos and folders of photos to look at")
    database: str | None = options.option(None, "folder or object-store address to search in")
    top_k: int = options.option(5, "nearest enrolled faces to list for a query face", at_least=1)
    distance: shared_options.MetricOptions = options.group(shared_options.MetricOptions)
    weights: str | None = options.option(
        None, "weight file, or folder of the trained extractor, that the database is made with"
    )
    exact: bool = options.option(False, "search all faces even if there is an index")
    detection: shared_options.FaceOptions = options.group(shared_options.FaceOptions)
    workdir: str | None = options.option("out/match", options.WORKDIR_HELP)


def run(config: MatchConfig) -> options.Outcome:
    """Looks for every face of the queries, and writes matches.csv.

    Raises:
        options.UsageError: no queries or database, weights that are not the database's.
    """
    if not config.database:
        raise options.UsageError("--database is needed")
    if not config.queries:
        raise options.UsageError("--queries is needed: photos or folders of photos")
    inputs, num_skipped = shared_options.list_photos(config.queries, flag="queries")
    try:
        with options.usage(""):
            reference = database.open_database(config.database)
            reference.check_not_empty()
            recognizer = _load(config, reference)
            # What is taken over from an earlier run is told by what it depends on.
            every = [".".join(leaf.path) for leaf in options.leaves(MatchConfig)]
            work = workdir.open_workdir(config.workdir, config, resumable=every)
            sources = [_nameable(photos.PhotoSource.of(item)) for item in inputs]
            kept, confidence = work.path / "kept", config.detection.min_confidence
            pipeline.share(recognizer, sources, which="all", min_confidence=confidence, kept=kept)
            if not distributed.is_primary():
                return options.Outcome({})
            with distributed.alone():
                found = recognizer.match(
                    sources,
                    reference,
                    top_k=config.top_k,
                    metric=config.distance.metric,
                    threshold=config.distance.threshold,
                    exact=True if config.exact else None,
                    min_confidence=confidence,
                    kept=kept,
                )
    except database.DatabaseError as error:
        raise options.UsageError(str(error)) from error
    found.save(work.path / "matches.csv")
    statuses = [query.found.status for query in found.queries]
    problems = [
        {"image": query.name, "reason": query.found.problem}
        for query in found.queries
        if query.found.problem
    ]
    for problem in problems:
        progress.warn(problem["image"], problem["reason"])
    result = {
        "database": reference.uri,
        "enrolled": len(reference),
        "extractor": reference.tag.name,
        "metric": found.metric,
        "threshold": found.threshold,
        "queries": {status: statuses.count(status) for status in ("ok", "no_face", "unreadable")},
        "skipped": num_skipped,
        "faces": len(found.decisions),
        "identified": sum(decision != match.UNKNOWN for decision in found.decisions),
        "unknown": found.decisions.count(match.UNKNOWN),
        "matches": work.path / "matches.csv",
        "not_handled": problems,
    }
    work.write_result(result)
    return options.Outcome(result, complete=not problems)


def _nameable(source: photos.PhotoSource) -> photos.PhotoSource:
    """The photo, with a problem if no table can hold its name."""
    if source.problem is not None or photo_files.is_unicode(source.name):
        return source
    return source._replace(problem=photo_files.NOT_UNICODE)


def _load(config: MatchConfig, reference: database.Database) -> pipeline.Recognizer:
    """The detector, and the extractor that the database was made with."""
    name, weights = reference.tag.name, config.weights
    if name not in registry.EXTRACTORS:
        if not weights:
            raise options.UsageError(f"{reference.uri} was made with {name}: give its --weights")
        name, weights = weights, None
    recognizer = pipeline.load_recognizer(
        name,
        weights=weights,
        options=detect.DetectorOptions(min_face_px=config.detection.min_face_px),
    )
    reference.check_tag(pipeline.tag(recognizer, name))
    return recognizer
