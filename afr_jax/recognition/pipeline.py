"""The face recognition system: a detector and extractors, from photos to who is on them.

A photo is read and its faces are detected once, then aligned and embedded for every extractor in
use (`recognize`). On that stand verification of two photos (`verify`), enrollment into a reference
database and matching against it (methods of `Recognizer`).
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from afr_jax.core import backend, distributed, files, parallel, progress, workdir
from afr_jax.data import identities, photos
from afr_jax.models import mtcnn
from afr_jax.models.extractors import registry
from afr_jax.models.weights import conversion
from afr_jax.recognition import database as databases
from afr_jax.recognition import detect, embed, match
from afr_jax.training import trained

# Photos whose faces are embedded together, and that one transaction of a database enrolls.
_GROUP = 64
NO_FACE = "no face was found"
# Stands for every extractor of the registry whose weights are there, but for judges.
ALL = "all"
_COLUMNS = (
    *("query", "face", "query_box", "rank", "identity", "image", "box"),
    *("distance", "threshold", "matched", "decision"),
)


# A folder with a folder of photos for each person, a listing, or photos by person.
GalleryLike = str | os.PathLike[str] | identities.Listing | Mapping[str, photos.PhotosLike]


class Recognizer(NamedTuple):
    """A detector and some extractors, loaded; from `load_recognizer`.

    Attributes:
        detector: variables of MTCNN's three networks.
        options: of the detector.
        extractors: entries of the registry and the like, by the name that was asked for.
        variables: theirs, by name.
    """

    detector: mtcnn.Variables
    options: detect.DetectorOptions
    extractors: dict[str, registry.Extractor]
    variables: dict[str, conversion.Variables]

    def enroll(
        self,
        gallery: GalleryLike,
        database: str | os.PathLike[str] | databases.Database,
        *,
        extractor: str | None = None,
        replace: bool = False,
        min_confidence: float = 0.9,
        kept: str | os.PathLike[str] | None = None,
    ) -> "EnrollmentReport":
        """Enrolls people's photos into a reference database: what is new and what has changed.

        The face that each photo is of (large and central) is written with its identity, the photo's
        name, its box and the extractor. Every 64 photos, or with `replace` every person, are one
        transaction, so that a killed run is completed by the next. Rows that were made with other
        options of the detector are made again, and damaged and repeated ones are dropped first. No
        other process can change the database meanwhile.

        Args:
            gallery: folder with a folder of photos for each person, a listing of photos, or photos
                in any form by person (`photos.list_sources`); those without a file and a name are
                called by their pixels.
            database: one that is open, or its folder or address, where it is made if need be.
            extractor: name of one of the recognizer's; its first by default.
            replace: whether the database forgets what else it has of the gallery's people.
            min_confidence: of the detector, for a face to be enrolled.
            kept: folder that `share_gallery` was given; what is kept there is deleted at the end,
                as it has embeddings.

        Raises:
            DatabaseError: it cannot be used, another process changes it, or it holds another
                extractor's embeddings.
            FileNotFoundError: the gallery does not exist.
            ValueError: it holds no photo of a person, two photos of a person have one name, or the
                recognizer has no such extractor.
        """
        name, database = self._place_for(database, extractor)
        items, problems = _enrollees(gallery)
        with database.hold():
            report = self._enroll(items, problems, database, name, replace, min_confidence, kept)
        workdir.Kept(kept).delete()
        return report

    def share_gallery(
        self,
        gallery: GalleryLike,
        database: str | os.PathLike[str] | databases.Database,
        *,
        extractor: str | None = None,
        replace: bool = False,
        min_confidence: float = 0.9,
        kept: str | os.PathLike[str],
    ) -> None:
        """Lets each of several processes look at its share of photos that are to be enrolled.

        One of them then calls `enroll` with the same arguments, which finds it in `kept`.

        Args:
            gallery: as of `enroll`, the same in all processes.
            database: likewise.
            extractor: likewise.
            replace: likewise.
            min_confidence: likewise.
            kept: folder that all see.

        Raises:
            DatabaseError: as of `enroll`.
            FileNotFoundError: likewise.
            ValueError: likewise.
        """
        name, database = distributed.primary_first(lambda: self._place_for(database, extractor))
        items, _ = _enrollees(gallery)
        enrolled = {} if replace else database.images()
        made = _made(self, name, min_confidence)
        todo, _ = _missing(items, enrolled, made, by_person=replace)
        sources = [item.photo for item in todo]
        share(self, sources, min_confidence=min_confidence, kept=kept)

    def _place_for(
        self, database: str | os.PathLike[str] | databases.Database, extractor: str | None
    ) -> tuple[str, databases.Database]:
        """Name of the extractor that enrolls, and the open database, which is checked."""
        name = next(iter(self.extractors), "") if extractor is None else extractor
        if name not in self.extractors:
            raise ValueError(f"the recognizer has no extractor {name!r}")
        own_tag = tag(self, name)
        if not isinstance(database, databases.Database):
            database = databases.open_database(database, tag=own_tag, create=True)
        database.check_tag(own_tag)
        return name, database

    def match(
        self,
        queries: photos.PhotosLike,
        database: "str | os.PathLike[str] | databases.Database | EnrollmentReport",
        *,
        top_k: int = 5,
        metric: str | None = None,
        threshold: float | None = None,
        exact: bool | None = None,
        min_confidence: float = 0.9,
        kept: str | os.PathLike[str] | None = None,
    ) -> "MatchReport":
        """Looks for every face of some photos in a reference database.

        Args:
            queries: photos in any form, see `photos.list_sources`.
            database: one that is open, its folder or address, or what `enroll` returned.
            top_k: nearest enrolled faces to list for a query face.
            metric: one of `registry.METRICS`; the extractor's own by default.
            threshold: distance below which it is the same person; the extractor's by default.
            exact: whether to search all faces even if there is an index.
            min_confidence: of the detector, for a face to be matched.
            kept: as of `recognize`.

        Raises:
            DatabaseError: it cannot be used, is empty, or holds another extractor's embeddings.
            FileNotFoundError: a query does not exist.
            ValueError: no threshold is known.
        """
        if isinstance(database, EnrollmentReport):
            database = database.database
        elif not isinstance(database, databases.Database):
            database = databases.open_database(database)
        database.check_not_empty()
        name = self._extractor_of(database)
        extractor = self.extractors[name]
        metric = metric or extractor.metric
        if threshold is None:
            threshold = match.threshold_of(extractor, metric)
        sources = photos.list_sources(queries)
        found = recognize(self, sources, which="all", min_confidence=min_confidence, kept=kept)
        seen = list(progress.track(found, description="query photos", total=len(sources)))
        probes = [item.embeddings[name] for item in seen]
        size = (0, extractor.embedding_size)
        hits = database.search(
            np.concatenate([np.zeros(size, np.float32), *probes]),
            k=top_k,
            metric=metric,
            exact=exact,
        )
        faces = [
            (source.name, number, box)
            for source, item in zip(sources, seen, strict=True)
            for number, box in enumerate(item.faces.boxes)
        ]
        matches, decisions = _matches(faces, hits, threshold)
        return MatchReport(
            tuple(Query(source.name, item) for source, item in zip(sources, seen, strict=True)),
            matches,
            decisions,
            metric,
            threshold,
        )

    def _enroll(
        self,
        items: "list[_Enrollee]",
        problems: list[identities.Omission],
        database: databases.Database,
        name: str,
        replace: bool,
        min_confidence: float,
        kept: str | os.PathLike[str] | None,
    ) -> "EnrollmentReport":
        num_damaged, num_repeated = database.repair()
        if num_damaged or num_repeated:
            what = f"{num_damaged} damaged rows and {num_repeated} repeated ones are dropped"
            progress.warn(database.uri, what)
        made = _made(self, name, min_confidence)
        enrolled = {} if replace else database.images()
        todo, repeats = _missing(items, enrolled, made, by_person=replace)
        sources = [item.photo for item in todo]
        found = recognize(self, sources, min_confidence=min_confidence, kept=kept)
        found = progress.track(found, description="photos", total=len(todo))
        added = changed = 0
        for group in _transactions(zip(todo, found, strict=True), by_person=replace):
            usable = [(item, seen) for item, seen in group if seen.problem is None]
            useless = [(item, seen.problem) for item, seen in group if seen.problem is not None]
            problems += [identities.Omission(item.name, reason) for item, reason in useless]
            new = [pair for pair in usable if pair[0].name not in enrolled]
            again = [pair for pair in usable if pair[0].name in enrolled]
            added += len(new)
            changed += len(again)
            if replace and new:
                database.replace_identity(new[0][0].identity, _entries(new, name, made))
            elif replace:
                problems += _forget(database, group)
            elif new:
                database.append(_entries(new, name, made))
            if again:
                database.replace_images(_entries(again, name, made))
            # A file that cannot be read just now may be what it was.
            gone = [item for item, seen in group if seen.problem is not None and seen.digest]
            database.delete_images(item.name for item in gone if item.name in enrolled)
        database.maintain()
        unchanged = len(items) - len(todo) - repeats
        return EnrollmentReport(database, added, changed, unchanged, tuple(problems), repeats)

    def _extractor_of(self, database: databases.Database) -> str:
        """Name of the extractor that made a database's embeddings."""
        tags = {name: tag(self, name) for name in self.extractors}
        for name, own in tags.items():
            if own == database.tag:
                return name
        for own in tags.values():
            database.check_tag(own)
        raise ValueError("the recognizer has no extractor")


class Recognized(NamedTuple):
    """What was found in one photo.

    Attributes:
        path: of the file; None for a photo that came as an array or image.
        problem: why there are no faces: an unreadable file, or `NO_FACE`; None if there are.
        digest: SHA-256 of the file, or of the pixels where there is none, hexadecimal; empty if it
            could not be read.
        faces: the N faces.
        embeddings: `[N, D]` float32 of each extractor, by name.
    """

    path: pathlib.Path | None
    problem: str | None
    digest: str
    faces: detect.Faces
    embeddings: dict[str, np.ndarray]

    @property
    def status(self) -> str:
        """`ok`, `no_face` or `unreadable`."""
        if self.problem is None:
            return "ok"
        return "no_face" if self.problem == NO_FACE else "unreadable"


class Verdict(NamedTuple):
    """Whether two faces are one person's, as an extractor has it.

    Attributes:
        distance: in the metric that was asked for.
        threshold: distance below which it is the same person; None where none is known.
        same_person: None where there is no threshold.
    """

    distance: float
    threshold: float | None
    same_person: bool | None


class EnrollmentReport(NamedTuple):
    """What `Recognizer.enroll` did.

    Attributes:
        database: the reference database.
        added: photos that were new.
        changed: photos that were enrolled before, and have changed or are now looked at with other
            options of the detector.
        unchanged: photos that were enrolled before.
        problems: photos that could not be enrolled, and why.
        repeats: photos whose file is that of another one of the same person, which stands for both.
    """

    database: databases.Database
    added: int
    changed: int
    unchanged: int
    problems: tuple[identities.Omission, ...]
    repeats: int = 0


class Query(NamedTuple):
    """A photo that was looked for, by its name, and what was found in it."""

    name: str
    found: Recognized


class Match(NamedTuple):
    """An enrolled face near a query face: a line of matches.csv.

    Attributes:
        query: name of the query photo.
        face: number of the face in it, from 0.
        query_box: `[4]` (y0, x0, y1, x1) of the face.
        rank: 1 is nearest.
        identity: of the enrolled face.
        image: name of the enrolled photo.
        box: `[4]` of the enrolled face.
        distance: of the two.
        threshold: distance below which it is the same person.
        matched: whether it is.
        decision: identity of the query face's nearest one if that matched, else `match.UNKNOWN`.
    """

    query: str
    face: int
    query_box: np.ndarray
    rank: int
    identity: str
    image: str
    box: np.ndarray
    distance: float
    threshold: float
    matched: bool
    decision: str


class MatchReport(NamedTuple):
    """What `Recognizer.match` found.

    Attributes:
        queries: the query photos, with the reason where one has no faces.
        matches: `top_k` for each query face, in the order of queries, faces, ranks.
        decisions: for each query face: an identity, or `match.UNKNOWN`.
        metric: of the distances.
        threshold: of the matches.
    """

    queries: tuple[Query, ...]
    matches: tuple[Match, ...]
    decisions: tuple[str, ...]
    metric: str
    threshold: float

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the matches as a CSV; boxes are `y0 x0 y1 x1` in pixels of the upright photo."""
        rows = [
            (
                *(item.query, item.face, _spoken(item.query_box), item.rank),
                *(item.identity, item.image, _spoken(item.box)),
                *(f"{item.distance:.6f}", f"{item.threshold:.6g}", int(item.matched)),
                item.decision,
            )
            for item in self.matches
        ]
        files.write_csv(path, _COLUMNS, rows)


def load_recognizer(
    *names: str,
    weights: Mapping[str, str] | str | os.PathLike[str] | None = None,
    options: detect.DetectorOptions | None = None,
) -> Recognizer:
    """Loads the detector and extractors.

    Args:
        *names: of extractors in the registry, or folders of trained ones
            (`trained.write_extractor`); `all` for every one of the registry whose weights are
            there and that is no judge; none for the detector alone.
        weights: file of an extractor's weights by its name, or the file alone where there is one
            extractor; the default source where none is given.
        options: of the detector; its defaults if None.

    Raises:
        ValueError: an unknown name, or a file that does not hold the network's weights.
        FileNotFoundError: weights that are not there, with what to do.
    """
    names = expand_names(names, given=weights if isinstance(weights, Mapping) else ())
    if isinstance(weights, (str, os.PathLike)):
        weights = parse_weights([os.fspath(weights)], names)
    weights = weights or {}
    for name in weights:
        if name not in names:
            raise ValueError(f"weights are given for {name!r}, which is not among the extractors")
    extractors = {name: find_extractor(name) for name in names}
    return Recognizer(
        detector=mtcnn.load_variables(),
        options=options or detect.DetectorOptions(),
        extractors=extractors,
        variables={
            name: parallel.place(registry.load_variables(extractor, path=weights.get(name)))
            for name, extractor in extractors.items()
        },
    )


def expand_names(
    names: Sequence[str], *, given: Collection[str] = (), without: Collection[str] = ()
) -> tuple[str, ...]:
    """Names of extractors with `all` replaced by every one of the registry that can be loaded.

    Judges (`Extractor.is_judge`) are only there where they are named.

    Args:
        names: of extractors; `all` may stand among them.
        given: names of extractors whose weights are given by the caller; the others need theirs in
            an installed package or in the cache (`registry.present`).
        without: names that `all` leaves out.

    Returns:
        The names in their order; those that `all` stands for in the order of the registry, without
        what is named beside it.
    """
    if ALL not in names:
        return tuple(names)
    there = {*registry.present(), *given} - {*names, *without}
    found = tuple(
        name for name, each in registry.EXTRACTORS.items() if name in there and not each.is_judge
    )
    place = names.index(ALL)
    return (*names[:place], *found, *(name for name in names[place:] if name != ALL))


def warn_of_judges(surrogates: Collection[str]) -> None:
    """Logs which surrogates of a cloak are extractors that are kept for judging."""
    for name, extractor in registry.EXTRACTORS.items():
        if name in surrogates and extractor.is_judge:
            progress.warn(name, "a judge by default; cloaks made against it cannot be judged by it")


def find_extractor(name: str) -> registry.Extractor:
    """An extractor by its name in the registry, or by the folder of a trained one.

    Raises:
        ValueError: neither.
    """
    if name not in registry.EXTRACTORS and pathlib.Path(name).exists():
        return trained.read_extractor(name)
    return registry.get(name)


def tag(recognizer: Recognizer, name: str) -> databases.ExtractorTag:
    """What a reference database notes of the extractor that filled it."""
    extractor = recognizer.extractors[name]
    weights = registry.fingerprint(recognizer.variables[name])
    size = extractor.embedding_size
    return databases.ExtractorTag(extractor.name, weights, size, extractor.metric)


def parse_weights(values: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Weight files of a command line: `NAME=FILE`, or `FILE` alone where there is one extractor.

    Raises:
        ValueError: a file without a name where there are several extractors.
    """
    found = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or name not in names:
            if len(names) != 1:
                raise ValueError(f"{value!r} must be NAME=FILE, NAME one of {', '.join(names)}")
            name, path = names[0], value
        found[name] = path
    return found


def verify(
    recognizer: Recognizer,
    first: photos.PhotoLike,
    second: photos.PhotoLike,
    *,
    metric: str | None = None,
    threshold: float | None = None,
) -> dict[str, Verdict]:
    """Whether two photos show one person, by each extractor; of several faces the main one counts.

    Args:
        recognizer: from `load_recognizer`.
        first: a photo in any form: array `[H, W, 3]` uint8, path, PIL image.
        second: likewise.
        metric: one of `registry.METRICS`; each extractor's own by default.
        threshold: distance below which it is the same person; each extractor's by default.

    Returns:
        The verdicts by the extractors' names.

    Raises:
        ValueError: a photo cannot be read or shows no face.
    """
    pair = tuple(recognize(recognizer, (first, second)))
    for place, photo, found in zip(("first", "second"), (first, second), pair, strict=True):
        if found.problem is not None:
            is_path = isinstance(photo, (str, os.PathLike))
            raise ValueError(f"{photo if is_path else f'the {place} photo'}: {found.problem}")
    return {
        name: judge(
            extractor,
            *(found.embeddings[name][0] for found in pair),
            metric=metric,
            threshold=threshold,
        )
        for name, extractor in recognizer.extractors.items()
    }


def judge(
    extractor: registry.Extractor,
    first: np.ndarray,
    second: np.ndarray,
    *,
    metric: str | None = None,
    threshold: float | None = None,
) -> Verdict:
    """An extractor's verdict on two embeddings `[D]`; see `verify`."""
    metric = metric or extractor.metric
    distance = float(match.distance(first, second, metric=metric))
    if threshold is None:
        threshold = getattr(extractor.thresholds, metric)
    return Verdict(distance, threshold, None if threshold is None else distance < threshold)


def recognize(
    recognizer: Recognizer,
    sources: Iterable[photos.PhotoLike | photos.PhotoSource],
    *,
    which: Literal["main", "all"] = "main",
    min_confidence: float = 0.0,
    detect_fn: Callable[[np.ndarray], detect.Faces] | None = None,
    kept: str | os.PathLike[str] | None = None,
) -> Iterator[Recognized]:
    """Reads photos, finds and embeds their faces.

    Photos are taken in groups of 64, or fewer large ones (`photos.in_groups`), some at a time
    through the detector, and dropped as soon as their faces are embedded.

    Args:
        recognizer: from `load_recognizer`.
        sources: photos in any form: paths of files, arrays `[H, W, 3]` uint8, PIL images, or what
            `photos.list_sources` makes of them.
        which: the face that a photo is of (`detect.main_face`), or every one.
        min_confidence: of the detector, for a face to count.
        detect_fn: finds the faces of `[H, W, 3]` uint8 in place of the recognizer's MTCNN, in
            several threads (`yunet.load` makes one); nothing is kept of that.
        kept: folder for what is found, group by group, embeddings included: a later call with the
            same photos and options goes on from there. What it had no use for is deleted at the
            end.

    Yields:
        One result for each photo, in their order.
    """
    look = _Look.of(recognizer, which=which, min_confidence=min_confidence, kept=kept)
    if detect_fn is not None:
        look = look._replace(detect_fn=detect_fn, kept=workdir.Kept(None))
    for group in photos.in_groups(sources, most=_GROUP, photo_fn=lambda source: source):
        for source, entry in zip(group, look.at(group), strict=True):
            photo = source.photo if isinstance(source, photos.PhotoSource) else source
            path = pathlib.Path(photo) if isinstance(photo, (str, os.PathLike)) else None
            yield _from_entry(recognizer, path, entry)
    look.kept.drop_unused()


def share(
    recognizer: Recognizer,
    sources: Iterable[photos.PhotoLike | photos.PhotoSource],
    *,
    which: Literal["main", "all"] = "main",
    min_confidence: float = 0.0,
    kept: str | os.PathLike[str],
) -> None:
    """Lets each of several processes look at its share of photos; one process does nothing.

    `recognize` then finds it in `kept`, a folder that all see, with the same arguments.

    Args:
        recognizer: from `load_recognizer`.
        sources: photos, the same in all processes.
        which: as of `recognize`.
        min_confidence: likewise.
        kept: likewise.
    """
    if distributed.process_count() > 1:
        look = _Look.of(recognizer, which=which, min_confidence=min_confidence, kept=kept)
        groups = list(photos.in_groups(sources, most=_GROUP, photo_fn=lambda source: source))

        def look_at_all(own: list[list[photos.PhotoLike | photos.PhotoSource]]) -> None:
            for group in progress.track(own, description="groups of photos"):
                look.at(group)

        distributed.split_work(groups, look_at_all)


class _Look(NamedTuple):
    """How photos are looked at, group by group, and where what is found is kept."""

    recognizer: Recognizer
    which: str
    min_confidence: float
    detect_fn: Callable[[np.ndarray], detect.Faces]
    kept: workdir.Kept
    settings: list[object]

    @classmethod
    def of(
        cls,
        recognizer: Recognizer,
        *,
        which: str,
        min_confidence: float,
        kept: str | os.PathLike[str] | None,
    ) -> "_Look":
        """By the recognizer's MTCNN."""
        store = workdir.Kept(kept)
        settings: list[object] = [which, min_confidence, recognizer.options, backend.most_pixels()]
        if store:
            networks = zip(mtcnn.Variables._fields, recognizer.detector, strict=False)
            settings += [registry.fingerprint(dict(networks))]
            settings += [tag(recognizer, name) for name in recognizer.extractors]
        find_fn = functools.partial(
            detect.detect_faces, recognizer.detector, options=recognizer.options
        )
        return cls(recognizer, which, min_confidence, find_fn, store, settings)

    def at(
        self, group: Sequence[photos.PhotoLike | photos.PhotoSource]
    ) -> Sequence[dict[str, files.Json]]:
        """What is found in photos, for each as `_from_entry` takes it."""
        digests = [photos.digest_of(source) for source in group] if self.kept else []
        find_fn = functools.partial(
            _find, self.detect_fn, which=self.which, min_confidence=self.min_confidence
        )
        return self.kept.load_or_compute(
            [self.settings, digests],
            functools.partial(_recognize_group, self.recognizer, group, find_fn=find_fn),
        )


def _recognize_group(
    recognizer: Recognizer,
    group: Sequence[photos.PhotoLike | photos.PhotoSource],
    *,
    find_fn: Callable[..., tuple[np.ndarray, detect.Faces, str, str | None]],
) -> list[dict[str, object]]:
    """What `_find` and the extractors find in photos, as `Recognized` without the path."""
    found = list(
        parallel.thread_stream(
            find_fn,
            group,
            width=detect.PHOTOS_AT_ONCE,
            weight_fn=photos.num_pixels,
            limit=detect.PIXELS_AT_ONCE,
        )
    )
    pairs = [(pixels, landmarks) for pixels, faces, _, _ in found for landmarks in faces.landmarks]
    embeddings = {
        name: embed.embed_faces(extractor, recognizer.variables[name], pairs)
        for name, extractor in recognizer.extractors.items()
    }
    entries, at = [], 0
    for _, faces, digest, problem in found:
        rows = slice(at, at + len(faces.boxes))
        at = rows.stop
        own = {name: vectors[rows] for name, vectors in embeddings.items()}
        entries.append({"problem": problem, "digest": digest, "faces": faces, "embeddings": own})
    return entries


def _from_entry(
    recognizer: Recognizer, path: pathlib.Path | None, entry: dict[str, files.Json]
) -> Recognized:
    """What `_recognize_group` found in a photo, from JSON."""
    if entry["problem"] == NO_FACE:  # One for all such photos: a folder may have many.
        return Recognized(path, NO_FACE, entry["digest"], *_nothing(tuple(_sizes(recognizer))))
    faces = {name: np.array(rows, np.float32) for name, rows in entry["faces"].items()}
    return Recognized(
        path,
        entry["problem"],
        entry["digest"],
        detect.Faces(
            faces["boxes"].reshape(-1, 4),
            faces["confidences"],
            faces["landmarks"].reshape(-1, 5, 2),
        ),
        {
            name: np.array(entry["embeddings"][name], np.float32).reshape(
                -1, extractor.embedding_size
            )
            for name, extractor in recognizer.extractors.items()
        },
    )


def _sizes(recognizer: Recognizer) -> Iterator[tuple[str, int]]:
    return ((name, each.embedding_size) for name, each in recognizer.extractors.items())


@functools.cache
def _nothing(sizes: tuple[tuple[str, int], ...]) -> tuple[detect.Faces, dict[str, np.ndarray]]:
    """No faces, and no embeddings of them by extractors of these names and sizes; read-only."""
    vectors = {name: np.zeros((0, size), np.float32) for name, size in sizes}
    for array in (*(faces := detect.no_faces()), *vectors.values()):
        array.flags.writeable = False
    return faces, vectors


class _Enrollee(NamedTuple):
    """A photo to enroll: its name, whose it is, the photo in any form."""

    name: str
    identity: str
    photo: photos.PhotoLike | photos.PhotoSource


def _enrollees(
    gallery: GalleryLike,
) -> tuple[list[_Enrollee], list[identities.Omission]]:
    """The photos of a gallery, and what cannot be enrolled for its name."""
    problems: list[identities.Omission] = []
    if isinstance(gallery, Mapping):
        items = [
            _Enrollee(f"{person}/{source.name}", person, source)
            for person, some in gallery.items()
            for source in _told_apart(photos.list_sources(some))
        ]
        counts = collections.Counter(item.name for item in items)
        if twice := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"several photos are called {twice[0]}: each needs a name of its own")
    else:
        if not isinstance(gallery, (identities.Listing, str, os.PathLike)):
            kind = type(gallery).__name__
            raise TypeError(f"a gallery is a folder, a listing or photos by person, not {kind}")
        if not isinstance(gallery, identities.Listing):
            gallery = identities.list_tree(gallery)
        problems += gallery.problems
        items = [_Enrollee(item.sample_id, item.identity, item.path) for item in gallery.samples]
    reasons = {item.name: reason for item in items if (reason := _name_problem(item))}
    problems += [identities.Omission(name, reason) for name, reason in reasons.items()]
    return [item for item in items if item.name not in reasons], problems


def _told_apart(sources: Sequence[photos.PhotoSource]) -> list[photos.PhotoSource]:
    """The photos, those without file and name called by their pixels, and each of these once."""
    named, unnamed = [], {}
    for source in sources:
        photo = source.photo
        if isinstance(photo, (str, os.PathLike)) or getattr(photo, "name", ""):
            named.append(source)
            continue
        name = source.name
        with contextlib.suppress(photos.PhotoError):
            digest = photos.digest_of_pixels(photos.as_photo(photo).pixels)
            name = f"photo_{digest[:16]}"
        unnamed[name] = source._replace(name=name)
    return [*named, *unnamed.values()]


def _missing(
    items: Sequence[_Enrollee],
    enrolled: Mapping[str, tuple[str, str, str]],
    made: str,
    *,
    by_person: bool,
) -> tuple[list[_Enrollee], int]:
    """What is not enrolled as it is now, and how many photos repeat another one of the person.

    Args:
        items: of a gallery.
        enrolled: digest, identity and `made` of a database's photos, by name.
        made: as of `_made`.
        by_person: whether photos of a person come one after the other.
    """
    todo, known, repeats = [], set(), 0
    for item in items:
        digest = photos.digest_of(item.photo)
        if digest and (item.identity, digest) in known:
            repeats += 1
            continue
        known.add((item.identity, digest))
        if enrolled.get(item.name) != (digest, item.identity, made):
            todo.append(item)
    if by_person:
        todo.sort(key=lambda item: item.identity)
    return todo, repeats


def _name_problem(item: _Enrollee) -> str | None:
    if item.identity == match.UNKNOWN:
        return f"nobody may be called {match.UNKNOWN!r}: it says that none matched"
    try:
        item.name.encode("utf-8")
    except UnicodeEncodeError:
        return "the name is not Unicode"
    return None


def _transactions(
    pairs: Iterable[tuple[_Enrollee, Recognized]], *, by_person: bool
) -> Iterator[list[tuple[_Enrollee, Recognized]]]:
    """Photos that are written at once: a person's, or any 64."""
    if by_person:
        for _, group in itertools.groupby(pairs, key=lambda pair: pair[0].identity):
            yield list(group)
        return
    pairs = iter(pairs)
    while group := list(itertools.islice(pairs, _GROUP)):
        yield group


def _forget(
    database: databases.Database, group: Sequence[tuple[_Enrollee, Recognized]]
) -> list[identities.Omission]:
    """Deletes a person none of whose photos shows a face; what is left out because it is not."""
    person = group[0][0].identity
    if not all(seen.digest for _, seen in group):
        reason = "is not replaced: some photos could not be read, the others show no face"
        return [identities.Omission(person, reason)]
    rows = database.images().items()
    database.delete_images(image for image, (_, identity, _) in rows if identity == person)
    return []


def _made(recognizer: Recognizer, name: str, min_confidence: float) -> str:
    """What decides a row of the database beside the photo and the extractor's weights."""
    extractor = recognizer.extractors[name]
    fields = {
        "detector": {"name": "mtcnn", **dataclasses.asdict(recognizer.options)},
        "min_confidence": min_confidence,
        "chip": [extractor.input_px, extractor.template, extractor.stretch],
    }
    return json.dumps(fields, sort_keys=True)


def _entries(
    pairs: Sequence[tuple[_Enrollee, Recognized]], name: str, made: str
) -> databases.Entries:
    return databases.Entries(
        identities=[item.identity for item, _ in pairs],
        images=[item.name for item, _ in pairs],
        digests=[seen.digest for _, seen in pairs],
        faces=[0] * len(pairs),
        boxes=np.stack([seen.faces.boxes[0] for _, seen in pairs]),
        vectors=np.stack([seen.embeddings[name][0] for _, seen in pairs]),
        made=[made] * len(pairs),
    )


def _matches(
    faces: Sequence[tuple[str, int, np.ndarray]], hits: databases.Hits, threshold: float
) -> tuple[tuple[Match, ...], tuple[str, ...]]:
    """The hits of each query face (photo, number, box), and the decision on it."""
    matches, decisions = [], []
    for at, (name, number, query_box) in enumerate(faces):
        is_known = hits.distances[at, 0] < threshold
        decision = hits.identities[at][0] if is_known else match.UNKNOWN
        decisions.append(decision)
        for rank in range(hits.distances.shape[1]):
            distance = float(hits.distances[at, rank])
            matches.append(
                Match(
                    *(name, number, query_box, rank + 1),
                    *(hits.identities[at][rank], hits.images[at][rank], hits.boxes[at, rank]),
                    *(distance, threshold, distance < threshold, decision),
                )
            )
    return tuple(matches), tuple(decisions)


def _spoken(box: np.ndarray) -> str:
    return " ".join(f"{value:.1f}" for value in box)


def _find(
    detect_fn: Callable[[np.ndarray], detect.Faces],
    source: photos.PhotoLike | photos.PhotoSource,
    which: str,
    min_confidence: float,
) -> tuple[np.ndarray, detect.Faces, str, str | None]:
    """Pixels (none of an unreadable photo), faces, digest and problem of one photo."""
    try:
        pixels, digest = _read(source)
    except photos.PhotoError as error:
        return np.zeros((0, 0, 3), np.uint8), detect.no_faces(), "", str(error)
    faces = detect_fn(pixels)
    spread = np.ptp(faces.landmarks, axis=1).max(axis=1, initial=0.0)
    # Landmarks in one spot cannot be aligned.
    faces = detect.select_faces(faces, (faces.confidences >= min_confidence) & (spread >= 1.0))
    if which == "main":
        faces = detect.main_face(faces, pixels.shape)
    if not len(faces.boxes):
        return np.zeros((0, 0, 3), np.uint8), faces, digest, NO_FACE
    return pixels, faces, digest, None


def _read(source: photos.PhotoLike | photos.PhotoSource) -> tuple[np.ndarray, str]:
    """Pixels and digest of a photo."""
    if isinstance(source, photos.PhotoSource):
        is_file = source.problem is None and isinstance(source.photo, (str, os.PathLike))
        source = source.photo if is_file else photos.read_source(source)
    if isinstance(source, (str, os.PathLike)):
        data = photos.read_photo_bytes(source)
        return photos.decode_photo(data).pixels, hashlib.sha256(data).hexdigest()
    pixels = photos.as_photo(source).pixels
    return pixels, photos.digest_of(pixels)
