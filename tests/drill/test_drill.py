"""The drill itself: what it makes, that it sees faults, and a small fixed share of it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from afr_jax.data import photos
from drill import ROOT, corpus, hostile, photo_series, processes, readers, tally


def test_input_k_of_a_seed_is_always_the_same(tmp_path):
    first = corpus.make(tmp_path / "a", 20, seed=3)
    assert corpus.make(tmp_path / "b", 20, seed=3) == first
    others = corpus.make(tmp_path / "c", 20, seed=4)
    assert others != first and [item.kind for item in others] == [item.kind for item in first]
    folders = [photo_series._digests(tmp_path / name) for name in "abc"]
    assert folders[0] == folders[1] != folders[2]


def test_all_kinds_are_made(tmp_path):
    items = corpus.make(tmp_path, 130, seed=0)
    small = {name for name, kind in corpus.KINDS.items() if not kind.is_large}
    assert {item.kind for item in items} == small
    found = {item.relative.as_posix(): item for item in photos.list_photos([tmp_path]).inputs}
    for item in items:
        try:
            listed = found.pop(item.name, None)
            status = corpus.ABSENT
            if listed is not None:
                photos.read_source(photos.PhotoSource(item.name, listed.path, listed.problem))
                status = corpus.FACE
        except photos.PhotoError:
            status = corpus.UNREADABLE
        # Whether there is a face is for detectors to say.
        allowed = [corpus.FACE if name == corpus.NO_FACE else name for name in item.allowed]
        assert status in allowed, item
    assert not found


class _Said:
    """A process that has ended, having said the statuses that it was given."""

    ended: processes.Ended
    images: dict

    def __init__(self, name, flags, log):
        output = next(flag for flag in flags if flag.startswith("--output_dir=")).partition("=")[2]
        os.makedirs(output)
        records = [{"image": name, "status": status} for name, status in self.images.items()]
        with open(f"{output}/faces.json", "w") as file:
            json.dump({"images": records}, file)

    def end(self, *, limit_seconds):
        del limit_seconds
        return self.ended


@pytest.mark.parametrize(
    "changes, said, expected",
    [
        ({}, {}, []),
        ({}, {"a.png": "no_face"}, ["wrong"]),
        ({}, {"c.png": "ok"}, ["wrong"]),
        ({"code": 0}, {}, ["wrong"]),
        ({"peak_mb": 2600.0}, {}, ["memory"]),
        ({"code": 1}, {}, ["crashes"]),
        ({"code": -11}, {}, ["crashes"]),
        ({"err": "Traceback (most recent call last):"}, {}, ["crashes"]),
        ({"hung": True, "code": -9}, {}, ["hangs"]),
    ],
)
def test_what_is_wrong_with_a_program_is_counted(tmp_path, monkeypatch, changes, said, expected):
    items = [corpus.Item("a.png", "whole", [corpus.FACE])]
    items.append(corpus.Item("b.png", "empty", [corpus.UNREADABLE]))
    _Said.images = {"a.png": "ok", "b.png": "unreadable", **said}
    _Said.ended = processes.Ended(3, "{}", "", 1.0, 300.0, False)._replace(**changes)
    monkeypatch.setattr(processes, "program", _Said)
    counts = tally.Tally()
    program = photo_series.PROGRAMS["detect"](tmp_path)
    photo_series._judge(program, tmp_path / "photos", items, tmp_path / "out", counts)
    assert [fault["fault"] for fault in counts.faults] == expected
    (row,) = counts.by_program()
    assert row["inputs"] == 2 and sum(row[name] for name in tally.FAULTS) == len(expected)


def test_a_changed_original_is_counted(tmp_path):
    (item,) = corpus.make(tmp_path, 1, seed=0)
    before = photo_series._digests(tmp_path)
    (tmp_path / item.name).write_bytes(b"changed")
    counts = tally.Tally()
    photo_series._compare(before, photo_series._digests(tmp_path), "detect", [item], counts)
    assert [(f["fault"], f["input"]) for f in counts.faults] == [("changed", item.name)]


def test_processes_tell_their_memory_their_signal_and_that_they_hang(tmp_path):
    def started(code):
        command = [sys.executable, "-c", f"import signal; {code}"]
        return processes.Running(command, tmp_path / "log")

    def run(code, **options):
        return started(code).end(**options)

    # It holds its memory until it is told to go on, which is once it has said that it has it.
    held = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); x = bytearray(300 << 20)"
    told = "print(len(x), flush=True); signal.sigwait([signal.SIGTERM]); raise SystemExit(3)"
    running = started(f"{held}; {told}")
    while processes.peak_mb(running.pid) and not (tmp_path / "log.out").read_text():
        time.sleep(0.01)
    used = running.end(limit_seconds=60, signal_after=(signal.SIGTERM, 0.0))
    assert (used.code, used.out, used.hung) == (3, f"{300 << 20}\n", False)
    assert used.peak_mb > 300
    ended = run("signal.pause()", limit_seconds=60, signal_after=(signal.SIGTERM, 0.2))
    assert (ended.code, ended.hung) == (-signal.SIGTERM, False)
    assert run("signal.pause()", limit_seconds=0.2).hung
    failed = run("raise ValueError('odd')", limit_seconds=60)
    assert failed.crashed and failed.last_words == "ValueError: odd"


def test_the_table_sums_the_kinds():
    counts = tally.Tally()
    counts.count("files", "noise", "a bit flipped", peak_mb=7.0)
    counts.count("files", "noise", "truncated", peak_mb=3.0)
    counts.fault("lost", "files", "noise", "truncated", subject="case 1", text="other")
    lines = [line.split() for line in tally.table(counts.by_program()).splitlines()]
    found = dict(zip(*lines, strict=True))
    assert (found["inputs"], found["lost"], found["crashes"], found["peak_mb"]) == tuple("2107")
    assert json.loads(json.dumps(counts.result()))["kinds"][1]["kind"] == "truncated"


# A share of the drill.


def test_detect_on_damaged_photos(tmp_path):
    counts = tally.Tally()
    photo_series.run(tmp_path, counts, inputs=24, seed=0, programs=("detect",))
    assert not counts.faults
    assert sum(row["inputs"] for row in counts.by_program()) == 24


def test_files_and_state_that_are_damaged(tmp_path):
    first = len(hostile.KINDS)
    last = first + 4 * len(readers.READERS)
    for case in readers.cases(tmp_path, seed=0, first=first, last=last):
        outcome, text = readers.read(case)
        assert outcome in case.allowed, (case.path, case.kind, text)


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_hostile_files_are_refused(tmp_path, kind):
    index = list(hostile.KINDS).index(kind)
    (case,) = readers.cases(tmp_path, seed=0, first=index, last=index + 1)
    outcome, text = readers.read(case)
    assert outcome == readers.REFUSED, text
    assert not (case.path.parent / hostile.MARKER).exists()


@pytest.mark.slow
def test_all_series(tmp_path):
    command = [sys.executable, "-m", "tests.drill", "--inputs=25", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {row["series"] for row in json.loads((tmp_path / "drill.json").read_text())["rows"]}
    assert {"photos", "files", "signals", "races"} <= found
