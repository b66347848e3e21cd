"""The way from a command line to a library call: flags from options, exit codes, the result line.

A program is a module of `experiments/` that names a config of the library and a function of it:

    from afr_jax.core import program
    from afr_jax.recognition.tasks import detect_photos

    if __name__ == "__main__":
        program.main(detect_photos.DetectConfig, detect_photos.run)

Standard output carries the result as one JSON line and nothing else; all other output goes to
standard error. With several processes only process 0 writes the line, and all end with one code.
"""

import contextlib
import inspect
import json
import logging as std_logging
import operator
import os
import pathlib
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from absl import app, flags, logging

from afr_jax.core import backend, distributed, files, interrupts, options
from afr_jax.core import provenance as provenance_lib
from afr_jax.core.runtime import object_store, process_group, profiling

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_PARTIAL = 3

UsageError = options.UsageError
_OWN_FLAGS = {
    "toy": "shrink data, networks and steps: seconds on a CPU",
    "one_process_per_node": "under SLURM: one process drives all GPUs of its node",
}
_PROFILE_HELP = "A:B writes a trace of steps A to B for xprof, into profile/ of the run's folder"
# Options that may be addresses in an object store.
_IN_STORES = ("workdir", "database")
_Config = TypeVar("_Config", bound=options.Config)

_DEFINERS = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
}


def main(
    config_class: type[_Config],
    run_fn: Callable[[_Config], options.Outcome],
    *,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Runs a function of a config as a program and exits.

    Parses the flags into a config, settles compiler options and memory, joins the cluster if there
    is one, switches the compilation cache on, calls `run_fn` and prints its result as one JSON
    line, the last of standard output. Exit codes: 0; 3 if the outcome is not complete; 2 for wrong
    flags, extra arguments, an `options.UsageError` or a file that cannot be read or written; 130
    and 143 when told to stop by SIGINT and SIGTERM; 1 with a traceback for everything else. Of
    several processes none goes on when another has ended.

    Args:
      config_class: the program's options; its docstring is the program's help.
      run_fn: does the work.
      argv: the command line with the program's name first; default `sys.argv`.
    """
    argv = list(sys.argv if argv is None else argv)
    interrupts.end_at_once()

    def call(_: Sequence[str]) -> int:
        try:
            config = _read(config_class, flags.FLAGS)
            _check_addresses(config)
            backend.choose_compiler_options()
            backend.keep_freed_memory()
            backend.limit_pixels(config.max_megapixels)
            if not _has_work(config_class):
                return EXIT_OK
            backend.enable_compilation_cache()
            interrupts.raise_and_remember()  # Last: a cluster's runtime has handlers of its own.
            with contextlib.redirect_stdout(sys.stderr):
                _ask_for_trace(config)
                outcome = run_fn(config)
                profiling.end()
                line = object_store.named(
                    json.dumps(files.to_jsonable(outcome.result), allow_nan=False)
                )
                object_store.close_all()
                is_complete = distributed.gather(outcome.complete)[0]
            interrupts.end_at_once()
            interrupts.check()
        except BaseException as error:
            interrupts.end_at_once()
            with contextlib.suppress(Exception):  # What was the trouble before counts.
                object_store.close_all()
            if (ending := process_group.ended_by_others()) is not None:
                process_group.leave_at_once(ending)
            if (code := interrupts.told(error)) is not None:
                process_group.fail(code, "was told to stop")
                return code
            if not isinstance(error, (options.UsageError, OSError)):
                if process_group.is_joined():
                    logging.exception("the program failed")
                    process_group.fail(1, f"failed: {type(error).__name__}")
                raise
            is_usage = isinstance(error, options.UsageError)
            message = f"error: {error if is_usage else files.printable(error)}"
            print(message, file=sys.stderr)
            logging.debug("where it happened", exc_info=True)
            process_group.fail(EXIT_USAGE, f"failed: {message}")
            return EXIT_USAGE
        if distributed.is_primary():
            print(line, flush=True)
        return EXIT_OK if is_complete else EXIT_PARTIAL

    if not {"-h", "-help", "--help"}.isdisjoint(argv[1:]):
        print(help_text(config_class, pathlib.Path(argv[0]).stem))
        sys.exit(EXIT_OK)
    _define(config_class, flags.FLAGS)
    for logger in (logging.get_absl_logger(), std_logging.getLogger("jax._src.xla_bridge")):
        logger.addFilter(_is_worth_showing)
    app.run(call, argv=argv, flags_parser=_parse_flags)
    raise AssertionError("absl.app.run returned")


def parse(config_class: type[_Config], arguments: Sequence[str]) -> _Config:
    """The config of a command line, as `main` makes it.

    Args:
      config_class: the program's options.
      arguments: the command line without the program's name.

    Raises:
      options.UsageError: wrong flags, or values out of their range.
    """
    values = flags.FlagValues()
    _define(config_class, values)
    try:
        remaining = values(["program", *arguments])
    except flags.Error as error:
        raise options.UsageError(str(error)) from error
    if len(remaining) > 1:
        raise options.UsageError(f"unexpected arguments: {' '.join(remaining[1:])}")
    return _read(config_class, values)


def help_text(config_class: type[options.Config], name: str) -> str:
    """What `--help` prints: the config's docstring, and a line or two for each flag.

    Args:
      config_class: the program's options.
      name: of the program.
    """
    lines = [f"{name}: {inspect.getdoc(config_class)}", "", "Flags:"]
    for leaf in options.leaves(config_class):
        bounds = [
            f"{word} {bound}"
            for word, bound in (("at least", leaf.spec.at_least), ("at most", leaf.spec.at_most))
            if bound is not None
        ]
        choices = ["|".join(leaf.spec.choices)] if leaf.spec.choices else []
        notes = "; ".join([leaf.spec.help, *bounds, *choices])
        lines.append(
            textwrap.fill(
                f"--{leaf.flag}={_shown(leaf)}  {notes}",
                width=100,
                initial_indent="  ",
                subsequent_indent="      ",
                break_on_hyphens=False,
                break_long_words=False,
            )
        )
    lines += [f"  --profile_steps=  {_PROFILE_HELP}"]
    lines += [f"  --{name}  {text}" for name, text in _OWN_FLAGS.items()]
    return "\n".join(lines)


def provenance(module: str, *, config: options.Config) -> dict[str, object]:
    """Says how the result of this program came about; see `provenance.provenance`.

    Paths below $AFR_SHARED, of --workdir and of --reference_python appear under these names.

    Args:
      module: the program, "experiments.benchmark" say.
      config: its options.
    """
    named = {leaf.path[-1]: leaf.path for leaf in options.leaves(type(config))}
    names: dict[str, str | None] = {
        name.upper(): operator.attrgetter(".".join(named[name]))(config)
        for name in ("workdir", "reference_python")
        if name in named
    }
    names["AFR_SHARED"] = os.environ.get("AFR_SHARED")
    return provenance_lib.provenance(module, sys.argv[1:], names=names)


def _define(config_class: type[options.Config], values: flags.FlagValues) -> None:
    """Defines a flag for each option, and those of all programs."""
    for leaf in options.leaves(config_class):
        default, text = leaf.default, leaf.spec.help
        if leaf.is_tuple:
            default = None if default is None else [str(item) for item in default]
            define = flags.DEFINE_multi_string if leaf.spec.is_repeated else flags.DEFINE_list
            define(leaf.flag, default, text, flag_values=values)
        else:
            _DEFINERS[leaf.kind](leaf.flag, default, text, flag_values=values)
        for alias in leaf.spec.aliases:
            flags.DEFINE_alias(alias, leaf.flag, flag_values=values)
    flags.DEFINE_string("profile_steps", None, _PROFILE_HELP, flag_values=values)
    for name, text in _OWN_FLAGS.items():
        flags.DEFINE_bool(name, False, text, flag_values=values)


def _read(config_class: type[_Config], values: flags.FlagValues) -> _Config:
    """The config that parsed flags say."""
    given = {}
    for leaf in options.leaves(config_class):
        value = values[leaf.flag].value
        if values[leaf.flag].present and (value == "" or (value == [] and not leaf.default)):
            # A shell's variable that is not set; the default would be work on other files.
            raise options.UsageError(f"--{leaf.flag} has an empty value")
        if leaf.is_tuple and value is not None:
            try:
                value = tuple(leaf.kind(item) for item in value)
            except ValueError as error:
                raise options.UsageError(f"--{leaf.flag}: {error}") from error
        given[leaf.path] = value
    try:
        config = options.build(config_class, given)
        return config.toy() if values["toy"].value else config
    except ValueError as error:
        raise options.UsageError(f"--{error}") from error


def _check_addresses(config: options.Config) -> None:
    """Refuses addresses in object stores where there must be files, before anything is written."""
    for leaf in options.leaves(type(config)):
        value = operator.attrgetter(".".join(leaf.path))(config)
        values = value if isinstance(value, tuple) else (value,)
        if not any(isinstance(item, str) and object_store.is_address(item) for item in values):
            continue
        if leaf.flag == "workdir" and hasattr(config, "output_dir"):
            raise UsageError("--workdir must be a folder where there is an --output_dir")
        if leaf.flag not in _IN_STORES:
            stores = " and ".join(f"--{name}" for name in _IN_STORES)
            raise UsageError(f"--{leaf.flag} must be a file or folder; {stores} may be in a store")


def _shown(leaf: options.Leaf) -> str:
    """A default as it would be typed."""
    if leaf.default is None:
        return ""
    if leaf.is_tuple:
        return ",".join(map(str, leaf.default))
    return str(leaf.default).lower() if leaf.kind is bool else str(leaf.default)


def _has_work(config_class: type[options.Config]) -> bool:
    """Joins the cluster if there is one, unless the program's work is for one process alone.

    Returns:
      Whether there is something to do for this process.
    """
    one_process = "one_process_per_node" in flags.FLAGS and flags.FLAGS.one_process_per_node
    try:
        if config_class.shares_work:
            distributed.maybe_initialize(one_process_per_node=one_process)
            return True
        number = distributed.process_of_cluster()
    except ValueError as error:
        raise UsageError(str(error)) from error
    if number is not None:
        logging.warning("process 0 does all the work of this program; this is process %d", number)
    return not number


def _ask_for_trace(config: options.Config) -> None:
    steps = flags.FLAGS.profile_steps
    if steps is not None:
        place = config.workdir or getattr(config, "output_dir", None) or "out"
        if object_store.is_address(place):
            raise UsageError("--profile_steps needs a folder as --workdir")
        number = f"process-{distributed.process_index()}"
        with options.usage("--profile_steps"):
            profiling.ask(steps, pathlib.Path(place).expanduser() / "profile" / number)


def _is_worth_showing(record: std_logging.LogRecord) -> bool:
    # Of level INFO, Orbax logs some 50 lines around each checkpoint, and JAX that there is no TPU.
    is_noise = "orbax" in record.pathname or record.name == "jax._src.xla_bridge"
    return record.levelno >= std_logging.WARNING or not is_noise


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the flags; wrong ones exit with code 2, help with 0 (absl exits with 1 for both)."""
    try:
        remaining = flags.FLAGS(argv)
    except flags.Error as error:
        print(f"error: {error}\nPass --help for the flags.", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except SystemExit:
        sys.exit(EXIT_OK)
    if len(remaining) > 1:
        extra = " ".join(remaining[1:])
        print(f"error: unexpected arguments: {extra}\nPass --help for the flags.", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    return remaining
