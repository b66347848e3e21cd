import collections
import subprocess
import sys

import pytest

from afr_jax.core import files, options
from afr_jax.core.runtime import claims

# Works on 12 items in groups of 2, each a file; at the item that is given it says so and waits.
_WORKER = """
import pathlib, sys
from afr_jax.core.runtime import claims

folder, stop = pathlib.Path(sys.argv[1]), sys.argv[2]

def work(group):
    for name in group:
        if name == stop:
            print("in hand", flush=True)
            sys.stdin.readline()
        with open(folder / name, "a") as file:
            file.write("x")

names = [f"item {number}" for number in range(12)]
with claims.Claims(folder) as shared:
    print("here", flush=True)
    shared.work_off(
        [names[start : start + 2] for start in range(0, 12, 2)],
        work,
        name_fn=str,
        is_done_fn=lambda name: (folder / name).exists(),
        description="items",
    )
"""


@pytest.fixture
def start(tmp_path):
    started = []

    def start(stop=""):
        command = [sys.executable, "-c", _WORKER, str(tmp_path), stop]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.kill()
        worker.communicate()


def _noted(folder):
    lines, _, num_damaged = files.read_sealed_lines(folder / claims.MANIFEST)
    assert not num_damaged
    return collections.Counter(name for line in lines for name in line["items"])


def test_what_a_killed_process_had_in_hand_is_taken_over_and_nothing_is_done_twice(tmp_path, start):
    workers = []
    for item in ("item 3", "item 6"):
        workers.append(start(item))
        assert [workers[-1].stdout.readline() for _ in range(2)] == ["here\n", "in hand\n"]
    first, second = workers
    first.kill()
    first.wait()
    late = start()
    second.stdin.write("\n")
    second.stdin.flush()
    assert second.wait(timeout=120) == late.wait(timeout=120) == 0
    names = {f"item {number}" for number in range(12)}
    assert {path.name for path in tmp_path.glob("item *")} == names
    # The one in hand was half done: item 2 stood there when the group was taken over.
    assert {name for name in names if (tmp_path / name).read_text() != "x"} == {"item 2"}
    assert _noted(tmp_path) == collections.Counter(names)


def test_those_who_have_nothing_left_wait_for_the_others(tmp_path, start):
    first = start("item 0")
    assert [first.stdout.readline() for _ in range(2)] == ["here\n", "in hand\n"]
    second = start()
    while len(_noted(tmp_path) if (tmp_path / claims.MANIFEST).exists() else ()) < 10:
        assert second.poll() is None
    assert second.poll() is None  # Item 0 and item 1 are not there.
    first.stdin.write("\n")
    first.stdin.flush()
    assert first.wait(timeout=120) == second.wait(timeout=120) == 0
    assert all((tmp_path / f"item {number}").read_text() == "x" for number in range(12))


def test_what_another_could_not_do_meanwhile_is_not_tried_again(tmp_path):
    groups, tried = [["a", "b"], ["c"]], []

    def work_off(shared, work_fn):
        shared.work_off(
            groups, work_fn, name_fn=str, is_done_fn=lambda name: False, description="items"
        )

    with claims.Claims(tmp_path) as shared:
        files.append_sealed(tmp_path / claims.MANIFEST, {"items": ["a", "b"]})
        work_off(shared, tried.extend)
    assert tried == ["c"]
    with claims.Claims(tmp_path) as later:  # Which joins when all of it is over.
        work_off(later, tried.extend)
    assert tried == ["c", "a", "b", "c"]


def test_a_run_alone_works_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = []
    with claims.Claims(None) as shared, shared.hold("anything"):
        shared.work_off(
            [[1, 2], [3]], done.extend, name_fn=str, is_done_fn=(3).__eq__, description="items"
        )
    assert done == [1, 2] and not list(tmp_path.iterdir())


def test_file_systems_without_locks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "fcntl", None)
    with pytest.raises(OSError, match="claims"):
        claims.Claims(tmp_path)


def test_processes_of_one_job_do_not_join(tmp_path, monkeypatch):
    monkeypatch.setattr(claims.distributed, "process_count", lambda: 2)
    with pytest.raises(options.UsageError, match="--join"):
        claims.Claims(tmp_path / "new")
    assert not (tmp_path / "new").exists()
