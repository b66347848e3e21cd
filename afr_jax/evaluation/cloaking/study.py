"""Config and run of the evaluation of cloaks: surrogates x trackers x countermeasures."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from afr_jax.core import distributed, files, options, parallel, program, progress, workdir
from afr_jax.data import identities, photos
from afr_jax.evaluation import fawkes_package, reference
from afr_jax.evaluation.attackers import tracker_names, tracker_training
from afr_jax.evaluation.cloaking import (
    cells,
    embeddings,
    people,
    plots,
    published,
    scores,
    table,
)
from afr_jax.models.extractors import registry
from afr_jax.recognition import pipeline

_NOTES = {
    "noise": "Gaussian, the largest that meets the budget",
    "fawkes_pypi": "the optimiser of PyPI fawkes with dlib's net, for its own extractors are not "
    "to be had; the change of its chips is brought back to the photo and fitted to the budget",
    "linear_head": "one head for all protected people, whose published photos are as the cell has "
    "them",
    "end_to_end": "one network for the people asked about; everybody else is enrolled clean",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FawkesEvaluationConfig(options.Config):
    """Measures what cloaks are worth: surrogates x trackers x countermeasures, in one table.

        python -m experiments.fawkes_evaluation --data=people --people=10 --workdir=out/evaluation

    --people of --data are protected, drawn by --seed (with --drawn_before nobody whom those runs
    protected): --cloaked_photos of each are published and enrolled by the tracker, --probes others,
    always clean, are what the tracker is asked about. Others are enrolled clean. One person is
    protected at a time, the other protected people are clean.

    A cell is a method, a set of surrogates and a budget. --methods: `none`, `noise`
    (Gaussian, within the budget), `fawkes` (ours), `lowkey`, `fawkes_pypi` (the optimizer of PyPI
    `fawkes` with dlib's net); `lowkey@0.007` is made at that budget alone. --cloaked adds others'
    methods: folders with photos of --data as another program protected them, PERSON/STEM.png or
    PERSON/STEM_cloaked.png, which are taken as they are; `NAME@0.007` says their budget, for plots.
    --surrogates: sets of extractors joined by `+`; `all` is every tracker of the registry but for
    judges (`mobilefacenet_192`), `leave_one_out` for each of them all others. --trackers: names of
    extractors, or folders of trained and hardened ones (adaptive trackers); `sface@yunet` aligns
    faces by the second detector, `sface@mirror` also embeds their mirror images. For each: the
    nearest enrolled photo, with and without the extractor's threshold; a vote of the 5 nearest; a
    linear head; with --end_to_end=N the whole network, trained for the first N people.

    Published photos go through each of --countermeasures before the tracker sees them. --leaks are
    shares of the published photos that the tracker has clean, spread evenly: of five photos a
    person 0.1 is one photo of every other person. --mixes are numbers of a person's photos that the
    tracker has in place of all: 10 for ten published ones, 10+5 for five clean ones beside them.
    Scored: the share of probes that are not identified as the person, with 95 % intervals
    (bootstrap over people), the rank of the person, and distances.

    Writes `result.json`, `table.csv`, `budgets.png` and `frontier.png` (protection against DSSIM,
    and against SSIMULACRA2), with --mixes `mixes.png`, `embeddings.png`, `distances.png` and for
    each cell `cells/<name>/` with its photos, scores and `matches.csv` (the nearest photo of each
    probe, as `DeepFace.find` lists them). What a killed run has written is not made again; methods,
    surrogates, budgets (where --num_steps is one number), trackers, countermeasures, leaks and
    mixes may be added later. Exit code 3: some photos have no face or cannot be read. Expected on
    LFW without any cloak: 0 to 2 % of the probes missed. --toy: two synthetic people, dlib alone.
    """

    shares_work = True

    data: str | None = options.option(None, "folder with a folder of photos for each person")
    people: int = options.option(10, "people to protect", at_least=1)
    drawn_before: tuple[str, ...] = options.option(
        (), "result files of earlier runs, whose protected people are not drawn again"
    )
    cloaked_photos: int = options.option(5, "published photos of each", at_least=1)
    probes: int = options.option(5, "clean photos of each that are asked about", at_least=1)
    gallery_people: int = options.option(190, "other people, enrolled clean", at_least=1)
    gallery_photos: int = options.option(5, "photos of each of them, at most", at_least=1)
    methods: tuple[str, ...] = options.option(
        ("none", "noise", "fawkes"), f"of {', '.join(cells.METHODS)}", resumable=True
    )
    cloaked: tuple[str, ...] = options.option(
        (),
        "photos that were protected elsewhere: NAME=FOLDER or NAME@BUDGET=FOLDER",
        resumable=True,
    )
    surrogates: tuple[str, ...] = options.option(
        ("leave_one_out", "all"), "sets of extractors: leave_one_out, all, or A+B", resumable=True
    )
    trackers: tuple[str, ...] = options.option(
        ("dlib", "sface", "facenet_casia"),
        f"of {', '.join(registry.EXTRACTORS)}, or folders of trained or hardened ones; "
        "NAME@yunet aligns by the second detector, NAME@mirror adds the mirror image",
        resumable=True,
    )
    weights: tuple[str, ...] = options.option((), "weight files: NAME=FILE", resumable=True)
    budgets: tuple[str, ...] = options.option(
        ("low", "mid", "high"), "modes of experiments.cloak, or DSSIM of a face", resumable=True
    )
    countermeasures: tuple[str, ...] = options.option(
        embeddings.COUNTERMEASURES,
        "edits of published photos",
        choices=embeddings.COUNTERMEASURES,
        resumable=True,
    )
    leaks: tuple[float, ...] = options.option(
        (0.0, 0.1, 0.25, 0.5),
        "shares of published photos that the tracker has clean",
        at_least=0,
        at_most=1,
        resumable=True,
    )
    mixes: tuple[str, ...] = options.option(
        (), "cloaked+clean photos of a person that the tracker has: 1,5,10+5", resumable=True
    )
    num_steps: tuple[int, ...] = options.option(
        (),
        "gradient steps of a cloak: one number, or one for each of --budgets; default: each "
        "method's own",
        at_least=0,
    )
    end_to_end: int = options.option(
        0, "people for trackers that train everything", at_least=0, resumable=True
    )
    epochs: int = options.option(3, "of their training", at_least=0, resumable=True)
    references: reference.ReferenceOptions = options.group(reference.ReferenceOptions)
    workdir: str | None = options.option("out/evaluation", options.WORKDIR_HELP)
    is_toy: bool = False

    def __post_init__(self) -> None:
        """Checks ranges and choices, and what must go together.

        Raises:
            ValueError: an option is out of its range.
        """
        options.check(self)
        for name in ("methods", "trackers", "budgets", "countermeasures"):
            if not getattr(self, name):
                raise ValueError(f"{name} is needed")
        _ = self.amounts
        for mix in self.exposed:
            if sum(mix) > self.cloaked_photos:
                raise ValueError(f"mixes={mix}: more than cloaked_photos={self.cloaked_photos}")
        if len(self.num_steps) not in (0, 1, len(self.budgets)):
            found = ",".join(map(str, self.num_steps))
            raise ValueError(
                f"num_steps={found}: a number, or one for each of {len(self.budgets)} budgets"
            )

    def toy(self) -> "FawkesEvaluationConfig":
        """Two people, two steps, dlib at one budget; without --data synthetic people."""
        small = {
            **{"people": 2, "cloaked_photos": 2, "probes": 2},
            **{"gallery_people": 3, "gallery_photos": 2, "num_steps": (2,)},
            **{"trackers": ("dlib",), "surrogates": ("all",), "budgets": ("0.007",)},
            **{"countermeasures": ("none", "jpeg75"), "leaks": (0.0, 0.5)},
        }
        return dataclasses.replace(options.fill_defaults(self, small), is_toy=True)

    @property
    def amounts(self) -> tuple[cells.Amount, ...]:
        """The budgets, as cells have them."""
        return tuple(map(cells.parse_budget, self.budgets))

    @property
    def exposed(self) -> tuple[scores.Mix, ...]:
        """The mixes as numbers, each once, in order."""
        return tuple(sorted(set(map(scores.parse_mix, self.mixes))))

    def steps_of(self, budget: cells.Amount | None) -> int | None:
        """Steps of a cloak of a budget; None for the method's own number.

        Raises:
            ValueError: there is a number for each of the budgets, and this is none of them.
        """
        if len(self.num_steps) < 2:
            return self.num_steps[0] if self.num_steps else None
        if budget not in self.amounts:
            raise ValueError(f"--num_steps has no number for a budget of {budget}")
        return self.num_steps[self.amounts.index(budget)]


def run(config: FawkesEvaluationConfig) -> options.Outcome:
    """Protects, publishes and scores the photos of every cell.

    Raises:
        options.UsageError: cells, people or extractors that are not to be had, or a work directory
            of another run.
    """
    config = _sorted(config)
    if not config.data and not config.is_toy:
        raise options.UsageError(
            "--data is needed: a folder with a folder of photos for each person"
        )
    try:
        bases = [tracker_names.parse(name).extractor for name in config.trackers]
        _ = [pipeline.find_extractor(name) for name in bases]
        sets = _surrogate_sets(config)
        folders = published.parse_given(config.cloaked)
        there = {cell: identities.list_copies(path) for cell, path in folders.items()}
        plan = [*cells.all_cells(config.methods, sets, config.amounts), *folders]
        names = [cell.name for cell in plan]
        if twice := sorted({cell.name for cell in folders if names.count(cell.name) > 1}):
            raise ValueError(f"--cloaked: there is another method called {', '.join(twice)}")
        steps = {cell: config.steps_of(cell.budget) for cell in plan if cell.surrogates}
    except (FileNotFoundError, ValueError) as error:
        raise options.UsageError(str(error)) from error
    needs_package = any(cell.method == "fawkes_pypi" for cell in plan)
    if needs_package and config.references.reference_python is None:
        raise options.UsageError("--methods=fawkes_pypi needs --reference_python")
    pipeline.warn_of_judges({name for cell in plan for name in cell.surrogates})
    names = list(dict.fromkeys([*bases, *(n for cell in plan for n in cell.surrogates)]))
    every = list(dict.fromkeys([*names, *config.trackers]))
    if len({cells.file_name(name) for name in every}) < len(every):
        raise options.UsageError(f"each of {', '.join(every)} must have one name of its own")
    drawn_before = _drawn_before(config)
    resolved = _resolved(config, sets, drawn_before)
    growing = [*options.resumable(FawkesEvaluationConfig), "surrogate_sets"]
    if len(config.num_steps) > 1:
        growing.remove("budgets")
    work = workdir.open_workdir(config.workdir, resolved, resumable=growing)
    split, problems = distributed.primary_first(lambda: _split(config, work, drawn_before))
    _check_drawn(work, split)
    try:
        everything = pipeline.load_recognizer(
            *names, weights=pipeline.parse_weights(config.weights, names)
        )
        trackers = tracker_names.add_trackers(everything, config.trackers)

        def prepare() -> table.Setup:
            embeddings.check_weights(work.path / "extractors.json", everything)
            return table.prepare(split, trackers, work.path / "clean")

        setup = distributed.primary_first(prepare)
    except (FileNotFoundError, ValueError) as error:
        raise options.UsageError(str(error)) from error
    problems += [lost.as_result() for found in there.values() for lost in found.problems]
    unseen = table.without_faces(setup)
    problems += [{"image": name, "reason": pipeline.NO_FACE} for name in unseen]
    rows, made = [], []
    package_of: contextlib.AbstractContextManager[reference.ReferenceProcess | None] = (
        config.references.start(fawkes_package.DRIVER)
        if needs_package
        else contextlib.nullcontext()
    )
    with package_of as package:

        def protect_fn(cell: cells.CloakCell) -> published.ProtectFn:
            if cell in folders:
                return published.given_fn(folders[cell], there[cell])
            return published.protect_fn(
                cell,
                everything,
                package=package,
                folder=work.path / "cells" / cell.name,
                num_steps=steps.get(cell),
                seed=config.seed,
            )

        def protect(cell: cells.CloakCell) -> _Protected:
            start = time.perf_counter()
            if cell in folders:
                published.check_given(work.path / "cells" / cell.name, there[cell], split.published)
            photos_of, records = _publish(cell, setup, work, protect_fn)
            middle = time.perf_counter()
            own_rows = _rows(config, setup, photos_of, records)
            seconds = {"photos": middle - start, "scores": time.perf_counter() - middle}
            return _Protected(photos_of, records, own_rows, seconds)

        distributed.split_work(plan, lambda own: [protect(cell) for cell in own])
        if not distributed.is_primary():
            return options.Outcome({})
        noted = {line.get("step") for line in work.read_metrics()}
        for number, cell in enumerate(progress.track(plan, description="cells")):
            with distributed.alone():
                done = protect(cell)
            made.append(done.photos_of)
            rows += done.rows
            for sample, record in zip(split.published, done.records, strict=False):
                if record["problem"]:
                    name = f"{cell.name}/{sample.sample_id}"
                    problems.append({"image": name, "reason": record["problem"]})
            # A run that goes on notes the others alone.
            if number not in noted:
                work.append_metrics({"step": number, "cell": cell.name, "seconds": done.seconds})
    table.write_table(work.path / "table.csv", rows)
    result = {
        **program.provenance("experiments.fawkes_evaluation", config=config),
        "config": resolved,
        "protected": [person.identity for person in split.protected],
        "people_enrolled": len(split.names),
        "photos_enrolled": len(split.gallery) + len(split.published),
        "notes": _NOTES,
        "not_handled": problems,
    }
    work.write_result({**result, "table": rows})
    with distributed.alone():
        _draw(setup, made, rows, work)
    keys = ("method", "surrogates", "budget", "extractor", "protection")
    plain = ("nearest", "none")
    shown = [
        row
        for row in rows
        if (row["tracker"], row["countermeasure"]) == plain and plots.is_whole(row)
    ]
    result["nearest"] = [{key: row[key] for key in keys} for row in shown]
    return options.Outcome(result, complete=not problems)


class _Protected(NamedTuple):
    """A cell that is done.

    Attributes:
        photos_of: the cell's photos.
        records: of them; none for clean ones.
        rows: of the table.
        seconds: that photos and scores took, in this run.
    """

    photos_of: table.CellPhotos
    records: list[published.PublishedRecord]
    rows: list[scores.Row]
    seconds: dict[str, float]


def _sorted(config: FawkesEvaluationConfig) -> FawkesEvaluationConfig:
    """The config with its budgets, their steps and its leaks in order."""
    amounts, steps = config.amounts, config.num_steps
    order = sorted(range(len(amounts)), key=lambda i: cells.limits_of(amounts[i]).dssim)
    if len(steps) > 1:
        steps = tuple(steps[i] for i in order)
    return dataclasses.replace(
        config,
        budgets=tuple(config.budgets[i] for i in order),
        leaks=tuple(sorted(config.leaks)),
        mixes=tuple(map(str, config.exposed)),
        num_steps=steps,
    )


def _surrogate_sets(config: FawkesEvaluationConfig) -> tuple[tuple[str, ...], ...]:
    """The sets of surrogates, none if no method asks for them.

    Raises:
        ValueError: a set that cannot be, or none where one is needed.
    """
    methods = {cells.parse_method(method)[0] for method in config.methods}
    if not methods & set(cells.CLOAKS):
        return ()
    sets = cells.surrogate_sets(config.surrogates, config.trackers)
    if not sets:
        raise ValueError("--surrogates is needed: sets of extractors")
    return sets


def _resolved(
    config: FawkesEvaluationConfig,
    sets: tuple[tuple[str, ...], ...],
    drawn_before: list[str],
) -> dict[str, files.Json]:
    """What decides the result, as config.json and result.json have it."""
    names = (
        *("data", "people", "cloaked_photos", "probes", "gallery_people", "gallery_photos"),
        *("methods", "cloaked", "trackers", "countermeasures", "leaks", "mixes", "num_steps"),
        *("end_to_end", "epochs", "seed"),
    )
    cloaks = cells.cloak_options()
    for each in cloaks.values() if config.num_steps else ():
        del each["num_steps"]
    return {
        **{name: getattr(config, name) for name in names},
        # Runs of before this was an option have none.
        **({"drawn_before": drawn_before} if drawn_before else {}),
        "budgets": config.amounts,
        "surrogate_sets": sets,
        "toy": config.is_toy,
        "cloaks": cloaks,
    }


def _drawn_before(config: FawkesEvaluationConfig) -> list[str]:
    """Names of the people whom earlier runs protected, sorted.

    Raises:
        options.UsageError: a file is not there, or no result of an evaluation.
    """
    found: set[str] = set()
    for path in config.drawn_before:
        try:
            names = files.parse_json(pathlib.Path(path).read_bytes())["protected"]
            if not all(isinstance(name, str) for name in names):
                raise TypeError
        except OSError as error:
            raise options.UsageError(f"--drawn_before: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise options.UsageError(
                f"--drawn_before: {path} is no result of an evaluation of cloaks"
            ) from error
        found.update(names)
    return sorted(found)


def _split(
    config: FawkesEvaluationConfig, work: workdir.Workdir, drawn_before: list[str]
) -> tuple[people.Split, list[dict[str, str]]]:
    """Who is who, without photos that cannot be read."""
    root = config.data
    if root is None:
        root = work.path / "synthetic"
        people.write_synthetic(root, num_people=6, num_photos=4)
    try:
        split, listing = people.choose_readable(
            identities.list_tree(root),
            num_people=config.people,
            num_published=config.cloaked_photos,
            num_probes=config.probes,
            num_gallery_people=config.gallery_people,
            num_gallery_photos=config.gallery_photos,
            seed=config.seed,
            drawn_before=drawn_before,
        )
    except (FileNotFoundError, ValueError) as error:
        raise options.UsageError(f"--data: {error}") from error
    return split, [problem.as_result() for problem in listing.problems]


def _publish(
    cell: cells.CloakCell,
    setup: table.Setup,
    work: workdir.Workdir,
    protect_fn: Callable[[cells.CloakCell], published.ProtectFn],
) -> tuple[table.CellPhotos, list[published.PublishedRecord]]:
    """A cell's photos with their records; none for clean ones."""
    folder = work.path / "cells" / cell.name
    if cell.method == "none":
        return table.CellPhotos(cell, [], folder), []
    folder.mkdir(parents=True, exist_ok=True)
    paths, records = published.write_photos(
        folder, setup.split.published, setup.recognizer.detector, protect_fn(cell)
    )
    return table.CellPhotos(cell, paths, folder), records


def _rows(
    config: FawkesEvaluationConfig,
    setup: table.Setup,
    photos_of: table.CellPhotos,
    records: Sequence[published.PublishedRecord],
) -> list[scores.Row]:
    """Rows of the table for a cell, and the file of its matches."""
    rows = table.score_cell(
        setup,
        photos_of,
        countermeasures=config.countermeasures,
        leaks=config.leaks,
        mixes=config.exposed,
    )
    for name in config.trackers if config.end_to_end else ():
        kept = f"end_to_end-{config.end_to_end}-{config.epochs}-{cells.file_name(name)}.json"

        def train(name: str = name) -> scores.Row:
            return table.end_to_end(
                setup,
                photos_of,
                name,
                num_people=config.end_to_end,
                options=tracker_training.TrainingOptions(num_epochs=config.epochs),
                seed=config.seed,
            )

        rows.append(workdir.load_or_compute(photos_of.folder / "scores" / kept, train))
    table.write_matches(photos_of.folder / "matches.csv", setup, photos_of)
    seen = _visibility(records)
    return [{**row, **seen} for row in rows]


def _visibility(records: Sequence[published.PublishedRecord]) -> dict[str, float | None]:
    """What is seen of a cell's photos: the mean DSSIM, the medians of the others."""
    done = [record for record in records if not record["problem"]]
    dssims = [record["dssim"] for record in done]
    found: dict[str, float | None] = {"mean_dssim": float(np.mean(dssims)) if dssims else None}
    for name in table.VISIBILITY:
        values = [record.get("visibility", {}).get(name) for record in done]
        known = [value for value in values if value is not None]
        found[name] = float(np.median(known)) if known else None
    return found


def _draw(
    setup: table.Setup,
    made: Sequence[table.CellPhotos],
    rows: Sequence[scores.Row],
    work: workdir.Workdir,
) -> None:
    plots.plot_budgets(work.path / "budgets.png", rows)
    plots.plot_budgets(work.path / "frontier.png", rows, axis="ssimulacra2")
    # Scores that were kept before there were mixes have none.
    if any(row.get("mix") for row in rows):
        plots.plot_mixes(work.path / "mixes.png", rows)
    by_cell = {photos_of.cell: photos_of for photos_of in made}
    shown = {
        name: (cell, table.cell_embeddings(setup, by_cell[cell], "none"))
        for name, cell in plots.shown_cells(list(by_cell), list(setup.clean)).items()
    }
    plots.draw(setup, shown, work.path)


def _check_drawn(work: workdir.Workdir, split: people.Split) -> None:
    """Refuses other photos than those that the run's embeddings and scores are of, row by row.

    Raises:
        options.UsageError: a photo has changed, or others were drawn.
    """
    drawn = (*split.published, *split.probes, *split.gallery)
    digests = parallel.thread_map(lambda sample: photos.digest_of(sample.path), drawn)
    names = [sample.sample_id for sample in drawn]
    if changed := workdir.note(work.path / "drawn.json", dict(zip(names, digests, strict=True))):
        raise options.UsageError(
            f"--data: since {work.path} was made photos have changed, or others are drawn "
            f"({changed[0]} and {len(changed) - 1} more); give another --workdir"
        )
