"""The cloak program from the outside: files in, statuses, files and records out."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import skimage.data
from PIL import Image, ImageCms, ImageOps

from afr_jax.core import ssim
from afr_jax.training import trained

_ROOT = pathlib.Path(__file__).parents[2]


def _portrait(side=256):
    """A real face, 40 to 90 pixels wide."""
    crop = Image.fromarray(skimage.data.astronaut()[0:300, 80:380])
    return crop.resize((side, side), Image.LANCZOS)


def _run(folder, *flags, output="out", check=None, kill_after=None):
    """Runs the program; returns the process and its result line."""
    command = [sys.executable, "-m", "experiments.cloak", f"--output_dir={folder / output}"]
    command += ["--num_steps=3", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "default"}
    process = subprocess.Popen(
        command,
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if kill_after is not None:
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=600)
    if check is not None:
        assert process.returncode == check, stderr
    lines = stdout.splitlines()
    return process, json.loads(lines[-1]) if lines else None, stderr


def _report(folder, output="out"):
    report = json.loads((folder / output / "report.json").read_text())
    return {record["image"]: record for record in report["images"]}, report


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one photo of each kind, cloaked once."""
    root = tmp_path_factory.mktemp("cloak")
    photos = root / "photos with spaces"
    (photos / "nested ünïcode").mkdir(parents=True)
    portrait = _portrait()
    portrait.save(photos / "a.jpg", quality=95)
    portrait.save(photos / "a.png", icc_profile=_srgb())
    portrait.convert("L").save(photos / "nested ünïcode" / "gray.png")
    rgba = portrait.convert("RGBA")
    alpha = np.full((256, 256), 255, np.uint8)
    alpha[:, 250:] = 0
    rgba.putalpha(Image.fromarray(alpha))
    rgba.save(photos / "alpha.png")
    two = Image.new("RGB", (512, 256))
    two.paste(portrait, (0, 0))
    two.paste(portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (256, 0))
    two.save(photos / "two.webp", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    portrait.rotate(90).save(photos / "turned.jpg", exif=exif.tobytes(), quality=95)
    Image.new("RGB", (64, 64), (90, 120, 200)).save(photos / "sky.bmp")
    (photos / "empty.jpg").touch()
    (photos / "notes.txt").write_text("no photo")
    data = (photos / "a.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(data[: len(data) // 2])
    _, result, stderr = _run(root, f"--images={photos}", check=3)
    return root, photos, result, stderr


def _srgb():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _pixels(path, mode):
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert(mode))


def test_statuses_and_names(folder):
    root, _, result, _ = folder
    records, _ = _report(root)
    found = {name: record["status"] for name, record in records.items()}
    assert found == {
        "a.jpg": "cloaked",
        "a.png": "cloaked",
        "nested ünïcode/gray.png": "cloaked",
        "alpha.png": "cloaked",
        "two.webp": "cloaked",
        "turned.jpg": "cloaked",
        "sky.bmp": "no_face",
        "empty.jpg": "unreadable",
        "notes.txt": "unreadable",
        "cut.jpg": "unreadable",
    }
    assert records["a.jpg"]["output"] != records["a.png"]["output"]
    assert records["nested ünïcode/gray.png"]["output"] == "nested ünïcode/gray_cloaked.png"
    assert {entry["image"] for entry in result["not_handled"]} == {
        "empty.jpg",
        "notes.txt",
        "cut.jpg",
    }
    written = {
        p.relative_to(root / "out").as_posix() for p in (root / "out").rglob("*_cloaked.png")
    }
    assert written == {r["output"] for r in records.values() if r["status"] == "cloaked"}
    assert (root / "out" / "report.html").read_text().count("a.jpg") >= 1


def test_files_hold_what_the_report_says(folder):
    root, photos, _, _ = folder
    records, report = _report(root)
    budget = report["settings"]["dssim_budget"]
    for name, record in records.items():
        if record["status"] != "cloaked":
            continue
        original = _pixels(photos / name, "RGB")
        final = _pixels(root / "out" / record["output"], "RGB")
        assert final.shape == original.shape
        change = final.astype(int) - original
        outside = np.ones(final.shape[:2], bool)
        for face in record["faces"]:
            y0, x0, y1, x1 = face["box"]
            outside[y0:y1, x0:x1] = False
            inside = change[y0:y1, x0:x1]
            assert inside.any()
            assert np.abs(inside.mean(axis=(0, 1))).max() < 0.5
            pair = original[y0:y1, x0:x1], final[y0:y1, x0:x1]
            assert ssim.dssim_uint8(*pair) <= budget
            y0, x0, y1, x1 = np.round(face["detection"]).astype(int)
            pair = original[y0:y1, x0:x1], final[y0:y1, x0:x1]
            assert ssim.dssim_uint8(*pair) <= budget * 1.02  # the box is rounded differently here
            found = face["extractors"]["dlib"]
            assert found["same_person"] == (found["distance"] < found["threshold"])
        assert not change[outside].any()
    assert len(records["two.webp"]["faces"]) == 2


def test_mode_profile_and_alpha_are_kept(folder):
    root, photos, _, _ = folder
    records, _ = _report(root)
    written = root / "out"
    with Image.open(written / records["nested ünïcode/gray.png"]["output"]) as gray:
        assert gray.mode == "L"
    alpha = _pixels(written / records["alpha.png"]["output"], "RGBA")[..., 3]
    np.testing.assert_array_equal(alpha, _pixels(photos / "alpha.png", "RGBA")[..., 3])
    with Image.open(written / records["a.png"]["output"]) as final:
        with Image.open(photos / "a.png") as original:
            assert final.info["icc_profile"] == original.info["icc_profile"]


def test_second_run_changes_nothing_and_does_no_work(folder):
    root, photos, first, _ = folder
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (root / "out").rglob("*.png")}
    _, result, stderr = _run(root, f"--images={photos}", check=3)
    assert result == first
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before


def test_other_settings_need_another_folder(folder):
    root, photos, _, _ = folder
    _, _, stderr = _run(root, f"--images={photos}", "--mode=high", check=2)
    assert "mode" in stderr and "--overwrite" in stderr


def test_foreign_output_is_kept_unless_told(tmp_path):
    photo = tmp_path / "p.png"
    _portrait(192).save(photo)
    output = tmp_path / "out" / "p_cloaked.png"
    output.parent.mkdir()
    output.write_bytes(b"somebody's file")
    _run(tmp_path, f"--images={photo}", check=3)
    assert output.read_bytes() == b"somebody's file"
    records, _ = _report(tmp_path)
    assert records["p.png"]["status"] == "failed" and "overwrite" in records["p.png"]["reason"]
    _run(tmp_path, f"--images={photo}", "--overwrite", check=0)
    assert _pixels(output, "RGB").shape == (192, 192, 3)


def test_products_inside_the_input_folder_are_not_cloaked_again(tmp_path):
    _portrait(192).save(tmp_path / "p.png")
    for _ in range(2):
        _run(tmp_path, f"--images={tmp_path}", output="inside", check=0)
    records, _ = _report(tmp_path, "inside")
    assert set(records) == {"p.png"}


def test_killed_runs_end_with_the_same_bytes(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        _portrait(160 + 16 * number).save(photos / f"{number}.png")
    _run(tmp_path, f"--images={photos}", output="straight", check=0)
    for seconds in (3.0, 5.0, 7.0):
        _run(tmp_path, f"--images={photos}", output="killed", kill_after=seconds)
        assert not [p for p in (tmp_path / "killed").rglob("*_cloaked.png") if not p.stat().st_size]
    _run(tmp_path, f"--images={photos}", output="killed", check=0)
    names = sorted(p.name for p in (tmp_path / "straight").glob("[!.]*"))
    assert names == sorted(p.name for p in (tmp_path / "killed").glob("[!.]*"))
    for name in names:
        pair = (tmp_path / "straight" / name, tmp_path / "killed" / name)
        assert pair[0].read_bytes() == pair[1].read_bytes(), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images=missing.jpg"], "missing.jpg"),
        (["--mode=extreme"], "extreme"),
        (["stray"], "stray"),
    ],
)
def test_wrong_usage_exits_with_2(tmp_path, flags, message):
    _, result, stderr = _run(tmp_path, *flags, check=2)
    assert result is None and message in stderr


def _save_extractor(folder, seed):
    """A trained extractor that was not trained; returns its folder."""
    template = ((9.0, 10.0), (9.0, 22.0), (16.0, 16.0), (22.0, 11.0), (22.0, 21.0))
    card = trained.Card("resnet6", 32, 16, width=4, template=template, threshold=0.01)
    network = trained.make_network("resnet6", input_px=32, embedding_size=16, width=4)
    variables = jax.jit(network.init)(jax.random.key(seed), jnp.zeros((1, 32, 32, 3)))
    folder.mkdir()
    trained.write_extractor(folder, card, variables)
    return folder


def test_wrong_usage_is_told_before_any_work(tmp_path, monkeypatch):
    out = tmp_path / "out"
    known = _save_extractor(tmp_path / "known", 0)
    unknown = tmp_path / "unknown"
    shutil.copytree(known, unknown)
    card = json.loads((unknown / "extractor.json").read_text())
    (unknown / "extractor.json").write_text(json.dumps(card | {"threshold": None}))
    cases = [
        (["--surrogates=nobody"], "nobody"),
        (["--surrogates="], "--surrogates"),
        (["--check=nobody"], "nobody"),
        (["--check=dlib"], "dlib must be named once in --surrogates and --check together"),
        ([f"--check={known},{known}"], "trained:known must be named once"),
        ([f"--check={unknown}"], "the threshold of trained:unknown"),
        ([f"--check={tmp_path}"], "there is no trained extractor"),
        (["--check=mobilefacenet"], "mobilefacenet"),
        (["--check=mobilefacenet", "--weights=mobilefacenet=no.npz"], "no.npz"),
        (["--check=mobilefacenet", "--weights=no.npz"], "must be NAME=FILE, NAME one of dlib, mob"),
        (["--weights=mobilefacenet=no.npz"], "no.npz"),
        (["--target=farthest"], "--gallery"),
        (["--target=nowhere"], "nowhere"),
    ]
    cases = [([f"--output_dir={out}", *flags], message) for flags, message in cases]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no downloads"))
    programs.assert_refused("cloak.cloak_program", cases)
    assert not out.exists()


def test_another_check_measures_again_and_leaves_the_files(tmp_path):
    photo = tmp_path / "p.png"
    _portrait(144).save(photo)
    made, other = (_save_extractor(tmp_path / name, seed) for seed, name in enumerate("ab"))
    flags = [f"--images={photo}", f"--surrogates={made}", "--num_steps=1"]
    asked = f"--check={other}"

    ((result, code),) = programs.drive(
        "cloak.cloak_program", [*flags, f"--output_dir={tmp_path / 'first'}"]
    )
    assert code == 0 and result["summary"]["cloaked"] == 1
    records, report = _report(tmp_path, "first")
    assert list(records["p.png"]["faces"][0]["extractors"]) == ["trained:a"]
    assert "judged only by" in (tmp_path / "first" / "report.html").read_text()
    path = tmp_path / "first" / "p_cloaked.png"
    before = path.stat().st_mtime_ns, path.read_bytes()

    answers = programs.drive(
        "cloak.cloak_program",
        [*flags, asked, f"--output_dir={tmp_path / 'first'}"],
        [*flags, asked, f"--output_dir={tmp_path / 'straight'}"],
    )
    assert [code for _, code in answers] == [0, 0]
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
    for name in ("p_cloaked.png", "report.json", "report.html"):
        pair = [(tmp_path / output / name).read_bytes() for output in ("first", "straight")]
        assert pair[0] == pair[1], name
    records, report = _report(tmp_path, "first")
    entries = records["p.png"]["faces"][0]["extractors"]
    assert {name: entry["surrogate"] for name, entry in entries.items()} == {
        "trained:a": True,
        "trained:b": False,
    }
    for entry in (*entries.values(), *(entry["after_jpeg75"] for entry in entries.values())):
        assert entry["same_person"] == (entry["distance"] < 0.01)
    assert report["settings"]["check"] == ["trained:b"]
    assert report["settings"]["reencoding"].startswith("JPEG quality 75 (4:2:0) was checked")
    page = (tmp_path / "first" / "report.html").read_text()
    assert "had no part in making the cloak" in page and "judged only by" not in page
    assert "protect" not in page.lower()


def test_targets_pull_towards_another_person(tmp_path):
    portrait = _portrait(192)
    portrait.save(tmp_path / "me.png")
    gallery = tmp_path / "gallery"
    for name in ("other", "nobody"):
        (gallery / name).mkdir(parents=True)
    # A mirrored, darkened face stands in for another person: its embedding differs from the own
    # one.
    other = portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT).point(lambda value: value // 2)
    other.save(gallery / "other" / "1.png")
    _run(
        tmp_path,
        f"--images={tmp_path / 'me.png'}",
        "--target=farthest",
        f"--gallery={gallery}",
        check=0,
    )
    _, report = _report(tmp_path)
    assert report["settings"]["target_identity"] == "other"
    empty = gallery / "nobody"
    _, _, stderr = _run(
        tmp_path, f"--images={tmp_path / 'me.png'}", f"--target={empty}", output="b", check=2
    )
    assert "no photo with a face" in stderr or "nobody" in stderr
