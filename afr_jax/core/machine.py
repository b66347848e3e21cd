"""Where and with what a figure was measured: the record that is kept beside every result."""

import ctypes
import datetime
import os
import pathlib
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence

import jax
import jaxlib

_ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
# XLA stops the process at an option that it does not know: only where it was tried.
_YNNPACK_OPTION = "--xla_cpu_experimental_ynn_fusion_type"
_YNNPACK_VERSIONS = ("0.10.",)
# glibc's mallopt: one arena, no maps of single blocks, nothing given back, 256 MiB at a time.
_MALLOPT = {-8: 1, -4: 0, -1: 2**31 - 1, -2: 256 << 20}


def choose_compiler_options() -> None:
    """Switches YNNPACK off in XLA for CPUs, unless `XLA_FLAGS` says something about it.

    jaxlib 0.10 hands convolutions to YNNPACK, which takes 1.2 to 2.2 times as long as XLA's own way
    for the face extractors here. Call it before JAX makes its first array: later it has no effect.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if jaxlib.__version__.startswith(_YNNPACK_VERSIONS) and _YNNPACK_OPTION not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_YNNPACK_OPTION}=".strip()


def keep_freed_memory() -> None:
    """Lets the process keep memory that it frees, where its C library is glibc.

    XLA for CPUs allocates the working memory of every call anew. Given back to the system each time
    and cleared by it again, it cost a seventh of a cloak's step (tried once: two cores, two nets).
    The price is that the process stays as large as it ever was.
    """
    if platform.libc_ver()[0] == "glibc":
        for parameter, value in _MALLOPT.items():
            ctypes.CDLL(None).mallopt(parameter, value)


def describe() -> dict[str, object]:
    """The machine as JSON can say it: platform, processor, cores, versions and devices."""
    devices = jax.local_devices()
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": _num_cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "num_devices": len(devices),
    }


def provenance(
    module: str, arguments: Sequence[str], *, names: Mapping[str, str | None]
) -> dict[str, object]:
    """Says how a result came about: command, commit, date and machine.

    Args:
        module: the program.
        arguments: its command line without the program's name.
        names: what stands in the record for a path of this machine, and for what lies below it:
            `AFR_SHARED` for the folder of the research data, say. Without a path a name is unused.

    Returns:
        `command`, `commit` (None outside a checkout), `date` and `machine`.
    """
    shown = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        # Of a list NAME=PATH,NAME=PATH as well.
        parts = ["=".join(_named(p, names) for p in part.split("=")) for part in value.split(",")]
        shown.append(_named(flag, names) + equals + ",".join(parts))
    return {
        "command": " ".join(["python", "-m", module, *shown]),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": describe(),
    }


def _named(value: str, names: Mapping[str, str | None]) -> str:
    for name, path in names.items():
        path = (path or "").rstrip("/")
        if path and (value == path or value.startswith(f"{path}/")):
            return f"${name}{shlex.quote(value[len(path) :])}" if value != path else f"${name}"
    return shlex.quote(value) if value else value


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _num_cores() -> int:
    # A container or a batch job may hold fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _commit() -> str | None:
    """The commit of the checkout, with a plus sign where files differ from it."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
