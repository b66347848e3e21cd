"""The launch scripts: what they hand to the program, and how a job under SLURM ends."""

import json
import os
import pathlib
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time

import programs
import pytest

from afr_jax.core.runtime import sweep

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SCRIPTS = (
    ".ci/run",
    "launch/gke/xpk.sh",
    "launch/local.sh",
    "launch/slurm.sbatch",
    "launch/tpu_vm.sh",
)

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
        "scontrol": """case $* in
            "show hostnames"*) echo a; echo b ;;
            "show job"*) echo "JobState=${JOB_STATE:-RUNNING} Reason=None" ;;
            *) echo "$*" >>calls ;;
            esac""",
        "scancel": 'echo "scancel $*" >>calls; eval "${SCANCEL_DOES:-}"',
    }.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    return tmp_path


def _sbatch(folder, *arguments, srun_does, **settings):
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
        **settings,
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


@pytest.mark.parametrize(
    "number, code, state, is_requeued",
    [
        (signal.SIGUSR1, 143, "RUNNING", True),
        (signal.SIGTERM, 143, "RUNNING", True),
        (signal.SIGUSR1, 9, "RUNNING", False),  # It failed, and would fail again.
        (signal.SIGTERM, 143, "CANCELLED", False),
    ],
)
def test_slurm_goes_back_to_the_queue_if_the_program_was_stopped(
    cluster, number, code, state, is_requeued
):
    for name in ("up", "go_on"):
        os.mkfifo(cluster / name)
    step = f"echo >up; read -r _ <go_on; exit {code}"
    job = _sbatch(cluster, "experiments.verify", "--workdir=w", srun_does=step, JOB_STATE=state)
    (cluster / "up").read_text()  # Until the step runs.
    job.send_signal(number)
    assert "told to stop" in job.stderr.readline()
    (cluster / "go_on").write_text("\n")
    job.communicate(timeout=60)
    # The job waited for the step to end.
    assert job.returncode == code
    stopped = ["scancel --signal=TERM 77"]
    calls = (cluster / "calls").read_text().splitlines()[1:]
    assert calls == stopped + ["requeue 77"] * is_requeued


def test_a_cell_of_an_array_stops_and_goes_back_alone(cluster):
    """The last cell bears the array's own number, which stands for all of its cells."""
    for name in ("up", "go_on"):
        os.mkfifo(cluster / name)
    step = "echo >up; read -r _ <go_on; exit 143"
    cell = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "5"}
    job = _sbatch(cluster, "experiments.verify", "--workdir=w", srun_does=step, **cell)
    (cluster / "up").read_text()
    job.send_signal(signal.SIGUSR1)
    assert "told to stop" in job.stderr.readline()
    (cluster / "go_on").write_text("\n")
    job.communicate(timeout=60)
    calls = (cluster / "calls").read_text().splitlines()[1:]
    assert calls == ["scancel --signal=TERM 77_5", "requeue 77_5"]


# Two ranks, as srun starts them; `ranks` then holds their numbers.
_TWO_RANKS = """
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_NODELIST=127.0.0.1
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" >>"rank-$rank" 2>>"errors-$rank" &
done
jobs -p >ranks
code=0
for rank in $(<ranks); do wait "$rank" || code=$?; done
exit "$code"
"""


_COUNTER = '''
import dataclasses
import pathlib
import time
import jax
import jax.numpy as jnp
import numpy as np
from afr_jax.core import checkpoint, distributed, options, parallel, program


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountConfig(options.Config):
    """Adds up the numbers of all devices, once a step; stops for a signal after the third."""

    shares_work = True
    workdir: str | None = options.option(None, "folder")


def run(config):
    work = pathlib.Path(config.workdir)
    mesh = parallel.make_mesh()
    numbers = parallel.shard_batch(np.array([1.0 + distributed.process_index()]), mesh)
    add = jax.jit(lambda total, numbers: total + jnp.sum(numbers))
    nothing = parallel.replicate(np.zeros(()), mesh)
    with checkpoint.Checkpoints(work / "checkpoints") as checkpoints:
        first, (total,) = checkpoints.restore([nothing]) or (0, [nothing])
        for step in range(first, 6):
            if step == 3 and not first:
                checkpoints.wait()
                (work / f"up-{distributed.process_index()}").touch()
                time.sleep(600)
            total = add(total, numbers)
            checkpoints.save(step + 1, [total])
    result = {"total": float(total), "first": first, "processes": distributed.process_count()}
    return options.Outcome(result)


if __name__ == "__main__":
    program.main(CountConfig, run)
'''


def test_slurm_starts_ranks_that_join_and_go_on_after_a_stop(cluster):
    (cluster / "counter.py").write_text(_COUNTER)
    work = cluster / "work"
    settings = {
        "AFR_LOGS": str(cluster / "logs"),
        "AFR_ROOT": str(_ROOT),
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHON": sys.executable,
        "SCANCEL_DOES": "kill -TERM $(<ranks)",
    }

    def sbatch():
        with socket.socket() as probe:  # JAX would take the port that the number of the job says.
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        flags = ["counter", f"--workdir={work}"]
        return _sbatch(cluster, *flags, srun_does=_TWO_RANKS, JAX_COORDINATOR_PORT=port, **settings)

    def errors():
        return [(cluster / f"errors-{rank}").read_text() for rank in (0, 1)]

    job = sbatch()
    while len(list(work.glob("up-*"))) < 2 and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=120)
    assert job.returncode == 143, errors()
    assert (cluster / "calls").read_text().splitlines()[-1] == "requeue 77"
    # What SLURM does then.
    job = sbatch()
    job.communicate(timeout=120)
    assert job.returncode == 0, errors()
    # What six steps of two devices give that nobody disturbs.
    result = json.loads((cluster / "rank-0").read_text().splitlines()[-1])
    assert result == {"total": 18.0, "first": 3, "processes": 2}


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


# A program that takes no time, and whose fifth cell fails.
_CELL = """
if [[ $SLURM_ARRAY_TASK_ID == 4 ]]; then exit 1; fi
for word in "$@"; do
  case $word in
    --workdir=*) folder=${word#*=} ;;
    --seed=*) seed=${word#*=} ;;
    --test_data=*) data=${word#*=} ;;
  esac
done
mkdir -p "$folder"
cat >"$folder/result.json" <<END
{"accuracy": $seed.5, "of": {"words": ${#data}}, "machine": {"cores": 2}}
END
"""


def _sweep(*flags):
    return programs.call(sweep.SweepConfig, sweep.run, *flags)


def test_an_array_job_runs_the_cells_of_a_sweep_which_are_collected(cluster):
    work = cluster / "my sweep"
    flags = ["--program=train_victim", "--arguments=--toy --data='my photos'"]
    flags += ["--axis=seed=0,1,2", '--axis=test_data=a,"b,c d"', f"--workdir={work}"]
    written, _ = _sweep(*flags)
    words = shlex.split(written["submit"])
    assert written["cells"] == 6
    assert words == ["sbatch", "--array=0-5", "launch/slurm.sbatch", f"@{work}/commands"]
    for number in range(6):
        job = _sbatch(cluster, words[-1], srun_does=_CELL, SLURM_ARRAY_TASK_ID=str(number))
        _, errors = job.communicate(timeout=20)
        assert job.returncode == (1 if number == 4 else 0) and errors == ""
    collected, complete = _sweep(f"--workdir={work}", "--collect")
    assert not complete and collected["collected"] == 5
    assert collected["missing"] == [{"cell": 4, "seed": "2", "test_data": "a"}]
    assert (work / "sweep.csv").read_text().splitlines() == [
        "cell,seed,test_data,accuracy,of.words",
        "0,0,a,0.5,1",
        '1,0,"b,c d",0.5,5',
        "2,1,a,1.5,1",
        '3,1,"b,c d",1.5,5',
        "4,2,a,,",
        '5,2,"b,c d",2.5,5',
    ]
    whole = json.loads((work / "results.json").read_text())
    assert [cell["result"] is None for cell in whole] == [number == 4 for number in range(6)]
    assert whole[3]["flags"] == {"seed": "1", "test_data": "b,c d"}
    # Another sweep is refused the folder, and the array has no cell beyond its last.
    assert "another config" in _sweep(*flags, "--axis=epochs=1,2")
    assert "a sweep is written to a folder" in _sweep(*flags[:-1], "--workdir=s3://b/sweep")
    job = _sbatch(cluster, words[-1], srun_does=_CELL, SLURM_ARRAY_TASK_ID="6")
    assert "has no cell 6" in job.communicate(timeout=20)[1] and job.returncode == 2


def test_one_cell_is_run_by_its_number(tmp_path):
    flags = ["--program=verify", "--axis=pairs=a.csv,absent.csv", f"--workdir={tmp_path}"]
    _sweep(*flags)
    done, result = programs.run("sweep", f"--workdir={tmp_path}", "--cell=1")
    assert done.returncode == 2 and "absent.csv" in done.stderr and result is None
    assert "--cell is 2; there are 0 to 1" in _sweep(f"--workdir={tmp_path}", "--cell=2")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--axis=seed=1"], "needs --program"),
        (["--program=verify"], "at least one --axis"),
        (["--program=verify", "--axis=seed"], "'seed' is not FLAG=VALUE"),
        (["--program=verify", "--axis=seed=1,,2"], "is not FLAG=VALUE"),
        (["--program=verify", "--axis=seed=1", "--axis=seed=2"], "seed comes twice"),
        (["--program=verify", "--axis=speed=1"], "Unknown command line flag 'speed'"),
        (["--program=train_victim", "--axis=epochs=1,0"], "--epochs=0"),
        (["--program=verify", "--axis=seed=1", "--arguments='"], "--arguments: No closing"),
        (["--collect"], "sweep.json"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused(tmp_path, flags, message):
    assert message in _sweep(*flags, f"--workdir={tmp_path}")
    assert list(tmp_path.iterdir()) == []
