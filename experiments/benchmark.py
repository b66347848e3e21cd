"""Measures speed and results against other people's implementations, on the same inputs.

    python -m experiments.benchmark --peer_python=peers/bin/python --workdir=out/benchmark

Rows (--rows):
  detection  our MTCNN against PyPI `mtcnn`: ms per photo, and whether both find the same faces.
  cloaking   our Fawkes against the optimiser of PyPI `fawkes`: same net (dlib's ResNet), DSSIM
             budget, pixel limit, steps and batches of 4. ms per face and step; the distance reached
             and the DSSIM of the 8-bit chips; the share of our step that the net does not take.
  embedding  our extractors against their originals: dlib, facenet-pytorch's module and a
             MobileFaceNet in torch; ms per face in batches of 16.
  database   the reference database at 10,000, 100,000 and 1,000,000 made vectors of 128 numbers:
             enrolment and queries, exact and through the index, and the index's recall. No peer.

Both sides run everything once before they are timed, then take turns. The peers are processes of
another environment, kept alive, which time themselves; without --peer_python their columns stay
empty. That environment (more in experiments/reference/README.md):

    python3.11 -m venv peers
    peers/bin/pip install tensorflow-cpu tf_keras mtcnn==1.0.0 face_recognition_models==0.3.0
    peers/bin/pip install torch dlib-bin
    peers/bin/pip install --no-deps fawkes==1.0.4 facenet-pytorch deepface

Writes `result.json` and `benchmark.md` (the table of standard error) into the work folder, by
default `out/benchmark`. Measure on an idle machine. Expected on two CPU cores: 20 minutes with the
peers; --toy: half a minute without them.
"""

import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import skimage.data
from absl import flags

from afr_jax.benchmark import cloaking, database, detection, embedding, photos, timing
from afr_jax.core import files, program, workdir
from afr_jax.data import photo_files
from afr_jax.evaluation import reference
from afr_jax.methods.cloaking import fawkes
from afr_jax.models import mtcnn
from afr_jax.models.extractors import registry
from afr_jax.recognition import detect

_ROWS = flags.DEFINE_list("rows", ["detection", "cloaking"], "what to measure")
_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python of an environment with the peers")
_IMAGES = flags.DEFINE_list("images", [], "photos and folders; default: made of a sample portrait")
_NUM_PHOTOS = flags.DEFINE_integer("num_photos", 12, "photos for detection", lower_bound=1)
_NUM_FACES = flags.DEFINE_list("num_faces", ["4", "20"], "faces for cloaking, measured one by one")
_EXTRACTORS = flags.DEFINE_list(
    "extractors", ["dlib", "facenet_casia", "mobilefacenet"], "networks for embedding"
)
_NUM_VECTORS = flags.DEFINE_list(
    "num_vectors", ["10000", "100000", "1000000"], "sizes of the database, measured one by one"
)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 40, "gradient steps of a cloak", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs of each side", lower_bound=1)
_PEER_GRAPH = flags.DEFINE_bool(
    "peer_graph", True, "compile the net for fawkes (tf.function): faster than the package as it is"
)

_PEERS = pathlib.Path(__file__).resolve().parent / "reference"
_SCRIPTS = {
    "detection": "mtcnn_driver.py",
    "cloaking": "fawkes_driver.py",
    "embedding": "extractors_driver.py",
    "database": None,
}
_BATCH, _EMBEDDING_BATCH = 4, 16
_MIN_CONFIDENCE = 0.9
_NOTE = (
    "The peers were not measured: pass --peer_python, the Python of an environment that has them. "
    "experiments/reference/README.md says how to make one."
)


class _Settings(NamedTuple):
    """The resolved options."""

    rows: tuple[str, ...]
    num_photos: int
    photo_px: int
    num_faces: tuple[int, ...]
    extractors: tuple[str, ...]
    num_vectors: tuple[int, ...]
    num_steps: int
    batch: int
    dssim_budget: float
    repeats: int
    peer_graph: bool
    seed: int
    toy: bool


def benchmark_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    settings = _settings()
    sources = _sources()
    work = workdir.open_workdir(
        flags.FLAGS.workdir or "out/benchmark", settings, resumable=settings._fields
    )
    provenance = program.provenance("experiments.benchmark")
    try:
        detector = jax.tree.map(jnp.asarray, mtcnn.read_weights(mtcnn.find_weights()))
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(str(error)) from error
    rows, versions = [], {}
    for name in settings.rows:
        measure_fn = {
            "detection": _detection,
            "cloaking": _cloaking,
            "embedding": _embedding,
            "database": _database,
        }[name]
        with tempfile.TemporaryDirectory() as folder, _open_peer(_SCRIPTS[name]) as other:
            rows += measure_fn(settings, detector, sources, pathlib.Path(folder), other)
            if other is not None:
                versions[name] = other.versions
    result = {
        **provenance,
        "settings": settings,
        "inputs": f"{len(sources)} files of --images" if sources else "made of a sample portrait",
        "peers": versions,
        "rows": rows,
        "note": None if versions else _NOTE,
    }
    page = _page(result)
    files.write_atomically(work.path / "benchmark.md", page.encode(), overwrite=True)
    print(page, file=sys.stderr)
    work.write_result(result)
    return result, program.EXIT_OK


def _settings() -> _Settings:
    for name in _ROWS.value:
        if name not in _SCRIPTS:
            raise program.UsageError(f"--rows: {name!r} is none of {', '.join(_SCRIPTS)}")
    for name in _EXTRACTORS.value:
        if name not in registry.EXTRACTORS:
            raise program.UsageError(
                f"--extractors: {name!r} is none of {', '.join(sorted(registry.EXTRACTORS))}"
            )
    settings = _Settings(
        rows=tuple(_ROWS.value),
        num_photos=_NUM_PHOTOS.value,
        photo_px=640,
        num_faces=_numbers("num_faces", _NUM_FACES.value),
        extractors=tuple(_EXTRACTORS.value),
        num_vectors=_numbers("num_vectors", _NUM_VECTORS.value),
        num_steps=_NUM_STEPS.value,
        batch=_BATCH,
        dssim_budget=fawkes.MODES["mid"],
        repeats=_REPEATS.value,
        peer_graph=_PEER_GRAPH.value,
        seed=flags.FLAGS.seed,
        toy=flags.FLAGS.toy,
    )
    if not settings.toy:
        return settings
    return settings._replace(
        num_photos=min(settings.num_photos, 2),
        photo_px=160,
        num_faces=(2,),
        extractors=settings.extractors[:1],
        num_vectors=(1000,),
        num_steps=min(settings.num_steps, 2),
        repeats=min(settings.repeats, 2),
    )


def _numbers(flag: str, values: Sequence[str]) -> tuple[int, ...]:
    try:
        numbers = tuple(int(value) for value in values)
    except ValueError:
        numbers = ()
    if min(numbers, default=0) < 1:
        raise program.UsageError(f"--{flag}={','.join(values)} must be numbers from 1 on")
    return numbers


def _sources() -> list[pathlib.Path]:
    paths = [pathlib.Path(path).expanduser() for path in _IMAGES.value]
    try:
        found = photo_files.list_photos(paths)
    except FileNotFoundError as error:
        raise program.UsageError(f"--images: {error}") from error
    if paths and not found:
        raise program.UsageError(f"--images={','.join(_IMAGES.value)} holds no files")
    return [item.path for item in found if item.problem is None]


@contextlib.contextmanager
def _open_peer(script: str | None) -> Iterator[reference.Peer | None]:
    if _PEER_PYTHON.value is None or script is None:
        yield None
        return
    try:
        other = reference.Peer(pathlib.Path(_PEER_PYTHON.value).expanduser(), _PEERS / script)
    except reference.PeerError as error:
        raise program.UsageError(f"--peer_python: {error}") from error
    with other:
        yield other


def _detection(
    settings: _Settings,
    detector: dict,
    sources: Sequence[pathlib.Path],
    folder: pathlib.Path,
    other: reference.Peer | None,
) -> list[dict[str, Any]]:
    """Photos of one longer side and many shapes, through both detectors."""
    batch = [
        photos.resized(pixels, settings.photo_px)
        for pixels in photos.read(sources, settings.num_photos)
    ]
    if not sources:
        batch = [photos.made(i, settings.photo_px) for i in range(settings.num_photos)]
    if not batch:
        raise program.UsageError("--images holds no readable photo")
    return detection.measure(
        f"detection, {len(batch)} photos of {settings.photo_px} px",
        detector,
        batch,
        folder,
        other,
        options=detect.DetectorOptions(),
        repeats=settings.repeats,
    )


def _cloaking(
    settings: _Settings,
    detector: dict,
    sources: Sequence[pathlib.Path],
    folder: pathlib.Path,
    other: reference.Peer | None,
) -> list[dict[str, Any]]:
    """The surest face of each photo, aligned, through both optimisers."""
    extractor = registry.get("dlib")
    try:
        variables = jax.tree.map(jnp.asarray, extractor.load())
    except (FileNotFoundError, ValueError) as error:
        raise program.UsageError(str(error)) from error
    faces = []
    for pixels in photos.read(sources, len(sources)) if sources else [skimage.data.astronaut()]:
        if settings.toy:
            pixels = photos.resized(pixels, settings.photo_px)
        found = detect.detect_faces(detector, pixels)
        if len(found.boxes) and found.confidences[0] >= _MIN_CONFIDENCE:
            faces.append((pixels, found.landmarks[0]))
        if len(faces) == max(settings.num_faces):
            break
    if not faces:
        raise program.UsageError("--images holds no photo with a face")
    chips = cloaking.cut_chips(extractor, faces, max(settings.num_faces), seed=settings.seed)
    config = fawkes.FawkesConfig(
        dssim_budget=settings.dssim_budget,
        num_steps=settings.num_steps,
        align_shift=0.0,
        align_turn=0.0,
    )
    rows = []
    for count in settings.num_faces:
        rows += cloaking.measure(
            f"cloaking, {count} faces, {settings.num_steps} steps",
            extractor,
            variables,
            chips[:count],
            folder,
            other,
            config=config,
            batch=settings.batch,
            repeats=settings.repeats,
            peer_graph=settings.peer_graph,
            seed=settings.seed,
        )
    return rows


def _embedding(settings, detector, sources, folder, other) -> list[dict[str, Any]]:
    """A batch of chips, through each extractor."""
    del detector, sources
    rows = []
    for name in settings.extractors:
        rows += embedding.measure(
            registry.get(name),
            folder,
            other,
            batch=_EMBEDDING_BATCH,
            repeats=settings.repeats,
            seed=settings.seed,
        )
    return rows


def _database(settings, detector, sources, folder, other) -> list[dict[str, Any]]:
    """Reference databases of made vectors; ours alone."""
    del detector, sources, other
    return database.measure(
        folder, settings.num_vectors, repeats=settings.repeats, seed=settings.seed
    )


def _page(result: dict[str, Any]) -> str:
    """The table with what its reader must know."""
    host, settings = result["machine"], result["settings"]
    lines = [
        timing.table(result["rows"]),
        "",
        f"Median (least-largest) of {settings.repeats} runs. {host['processor']}, {host['cores']} "
        f"cores; {host['num_devices']} x {host['device']}; jax {host['jax']}. "
        f"{result['date']}, commit {result['commit']}.",
    ]
    for name, versions in result["peers"].items():
        found = ", ".join(f"{package} {version}" for package, version in versions.items())
        lines.append(f"Peer of {name}: {found}.")
    if "cloaking" in result["peers"] and settings.peer_graph:
        lines.append("The peer's net is compiled (--peer_graph), which the package does not do.")
    if result["note"]:
        lines.append(result["note"])
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(benchmark_program)
