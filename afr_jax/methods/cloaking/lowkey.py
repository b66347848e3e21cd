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

import jax
import jax.numpy as jnp
import optax

from afr_jax.core import ssim
from afr_jax.methods.cloaking import face_cloaks
from afr_jax.models.extractors import registry
from afr_jax.perturb import loop, transformations

# Of the chip, cut at 3 pixels: the authors' kernel of 7 x 7.
_BLUR_SIGMA_PX = 3.0


@dataclasses.dataclass(frozen=True)
class LowKeyConfig:
    """Options of the optimisation, with the authors' values; see `face_cloaks.CloakConfig`.

    Attributes:
        dssim_budget: see there.
        linf_limit: see there.
        num_steps: see there.
        start_noise: see there.
        step_size: of a signed step, in [0, 1] units.
    """

    dssim_budget: float = 0.007
    linf_limit: float = 0.05
    num_steps: int = 50
    start_noise: float = 0.005
    step_size: float = 0.0025

    def __post_init__(self):
        for name in ("dssim_budget", "linf_limit", "start_noise", "step_size"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must lie in (0, 1]")
        if self.num_steps < 0:
            raise ValueError(f"num_steps is {self.num_steps}, must be at least 0")

    def problem(
        self,
        variables: tuple[dict, ...],
        face: face_cloaks.Face,
        reference: ssim.SsimReference,
        surrogates: tuple[face_cloaks.Surrogate, ...],
    ) -> loop.Problem:
        """See `face_cloaks.CloakConfig.problem`."""

        def loss_fn(delta, weight, key):
            del key  # Nothing is random.
            return evaluate(delta, weight, variables, face, reference, surrogates)

        return face_cloaks.make_problem(loss_fn, optax.sign_sgd(self.step_size), face)


def evaluate(
    delta: jax.Array,
    weight: jax.Array,
    variables: tuple[dict, ...],
    face: face_cloaks.Face,
    reference: ssim.SsimReference,
    surrogates: tuple[face_cloaks.Surrogate, ...],
) -> loop.Evaluation:
    """Loss, score and metrics of one face's change.

    Returns:
        loss = weight * dssim / budget - gain, where gain is the mean, over surrogates and over
        plain and blurred chip, of the squared distance in units of the clean embedding's squared
        length; score = -gain within the budget and inf outside; metrics of `within_budget`.
    """
    cloaked = face.image + delta
    dssim = face_cloaks.dssim(cloaked, face, reference)
    gains = []
    for surrogate, params, view in zip(surrogates, variables, face.views, strict=True):
        chip = face_cloaks.chip(surrogate, cloaked, view.transform)
        pair = jnp.stack([chip, transformations.blur(chip, _BLUR_SIGMA_PX)])
        moved = registry.embed(surrogate.extractor, params, pair) - view.own[None]
        gains.append(jnp.mean(jnp.sum(moved**2, axis=-1)) / jnp.sum(view.own**2))
    gain = sum(gains) / len(gains)
    return face_cloaks.within_budget(gain, dssim, weight, face)
