"""Row `scaling`: a cloak step by the size of the batch, training by the number of devices.

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

_CLOAK, _TRAINING = "cloak step by faces of a batch", "training step by devices"
_UNITS = {_CLOAK: "face and step", _TRAINING: "image"}


@dataclasses.dataclass(frozen=True)
class ScalingOptions:
    """What is measured in the row `scaling`."""

    scaling_batches: tuple[int, ...] = options.option(
        (1, 2, 4, 8, 16, 32, 64), "scaling: faces of a batch, measured one by one", at_least=1
    )
    scaling_steps: int = options.option(4, "scaling: steps of a cloak", at_least=1)
    scaling_devices: tuple[int, ...] = options.option(
        (1, 2, 4), "scaling: numbers of devices, as far as there are so many", at_least=1
    )
    scaling_images: int = options.option(256, "scaling: images of a training step", at_least=2)

    def __post_init__(self) -> None:
        """Checks the ranges."""
        options.check(self)


def run(config: ScalingOptions, given: setting.Setting) -> setting.Measured:
    """Both tables, and their plot.

    Raises:
        options.UsageError: the weights of dlib's net are missing.
    """
    loops = {}
    for batch in config.scaling_batches:
        loops[f"{_CLOAK}, {batch}"] = hot_loops.cloak_loop(batch, config.scaling_steps, given.seed)
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


def plot(rows: list[timing.Row]) -> "Figure":
    """Both times over the size of the batch, and over the number of devices."""
    figure, axes = figures.pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, what in zip(axes, _UNITS, strict=True):
        axis.set_xscale("log", base=2)
        for label, start in (("on the clock", "ms"), ("processor time", "processor ms")):
            points = [
                (int(row["row"].rpartition(", ")[2]), cast("timing.Spread", row["ours"]))
                for row in rows
                if row["row"].startswith(f"{what}, ") and row["quantity"].startswith(start)
            ]
            counts = [count for count, _ in points]
            low, middle, high = zip(
                *((each["low"], each["median"], each["high"]) for _, each in points), strict=True
            )
            (line,) = axis.plot(counts, middle, marker="o", label=label)
            axis.fill_between(counts, low, high, color=line.get_color(), alpha=0.2)
            axis.set_xticks(counts, labels=[str(count) for count in counts])
        axis.set_xlabel(what.partition(" by ")[2])
        axis.set_ylabel(f"ms per {_UNITS[what]}")
        axis.set_title(what.partition(" by ")[0])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure
