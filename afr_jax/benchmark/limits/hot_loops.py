"""Row `loops`: each hot loop beside the device's own limit.

A loop runs on random pixels, which cost what real ones do. Its arithmetic and traffic are what XLA
counts of its largest program; the limit is the best product of matrices and the best copy that were
measured in turns with it. On a CPU both are taken by processor time, which depends less on other
programs than the clock does; on an accelerator by the clock.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.benchmark import cloaking, embedding, setting, timing, unlearnable
from afr_jax.benchmark.limits import compiled
from afr_jax.core import options, parallel
from afr_jax.methods.cloaking import fawkes
from afr_jax.models import mtcnn
from afr_jax.models.extractors import registry
from afr_jax.recognition import match
from afr_jax.training import trainer

_TILE_PX = 128
_GALLERY, _PROBES = 16_384, 256


@dataclasses.dataclass(frozen=True)
class LoopsOptions:
    """What is measured in the row `loops`."""

    loops: tuple[str, ...] = options.option(
        ("cloak", "embed", "propose", "search", "noise", "victim"),
        "loops: which",
        choices=("cloak", "embed", "propose", "search", "noise", "victim"),
    )
    loop_batch: int = options.option(16, "loops: faces, chips or tiles of a batch", at_least=1)
    loop_steps: int = options.option(10, "loops: steps of a cloak", at_least=1)
    loop_images: int = options.option(128, "loops: images of a batch of noise, victim", at_least=2)

    def __post_init__(self) -> None:
        """Checks the ranges."""
        options.check(self)


class HotLoop(NamedTuple):
    """A loop that can be run again and again.

    Attributes:
        name: for people.
        unit: what it does `units` of in a run.
        units: how many.
        calls: of its largest program in a run.
        run_fn: runs it to its end.
    """

    name: str
    unit: str
    units: int
    calls: int
    run_fn: Callable[[], object]


def run(config: LoopsOptions, given: setting.Setting) -> setting.Measured:
    """All chosen loops, one after the other.

    Raises:
        options.UsageError: the weights of dlib's net or of the detector are missing.
    """
    clock = "processor" if jax.default_backend() == "cpu" else "wall"
    measured: list[tuple[HotLoop, compiled.Compilation, list[timing.Took]]] = []
    details, peaks = {}, []
    for name in config.loops:
        loop = _MAKERS[name](config, given.seed)
        compilation = compiled.first_run(loop.run_fn)
        sides = {"loop": loop.run_fn, **compiled.peak_sides()}
        turns = timing.by_both_clocks(sides, repeats=given.repeats)
        peaks.append(compiled.peak(turns, clock=clock))
        measured.append((loop, compilation, turns["loop"]))
        details[name] = [program._asdict() for program in compilation.programs[:5]]
    best = compiled.Peak(max(p.flops for p in peaks), max(p.bytes_moved for p in peaks))
    rows = []
    for loop, compilation, taken in measured:
        rows += _rows(loop, compilation, taken, best, clock)
    second = "processor second" if clock == "processor" else "second"
    rows += [
        timing.state(
            "the device", f"product of matrices, GFLOP a {second}", best.flops / 1e9, None
        ),
        timing.state("the device", f"copy, GB a {second}", best.bytes_moved / 1e9, None),
    ]
    return setting.Measured(rows, {}, {"programs": details, "clock": clock})


def cloak_loop(batch: int, steps: int, seed: int) -> HotLoop:
    """A cloak of a batch of faces against dlib's net, from its start to its end.

    Raises:
        options.UsageError: the weights are missing.
    """
    extractor = registry.get("dlib")
    with options.usage("dlib"):
        variables = jax.tree.map(jnp.asarray, extractor.load())
    side = extractor.input_px
    chips = np.random.default_rng(seed).integers(0, 256, (batch, side, side, 3)).astype(np.uint8)
    method = fawkes.FawkesConfig(num_steps=steps)
    return HotLoop(
        f"cloak step, dlib, {batch} faces",
        "face and step",
        batch * steps,
        steps + 1,
        lambda: cloaking.cloak_chips(extractor, variables, chips, method, batch, seed),
    )


def _cloak(config: LoopsOptions, seed: int) -> HotLoop:
    return cloak_loop(config.loop_batch, config.loop_steps, seed)


def _embed(config: LoopsOptions, seed: int) -> HotLoop:
    extractor = registry.get("dlib")
    with options.usage("dlib"):
        variables = jax.tree.map(jnp.asarray, extractor.load())
    side, count = extractor.input_px, config.loop_batch
    chips = jax.random.uniform(jax.random.key(seed), (count, side, side, 3))
    return HotLoop(
        f"embedding, dlib, {count} chips",
        "face",
        count,
        1,
        lambda: jax.block_until_ready(embedding.embed_chips(variables, chips, extractor)),
    )


def _propose(config: LoopsOptions, seed: int) -> HotLoop:
    with options.usage("the detector"):
        variables = mtcnn.load_variables()
    count = config.loop_batch
    tiles = jax.random.uniform(jax.random.key(seed), (count, _TILE_PX, _TILE_PX, 3))
    own = jnp.ones((count, _TILE_PX - 2, _TILE_PX - 2), bool)
    propose = jax.jit(mtcnn.propose)
    return HotLoop(
        f"detection, first stage, {count} tiles of {_TILE_PX} px",
        "tile",
        count,
        1,
        lambda: jax.block_until_ready(propose(variables.pnet, tiles, own)),
    )


def _search(config: LoopsOptions, seed: int) -> HotLoop:
    rng = np.random.default_rng(seed)
    gallery = match.place(rng.standard_normal((_GALLERY, 128), np.float32), metric="euclidean_l2")
    probes = rng.standard_normal((_PROBES, 128), np.float32)
    return HotLoop(
        f"exact search, {_PROBES} probes, {_GALLERY} rows",
        "probe",
        _PROBES,
        1,
        lambda: match.top_k(probes, gallery, k=5),
    )


def _noise(config: LoopsOptions, seed: int) -> HotLoop:
    task = _task(config)
    mesh = parallel.make_mesh()
    pixels, labels, recipe = unlearnable.make_task(task, seed)
    data = trainer.place_data(pixels, labels, mesh)
    once = unlearnable.noise_pass(task, data, recipe, mesh, seed)
    return HotLoop(f"noise step, small ResNet, {len(pixels)} images", "image", len(pixels), 1, once)


def _victim(config: LoopsOptions, seed: int) -> HotLoop:
    task = _task(config)
    mesh = parallel.make_mesh()
    pixels, labels, recipe = unlearnable.make_task(task, seed)
    data = trainer.place_data(pixels, labels, mesh)
    once = unlearnable.victim_epoch(task, data, recipe, mesh, seed)
    name = f"training step, small ResNet, {len(pixels)} images"
    return HotLoop(name, "image", len(pixels), 1, once)


def _task(config: LoopsOptions) -> unlearnable.UnlearnableOptions:
    """One batch and one signed step: no loop within the program, of which XLA counts one pass."""
    count = config.loop_images
    return unlearnable.UnlearnableOptions(num_images=count, batch_size=count, noise_steps=1)


_MAKERS: dict[str, Callable[[LoopsOptions, int], HotLoop]] = {
    "cloak": _cloak,
    "embed": _embed,
    "propose": _propose,
    "search": _search,
    "noise": _noise,
    "victim": _victim,
}


def _rows(
    loop: HotLoop,
    compilation: compiled.Compilation,
    taken: list[timing.Took],
    peak: compiled.Peak,
    clock: str,
) -> list[timing.Row]:
    hot = compilation.programs[0]
    flops, moved = hot.flops * loop.calls, hot.bytes_accessed * loop.calls
    best = min(getattr(took, clock) for took in taken)
    times = {
        "ms": [1e3 * took.wall / loop.units for took in taken],
        "processor ms": [1e3 * took.processor / loop.units for took in taken],
    }
    figures = {
        f"MFLOP per {loop.unit}": flops / loop.units / 1e6,
        f"MB moved per {loop.unit}": moved / loop.units / 1e6,
        "share of the best product": flops / best / peak.flops,
        "share of the best copy": moved / best / peak.bytes_moved,
        "programs compiled": len(compilation.programs),
        "seconds of compilation": compilation.seconds,
        "memory of the program, MB": hot.memory_bytes / 1e6,
    }
    return [
        *(
            timing.state(loop.name, f"{clock_name} per {loop.unit}", timing.spread(values), None)
            for clock_name, values in times.items()
        ),
        *(timing.state(loop.name, what, value, None) for what, value in figures.items()),
    ]
