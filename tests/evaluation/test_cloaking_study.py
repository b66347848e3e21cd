"""Splits, leaks and scores on synthetic embeddings; protected photos on disk, cut and resumed."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from PIL import Image

from afr_jax.core import options, workdir
from afr_jax.data import identities
from afr_jax.evaluation import fawkes_package
from afr_jax.evaluation.attackers import trackers
from afr_jax.evaluation.cloaking import (
    cells,
    embeddings,
    people,
    plots,
    published,
    scores,
    study,
    table,
)
from afr_jax.evaluation.cloaking.cells import CloakCell
from afr_jax.evaluation.metrics import intervals
from afr_jax.methods.cloaking import budget, fawkes, noise, photo_cloaks
from afr_jax.models.extractors import registry
from afr_jax.recognition import align, detect, pipeline

_DLIB = registry.get("dlib")


def _listing(counts):
    samples = [
        identities.Sample(f"{name}/{i}.png", name, pathlib.Path(f"/x/{name}/{i}.png"))
        for name, count in counts.items()
        for i in range(count)
    ]
    return identities.Listing(tuple(sorted(samples, key=lambda s: s.sample_id)))


def _choose(counts, **options):
    defaults = {"num_people": 2, "num_published": 3, "num_probes": 2, "num_gallery_people": 3}
    options = {**defaults, "num_gallery_photos": 2, "seed": 0, **options}
    return people.choose(_listing(counts), **options)


def test_split_takes_each_photo_once_and_those_with_enough():
    counts = {"a": 5, "b": 9, "c": 1, "d": 4, "e": 7, "f": 2, "g": 1}
    split = _choose(counts)
    assert {person.identity for person in split.protected} <= {"a", "b", "e"}
    assert [len(p.published) for p in split.protected] == [3, 3]
    assert [len(p.probes) for p in split.protected] == [2, 2]
    samples = [*split.published, *split.probes, *split.gallery]
    assert len({sample.sample_id for sample in samples}) == len(samples)
    owners = {sample.identity for sample in split.gallery}
    # Those with two photos come before those with one.
    assert len(owners) == 3 and owners <= {"a", "b", "d", "e", "f"} and len(split.gallery) == 6
    assert not owners & {person.identity for person in split.protected}
    assert split == _choose(counts) != _choose(counts, seed=1)
    np.testing.assert_array_equal(
        np.array(split.names)[split.labels(split.probes)],
        [sample.identity for sample in split.probes],
    )


def test_split_divides_half_and_half_where_photos_are_few():
    split = _choose({"a": 4, "b": 3, "c": 1, "d": 1, "e": 1})
    assert [(len(p.published), len(p.probes)) for p in split.protected] == [(2, 2), (1, 2)]
    with pytest.raises(ValueError, match="2 such people to protect"):
        _choose({"a": 4, "b": 1, "c": 1, "d": 1, "e": 1})
    with pytest.raises(ValueError, match="3 others to enroll"):
        _choose({"a": 4, "b": 4, "c": 1, "d": 1})


def test_nobody_is_drawn_twice_and_all_may_be_enrolled():
    counts = dict.fromkeys("abcdefgh", 5)
    first = _choose(counts)
    names = {person.identity for person in first.protected}
    for seed in range(5):
        second = _choose(counts, seed=seed, num_gallery_people=6, drawn_before=names)
        assert not {person.identity for person in second.protected} & names
        assert {sample.identity for sample in second.gallery} >= names
    with pytest.raises(ValueError, match="2 such people to protect"):
        _choose(counts, drawn_before=set("abcdefg"))


def test_a_run_does_not_go_on_with_other_photos(tmp_path):
    samples = []
    for name in "abcd":
        path = tmp_path / f"{name}.png"
        Image.fromarray(np.full((8, 8, 3), ord(name), np.uint8)).save(path)
        samples.append(identities.Sample(path.name, name, path))
    work = workdir.open_workdir(tmp_path / "work", study.FawkesEvaluationConfig())
    split = people.Split(
        (people.ProtectedPerson("a", (samples[0],), (samples[1],)),), (samples[2],)
    )
    for _ in range(2):
        study._check_drawn(work, split)
    others = split._replace(gallery=(samples[3],))
    with pytest.raises(options.UsageError, match=r"c.png and 1 more"):
        study._check_drawn(work, others)
    samples[1].path.write_bytes(samples[3].path.read_bytes())
    with pytest.raises(options.UsageError, match=r"b.png and 0 more"):
        study._check_drawn(work, split)


def test_unreadable_photos_are_drawn_again(tmp_path):
    people.write_synthetic(tmp_path, num_people=4, num_photos=3, side=32)
    (tmp_path / "person_01" / "1.png").write_bytes(b"no photo")
    listing = identities.list_tree(tmp_path)
    options = {"num_people": 1, "num_published": 1, "num_probes": 1, "num_gallery_people": 3}
    split, rest = people.choose_readable(listing, num_gallery_photos=3, **options)
    drawn = {s.sample_id for s in (*split.published, *split.probes, *split.gallery)}
    assert "person_01/1.png" not in drawn and len(rest.problems) == 1 and len(split.gallery) >= 8


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_leaks_are_the_share_and_spread(share):
    leaked = scores.leaked_photos(20, share)
    assert leaked.sum() == round(20 * share)
    halves = leaked.reshape(2, 10).sum(axis=1)
    assert abs(halves[0] - halves[1]) <= 1


def _embeddings(rng, labels, centres, spread=0.3):
    vectors = centres[labels] + spread * rng.normal(size=(len(labels), centres.shape[1]))
    found = np.ones(len(labels), bool)
    points = np.zeros((len(labels), 5, 2), np.float32)
    boxes = np.zeros((len(labels), 4), np.float32)
    return embeddings.Embeddings(found, vectors.astype(np.float32), points, boxes)


@pytest.fixture(scope="module")
def clean():
    """Four protected people and six others; one published photo and one probe have no face."""
    names = [f"p{i}" for i in range(10)]
    split = _choose(
        {name: 6 if i < 4 else 2 for i, name in enumerate(names)},
        num_people=4,
        num_published=4,
        num_gallery_people=6,
    )
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 5))
    views = [
        _embeddings(rng, split.labels(samples), centres)
        for samples in (split.published, split.probes, list(split.gallery))
    ]
    views[0].found[5] = views[1].found[3] = False
    return scores.compare_clean(split, "dlib", _DLIB, *views)


@pytest.fixture(scope="module")
def cloaked(clean):
    """Published photos moved about: some near, some far, the last person's without any face."""
    rng = np.random.default_rng(1)
    shift = rng.normal(size=clean.published.vectors.shape) * np.repeat([0.1, 0.8, 2, 3], 4)[:, None]
    found = clean.published.found.copy()
    found[12:] = False
    return clean.published._replace(
        vectors=(clean.published.vectors + shift).astype(np.float32), found=found
    )


def _brute_force(clean, cloaked, leaked, hidden=()):
    """Answers of the nearest-neighbour trackers and ranks, probe by probe.

    `leaked` and `hidden` are numbers of published photos: clean ones, and ones not enrolled.
    """
    split = clean.split
    answers, limited, ranks, own_distances = [], [], [], []
    for number, probe in enumerate(split.probes):
        enrolled = []
        for i, sample in enumerate(split.published):
            is_own = sample.identity == probe.identity
            source = cloaked if is_own and i not in leaked else clean.published
            if source.found[i] and not (is_own and i in hidden):
                enrolled.append((sample.identity, source.vectors[i]))
        for i, sample in enumerate(split.gallery):
            enrolled.append((sample.identity, clean.gallery.vectors[i]))
        people = {}
        if clean.probes.found[number]:
            for name, vector in enrolled:
                apart = np.linalg.norm(np.float64(vector) - clean.probes.vectors[number])
                people[name] = min(people.get(name, np.inf), apart)
        order = sorted(people, key=people.get)
        known = probe.identity in people
        answers.append(order[0] if order else None)
        limited.append(order[0] if order and people[order[0]] < 0.6 else None)
        ranks.append(order.index(probe.identity) + 1 if known else len(split.names) + 1)
        if known:
            own_distances.append(people[probe.identity])
    return answers, limited, ranks, own_distances


# Photo 5 has no face clean, and photos 12 to 15 none any more.
@pytest.mark.parametrize(
    "exposure, leaked, hidden, not_found",
    [
        (scores.Exposure(), [], [], 5),
        (scores.Exposure(leak=0.25), [3, 7, 11, 15], [], 4),
        (scores.Exposure(mix=scores.Mix(4)), [], [], 5),
        (scores.Exposure(mix=scores.Mix(1)), [], [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15], 1),
        (scores.Exposure(mix=scores.Mix(2, 1)), [3, 7, 11, 15], [2, 6, 10, 14], 3),
        (
            scores.Exposure(mix=scores.Mix(0, 1)),
            [3, 7, 11, 15],
            [i for i in range(16) if i % 4 < 3],
            0,
        ),
    ],
)
def test_scores_by_brute_force(clean, cloaked, exposure, leaked, hidden, not_found):
    rows = {row["tracker"]: row for row in scores.score(clean, cloaked, exposure=exposure)}
    assert tuple(rows) == trackers.KINDS
    answers, limited, ranks, own = _brute_force(clean, cloaked, leaked, hidden)
    truth = [probe.identity for probe in clean.split.probes]
    for kind, given in (("nearest", answers), ("nearest_threshold", limited)):
        missed = np.array([a != t for a, t in zip(given, truth, strict=True)], float)
        assert rows[kind]["protection"] == missed.mean()
        assert (rows[kind]["low"], rows[kind]["high"]) == intervals.grouped_interval(missed, truth)
        assert rows[kind]["people"] == 4 and rows[kind]["probes"] == 8
    assert 0 < rows["nearest"]["protection"] < rows["nearest_threshold"]["protection"] <= 1
    nearest = rows["nearest"]
    assert nearest["rank_median"] == np.median(ranks)
    assert nearest["rank_1"] == np.mean(np.array(ranks) <= 1)
    assert nearest["rank_5"] == np.mean(np.array(ranks) <= 5)
    np.testing.assert_allclose(nearest["own_distance"][2], np.median(own), rtol=1e-5)
    assert nearest["leaked"] == len(leaked)
    assert nearest["not_found"] == not_found
    assert nearest["enrolled"] + nearest["not_found"] == 16 - len(hidden)


def test_mixes_take_the_first_photos_cloaked_and_the_last_ones_clean():
    people_of = np.array([7, 7, 7, 2, 2, 2, 2, 2])
    has, leaked = scores.mixed_photos(people_of, scores.Mix(2, 2))
    assert np.flatnonzero(leaked).tolist() == [1, 2, 6, 7]
    assert np.flatnonzero(has).tolist() == [0, 1, 2, 3, 4, 6, 7]
    has, leaked = scores.mixed_photos(people_of, scores.Mix(20))
    assert has.all() and not leaked.any()
    has, leaked = scores.mixed_photos(people_of, scores.Mix(0, 9))
    assert has.all() and leaked.all()


def test_mixes_are_read_and_written():
    assert scores.parse_mix("10") == scores.Mix(10, 0) == scores.parse_mix("10+0")
    assert str(scores.parse_mix("3+12")) == "3+12"
    for text in ("", "+", "0", "0+0", "3+", "+3", "-1", "1.5", "1+2+3", "a"):
        with pytest.raises(ValueError, match="mixes must"):
            scores.parse_mix(text)


def test_the_head_learns_from_the_photos_that_the_tracker_has(clean, cloaked):
    # The last person's published photos have no face, their clean one has.
    rows = [
        scores.score(clean, cloaked, exposure=scores.Exposure(mix=scores.Mix(*m)))
        for m in ((4, 0), (3, 1))
    ]
    missed = [
        row["protection"] for found in rows for row in found if row["tracker"] == "linear_head"
    ]
    assert missed[0] > missed[1]


def test_clean_photos_are_told_apart_and_leaks_of_all_are_clean(clean, cloaked):
    plain = scores.score(clean, clean.published)
    # One probe of eight has no face; five dimensions are few for ten people.
    assert all(row["protection"] <= 0.4 for row in plain if row["tracker"] != "nearest_threshold")
    leaked = scores.score(clean, cloaked, exposure=scores.Exposure(leak=1.0))
    for one, other in zip(plain, leaked, strict=True):
        assert {**one, "leaked": 16} == {**other, "leaked": 16}


def test_top_matches_are_those_of_the_nearest_tracker(clean, cloaked):
    found = scores.top_matches(clean, cloaked)
    answers, limited, ranks, _ = _brute_force(clean, cloaked, [])
    seen = [i for i in range(8) if clean.probes.found[i]]
    assert [row["identity"] for row in found] == [answers[i] for i in seen]
    assert [row["matched"] for row in found] == [int(limited[i] is not None) for i in seen]
    assert [row["person_rank"] for row in found] == [ranks[i] for i in seen]
    assert set(found[0]) == set(table.MATCH_COLUMNS)
    assert all(row["image"].startswith(row["identity"]) for row in found)


def test_pictures_are_drawn_of_transfer_cells(clean, cloaked, tmp_path):
    cells = [CloakCell("none"), CloakCell("noise", (), 0.007)]
    cells += [
        CloakCell("fawkes", names, budget)
        for names in (("dlib",), ("facenet_casia", "mobilefacenet"), ("dlib", "mobilefacenet"))
        for budget in (0.004, 0.007, 0.012)
    ]
    shown = plots.shown_cells(cells, ["dlib", "facenet_casia"])
    assert shown["dlib"] == CloakCell("fawkes", ("facenet_casia", "mobilefacenet"), 0.007)
    assert shown["facenet_casia"] == CloakCell("fawkes", ("dlib", "mobilefacenet"), 0.007)
    assert plots.shown_cells(cells[:2], ["dlib"])["dlib"] == cells[1]
    # A tracker of another alignment is of the same network.
    assert plots.shown_cells(cells, ["dlib@yunet"])["dlib@yunet"] == shown["dlib"]
    setup = table.Setup(clean.split, None, {"dlib": clean})
    plots.draw(setup, {"dlib": (shown["dlib"], {"dlib": cloaked})}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"embeddings.png", "distances.png"}


def test_cells_of_which_nothing_is_seen_are_not_drawn(tmp_path):
    row = {
        **{"tracker": "nearest", "countermeasure": "none", "leak": 0.0, "extractor": "dlib"},
        **{"method": "others", "surrogates": "", "transfer": None},
        **{"protection": 0.5, "low": 0.4, "high": 0.6},
    }
    rows = [
        row | {"budget": 0.004, "mean_dssim": None},
        row | {"budget": 0.007, "mean_dssim": 0.006},
        row | {"budget": 0.012, "mean_dssim": 0.011},
        row | {"budget": None, "method": "none", "mean_dssim": None, "protection": 0.0, "low": 0.0},
    ]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots.figures, "save", lambda figure, path: drawn.append(figure))
        plots.plot_budgets(tmp_path / "x.png", rows)
    (line,) = (box.lines[0] for box in drawn[0].axes[0].containers)
    np.testing.assert_array_equal(line.get_xdata(), [0.006, 0.011])


def test_photos_without_a_face_have_no_embedding(tmp_path, monkeypatch):
    monkeypatch.setattr(detect, "detect_faces", lambda *args, **kwargs: detect.no_faces())
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    recognizer = pipeline.Recognizer({}, detect.DetectorOptions(), {"dlib": _DLIB}, {"dlib": {}})
    found = embeddings.embed_photos(recognizer, [tmp_path / "0.png"], tmp_path)["dlib"]
    assert not found.found.any() and found.vectors.shape == (1, 128)


def test_gray_photos_that_others_colored_stay_colored(tmp_path, monkeypatch):
    gray = np.random.default_rng(0).integers(0, 256, (64, 64, 1), np.uint8).repeat(3, axis=2)
    colored = gray.copy()
    colored[20:40, 20:40, 0] ^= 16
    (tmp_path / "given" / "p").mkdir(parents=True)
    (tmp_path / "p").mkdir()
    Image.fromarray(gray[..., 0]).save(tmp_path / "p" / "0.png")
    Image.fromarray(colored).save(tmp_path / "given" / "p" / "0_cloaked.png")
    points = np.array([[25, 25], [25, 40], [32, 32], [40, 26], [40, 39]], np.float32)
    box = np.array([[15, 15, 50, 50]], np.float32)
    faces = detect.Faces(box, np.ones(1, np.float32), points[None])
    monkeypatch.setattr(detect, "detect_faces", lambda *args, **kwargs: faces)
    sample = identities.Sample("p/0.png", "p", tmp_path / "p" / "0.png")
    folder = tmp_path / "given"
    fn = published.given_fn(folder, identities.list_copies(folder))
    (path,), (record,) = published.write_photos(tmp_path / "cell", [sample], {}, fn)
    assert record["problem"] is None
    np.testing.assert_array_equal(np.asarray(Image.open(path)), colored)


def test_copies_are_those_of_the_photo_of_that_suffix(tmp_path):
    """Names as `experiments.cloak` gives them to photos that differ in their suffix alone."""
    (tmp_path / "p").mkdir()
    for number, name in enumerate(("a_cloaked.png", "a_png_cloaked.png", "b.jpg.png", "c.png")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "p" / name)
    copies = identities.list_copies(tmp_path)
    names = {"a.jpg": "a_cloaked", "a.png": "a_png_cloaked", "b.jpg": "b.jpg", "c.webp": "c"}
    for original, copy in names.items():
        assert copies.of(f"deep/p/{original}").path.stem == copy
    assert copies.of("p/d.jpg") is None and copies.of("q/a.jpg") is None


def test_principal_components_against_the_covariance():
    vectors = np.random.default_rng(0).normal(size=(40, 6)) * [5, 3, 1, 1, 1, 1]
    found = plots.principal_components(vectors)(vectors)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(np.cov(unit.T))[::-1]
    np.testing.assert_allclose(np.var(found, axis=0, ddof=1), values[:2], rtol=1e-9)


def test_sets_of_surrogates_and_cells():
    trackers_ = ["dlib", "facenet_casia", "out/robust", "mobilefacenet"]
    sets = cells.surrogate_sets(["leave_one_out", "all", "dlib+out/robust"], trackers_)
    assert sets == (
        ("facenet_casia", "mobilefacenet"),
        ("dlib", "mobilefacenet"),
        ("dlib", "facenet_casia"),
        ("dlib", "facenet_casia", "mobilefacenet"),
        ("dlib", "out/robust"),
    )
    # A judge is no surrogate unless it is named.
    judged = ["dlib", "mobilefacenet_192", "sface"]
    assert cells.surrogate_sets(["leave_one_out", "all", "mobilefacenet_192"], judged) == (
        ("sface",),
        ("dlib",),
        ("dlib", "sface"),
        ("mobilefacenet_192",),
    )
    # One set under two names is one set.
    assert len(cells.surrogate_sets(["all", "openface+dlib"], ["dlib", "openface"])) == 1
    for wrong in (["dlib+dlib"], ["dlib+"], [""]):
        with pytest.raises(ValueError, match="each once"):
            cells.surrogate_sets(wrong, trackers_)
    with pytest.raises(ValueError, match="two trackers"):
        cells.surrogate_sets(["leave_one_out"], ["dlib"])
    found = cells.all_cells(["fawkes", "none", "noise"], sets[3:], [0.004, 0.012])
    assert [cell.name for cell in found] == [
        "none",
        "noise-0.004",
        "noise-0.012",
        "fawkes-dlib+facenet_casia+mobilefacenet-0.004",
        "fawkes-dlib+facenet_casia+mobilefacenet-0.012",
        "fawkes-dlib+robust-0.004",
        "fawkes-dlib+robust-0.012",
    ]


def test_a_method_may_have_a_budget_of_its_own():
    methods = ["lowkey@0.007", "none", "lowkey@0.007"]
    found = cells.all_cells(methods, [("dlib",)], [0.004, 0.012])
    assert [cell.name for cell in found] == ["none", "lowkey-dlib-0.007"]
    (mode,) = cells.all_cells(["lowkey@high"], [("dlib",)], [0.004])
    assert mode.budget == "high"
    for wrong in ("lowkey@0", "lowkey@most", "magic"):
        with pytest.raises(ValueError, match=r"budget|no method"):
            cells.all_cells([wrong], [("dlib",)], [0.004])


def test_half_size_averages_and_the_others_are_the_conversions():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 14, 3)).astype(np.uint8)
    half = embeddings.convert("half_size", pixels)
    expected = pixels.reshape(5, 2, 7, 2, 3).mean(axis=(1, 3))
    # Pillow rounds after either axis.
    assert half.shape == (5, 7, 3) and np.abs(half - expected).max() <= 1
    gray = embeddings.convert("grayscale", pixels)
    assert np.ptp(gray, axis=-1).max() == 0
    np.testing.assert_array_equal(embeddings.convert("none", pixels), pixels)
    with pytest.raises(ValueError, match="no countermeasure 'sepia'"):
        embeddings.convert("sepia", pixels)


def _face(centre=(60, 60), size=56.0):
    points = [(-0.2, -0.2), (-0.2, 0.2), (0.02, 0.0), (0.2, -0.17), (0.2, 0.17)]
    landmarks = np.array([[centre[0] + a * size, centre[1] + b * size] for a, b in points])
    box = [centre[0] - size / 2, centre[1] - size / 2, centre[0] + size / 2, centre[1] + size / 2]
    return detect.Faces(np.array([box], np.float32), np.ones(1, np.float32), landmarks[None])


def _photo(**fields):
    pixels = np.asarray(skimage.data.astronaut()[40:180, 150:290])
    return photo_cloaks.PhotoFaces("photo", pixels, False, None, _face())._replace(**fields)


@pytest.mark.parametrize("limit", [0.004, 0.012])
def test_noise_is_as_much_as_the_budget_allows(limit):
    photo = _photo()
    pixels, (face,) = noise.add_noise(photo, [_DLIB], limits=budget.Budget(limit))
    measured = budget.face_dssim(photo.pixels, pixels, face.region, face.box)
    assert 0.99 * limit <= measured <= limit
    plan = photo_cloaks._plan([_DLIB], photo, 0, 0, None, fawkes.FawkesConfig())
    np.testing.assert_array_equal(face.region, plan.region)  # Where a cloak is measured.
    y0, x0, y1, x1 = face.region
    changed = np.any(pixels != photo.pixels, axis=-1)
    assert changed[y0:y1, x0:x1].mean() > 0.8
    changed[y0:y1, x0:x1] = False
    assert not changed.any()
    again, _ = noise.add_noise(photo, [_DLIB], limits=budget.Budget(limit))
    np.testing.assert_array_equal(pixels, again)
    other, _ = noise.add_noise(photo._replace(name="other"), [_DLIB], limits=budget.Budget(limit))
    assert np.any(other != pixels)


def test_noise_keeps_gray_photos_gray_and_transparent_pixels():
    gray = np.repeat(_photo().pixels[:, :, :1], 3, axis=2)
    visible = np.ones(gray.shape[:2], bool)
    visible[:, 60:] = False
    photo = _photo(pixels=gray, gray=True, visible=visible)
    pixels, _ = noise.add_noise(photo, [_DLIB], limits=budget.Budget(0.007))
    assert np.ptp(pixels, axis=-1).max() == 0 and np.any(pixels != gray)
    np.testing.assert_array_equal(pixels[:, 60:], gray[:, 60:])


class _Package:
    """Stands in for PyPI fawkes: adds a pattern to every chip."""

    def __init__(self):
        self.calls = []

    def call(self, command, *, chips, output, **options):
        self.calls.append((command, options))
        images = np.load(chips).astype(np.int32)
        rows = np.arange(150)[None, :, None, None]
        images = images + np.round(20 * np.sin(rows / 8)).astype(np.int32)
        np.save(output, np.clip(images, 0, 255).astype(np.uint8))


def test_the_package_s_change_comes_back_through_the_warp(tmp_path):
    photo = _photo(pixels=np.full((140, 140, 3), 128, np.uint8))
    package = _Package()
    ((pixels, (face,)),) = fawkes_package.cloak(
        package, tmp_path, [photo], _DLIB, budget.Budget(0.007), num_steps=9, seed=3
    )
    ((command, options),) = package.calls
    assert command == "cloak" and options["steps"] == 9 and options["dssim"] == 0.007
    dssim = budget.face_dssim(photo.pixels, pixels, face.region, face.box)
    assert 0.98 * 0.007 <= dssim <= 0.007
    # Seen through the chip again it is the pattern, but for a factor, the grid and its rounding.
    transform = align.chip_transform(_DLIB, photo.faces.landmarks[0])
    change = jnp.asarray(pixels.astype(np.float32) - 128)
    seen = jax.jit(align.warp, static_argnames="size")(change, jnp.asarray(transform), size=150)
    seen = np.asarray(seen)[10:140, 10:140, 0]
    pattern = np.sin(np.arange(150) / 8)[10:140]
    factor = seen.mean(axis=1) @ pattern / (pattern @ pattern)
    assert factor > 1
    np.testing.assert_allclose(seen / factor, np.tile(pattern[:, None], 130), atol=0.25)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Seven photos of 64 px; the detector finds a face unless a photo is black."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(7):
        path = tmp_path / "in" / "p" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8) * (number != 4)
        Image.fromarray(pixels).save(path)
        samples.append(identities.Sample(f"p/{number}.png", "p", path))
    sizes = {2: 16.0}

    def find(variables, pixels, *, options=None):
        is_small = np.array_equal(pixels, np.asarray(Image.open(samples[2].path)))
        return (
            _face((32, 32), sizes[2] if is_small else 30.0) if pixels.any() else detect.no_faces()
        )

    monkeypatch.setattr(detect, "detect_faces", find)
    return tmp_path, samples


def _protect(calls, fail_at=None):
    def protect(faces):
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append([face.name for face in faces])
        # The bytes depend on the group, as those of a batch may.
        values = [(face.pixels // 2 + len(faces)).astype(np.uint8) for face in faces]
        region = np.array([0, 0, 64, 64])
        return [
            (v, [photo_cloaks.CloakedFace(region, region, {}, budget.Budget(0.9))]) for v in values
        ]

    return protect


def _bytes(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_killed_run_goes_on_group_by_group_with_the_same_bytes(folder):
    root, samples = folder
    straight, cut, calls = [], [], []

    def write(name, protect_fn):
        return published.write_photos(root / name, samples, {}, protect_fn, group=3)

    paths, records = write("straight", _protect(straight))
    assert straight == [["p/0.png", "p/1.png"], ["p/3.png", "p/5.png"], ["p/6.png"]]
    with pytest.raises(KeyboardInterrupt):
        write("cut", _protect(cut, fail_at=1))
    (root / "cut/photos/p/1.png.png").unlink()
    written = write("cut", _protect(calls))
    # The first group lost a photo and is done as a whole again.
    assert cut + calls == [straight[0], *straight]
    assert _bytes(root / "cut") == _bytes(root / "straight")
    assert [path.name for path in paths] == [f"{i}.png.png" for i in range(7)]
    problems = [record["problem"] for record in records]
    assert problems[4] == "no face was found" and "too small" in problems[2]
    assert [p is None for p in problems] == [True, True, False, True, False, True, True]
    assert records == written[1] and records[0]["visibility"]["linf"] > 0
    assert records[0]["visibility"]["lpips"] > 0
    for number in (2, 4):  # Written as they are.
        np.testing.assert_array_equal(
            np.asarray(Image.open(paths[number])), np.asarray(Image.open(samples[number].path))
        )
    again = []
    write("straight", _protect(again))
    assert not again


def test_the_tint_of_irises_is_measured_apart():
    original = np.full((60, 80, 3), 128, np.uint8)
    landmarks = np.array([[30.0, 20.0], [30.0, 60.0], [40, 40], [50, 30], [50, 50]])
    region = np.array([5, 0, 60, 80])
    reddish = original.copy()
    reddish[20:40, 10:30, 0] += 10  # about one eye of the two
    found = published._iris_tint(original, reddish, landmarks, region)
    # Cb and Cr of 10 levels of red; half of the irises have it.
    assert found == pytest.approx(10 * np.hypot(0.168736, 0.5) / 2, rel=0.02)
    elsewhere = original.copy()
    elsewhere[45:, :, 0] += 10
    assert published._iris_tint(original, elsewhere, landmarks, region) < 0.01
