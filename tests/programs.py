"""Running the programs from the outside, and the small pictures that they are given."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
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


def run_together(commands, *, disturb_fn=None):
    """The finished processes of some commands, which are one distributed run on the CPU.

    Each has one device. Whatever one says goes to files, so that none waits for a reader. With
    `disturb_fn`, that is called with the running processes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")
    }
    environment |= {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "1",
        "AFR_COORDINATOR": f"127.0.0.1:{port}",
        "AFR_NUM_PROCESSES": str(len(commands)),
    }
    with contextlib.ExitStack() as stack:
        started = []
        for index, command in enumerate(commands):
            said = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
            process = subprocess.Popen(
                command,
                env={**environment, "AFR_PROCESS_ID": str(index)},
                cwd=ROOT,
                stdout=said[0],
                stderr=said[1],
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append((process, said))
        if disturb_fn is not None:
            disturb_fn([process for process, _ in started])
        ended = []
        for process, said in started:
            process.wait(timeout=1800)
            for file in said:
                file.seek(0)
            texts = [file.read() for file in said]
            ended.append(subprocess.CompletedProcess(process.args, process.returncode, *texts))
        return ended


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
