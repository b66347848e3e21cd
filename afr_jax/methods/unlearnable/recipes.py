"""Makers of unlearnable examples, each a config class with the published values, and one function.

    noise = make_unlearnable(data, config=ErrorMin(granularity="sample"))
    protected = noise.apply(data)
    noise.save("noise.npz")

| name | class | what it is | budget |
|---|---|---|---|
| error_min | `ErrorMin` | Huang et al. 2021 (ICLR): nothing is left to learn | L-infinity |
| error_max | `ErrorMax` | its counterpart: raises the loss of a trained network | L-infinity |
| random | `RandomNoise` | uniform noise, the control | L-infinity |
| rem | `REM` | Fu et al. 2022 (ICLR): error_min under crops and an adversary | L-infinity |
| tap | `TAP` | Fowl et al. 2021 (NeurIPS): towards another label | L-infinity |
| aue | `AUE` | Wang et al. 2024 (NeurIPS): error_min under contrastive views | L-infinity |
| aap | `AAP` | of the same: TAP under such views | L-infinity |
| uc | `UnlearnableClusters` | Zhang et al. 2023 (CVPR): by cluster, no labels | L-infinity |
| lsp | `LSP` | Yu et al. 2022 (KDD): linearly separable patches, no network | L2 |
| cuda | `CUDA` | Sadasivan et al. 2023 (CVPR): a random filter a class, no network | none |

What this does not do: it protects only photos that nobody has without the noise; below 100 %
coverage the victim hardly loses; grayscale, JPEG or adversarial training undo most of it.
Sample-wise noise needs a search for every new image, class-wise noise carries over to new images of
its class. Any later resize or re-encoding weakens it.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np

from afr_jax.core import checkpoint, files, parallel
from afr_jax.data import augmentation, image_sets, noise_files
from afr_jax.methods.unlearnable import baselines, clusters
from afr_jax.methods.unlearnable import search as noise_search
from afr_jax.models import heads
from afr_jax.models.classifiers import registry
from afr_jax.training import optimizers, trainer

# Optimizer steps of 60 epochs of CIFAR-10 in batches of 512, on clean images.
_SOURCE_STEPS = 60 * 97


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig(abc.ABC):
    """What all methods have in common.

    Attributes:
        granularity: one noise an image ("sample"), or one a class ("class").
        epsilon: budget in [0, 1] units: the largest change of a value, but for LSP and CUDA.
    """

    name: ClassVar[str]
    budget: ClassVar[str] = "L-infinity"
    granularities: ClassVar[tuple[str, ...]] = ("sample", "class")
    needs_classes: ClassVar[bool] = False
    granularity: noise_files.Granularity = "sample"
    epsilon: float = 8 / 255

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        if self.granularity not in ("sample", "class"):
            raise ValueError(f"granularity is {self.granularity!r}, must be 'sample' or 'class'")
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon is {self.epsilon}, must lie in (0, 1]")

    @property
    def epsilon_levels(self) -> float:
        """The budget in gray levels."""
        return round(255 * self.epsilon, 6)  # 8, not 8 give or take a rounding.

    def describe(self) -> dict[str, files.Json]:
        """The method and its options, as JSON can say them."""
        return {
            "method": self.name,
            "granularity": self.granularity,
            "epsilon_levels": self.epsilon_levels,
            "search": None,
            "source": None,
        }

    def names_of(self, data: image_sets.ImageSet) -> tuple[str, ...]:
        """Whose noise it is: sample ids or class names."""
        return data.sample_ids if self.granularity == "sample" else data.classes


class DirectNoise(NoiseConfig):
    """A method without a network."""

    @abc.abstractmethod
    def make(self, data: image_sets.ImageSet, *, seed: int) -> noise_files.Noise:
        """The noise of a set, which depends on ids, classes and seed, not on an order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomNoise(DirectNoise):
    """Uniform noise in [-epsilon, epsilon], the control; see `NoiseConfig`."""

    name = "random"

    def make(self, data: image_sets.ImageSet, *, seed: int) -> noise_files.Noise:
        """See `DirectNoise.make`."""
        names, shape = self.names_of(data), data.images.shape[1:]
        levels = baselines.uniform(seed, names, shape, epsilon_levels=self.epsilon_levels)
        return noise_files.Noise(names, levels, self.granularity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSP(DirectNoise):
    """Linearly separable patches; `epsilon` scales their L2 norm (`baselines`)."""

    name = "lsp"
    budget = "L2"

    def make(self, data: image_sets.ImageSet, *, seed: int) -> noise_files.Noise:
        """See `DirectNoise.make`."""
        names = self.names_of(data)
        of_sample = [data.classes[label] for label in data.labels]
        levels = baselines.separable_patches(
            seed,
            names,
            of_sample if self.granularity == "sample" else names,
            data.images.shape[1:],
            epsilon_levels=self.epsilon_levels,
        )
        return noise_files.Noise(names, levels, self.granularity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CUDA(DirectNoise):
    """A random filter for each class; there is no budget.

    The change that a filter makes is that of each image, so the noise is by sample.
    """

    name = "cuda"
    budget = "none"
    granularities = ("class",)
    granularity: noise_files.Granularity = "class"

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        super().__post_init__()
        if self.granularity == "sample":
            raise ValueError("cuda has one filter a class: its granularity is 'class'")

    def make(self, data: image_sets.ImageSet, *, seed: int) -> noise_files.Noise:
        """See `DirectNoise.make`."""
        filters = baselines.class_filters(seed, data.classes)
        changed = baselines.filtered(data.images, data.labels, filters)
        return noise_files.Noise(data.sample_ids, changed.astype(np.int16) - data.images, "sample")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchedNoise(NoiseConfig):
    """A method that searches its noise with a source network.

    Attributes:
        granularity: see `NoiseConfig`.
        epsilon: see `NoiseConfig`.
        network: the source network.
        learning_rate: of its training, which does not fall.
        search: how the noise is searched; None for the published values of CIFAR-10
            (`published`), and see `with_search`. Granularity and epsilon are those of the method.
    """

    needs_classes = True
    network: registry.ClassifierOptions = registry.ClassifierOptions()
    learning_rate: float = 0.1
    search: noise_search.SearchOptions | None = None

    @abc.abstractmethod
    def published(self) -> noise_search.SearchOptions:
        """The search with the published values for CIFAR-10."""

    def search_options(self) -> noise_search.SearchOptions:
        """The search as it is done."""
        return dataclasses.replace(
            self.search or self.published(),
            granularity=self.granularity,
            epsilon=self.epsilon,
        )

    def with_search(self, **changes: Any) -> Self:
        """The method with some other values of its search, fields of `SearchOptions`."""
        return dataclasses.replace(
            self, search=dataclasses.replace(self.search_options(), **changes)
        )

    def describe(self) -> dict[str, files.Json]:
        """See `NoiseConfig.describe`."""
        source = {"network": self.network, "learning_rate": self.learning_rate}
        return super().describe() | {"search": self.search_options(), "source": source}

    def recipe(self, num_classes: int) -> trainer.Recipe:
        """The training of the source network."""
        optimizer = optimizers.OptimizerOptions(
            learning_rate=self.learning_rate, schedule="constant"
        )
        return trainer.Recipe(self.network.make(num_classes), heads.Logits(), optimizer)

    def groups(self, data: image_sets.ImageSet, *, seed: int) -> tuple[np.ndarray, int]:
        """What the source network tells apart: the group of each image `[N]`, and their number."""
        del seed
        return data.labels, len(data.classes)

    def noise_of(
        self, data: image_sets.ImageSet, groups: np.ndarray, levels: np.ndarray
    ) -> noise_files.Noise:
        """Names for found noise `[N or K, H, W, 3]`, in gray levels."""
        del groups
        return noise_files.Noise(self.names_of(data), levels, self.granularity)

    def _base(self) -> noise_search.SearchOptions:
        is_class = self.granularity == "class"
        return noise_search.SearchOptions(
            num_steps=1 if is_class else 20, class_share=0.2 if is_class else 1.0
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorMin(SearchedNoise):
    """Error-minimizing noise; see `SearchedNoise`."""

    name = "error_min"

    def published(self) -> noise_search.SearchOptions:
        """The values of Huang et al.'s scripts."""
        return self._base()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorMax(SearchedNoise):
    """Error-maximizing noise; see `SearchedNoise`."""

    name = "error_max"

    def published(self) -> noise_search.SearchOptions:
        """Huang et al.'s min-max baseline.

        60 epochs of clean training (97 steps of 512 images each), then ascent until the error is
        0.9 (sample-wise) or 0.8 (class-wise).
        """
        return dataclasses.replace(
            self._base(),
            ascend=True,
            source_steps=_SOURCE_STEPS,
            train_steps=0,
            stop_error=0.8 if self.granularity == "class" else 0.9,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class REM(SearchedNoise):
    """Robust error-minimizing noise; see `SearchedNoise`."""

    name = "rem"

    def published(self) -> noise_search.SearchOptions:
        """Fu et al.'s 5,000 source steps at batch 128, here in 20 rounds of 250.

        A pass over all noise follows each round, where the authors refine the noise of a batch just
        before its step.
        """
        return dataclasses.replace(
            self._base(),
            num_steps=1 if self.granularity == "class" else 10,
            step_size=1.6 / 255,
            train_steps=250,
            batch_size=128,
            max_rounds=20,
            stop_error=None,
            views=5,
            adversary_radius=4 / 255,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TAP(SearchedNoise):
    """Targeted adversarial noise: towards the label of another class; see `SearchedNoise`."""

    name = "tap"

    def published(self) -> noise_search.SearchOptions:
        """250 steps of Fowl et al. at their usual budget of 8 levels, in 10 rounds.

        The step size is ours.
        """
        is_class = self.granularity == "class"
        return dataclasses.replace(
            self._base(),
            permuted=True,
            source_steps=_SOURCE_STEPS,
            train_steps=0,
            num_steps=1 if is_class else 25,
            max_rounds=100 if is_class else 10,
            stop_error=None,
        )


def contrastive_view(strength: float) -> augmentation.Augmentation:
    """Views as contrastive learning has them, of a strength in [0, 1].

    Wang et al. 2024: SimCLR's views (Chen et al. 2020, appendix A) are scaled by one number. Here
    crops of a random area from 1 - 0.9 strength on, flips, brightness, contrast and saturation by
    0.4 strength, no color with probability 0.2 strength. The authors change color in a share of 0.8
    strength of the views, here in all, and hue as well, which is left out.
    """
    return augmentation.Augmentation(
        min_scale=1 - 0.9 * strength,
        max_stretch=4 / 3,
        flip_probability=0.5,
        brightness=0.4 * strength,
        contrast=0.4 * strength,
        saturation=0.4 * strength,
        gray_probability=0.2 * strength,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AUE(SearchedNoise):
    """Augmented unlearnable examples, against supervised and contrastive learning at once.

    Wang, Zhu and Gao 2024, "Efficient Availability Attacks against Supervised and Contrastive
    Learning Simultaneously" (NeurIPS), section 4: error-minimizing noise whose source network and
    whose noise steps see `contrastive_view` of strength 0.6, the authors' for CIFAR-10; a victim
    that learns from pairs of views is met by it, too. The rounds are those of `ErrorMin`. See
    `SearchedNoise`.
    """

    name = "aue"

    def published(self) -> noise_search.SearchOptions:
        """The values of `ErrorMin` with views, all rounds."""
        return dataclasses.replace(
            self._base(), views=1, view=contrastive_view(0.6), stop_error=None
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AAP(SearchedNoise):
    """Augmented adversarial poisoning, the targeted form; see `AUE` and `SearchedNoise`.

    The source network is trained on views of clean images, and the noise leads views to the label
    of another class: `TAP` under `contrastive_view` of strength 0.4, the authors' for CIFAR-10.
    """

    name = "aap"

    def published(self) -> noise_search.SearchOptions:
        """The values of `TAP` with views."""
        tap = TAP(granularity=self.granularity).published()
        return dataclasses.replace(tap, views=1, view=contrastive_view(0.4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlearnableClusters(SearchedNoise):
    """Noise by clusters of images, which needs no labels; see `SearchedNoise`.

    Zhang et al. 2023, "Unlearnable Clusters: Towards Label-Agnostic Unlearnable Examples" (CVPR):
    images are put into clusters without labels, and all images of a cluster share a noise that
    leads them to the center of another one. The authors cluster and measure in the features of a
    large pretrained network and train a generator for each noise. Here K-means (Lloyd, in the
    principal components of the pixels) makes the clusters, a source network is trained to tell
    them apart, and the noise is searched as `TAP` by class with clusters for classes: the rows of
    its last layer take the centers' place. Their budget is 16/255; the default here is that of the
    other methods.

    Attributes:
        granularity: "class", which is by cluster; images of one cluster have equal noise.
        num_clusters: p, 10 in the paper.
    """

    name = "uc"
    needs_classes = False
    granularities = ("class",)
    granularity: noise_files.Granularity = "class"
    num_clusters: int = 10

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        super().__post_init__()
        if self.granularity == "sample":
            raise ValueError("uc has one noise a cluster: its granularity is 'class'")
        if self.num_clusters < 2:
            raise ValueError(f"num_clusters is {self.num_clusters}, must be at least 2")

    def published(self) -> noise_search.SearchOptions:
        """The values of `TAP`."""
        return TAP(granularity="class").published()

    def groups(self, data: image_sets.ImageSet, *, seed: int) -> tuple[np.ndarray, int]:
        """See `SearchedNoise.groups`: clusters, as many as there are images for."""
        count = min(self.num_clusters, len(data.images))
        return clusters.of_images(data.images, count, seed=seed), count

    def noise_of(
        self, data: image_sets.ImageSet, groups: np.ndarray, levels: np.ndarray
    ) -> noise_files.Noise:
        """See `SearchedNoise.noise_of`: by sample, since a cluster has no name of its own."""
        return noise_files.Noise(data.sample_ids, levels[groups], "sample")


METHODS: dict[str, type[NoiseConfig]] = {
    config.name: config
    for config in (
        *(ErrorMin, ErrorMax, RandomNoise, REM, TAP, LSP, CUDA),
        *(AUE, AAP, UnlearnableClusters),
    )
}
SEARCHED = tuple(name for name, config in METHODS.items() if issubclass(config, SearchedNoise))


def is_defined(method: str, granularity: str) -> bool:
    """Whether a method of `METHODS` makes noise of this granularity."""
    return granularity in METHODS[method].granularities


def make_unlearnable(
    data: image_sets.ImageSet,
    *,
    config: NoiseConfig | None = None,
    seed: int = 0,
    mesh: parallel.Mesh | None = None,
    checkpoints: checkpoint.Checkpoints | None = None,
    report_fn: Callable[[int, float], None] | None = None,
) -> noise_files.Noise:
    """Makes noise for a data set; the same set in another order gives the same noise by id.

    Args:
        data: The images to protect.
        config: The method; by default `ErrorMin()`.
        seed: The seed of everything random.
        mesh: The devices of a search; by default all.
        checkpoints: Saves the state of a search after each round, and resumes from the last one.
        report_fn: Called after each round of a search with its number and the training error.

    Returns:
        The noise. Its `settings` have the method with its options, the seed, and under "report" the
        facts of the run: `budget`, `largest_level` (largest change, gray levels) and, of a search,
        `training_errors` of the source network on noisy images after each round and `converged`,
        whether the limit was met before the rounds were used up.

    Raises:
        TypeError: `data` or `config` is something else.
        ValueError: The method needs more classes.
    """
    config = config or ErrorMin()
    image_sets.check(data, name="data")
    data = image_sets.take(data, np.arange(len(data.labels)))
    report: dict[str, files.Json] = {}
    if isinstance(config, SearchedNoise):
        groups, count = config.groups(data, seed=seed)
        if count < 2:
            raise ValueError(f"{config.name} needs two classes or more")
        found = noise_search.search(
            data.images,
            groups,
            num_classes=count,
            recipe=config.recipe(count),
            options=config.search_options(),
            seed=seed,
            mesh=mesh or parallel.make_mesh(),
            checkpoints=checkpoints,
            report_fn=report_fn,
        )
        levels = noise_files.to_levels(found.noise, limit_levels=config.epsilon_levels)
        noise = config.noise_of(data, groups, levels)
        report = {"training_errors": found.errors, "converged": found.converged}
    elif isinstance(config, DirectNoise):
        noise = config.make(data, seed=seed)
    else:
        kind = type(config).__name__
        raise TypeError(f"config must be a method's, as `ErrorMin()`, got {kind}")
    report |= {"budget": config.budget, "largest_level": int(np.abs(noise.levels).max(initial=0))}
    return noise._replace(settings=config.describe() | {"seed": seed, "report": report})
