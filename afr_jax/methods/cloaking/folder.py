"""Cloaking of many photo files into a folder: published one by one, resumed, measured again.

The steps are those of `workflow`; what was done to a file stands in its record (`records`). A run
that was killed goes on where it was and ends with the same bytes. Several processes share the
groups of photos, each on its own devices.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from afr_jax.core import distributed, files, parallel, progress, workdir
from afr_jax.core.runtime import claims as claims_lib
from afr_jax.data import photos
from afr_jax.methods.cloaking import check, records, targets, workflow
from afr_jax.models.extractors import registry
from afr_jax.recognition import detect

STATUSES = (
    *("cloaked", "partly_cloaked", "already_cloaked"),
    *("no_face", "unreadable", "failed"),
)
_TARGET = "target.json"


class _Loaded(NamedTuple):
    """A photo in memory on its way through a group."""

    job: records.Job
    sha256: str
    found: workflow.Found


@dataclasses.dataclass(frozen=True)
class FolderRun:
    """One run over photo files.

    Attributes:
        flow: the steps.
        work: folder of the records.
        key: of all randomness.
        target: as of `targets.choose`.
        gallery: likewise.
        overwrite: whether files that are not of this run are replaced.
        claims: what keeps this run and others that share its work apart.
    """

    flow: workflow.Workflow
    work: workdir.Workdir
    key: jax.Array
    target: str = "repel"
    gallery: str | None = None
    overwrite: bool = False
    claims: claims_lib.Claims = claims_lib.Claims(None)

    @property
    def judges(self) -> dict[str, str]:
        """Fingerprint of the weights of every extractor that measures, by name."""
        return fingerprints(self.flow)

    def cloak(self, jobs: Sequence[records.Job]) -> list[records.ImageRecord]:
        """Brings every job to a record; a group with nothing left to do is skipped.

        Args:
            jobs: of `records.list_jobs`.

        Returns:
            The photos' entries in report.json.

        Raises:
            targets.TargetError: the target cannot be used.
        """
        in_groups = photos.in_groups(
            jobs, most=workflow.GROUP, photo_fn=lambda job: photos.PhotoSource.of(job.source)
        )
        start, groups = 0, {}
        for group in in_groups:
            groups[start] = group
            start += len(group)
        judges = self.judges
        known = records.known_pixels(self.work.path)
        # One process says what is open, since others may have begun.
        opened = distributed.decide(
            lambda: [start for start, group in groups.items() if not all(map(self._is_done, group))]
        )
        target = self._choose_target(jobs) if opened else None
        own = frozenset(distributed.share(opened))
        with distributed.alone():
            if self.claims:
                self.claims.work_off(
                    groups.values(),
                    lambda group: self._work_on_group(group, target, judges, known),
                    name_fn=lambda job: job.name,
                    is_done_fn=self._is_done,
                    description="photos",
                )
            else:
                for number in progress.track(range(len(jobs)), description="photos"):
                    if number in own:
                        self._work_on_group(groups[number], target, judges, known)
        distributed.barrier("all photos are cloaked")
        self.claims.work_off(
            [[job] for job in distributed.share(jobs) if not _is_judged(job, judges)],
            lambda group: self._judge_again(group[0], judges),
            name_fn=lambda job: f"{job.name} again",
            is_done_fn=lambda job: _is_judged(job, judges),
            description="measured again",
        )
        distributed.barrier("all photos are measured")
        return [records.read(job)["image"] for job in jobs]

    def target_identity(self) -> str | None:
        """Name of the person whom faces were moved towards."""
        known = self._known_target()
        return None if known is None else known.identity

    def _work_on_group(
        self,
        group: Sequence[records.Job],
        target: targets.Target | None,
        judges: dict[str, str],
        known: frozenset[str],
    ) -> None:
        stream = parallel.thread_stream(
            functools.partial(self._load, known=known),
            group,
            weight_fn=lambda job: photos.num_pixels(job.source.path),
            limit=photos.GROUP_PIXELS // 2,
        )
        loaded = [item for item in stream if item is not None]
        found = [item.found for item in loaded]
        total = sum(len(item.task.faces.boxes) for item in found) * self.flow.method.num_steps
        with progress.counter(total, description="face steps") as report_fn:
            outcomes = self.flow.cloak_group(self.key, found, target=target, report_fn=report_fn)
        waiting = {
            number: outcome
            for number, outcome in enumerate(outcomes)
            if not self._is_done(loaded[number].job)
        }
        del outcomes
        left = [loaded[number] for number in waiting]
        for item, done in zip(left, self.flow.finish_all(found, waiting), strict=True):
            self._finish(item, done, judges)

    def _is_done(self, job: records.Job) -> bool:
        """Whether nothing is left to do for a job."""
        if not records.is_done(job):
            return False
        return not self.flow.again or records.read(job)["image"]["status"] != "already_cloaked"

    def _load(self, job: records.Job, *, known: frozenset[str]) -> _Loaded | None:
        """Reads a photo and finds its faces; None, with a record, if there is nothing to cloak."""
        sha256 = None
        try:
            if job.source.problem is not None:
                raise photos.PhotoError(job.source.problem)
            data = photos.read_photo_bytes(job.source.path)
            sha256 = records.sha256_of(data)
            photo = photos.decode_photo(data)
        except photos.PhotoError as error:
            records.write(job, "unreadable", str(error), [], sha256=sha256)
            return None
        if self.flow.is_output(photo, known=known):
            done = workflow.already_cloaked(job.name)
            records.write(job, done.status, done.reason, [], sha256=sha256)
            return None
        return _Loaded(job, sha256, self.flow.find_faces(job.source.relative.as_posix(), photo))

    def _finish(self, item: _Loaded, done: workflow.CloakedPhoto, judges: dict[str, str]) -> None:
        """Publishes and records one photo."""
        job, sha256 = item.job, item.sha256
        if done.data is None or done.pixels is None:
            records.write(job, done.status, done.reason, done.faces, sha256=sha256)
            return
        try:
            records.publish(
                job,
                done.data,
                done.status,
                done.reason,
                done.faces,
                overwrite=self.overwrite,
                sha256=sha256,
                pixels_sha256=photos.digest_of_pixels(done.pixels),
                found=item.found.task.faces,
                judges=judges,
            )
        except FileExistsError:
            reason = "the output exists and is not of this run; pass --overwrite to replace it"
            records.write(job, "failed", reason, [], sha256=sha256)
        except OSError as error:
            if files.is_of_the_disk(error):
                raise
            reason = f"could not write the output: {error.strerror or error}"
            records.write(job, "failed", reason, [], sha256=sha256)

    def _judge_again(self, job: records.Job, judges: dict[str, str]) -> None:
        """Measures a finished output anew."""
        known = records.read(job)
        image = known["image"]
        pixels = photos.read_photo(job.source.path).pixels
        found = detect.Faces(
            **{name: np.array(rows, np.float32) for name, rows in (known["found"] or {}).items()}
        )
        faces = check.judge_again(
            self.flow.recognizer,
            self.flow.second,
            pixels,
            found,
            photos.read_photo(job.output).pixels,
            image["faces"],
            surrogates=self.flow.surrogates,
            options=self.flow.face_filter.union_options(pixels.shape),
        )
        records.write(
            job,
            image["status"],
            image["reason"],
            faces,
            sha256=known["sha256"],
            output_sha256=known["output_sha256"],
            pixels_sha256=known["pixels_sha256"],
            found=found,
            judges=judges,
        )

    def _choose_target(self, jobs: Sequence[records.Job]) -> targets.Target | None:
        """The target; chosen once and kept for resumed runs."""

        def choose() -> None:
            if self._known_target() is None:
                chosen = self.flow.choose_target(self.target, self.gallery, _readable_pixels(jobs))
                if chosen is not None:
                    files.write_sealed(self.work.path / _TARGET, chosen._asdict())

        with self.claims.hold("the target"):
            distributed.decide(choose)
        return self._known_target()

    def _known_target(self) -> targets.Target | None:
        known = workdir.read_or_none(self.work.path / _TARGET, files.read_sealed)
        if known is None:
            return None
        centroids = {
            name: np.array(vector, np.float32) for name, vector in known["centroids"].items()
        }
        return targets.Target(known["identity"], centroids)


def forget(path: pathlib.Path) -> None:
    """Deletes what the work directory of a run knows, so that its outputs are made again."""
    records.forget(path)
    (path / _TARGET).unlink(missing_ok=True)


def fingerprints(flow: workflow.Workflow) -> dict[str, str]:
    """Short fingerprint of the weights of every extractor, by name."""
    variables = flow.recognizer.variables
    return {name: registry.fingerprint(each)[:16] for name, each in variables.items()}


def load_pair(job: records.Job) -> tuple[np.ndarray, np.ndarray] | None:
    """Pixels of a photo and of its cloaked file; None if one cannot be read."""
    try:
        return photos.read_photo(job.source.path).pixels, photos.read_photo(job.output).pixels
    except (photos.PhotoError, OSError):
        return None


def _is_judged(job: records.Job, judges: dict[str, str]) -> bool:
    """Whether nothing was written, or it was measured by these extractors."""
    known = records.read(job)
    return known["image"]["output"] is None or known["judges"] == judges


def _readable_pixels(jobs: Sequence[records.Job]) -> Iterator[np.ndarray]:
    for job in jobs:
        with contextlib.suppress(photos.PhotoError):
            yield photos.read_photo(job.source.path).pixels
