"""The launch scripts: what they hand to the program, and how a job under SLURM ends."""

import os
import pathlib
import shlex
import signal
import stat
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SCRIPTS = (".ci/run", "launch/local.sh", "launch/slurm.sbatch")

_PROGRAM = '''
import dataclasses
import jax
from afr_jax.core import options, program


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestConfig(options.Config):
    """A program for the test."""


def run(config):
    result = {"devices": jax.device_count(), "platform": jax.default_backend()}
    return options.Outcome(result, complete=False)


if __name__ == "__main__":
    program.main(TestConfig, run)
'''


@pytest.mark.parametrize("script", _SCRIPTS)
def test_scripts_parse_and_may_be_run(script):
    subprocess.run(["bash", "-n", str(_ROOT / script)], check=True, timeout=20)
    assert (_ROOT / script).stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize("script", _SCRIPTS)
def test_scripts_stop_at_the_first_error(script):
    assert "set -euo pipefail" in (_ROOT / script).read_text()


def _local(folder, *arguments, program=_PROGRAM):
    (folder / "program.py").write_text(program)
    return subprocess.run(
        [str(_ROOT / "launch" / "local.sh"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_local_runs_a_module_from_any_folder(tmp_path):
    done = _local(tmp_path, "program", "--help")
    assert done.returncode == 0, done.stderr
    assert "A program for the test." in done.stdout and "--workdir" in done.stdout


def test_local_gives_cpu_devices_and_passes_the_exit_code_on(tmp_path):
    done = _local(tmp_path, "--cpu_devices=3", "program", "--toy")
    assert done.returncode == 3, done.stderr
    assert done.stdout == '{"devices": 3, "platform": "cpu"}\n'


def test_local_starts_several_processes_that_are_one_run(tmp_path):
    program = _PROGRAM.replace('"""A program for the test."""', "shares_work = True")
    done = _local(tmp_path, "--processes=2", "--cpu_devices=2", "program", program=program)
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines()[-1] == '{"devices": 4, "platform": "cpu"}'


def test_local_shows_the_command_of_each_process(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nfor i in 0 1 2 3; do echo GPU; done\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("AFR_COORDINATOR", "127.0.0.1:4321")
    done = _local(tmp_path, "--processes=2", "--dry_run", "program", "--images=my photos")
    assert done.returncode == 0, done.stderr
    for number, line in enumerate(done.stdout.splitlines()):
        words = shlex.split(line)
        assert words[0] == "env" and words[-3:] == ["-m", "program", "--images=my photos"]
        assert {
            f"AFR_PROCESS_ID={number}",
            "AFR_NUM_PROCESSES=2",
            "AFR_COORDINATOR=127.0.0.1:4321",
            f"JAX_LOCAL_DEVICE_IDS={2 * number},{2 * number + 1}",
        } <= set(words)
    assert number == 1
    uneven = _local(tmp_path, "--processes=3", "--dry_run", "program")
    assert uneven.returncode == 2 and "4 GPUs" in uneven.stderr


@pytest.mark.parametrize("arguments", [(), ("--gpus=3", "program"), ("--cpu_devices=none", "p")])
def test_local_rejects_wrong_usage(tmp_path, arguments):
    done = _local(tmp_path, *arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr and done.stdout == ""


@pytest.fixture
def cluster(tmp_path):
    """A folder of commands that stand for SLURM's: they note how they were called."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in {
        "srun": 'echo "srun $* PYTHONPATH=$PYTHONPATH" >>calls; eval "$SRUN_DOES"',
        "scontrol": 'if [[ $1 == show ]]; then echo a; echo b; else echo "$*" >>calls; fi',
    }.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    return tmp_path


def _sbatch(folder, *arguments, srun_does):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("AFR_", "SLURM"))
    }
    environment.pop("PYTHONPATH", None)
    environment |= {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(folder),
        "PYTHON": "python3",
        "SRUN_DOES": srun_does,
    }
    return subprocess.Popen(
        ["bash", str(_ROOT / "launch" / "slurm.sbatch"), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_starts_one_step_and_passes_the_exit_code_on(cluster, code):
    job = _sbatch(cluster, "experiments.verify", "--workdir=w", srun_does=f"exit {code}")
    _, errors = job.communicate(timeout=20)
    assert job.returncode == code and errors == ""
    (call,) = (cluster / "calls").read_text().splitlines()
    assert f"--output={cluster}/logs/%x-%j-%t.log" in call
    assert "python3 -m experiments.verify --workdir=w" in call
    assert call.endswith(f"PYTHONPATH={cluster}")
    assert (cluster / "logs").is_dir()


def test_slurm_goes_back_to_the_queue_when_time_is_nearly_up(cluster):
    for name in ("up", "go_on"):
        os.mkfifo(cluster / name)
    step = "echo >up; read -r _ <go_on; exit 9"
    job = _sbatch(cluster, "experiments.verify", "--workdir=w", srun_does=step)
    (cluster / "up").read_text()  # Until the step runs.
    job.send_signal(signal.SIGUSR1)
    assert "back to the queue" in job.stderr.readline()
    (cluster / "go_on").write_text("\n")
    job.communicate(timeout=60)
    assert (cluster / "calls").read_text().splitlines()[1:] == ["requeue 77"]
    # The job waited for the step to end.
    assert job.returncode == 9


def test_slurm_warns_of_a_run_that_cannot_resume(cluster):
    job = _sbatch(cluster, "experiments.verify", srun_does="exit 0")
    _, errors = job.communicate(timeout=20)
    assert job.returncode == 0 and "no --workdir" in errors


def test_slurm_rejects_wrong_usage(cluster):
    job = _sbatch(cluster, srun_does="exit 0")
    _, errors = job.communicate(timeout=20)
    assert job.returncode == 2 and "usage:" in errors


def test_slurm_asks_for_tasks_as_jax_wants_them():
    directives = [
        line
        for line in (_ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH")
    ]
    text = "\n".join(directives)
    assert "--gpus-per-task" not in text and "--requeue" in text
    values = dict(line.split("--", 1)[1].split("=", 1) for line in directives if "=" in line)
    assert values["gres"] == f"gpu:{values['ntasks-per-node']}"
