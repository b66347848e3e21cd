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

Launching is the business of `launch/`; meshes are the business of `core/parallel.py`.
"""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

_EXPLICIT = ("AFR_COORDINATOR", "AFR_NUM_PROCESSES", "AFR_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


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
    jax.distributed.initialize(**arguments)
    logging.info(
        "process %d/%d, %d local and %d global devices (%s)",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
        jax.default_backend(),
    )
    return True


def is_primary() -> bool:
    """Returns whether this process is the one that writes files and prints results.

    Starts no backend in a single-process run.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier of this name; no effect for one process.

    Args:
      name: the same in all processes; says in a time-out message where they waited.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


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
