"""The counts of faces that are taken, named or lost, on boxes made by hand."""

import numpy as np
import programs
import pytest
import skimage.data
from PIL import Image

from afr_jax.evaluation.recognition import face_coverage

_NONE = np.zeros((0, 4), np.float32)
_LARGE, _OTHER, _SMALL = (0, 0, 200, 200), (300, 300, 380, 380), (400, 0, 440, 40)


def _boxes(*rows):
    return np.array(rows, np.float32).reshape(-1, 4)


def _count(*, mtcnn=(), yunet=(), annotated=None, taken=(), named=()):
    annotated = None if annotated is None else _boxes(*annotated)
    seen = face_coverage._Seen(
        _boxes(*mtcnn), _boxes(*yunet), annotated, _boxes(*taken), _boxes(*named)
    )
    return face_coverage.count([seen], min_px=60)


def test_each_sure_face_is_taken_named_or_lost():
    near = (5, 5, 205, 195)
    found = _count(mtcnn=[_LARGE, _SMALL], yunet=[near, _OTHER], taken=[near], named=[])
    assert (found["sure"], found["taken"], found["named"], found["lost"]) == (2, 1, 0, 1)
    found = _count(mtcnn=[_LARGE], yunet=[_OTHER], taken=[_LARGE], named=[_OTHER])
    assert (found["sure"], found["taken"], found["named"], found["lost"]) == (2, 1, 1, 0)
    assert _count(mtcnn=[_SMALL])["sure"] == 0


@pytest.mark.parametrize(
    "taken, named, expected",
    [([_OTHER], [], 1), ([_OTHER], [_LARGE], 0), ([_LARGE], [_OTHER], 0), ([], [], 0)],
)
def test_a_photo_called_cloaked_without_its_largest_face(taken, named, expected):
    found = _count(mtcnn=[_LARGE, _OTHER], taken=taken, named=named)
    assert found["false_safety"] == expected


def test_annotated_faces_are_counted_for_each_detector():
    found = _count(
        mtcnn=[_LARGE], yunet=[_OTHER], annotated=[_LARGE, _OTHER, _SMALL], taken=[_LARGE, _OTHER]
    )
    names = ("annotated", "mtcnn_annotated", "yunet_annotated", "taken_annotated")
    assert [found[name] for name in names] == [2, 1, 1, 2]


def test_the_program_draws_what_no_annotation_knows(tmp_path):
    portrait = Image.fromarray(skimage.data.astronaut())
    (tmp_path / "photos").mkdir()
    portrait.save(tmp_path / "photos" / "a.png")
    boxes = tmp_path / "boxes.csv"
    face = "a.png,182,61,84,112"
    for row, known in ((face, True), ("a.png,0,400,60,60", False)):
        boxes.write_text(f"image,x,y,width,height\n{row}\n")
        flags = [f"--images={tmp_path / 'photos'}", f"--boxes={boxes}"]
        work = tmp_path / str(known)
        result, complete = programs.call(
            face_coverage.FaceCoverageConfig,
            face_coverage.run,
            *flags,
            "--not_faces=0",
            f"--workdir={work}",
        )
        assert complete and result["rows"][0]["taken"] == result["rows"][0]["sure"] == 1
        assert result["rows"][0]["taken_annotated"] == int(known)
        assert result["false_faces"] == int(not known)
        assert (work / "unmatched.png").exists() != known
    boxes.write_text("image,x\na.png,1\n")
    message = programs.call(face_coverage.FaceCoverageConfig, face_coverage.run, *flags)
    assert "needs image, x, y, width, height" in message
