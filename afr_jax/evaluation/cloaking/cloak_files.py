"""Config and run of the program that cloaks photo files and reports what that is worth."""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Literal

import jax
from absl import logging

from afr_jax.core import distributed, files, options, workdir
from afr_jax.core.runtime import claims
from afr_jax.evaluation.report import page, summary
from afr_jax.methods.cloaking import budget, check, fawkes, folder, records, targets, workflow
from afr_jax.methods.cloaking import face_filter as face_filters
from afr_jax.recognition import pipeline, shared_options
from afr_jax.recognition.detectors import union

# Of two families, and there after the install.
DEFAULT_SURROGATES = ("dlib", "sface")
_TOY_STEPS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class CloakConfig(options.Config):
    """Cloaks photos: moves every face's embedding away while the photo keeps looking the same.

        python -m experiments.cloak --images=photos --output_dir=cloaked --mode=mid

    writes `cloaked/<folders>/<stem>_cloaked.png` for every photo (.jpg with --format=jpeg),
    `report.json` and `report.html`. Without flags it cloaks a sample portrait. A second run skips
    what is done and goes on with what was interrupted; originals are never touched, and outputs are
    left as they are unless --again. Exit code 3: some photos were not handled, each is named in the
    report. Files in folders that are no photos are counted as skipped. With --join any number of
    runs of one command share the photos.

    Photos are worked on in groups of 8, or of 100 megapixels, in the order of their names. Faces of
    one group that show the same person are moved away from what they have in common, which carries
    over better to unknown extractors: give all photos of a person together. --mode is a budget in
    what people see: limits of SSIMULACRA2 (low 85, mid 78, high 70), CIEDE2000, tint, FLIP and
    DSSIM (0.012, 0.016, 0.026), all of which hold for every face.

    --target says where faces go: `repel` (away from the person), a folder with photos of another
    person (towards that person as well), or `farthest` (the person of --gallery, a folder of one
    folder per person, who is farthest from all photos of this run).

    Two detectors look for faces; every face that one of them is sure of is cloaked or named in the
    report. A photo with a larger face than those that were cloaked is `partly_cloaked`.

    Every face is measured on the written file, and on it after JPEG of quality 75, by the
    extractors it was made against and by those of --check, which had no part in it:

        python -m experiments.cloak --images=photos --surrogates=dlib --check=sface

    With another --check a finished run measures its files again and leaves them as they are.
    --surrogates and --check take names of extractors and folders of trained or hardened extractors;
    `--surrogates=all` is every extractor whose weights are there: installed, in the cache
    (`experiments.fetch_weights` lists them) or given by --weights, but for those of --check
    and for judges (`mobilefacenet_192`), which must be named.

    Expected on the sample portrait: distances of 0.75 for dlib (below 0.6 it takes two faces for
    the same person) and 1.34 for SFace (below 1.14), SSIMULACRA2 81. A cloak hides nothing from a
    model that already knows the person.
    """

    shares_work = True

    images: tuple[str, ...] = options.option(
        (), "photos and folders of photos; default: a sample portrait"
    )
    output_dir: str = options.option("out/cloak", "folder for cloaked photos and reports")
    mode: budget.Mode = options.option("mid", "budget in what people see")
    dssim: float | None = options.option(
        None, "budget in DSSIM in place of --mode; the paper's is 0.007", at_most=1
    )
    surrogates: tuple[str, ...] = options.option(
        DEFAULT_SURROGATES, "extractors to cloak against; all: every one whose weights are there"
    )
    check: tuple[str, ...] = options.option((), "further extractors that judge the cloak")
    weights: tuple[str, ...] = options.option(
        (), "weight files: NAME=FILE, or FILE for one extractor"
    )
    target: str = options.option("repel", "repel, farthest, or a folder of another person")
    gallery: str | None = options.option(None, "folder per person, for --target=farthest")
    face_filter: face_filters.FaceFilter = options.group(face_filters.FaceFilter)
    search: fawkes.FawkesSearch = options.group(fawkes.FawkesSearch)
    file_format: Literal["png", "jpeg", "same"] = options.option(
        "png", "jpeg: at the photo's own quality; same: jpeg where the photo is", flag="format"
    )
    marked: bool = options.option(True, "note in the files that they are cloaked, for all to read")
    again: bool = options.option(False, "cloak photos that are cloaked already once more")
    overwrite: bool = options.option(False, "replace existing files in the output folder")
    keep_metadata: bool = options.option(False, "keep EXIF data, the place included")
    join: bool = options.option(False, claims.JOIN_HELP)
    workdir: str | None = options.option(None, "folder of the records; default: in --output_dir")

    @property
    def method(self) -> fawkes.FawkesConfig:
        """The search with its budget."""
        return fawkes.FawkesConfig(
            **dataclasses.asdict(self.search), mode=self.mode, dssim_budget=self.dssim
        )

    def toy(self) -> "CloakConfig":
        """Four steps."""
        num_steps = min(self.search.num_steps, _TOY_STEPS)
        return dataclasses.replace(
            self, search=dataclasses.replace(self.search, num_steps=num_steps)
        )


def run(config: CloakConfig) -> options.Outcome:
    """Cloaks photo files and writes both reports.

    Raises:
        options.UsageError: no such photos, extractors, weights, target or folders; or a folder of
            another run.
    """
    output_dir = pathlib.Path(config.output_dir).expanduser().absolute()
    if output_dir.exists() and not output_dir.is_dir():
        raise options.UsageError(f"--output_dir={config.output_dir} is not a folder")
    if not config.surrogates:
        raise options.UsageError("--surrogates must name an extractor")
    with options.usage("--target, --gallery"):
        targets.check(config.target, config.gallery)
    flow = load_flow(config)
    settings = _settings(config, flow)
    records_dir = pathlib.Path(config.workdir or output_dir / ".cloak")
    with contextlib.ExitStack() as held:
        shared = held.enter_context(claims.Claims(records_dir if config.join else None))
        with shared.hold("the folder"):
            work = _open_workdir(
                records_dir, settings, overwrite=config.overwrite, is_shared=config.join
            )
            jobs, num_skipped = _list_jobs(config, output_dir, work)
            below = [job.output.parent for job in jobs]
            held.enter_context(workdir.claimed(output_dir, below=below, is_shared=config.join))
        folder_run = folder.FolderRun(
            flow,
            work,
            jax.random.key(config.seed),
            config.target,
            config.gallery,
            config.overwrite,
            shared,
        )
        try:
            images = folder_run.cloak(jobs)
        except targets.TargetError as error:
            raise options.UsageError(f"--target={config.target}: {error}") from error
        report = _report(settings, folder_run, images, num_skipped)
        if distributed.is_primary():
            with shared.hold("the report"):
                _write_report(output_dir, report, jobs, is_shared=config.join)
    trouble = ["unreadable", "failed"]
    if config.face_filter.boxes is None:  # Else a person chose what is left.
        trouble.append("partly_cloaked")
    incomplete = [
        {"image": record["image"], "status": record["status"], "reason": record["reason"]}
        for record in images
        if record["status"] in trouble
    ]
    result = {
        "summary": report["summary"],
        "skipped": num_skipped,
        "not_handled": incomplete,
        "report": "report.html",
        "output_dir": config.output_dir,
    }
    work.write_result(result)
    return options.Outcome(result, complete=not incomplete)


def _list_jobs(
    config: CloakConfig, output_dir: pathlib.Path, work: workdir.Workdir
) -> tuple[list[records.Job], int]:
    """As of `records.list_jobs`; at least one."""
    with options.usage("--images"):
        images = config.images or [shared_options.sample_portrait()]
        jobs, num_skipped = records.list_jobs(
            images, output_dir, work.path, file_format=config.file_format
        )
    if not jobs:
        raise options.UsageError(f"--images={','.join(config.images)} holds no photos")
    with options.usage("--faces"):
        config.face_filter.check_photos(len(jobs))
    return jobs, num_skipped


def load_flow(config: CloakConfig) -> workflow.Workflow:
    """The steps of a cloak with its networks, as the options say.

    Raises:
        options.UsageError: no such extractors, or their weights are not there.
    """
    try:
        given = {name for name, *rest in (value.split("=") for value in config.weights) if rest}
        surrogates = pipeline.expand_names(config.surrogates, given=given, without=config.check)
        if not surrogates:
            raise ValueError("--surrogates=all: no extractor's weights are there")
        asked = [*surrogates, *config.check]
        weights = pipeline.parse_weights(config.weights, asked)
        recognizer = pipeline.load_recognizer(*asked, weights=weights)
        names = [recognizer.extractors[name].name for name in asked]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} must be named once in --surrogates and --check together")
        recognizer = workflow.own_names(recognizer)
        pipeline.warn_of_judges(names[: len(surrogates)])
        logging.info("made against: %s", files.printable(", ".join(names[: len(surrogates)])))
    except FileNotFoundError as error:
        hint = "--weights=NAME=FILE names the file of an extractor's weights"
        raise options.UsageError(f"{error} ({hint})") from error
    except ValueError as error:
        raise options.UsageError(str(error)) from error
    return workflow.Workflow(
        recognizer,
        tuple(names[: len(surrogates)]),
        config.method,
        union.load_second(),
        config.face_filter,
        config.keep_metadata,
        config.file_format,
        config.marked,
        config.again,
    )


def _settings(config: CloakConfig, flow: workflow.Workflow) -> dict[str, files.Json]:
    """What decides the bytes of the outputs."""
    weights = folder.fingerprints(flow)
    return {
        **dataclasses.asdict(config.method),
        "dssim_budget": config.method.budget.dssim,
        "budget": dataclasses.asdict(config.method.budget),
        "surrogates": flow.surrogates,
        "weights": {name: weights[name] for name in flow.surrogates},
        "target": config.target,
        "gallery": config.gallery,
        "detectors": flow.detectors,
        "faces": config.face_filter.faces,
        "min_confidence": config.face_filter.min_confidence,
        "min_face_px": config.face_filter.min_face_px,
        "keep_metadata": config.keep_metadata,
        "format": config.file_format,
        "marked": config.marked,
        "seed": config.seed,
    }


def _open_workdir(
    path: pathlib.Path, settings: Mapping[str, files.Json], *, overwrite: bool, is_shared: bool
) -> workdir.Workdir:
    """The folder of records; with --overwrite, those of other settings make way."""
    if is_shared:  # Others may be at work on what would have to make way.
        return workdir.open_workdir(path, settings, is_shared=True)
    with workdir.claimed(path):  # No other process has it: what is wrong are the settings.
        try:
            return workdir.open_workdir(path, settings)
        except options.UsageError as error:
            if not (path / "config.json").exists():
                raise
            if not overwrite:
                raise options.UsageError(
                    f"{error} (or pass --overwrite to replace its outputs)"
                ) from error
        folder.forget(path)
        (path / "config.json").unlink()
        return workdir.open_workdir(path, settings)


def _report(
    settings: Mapping[str, files.Json],
    folder_run: folder.FolderRun,
    images: list[records.ImageRecord],
    num_skipped: int,
) -> dict[str, files.Json]:
    """Content of report.json."""
    flow, identity = folder_run.flow, folder_run.target_identity()
    settings = {
        **settings,
        "check": [name for name in flow.recognizer.extractors if name not in flow.surrogates],
        "weights": folder_run.judges,
        "linf_limit": flow.method.linf_limit,
        "reencoding": check.REENCODING,
    }
    if identity is not None:
        settings["target_identity"] = identity
    counts = {
        status: sum(record["status"] == status for record in images) for status in folder.STATUSES
    }
    return {"images": images, "settings": settings, "summary": counts, "skipped": num_skipped}


def _read_json(path: str | os.PathLike[str]) -> files.Json:
    return files.parse_json(pathlib.Path(path).read_bytes())


def _write_report(
    output_dir: pathlib.Path,
    report: Mapping[str, files.Json],
    jobs: list[records.Job],
    *,
    is_shared: bool,
) -> None:
    """Writes report.html and report.json, and logs them as lines; once, of runs that share them."""
    known = workdir.read_or_none(output_dir / "report.json", _read_json) if is_shared else None
    if known == files.to_jsonable(report):
        return
    sources = {
        record["output"]: functools.partial(folder.load_pair, job)
        for job, record in zip(jobs, report["images"], strict=True)
    }
    page.write_cloak_report(
        output_dir / "report.html", report, lambda record: sources[record["output"]]()
    )
    files.write_json(output_dir / "report.json", report)
    for line in summary.lines(report):
        logging.info("%s", line)
