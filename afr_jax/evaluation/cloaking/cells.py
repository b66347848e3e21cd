"""Cells of an evaluation: a method, the extractors that it works against, and a DSSIM budget."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from afr_jax.methods.cloaking import fawkes, lowkey
from afr_jax.models.extractors import registry

# The cloaks that are made here, and the options of each.
CLOAKS: dict[str, type[fawkes.FawkesConfig | lowkey.LowKeyConfig]] = {
    "fawkes": fawkes.FawkesConfig,
    "lowkey": lowkey.LowKeyConfig,
}
METHODS = ("none", "noise", *CLOAKS, "fawkes_pypi")


class CloakCell(NamedTuple):
    """One way to protect photos.

    Attributes:
        method: of `METHODS`.
        surrogates: names of the extractors that it works against; empty for none and noise.
        budget: DSSIM of a face; None for none.
    """

    method: str
    surrogates: tuple[str, ...] = ()
    budget: float | None = None

    @property
    def name(self) -> str:
        """Unique among cells, usable as a file name."""
        parts = [self.method]
        if self.surrogates:
            parts.append(self.surrogate_names)
        if self.budget is not None:
            parts.append(f"{self.budget:g}")
        return "-".join(parts)

    @property
    def surrogate_names(self) -> str:
        """Names of the surrogates, joined by "+"."""
        return "+".join(file_name(name) for name in self.surrogates)


def file_name(extractor: str) -> str:
    """An extractor's name, or the last part of its folder, for the names of files."""
    return pathlib.PurePath(extractor).name


def surrogate_sets(asked: Sequence[str], trackers: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Sets of surrogates, each once.

    Args:
        asked: names joined by "+"; "all" for every tracker that was neither trained here nor is a
            judge (`Extractor.is_judge`); "leave_one_out" for each of these all others.
        trackers: names and folders of the trackers' extractors.

    Raises:
        ValueError: a set names an extractor twice or none, or "leave_one_out" leaves none.
    """
    pool = tuple(
        name
        for name in trackers
        if name in registry.EXTRACTORS and not registry.EXTRACTORS[name].is_judge
    )
    found: list[tuple[str, ...]] = []
    for text in asked:
        if text == "leave_one_out":
            found += [tuple(other for other in pool if other != name) for name in pool]
        else:
            found.append(pool if text == "all" else tuple(text.split("+")))
    for names in found:
        if not all(names) or not names or len(set(names)) < len(names):
            raise ValueError(
                f"surrogates {'+'.join(names)!r}: a set has one extractor or more, each once; "
                f"leave_one_out needs two trackers of the registry, all needs one"
            )
    return tuple({frozenset(names): names for names in found}.values())


def all_cells(
    methods: Sequence[str],
    surrogate_sets: Sequence[tuple[str, ...]],
    budgets: Sequence[float],
) -> list[CloakCell]:
    """All cells: the plain ones first, every set of surrogates with every budget.

    Args:
        methods: of `METHODS`; `lowkey@0.007` has that budget alone.
        surrogate_sets: what `fawkes` and `lowkey` are made against; `fawkes_pypi` knows dlib alone.
        budgets: DSSIM.

    Raises:
        ValueError: there is no such method, or a method's own budget does not lie in (0, 1].
    """
    found = []
    parsed = [parse_method(text) for text in methods]
    for method, own in sorted(parsed, key=lambda pair: METHODS.index(pair[0])):
        if method == "none":
            found.append(CloakCell(method))
            continue
        sets = {"noise": [()], "fawkes_pypi": [("dlib",)]}.get(method, surrogate_sets)
        asked = budgets if own is None else [own]
        found += [CloakCell(method, tuple(names), budget) for names in sets for budget in asked]
    return list(dict.fromkeys(found))


def parse_method(text: str) -> tuple[str, float | None]:
    """A method, and the DSSIM budget that is its own if it has one (`lowkey@0.007`).

    Raises:
        ValueError: there is no such method, or the budget does not lie in (0, 1].
    """
    method, _, own = text.partition("@")
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
    if own and not 0 < float(own) <= 1:
        raise ValueError(f"the budget of {text} must lie in (0, 1]")
    return method, float(own) if own else None


def cloak_method(
    method: str, budget: float, *, num_steps: int | None
) -> fawkes.FawkesConfig | lowkey.LowKeyConfig:
    """The options of a cloak.

    Args:
        method: of `CLOAKS`.
        budget: DSSIM of a face.
        num_steps: None for the method's own number.
    """
    config = CLOAKS[method](dssim_budget=budget)
    return config if num_steps is None else dataclasses.replace(config, num_steps=num_steps)


def cloak_options() -> dict[str, dict[str, object]]:
    """The options that a cloak has by itself, but for the budget, by method."""
    found = {}
    for name in CLOAKS:
        found[name] = dataclasses.asdict(cloak_method(name, 1.0, num_steps=None))
        del found[name]["dssim_budget"]
    return found
