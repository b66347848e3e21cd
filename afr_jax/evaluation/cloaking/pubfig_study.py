"""Config and run of the study that puts a cloaked photo into a folder and matches a clean one."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from afr_jax.core import files, options, program, progress, workdir
from afr_jax.data import identities
from afr_jax.evaluation.cloaking import (
    cells,
    cloak_files,
    embeddings,
    folder_matching,
    people,
    plots,
    published,
    table,
)
from afr_jax.evaluation.report import match_page
from afr_jax.methods.cloaking import budget, fawkes, photo_cloaks
from afr_jax.models.extractors import registry
from afr_jax.recognition import pipeline

# Photos whose embeddings are kept together: what a killed run has to embed again at most.
_GROUP = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class PubFigConfig(options.Config):
    """Puts one cloaked photo into a person's folder: who still matches it with the person?

        python -m experiments.pubfig_study --data=people --people=3 --workdir=out/pubfig

    --data has a folder of photos for each person, PubFig or LFW say. --people are drawn by --seed,
    who have two photos or more. One photo of each is cloaked and lies in the person's folder beside
    up to --own_photos clean ones; another clean photo is the query. Every extractor looks for it
    among all photos of --data (up to --gallery_photos of each person), once with the cloaked photo
    in the folder and once with its original.

    --cloaked takes cloaked photos that are there already, as `experiments.cloak --images=people`
    writes them: PERSON/STEM_cloaked.png is the cloaked copy of the photo PERSON/STEM of --data.
    Without it the photos are cloaked here, against --surrogates within the budget of --mode.

    --extractors=all is every one whose weights are there: installed, in the cache
    (`experiments.fetch_weights` lists them) or given by --weights. Answered for each person and
    extractor: rank and distance of the cloaked photo, and of its original; whether they verify at
    the extractor's threshold; who is nearest; and whether the photo would give the person away if
    it lay in the folder alone.

    Writes `report.html` (the nearest photos side by side), `result.json`,
    `embeddings/PERSON/EXTRACTOR.png` (principal components, clean and cloaked) and
    `matches/PERSON/EXTRACTOR.csv`: all photos from the nearest on, with the columns of
    `DeepFace.find`, whose own answer are the lines with a distance below the threshold. There
    `identity` is the photo's path below --data, and `hash` the SHA-256 of its file.

    Expected on two CPU cores: half a second a photo with four extractors; --gallery_people limits
    it. What a killed run has made is not made again; extractors may be added later. Exit code 3:
    some photos cannot be read, or a person's photo shows no face. --toy: two synthetic people.
    """

    data: str | None = options.option(None, "folder with a folder of photos for each person")
    people: int = options.option(3, "people with a cloaked photo", at_least=1)
    cloaked: str | None = options.option(None, "folder of cloaked photos; default: made here")
    extractors: tuple[str, ...] = options.option(
        (pipeline.ALL,),
        f"of {', '.join(registry.EXTRACTORS)}, folders of trained ones, or all",
        resumable=True,
    )
    weights: tuple[str, ...] = options.option((), "weight files: NAME=FILE", resumable=True)
    surrogates: tuple[str, ...] = options.option(
        cloak_files.DEFAULT_SURROGATES, "extractors to cloak against"
    )
    mode: budget.Mode = options.option("mid", "budget of the cloaks in what people see")
    num_steps: int | None = options.option(
        None, "gradient steps of a cloak; default: the method's own", at_least=0
    )
    own_photos: int = options.option(
        4, "clean photos beside the cloaked one in the person's folder, at most", at_least=0
    )
    gallery_people: int | None = options.option(
        None, "other people to match against; default: everybody", at_least=1
    )
    gallery_photos: int = options.option(5, "photos of each of them, at most", at_least=1)
    top_k: int = options.option(5, "nearest photos on the page", at_least=1, resumable=True)
    workdir: str | None = options.option("out/pubfig", options.WORKDIR_HELP)
    is_toy: bool = False

    def toy(self) -> "PubFigConfig":
        """Two people, two steps, dlib; without --data synthetic people."""
        small = {
            **{"people": 2, "num_steps": 2, "own_photos": 1, "gallery_photos": 2},
            **{"extractors": ("dlib",), "surrogates": ("dlib",)},
        }
        return dataclasses.replace(options.fill_defaults(self, small), is_toy=True)

    @property
    def method(self) -> fawkes.FawkesConfig:
        """The cloak with the budget of the mode."""
        config = fawkes.FawkesConfig(mode=self.mode)
        if self.num_steps is None:
            return config
        return dataclasses.replace(config, num_steps=self.num_steps)


def run(config: PubFigConfig) -> options.Outcome:
    """Cloaks, matches and reports.

    Raises:
        options.UsageError: people, photos, extractors or weights that are not to be had, or a work
            directory of another run.
    """
    if not config.data and not config.is_toy:
        raise options.UsageError(
            "--data is needed: a folder with a folder of photos for each person"
        )
    names, surrogates = _names(config)
    work = workdir.open_workdir(config.workdir, config)
    with options.usage("--data, --cloaked"):
        split, given, problems = _draw(config, work)
    with options.usage("--extractors, --weights"):
        asked = list(dict.fromkeys([*names, *surrogates]))
        everything = pipeline.load_recognizer(
            *asked, weights=pipeline.parse_weights(config.weights, asked)
        )
        for name in names:
            _ = everything.extractors[name].threshold
        embeddings.check_weights(work.path / "extractors.json", everything)
    if given:
        cloaks: list[pathlib.Path | None] = [given[p.identity].path for p in split.protected]
    else:
        cloaks, failed = _cloak(config, split, everything, surrogates, work)
        problems += failed
    cases = _cases(split, cloaks)
    _check_photos(work, cases)
    recognizer = everything._replace(extractors={n: everything.extractors[n] for n in names})
    paths = [sample.path for sample in (*split.published, *split.probes, *split.gallery)]
    seen = _embed(recognizer, [*paths, *filter(None, cloaks)], work.path / "photos")
    answers = []
    for case in cases:
        problem = _problem(case, next(iter(seen.values())))
        if problem is not None:
            problems.append(problem)
            continue
        for name, extractor in recognizer.extractors.items():
            found, lines = folder_matching.answer(case, seen[name], extractor, top_k=config.top_k)
            place = work.path / "matches" / case.person / f"{cells.file_name(name)}.csv"
            place.parent.mkdir(parents=True, exist_ok=True)
            table.write_columns(place, folder_matching.FIND_COLUMNS, lines)
            made_against = None if given else name in surrogates
            answers.append(
                {"extractor": cells.file_name(name), "made_against": made_against} | found
            )
            drawn = work.path / "embeddings" / case.person / f"{cells.file_name(name)}.png"
            _plot(drawn, case, cells.file_name(name), seen[name])
    result = {
        **program.provenance("experiments.pubfig_study", config=config),
        "people": [person.identity for person in split.protected],
        "people_matched": len(split.names),
        "photos_matched": len(split.published) + len(split.gallery),
        "surrogates": list(surrogates),
        "mode": None if given else config.mode,
        "extractors": folder_matching.count(answers),
        "not_handled": problems,
    }
    full = {**result, "top_k": config.top_k, "answers": answers}
    work.write_result(full)
    match_page.write_match_report(
        work.path / "report.html", files.to_jsonable(full), work.path / "embeddings"
    )
    return options.Outcome({**result, "report": "report.html"}, complete=not problems)


def _names(config: PubFigConfig) -> tuple[list[str], tuple[str, ...]]:
    """Extractors that match, and those to cloak against.

    Raises:
        options.UsageError: none, or two that cannot be told apart.
    """
    given = {value.partition("=")[0] for value in config.weights if "=" in value}
    there = {*registry.present(), *given}
    names = []
    for name in config.extractors:
        names += (
            [each for each in registry.EXTRACTORS if each in there] if name == "all" else [name]
        )
    names = list(dict.fromkeys(names))
    if not names:
        raise options.UsageError("--extractors: there is no extractor with weights")
    if len({cells.file_name(name) for name in names}) < len(names):
        raise options.UsageError(f"each of {', '.join(names)} must have one name of its own")
    with options.usage(""):
        for name in names:
            pipeline.find_extractor(name)
    if not config.surrogates and config.cloaked is None:
        raise options.UsageError("--surrogates must name an extractor")
    return names, () if config.cloaked else config.surrogates


def _draw(
    config: PubFigConfig, work: workdir.Workdir
) -> tuple[people.Split, dict[str, identities.Sample], list[dict[str, str]]]:
    """Who is who, the given cloaked photos by person, and what cannot be used.

    Raises:
        FileNotFoundError, ValueError: there are not enough people.
    """
    root = pathlib.Path(config.data) if config.data else work.path / "synthetic"
    if not config.data:
        people.write_synthetic(root, num_people=4, num_photos=3)
    listing = identities.list_tree(root.expanduser())
    given: dict[str, identities.Sample] = {}
    first = None
    if config.cloaked:
        there = identities.list_copies(config.cloaked)
        first, useless = {}, {sample.sample_id for sample in there.samples.values()}
        for original in listing.samples:
            copy = there.of(original.sample_id)
            if copy is not None:
                useless.discard(copy.sample_id)
                if original.identity not in first:
                    first[original.identity], given[original.identity] = original.sample_id, copy
        reason = "its original is not in --data"
        lost = [identities.Omission(name, reason) for name in sorted(useless)]
        lost = [*there.problems, *lost]
        listing = dataclasses.replace(listing, problems=(*listing.problems, *lost))
    split, listing = people.choose_readable(
        listing,
        first=first,
        num_people=config.people,
        num_published=1 + config.own_photos,
        num_probes=1,
        num_gallery_people=config.gallery_people,
        num_gallery_photos=config.gallery_photos,
        seed=config.seed,
    )
    return split, given, [problem.as_result() for problem in listing.problems]


def _cloak(
    config: PubFigConfig,
    split: people.Split,
    recognizer: pipeline.Recognizer,
    surrogates: Sequence[str],
    work: workdir.Workdir,
) -> tuple[list[pathlib.Path | None], list[dict[str, str]]]:
    """Paths of the cloaked photos, None where one could not be cloaked, and why."""
    against = photo_cloaks.Surrogates(
        tuple(recognizer.extractors[name] for name in surrogates),
        tuple(recognizer.variables[name] for name in surrogates),
    )

    def protect(faces: Sequence[photo_cloaks.PhotoFaces]) -> Sequence[published.OneProtected]:
        key = jax.random.key(config.seed)
        return photo_cloaks.cloak_photos(
            key, against, faces, config=config.method, detector=recognizer.detector
        )

    samples = [person.published[0] for person in split.protected]
    paths, records = published.write_photos(
        work.path / "cloaked", samples, recognizer.detector, protect
    )
    problems = [
        {"image": sample.sample_id, "reason": record["problem"]}
        for sample, record in zip(samples, records, strict=True)
        if record["problem"]
    ]
    cloaks = [
        None if record["problem"] else path for path, record in zip(paths, records, strict=True)
    ]
    return cloaks, problems


def _cases(
    split: people.Split, cloaks: Sequence[pathlib.Path | None]
) -> list[folder_matching.Case]:
    """A case for each person with a cloaked photo; rows are those of the photos embedded."""
    samples = [*split.published, *split.probes, *split.gallery]
    photos = [
        folder_matching.FolderPhoto(s.sample_id, s.identity, s.path, _digest(s.path))
        for s in samples
    ]
    num_published, num_probes = len(split.published), len(split.probes)
    rows = np.array([*range(num_published), *range(num_published + num_probes, len(samples))])
    cases, at, cloaked_row = [], 0, len(samples)
    for number, (person, cloak) in enumerate(zip(split.protected, cloaks, strict=True)):
        if cloak is not None:
            name = pathlib.PurePosixPath(photos[at].name)
            name = name.with_name(f"{name.stem}{identities.CLOAKED}{cloak.suffix}")
            folder = [photos[row] for row in rows]
            folder[at] = folder_matching.FolderPhoto(
                str(name), person.identity, cloak, _digest(cloak)
            )
            own_rows = rows.copy()
            own_rows[at] = cloaked_row
            query_row = num_published + number
            cases.append(
                folder_matching.Case(
                    *(person.identity, photos[query_row], photos[at], folder, at),
                    *(own_rows, query_row, at),
                )
            )
            cloaked_row += 1
        at += len(person.published)
    return cases


def _check_photos(work: workdir.Workdir, cases: Sequence[folder_matching.Case]) -> None:
    """Refuses other photos than those that the run's files were made with.

    Raises:
        options.UsageError: a photo has changed, or another one was drawn.
    """
    now = {p.name: p.digest for case in cases for p in (*case.photos, case.query, case.original)}
    if changed := workdir.note(work.path / "drawn.json", now):
        raise options.UsageError(f"{changed[0]} has changed since {work.path} was made")


def _embed(
    recognizer: pipeline.Recognizer, paths: Sequence[pathlib.Path], folder: pathlib.Path
) -> dict[str, embeddings.Embeddings]:
    """What every extractor sees of some photos, which are always the same."""
    parts: list[dict[str, embeddings.Embeddings]] = []
    starts = range(0, len(paths), _GROUP)
    with progress.counter(len(paths), description="photos") as advance:
        for start in starts:
            part = paths[start : start + _GROUP]
            parts.append(embeddings.embed_photos(recognizer, part, folder / f"{start:06d}"))
            advance(len(part))
    return {
        name: embeddings.Embeddings(
            *(np.concatenate(field) for field in zip(*(part[name] for part in parts), strict=True))
        )
        for name in recognizer.extractors
    }


def _problem(case: folder_matching.Case, seen: embeddings.Embeddings) -> dict[str, str] | None:
    """Why nothing can be said of a person, or None."""
    for photo, row in ((case.query, case.query_row), (case.original, case.original_row)):
        if not seen.found[row]:
            return {"image": photo.name, "reason": pipeline.NO_FACE}
    return None


def _plot(
    path: pathlib.Path,
    case: folder_matching.Case,
    title: str,
    seen: embeddings.Embeddings,
    *,
    num_others: int = 4,
) -> None:
    """Principal components of the person's photos and of the people with the most others."""
    owners = case.owners
    others, sizes = np.unique(owners[owners != case.person], return_counts=True)
    shown = others[np.argsort(-sizes, kind="stable")][:num_others]
    own = np.flatnonzero(owners == case.person)

    def vectors(rows: np.ndarray) -> np.ndarray:
        part = seen.take(rows)
        return part.vectors[part.found]

    cloud = plots.Cloud(
        title,
        vectors(np.append(case.rows[own[own != case.at]], case.original_row)),
        vectors(case.rows[[case.at]]),
        vectors(np.array([case.query_row])),
        {str(other): vectors(case.rows[owners == other]) for other in shown},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.plot_embeddings(path, [cloud])


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
