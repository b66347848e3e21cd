"""The table of extractors: conventions, metrics, sources of the weights, hashes."""

import dataclasses
import math
import pathlib
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import requests

from afr_jax.models.extractors import registry
from afr_jax.models.weights import conversion, download


class _Toy(nn.Module):
    @nn.compact
    def __call__(self, chips):
        return nn.Dense(3)(chips.mean(axis=(1, 2)))


def _toy(**changes) -> registry.Extractor:
    fields = dict(
        name="toy",
        module=_Toy(),
        input_px=8,
        template=((0.0, 0.0),) * 5,
        input_scale=2.0,
        input_offset=-1.0,
        embedding_size=3,
        normalized=False,
        thresholds=registry.Thresholds(1.0, None, 0.3),
        load=dict,
        source="",
        license="",
    )
    return registry.Extractor(**(fields | changes))


def _toy_variables() -> dict:
    generator = np.random.default_rng(0)
    kernel, bias = generator.normal(size=(3, 3)), generator.normal(size=3)
    return {"params": {"Dense_0": {"kernel": np.float32(kernel), "bias": np.float32(bias)}}}


@pytest.mark.parametrize("is_bgr", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_embed_converts_the_range_and_normalizes(normalized, is_bgr):
    chips = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
    variables = _toy_variables()
    extractor = _toy(normalized=normalized, is_bgr=is_bgr)
    embeddings = jax.jit(registry.embed, static_argnums=0)(extractor, variables, chips)
    dense = variables["params"]["Dense_0"]
    mean = chips.mean(axis=(1, 2))[:, :: -1 if is_bgr else 1]
    expected = (2 * mean - 1) @ dense["kernel"] + dense["bias"]
    if normalized:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)


class _Flat(nn.Module):
    """Tells a chip from its mirror image."""

    @nn.compact
    def __call__(self, chips):
        return nn.Dense(3)(chips.reshape(len(chips), -1))


@pytest.mark.parametrize("normalized", [False, True])
def test_a_mirrored_embedding_is_the_mean_of_both(normalized):
    generator = np.random.default_rng(1)
    chips = generator.uniform(size=(2, 8, 8, 3)).astype(np.float32)
    kernel = generator.normal(size=(192, 3)).astype(np.float32)
    variables = {"params": {"Dense_0": {"kernel": kernel, "bias": np.ones(3, np.float32)}}}
    extractor = _toy(module=_Flat(), normalized=normalized, mirrored=True)
    both = [(2 * x - 1).reshape(2, -1) @ kernel + 1 for x in (chips, chips[:, :, ::-1])]
    assert not np.allclose(*both, atol=1e-2)
    if normalized:
        both = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in both]
    expected = np.mean(both, axis=0)
    if normalized:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(
        registry.embed(extractor, variables, chips), expected, atol=1e-5, rtol=1e-5
    )


def test_embed_takes_chips_of_its_own_size_only():
    with pytest.raises(AssertionError):
        registry.embed(_toy(), {}, jnp.zeros((1, 9, 8, 3)))


def test_distance_and_its_gradient():
    embedding, other = jnp.array([[1.0, 5.0], [2.0, 2.0]]), jnp.array([[4.0, 1.0], [2.0, 2.0]])
    np.testing.assert_allclose(registry.distance(embedding, other), [5.0, 0.0])
    gradient = jax.jit(jax.grad(lambda x: registry.distance(x, other).sum()))(embedding)
    np.testing.assert_allclose(gradient, [[-0.6, 0.8], [0.0, 0.0]], atol=1e-6)


def test_the_threshold_is_that_of_the_extractors_own_metric():
    assert (_toy().metric, _toy().threshold) == ("euclidean", 1.0)
    other = _toy(normalized=True, thresholds=registry.Thresholds(None, 1.1, None))
    assert (other.metric, other.threshold) == ("euclidean_l2", 1.1)
    assert set(registry.METRICS) == set(registry.Thresholds._fields)


def test_reach_is_the_nearest_other_person_or_the_threshold():
    assert _toy().reach == 1.0
    assert _toy(nearest_other=0.9).reach == 0.9
    known = [registry.get(name) for name in ("dlib", "facenet_casia", "mobilefacenet")]
    # Other people lie within the threshold of somebody among many, but not far within.
    assert all(0.9 * one.threshold < one.reach < one.threshold for one in known)


def test_an_unknown_threshold_is_an_error():
    extractor = _toy(normalized=True)
    with pytest.raises(ValueError, match="threshold of toy in euclidean_l2 is not known"):
        _ = extractor.threshold


def test_unknown_extractors_are_named():
    with pytest.raises(ValueError, match=r"no extractor 'nobody'; there are: .*dlib"):
        registry.get("nobody")


def test_the_table_has_what_it_promises():
    assert set(registry.EXTRACTORS) == {
        *("dlib", "sface", "facenet_vggface2", "facenet_casia", "vggface", "openface", "deepface"),
        *("arcface_r50", "arcface_r100", "mobilefacenet", "adaface_ir50", "adaface_ir101"),
        *("frbench_irse50", "frbench_irse100", "frbench_mobilefacenet", "foamliu_mobilefacenet"),
        *("lvface_t", "lvface_s", "lvface_b", "lvface_l", "mobilefacenet_192"),
    }


@pytest.mark.parametrize("name", sorted(registry.EXTRACTORS))
def test_the_table_agrees_with_the_modules(name):
    extractor = registry.get(name)
    assert extractor.name == name
    assert hash(extractor) == hash(dataclasses.replace(extractor))
    assert np.shape(extractor.template) == (5, 2)
    assert np.all(np.array(extractor.template) > 0)
    assert np.all(np.array(extractor.template) < extractor.input_px)
    left, right = np.array(extractor.template)[:2]
    # Both eyes on one height, the picture's left one first.
    assert abs(left[0] - right[0]) < 0.02 * extractor.input_px and left[1] < right[1]
    assert extractor.license and extractor.source
    assert 0 < extractor.threshold < 100
    l2, cosine = extractor.thresholds.euclidean_l2, extractor.thresholds.cosine
    # Of unit vectors both measure one angle; deepface rounds, and tuned each by itself.
    assert math.isclose(l2**2 / 2, cosine, rel_tol=0.5)
    chips = jax.ShapeDtypeStruct((2, extractor.input_px, extractor.input_px, 3), jnp.float32)
    embeddings = jax.eval_shape(
        extractor.module.apply, conversion.shapes(extractor.module, extractor.input_px), chips
    )
    assert embeddings.shape == (2, extractor.embedding_size)


# Variables.


def test_variables_come_from_the_default_source_or_from_a_file(tmp_path):
    variables = _toy_variables()
    extractor = _toy(load=lambda: variables)
    assert registry.load_variables(extractor, None) is variables
    path = tmp_path / "ours.bin"
    conversion.write_safetensors(path, variables)
    found = registry.load_variables(extractor, path)
    assert registry.fingerprint(found) == registry.fingerprint(variables)


def test_a_foreign_file_goes_to_the_extractors_reader(tmp_path):
    path = tmp_path / "theirs.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n")
    assert registry.load_variables(_toy(read=lambda path: {"read": path}), path) == {"read": path}
    with pytest.raises(ValueError, match="only safetensors"):
        registry.load_variables(_toy(), path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.pt"):
        registry.load_variables(_toy(), tmp_path / "none.pt")


def test_the_dlib_file_is_read_by_path():
    extractor = registry.get("dlib")
    path = registry.dlib_resnet.find_weights()
    own = registry.load_variables(extractor, None)
    assert registry.fingerprint(registry.load_variables(extractor, path)) == registry.fingerprint(
        own
    )


@pytest.mark.parametrize(
    "change, is_same",
    [
        (lambda v: {"b": v["b"], "a": v["a"]}, True),
        (lambda v: jax.tree.map(jnp.asarray, v), True),
        (lambda v: {**v, "b": v["b"] + 1e-6}, False),
        (lambda v: {**v, "b": v["b"].astype(np.float16)}, False),
        (lambda v: {**v, "b": v["b"].reshape(3, 2)}, False),
        (lambda v: {"a": v["a"], "c": v["b"]}, False),
        (lambda v: {**v, "a": {"n": v["b"], "m": v["a"]["n"]}}, False),
    ],
)
def test_the_fingerprint_is_of_names_shapes_types_and_values(change, is_same):
    variables = {"a": {"n": np.ones(2, np.float32)}, "b": np.ones((2, 3), np.float32)}
    same = registry.fingerprint(change(variables)) == registry.fingerprint(variables)
    assert same == is_same
    assert len(registry.fingerprint(variables)) == 64


# Downloads.


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return download.cache_folder()


@pytest.fixture
def offline(monkeypatch):
    def retrieve(*_, **__):
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(download.pooch, "retrieve", retrieve)


def test_the_cache_obeys_the_environment(cache, tmp_path):
    assert cache.is_relative_to(tmp_path)


@pytest.mark.parametrize("name", sorted(set(registry.EXTRACTORS) - {"dlib", "sface"}))
def test_without_network_the_message_says_what_to_put_where(cache, offline, name):
    source = download.SOURCES[name]
    with pytest.raises(FileNotFoundError) as error:
        registry.load_variables(registry.get(name), None)
    assert str(cache / source.file_name) in str(error.value)
    assert (source.url or source.hint) in str(error.value)


def test_what_is_there_is_known_without_a_network(cache, offline):
    assert registry.present() == ("dlib", "sface")
    cache.mkdir(parents=True)
    (cache / download.SOURCES["lvface_t"].file_name).touch()
    (cache / download.SOURCES["facenet_casia"].file_name).touch()
    assert registry.present() == ("dlib", "sface", "facenet_casia", "lvface_t")


def test_a_file_in_the_cache_needs_no_network(cache, offline):
    cache.mkdir(parents=True)
    path = cache / download.SOURCES["openface"].file_name
    path.write_bytes(b"anything")
    assert download.fetch("openface") == path
    with pytest.raises(ValueError, match="not a weight file"):
        registry.load_variables(registry.get("openface"), None)


def _serve(monkeypatch, folder: pathlib.Path, data: bytes) -> list:
    """Lets every address serve these bytes; returns the list of (address, hash) asked for."""
    asked = []

    def retrieve(url, known_hash, fname, path, downloader):
        asked.append((url, known_hash))
        path.mkdir(parents=True, exist_ok=True)
        (path / fname).write_bytes(data)
        return str(path / fname)

    monkeypatch.setattr(download.pooch, "retrieve", retrieve)
    return asked


def test_a_file_is_fetched_with_its_hash(cache, monkeypatch):
    asked = _serve(monkeypatch, cache, b"weights")
    assert download.fetch("facenet_casia").read_bytes() == b"weights"
    source = download.SOURCES["facenet_casia"]
    assert asked == [(source.url, f"sha256:{source.sha256}")]


def test_an_archive_is_unpacked(cache, monkeypatch, tmp_path):
    source = download.SOURCES["deepface"]
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(f"inside/{source.member}", b"weights")
    _serve(monkeypatch, cache, archive.read_bytes())
    path = download.fetch("deepface")
    assert path == cache / source.file_name and path.read_bytes() == b"weights"
    assert [found.name for found in cache.iterdir()] == [source.file_name]


def test_an_archive_without_the_file_is_refused(cache, monkeypatch):
    _serve(monkeypatch, cache, b"<html>gone</html>")
    with pytest.raises(ValueError, match="not an archive"):
        download.fetch("deepface")
    # Another try fetches it anew.
    assert not list(cache.iterdir())


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_damaged_archive_is_dropped(cache, monkeypatch, tmp_path, method):
    member, packed = download.SOURCES["deepface"].member, tmp_path / "archive.zip"
    with zipfile.ZipFile(packed, "w", method) as file:
        file.writestr(member, bytes(1000))
    data = bytearray(packed.read_bytes())
    if method == zipfile.ZIP_DEFLATED:
        # A block of a type that there is not.
        data[30 + len(member)] = 0b111
    else:
        # More bytes than the file has.
        sizes = data.rindex(b"PK\1\2") + 20
        data[sizes : sizes + 8] = 2 * (1 << 20).to_bytes(4, "little")
    _serve(monkeypatch, cache, bytes(data))
    with pytest.raises(ValueError, match="not an archive"):
        download.fetch("deepface")
    assert not list(cache.iterdir())


@pytest.mark.parametrize("is_open", [False, True])
def test_another_process_may_unpack_an_archive_meanwhile(cache, monkeypatch, tmp_path, is_open):
    source, packed = download.SOURCES["deepface"], tmp_path / "archive.zip"
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr(source.member, b"weights")
    _serve(monkeypatch, cache, packed.read_bytes())
    archive, path = cache / f"{source.file_name}.zip", cache / source.file_name
    open_archive = zipfile.ZipFile

    def meanwhile(name):
        found = open_archive(name) if is_open else None
        archive.unlink()
        path.write_bytes(b"weights")
        return found or open_archive(name)

    monkeypatch.setattr(download.zipfile, "ZipFile", meanwhile)
    assert download.fetch("deepface").read_bytes() == b"weights"
    assert list(cache.iterdir()) == [path]


@pytest.mark.parametrize("name", sorted(download.SOURCES))
def test_sources_are_complete(name):
    source = download.SOURCES[name]
    assert bool(source.url) != bool(source.hint)
    assert not source.url or source.url.startswith("https://")
    assert source.sha256 is None or len(bytes.fromhex(source.sha256)) == 32
