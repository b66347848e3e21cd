"""The perturbation loop on problems with known answers, its projections and its penalties."""

import functools
import itertools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afr_jax.perturb import loop, penalties, projections, stepping

_SHAPE = (4, 3)


class _Tree(NamedTuple):
    a: jax.Array
    b: dict


def _box(limit):
    return lambda delta: jax.tree.map(lambda leaf: projections.linf_box(leaf, limit), delta)


def _evaluation(score, **metrics):
    return loop.Evaluation(score, score, metrics)


def _rules(tx, project_fn=lambda delta: delta, **options):
    return loop.Rules(tx, project_fn, **options)


def _quadratic(target, *, tx=None, limit=0.5, noise=0.0, score_fn=None, **options):
    """Distance to a target within a box; the minimum is the clipped target."""

    def loss_fn(delta, weight, key, step):
        del weight, step
        moved = target + noise * jax.random.normal(key, target.shape)
        loss = jnp.sum((delta - moved) ** 2)
        score = loss if score_fn is None else score_fn(delta, loss)
        return loop.Evaluation(loss, score, {"loss": loss, "largest": jnp.max(jnp.abs(delta))})

    return loop.Problem(loss_fn, _rules(tx or optax.sgd(0.1), _box(limit), **options))


def _target(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=_SHAPE).astype(np.float32))


def _run(problem, delta, *, num_steps, seed=0):
    return jax.jit(lambda key, delta: loop.run(key, problem, delta, num_steps=num_steps))(
        jax.random.key(seed), delta
    )


# The loop.


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1),
        optax.adam(optax.cosine_decay_schedule(0.1, 200)),
        optax.sign_sgd(optax.cosine_decay_schedule(0.1, 200)),
    ],
    ids=["sgd", "adam", "sign"],
)
def test_a_quadratic_in_a_box_reaches_its_minimum(tx):
    target = _target()
    result, _ = _run(_quadratic(target, tx=tx, limit=0.5), jnp.zeros(_SHAPE), num_steps=200)
    optimum = np.clip(np.asarray(target, np.float64), -0.5, 0.5)
    assert 0 < np.sum(np.abs(optimum) == 0.5) < optimum.size
    np.testing.assert_allclose(result.delta, optimum, atol=1e-3)
    np.testing.assert_allclose(
        result.score, np.sum((optimum - np.asarray(target, np.float64)) ** 2), rtol=1e-4
    )


def test_steps_are_those_of_projected_gradient_descent():
    """Evaluate, step, project, three times by hand."""
    target = np.asarray(_target(), np.float64)
    deltas = [np.zeros(_SHAPE)]
    for _ in range(3):
        deltas.append(np.clip(deltas[-1] - 0.1 * 2 * (deltas[-1] - target), -0.5, 0.5))
    result, metrics = _run(_quadratic(_target()), jnp.zeros(_SHAPE), num_steps=3)
    # The start and the results of three steps.
    losses = [np.sum((delta - target) ** 2) for delta in deltas]
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    # The last one is evaluated too, and wins.
    np.testing.assert_allclose(result.delta, deltas[-1], atol=1e-6)
    np.testing.assert_allclose(result.score, losses[-1], rtol=1e-5)


def test_zero_steps_give_the_projected_start():
    start = jnp.full(_SHAPE, 2.0)
    result, metrics = _run(_quadratic(_target(), limit=0.25), start, num_steps=0)
    np.testing.assert_array_equal(result.delta, np.full(_SHAPE, 0.25))
    assert metrics["loss"].shape == (1,)
    np.testing.assert_allclose(
        result.score, np.sum((0.25 - np.asarray(_target(), np.float64)) ** 2), rtol=1e-5
    )


def _states(problem, delta, num_steps, key):
    advance = jax.jit(functools.partial(loop.advance, problem=problem))
    states = [jax.jit(functools.partial(loop.start, problem.rules))(delta)]
    for _ in range(num_steps):
        states.append(advance(key, state=states[-1])[0])
    return states


def test_the_best_score_never_rises_and_belongs_to_the_best_delta():
    target = _target()
    # A step this long overshoots back and forth, so the last one is not always the best.
    problem = _quadratic(target, tx=optax.sgd(0.6), limit=5.0, noise=0.3)
    states = _states(problem, jnp.zeros(_SHAPE), 12, jax.random.key(0))
    scores = [float(state.score) for state in states]
    assert scores[0] == np.inf and scores[1] < np.inf
    assert all(after <= before for before, after in itertools.pairwise(scores))
    assert scores[-1] < scores[1]
    score_fn = jax.jit(
        lambda delta, k: (
            problem.loss_fn(delta, (), jax.random.fold_in(jax.random.key(0), k), k).score
        )
    )
    deltas = [np.asarray(state.delta) for state in states[:-1]]
    measured = [float(score_fn(delta, k)) for k, delta in enumerate(deltas)]
    assert np.any(np.diff(measured) > 0)
    for number, state in enumerate(states[1:], start=1):
        best = int(np.argmin(measured[:number]))
        np.testing.assert_allclose(state.score, measured[best], rtol=1e-5)
        np.testing.assert_array_equal(state.kept, deltas[best])


def test_the_constraint_holds_at_every_step():
    image = jnp.asarray(np.random.default_rng(1).uniform(size=_SHAPE).astype(np.float32))

    def project(delta):
        return projections.image_box(projections.linf_box(delta, 0.3), image)

    problem = _quadratic(10 * _target())
    problem = problem._replace(rules=_rules(optax.sgd(1.0), project))
    for state in _states(problem, 3 * _target(2), 5, jax.random.key(0)):
        for delta in (state.delta, state.kept):
            # Clipping image + delta and subtracting the image again rounds.
            assert np.abs(delta).max() <= 0.3 + 1e-6
            assert (image + delta).min() >= -1e-6 and (image + delta).max() <= 1 + 1e-6


def test_a_batch_is_its_problems_one_at_a_time():
    targets = jnp.stack([_target(seed) for seed in range(3)])
    keys = jax.random.split(jax.random.key(0), 3)

    def one(key, target):
        # Per-image norms: a batch-wide one would couple the problems.
        tx = optax.chain(optax.normalize_by_update_norm(), optax.adam(0.05))
        problem = _quadratic(target, tx=tx, noise=0.1)
        return loop.run(key, problem, jnp.zeros_like(target), num_steps=10)

    results, metrics = jax.jit(jax.vmap(one))(keys, targets)
    run_one = jax.jit(one)
    for number in range(3):
        result, trace = run_one(keys[number], targets[number])
        np.testing.assert_allclose(results.delta[number], result.delta, atol=1e-6)
        np.testing.assert_allclose(results.score[number], result.score, rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"][number], trace["loss"], rtol=1e-5)


@pytest.mark.parametrize("length", [1, 3, 50])
def test_the_chunk_length_does_not_change_the_result(length):
    """Seven steps and the one that evaluates the last variable, by one program."""
    chex.clear_trace_counter()
    problem = _quadratic(_target(), tx=optax.adam(0.05), noise=0.2)
    key = jax.random.key(3)
    expected, trace = _run(problem, jnp.zeros(_SHAPE), num_steps=7, seed=3)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def advance(key, state, count):
        return loop.advance(key, problem, state, num_steps=length, count=count)

    start = jax.jit(functools.partial(loop.start, problem.rules))(jnp.zeros(_SHAPE))
    state, metrics = stepping.drive(
        lambda state, steps: advance(key, state, np.int32(len(steps))),
        start,
        steps=range(8),
        length=length,
    )
    assert int(state.step) == 8
    np.testing.assert_allclose(metrics["loss"], trace["loss"], rtol=1e-5)
    result = loop.best(state)
    np.testing.assert_allclose(result.delta, expected.delta, atol=1e-6)
    np.testing.assert_allclose(result.score, expected.score, rtol=1e-5)


def test_the_last_variable_is_kept_whatever_its_score():
    problem = _quadratic(_target(), tx=optax.sgd(0.6), limit=5.0, keep="last")
    state = jax.jit(functools.partial(loop.start, problem.rules))(jnp.zeros(_SHAPE))
    assert state.kept == ()
    states = _states(problem, jnp.zeros(_SHAPE), 3, jax.random.key(0))
    for state in states:
        np.testing.assert_array_equal(loop.best(state).delta, state.delta)
    # Each step goes 1.2 of the way.
    np.testing.assert_allclose(states[-1].delta, _target() * (1 + 0.2**3), rtol=1e-5)


def test_the_loss_is_told_the_step_and_the_penalties_weights():
    def loss_fn(delta, weight, key, step):
        return loop.Evaluation(jnp.sum(delta), step, {"step": step, "weight": weight})

    doubling = loop.Penalties(lambda: jnp.ones(()), lambda weight, evaluation: 2 * weight)
    problem = loop.Problem(loss_fn, _rules(optax.sgd(0.1), penalties=doubling))
    _, metrics = _run(problem, jnp.zeros(_SHAPE), num_steps=3)
    np.testing.assert_array_equal(metrics["step"], [0, 1, 2, 3])
    np.testing.assert_array_equal(metrics["weight"], [1, 2, 4, 8])


def test_a_key_gives_the_same_result_again_and_another_key_another():
    problem = _quadratic(_target(), noise=0.5)
    run = jax.jit(lambda key: loop.run(key, problem, jnp.zeros(_SHAPE), num_steps=5)[0].delta)
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_every_step_has_a_key_of_its_own():

    def loss_fn(delta, weight, key, step):
        draw = jax.random.uniform(key)
        return loop.Evaluation(jnp.sum(delta) * 0, jnp.sum(delta), {"draw": draw})

    problem = loop.Problem(loss_fn, _rules(optax.sgd(0.1)))
    _, metrics = _run(problem, jnp.zeros(_SHAPE), num_steps=6)
    draws = metrics["draw"]
    assert len(np.unique(draws)) == 7


def test_new_values_do_not_compile_again():
    traces = []

    @jax.jit
    def run(key, target, delta):
        traces.append(1)
        return loop.run(key, _quadratic(target), delta, num_steps=4)

    run(jax.random.key(0), _target(), jnp.zeros(_SHAPE))
    run(jax.random.key(1), _target(1), jnp.ones(_SHAPE))
    assert len(traces) == 1


def test_the_variable_may_be_any_tree():
    target = _Tree(_target(), {"x": jnp.float32(3.0), "y": [_target(1)[0]]})

    def loss_fn(delta, weight, key, step):
        parts = jax.tree.map(lambda d, t: jnp.sum((d - t) ** 2), delta, target)
        return _evaluation(sum(jax.tree.leaves(parts)))

    problem = loop.Problem(loss_fn, _rules(optax.sgd(0.2), _box(0.5)))
    result, _ = _run(problem, jax.tree.map(jnp.zeros_like, target), num_steps=40)
    assert jax.tree.structure(result.delta) == jax.tree.structure(target)
    for ours, optimum in zip(jax.tree.leaves(result.delta), jax.tree.leaves(target), strict=True):
        # Scores of about 15 that differ by less than 1e-6 are ties in float32.
        np.testing.assert_allclose(ours, np.clip(optimum, -0.5, 0.5), atol=1e-3)


def test_a_nan_score_never_wins():
    def score_fn(delta, loss):
        return jnp.where(delta[0, 0] > 0.2, jnp.nan, loss)

    target = jnp.ones(_SHAPE)
    problem = _quadratic(target, limit=1.0, score_fn=score_fn)
    result, metrics = _run(problem, jnp.zeros(_SHAPE), num_steps=20)
    # Steps of a fifth of the way: 0, 0.2 (or a little above), 0.36: NaN from here on.
    assert np.isfinite(result.score) and 0 <= result.delta[0, 0] <= 0.2
    assert metrics["largest"][-1] > 0.9


def test_where_every_score_is_nan_the_start_is_kept():
    problem = _quadratic(_target(), score_fn=lambda delta, loss: loss * jnp.nan)
    result, _ = _run(problem, jnp.full(_SHAPE, 9.0), num_steps=3)
    assert result.score == np.inf
    np.testing.assert_array_equal(result.delta, np.full(_SHAPE, 0.5))


def test_infeasible_variables_are_not_kept():
    """The loss pulls beyond what the score allows."""

    def score_fn(delta, loss):
        return jnp.where(jnp.max(delta) <= 0.6, loss, jnp.inf)

    problem = _quadratic(jnp.ones(_SHAPE), limit=1.0, score_fn=score_fn)
    result, metrics = _run(problem, jnp.zeros(_SHAPE), num_steps=20)
    feasible = np.asarray(metrics["largest"])
    feasible = feasible[feasible <= 0.6]
    assert 0 < feasible.size < 21
    np.testing.assert_allclose(np.max(result.delta), feasible.max())


@pytest.mark.parametrize("outside", [np.inf, np.nan])
def test_the_average_is_one_of_the_feasible_ones(outside):
    """By hand: every step goes a fifth of the way to 1; the first, and those above 0.6, are out."""
    reached = 1 - 0.8 ** np.arange(21)

    def score_fn(delta, loss):
        feasible = (jnp.max(delta) <= 0.6) & (jnp.max(delta) > 0.1)
        return jnp.where(feasible, loss, outside)

    problem = _quadratic(
        jnp.ones(_SHAPE), limit=1.0, score_fn=score_fn, keep="average", ema_decay=0.75
    )
    result, _ = _run(problem, jnp.zeros(_SHAPE), num_steps=20)
    feasible = reached[(reached <= 0.6) & (reached > 0.1)]
    assert len(feasible) == 4
    expected = feasible[0]
    for value in feasible[1:]:
        expected = 0.75 * expected + 0.25 * value
    np.testing.assert_allclose(result.delta, np.full(_SHAPE, expected), rtol=1e-5)
    np.testing.assert_allclose(result.score, 12 * (1 - feasible[-1]) ** 2, rtol=1e-5)


def test_an_average_is_nearer_to_the_optimum_than_the_luckiest_variable():
    target = jnp.asarray(_target()) * 0.2

    def errors(**options):
        problem = _quadratic(target, tx=optax.sgd(0.4), noise=0.3, **options)
        return [
            float(jnp.sum((_run(problem, target, num_steps=60, seed=seed)[0].delta - target) ** 2))
            for seed in range(5)
        ]

    assert np.mean(errors(keep="average", ema_decay=0.9)) < 0.5 * np.mean(errors())


def test_ties_keep_the_older():
    def loss_fn(delta, weight, key, step):
        return loop.Evaluation(jnp.sum(delta), jnp.zeros(()), {"first": delta[0, 0]})

    problem = loop.Problem(loss_fn, _rules(optax.sgd(0.1)))
    result, metrics = _run(problem, jnp.ones(_SHAPE), num_steps=4)
    np.testing.assert_allclose(metrics["first"], [1, 0.9, 0.8, 0.7, 0.6], atol=1e-6)
    np.testing.assert_array_equal(result.delta, np.ones(_SHAPE))


def test_a_chunk_after_the_first_does_not_compile_again():
    """The state of a start has the types of the state of a step, weak ones included."""
    chex.clear_trace_counter()
    weights = penalties.hold_below("loss", 0.5, start=1.0, rate=0.1)
    problem = _quadratic(_target(), tx=optax.adam(0.1), penalties=weights)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def advance(key, state):
        return loop.advance(key, problem, state)

    state = jax.jit(functools.partial(loop.start, problem.rules))(jnp.zeros(_SHAPE))
    for _ in range(3):
        state, _ = advance(jax.random.key(0), state)


def test_a_start_can_be_donated():
    """No two leaves of the state share a buffer."""
    problem = _quadratic(_target(), tx=optax.adam(0.1))
    delta = jnp.zeros(_SHAPE)
    rules = problem.rules._replace(project_fn=lambda delta: delta)
    problem = problem._replace(rules=rules)
    state = loop.start(rules, delta)
    advance = jax.jit(functools.partial(loop.advance, problem=problem), donate_argnames="state")
    for _ in range(2):
        donated, (state, _) = state, advance(jax.random.key(0), state=state)
    assert int(state.step) == 2
    assert donated.delta.is_deleted() and not state.kept.is_deleted()


# Controls.


def _updated(update_fn, weight, value):
    return float(update_fn(weight, loop.Evaluation(0.0, 0.0, {"size": jnp.float32(value)})))


def test_the_multiplier_rises_above_the_limit_and_falls_below(variant):
    control = penalties.hold_below("size", 2.0, start=4.0, rate=0.5)
    weight = control.init()
    assert weight.shape == () and weight == 4.0
    assert _updated(variant(control.update), weight, 3.0) == pytest.approx(4 * np.exp(0.5 * 0.5))
    assert _updated(variant(control.update), weight, 1.0) == pytest.approx(4 * np.exp(0.5 * -0.5))
    assert _updated(variant(control.update), weight, 2.0) == pytest.approx(4.0)
    # A change is bounded, however far off the metric is.
    assert _updated(variant(control.update), weight, 1e9) == pytest.approx(4 * np.exp(0.5))
    assert _updated(variant(control.update), weight, 0.0) == pytest.approx(4 * np.exp(-0.5))


def test_the_multiplier_is_bounded():
    control = penalties.hold_below("size", 1.0, start=1.0, rate=5.0, least=0.5, most=3.0)
    assert _updated(control.update, 1.0, 100.0) == 3.0
    assert _updated(control.update, 1.0, 0.0) == 0.5


@pytest.mark.parametrize("start", [0.001, 0.15, 3.0])
def test_the_metric_settles_at_its_limit(start):
    """Loss -x + w x^2 / limit: at the limit x^2 = 0.09 the weight is 1 / (2 x) * limit."""
    limit = 0.09

    def loss_fn(delta, weight, key, step):
        size = delta**2
        return loop.Evaluation(-delta + weight * size / limit, -delta, {"size": size, "w": weight})

    problem = loop.Problem(
        loss_fn,
        _rules(
            optax.sgd(0.01),
            _box(2.0),
            penalties=penalties.hold_below("size", limit, start=start, rate=0.05),
        ),
    )
    _, metrics = _run(problem, jnp.zeros(()), num_steps=1500)
    np.testing.assert_allclose(metrics["size"][-100:], limit, rtol=0.02)
    np.testing.assert_allclose(metrics["w"][-100:], limit / (2 * 0.3), rtol=0.02)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_limits_are_checked(limit):
    with pytest.raises(ValueError, match="limit is"):
        penalties.hold_below("size", limit, start=1.0, rate=0.1)


def test_no_penalties_have_no_weights():
    control = loop.no_penalties()
    assert control.init() == () and control.update((), None) == ()


# Projections.


def _all_projections(image):
    limits = jnp.asarray(np.random.default_rng(3).uniform(0, 0.4, (6, 5, 1)).astype(np.float32))
    return {
        "linf": (lambda d: projections.linf_box(d, 0.2), lambda d: np.abs(d).max() <= 0.2),
        "linf by pixel": (
            lambda d: projections.linf_box(d, limits),
            lambda d: np.all(np.abs(d) <= limits),
        ),
        "image": (
            lambda d: projections.image_box(d, image),
            lambda d: np.all((image + d >= -1e-6) & (image + d <= 1 + 1e-6)),
        ),
        "gray": (projections.gray, lambda d: np.ptp(d, axis=-1).max() == 0),
    }


@pytest.mark.parametrize("name", ["linf", "linf by pixel", "image", "gray"])
def test_projections_are_the_nearest_points_of_their_sets(name, variant):
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.uniform(size=(6, 5, 3)).astype(np.float32))
    delta = jnp.asarray(rng.normal(0, 0.5, (6, 5, 3)).astype(np.float32))
    project_fn, holds = _all_projections(image)[name]
    project_fn = variant(project_fn)
    projected = np.asarray(project_fn(delta))
    assert holds(projected) and not holds(np.asarray(delta))
    np.testing.assert_allclose(project_fn(projected), projected, atol=1e-7)
    # Nearest point of a convex set: no other point of it lies at less than a right angle.
    for seed in range(20):
        other = np.asarray(
            project_fn(
                jnp.asarray(
                    np.random.default_rng(seed).normal(0, 0.5, delta.shape).astype(np.float32)
                )
            )
        )
        assert np.vdot(np.asarray(delta) - projected, other - projected) <= 1e-4


def test_projections_keep_what_is_inside():
    image = jnp.full((2, 2, 3), 0.5)
    delta = jnp.full((2, 2, 3), 0.1)
    for project_fn, _ in list(_all_projections(image).values())[::2]:
        np.testing.assert_array_equal(project_fn(delta), delta)


# Rows are Y, Cb and Cr of JFIF 1.02, from red, green and blue.
_TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)


def test_luma_and_chroma_are_clipped_each_by_itself(variant):
    rng = np.random.default_rng(0)
    delta = rng.normal(0, 0.1, (6, 5, 3)).astype(np.float32)
    luma, chroma = rng.uniform(0, 0.1, (2, 6, 5)).astype(np.float32)
    projected = np.asarray(variant(projections.luma_chroma_box)(delta, luma, chroma))
    known = delta @ _TO_YCC.T
    limits = np.stack([luma, chroma, chroma], axis=-1)
    clipped = np.clip(known, -limits, limits)
    np.testing.assert_allclose(projected @ _TO_YCC.T, clipped, atol=2e-6)
    assert np.any(clipped != known) and np.any(clipped == known)


def test_gray_changes_have_no_chroma_to_clip():
    gray = np.repeat(np.random.default_rng(0).normal(0, 0.1, (4, 4, 1)), 3, axis=2)
    projected = projections.luma_chroma_box(jnp.asarray(gray, jnp.float32), 1.0, 0.0)
    np.testing.assert_allclose(projected, gray, atol=1e-6)
