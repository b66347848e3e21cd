import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from afr_jax.core import options, program

_ROOT = pathlib.Path(__file__).resolve().parents[2]

_PROGRAM = """
import dataclasses, threading
import logging as std_logging
import numpy as np
from absl import logging
from afr_jax.core import options, program

@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Config):
    '''A program for the test.'''

    do: str = options.option(
        "result",
        "what to do",
        choices=("result", "usage", "folder", "crash", "wait"),
        aliases=("task",),
    )
    steps: int = options.option(100, "gradient steps", at_least=1)

    def toy(self):
        return dataclasses.replace(self, steps=min(self.steps, 3))

def run(config):
    if config.do == "usage":
        raise options.UsageError("no photos given")
    if config.do == "folder":
        raise PermissionError(13, "Permission denied", "out")
    if config.do == "crash":
        raise ZeroDivisionError("a bug")
    if config.do == "wait":
        print("ready")
        threading.Event().wait()
    print("a stray print")
    std_logging.getLogger("jax._src.xla_bridge").info("there is no TPU")
    logging.info("a log line")
    return options.Outcome({**dataclasses.asdict(config), "loss": np.float32("nan")}, False)

if __name__ == "__main__":
    program.main(Config, run)
"""


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
        env={**os.environ, "PYTHONPATH": str(_ROOT), **environment},
    )


def test_main_prints_one_json_line_and_exits_with_the_code(command):
    done = _call(command, "--seed=7", "--toy", "--task=result")
    assert done.returncode == program.EXIT_PARTIAL
    assert json.loads(done.stdout) == {
        "do": "result",
        "loss": None,
        "seed": 7,
        "steps": 3,
        "workdir": None,
    }
    assert done.stdout.count("\n") == 1
    assert "a stray print" in done.stderr and "a log line" in done.stderr
    assert "there is no TPU" not in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--no_such_flag=1"], "no_such_flag"),
        (["--seed=many"], "seed"),
        (["--do=dance"], "--do is 'dance', must be one of result, usage, folder, crash, wait"),
        (["--steps=0"], "--steps is 0, must be at least 1"),
        (["photo.jpg", "--toy"], "unexpected arguments: photo.jpg"),
        (["--do=usage"], "error: no photos given"),
        (["--do=folder"], "error: [Errno 13] Permission denied: 'out'"),
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
    for part in ("A program for the test.", "--workdir", "--seed=0", "--toy", "--do=result"):
        assert part in done.stdout
    assert "gradient steps; at least 1" in done.stdout
    assert "result|usage|folder|crash|wait" in done.stdout


def test_a_bug_exits_1_with_a_traceback(command):
    done = _call(command, "--do=crash")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stdout == ""


def test_interrupt_exits_130_without_a_traceback(command, start_process):
    process = start_process(
        [*command, "--do=wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1"},
    )
    for line in process.stderr:
        if line == "ready\n":
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130
    assert output == "" and errors == "interrupted\n"


@dataclasses.dataclass(frozen=True)
class _Group:
    margin: float = options.option(0.5, "share of the face", at_least=0, at_most=1)
    hidden: int = 3

    def __post_init__(self):
        options.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config(options.Config):
    """A config."""

    photos: tuple[str, ...] = options.option((), "photos")
    factors: tuple[float, ...] = options.option((0.7, 0.8), "scale factors", at_most=1)
    face: _Group = options.group(_Group, margin=0.25, hidden=4)


def test_a_command_line_becomes_a_config():
    config = program.parse(_Config, ["--photos=a.jpg,b.jpg", "--factors=0.5", "--seed=3"])
    assert config == _Config(photos=("a.jpg", "b.jpg"), factors=(0.5,), seed=3)
    assert config.face == _Group(0.25, 4)
    assert program.parse(_Config, ["--factors="]).factors == ()
    assert program.parse(_Config, ["--margin=0.1"]).face == _Group(0.1, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--factors=a"], "--factors"),
        (["--factors=0.5,1.5"], "--factors is 1.5, must be at most 1"),
        (["--margin=2"], "--margin is 2.0, must be at most 1"),
        (["--hidden=1"], "hidden"),
        (["--photos="], "--photos has an empty value"),
        (["--workdir="], "--workdir has an empty value"),
        (["a.jpg"], "unexpected arguments: a.jpg"),
    ],
)
def test_wrong_command_lines(arguments, message):
    with pytest.raises(options.UsageError, match=message):
        program.parse(_Config, arguments)
