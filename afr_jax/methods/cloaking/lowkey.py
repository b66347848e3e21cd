"""LowKey: the stronger published cloak, beside Fawkes under the same budget.

Cherepanova, Goldblum, Foley, Duan, Dickerson, Taylor, Goldstein: "LowKey: Leveraging Adversarial
Attacks to Protect Social Media Users from Facial Recognition", ICLR 2021, equation 1: signed steps
away from the own embedding, on the chip as it is and after a Gaussian blur, each in units of the
length of the clean embedding, summed over an ensemble, within an L-infinity ball.

Differences: the visible change is limited by the DSSIM budget that all methods here share (the
authors subtract 0.05 times LPIPS, whose network is not at hand), held by a multiplier as in
`fawkes`; the ensemble is the caller's (theirs: four ArcFace and CosFace nets); the perturbation
lives on the photo's pixels instead of a 112 px chip; the last iterate is not taken, but the best.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import optax
from flax.typing import VariableDict

from afr_jax.core import options
from afr_jax.methods.cloaking import budget, face_cloaks
from afr_jax.models.extractors import registry
from afr_jax.perturb import loop, transformations

# Of the chip, cut at 3 pixels: the authors' kernel of 7 x 7.
_BLUR_SIGMA_PX = 3.0


@dataclasses.dataclass(frozen=True)
class LowKeySearch:
    """Static options of the optimization, with the authors' values; see `face_cloaks.CloakSearch`.

    Attributes:
        num_steps: see there.
        start_noise: see there.
        step_size: of a signed step, in [0, 1] units.
    """

    num_steps: int = options.option(50, "gradient steps of a face", at_least=0)
    start_noise: float = 0.005
    step_size: float = 0.0025

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: an option is out of its range.
        """
        options.check(self)
        face_cloaks.check_shares(self, ("start_noise", "step_size"))

    def rules(self, face: face_cloaks.Face, reference: face_cloaks.Reference) -> loop.Rules:
        """See `face_cloaks.CloakSearch.rules`."""
        del reference
        return face_cloaks.rules(optax.sign_sgd(self.step_size), face)

    def problem(
        self,
        variables: tuple[VariableDict, ...],
        face: face_cloaks.Face,
        reference: face_cloaks.Reference,
        surrogates: tuple[face_cloaks.Surrogate, ...],
    ) -> loop.Problem:
        """See `face_cloaks.CloakSearch.problem`."""

        def loss_fn(
            delta: jax.Array, weight: jax.Array, key: jax.Array, step: jax.Array
        ) -> loop.Evaluation:
            del key, step  # Nothing is random.
            return evaluate(delta, weight, variables, face, reference, surrogates)

        return loop.Problem(loss_fn, self.rules(face, reference))


@dataclasses.dataclass(frozen=True)
class LowKeyConfig(LowKeySearch):
    """Options of a cloak; see `face_cloaks.CloakMethod`, and `LowKeySearch` for the others.

    Attributes:
        dssim_budget: Largest DSSIM of a face, in (0, 1].
        mode: Name of a budget in what people see (`budget.MODES`), in place of it.
        linf_limit: Largest change of a pixel, in [0, 1] units.
    """

    dssim_budget: float | None = 0.007
    mode: budget.Mode | None = None
    linf_limit: float = 0.05

    def __post_init__(self) -> None:
        """Checks ranges."""
        super().__post_init__()
        face_cloaks.check_shares(self, ("linf_limit",))
        _ = self.budget

    @property
    def budget(self) -> budget.Budget:
        """See `face_cloaks.CloakMethod.budget`."""
        return budget.choose(self.mode, None if self.mode else self.dssim_budget)

    @property
    def search(self) -> LowKeySearch:
        """See `face_cloaks.CloakMethod.search`."""
        return options.narrowed(self, LowKeySearch)


def evaluate(
    delta: jax.Array,
    weight: jax.Array,
    variables: tuple[VariableDict, ...],
    face: face_cloaks.Face,
    reference: face_cloaks.Reference,
    surrogates: tuple[face_cloaks.Surrogate, ...],
) -> loop.Evaluation:
    """Loss, score and metrics of one face's change.

    Returns:
        loss = weight * spent - gain, where gain is the mean, over surrogates and over
        plain and blurred chip, of the squared distance in units of the clean embedding's squared
        length; score = -gain within the budget and inf outside; metrics of `within_budget`.
    """
    cloaked = delta + face.image
    spent = face_cloaks.spent(cloaked, face, reference)
    gains = []
    for surrogate, params, crop in zip(surrogates, variables, face.crops, strict=True):
        chip = face_cloaks.chip(surrogate, cloaked, crop.transform)
        pair = jnp.stack([chip, transformations.blur(chip, _BLUR_SIGMA_PX)])
        moved = registry.embed(surrogate.extractor, params, pair) - crop.own[None]
        gains.append(jnp.mean(jnp.sum(moved**2, axis=-1)) / jnp.sum(crop.own**2))
    gain = functools.reduce(operator.add, gains) / len(gains)
    return face_cloaks.within_budget(gain, spent, weight)
