"""The perturbation loop: gradient steps on a variable, projected and penalized, and what is kept.

Every method of this code base is a loss with rules (a step as an optax transformation, a
projection, penalties whose weights react), bound together here. The loop knows no images, faces or
models; the variable is any pytree. It is written for ONE problem; batch it with `jax.vmap`.

A run is `start`, then `advance` in chunks of steps, then `best`. The host drives the chunks
(`stepping.drive`): one step at a time on CPU, where XLA runs loops badly, long scans on
accelerators. The result does not depend on the chunk length. `run` is the three in one traced
function.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from afr_jax.core import backend
from afr_jax.core.parallel import PyTree
from afr_jax.perturb import stepping

Metrics = Mapping[str, jax.Array]


class Evaluation(NamedTuple):
    """What a loss function says of a variable.

    Attributes:
        loss: The scalar that is descended.
        score: A scalar, lower is better, +inf where the variable breaks a budget; it decides what
            is kept, except where the last variable is.
        metrics: A tree of arrays to record, and what the penalties react to.
    """

    loss: jax.Array
    score: jax.Array | float
    metrics: Metrics


class Penalties(NamedTuple):
    """How weights of penalties react to the evaluations: a pair of pure functions over arrays.

    Attributes:
        init: `() -> weights`.
        update: `(weights, Evaluation) -> weights`.
    """

    init: Callable[[], PyTree]
    update: Callable[[PyTree, Evaluation], PyTree]


def no_penalties() -> Penalties:
    """For losses without an adaptive penalty; the weights are empty."""
    return Penalties(init=lambda: (), update=lambda weights, evaluation: weights)


class Rules(NamedTuple):
    """How a variable moves and which one is kept: all of a problem but its loss.

    Attributes:
        tx: The step.
        project_fn: The nearest admissible variable; applied to the start and after every step.
        penalties: The adaptive weights that the loss is given.
        keep: What `best` returns, static. "best" is the variable with the best score. "average" is
            a moving average of all variables whose score is finite: where a loss draws random
            views, a good score is good luck as well (Polyak and Juditsky 1992, with an exponential
            window); the sets that variables are projected to and that a finite score stands for
            should be convex. "last" is the last variable, whatever its score.
        ema_decay: The share of the average, in [0, 1), when another variable comes; static.
    """

    tx: optax.GradientTransformation
    project_fn: Callable[[PyTree], PyTree]
    penalties: Penalties = no_penalties()
    keep: Literal["best", "average", "last"] = "best"
    ema_decay: float = 0.0


class Problem(NamedTuple):
    """What is optimized and how.

    Attributes:
        loss_fn: `(delta, weights of the penalties, key, step) -> Evaluation`, where step is the
            number of steps taken before, an int32 scalar.
        rules: How delta moves and what is kept.
    """

    loss_fn: Callable[[PyTree, PyTree, jax.Array, jax.Array], Evaluation]
    rules: Rules


class State(NamedTuple):
    """A run between two steps.

    Attributes:
        step: Steps taken, int32 scalar.
        delta: The variable.
        opt_state: The state of the step.
        penalties: The weights.
        kept: The best variable or the average; () where the last one is kept.
        score: The score of what is kept, of an average the last one in it; +inf at the start.
    """

    step: jax.Array
    delta: PyTree
    opt_state: PyTree
    penalties: PyTree
    kept: PyTree
    score: jax.Array


class Result(NamedTuple):
    """The variable that was kept (`Rules.keep`), and its score."""

    delta: PyTree
    score: jax.Array


def start(rules: Rules, delta: PyTree) -> State:
    """The state before the first step, from a start that is projected first."""
    delta = rules.project_fn(delta)
    return State(
        step=jnp.zeros((), jnp.int32),
        delta=delta,
        opt_state=rules.tx.init(delta),
        penalties=rules.penalties.init(),
        # A copy: donating a state whose leaves share a buffer fails.
        kept=() if rules.keep == "last" else jax.tree.map(jnp.copy, delta),
        score=jnp.full((), jnp.inf, jnp.float32),
    )


def advance(
    key: jax.Array,
    problem: Problem,
    state: State,
    *,
    num_steps: int = 1,
    count: jax.Array | int | None = None,
) -> tuple[State, Metrics]:
    """Takes steps.

    A step evaluates at delta, moves along the gradient, projects, and lets the penalties react. Its
    key is `fold_in(key, step)`, so a run can be cut anywhere.

    Args:
        key: The key of the whole run, the same for every chunk.
        problem: The problem.
        state: The state between two steps.
        num_steps: The length of the chunk, static.
        count: How many steps of the chunk are taken, as of `stepping.take`; None takes all.

    Returns:
        The state after them, and the metrics of each step, stacked `[num_steps]`.
    """
    rules = problem.rules

    def one(state: State, _: None) -> tuple[State, Metrics]:
        def loss_fn(delta: PyTree) -> tuple[jax.Array, Evaluation]:
            step_key = jax.random.fold_in(key, state.step)
            evaluation = problem.loss_fn(delta, state.penalties, step_key, state.step)
            return evaluation.loss, evaluation

        gradient, evaluation = jax.grad(loss_fn, has_aux=True)(state.delta)
        gradient = backend.settle(gradient)  # Each moment of Adam would add it up anew.
        kept, score = _keep(rules, state, evaluation)
        updates, opt_state = rules.tx.update(gradient, state.opt_state, state.delta)
        delta = rules.project_fn(optax.apply_updates(state.delta, updates))
        weights = rules.penalties.update(state.penalties, evaluation)
        return State(state.step + 1, delta, opt_state, weights, kept, score), evaluation.metrics

    return stepping.take(one, state, None, length=num_steps, count=count)


def best(state: State) -> Result:
    """What was kept.

    A step evaluates before it moves, so a run of n steps that keeps the best or the average ends
    with one step more: it evaluates the last variable, which can then win.
    """
    is_last = not jax.tree.leaves(state.kept)
    return Result(state.delta if is_last else state.kept, state.score)


def run(
    key: jax.Array, problem: Problem, delta: PyTree, *, num_steps: int
) -> tuple[Result, Metrics]:
    """A whole run in one traced function.

    Args:
        key: The key of the run.
        problem: The problem.
        delta: The start.
        num_steps: The number of steps, static.

    Returns:
        What was kept of the projected start and the results of all steps, and the metrics of each
        of them, `[num_steps + 1]`. Where the last variable is kept, that is the result of a step
        more, which has not been evaluated.
    """
    state = start(problem.rules, delta)
    state, metrics = advance(key, problem, state, num_steps=num_steps + 1)
    return best(state), metrics


def _keep(rules: Rules, state: State, evaluation: Evaluation) -> tuple[PyTree, jax.Array]:
    """What is kept after an evaluation of `state.delta`; ties and NaN keep the older."""
    if rules.keep == "last":
        return (), jnp.asarray(evaluation.score, jnp.float32)
    kept = state.delta
    if rules.keep == "average":
        wins = jnp.isfinite(evaluation.score)
        share = jnp.where(jnp.isfinite(state.score), rules.ema_decay, 0.0)
        kept = jax.tree.map(lambda new, old: share * old + (1 - share) * new, kept, state.kept)
    else:
        wins = evaluation.score < state.score
    kept = jax.tree.map(lambda new, old: jnp.where(wins, new, old), kept, state.kept)
    return kept, jnp.where(wins, evaluation.score, state.score)
