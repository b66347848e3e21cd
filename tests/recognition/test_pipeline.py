"""From photo files to embedded faces: order, problems, choice of faces, several extractors."""

import hashlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from afr_jax.core import distributed
from afr_jax.data import photos
from afr_jax.models.extractors import registry
from afr_jax.models.weights import download
from afr_jax.recognition import database, detect, embed, pipeline
from afr_jax.training import trained


class _MeanColor(nn.Module):
    """The mean color of the chip, which tells photos of one color apart."""

    @nn.compact
    def __call__(self, images):
        return jnp.mean(images, axis=(1, 2))


def _extractor(name, *, normalized=False, side=32):
    template = tuple((side * y, side * x) for y, x in registry.get("dlib").template)
    return registry.Extractor(
        **{
            **{
                field: getattr(registry.get("dlib"), field)
                for field in ("load", "source", "license")
            },
            "name": name,
            "module": _MeanColor(),
            "input_px": side,
            "template": tuple((y / 150, x / 150) for y, x in template),
            "input_scale": 255.0,
            "input_offset": 0.0,
            "embedding_size": 3,
            "normalized": normalized,
            "thresholds": registry.Thresholds(10.0, None, None),
        }
    )


@pytest.fixture
def recognizer(monkeypatch):
    """Finds as many faces as the photo's first pixel says in red, 30 px apart."""

    def detect_faces(variables, pixels, *, options):
        count = int(pixels[0, 0, 0])
        shift = 30.0 * np.arange(count)[:, None]
        boxes = np.array([[10, 10, 40, 40]]) + shift * [0, 1, 0, 1]
        points = np.array([[20, 15], [20, 30], [27, 22], [34, 16], [34, 29]], np.float32)
        landmarks = points[None] + shift[:, None] * [0, 1]
        if count == 3:
            landmarks[1] = 7.0  # All in one spot.
        confidences = 0.99 - 0.1 * np.arange(count)
        return detect.Faces(boxes.astype(np.float32), confidences, landmarks)

    monkeypatch.setattr(detect, "detect_faces", detect_faces)
    extractors = {"a": _extractor("a"), "b": _extractor("b", normalized=True)}
    return pipeline.Recognizer({}, detect.DetectorOptions(), extractors, {"a": {}, "b": {}})


def _photo(path, count, color):
    pixels = np.full((60, 160, 3), color, np.uint8)
    pixels[0, 0] = count
    Image.fromarray(pixels).save(path)
    return path


def test_every_path_gets_its_result_in_order(recognizer, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_GROUP", 2)
    paths = [
        _photo(tmp_path / "one.png", 1, (10, 20, 30)),
        tmp_path / "missing.png",
        _photo(tmp_path / "none.png", 0, (9, 9, 9)),
        _photo(tmp_path / "two.png", 2, (40, 50, 60)),
        _photo(tmp_path / "three.png", 3, (70, 80, 90)),
    ]
    found = list(pipeline.recognize(recognizer, paths, which="all"))
    assert [item.path for item in found] == paths
    assert [item.problem for item in found] == [
        None,
        "the file does not exist",
        pipeline.NO_FACE,
        None,
        None,
    ]
    # The face of the third photo whose landmarks coincide is left out.
    assert [len(item.faces.boxes) for item in found] == [1, 0, 0, 2, 2]
    for item, color in zip(found[3:], ((40, 50, 60), (70, 80, 90)), strict=True):
        np.testing.assert_allclose(item.embeddings["a"], [color] * 2, atol=1e-3)
        unit = np.array(color) / np.linalg.norm(color)
        np.testing.assert_allclose(item.embeddings["b"], [unit] * 2, atol=1e-5)
    assert found[1].embeddings["a"].shape == (0, 3) and found[1].digest == ""
    digest = hashlib.sha256(paths[3].read_bytes()).hexdigest()
    assert found[3].digest == digest


def test_the_main_face_and_sure_faces_only(recognizer, tmp_path):
    path = _photo(tmp_path / "five.png", 5, (1, 2, 3))
    (main,) = pipeline.recognize(recognizer, [path])
    # The one in the middle of 160 columns.
    np.testing.assert_array_equal(main.faces.boxes, [[10, 70, 40, 100]])
    (sure,) = pipeline.recognize(recognizer, [path], which="all", min_confidence=0.85)
    assert len(sure.faces.boxes) == 2
    (none,) = pipeline.recognize(recognizer, [path], min_confidence=0.999)
    assert none.problem == pipeline.NO_FACE


def test_photos_come_in_any_form_and_some_must_not_be_read(recognizer, tmp_path):
    path = _photo(tmp_path / "one.png", 1, (10, 20, 30))
    pixels = np.asarray(Image.open(path))
    sources = [path, str(path), pixels, Image.open(path), photos.PhotoSource("x", path)]
    *found, refused = pipeline.recognize(
        recognizer, [*sources, photos.PhotoSource("y", path, problem="a link out")]
    )
    for item in found:
        np.testing.assert_array_equal(item.embeddings["a"], found[0].embeddings["a"])
        assert item.status == "ok"
    assert [item.path for item in found] == [path, path, None, None, path]
    assert found[0].digest == found[4].digest != found[2].digest == found[3].digest
    assert (refused.problem, refused.status) == ("a link out", "unreadable")


def test_verdicts_of_all_extractors(recognizer, tmp_path):
    first = _photo(tmp_path / "one.png", 1, (10, 20, 30))
    second = _photo(tmp_path / "two.png", 1, (10, 20, 38))
    found = pipeline.verify(recognizer, first, second)
    assert found["a"].distance == pytest.approx(8, abs=1e-3)
    assert found["a"].same_person is True and found["a"].threshold == 10.0
    # No threshold is known of unit vectors.
    assert (found["b"].threshold, found["b"].same_person) == (None, None)
    strict = pipeline.verify(recognizer, first, second, metric="euclidean", threshold=7.5)
    assert strict["a"].same_person is False
    with pytest.raises(ValueError, match=r"absent.png: the file does not exist"):
        pipeline.verify(recognizer, first, tmp_path / "absent.png")


def test_what_is_enrolled_is_matched(recognizer, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_GROUP", 2)
    people = {
        name: _photo(tmp_path / f"{name}.png", 1, (10 * i, 90, 30))
        for i, name in enumerate(("Ann", "Bob", "Cem"), start=1)
    }
    nobody = _photo(tmp_path / "none.png", 0, (1, 1, 1))
    gallery = {**people, "Nobody": nobody, "unknown": people["Ann"]}
    done = recognizer.enroll(gallery, tmp_path / "db")
    assert (done.added, done.changed, done.unchanged, len(done.database)) == (3, 0, 0, 3)
    assert [item.name for item in done.problems] == ["unknown/Ann.png", "Nobody/none.png"]
    query = _photo(tmp_path / "query.png", 2, (21, 90, 30))
    found = recognizer.match([query, nobody], done, top_k=2, threshold=2.0, min_confidence=0.8)
    assert [item.found.status for item in found.queries] == ["ok", "no_face"]
    assert found.decisions == ("Bob", "Bob")
    assert [(item.face, item.rank, item.identity, item.matched) for item in found.matches] == [
        (face, rank, name, rank == 1) for face in (0, 1) for rank, name in ((1, "Bob"), (2, "Cem"))
    ]
    # Another extractor's database is refused, whether it is the first or not.
    alone = recognizer._replace(extractors={"b": recognizer.extractors["b"]})
    with pytest.raises(database.DatabaseError, match="cannot be mixed"):
        alone.match(query, done)
    with pytest.raises(ValueError, match="no extractor 'c'"):
        recognizer.enroll(people, tmp_path / "db", extractor="c")


def test_photos_of_one_name_do_not_take_each_others_place(recognizer, tmp_path):
    for folder, color in (("x", (10, 90, 30)), ("y", (30, 90, 10))):
        (tmp_path / folder).mkdir()
        _photo(tmp_path / folder / "1.png", 1, color)
    paths = [tmp_path / folder / "1.png" for folder in ("x", "y")]
    with pytest.raises(ValueError, match=r"several photos are called Ann/1\.png"):
        recognizer.enroll({"Ann": paths}, tmp_path / "db")
    # Arrays have no names, and each is enrolled once, however often and in whatever call it comes.
    first, second = (np.asarray(Image.open(path)) for path in paths)
    done = recognizer.enroll({"Ann": [first, first]}, tmp_path / "db")
    assert (done.added, len(done.database)) == (1, 1)
    done = recognizer.enroll({"Ann": [second, first]}, tmp_path / "db")
    assert (done.added, done.changed, done.unchanged, len(done.database)) == (1, 0, 1, 2)


def test_a_file_that_cannot_be_read_just_now_stays_enrolled(recognizer, tmp_path):
    path = _photo(tmp_path / "1.png", 1, (10, 90, 30))
    gallery = {"Ann": [photos.PhotoSource("1.png", path)]}
    assert len(recognizer.enroll(gallery, tmp_path / "db").database) == 1
    path.rename(tmp_path / "away.png")
    done = recognizer.enroll(gallery, tmp_path / "db")
    assert [item.name for item in done.problems] == ["Ann/1.png"] and len(done.database) == 1
    # One that can be read and shows nobody any more is dropped.
    _photo(path, 0, (1, 1, 1))
    assert len(recognizer.enroll(gallery, tmp_path / "db").database) == 0


def test_faces_spread_over_devices_are_those_of_one(recognizer):
    rng = np.random.default_rng(0)
    points = np.array([[20, 15], [20, 30], [27, 22], [34, 16], [34, 29]], np.float32)
    faces = [
        (rng.integers(0, 255, (60, 80 + i, 3), np.uint8), points + rng.uniform(0, 9, (1, 2)))
        for i in range(7)
    ]
    extractor = recognizer.extractors["a"]
    together = embed.embed_faces(extractor, {}, faces)
    assert len(jax.local_devices()) == 4
    one_by_one = np.concatenate([embed.embed_faces(extractor, {}, [face]) for face in faces])
    np.testing.assert_allclose(together, one_by_one, rtol=1e-5)
    assert embed.embed_faces(extractor, {}, []).shape == (0, 3)


def test_weights_of_a_command_line():
    assert pipeline.parse_weights(["x=1.npz"], ["dlib"]) == {"dlib": "x=1.npz"}
    assert pipeline.parse_weights(["dlib=1.npz"], ["dlib"]) == {"dlib": "1.npz"}
    assert pipeline.parse_weights(["b=2", "a=1"], ["a", "b"]) == {"a": "1", "b": "2"}
    with pytest.raises(ValueError, match="NAME=FILE"):
        pipeline.parse_weights(["1.npz"], ["a", "b"])


def test_loading_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="no extractor 'nobody'"):
        pipeline.load_recognizer("nobody")
    with pytest.raises(ValueError, match="not among the extractors"):
        pipeline.load_recognizer("dlib", weights={"openface": "x"})
    with pytest.raises(FileNotFoundError, match="absent"):
        pipeline.load_recognizer("dlib", weights={"dlib": str(tmp_path / "absent.dat")})


def test_two_extractors_come_with_the_install(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "fetch", lambda name: pytest.fail(f"{name} asks for a network"))
    monkeypatch.setattr(download, "cache_folder", lambda: tmp_path)
    loaded = pipeline.load_recognizer("all")
    assert list(loaded.extractors) == list(loaded.variables) == ["dlib", "sface"]


@pytest.mark.parametrize(
    "names, options, expected",
    [
        (("all",), {}, ("dlib", "sface", "openface")),
        (("out/mine", "all", "sface"), {}, ("out/mine", "dlib", "openface", "sface")),
        (("all",), {"given": {"lvface_t", "nobody"}}, ("dlib", "sface", "openface", "lvface_t")),
        (("all",), {"without": ("dlib", "out/mine")}, ("sface", "openface")),
        (("dlib",), {"given": {"lvface_t"}}, ("dlib",)),
        (("all", "all"), {}, ("dlib", "sface", "openface")),
        # A judge is only there where it is named.
        (("all",), {"given": {"mobilefacenet_192"}}, ("dlib", "sface", "openface")),
        (("sface", "mobilefacenet_192"), {}, ("sface", "mobilefacenet_192")),
        ((), {}, ()),
    ],
)
def test_all_stands_for_what_can_be_loaded(monkeypatch, names, options, expected):
    monkeypatch.setattr(registry, "present", lambda: ("dlib", "sface", "openface"))
    assert pipeline.expand_names(names, **options) == expected


def test_judges_among_surrogates_are_told(monkeypatch):
    told = []
    monkeypatch.setattr(pipeline.progress, "warn", lambda name, reason: told.append((name, reason)))
    pipeline.warn_of_judges(["dlib", "out/mine"])
    assert not told
    pipeline.warn_of_judges(["dlib", "mobilefacenet_192"])
    assert [name for name, _ in told] == ["mobilefacenet_192"] and "judge" in told[0][1]


def test_the_tag_names_extractor_and_weights(recognizer):
    first = pipeline.tag(recognizer, "a")
    assert (first.name, first.embedding_size, first.metric) == ("a", 3, "euclidean")
    other = recognizer._replace(variables={"a": {"params": {"w": np.ones(2, np.float32)}}})
    assert pipeline.tag(other, "a").weights != first.weights


def test_a_trained_extractor_is_found_by_its_folder(tmp_path):
    card = trained.Card(
        "resnet6", 32, 16, width=4, template=_extractor("t").template, threshold=0.9
    )
    network = trained.make_network("resnet6", input_px=32, embedding_size=16, width=4)
    variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    folder = tmp_path / "mine"
    folder.mkdir()
    trained.write_extractor(folder, card, variables)
    name = str(folder)
    loaded = pipeline.load_recognizer(name)
    extractor = loaded.extractors[name]
    assert (extractor.name, extractor.threshold) == ("trained:mine", 0.9)
    expected = registry.fingerprint(jax.device_get(variables))
    assert pipeline.tag(loaded, name) == ("trained:mine", expected, 16, "euclidean_l2")
    with pytest.raises(ValueError, match="no extractor"):
        pipeline.find_extractor(str(tmp_path / "absent"))


def test_what_was_found_is_kept_group_by_group(recognizer, tmp_path, monkeypatch):
    """A run that ends early keeps whole groups; the next one embeds the rest, to the same bits."""
    monkeypatch.setattr(pipeline, "_GROUP", 2)
    paths = [_photo(tmp_path / f"{n}.png", n % 3, (n, 20, 30.0 + n / 3)) for n in range(5)]
    straight = list(pipeline.recognize(recognizer, paths, which="all"))
    kept = tmp_path / "kept"
    calls, embed_faces = [], embed.embed_faces

    def embed_some(extractor, variables, pairs):
        calls.append(extractor.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed_faces(extractor, variables, pairs)

    monkeypatch.setattr(embed, "embed_faces", embed_some)
    found = pipeline.recognize(recognizer, paths, which="all", kept=kept)
    assert [next(found).path, next(found).path] == paths[:2]
    with pytest.raises(KeyboardInterrupt):
        next(found)
    for expected_calls in (4, 0):  # Two groups of two extractors; then nothing.
        calls[:] = ["some"] * 3
        again = list(pipeline.recognize(recognizer, paths, which="all", kept=kept))
        assert len(calls) - 3 == expected_calls
        for one, other in zip(again, straight, strict=True):
            assert one[:3] == other[:3]
            jax.tree.map(np.testing.assert_array_equal, one[3:], other[3:])
    # Other options, a changed photo: computed anew.
    list(pipeline.recognize(recognizer, paths, min_confidence=0.5, kept=kept))
    assert len(calls) - 3 == 6
    _photo(paths[0], 1, (1, 2, 3))
    list(pipeline.recognize(recognizer, paths, min_confidence=0.5, kept=kept))
    assert len(calls) - 3 == 8 and len(list(kept.iterdir())) == 3


def test_each_of_two_processes_looks_at_its_groups(recognizer, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_GROUP", 2)
    monkeypatch.setattr(distributed, "barrier", lambda name: None)
    paths = [_photo(tmp_path / f"{n}.png", n % 3, (n, 20, 30)) for n in range(7)]
    straight = list(pipeline.recognize(recognizer, paths))
    pipeline.share(recognizer, paths, kept=tmp_path / "alone")
    assert not (tmp_path / "alone").exists()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    kept, seen = tmp_path / "kept", []
    find = pipeline._find

    def find_and_note(detect_fn, source, which, min_confidence):
        seen.append(source)
        return find(detect_fn, source, which, min_confidence)

    monkeypatch.setattr(pipeline, "_find", find_and_note)
    for index, own in ((1, [2, 3, 6]), (0, [0, 1, 4, 5])):
        seen.clear()
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        pipeline.share(recognizer, paths, kept=kept)
        assert sorted(seen) == [paths[number] for number in own]
    seen.clear()
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    found = list(pipeline.recognize(recognizer, paths, kept=kept))
    assert not seen
    for one, other in zip(found, straight, strict=True):
        assert one[:3] == other[:3]
        jax.tree.map(np.testing.assert_array_equal, one[3:], other[3:])


def test_groups_are_of_few_pixels(recognizer, tmp_path, monkeypatch):
    paths = [_photo(tmp_path / f"{n}.png", 1, (n, 20, 30)) for n in range(5)]
    sizes, embed_faces = [], embed.embed_faces

    def embed_some(extractor, variables, pairs):
        sizes.append(sum(pixels.shape[0] * pixels.shape[1] for pixels, _ in pairs))
        return embed_faces(extractor, variables, pairs)

    monkeypatch.setattr(embed, "embed_faces", embed_some)
    monkeypatch.setattr(photos, "GROUP_PIXELS", 2 * 60 * 160)
    assert len(list(pipeline.recognize(recognizer, paths))) == 5
    assert max(sizes) == 2 * 60 * 160 and len(sizes) == 6
    # Pixels of photos without faces are not held.
    assert pipeline._find(lambda pixels: detect.no_faces(), paths[0], "all", 0)[0].size == 0
