"""Cloaks photos: moves every face's embedding away while the photo keeps looking the same.

    python -m experiments.cloak --images=photos --output_dir=cloaked --mode=mid

writes `cloaked/<folders>/<stem>_cloaked.png` for every photo, `report.json` and `report.html`.
Without flags it cloaks a sample portrait into `out/cloak`. A second run skips what is done and goes
on with what was interrupted. Originals are never touched.

--target says where faces go: `repel` (away from themselves, the default), a folder with photos of
another person (towards that person as well), or `farthest` (the person of --gallery, a folder of
one folder per person, who is farthest from all photos of this run).

Expected on two CPU cores: about 25 ms per face and step, so 3 s a face, after half a minute of
compilation in the first run. Expected on the sample portrait at --mode=mid: dlib distance about 0.9
at DSSIM 0.007; below 0.6 dlib takes two faces for the same person.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import skimage
import tqdm
from absl import flags, logging

from afr_jax.core import parallel, run
from afr_jax.data import photo_files, photos
from afr_jax.evaluation import cloak_check, report
from afr_jax.methods import cloak, fawkes, targets
from afr_jax.models import mtcnn, zoo
from afr_jax.recognition import detect, embed

_IMAGES = flags.DEFINE_list(
    "images", [], "photos and folders of photos; default: a sample portrait"
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", "out/cloak", "folder for cloaked photos and reports"
)
_MODE = flags.DEFINE_enum(
    "mode", "mid", sorted(fawkes.MODES), "DSSIM budget: low 0.004, mid 0.007, high 0.012"
)
_SURROGATES = flags.DEFINE_list("surrogates", ["dlib"], "extractors to cloak against, by name")
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


@dataclasses.dataclass(frozen=True)
class _Models:
    """Everything that is loaded once."""

    detector: dict
    surrogates: cloak.Surrogates

    def by_name(self) -> dict[str, tuple[zoo.Extractor, dict]]:
        pairs = zip(self.surrogates.extractors, self.surrogates.variables, strict=True)
        return {extractor.name: (extractor, variables) for extractor, variables in pairs}


@dataclasses.dataclass(frozen=True)
class _Job:
    """One input with its output and the place of its record."""

    source: photo_files.PhotoInput
    output: pathlib.Path
    record: pathlib.Path


@dataclasses.dataclass
class _Loaded:
    """A photo in memory on its way through a group."""

    job: _Job
    sha256: str
    photo: photos.Photo
    task: cloak.PhotoFaces
    skipped: list[dict[str, Any]]
    options: detect.DetectorOptions


def cloak_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    output_dir = pathlib.Path(_OUTPUT_DIR.value).expanduser().absolute()
    if output_dir.exists() and not output_dir.is_dir():
        raise run.UsageError(f"--output_dir={_OUTPUT_DIR.value} is not a folder")
    settings = _settings()
    workdir = _open_workdir(flags.FLAGS.workdir or output_dir / ".cloak", settings)
    jobs = _jobs(output_dir, workdir.path)
    session = _Session(settings, workdir, output_dir)
    session.work(jobs)
    return session.conclude(jobs)


def _settings() -> dict[str, Any]:
    """The options that decide the bytes of the outputs, checked."""
    try:
        surrogates = [zoo.get(name).name for name in _SURROGATES.value]
    except ValueError as error:
        raise run.UsageError(f"--surrogates: {error}") from error
    if not surrogates or len(set(surrogates)) < len(surrogates):
        raise run.UsageError(f"--surrogates={_SURROGATES.value} must name each extractor once")
    if (_TARGET.value == "farthest") != (_GALLERY.value is not None):
        raise run.UsageError("--target=farthest and --gallery need each other")
    if _TARGET.value not in ("repel", "farthest") and not pathlib.Path(_TARGET.value).is_dir():
        raise run.UsageError(f"--target={_TARGET.value} is not repel, farthest or a folder")
    if _GALLERY.value is not None and not pathlib.Path(_GALLERY.value).is_dir():
        raise run.UsageError(f"--gallery={_GALLERY.value} is not a folder")
    if 0 < _MIN_FACE.value < 20:
        raise run.UsageError(f"--min_face_px={_MIN_FACE.value} must be 0 or at least 20")
    num_steps = min(_NUM_STEPS.value, 4) if flags.FLAGS.toy else _NUM_STEPS.value
    config = fawkes.FawkesConfig(dssim_budget=fawkes.MODES[_MODE.value], num_steps=num_steps)
    return {
        "mode": _MODE.value,
        **dataclasses.asdict(config),
        "surrogates": surrogates,
        "target": _TARGET.value,
        "gallery": _GALLERY.value,
        "min_confidence": _MIN_CONFIDENCE.value,
        "min_face_px": _MIN_FACE.value,
        "keep_metadata": _KEEP_METADATA.value,
        "seed": flags.FLAGS.seed,
    }


def _open_workdir(path: pathlib.Path, settings: dict[str, Any]) -> run.Workdir:
    """The folder of records; with --overwrite, those of other settings make way."""
    try:
        return run.open_workdir(path, settings)
    except run.UsageError as error:
        if not _OVERWRITE.value or not (path / "config.json").exists():
            raise run.UsageError(f"{error} (or pass --overwrite to replace its outputs)") from error
    for record in (path / "records").glob("*.json"):
        record.unlink()
    (path / "config.json").unlink()
    return run.open_workdir(path, settings)


def _jobs(output_dir: pathlib.Path, workdir: pathlib.Path) -> list[_Job]:
    """All inputs with their outputs; products of an earlier run are no inputs."""
    sample = pathlib.Path(skimage.__file__).parent / "data" / "astronaut.png"
    earlier = {}
    for path in sorted((workdir / "records").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads(path.read_text())
            earlier[known["source"]] = str(output_dir / known["output"])
    own = [pathlib.Path(path) for path in earlier.values()]
    own += [output_dir / name for name in ("report.json", "report.html")]
    try:
        inputs = photo_files.list_photos(_IMAGES.value or [sample], exclude=[output_dir, *own])
    except FileNotFoundError as error:
        raise run.UsageError(f"--images: {error}") from error
    if not inputs:
        raise run.UsageError(f"--images={','.join(_IMAGES.value)} holds no files")
    outputs = photo_files.output_paths(inputs, output_dir, taken=earlier)
    jobs = []
    for source, output in zip(inputs, outputs, strict=True):
        digest = hashlib.sha256(str(source.path).encode("utf-8", "surrogateescape")).hexdigest()
        jobs.append(_Job(source, output, workdir / "records" / f"{digest[:32]}.json"))
    return jobs


class _Session:
    """One run of the program over its jobs, group by group."""

    def __init__(
        self, settings: dict[str, Any], workdir: run.Workdir, output_dir: pathlib.Path
    ) -> None:
        self._settings = settings
        self._workdir = workdir
        self._output_dir = output_dir
        fields = {field.name for field in dataclasses.fields(fawkes.FawkesConfig)}
        self._config = fawkes.FawkesConfig(
            **{name: value for name, value in settings.items() if name in fields}
        )
        self._key = jax.random.key(settings["seed"])
        self._models: _Models | None = None
        self._targets: dict[str, np.ndarray] | None = None
        self._target_name: str | None = None

    def work(self, jobs: Sequence[_Job]) -> None:
        """Brings every job to a record; a group with nothing left to do is skipped."""
        (self._workdir.path / "records").mkdir(exist_ok=True)
        groups = [jobs[start : start + _GROUP] for start in range(0, len(jobs), _GROUP)]
        open_groups = [group for group in groups if not all(self._is_done(job) for job in group)]
        if open_groups:
            self._load_models(jobs)
        bar = tqdm.tqdm(total=len(jobs), desc="photos", unit="photo", disable=None)
        bar.update(sum(len(group) for group in groups if group not in open_groups))
        for group in open_groups:
            self._work_on_group(group, bar)
            bar.update(len(group))
        bar.close()

    def conclude(self, jobs: Sequence[_Job]) -> tuple[dict[str, Any], int]:
        """Writes the reports from the records of all jobs."""
        records = [json.loads(job.record.read_text())["image"] for job in jobs]
        summary = {
            status: sum(record["status"] == status for record in records)
            for status in ("cloaked", "no_face", "unreadable", "failed")
        }
        settings = {**self._settings, "linf_limit": self._config.linf_limit}
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

        run.write_json(self._output_dir / "report.json", whole)
        report.write_cloak_report(self._output_dir / "report.html", whole, load_pair)
        incomplete = [
            {"image": record["image"], "status": record["status"], "reason": record["reason"]}
            for record in records
            if record["status"] in ("unreadable", "failed")
        ]
        for record in records:
            logging.info("%s: %s", record["image"], _in_words(record))
        result = {
            "summary": summary,
            "not_handled": incomplete,
            "report": "report.html",
            "output_dir": str(_OUTPUT_DIR.value),
        }
        self._workdir.write_result(result)
        return result, run.EXIT_PARTIAL if incomplete else run.EXIT_OK

    def _load_models(self, jobs: Sequence[_Job]) -> None:
        names = self._settings["surrogates"]
        try:
            detector = jax.tree.map(jax.numpy.asarray, mtcnn.read_weights(mtcnn.find_weights()))
            variables = tuple(
                jax.tree.map(jax.numpy.asarray, zoo.get(name).load()) for name in names
            )
        except (FileNotFoundError, ValueError) as error:
            raise run.UsageError(str(error)) from error
        surrogates = cloak.Surrogates(tuple(zoo.get(name) for name in names), variables)
        self._models = _Models(detector, surrogates)
        if self._settings["target"] != "repel":
            self._targets = self._choose_target(jobs)

    def _is_done(self, job: _Job) -> bool:
        """Whether a record says so and the files are still those it speaks of."""
        try:
            known = json.loads(job.record.read_text())
            image = known["image"]
            if image["status"] == "failed" or known.get("pending"):
                return False
            if job.source.problem is None:
                if known["sha256"] != _sha256_of(photos.read_photo_bytes(job.source.path)):
                    return False
            if image["status"] == "cloaked":
                return _sha256_of(job.output.read_bytes()) == known["output_sha256"]
            return True
        except photos.PhotoError as error:
            return image["status"] == "unreadable" and image["reason"] == str(error)
        except (OSError, ValueError, KeyError):
            return False

    def _work_on_group(self, group: Sequence[_Job], bar: tqdm.tqdm) -> None:
        loaded = [item for item in parallel.overlapped(self._load, group) if item is not None]
        num_faces = sum(len(item.task.faces.boxes) for item in loaded)
        steps = tqdm.tqdm(
            total=num_faces * self._config.num_steps, desc="face steps", leave=False, disable=None
        )
        tasks = [item.task for item in loaded]
        try:
            results = cloak.cloak_photos(
                self._key,
                self._models.surrogates,
                tasks,
                config=self._config,
                targets=self._targets,
                report_fn=steps.update,
            )
        except Exception as error:  # One photo's trouble must not cost the others theirs.
            if len(group) == 1 or isinstance(error, MemoryError):
                for item in loaded:
                    self._write_record(item.job, item.sha256, "failed", f"{error}", [])
                logging.exception("could not cloak %s", [str(job.source.path) for job in group])
                return
            logging.warning("working photo by photo after: %s", error)
            for job in group:
                self._work_on_group([job], bar)
            return
        finally:
            steps.close()
        for item, (pixels, faces) in zip(loaded, results, strict=True):
            if not self._is_done(item.job):
                self._finish(item, pixels, faces)

    def _load(self, job: _Job) -> _Loaded | None:
        """Reads a photo and finds its faces; None, with a record, if nothing is to cloak."""
        if job.source.problem is not None:
            self._write_record(job, None, "unreadable", job.source.problem, [])
            return None
        sha256 = None
        try:
            data = photos.read_photo_bytes(job.source.path)
            sha256 = _sha256_of(data)
            photo = photos.decode_photo(data)
        except photos.PhotoError as error:
            self._write_record(job, sha256, "unreadable", str(error), [])
            return None
        options = self._detector_options(photo.pixels.shape)
        found = detect.detect_faces(self._models.detector, photo.pixels, options=options)
        sure = found.confidences >= self._settings["min_confidence"]
        kept = sure & cloak.is_large_enough(found.boxes)
        skipped = [
            {
                "box": np.concatenate([np.floor(box[:2]), np.ceil(box[2:])]).astype(int).tolist(),
                "detection": box.tolist(),
                "confidence": float(confidence),
                "status": "skipped",
                "reason": "it is too small to be recognised"
                if confident
                else f"confidence {confidence:.2f} is below {self._settings['min_confidence']}",
            }
            for box, confidence, confident, keep in zip(
                found.boxes, found.confidences, sure, kept, strict=True
            )
            if not keep
        ]
        if not kept.any():
            reason = "no face was found" if not skipped else "no face was found with confidence"
            self._write_record(job, sha256, "no_face", reason, skipped)
            return None
        visible = None if photo.alpha is None else photo.alpha > 0
        task = cloak.PhotoFaces(
            name=job.source.relative.as_posix(),
            pixels=photo.pixels,
            grey=photo.grey,
            visible=visible,
            faces=detect.select_faces(found, kept),
        )
        return _Loaded(job, sha256, photo, task, skipped, options)

    def _finish(
        self, item: _Loaded, pixels: np.ndarray, faces: Sequence[cloak.CloakedFace]
    ) -> None:
        """Encodes, reads back, measures, publishes and records one photo."""
        job = item.job
        data = photos.encode_png(item.photo, pixels, keep_metadata=self._settings["keep_metadata"])
        records = cloak_check.check_photo(
            self._models.detector,
            self._models.by_name(),
            item.task,
            photos.decode_photo(data).pixels,
            faces,
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
            self._write_record(job, item.sha256, "failed", "; ".join(problems), records)
            return
        try:
            self._publish(job, item.sha256, data, records)
        except FileExistsError:
            reason = "the output exists and is not of this run; pass --overwrite to replace it"
            self._write_record(job, item.sha256, "failed", reason, [])
        except OSError as error:
            reason = f"could not write the output: {error.strerror or error}"
            self._write_record(job, item.sha256, "failed", reason, [])

    def _publish(self, job: _Job, sha256: str, data: bytes, records: list[dict]) -> None:
        """Gives the file its name; the record goes first, so a killed run knows its own file."""
        output_sha256 = _sha256_of(data)
        ours = _OVERWRITE.value
        if job.output.exists() and not ours:
            existing = _sha256_of(job.output.read_bytes())
            ours = existing in (output_sha256, _recorded_output(job))
            if not ours:
                raise FileExistsError(job.output)
        self._write_record(
            job, sha256, "cloaked", None, records, output_sha256=output_sha256, pending=True
        )
        photo_files.write_atomically(job.output, data, overwrite=ours)
        if _sha256_of(job.output.read_bytes()) != output_sha256:
            raise OSError(0, "the file reads back differently")
        self._write_record(job, sha256, "cloaked", None, records, output_sha256=output_sha256)

    def _write_record(
        self, job: _Job, sha256, status, reason, faces, *, output_sha256=None, pending=False
    ) -> None:
        output = job.output.relative_to(self._output_dir).as_posix()
        record = {
            "source": str(job.source.path),
            "output": output,
            "sha256": sha256,
            "output_sha256": output_sha256,
            "pending": pending,
            "image": {
                "image": job.source.relative.as_posix(),
                "output": output if status == "cloaked" else None,
                "status": status,
                "reason": reason,
                "faces": faces,
            },
        }
        run.write_json(job.record, record)

    def _detector_options(self, shape: Sequence[int]) -> detect.DetectorOptions:
        smallest = self._settings["min_face_px"] or max(30, max(shape[:2]) / 80)
        return detect.DetectorOptions(min_face_px=smallest)

    def _faces_below(self, folder: pathlib.Path) -> list[tuple[np.ndarray, np.ndarray]]:
        """The most confident face of every readable photo of a folder, with its landmarks."""
        faces = []
        for source in photo_files.list_photos([folder]):
            try:
                pixels = photos.read_photo(source.path).pixels
            except photos.PhotoError as error:
                logging.warning("%s: %s", source.path, error)
                continue
            options = self._detector_options(pixels.shape)
            found = detect.detect_faces(self._models.detector, pixels, options=options)
            if len(found.boxes):
                faces.append((pixels, found.landmarks[0]))
        return faces

    def _embed(self, faces) -> dict[str, np.ndarray]:
        return {
            name: embed.embed_faces(extractor, variables, faces)
            for name, (extractor, variables) in self._models.by_name().items()
        }

    def _choose_target(self, jobs: Sequence[_Job]) -> dict[str, np.ndarray]:
        """The target's centroid for each surrogate; chosen once and kept for resumed runs."""
        stored = self._workdir.path / "target.json"
        if stored.exists():
            known = json.loads(stored.read_text())["centroids"]
            return {name: np.array(vector, np.float32) for name, vector in known.items()}
        if self._settings["target"] == "farthest":
            identity, centroids = self._farthest(jobs)
        else:
            folder = pathlib.Path(self._settings["target"])
            faces = self._faces_below(folder)
            if not faces:
                raise run.UsageError(f"--target={folder} holds no photo with a face")
            identity = folder.name
            centroids = {
                name: targets.centroid(found) for name, found in self._embed(faces).items()
            }
        run.write_json(stored, {"identity": identity, "centroids": centroids})
        return centroids

    def _farthest(self, jobs: Sequence[_Job]) -> tuple[str, dict[str, np.ndarray]]:
        gallery = {}
        for folder in sorted(pathlib.Path(self._settings["gallery"]).iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                if faces := self._faces_below(folder):
                    found = self._embed(faces)
                    gallery[folder.name] = {n: targets.centroid(e) for n, e in found.items()}
        own = []
        for job in jobs:
            with contextlib.suppress(photos.PhotoError):
                pixels = photos.read_photo(job.source.path).pixels
                options = self._detector_options(pixels.shape)
                found = detect.detect_faces(self._models.detector, pixels, options=options)
                own += [(pixels, landmarks) for landmarks in found.landmarks]
        thresholds = {name: zoo.get(name).threshold for name in self._settings["surrogates"]}
        if not own:
            raise run.UsageError("--target=farthest: no face was found in --images")
        try:
            identity = targets.farthest_identity(self._embed(own), gallery, thresholds)
        except ValueError as error:
            raise run.UsageError(f"--gallery={self._settings['gallery']}: {error}") from error
        return identity, gallery[identity]


def _recorded_output(job: _Job) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads(job.record.read_text())["output_sha256"]
    return None


def _sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _in_words(record: dict[str, Any]) -> str:
    """One line for a person, with what was measured."""
    if record["status"] != "cloaked":
        return f"{record['status']} ({record['reason']})"
    parts = []
    for face in record["faces"]:
        for name, found in face.get("extractors", {}).items():
            verdict = "still the same person" if found["same_person"] else "another person"
            parts.append(
                f"{name} {found['distance']:.2f} of {found['threshold']:.2f} ({verdict}), "
                f"DSSIM {face['dssim']:.4f}"
            )
    return "cloaked; " + "; ".join(parts)


if __name__ == "__main__":
    run.define_flags()
    run.main(cloak_program)
