"""The evaluation of cloaks from the outside: toy extractors and a stand-in for the detector."""

import contextlib
import csv
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from PIL import Image

from afr_jax.core import program
from afr_jax.evaluation.cloaking import study
from afr_jax.methods.cloaking import noise, photo_cloaks
from afr_jax.models.extractors import registry
from afr_jax.recognition import detect, embed
from afr_jax.training import trained

_WIDER = ((9.0, 10.0), (9.0, 22.0), (16.0, 16.0), (22.0, 11.0), (22.0, 21.0))
_TEMPLATE = ((7.0, 7.5), (7.0, 16.5), (12.0, 12.0), (16.5, 8.0), (16.5, 16.0))


class _Net(nn.Module):
    @nn.compact
    def __call__(self, chips):
        return nn.Dense(8, name="out")(chips[:, ::6, ::6].reshape(chips.shape[0], -1))


def _toy(name, seed):
    kernel = np.random.default_rng(seed).normal(size=(48, 8)).astype(np.float32)
    variables = {"params": {"out": {"kernel": kernel, "bias": np.zeros(8, np.float32)}}}
    limits = registry.Thresholds(None, 0.6, None)
    return registry.Extractor(
        name, _Net(), 24, _TEMPLATE, 1.0, 0.0, 8, True, limits, lambda: variables, "", ""
    )


def _detect_faces(variables, pixels, *, options=None):
    """Every photo's face is in its middle, but for black photos."""
    side = pixels.shape[0]
    points = np.array(_TEMPLATE) / 24 * 0.5 * side + side / 4
    box = np.array([[side / 4, side / 4, 3 * side / 4, 3 * side / 4]], np.float32)
    faces = detect.Faces(box, np.ones(1, np.float32), points[None].astype(np.float32))
    return faces if pixels.max() else detect.no_faces()


def _embed_faces(extractor, variables, faces):
    """A projection of the photo at 4 x 4 pixels."""
    size = extractor.embedding_size
    kernel = np.random.default_rng(len(extractor.name)).normal(size=(48, size))
    small = [Image.fromarray(pixels).resize((4, 4), Image.BOX) for pixels, _ in faces]
    flat = np.array([np.asarray(image, float).ravel() - 128 for image in small]).reshape(-1, 48)
    vectors = flat @ kernel
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class _Cloak:
    """Stands in for `cloak_photos`: noise that depends on the group and the options."""

    def __init__(self):
        self.calls, self.fail_at = [], None

    def __call__(self, key, surrogates, photos, *, config, detector):
        assert detector is not None  # Faces are judged as a tracker finds them.
        self.calls.append([extractor.name for extractor in surrogates.extractors])
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        return [
            noise.add_noise(
                photo,
                surrogates.extractors,
                limits=config.budget,
                seed=len(photos) + config.num_steps,
            )
            for photo in photos
        ]


@contextlib.contextmanager
def _stand_ins():
    """Yields a function of flags: what the program says, and the surrogates of its cloaks."""
    with pytest.MonkeyPatch.context() as patch:
        for seed, name in enumerate(("toy_a", "toy_b")):
            patch.setitem(registry.EXTRACTORS, name, _toy(name, seed))
        cloak = _Cloak()
        patch.setattr(detect, "detect_faces", _detect_faces)
        patch.setattr(embed, "embed_faces", _embed_faces)
        patch.setattr(photo_cloaks, "cloak_photos", cloak)

        def answer(*flags, fail_at=None):
            cloak.calls, cloak.fail_at = [], fail_at
            try:
                found = programs.call(study.FawkesEvaluationConfig, study.run, *flags)
            except KeyboardInterrupt:
                found = None
            return found, cloak.calls

        yield answer


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Seven people in patterns of their own; a photo without a face."""
    root = tmp_path_factory.mktemp("people")
    rng = np.random.default_rng(0)
    for person in range(7):
        pattern = rng.integers(40, 216, (12, 12, 3)).astype(np.float64)
        for number in range(6 if person < 4 else 2):
            pixels = np.kron(pattern, np.ones((8, 8, 1))) + rng.normal(0, 6, (96, 96, 3))
            path = root / f"p{person}" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.clip(pixels, 1, 255).astype(np.uint8)).save(path)
    Image.new("RGB", (96, 96)).save(root / "p6" / "0.png")
    return root


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    """A trained extractor, untrained."""
    folder = tmp_path_factory.mktemp("robust")
    card = trained.Card("resnet6", 32, 16, width=4, template=_WIDER, threshold=0.5)
    network = trained.make_network("resnet6", input_px=32, embedding_size=16, width=4)
    variables = network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    trained.write_extractor(folder, card, variables)
    return folder


_SMALL = (
    *("--people=2", "--cloaked_photos=3", "--probes=3", "--gallery_people=5", "--gallery_photos=2"),
    *("--countermeasures=none,half_size", "--leaks=0,0.5", "--num_steps=2"),
)
_MADE = ("cells/*/photos/**/*", "cells/*/matches.csv", "clean/*.npz", "table.csv", "*.json")


def _bytes(root):
    """What a run made, by name; figures and times aside."""
    paths = [path for pattern in _MADE for path in root.glob(pattern) if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def runs(people, trained_folder, tmp_path_factory):
    """A straight run; one that was interrupted and resumed; one that grew; and wrong ones."""
    root = tmp_path_factory.mktemp("runs")
    common = [f"--data={people}", *_SMALL, f"--trackers=toy_a,toy_b,{trained_folder}"]
    all_sets = "--surrogates=leave_one_out,all"

    def small(name, *flags, **options):
        return ask(*common, f"--workdir={root / name}", *flags, **options)

    last = [all_sets, "--budgets=0.007"]
    grown = ["--surrogates=toy_a", "--end_to_end=1", "--epochs=1", "--mixes=2+1,1"]
    steps = [grown[0], "--trackers=toy_a"]
    with _stand_ins() as ask:
        found = [
            small("straight", *last),
            small("straight", *last),
            small("cut", *last, fail_at=2),
            small("cut", *last),
            small("grown", *grown, "--trackers=toy_a", "--budgets=0.007"),
            small("grown", *grown, "--trackers=toy_a,toy_b", "--budgets=0.004,0.007"),
            small("steps", *steps, "--budgets=0.007,0.004", "--num_steps=5,2"),
            small("steps", *steps, "--budgets=0.007,0.012", "--num_steps=2,5"),
        ]
    return root, found


def test_the_table_has_a_row_for_everything(runs, people, trained_folder):
    root, ((result, complete), _) = runs[0] / "straight", runs[1][0]
    assert not complete
    assert result["not_handled"] == [{"image": "p6/0.png", "reason": "no face was found"}]
    assert result["people_enrolled"] == 7 and result["photos_enrolled"] == 16
    table = json.loads((root / "result.json").read_text())["table"]
    extractors = ("toy_a", "toy_b", trained_folder.name)
    cells = [("none", ""), ("noise", ""), ("fawkes", "toy_b"), ("fawkes", "toy_a")]
    cells.append(("fawkes", "toy_a+toy_b"))
    cases = [("none", 0), ("half_size", 0), ("none", 0.5)]
    kinds = ("nearest", "nearest_threshold", "knn_vote", "linear_head")
    keys = ("method", "surrogates", "countermeasure", "leak", "extractor", "tracker")
    assert [tuple(row[key] for key in keys) for row in table] == [
        (*cell, *case, extractor, kind)
        for cell in cells
        for case in cases
        for extractor in extractors
        for kind in kinds
    ]
    for row in table:
        assert 0 <= row["low"] <= row["protection"] <= row["high"] <= 1
        assert row["probes"] == 6 and row["enrolled"] == 6
        assert row["leaked"] == (3 if row["leak"] else 0)
        known = row["extractor"] in row["surrogates"].split("+")
        assert row["transfer"] == (not known if row["surrogates"] else None)
        if row["method"] == "none":
            assert row["mean_dssim"] is None
            if row["countermeasure"] == "none":
                assert row["own_distance"] == row["own_distance_clean"]
        else:
            assert 0.9 * 0.007 <= row["mean_dssim"] <= 0.007
    with open(root / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["protection"]) for line in lines] == pytest.approx(
        [row["protection"] for row in table], abs=1e-5
    )
    assert all((root / f"{name}.png").exists() for name in ("budgets", "embeddings", "distances"))


def test_matches_are_listed_as_deepface_does(runs):
    with open(runs[0] / "straight" / "cells" / "none" / "matches.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 6
    for row in rows:
        assert row["rank"] == "1" and row["matched"] == str(
            int(float(row["distance"]) < float(row["threshold"]))
        )
        assert (row["identity"] == row["person"]) == (row["person_rank"] == "1")
        assert row["image"].startswith(f"{row['identity']}/")
    assert {row["extractor"] for row in rows} >= {"toy_a", "toy_b"}


def test_a_resumed_run_is_the_same_and_makes_nothing_twice(runs):
    root, found = runs
    (straight, calls), (again, no_calls), (cut, _), (resumed, rest) = found[:4]
    assert calls == [["toy_b"], ["toy_a"], ["toy_a", "toy_b"]] and no_calls == []
    # Somebody may commit meanwhile.
    for result, _ in (again, straight):
        result["commit"] = None
    assert again == straight and cut is None
    # The cell that was interrupted, and those after it.
    assert rest == calls[1:]
    assert resumed[0]["nearest"] == straight[0]["nearest"]
    one, other = _bytes(root / "straight"), _bytes(root / "cut")
    for files in (one, other):
        del files["result.json"]
    assert one == other and sum(name.endswith(".png") for name in one) == 4 * 6


def test_a_run_may_grow(runs):
    root, found = runs
    (first, calls), (second, more) = found[4:6]
    assert calls == [["toy_a"]] and more == calls
    table = json.loads((root / "grown" / "result.json").read_text())["table"]
    assert {row["budget"] for row in table} == {None, 0.004, 0.007}
    mixed = [row for row in table if row["mix"]]
    # Two mixes of the five cells, for two extractors and four trackers.
    assert {row["mix"] for row in mixed} == {"1+0", "2+1"} and len(mixed) == 2 * 5 * 2 * 4
    for row in mixed:
        assert row["enrolled"] == 2 * (1 if row["mix"] == "1+0" else 3)
        assert row["leaked"] == 2 * (row["mix"] == "2+1") and row["leak"] == 0
    assert (root / "grown" / "mixes.png").exists()
    trained = [row for row in table if row["tracker"] == "end_to_end"]
    # Two extractors; none, and two methods of two budgets.
    assert len(trained) == 10 and all(row["people"] == 1 for row in trained)
    assert all(row["probes"] == 3 for row in trained)
    kept = [
        row
        for row in second[0]["nearest"]
        if row["budget"] != 0.004 and row["extractor"] == "toy_a"
    ]
    assert kept == first[0]["nearest"]


def test_every_budget_may_have_its_own_steps(runs):
    """The run that grew took 2 steps for each. Budgets cannot be added, as steps might change."""
    root, found = runs
    assert "budgets" in found[-1][0]
    for budget, is_same in (("0.004", True), ("0.007", False)):
        folders = [root / name / f"cells/fawkes-toy_a-{budget}" for name in ("grown", "steps")]
        photos = [[p.read_bytes() for p in sorted(f.rglob("*.png"))] for f in folders]
        assert len(photos[0]) == 6 and (photos[0] == photos[1]) == is_same
    config = json.loads((root / "steps" / "config.json").read_text())
    assert (config["budgets"], config["num_steps"]) == ([0.004, 0.007], [2, 5])


def test_wrong_usage_is_named(people, trained_folder, tmp_path):
    def small(*flags):
        return [f"--data={people}", *_SMALL, "--trackers=toy_a,toy_b", *flags]

    namesake = tmp_path / trained_folder.name
    namesake.symlink_to(trained_folder, target_is_directory=True)
    out = f"--workdir={tmp_path / 'out'}"
    others = tmp_path / "others.json"
    others.write_text(json.dumps({"protected": 3}))
    lines = {
        "5 people to protect|needed are 9 such people": small("--people=9", out),
        "no extractor 'vgg'": small("--trackers=toy_a,vgg", f"--workdir={tmp_path / 'b'}"),
        "does not exist": small(f"--data={tmp_path / 'nowhere'}", f"--workdir={tmp_path / 'c'}"),
        "--data has an empty value": small("--data="),
        "no method 'magic'; there are none, noise": small("--methods=none,magic"),
        "countermeasures is 'sepia', must be one of none": small("--countermeasures=sepia"),
        "--leaks is 2.0, must be at most 1": small("--leaks=0,2"),
        "mixes=2+2: more than cloaked_photos=3": small("--mixes=1,2+2"),
        "mixes must be like 10 or 10+5": small("--mixes=many"),
        "--budgets must be of low, mid, high, or lie in (0, 1], not 0": small("--budgets=0"),
        "or lie in (0, 1], not much": small("--budgets=much"),
        "--num_steps=1,2: a number, or one for each of 3": small("--num_steps=1,2"),
        "--num_steps is -1, must be at least 0": small("--num_steps=-1"),
        "no number for a budget of 0.01": small(
            "--budgets=0.004,0.007", "--num_steps=1,2", "--methods=lowkey@0.01"
        ),
        "each once": small("--surrogates=toy_a+toy_a"),
        "needs two trackers": small("--trackers=toy_a"),
        "needs --reference_python": small("--methods=fawkes_pypi"),
        "must have one name": small(f"--trackers=toy_a,toy_b,{trained_folder},{namesake}"),
        "must be NAME=FOLDER": small("--cloaked=nowhere"),
        "there is another method called x-low": small(f"--cloaked=x-low={people},x@low={people}"),
        "'noise' is a method that is made here": small("--cloaked=noise=there"),
        "'a@0.004' is there twice": small("--cloaked=a@0.004=x,a@0.004=y"),
        "No such file": small(f"--drawn_before={tmp_path / 'none.json'}"),
        "others.json is no result of an evaluation": small(f"--drawn_before={others}"),
        "must be NAME=FILE": small("--weights=x.npz", f"--workdir={tmp_path / 'd'}"),
    }
    with _stand_ins() as ask:
        for expected, line in lines.items():
            message, _ = ask(*line)
            assert isinstance(message, str) and any(e in message for e in expected.split("|")), (
                message
            )


def test_photos_of_another_program_are_taken_as_they_are(runs, people, tmp_path):
    made = runs[0] / "straight" / "cells" / "fawkes-toy_a-0.007"
    given = tmp_path / "given"
    names = sorted(path.relative_to(made / "photos") for path in made.glob("photos/p*/*.png"))
    assert len(names) == 6
    for name in names[1:]:
        # The last but one keeps the name that the cell gave it.
        stem = name.name.removesuffix(".png").removesuffix(".png")
        own = name.name if name == names[4] else f"{stem}_cloaked.png"
        place = given / name.parent / own
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((made / "photos" / name).read_bytes())
    # Of two copies the one that says so counts; photos of nobody asked about do not matter.
    (given / names[1].parent / names[1].name.replace(".png.png", ".png")).write_bytes(
        (people / "p6" / "1.png").read_bytes()
    )
    Image.new("RGB", (20, 30)).save(given / names[2].parent / "9.png")
    last = given / names[5].parent / f"{names[5].name.split('.')[0]}_cloaked.png"
    Image.new("RGB", (20, 30), (9, 9, 9)).save(last)
    (last.parent / "broken.png").write_bytes(b"no photo")
    flags = [f"--data={people}", *_SMALL, "--trackers=toy_a,toy_b", "--methods=none"]
    flags += [f"--workdir={tmp_path / 'out'}", "--budgets=0.007"]
    with _stand_ins() as ask:
        (_, complete), calls = ask(*flags, f"--cloaked=others@0.007={given}")
    assert not complete and not calls
    cell = tmp_path / "out" / "cells" / "others-0.007"
    for name in names[1:5]:
        assert np.array_equal(
            np.asarray(Image.open(cell / "photos" / name)),
            np.asarray(Image.open(made / "photos" / name)),
        )
        ours, theirs = (
            json.loads((root / "photos" / name).with_suffix(".json").read_text())
            for root in (made, cell)
        )
        assert theirs["box"] == ours["box"]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    reasons = [problem["reason"] for problem in result["not_handled"]]
    assert any("is not in" in reason for reason in reasons)
    assert any("has 20 x 30 pixels" in reason for reason in reasons)
    named = [problem["image"] for problem in result["not_handled"]]
    assert any(name.endswith("broken.png") for name in named)
    rows = [row for row in result["table"] if row["method"] == "others"]
    assert rows and all(row["budget"] == 0.007 and row["transfer"] is None for row in rows)
    assert all(row["ssimulacra2"] < 100 for row in rows)
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 0
    # What was taken is kept, and other files under its name are refused.
    late = given / names[0].parent / f"{names[0].name.split('.')[0]}_cloaked.png"
    late.write_bytes((made / "photos" / names[0]).read_bytes())
    with _stand_ins() as ask:
        message, _ = ask(*flags, f"--cloaked=others@0.007={given}")
    assert "others-0.007 was made of other files (" in message


def test_people_of_earlier_runs_are_not_drawn_again(runs, people, tmp_path):
    before = runs[0] / "straight" / "result.json"
    earlier = json.loads(before.read_text())["protected"]
    with _stand_ins() as ask:
        ask(
            *(f"--data={people}", *_SMALL, "--trackers=toy_a", "--methods=none"),
            *(f"--drawn_before={before}", f"--workdir={tmp_path}"),
        )
    later = json.loads((tmp_path / "result.json").read_text())
    assert later["config"]["drawn_before"] == earlier
    assert not set(later["protected"]) & set(earlier)
    # Runs of before there was this option may go on.
    assert "drawn_before" not in json.loads((runs[0] / "straight" / "config.json").read_text())


def test_a_folder_of_the_same_name_is_not_taken_for_another(people, trained_folder, tmp_path):
    other = tmp_path / "elsewhere" / trained_folder.name
    network = trained.make_network("resnet6", input_px=32, embedding_size=16, width=4)
    variables = network.init(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))
    card = trained.Card("resnet6", 32, 16, width=4, template=_WIDER, threshold=0.5)
    trained.write_extractor(other, card, variables)
    flags = [f"--data={people}", *_SMALL, "--methods=none", f"--workdir={tmp_path / 'out'}"]
    with _stand_ins() as ask:
        ask(*flags, f"--trackers={trained_folder}")
        message, _ = ask(*flags, f"--trackers={other}")
    assert "was made with other weights of" in message


def test_toy_runs_on_a_fresh_machine(tmp_path):
    result, complete = programs.call(
        study.FawkesEvaluationConfig, study.run, "--toy", f"--workdir={tmp_path}"
    )
    assert complete
    assert [row["method"] for row in result["nearest"]] == ["none", "noise", "fawkes"]
    assert result["people_enrolled"] == 5 and not result["not_handled"]


def test_old_names_of_flags_hold_and_budgets_keep_their_steps():
    config = program.parse(
        study.FawkesEvaluationConfig,
        ["--peer_python=python3", "--budgets=0.012,0.004", "--num_steps=3,5"],
    )
    assert config.references.reference_python == "python3"
    assert [config.steps_of(budget) for budget in (0.004, 0.012)] == [5, 3]
