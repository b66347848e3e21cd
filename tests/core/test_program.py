import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from afr_jax.core import checkpoint, options, program

_ROOT = pathlib.Path(__file__).resolve().parents[2]

_PROGRAM = """
import atexit, dataclasses, gc, os, signal, threading
import logging as std_logging
from unittest import mock
import numpy as np
from absl import logging
from afr_jax.core import checkpoint, options, program, progress

@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Config):
    '''A program for the test.'''

    do: str = options.option(
        "result",
        "what to do",
        choices=tuple("result usage folder full crash wait swallow wrap save late".split()),
        aliases=("task",),
    )
    steps: int = options.option(100, "gradient steps", at_least=1)

    def toy(self):
        return dataclasses.replace(self, steps=min(self.steps, 3))

def told(name):
    os.kill(os.getpid(), getattr(signal, name))

def run(config):
    if config.do == "usage":
        raise options.UsageError("no photos given")
    if config.do == "folder":
        raise PermissionError(13, "Permission denied", "out")
    if config.do == "full":
        raise OSError(28, "No space left on device", "out/a\\n.json")
    if config.do == "crash":
        raise ZeroDivisionError("a bug")
    if config.do == "wait":
        print("ready")
        threading.Event().wait()
    if config.do == "swallow":
        # Python prints what a callback of the garbage collector raises, and goes on.
        gc.callbacks.append(lambda phase, info: phase == "start" and told("SIGTERM"))
        gc.collect()
        gc.callbacks.clear()
        for _ in progress.track(range(10), description="steps"):
            pass
        print("lost")
    if config.do == "wrap":
        try:
            told("SIGTERM")
        except BaseException as error:
            raise options.UsageError("comparing failed") from error
    if config.do == "save":
        with checkpoint.Checkpoints(config.workdir) as saved:
            # The signal comes in the middle of what Orbax does.
            original = saved._manager.save
            def save(*args, **kwargs):
                told("SIGTERM")
                return original(*args, **kwargs)
            with mock.patch.object(saved._manager, "save", save):
                saved.save(1, {"a": np.zeros(3)})
    if config.do == "late":
        atexit.register(told, "SIGTERM")
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
        "max_megapixels": None,
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
        (["--do=dance"], "--do is 'dance', must be one of result, usage, folder, full, crash"),
        (["--steps=0"], "--steps is 0, must be at least 1"),
        (["photo.jpg", "--toy"], "unexpected arguments: photo.jpg"),
        (["--do=usage"], "error: no photos given"),
        (["--do=folder"], "error: [Errno 13] Permission denied: 'out'"),
        (["--do=full"], r"error: [Errno 28] No space left on device: 'out/a\n.json'"),
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
    assert "result|usage|folder|full|crash|wait|swallow|wrap|save|late" in done.stdout


def test_a_bug_exits_1_with_a_traceback(command):
    done = _call(command, "--do=crash")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "number, code, word",
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_exits_with_its_code_without_a_traceback(
    command, start_process, number, code, word
):
    process = start_process(
        [*command, "--do=wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1"},
    )
    for line in process.stderr:
        if line == "ready\n":
            break
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == code
    assert output == "" and errors == f"{word}\n"


def test_a_signal_that_a_callback_swallows_ends_the_work_at_the_next_step(command):
    done = _call(command, "--do=swallow")
    assert done.returncode == 143
    assert done.stdout == "" and "lost" not in done.stderr
    assert done.stderr.endswith("terminated\n") and "Traceback" not in done.stderr


def test_a_signal_that_a_library_makes_another_error_of_is_told(command):
    done = _call(command, "--do=wrap")
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "terminated\n")


def test_a_checkpoint_that_is_begun_is_completed_before_a_signal_counts(command, tmp_path):
    done = _call(command, "--do=save", f"--workdir={tmp_path}")
    assert (done.returncode, done.stdout) == (143, "") and done.stderr.endswith("terminated\n")
    with checkpoint.Checkpoints(tmp_path) as saved:
        assert saved.latest_step() == 1


def test_a_signal_during_exit_counts(command):
    done = _call(command, "--do=late")
    assert done.returncode == 143 and json.loads(done.stdout)["do"] == "late"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_during_imports_ends_a_program(name, code):
    """Handled from the first import on, before those that take seconds."""
    told = f"import signal, experiments; signal.raise_signal(signal.{name}); print('lost')"
    done = _call([sys.executable, "-c", told])
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr


def test_a_signal_that_is_ignored_stays_ignored(command):
    """As shells start jobs in the background."""
    ignored = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    told = "import signal, experiments; signal.raise_signal(signal.SIGINT); print('goes on')"
    done = _call([sys.executable, "-c", ignored, "-c", told])
    assert (done.returncode, done.stdout) == (0, "goes on\n")


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
