"""Where and with what a figure was measured: the record that is kept beside every result."""

import datetime
import os
import pathlib
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence

import jax

_ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


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
