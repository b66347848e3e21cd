"""The sheet of faces beside their cloaks."""

import numpy as np
import pytest
from PIL import Image

from afr_jax.core import options
from afr_jax.evaluation.cloaking import mode_sheet
from afr_jax.methods.cloaking import workflow

_BOX, _FACE_PX = [2, 4, 42, 34], 80
_SHIFT = {"low": 10, "0.007": 40}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two photos, one that is none, and one without a face; cloaks are a shift of all levels."""

    def cloak(recognizer, pixels, *, config, face_filter):
        assert face_filter.faces == "largest" and set(recognizer.extractors) == {"dlib"}
        if pixels[0, 0, 0] == 3:
            return [workflow.CloakedPhoto("", "no_face", "no face")]
        amount = _SHIFT["low" if config.dssim_budget is None else str(config.dssim_budget)]
        likeness = dict.fromkeys(("ssimulacra2", "ssimulacra2_close"), 90.0 - amount)
        visibility = {**likeness, "ciede2000_p99": amount / 10}
        face = {"box": _BOX, "status": "cloaked", "dssim": amount / 1000, "visibility": visibility}
        return [workflow.CloakedPhoto("", "cloaked", None, [face], pixels + np.uint8(amount))]

    monkeypatch.setattr(workflow, "cloak", cloak)
    for name, shade in (("a", 100), ("b", 150), ("no_face", 3)):
        Image.new("RGB", (48, 60), (shade,) * 3).save(tmp_path / f"{name}.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path


def test_each_row_is_a_face_with_its_cloaks(folder):
    config = mode_sheet.ModeSheetConfig(
        images=(str(folder),),
        budgets=("low", "0.007"),
        surrogates=("dlib",),
        face_px=_FACE_PX,
        workdir=str(folder / "out"),
    )
    outcome = mode_sheet.run(config)
    assert not outcome.complete
    result = outcome.result
    assert [item["image"] for item in result["not_handled"]] == ["bad.png", "no_face.png"]
    assert [(row["image"], row["budget"], row["dssim"]) for row in result["rows"]] == [
        *(("a.png", "low", 0.01), ("a.png", "0.007", 0.04)),
        *(("b.png", "low", 0.01), ("b.png", "0.007", 0.04)),
    ]
    sheet = np.asarray(Image.open(folder / "out" / "sheet.png"))
    rows = len(sheet) // 2
    centers = sheet[_FACE_PX // 2 :: rows, _FACE_PX // 2 :: _FACE_PX, 0]
    assert centers.tolist() == [[100, 110, 140], [150, 160, 190]]


def test_budgets_are_checked_first():
    with pytest.raises(ValueError, match="budgets must be of low, mid, high"):
        mode_sheet.ModeSheetConfig(budgets=("faint",))
    with pytest.raises(options.UsageError, match="--images"):
        mode_sheet.run(mode_sheet.ModeSheetConfig(images=("missing",)))
