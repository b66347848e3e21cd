"""Cells of an evaluation: a method, the extractors that it works against, and a DSSIM budget."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple, get_args

from afr_jax.methods.cloaking import budget as budgets
from afr_jax.methods.cloaking import fawkes, lowkey
from afr_jax.models.extractors import registry

# The cloaks that are made here, and the options of each.
CLOAKS: dict[str, type[fawkes.FawkesConfig | lowkey.LowKeyConfig]] = {
    "fawkes": fawkes.FawkesConfig,
    "lowkey": lowkey.LowKeyConfig,
}
METHODS = ("none", "noise", *CLOAKS, "fawkes_pypi")

# A budget as cells have it: the name of a mode, or DSSIM of a face.
Amount = float | budgets.Mode


class CloakCell(NamedTuple):
    """One way to protect photos.

    Attributes:
        method: of `METHODS`.
        surrogates: names of the extractors that it works against; empty for none and noise.
        budget: DSSIM of a face; None for none.
    """

    method: str
    surrogates: tuple[str, ...] = ()
    budget: Amount | None = None

    @property
    def name(self) -> str:
        """Unique among cells, usable as a file name."""
        parts = [self.method]
        if self.surrogates:
            parts.append(self.surrogate_names)
        if self.budget is not None:
            parts.append(str(self.budget))
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
    amounts: Sequence[Amount],
) -> list[CloakCell]:
    """All cells: the plain ones first, every set of surrogates with every budget.

    Args:
        methods: of `METHODS`; `lowkey@0.007` has that budget alone.
        surrogate_sets: what `fawkes` and `lowkey` are made against; `fawkes_pypi` knows dlib alone.
        amounts: Budgets: names of modes, or DSSIM.

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
        asked = amounts if own is None else [own]
        found += [CloakCell(method, tuple(names), budget) for names in sets for budget in asked]
    return list(dict.fromkeys(found))


def parse_method(text: str) -> tuple[str, Amount | None]:
    """A method, and the budget that is its own if it has one (`lowkey@0.007`).

    Raises:
        ValueError: there is no such method, or the budget is none.
    """
    method, _, own = text.partition("@")
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
    return method, parse_budget(own) if own else None


def parse_budget(text: str) -> Amount:
    """A budget: the name of a mode, or DSSIM in (0, 1].

    Raises:
        ValueError: it is neither.
    """
    for mode in get_args(budgets.Mode):
        if text == mode:
            return mode
    try:
        return budgets.Budget(float(text)).dssim
    except ValueError:
        modes = ", ".join(budgets.MODES)
        raise ValueError(f"budgets must be of {modes}, or lie in (0, 1], not {text}") from None


def cloak_method(
    method: str, budget: Amount, *, num_steps: int | None
) -> fawkes.FawkesConfig | lowkey.LowKeyConfig:
    """The options of a cloak.

    Args:
        method: of `CLOAKS`.
        budget: DSSIM of a face.
        num_steps: None for the method's own number.
    """
    if isinstance(budget, str):
        config = CLOAKS[method](mode=budget, dssim_budget=None)
    else:
        config = CLOAKS[method](dssim_budget=budget)
    return config if num_steps is None else dataclasses.replace(config, num_steps=num_steps)


def limits_of(budget: Amount) -> budgets.Budget:
    """The limits of a budget: DSSIM of a face, or the name of a mode."""
    if isinstance(budget, str):
        return budgets.choose(budget, None)
    return budgets.Budget(dssim=budget)


def cloak_options() -> dict[str, dict[str, object]]:
    """The options that a cloak has by itself, but for the budget, by method."""
    found = {}
    for name in CLOAKS:
        found[name] = dataclasses.asdict(cloak_method(name, 1.0, num_steps=None))
        del found[name]["dssim_budget"], found[name]["mode"]
    return found
