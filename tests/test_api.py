"""The public names of the package, used as a researcher would type them."""

import ast
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import afr_jax as afr
from afr_jax.core import options, parallel, program
from afr_jax.data import photos
from afr_jax.evaluation.cloaking import cloak_files
from afr_jax.methods.patches import scenes

_PEOPLE = ("Ai_Sugiyama", "Allyson_Felix", "Arminio_Fraga")
_STRANGERS = ("Aaron_Eckhart", "Aaron_Guiel")


def test_importing_the_package_imports_nothing_else():
    code = "import sys, afr_jax; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "afr_jax" in loaded
    heavy = {"jax", "jaxlib", "flax", "numpy", "scipy", "sklearn", "cv2", "PIL", "lancedb", "absl"}
    assert not loaded & heavy


def test_type_checkers_see_the_public_names():
    """The imports under TYPE_CHECKING are those that are made when a name is used."""
    tree = ast.parse(pathlib.Path(afr.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING" and not block.orelse
    seen = {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == {name: (module, name) for name, module in afr._MODULES.items()}


def test_every_public_name_is_there():
    assert set(afr.__all__) <= set(dir(afr))
    for name in afr.__all__:
        assert getattr(afr, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'cloack'"):
        _ = afr.cloack


def test_photos_come_in_any_form(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "gray.png")
    (tmp_path / "notes.txt").write_text("no photo")
    (one,) = afr.read_photos(pixels)
    np.testing.assert_array_equal(one.pixels, pixels)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), one):
        (found,) = afr.read_photos(source)
        np.testing.assert_array_equal(found.pixels, pixels)
    first, second = afr.read_photos(tmp_path)
    assert (first.name, second.name, second.gray) == ("a.png", "gray.png", True)
    several = afr.read_photos([tmp_path, np.stack([pixels])[0], Image.new("L", (3, 3))])
    assert [photo.name for photo in several] == ["a.png", "gray.png", "photo_1", "photo_2"]
    assert several[3].gray and len(afr.read_photos(np.stack([pixels, pixels]))) == 2
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for wrong, part in (
        (tmp_path, "half.png: the PNG"),
        (tmp_path / "notes.txt", "notes.txt: not a photo"),
    ):
        with pytest.raises(photos.PhotoError, match=part):
            afr.read_photos(wrong)
    with pytest.raises(ValueError, match="photo_1: a photo must be uint8"):
        afr.read_photos([pixels, pixels / 255])
    for value in (3, None, b"abc", [3]):
        with pytest.raises(TypeError, match="a photo must be an array, a path or a PIL image, got"):
            afr.read_photos(value)
    with pytest.raises(FileNotFoundError):
        afr.read_photos(tmp_path / "absent")


@pytest.mark.parametrize(
    "call, error, part",
    [
        (lambda: afr.train_patches(None, []), ValueError, "frames: there is none"),
        (lambda: afr.train_patches(None, 3), TypeError, "frames must be .* got int"),
        (lambda: afr.train_patches(None, [3]), TypeError, "frames: int is not"),
        (lambda: afr.make_unlearnable(3), TypeError, "data must be an ImageSet, .* got int"),
        (lambda: afr.train_victim(None, 3), TypeError, "train_set must be an ImageSet"),
        (
            lambda: afr.misdetection(None, [], None),
            TypeError,
            "patches must be what `train_patches` returns, got NoneType",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, part):
    with pytest.raises(error, match=part):
        call()


@pytest.fixture(scope="module")
def recognizer():
    return afr.load_recognizer("dlib", "sface")


@pytest.fixture(scope="module")
def people(shared, tmp_path_factory) -> pathlib.Path:
    """Three people of four photos each, and two strangers."""
    root = tmp_path_factory.mktemp("people")
    for person in (*_PEOPLE, *_STRANGERS):
        (root / person).mkdir()
        count = 4 if person in _PEOPLE else 1
        for path in sorted((shared / "data/lfw" / person).iterdir())[:count]:
            shutil.copy(path, root / person / path.name)
    return root


@pytest.fixture(scope="module")
def pair(shared) -> list[pathlib.Path]:
    return sorted((shared / "data/lfw" / _PEOPLE[0]).iterdir())[:2]


@pytest.mark.shared
def test_verify(recognizer, pair, shared):
    verdicts = afr.verify(recognizer, *pair)
    assert verdicts.keys() == {"dlib", "sface"}
    for verdict in verdicts.values():
        assert verdict.same_person and 0 < verdict.distance < verdict.threshold
    other = next((shared / "data/lfw" / _PEOPLE[2]).iterdir())
    # The same photo as an array and as a picture.
    with Image.open(other) as picture:
        apart = afr.verify(recognizer, afr.read_photos(pair[0])[0].pixels, picture, metric="cosine")
    assert not apart["dlib"].same_person and apart["dlib"].threshold == 0.07
    with pytest.raises(ValueError, match="the second photo: no face was found"):
        afr.verify(recognizer, pair[0], np.zeros((80, 80, 3), np.uint8))


@pytest.mark.shared
def test_detect_faces(recognizer, pair):
    faces = afr.detect_faces(recognizer.detector, pair[0])
    assert faces.boxes.shape[1:] == (4,) and faces.confidences[0] > 0.9
    (found,) = afr.recognize(recognizer, [pair[0]])
    assert found.problem is None and found.embeddings["dlib"].shape == (1, 128)


@pytest.mark.shared
def test_enroll_and_match(recognizer, people, shared, tmp_path):
    gallery = {name: sorted((people / name).iterdir())[:3] for name in _PEOPLE}
    database = recognizer.enroll(gallery, tmp_path / "people")
    assert (database.added, database.problems) == (9, ())
    again = recognizer.enroll(gallery, database.database)
    assert (again.added, again.unchanged) == (0, 9)
    queries = [sorted((people / name).iterdir())[3] for name in _PEOPLE]
    found = recognizer.match(queries, database, top_k=3)
    assert [query.name for query in found.queries] == [path.name for path in queries]
    first = [match for match in found.matches if match.rank == 1 and match.face == 0]
    assert [match.identity for match in first] == list(_PEOPLE)
    assert len(found.matches) == 3 * len(found.decisions)
    found.save(tmp_path / "matches.csv")
    assert (tmp_path / "matches.csv").read_text().count("\n") == 1 + len(found.matches)
    # Arrays are enrolled and found as files are.
    portrait = afr.read_photos(queries[0])[0].pixels
    other = recognizer.enroll({"she": [portrait]}, tmp_path / "other")
    near = recognizer.match(portrait, other, top_k=1).matches
    assert near[0].identity == "she" and near[0].distance < 1e-3 and near[0].decision == "she"


@pytest.mark.shared
def test_identify(recognizer, people, shared):
    report = afr.identify(recognizer, people, min_photos=4)
    assert [row["extractor"] for row in report.rows] == ["dlib", "sface"]
    assert report.rows[0]["rank_1"] == report.rows[1]["rank_1"] == 1.0
    assert len(report.split.strangers) == 2


@pytest.mark.shared
def test_readers(people, shared):
    data = afr.load_image_folder(people)
    assert set(data.classes) == {*_PEOPLE, *_STRANGERS} and data.images.shape == (14, 250, 250, 3)
    found = afr.read_frames(people / _PEOPLE[0])
    assert len(found.frames) == 4 and not found.skipped


@pytest.mark.shared
def test_patches(recognizer, shared, tmp_path):
    film = shared / "data/video/head-pose-face-detection-female.gif"
    frames = afr.read_frames(film, max_frames=4)
    # What compiles fastest.
    levels = scenes.LevelOptions(scale_factors=(0.709,), window_ratios=(0.6, 1.6), draws=1)
    config = afr.PatchConfig(
        placement="cheeks", patch_px=12, epochs=2, stage_weight=0.0, levels=levels
    )
    patches = afr.train_patches(recognizer.detector, frames.frames[::2], config=config)
    assert set(patches.patches) == {"left_cheek", "right_cheek"}
    assert patches.record.epochs == 2 and not patches.skipped
    sizes = patches.save(tmp_path)
    assert 45 < sizes["left_cheek"][1] < 55 and (tmp_path / "patches.pdf").stat().st_size > 1000
    with Image.open(tmp_path / "patches" / "left_cheek.png") as picture:
        printed = np.asarray(picture)
    np.testing.assert_array_equal(printed, np.round(255 * patches.patches["left_cheek"]))
    # A folder goes on with the same frames alone.
    resumed = afr.train_patches(
        recognizer.detector, frames.frames[::2], config=config, workdir=tmp_path / "work"
    )
    np.testing.assert_array_equal(resumed.patches["left_cheek"], patches.patches["left_cheek"])
    with pytest.raises(options.UsageError, match="frames"):
        afr.train_patches(
            recognizer.detector, frames.frames[1::2], config=config, workdir=tmp_path / "work"
        )
    # Frames as an array.
    others = np.stack([frame.pixels for frame in frames.frames[1::2]])
    found = afr.misdetection(recognizer.detector, others, patches, scale_factors=(0.709,))
    assert found.names == ["0000", "0001"] and found.clean["0.709"]["missed"] == 0
    assert found.patched["0.709"]["low"] <= found.patched["mean"] <= found.patched["0.709"]["high"]
    np.testing.assert_array_equal(found.clean_frames[1], others[1])
    changed = (found.patched_frames[0] != others[0]).any(axis=-1)
    assert 0.002 < changed.mean() < 0.2
    found.save(tmp_path)
    names = sorted(path.name for path in (tmp_path / "frames/patched").iterdir())
    assert names == ["0000.png", "0001.png"] and (tmp_path / "misdetection.json").exists()
    with pytest.raises(ValueError, match=r"no frame to train on \(0000: no face of the person\)"):
        afr.train_patches(recognizer.detector, np.zeros((1, 64, 64, 3), np.uint8))


@pytest.fixture(scope="module")
def faces(shared, tmp_path_factory) -> pathlib.Path:
    """Face crops of three people: nine to train on, three to test on."""
    root = tmp_path_factory.mktemp("faces")
    for person in ("identity_00", "identity_01", "identity_02"):
        for number, path in enumerate(sorted((shared / "data/faces24" / person).iterdir())[:12]):
            folder = root / ("train" if number < 9 else "test") / person
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.name)
    return root


@pytest.mark.shared
def test_unlearnable_examples(faces, tmp_path):
    one_device = parallel.make_mesh(devices=jax.devices()[:1])
    network = afr.ClassifierOptions("small_resnet", width=4)
    data = afr.load_image_folder(faces / "train", image_px=16, resize=True)
    test = afr.load_image_folder(faces / "test", image_px=16, resize=True)
    config = afr.ErrorMin(granularity="sample", network=network)
    config = config.with_search(batch_size=9, max_rounds=1, train_steps=2, num_steps=2)
    noise = afr.make_unlearnable(data, config=config, mesh=one_device)
    protected = noise.apply(data)
    assert noise.names == protected.sample_ids == data.sample_ids
    change = np.abs(protected.images.astype(int) - data.images)
    assert 0 < change.max() <= 8 and noise.settings["method"] == "error_min"
    noise.save(tmp_path / "noise.npz")
    again = afr.read_noise(tmp_path / "noise.npz")
    np.testing.assert_array_equal(again.apply(data).images, protected.images)
    protected.save(tmp_path / "images")
    read = afr.load_image_folder(tmp_path / "images")
    np.testing.assert_array_equal(read.images, protected.images)
    options = afr.VictimOptions(network=network, num_epochs=2, batch_size=9)
    victim = afr.train_victim(protected, test, options=options, mesh=one_device)
    assert victim.curve.test_accuracy.shape == (2,)
    low, high = victim.last_interval
    assert 0 <= low <= victim.last_accuracy <= high <= 1
    assert victim.peak_accuracy >= victim.last_accuracy
    by_class = afr.make_unlearnable(data, config=afr.RandomNoise(granularity="class"))
    assert by_class.names == data.classes


@pytest.mark.shared
def test_cloak(recognizer, pair, tmp_path):
    """Against one extractor, judged by all; the program makes the same bytes."""
    config = afr.FawkesConfig(dssim_budget=0.012, num_steps=3)
    cloaked = afr.cloak(recognizer, pair, config=config, key=0, surrogates=["dlib"])
    assert [photo.status for photo in cloaked] == ["cloaked", "cloaked"]
    for photo, original in zip(cloaked, afr.read_photos(pair), strict=True):
        (face,), (found,) = photo.faces, photo.distances
        assert 0 < face["dssim"] <= 0.012 and np.any(photo.pixels != original.pixels)
        verdict = afr.verify(recognizer, original.pixels, photo.pixels)["dlib"]
        # Another smallest face gives the detector other landmarks.
        assert found["dlib"]["distance"] == pytest.approx(verdict.distance, rel=0.2)
        assert found["dlib"]["same_person"] == (found["dlib"]["distance"] < 0.6)
        made_against = {name: entry["surrogate"] for name, entry in found.items()}
        assert made_against == {name: name == "dlib" for name in recognizer.extractors}
    cloaked[0].save(tmp_path / "a_cloaked.png")
    (written,) = afr.read_photos(tmp_path / "a_cloaked.png")
    np.testing.assert_array_equal(written.pixels, cloaked[0].pixels)
    with pytest.raises(ValueError, match=r"written as .png"):
        cloaked[0].save(tmp_path / "a.jpg")
    flags = [f"--images={','.join(map(str, pair))}", "--num_steps=3", "--dssim=0.012"]
    flags.append("--surrogates=dlib")
    outcome = cloak_files.run(
        program.parse(cloak_files.CloakConfig, [*flags, f"--output_dir={tmp_path / 'out'}"])
    )
    assert outcome.complete
    for path, photo in zip(pair, cloaked, strict=True):
        assert (tmp_path / "out" / f"{path.stem}_cloaked.png").read_bytes() == photo.data


@pytest.mark.shared
def test_photos_that_are_not_cloaked_say_why(recognizer, pair, tmp_path):
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / "half.jpg").write_bytes(pair[0].read_bytes()[:2000])
    black = np.zeros((80, 80, 3), np.uint8)
    config = afr.FawkesConfig(num_steps=1)
    half, empty, picture = afr.cloak(
        recognizer, [tmp_path, black, Image.fromarray(black)], config=config
    )
    assert (half.image, half.status) == ("half.jpg", "unreadable") and half.reason
    assert (empty.status, empty.reason) == ("no_face", "no face was found")
    assert picture.pixels is None and picture.distances == []
    with pytest.raises(ValueError, match="photo_1 is not cloaked: no_face"):
        empty.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="must be among the extractors: dlib"):
        afr.cloak(recognizer, black, surrogates=["nobody"])
    with pytest.raises(ValueError, match="needs a gallery"):
        afr.cloak(recognizer, black, target="farthest")
