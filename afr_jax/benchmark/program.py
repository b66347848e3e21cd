"""The benchmark: its rows, its options, and the run that puts them into a table and a JSON file."""

import dataclasses
import functools
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from afr_jax.benchmark import (
    cloaking,
    database,
    detection,
    embedding,
    folder,
    patches,
    setting,
    timing,
    unlearnable,
)
from afr_jax.benchmark.agreement import detector_agreement, extractor_agreement
from afr_jax.benchmark.limits import hot_loops, scaling
from afr_jax.core import files, options, workdir
from afr_jax.core import program as core_program
from afr_jax.data import photo_files
from afr_jax.evaluation import reference
from afr_jax.evaluation.report import figures

# By name: the field with its options, and the function that measures it.
_RowFn = Callable[[Any, setting.Setting], setting.Measured]
ROWS: dict[str, tuple[str, _RowFn]] = {
    "detection": ("detection_row", detection.run),
    "folder": ("folder_row", folder.run),
    "cloaking": ("cloaking_row", cloaking.run),
    "embedding": ("embedding_row", embedding.run),
    "database": ("database_row", database.run),
    "patches": ("patches_row", patches.run),
    "detector_agreement": ("detector_agreement_row", detector_agreement.run),
    "extractor_agreement": ("extractor_agreement_row", extractor_agreement.run),
    "loops": ("loops_row", hot_loops.run),
    "scaling": ("scaling_row", scaling.run),
    "noise": ("unlearnable_row", unlearnable.run_noise),
    "victim": ("unlearnable_row", unlearnable.run_victim),
}
_TOY = {
    "repeats": 2,
    "num_photos": 2,
    "photo_px": 160,
    "folder_photos": 2,
    "num_faces": (2,),
    "num_steps": 2,
    "extractors": embedding.EmbeddingOptions().extractors[:1],
    "num_vectors": (1000,),
    "epochs": 2,
    "max_photos": 2,
    "networks": ("facenet_vggface2", "openface"),
    "num_chips": 1,
    "num_images": 64,
    "num_blocks": (1,),
    "width": 4,
    "batch_size": 32,
    "noise_steps": 2,
    "loop_batch": 2,
    "loop_steps": 2,
    "loop_images": 4,
    "scaling_batches": (1, 2),
    "scaling_steps": 1,
    "scaling_lengths": (1, 2),
    "scaling_sets": (4, 8),
    "scaling_devices": (1, 2),
    "scaling_images": 4,
}
_TOY_PX = 160
_NOTE = (
    "The reference implementations were not measured: pass --reference_python, the Python of an "
    "environment that has them. experiments/reference/README.md says how to make one."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(options.Config):
    """Measures speed and results beside other people's implementations, on the same inputs.

        python -m experiments.benchmark --reference_python=reference/bin/python

    Rows (--rows); each of them has flags of its own below:
      detection  our MTCNN beside PyPI `mtcnn`: ms per photo, and whether both find the same faces.
      folder     the whole detect program on photos of all sizes, with an empty cache and a full
                 one, beside PyPI `mtcnn`, which starts and decodes for free, and YuNet; how many
                 programs it compiles, and its memory.
      cloaking   our Fawkes beside the optimizer of PyPI `fawkes`: same net (dlib's ResNet), DSSIM
                 budget, pixel limit, steps and batches of 4. ms per face and step; the distance
                 reached and the DSSIM of the 8-bit chips; the share of our step that the net does
                 not take.
      embedding  our extractors beside their originals: ms per face in batches of 16.
      database   the reference database of synthetic vectors of 128 numbers: enrolment and queries,
                 exact and through the index, and the index's recall. Ours alone.
      patches    epochs of our patch attack beside a plain loop in PyTorch, on a person's film or
                 photos of one size in --images; on a GPU as many --starts as it holds.
      detector_agreement   whether our MTCNN and PyPI `mtcnn` find the same faces on --images; lists
                           every disagreement. 1 s a photo.
      extractor_agreement  whether our extractors compute what the originals compute, from the
                           originals' own files. 4 minutes, 2 GB of temporary files.
      loops      each hot loop beside the device's limit: arithmetic and traffic by XLA's count,
                 shares of the best product and copy, programs, compilation, memory. Ours alone;
                 JAX_ENABLE_COMPILATION_CACHE=false compiles anew.
      scaling    a cloak step by faces of a batch and by steps, noise by images, a training step by
                 devices; scaling.png. JAX_NUM_CPU_DEVICES=4 makes four of a CPU. Ours alone.
      noise, victim   a pass of signed steps over the noise of all images, an epoch of a victim,
                      beside PyTorch: a small net for CPUs; for one GPU --num_images=50000
                      --num_blocks=2,2,2,2 --width=64 --batch_size=512 --noise_steps=20. Ours takes
                      about as long on two CPU cores; on an H200 it is 2.3 and 1.65 times as fast.

    Both sides run everything once before they are timed, then take turns. The reference
    implementations are processes of another environment, kept alive, which time themselves
    (experiments/reference/README.md says how to make it); without --reference_python their columns
    stay empty, and rows of agreement are refused.

    Writes `result.json` and `benchmark.md` (the table of standard error) into the work folder.
    Measure on an idle machine. Exit code 3: an image could not be read, or an extractor disagrees.
    Expected on two CPU cores: 20 minutes for the default rows with the reference implementations;
    --toy: half a minute without them.
    """

    rows: tuple[str, ...] = options.option(
        ("detection", "cloaking"), "what to measure", choices=tuple(ROWS)
    )
    images: tuple[str, ...] = options.option(
        (), "photos and folders; default: made of a sample portrait"
    )
    originals: reference.ReferenceOptions = options.group(reference.ReferenceOptions)
    repeats: int = options.option(5, "timed runs of each side", at_least=1)
    detection_row: detection.DetectionOptions = options.group(detection.DetectionOptions)
    folder_row: folder.FolderOptions = options.group(folder.FolderOptions)
    cloaking_row: cloaking.CloakingOptions = options.group(cloaking.CloakingOptions)
    embedding_row: embedding.EmbeddingOptions = options.group(embedding.EmbeddingOptions)
    database_row: database.DatabaseOptions = options.group(database.DatabaseOptions)
    patches_row: patches.PatchesOptions = options.group(patches.PatchesOptions)
    detector_agreement_row: detector_agreement.DetectorAgreementOptions = options.group(
        detector_agreement.DetectorAgreementOptions
    )
    extractor_agreement_row: extractor_agreement.ExtractorAgreementOptions = options.group(
        extractor_agreement.ExtractorAgreementOptions
    )
    loops_row: hot_loops.LoopsOptions = options.group(hot_loops.LoopsOptions)
    scaling_row: scaling.ScalingOptions = options.group(scaling.ScalingOptions)
    unlearnable_row: unlearnable.UnlearnableOptions = options.group(unlearnable.UnlearnableOptions)
    workdir: str | None = options.option("out/benchmark", options.WORKDIR_HELP)
    is_toy: bool = False

    def toy(self) -> "BenchmarkConfig":
        """Few and small inputs, few repeats."""
        return dataclasses.replace(options.fill_defaults(self, _TOY), is_toy=True)


def run(config: BenchmarkConfig) -> options.Outcome:
    """Measures the rows one after the other.

    Raises:
        options.UsageError: an input that a row needs is missing.
    """
    images = _list_images(config)
    work = _open(config)
    provenance = core_program.provenance("experiments.benchmark", config=config)
    measured = {}
    load = timing.load()
    for name in config.rows:
        field, row_fn = ROWS[name]
        with tempfile.TemporaryDirectory() as place:
            given = setting.Setting(
                reference=config.originals,
                folder=pathlib.Path(place),
                images=images,
                repeats=config.repeats,
                seed=config.seed,
                max_px=_TOY_PX if config.is_toy else None,
            )
            measured[name] = row_fn(getattr(config, field), given)
    others = load.others()
    versions = {name: found.versions for name, found in measured.items() if found.versions}
    result = {
        **provenance,
        "settings": _settings(config),
        "inputs": (
            f"{sum(map(len, images))} files of --images" if images else "made of a sample portrait"
        ),
        "used_by_others": others,
        "peers": versions,
        "rows": [row for found in measured.values() for row in found.rows],
        **{name: found.details for name, found in measured.items() if found.details},
        "note": None if versions else _NOTE,
    }
    page = _page(config, result)
    files.write_atomically(work.path / "benchmark.md", page.encode(), overwrite=True)
    for found in measured.values():
        for name, figure in found.figures.items():
            figures.save(figure, work.path / f"{name}.png")
    print(page, file=sys.stderr)
    work.write_result(result)
    return options.Outcome(result, complete=all(found.complete for found in measured.values()))


def _settings(config: BenchmarkConfig) -> dict[str, files.Json]:
    """The options by flag, but for places of this machine."""
    places = ("workdir", "images", "reference_python", "mobilefacenet", "database_folder")
    return {
        leaf.flag: functools.reduce(getattr, leaf.path, config)
        for leaf in options.leaves(type(config))
        if leaf.flag not in places
    } | {"toy": config.is_toy}


def _open(config: BenchmarkConfig) -> workdir.Workdir:
    """The work folder; a benchmark starts anew whatever was measured there."""
    names = [".".join(leaf.path) for leaf in options.leaves(type(config))]
    return workdir.open_workdir(config.workdir, config, resumable=[*names, "is_toy"])


def _list_images(config: BenchmarkConfig) -> list[list[photo_files.PhotoInput]]:
    images = []
    for path in config.images:
        with options.usage("--images"):
            found = list(photo_files.list_photos([pathlib.Path(path).expanduser()]))
        if not found:
            raise options.UsageError(f"--images: {path} holds no files")
        images.append(found)
    return images


def _page(config: BenchmarkConfig, result: Mapping[str, files.Json]) -> str:
    """The table with what its reader must know."""
    host = result["machine"]
    lines = [
        timing.table(result["rows"]),
        "",
        f"Median (least-largest) of {config.repeats} runs. {host['processor']}, {host['cores']} "
        f"cores; {host['num_devices']} x {host['device']}; jax {host['jax']}. "
        f"{result['date']}, commit {result['commit']}.",
    ]
    if result["used_by_others"] is not None:
        lines.append(f"Others used {result['used_by_others']:.0%} of the processors meanwhile.")
    for name, versions in result["peers"].items():
        found = ", ".join(f"{package} {version}" for package, version in versions.items())
        lines.append(f"Reference of {name}: {found}.")
    if "cloaking" in result["peers"] and config.cloaking_row.reference_graph:
        lines.append("The package's net is compiled (--reference_graph), which it does not do.")
    if result["note"]:
        lines.append(result["note"])
    return "\n".join(lines) + "\n"
