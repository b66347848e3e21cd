"""Checks that our face extractors compute what the originals compute, and read their files.

    python -m experiments.extractor_agreement --peer_python=peers/bin/python

For each network the original (facenet-pytorch's module, the Keras models of `deepface`,
InsightFace's layouts in torch) is filled with random weights and random BatchNorm statistics and
writes them in its own format; our reader reads that file, and both embed the same chips. The error
is the largest difference of two embeddings in units of their root mean square; it must not exceed
--tolerance, or the program ends with exit code 3. --mobilefacenet=FOLDER also compares the
published MobileFaceNet (`mobilefacenet_y1_ms1m.npz`) with its list of layers (`.json` beside it),
computed one by one in torch. dlib's descriptor is compared with dlib in the tests.

Writes `result.json` into the work folder, by default `out/extractor_agreement`. How to make the
environment of the originals: experiments/reference/README.md. Expected on two CPU cores: 4 minutes,
2 GB of temporary files, errors of 1e-6 to 5e-5 (IResNet-100). --toy: FaceNet and OpenFace on one
chip, one minute.
"""

import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from afr_jax.core import program, progress, workdir
from afr_jax.evaluation import reference
from afr_jax.models.extractors import mobilefacenet, registry

_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python of an environment with the peers")
_NETWORKS = flags.DEFINE_list("networks", None, "which to compare; default: all")
_NUM_CHIPS = flags.DEFINE_integer("num_chips", 3, "chips for each network", lower_bound=1)
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-4, "largest error that passes", lower_bound=0.0)
_MOBILEFACENET = flags.DEFINE_string(
    "mobilefacenet", None, "folder with mobilefacenet_y1_ms1m.npz and .json"
)

_SCRIPT = pathlib.Path(__file__).resolve().parent / "reference" / "extractors_driver.py"
# Suffix of the weight file of each network, and whether torch's format before 1.6 is read, too.
_FORMATS = {
    "facenet_vggface2": (".pt", True),
    "openface": (".h5", False),
    "mobilefacenet": (".pth", False),
    "arcface_r50": (".pth", False),
    "arcface_r100": (".pth", False),
    "vggface": (".h5", False),
    "deepface": (".h5", False),
}
_TOY = ("facenet_vggface2", "openface")
_GRAPH = "mobilefacenet_graph"


def agreement_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    networks = _networks()
    if _PEER_PYTHON.value is None:
        raise program.UsageError("--peer_python is needed; see experiments/reference/README.md")
    num_chips = 1 if flags.FLAGS.toy else _NUM_CHIPS.value
    settings = {
        "networks": networks,
        "num_chips": num_chips,
        "tolerance": _TOLERANCE.value,
        "seed": flags.FLAGS.seed,
        "toy": flags.FLAGS.toy,
    }
    work = workdir.open_workdir(
        flags.FLAGS.workdir or "out/extractor_agreement", settings, resumable=settings
    )
    provenance = program.provenance("experiments.extractor_agreement")
    rows, failed = [], []
    for network in progress.track(networks, description="networks"):
        # A process for each: torch and TensorFlow stay apart, and memory is given back.
        try:
            with reference.Peer(pathlib.Path(_PEER_PYTHON.value).expanduser(), _SCRIPT) as other:
                versions = other.versions
                with tempfile.TemporaryDirectory() as folder:
                    rows += _compare(network, other, pathlib.Path(folder), num_chips)
        except reference.PeerError as error:
            failed.append({"network": network, "reason": str(error)})
    if not rows:
        raise program.UsageError(f"--peer_python: {failed[0]['reason']}")
    failed += [
        {"network": row["network"], "reason": f"error {row['error']:.2g}"}
        for row in rows
        if not row["error"] <= _TOLERANCE.value
    ]
    result = {
        **provenance,
        "peer": versions,
        "settings": settings,
        "rows": rows,
        "largest_error": max(row["error"] for row in rows),
        "failed": failed,
    }
    work.write_result(result)
    return result, program.EXIT_PARTIAL if failed else program.EXIT_OK


def _networks() -> list[str]:
    networks = _NETWORKS.value or list(_TOY if flags.FLAGS.toy else _FORMATS)
    for name in networks:
        if name not in _FORMATS:
            raise program.UsageError(f"--networks: {name!r} is none of {', '.join(_FORMATS)}")
    if _MOBILEFACENET.value is None:
        return networks
    for path in _graph_files():
        if not path.is_file():
            raise program.UsageError(f"--mobilefacenet: there is no {path}")
    return [*networks, _GRAPH]


def _graph_files() -> tuple[pathlib.Path, pathlib.Path]:
    folder = pathlib.Path(_MOBILEFACENET.value).expanduser()
    return folder / "mobilefacenet_y1_ms1m.json", folder / "mobilefacenet_y1_ms1m.npz"


def _compare(
    network: str, other: reference.Peer, folder: pathlib.Path, num_chips: int
) -> list[dict[str, Any]]:
    """A row for each format of the network's weight file."""
    if network == _GRAPH:
        extractor = registry.get("mobilefacenet")
        graph, arrays = _graph_files()
        chips, inputs = _chips(extractor, num_chips)
        theirs = _ask(other, folder, network, 255 * chips, graph=str(graph), arrays=str(arrays))
        variables = registry.load_variables(extractor, arrays)
        return [_row(network, ".npz", extractor.module, variables, inputs, theirs)]
    extractor = registry.get(network)
    module, read_fn = extractor.module, extractor.read
    if network == "mobilefacenet":
        # InsightFace's torch version.
        module = mobilefacenet.MobileFaceNet(use_bias=False, epsilon=1e-5)
        read_fn = lambda path: mobilefacenet.read_weights(path, module=module)  # noqa: E731
    suffix, has_legacy = _FORMATS[network]
    _, inputs = _chips(extractor, num_chips)
    rows = []
    for is_legacy in (False, True) if has_legacy else (False,):
        path = folder / f"weights{suffix}"
        other.call("write", name=network, seed=flags.FLAGS.seed, path=str(path), legacy=is_legacy)
        kind = f"{suffix} before torch 1.6" if is_legacy else suffix
        theirs = _ask(other, folder, network, inputs)
        rows.append(_row(network, kind, module, read_fn(path), inputs, theirs))
    return rows


def _chips(extractor: registry.Extractor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random chips `[N, S, S, 3]` in [0, 1], and the same in the range of the network."""
    generator = np.random.default_rng([flags.FLAGS.seed, extractor.input_px])
    chips = generator.random((count, extractor.input_px, extractor.input_px, 3), np.float32)
    return chips, (chips * extractor.input_scale + extractor.input_offset).astype(np.float32)


def _ask(
    other: reference.Peer, folder: pathlib.Path, name: str, inputs: np.ndarray, **files: str
) -> np.ndarray:
    chips, output = folder / "chips.npy", folder / "embeddings.npy"
    np.save(chips, inputs)
    other.call("embed", name=name, chips=str(chips), output=str(output), **files)
    return np.load(output)


def _row(network, kind, module, variables, inputs, theirs) -> dict[str, Any]:
    start = time.perf_counter()
    variables = jax.tree.map(jnp.asarray, variables)
    ours = np.asarray(jax.jit(module.apply)(variables, inputs), np.float64)
    seconds = time.perf_counter() - start
    if network.startswith("facenet") or network == "openface":
        # These originals scale their embeddings to unit length.
        ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    size = float(np.sqrt(np.mean(theirs.astype(np.float64) ** 2)))
    return {
        "network": network,
        "format": kind,
        "dimensions": theirs.shape[1],
        "error": float(np.abs(ours - theirs).max() / size),
        "absolute_error": float(np.abs(ours - theirs).max()),
        # Between the embeddings of two chips, in the same units: what an error would have to hide.
        "spread": float(np.abs(theirs - theirs.mean(axis=0)).max() / size),
        "seconds": seconds,
    }


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(agreement_program)
