"""Rows `noise` and `victim`: our noise search and victim training beside plain PyTorch.

Both sides train the same net on the same random images; on a GPU both compute in bfloat16. The
other side runs in a process of its own (`experiments/reference/unlearnable_driver.py`), whose
environment needs `torch` alone.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.benchmark import setting, timing
from afr_jax.core import images as image_ops
from afr_jax.core import options as options_lib
from afr_jax.core import parallel
from afr_jax.evaluation import reference
from afr_jax.evaluation.attackers import victims
from afr_jax.methods.unlearnable import recipes, search
from afr_jax.models import heads, norm
from afr_jax.models.classifiers import resnet
from afr_jax.models.weights import conversion
from afr_jax.training import optimizers, trainer

_DRIVER = "unlearnable_driver.py"
_SIDE = 32
_CLASSES = 10
_NAMES = {"noise": "noise, one pass", "victim": "victim, one epoch"}


@dataclasses.dataclass(frozen=True)
class UnlearnableOptions:
    """Sizes of the rows `noise` and `victim`: by default a small net for CPUs.

    The published setting, for one GPU: num_images=50000, num_blocks=(2, 2, 2, 2), width=64,
    batch_size=512, noise_steps=20.
    """

    num_images: int = options_lib.option(
        1024, "noise, victim: random images of 32 px, ten classes", at_least=2
    )
    num_blocks: tuple[int, ...] = options_lib.option(
        (1, 1, 1), "noise, victim: residual blocks of each stage", at_least=1
    )
    width: int = options_lib.option(16, "noise, victim: channels of the first stage", at_least=1)
    batch_size: int = options_lib.option(128, "noise, victim: images of a step", at_least=1)
    noise_steps: int = options_lib.option(
        4, "noise: signed steps of an image in a pass", at_least=1
    )
    peak_teraflops: float | None = options_lib.option(
        None,
        "noise, victim: peak of the device at the precision in use (H200, dense bfloat16: 989); "
        "without it the share is not stated",
    )

    def __post_init__(self) -> None:
        """Checks the ranges."""
        options_lib.check(self)


def run_noise(config: UnlearnableOptions, given: setting.Setting) -> setting.Measured:
    """A pass of the noise search beside PyTorch's."""
    return _run("noise", config, given)


def run_victim(config: UnlearnableOptions, given: setting.Setting) -> setting.Measured:
    """An epoch of a victim beside PyTorch's."""
    return _run("victim", config, given)


def measure(
    row: Literal["noise", "victim"],
    folder: pathlib.Path,
    other: reference.ReferenceProcess | None,
    *,
    options: UnlearnableOptions,
    repeats: int,
    seed: int = 0,
) -> list[timing.Row]:
    """Rows of a table (`timing`): seconds, the rate of arithmetic and its share of the peak.

    Args:
        row: "noise", a pass of signed steps over the noise of all images, or "victim", an epoch of
            a victim without augmentation.
        folder: Where the images are put for the other side.
        other: The other side; None leaves its column empty.
        options: The sizes.
        repeats: The timed runs of each side.
        seed: The seed of images and nets.

    Returns:
        The rows. The arithmetic is that of the convolutions and the linear layer. The last row is
        the share of our time that the network takes alone, without BatchNorm, loss, optimizer and
        data: what is left to gain around the convolutions of XLA.
    """
    mesh = parallel.make_mesh()
    images, labels, recipe = make_task(options, seed)
    data = trainer.place_data(images, labels, mesh)
    work = _forward_flops(recipe, images.shape[1:]) * len(images)
    if row == "noise":
        ours_fn = noise_pass(options, data, recipe, mesh, seed)
        # A signed step is a forward and a backward pass to the images: twice a forward pass.
        work *= 2 * options.noise_steps
    else:
        ours_fn = victim_epoch(options, data, recipe, mesh, seed)
        work *= 3
    sides = {"ours": ours_fn, "bare": bare_pass(row, options, data, recipe)}
    if other is not None:
        sides["theirs"] = _theirs(row, folder, other, options, images, labels)
    samples = timing.take_turns(sides, repeats=repeats)
    rates = [work / seconds / 1e12 for seconds in samples["ours"]]
    rows = [
        timing.compare(_NAMES[row], "s", samples["ours"], samples.get("theirs")),
        timing.state(_NAMES[row], "teraflops/s", timing.spread(rates), None),
    ]
    bare = [bare / whole for bare, whole in zip(samples["bare"], samples["ours"], strict=True)]
    rows.append(timing.state(_NAMES[row], "share of the bare network", timing.spread(bare), None))
    if options.peak_teraflops:
        shares = timing.spread([rate / options.peak_teraflops for rate in rates])
        rows.append(timing.state(_NAMES[row], "share of peak", shares, None))
    return rows


def make_task(
    options: UnlearnableOptions, seed: int
) -> tuple[np.ndarray, np.ndarray, trainer.Recipe]:
    """Random images `[N, 32, 32, 3]` uint8 of ten classes, their labels, and a net for them."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (options.num_images, _SIDE, _SIDE, 3)).astype(np.uint8)
    labels = (np.arange(len(images)) % _CLASSES).astype(np.int32)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    net = resnet.ResNet(options.num_blocks, False, options.width, "cifar", _CLASSES, dtype=dtype)
    recipe = trainer.Recipe(net, heads.Logits(), optimizers.OptimizerOptions(schedule="constant"))
    return images, labels, recipe


def _run(
    row: Literal["noise", "victim"], config: UnlearnableOptions, given: setting.Setting
) -> setting.Measured:
    with given.reference.open(_DRIVER) as other:
        rows = measure(
            row, given.folder, other, options=config, repeats=given.repeats, seed=given.seed
        )
        return setting.Measured(rows, {} if other is None else other.versions)


def _theirs(
    row: str,
    folder: pathlib.Path,
    other: reference.ReferenceProcess,
    options: UnlearnableOptions,
    images: np.ndarray,
    labels: np.ndarray,
) -> Callable[[], float]:
    arguments: dict[str, Any] = {
        "num_blocks": list(options.num_blocks),
        "width": options.width,
        "batch": min(options.batch_size, options.num_images),
        "rounds": 1,
    }
    for name, array in (("images", images), ("labels", labels)):
        arguments[name] = os.fspath(folder / f"{name}.npy")
        np.save(arguments[name], array)
    command = {"noise": "noise", "victim": "epoch"}[row]
    if row == "noise":
        arguments["num_steps"] = options.noise_steps
    return lambda: other.call(command, **arguments)["seconds"][0]


def noise_pass(
    options: UnlearnableOptions,
    data: trainer.Data,
    recipe: trainer.Recipe,
    mesh: parallel.Mesh,
    seed: int,
) -> Callable[[], float]:
    """A function that does a pass over the noise and returns its seconds."""
    found = recipes.ErrorMin().with_search(
        batch_size=min(options.batch_size, options.num_images), num_steps=options.noise_steps
    )
    how = found.search_options()
    state = search.init_search(seed, data, recipe, how, num_rows=len(data.labels), mesh=mesh)
    target_of = jnp.arange(_CLASSES)

    def seconds() -> float:
        nonlocal state
        start = time.perf_counter()
        state = search.refine(
            state, data, target_of, recipe=recipe, options=how, seed=seed, mesh=mesh
        )
        jax.block_until_ready(state.noise)
        return time.perf_counter() - start

    return seconds


def victim_epoch(
    options: UnlearnableOptions,
    data: trainer.Data,
    recipe: trainer.Recipe,
    mesh: parallel.Mesh,
    seed: int,
) -> Callable[[], float]:
    """A function that trains a victim for an epoch and returns its seconds."""
    victim = victims.VictimOptions(batch_size=options.batch_size, augmented=False)
    key, batches = victims.init_run(seed, len(data.labels), victim, multiple=mesh.devices.size)
    state = trainer.init_state(key, recipe, image_shape=(_SIDE, _SIDE, 3), mesh=mesh)
    epoch = 0

    def seconds() -> float:
        nonlocal state, epoch
        start = time.perf_counter()
        state, _ = victims.run_epoch(
            key, state, data, batches, epoch, recipe=recipe, options=victim, mesh=mesh
        )
        jax.block_until_ready(state)
        epoch += 1
        return time.perf_counter() - start

    return seconds


def bare_pass(
    row: Literal["noise", "victim"],
    options: UnlearnableOptions,
    data: trainer.Data,
    recipe: trainer.Recipe,
) -> Callable[[], float]:
    """A function that runs as many passes of the network without BatchNorm, in seconds."""
    size = min(options.batch_size, len(data.labels))
    count = -(-len(data.labels) // size) * (options.noise_steps if row == "noise" else 1)
    images = image_ops.to_float(data.images[:size])
    params = recipe.net.init(jax.random.key(0), images)["params"]

    def without_norm(
        next_fn: Callable[..., jax.Array],
        arguments: tuple[jax.Array, ...],
        options: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> jax.Array:
        is_norm = isinstance(context.module, norm.BatchNorm)
        return arguments[0] if is_norm else next_fn(*arguments, **options)

    def total(params: conversion.Variables, images: jax.Array) -> jax.Array:
        with nn.intercept_methods(without_norm):
            return jnp.sum(cast(jax.Array, recipe.net.apply({"params": params}, images)))

    gradient_fn = jax.jit(jax.grad(total, argnums=1 if row == "noise" else 0))

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready([gradient_fn(params, images) for _ in range(count)])
        return time.perf_counter() - start

    return seconds


def _forward_flops(recipe: trainer.Recipe, shape: tuple[int, ...]) -> float:
    """Multiplications and additions of a forward pass over one image, as XLA counts for a CPU.

    For GPUs it does not count them.
    """
    host = parallel.replicated(parallel.make_mesh(devices=jax.devices("cpu")[:1]))
    images = jax.ShapeDtypeStruct((1, *shape), np.float32)
    variables = jax.eval_shape(recipe.net.init, jax.random.key(0), images)
    lowered = jax.jit(recipe.net.apply, in_shardings=host).lower(variables, images)
    return float((lowered.cost_analysis() or {})["flops"])
