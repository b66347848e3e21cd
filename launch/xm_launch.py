r"""Launches a sweep through XManager (`pip install xmanager`), a container for each cell.

    python -m launch.xm_launch --executor=vertex --accelerator=v100=8 --image=REGISTRY/afr_jax \
        --program=train_victim --arguments="--data=/shared/people" --axis=seed=0,1,2 \
        --workdir=/shared/sweep
    python -m experiments.sweep --workdir=/shared/sweep --collect

The image is one of launch/Containerfile. Run this in the folder of the checkout, on a machine that
sees the work folder as the containers do.
"""

import dataclasses
import importlib
import shlex
import sys

from afr_jax.core import options, program
from afr_jax.core.runtime import sweep


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig(sweep.SweepConfig):
    """Launches the cells of a sweep through XManager, a container for each.

    Takes the options of experiments.sweep, which collects the results. Without --dry_run it writes
    the sweep down first.
    """

    executor: str = options.option(
        "local",
        "where the containers run",
        choices=("local", "vertex", "kubernetes"),
        resumable=True,
    )
    image: str | None = options.option(
        None, "of launch/Containerfile, as the executor finds it", resumable=True
    )
    accelerator: str | None = options.option(
        None,
        "NAME=COUNT for each cell, by XManager's names; of the local executor local_gpu=1",
        resumable=True,
    )
    volumes: tuple[str, ...] = options.option(
        (),
        "folders that local containers see at the same place, beside the work folder",
        resumable=True,
    )
    dry_run: bool = options.option(
        False, "print the command of each cell in place of running it", resumable=True
    )


def run(config: LaunchConfig) -> options.Outcome:
    """Launches all cells.

    Raises:
        options.UsageError: what is asked for is missing or wrong, or there is no XManager.
    """
    if config.cell is not None or config.collect:
        raise options.UsageError("--cell and --collect are for experiments.sweep")
    if config.image is None:
        raise options.UsageError("--image is needed")
    folder, cells = sweep.plan(config)
    name, _, count = (config.accelerator or "").partition("=")
    if config.accelerator and not (name and count.isdecimal()):
        raise options.UsageError(f"--accelerator={config.accelerator} is not NAME=COUNT")
    if config.dry_run:
        for cell in cells:
            print(shlex.join(["python", "-m", *cell.command]), file=sys.stderr)
        return options.Outcome({"cells": len(cells), "launched": 0})
    try:
        xm = importlib.import_module("xmanager.xm")
        xm_local = importlib.import_module("xmanager.xm_local")
    except ImportError as error:
        raise options.UsageError(f"XManager is needed: pip install xmanager ({error})") from error
    sweep.write(config, folder, cells)
    executor = getattr(xm_local, config.executor.capitalize())
    settings = {"requirements": xm.JobRequirements(**({name: int(count)} if name else {}))}
    if config.executor == "local":
        places = {place: place for place in (str(folder), *config.volumes)}
        settings["docker_options"] = xm_local.DockerOptions(volumes=places)
    with xm_local.create_experiment(experiment_title=f"afr_jax {config.program}") as experiment:
        [executable] = experiment.package([xm.container(executor.Spec(), config.image)])
        for number, cell in enumerate(cells):
            job = xm.Job(executable, args=cell.command, executor=executor(**settings))
            experiment.add(job, identity=f"cell-{number}")
    return options.Outcome({"cells": len(cells), "launched": len(cells)})


if __name__ == "__main__":
    program.main(LaunchConfig, run)
