"""Runs that are disturbed, and run again: signals, races, full disks, clocks that are wrong.

What a disturbed run leaves must be, after one more run, what an undisturbed run leaves.
"""

import hashlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from afr_jax.core import files

from . import corpus, processes, tally

_LIMIT_SECONDS = 300.0
# A run that still works so long after a signal has lost it.
_GRACE_SECONDS = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
# Keys of JSON whose values differ from run to run.
_OF_THE_RUN = frozenset(
    {"seconds", "resumed", "seconds_per_step", "seconds_per_epoch", "date", "machine", "timing"}
)
_DELETED = "Absent Person"


class Program(NamedTuple):
    """A program whose runs go on from where they were.

    Attributes:
        name: of the program.
        flags_fn: its flags, for the folder of the data and one of outputs.
        says_all: whether what it left is to be asked of one more run, not read from its files.
    """

    name: str
    flags_fn: Callable[[pathlib.Path, pathlib.Path], list[str]]
    says_all: bool = False


PROGRAMS = (
    Program(
        "cloak",
        lambda data, output: [
            *(f"--images={data / 'photos'}", f"--output_dir={output}"),
            *("--num_steps=4", "--surrogates=dlib"),
        ],
    ),
    Program(
        "detect",
        lambda data, output: [f"--images={data / 'photos'}", f"--output_dir={output}", "--toy"],
    ),
    Program(
        "enroll",
        lambda data, output: [f"--gallery={data / 'people'}", f"--database={output}"],
        says_all=True,
    ),
    Program(
        "make_unlearnable",
        lambda data, output: [f"--data={data / 'classes'}", f"--output_dir={output}", "--toy"],
    ),
    Program(
        "train_victim",
        lambda data, output: [
            *(f"--data={data / 'classes'}", f"--test_data={data / 'classes'}"),
            *(f"--workdir={output}", "--toy"),
        ],
    ),
    Program(
        "match",
        lambda data, output: [
            *(f"--queries={data / 'photos'}", f"--database={data / 'database'}"),
            f"--workdir={output}",
        ],
    ),
    Program(
        "collect", lambda data, output: [f"--data={data / 'people'}", f"--output_dir={output}"]
    ),
    Program(
        "verify",
        lambda data, output: [
            *(f"--pairs={data / 'pairs.csv'}", f"--images={data / 'people'}"),
            f"--workdir={output}",
        ],
    ),
    Program("identify", lambda data, output: [f"--data={data / 'people'}", f"--workdir={output}"]),
    *(
        Program(name, lambda _, output: ["--toy", f"--workdir={output}"])
        for name in (
            *("train_extractor", "harden_extractor", "attack_detector"),
            *("fawkes_evaluation", "pubfig_study", "unlearnable_faces"),
        )
    ),
)


class Undisturbed(NamedTuple):
    """What a program does when nothing happens: its exit code, time, and what it leaves."""

    code: int
    seconds: float
    left: dict[str, str]


def signals(
    workdir: pathlib.Path,
    counts: tally.Tally,
    *,
    rounds: int,
    seed: int,
    programs: Sequence[Program] = PROGRAMS,
) -> None:
    """Sends signals to runs at times drawn at random, each program and signal in turn."""
    data, known = _data(workdir), {}
    for index in range(rounds):
        random = np.random.default_rng((seed, index))
        program = programs[index % len(programs)]
        number = _SIGNALS[(index // len(programs) + index) % len(_SIGNALS)]
        whole = _undisturbed(workdir, program, known)
        output = workdir / f"{program.name}_{index}"
        after = float(random.uniform(0.02, 1.0)) * whole.seconds
        ended = processes.program(
            program.name, program.flags_fn(data, output), workdir / f"log_{index}_first"
        ).end(limit_seconds=_LIMIT_SECONDS, signal_after=(number, after))
        counts.count("signals", program.name, number.name, peak_mb=ended.peak_mb)
        subject = f"{number.name} after {after:.1f} of {whole.seconds:.1f} s"
        fault = _fault_fn(counts, "signals", program.name, number.name, subject)
        if ended.hung:
            fault("hangs", "no end after the signal")
        elif "Traceback" in ended.err:
            fault("crashes", ended.last_words)
        elif ended.code == whole.code and ended.seconds > after + _GRACE_SECONDS:
            fault("lost", f"the signal: it worked on for {ended.seconds - after:.0f} s")
        elif ended.code not in (128 + number, -number, whole.code):
            fault("wrong", f"exit code {ended.code}: {ended.last_words}")
        _run_again(workdir, program, output, whole, fault)


def races(
    workdir: pathlib.Path,
    counts: tally.Tally,
    *,
    rounds: int,
    seed: int,
    programs: Sequence[Program] = PROGRAMS,
) -> None:
    """Starts two or three processes that write to one place."""
    data, known = _data(workdir), {}
    for index in range(rounds):
        random = np.random.default_rng((seed, index))
        program = programs[index % len(programs)]
        whole = _undisturbed(workdir, program, known)
        output = workdir / f"{program.name}_{index}"
        kind = f"{2 + index // len(programs) % 2} processes"
        flags = program.flags_fn(data, output)
        running = []
        for number in range(int(kind[0])):
            # Half of the later ones start at once, the others while the first one works.
            time.sleep(max(0.0, random.uniform(-0.5, 0.5)) * whole.seconds if number else 0.0)
            running.append(
                processes.program(program.name, flags, workdir / f"log_{index}_{number}")
            )
        ended = [process.end(limit_seconds=_LIMIT_SECONDS) for process in running]
        counts.count("races", program.name, kind, peak_mb=max(e.peak_mb for e in ended))
        fault = _fault_fn(counts, "races", program.name, kind, f"round {index}")
        for each in ended:
            if each.hung:
                fault("hangs", "no end")
            elif each.crashed:
                fault("crashes", f"exit code {each.code}: {each.last_words}")
        if whole.code not in {each.code for each in ended}:
            fault("wrong", f"exit codes {[each.code for each in ended]}: nobody did the work")
        _compare(_left(workdir, program, output), whole, fault)
        shutil.rmtree(output, ignore_errors=True)


def disks(
    workdir: pathlib.Path,
    counts: tally.Tally,
    *,
    rounds: int,
    seed: int,
    programs: Sequence[Program] = PROGRAMS,
) -> None:
    """Lets disks fill up, and makes them larger."""
    data, known = _data(workdir), {}
    for index in range(rounds):
        random = np.random.default_rng((seed, index))
        program = programs[index % len(programs)]
        whole = _undisturbed(workdir, program, known)
        output = workdir / f"{program.name}_{index}"
        output.mkdir()
        size = f"{int(random.choice([8, 24, 64, 160, 400]))}k"
        if reason := _mount(output, size):
            counts.not_run["disks"] = reason
            return
        try:
            flags = program.flags_fn(data, output / "in")
            ended = processes.program(program.name, flags, workdir / f"log_{index}").end(
                limit_seconds=_LIMIT_SECONDS
            )
            counts.count("disks", program.name, size, peak_mb=ended.peak_mb)
            fault = _fault_fn(counts, "disks", program.name, size, f"a disk of {size}")
            if ended.hung:
                fault("hangs", "no end")
            elif ended.crashed:
                fault("crashes", f"exit code {ended.code}: {ended.last_words}")
            _mount(output, "200m", option="remount,")
            _run_again(workdir, program, output / "in", whole, fault)
        finally:
            subprocess.run(["umount", "--lazy", str(output)], check=False, capture_output=True)


def clocks(workdir: pathlib.Path, counts: tally.Tally) -> None:
    """Deletes a person with clocks that are behind and ahead, and looks for what is left."""
    if shutil.which("gcc") is None:
        counts.not_run["clocks"] = "no gcc"
        return
    data, shim = _data(workdir), workdir / "clock_shim.so"
    source = pathlib.Path(__file__).with_name("clock_shim.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    for offset in (-3600, -60, 60, 30 * 86400):
        place = workdir / f"database_{offset}"
        flags = [f"--gallery={data / 'people'}", f"--database={place}"]
        processes.program("enroll", flags, workdir / "log").end(limit_seconds=_LIMIT_SECONDS)
        ended = processes.program(
            "enroll",
            [f"--database={place}", f"--delete={_DELETED}", "--purge"],
            workdir / f"log_{offset}",
            env={"LD_PRELOAD": str(shim), "CLOCK_OFFSET": str(offset)},
        ).end(limit_seconds=_LIMIT_SECONDS)
        kind = f"{offset:+} s"
        counts.count("clocks", "enroll", kind, peak_mb=ended.peak_mb)
        fault = _fault_fn(counts, "clocks", "enroll", kind, f"--delete --purge, {kind}")
        if ended.hung or ended.crashed:
            fault("crashes", ended.last_words)
        left = [path for path in place.rglob("*") if path.is_file()]
        holding = [path for path in left if _DELETED.encode() in path.read_bytes()]
        if ended.code == 0 and holding:
            fault("wrong", f"success is reported, the name is in {len(holding)} files")


def _undisturbed(
    workdir: pathlib.Path, program: Program, known: dict[str, Undisturbed]
) -> Undisturbed:
    """Of a program; run once, and once before that fills the cache of compiled programs."""
    if program.name not in known:
        data, output = _data(workdir), workdir / f"{program.name}_whole"
        for _ in range(2):
            shutil.rmtree(output, ignore_errors=True)
            ended = processes.program(
                program.name, program.flags_fn(data, output), workdir / "log_whole"
            ).end(limit_seconds=_LIMIT_SECONDS)
        if ended.hung or ended.crashed or ended.code == 2:
            raise RuntimeError(f"{program.name} does not run: {ended.err[-2000:]}")
        known[program.name] = Undisturbed(
            ended.code, ended.seconds, _left(workdir, program, output)
        )
    return known[program.name]


def _run_again(
    workdir: pathlib.Path,
    program: Program,
    output: pathlib.Path,
    whole: Undisturbed,
    fault: Callable[[str, str], None],
) -> None:
    flags = program.flags_fn(_data(workdir), output)
    ended = processes.program(program.name, flags, workdir / "log_again").end(
        limit_seconds=_LIMIT_SECONDS
    )
    if ended.hung:
        fault("hangs", "the next run has no end")
    elif ended.code != whole.code:
        fault("lost", f"the next run: exit code {ended.code}: {ended.last_words}")
    else:
        _compare(_left(workdir, program, output), whole, fault)
    shutil.rmtree(output, ignore_errors=True)


def _compare(left: dict[str, str], whole: Undisturbed, fault: Callable[[str, str], None]) -> None:
    names = sorted(
        name for name in left.keys() | whole.left.keys() if left.get(name) != whole.left.get(name)
    )
    if names:
        fault("lost", f"not as an undisturbed run leaves it: {', '.join(names[:5])}")


def _left(workdir: pathlib.Path, program: Program, output: pathlib.Path) -> dict[str, str]:
    """What a run left, by file: a digest of what does not change from run to run."""
    if program.says_all:
        flags = program.flags_fn(_data(workdir), output)
        ended = processes.program(program.name, flags, workdir / "log_left").end(
            limit_seconds=_LIMIT_SECONDS
        )
        result = json.loads(ended.out) if ended.out else {}
        return {
            name: str(result.get(name)) for name in ("added", "changed", "unchanged", "enrolled")
        }
    found = {}
    for path in sorted(output.rglob("*")):
        parts = path.relative_to(output).parts
        if not path.is_file() or any(p.startswith(".") or p == "checkpoints" for p in parts):
            continue
        if any((folder / "_CHECKPOINT_METADATA").exists() for folder in path.parents):
            continue  # Orbax notes the time.
        data = path.read_bytes().replace(str(output).encode(), b"OUTPUT")
        if path.suffix == ".json":
            data = json.dumps(_stable(json.loads(data))).encode()
        elif path.suffix == ".jsonl":
            data = json.dumps([_stable(json.loads(line)) for line in data.splitlines()]).encode()
        elif path.suffix == ".html":
            continue
        found["/".join(parts)] = hashlib.sha256(data).hexdigest()
    return found


def _stable(value: object) -> object:
    if isinstance(value, dict):
        names = value.keys() - _OF_THE_RUN - {"checksum"}
        return {name: _stable(value[name]) for name in sorted(names)}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def _fault_fn(
    counts: tally.Tally, series: str, program: str, kind: str, subject: str
) -> Callable[[str, str], None]:
    def fault(name: str, text: str) -> None:
        counts.fault(name, series, program, kind, subject=subject, text=text)

    return fault


def _mount(folder: pathlib.Path, size: str, *, option: str = "") -> str | None:
    """Puts a disk of that size at a folder; returns why that cannot be done, or None."""
    if os.geteuid() != 0:
        return "only root can mount a disk"
    command = ["mount", "-t", "tmpfs", "-o", f"{option}size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stderr.strip() or "mount failed" if done.returncode else None


def _data(workdir: pathlib.Path) -> pathlib.Path:
    """Photos, people and classes of small images; made once."""
    data = workdir / "data"
    if data.exists():
        return data
    random = np.random.default_rng(0)

    def save(names: Sequence[str], side: int) -> None:
        for name in names:
            path = data / name
            path.parent.mkdir(parents=True, exist_ok=True)
            corpus.portrait(random).resize((side, side)).save(path)

    save([f"photos/{row}.png" for row in range(10)], 256)
    save([f"people/{name}/{row}.png" for name in (_DELETED, "Other") for row in range(5)], 256)
    save(["people/Once/0.png"], 256)
    save([f"classes/{name}/{row:02}.png" for name in "ab" for row in range(16)], 32)
    ours, others = ([f"{name}/{row}.png" for row in range(5)] for name in (_DELETED, "Other"))
    same = [(a, b, 1) for some in (ours, others) for a, b in itertools.combinations(some, 2)]
    rows = same + [(a, b, 0) for a, b in zip(ours, others, strict=True)]
    files.write_csv(data / "pairs.csv", ["image_a", "image_b", "same"], rows)
    flags = [f"--gallery={data / 'people'}", f"--database={data / 'database'}"]
    ended = processes.program("enroll", flags, workdir / "log_data").end(
        limit_seconds=_LIMIT_SECONDS
    )
    if ended.code:
        raise RuntimeError(f"nobody could be enrolled: {ended.err[-2000:]}")
    return data
