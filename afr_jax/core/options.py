"""Options of programs and methods: frozen dataclasses whose fields carry help, range and choices.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class TrainConfig(options.Config):
        epochs: int = options.option(60, "passes over the training images", at_least=1)
        face: FaceOptions = options.group(FaceOptions)

        def toy(self):
            return dataclasses.replace(self, epochs=min(self.epochs, 2))

A program's flags are made from these fields in `afr_jax.core.program` and nowhere else; fields of a
group become flags beside the others. A field without `option` or `group` is no flag. Supported
types: str, int, float, bool, `Literal` of strings, each also `| None` or as `tuple[T, ...]`.
"""

import contextlib
import dataclasses
import functools
import types
import typing
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeVar

from afr_jax.core import files

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Options = TypeVar("_Options", bound="DataclassInstance")

WORKDIR_HELP = "folder for config.json, metrics.jsonl, result.json; resumed if it has them"


class UsageError(Exception):
    """Wrong usage: the program prints the message and exits with code 2, without a traceback."""


class Outcome(NamedTuple):
    """What a program's function returns.

    Attributes:
        result: what is printed as the last line, and stands in result.json.
        complete: False if some inputs could not be handled (exit code 3); the result names them.
    """

    result: Mapping[str, files.Json]
    complete: bool = True


class Spec(NamedTuple):
    """What `option` notes beside a field's default.

    Attributes:
        help: for people, with the unit.
        choices: allowed values, of a tuple's items where the field is one; empty for any.
        at_least: lower bound, or None.
        at_most: upper bound, or None.
        flag: name of the flag; None for the field's own.
        aliases: further names of the flag.
        resumable: whether the value may change when a run is resumed.
        is_repeated: whether several values are given by repeating the flag, not with commas.
    """

    help: str
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    flag: str | None = None
    aliases: tuple[str, ...] = ()
    resumable: bool = False
    is_repeated: bool = False


class Leaf(NamedTuple):
    """One option of a class, of a group of it, and so on.

    Attributes:
        path: names of the fields that lead to it.
        kind: str, int, float or bool: of the items where it `is_tuple`.
        is_tuple: whether it holds several values.
        default: of the field.
        spec: help and so on; `choices` also those of a `Literal`.
    """

    path: tuple[str, ...]
    kind: type
    is_tuple: bool
    default: Any
    spec: Spec

    @property
    def flag(self) -> str:
        """Name of the flag."""
        return self.spec.flag or self.path[-1]


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    flag: str | None = None,
    aliases: tuple[str, ...] = (),
    resumable: bool = False,
    is_repeated: bool = False,
) -> Any:
    """A field of an options class that is a flag of programs; see `Spec` for the arguments."""
    spec = Spec(
        help, tuple(choices), at_least, at_most, flag, tuple(aliases), resumable, is_repeated
    )
    return dataclasses.field(default=default, metadata={"option": spec})


def group(options_class: type, **defaults: Any) -> Any:
    """A field that holds another options class, whose options become flags beside the others.

    Args:
        options_class: a frozen dataclass.
        **defaults: of its fields, where they differ from its own.
    """
    return dataclasses.field(default=options_class(**defaults), metadata={"group": options_class})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The options that every program has; programs derive from it.

    Attributes:
        shares_work: whether several processes share the program's work (`core/distributed.py`);
            else the first of them does it all.
    """

    shares_work: ClassVar[bool] = False

    workdir: str | None = option(None, WORKDIR_HELP)
    seed: int = option(0, "seed of all randomness of the run", at_least=0, at_most=2**63 - 1)
    max_megapixels: float | None = option(
        None,
        "larger photos are refused; default: by the machine's memory, at most 100",
        at_least=0.01,
        at_most=10_000,
        resumable=True,
    )

    def __post_init__(self) -> None:
        """Checks ranges and choices.

        Raises:
            ValueError: an option is out of its range.
        """
        check(self)

    def toy(self) -> Self:
        """The same run, shrunk to seconds on a CPU."""
        return self


@contextlib.contextmanager
def usage(what: str) -> Generator[None]:
    """Says of a file that is missing or wrong which flag named it.

    Args:
        what: put before the message, "--data=photos" say.

    Raises:
        UsageError: the body raised FileNotFoundError or ValueError.
    """
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"{what}: {error}" if what else str(error)) from error


def fill_defaults(values: _Options, others: Mapping[str, object]) -> _Options:
    """The same options with other values where a field still has its default, for `Config.toy`.

    Args:
        values: an instance of an options class.
        others: values by flag, also of groups.
    """
    changes = {}
    for leaf in leaves(type(values)):
        is_default = functools.reduce(getattr, leaf.path, values) == leaf.default
        if leaf.flag in others and is_default:
            changes[leaf.path] = others[leaf.flag]
    return _replaced(values, changes)


def narrowed(values: _Options, base_class: type[_Options]) -> _Options:
    """The options that one of the base classes of a dataclass has, as an instance of that class.

    Compiled programs take the narrow instance as a static argument, so that they do not depend on
    the rest.

    Args:
        values: An instance of a frozen dataclass.
        base_class: A dataclass that its class is derived from.
    """
    names = [field.name for field in dataclasses.fields(base_class)]
    return base_class(**{name: getattr(values, name) for name in names})


def leaves(options_class: type) -> Iterator[Leaf]:
    """Yields the options of a class and of its groups, in the order of their fields.

    Raises:
        TypeError: a field has a type that no flag can have.
    """
    yield from _leaves(options_class, options_class, (), None)


def check(values: object) -> None:
    """Checks the options of an instance against their ranges and choices; groups check themselves.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    for leaf in leaves(type(values)):
        if len(leaf.path) > 1:
            continue
        value = getattr(values, leaf.path[0])
        for item in value if leaf.is_tuple and value is not None else (value,):
            _check_item(leaf, item)


def build(options_class: type[_Options], values: Mapping[tuple[str, ...], object]) -> _Options:
    """An instance from values by `Leaf.path`; what is not given keeps its default.

    Raises:
        ValueError: an option is out of its range.
    """
    return _replaced(options_class(), values)


def resumable(options_class: type) -> tuple[str, ...]:
    """Dotted names of the options that may change when a run is resumed."""
    return tuple(".".join(leaf.path) for leaf in leaves(options_class) if leaf.spec.resumable)


def _replaced(values: _Options, new: Mapping[tuple[str, ...], object]) -> _Options:
    changes: dict[str, Any] = {path[0]: value for path, value in new.items() if len(path) == 1}
    for name in {path[0] for path in new if len(path) > 1}:
        inner = {path[1:]: value for path, value in new.items() if path[0] == name}
        changes[name] = _replaced(getattr(values, name), inner)
    return dataclasses.replace(values, **changes)


def _leaves(top: type, options_class: type, path: tuple[str, ...], defaults: Any) -> Iterator[Leaf]:
    hints = typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        here = (*path, field.name)
        default = field.default if defaults is None else getattr(defaults, field.name)
        if "group" in field.metadata:
            yield from _leaves(top, field.metadata["group"], here, default)
        elif "option" in field.metadata:
            spec = field.metadata["option"]
            try:
                kind, is_tuple, choices = _kind_of(hints[field.name])
            except TypeError as error:
                raise TypeError(f"{top.__name__}.{'.'.join(here)}: {error}") from error
            yield Leaf(
                here, kind, is_tuple, default, spec._replace(choices=spec.choices or choices)
            )


def _kind_of(hint: Any) -> tuple[type, bool, tuple[str, ...]]:
    """Kind of a value, whether there are several, and the choices of a `Literal`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        present = [argument for argument in arguments if argument is not type(None)]
        if len(present) == 1:
            return _kind_of(present[0])
    elif origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        kind, _, choices = _kind_of(arguments[0])
        return kind, True, choices
    elif origin is typing.Literal:
        return str, False, arguments
    elif hint in (str, int, float, bool):
        return hint, False, ()
    raise TypeError(f"no flag can have the type {hint}")


def _check_item(leaf: Leaf, value: Any) -> None:
    if value is None:
        return
    name, spec = leaf.flag, leaf.spec
    if spec.choices and value not in spec.choices:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(spec.choices)}")
    if spec.at_least is not None and not value >= spec.at_least:
        raise ValueError(f"{name} is {value}, must be at least {spec.at_least}")
    if spec.at_most is not None and not value <= spec.at_most:
        raise ValueError(f"{name} is {value}, must be at most {spec.at_most}")
