"""What trackers' names say, and that trackers see photos as their names say."""

import dataclasses

import numpy as np
import pytest
import skimage.data
from PIL import Image

from afr_jax.evaluation.attackers import tracker_names
from afr_jax.evaluation.cloaking import embeddings
from afr_jax.recognition import detect, embed, pipeline
from afr_jax.recognition.detectors import yunet

_NAMES = ("dlib", "dlib@yunet", "dlib@mirror", "dlib@yunet@mirror")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("sface", ("sface", "mtcnn", False)),
        ("sface@yunet", ("sface", "yunet", False)),
        ("sface@mirror", ("sface", "mtcnn", True)),
        ("sface@yunet@mirror", ("sface", "yunet", True)),
        # What is no habit belongs to the name of a folder.
        ("out/me@home", ("out/me@home", "mtcnn", False)),
    ],
)
def test_names(text, expected):
    assert tracker_names.parse(text) == expected


def test_trackers_align_and_mirror_as_their_names_say(tmp_path):
    pixels = skimage.data.astronaut()[:280, 80:360]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    plain = pipeline.load_recognizer("dlib")
    trackers = tracker_names.add_trackers(plain, _NAMES)
    found = embeddings.embed_photos(trackers, [tmp_path / "a.png"], tmp_path / "kept")
    mtcnn = detect.main_face(detect.detect_faces(plain.detector, pixels), pixels.shape)
    seen = {"mtcnn": mtcnn, "yunet": yunet.load()(pixels)}
    assert not np.allclose(seen["mtcnn"].landmarks, seen["yunet"].landmarks, atol=0.5)
    for name in _NAMES:
        extractor, aligner, mirrored = tracker_names.parse(name)
        own = dataclasses.replace(plain.extractors[extractor], mirrored=mirrored)
        landmarks = seen[aligner].landmarks[0]
        expected = embed.embed_faces(own, plain.variables[extractor], [(pixels, landmarks)])
        np.testing.assert_allclose(found[name].vectors, expected, atol=1e-5)
        np.testing.assert_allclose(found[name].landmarks[0], landmarks, atol=1e-3)
    vectors = [found[name].vectors[0] for name in _NAMES]
    apart = [np.linalg.norm(a - b) for i, a in enumerate(vectors) for b in vectors[:i]]
    assert min(apart) > 1e-3
