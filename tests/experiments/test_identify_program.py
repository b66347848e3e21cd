"""The identify and verify programs from the outside, with a stand-in for detector and extractor."""

import shutil

import numpy as np
import programs
import pytest

from afr_jax.evaluation.recognition import identify, verify
from afr_jax.recognition import embed, pipeline


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Eight people of six photos in colors of their own, and ten strangers."""
    root = tmp_path_factory.mktemp("people")
    rng = np.random.default_rng(0)
    for person in range(8):
        for number in range(6):
            color = np.array([20 + 25 * person, 100, 50]) + rng.integers(-2, 3, 3)
            programs.save_photo(root / f"p{person}" / f"{number}.png", tuple(int(c) for c in color))
    for stranger in range(10):
        programs.save_photo(root / f"s{stranger}" / "0.png", (20 + 20 * stranger, 200, 200))
    # A stranger who looks like person 3, and a probe or enrolled photo without a face.
    programs.save_photo(root / "double" / "0.png", (95, 100, 50))
    programs.save_photo(root / "p7" / "5.png", (0, 0, 0))
    return root


def test_identification_of_well_separated_people(people, tmp_path, monkeypatch):
    programs.stand_in(monkeypatch)
    (result, complete), toy, no_strangers = (
        programs.call(identify.IdentifyConfig, identify.run, f"--data={people}", *flags)
        for flags in (
            [f"--workdir={tmp_path / 'out'}"],
            [f"--workdir={tmp_path / 'toy'}", "--toy"],
            ["--min_photos=7", f"--workdir={tmp_path / 'none'}"],
        )
    )
    assert not complete
    assert result["not_handled"] == [{"image": "p7/5.png", "reason": "no face was found"}]
    assert (result["people_enrolled"], result["photos_enrolled"]) == (8, 24)
    assert (result["probes"], result["strangers"]) == (24, 11)
    (row,) = result["rows"]
    # Everyone is found but for the black photo, if that is among the probes.
    assert row["rank_1"] in (1.0, pytest.approx(23 / 24))
    # The double comes as near as p3's own photos, so no threshold lets p3 in at 1 %.
    assert row["dir_at_fpir_0.01"] < row["rank_1"]
    assert row["rank_1_interval"][0] <= row["rank_1"] <= row["rank_1_interval"][1]
    assert (tmp_path / "out" / "identification.png").stat().st_size > 5000
    assert toy[0]["people_enrolled"] == 4 and toy[0]["strangers"] == 4
    assert "both are needed" in no_strangers


def test_verification_in_every_metric(people, tmp_path, monkeypatch):
    pairs = [
        (f"p{person}/{number}.png", f"p{person + step}/{number + 1}.png", 1 - step)
        for person in range(7)
        for number in range(3)
        for step in (0, 1)
    ]
    table = tmp_path / "pairs.csv"
    rows = ["image_a,image_b,same", *(",".join(map(str, pair)) for pair in pairs)]
    table.write_text("\n".join(rows))
    common = [f"--pairs={table}", f"--images={people}"]
    programs.stand_in(monkeypatch)
    *answers, one, both = [
        programs.call(verify.VerifyConfig, verify.run, *flags)
        for flags in (
            [*common, f"--workdir={tmp_path / 'a'}"],
            [*common, f"--workdir={tmp_path / 'b'}", "--metric=cosine", "--threshold=0.01"],
            [f"--pair={people / 'p0/0.png'},{people / 'p0/1.png'}", "--threshold=15"],
            [f"--pair={people / 'p0/0.png'},{people / 'p7/5.png'}"],
            [f"--pair={people / 'p0/0.png'}"],
            [*common, "--pair=a,b"],
        )
    ]
    (plain, complete), (cosine, _), (pair, _), (no_face, no_face_complete) = answers
    assert complete and plain["accuracy"] == plain["auc"] == 1.0 and plain["eer"] == 0.0
    assert plain["similarity_metric"] == "euclidean" and 5 < plain["best_threshold"] < 25 * 7
    assert cosine["similarity_metric"] == "cosine" and cosine["best_threshold"] < 0.1
    assert cosine["threshold"] == 0.01
    keys = {"verified", "distance", "threshold", "model", "similarity_metric", "facial_areas"}
    assert keys | {"time"} <= set(pair) and pair["model"] == "dlib"
    assert pair["verified"] is (pair["distance"] < 15.0)
    assert pair["facial_areas"] == {"img1": [1, 2, 9, 8], "img2": [1, 2, 9, 8]}
    assert no_face["verified"] is None and "no face was found" in no_face["reason"]
    assert not no_face_complete
    assert "two photos" in one and "one of --pair and --pairs" in both


def test_pairs_of_files_elsewhere_are_not_read_and_runs_go_on(people, tmp_path, monkeypatch):
    root = tmp_path / "photos"
    shutil.copytree(people, root)
    programs.save_photo(tmp_path / "secret.png", (20, 100, 50))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    outside = ["link.png", "../secret.png", str(tmp_path / "secret.png")]
    pairs = [(f"p{person}/0.png", f"p{person}/1.png", 1) for person in range(7)]
    pairs += [(f"p{person}/0.png", f"p{person + 1}/1.png", 0) for person in range(6)] * 2
    pairs += [("p0/0.png", name, 1) for name in outside]
    rows = ["image_a,image_b,same", *(",".join(map(str, pair)) for pair in pairs)]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    programs.stand_in(monkeypatch)
    monkeypatch.setattr(pipeline, "_GROUP", 4)
    flags = [f"--pairs={tmp_path / 'pairs.csv'}", f"--images={root}"]
    flags.append(f"--workdir={tmp_path / 'out'}")
    embed_faces, calls = embed.embed_faces, []

    def embed_some(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed_faces(*arguments)

    monkeypatch.setattr(embed, "embed_faces", embed_some)
    with pytest.raises(KeyboardInterrupt):
        programs.call(verify.VerifyConfig, verify.run, *flags)
    result, complete = programs.call(verify.VerifyConfig, verify.run, *flags)
    # Seventeen photos in five groups, two of which were done before.
    assert len(calls) == 3 + 3
    assert not complete and {item["image"] for item in result["not_handled"]} == set(outside)
    assert all("lies outside" in item["reason"] for item in result["not_handled"])
    again = programs.call(verify.VerifyConfig, verify.run, *flags)
    assert again == (result, False) and len(calls) == 6


def test_identification_goes_on(people, tmp_path, monkeypatch):
    programs.stand_in(monkeypatch)
    monkeypatch.setattr(pipeline, "_GROUP", 20)
    flags = [f"--data={people}", f"--workdir={tmp_path / 'out'}"]
    first, _ = programs.call(identify.IdentifyConfig, identify.run, *flags)
    monkeypatch.setattr(embed, "embed_faces", None)
    again, _ = programs.call(identify.IdentifyConfig, identify.run, *flags)
    assert again["rows"] == first["rows"]
