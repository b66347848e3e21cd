"""Runs whose work folder lies in an object store, from the outside."""

import json
import os
import signal
import subprocess
import sys
import time

import fsspec
import programs
import pytest

_EPOCHS = 20


@pytest.mark.slow
def test_a_killed_run_goes_on_from_what_the_store_has(bucket, tmp_path):
    for name, seed in (("train", 0), ("test", 1)):
        programs.save_synthetic(tmp_path / name, 24, seed=seed, num_classes=3)
    flags = [f"--data={tmp_path / 'train'}", f"--test_data={tmp_path / 'test'}", "--toy"]
    flags += [f"--epochs={_EPOCHS}", "--batch_size=12"]
    address = f"{bucket}/runs/1"
    command = [sys.executable, "-m", "experiments.train_victim", *flags, f"--workdir={address}"]
    store = fsspec.filesystem("s3")

    def complete():
        """Checkpoints that the store has; Orbax writes this file at last."""
        found = store.find(f"{address}/checkpoints", refresh=True)
        return {int(path.split("/")[-2]) for path in found if path.endswith("_CHECKPOINT_METADATA")}

    with subprocess.Popen(
        command, cwd=programs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as killed:
        while not complete():
            assert killed.poll() is None
            time.sleep(0.05)
        killed.kill()
        assert killed.communicate()[0] == "" and killed.returncode == -signal.SIGKILL
    assert 0 < max(complete()) < _EPOCHS
    done, result = programs.run("train_victim", *flags, f"--workdir={address}")
    assert done.returncode == 0, done.stderr
    assert max(complete()) == _EPOCHS
    assert json.loads(store.cat(f"{address}/result.json")) == result
    undisturbed = programs.run("train_victim", *flags, f"--workdir={tmp_path / 'work'}")[1]
    differing = {"workdir", "command", "commit", "date", "settings"}
    assert {k: v for k, v in result.items() if k not in differing} == {
        k: v for k, v in undisturbed.items() if k not in differing
    }
    for name in ("curve.csv", "metrics.jsonl"):
        assert store.cat(f"{address}/{name}") == (tmp_path / "work" / name).read_bytes()


def test_what_cannot_be_in_a_store_is_refused_before_anything_is_written(tmp_path):
    command = [sys.executable, "-m", "experiments.cloak", "--toy", "--output_dir=s3://bucket/out"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(programs.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    message = "error: --output_dir must be a file or folder; --workdir and --database may be in"
    assert done.stderr.splitlines()[-1].startswith(message)
