"""Running the programs from the outside, and the small pictures that they are given."""

import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
from PIL import Image

from afr_jax.core import files, options, parallel, program
from afr_jax.data import image_sets
from afr_jax.recognition import detect, embed

ROOT = pathlib.Path(__file__).resolve().parent.parent
STUB_DRIVER = pathlib.Path(__file__).resolve().parent / "stub_driver.py"


def run(module, *flags):
    """The finished process of `python -m experiments.<module>`, and its result or None."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, flags)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    return done, json.loads(done.stdout) if done.stdout else None


def call(config_class, run_fn, *flags):
    """What a program's function makes of a command line, in this process: (result, complete).

    Wrong usage gives the message alone.
    """
    try:
        outcome = run_fn(program.parse(config_class, [str(flag) for flag in flags]))
    except options.UsageError as error:
        return str(error)
    return json.loads(json.dumps(files.to_jsonable(outcome.result))), outcome.complete


def call_alone(config_class, run_fn, *flags):
    """Like `call`, with one device, as a process of its own would have it.

    The devices of the tests are threads, and four of them that wait for each other at each step are
    slow where few cores are free.
    """
    one = parallel.make_mesh(devices=jax.devices()[:1])
    with mock.patch.object(parallel, "make_mesh", return_value=one):
        return call(config_class, run_fn, *flags)


def stand_in(monkeypatch):
    """Puts a detector and an extractor in place that need no compilation.

    There is one face in every photo that is not black; its embedding is the color of the photo's
    first pixel.
    """

    def detect_faces(variables, pixels, *, options):
        found = detect.Faces(
            np.array([[1, 2, 9, 8]], np.float32),
            np.ones(1, np.float32),
            np.arange(10, dtype=np.float32).reshape(1, 5, 2),
        )
        return found if pixels.max() else detect.no_faces()

    def embed_faces(extractor, variables, faces):
        vectors = [np.resize(pixels[0, 0], extractor.embedding_size) for pixels, _ in faces]
        return np.array(vectors, np.float32).reshape(-1, extractor.embedding_size)

    monkeypatch.setattr(detect, "detect_faces", detect_faces)
    monkeypatch.setattr(embed, "embed_faces", embed_faces)


def save_photo(path, color, *, size=(24, 24)):
    """Writes a photo of one color, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def save_synthetic(folder, num_images, *, seed=0, **options):
    """Writes the images of `image_sets.synthetic` as a folder per class; returns them."""
    data = image_sets.synthetic(seed, num_images, **options)
    data.save(folder)
    return data
