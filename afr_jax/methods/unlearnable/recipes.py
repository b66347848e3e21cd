"""Unlearnable examples behind one interface: images in, signed noise by sample id or class out.

    options = unlearnable.published("error_min", "sample")
    made = unlearnable.make(data, method="error_min", options=options, recipe=recipe, ...)
    protected = noise_files.apply(data.images, made.noise, data.sample_ids, names_of_classes)

| method | what it is | budget |
|---|---|---|
| error_min | Huang et al. 2021 (ICLR): the loss has nothing left to teach | L-infinity |
| error_max | its counterpart: noise that raises the loss of a trained network | L-infinity |
| random | uniform noise, the control | L-infinity |
| rem | Fu et al. 2022 (ICLR): error_min under random crops and an inner adversary | L-infinity |
| tap | Fowl et al. 2021 (NeurIPS): towards another label of a trained network | L-infinity |
| lsp | Yu et al. 2022 (KDD): linearly separable patches, no network | L2 |
| cuda | Sadasivan et al. 2023 (CVPR): a random filter for each class, no network | none |

What this does not do: it protects only photos that nobody has without the noise; below 100 %
coverage the victim hardly loses; grayscale, JPEG or adversarial training undo most of it.
Sample-wise noise needs a search for every new image, class-wise noise carries over to new images of
its class. Any later resize or re-encoding weakens it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from afr_jax.core import checkpoint, parallel
from afr_jax.data import image_sets, noise_files
from afr_jax.methods.unlearnable import baselines, search
from afr_jax.training import trainer

METHODS = ("error_min", "error_max", "random", "rem", "tap", "lsp", "cuda")
SEARCHED = ("error_min", "error_max", "rem", "tap")
BUDGETS = {"lsp": "L2", "cuda": "none"}


class Made(NamedTuple):
    """What a method made.

    Attributes:
        noise: by sample or by class.
        report: facts of the run as JSON can say them: training errors of the source network after
            each round, whether the stop was reached, the largest change in gray levels.
    """

    noise: noise_files.Noise
    report: dict[str, Any]


def published(method: str, granularity: noise_files.Granularity) -> search.SearchOptions:
    """The search of a method with the published values for CIFAR-10.

    error_min: Huang et al.'s scripts. error_max: their min-max baseline, 60 epochs of clean
    training (at 97 steps of 512), then ascent until the error is 0.9 (sample-wise) or 0.8
    (class-wise). rem: Fu et al.'s 5,000 source steps at batch 128, here in 20 rounds of 250 with a
    pass over all noise after each, where the authors refine the noise of a batch just before its
    step. tap: 250 steps of Fowl et al. at their usual budget of 8 levels, in 10 rounds; the step
    size is ours.

    Raises:
        ValueError: the method has no search, or the granularity is unknown.
    """
    is_class = granularity == "class"
    base = search.SearchOptions(
        granularity=granularity,
        num_steps=1 if is_class else 20,
        class_share=0.2 if is_class else 1.0,
    )
    if method == "error_min":
        return base
    if method == "error_max":
        return dataclasses.replace(
            base,
            ascend=True,
            source_steps=60 * 97,
            train_steps=0,
            stop_error=0.8 if is_class else 0.9,
        )
    if method == "rem":
        return dataclasses.replace(
            base,
            num_steps=1 if is_class else 10,
            step_levels=1.6,
            train_steps=250,
            batch_size=128,
            max_rounds=20,
            stop_error=None,
            views=5,
            adversary_levels=4.0,
        )
    if method == "tap":
        return dataclasses.replace(
            base,
            permuted=True,
            source_steps=60 * 97,
            train_steps=0,
            num_steps=1 if is_class else 25,
            max_rounds=100 if is_class else 10,
            stop_error=None,
        )
    raise ValueError(f"{method!r} has no search; these have: {', '.join(SEARCHED)}")


def check(method: str, granularity: str) -> None:
    """Raises ValueError if there is no such method, or not for this granularity."""
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are: {', '.join(METHODS)}")
    if granularity not in ("sample", "class"):
        raise ValueError(f"granularity is {granularity!r}, but must be 'sample' or 'class'")
    if method == "cuda" and granularity == "sample":
        raise ValueError("cuda has one filter a class: its granularity is 'class'")


def make(
    data: image_sets.ImageSet,
    *,
    method: str,
    granularity: noise_files.Granularity,
    epsilon_levels: float,
    seed: int,
    options: search.SearchOptions | None = None,
    recipe: trainer.Recipe | None = None,
    mesh: parallel.Mesh | None = None,
    checkpoints: checkpoint.Checkpoints | None = None,
    report_fn: Callable[[int, float], None] | None = None,
) -> Made:
    """Makes noise for a data set; the same set in another order gives the same noise by id.

    Args:
        data: the images to protect.
        method: one of `METHODS`.
        granularity: one noise an image or a class. CUDA's filters are by class, but the change that
            they make is that of each image, and is returned by sample.
        epsilon_levels: budget, gray levels: L-infinity for searched and random noise; lsp scales
            its L2 norm by it, cuda has none.
        seed: of everything random.
        options: of the search, whose granularity and epsilon these arguments replace; by default
            `published`.
        recipe: source network of a search.
        mesh: devices of a search; by default all.
        checkpoints: of a search, which resumes from them.
        report_fn: called after each round of a search with its number and the training error.

    Raises:
        ValueError: unknown method, or a combination that does not exist.
    """
    check(method, granularity)
    order = np.argsort(np.array(data.sample_ids), kind="stable")
    data = image_sets.take(data, order)
    shape = data.images.shape[1:]
    of_sample = [data.classes[label] for label in data.labels]
    names = data.sample_ids if granularity == "sample" else data.classes
    report: dict[str, Any] = {}
    if method in SEARCHED:
        if recipe is None:
            raise ValueError(f"{method} needs the recipe of a source network")
        options = dataclasses.replace(
            options or published(method, granularity),
            granularity=granularity,
            epsilon_levels=epsilon_levels,
        )
        found = search.search(
            data.images,
            data.labels,
            num_classes=len(data.classes),
            recipe=recipe,
            options=options,
            seed=seed,
            mesh=mesh or parallel.make_mesh(),
            checkpoints=checkpoints,
            report_fn=report_fn,
        )
        levels = noise_files.to_levels(found.noise, limit_levels=epsilon_levels)
        report = {"training_errors": found.errors, "converged": found.converged}
    elif method == "random":
        levels = baselines.uniform(seed, names, shape, epsilon_levels=epsilon_levels)
    elif method == "lsp":
        classes = of_sample if granularity == "sample" else names
        levels = baselines.separable_patches(
            seed, names, classes, shape, epsilon_levels=epsilon_levels
        )
    else:
        filters = baselines.class_filters(seed, data.classes)
        changed = baselines.filtered(data.images, data.labels, filters)
        levels = changed.astype(np.int16) - data.images
        names, granularity = data.sample_ids, "sample"
    noise = noise_files.Noise(tuple(names), levels, granularity)
    report |= {
        "budget": BUDGETS.get(method, "L-infinity"),
        "largest_level": int(np.abs(levels).max(initial=0)),
    }
    return Made(noise, report)
