"""Row `embedding`: how fast our extractors embed a face, beside their originals.

The originals are dlib, facenet-pytorch's module and a MobileFaceNet in torch, in inference mode;
those in torch also as onnxruntime runs them. All sides get the same batch of aligned chips;
detection and alignment are not in it.
"""

import dataclasses
import functools
import pathlib
import time
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.benchmark import setting, timing
from afr_jax.core import options
from afr_jax.evaluation import reference
from afr_jax.models.extractors import registry
from afr_jax.models.weights import conversion

DRIVER = "extractors_driver.py"
_BATCH = 16
_OTHER_RUNTIME = "onnxruntime"


@dataclasses.dataclass(frozen=True)
class EmbeddingOptions:
    """What is measured in the row `embedding`."""

    extractors: tuple[str, ...] = options.option(
        ("dlib", "facenet_casia", "mobilefacenet"),
        "networks for embedding",
        choices=tuple(registry.EXTRACTORS),
    )

    def __post_init__(self) -> None:
        """Checks the names."""
        options.check(self)


def run(config: EmbeddingOptions, given: setting.Setting) -> setting.Measured:
    """A batch of chips, through each extractor."""
    rows = []
    with given.reference.open(DRIVER) as other:
        for name in config.extractors:
            rows += measure(
                registry.get(name),
                given.folder,
                other,
                batch=_BATCH,
                repeats=given.repeats,
                seed=given.seed,
            )
        return setting.Measured(rows, other.versions if other else {})


def measure(
    extractor: registry.Extractor,
    folder: pathlib.Path,
    other: reference.ReferenceProcess | None,
    *,
    batch: int,
    repeats: int,
    seed: int = 0,
) -> list[timing.Row]:
    """Rows of the table: milliseconds a face.

    Weights and chips are random, which costs the same as real ones.

    Args:
        extractor: of the registry.
        folder: where chips are put for the original.
        other: the original; None leaves its column empty.
        batch: chips of a call.
        repeats: timed calls of each side.
        seed: of weights and chips.
    """
    rng = np.random.default_rng(seed)
    side = extractor.input_px
    chips = rng.uniform(size=(batch, side, side, 3)).astype(np.float32)
    source = folder / f"{extractor.name}.npy"
    inputs = extractor.input_scale * chips + extractor.input_offset
    np.save(source, inputs[..., ::-1] if extractor.is_bgr else inputs)
    variables = _random_variables(extractor, seed)
    placed = jnp.asarray(chips)

    def ours() -> float:
        # As the others: once untimed, after what the turn before has left in caches and threads.
        jax.block_until_ready(embed_chips(variables, placed, extractor))
        start = time.perf_counter()
        jax.block_until_ready(embed_chips(variables, placed, extractor))
        return 1e3 * (time.perf_counter() - start) / batch

    def theirs(with_onnxruntime: bool) -> float:
        answer = cast(reference.ReferenceProcess, other).call(
            "throughput",
            name=extractor.name,
            chips=str(source),
            repeats=1,
            with_onnxruntime=with_onnxruntime,
        )
        return 1e3 * answer["seconds"][0] / batch

    sides = {"ours": ours}
    if other is not None:
        sides["theirs"] = functools.partial(theirs, False)
        if extractor.name != "dlib":
            sides[_OTHER_RUNTIME] = functools.partial(theirs, True)
    times = timing.take_turns(sides, repeats=repeats)
    row = f"embedding, {extractor.name}, batch {batch}"
    rows = [timing.compare(row, "ms per face", times["ours"], times.get("theirs"))]
    if _OTHER_RUNTIME in times:
        quantity = f"ms per face, {_OTHER_RUNTIME}"
        rows.append(timing.compare(row, quantity, times["ours"], times[_OTHER_RUNTIME]))
    return rows


def _random_variables(extractor: registry.Extractor, seed: int) -> conversion.Variables:
    shapes = conversion.shapes(extractor.module, extractor.input_px)
    rng = np.random.default_rng(seed)
    # Small and positive: also a variance.
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.01, 0.02, leaf.shape).astype(np.float32)), shapes
    )


@functools.partial(jax.jit, static_argnames="extractor")
def embed_chips(
    variables: conversion.Variables, chips: jax.Array, extractor: registry.Extractor
) -> jax.Array:
    """Embeddings `[N, D]` of chips `[N, S, S, 3]` in [0, 1]; compiled."""
    return registry.embed(extractor, variables, chips)
