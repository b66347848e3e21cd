r"""Speed of noise search and victim training, beside plain PyTorch on the same machine.

    python -m experiments.unlearnable_speed --peer_python=peers/bin/python --workdir=out/speed
    python -m experiments.unlearnable_speed --num_images=50000 --num_blocks=2,2,2,2 --width=64 \
        --batch_size=512 --num_steps=20 --peer_python=peers/bin/python --workdir=out/speed_h200

The first is a small net for CPUs, the second the published setting for one GPU. Rows: a pass of
signed steps over the noise of all images, and an epoch of a victim without augmentation. Both sides
compile and warm up first, then take turns; on a GPU both compute in bfloat16. The share of the
device's peak is the work of the convolutions and the linear layer over the time and
--peak_teraflops (989 for an H200's dense bfloat16), without it not stated.

Without --peer_python the peer's columns stay empty; its environment needs `torch` alone
(experiments/reference/README.md). Writes `result.json` and `speed.md` into --workdir (default
out/speed). Measure on an idle machine. Expected: on two CPU cores PyTorch is 1.5 (noise) and 2.7
(victim) times as fast, on an H200 ours 2.3 and 1.65 times (25,600 images, 5 steps). --toy: seconds.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from afr_jax.benchmark import timing
from afr_jax.core import files, parallel, program, workdir
from afr_jax.evaluation import reference
from afr_jax.evaluation.attackers import victims
from afr_jax.methods.unlearnable import recipes, search
from afr_jax.models import heads
from afr_jax.models.classifiers import resnet
from afr_jax.training import optimizers, trainer

_NUM_IMAGES = flags.DEFINE_integer("num_images", 1024, "made-up images of 32 px, ten classes", 2)
_NUM_BLOCKS = flags.DEFINE_list("num_blocks", ["1", "1", "1"], "residual blocks of each stage")
_WIDTH = flags.DEFINE_integer("width", 16, "channels of the first stage", 1)
_BATCH = flags.DEFINE_integer("batch_size", 128, "images of a step", 1)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 4, "signed steps of an image in a pass", 1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "timed rounds of each side", 1)
_PEAK = flags.DEFINE_float("peak_teraflops", None, "peak of the device at the precision in use")
_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python of an environment with torch")
_SCRIPT = pathlib.Path(__file__).resolve().parent / "reference" / "unlearnable_driver.py"
_SIDE = 32
_CLASSES = 10


def speed_program() -> tuple[dict[str, Any], int]:
    """Runs the program; returns its result and exit code."""
    toy = flags.FLAGS.toy
    try:
        num_blocks = tuple(int(count) for count in _NUM_BLOCKS.value)
    except ValueError as error:
        raise program.UsageError(f"--num_blocks={','.join(_NUM_BLOCKS.value)}: numbers") from error
    settings = {
        "num_images": 64 if toy else _NUM_IMAGES.value,
        "num_blocks": (1,) if toy else num_blocks,
        "width": 4 if toy else _WIDTH.value,
        "batch_size": min(_BATCH.value, 32 if toy else _NUM_IMAGES.value),
        "num_steps": 2 if toy else _NUM_STEPS.value,
        "repeats": 1 if toy else _REPEATS.value,
        "seed": flags.FLAGS.seed,
    }
    work = workdir.open_workdir(
        flags.FLAGS.workdir or "out/speed", settings, resumable=tuple(settings)
    )
    provenance = program.provenance("experiments.unlearnable_speed")
    generator = np.random.default_rng(flags.FLAGS.seed)
    images = generator.integers(0, 256, (settings["num_images"], _SIDE, _SIDE, 3)).astype(np.uint8)
    labels = (np.arange(len(images)) % _CLASSES).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder, _open_peer() as other:
        rows = _measure(settings, images, labels, pathlib.Path(folder), other)
        versions = other.versions if other is not None else {}
    result = {**provenance, "settings": settings, "peer": versions, "rows": rows}
    page = timing.table(rows) + "\n"
    files.write_atomically(work.path / "speed.md", page.encode(), overwrite=True)
    print(page, file=sys.stderr)
    work.write_result(result)
    return result, program.EXIT_OK


@contextlib.contextmanager
def _open_peer():
    if _PEER_PYTHON.value is None:
        yield None
        return
    try:
        other = reference.Peer(pathlib.Path(_PEER_PYTHON.value).expanduser(), _SCRIPT)
    except reference.PeerError as error:
        raise program.UsageError(f"--peer_python: {error}") from error
    with other:
        yield other


def _measure(settings, images, labels, folder, other) -> list[dict[str, Any]]:
    mesh = parallel.make_mesh()
    dtype = np.float32 if jax.default_backend() == "cpu" else jax.numpy.bfloat16
    net = resnet.ResNet(
        settings["num_blocks"], False, settings["width"], "cifar", _CLASSES, dtype=dtype
    )
    recipe = trainer.Recipe(net, heads.Logits(), optimizers.OptimizerOptions(schedule="constant"))
    data = trainer.place_data(images, labels, mesh)
    shared = {"num_blocks": list(settings["num_blocks"]), "width": settings["width"]}
    shared |= {"batch": settings["batch_size"], "rounds": 1}
    shared |= {"images": os.fspath(folder / "images.npy"), "labels": os.fspath(folder / "l.npy")}
    np.save(shared["images"], images)
    np.save(shared["labels"], labels)

    def theirs(command: str, **arguments):
        return lambda: other.call(command, **shared, **arguments)["seconds"][0]

    work = _forward_flops(recipe, images.shape[1:])
    kinds = {
        # A signed step is a forward and a backward pass to the images: twice a forward pass.
        "noise, one pass": (
            _noise_seconds(settings, data, recipe, mesh),
            lambda: theirs("noise", num_steps=settings["num_steps"]),
            2 * work * len(images) * settings["num_steps"],
        ),
        "victim, one epoch": (
            _epoch_seconds(settings, data, recipe, mesh),
            lambda: theirs("epoch"),
            3 * work * len(images),
        ),
    }
    rows = []
    for name, (ours_fn, theirs_fn, flops) in kinds.items():
        sides = {"ours": ours_fn} | ({} if other is None else {"peer": theirs_fn()})
        samples = timing.take_turns(sides, repeats=settings["repeats"])
        rows.append(timing.compare(name, "s", samples["ours"], samples.get("peer")))
        rate = flops / min(samples["ours"]) / 1e12
        rows.append(timing.state(name, "teraflops/s", rate, None))
        if _PEAK.value:
            rows.append(timing.state(name, "share of peak", rate / _PEAK.value, None))
    return rows


def _noise_seconds(settings, data, recipe, mesh):
    options = dataclasses.replace(
        recipes.published("error_min", "sample"),
        batch_size=settings["batch_size"],
        num_steps=settings["num_steps"],
    )
    arguments = {"recipe": recipe, "options": options, "mesh": mesh}
    state = search.init_search(
        settings["seed"], data, recipe, options, num_rows=len(data.labels), mesh=mesh
    )
    target_of = jax.numpy.arange(_CLASSES)

    def seconds() -> float:
        nonlocal state
        start = time.perf_counter()
        state = search.refine(state, data, target_of, seed=settings["seed"], **arguments)
        jax.block_until_ready(state.noise)
        return time.perf_counter() - start

    return seconds


def _epoch_seconds(settings, data, recipe, mesh):
    options = victims.VictimOptions(batch_size=settings["batch_size"], augmented=False)
    key, batches = victims.init_run(
        settings["seed"], len(data.labels), options, multiple=mesh.devices.size
    )
    shape = data.images.shape[1:]
    state = trainer.init_state(key, recipe, image_shape=shape, mesh=mesh)
    epoch = 0

    def seconds() -> float:
        nonlocal state, epoch
        start = time.perf_counter()
        state, _ = victims.run_epoch(
            key, state, data, batches, epoch, recipe=recipe, options=options, mesh=mesh
        )
        jax.block_until_ready(state)
        epoch += 1
        return time.perf_counter() - start

    return seconds


def _forward_flops(recipe, shape) -> float:
    """Multiplications and additions of a forward pass over one image, as XLA counts for a CPU.

    For GPUs it does not count them.
    """
    host = parallel.replicated(parallel.make_mesh(devices=jax.devices("cpu")[:1]))
    images = jax.ShapeDtypeStruct((1, *shape), np.float32)
    variables = jax.eval_shape(recipe.net.init, jax.random.key(0), images)
    lowered = jax.jit(recipe.net.apply, in_shardings=host).lower(variables, images)
    return float(lowered.cost_analysis()["flops"])


if __name__ == "__main__":
    program.define_flags()
    program.main_of_flags(speed_program)
