"""The row on epochs of the patch attack: extrapolation, and what the other side is given."""

import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data

from afr_jax.benchmark import patches
from afr_jax.data import video
from afr_jax.methods.patches import scenes, training
from afr_jax.methods.patches.config import PatchConfig
from afr_jax.models import mtcnn

_CONFIG = PatchConfig(
    patch_px=10,
    levels=scenes.LevelOptions(
        min_face_px=60, scale_factors=(0.709,), window_ratios=(0.6, 1.6), draws=1
    ),
)


class _Other:
    """Stands in for the driver; keeps what it was asked."""

    def call(self, command, **arguments):
        assert command == "train"
        self.arguments = arguments
        self.photos = np.load(arguments["photos"])
        self.coordinates = np.load(arguments["coordinates"])
        return {"seconds": 8.0}


@pytest.fixture
def trainer(monkeypatch):
    """Stands in for the compiled training: says what is asked of it."""
    asked = []

    def make_trainer(key, variables, batch, config, **options):
        asked.append((config.stage_weight, batch.side.shape[0]))
        return training.Trainer(
            start_fn=lambda key, num_starts: jnp.zeros(num_starts),
            advance_fn=lambda states, num_steps: (states + num_steps, {}),
            judge_fn=None,
        )

    monkeypatch.setattr(training, "make_trainer", make_trainer)
    return asked


def test_the_speed_of_epochs_is_extrapolated_to_a_run(tmp_path, trainer):
    portrait = skimage.data.astronaut()[:160, 128:288]
    frames = [video.Frame("a", portrait), video.Frame("sky", np.zeros_like(portrait))]
    other = _Other()
    rows = patches.measure(
        "patches",
        mtcnn.load_variables(),
        frames,
        tmp_path,
        other,
        config=_CONFIG,
        epochs=2,
        repeats=1,
        is_film=False,
    )
    epochs, minutes, default, _ = rows
    assert epochs["quantity"] == "s per epoch" and minutes["quantity"] == "minutes for 2000 epochs"
    assert minutes["ours"]["median"] == pytest.approx(epochs["ours"]["median"] * 2000 / 60)
    assert all(row["ours"]["low"] > 0 for row in rows)
    assert "1 frames" in epochs["row"] and "as published" in epochs["row"]
    assert trainer == [(0.0, 1), (_CONFIG.stage_weight, 1)]
    # Eight seconds for two epochs; the other side has no R-Net and no O-Net.
    assert epochs["peer"]["median"] == 4.0 and default["peer"] is None
    assert other.photos.shape == (1, 160, 160, 3) and other.coordinates.shape == (1, 2, 160, 160, 2)
    assert other.arguments["patch"] == [2, *_CONFIG.shapes()["left_cheek"]]
    # What a patch covers looks into it.
    assert 0.002 < (np.abs(other.coordinates).max(-1) <= 1).mean() < 0.2


def test_frames_without_a_face_are_refused(tmp_path):
    frames = [video.Frame("sky", np.zeros((64, 64, 3), np.uint8))]
    with pytest.raises(ValueError, match="show no face"):
        patches.measure(
            "patches",
            mtcnn.load_variables(),
            frames,
            tmp_path,
            None,
            config=_CONFIG,
            epochs=1,
            repeats=1,
        )
