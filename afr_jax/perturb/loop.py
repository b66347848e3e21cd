"""The one perturbation loop: gradient steps on a variable, projected, penalised, best result kept.

Every method of this code base is a loss, a step (an optax transformation), a projection and a
control of its penalties, bound together here. The loop knows no images, faces or models; the
variable is any pytree. It is written for ONE problem; batch it with `jax.vmap`.

A run is `start`, then `advance` in chunks of steps, then `best`. The host drives the chunks
(`drive`): one step at a time on CPU, where XLA runs loops badly, long scans on accelerators. The
result does not depend on the chunk length. `run` is the three in one traced function.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

Tree = chex.ArrayTree


class Evaluation(NamedTuple):
    """What a loss function says of a variable.

    Attributes:
        loss: scalar that is descended.
        score: scalar, lower is better, +inf where the variable breaks a budget; decides what is
            kept.
        metrics: tree of scalars to record, and what the control reads.
    """

    loss: jax.Array
    score: jax.Array
    metrics: dict


class Control(NamedTuple):
    """How a penalty weight reacts to the evaluations: a pair of pure functions over arrays.

    Attributes:
        init: `() -> control state`.
        update: `(control state, Evaluation) -> control state`.
    """

    init: Callable[[], Tree]
    update: Callable[[Tree, Evaluation], Tree]


class State(NamedTuple):
    """A run between two steps."""

    step: jax.Array
    delta: Tree
    opt_state: Tree
    control: Tree
    best_delta: Tree
    best_score: jax.Array


class Result(NamedTuple):
    """The best variable met (by score), and its score; see `Problem.memory`."""

    delta: Tree
    score: jax.Array


class Problem(NamedTuple):
    """What is optimised and how.

    Attributes:
        loss_fn: `(delta, control state, key) -> Evaluation`.
        tx: the step.
        project_fn: nearest admissible variable, applied to the start and after every step.
        control: of the penalties.
        memory: in [0, 1), static. 0 keeps the variable with the best score. Else what is kept is a
            moving average of all variables whose score is finite, and this its share when another
            one comes: where a loss draws random views, a good score is good luck as well (Polyak
            and Juditsky 1992, with an exponential window). The sets that variables are projected
            to and that a finite score stands for should be convex.
    """

    loss_fn: Callable[[Tree, Tree, jax.Array], Evaluation]
    tx: optax.GradientTransformation
    project_fn: Callable[[Tree], Tree]
    control: Control
    memory: float = 0.0


def no_control() -> Control:
    """For losses without an adaptive penalty; the control state is empty."""
    return Control(init=lambda: (), update=lambda control, evaluation: control)


def start(problem: Problem, delta: Tree) -> State:
    """State before the first step, from a start that is projected first."""
    delta = problem.project_fn(delta)
    return State(
        step=jnp.zeros((), jnp.int32),
        delta=delta,
        opt_state=problem.tx.init(delta),
        control=problem.control.init(),
        # A copy: donating a state whose leaves share a buffer fails.
        best_delta=jax.tree.map(jnp.copy, delta),
        best_score=jnp.full((), jnp.inf, jnp.float32),
    )


def advance(
    key: jax.Array, problem: Problem, state: State, *, num_steps: int = 1
) -> tuple[State, dict]:
    """Takes `num_steps` steps.

    A step evaluates at delta, moves along the gradient, projects, and lets the control react. Its
    key is `fold_in(key, step)`, so a run can be cut anywhere.

    Args:
        key: of the whole run, the same for every chunk.
        problem: the problem.
        state: between two steps.
        num_steps: length of the chunk, static.

    Returns:
        The state after them, and the metrics of each step, stacked `[num_steps]`.
    """

    def one(state: State, _) -> tuple[State, dict]:
        def loss_fn(delta):
            evaluation = problem.loss_fn(delta, state.control, jax.random.fold_in(key, state.step))
            return evaluation.loss, evaluation

        gradient, evaluation = jax.grad(loss_fn, has_aux=True)(state.delta)
        best_delta, best_score = _keep(problem.memory, state, evaluation)
        updates, opt_state = problem.tx.update(gradient, state.opt_state, state.delta)
        delta = problem.project_fn(optax.apply_updates(state.delta, updates))
        control = problem.control.update(state.control, evaluation)
        after = State(state.step + 1, delta, opt_state, control, best_delta, best_score)
        return after, evaluation.metrics

    if num_steps == 1:
        state, metrics = one(state, None)
        return state, jax.tree.map(lambda value: value[None], metrics)
    return jax.lax.scan(one, state, length=num_steps)


def best(state: State) -> Result:
    """The best variable that was evaluated; with `Problem.memory` the average, and the last score.

    A step evaluates before it moves, so a run of n steps ends with one step more: it evaluates the
    last variable, which can then win.
    """
    return Result(state.best_delta, state.best_score)


def run(key: jax.Array, problem: Problem, delta: Tree, *, num_steps: int) -> tuple[Result, dict]:
    """A whole run in one traced function.

    Returns:
        The best variable among the projected start and the results of all steps, and the metrics of
        each of them, `[num_steps + 1]`.
    """
    state, metrics = advance(key, problem, start(problem, delta), num_steps=num_steps + 1)
    return best(state), metrics


def chunk_length() -> int:
    """Steps of one call on this backend: 1 on CPU (a scan is about three times slower), else 50."""
    return 1 if jax.default_backend() == "cpu" else 50


def drive(
    advance_fn: Callable[[State, int], tuple[State, dict]],
    state: State,
    *,
    num_steps: int,
    chunk: int | None = None,
    report_fn: Callable[[int], None] | None = None,
) -> State:
    """Runs the chunks of a compiled `advance` from the host.

    Args:
        advance_fn: `(state, num_steps) -> (state, metrics)`, compiled, `num_steps` static.
        state: before the first step.
        num_steps: in all; one step more is taken at the end, which evaluates the last variable.
        chunk: steps of one call; by default `chunk_length()`.
        report_fn: called after each chunk with the number of steps it took (progress).

    Returns:
        The state after them, for `best`.
    """
    chunk = chunk or chunk_length()
    done = 0
    while done < num_steps:
        length = min(chunk, num_steps - done)
        state, _ = advance_fn(state, length)
        done += length
        if report_fn is not None:
            report_fn(length)
    state, _ = advance_fn(state, 1)
    return state


def _keep(memory: float, state: State, evaluation: Evaluation) -> tuple[Tree, jax.Array]:
    """What is kept after an evaluation of `state.delta`; ties and NaN keep the older."""
    kept = state.delta
    if memory > 0:
        wins = jnp.isfinite(evaluation.score)
        share = jnp.where(jnp.isfinite(state.best_score), memory, 0.0)
        kept = jax.tree.map(
            lambda new, old: share * old + (1 - share) * new, kept, state.best_delta
        )
    else:
        wins = evaluation.score < state.best_score
    delta = jax.tree.map(lambda new, old: jnp.where(wins, new, old), kept, state.best_delta)
    return delta, jnp.where(wins, evaluation.score, state.best_score)
