"""A driver for tests: finds one face at a fixed place, and cloaks by darkening a little."""

import os
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "experiments" / "reference"))

import serving


def detect(paths, **options):
    assert sorted(options) == ["min_face_px", "overlaps", "scale_factor", "thresholds"], options
    row = [0, 10, 20, 50, 70, 0.99, *range(20, 25), *range(30, 35)]
    return {"seconds": [0.5] * len(paths), "faces": [[row] for path in paths]}


def cloak(chips, output, steps, **options):
    np.save(output, np.maximum(np.load(chips), 8) - 8)
    return {"seconds": 100.0 * steps}


def fail():
    raise ValueError("no such thing")


def crash():
    print("last words", file=sys.stderr, flush=True)
    os._exit(5)


def noise():
    print("a stray print")
    os.system("echo a stray child")
    return {"text": "wörds"}


handlers = dict(detect=detect, cloak=cloak, fail=fail, crash=crash, noise=noise)
serving.serve(serving.versions("numpy", "no_such_package"), handlers)
