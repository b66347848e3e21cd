import dataclasses
from typing import Literal

import pytest

from afr_jax.core import options


@dataclasses.dataclass(frozen=True)
class _Inner:
    rate: float = options.option(0.1, "of the steps", at_least=0)

    def __post_init__(self):
        options.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Outer(options.Config):
    mode: Literal["a", "b"] = options.option("a", "which one")
    sizes: tuple[int, ...] | None = options.option(None, "sides, px", resumable=True)
    note: str = "no option"
    inner: _Inner = options.group(_Inner, rate=0.2)


def test_leaves_come_in_order_with_their_types():
    leaves = {leaf.path: leaf for leaf in options.leaves(_Outer)}
    base = [("workdir",), ("seed",), ("max_megapixels",)]
    assert list(leaves) == [*base, ("mode",), ("sizes",), ("inner", "rate")]
    assert leaves["mode",].spec.choices == ("a", "b")
    assert leaves["sizes",].is_tuple and leaves["sizes",].kind is int
    assert leaves["inner", "rate"].default == 0.2
    assert options.resumable(_Outer) == ("max_megapixels", "sizes")


def test_built_values_replace_defaults_and_nothing_else():
    built = options.build(_Outer, {("inner", "rate"): 0.5, ("sizes",): (1, 2)})
    assert built == _Outer(sizes=(1, 2), inner=_Inner(0.5))


@pytest.mark.parametrize(
    "values, message",
    [
        ({("seed",): -1}, "seed is -1, must be at least 0"),
        ({("seed",): 2**63}, "must be at most 9223372036854775807"),
        ({("mode",): "c"}, "mode is 'c', must be one of a, b"),
        ({("inner", "rate"): -1.0}, "rate is -1.0, must be at least 0"),
        ({("inner", "rate"): float("nan")}, "rate is nan"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        options.build(_Outer, values)


@dataclasses.dataclass(frozen=True)
class _Wrong:
    table: dict = options.option(None, "a table")


def test_a_field_that_no_flag_can_have_is_named():
    with pytest.raises(TypeError, match=r"_Wrong\.table"):
        list(options.leaves(_Wrong))


@dataclasses.dataclass(frozen=True)
class _Step:
    batch_size: int = options.option(128, "images of a step", flag="batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run(options.Config):
    epochs: int = options.option(30, "passes")
    step: _Step = options.group(_Step, batch_size=64)


def test_defaults_are_filled_but_what_is_said_stays():
    others = {"epochs": 2, "batch": 8}
    found = options.fill_defaults(_Run(epochs=5), others)
    assert (found.epochs, found.step.batch_size) == (5, 8)
    # The default is the group's in this place, not its class's.
    found = options.fill_defaults(_Run(step=_Step(128)), others)
    assert (found.epochs, found.step.batch_size) == (2, 128)


def test_what_a_flag_named_is_blamed_on_the_flag():
    message = "--data=x: nothing there"
    with pytest.raises(options.UsageError, match=message), options.usage("--data=x"):
        raise FileNotFoundError("nothing there")
