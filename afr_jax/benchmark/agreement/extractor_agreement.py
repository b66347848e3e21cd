"""Row `extractor_agreement`: do our extractors compute what the originals do, and read their files?

For each network the original (facenet-pytorch's module, the Keras models of `deepface`,
InsightFace's layouts in torch) is filled with random weights and random BatchNorm statistics and
writes them in its own format; our reader reads that file, and both embed the same chips. The error
is the largest difference of two embeddings in units of their root mean square. dlib's descriptor is
compared with dlib in the tests. Expected: errors of 1e-6 to 5e-5 (IResNet-100).
"""

import dataclasses
import pathlib
import tempfile
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.benchmark import setting, timing
from afr_jax.core import files, options, progress
from afr_jax.evaluation import reference
from afr_jax.models.extractors import mobilefacenet, registry
from afr_jax.models.weights import conversion

DRIVER = "extractors_driver.py"
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
_GRAPH = "mobilefacenet_graph"


@dataclasses.dataclass(frozen=True)
class ExtractorAgreementOptions:
    """What is compared in the row `extractor_agreement`."""

    networks: tuple[str, ...] = options.option(
        tuple(_FORMATS), "whose agreement is checked", choices=tuple(_FORMATS)
    )
    num_chips: int = options.option(3, "chips for each of them", at_least=1)
    tolerance: float = options.option(1e-4, "largest error that agrees", at_least=0)
    mobilefacenet: str | None = options.option(
        None, "folder with mobilefacenet_y1_ms1m.npz and .json, to be compared layer by layer"
    )

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        options.check(self)


def run(config: ExtractorAgreementOptions, given: setting.Setting) -> setting.Measured:
    """Compares the embeddings of each network; the details name those that disagree.

    Raises:
        options.UsageError: there is no original to compare with, or files are missing.
    """
    networks = list(config.networks)
    if config.mobilefacenet is not None:
        for path in _graph_files(config.mobilefacenet):
            if not path.is_file():
                raise options.UsageError(f"--mobilefacenet: there is no {path}")
        networks.append(_GRAPH)
    found, failed, versions = [], [], {}
    for network in progress.track(networks, description="networks"):
        # A process for each: torch and TensorFlow stay apart, and memory is given back.
        with given.reference.start(DRIVER) as other, tempfile.TemporaryDirectory() as folder:
            versions = other.versions
            here = given._replace(folder=pathlib.Path(folder))
            try:
                found += _compare(network, other, config, here)
            except reference.ReferenceProcessError as error:
                failed.append({"network": network, "reason": str(error)})
    if not found:
        raise options.UsageError(f"--reference_python: {failed[0]['reason']}")
    failed += [
        {"network": item["network"], "reason": f"error {item['error']:.2g}"}
        for item in found
        if not item["error"] <= config.tolerance
    ]
    rows = [
        timing.state(
            f"extractor agreement, {item['network']} from {item['format']}",
            "largest error, root mean squares",
            item["error"],
            None,
        )
        for item in found
    ]
    details = {
        "rows": found,
        "largest_error": max(item["error"] for item in found),
        "failed": failed,
    }
    return setting.Measured(rows, versions, details, complete=not failed)


def _graph_files(place: str) -> tuple[pathlib.Path, pathlib.Path]:
    folder = pathlib.Path(place).expanduser()
    return folder / "mobilefacenet_y1_ms1m.json", folder / "mobilefacenet_y1_ms1m.npz"


def _compare(
    network: str,
    other: reference.ReferenceProcess,
    config: ExtractorAgreementOptions,
    given: setting.Setting,
) -> list[dict[str, files.Json]]:
    """A finding for each format of the network's weight file."""
    folder, num_chips, seed = given.folder, config.num_chips, given.seed
    if network == _GRAPH and config.mobilefacenet is not None:
        extractor = registry.get("mobilefacenet")
        graph, arrays = _graph_files(config.mobilefacenet)
        chips, inputs = _chips(extractor, num_chips, seed)
        theirs = _ask(other, folder, network, 255 * chips, graph=str(graph), arrays=str(arrays))
        variables = registry.load_variables(extractor, arrays)
        return [_finding(network, ".npz", extractor.module, variables, inputs, theirs)]
    extractor = registry.get(network)
    module, read_fn = extractor.module, extractor.read
    if network == "mobilefacenet":
        # InsightFace's torch version.
        module = mobilefacenet.MobileFaceNet(use_bias=False, epsilon=1e-5)
        read_fn = lambda path: mobilefacenet.read_weights(path, module=module)  # noqa: E731
    assert read_fn is not None, f"{network} has an original's format"
    suffix, has_legacy = _FORMATS[network]
    _, inputs = _chips(extractor, num_chips, seed)
    rows = []
    for is_legacy in (False, True) if has_legacy else (False,):
        path = folder / f"weights{suffix}"
        other.call("write", name=network, seed=seed, path=str(path), legacy=is_legacy)
        kind = f"{suffix} before torch 1.6" if is_legacy else suffix
        theirs = _ask(other, folder, network, inputs)
        rows.append(_finding(network, kind, module, read_fn(path), inputs, theirs))
    return rows


def _chips(extractor: registry.Extractor, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random chips `[N, S, S, 3]` in [0, 1], and the same in the range of the network."""
    generator = np.random.default_rng([seed, extractor.input_px])
    chips = generator.random((count, extractor.input_px, extractor.input_px, 3), np.float32)
    return chips, (chips * extractor.input_scale + extractor.input_offset).astype(np.float32)


def _ask(
    other: reference.ReferenceProcess,
    folder: pathlib.Path,
    name: str,
    inputs: np.ndarray,
    **files: str,
) -> np.ndarray:
    chips, output = folder / "chips.npy", folder / "embeddings.npy"
    np.save(chips, inputs)
    other.call("embed", name=name, chips=str(chips), output=str(output), **files)
    return np.load(output)


def _finding(
    network: str,
    kind: str,
    module: nn.Module,
    variables: conversion.Variables,
    inputs: np.ndarray,
    theirs: np.ndarray,
) -> dict[str, files.Json]:
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
