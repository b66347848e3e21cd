"""The single door to `jax.distributed`: who starts it, how, and who is process 0.

`maybe_initialize` must run before any other JAX call. It does nothing on a machine without cluster
variables, so every program calls it. What it understands, in this order:

1. Explicit: `AFR_COORDINATOR` (host:port), `AFR_NUM_PROCESSES` and `AFR_PROCESS_ID` (or
   `JOB_COMPLETION_INDEX`, which an indexed Kubernetes job has anyway). On GPU nodes with several
   processes set `JAX_LOCAL_DEVICE_IDS` beside them.
2. SLURM: a task started by `srun` in a step of more than one task. JAX then assumes one process per
   GPU with all of the node's GPUs visible (`--ntasks-per-node=G --gres=gpu:G`, no
   `--gpus-per-task`), or one process per node with `one_process_per_node=True`.
3. TPU pods: GKE sets the workers' host names; a Cloud TPU VM is asked through its metadata.
4. A Kubernetes JobSet, with the `kubernetes` package installed (`jax[k8s]`).

Processes share work in two ways. Where arrays are shared, all of them take the same steps on one
mesh (`core/parallel.py`). Where items are independent, each takes its `share` of them, `alone`, on
its own devices, and leaves what it finds in files that all see; a `barrier` later they are read.

The processes of a run end together: `core/runtime/process_group.py`. Launching is the business of
`launch/`.
"""

import contextlib
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
from absl import logging

from afr_jax.core.runtime import process_group

_Item = TypeVar("_Item")
_Value = TypeVar("_Value")
_EXPLICIT = ("AFR_COORDINATOR", "AFR_NUM_PROCESSES", "AFR_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# Where clusters say which process this is, before it has joined them.
_NUMBERS = ("AFR_PROCESS_ID", "JOB_COMPLETION_INDEX", "SLURM_PROCID")

_meetings = itertools.count()
_is_alone = False


def maybe_initialize(*, one_process_per_node: bool = False) -> bool:
    """Joins this process to its cluster, if it is in one; a second call has no effect.

    Args:
      one_process_per_node: under SLURM, let this one process drive all GPUs of its node instead of
        the one GPU which its local task number names.

    Returns:
      Whether this process is part of a distributed run.

    Raises:
      ValueError: if the explicit variables are incomplete or contradict each other.
      RuntimeError: if the process belongs to a JobSet and nothing says how to find the others.
    """
    if jax.distributed.is_initialized():
        return True
    arguments = _cluster_arguments(os.environ, one_process_per_node=one_process_per_node)
    if arguments is None:
        return False
    jax.distributed.initialize(
        **arguments, heartbeat_timeout_seconds=process_group.LONGEST_SILENCE_S
    )
    process_group.join(jax.process_index(), jax.process_count())
    logging.info(
        "process %d/%d, %d local and %d global devices (%s)",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
        jax.default_backend(),
    )
    return True


def process_of_cluster() -> int | None:
    """The number of this process in its cluster, which it need not have joined; None without one.

    Raises:
      ValueError: if the explicit variables are incomplete or contradict each other, or if only
        joining would tell.
    """
    if _cluster_arguments(os.environ, one_process_per_node=False) is None:
        return None
    for name in _NUMBERS:
        if name in os.environ:
            return int(os.environ[name])
    raise ValueError("this program works in one process: start it outside of the cluster's job")


def process_count() -> int:
    """Returns how many processes work together; 1 in `alone`."""
    return 1 if _works_alone() else jax.process_count()


def process_index() -> int:
    """Returns the number of this process among those that work together; 0 in `alone`."""
    return 0 if _works_alone() else jax.process_index()


def is_primary() -> bool:
    """Returns whether this process is the one that writes files and prints results.

    Starts no backend in a single-process run.
    """
    return process_index() == 0


@contextlib.contextmanager
def alone() -> Generator[None]:
    """In the body this process works for itself, as if it were the only one.

    Meshes are of its own devices, it writes what it makes, and waits for nobody. All threads are
    concerned.
    """
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


def own_devices() -> list[jax.Device]:
    """Returns the devices of a mesh: those of all processes, in `alone` those of this one."""
    return jax.local_devices() if _works_alone() else jax.devices()


def share(items: Sequence[_Item]) -> list[_Item]:
    """Returns this process's share of independent items: every P-th of P processes.

    Args:
      items: the same in all processes.
    """
    return list(items[process_index() :: process_count()])


def split_work(items: Sequence[_Item], work_fn: Callable[[list[_Item]], object]) -> None:
    """Lets each of several processes work on its share of independent items, alone; waits for all.

    One process does nothing: what follows here finds all of it left to do.

    Args:
      items: the same in all processes.
      work_fn: takes a share, and leaves what it finds in files.
    """
    if process_count() > 1:
        own = share(items)
        with alone():
            work_fn(own)
        barrier("all shares of the work are done")


def primary_first(make_fn: Callable[[], _Value]) -> _Value:
    """What a function returns in each process; process 0 calls it first.

    So the others find in files what it has made.

    Args:
      make_fn: works on what it makes and keeps; called `alone`.
    """
    if process_count() == 1:
        return make_fn()
    is_first = is_primary()
    if not is_first:
        barrier("process 0 has made what all need")
    with alone():
        value = make_fn()
    if is_first:
        barrier("process 0 has made what all need")
    return value


def gather(value: _Value) -> list[_Value]:
    """Waits for all processes, and returns what each of them has said, in their order.

    There is no limit to the time. A process that has failed or ended ends the others.

    Args:
      value: anything that JSON can hold.
    """
    if process_count() == 1:
        return [value]
    texts = process_group.exchange(next(_meetings), json.dumps(value))
    return [json.loads(text) for text in texts]


def decide(decide_fn: Callable[[], _Value]) -> _Value:
    """What a function returns in process 0, in every process, all of which wait for it.

    Args:
      decide_fn: called in process 0 alone; returns what JSON can hold.
    """
    if is_primary():  # What it raises ends the others, which wait.
        return gather(decide_fn())[0]
    return gather(cast(_Value, None))[0]


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier of this name; no effect for one process.

    Args:
      name: the same in all processes.

    Raises:
      RuntimeError: another process is at another barrier.
    """
    names = gather(name)
    if set(names) != {name}:
        raise RuntimeError(f"the processes wait for different things: {names}")


def _works_alone() -> bool:
    return _is_alone or not jax.distributed.is_initialized()


def _cluster_arguments(
    environ: Mapping[str, str], *, one_process_per_node: bool
) -> dict[str, Any] | None:
    """Returns the arguments for `jax.distributed.initialize`, or None outside of a cluster."""
    if "AFR_COORDINATOR" in environ or "AFR_NUM_PROCESSES" in environ:
        return _explicit_arguments(environ)
    if all(name in environ for name in _SLURM) and int(environ["SLURM_NTASKS"]) > 1:
        return _slurm_arguments(environ) if one_process_per_node else {}
    if _is_tpu_pod(environ):
        return {}
    if "KUBERNETES_SERVICE_HOST" in environ and "JOBSET_NAME" in environ:
        if "JOB_COMPLETION_INDEX" not in environ:
            return None
        if importlib.util.find_spec("kubernetes") is None:
            raise RuntimeError(
                f"this process belongs to JobSet {environ['JOBSET_NAME']!r}: "
                "install jax[k8s], or set AFR_COORDINATOR and AFR_NUM_PROCESSES"
            )
        return {}
    return None


def _explicit_arguments(environ: Mapping[str, str]) -> dict[str, Any] | None:
    values = {name: environ[name] for name in _EXPLICIT if name in environ}
    if "JOB_COMPLETION_INDEX" in environ:
        values.setdefault("AFR_PROCESS_ID", environ["JOB_COMPLETION_INDEX"])
    missing = [name for name in _EXPLICIT if name not in values]
    if missing:
        raise ValueError(f"set all of {', '.join(_EXPLICIT)}; missing: {', '.join(missing)}")
    try:
        num_processes = int(values["AFR_NUM_PROCESSES"])
        process_id = int(values["AFR_PROCESS_ID"])
    except ValueError as error:
        raise ValueError(f"AFR_NUM_PROCESSES and AFR_PROCESS_ID are integers: {error}") from error
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"AFR_PROCESS_ID is {process_id}, but must lie in [0, AFR_NUM_PROCESSES = "
            f"{num_processes})"
        )
    if ":" not in values["AFR_COORDINATOR"]:
        raise ValueError(f"AFR_COORDINATOR is host:port, not {values['AFR_COORDINATOR']!r}")
    if num_processes == 1:
        return None
    return {
        "coordinator_address": values["AFR_COORDINATOR"],
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }


def _slurm_arguments(environ: Mapping[str, str]) -> dict[str, Any]:
    # CUDA renumbers what it shows to a process from 0, so the ids are positions, not the numbers in
    # the variable.
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([name for name in visible.split(",") if name.strip()])
    else:
        count = int(environ.get("SLURM_GPUS_ON_NODE", "0"))
    return {"local_device_ids": list(range(count))} if count else {}


def _is_tpu_pod(environ: Mapping[str, str]) -> bool:
    if int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return True
    workers = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if workers is not None:
        return len(workers.split(",")) > 1
    # JAX sets this on import when the machine is a Cloud TPU VM; the second variable says that
    # there is no metadata.
    return environ.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in environ
