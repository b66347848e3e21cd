"""The report page: its figures and words, its escaping, and how it works in a browser."""

import base64
import html.parser
import io
import re
import weakref

import browsers
import numpy as np
import pytest
from PIL import Image

from afr_jax.evaluation.report import page as report_lib
from afr_jax.evaluation.report import pictures as report_pictures
from afr_jax.evaluation.report import summary

_HOSTILE = "album/<img src=x onerror=\"document.title='owned'\">&'.jpg"
_VOID = {"meta", "img", "input", "br"}


def _extractor(distance, threshold=0.6, **more):
    return {"distance": distance, "threshold": threshold, "metric": "l2"} | more


def _after(distance, same_person, reason=None):
    return {"distance": distance, "same_person": same_person, "reason": reason}


def _face(box=(8, 8, 24, 24), extractors=None, **more):
    if extractors is None:
        extractors = {"dlib": _extractor(1.02, same_person=False, distance_before_budget=1.15)}
    face = {"box": list(box), "detection": list(box), "confidence": 0.99, "status": "cloaked"}
    figures = {"dssim": 0.0068, "linf": 12 / 255, "mean_difference": 0.1, "extractors": extractors}
    return face | {"reason": None} | figures | more


def _image(name, faces=(), status="cloaked", reason=None):
    output = f"out/{name}_cloaked.png" if "cloaked" in status else None
    return {
        "image": name,
        "output": output,
        "status": status,
        "reason": reason,
        "faces": list(faces),
    }


def _report(*images, **settings):
    defaults = {"mode": "mid", "dssim_budget": 0.007, "surrogates": ["dlib"], "seed": 0}
    return {"images": list(images), "settings": defaults | settings}


def _pair(height=32, width=48, box=(8, 8, 24, 24), seed=0):
    """A photo of noise and the same with every value of the box moved by at most 9 levels."""
    rng = np.random.default_rng(seed)
    original = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    change = np.zeros(original.shape, np.int64)
    y0, x0, y1, x1 = box
    change[y0:y1, x0:x1] = rng.integers(1, 10, size=(y1 - y0, x1 - x0, 3))
    return original, np.clip(original + change, 0, 255).astype(np.uint8)


class _Page(html.parser.HTMLParser):
    """Collects a page's elements and text, and checks that elements are properly nested."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.stack, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack[-1:] not in (["script"], ["style"]):
            self.text += data

    @property
    def words(self):
        return " ".join(self.text.split())

    def pictures(self, kind):
        return [a for tag, a in self.elements if tag == "img" and kind in a["class"].split()]


def _render(report, load_pair=lambda record: _pair(), **options):
    return _Page(report_lib.cloak_report_html(report, load_pair, **options))


def _decode(uri):
    header, data = uri.split(",", 1)
    return header, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_amplified_difference_is_ten_times_the_change_around_mid_gray():
    rng = np.random.default_rng(0)
    original, cloaked = rng.integers(0, 256, size=(2, 16, 16, 3), dtype=np.uint8)
    cloaked[:8] = np.clip(original[:8].astype(int) + rng.integers(-14, 15, (8, 16, 3)), 0, 255)
    change = cloaked.astype(np.float64) - original.astype(np.float64)
    for gain in (1, 10):
        shown = report_pictures.amplified_difference(original, cloaked, gain=gain)
        assert shown.dtype == np.uint8
        np.testing.assert_array_equal(shown, np.clip(128 + gain * change, 0, 255))
    np.testing.assert_array_equal(report_pictures.amplified_difference(original, original), 128)


def test_small_face_is_shown_at_native_pixels_without_loss():
    original, cloaked = _pair(height=80, width=120, box=(20, 30, 40, 50))
    page = _render(
        _report(_image("a.png", [_face((20, 30, 40, 50))])), lambda _: (original, cloaked)
    )
    crop = np.s_[17:43, 27:53]  # the box and 15 % of its side around it
    expected = {
        "before": original[crop],
        "after": cloaked[crop],
        "difference": np.clip(128 + 10 * (cloaked[crop].astype(int) - original[crop]), 0, 255),
    }
    for kind, array in expected.items():
        header, shown = _decode(page.pictures(kind)[1]["src"])
        assert header == "data:image/png;base64"
        np.testing.assert_array_equal(shown, array)
    assert "Difference × 10 around mid gray" in page.words
    assert "26 × 26 pixels, each drawn 18 × 18" in page.words
    assert "0 pixels outside the cloaked faces’ boxes changed" in page.words


def test_previews_keep_to_their_limit():
    pair = _pair(height=300, width=200, box=(0, 0, 299, 199))
    page = _render(
        _report(_image("a.png", [_face((0, 0, 299, 199))])), lambda _: pair, preview_px=100
    )
    for kind in ("before", "after", "difference"):
        sizes = [_decode(picture["src"])[1].shape for picture in page.pictures(kind)]
        assert sizes[0] == (100, 67, 3)
        assert all(max(size) <= 100 for size in sizes)
    assert "Reduced from 200 × 300 pixels" in page.words


def test_changed_pixels_outside_the_cloaked_faces_are_counted():
    original, cloaked = _pair()
    cloaked = cloaked.copy()
    cloaked[30, 40:43] ^= 1
    faces = [_face(), _face((28, 38, 32, 48), status="skipped", reason="too small")]
    page = _render(_report(_image("a.png", faces)), lambda _: (original, cloaked))
    assert "3 pixels outside the cloaked faces’ boxes changed" in page.words


def test_identical_files_are_called_uncloaked():
    original, _ = _pair()
    page = _render(_report(_image("a.png", [_face()])), lambda _: (original, original.copy()))
    assert "this file carries no cloak" in page.words


@pytest.mark.parametrize(
    "entry, expected",
    [
        (_extractor(1.02, same_person=False), False),
        (_extractor(0.60), False),
        (_extractor(0.59), True),
        (_extractor(0.59, same_person=False), True),
        (_extractor(1.02, same_person=True), True),
        (_extractor(None, same_person=False), None),
        (_extractor(float("nan"), same_person=False), None),
        ({"distance": 1.0}, None),
    ],
)
def test_a_face_counts_as_moved_only_if_number_and_verdict_agree(entry, expected):
    assert report_lib.still_same_person(entry) is expected


def test_verdicts_name_extractor_distance_and_threshold():
    extractors = {
        "dlib": _extractor(
            1.02,
            same_person=False,
            surrogate=True,
            distance_before_budget=1.15,
            other_key=[1],
            after_jpeg75=_after(0.58, True),
        ),
        "facenet": _extractor(0.31, threshold=0.9, same_person=True, surrogate=False),
        "close": _extractor(0.5998, same_person=True),
        "mute": _extractor(None),
        "lost": _extractor(0.9, surrogate=False, after_jpeg75=_after(None, None, "not found")),
    }
    words = _render(_report(_image("a.png", [_face(extractors=extractors)]))).words
    assert (
        "dlib the cloak was made against it As written: another person at this threshold "
        "(distance 1.02, threshold 0.60). After JPEG quality 75: still the same person at this "
        "threshold (distance 0.58, threshold 0.60)."
    ) in words
    assert (
        "facenet had no part in making the cloak As written: still the same person at this "
        "threshold (distance 0.31, threshold 0.90)."
    ) in words
    # Two digits would print the same number twice and hide which side it is on.
    assert "(distance 0.5998, threshold 0.6000)" in words
    assert "mute As written: no distance." in words
    assert "After JPEG quality 75: no distance, not found." in words
    assert "rounding to 8 bits (circle) 1.15, after 1.02" in words
    # Five on the written file and two after JPEG.
    assert "moved in 2 of 7 checks" in words


def _two_faces(**more):
    """Two faces in two extractors, the second of which lost a face to JPEG."""
    made = {"surrogate": True, **more}
    rows = [
        {
            "dlib": _extractor(1.0, after_jpeg75=_after(0.9, False), **made),
            "other": _extractor(0.7, surrogate=False, after_jpeg75=_after(0.5, True)),
        },
        {
            "dlib": _extractor(0.5, same_person=True, after_jpeg75=_after(0.4, True), **made),
            "other": _extractor(0.8, surrogate=False, after_jpeg75=_after(None, None, "gone")),
        },
    ]
    return _report(*(_image(f"{i}.png", [_face(extractors=row)]) for i, row in enumerate(rows)))


def test_shares_of_moved_faces_are_counted_for_each_extractor():
    rows = {row["name"]: row for row in report_lib.count_moved(_two_faces()["images"])}
    assert list(rows) == ["dlib", "other"]
    expected = {
        ("dlib", "written"): (2, 1, 0, "50\xa0%", "0.75"),
        ("dlib", "after"): (2, 1, 0, "50\xa0%", "0.65"),
        ("other", "written"): (2, 2, 0, "100\xa0%", "0.75"),
        ("other", "after"): (1, 0, 1, "0\xa0%", "0.50"),
    }
    for (name, key), values in expected.items():
        assert tuple(rows[name][key].values()) == values
    assert [rows[name]["made_against"] for name in rows] == [True, False]
    words = _render(_two_faces()).words
    assert (
        "Extractor As written After JPEG quality 75 dlib the cloak was made against it "
        "threshold 0.60 1 of 2 faces (50 %) median distance 0.75 1 of 2 faces (50 %) median "
        "distance 0.65 other had no part in making the cloak threshold 0.60 2 of 2 faces (100 %) "
        "median distance 0.75 0 of 1 face (0 %) median distance 0.50 no distance for 1 face"
    ) in words
    assert "other had no part in making the cloak: what it says is nearest" in words
    assert "judged only by" not in words
    assert "on the file as written and after JPEG quality 75." in words


def test_a_cloak_that_nobody_else_judged_is_called_so():
    report = _report(_image("a.png", [_face(extractors={"dlib": _extractor(1, surrogate=True)})]))
    words = _render(report).words
    assert "the cloak was judged only by the extractor it was made against." in words
    assert "No extractor that had no part in making the cloak was asked." in words
    assert "not looked at" in words  # after JPEG


def test_the_log_says_what_the_page_says():
    lines = list(summary.lines(_two_faces()))
    assert lines[0] == "0.png: cloaked, out/0.png_cloaked.png"
    assert lines[2] == (
        "    dlib (the cloak was made against it): 1.00 of 0.60, another person at this threshold; "
        "after JPEG 75: 0.90 of 0.60, another person at this threshold"
    )
    assert lines[7] == (
        "    other (not used to make the cloak): 0.80 of 0.60, another person at this threshold; "
        "after JPEG 75: no distance (gone)"
    )
    assert lines[-1] == (
        "other (not used to make the cloak): another person at its threshold: 2 of 2 faces; "
        "after JPEG 75: 0 of 1 face (1 without a distance)"
    )
    own = {"dlib": _extractor(1.0, surrogate=True, after_jpeg75=_after(0.9, False))}
    skipped = {"box": [1, 2, 13, 12], "status": "skipped", "reason": "tiny"}
    faces = [_face(extractors=own, found_again=False), skipped]
    images = [
        _image("a.png", faces, "partly_cloaked", "larger"),
        _image("b.png", [], "failed", "r"),
    ]
    lines = list(summary.lines(_report(*images)))
    assert lines[0] == "a.png: partly_cloaked, out/a.png_cloaked.png (larger)"
    assert lines[1].endswith("; not found again in the written photo")
    assert lines[3:5] == ["  face 2 at x 2, y 1, 10 x 12 px: skipped (tiny)", "b.png: failed (r)"]
    assert "judged only by the extractors it was made against" in lines[-1]
    lines = list(summary.lines(_report(*images, detectors=["mtcnn"])))
    assert lines[0].startswith("no second detector looked")
    assert not any("second detector" in line for line in lines[1:])


def test_pictures_come_first_and_settings_last():
    words = _render(_report(_image("a.png", [_face()]))).words
    parts = (
        "Cloaked photos Outline",
        "What the recognizers made",
        "What this cloak is",
        "Settings",
    )
    places = [words.index(part) for part in parts]
    assert places == sorted(places)


def test_a_missing_second_detector_and_a_lost_face_are_told():
    images = [_image("a.png", [_face(found_again=False)])]
    words = _render(_report(*images, detectors=["mtcnn"])).words
    assert "No second detector looked" in words
    assert "No detector finds this face in the written photo" in words
    words = _render(_report(_image("a.png", [_face()]), detectors=["mtcnn", "yunet"])).words
    assert "second detector" not in words and "No detector" not in words


def test_bars_are_drawn_to_scale():
    text = report_lib.cloak_report_html(
        _report(_image("a.png", [_face(dssim=0.0084)])), lambda _: _pair()
    )
    marks = [float(x) for x in re.findall(r'<line class="mark" x1="([\d.]+)%"', text)]
    bars = [float(x) for x in re.findall(r'<rect class="bar[^>]* width="([\d.]+)%"', text)]
    circle = float(re.search(r'<circle class="before" cx="([\d.]+)%"', text).group(1))
    # Two digits of a per cent are printed.
    assert bars[0] / marks[0] == pytest.approx(1.02 / 0.6, rel=1e-3)
    assert circle / marks[0] == pytest.approx(1.15 / 0.6, rel=1e-3)
    assert bars[1] / marks[1] == pytest.approx(0.0084 / 0.007, rel=1e-3)
    assert max(*marks, *bars, circle) <= 100
    assert "over budget" in text
    entry = _extractor(1.02, after_jpeg75=_after(1.4, False))
    text = report_lib.cloak_report_html(
        _report(_image("a.png", [_face(extractors={"dlib": entry})])), lambda _: _pair()
    )
    both = [float(x) for x in re.findall(r'<rect class="bar[^>]* width="([\d.]+)%"', text)][:2]
    assert both[1] / both[0] == pytest.approx(1.4 / 1.02, rel=1e-3)
    assert both[1] <= 100


def test_a_face_with_wider_limits_is_shown_within_these():
    usual = {"dssim": 0.007, "ssimulacra2": 85.0}
    wider = {"dssim": 0.010, "ssimulacra2": 80.0}
    for limits, least, is_relieved in ((usual, 85, False), (wider, 80, True)):
        face = _face(dssim=0.0068, limits=limits, visibility={"ssimulacra2": 90.0})
        words = _render(_report(_image("a.png", [face]), budget=usual)).words
        assert f"90 (at least {least})" in words
        assert f"of a budget of {limits['dssim']:.5f}" in words
        assert ("it has wider ones" in words) == is_relieved


def test_photos_and_faces_without_a_cloak_are_named_with_their_reason():
    skipped = {
        "box": [1, 1, 3, 3],
        "detection": [1, 1, 3, 3],
        "status": "skipped",
        "reason": "tiny",
    }
    page = _render(
        _report(
            _image("yes.png", [_face(), skipped]),
            _image("half.png", [_face(), skipped], "partly_cloaked", "a larger face is not"),
            _image("beach.png", status="no_face", reason="nobody there"),
            _image("torn.png", status="unreadable", reason="truncated file"),
            _image("hard.png", status="failed", reason="over budget"),
            _image("odd.png", status="postponed"),
        )
    )
    words = page.words
    assert "1 of 6 photos was cloaked; 1 was only in part; 4 were not." in words
    assert "Faces without a cloak: 2 photos" in words and "half.png: a larger face is not" in words
    assert "Not cloaked: 4 photos" in words
    assert "no face found beach.png: nobody there" in words
    assert "unreadable torn.png: truncated file" in words
    assert "failed hard.png: over budget" in words
    assert "postponed odd.png" in words
    assert "face 2 skipped at x 1, y 1, 2 × 2 pixels (tiny)" in words
    assert "Face 2 not cloaked: skipped" in words
    assert words.index("Not cloaked: 4 photos") < words.index("What this cloak is")
    assert len([a for tag, a in page.elements if tag == "article"]) == 2


def test_every_photo_is_there_and_loaded_lazily_one_at_a_time():
    alive, asked = [], []

    def load(record):
        assert all(reference() is None for reference in alive)
        asked.append(record["image"])
        pair = _pair(seed=len(asked))
        alive.extend(weakref.ref(array) for array in pair)
        return pair

    names = [f"{index:02d}.jpg" for index in range(15)]
    images = [_image(name, [_face()]) for name in names] + [_image("x.jpg", status="failed")]
    page = _render(_report(*images), load)
    assert asked == names
    assert all(name in page.text for name in names)
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    assert all(p["loading"] == "lazy" and p["decoding"] == "async" for p in pictures)
    assert all(p["alt"] and p["width"] and p["height"] for p in pictures)
    identifiers = [a["id"] for _, a in page.elements if "id" in a]
    assert len(set(identifiers)) == len(identifiers)
    labels = [a["for"] for tag, a in page.elements if tag == "label"]
    ranges = [a["id"] for tag, a in page.elements if tag == "input" and a["type"] == "range"]
    assert set(ranges) <= set(labels)


@pytest.mark.parametrize(
    "pair, message",
    [(None, "could not be read again"), ((_pair()[0], _pair(height=33)[1]), "differ in size")],
)
def test_a_pair_that_cannot_be_shown_leaves_the_figures(pair, message):
    page = _render(_report(_image("a.png", [_face()])), lambda _: pair)
    assert message in page.words
    assert "As written: another person at this threshold" in page.words
    assert not page.pictures("before")


def test_bad_arrays_and_limits_are_refused():
    report = _report(_image("a.png", [_face()]))
    for bad in (_pair()[0] / 255.0, _pair()[0][..., 0]):
        with pytest.raises(ValueError, match="uint8"):
            report_lib.cloak_report_html(report, lambda _, bad=bad: (bad, bad))
    with pytest.raises(ValueError, match="preview_px"):
        report_lib.cloak_report_html(report, lambda _: _pair(), preview_px=0)


def test_hostile_text_is_escaped_and_the_page_fetches_nothing():
    hostile = _face(extractors={_HOSTILE: _extractor(1.0)}, reason=_HOSTILE)
    report = _report(
        _image(_HOSTILE, [hostile]), _image(_HOSTILE, [], "failed", _HOSTILE), target=_HOSTILE
    )
    text = report_lib.cloak_report_html(
        report | {"summary": {_HOSTILE: _HOSTILE}}, lambda _: _pair()
    )
    page = _Page(text)
    assert page.text.count(_HOSTILE) >= 8
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
    for tag, attributes in page.elements:
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith("#")
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    assert [tag for tag, _ in page.elements].count("script") == 1
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_names_that_are_not_text_are_written_and_passed_on_unchanged(tmp_path):
    name = "caf\udce9.jpg"  # how Python spells a byte that is not UTF-8
    asked = []
    report_lib.write_cloak_report(
        tmp_path / "report.html",
        _report(_image(name, [_face()])),
        lambda record: asked.append(record["image"]),
    )
    assert asked == [name]
    assert "caf\\udce9.jpg" in (tmp_path / "report.html").read_text("utf-8")


def test_written_page_is_the_returned_page_and_always_the_same(tmp_path):
    report = _report(_image("a.png", [_face()]), _image("b.png", status="no_face"))
    path = tmp_path / "report.html"
    report_lib.write_cloak_report(path, report, lambda _: _pair())
    assert path.read_bytes() == report_lib.cloak_report_html(report, lambda _: _pair()).encode()


def test_a_page_that_breaks_off_leaves_the_earlier_one(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("earlier")

    def broken(record):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        report_lib.write_cloak_report(path, _report(_image("a.png", [_face()])), broken)
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "earlier"


def test_honest_words_are_there_and_soothing_ones_are_not():
    extractors = {"dlib": _extractor(1.0), "facenet": _extractor(0.4)}
    report = _report(_image("a.png", [_face(extractors=extractors)]), surrogates="dlib")
    text = report_lib.cloak_report_html(report, lambda _: None)
    words = _Page(text).words
    for phrase in (
        "What this cloak is and is not worth",
        "If a tracker enrolls these cloaked photos",
        "does not hide these photos, or the person, from a system that already holds clean photos",
        "adaptive tracker undoes it",
        "purifies pictures",
        "Clean photos of the person elsewhere",
        "Made against dlib. Other recognizers may not be moved",
        "Checked on dlib and facenet only, on the file as written",
        "Sites re-encode and shrink what is uploaded. That was neither modelled nor checked",
        "exit code 0, all done; 3, done, but some inputs could not be handled",
    ):
        assert phrase in words
    assert not re.search(r"protect|safe|secure|invisible|anonym", text, re.IGNORECASE)


def test_what_the_settings_say_of_re_encoding_replaces_the_warning():
    report = _report(_image("a.png", [_face()]), reencoding="JPEG 75 was checked.")
    words = _render(report).words
    assert "Re-encoding: JPEG 75 was checked." in words
    assert "neither modelled nor checked" not in words


@pytest.mark.parametrize("report", [{"images": [], "settings": {}}, {"images": []}])
def test_no_photos(report):
    page = _render(report)
    assert "No photos were given." in page.words
    assert "Checked on no extractor" in page.words
    assert not page.pictures("before")


def _open(browser, path, *, width, scheme="light"):
    browsers.view(browser, width, scheme=scheme)
    browser.get(path.as_uri())
    frame = browser.find_element("css selector", ".compare .frame")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", frame)
    loaded = """
      const done = arguments[arguments.length - 1];
      const pictures = [...arguments[0].querySelectorAll("img")];
      Promise.all(pictures.map((picture) => picture.decode())).then(
        () => requestAnimationFrame(() => done(true)), () => done(false));
    """
    assert browser.execute_async_script(loaded, frame)
    return frame


@pytest.fixture
def red_and_blue(tmp_path):
    """A page on a photo that is all red, whose cloaked version is all blue."""
    original, cloaked = np.zeros((2, 200, 300, 3), np.uint8)
    original[..., 0], cloaked[..., 2] = 255, 255
    report = _report(
        _image(_HOSTILE, [_face((0, 0, 200, 300))]),
        _image("n" * 150 + ".jpg", [], "failed", "r" * 150),
    )
    path = tmp_path / "report.html"
    report_lib.write_cloak_report(path, report, lambda _: (original, cloaked))
    return path


def _red_share(frame):
    """Which part of the frame, from the left, shows the original."""
    shown = np.asarray(Image.open(io.BytesIO(frame.screenshot_as_png)).convert("RGB"), int)
    row = shown[shown.shape[0] // 2]  # between the name tags and the knob
    red = row[:, 0] > row[:, 2] + 50
    assert (np.diff(red.astype(int)) != 0).sum() <= 1
    return red.mean()


def test_slider_uncovers_by_keyboard_drag_touch_and_buttons(browser, red_and_blue):
    # Tolerance: the divider is 2 px and its shadow 2 px on a frame of 300 px.
    near = {"abs": 0.02}
    webdriver = pytest.importorskip("selenium.webdriver")
    keys = webdriver.Keys
    frame = _open(browser, red_and_blue, width=1200)
    slider = frame.find_element("css selector", "input[type=range]")
    assert _red_share(frame) == pytest.approx(0.5, **near)
    assert slider.accessible_name.startswith("How much of the original to show")

    browser.execute_script("arguments[0].focus()", slider)
    slider.send_keys(keys.ARROW_RIGHT * 10)
    assert _red_share(frame) == pytest.approx(0.6, **near)
    assert slider.get_attribute("aria-valuetext") == "60 % original, 40 % cloaked"
    slider.send_keys(keys.HOME)
    assert _red_share(frame) == pytest.approx(0.0, **near)

    actions = webdriver.ActionChains(browser)
    actions.move_to_element(frame).click_and_hold().move_by_offset(75, 0).release().perform()
    assert _red_share(frame) == pytest.approx(0.75, **near)
    # Released: moving on must not drag on.
    webdriver.ActionChains(browser).move_by_offset(-120, 0).perform()
    assert _red_share(frame) == pytest.approx(0.75, **near)
    assert browser.switch_to.active_element == slider

    box = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", frame)
    for kind, shares in (("touchStart", [0.75]), ("touchMove", [0.5, 0.25]), ("touchEnd", [None])):
        for share in shares:
            y = box["top"] + box["height"] / 2
            point = [] if share is None else [{"x": box["left"] + share * box["width"], "y": y}]
            browser.execute_cdp_cmd(
                "Input.dispatchTouchEvent", {"type": kind, "touchPoints": point}
            )
    assert _red_share(frame) == pytest.approx(0.25, **near)

    original, cloaked = browser.find_elements("css selector", ".compare .flip button")[:2]
    original.click()
    assert _red_share(frame) == pytest.approx(1.0, **near)
    cloaked.click()
    assert _red_share(frame) == pytest.approx(0.0, **near)
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_page_fits_the_screen_in_both_schemes(browser, red_and_blue, width, scheme):
    _open(browser, red_and_blue, width=width, scheme=scheme)
    fits = "return [document.documentElement.scrollWidth, innerWidth]"
    needed, there = browser.execute_script(fits)
    assert needed <= there == width
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = np.mean([int(level) for level in re.findall(r"\d+", background)])
    assert (brightness > 128) == (scheme == "light")
    assert browser.title.startswith("Cloak report")  # the hostile file name did not run
    assert browser.get_log("browser") == []


def test_outlines_are_switched_on_and_print_shows_both_pictures(browser, red_and_blue):
    frame = _open(browser, red_and_blue, width=1200)
    outline = frame.find_element("css selector", ".outline")
    assert not outline.is_displayed()
    browser.find_element("id", "outlines").click()
    assert outline.is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    before, after = (frame.find_element("class name", name).rect for name in ("before", "after"))
    assert after["x"] >= before["x"] + before["width"]
    assert after["width"] == pytest.approx(before["width"], abs=1)
    assert browser.get_log("browser") == []
