"""Optimizers and learning rates of training runs, from options that can be compared and printed."""

import dataclasses
from typing import Literal, cast

import jax
import optax
from jax.typing import ArrayLike

from afr_jax.core.parallel import PyTree
from afr_jax.models.weights import conversion


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """How parameters move.

    Attributes:
        name: "sgd" with Nesterov's momentum switched off, or "adamw".
        learning_rate: the largest.
        num_steps: length of the schedule; the rate stays at its end beyond it.
        warmup_steps: of a linear rise from zero, within `num_steps`.
        schedule: "cosine" falls to zero at `num_steps`, "constant" does not fall.
        momentum: of sgd.
        weight_decay: of kernels, not of biases and BatchNorm; coupled (added to the gradient) for
            sgd, decoupled for adamw.
        clip_norm: largest L2 norm of the whole gradient; 0 for no limit.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.1
    num_steps: int = 1000
    warmup_steps: int = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip_norm: float = 5.0

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        if self.name not in ("sgd", "adamw"):
            raise ValueError(f"name is {self.name!r}, but must be 'sgd' or 'adamw'")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule is {self.schedule!r}, but must be 'cosine' or 'constant'")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, but must be above 0")
        if self.num_steps < 1 or not 0 <= self.warmup_steps < self.num_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} of {self.num_steps} steps, but must be at "
                "least 0 and below their number"
            )
        if min(self.momentum, self.weight_decay, self.clip_norm) < 0 or self.momentum >= 1:
            raise ValueError("momentum lies in [0, 1), weight_decay and clip_norm from 0 on")


def learning_rate_fn(options: OptimizerOptions) -> optax.Schedule:
    """The schedule: steps taken -> learning rate of the next step."""
    falling = options.num_steps - options.warmup_steps
    if options.schedule == "cosine":
        main = optax.cosine_decay_schedule(options.learning_rate, falling)
    else:
        main = optax.constant_schedule(options.learning_rate)
    if not options.warmup_steps:
        return main

    def ramp(step: ArrayLike) -> ArrayLike:
        # The first step already moves: the ramp reaches the full rate at its last step.
        return options.learning_rate * (step + 1) / options.warmup_steps

    return optax.join_schedules([ramp, main], [options.warmup_steps])


def make_optimizer(options: OptimizerOptions) -> optax.GradientTransformation:
    """The optimizer of the options: clipping, then decay and momentum, then the schedule."""
    clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
    rate = learning_rate_fn(options)
    if options.name == "adamw":
        decay = options.weight_decay
        return optax.chain(clip, optax.adamw(rate, weight_decay=decay, mask=_is_kernel))
    return optax.chain(
        clip,
        optax.add_decayed_weights(options.weight_decay, mask=_is_kernel),
        optax.sgd(rate, momentum=options.momentum or None),
    )


def step(
    gradient: conversion.Variables,
    opt_state: optax.OptState,
    params: conversion.Variables,
    *,
    options: OptimizerOptions,
) -> tuple[conversion.Variables, optax.OptState]:
    """One step of the optimizer of the options.

    Args:
        gradient: of the loss, like the parameters.
        opt_state: of `make_optimizer`.
        params: to be moved.
        options: of the optimizer.

    Returns:
        The parameters and the optimizer's state after it.
    """
    updates, opt_state = make_optimizer(options).update(gradient, opt_state, params)
    return cast(conversion.Variables, optax.apply_updates(params, updates)), opt_state


def _is_kernel(params: PyTree) -> PyTree:
    """Which leaves are decayed: matrices and kernels."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
