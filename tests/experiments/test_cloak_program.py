"""The cloak program from the outside: files in, statuses, files and records out."""

import json
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import skimage.data
from PIL import Image, ImageCms, ImageOps

from afr_jax.core import files, options, program
from afr_jax.core.perception import ssim
from afr_jax.evaluation.cloaking import cloak_files
from afr_jax.methods.cloaking import records, workflow
from afr_jax.models.extractors import registry
from afr_jax.recognition.detectors import union
from afr_jax.training import trained


def _portrait(side=256):
    """A real face, 40 to 90 pixels wide."""
    crop = Image.fromarray(skimage.data.astronaut()[0:300, 80:380])
    return crop.resize((side, side), Image.LANCZOS)


def _run(folder, *flags, output="out"):
    """What the program answers: (result, whether all was handled), or what usage is wrong."""
    if not any(flag.startswith("--surrogates=") for flag in flags):
        flags = ["--surrogates=dlib", *flags]
    flags = [f"--output_dir={folder / output}", "--num_steps=3", *flags]
    return programs.call(cloak_files.CloakConfig, cloak_files.run, *flags)


def _report(folder, output="out"):
    report = json.loads((folder / output / "report.json").read_text())
    return {record["image"]: record for record in report["images"]}, report


def _cloaked_faces(record):
    """The faces of a photo without those that are only named."""
    return [face for face in record["faces"] if face["status"] == "cloaked"]


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
    for name in ("text.jpg", "notes.txt", ".DS_Store"):
        (photos / name).write_text("no photo")
    data = (photos / "a.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(data[: len(data) // 2])
    result, complete = _run(root, f"--images={photos}")
    assert not complete
    return root, photos, result


def _srgb():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _pixels(path, mode):
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert(mode))


def test_statuses_and_names(folder):
    root, _, result = folder
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
        "text.jpg": "unreadable",
        "cut.jpg": "unreadable",
    }
    assert records["a.jpg"]["output"] != records["a.png"]["output"]
    assert records["nested ünïcode/gray.png"]["output"] == "nested ünïcode/gray_cloaked.png"
    assert result["skipped"] == 2
    assert {entry["image"] for entry in result["not_handled"]} == {
        "empty.jpg",
        "text.jpg",
        "cut.jpg",
    }
    written = {
        p.relative_to(root / "out").as_posix() for p in (root / "out").rglob("*_cloaked.png")
    }
    assert written == {r["output"] for r in records.values() if r["status"] == "cloaked"}
    assert (root / "out" / "report.html").read_text().count("a.jpg") >= 1


def test_a_fresh_machine_has_two_surrogates_and_all_takes_them(tmp_path, monkeypatch):
    """Without a cache, what comes with the install; the settings of the report name them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = []
    for flags in ([], ["--surrogates=all"]):
        config = program.parse(cloak_files.CloakConfig, flags)
        flow = cloak_files.load_flow(config)
        assert flow.surrogates == ("dlib", "sface")
        settings.append(cloak_files._settings(config, flow))
    assert settings[0] == settings[1] and set(settings[0]["weights"]) == {"dlib", "sface"}


def test_all_leaves_out_what_judges(monkeypatch):
    names = []

    def load(*asked, weights):
        names[:] = asked
        raise ValueError("seen")

    monkeypatch.setattr(cloak_files.pipeline, "load_recognizer", load)
    monkeypatch.setattr(registry, "present", lambda: ("dlib", "sface", "facenet_casia"))
    for flags, expected in (
        (["--check=sface"], ["dlib", "facenet_casia", "sface"]),
        (["--weights=lvface_t=x.pt"], ["dlib", "sface", "facenet_casia", "lvface_t"]),
    ):
        config = program.parse(cloak_files.CloakConfig, ["--surrogates=all", *flags])
        with pytest.raises(options.UsageError, match="seen"):
            cloak_files.run(config)
        assert names == expected
    monkeypatch.setattr(registry, "present", lambda: ())
    config = program.parse(cloak_files.CloakConfig, ["--surrogates=all"])
    with pytest.raises(options.UsageError, match="no extractor's weights are there"):
        cloak_files.run(config)


def test_files_hold_what_the_report_says(folder):
    root, photos, _ = folder
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
        for face in _cloaked_faces(record):
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
    assert len(_cloaked_faces(records["two.webp"])) == 2


def test_mode_profile_and_alpha_are_kept(folder):
    root, photos, _ = folder
    records, _ = _report(root)
    written = root / "out"
    with Image.open(written / records["nested ünïcode/gray.png"]["output"]) as gray:
        assert gray.mode == "L"
    alpha = _pixels(written / records["alpha.png"]["output"], "RGBA")[..., 3]
    np.testing.assert_array_equal(alpha, _pixels(photos / "alpha.png", "RGBA")[..., 3])
    output = written / records["a.png"]["output"]
    with Image.open(output) as final, Image.open(photos / "a.png") as original:
        assert final.info["icc_profile"] == original.info["icc_profile"]


def test_second_run_changes_nothing_and_does_no_work(folder, monkeypatch):
    root, photos, first = folder
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (root / "out").rglob("*.png")}
    monkeypatch.setattr(workflow.Workflow, "find_faces", None)
    assert _run(root, f"--images={photos}") == (first, False)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before


def test_other_settings_need_another_folder(folder):
    root, photos, _ = folder
    message = _run(root, f"--images={photos}", "--mode=high")
    assert "mode" in message and "--overwrite" in message


def test_a_photo_that_fails_does_not_cost_the_others_theirs(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "ab":
        _portrait(144).save(photos / f"{name}.png")
    cloak_photos = workflow.photo_cloaks.cloak_photos

    def fail(key, surrogates, tasks, **options):
        if any(task.name == "b.png" for task in tasks):
            raise ValueError("too strange")
        return cloak_photos(key, surrogates, tasks, **options)

    monkeypatch.setattr(workflow.photo_cloaks, "cloak_photos", fail)
    made = _save_extractor(tmp_path / "made", 0)
    result, complete = _run(tmp_path, f"--images={photos}", f"--surrogates={made}")
    assert not complete and result["summary"]["cloaked"] == 1
    assert result["not_handled"] == [
        {"image": "b.png", "status": "failed", "reason": "too strange"}
    ]


@pytest.fixture
def larger_face(monkeypatch):
    """A face that one detector is sure of, and the other does not see, larger than all others."""
    detect_union = union.detect_union

    def see(variables, second, pixels, *, options):
        seen = detect_union(variables, second, pixels, options=options)
        height, width = pixels.shape[:2]
        box = np.array([[0, 0, height - 1, width - 1]], np.float32)
        fields = zip(
            (*seen.faces, seen.mtcnn, seen.yunet, seen.counts),
            (box, [0.95], seen.faces.landmarks[:1], [0.95], [0.0], [False]),
            strict=True,
        )
        boxes, confidences, landmarks, ours, theirs, counts = (
            np.concatenate([own, np.asarray(new, own.dtype)]) for own, new in fields
        )
        faces = union.detect.Faces(boxes, confidences, landmarks)
        return union.Sightings(faces, ours, theirs, counts)

    monkeypatch.setattr(union, "detect_union", see)


def test_a_photo_whose_largest_face_is_left_is_not_cloaked(tmp_path, larger_face):
    _portrait(144).save(tmp_path / "p.png")
    flags = [f"--images={tmp_path / 'p.png'}", f"--surrogates={_save_extractor(tmp_path / 'm', 0)}"]
    result, complete = _run(tmp_path, *flags)
    assert not complete and result["not_handled"][0]["status"] == "partly_cloaked"
    records, report = _report(tmp_path)
    record = records["p.png"]
    assert record["status"] == "partly_cloaked" and "is larger than" in record["reason"]
    assert (tmp_path / "out" / record["output"]).exists()
    cloaked, left = record["faces"]
    assert cloaked["status"] == "cloaked" and min(cloaked["detectors"].values()) > 0.8
    assert left["status"] == "skipped" and left["box"] == [0, 0, 143, 143]
    assert left["reason"] == "only MTCNN sees a face here (confidence 0.95), YuNet does not"
    assert report["settings"]["detectors"] == ["mtcnn", "yunet"]
    # Nothing is left to do: the record is one of a finished photo.
    assert _run(tmp_path, *flags) == (result, complete)
    # Who names the faces knows which ones are left.
    y0, x0, y1, x1 = cloaked["detection"]
    faces = f"--faces={x0},{y0},{x1 - x0},{y1 - y0}"
    result, complete = _run(tmp_path, *flags, faces, output="asked")
    assert complete and not result["not_handled"]
    assert _report(tmp_path, "asked")[0]["p.png"]["status"] == "partly_cloaked"


def test_without_a_second_detector_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(union, "load_second", lambda: None)
    _portrait(144).save(tmp_path / "p.png")
    made = _save_extractor(tmp_path / "made", 0)
    _, complete = _run(tmp_path, f"--images={tmp_path / 'p.png'}", f"--surrogates={made}")
    assert complete
    records, report = _report(tmp_path)
    assert report["settings"]["detectors"] == ["mtcnn"]
    assert list(records["p.png"]["faces"][0]["detectors"]) == ["mtcnn"]
    assert "No second detector looked" in (tmp_path / "out" / "report.html").read_text()


def test_outputs_are_of_the_photos_format_and_are_not_cloaked_again(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    _portrait(144).save(photos / "a.jpg", quality=85)
    _portrait(160).save(photos / "b.png")
    made = f"--surrogates={_save_extractor(tmp_path / 'made', 0)}"
    _, complete = _run(tmp_path, f"--images={photos}", "--format=same", made)
    assert complete
    records, report = _report(tmp_path)
    assert [records[name]["status"] for name in ("a.jpg", "b.png")] == ["cloaked"] * 2
    written = tmp_path / "out" / "a_cloaked.jpg"
    assert records["a.jpg"]["output"] == written.name
    with Image.open(written) as final, Image.open(photos / "a.jpg") as original:
        assert final.format == "JPEG" and final.quantization == original.quantization
    (face,) = records["a.jpg"]["faces"]
    assert face["dssim"] <= report["settings"]["dssim_budget"]
    pair = _pixels(photos / "a.jpg", "RGB"), _pixels(written, "RGB")
    y0, x0, y1, x1 = face["box"]
    measured = ssim.dssim_uint8(*(pixels[y0:y1, x0:x1] for pixels in pair))
    assert 0 < measured <= face["dssim"] + 1e-9
    assert "as JPEG changes each a little" in (tmp_path / "out" / "report.html").read_text()

    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*_cloaked.*")}
    for images, output in ((tmp_path / "out", "out"), (tmp_path / "out", "second")):
        result, complete = _run(
            tmp_path, f"--images={images}", "--format=same", made, output=output
        )
        assert complete and result["summary"] == {
            **dict.fromkeys(result["summary"], 0),
            "already_cloaked": 2,
        }
        assert {path: path.read_bytes() for path in before} == before
    assert not list((tmp_path / "second").glob("*_cloaked*"))
    assert "Left as they are: 2 photos" in (tmp_path / "second" / "report.html").read_text()
    flags = [f"--images={tmp_path / 'out'}", "--format=same", made, "--again"]
    result, complete = _run(tmp_path, *flags, output="second")
    assert complete and result["summary"]["cloaked"] == 2
    assert (tmp_path / "second" / "a_cloaked_cloaked.jpg").exists()


def test_outputs_without_a_note_are_known_by_their_pixels(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    _portrait(144).save(photos / "a.png")
    flags = [f"--images={photos}", "--nomarked"]
    flags.append(f"--surrogates={_save_extractor(tmp_path / 'made', 0)}")
    _run(tmp_path, *flags)
    with Image.open(tmp_path / "out" / "a_cloaked.png") as final:
        final.save(photos / "copy.bmp")
    _, complete = _run(tmp_path, *flags)
    assert complete
    records, _ = _report(tmp_path)
    assert records["copy.bmp"]["status"] == "already_cloaked" and not records["copy.bmp"]["faces"]
    assert records["a.png"]["status"] == "cloaked"


def test_records_that_are_damaged_or_name_other_files_count_for_nothing(tmp_path, caplog):
    photo = tmp_path / "photos" / "a.png"
    photo.parent.mkdir()
    _portrait(144).save(photo)
    flags = [f"--images={photo.parent}"]
    flags.append(f"--surrogates={_save_extractor(tmp_path / 'made', 0)}")
    first = _run(tmp_path, *flags)
    report, output = _report(tmp_path), (tmp_path / "out" / "a_cloaked.png").read_bytes()
    (path,) = (tmp_path / "out" / ".cloak" / "records").iterdir()
    whole, known = path.read_bytes(), files.read_sealed(path)
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    for name in ("../ESCAPED.png", str(tmp_path / "ESCAPED.png"), "link/ESCAPED.png"):
        forged = files.seal({**known, "output": name})
        path.write_text(json.dumps(forged))
        assert _run(tmp_path, *flags) == first and _report(tmp_path) == report
        assert (tmp_path / "out" / "a_cloaked.png").read_bytes() == output
        assert not (tmp_path / "ESCAPED.png").exists() and path.read_bytes() == whole
    (job,), _ = records.list_jobs([photo], tmp_path / "out", path.parent.parent)
    caplog.clear()
    num_refused = 0
    for number in range(0, 8 * len(whole), 13):
        changed = bytearray(whole)
        changed[number // 8] ^= 1 << number % 8
        path.write_bytes(changed)
        if records.is_done(job):
            assert records.read(job) == known
        else:
            num_refused += 1
    assert num_refused > len(whole) / 3
    records.list_jobs([photo], tmp_path / "out", path.parent.parent)
    assert f"{path}: the record counts for nothing" in caplog.text


def test_two_runs_do_not_write_to_one_folder(tmp_path, start_process):
    _portrait(144).save(tmp_path / "a.png")
    code = (
        "import sys; from afr_jax.core import workdir\n"
        "with workdir.claimed(sys.argv[1]):\n print('held', flush=True); sys.stdin.readline()"
    )
    (tmp_path / "out").mkdir()
    holder = start_process(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    photo = f"--images={tmp_path / 'a.png'}"
    message = _run(tmp_path, photo, f"--workdir={tmp_path / 'work'}")
    assert f"out is in use by process {holder.pid}" in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    # Nor does --overwrite take away what another run has.
    (tmp_path / "out" / "config.json").write_text("{}")
    flags = [photo, f"--workdir={tmp_path / 'out'}", "--overwrite"]
    message = _run(tmp_path, *flags, output="other")
    assert message.startswith(f"{tmp_path / 'out'} is in use by process {holder.pid}")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_foreign_output_is_kept_unless_told(tmp_path):
    photo = tmp_path / "p.png"
    _portrait(192).save(photo)
    output = tmp_path / "out" / "p_cloaked.png"
    output.parent.mkdir()
    output.write_bytes(b"somebody's file")
    _, complete = _run(tmp_path, f"--images={photo}")
    assert not complete and output.read_bytes() == b"somebody's file"
    records, _ = _report(tmp_path)
    assert records["p.png"]["status"] == "failed" and "overwrite" in records["p.png"]["reason"]
    _, complete = _run(tmp_path, f"--images={photo}", "--overwrite")
    assert complete and _pixels(output, "RGB").shape == (192, 192, 3)


def test_a_photo_may_become_another_and_none(tmp_path):
    """The run's own output stays its own when the photo has lost its face for a while."""
    photo, output = tmp_path / "p.png", tmp_path / "out" / "p_cloaked.png"
    _portrait(192).save(photo)
    assert _run(tmp_path, f"--images={photo}")[1]
    before = output.read_bytes()
    Image.new("RGB", (192, 192), (90, 120, 200)).save(photo)
    _run(tmp_path, f"--images={photo}")
    assert _report(tmp_path)[0]["p.png"]["status"] == "no_face"
    _portrait(200).save(photo)
    assert _run(tmp_path, f"--images={photo}")[1]
    assert _report(tmp_path)[0]["p.png"]["status"] == "cloaked"
    assert output.read_bytes() != before


def test_products_inside_the_input_folder_are_not_cloaked_again(tmp_path):
    _portrait(192).save(tmp_path / "p.png")
    for _ in range(2):
        _, complete = _run(tmp_path, f"--images={tmp_path}", output="inside")
        assert complete
    records, _ = _report(tmp_path, "inside")
    assert set(records) == {"p.png"}


# Ends itself before a file is written; the arguments are the number of the file, and flags. With as
# many devices as the tests have, for equal rounding.
_KILLED = """
import os, signal, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from afr_jax.core import files, program
from afr_jax.evaluation.cloaking import cloak_files

written, write = [], files.write_atomically

def write_atomically(path, data, **options):
    written.append(path)
    if len(written) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, data, **options)

files.write_atomically = write_atomically
program.main(cloak_files.CloakConfig, cloak_files.run, argv=["cloak", *sys.argv[2:]])
"""


def test_killed_runs_end_with_the_same_bytes(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        _portrait(160 + 16 * number).save(photos / f"{number}.png")
    made = _save_extractor(tmp_path / "made", 0)
    flags = [f"--images={photos}", f"--surrogates={made}"]
    _run(tmp_path, *flags, output="straight")
    # Its config and the first record and photo are written, but not that it is done.
    options = [f"--output_dir={tmp_path / 'killed'}", "--num_steps=3", *flags]
    child = subprocess.run([sys.executable, "-c", _KILLED, "4", *options], cwd=programs.ROOT)
    assert child.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "killed").glob("*_cloaked.png"))) == 1
    write_atomically = files.write_atomically
    for last in (3, 5, 6, 5):
        written = []

        def write(path, data, *, last=last, written=written, **options):
            written.append(path)
            if len(written) == last:
                raise KeyboardInterrupt
            write_atomically(path, data, **options)

        monkeypatch.setattr(files, "write_atomically", write)
        with pytest.raises(KeyboardInterrupt):
            _run(tmp_path, *flags, output="killed")
        assert not [p for p in (tmp_path / "killed").rglob("*_cloaked.png") if not p.stat().st_size]
    monkeypatch.setattr(files, "write_atomically", write_atomically)
    _run(tmp_path, *flags, output="killed")
    names = sorted(p.name for p in (tmp_path / "straight").glob("[!.]*"))
    assert names == sorted(p.name for p in (tmp_path / "killed").glob("[!.]*"))
    for name in names:
        pair = (tmp_path / "straight" / name, tmp_path / "killed" / name)
        assert pair[0].read_bytes() == pair[1].read_bytes(), name


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
    del card["checksum"]
    (unknown / "extractor.json").write_text(json.dumps(card | {"threshold": None}))
    cases = [
        (["--images=missing.jpg"], "missing.jpg"),
        (["--mode=extreme"], "extreme"),
        (["--faces=some"], "faces is 'some', must be all, largest, or boxes"),
        (["--min_face_px=12"], "--min_face_px is 12, must be 0 or at least 20"),
        (["stray"], "stray"),
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
        (["--images="], "--images has an empty value"),
        (["--workdir=/proc/none"], "No such file or directory: '/proc/none'"),
    ]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no downloads"))
    for flags, message in cases:
        answer = _run(tmp_path, *flags)
        assert isinstance(answer, str) and message in answer, (flags, answer)
        assert "--overwrite" not in answer
    # The folder of records is there once the flags make sense; no photo was looked at.
    assert not [path for path in out.rglob("*") if path.suffix in (".png", ".html")]


def test_another_check_measures_again_and_leaves_the_files(tmp_path):
    photo = tmp_path / "p.png"
    _portrait(144).save(photo)
    made, other = (_save_extractor(tmp_path / name, seed) for seed, name in enumerate("ab"))
    flags = [f"--images={photo}", f"--surrogates={made}"]
    asked = f"--check={other}"

    result, complete = _run(tmp_path, *flags, output="first")
    assert complete and result["summary"]["cloaked"] == 1
    records, report = _report(tmp_path, "first")
    assert list(records["p.png"]["faces"][0]["extractors"]) == ["trained:a"]
    assert "judged only by" in (tmp_path / "first" / "report.html").read_text()
    path = tmp_path / "first" / "p_cloaked.png"
    before = path.stat().st_mtime_ns, path.read_bytes()

    for output in ("first", "straight"):
        assert _run(tmp_path, *flags, asked, output=output)[1]
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
    photo = f"--images={tmp_path / 'me.png'}"
    _, complete = _run(tmp_path, photo, "--target=farthest", f"--gallery={gallery}")
    assert complete
    _, report = _report(tmp_path)
    assert report["settings"]["target_identity"] == "other"
    message = _run(tmp_path, photo, f"--target={gallery / 'nobody'}", output="b")
    assert "no photo with a face" in message
