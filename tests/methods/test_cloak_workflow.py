"""The file of a cloaked photo: its format, its note, and the budget after encoding."""

import io

import numpy as np
import pytest
import skimage.data
from PIL import Image

from afr_jax.data import photos
from afr_jax.methods.cloaking import budget, fawkes, photo_cloaks, workflow
from afr_jax.models import mtcnn
from afr_jax.recognition import detect, pipeline

_BUDGET = 0.004
_REGIONS = np.array([[8, 8, 72, 72], [40, 60, 120, 130]])


def _flow(**options):
    recognizer = pipeline.Recognizer(mtcnn.Variables({}, {}, {}), detect.DetectorOptions(), {}, {})
    method = fawkes.FawkesConfig(dssim_budget=_BUDGET)
    return workflow.Workflow(recognizer, (), method, **options)


def _photo(quality=None):
    """A photo of 128 px, as a JPEG file where there is a quality, and its two faces."""
    limits = budget.Budget(_BUDGET)
    buffer = io.BytesIO()
    image = Image.fromarray(skimage.data.astronaut()[:128, 150:278])
    if quality is None:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=quality, subsampling=2)
    faces = [photo_cloaks.CloakedFace(region, region, {}, limits) for region in _REGIONS]
    return photos.decode_photo(buffer.getvalue()), faces


def _changed(photo, amplitude):
    noise = np.random.default_rng(0).integers(-amplitude, amplitude + 1, (128, 128, 3))
    pixels = photo.pixels.copy()
    for y0, x0, y1, x1 in _REGIONS:
        piece = photo.pixels[y0:y1, x0:x1].astype(int) + noise[y0:y1, x0:x1]
        pixels[y0:y1, x0:x1] = np.clip(piece, 0, 255)
    return pixels


def _dssims(photo, written, faces):
    return [budget.face_dssim(photo.pixels, written, face.region, face.box) for face in faces]


@pytest.mark.parametrize(
    "file_format, quality, suffix",
    [("png", 80, ".png"), ("jpeg", None, ".jpg"), ("same", 80, ".jpg"), ("same", None, ".png")],
)
def test_formats(file_format, quality, suffix):
    photo, faces = _photo(quality)
    pixels = _changed(photo, 2)
    file = _flow(file_format=file_format)._encode(photo, pixels, faces)
    assert file.suffix == suffix and (file.reencoded is None) == (suffix == ".png")
    again = photos.decode_photo(file.data)
    np.testing.assert_array_equal(again.pixels, file.pixels)
    assert again.note == workflow.NOTE
    if suffix == ".png":
        np.testing.assert_array_equal(file.pixels, pixels)
    elif quality:
        assert again.jpeg == photo.jpeg


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_the_budget_holds_after_encoding(quality):
    photo, faces = _photo(quality)
    pixels = _changed(photo, 40)
    assert min(_dssims(photo, pixels, faces)) > 2 * _BUDGET
    file = _flow(file_format="same")._encode(photo, pixels, faces)
    written = photos.decode_photo(file.data).pixels
    assert max(_dssims(photo, written, faces)) <= _BUDGET
    assert max(_dssims(photo, written, faces)) > 0.8 * _BUDGET


def test_a_change_that_does_not_fit_is_given_up():
    def encode_fn(scales):
        asked.append(scales)
        return b"", np.zeros((1, 1, 3), np.uint8), np.where(scales > 0, [3.0, 0.5, 3.0], 0)

    asked = []
    regions = np.array([[0, 0, 9, 9], [5, 5, 14, 14], [20, 20, 29, 29]], np.float64)
    workflow._fitted(encode_fn, regions)
    # The second overlaps the first.
    assert asked[-1].tolist() == [0, 0, 0] and len(asked) <= 11
    asked = []
    workflow._fitted(encode_fn, regions + [[0], [90], [0]])
    assert asked[-1].tolist() == [0, 1, 0]


def test_a_little_too_much_takes_two_rounds():
    def encode_fn(scales):
        asked.append(scales)
        return b"", np.zeros((1, 1, 3), np.uint8), scales**2 * [1.1, 0.4]

    asked = []
    regions = np.array([[0, 0, 9, 9], [5, 5, 14, 14]], np.float64)
    workflow._fitted(encode_fn, regions)
    np.testing.assert_allclose(asked[1:], [np.sqrt([0.97 / 1.1] * 2)])


def test_a_face_within_the_budget_is_left_as_it_is():
    photo, faces = _photo(95)
    pixels = photo.pixels.copy()
    faces = [faces[0], faces[1]._replace(region=np.array([80, 80, 120, 120]))]
    noise = np.random.default_rng(0).integers(-30, 31, (64, 64, 3))
    pixels[8:72, 8:72] = np.clip(photo.pixels[8:72, 8:72].astype(int) + noise, 0, 255)
    pixels[80:120, 80:120] = np.clip(photo.pixels[80:120, 80:120].astype(int) + 2, 0, 255)
    scaled = workflow._scaled(photo.pixels, pixels, faces, np.array([0.5, 1.0]))
    np.testing.assert_array_equal(scaled[80:120, 80:120], pixels[80:120, 80:120])
    change = scaled[8:72, 8:72].astype(float) - photo.pixels[8:72, 8:72]
    whole = pixels[8:72, 8:72].astype(float) - photo.pixels[8:72, 8:72]
    np.testing.assert_allclose(change, whole / 2, atol=0.5)


def test_without_the_note_nothing_says_that_a_file_is_cloaked():
    photo, faces = _photo()
    flow = _flow(marked=False)
    data = flow._encode(photo, _changed(photo, 2), faces).data
    assert b"afr" not in data and b"cloak" not in data
    again = photos.decode_photo(data)
    assert not flow.is_output(again)
    known = {photos.digest_of_pixels(again.pixels)}
    assert flow.is_output(again, known=known)
    assert not _flow(marked=False, again=True).is_output(again, known=known)


def test_own_output_is_left_as_it_is():
    photo, faces = _photo(90)
    flow = _flow(file_format="jpeg")
    file = flow._encode(photo, _changed(photo, 2), faces)
    assert flow.is_output(photos.decode_photo(file.data))
    assert not flow.is_output(photo)
    assert not _flow(again=True).is_output(photos.decode_photo(file.data))


def test_results_are_saved_as_they_were_encoded(tmp_path):
    result = workflow.CloakedPhoto("a", "cloaked", data=b"file", suffix=".jpg")
    result.save(tmp_path / "a.JPEG")
    assert (tmp_path / "a.JPEG").read_bytes() == b"file"
    with pytest.raises(ValueError, match=r"a.png: this cloaked photo is written as .jpg"):
        result.save(tmp_path / "a.png")
