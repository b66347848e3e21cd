"""Signed gradient steps within an L-infinity ball: projected gradient descent on images.

Images are float in [0, 1], limits and step sizes in the same units. Signs are taken value by value,
so images of a batch do not influence each other as long as the loss is a sum over them.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from afr_jax.perturb import loop, projections


def seen(images: jax.Array, delta: jax.Array) -> jax.Array:
    """What a network is shown: images + delta clipped to [0, 1], with the gradient of the sum.

    The clip passes the gradient straight through, so that noise on a saturated pixel can come back,
    as it can where each step starts from the clipped image (Madry et al. 2018).

    Args:
        images: `[..., H, W, 3]` in [0, 1].
        delta: of the same shape.
    """
    chex.assert_equal_shape([images, delta])
    total = images + delta
    return total + jax.lax.stop_gradient(jnp.clip(total, 0.0, 1.0) - total)


def rules(*, limit: float, step_size: float) -> loop.Rules:
    """Signed steps within [-limit, limit]; the last variable is the result.

    Args:
        limit: The largest absolute value of delta.
        step_size: The size of every step and value.
    """
    return loop.Rules(
        tx=optax.chain(optax.scale_by_sign(), optax.scale(-step_size)),
        project_fn=lambda delta: projections.linf_box(delta, limit),
        keep="last",
    )


def problem(
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array], *, limit: float, step_size: float
) -> loop.Problem:
    """Signed descent of a loss by `rules`.

    Args:
        loss_fn: `(delta, key) -> scalar` that is descended; minus a loss to ascend it.
        limit: The largest absolute value of delta.
        step_size: The size of every step and value.
    """

    def evaluate(
        delta: jax.Array, weights: tuple[()], key: jax.Array, step: jax.Array
    ) -> loop.Evaluation:
        del weights, step
        loss = loss_fn(delta, key)
        return loop.Evaluation(loss, loss, {})

    return loop.Problem(evaluate, rules(limit=limit, step_size=step_size))


def adversarial(
    key: jax.Array,
    loss_fn: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    *,
    limit: float,
    step_size: float,
    num_steps: int,
) -> jax.Array:
    """Images that raise a loss: PGD from a random start (Madry et al. 2018, section 2.1).

    Args:
        key: of the start, uniform in the ball.
        loss_fn: images `[B, H, W, 3]` to a scalar, a sum over images.
        images: `[B, H, W, 3]` in [0, 1].
        limit: radius of the ball.
        step_size: of a step.
        num_steps: of them, static.

    Returns:
        `[B, H, W, 3]` in [0, 1], within the ball; no gradient flows through it.
    """
    chex.assert_rank(images, 4)
    delta = jax.random.uniform(key, images.shape, images.dtype, -limit, limit)
    ascent = problem(lambda d, _: -loss_fn(seen(images, d)), limit=limit, step_size=step_size)
    state, _ = loop.advance(key, ascent, loop.start(ascent.rules, delta), num_steps=num_steps)
    return jax.lax.stop_gradient(jnp.clip(images + loop.best(state).delta, 0.0, 1.0))
