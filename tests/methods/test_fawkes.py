"""Cloaks of a toy extractor: what they gain, and every limit they keep."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.metrics

from afr_jax.core import parallel
from afr_jax.methods.cloaking import budget, face_cloaks, fawkes
from afr_jax.models.extractors import registry
from afr_jax.perturb import stepping
from afr_jax.recognition import align

_SIDE = 40
# Every other configuration or batch size below costs a compilation of seconds.
_CONFIG = fawkes.FawkesConfig(
    num_steps=60,
    dssim_budget=0.01,
    linf_limit=0.1,
    learning_rate=0.0084,  # 0.01 at this budget.
    align_shift=0.0,
    align_turn=0.0,
    mirror=False,
    blur_px=0.0,
    jpeg_quality=None,
)
_REGION, _BOX = (3, 2, 38, 39), (10, 9, 31, 32)


class _Net(nn.Module):
    @nn.compact
    def __call__(self, chips):
        x = nn.tanh(nn.Conv(8, (5, 5), 2)(chips))
        x = nn.tanh(nn.Conv(8, (3, 3), 2)(x))
        return nn.Dense(6)(x.reshape(x.shape[0], -1))


_TOY = registry.Extractor(
    name="toy",
    module=_Net(),
    input_px=24,
    template=((7, 7), (7, 16), (12, 12), (17, 8), (17, 15)),
    input_scale=4.0,
    input_offset=-2.0,
    embedding_size=6,
    normalized=False,
    thresholds=registry.Thresholds(0.5, None, None),
    load=dict,
    source="",
    license="",
)
_SURROGATES = (face_cloaks.Surrogate(_TOY, 1),)


@functools.cache
def _variables(seed=0) -> dict:
    chips = jnp.zeros((1, _TOY.input_px, _TOY.input_px, 3))
    variables = jax.jit(_TOY.module.init)(jax.random.key(seed), chips)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) < 5000
    return variables


def _transform(number: int) -> np.ndarray:
    turn, scale = 0.1 * number, 1.1
    cosine, sine = scale * np.cos(turn), scale * np.sin(turn)
    return np.array([[cosine, sine, 6.0 - number], [-sine, cosine, 8.0]], np.float32)


def _image(number: int) -> np.ndarray:
    """Some structure and some texture, with pixels at 0 and at 1."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:_SIDE, :_SIDE] / 6
    waves = np.stack([np.sin(y + number), np.cos(x - y), np.sin(x * y / 4)], axis=-1)
    image = 0.5 + 0.45 * waves + rng.normal(0, 0.08, waves.shape)
    return np.clip(image, 0, 1).astype(np.float32)


def _face(number: int, *, crops: int = 1, gray: bool = False, **changes) -> face_cloaks.Face:
    image = _image(number)
    if gray:
        image = np.repeat(image.mean(axis=-1, keepdims=True), 3, axis=-1)
    limit = np.zeros((_SIDE, _SIDE), np.float32)
    limit[_REGION[0] : _REGION[2], _REGION[1] : _REGION[3]] = _CONFIG.linf_limit
    if number % 2:
        # Change in the middle of the box only: the region as a whole is changed less than the box.
        inner = np.zeros_like(limit)
        inner[_BOX[0] + 5 : _BOX[2] - 5, _BOX[1] + 5 : _BOX[3] - 5] = 1
        limit *= inner
    # Some pixels belong to somebody else, others may change less.
    limit[15:18, 20:30] = 0
    limit[30:34, :] *= 0.25
    blank = np.zeros(_TOY.embedding_size, np.float32)
    face = face_cloaks.Face(
        image=image,
        limit=limit,
        boxes=np.array([_REGION, _BOX], np.int32),
        crops=(face_cloaks.FaceCrop(_transform(number), blank, blank, blank),) * crops,
        has_target=np.float32(0),
        gray=np.float32(gray),
        is_coarse=np.bool_(False),
        luma=limit,
        chroma=np.ones_like(limit),
    )
    return face._replace(**changes)


def _batch(*faces: face_cloaks.Face) -> face_cloaks.Face:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *faces)


def _cloak(faces, *, config=_CONFIG, surrogates=_SURROGATES, seed=0):
    keys = jax.random.split(jax.random.key(seed), faces.image.shape[0])
    variables = tuple(_variables(number) for number in range(len(surrogates)))
    deltas, distances = face_cloaks.cloak_faces(
        keys, variables, faces, surrogates=surrogates, config=config
    )
    return np.asarray(deltas), np.asarray(distances)


@jax.jit
def _embeddings(variables, images, transforms):
    warp = jax.vmap(functools.partial(align.warp, size=_TOY.input_px))
    return registry.embed(_TOY, variables, warp(images, transforms))


def _distances(images, others, transforms, *, seed=0):
    """Moved between two sets of images, by a way that shares no code with the loop."""
    embeddings, clean = (
        np.asarray(_embeddings(_variables(seed), x, transforms), np.float64)
        for x in (images, others)
    )
    return np.linalg.norm(embeddings - clean, axis=-1)


def _dssim(image, other, box):
    """float64, of the crop."""
    crop = np.s_[box[0] : box[2], box[1] : box[3]]
    _, similarity = skimage.metrics.structural_similarity(
        image[crop].astype(float),
        other[crop].astype(float),
        data_range=1.0,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return (1 - similarity[5:-5, 5:-5].mean()) / 2


@pytest.fixture(scope="module")
def faces():
    return _batch(*(_face(number) for number in range(4)))


@pytest.fixture(scope="module")
def cloaks(faces):
    return _cloak(faces)


# What a cloak gains and what it keeps.


def test_faces_move_away_from_themselves(faces, cloaks):
    deltas, distances = cloaks
    assert deltas.shape == faces.image.shape and distances.shape == (4, 1)
    moved = _distances(faces.image + deltas, faces.image, faces.crops[0].transform)
    np.testing.assert_allclose(distances[:, 0], moved, rtol=1e-4)
    # Far more than noise of the start's size does.
    noise = np.random.default_rng(0).uniform(-1, 1, deltas.shape).astype(np.float32)
    noise *= np.minimum(_CONFIG.start_noise, faces.limit[..., None])
    drifted = _distances(faces.image + noise, faces.image, faces.crops[0].transform)
    assert np.all(moved > 10 * drifted)


def test_the_budget_holds_for_the_region_and_for_the_box(faces, cloaks):
    for number, (image, delta) in enumerate(zip(faces.image, cloaks[0], strict=True)):
        used = [_dssim(image + delta, image, box) for box in (_REGION, _BOX)]
        # float32 similarity is good to about 1e-6.
        assert max(used) <= _CONFIG.dssim_budget + 1e-5
        # The multiplier spends it, rather than staying far below. An average of changes costs less
        # than each of them; what is left is spent when it is fitted to the photo.
        assert max(used) > 0.5 * _CONFIG.dssim_budget
        assert np.argmax(used) == number % 2


def test_pixel_limits_hold(faces, cloaks):
    deltas, _ = cloaks
    limits = faces.limit[..., None]
    assert np.all(np.abs(deltas) <= limits + 1e-6)
    assert np.all(deltas[np.broadcast_to(limits == 0, deltas.shape)] == 0)
    # The limits are used, and no pixel leaves the image box.
    assert np.mean((np.abs(deltas) > 0.99 * limits) & (limits > 0)) > 0.001
    cloaked = faces.image + deltas
    assert cloaked.min() >= -1e-7 and cloaked.max() <= 1 + 1e-7


def test_pixels_at_the_ends_of_the_range_change_inwards(faces, cloaks):
    """Tanh space would give them no gradient."""
    deltas, _ = cloaks
    free = np.broadcast_to(faces.limit[..., None] > 0, deltas.shape)
    for value, sign in ((0.0, 1), (1.0, -1)):
        at_end = free & (faces.image == value)
        assert at_end.sum() > 10
        assert np.all(sign * deltas[at_end] >= 0) and np.any(sign * deltas[at_end] > 0.005)


def test_gray_faces_stay_gray(cloaks):
    faces = _batch(_face(0, gray=True), _face(1), _face(2, gray=True), _face(3))
    deltas, distances = _cloak(faces)
    for number in (0, 2):
        assert np.ptp(deltas[number], axis=-1).max() == 0 and np.abs(deltas[number]).max() > 0.01
    assert np.all(distances > 0.1)
    np.testing.assert_array_equal(deltas[1::2], cloaks[0][1::2])


def test_a_target_draws_the_face(faces, cloaks):
    """The first two of four faces have one: another image seen as they are."""
    transforms = faces.crops[0].transform
    other = np.stack([_image(7)] * 4)
    target = np.asarray(_embeddings(_variables(), other, transforms))
    crop = faces.crops[0]._replace(target=target)
    has_target = np.array([1, 1, 0, 0], np.float32)
    deltas, _ = _cloak(faces._replace(crops=(crop,), has_target=has_target))

    def left(deltas):
        return _distances(faces.image + deltas, other, transforms)

    assert np.all(left(deltas)[:2] < 0.9 * left(np.zeros_like(deltas))[:2])
    # A cloak without the target does not come as near.
    assert np.all(left(deltas)[:2] < left(cloaks[0])[:2])
    np.testing.assert_array_equal(deltas[2:], cloaks[0][2:])


def test_a_target_that_does_not_count_changes_nothing(faces, cloaks):
    crops = tuple(crop._replace(target=crop.target + 3.0) for crop in faces.crops)
    np.testing.assert_array_equal(_cloak(faces._replace(crops=crops))[0], cloaks[0])


def test_two_surrogates_are_both_moved_and_random_views_are_for_the_steps_only():
    """The distances told are those of the chips as they are."""
    config = dataclasses.replace(
        _CONFIG, align_shift=0.01, align_turn=0.01, blur_px=0.5, jpeg_quality=(80, 95)
    )
    faces = _batch(_face(0, crops=2), _face(1, crops=2))
    deltas, distances = _cloak(faces, surrogates=_SURROGATES * 2, config=config)
    assert distances.shape == (2, 2)
    for number in (0, 1):
        transforms = faces.crops[number].transform
        moved = _distances(faces.image + deltas, faces.image, transforms, seed=number)
        np.testing.assert_allclose(distances[:, number], moved, rtol=1e-4)
        assert np.all(moved > 0.05)


def test_a_face_that_never_fits_the_budget_is_left_alone(faces, monkeypatch):
    """The state of a run without a feasible variable is that of its start: noise, no score."""
    monkeypatch.setattr(stepping, "drive", lambda chunk_fn, state, **options: (state, None))
    deltas, distances = _cloak(faces)
    np.testing.assert_array_equal(deltas, 0)
    np.testing.assert_array_equal(distances, 0)


# Batches, devices, keys, compiled programs.


def test_a_batch_is_its_faces_one_at_a_time(faces, cloaks):
    one = jax.tree.map(lambda leaf: leaf[2:3], faces)
    keys = jax.random.split(jax.random.key(0), 4)
    deltas, distances = face_cloaks.cloak_faces(
        keys[2:3], (_variables(),), one, surrogates=_SURROGATES, config=_CONFIG
    )
    _assert_same_cloaks(deltas, distances, cloaks[0][2:3], cloaks[1][2:3])


def _assert_same_cloaks(deltas, distances, expected_deltas, expected_distances):
    # XLA sums in another order for another number of rows, and Adam divides by the gradient's own
    # size: where a gradient is nearly zero, rounding can turn a step of a hundredth around.
    apart = np.abs(np.asarray(deltas) - expected_deltas)
    assert apart.mean() < 1e-5 and apart.max() < 5e-3
    np.testing.assert_allclose(distances, expected_distances, rtol=2e-3)


def test_four_devices_give_the_cloaks_of_one(faces, cloaks):
    mesh = parallel.make_mesh()
    keys = jax.random.split(jax.random.key(0), 4)
    deltas, distances = face_cloaks.cloak_faces(
        parallel.shard_batch(keys, mesh),
        parallel.replicate((_variables(),), mesh),
        parallel.shard_batch(faces, mesh),
        surrogates=_SURROGATES,
        config=_CONFIG,
    )
    assert len(deltas.sharding.device_set) == 4
    _assert_same_cloaks(deltas, distances, *cloaks)


def test_a_seed_gives_the_same_cloaks_again_and_another_seed_others(faces, cloaks):
    again, _ = _cloak(faces)
    np.testing.assert_array_equal(again, cloaks[0])
    other, _ = _cloak(faces, seed=1)
    assert np.all(np.abs(other - again).max(axis=(1, 2, 3)) > 0.01)


def test_a_face_depends_on_its_own_key_and_pixels_only(faces, cloaks):
    image = faces.image.copy()
    image[0] = _image(9)
    deltas, _ = _cloak(faces._replace(image=image))
    assert np.abs(deltas[0] - cloaks[0][0]).max() > 0.01
    np.testing.assert_array_equal(deltas[1:], cloaks[0][1:])


def test_another_batch_of_the_shape_or_budget_does_not_compile_again(cloaks, no_compilation):
    config = dataclasses.replace(_CONFIG, dssim_budget=0.02, linf_limit=0.05)
    with no_compilation():
        _cloak(_batch(*(_face(number) for number in range(5, 9))), config=config, seed=3)


def test_progress_is_told(faces, cloaks):
    steps = []
    face_cloaks.cloak_faces(
        jax.random.split(jax.random.key(0), 4),
        (_variables(),),
        faces,
        surrogates=_SURROGATES,
        config=_CONFIG,
        report_fn=steps.append,
    )
    assert sum(steps) == _CONFIG.num_steps


# The parts.


@functools.cache
def _evaluate_fn(config=_CONFIG):
    return jax.jit(functools.partial(fawkes.evaluate, surrogates=_SURROGATES, config=config))


@pytest.mark.parametrize("has_target", [0.0, 1.0])
@pytest.mark.parametrize("size, fits", [(0.025, True), (0.3, False)])
def test_the_objective(size, fits, has_target):
    face = _face(2)
    rng = np.random.default_rng(0)
    delta = np.clip(size * rng.normal(size=face.image.shape), -face.image, 1 - face.image)
    delta = delta.astype(np.float32)
    transform = face.crops[0].transform
    embeddings = _embeddings(
        _variables(), np.stack([face.image, face.image + delta]), np.stack([transform] * 2)
    )
    own, cloaked = np.asarray(embeddings, np.float64)
    to_person, target = 0.3 * rng.normal(size=own.shape), rng.normal(size=own.shape)
    vectors = [vector.astype(np.float32) for vector in (own, to_person, target)]
    crop = face_cloaks.FaceCrop(transform, *vectors)
    face = face._replace(crops=(crop,), has_target=np.float32(has_target), budget=np.float32(0.02))
    reference = face_cloaks.reference(face)
    config = dataclasses.replace(_CONFIG, repel_weight=0.5, attract_weight=2.0)
    found = _evaluate_fn(config)(
        jax.random.key(0), delta, jnp.float32(3.0), (_variables(),), face, reference
    )
    away, left = np.linalg.norm(cloaked - (own + to_person)), np.linalg.norm(cloaked - target)
    gain = (0.5 * away - has_target * 2.0 * left) / _TOY.threshold
    dssim = max(_dssim(face.image + delta, face.image, box) for box in (_REGION, _BOX))
    assert (dssim < 0.02) == fits
    np.testing.assert_allclose(found.metrics["spent"], dssim / 0.02, atol=1e-3)
    np.testing.assert_allclose(found.metrics["gain"], gain, rtol=1e-3)
    np.testing.assert_allclose(found.metrics["distances"], [away], rtol=1e-3)
    np.testing.assert_allclose(found.loss, 3.0 * dssim / 0.02 - gain, rtol=1e-3)
    np.testing.assert_allclose(found.score, -gain if fits else np.inf, rtol=1e-3)


@pytest.mark.parametrize("ease, fewest, most", [(1.0, 8, 32), (0.25, 1, 12)])
def test_chips_are_mirrored_half_of_the_time_or_as_the_budget_pays(ease, fewest, most):
    face = _face(1)._replace(ease=jnp.float32(ease))
    transform = face.crops[0].transform
    chip = align.warp(jnp.asarray(face.image), transform, size=_TOY.input_px)
    expected = [
        float(jnp.linalg.norm(registry.embed(_TOY, _variables(), x[None])[0]))
        for x in (chip, chip[:, ::-1])
    ]
    evaluate = _evaluate_fn(dataclasses.replace(_CONFIG, mirror=True))
    reference = face_cloaks.reference(face)
    # `own` is zero here: the distance is the length of the embedding.
    crops = (face.crops[0]._replace(own=np.zeros(6, np.float32)),)
    face = face._replace(crops=crops, budget=jnp.float32(0.01))
    args = np.zeros_like(face.image), jnp.float32(1.0), (_variables(),), face, reference
    found = [float(evaluate(jax.random.key(n), *args).metrics["distances"][0]) for n in range(40)]
    is_mirrored = np.abs(np.subtract.outer(found, expected)).argmin(axis=1)
    np.testing.assert_allclose(found, np.array(expected)[is_mirrored], rtol=1e-4)
    assert fewest <= is_mirrored.sum() <= most


def test_budgets_that_pay_for_less_see_milder_views_and_balance_more_sharply():
    """Of half the views: half of the blur, JPEG and misalignment, four times the sharpness."""
    assert budget.Budget(0.0035).ease == 0.5 and budget.Budget(0.014).ease == 1
    assert budget.Budget(0.0035, views=0.5).ease == 0.25
    face = _face(0, crops=2)
    delta = 0.02 * np.random.default_rng(0).normal(size=face.image.shape).astype(np.float32)
    reference = face_cloaks.reference(face)
    variables = (_variables(0), _variables(1))

    def metrics(ease, **options):
        config = dataclasses.replace(_CONFIG, **options)
        evaluate = functools.partial(fawkes.evaluate, surrogates=_SURROGATES * 2, config=config)
        found = jax.jit(evaluate)(
            jax.random.key(6),  # Draws nearly the strongest blur.
            delta,
            jnp.float32(1.0),
            variables,
            face._replace(budget=jnp.float32(0.01), ease=jnp.float32(ease)),
            reference,
        )
        distances = np.asarray(found.metrics["distances"], np.float64)
        return distances, float(found.metrics["gain"]), distances / _TOY.reach

    strong = {"blur_px": 1.2, "align_shift": 0.04, "align_turn": 0.06, "jpeg_quality": (60, 100)}
    mild = {"blur_px": 0.6, "align_shift": 0.02, "align_turn": 0.03, "jpeg_quality": (80, 100)}
    distances, gain, units = metrics(0.5, softmin_sharpness=2.0, **strong)
    others, _, _ = metrics(1.0, softmin_sharpness=2.0, **mild)
    np.testing.assert_allclose(distances, others, rtol=1e-5)
    assert abs(units[0] - units[1]) > 0.02
    np.testing.assert_allclose(gain, -np.log(np.mean(np.exp(-8 * units))) / 8, rtol=1e-4)
    for name, value in strong.items():
        distances, gain, units = metrics(1.0, softmin_sharpness=2.0, **(mild | {name: value}))
        assert np.abs(distances / others - 1).min() > 0.001, name
        np.testing.assert_allclose(gain, -np.log(np.mean(np.exp(-2 * units))) / 2, rtol=1e-4)
    _, gain, units = metrics(0.5, softmin_sharpness=0.0)
    np.testing.assert_allclose(gain, np.mean(units), rtol=1e-4)


@pytest.mark.parametrize("sharpness", [0.1, 8.0, 1e3])
def test_surrogates_that_lag_behind_count_for_more(sharpness):
    values = np.array([1.4, 0.3, -0.2])
    found = float(fawkes.soft_minimum(jnp.asarray(values, jnp.float32), sharpness))
    assert values.min() - 1e-5 <= found <= values.mean() + 1e-5
    expected = -np.log(np.mean(np.exp(-sharpness * values))) / sharpness
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    gradient = jax.grad(fawkes.soft_minimum)(jnp.asarray(values, jnp.float32), sharpness)
    np.testing.assert_allclose(np.sum(gradient), 1.0, rtol=1e-4)
    assert np.all(np.diff(gradient) >= 0) and (sharpness < 1 or gradient[0] < 0.01)
    np.testing.assert_allclose(fawkes.soft_minimum(jnp.array([0.7]), sharpness), 0.7, rtol=1e-5)


@pytest.mark.parametrize("gray", [False, True])
def test_project_is_idempotent(gray):
    face = _face(1, gray=gray)
    delta = np.random.default_rng(0).normal(0, 0.1, face.image.shape).astype(np.float32)
    project = jax.jit(face_cloaks.project)
    once = project(delta, face)
    np.testing.assert_allclose(project(once, face), once, atol=1e-7)


@pytest.mark.parametrize("budget, rate", [(0.007, 0.04), (0.028, 0.08)])
def test_the_learning_rate_falls_to_a_tenth(budget, rate):
    """Under a steady gradient Adam's updates are the rate itself, here as root mean square."""
    config = fawkes.FawkesConfig(num_steps=30, learning_rate=0.04)
    face = _face(1)._replace(budget=budget)
    tx = fawkes.step(config, face, face_cloaks.reference(face))
    gradient = np.random.default_rng(0).normal(size=face.image.shape).astype(np.float32)
    update = jax.jit(tx.update)
    state, sizes = tx.init(face.image), []
    free = np.asarray(face.limit > 0)
    for _ in range(31):
        updates, state = update(gradient, state)
        sizes.append(np.sqrt(np.mean(np.asarray(updates)[free] ** 2)))
        np.testing.assert_array_equal(np.sign(updates), -np.sign(gradient))
    np.testing.assert_allclose(sizes[0], rate, rtol=1e-3)
    np.testing.assert_allclose(sizes[15], rate * (0.1 + 0.9 * 0.5), rtol=1e-3)
    np.testing.assert_allclose(sizes[30], rate / 10, rtol=1e-3)


def test_steps_are_longer_where_texture_hides_them():
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (_SIDE, _SIDE, 3)).astype(np.float32)
    half = _SIDE // 2
    image = 0.5 + noise * (np.arange(_SIDE) >= half)[:, None]
    face = _face(0)._replace(image=image, budget=0.007)
    tx = fawkes.step(fawkes.FawkesConfig(), face, face_cloaks.reference(face))
    updates = np.abs(tx.update(jnp.ones_like(image), tx.init(image))[0])
    assert updates[:, half + 10 :].min() > 5 * updates[:, : half - 10].max()


@pytest.mark.parametrize("num_steps, ema_decay", [(0, 0), (10, 0), (50, 0.8), (100, 0.9)])
def test_changes_are_averaged_over_a_tenth_of_the_steps(num_steps, ema_decay):
    face = _face(1)._replace(budget=0.007)
    config = fawkes.FawkesConfig(num_steps=num_steps)
    rules = config.rules(face, face_cloaks.reference(face))
    assert rules.keep == ("average" if ema_decay else "best")
    assert rules.ema_decay == pytest.approx(ema_decay)


@pytest.mark.parametrize(
    "changes",
    [
        {"dssim_budget": 0.0},
        {"dssim_budget": 1.1},
        {"learning_rate": -1.0},
        {"linf_limit": float("nan")},
        {"start_noise": 0.0},
        {"num_steps": -1},
        {"repel_weight": -0.1},
        {"attract_weight": float("nan")},
        {"align_shift": -0.1},
        {"align_turn": float("nan")},
        {"blur_px": 1.6},
        {"jpeg_quality": (0, 50)},
    ],
)
def test_options_are_checked(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value}")):
        fawkes.FawkesConfig(**changes)


def test_modes_are_budgets_in_what_people_see_and_the_paper_s_is_at_hand():
    modes = [fawkes.FawkesConfig(mode=mode).budget for mode in budget.MODES]
    assert [mode.ssimulacra2 for mode in modes] == [85.0, 78.0, 70.0]
    assert fawkes.FawkesConfig().budget == modes[1]
    assert fawkes.FawkesConfig(dssim_budget=0.007).budget == budget.Budget(0.007)
    assert hash(modes[0]) == hash(fawkes.FawkesConfig(mode="low").budget)
