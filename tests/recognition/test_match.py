"""Exact nearest neighbors on the accelerator, by NumPy float64."""

import jax
import numpy as np
import pytest

from afr_jax.core import parallel
from afr_jax.models.extractors import registry
from afr_jax.recognition import match


def _oracle(first, second, metric):
    first, second = first.astype(np.float64), second.astype(np.float64)
    if metric == "euclidean":
        return np.sqrt(((first[:, None] - second[None]) ** 2).sum(-1))
    cosine = first @ second.T / np.linalg.norm(first, axis=1)[:, None]
    cosine = cosine / np.linalg.norm(second, axis=1)[None]
    return 1 - cosine if metric == "cosine" else np.sqrt(np.maximum(2 - 2 * cosine, 0))


@pytest.mark.parametrize("metric", registry.METRICS)
@pytest.mark.parametrize("num_rows, k", [(1, 3), (7, 7), (1500, 5), (9000, 40)])
def test_top_k_by_numpy(metric, num_rows, k):
    rng = np.random.default_rng(num_rows)
    gallery = rng.normal(size=(num_rows, 16)).astype(np.float32)
    probes = rng.normal(size=(20, 16)).astype(np.float32)
    probes[0] = gallery[0]
    apart = _oracle(probes, gallery, metric)
    for num_devices in (1, 4):
        mesh = parallel.make_mesh(devices=jax.devices()[:num_devices])
        found = match.top_k(probes, match.place(gallery, metric=metric, mesh=mesh), k=k)
        best = np.sort(apart, axis=1)[:, :k]
        assert found.index.shape == best.shape
        # Float32 features of length about 4.
        np.testing.assert_allclose(found.distances, best, atol=2e-6)
        at = np.take_along_axis(apart, found.index, axis=1)
        np.testing.assert_allclose(at, best, atol=2e-6)
        assert found.distances[0, 0] == 0 and found.index[0, 0] == 0


def test_ties_go_to_the_earlier_row():
    gallery = np.tile(np.eye(4, dtype=np.float32), (700, 1))
    found = match.top_k(np.eye(4, dtype=np.float32), match.place(gallery, metric="euclidean"), k=3)
    np.testing.assert_array_equal(found.index, np.arange(4)[:, None] + 4 * np.arange(3)[None])


def test_many_probes_are_taken_in_groups():
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(50, 4)).astype(np.float32)
    probes = rng.normal(size=(600, 4)).astype(np.float32)
    placed = match.place(gallery, metric="euclidean")
    found = match.top_k(probes, placed, k=1)
    np.testing.assert_array_equal(
        found.index[:, 0], np.argmin(_oracle(probes, gallery, "euclidean"), axis=1)
    )
    assert match.top_k(probes[:0], placed, k=2).distances.shape == (0, 2)


@pytest.mark.parametrize("metric", registry.METRICS)
@pytest.mark.parametrize("num_devices", [1, 4])
def test_shards_give_what_the_whole_gallery_gives(metric, num_devices):
    rng = np.random.default_rng(3)
    gallery = rng.normal(size=(5000, 16)).astype(np.float32)
    gallery[4000] = gallery[40]  # A tie between shards.
    probes = rng.normal(size=(20, 16)).astype(np.float32)
    probes[0] = gallery[40]
    mesh = parallel.make_mesh(devices=jax.devices()[:num_devices])
    whole = match.top_k(probes, match.place(gallery, metric=metric, mesh=mesh), k=7)
    shards = np.split(gallery, [3, 2000, 4000, 4001])  # Two of them smaller than k.
    found = match.top_k_of_shards(probes, shards, k=7, metric=metric, mesh=mesh)
    np.testing.assert_array_equal(found.index, whole.index)
    np.testing.assert_array_equal(found.distances, whole.distances)
    assert list(found.index[0, :2]) == [40, 4000]


def test_one_shard_is_on_the_accelerator_at_a_time():
    rng = np.random.default_rng(0)
    probes = rng.normal(size=(4, 16)).astype(np.float32)
    before = sum(array.nbytes for array in jax.live_arrays())
    held = []

    def shards():
        for _ in range(4):
            yield rng.normal(size=(4096, 16)).astype(np.float32)
            held.append(sum(array.nbytes for array in jax.live_arrays()) - before)

    match.top_k_of_shards(probes, shards(), k=2, metric="euclidean")
    assert len(held) == 4 and max(held) < 4096 * 16 * 4


@pytest.mark.parametrize("metric", registry.METRICS)
def test_distances_of_pairs(metric):
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 5, 8)).astype(np.float32)
    apart = _oracle(first, second, metric)
    np.testing.assert_allclose(match.pairwise(first, second, metric=metric), apart, rtol=1e-12)
    np.testing.assert_allclose(
        match.distance(first, second, metric=metric), np.diag(apart), rtol=1e-12
    )
    assert match.pairwise(first[:0], second, metric=metric).shape == (0, 5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 0}, "k is 0"),
        ({"gallery": np.zeros((0, 4), np.float32)}, r"gallery of shape \(0, 4\)"),
        ({"gallery": np.zeros((3, 5), np.float32)}, "do not fit"),
        ({"metric": "manhattan"}, "no metric 'manhattan'"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "probes": np.zeros((2, 4), np.float32),
        "gallery": np.ones((3, 4), np.float32),
        "k": 1,
        "metric": "euclidean",
    } | change

    def search():
        gallery = match.place(arguments["gallery"], metric=arguments["metric"])
        match.top_k(arguments["probes"], gallery, k=arguments["k"])

    with pytest.raises(ValueError, match=message):
        search()


def test_known_thresholds_only():
    assert match.threshold_of(registry.get("dlib"), "euclidean") == 0.6
    unknown = next(
        (extractor, metric)
        for extractor in registry.EXTRACTORS.values()
        for metric in registry.METRICS
        if getattr(extractor.thresholds, metric) is None
    )
    with pytest.raises(ValueError, match="no threshold"):
        match.threshold_of(*unknown)
