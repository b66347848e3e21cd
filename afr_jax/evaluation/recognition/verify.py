"""Face verification: is it the same person on two photos, and how often is the verdict right?"""

import dataclasses
import pathlib
import time

import numpy as np

from afr_jax.core import distributed, files, options, progress, workdir
from afr_jax.data import pairs, photo_files, photos
from afr_jax.evaluation.metrics import verification
from afr_jax.evaluation.report import figures
from afr_jax.recognition import detect, match, pipeline, shared_options

_FARS = (1e-2, 1e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyConfig(options.Config):
    """Face verification: is it the same person on two photos?

        python -m experiments.verify --pair=a.jpg,b.jpg
        python -m experiments.verify --pairs=lfw_pairs.csv --images=lfw --workdir=out/verify

    The first prints distance, threshold and verdict, with the keys that PyPI deepface's `verify`
    uses. The second takes a CSV with the columns image_a, image_b, same (0 or 1), paths below
    --images, and reports 10-fold accuracy, AUC, EER and TAR at FAR, with `distances.csv` and
    `roc.png` in the work directory. Every photo is detected, aligned and embedded once; of several
    faces the one that is large and central counts. `kept/` holds what was found in groups of
    photos, so that a killed run goes on where it was. Paths and links that lead out of --images are
    not followed.

    --metric: `euclidean` is the distance of the embeddings, `euclidean_l2` that of the embeddings
    scaled to unit length, `cosine` one minus the cosine of their angle. --toy: the first 40 pairs.
    """

    shares_work = True

    pair: tuple[str, ...] = options.option((), "two photos: A,B")
    pairs: str | None = options.option(None, "CSV with the columns image_a, image_b, same")
    images: str = options.option(".", "folder that the paths of --pairs are below")
    max_pairs: int = options.option(0, "at most so many rows of --pairs; 0: all", at_least=0)
    recognition: shared_options.ExtractorOptions = options.group(shared_options.ExtractorOptions)
    judging: shared_options.MetricOptions = options.group(shared_options.MetricOptions)
    min_face_px: float = options.option(20.0, detect.MIN_FACE_HELP, at_least=12)
    workdir: str | None = options.option("out/verify", options.WORKDIR_HELP)

    def toy(self) -> "VerifyConfig":
        """The first 40 pairs."""
        return dataclasses.replace(self, max_pairs=min(self.max_pairs or 40, 40))


def run(config: VerifyConfig) -> options.Outcome:
    """Judges one pair, or every pair of a file.

    Raises:
        options.UsageError: no pair or a wrong one, a photo of it that is not there, an unknown
            extractor, pairs of one kind only.
    """
    if bool(config.pair) == bool(config.pairs):
        raise options.UsageError("give one of --pair and --pairs")
    if config.pair and len(config.pair) != 2:
        raise options.UsageError(f"--pair takes two photos, not {len(config.pair)}")
    for path in config.pair:
        if not pathlib.Path(path).expanduser().is_file():
            raise options.UsageError(f"--pair: {path} is not a file")
    recognizer = config.recognition.load(min_face_px=config.min_face_px)
    extractor = recognizer.extractors[config.recognition.extractor]
    metric = config.judging.metric or extractor.metric
    threshold = config.judging.threshold
    # Scores over pairs need none.
    if threshold is None and (config.pair or getattr(extractor.thresholds, metric)):
        with options.usage(""):
            threshold = match.threshold_of(extractor, metric)
    if config.pair:
        if not distributed.is_primary():
            return options.Outcome({})
        with distributed.alone():
            return _verify_pair(config, recognizer, metric, threshold)
    return _verify_pairs(config, recognizer, metric, threshold)


def _verify_pair(
    config: VerifyConfig,
    recognizer: pipeline.Recognizer,
    metric: str,
    threshold: float | None,
) -> options.Outcome:
    name = config.recognition.extractor
    start = time.perf_counter()
    found = list(pipeline.recognize(recognizer, config.pair))
    if problems := [f"{item.path}: {item.problem}" for item in found if item.problem]:
        return options.Outcome({"verified": None, "reason": "; ".join(problems)}, complete=False)
    first, second = (item.embeddings[name][0] for item in found)
    verdict = pipeline.judge(
        recognizer.extractors[name], first, second, metric=metric, threshold=threshold
    )
    areas = {f"img{number}": item.faces.boxes[0] for number, item in enumerate(found, start=1)}
    result = {
        "verified": verdict.same_person,
        "distance": verdict.distance,
        "threshold": verdict.threshold,
        "model": recognizer.extractors[name].name,
        "detector_backend": "mtcnn",
        "similarity_metric": metric,
        "facial_areas": areas,
        "time": time.perf_counter() - start,
    }
    return options.Outcome(result)


def _verify_pairs(
    config: VerifyConfig, recognizer: pipeline.Recognizer, metric: str, threshold: float | None
) -> options.Outcome:
    name = config.recognition.extractor
    rows, same = _read_pairs(config)
    work = workdir.open_workdir(config.workdir, config)
    names = sorted({photo for row in rows for photo in row})
    sources = [photos.PhotoSource.of(photo_files.find_below(config.images, each)) for each in names]
    pipeline.share(recognizer, sources, kept=work.path / "kept")
    if not distributed.is_primary():
        return options.Outcome({})
    with distributed.alone():
        found = pipeline.recognize(recognizer, sources, kept=work.path / "kept")
        found = list(progress.track(found, description="photos", total=len(names)))
    embeddings, problems = {}, []
    for photo, item in zip(names, found, strict=True):
        if item.problem:
            problems.append({"image": photo, "reason": item.problem})
        else:
            embeddings[photo] = item.embeddings[name][0]
    distances = np.array([_pair_distance(embeddings, *row, metric) for row in rows])
    curve = verification.roc(distances, same)
    accuracies = verification.fold_accuracies(distances, same)
    result = {
        "extractor": recognizer.extractors[name].name,
        "similarity_metric": metric,
        "pairs": len(rows),
        "photos": len(names),
        "accuracy": float(accuracies.mean()),
        "accuracy_std": float(accuracies.std(ddof=1)),
        "accuracy_at_threshold": (
            None if threshold is None else verification.accuracy(distances, same, threshold)
        ),
        "threshold": threshold,
        "best_threshold": verification.best_threshold(distances, same),
        "auc": verification.auc(curve),
        "eer": verification.equal_error_rate(curve),
        "tar_at_far": {f"{far:g}": verification.tar_at_far(curve, far) for far in _FARS},
        "not_handled": problems,
    }
    files.write_csv(
        work.path / "distances.csv",
        ("image_a", "image_b", "same", "distance"),
        [
            (*row, int(kind), f"{distance:.6f}")
            for row, kind, distance in zip(rows, same, distances, strict=True)
        ],
    )
    _plot(work.path / "roc.png", curve, result)
    work.write_result(result)
    return options.Outcome(result, complete=not problems)


def _read_pairs(config: VerifyConfig) -> tuple[list[tuple[str, str]], np.ndarray]:
    try:
        names, same = pairs.read_pairs(pathlib.Path(config.pairs or ""))
    except (FileNotFoundError, ValueError) as error:
        raise options.UsageError(f"--pairs: {error}") from error
    if config.max_pairs:
        names, same = names[: config.max_pairs], same[: config.max_pairs]
    if len(names) < 20 or same.all() or not same.any():
        raise options.UsageError(f"--pairs={config.pairs} needs 20 pairs or more, of both kinds")
    return names, same


def _pair_distance(
    embeddings: dict[str, np.ndarray], first: str, second: str, metric: str
) -> float:
    """Their distance; inf (never accepted) where a photo has no face."""
    if first not in embeddings or second not in embeddings:
        return float("inf")
    return float(match.distance(embeddings[first], embeddings[second], metric=metric))


def _plot(path: pathlib.Path, curve: verification.Roc, result: dict[str, files.Json]) -> None:
    figure, axes = figures.pyplot().subplots(figsize=(5, 4), layout="constrained")
    axes.plot(np.maximum(curve.far, 1e-5), curve.tar)
    axes.set(xscale="log", xlim=(3e-4, 1), ylim=(0.8, 1.003))
    axes.set(xlabel="false acceptance rate", ylabel="true acceptance rate")
    axes.set_title(f"{result['extractor']}: {result['pairs']} pairs, AUC {result['auc']:.4f}")
    axes.grid(alpha=0.3)
    figures.save(figure, path)
