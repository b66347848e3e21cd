"""Hot loops beside the device's limit: XLA's count, both clocks, scaling and its plot."""

import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from PIL import Image

from afr_jax.benchmark import program as benchmark
from afr_jax.benchmark import timing, unlearnable
from afr_jax.benchmark.limits import compiled, hot_loops


def test_the_first_run_counts_what_it_compiles():
    side = 96
    square = jnp.ones((side, side))

    @jax.jit
    def product(matrix):
        # A loop counts as one pass.
        return jax.lax.fori_loop(0, 5, lambda _, total: total @ matrix, matrix)

    for _ in range(2):  # The second time nothing is known any more.
        found = compiled.first_run(lambda: product(square))
        (program,) = found.programs
        assert program.name == "product" and found.seconds > 0
        assert program.flops == pytest.approx(2 * side**3, rel=0.01)
        least = 4 * 3 * side**2
        assert least <= program.bytes_accessed < 10 * least
        assert 2 * 4 * side**2 <= program.memory_bytes < 10 * least


def test_the_clocks_differ_by_what_the_process_waits():
    taken = timing.by_both_clocks({"wait": lambda: time.sleep(0.2)}, repeats=2)
    assert len(taken["wait"]) == 2
    for took in taken["wait"]:
        assert took.wall >= 0.2 and took.processor < 0.15


def test_a_process_that_was_started_is_not_others():
    before = timing.load().took
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    spent = timing.load().took - before
    assert spent.processor >= 0.28  # In ticks of a hundredth of a second.


def test_peaks_are_the_best_of_what_was_taken(monkeypatch):
    monkeypatch.setattr(compiled, "_COPIED", 1000)
    monkeypatch.setitem(compiled._MATRIX, jax.default_backend(), 10)
    sides = compiled.peak_sides()
    assert sides["matmul"]().shape == (10, 10) and sides["copy"]().shape == (1000,)
    taken = {
        "matmul": [timing.Took(2.0, 1.0), timing.Took(3.0, 4.0)],
        "copy": [timing.Took(1.0, 0.5)],
    }
    assert compiled.peak(taken, clock="wall") == (2000 / 2, 8000 / 1)
    assert compiled.peak(taken, clock="processor") == (2000 / 1, 8000 / 0.5)


def test_a_loop_beside_the_limit(tmp_path):
    flags = ["--rows=loops", "--loops=search", "--repeats=1", f"--workdir={tmp_path}"]
    result, complete = programs.call(benchmark.BenchmarkConfig, benchmark.run, *flags)
    assert complete and json.loads((tmp_path / "result.json").read_text()) == result
    rows = {(row["row"], row["quantity"]): row["ours"] for row in result["rows"]}
    name = "exact search, 256 probes, 16384 rows"
    # A product of probes and rows, and little for the largest scores.
    assert 0.9 < 2 * 128 * 16384 / 1e6 / rows[name, "MFLOP per probe"] < 1
    for share in ("share of the best product", "share of the best copy"):
        assert 0 < rows[name, share] < 1.5
    assert rows["the device", "copy, GB a processor second"] > 0
    assert 0 <= result["used_by_others"] <= 1


def test_scaling_over_batches_and_the_devices_that_there_are(tmp_path, monkeypatch):
    def cloak_loop(batch, steps, seed):
        return hot_loops.HotLoop("cloak", "face and step", batch * steps, 1, lambda: None)

    asked, sets = [], []

    def noise_pass(options, data, recipe, mesh, seed):
        sets.append(len(data.labels))
        return lambda: None

    def victim_epoch(options, data, recipe, mesh, seed):
        asked.append(mesh.devices.size)
        return lambda: time.sleep(0.001)

    monkeypatch.setattr(hot_loops, "cloak_loop", cloak_loop)
    monkeypatch.setattr(unlearnable, "victim_epoch", victim_epoch)
    monkeypatch.setattr(unlearnable, "noise_pass", noise_pass)
    flags = ["--rows=scaling", "--repeats=3", "--scaling_devices=1,2,999", f"--workdir={tmp_path}"]
    result, _ = programs.call(benchmark.BenchmarkConfig, benchmark.run, *flags)
    assert asked == [1, 2] and sets == [10, 100, 1000, 10_000]
    rows = {(row["row"], row["quantity"]): row["ours"] for row in result["rows"]}
    batches = [f"cloak step by faces of a batch, {n}" for n in (1, 2, 4, 8, 16, 32, 64)]
    devices = [f"training step by devices, {n}" for n in (1, 2)]
    lengths = [f"cloak of one face by steps, {n}" for n in (1, 10, 100)]
    images = [f"signed step of noise by images, {n}" for n in sets]
    assert [name for name, _ in rows][::2] == batches + lengths + images + devices
    # A thousandth of a second for 256 images.
    assert rows[devices[0], "ms per image"]["low"] >= 1 / 256
    picture = np.asarray(Image.open(tmp_path / "scaling.png").convert("L"))
    assert picture.shape[0] > 300 and picture.std() > 10
    # Where there are no such devices the rest is measured all the same.
    flags = [
        "--rows=scaling",
        "--repeats=1",
        "--scaling_devices=999",
        f"--workdir={tmp_path / 'x'}",
    ]
    result, _ = programs.call(benchmark.BenchmarkConfig, benchmark.run, *flags)
    assert len(result["rows"]) == 2 * len(batches + lengths + images)
