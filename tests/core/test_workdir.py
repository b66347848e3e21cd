import dataclasses
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from afr_jax.core import options, workdir


def test_workdir_is_created_and_resumed(tmp_path):
    config = {"num_steps": 3, "model": {"width": 8, "rates": (0.1, float("inf"))}}
    work = workdir.open_workdir(tmp_path / "a" / "b", config)
    assert not work.resumed
    stored = json.loads((work.path / "config.json").read_text())
    assert stored == {"num_steps": 3, "model": {"width": 8, "rates": [0.1, None]}}
    assert workdir.open_workdir(tmp_path / "a" / "b", config).resumed


def test_workdir_of_another_run_is_refused_with_the_keys(tmp_path):
    workdir.open_workdir(tmp_path, {"a": 1, "b": {"c": 2, "d": 3}, "old": 0})
    with pytest.raises(options.UsageError) as error:
        workdir.open_workdir(tmp_path, {"a": 1, "b": {"c": 9, "d": 3}, "new": 5})
    message = str(error.value)
    assert 'b.c (was 2, is 9); new (was "absent", is 5); old (was 0, is "absent")' in message
    assert "b.d" not in message
    assert json.loads((tmp_path / "config.json").read_text())["b"]["c"] == 2


def test_resumable_keys_may_change(tmp_path):
    workdir.open_workdir(tmp_path, {"num_steps": 3, "b": {"c": 2}})
    new = {"num_steps": 9, "b": {"c": 3}}
    assert workdir.open_workdir(tmp_path, new, resumable=("num_steps", "b.c")).resumed
    assert json.loads((tmp_path / "config.json").read_text()) == new


def test_unusable_workdirs_are_wrong_usage(tmp_path):
    with pytest.raises(options.UsageError, match="--workdir is needed"):
        workdir.open_workdir(None, {})
    (tmp_path / "file").touch()
    with pytest.raises(options.UsageError, match="cannot use"):
        workdir.open_workdir(tmp_path / "file", {})
    with pytest.raises(options.UsageError, match="cannot use"):
        workdir.open_workdir("/proc/none", {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(options.UsageError, match="cannot use"):
        workdir.open_workdir(tmp_path, {})


def test_metrics_are_appended_and_truncated_to_the_checkpoint(tmp_path):
    work = workdir.open_workdir(tmp_path, {})
    work.truncate_metrics(0)
    assert work.read_metrics() == []
    for step in range(5):
        work.append_metrics({"step": step, "loss": jnp.float32(step) / 2})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    work.truncate_metrics(2)
    assert work.read_metrics() == [{"step": step, "loss": step / 2} for step in range(3)]
    work.append_metrics({"step": 3, "loss": np.nan})
    assert '\n{"step": 3, "loss": null, "checksum": "' in (tmp_path / "metrics.jsonl").read_text()


def test_damaged_lines_of_metrics_are_left_out_and_counted(tmp_path, caplog):
    work = workdir.open_workdir(tmp_path, {})
    for step in range(4):
        work.append_metrics({"step": step, "loss": 0.25 * step})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b"0.25", b"0.75")
    lines[2] = lines[2][:-9] + b"\xff\xfe"
    path.write_bytes(b"\n".join(lines) + b'{"step": 4, "lo')
    assert [line["step"] for line in work.read_metrics()] == [0, 3]
    assert f"{path}: 2 damaged lines are left out" in caplog.text
    # A line is not written behind a torn one.
    work.append_metrics({"step": 4})
    assert [line["step"] for line in work.read_metrics()] == [0, 3, 4]


def test_result_is_written(tmp_path):
    work = workdir.open_workdir(tmp_path, {})
    work.write_result({"accuracy": np.float64(0.5)})
    assert json.loads((tmp_path / "result.json").read_text()) == {"accuracy": 0.5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config(options.Config):
    width: int = options.option(8, "channels")
    log_steps: int = options.option(10, "between two log lines", resumable=True)


_HOLD = """
import sys
from afr_jax.core import options, workdir

try:
    work = workdir.open_workdir(sys.argv[1], {"a": 1})
    print("held", flush=True)
    sys.stdin.readline()
    work.append_metrics({"step": 1})
except options.UsageError as error:
    print(error, flush=True)
"""


def test_two_processes_do_not_share_a_folder(tmp_path, start_process):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    first, second = (start_process(command, **pipes) for _ in range(2))
    said = {child.stdout.readline().strip(): child for child in (first, second)}
    holder = said.pop("held")
    (message,) = said
    assert message.startswith(f"{tmp_path} is in use by process {holder.pid} on ")
    with pytest.raises(options.UsageError, match=f"in use by process {holder.pid}"):
        workdir.open_workdir(tmp_path, {"a": 1})
    with pytest.raises(options.UsageError, match="in use"), workdir.claimed(tmp_path):
        pass
    holder.kill()  # A lock goes with its process.
    holder.wait()
    work = workdir.open_workdir(tmp_path, {"a": 1})
    third = start_process(command, **pipes)
    assert f"in use by process {os.getpid()}" in third.stdout.readline()
    assert workdir.open_workdir(tmp_path, {"a": 1}) == work and work.resumed
    del work  # And with the object.
    fourth = start_process(command, **pipes)
    assert fourth.stdout.readline() == "held\n"


def test_what_killed_runs_left_half_written_goes(tmp_path, start_process):
    left = [tmp_path / name / ".0123456789abcdef.partial" for name in ("", "cells", "a/b")]
    others = [
        tmp_path / ".partial",
        tmp_path / "cells" / "x.partial",
        tmp_path / "a" / ".0.partial",
    ]
    for path in [*left, *others]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    code = (
        "import os, sys; from afr_jax.core import files\n"
        "def fsync(number): print('writing', flush=True); sys.stdin.readline()\n"
        "os.fsync = fsync; files.write_atomically(sys.argv[1], b'whole')"
    )
    writer = start_process(
        [sys.executable, "-c", code, str(tmp_path / "cells" / "new")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    writer.stdout.readline()
    workdir.open_workdir(tmp_path, {})
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)
    writer.stdin.close()
    assert writer.wait() == 0 and (tmp_path / "cells" / "new").read_bytes() == b"whole"


def test_an_options_class_says_what_may_change(tmp_path):
    workdir.open_workdir(tmp_path, _Config(workdir="a"))
    assert workdir.open_workdir(tmp_path, _Config(workdir="b", log_steps=1)).resumed
    with pytest.raises(options.UsageError, match=r"width \(was 8, is 9\)"):
        workdir.open_workdir(tmp_path, _Config(width=9))


def test_a_cell_is_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"rate": np.float32(0.5), "pair": (1, 2)}

    path = tmp_path / "cells" / "a.json"
    first = workdir.load_or_compute(path, compute)
    assert first == workdir.load_or_compute(path, compute) == {"rate": 0.5, "pair": [1, 2]}
    assert calls == [1]


def test_what_a_run_is_made_of_is_noted(tmp_path):
    path = tmp_path / "drawn.json"
    assert workdir.note(path, {"a": "1", "b": None}) == []
    assert workdir.note(path, {"b": None, "a": "1"}) == []
    assert workdir.note(path, {"a": "2", "c": None}) == ["a", "b", "c"]
    assert workdir.note(path, {"a": "1", "b": None}) == []  # What was noted first stays.


def test_a_damaged_cell_is_computed_again(tmp_path, caplog):
    path = tmp_path / "a.json"
    workdir.load_or_compute(path, lambda: 0.5)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"0.5", b"0.4"))
    assert workdir.load_or_compute(path, lambda: 0.5) == 0.5
    assert f"{path}: made again: damaged" in caplog.text and path.read_bytes() == whole


def test_a_cell_that_fails_leaves_no_file(tmp_path):
    def fail():
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        workdir.load_or_compute(tmp_path / "a.json", fail)
    assert not list(tmp_path.iterdir())


def test_what_was_found_is_kept_by_what_it_depends_on(tmp_path):
    calls = []

    def find(name):
        return lambda: calls.append(name) or {"name": name}

    for _ in range(2):
        kept = workdir.Kept(tmp_path / "kept")
        assert kept.load_or_compute(["a", 1], find("a")) == {"name": "a"}
        assert kept.load_or_compute(["a", 2], find("b")) == {"name": "b"}
    assert calls == ["a", "b"]
    assert kept.load_or_compute(["a", 2], find("c"), anew=True) == {"name": "c"}
    # A run that comes to its end leaves what it used, and files of others.
    (tmp_path / "kept" / "notes.json").touch()
    kept = workdir.Kept(tmp_path / "kept")
    kept.load_or_compute(["a", 1], find("d"))
    kept.drop_unused()
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert calls == ["a", "b", "c"]
    kept.delete()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["notes.json"]
    (tmp_path / "kept" / "notes.json").unlink()
    kept.delete()
    assert not (tmp_path / "kept").exists()
    nothing = workdir.Kept(None)
    assert not nothing and nothing.load_or_compute("a", lambda: np.float32(0.5)) == 0.5
    nothing.drop_unused()
