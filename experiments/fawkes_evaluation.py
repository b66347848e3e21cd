"""Measures what cloaks are worth: surrogates x trackers x countermeasures, in one table.

    python -m experiments.fawkes_evaluation --data=people --people=10 --workdir=out/evaluation

--data is a folder with a folder of photos for each person. --people of them are protected, drawn by
--seed: --cloaked_photos of each are published and enrolled by the tracker, --probes others, always
clean, are what the tracker is asked about. --gallery_people others are enrolled clean with up to
--gallery_photos each. One person is protected at a time, the other protected people are clean.

A cell is a method, a set of surrogates and a DSSIM budget. --methods: `none`, `noise` (Gaussian,
of equal DSSIM), `fawkes` (ours), `lowkey`, `fawkes_pypi` (the optimiser of PyPI `fawkes` with
dlib's net, for its own extractors cannot be downloaded; needs --peer_python, see
experiments/reference/README.md). `lowkey@0.007` is made at that budget alone.
--surrogates: sets of extractors joined by `+`; `all` is every tracker of the zoo, `leave_one_out`
for each of them all others. --trackers: extractors of the zoo or folders of trained and hardened
ones (adaptive trackers). For each: the nearest enrolled photo, with and without the extractor's
threshold; a vote of the 5 nearest; a linear head (one for all protected people, whose published
photos are as the cell has them); with --end_to_end=N the whole network, trained for the first N
people.

Published photos go through each of --countermeasures before the tracker detects, aligns and embeds
them. --leaks are shares of the published photos that the tracker has clean, spread evenly: of five
photos a person 0.1 is one photo of every other person. Scored: the share of probes that are not
identified as the person, with 95 % intervals (bootstrap over people), the rank of the person, and
distances.

Writes into --workdir `result.json`, `table.csv`, `budgets.png`, `embeddings.png`, `distances.png`
and for each cell `cells/<name>/` with its photos, `scores.json` and `matches.csv` (the nearest
photo of each probe by each extractor, as `DeepFace.find` lists them). What a killed run has
written is not made again; methods, surrogates, budgets (where --num_steps is one number), trackers,
countermeasures and leaks may be added later. Expected on LFW without any
cloak: 0 to 2 % of the probes missed. --toy: two made-up people, dlib alone.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

from afr_jax.core import files, program, progress, workdir
from afr_jax.data import identities
from afr_jax.evaluation import reference
from afr_jax.evaluation.attackers import tracker_training
from afr_jax.evaluation.cloaking import methods as cloaking_methods
from afr_jax.evaluation.cloaking import photos, pictures, plots
from afr_jax.evaluation.cloaking import split as cloaking_split
from afr_jax.evaluation.cloaking import study as cloaking_study
from afr_jax.evaluation.cloaking import views as cloaking_views
from afr_jax.models.extractors import registry
from afr_jax.recognition import pipeline

_DATA = flags.DEFINE_string("data", None, "folder with a folder of photos for each person")
_PEOPLE = flags.DEFINE_integer("people", 10, "people to protect", 1)
_CLOAKED = flags.DEFINE_integer("cloaked_photos", 5, "published photos of each", 1)
_PROBES = flags.DEFINE_integer("probes", 5, "clean photos of each that are asked about", 1)
_GALLERY_PEOPLE = flags.DEFINE_integer("gallery_people", 190, "other people, enrolled clean", 1)
_GALLERY_PHOTOS = flags.DEFINE_integer("gallery_photos", 5, "photos of each of them, at most", 1)
_METHODS = flags.DEFINE_list(
    "methods", ["none", "noise", "fawkes"], f"of {', '.join(cloaking_methods.METHODS)}"
)
_SURROGATES = flags.DEFINE_list(
    "surrogates", ["leave_one_out", "all"], "sets of extractors: leave_one_out, all, or A+B"
)
_TRACKERS = flags.DEFINE_list(
    "trackers",
    ["dlib", "facenet_casia", "mobilefacenet"],
    f"of {', '.join(registry.EXTRACTORS)}, or folders of trained or hardened ones",
)
_WEIGHTS = flags.DEFINE_list("weights", [], "weight files: NAME=FILE")
_BUDGETS = flags.DEFINE_list("budgets", ["0.004", "0.007", "0.012"], "DSSIM of a face")
_COUNTERMEASURES = flags.DEFINE_list(
    "countermeasures",
    list(cloaking_views.COUNTERMEASURES),
    f"of {', '.join(cloaking_views.COUNTERMEASURES)}",
)
_LEAKS = flags.DEFINE_list(
    "leaks", ["0", "0.1", "0.25", "0.5"], "shares of published photos that the tracker has clean"
)
_NUM_STEPS = flags.DEFINE_list(
    "num_steps",
    [],
    "gradient steps of a cloak: one number, or one for each of --budgets; default: each method's "
    "own",
)
_END_TO_END = flags.DEFINE_integer("end_to_end", 0, "people for trackers that train everything", 0)
_EPOCHS = flags.DEFINE_integer("epochs", 3, "of their training", 0)
_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python of an environment with `fawkes`")

_PEER_SCRIPT = pathlib.Path(__file__).parent / "reference" / "fawkes_driver.py"
_TOY = {
    **{"people": 2, "cloaked_photos": 2, "probes": 2, "gallery_people": 3, "gallery_photos": 2},
    **{"num_steps": ["2"], "trackers": ["dlib"], "surrogates": ["all"], "budgets": ["0.007"]},
    **{"countermeasures": ["none", "jpeg75"], "leaks": ["0", "0.5"]},
}
# What may be added to a run that is there.
_GROWING = ("methods", "surrogate_sets", "trackers", "budgets", "countermeasures", "leaks")
_GROWING += ("end_to_end", "epochs")
_NOTES = {
    "noise": "Gaussian, the largest that meets the DSSIM budget",
    "fawkes_pypi": "the optimiser of PyPI fawkes with dlib's net, for its own extractors are not "
    "to be had; the change of its chips is brought back to the photo and fitted to the budget",
    "linear_head": "one head for all protected people, whose published photos are as the cell has "
    "them",
    "end_to_end": "one network for the people asked about; everybody else is enrolled clean",
}


@dataclasses.dataclass(frozen=True)
class _Options:
    """What decides the result, checked; names as of the flags."""

    data: str | None
    people: int
    cloaked_photos: int
    probes: int
    gallery_people: int
    gallery_photos: int
    methods: tuple[str, ...]
    surrogate_sets: tuple[tuple[str, ...], ...]
    trackers: tuple[str, ...]
    budgets: tuple[float, ...]
    countermeasures: tuple[str, ...]
    leaks: tuple[float, ...]
    num_steps: tuple[int, ...]
    end_to_end: int
    epochs: int
    seed: int
    toy: bool

    def steps_of(self, budget: float | None) -> int | None:
        """Steps of a cloak of a budget; None for the method's own number.

        Raises:
            program.UsageError: there is a number for each of the budgets, and this is none of them.
        """
        if len(self.num_steps) < 2:
            return self.num_steps[0] if self.num_steps else None
        if budget not in self.budgets:
            raise program.UsageError(f"--num_steps has no number for a budget of {budget}")
        return self.num_steps[self.budgets.index(budget)]


def evaluation_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    options = _options()
    cells = photos.cells_of(options.methods, options.surrogate_sets, options.budgets)
    steps = {cell: options.steps_of(cell.budget) for cell in cells if cell.surrogates}
    names = list(dict.fromkeys([*options.trackers, *(n for c in cells for n in c.surrogates)]))
    files = [cloaking_methods.file_name(name) for name in names]
    if len(set(files)) < len(files):
        raise program.UsageError(f"each of {', '.join(names)} must have one name of its own")
    cloaks = cloaking_methods.cloak_options()
    for each in cloaks.values() if options.num_steps else ():
        del each["num_steps"]
    config = {**dataclasses.asdict(options), "cloaks": cloaks}
    growing = [name for name in _GROWING if name != "budgets" or len(options.num_steps) < 2]
    work = workdir.open_workdir(flags.FLAGS.workdir or "out/evaluation", config, resumable=growing)
    split, problems = _split(options, work)
    try:
        weights = pipeline.parse_weights(_WEIGHTS.value, names)
        everything = pipeline.load_recognizer(*names, weights=weights)
        _check_weights(work, everything)
        trackers = {name: everything.extractors[name] for name in options.trackers}
        study = cloaking_study.open_study(
            split, everything._replace(extractors=trackers), work.path / "clean"
        )
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(str(error)) from error
    unseen = cloaking_study.without_faces(study)
    problems += [{"image": name, "reason": pipeline.NO_FACE} for name in unseen]
    rows, photos_of = [], {}
    with _open_package(options) as package:
        for number, cell in enumerate(progress.track(cells, description="cells")):
            start = time.perf_counter()
            folder = work.path / "cells" / cell.name
            paths, records = _photos(
                cell,
                study,
                everything,
                package,
                folder,
                num_steps=steps.get(cell),
                seed=options.seed,
            )
            middle = time.perf_counter()
            photos_of[cell] = paths
            rows += _rows(cell, study, paths, records, folder, options)
            for sample, record in zip(split.published, records, strict=False):
                if record["problem"]:
                    name = f"{cell.name}/{sample.sample_id}"
                    problems.append({"image": name, "reason": record["problem"]})
            seconds = {"photos": middle - start, "scores": time.perf_counter() - middle}
            work.append_metrics({"step": number, "cell": cell.name, "seconds": seconds})
    _draw(study, photos_of, rows, work.path)
    cloaking_study.write_table(work.path / "table.csv", rows)
    result = {
        **program.provenance("experiments.fawkes_evaluation"),
        "config": config,
        "protected": [person.identity for person in split.protected],
        "people_enrolled": len(split.identities),
        "photos_enrolled": len(split.gallery) + len(split.published),
        "notes": _NOTES,
        "not_handled": problems,
    }
    work.write_result({**result, "table": rows})
    keys = ("method", "surrogates", "budget", "extractor", "protection")
    plain = ("nearest", "none", 0)
    shown = [row for row in rows if (row["tracker"], row["countermeasure"], row["leak"]) == plain]
    result["nearest"] = [{key: row[key] for key in keys} for row in shown]
    return result, program.EXIT_PARTIAL if problems else program.EXIT_OK


def _options() -> _Options:
    def value_of(name: str) -> Any:
        flag = flags.FLAGS[name]
        is_toy = flags.FLAGS.toy and flag.using_default_value
        value = _TOY.get(name, flag.value) if is_toy else flag.value
        return tuple(value) if isinstance(value, list) else value

    fields = [field.name for field in dataclasses.fields(_Options)]
    values = {name: value_of(name) for name in fields if name != "surrogate_sets"}
    try:
        for name in ("budgets", "leaks"):
            values[name] = tuple(float(value) for value in values[name])
        values["num_steps"] = _steps(values["num_steps"], values["budgets"])
        for name in ("budgets", "leaks"):
            values[name] = tuple(sorted(values[name]))
        if not all(0 < value <= 1 for value in values["budgets"]) or not values["budgets"]:
            raise ValueError("--budgets must lie in (0, 1]")
        if not all(0 <= value <= 1 for value in values["leaks"]):
            raise ValueError("--leaks must lie in [0, 1]")
        known = cloaking_views.COUNTERMEASURES
        if not values["countermeasures"] or not set(values["countermeasures"]) <= set(known):
            found = ",".join(values["countermeasures"])
            raise ValueError(f"--countermeasures={found}: of {', '.join(known)}")
        if not values["methods"]:
            raise ValueError("--methods is needed: how photos are protected")
        if not [pipeline.find_extractor(name) for name in values["trackers"]]:
            raise ValueError("--trackers is needed: names of extractors")
        sets = ()
        if _names(values["methods"]) & set(cloaking_methods.CLOAKS):
            sets = photos.surrogate_sets(value_of("surrogates"), values["trackers"])
            if not sets:
                raise ValueError("--surrogates is needed: sets of extractors")
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(str(error)) from error
    if "fawkes_pypi" in _names(values["methods"]) and not _PEER_PYTHON.value:
        raise program.UsageError("--methods=fawkes_pypi needs --peer_python")
    if not values["data"] and not values["toy"]:
        raise program.UsageError(
            "--data is needed: a folder with a folder of photos for each person"
        )
    return _Options(**values, surrogate_sets=sets)


def _steps(asked: tuple[str, ...], budgets: tuple[float, ...]) -> tuple[int, ...]:
    """The numbers of --num_steps, in the order of their budgets if there are several."""
    if not all(value.isdecimal() for value in asked) or len(asked) not in (0, 1, len(budgets)):
        found = ",".join(asked)
        raise ValueError(
            f"--num_steps={found}: a number, or one for each of {len(budgets)} budgets"
        )
    steps = tuple(map(int, asked))
    if len(steps) > 1:
        steps = tuple(number for _, number in sorted(zip(budgets, steps, strict=True)))
    return steps


def _names(methods: tuple[str, ...]) -> set[str]:
    """The methods without their own budgets."""
    return {photos.parse_method(method)[0] for method in methods}


def _split(
    options: _Options, work: workdir.Workdir
) -> tuple[cloaking_split.Split, list[dict[str, str]]]:
    """Who is who, without photos that cannot be read."""
    root = options.data
    if root is None:
        root = work.path / "made_up"
        cloaking_split.make_up(root, num_people=6, num_photos=4)
    try:
        listing = identities.list_tree(root)
        split, listing = cloaking_split.choose_readable(
            listing,
            num_people=options.people,
            num_published=options.cloaked_photos,
            num_probes=options.probes,
            num_gallery_people=options.gallery_people,
            num_gallery_photos=options.gallery_photos,
            seed=options.seed,
        )
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(f"--data: {error}") from error
    return split, [{"image": p.name, "reason": p.reason} for p in listing.problems]


def _check_weights(work: workdir.Workdir, recognizer: pipeline.Recognizer) -> None:
    """Refuses an extractor whose weights are not those that the run's files were made with."""
    path = work.path / "extractors.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    now = {name: registry.fingerprint(v) for name, v in recognizer.variables.items()}
    for name in now:
        if known.get(name, now[name]) != now[name]:
            raise ValueError(f"{work.path} was made with other weights of {name}")
    files.write_json(path, known | now)


def _photos(cell, study, everything, package, folder, *, num_steps, seed):
    """Paths and records of a cell's photos; none for clean ones."""
    if cell.method == "none":
        return [], []
    folder.mkdir(parents=True, exist_ok=True)
    protect_fn = cloaking_methods.protect_fn(
        cell,
        everything,
        covered=[scene.extractor for scene in study.scenes.values()],
        package=package,
        folder=folder,
        num_steps=num_steps,
        seed=seed,
    )
    return photos.write_photos(folder, study.split.published, everything.detector, protect_fn)


def _rows(cell, study, paths, records, folder, options) -> list[dict[str, Any]]:
    """Rows of the table for a cell, from its file if that has been asked the same."""
    path = folder / "scores.json"
    asked = {
        name: files.to_jsonable(getattr(options, name))
        for name in ("trackers", "countermeasures", "leaks", "end_to_end", "epochs")
    }
    with contextlib.suppress(FileNotFoundError, ValueError):
        known = json.loads(path.read_text())
        if known["asked"] == asked:
            return known["rows"]
    views = folder / "views"
    rows = cloaking_study.score_cell(
        study, cell, paths, views, countermeasures=options.countermeasures, leaks=options.leaks
    )
    for name in options.trackers if options.end_to_end else ():
        rows.append(
            cloaking_study.end_to_end(
                study,
                cell,
                paths,
                views,
                name,
                num_people=options.end_to_end,
                options=tracker_training.TrainingOptions(num_epochs=options.epochs),
                seed=options.seed,
            )
        )
    dssims = [record["dssim"] for record in records if not record["problem"]] or [None]
    mean = None if dssims[0] is None else float(np.mean(dssims))
    rows = files.to_jsonable([{**row, "mean_dssim": mean} for row in rows])
    cloaking_study.write_matches(study, cell, paths, views, folder / "matches.csv")
    files.write_json(path, {"cell": cell, "asked": asked, "rows": rows})
    return rows


def _draw(study, photos_of, rows, folder: pathlib.Path) -> None:
    plots.plot_budgets(folder / "budgets.png", rows)
    shown = {}
    for name, cell in pictures.shown_cells(list(photos_of), list(study.scenes)).items():
        views = folder / "cells" / cell.name / "views"
        seen = cloaking_study.cell_views(study, cell, photos_of[cell], views, "none")
        shown[name] = cell, seen
    pictures.draw(study, shown, folder)


@contextlib.contextmanager
def _open_package(options: _Options) -> Iterator[reference.Peer | None]:
    if "fawkes_pypi" not in _names(options.methods):
        yield None
        return
    try:
        package = reference.Peer(pathlib.Path(_PEER_PYTHON.value).expanduser(), _PEER_SCRIPT)
    except reference.PeerError as error:
        raise program.UsageError(f"--peer_python: {error}") from error
    with package:
        yield package


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(evaluation_program)
