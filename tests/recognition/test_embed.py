"""Photos and landmarks to embeddings: batches, canvases and order against one face at a time."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data

from afr_jax.models.extractors import registry
from afr_jax.recognition import align, embed


class _Net(nn.Module):
    @nn.compact
    def __call__(self, chips):
        return nn.Dense(4)(nn.avg_pool(chips, (6, 6), (6, 6)).reshape(chips.shape[0], -1))


_TOY = registry.Extractor(
    name="toy",
    module=_Net(),
    input_px=24,
    template=((7, 7), (7, 16), (12, 12), (17, 8), (17, 15)),
    input_scale=1.0,
    input_offset=0.0,
    embedding_size=4,
    normalized=True,
    thresholds=registry.Thresholds(None, 1.0, None),
    load=dict,
    source="",
    license="",
)
_PORTRAIT = skimage.data.astronaut()


@functools.cache
def _variables():
    return jax.jit(_TOY.module.init)(jax.random.key(0), jnp.zeros((1, 24, 24, 3)))


def _landmarks(scale: float, angle: float, shift: tuple[float, float]) -> np.ndarray:
    turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return np.array(_TOY.template) @ turn.T + np.array(shift)


@functools.partial(jax.jit, static_argnames="pool")
def _embed_one(variables, photo, transform, pool):
    chip = align.warp(photo, transform, size=_TOY.input_px, pool=pool)
    return registry.embed(_TOY, variables, chip[None])[0]


def _expected(pixels, landmarks):
    """From the whole photo, without a canvas."""
    transform = align.similarity_transform(landmarks, np.array(_TOY.template))
    pool = align.pool_factor(align.transform_scale(transform))
    photo = pixels.astype(np.float32) / 255
    return np.asarray(_embed_one(_variables(), photo, transform.astype(np.float32), pool))


@pytest.mark.parametrize("count", [1, 3, 18])
def test_faces_keep_their_order_and_do_not_see_each_other(count):
    """Eighteen faces are a full batch and one that is filled up."""
    rng = np.random.default_rng(count)
    photos = (_PORTRAIT, _PORTRAIT[:300, 60:420])
    faces = [
        (photos[i % 2], _landmarks(*rng.uniform((0.5, -0.5), (1.2, 0.5)), rng.uniform(30, 220, 2)))
        for i in range(count)
    ]
    embeddings = embed.embed_faces(_TOY, _variables(), iter(faces))
    assert embeddings.shape == (count, 4) and embeddings.dtype == np.float32
    expected = np.stack([_expected(*face) for face in faces])
    assert count == 1 or np.ptp(expected, axis=0).max() > 0.1
    # Canvases have coordinates of their own: float32 places to 1e-5 px.
    np.testing.assert_allclose(embeddings, expected, atol=1e-4)


@pytest.mark.parametrize("scale", [2.0, 4.0, 9.0])
def test_large_faces_are_averaged_first(scale):
    landmarks = _landmarks(scale, 0.2, (60, 120))
    (embedding,) = embed.embed_faces(_TOY, _variables(), [(_PORTRAIT, landmarks)])
    # Blocks of pixels begin at the canvas's origin, not at the photo's.
    np.testing.assert_allclose(embedding, _expected(_PORTRAIT, landmarks), atol=0.02)


def test_faces_over_the_edge_and_outside():
    """What lies outside the photo is black."""
    faces = [
        (_PORTRAIT, _landmarks(1.0, 0.1, (-9, 500))),
        (_PORTRAIT, _landmarks(1.0, 0.1, (-400, 900))),
    ]
    embeddings = embed.embed_faces(_TOY, _variables(), faces)
    black = registry.embed(_TOY, _variables(), jnp.zeros((1, 24, 24, 3)))[0]
    np.testing.assert_allclose(embeddings[0], _expected(*faces[0]), atol=1e-4)
    np.testing.assert_allclose(embeddings[1], black, atol=1e-4)


def test_embeddings_do_not_depend_on_the_devices(one_device, spread):
    rng = np.random.default_rng(1)
    faces = [(_PORTRAIT, _landmarks(1.0, 0.1, rng.uniform(30, 220, 2))) for _ in range(19)]
    expected = embed.embed_faces(_TOY, _variables(), faces, mesh=one_device)
    mesh, backend = spread
    found = embed.embed_faces(_TOY, _variables(), faces, mesh=mesh, backend=backend)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_no_faces():
    assert embed.embed_faces(_TOY, _variables(), []).shape == (0, 4)


def test_landmarks_that_span_no_face_are_refused():
    with pytest.raises(ValueError, match="landmarks"):
        embed.embed_faces(_TOY, _variables(), [(_PORTRAIT, np.full((5, 2), 30.0))])


def test_more_faces_do_not_compile_again(no_compilation):
    face = (_PORTRAIT, _landmarks(1.0, 0.0, (80, 180)))
    embed.embed_faces(_TOY, _variables(), [face] * 4)
    with no_compilation():
        embed.embed_faces(_TOY, _variables(), [(_PORTRAIT[9:], face[1] + 3)] * 3)
