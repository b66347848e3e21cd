"""Noise without a network, the interface of all methods, and the linear probe."""

import numpy as np
import pytest
from scipy import ndimage

from afr_jax.data import image_sets
from afr_jax.evaluation.metrics import learnability
from afr_jax.methods.unlearnable import baselines, recipes

_SHAPE = (32, 32, 3)


def _data(count=40, side=32):
    return image_sets.synthetic(0, count, num_classes=4, side=side)


def _make(data, method, granularity, seed=0):
    config = recipes.METHODS[method](granularity=granularity)
    return recipes.make_unlearnable(data, config=config, seed=seed)


@pytest.mark.parametrize(
    "method, granularity",
    [
        ("random", "sample"),
        ("random", "class"),
        ("lsp", "sample"),
        ("lsp", "class"),
        ("cuda", "class"),
    ],
)
def test_noise_depends_on_ids_not_on_their_order(method, granularity):
    data = _data()
    order = np.random.default_rng(1).permutation(len(data.labels))
    shuffled = data._replace(
        sample_ids=tuple(data.sample_ids[i] for i in order),
        images=data.images[order],
        labels=data.labels[order],
    )
    made, again = (_make(d, method, granularity) for d in (data, shuffled))
    other = _make(data, method, granularity, seed=1)
    assert made.names == again.names
    np.testing.assert_array_equal(made.levels, again.levels)
    assert (made.levels != other.levels).any()
    # Half of the data: every sample keeps its noise.
    half = image_sets.take(data, np.arange(0, 40, 2))
    part = _make(half, method, granularity)
    rows = [made.names.index(name) for name in part.names]
    np.testing.assert_array_equal(part.levels, made.levels[rows])


def test_random_noise_is_even_within_the_budget():
    levels = baselines.uniform(0, [f"s{i}" for i in range(50)], _SHAPE, epsilon_levels=8)
    shares = np.bincount(levels.reshape(-1) + 8) / levels.size
    assert len(shares) == 17 and np.abs(shares - 1 / 17).max() < 0.003


def test_lsp_is_separable_patches_of_one_norm():
    data = _data(200)
    noise = _make(data, "lsp", "sample")
    blocks = noise.levels.reshape(200, 4, 8, 4, 8, 3)
    assert (blocks == blocks[:, :, :1, :, :1]).all()
    norms = np.linalg.norm(noise.levels.reshape(200, -1).astype(float), axis=1)
    # sqrt(d) * 6 gray levels; the 48 distinct values are rounded to whole levels.
    np.testing.assert_allclose(norms, np.sqrt(np.prod(_SHAPE)) * 6, rtol=0.05)
    assert learnability.linear_probe(noise.levels, data.labels) > 0.98


def test_cuda_is_the_class_filter_scaled_to_white():
    data = _data(12, side=16)
    filters = baselines.class_filters(0, data.classes)
    assert filters.shape == (4, 3, 3) and filters.max() == 1.0
    assert all((np.sort(f.reshape(-1))[:-1] <= 0.3).all() for f in filters)
    made = baselines.filtered(data.images, data.labels, filters)
    for row in (0, 7):
        kernel = filters[data.labels[row]][:, :, None]
        exact = ndimage.correlate(data.images[row].astype(np.float64), kernel, mode="constant")
        np.testing.assert_allclose(made[row], exact * 255 / exact.max(), atol=0.51)
    black = np.zeros((1, 16, 16, 3), np.uint8)
    assert (baselines.filtered(black, np.zeros(1, int), filters) == 0).all()
    noise = _make(data, "cuda", "class")
    assert noise.granularity == "sample"
    np.testing.assert_array_equal(noise.apply(data).images, made)


def test_the_probe_tells_separable_noise_from_random_noise():
    labels = np.arange(400) % 4
    centers = np.random.default_rng(0).normal(0, 1, (4, 48))
    clutter = np.random.default_rng(1).normal(0, 1, (400, 48))
    assert learnability.linear_probe(centers[labels] + 0.3 * clutter, labels) > 0.95
    assert abs(learnability.linear_probe(clutter, labels) - 0.25) < 0.12
    # Fewer samples than features takes the other system of equations.
    wide = np.concatenate([clutter[:100]] * 3, axis=1)
    wide[:, :48] += 5 * centers[labels[:100]]
    assert learnability.linear_probe(wide, labels[:100]) > 0.9


def test_published_settings_and_combinations_that_do_not_exist():
    sample, by_class = (
        recipes.ErrorMin(granularity=kind).search_options() for kind in ("sample", "class")
    )
    assert (sample.num_steps, sample.train_steps, sample.step_size) == (20, 10, 0.8 / 255)
    assert (by_class.num_steps, by_class.class_share, by_class.stop_error) == (1, 0.2, 0.01)
    assert by_class.granularity == "class"
    assert recipes.REM().published().adversary_radius == 4 / 255
    assert recipes.ErrorMax(granularity="class").published().ascend
    changed = recipes.TAP(epsilon=16 / 255).with_search(max_rounds=3)
    assert changed.search_options().epsilon == 16 / 255
    assert changed.search_options().max_rounds == 3
    assert changed.search_options().permuted and recipes.TAP().search_options().max_rounds == 10
    for config, changes, match in (
        (recipes.CUDA, {"granularity": "sample"}, "one filter a class"),
        (recipes.RandomNoise, {"granularity": "batch"}, "granularity"),
        (recipes.RandomNoise, {"epsilon": 8}, "epsilon"),
    ):
        with pytest.raises(ValueError, match=match):
            config(**changes)
    with pytest.raises(ValueError, match="two classes"):
        recipes.make_unlearnable(_data(8)._replace(classes=("one",), labels=np.zeros(8, np.int32)))


def test_curves_come_to_last_and_peak(tmp_path):
    curve = learnability.Curve(
        np.array([0.5, 0.9, 1.0], np.float32), np.array([0.3, 0.6, 0.2], np.float32)
    )
    summary = learnability.summary(curve)
    np.testing.assert_allclose(summary, (0.2, 0.6, 2, 1.0), atol=1e-6)
    learnability.write_curves(tmp_path / "c.csv", {"a": curve})
    lines = (tmp_path / "c.csv").read_text().splitlines()
    assert lines[0].startswith("run,epoch") and lines[2] == "a,2,0.900000,0.600000"
