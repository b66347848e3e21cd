"""Sweeps: a program's flags in all combinations, as cells of an array job, and their results.

A sweep is a folder: `sweep.json` says its cells, `commands` has the command line of cell N in line
N + 1, for launchers, and cell N writes into `cells/N`. Whoever runs the cells, in whatever order,
needs no more than that; `collect` then puts the results that are there into one table.
"""

import csv
import dataclasses
import importlib
import itertools
import os
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from afr_jax import cli
from afr_jax.core import files, options, program, progress, workdir
from afr_jax.core.runtime import object_store

# What a result says of its run; the cells of a sweep have it in common.
_CIRCUMSTANCES = ("config", "machine", "settings", "seed", "workdir", "output_dir")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(options.Config):
    r"""Runs a program with all combinations of some flags, and collects the results.

        python -m experiments.sweep --program=train_victim --arguments="--data=photos --toy" \
            --axis=seed=0,1,2 --axis=epochs=10,20 --workdir=out/sweep
        sbatch --array=0-5 launch/slurm.sbatch @out/sweep/commands
        python -m experiments.sweep --workdir=out/sweep --collect

    The first line checks the flags of all cells, writes them down and prints the second, which
    runs them under SLURM; without it, --cell=N runs one. Cell N writes into cells/N of the work
    folder and goes on there when it is run again.

    --collect writes sweep.csv (a line for each cell: its flags and the numbers of its result) and
    results.json (the whole results). Exit code 3: cells have no result yet; they are named.
    """

    program: str | None = options.option(
        None, "that is run, by its name", choices=tuple(cli.PROGRAMS)
    )
    arguments: str = options.option("", "flags of all cells, as a shell would split them")
    axes: tuple[str, ...] = options.option(
        (),
        "FLAG=VALUE,VALUE,...; repeated; a value with commas stands in double quotes",
        flag="axis",
        is_repeated=True,
    )
    cell: int | None = options.option(
        None, "run this one, in place of the whole", at_least=0, resumable=True
    )
    collect: bool = options.option(False, "put the results into one table", resumable=True)


class Cell(NamedTuple):
    """One run of the program.

    Attributes:
        flags: that this cell does not share with all, in the order of the axes.
        command: the words behind `python -m`.
    """

    flags: dict[str, str]
    command: list[str]


def run(config: SweepConfig) -> options.Outcome:
    """Writes a sweep down, runs one of its cells in the place of this process, or collects it.

    Raises:
        options.UsageError: what is asked for is missing or wrong.
    """
    if config.cell is None and not config.collect:
        return write(config, *plan(config))
    folder = _folder(config)
    with options.usage("--workdir"):
        cells = [Cell(**fields) for fields in files.read_sealed(folder / "sweep.json")["cells"]]
    if config.cell is None:
        return _collect(folder, cells)
    if config.collect:
        raise options.UsageError("--cell and --collect exclude each other")
    if config.cell >= len(cells):
        raise options.UsageError(f"--cell is {config.cell}; there are 0 to {len(cells) - 1}")
    command = [sys.executable, "-m", *cells[config.cell].command]
    os.execv(command[0], command)


def _folder(config: SweepConfig) -> pathlib.Path:
    if config.workdir is None:
        raise options.UsageError("--workdir is needed")
    if object_store.is_address(config.workdir):
        raise options.UsageError(f"--workdir={config.workdir}: a sweep is written to a folder")
    return pathlib.Path(config.workdir).expanduser().absolute()


def plan(config: SweepConfig) -> tuple[pathlib.Path, list[Cell]]:
    """The folder of a sweep and its cells; writes nothing.

    Raises:
        options.UsageError: options are missing, or the program refuses the flags of a cell.
    """
    folder = _folder(config)
    if config.program is None or not config.axes:
        raise options.UsageError("a sweep needs --program and at least one --axis")
    with options.usage("--arguments"):
        arguments = shlex.split(config.arguments)
    with options.usage("--axis"):
        return folder, make_cells(config.program, arguments, config.axes, folder)


def write(config: SweepConfig, folder: pathlib.Path, cells: Sequence[Cell]) -> options.Outcome:
    """Writes a sweep down, as `plan` has it; the result says how SLURM runs it.

    Raises:
        options.UsageError: the folder belongs to another sweep, or somebody works in it.
    """
    work = workdir.open_workdir(folder, config)
    commands = work.path / "commands"
    lines = "".join(f"{shlex.join(cell.command)}\n" for cell in cells)
    files.write_atomically(commands, lines.encode(), overwrite=True)
    files.write_sealed(work.path / "sweep.json", {"cells": [cell._asdict() for cell in cells]})
    place = shlex.quote(f"@{commands}")
    submit = f"sbatch --array=0-{len(cells) - 1} launch/slurm.sbatch {place}"
    return options.Outcome({"cells": len(cells), "submit": submit})


def product(axes: Sequence[str]) -> list[dict[str, str]]:
    """All combinations of the values of some flags; the last flag changes first.

    Args:
        axes: FLAG=VALUE,VALUE,... each.

    Raises:
        ValueError: an axis without a flag or a value, or a flag that comes twice.
    """
    values: dict[str, list[str]] = {}
    for axis in axes:
        name, _, text = axis.removeprefix("--").partition("=")
        found = next(csv.reader([text]), [])
        if not name or not all(found) or not found:
            raise ValueError(f"{axis!r} is not FLAG=VALUE,VALUE,...")
        if name in values:
            raise ValueError(f"{name} comes twice")
        values[name] = found
    return [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]


def make_cells(
    name: str, arguments: Sequence[str], axes: Sequence[str], folder: pathlib.Path
) -> list[Cell]:
    """The cells of a sweep, whose flags the program takes.

    Args:
        name: of the program, in `cli.PROGRAMS`.
        arguments: flags of all cells.
        axes: as in `product`.
        folder: of the sweep.

    Raises:
        options.UsageError: the program refuses the flags of a cell.
        ValueError: as `product`.
    """
    module_name, class_name = cli.PROGRAMS[name]
    config_class = getattr(importlib.import_module(module_name), class_name)
    has_output = any(leaf.flag == "output_dir" for leaf in options.leaves(config_class))
    cells = []
    for number, flags in enumerate(product(axes)):
        place = _place(folder, number)
        own = [*arguments, *(f"--{flag}={value}" for flag, value in flags.items())]
        own.append(f"--workdir={place}")
        if has_output:
            own.append(f"--output_dir={place / 'output'}")
        try:
            program.parse(config_class, own)
        except options.UsageError as error:
            raise options.UsageError(f"{name} {shlex.join(own)}: {error}") from error
        cells.append(Cell(flags, ["afr_jax.cli", name, *own]))
    return cells


def _place(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / "cells" / str(number)


def _collect(folder: pathlib.Path, cells: Sequence[Cell]) -> options.Outcome:
    results, missing = [], []
    for number, cell in enumerate(cells):
        path = _place(folder, number) / "result.json"
        found = None
        try:
            found = files.parse_json(path.read_bytes())
        except FileNotFoundError:
            pass
        except ValueError as error:
            progress.warn(path, f"no result: {error}")
        results.append(found)
        if found is None:
            missing.append({"cell": number, **cell.flags})
    numbers = [_numbers(found or {}) for found in results]
    columns = list(dict.fromkeys(name for row in numbers for name in row))
    swept = list(cells[0].flags)
    rows = [
        [number, *cell.flags.values(), *(row.get(name, "") for name in columns)]
        for number, (cell, row) in enumerate(zip(cells, numbers, strict=True))
    ]
    files.write_csv(folder / "sweep.csv", ["cell", *swept, *columns], rows)
    whole = [
        {"cell": number, "flags": cell.flags, "result": found}
        for number, (cell, found) in enumerate(zip(cells, results, strict=True))
    ]
    files.write_json(folder / "results.json", whole)
    outcome = {
        "cells": len(cells),
        "collected": len(cells) - len(missing),
        "missing": missing,
        "table": str(folder / "sweep.csv"),
    }
    return options.Outcome(outcome, complete=not missing)


def _numbers(result: Mapping[str, files.Json]) -> dict[str, float]:
    """The numbers of a result; those of an object in it have its name and a dot before theirs."""
    found: dict[str, float] = {}
    for name, value in result.items():
        if name in _CIRCUMSTANCES:
            continue
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": each for inner, each in _numbers(value).items()}
        elif isinstance(value, (bool, int, float)):
            found[name] = value
    return found
