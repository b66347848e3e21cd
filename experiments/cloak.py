r"""Cloaks photos: moves every face's embedding away while the photo keeps looking the same.

    python -m experiments.cloak --images=photos --output_dir=cloaked --mode=mid

writes `cloaked/<folders>/<stem>_cloaked.png` for every photo, `report.json` and `report.html`.
Without flags it cloaks a sample portrait into `out/cloak`. A second run skips what is done and goes
on with what was interrupted. Originals are never touched.

Photos are worked on in groups of 8, in the order of their names. Faces of one group that show the
same person are moved away from what they have in common, which carries over to unknown extractors
better than away from each by itself: give all photos of a person together.

--target says where faces go: `repel` (away from the person, the default), a folder with photos of
another person (towards that person as well), or `farthest` (the person of --gallery, a folder of
one folder per person, who is farthest from all photos of this run).

Every face is measured on the written file, and on it after JPEG of quality 75, by the extractors it
was made against and by those of --check, which had no part in it:

    python -m experiments.cloak --images=photos --check=facenet_casia,mobilefacenet \
        --weights=facenet_casia=FILE,mobilefacenet=FILE

--surrogates and --check take names of the zoo and folders of trained or hardened extractors. With
another --check a finished run measures its files again and leaves them as they are.

Expected on two CPU cores: about four seconds a face (against dlib 4.4 in a run of 60 photos, 100
steps, another program beside it), after half a minute of compilation in the first run. Expected on
the sample portrait at --mode=mid: dlib distance about 0.9 at DSSIM 0.007; below 0.6 dlib takes two
faces for the same person.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import skimage
import tqdm
from absl import flags, logging

from afr_jax.core import files, parallel, program, workdir
from afr_jax.data import photos
from afr_jax.evaluation.cloaking import check
from afr_jax.evaluation.cloaking import records as cloaking_records
from afr_jax.evaluation.report import page
from afr_jax.evaluation.report import summary as report_summary
from afr_jax.methods.cloaking import fawkes, photo_cloaks, targets
from afr_jax.models.extractors import registry
from afr_jax.recognition import detect, pipeline

_IMAGES = flags.DEFINE_list(
    "images", [], "photos and folders of photos; default: a sample portrait"
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", "out/cloak", "folder for cloaked photos and reports"
)
_MODE = flags.DEFINE_enum(
    "mode", "mid", sorted(fawkes.MODES), "DSSIM budget: low 0.004, mid 0.007, high 0.012"
)
_SURROGATES = flags.DEFINE_list(
    "surrogates", ["dlib"], "extractors to cloak against: names, or folders of trained ones"
)
_CHECK = flags.DEFINE_list("check", [], "further extractors that judge the cloak, likewise")
_WEIGHTS = flags.DEFINE_list("weights", [], "weight files: NAME=FILE, or FILE for one extractor")
_TARGET = flags.DEFINE_string("target", "repel", "repel, farthest, or a folder of another person")
_GALLERY = flags.DEFINE_string("gallery", None, "folder per person, for --target=farthest")
_NUM_STEPS = flags.DEFINE_integer("num_steps", 100, "gradient steps per face", lower_bound=0)
_MIN_CONFIDENCE = flags.DEFINE_float("min_confidence", 0.9, "least confidence of a face", 0, 1)
_MIN_FACE = flags.DEFINE_integer(
    "min_face_px", 0, "smallest face; 0: 30 px, or 1/80 of the longer side if that is more", 0
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace existing files in the output folder")
_KEEP_METADATA = flags.DEFINE_bool("keep_metadata", False, "keep EXIF data, the place included")

# Photos that are read, detected and cloaked together. Their faces share batches, so a group is
# always worked on as a whole: a resumed run gives the same bytes.
_GROUP = 8


class _Models(NamedTuple):
    """Everything that is loaded, once; extractors by their own names.

    Attributes:
        eyes: the detector, the surrogates and the extractors of --check.
        surrogates: names of the extractors to cloak against.
        checks: of the others.
        weights: fingerprint of each extractor's weights.
    """

    eyes: pipeline.Recognizer
    surrogates: list[str]
    checks: list[str]
    weights: dict[str, str]


@dataclasses.dataclass
class _Loaded:
    """A photo in memory on its way through a group."""

    job: cloaking_records.Job
    sha256: str
    photo: photos.Photo
    task: photo_cloaks.PhotoFaces
    skipped: list[dict[str, Any]]
    options: detect.DetectorOptions


def cloak_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    output_dir = pathlib.Path(_OUTPUT_DIR.value).expanduser().absolute()
    if output_dir.exists() and not output_dir.is_dir():
        raise program.UsageError(f"--output_dir={_OUTPUT_DIR.value} is not a folder")
    _check_flags()
    models = _load_models()
    settings = _settings(models)
    workdir = _open_workdir(flags.FLAGS.workdir or output_dir / ".cloak", settings)
    sample = pathlib.Path(skimage.__file__).parent / "data" / "astronaut.png"
    try:
        jobs = cloaking_records.list_jobs(_IMAGES.value or [sample], output_dir, workdir.path)
    except FileNotFoundError as error:
        raise program.UsageError(f"--images: {error}") from error
    if not jobs:
        raise program.UsageError(f"--images={','.join(_IMAGES.value)} holds no files")
    session = _Session(models, settings, workdir, output_dir)
    session.work(jobs)
    return session.conclude(jobs)


def _check_flags() -> None:
    if not _SURROGATES.value:
        raise program.UsageError("--surrogates must name an extractor")
    if (_TARGET.value == "farthest") != (_GALLERY.value is not None):
        raise program.UsageError("--target=farthest and --gallery need each other")
    if _TARGET.value not in ("repel", "farthest") and not pathlib.Path(_TARGET.value).is_dir():
        raise program.UsageError(f"--target={_TARGET.value} is not repel, farthest or a folder")
    if _GALLERY.value is not None and not pathlib.Path(_GALLERY.value).is_dir():
        raise program.UsageError(f"--gallery={_GALLERY.value} is not a folder")
    if 0 < _MIN_FACE.value < 20:
        raise program.UsageError(f"--min_face_px={_MIN_FACE.value} must be 0 or at least 20")


def _load_models() -> _Models:
    asked = [*_SURROGATES.value, *_CHECK.value]
    try:
        weights = pipeline.parse_weights(_WEIGHTS.value, asked)
        eyes = pipeline.load_recognizer(*asked, weights=weights)
        names = [eyes.extractors[name].name for name in asked]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} must be named once in --surrogates and --check together")
        for extractor in eyes.extractors.values():
            _ = extractor.threshold  # Raises if it is not known: then nothing can be judged.
    except FileNotFoundError as error:
        hint = "--weights=NAME=FILE names the file of an extractor's weights"
        raise program.UsageError(f"{error} ({hint})") from error
    except ValueError as error:
        raise program.UsageError(str(error)) from error
    variables = {name: eyes.variables[key] for name, key in zip(names, asked, strict=True)}
    eyes = eyes._replace(
        extractors={extractor.name: extractor for extractor in eyes.extractors.values()},
        variables=variables,
    )
    weights = {name: registry.fingerprint(each)[:16] for name, each in variables.items()}
    count = len(_SURROGATES.value)
    return _Models(eyes, names[:count], names[count:], weights)


def _settings(models: _Models) -> dict[str, Any]:
    """The options that decide the bytes of the outputs."""
    num_steps = min(_NUM_STEPS.value, 4) if flags.FLAGS.toy else _NUM_STEPS.value
    config = fawkes.FawkesConfig(dssim_budget=fawkes.MODES[_MODE.value], num_steps=num_steps)
    return {
        "mode": _MODE.value,
        **dataclasses.asdict(config),
        "surrogates": models.surrogates,
        "weights": {name: models.weights[name] for name in models.surrogates},
        "target": _TARGET.value,
        "gallery": _GALLERY.value,
        "min_confidence": _MIN_CONFIDENCE.value,
        "min_face_px": _MIN_FACE.value,
        "keep_metadata": _KEEP_METADATA.value,
        "seed": flags.FLAGS.seed,
    }


def _open_workdir(path: pathlib.Path, settings: dict[str, Any]) -> workdir.Workdir:
    """The folder of records; with --overwrite, those of other settings make way."""
    try:
        return workdir.open_workdir(path, settings)
    except program.UsageError as error:
        if not _OVERWRITE.value or not (path / "config.json").exists():
            raise program.UsageError(
                f"{error} (or pass --overwrite to replace its outputs)"
            ) from error
    cloaking_records.forget(path)
    (path / "target.json").unlink(missing_ok=True)
    (path / "config.json").unlink()
    return workdir.open_workdir(path, settings)


class _Session:
    """One run of the program over its jobs, group by group."""

    def __init__(
        self,
        models: _Models,
        settings: dict[str, Any],
        workdir: workdir.Workdir,
        output_dir: pathlib.Path,
    ) -> None:
        self._models = models
        self._settings = settings
        self._workdir = workdir
        self._output_dir = output_dir
        fields = {field.name for field in dataclasses.fields(fawkes.FawkesConfig)}
        self._config = fawkes.FawkesConfig(
            **{name: value for name, value in settings.items() if name in fields}
        )
        self._key = jax.random.key(settings["seed"])
        eyes = models.eyes
        self._surrogates = photo_cloaks.Surrogates(
            tuple(eyes.extractors[name] for name in models.surrogates),
            tuple(eyes.variables[name] for name in models.surrogates),
        )
        self._targets: dict[str, np.ndarray] | None = None

    def work(self, jobs: Sequence[cloaking_records.Job]) -> None:
        """Brings every job to a record; a group with nothing left to do is skipped."""
        groups = [jobs[start : start + _GROUP] for start in range(0, len(jobs), _GROUP)]
        is_open = [not all(map(cloaking_records.is_done, group)) for group in groups]
        if any(is_open) and self._settings["target"] != "repel":
            self._targets = self._choose_target(jobs)
        bar = tqdm.tqdm(total=len(jobs), desc="photos", unit="photo", disable=None)
        for group, has_work in zip(groups, is_open, strict=True):
            if has_work:
                self._work_on_group(group)
            for job in group:
                self._judge_again(job)
            bar.update(len(group))
        bar.close()

    def conclude(self, jobs: Sequence[cloaking_records.Job]) -> tuple[dict[str, Any], int]:
        """Writes the reports from the records of all jobs."""
        records = [cloaking_records.read(job)["image"] for job in jobs]
        summary = {
            status: sum(record["status"] == status for record in records)
            for status in ("cloaked", "no_face", "unreadable", "failed")
        }
        settings = {
            **self._settings,
            "check": self._models.checks,
            "weights": self._models.weights,
            "linf_limit": self._config.linf_limit,
            "reencoding": check.REENCODING,
        }
        target_file = self._workdir.path / "target.json"
        if target_file.exists():
            settings["target_identity"] = json.loads(target_file.read_text())["identity"]
        whole = {"images": records, "settings": settings, "summary": summary}
        sources = {record["output"]: job for job, record in zip(jobs, records, strict=True)}

        def load_pair(record):
            job = sources[record["output"]]
            try:
                original = photos.read_photo(job.source.path)
                return original.pixels, photos.read_photo(job.output).pixels
            except (photos.PhotoError, OSError):
                return None

        files.write_json(self._output_dir / "report.json", whole)
        page.write_cloak_report(self._output_dir / "report.html", whole, load_pair)
        incomplete = [
            {"image": record["image"], "status": record["status"], "reason": record["reason"]}
            for record in records
            if record["status"] in ("unreadable", "failed")
        ]
        for line in report_summary.lines(whole):
            logging.info("%s", line)
        result = {
            "summary": summary,
            "not_handled": incomplete,
            "report": "report.html",
            "output_dir": str(_OUTPUT_DIR.value),
        }
        self._workdir.write_result(result)
        return result, program.EXIT_PARTIAL if incomplete else program.EXIT_OK

    def _work_on_group(self, group: Sequence[cloaking_records.Job]) -> None:
        loaded = [item for item in parallel.thread_map(self._load, group) if item is not None]
        num_faces = sum(len(item.task.faces.boxes) for item in loaded)
        steps = tqdm.tqdm(
            total=num_faces * self._config.num_steps, desc="face steps", leave=False, disable=None
        )
        tasks = [item.task for item in loaded]
        try:
            results = photo_cloaks.cloak_photos(
                self._key,
                self._surrogates,
                tasks,
                config=self._config,
                targets=self._targets,
                report_fn=steps.update,
            )
        except Exception as error:  # One photo's trouble must not cost the others theirs.
            if len(group) == 1 or isinstance(error, MemoryError):
                for item in loaded:
                    cloaking_records.write(item.job, "failed", f"{error}", [], sha256=item.sha256)
                logging.exception("could not cloak %s", [str(job.source.path) for job in group])
                return
            logging.warning("working photo by photo after: %s", error)
            for job in group:
                self._work_on_group([job])
            return
        finally:
            steps.close()
        for item, (pixels, faces) in zip(loaded, results, strict=True):
            if not cloaking_records.is_done(item.job):
                self._finish(item, pixels, faces)

    def _load(self, job: cloaking_records.Job) -> _Loaded | None:
        """Reads a photo and finds its faces; None, with a record, if nothing is to cloak."""
        sha256 = None
        try:
            if job.source.problem is not None:
                raise photos.PhotoError(job.source.problem)
            data = photos.read_photo_bytes(job.source.path)
            sha256 = cloaking_records.sha256_of(data)
            photo = photos.decode_photo(data)
        except photos.PhotoError as error:
            cloaking_records.write(job, "unreadable", str(error), [], sha256=sha256)
            return None
        options = self._detector_options(photo.pixels.shape)
        found = detect.detect_faces(self._models.eyes.detector, photo.pixels, options=options)
        sure = found.confidences >= self._settings["min_confidence"]
        kept = sure & photo_cloaks.is_large_enough(found.boxes)
        skipped = check.skipped_faces(found, kept, min_confidence=self._settings["min_confidence"])
        if not kept.any():
            reason = "no face was found" if not skipped else "no face was found with confidence"
            cloaking_records.write(job, "no_face", reason, skipped, sha256=sha256)
            return None
        visible = None if photo.alpha is None else photo.alpha > 0
        task = photo_cloaks.PhotoFaces(
            name=job.source.relative.as_posix(),
            pixels=photo.pixels,
            gray=photo.gray,
            visible=visible,
            faces=detect.select_faces(found, kept),
        )
        return _Loaded(job, sha256, photo, task, skipped, options)

    def _finish(
        self, item: _Loaded, pixels: np.ndarray, faces: Sequence[photo_cloaks.CloakedFace]
    ) -> None:
        """Encodes, reads back, measures, publishes and records one photo."""
        job, sha256 = item.job, item.sha256
        data = photos.encode_png(item.photo, pixels, keep_metadata=self._settings["keep_metadata"])
        records = check.check_photo(
            self._models.eyes,
            item.task,
            photos.decode_photo(data).pixels,
            faces,
            surrogates=self._models.surrogates,
            dssim_budget=self._config.dssim_budget,
            options=item.options,
        )
        problems = [
            f"face {number} of {len(records)}: {record['reason']}"
            for number, record in enumerate(records, start=1)
            if record["status"] != "cloaked"
        ]
        records += item.skipped
        if problems:
            cloaking_records.write(job, "failed", "; ".join(problems), records, sha256=sha256)
            return
        try:
            cloaking_records.publish(
                job,
                data,
                records,
                overwrite=_OVERWRITE.value,
                sha256=sha256,
                found=item.task.faces,
                judges=self._models.weights,
            )
        except FileExistsError:
            reason = "the output exists and is not of this run; pass --overwrite to replace it"
            cloaking_records.write(job, "failed", reason, [], sha256=sha256)
        except OSError as error:
            reason = f"could not write the output: {error.strerror or error}"
            cloaking_records.write(job, "failed", reason, [], sha256=sha256)

    def _judge_again(self, job: cloaking_records.Job) -> None:
        """Measures a finished output anew if other extractors than now have judged it."""
        known = cloaking_records.read(job)
        image, judges = known["image"], self._models.weights
        if image["status"] != "cloaked" or known["judges"] == judges:
            return
        pixels = photos.read_photo(job.source.path).pixels
        found = {name: np.array(rows, np.float32) for name, rows in known["found"].items()}
        faces = check.judge_again(
            self._models.eyes,
            pixels,
            detect.Faces(**found),
            photos.read_photo(job.output).pixels,
            image["faces"],
            surrogates=self._models.surrogates,
            options=self._detector_options(pixels.shape),
        )
        kept = {name: known[name] for name in ("sha256", "output_sha256", "found")}
        cloaking_records.write(job, "cloaked", None, faces, judges=judges, **kept)

    def _detector_options(self, shape: Sequence[int]) -> detect.DetectorOptions:
        smallest = self._settings["min_face_px"] or max(30, max(shape[:2]) / 80)
        return detect.DetectorOptions(min_face_px=smallest)

    def _choose_target(self, jobs: Sequence[cloaking_records.Job]) -> dict[str, np.ndarray]:
        """The target's centroid for each surrogate; chosen once and kept for resumed runs."""
        stored = self._workdir.path / "target.json"
        if stored.exists():
            known = json.loads(stored.read_text())["centroids"]
            return {name: np.array(vector, np.float32) for name, vector in known.items()}
        own = {name: self._models.eyes.extractors[name] for name in self._models.surrogates}
        eyes = self._models.eyes._replace(extractors=own)
        target, options_fn = self._settings["target"], self._detector_options
        try:
            if target == "farthest":
                identity, centroids = targets.farthest_in_gallery(
                    eyes,
                    self._settings["gallery"],
                    [job.source.path for job in jobs],
                    options_fn=options_fn,
                )
            else:
                identity = pathlib.Path(target).name
                centroids = targets.folder_centroids(eyes, target, options_fn=options_fn)
        except ValueError as error:
            raise program.UsageError(f"--target={target}: {error}") from error
        files.write_json(stored, {"identity": identity, "centroids": centroids})
        return centroids


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(cloak_program)
