import csv
import dataclasses
import errno
import fcntl
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from afr_jax.core import files


class _Pair(NamedTuple):
    first: int
    second: float


@dataclasses.dataclass(frozen=True)
class _Config:
    num_steps: int = 3
    rates: tuple[float, ...] = (0.1, 0.2)


@pytest.mark.parametrize(
    "value, expected",
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.nan, None),
        (-math.inf, None),
        (np.array([1.0, np.nan, np.inf]), [1.0, None, None]),
        (jnp.ones((2, 1), jnp.bfloat16), [[1.0], [1.0]]),
        (jnp.int32(4), 4),
        (_Pair(1, 2.0), {"first": 1, "second": 2.0}),
        (_Config(), {"num_steps": 3, "rates": [0.1, 0.2]}),
        ({1: (2, 3)}, {"1": [2, 3]}),
        ({"b", "a"}, ["a", "b"]),
        (pathlib.Path("a/b"), "a/b"),
        (None, None),
    ],
)
def test_to_jsonable(value, expected):
    result = files.to_jsonable(value)
    assert result == expected
    assert type(result) is type(expected)


def test_to_jsonable_rejects_what_json_cannot_say():
    with pytest.raises(TypeError, match="object"):
        files.to_jsonable({"a": object()})


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_lock_of_another_machine_is_waited_for(tmp_path, monkeypatch):
    """As of one that is gone, until the file server knows."""
    with open(tmp_path / ".lock", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b"process 7 on elsewhere:")
        other.flush()
        slept = []
        monkeypatch.setattr(time, "sleep", slept.append)
        with pytest.raises(files.InUseError, match="in use by process 7 on elsewhere: let it"):
            files.lock_folder(tmp_path)
        assert sum(slept) == 120
        monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(other, fcntl.LOCK_UN))
        assert files.lock_folder(tmp_path) is not None
    assert not (tmp_path / ".lock").exists()


def test_no_bit_of_a_sealed_file_changes_unseen(tmp_path):
    fields = {"name": "Zoë", "rate": 0.5, "pair": [1, None], "inner": {"a": True}}
    path = tmp_path / "a.json"
    files.write_sealed(path, fields)
    assert files.read_sealed(path) == fields
    whole, num_refused = path.read_bytes(), 0
    for number in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[number // 8] ^= 1 << number % 8
        path.write_bytes(changed)
        try:
            assert files.read_sealed(path) == fields  # A space became a tab, say.
        except ValueError:
            num_refused += 1
    assert num_refused > 6 * len(whole)


def test_damaged_arrays_are_an_error_and_never_others(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "names": np.array(["x", "yz"])}
    path = tmp_path / "a.npz"
    files.write_arrays(path, arrays)
    whole, num_harmless = path.read_bytes(), 0
    for number in range(0, 8 * len(whole), 3):
        changed = bytearray(whole)
        changed[number // 8] ^= 1 << number % 8
        path.write_bytes(changed)
        try:
            found = files.read_arrays(path)
        except ValueError as error:
            assert "damaged" in str(error)
        else:
            num_harmless += 1
            assert found.keys() == arrays.keys()
            for name in arrays:
                np.testing.assert_array_equal(found[name], arrays[name])
    assert num_harmless < len(whole)
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match="damaged"):
        files.read_arrays(path)
    with pytest.raises(FileNotFoundError):
        files.read_arrays(tmp_path / "none.npz")


def test_write_json_respects_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_csv_cells_are_read_back_as_they_were(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    rows = [("a,b", 1.5), ('with "quotes"', None), ("two\nlines", "ä")]
    files.write_csv(path, ("name", "value"), rows)
    with path.open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["name", "value"],
            ["a,b", "1.5"],
            ['with "quotes"', ""],
            ["two\nlines", "ä"],
        ]
    assert b"\r" not in path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_without_permission_is_told_by_the_name_of_the_file(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*/report\.json'"):
        files.write_json(tmp_path / "report.json", {})


def test_text_that_spreadsheets_would_run_is_marked_and_read_back(tmp_path):
    path = tmp_path / "table.csv"
    names = ["=1+1", "+a", "-a.jpg", "@sum", "\tb", "\rc", "'=x", "''@y", "-1.5", "plain", "'tis"]
    files.write_csv(path, ("name", "value"), [(name, -2.5) for name in names])
    with path.open(encoding="utf-8", newline="") as file:
        _, *cells = csv.reader(file)
    for name, (cell, value) in zip(names, cells, strict=True):
        is_number = name == "-1.5"
        assert is_number or cell[0] not in "=+-@\t\r"
        assert value == "-2.5"
    assert [row for _, row in files.read_csv(path, ["name"])] == [(name,) for name in names]
    # What is no formula is left as it is.
    assert [cell for cell, _ in cells[-3:]] == names[-3:]


def test_names_that_are_not_unicode_do_not_cost_a_table(tmp_path):
    path = tmp_path / "table.csv"
    files.write_csv(path, ("name",), [(os.fsdecode(b"caf\xe9"),), ("other",)])
    assert files.read_csv(path, ["name"])[1] == (3, ("other",))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_is_told_by_the_name_of_the_file(tmp_path, monkeypatch, number):
    """The system names no file when the disk is full."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=r"report\.json") as caught:
        files.write_json(tmp_path / "report.json", {})
    assert files.is_of_the_disk(caught.value) and not list(tmp_path.iterdir())
    monkeypatch.undo()
    with pytest.raises(OSError, match="nnn") as caught:
        files.write_json(tmp_path / ("n" * 300), {})
    assert not files.is_of_the_disk(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Failed writing: [OS error 28: No space left on device]"),
        RuntimeError("lance error: LanceError(IO): No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_by_name_whatever_a_library_makes_of_it(error):
    with pytest.raises(OSError, match="out/records") as caught, files.naming("out/records"):
        raise error
    assert files.is_of_the_disk(caught.value)


@pytest.mark.parametrize(
    "error", [ValueError("another"), files.InUseError("in use"), FileExistsError(17, "exists", "a")]
)
def test_other_errors_are_left_as_they_are(error):
    with pytest.raises(type(error)) as caught, files.naming("out"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("depth", [200_000, 400])
def test_json_without_end_is_damage(tmp_path, depth):
    """What the parser takes may still be too deep for who writes it again."""
    path = tmp_path / "record.json"
    path.write_text('{"a": ' + "[" * depth + "]" * depth + ', "checksum": 1}')
    with pytest.raises(ValueError, match="damaged"):
        files.read_sealed(path)


def test_a_shared_folder_is_no_folder_of_one_alone(tmp_path):
    hold = (
        "import pathlib, sys; from afr_jax.core import files;"
        "lock = files.lock_folder(sys.argv[1], is_shared=True);"
        "print('held', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(files.InUseError, match=f"process {other.pid} "):
            files.lock_folder(tmp_path)
        lock = files.lock_folder(tmp_path, is_shared=True)
        assert lock is not None
        other.communicate("\n")
    # Whoever leaves first takes nothing from the others.
    with pytest.raises(files.InUseError):
        files.lock_folder(tmp_path)
    del lock
    assert files.lock_folder(tmp_path) is not None
    assert not (tmp_path / ".lock").exists()
