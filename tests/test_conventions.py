"""The house rules for public functions, checked over all of them (after dm_pix's api_test)."""

import dataclasses
import importlib
import inspect
import pathlib
import types

import flax.linen as nn
import jax
import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _module_names():
    for path in sorted((_ROOT / "afr_jax").rglob("*.py")):
        parts = path.relative_to(_ROOT).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__")


def _public(module):
    """Yields (name, object) of the public functions and classes that a module defines itself."""
    for name, value in vars(module).items():
        value = inspect.unwrap(value) if callable(value) else value
        is_ours = getattr(value, "__module__", None) == module.__name__
        if not name.startswith("_") and is_ours and isinstance(value, (type, types.FunctionType)):
            yield f"{module.__name__}.{name}", value


def _methods(owner):
    for name, value in vars(owner).items():
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        if not name.startswith("_") and isinstance(value, types.FunctionType):
            # Flax wraps the methods of a module.
            yield name, inspect.unwrap(value)


def _has_free_signature(owner):
    """Dataclasses, Flax modules, NamedTuples and protocols do not write their __init__."""
    is_tuple = issubclass(owner, tuple) and hasattr(owner, "_fields")
    is_protocol = getattr(owner, "_is_protocol", False)
    is_made = dataclasses.is_dataclass(owner) or issubclass(owner, nn.Module)
    return is_made or is_tuple or is_protocol


def _is_generated(owner, name):
    is_flax = issubclass(owner, nn.Module) and name in ("setup",)
    return is_flax or (dataclasses.is_dataclass(owner) and name == "replace")


def _functions():
    """Yields (name, function, whether its signature must follow the rules)."""
    for module_name in _module_names():
        for name, value in _public(importlib.import_module(module_name)):
            if isinstance(value, types.FunctionType):
                yield name, value
                continue
            if "__init__" in vars(value) and not _has_free_signature(value):
                yield f"{name}.__init__", value.__init__
            for method_name, method in _methods(value):
                if not _is_generated(value, method_name):
                    yield f"{name}.{method_name}", method


def _errors(name, function):
    parameters = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    names = [parameter.name for parameter in parameters]
    if not inspect.getdoc(function):
        yield f"{name} has no docstring"
    if "key" in names and names[0] != "key" and parameters[names.index("key")].kind in _POSITIONAL:
        yield f"{name}: key comes first"
    if "rng" in names:
        yield f"{name}: a key is called key, not rng"
    for parameter in parameters:
        if parameter.kind in _POSITIONAL and parameter.default is not inspect.Parameter.empty:
            yield f"{name}: {parameter.name} has a default and is not keyword-only"
        if parameter.annotation is inspect.Parameter.empty:
            yield f"{name}: {parameter.name} has no type"


@pytest.mark.parametrize("module_name", list(_module_names()))
def test_modules_and_classes_have_docstrings(module_name):
    module = importlib.import_module(module_name)
    if pathlib.Path(module.__file__).read_text().strip():
        assert module.__doc__, f"{module_name} has no docstring"
    for name, value in _public(module):
        # A dataclass or a NamedTuple without one gets its signature as a docstring.
        text = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
        assert text and not text.startswith(f"{name.rsplit('.', 1)[1]}("), f"{name}: no docstring"


def test_public_functions_follow_the_rules():
    errors = [error for name, function in _functions() for error in _errors(name, function)]
    assert not errors, "\n".join(errors)


def test_the_walk_finds_functions_and_methods():
    names = {name for name, _ in _functions()}
    assert {
        "afr_jax.core.parallel.pad_batch",
        "afr_jax.core.checkpoint.Checkpoints.__init__",
        "afr_jax.core.checkpoint.Checkpoints.save",
        "afr_jax.core.workdir.Workdir.write_result",
    } <= names


def _good(key: int, params: int, image: int, *, scale: float = 1.0):
    """Documented."""


def _undocumented(image: int):
    pass


def _late_key(image: int, key: int):
    """Documented."""


def _rng(rng: int, image: int):
    """Documented."""


def _untyped(image):
    """Documented."""


def _positional_default(image: int, scale: float = 1.0):
    """Documented."""


@pytest.mark.parametrize(
    "function, count",
    [
        (_good, 0),
        (_undocumented, 1),
        (_late_key, 1),
        (_rng, 1),
        (_untyped, 1),
        (_positional_default, 1),
    ],
)
def test_the_rules_themselves(function, count):
    assert len(list(_errors("f", function))) == count


def test_jitted_functions_are_walked():
    module = types.ModuleType("somewhere")
    late_key = types.FunctionType(_late_key.__code__, {"__name__": "somewhere"}, "late_key")
    late_key.__module__ = "somewhere"
    module.late_key = jax.jit(late_key)
    assert [name for name, _ in _public(module)] == ["somewhere.late_key"]
