import os
import signal
import sys
from unittest import mock

import jax
import programs
import pytest

from afr_jax.core import distributed
from afr_jax.core.runtime import process_group

_CLUSTER_VARIABLES = ("AFR_", "SLURM_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB", "JAX_LOCAL")

_LIMIT = {"heartbeat_timeout_seconds": process_group.LONGEST_SILENCE_S}
_EXPLICIT = {
    "AFR_COORDINATOR": "10.0.0.1:1234",
    "AFR_NUM_PROCESSES": "4",
    "AFR_PROCESS_ID": "2",
}
_EXPLICIT_ARGUMENTS = {
    "coordinator_address": "10.0.0.1:1234",
    "num_processes": 4,
    "process_id": 2,
    "cluster_detection_method": "deactivate",
}
_SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
_JOBSET = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOBSET_NAME": "faces",
    "JOB_COMPLETION_INDEX": "3",
}


@pytest.fixture
def initialize(monkeypatch):
    """A `jax.distributed.initialize` that only notes its call, and no cluster variables."""
    for name in list(os.environ):
        if name.startswith(_CLUSTER_VARIABLES) or name == "CUDA_VISIBLE_DEVICES":
            monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setattr(process_group, "join", lambda index, count: None)
    with mock.patch.object(jax.distributed, "initialize") as initialize:
        yield initialize


def _set(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {**_EXPLICIT, "AFR_NUM_PROCESSES": "1", "AFR_PROCESS_ID": "0"},
        {**_SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        # The batch script itself, and a shell of salloc: no step, so no srun.
        {name: value for name, value in _SLURM.items() if "STEP" not in name},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"MEGASCALE_NUM_SLICES": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
    ],
)
def test_no_effect_without_a_cluster(initialize, monkeypatch, variables):
    _set(monkeypatch, variables)
    assert distributed.maybe_initialize() is False
    initialize.assert_not_called()


@pytest.mark.parametrize(
    "variables, arguments",
    [
        (_EXPLICIT, _EXPLICIT_ARGUMENTS),
        ({**_EXPLICIT, **_SLURM}, _EXPLICIT_ARGUMENTS),
        (
            {
                "AFR_COORDINATOR": "10.0.0.1:1234",
                "AFR_NUM_PROCESSES": "4",
                "JOB_COMPLETION_INDEX": "2",
            },
            _EXPLICIT_ARGUMENTS,
        ),
        (_SLURM, {}),
        ({"TPU_WORKER_HOSTNAMES": "host0,host1", "TPU_WORKER_ID": "1"}, {}),
        ({"TPU_PROCESS_ADDRESSES": "host0:1,host1:1", "TPU_WORKER_ID": "1"}, {}),
        ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "host0"}, {}),
    ],
)
def test_initializes_in_a_cluster(initialize, monkeypatch, variables, arguments):
    _set(monkeypatch, variables)
    assert distributed.maybe_initialize() is True
    initialize.assert_called_once_with(**_LIMIT, **arguments)


def test_initializes_on_a_cloud_tpu_machine(initialize, monkeypatch):
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")
    assert distributed.maybe_initialize() is True
    initialize.assert_called_once_with(**_LIMIT)


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_jobset_needs_the_kubernetes_package(initialize, monkeypatch, is_installed):
    _set(monkeypatch, _JOBSET)
    monkeypatch.setattr(
        distributed.importlib.util, "find_spec", lambda name: object() if is_installed else None
    )
    if is_installed:
        assert distributed.maybe_initialize() is True
        initialize.assert_called_once_with(**_LIMIT)
    else:
        with pytest.raises(RuntimeError, match=r"install jax\[k8s\], or set AFR_COORDINATOR"):
            distributed.maybe_initialize()


@pytest.mark.parametrize(
    "variables, arguments",
    [
        # CUDA shows the two GPUs to the process as 0 and 1.
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, {"local_device_ids": [0, 1]}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a,GPU-2b,GPU-3c"}, {"local_device_ids": [0, 1, 2]}),
        ({"SLURM_GPUS_ON_NODE": "4"}, {"local_device_ids": [0, 1, 2, 3]}),
        ({"CUDA_VISIBLE_DEVICES": ""}, {}),
        ({}, {}),
    ],
)
def test_one_process_per_node_drives_all_gpus(initialize, monkeypatch, variables, arguments):
    _set(monkeypatch, {**_SLURM, **variables})
    distributed.maybe_initialize(one_process_per_node=True)
    initialize.assert_called_once_with(**_LIMIT, **arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"AFR_PROCESS_ID": None}, "missing: AFR_PROCESS_ID"),
        ({"AFR_COORDINATOR": None}, "missing: AFR_COORDINATOR"),
        ({"AFR_NUM_PROCESSES": "two"}, "integers"),
        ({"AFR_PROCESS_ID": "4"}, r"AFR_PROCESS_ID is 4, but must lie in \[0, .* 4\)"),
        ({"AFR_COORDINATOR": "10.0.0.1"}, "host:port"),
    ],
)
def test_wrong_explicit_variables_are_named(initialize, monkeypatch, change, message):
    variables = {**_EXPLICIT, **change}
    _set(monkeypatch, {name: value for name, value in variables.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        distributed.maybe_initialize()
    initialize.assert_not_called()


def test_second_call_has_no_effect(initialize, monkeypatch):
    _set(monkeypatch, _EXPLICIT)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert distributed.maybe_initialize() is True
    initialize.assert_not_called()


def test_a_lone_process_is_primary_and_waits_for_nobody():
    assert distributed.is_primary()
    distributed.barrier("alone")


_WORKER = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
from afr_jax.core import distributed, parallel
assert distributed.maybe_initialize() and distributed.maybe_initialize()

import numpy as np
index = jax.process_index()
mesh = parallel.make_mesh()
assert mesh.shape == {"data": 4} and jax.local_device_count() == 2

rows = np.arange(12, dtype=np.float32).reshape(4, 3) + 100 * index
batch = parallel.shard_batch(rows, mesh)
assert batch.shape == (8, 3)
np.testing.assert_array_equal(parallel.local_rows(batch), rows)
total = jax.jit(lambda batch: batch.sum())(batch)
assert float(total) == 2 * 66 + 1200, total

# All rows in every process, and all results.
rows = np.arange(21, dtype=np.float32).reshape(7, 3)
keys = jax.random.split(jax.random.key(0), 7)
add_noise = lambda key, scale, row: row + scale * jax.random.normal(key, row.shape)
expected = jax.vmap(add_noise, (0, None, 0))(keys, 0.5, rows)
for backend in ("jit", "pmap"):
    run = parallel.map_batches(
        add_noise, mesh, in_axes=(0, None, 0), batch_size=4, backend=backend
    )
    np.testing.assert_allclose(run(keys, 0.5, rows), expected, atol=1e-6)

distributed.barrier("end")
print("primary" if distributed.is_primary() else "secondary", float(total))
"""


def test_two_real_processes_share_one_mesh():
    command = [sys.executable, "-c", _WORKER]
    ended = programs.run_together([command, command])
    assert [one.returncode for one in ended] == [0, 0], ended
    last = [one.stdout.splitlines()[-1] for one in ended]
    assert last == ["primary 1332.0", "secondary 1332.0"]


_GROUP = """
import os, signal, sys
from afr_jax.core import distributed, interrupts
from afr_jax.core.runtime import process_group
distributed.maybe_initialize()
interrupts.raise_and_remember()
index = distributed.process_index()
assert distributed.gather({"index": index}) == [{"index": 0}, {"index": 1}]
assert distributed.decide(lambda: [index]) == [0]
assert distributed.share(range(5)) == [[0, 2, 4], [1, 3]][index]
with distributed.alone():
    assert distributed.is_primary() and distributed.gather(7) == [7]
    assert len(distributed.own_devices()) == 1
assert distributed.primary_first(lambda: index) == index
distributed.split_work(range(5), lambda own: print(own))
distributed.barrier("half way")
try:
    if index == 1:
        {fault}
    distributed.barrier("never reached")
except KeyboardInterrupt:
    if (ending := process_group.ended_by_others()) is not None:
        process_group.leave_at_once(ending)
    process_group.fail(143, "was told to stop")
"""


@pytest.mark.parametrize(
    "fault, codes, reason",
    [
        ("process_group.fail(2, 'failed: no such folder')", [2, 2], "failed: no such folder"),
        ("os.kill(os.getpid(), signal.SIGTERM)", [143, 143], "was told to stop"),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGKILL)",
            [1, -signal.SIGKILL],
            "has not answered for 30 s",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_processes_end_together(fault, codes, reason):
    command = [sys.executable, "-c", _GROUP.replace("{fault}", fault)]
    ended = programs.run_together([command, command])
    assert [one.returncode for one in ended] == codes, ended
    assert [one.stdout.splitlines()[0] for one in ended] == ["[0, 2, 4]", "[1, 3]"]
    assert f"error: process 1 {reason}" in ended[0].stderr


_LEAVES = """
import sys, time
from afr_jax.core import distributed, interrupts
from afr_jax.core.runtime import process_group
distributed.maybe_initialize()
interrupts.raise_and_remember()
if distributed.process_index():
    process_group.fail(2, "failed: no such folder")
interrupts.end_at_once()
while process_group.ended_by_others() is None:
    time.sleep(0.01)
try:
    while True:
        interrupts.check()
except KeyboardInterrupt:
    time.sleep(0.1)  # A handler would run here.
    process_group.fail(1, "failed: a connection broke")
"""


def test_a_process_that_leaves_already_is_not_ended_before_it_has_said_why():
    command = [sys.executable, "-c", _LEAVES]
    ended = programs.run_together([command, command])
    assert [one.returncode for one in ended] == [2, 2], ended
    said = ended[0].stderr.splitlines()
    assert said[-1] == "error: process 1 failed: no such folder"
    assert "terminated" not in said


def test_a_program_for_one_process_knows_its_number_without_joining(initialize, monkeypatch):
    assert distributed.process_of_cluster() is None
    for variables, number in ((_EXPLICIT, 2), (_SLURM, 1)):
        with monkeypatch.context() as patch:
            _set(patch, variables)
            assert distributed.process_of_cluster() == number
    _set(monkeypatch, {"TPU_WORKER_HOSTNAMES": "host0,host1", "TPU_WORKER_ID": "1"})
    with pytest.raises(ValueError, match="works in one process"):
        distributed.process_of_cluster()
    initialize.assert_not_called()
