"""LowKey's objective and its limits, on the toy extractor of the Fawkes tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fawkes import _BOX, _REGION, _SURROGATES, _TOY, _batch, _dssim, _face, _variables

from afr_jax.methods.cloaking import face_cloaks, lowkey
from afr_jax.models.extractors import registry
from afr_jax.recognition import align


def _kernel() -> np.ndarray:
    """7 x 7, sigma 3, float64."""
    line = np.exp(-(np.arange(-3, 4) ** 2) / 18.0)
    return np.outer(line, line) / line.sum() ** 2


def _blurred(chip: np.ndarray) -> np.ndarray:
    padded = np.pad(chip.astype(np.float64), ((3, 3), (3, 3), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), axis=(0, 1))
    return np.einsum("ijckl,kl->ijc", windows, _kernel())


@functools.cache
def _evaluate_fn():
    def evaluate(delta, weight, variables, face, reference):
        return lowkey.evaluate(delta, weight, variables, face, reference, _SURROGATES)

    return jax.jit(evaluate)


@pytest.mark.parametrize("size, fits", [(0.025, True), (0.3, False)])
def test_the_objective(size, fits):
    """Equation 1 of the paper, in float64 but for the net."""
    face = _face(2)
    rng = np.random.default_rng(0)
    delta = np.clip(size * rng.normal(size=face.image.shape), -face.image, 1 - face.image)
    delta = delta.astype(np.float32)
    transform = face.crops[0].transform
    warp = functools.partial(align.warp, transform=transform, size=_TOY.input_px)
    plain = np.asarray(warp(jnp.asarray(face.image + delta)))
    chips = np.stack([np.asarray(warp(jnp.asarray(face.image))), plain, _blurred(plain)])
    embed = registry.embed(_TOY, _variables(), jnp.asarray(chips, jnp.float32))
    own, *moved = np.asarray(embed, np.float64)
    gain = np.mean([np.sum((one - own) ** 2) for one in moved]) / np.sum(own**2)
    crop = face.crops[0]._replace(own=own.astype(np.float32))
    face = face._replace(crops=(crop,), budget=np.float32(0.02))
    reference = face_cloaks.reference(face)
    found = _evaluate_fn()(delta, jnp.float32(3.0), (_variables(),), face, reference)
    dssim = max(_dssim(face.image + delta, face.image, box) for box in (_REGION, _BOX))
    assert (dssim < 0.02) == fits
    np.testing.assert_allclose(found.metrics["gain"], gain, rtol=1e-3)
    np.testing.assert_allclose(found.loss, 3.0 * dssim / 0.02 - gain, rtol=1e-3)
    np.testing.assert_allclose(found.score, -gain if fits else np.inf, rtol=1e-3)


def test_faces_move_in_signed_steps_within_budget_and_ball():
    config = lowkey.LowKeyConfig(dssim_budget=0.01, num_steps=30)
    faces = _batch(_face(0), _face(1))
    faces = faces._replace(limit=np.minimum(faces.limit, np.float32(config.linf_limit)))
    keys = jax.random.split(jax.random.key(0), 2)
    deltas, distances = face_cloaks.cloak_faces(
        keys, (_variables(),), faces, surrogates=_SURROGATES, config=config
    )
    deltas = np.asarray(deltas)
    assert np.all(np.abs(deltas) <= faces.limit[..., None] + 1e-6)
    assert np.all(np.asarray(distances) > 0.05)
    for image, delta in zip(faces.image, deltas, strict=True):
        assert max(_dssim(image + delta, image, box) for box in (_REGION, _BOX)) <= 0.01 + 1e-5
    # The start is random, every step has one size: changes differ from their start by whole steps.
    start = jax.vmap(lambda key: jax.random.uniform(key, deltas[0].shape, minval=-1, maxval=1))(
        keys
    )
    steps = (deltas - config.start_noise * np.asarray(start)) / config.step_size
    free = (np.abs(deltas) < 0.9 * faces.limit[..., None]) & (faces.image > 0.2)
    free &= (faces.image < 0.8) & (faces.limit[..., None] > 0.05 - 1e-6)
    assert free.sum() > 500
    assert np.mean(np.abs(steps - np.round(steps))[free] < 0.01) > 0.9


@pytest.mark.parametrize(
    "changes",
    [{"dssim_budget": 0.0}, {"step_size": -1.0}, {"linf_limit": float("nan")}, {"num_steps": -1}],
)
def test_bad_options_are_named(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        lowkey.LowKeyConfig(**changes)
