"""Row `scaling`: cloaks by faces and by steps, noise by images, training by devices.

Processor time tells what the work costs where other programs keep the clock from telling it; over
devices it shows what they cost beside one, and the clock what they save.
"""

import dataclasses
from typing import TYPE_CHECKING, cast

import jax

from afr_jax.benchmark import setting, timing, unlearnable
from afr_jax.benchmark.limits import hot_loops
from afr_jax.core import options, parallel
from afr_jax.evaluation.report import figures
from afr_jax.training import trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CLOAK, _STEPS = "cloak step by faces of a batch", "cloak of one face by steps"
_NOISE, _TRAINING = "signed step of noise by images", "training step by devices"
_UNITS = {_CLOAK: "face and step", _STEPS: "face and step", _NOISE: "image", _TRAINING: "image"}
# Images of a batch of noise.
_BATCH = 128


@dataclasses.dataclass(frozen=True)
class ScalingOptions:
    """What is measured in the row `scaling`."""

    scaling_batches: tuple[int, ...] = options.option(
        (1, 2, 4, 8, 16, 32, 64), "scaling: faces of a batch, measured one by one", at_least=1
    )
    scaling_steps: int = options.option(4, "scaling: steps of a cloak of a batch", at_least=1)
    scaling_lengths: tuple[int, ...] = options.option(
        (1, 10, 100), "scaling: steps of a cloak of one face, measured one by one", at_least=1
    )
    scaling_sets: tuple[int, ...] = options.option(
        (10, 100, 1000, 10_000), "scaling: images of a set that noise is searched for", at_least=2
    )
    scaling_devices: tuple[int, ...] = options.option(
        (1, 2, 4), "scaling: numbers of devices, as far as there are so many", at_least=1
    )
    scaling_images: int = options.option(256, "scaling: images of a training step", at_least=2)

    def __post_init__(self) -> None:
        """Checks the ranges."""
        options.check(self)


def run(config: ScalingOptions, given: setting.Setting) -> setting.Measured:
    """All times, and their plot.

    Raises:
        options.UsageError: the weights of dlib's net are missing.
    """
    loops = {}
    for batch in config.scaling_batches:
        loops[f"{_CLOAK}, {batch}"] = hot_loops.cloak_loop(batch, config.scaling_steps, given.seed)
    for steps in config.scaling_lengths:
        loops[f"{_STEPS}, {steps}"] = hot_loops.cloak_loop(1, steps, given.seed)
    for count in config.scaling_sets:
        loops[f"{_NOISE}, {count}"] = _noise_loop(count, given.seed)
    task = unlearnable.UnlearnableOptions(
        num_images=config.scaling_images, batch_size=config.scaling_images
    )
    pixels, labels, recipe = unlearnable.make_task(task, given.seed)
    for count in config.scaling_devices:
        if count <= len(jax.devices()):
            mesh = parallel.make_mesh(devices=jax.devices()[:count])
            data = trainer.place_data(pixels, labels, mesh)
            once = unlearnable.victim_epoch(task, data, recipe, mesh, given.seed)
            name = f"{_TRAINING}, {count}"
            loops[name] = hot_loops.HotLoop(name, "image", len(pixels), 1, once)
    sides = {name: loop.run_fn for name, loop in loops.items()}
    rows = []
    for name, taken in timing.by_both_clocks(sides, repeats=given.repeats).items():
        loop = loops[name]
        for clock, values in zip(("", "processor "), zip(*taken, strict=True), strict=True):
            each = timing.spread([1e3 * value / loop.units for value in values])
            rows.append(timing.state(name, f"{clock}ms per {loop.unit}", each, None))
    return setting.Measured(rows, figures={"scaling": plot(rows)})


def _noise_loop(count: int, seed: int) -> hot_loops.HotLoop:
    """A signed step over the noise of a set of images, on one device."""
    task = unlearnable.UnlearnableOptions(num_images=count, batch_size=_BATCH, noise_steps=1)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    pixels, labels, recipe = unlearnable.make_task(task, seed)
    data = trainer.place_data(pixels, labels, mesh)
    once = unlearnable.noise_pass(task, data, recipe, mesh, seed)
    return hot_loops.HotLoop(_NOISE, "image", count, -(-count // _BATCH), once)


def plot(rows: list[timing.Row]) -> "Figure":
    """Both times over each number that was changed."""
    figure, axes = figures.pyplot().subplots(2, 2, figsize=(9, 7), layout="constrained")
    for axis, what in zip(axes.flat, _UNITS, strict=True):
        axis.set_xscale("log", base=10 if what in (_STEPS, _NOISE) else 2)
        for label, start in (("on the clock", "ms"), ("processor time", "processor ms")):
            points = [
                (int(row["row"].rpartition(", ")[2]), cast("timing.Spread", row["ours"]))
                for row in rows
                if row["row"].startswith(f"{what}, ") and row["quantity"].startswith(start)
            ]
            if not points:  # More devices than there are.
                continue
            counts = [count for count, _ in points]
            low, middle, high = zip(
                *((each["low"], each["median"], each["high"]) for _, each in points), strict=True
            )
            (line,) = axis.plot(counts, middle, marker="o", label=label)
            axis.fill_between(counts, low, high, color=line.get_color(), alpha=0.2)
            axis.set_xticks(counts, labels=[f"{count:,}" for count in counts])
            axis.minorticks_off()
        axis.set_xlabel(what.partition(" by ")[2])
        axis.set_ylabel(f"ms per {_UNITS[what]}")
        axis.set_title(what.partition(" by ")[0])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    return figure
