"""Fawkes: moves the embedding of a face away while the photo keeps looking the same.

Shan, Wenger, Zhang, Li, Zheng, Zhao: "Fawkes: Protecting Privacy against Unauthorized Deep Learning
Models", USENIX Security 2020. What differs from the paper and from the authors' code, and why:

* The perturbation lives on the photo's own pixels and the chip is warped out of them inside the
  loop (the code perturbs a 112 px crop and pastes an enlarged difference).
* Objective: away from the person, towards a target identity (as the paper), or both, each in units
  of the distance at which other people's photos lie for that extractor; several extractors by a
  soft minimum, as a sum is easily won on the weakest of them alone. The person is the mean of the
  clean embeddings of all faces of the person that are cloaked together (`photo_cloaks.cloak_photos`
  finds them). The code's last release moves each face away from its own clean embedding; what that
  costs is in `experiments/results/fawkes_attempts.md`.
* Steps are longer where texture hides a change (`step`).
* Every step sees the photo as a tracker may get it: blurred or shrunk, compressed, mirrored or not,
  and aligned by other landmarks (Athalye et al. 2018; neither paper nor code have this). What
  survives that also carries over better to extractors that are not among the surrogates.
* Budgets are limits of what people see (`budget`): DSSIM alone, the paper's, is blind to smooth
  shifts of color. A multiplier for each face holds DSSIM and flicker inside the compiled loop, and
  luma and chroma are clipped at every pixel; the other limits hold on the final pixels. Only
  iterates within the budget count (the code accepts 10 % more). What is kept is a moving average of
  them, not the best one: its score was good luck with the view as well.
* Boxes instead of tanh space: pixels at 0 and 255 keep their gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax.typing import VariableDict

from afr_jax.core import options
from afr_jax.methods.cloaking import budget, face_cloaks
from afr_jax.models.extractors import registry
from afr_jax.perturb import loop, transformations
from afr_jax.recognition import align

# The share of the steps over which changes are averaged.
_AVERAGED = 0.1


@dataclasses.dataclass(frozen=True)
class FawkesSearch:
    """Static options of the optimization; see `face_cloaks.CloakSearch`.

    Attributes:
        num_steps: gradient steps, >= 0.
        learning_rate: of Adam at the start for the budget of mode mid, in [0, 1] units, root mean
            square over the pixels (`step`); a cosine takes it to a tenth. For other budgets it
            grows with the root of their DSSIM.
        repel_weight: weight of the distance from the person.
        attract_weight: weight of the distance to the target embedding, where there is a target.
        softmin_sharpness: how much surrogates that lag behind count for more: the gain is
            `soft_minimum` of theirs; 0 is their mean. It grows with the inverse square of
            `Budget.ease`: where the budget is small nothing can be spared for those that are ahead.
        align_shift: standard deviation of the random shift of each chip at each step, as a share of
            its side, at the full strength of views, as all that follows: `Budget.ease` says how
            much of it the budget pays for. A tracker finds other landmarks than ours. By
            MTCNN they move by a quarter of the default; three to four times as much is what
            carries over best to other extractors (`fawkes_attempts.md`). 0 switches it off.
        align_turn: standard deviation of the rotation (radians) and of the relative scale of each
            chip about its center, likewise.
        mirror: whether each chip is mirrored at each step with probability one half.
        blur_px: largest standard deviation of the random Gaussian blur, in canvas pixels, at most
            1.5 (about what halving and doubling the size does). 0 switches it off.
        jpeg_quality: (lowest, highest) of the random JPEG compression; None switches it off.
        start_noise: half width of the uniform start, in [0, 1] units.
    """

    num_steps: int = options.option(100, "gradient steps of a face", at_least=0)
    learning_rate: float = 2 / 255
    repel_weight: float = options.option(1.0, "of the distance from the person", at_least=0)
    attract_weight: float = options.option(1.0, "of the distance to a target", at_least=0)
    softmin_sharpness: float = options.option(
        8.0, "how much surrogates that lag behind count for more; 0: as the others", at_least=0
    )
    align_shift: float = options.option(
        0.02, "standard deviation of a chip's random shift, of its side", at_least=0
    )
    align_turn: float = options.option(
        0.06, "standard deviation of a chip's random rotation, radians, and scale", at_least=0
    )
    mirror: bool = options.option(True, "chips are mirrored at random")
    blur_px: float = options.option(1.5, "largest random blur, canvas pixels", at_least=0)
    jpeg_quality: tuple[int, int] | None = (60, 95)
    start_noise: float = 1 / 255

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: an option is out of its range.
        """
        options.check(self)
        face_cloaks.check_shares(self, ("learning_rate", "start_noise"))
        self.views()

    def views(self) -> transformations.ViewOptions:
        """How the photo may change on its way to the tracker."""
        return transformations.ViewOptions(
            light=0.0,
            contrast=0.0,
            color_cast=0.0,
            noise=0.0,
            blur_px=self.blur_px,
            jpeg_quality=self.jpeg_quality,
        )

    def rules(self, face: face_cloaks.Face, reference: face_cloaks.Reference) -> loop.Rules:
        """See `face_cloaks.CloakSearch.rules`."""
        # Of so few steps that the average would be of one change, the best is kept.
        ema_decay = 1 - 1 / max(_AVERAGED * self.num_steps, 1)
        return face_cloaks.rules(step(self, face, reference), face, ema_decay=ema_decay or None)

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
            del step
            return evaluate(
                key, delta, weight, variables, face, reference, surrogates=surrogates, config=self
            )

        return loop.Problem(loss_fn, self.rules(face, reference))


@dataclasses.dataclass(frozen=True)
class FawkesConfig(FawkesSearch):
    """Options of a cloak; see `face_cloaks.CloakMethod`, and `FawkesSearch` for the others.

    Attributes:
        mode: Name of a budget in what people see (`budget.MODES`).
        dssim_budget: Largest DSSIM of a face, in (0, 1], in place of the mode's limits; 0.007 is
            the paper's.
        linf_limit: Largest change of a pixel, in [0, 1] units.
    """

    mode: budget.Mode = "mid"
    dssim_budget: float | None = None
    linf_limit: float = 24 / 255

    def __post_init__(self) -> None:
        """Checks ranges."""
        super().__post_init__()
        face_cloaks.check_shares(self, ("linf_limit",))
        _ = self.budget

    @property
    def budget(self) -> budget.Budget:
        """See `face_cloaks.CloakMethod.budget`."""
        return budget.choose(self.mode, self.dssim_budget)

    @property
    def search(self) -> FawkesSearch:
        """See `face_cloaks.CloakMethod.search`."""
        return options.narrowed(self, FawkesSearch)


def evaluate(
    key: jax.Array,
    delta: jax.Array,
    weight: jax.Array,
    variables: tuple[VariableDict, ...],
    face: face_cloaks.Face,
    reference: face_cloaks.Reference,
    *,
    surrogates: tuple[face_cloaks.Surrogate, ...],
    config: FawkesSearch,
) -> loop.Evaluation:
    """Loss, score and metrics of one face's change (equation 2 of the paper, repelling by default).

    Args:
        key: of the view, the misalignment and the mirroring.
        delta: `[S, S, 3]`.
        weight: multiplier of the budget's penalty.
        variables: of each surrogate's module.
        face: without batch axis.
        reference: of the canvas.
        surrogates: static.
        config: options.

    Returns:
        loss = weight * spent - gain, score = -gain within the budget and inf outside, metrics
        `spent`, `gain` and `distances` from the person `[number of surrogates]`.
    """
    cloaked = delta + face.image
    spent = face_cloaks.spent(cloaked, face, reference)
    view_key, align_key = jax.random.split(key)
    ease = jnp.asarray(face.ease)
    seen = transformations.random_view(view_key, cloaked, config.views(), share=ease)
    distances, gains = [], []
    for number, (surrogate, params, crop) in enumerate(
        zip(surrogates, variables, face.crops, strict=True)
    ):
        transform = crop.transform
        own_key = jax.random.fold_in(align_key, number)
        if config.align_shift > 0 or config.align_turn > 0:
            transform = align.jitter_transform(
                own_key,
                transform,
                surrogate.extractor.input_px,
                shift=ease * config.align_shift,
                turn=ease * config.align_turn,
            )
        chip = face_cloaks.chip(surrogate, seen, transform)
        if config.mirror:
            is_mirrored = jax.random.bernoulli(jax.random.fold_in(own_key, 1), 0.5 * ease)
            chip = jnp.where(is_mirrored, chip[:, ::-1], chip)
        embedding = registry.embed(surrogate.extractor, params, chip[None])[0]
        away = registry.distance(embedding, crop.own + crop.to_person)
        left = registry.distance(embedding, crop.target)
        distances.append(away)
        gain = config.repel_weight * away - config.attract_weight * face.has_target * left
        gains.append(gain / surrogate.extractor.reach)
    gains, distances = jnp.stack(gains), jnp.stack(distances)
    if config.softmin_sharpness > 0:
        gain = soft_minimum(gains, config.softmin_sharpness / ease**2)
    else:
        gain = jnp.mean(gains)
    return face_cloaks.within_budget(gain, spent, weight, distances=distances)


def soft_minimum(values: jax.Array, sharpness: jax.Array | float) -> jax.Array:
    """-log(mean(exp(-sharpness * values))) / sharpness of `[N]`, for a sharpness above 0."""
    log_mean = jax.nn.logsumexp(-sharpness * values) - jnp.log(values.shape[0])
    return -log_mean / sharpness


def step(
    config: FawkesSearch, face: face_cloaks.Face, reference: face_cloaks.Reference
) -> optax.GradientTransformation:
    """Adam with a cosine schedule, longer where a change costs less DSSIM: where texture hides it.

    Adam alone moves all pixels alike, and smooth skin, where that shows most, eats up the budget.

    Args:
        config: options.
        face: without batch axis, with its budget.
        reference: of its canvas.
    """
    schedule = optax.cosine_decay_schedule(
        config.learning_rate, max(config.num_steps, 1), alpha=0.1
    )
    size = jnp.sqrt(face.budget / budget.PUBLISHED_DSSIM)
    return optax.chain(
        optax.adam(lambda count: size * schedule(count), b1=0.9, b2=0.99),
        optax.stateless(
            lambda updates, _: jax.tree.map(lambda one: one * reference.tolerance, updates)
        ),
    )
