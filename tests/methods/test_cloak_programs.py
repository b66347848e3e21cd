"""How many programs a folder of photos of all sizes takes to detect and to cloak."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from PIL import Image

from afr_jax.core import parallel
from afr_jax.methods.cloaking import fawkes, workflow
from afr_jax.models import lpips, mtcnn
from afr_jax.models.extractors import registry
from afr_jax.recognition import detect, pipeline

# Longer side and shape: faces from 40 to 500 px, on canvases of each size and at a half.
_PHOTOS = (
    *((100, 1.0), (170, 0.8), (260, 1.2), (390, 1.0), (450, 0.9)),
    *((520, 1.0), (640, 1.1), (800, 0.9), (1000, 1.0), (1300, 0.8)),
)
_TEMPLATE = ((0.34, 0.34), (0.34, 0.66), (0.5, 0.5), (0.66, 0.36), (0.66, 0.64))


class _Net(nn.Module):
    @nn.compact
    def __call__(self, chips):
        return nn.Dense(8)(nn.Conv(4, (7, 7), 7)(chips).reshape(chips.shape[0], -1))


def _extractor(name: str, side: int) -> registry.Extractor:
    template = tuple((y * side, x * side) for y, x in _TEMPLATE)
    thresholds = registry.Thresholds(0.6, None, None)
    return registry.Extractor(
        name, _Net(), side, template, 1.0, 0.0, 8, False, thresholds, dict, "test", "test"
    )


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    portrait = Image.fromarray(skimage.data.astronaut()[:300, 60:360])
    return [
        np.asarray(
            portrait.resize(
                (side, round(side * shape)) if shape <= 1 else (round(side / shape), side)
            )
        )
        for side, shape in _PHOTOS
    ]


def test_a_folder_of_all_sizes_takes_few_programs(photos, compiled, monkeypatch):
    one = parallel.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: one)
    extractors = {each.name: each for each in (_extractor("a", 70), _extractor("b", 112))}
    variables = {
        name: each.module.init(jax.random.key(0), jnp.zeros((1, each.input_px, each.input_px, 3)))
        for name, each in extractors.items()
    }
    jax.clear_caches()
    compiled.clear()
    detector = mtcnn.load_variables()
    for pixels in photos:
        detect.detect_faces(detector, pixels)
    assert len(compiled) <= 8, compiled
    compiled.clear()
    # LPIPS, which is optional, takes one more.
    monkeypatch.setattr(lpips, "measure", lambda original, final: None)
    recognizer = pipeline.Recognizer(detector, detect.DetectorOptions(), extractors, variables)
    method = fawkes.FawkesConfig(num_steps=1)
    done = workflow.cloak(recognizer, photos, config=method, key=0)
    faces = [face for photo in done for face in photo.faces if face["status"] != "skipped"]
    sides = [max(np.subtract(face["box"][2:], face["box"][:2])) for face in faces]
    # Canvases of 160, 224 and 320 px, and larger faces at whole fractions.
    assert {int(np.digitize(side, [160, 224, 320])) for side in sides} == {0, 1, 2, 3}
    assert len(compiled) <= 12, compiled
    # What else there is takes none at all.
    compiled.clear()
    workflow.cloak(recognizer, [pixels[9:, 5:] for pixels in photos], config=method, key=1)
    assert not compiled
