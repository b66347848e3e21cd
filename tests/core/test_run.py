import dataclasses
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afr_jax.core import backend, files, program, progress, workdir

_ROOT = pathlib.Path(__file__).resolve().parents[2]

_PROGRAM = '''
"""A program for the test."""
import time
import numpy as np
from absl import flags, logging
from afr_jax.core import backend, files, program, progress, workdir

program.define_flags()
_DO = flags.DEFINE_enum("do", "result", ["result", "usage", "crash", "sleep"], "what to do")

def run_experiment():
    if _DO.value == "usage":
        raise program.UsageError("no photos given")
    if _DO.value == "crash":
        raise ZeroDivisionError("a bug")
    if _DO.value == "sleep":
        print("ready")
        time.sleep(60)
    print("a stray print")
    logging.info("a log line")
    result = {"seed": flags.FLAGS.seed, "toy": flags.FLAGS.toy, "loss": np.float32("nan")}
    return result, program.EXIT_PARTIAL

if __name__ == "__main__":
    program.main_of_flags(run_experiment)
'''


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(_PROGRAM)
    return [sys.executable, str(path)]


def _call(command, *arguments, **environment):
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(_ROOT), **environment},
    )


def test_main_prints_one_json_line_and_exits_with_the_code(command):
    done = _call(command, "--seed=7", "--toy")
    assert done.returncode == program.EXIT_PARTIAL
    assert json.loads(done.stdout) == {"seed": 7, "toy": True, "loss": None}
    assert done.stdout.count("\n") == 1
    assert "a stray print" in done.stderr and "a log line" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--no_such_flag=1"], "no_such_flag"),
        (["--seed=many"], "seed"),
        (["--do=dance"], "dance"),
        (["photo.jpg", "--toy"], "unexpected arguments: photo.jpg"),
        (["--do=usage"], "error: no photos given"),
    ],
)
def test_wrong_usage_exits_2_with_a_message(command, arguments, message):
    done = _call(command, *arguments)
    assert done.returncode == program.EXIT_USAGE
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_cluster_variables_are_wrong_usage(command):
    done = _call(command, AFR_COORDINATOR="127.0.0.1:1", AFR_NUM_PROCESSES="2")
    assert done.returncode == program.EXIT_USAGE
    assert "missing: AFR_PROCESS_ID" in done.stderr


def test_help_lists_the_flags_and_exits_0(command):
    done = _call(command, "--help")
    assert done.returncode == program.EXIT_OK
    for flag in ("--workdir", "--seed", "--[no]toy", "--do", "A program for the test."):
        assert flag in done.stdout


def test_a_bug_exits_1_with_a_traceback(command):
    done = _call(command, "--do=crash")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stdout == ""


def test_interrupt_exits_130_without_a_traceback(command):
    process = subprocess.Popen(
        [*command, "--do=sleep"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1"},
    )
    for line in process.stderr:
        if line == "ready\n":
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output == "" and errors == "interrupted\n"


class _Pair(NamedTuple):
    first: int
    second: float


@dataclasses.dataclass(frozen=True)
class _Config:
    num_steps: int = 3
    rates: tuple[float, ...] = (0.1, 0.2)


@pytest.mark.parametrize(
    "value, expected",
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.nan, None),
        (-math.inf, None),
        (np.array([1.0, np.nan, np.inf]), [1.0, None, None]),
        (jnp.ones((2, 1), jnp.bfloat16), [[1.0], [1.0]]),
        (jnp.int32(4), 4),
        (_Pair(1, 2.0), {"first": 1, "second": 2.0}),
        (_Config(), {"num_steps": 3, "rates": [0.1, 0.2]}),
        ({1: (2, 3)}, {"1": [2, 3]}),
        ({"b", "a"}, ["a", "b"]),
        (pathlib.Path("a/b"), "a/b"),
        (None, None),
    ],
)
def test_to_jsonable(value, expected):
    result = files.to_jsonable(value)
    assert result == expected
    assert type(result) is type(expected)


def test_to_jsonable_rejects_what_json_cannot_say():
    with pytest.raises(TypeError, match="object"):
        files.to_jsonable({"a": object()})


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_write_json_respects_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_workdir_is_created_and_resumed(tmp_path):
    config = {"num_steps": 3, "model": {"width": 8, "rates": (0.1, float("inf"))}}
    work = workdir.open_workdir(tmp_path / "a" / "b", config)
    assert not work.resumed
    stored = json.loads((work.path / "config.json").read_text())
    assert stored == {"num_steps": 3, "model": {"width": 8, "rates": [0.1, None]}}
    assert workdir.open_workdir(tmp_path / "a" / "b", config).resumed


def test_workdir_of_another_run_is_refused_with_the_keys(tmp_path):
    workdir.open_workdir(tmp_path, {"a": 1, "b": {"c": 2, "d": 3}, "old": 0})
    with pytest.raises(program.UsageError) as error:
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
    with pytest.raises(program.UsageError, match="--workdir is needed"):
        workdir.open_workdir(None, {})
    (tmp_path / "file").touch()
    with pytest.raises(program.UsageError, match="cannot use"):
        workdir.open_workdir(tmp_path / "file", {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(program.UsageError, match="cannot use"):
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
    assert (tmp_path / "metrics.jsonl").read_text().endswith('{"step": 3, "loss": null}\n')


def test_result_is_written(tmp_path):
    work = workdir.open_workdir(tmp_path, {})
    work.write_result({"accuracy": np.float64(0.5)})
    assert json.loads((tmp_path / "result.json").read_text()) == {"accuracy": 0.5}


@pytest.fixture
def cache_settings():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("cache_settings")
def test_compilation_cache_lies_in_the_cache_folder_of_the_user(tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert backend.enable_compilation_cache() == tmp_path / "afr_jax" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "afr_jax" / "xla")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    assert backend.enable_compilation_cache() == tmp_path / ".cache" / "afr_jax" / "xla"


@pytest.mark.usefixtures("cache_settings")
def test_a_configured_compilation_cache_is_kept(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert backend.enable_compilation_cache() == tmp_path / "mine"
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    assert backend.enable_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/cache"


@pytest.mark.usefixtures("cache_settings")
def test_an_unusable_cache_folder_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file"))
    assert backend.enable_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_a_bar_on_a_terminal(monkeypatch):
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress.track(3, description="photos")) == [0, 1, 2]
    assert "photos" in terminal.getvalue() and "3/3" in terminal.getvalue()


@pytest.mark.parametrize(
    "force, environment, is_shown", [(None, "0", False), (None, "1", True), (True, "0", True)]
)
def test_progress_elsewhere_logs_only_when_forced(
    monkeypatch, caplog, force, environment, is_shown
):
    monkeypatch.setenv("AFR_PROGRESS", environment)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level("INFO", logger="absl"):
        items = progress.track(iter("ab"), description="photos", total=2, force=force)
        assert list(items) == ["a", "b"]
    assert ("photos: 2/2" in caplog.text) == is_shown


def test_progress_logs_once_in_an_interval(monkeypatch, caplog):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level("INFO", logger="absl"):
        list(progress.track(iter(range(9)), description="steps", force=True))
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "steps: 3",
        "steps: 6",
        "steps: 9",
    ]
