"""Data of the face study: who is who, aligned crops, the middle of a photo."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from afr_jax.data import image_sets
from afr_jax.evaluation.unlearnable import faces
from afr_jax.models import heads
from afr_jax.training import optimizers, trainer


def test_people_and_photos_are_divided_without_overlap():
    data = image_sets.synthetic(0, 160, num_classes=8, side=8)
    division = faces.divide(data, num_auxiliary=3, num_protected=2, held_out=0.3, seed=1)
    groups = division.auxiliary, division.protected, division.clean
    assert [len(group) for group in groups] == [3, 2, 3]
    assert sorted(sum(groups, ())) == sorted(data.classes)
    assert division.training.classes == tuple(sorted(division.protected + division.clean))
    assert not set(division.training.sample_ids) & set(division.held_out.sample_ids)
    assert not set(division.search.sample_ids) & set(division.held_out.sample_ids)
    # Of each person's photos about the share is held out, one at least.
    counts = np.bincount(division.held_out.labels, minlength=5)
    every = counts + np.bincount(division.training.labels, minlength=5)
    np.testing.assert_array_equal(counts, np.maximum(1, np.round(0.3 * every)))
    # Labels follow the names in every part.
    for part in (division.search, division.training, division.held_out):
        for name, label in zip(part.sample_ids, part.labels, strict=True):
            assert name.startswith(f"{part.classes[label]}/")
    again = faces.divide(data, num_auxiliary=3, num_protected=2, held_out=0.3, seed=1)
    assert again.protected == division.protected
    with pytest.raises(ValueError, match="8 people"):
        faces.divide(data, num_auxiliary=6, num_protected=2)


def test_aligned_crops_put_the_eyes_where_the_template_has_them():
    """Dots at the landmarks of a turned, larger face arrive at the template's places."""
    template = faces._TEMPLATE
    angle, scale = 0.3, 1.6
    turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    landmarks = (template - 56) @ turn.T + np.array([140.0, 150.0])
    rows, columns = np.mgrid[:300, :300]
    photo = np.zeros((300, 300, 3), np.uint8)
    for y, x in landmarks:
        photo[np.hypot(rows - y, columns - x) < 4] = 255
    for side in (112, 56):
        crop = faces.aligned(photo, landmarks, side)[..., 0].astype(float)
        # Pixel centers of a crop of another side lie half a pixel inwards.
        places = (template + 0.5) * side / 112 - 0.5
        rows_in, columns_in = np.mgrid[:side, :side]
        for y, x in places:
            near = crop * (np.hypot(rows_in - y, columns_in - x) < 6 * side / 112)
            center = np.array([(near * rows_in).sum(), (near * columns_in).sum()]) / near.sum()
            assert np.abs(center - [y, x]).max() < 0.6, (side, center, (y, x))


def test_the_middle_of_an_lfw_photo_has_the_template_s_scale():
    photo = np.zeros((250, 250, 3), np.uint8)
    photo[50:184, 58:192] = 255
    assert (faces.centered(photo, 67) == 255).all()
    photo[:48], photo[186:] = 7, 7
    assert faces.centered(photo, 67).shape == (67, 67, 3)


class _Net(nn.Module):
    @nn.compact
    def __call__(self, images, *, train=False):
        return nn.Dense(5)(nn.relu(nn.Conv(4, (3, 3), 2)(images)).mean(axis=(1, 2)))


def test_embeddings_do_not_depend_on_the_devices(one_device, spread):
    """Eleven crops in batches of four, of unit length."""
    images = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
    recipe = trainer.Recipe(_Net(), heads.Logits(), optimizers.OptimizerOptions())
    state = trainer.init_state(jax.random.key(0), recipe, image_shape=(8, 8, 3))
    mesh, backend = spread
    expected = faces.embeddings(_Net(), state, images, batch_size=4, mesh=one_device)
    found = faces.embeddings(_Net(), state, images, batch_size=4, mesh=mesh, backend=backend)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-6)
